"""The preview of a map: a PNG with title, legend, scale bar and north arrow, ready for a slide."""

from __future__ import annotations

import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rsosm_cli.products.view import RAMP, MapView
from rsosm_cli.workspace import atomic

DPI = 150
INK, MUTED, PAPER, LINE = "#1d2530", "#66707c", "#fbfaf7", "#d9d6cf"
MARGIN, PANEL, FOOT = 0.35, 2.65, 0.42  # inches
# Names of cities are in any script; the first of these fonts that has a glyph draws it.
_FONTS = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Arial Unicode MS", "WenQuanYi Zen Hei",
)  # fmt: skip


def draw_preview(path: Path, view: MapView) -> None:
    """Draw ``view`` and write it to ``path``, whole or not at all."""
    import matplotlib as mpl

    with mpl.rc_context({"font.family": font_family(), "font.size": 9, "text.color": INK}):
        figure, place = _figure(view)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            # A name in a script that no font of this machine has is drawn with boxes; the map is none the worse.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            canvas.draw()
    # The picture goes under what matplotlib drew: it would bring it to its own pixels in eight bytes a number.
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    sheet = Image.new("RGBA", drawn.size, PAPER)
    sheet.paste(_picture(view, place[2:]), place[:2])
    sheet.alpha_composite(drawn)
    facts = PngInfo()
    facts.add_text("Software", "rsosm")
    with atomic(path) as part, part.open("wb") as file:
        sheet.convert("RGB").save(file, "PNG", pnginfo=facts, dpi=(DPI, DPI))


def font_family() -> list[str]:
    """Return the fonts of this machine that names of cities are drawn with, the first that has a glyph."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in known] or ["sans-serif"]


def _figure(view: MapView) -> tuple[Figure, tuple[int, int, int, int]]:
    """Return all but the picture, and where that goes: left, top, width, height in pixels."""
    height, width = view.values.shape
    # The longer side of the map takes 7.5 inches; a narrow map still leaves room for the legend beside it.
    scale = 7.5 / max(height, width)
    map_w, map_h = width * scale, height * scale
    body = max(map_h, 3.6 + 0.27 * len(view.legend))
    size = (map_w + PANEL + 3 * MARGIN, body + 2 * MARGIN + FOOT)
    figure = Figure(figsize=size, dpi=DPI, facecolor="none")

    def axes(left: float, bottom: float, w: float, h: float) -> Axes:
        made = figure.add_axes((left / size[0], bottom / size[1], w / size[0], h / size[1]))
        made.set_axis_off()
        return made

    bottom = MARGIN + FOOT
    under = axes(MARGIN, bottom + body - map_h, map_w, map_h)
    _draw_frame(under, view)
    panel = axes(map_w + 2 * MARGIN, bottom, PANEL, body)
    panel.set_xlim(0, PANEL)
    panel.set_ylim(0, body)
    top = _heading(panel, view, body)
    if view.legend:
        _legend(panel, view, top)
    elif not view.is_classes:
        _ramp(panel, view, top)
    _scale_bar(panel, view.metres_per_pixel / scale)
    _north(panel, body)
    foot = axes(MARGIN, MARGIN * 0.5, size[0] - 2 * MARGIN, FOOT)
    foot.text(0, 0.5, _short(view.attribution, int(size[0] * 17)), color=MUTED, fontsize=7, va="center",
              transform=foot.transAxes)  # fmt: skip
    left, low, right, high = np.rint(under.get_window_extent().extents).astype(int).tolist()
    return figure, (left, int(figure.bbox.height) - high, max(1, right - left), max(1, high - low))


def _draw_frame(axes: Axes, view: MapView) -> None:
    west, south, east, north = view.bounds_m
    if view.place is not None:
        for ring in _rings(view.place):
            axes.plot(ring[:, 0], ring[:, 1], color="white", linewidth=2.2, alpha=0.8, solid_joinstyle="round")
            axes.plot(ring[:, 0], ring[:, 1], color=INK, linewidth=0.9, solid_joinstyle="round")
    axes.set_xlim(west, east)
    axes.set_ylim(south, north)
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=LINE, linewidth=1.0))


def _picture(view: MapView, size: tuple[int, int]) -> Image.Image:
    """Return the map over its image in ``size`` (width, height) pixels: averaged if smaller, else whole squares."""
    image = Image.fromarray(_composed(view))
    smaller = size[0] < image.width or size[1] < image.height
    return image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def _composed(view: MapView) -> NDArray[np.uint8]:
    """Return (H, W, 3): the image greyed, the map's colours over it; ground that is not mapped fades away."""
    colours = view.rgba()
    out = np.empty((*colours.shape[:2], 3), np.uint8)
    for top in range(0, len(out), 64):  # colours are mixed in numbers of eight bytes
        rows = slice(top, top + 64)
        out[rows] = _composed_rows(view, colours[rows].astype(float), rows)
    return out


