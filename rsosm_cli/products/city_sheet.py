"""The sheet of a city's picture: squares on one raster of screen pixels, captions, scale bars, legend, credits."""

from __future__ import annotations

import textwrap
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import read_elements
from rsosm_cli.products.city_layers import BUILDING, KINDS, LAYERS, POINT, Box, Lines, kinds_of, layers_of, outlines
from rsosm_cli.products.city_preview import (
    CAPTION_PX,
    GAP_PX,
    OVERVIEW_PX,
    PANEL_PX,
    CityPicture,
    Ground,
    ground_text,
    middle_text,
)
from rsosm_cli.products.preview import INK, LINE, MUTED, PAPER, font_family, length_text, nice_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
MARGIN_PX, TITLE_PX = 24, 76
_THIN_FROM_M = 250.0  # width of a window from which its lines get thinner
_ROW_PX, _FOOT_LINE_PX = 24, 17
# Dark, so that the colours for photographs show on it, too, where there is no image.
GROUND = "#414b56"
_MARK = "#ff3b5c"
_WARNING = "#b3261e"


def sheet(picture: CityPicture) -> Figure:
    """Return the finished figure: overview left, one column (or two) of windows right."""
    drawn = _Sheet(picture)
    drawn.draw()
    return drawn.figure


def png(picture: CityPicture) -> bytes:
    """Return the sheet as a PNG."""
    import io

    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    with mpl.rc_context({"font.family": font_family(), "text.color": INK}), warnings.catch_warnings():
        # A name in a script that no font of this machine has is drawn with boxes; the rest is none the worse.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(sheet(picture)).print_png(out, metadata={"Software": "rsosm"}, pil_kwargs={"compress_level": 3})
    return out.getvalue()