def _composed_rows(view: MapView, colours: NDArray[np.float64], rows: slice) -> NDArray[np.uint8]:
    known = colours[..., 3:] > 0
    if view.image is None:
        return np.where(known, colours[..., :3], 244.0).astype(np.uint8)
    image = view.image[rows]
    grey = (image.astype(float) @ np.array([0.299, 0.587, 0.114]))[..., None]
    faded = 255 - (255 - (0.8 * grey + 0.2 * image)) * 0.5
    # A colour takes the image's light and shade, so that roofs and roads stay readable under it.
    shade = 0.72 + 0.5 * grey / 255
    mixed = 0.8 * colours[..., :3] * shade + 0.2 * grey
    if view.background is not None and view.is_classes:
        behind = (view.values[rows] == view.background)[..., None]
        mixed = np.where(behind, 0.25 * colours[..., :3] + 0.75 * image, mixed)
    return np.where(known, mixed, faded).clip(0, 255).astype(np.uint8)


def _rings(place: Any) -> list[NDArray[np.float64]]:
    import shapely

    lines = shapely.get_parts(shapely.boundary(place))
    return [shapely.get_coordinates(line) for line in lines]


def _heading(panel: Axes, view: MapView, top: float) -> float:
    """Write title and city at the top; return the height left below them, in inches."""
    lines = _wrapped(view.title, 20)
    y = top - 0.05
    for line in lines:
        panel.text(0, y, line, fontsize=15, fontweight="bold", va="top")
        y -= 0.29
    panel.text(0, y - 0.02, _short(view.city, 32), fontsize=10.5, color=MUTED, va="top")
    return y - 0.5


def _legend(panel: Axes, view: MapView, top: float) -> None:
    for row, entry in enumerate(view.legend):
        y = top - 0.27 * row
        panel.add_patch(
            FancyBboxPatch((0.02, y - 0.16), 0.24, 0.15, boxstyle="round,pad=0,rounding_size=0.03",
                           facecolor=entry.colour, edgecolor=INK, linewidth=0.4)
        )  # fmt: skip
        panel.text(0.38, y - 0.085, _short(entry.name, 22), va="center")
        if entry.share is not None:
            panel.text(PANEL - 0.15, y - 0.085, percent(entry.share), va="center", ha="right", color=MUTED)
    for row, line in enumerate(textwrap.wrap(view.note, 38)):
        y = top - 0.27 * len(view.legend) - 0.12 - 0.17 * row
        panel.text(0.02, y, line, va="top", color=MUTED, fontsize=8)


def _ramp(panel: Axes, view: MapView, top: float) -> None:
    low, high = view.value_range
    colours = LinearSegmentedColormap.from_list("ramp", RAMP)
    steps, tall = 120, 1.9
    for i in range(steps):
        panel.add_patch(
            Rectangle((0.02, top - tall + tall * i / steps), 0.24, tall / steps * 1.5, facecolor=colours(i / steps),
                      linewidth=0)
        )  # fmt: skip
    panel.add_patch(Rectangle((0.02, top - tall), 0.24, tall, fill=False, edgecolor=INK, linewidth=0.4))
    for share in (0, 0.5, 1):
        panel.text(0.38, top - tall + tall * share, f"{low + (high - low) * share:,.3g}", va="center")
    panel.text(0.02, top - tall - 0.22, _short(view.unit, 34), va="top", color=MUTED, fontsize=8.5)


def nice_length(metres: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is at most ``metres``."""
    base = 10.0 ** math.floor(math.log10(metres))
    return max(step * base for step in (1, 2, 5) if step * base <= metres * (1 + 1e-9))


def length_text(metres: float) -> str:
    return f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m"


def _scale_bar(panel: Axes, metres_per_inch: float) -> None:
    length = nice_length(1.9 * metres_per_inch)
    inches, y, tall = length / metres_per_inch, 0.1, 0.075
    for part in range(4):
        panel.add_patch(
            Rectangle((0.02 + inches * part / 4, y), inches / 4, tall, facecolor=INK if part % 2 == 0 else "white",
                      edgecolor=INK, linewidth=0.7)
        )  # fmt: skip
    for share, text in ((0.0, "0"), (0.5, length_text(length / 2)), (1.0, length_text(length))):
        panel.text(0.02 + inches * share, y + tall + 0.06, text, fontsize=7.5, va="bottom",
                   ha="left" if share == 0 else "center")  # fmt: skip


def _north(panel: Axes, body: float) -> None:
    x, y = 0.2, 0.62
    panel.add_patch(Polygon([(x, y + 0.5), (x - 0.14, y), (x, y + 0.12)], closed=True, facecolor=INK, linewidth=0))
    panel.add_patch(
        Polygon([(x, y + 0.5), (x + 0.14, y), (x, y + 0.12)], closed=True, facecolor="white", edgecolor=INK,
                linewidth=0.7)
    )  # fmt: skip
    panel.text(x, y + 0.55, "N", ha="center", va="bottom", fontsize=9.5, fontweight="bold")


def percent(share: float) -> str:
    """Return a share for a table: one decimal below ten percent, ``<0.1 %`` for what rounds to nothing."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _wrapped(text: str, most: int) -> list[str]:
    return [_short(line, most + 2) for line in textwrap.wrap(text, most)[:3]] or [""]