class _Sheet:
    """Places things by screen pixels from the top left."""

    def __init__(self, picture: CityPicture) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.picture = picture
        self.panels = _panels(picture)
        columns = 1 + max((column for column, _, _, _ in self.panels), default=-1)
        self.width = 2 * MARGIN_PX + OVERVIEW_PX + columns * (GAP_PX + PANEL_PX)
        self.notes = [line for note in picture.notes for line in textwrap.wrap(note, self.width // 8)]
        self.credits = textwrap.wrap(picture.credits, self.width // 6)
        self.top = TITLE_PX + len(self.notes) * _ROW_PX + CAPTION_PX
        self.entries = _legend(picture)
        # About: how far letters run is known when they are drawn.
        rows = -(-sum(62 + 8.4 * len(name) for name, _, _ in self.entries) // (self.width - 2 * MARGIN_PX))
        self.legend_top = self.top + OVERVIEW_PX + 14
        self.height = int(self.legend_top + (rows + 0.7) * _ROW_PX) + len(self.credits) * _FOOT_LINE_PX + MARGIN_PX
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor=PAPER)
        self.canvas = FigureCanvasAgg(self.figure)

    def draw(self) -> None:
        picture = self.picture
        over = " over imagery" if picture.has_image else ""
        self._text(MARGIN_PX, 34, f"{picture.name}: OSM outlines{over}", 17, weight="bold")
        image = "no imagery"
        if picture.gsd_m is not None:
            image = f"image of {ground_text(picture.gsd_m)} a pixel, {picture.bands} band{'s' * (picture.bands > 1)}"
        count = 0 if picture.survey is None else int(picture.survey.counts.sum())
        said = (picture.crs, image, f"{count:,} OSM objects")
        self._text(MARGIN_PX, 60, "   ·   ".join(said), 10.5, colour=MUTED)
        for row, note in enumerate(self.notes):
            self._text(MARGIN_PX, TITLE_PX + 10 + row * _ROW_PX, note, 11, colour=_WARNING, weight="bold")
        self._overview()
        for column, y, number, outlined in self.panels:
            self._window(MARGIN_PX + OVERVIEW_PX + GAP_PX + column * (GAP_PX + PANEL_PX), y, number, outlined)
        self._legend()
        for row, line in enumerate(self.credits):
            y = self.height - MARGIN_PX - (len(self.credits) - 1 - row) * _FOOT_LINE_PX
            self._text(MARGIN_PX, y, line, 9, colour=MUTED)

    def _overview(self) -> None:
        import shapely

        picture, box = self.picture, self.picture.overview.box
        px_m = (box[2] - box[0]) / OVERVIEW_PX
        axes = self._panel(MARGIN_PX, self.top, OVERVIEW_PX, picture.overview)
        known = picture.survey
        if known is not None:
            by_kind = sorted(known.drawn.items(), key=lambda item: LAYERS[item[0]].kind)
            for i, lines in by_kind:
                wide = 1.1 if LAYERS[i].name in ("main roads", "secondary roads") else 0.7
                _lines(axes, lines, LAYERS[i].kind, wide, casing=0.9)
            if _spread(picture):
                _built_area(axes, known.spread, box)
        for ring in shapely.get_parts(shapely.boundary(picture.place)):
            xy = shapely.get_coordinates(ring)
            axes.plot(*xy.T, color=INK, lw=2.6, alpha=0.8)
            axes.plot(*xy.T, color="white", lw=1.2, dashes=(6, 3))
        for letter, window in zip("AB", picture.windows, strict=False):
            _mark(axes, window.box, letter, px_m)
        left_out = ", ".join(known.left_out) if known is not None else ""
        caption = f"The whole place, {ground_text(px_m)} a screen pixel"
        self._caption(MARGIN_PX, self.top, caption, f"not drawn here: {left_out}" if left_out else "", OVERVIEW_PX)
        axes.text(0.985, 0.985, "N ↑", transform=axes.transAxes, ha="right", va="top", fontsize=11, weight="bold",
                  bbox=_PLATE)  # fmt: skip

    def _window(self, x: int, y: int, number: int, outlined: bool) -> None:
        import shapely

        picture = self.picture
        window = picture.windows[number]
        axes = self._panel(x, self.top + y, PANEL_PX, window)
        if outlined and picture.osm is not None:
            elements = read_elements(picture.osm, picture.crs, window.box)
            kinds = kinds_of(layers_of(elements))
            thin = min(1.0, (_THIN_FROM_M / (window.box[2] - window.box[0])) ** 0.5)
            for code, kind in enumerate(KINDS[:POINT]):
                lines = outlines(elements, kinds == code, window.box, 0.0)
                _lines(axes, lines, code, thin * kind.width, casing=thin * 1.4)
            xy = shapely.get_coordinates(elements.geometry[kinds == POINT])
            axes.plot(
                xy[:, 0], xy[:, 1], "o", ms=4 * thin, color=KINDS[POINT].colour, mec=INK, mew=0.8 * thin, zorder=4
            )
        what = "outlines over the image" if outlined else "the image alone"
        what = what if picture.has_image else "outlines"
        where = middle_text(window.box, picture.crs) if outlined else ""
        self._caption(x, self.top + y, f"{'AB'[number]}  {what}", where, PANEL_PX)

    def _panel(self, x: int, y: int, px: int, ground: Ground) -> Axes:
        west, south, east, north = ground.box
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + px) / self.height, px / self.width, px / self.height), facecolor=GROUND
        )
        shown = np.dstack([ground.pixels, ground.valid.astype(np.uint8) * 255])
        axes.imshow(shown, extent=(west, east, south, north), origin="upper", interpolation="none", aspect="auto")
        axes.set(xlim=(west, east), ylim=(south, north), xticks=(), yticks=())
        for spine in axes.spines.values():
            spine.set(color=LINE, linewidth=0.8)
        length = nice_length((east - west) * (0.22 if px == OVERVIEW_PX else 0.3))
        x0, y0 = west + (east - west) * 14 / px, south + (north - south) * 16 / px
        axes.plot([x0, x0 + length], [y0, y0], color=INK, lw=6, solid_capstyle="butt", zorder=8)
        axes.plot([x0, x0 + length], [y0, y0], color="white", lw=3, solid_capstyle="butt", zorder=9)
        axes.text(x0 + length / 2, y0 + (north - south) * 9 / px, length_text(length), ha="center", va="bottom",
                  fontsize=9, bbox=_PLATE, zorder=9)  # fmt: skip
        return axes

    def _caption(self, x: int, y: int, left: str, right: str, px: int) -> None:
        made = self._text(x, y - CAPTION_PX / 2, left, 11, weight="bold")
        if right:
            width = self._text(x + px, y - CAPTION_PX / 2, right, 9, colour=MUTED, align="right")
            if width > px - made - 16:
                most = int(len(right) * (px - made - 16) / width) - 2
                self.figure.texts[-1].set_text(right[:most].rstrip(" ,") + "…")

    def _legend(self) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle

        axes = self.figure.add_axes((0, 0, 1, 1), zorder=5)
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        x, y = float(MARGIN_PX), float(self.legend_top + _ROW_PX / 2)
        for name, colour, shape in self.entries:
            text = axes.text(x + 34, y, name, fontsize=10.5, va="center")
            width = text.get_window_extent(self.canvas.get_renderer()).width
            if x + 34 + width > self.width - MARGIN_PX and x > MARGIN_PX:
                x, y = float(MARGIN_PX), y + _ROW_PX
                text.set_position((x + 34, y))
            axes.add_patch(Rectangle((x, y - 8), 26, 16, facecolor=GROUND, edgecolor=INK, linewidth=0.5))
            if shape == "point":
                axes.plot([x + 13], [y], "o", ms=4.5, color=colour, mec=INK, mew=0.8)
            elif shape == "box":
                axes.add_patch(Rectangle((x + 6, y - 5), 14, 10, fill=False, edgecolor=colour, linewidth=1.6))
            elif shape != "fill":
                line = Line2D([x + 3, x + 23], [y, y], color=colour, lw=2.2)
                if shape != "line":
                    line.set_dashes((3, 1.5) if shape == "dashed" else (1, 1))
                axes.add_line(line)
            x += 34 + width + 26

    def _text(
        self, x: float, y: float, text: str, size: float, *, colour: str = INK, weight: str = "normal",
        align: str = "left",
    ) -> float:  # fmt: skip
        made = self.figure.text(
            x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, weight=weight, ha=align, va="center"
        )
        return float(made.get_window_extent(self.canvas.get_renderer()).width)


_PLATE = {"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.85, "linewidth": 0}


def _panels(picture: CityPicture) -> list[tuple[int, int, int, bool]]:
    """Return the panels of the windows: column, pixels below the overview's top, window, whether with outlines."""
    below = PANEL_PX + GAP_PX + CAPTION_PX
    if not picture.has_image:
        return [(0, number * below, number, True) for number in range(len(picture.windows))]
    if len(picture.windows) == 1:
        return [(0, 0, 0, False), (0, below, 0, True)]
    return [(column, n * below, n, column == 1) for n in range(len(picture.windows)) for column in range(2)]


def _legend(picture: CityPicture) -> list[tuple[str, str, str]]:
    """Return name, colour and shape of what the sheet shows."""
    found: list[tuple[str, str, str]] = []
    if picture.survey is not None:
        counts = picture.survey.counts.tolist()
        for code in (5, 4, 3, 2, 1, 0, 6):  # as people look for them
            if counts[code]:
                kind = KINDS[code]
                found.append((f"{kind.name} {counts[code]:,}", kind.colour, "point" if code == POINT else "line"))
        if _spread(picture):
            found.append(("area with buildings", KINDS[BUILDING].colour, "dotted"))
    found.append(("boundary of the place", "white", "dashed"))
    if picture.windows:
        found.append(("window" if len(picture.windows) == 1 else "windows A and B", _MARK, "box"))
    if picture.has_image and not picture.overview.valid.all():
        found.append(("no image", GROUND, "fill"))
    return found


def _spread(picture: CityPicture) -> bool:
    """Return whether the overview tells only where buildings are, as they are too many to be drawn."""
    return picture.survey is not None and "buildings" in picture.survey.left_out


def _built_area(axes: Axes, spread: NDArray[np.int64], box: Box) -> None:
    """Draw the edge of the ground that has buildings."""
    there = np.pad((spread > 0).astype(float), 2)
    around = sum(np.roll(there, (dy, dx), axis=(0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    n, m = spread.shape
    step = (box[2] - box[0]) / m
    at = (np.arange(-2, m + 2) + 0.5) * step
    axes.contour(
        box[0] + at, box[1] + at[: n + 4], around, levels=[2.5], colors=KINDS[BUILDING].colour, linewidths=1.3,
        linestyles="dotted", zorder=3,
    )  # fmt: skip


def _mark(axes: Axes, box: Box, letter: str, px_m: float) -> None:
    """Draw the frame of a window and its letter; a small one is enlarged until it can be seen."""
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, max((box[2] - box[0]) / 2, 8 * px_m)
    xs, ys = np.array([-1, 1, 1, -1, -1]) * half + x, np.array([-1, -1, 1, 1, -1]) * half + y
    for colour, wide in (("white", 3.6), (_MARK, 1.8)):
        axes.plot(xs, ys, color=colour, lw=wide, zorder=6)
    axes.annotate(letter, (x - half, y + half), (2, 3), textcoords="offset points", color="white", weight="bold",
                  fontsize=11, va="bottom", zorder=7, annotation_clip=False,
                  bbox={"boxstyle": "round,pad=0.15", "facecolor": _MARK, "linewidth": 0})  # fmt: skip


def _lines(axes: Axes, lines: Lines, kind: int, width: float, *, casing: float) -> None:
    """Draw lines in the colour of their class on a dark seam, which bright roofs need."""
    from matplotlib.collections import LineCollection

    if kind == POINT:
        if lines:
            xy = np.concatenate(lines)
            axes.plot(xy[:, 0], xy[:, 1], "o", ms=1.5, color=KINDS[kind].colour, mec="none", zorder=4)
        return
    axes.add_collection(
        LineCollection(lines, colors="black", linewidths=width + casing, alpha=0.45, zorder=2 + kind / 10)
    )
    axes.add_collection(LineCollection(lines, colors=KINDS[kind].colour, linewidths=width, zorder=2.05 + kind / 10))
