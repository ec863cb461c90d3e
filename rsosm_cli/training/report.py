"""One HTML file without anything outside it: text, tables, curves as SVG, pictures as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.workspace import write_text

# Okabe and Ito's palette: told apart by the colour-blind, too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.15rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
figure{display:inline-block;margin:.5rem 1rem .5rem 0}figcaption{font-size:.85rem;color:#555}
img{image-rendering:pixelated;max-width:100%}
.swatch{display:inline-block;width:.9em;height:.9em;border:1px solid #999;margin:0 .35em 0 1em;vertical-align:-.1em}
.warning{background:#fff3cd;border-left:4px solid #e69f00;padding:.5rem .8rem}
"""


class Report:
    """Collects the parts of a page in order."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def warning(self, text: str) -> None:
        self._parts.append(f'<p class="warning">{escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; numbers are set right."""
        head = "".join(f"<th>{escape(h)}</th>" for h in header)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Add a line of (name, ``#rrggbb``), each with a square of its colour."""
        parts = (f'<span class="swatch" style="background:{escape(c)}"></span>{escape(name)}' for name, c in entries)
        self._parts.append(f"<p>{''.join(parts)}</p>")

    def facts(self, facts: Mapping[str, object]) -> None:
        self.table(("", ""), [(k, v) for k, v in facts.items()])

    def curves(
        self,
        series: Mapping[str, Sequence[tuple[float, float]]],
        *,
        x: str,
        y: str,
        caption: str = "",
        log: bool = False,
    ) -> None:
        """Add one chart of lines: name to (x, y) points; points that are not finite are left out."""
        self._figure(line_chart(series, x=x, y=y, log=log), caption)

    def image(self, rgb: NDArray[np.uint8], caption: str = "", scale: int = 1) -> None:
        """Add an (H, W, 3) picture, each pixel shown ``scale`` times as large."""
        data = base64.b64encode(png(rgb)).decode()
        height, width = rgb.shape[:2]
        size = f'width="{width * scale}" height="{height * scale}"'
        self._figure(f'<img alt="{escape(caption)}" {size} src="data:image/png;base64,{data}">', caption)

    def _figure(self, content: str, caption: str) -> None:
        text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{content}{text}</figure>")

    def html(self) -> str:
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body><h1>{escape(self.title)}</h1>{''.join(self._parts)}</body></html>\n"
        )

    def write(self, path: Path) -> None:
        write_text(path, self.html())


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape(str(value))}</td>"
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f'<td class="n">{value:.4g}</td>'


def png(rgb: NDArray[np.uint8]) -> bytes:
    """Return an (H, W, 3) or (H, W) picture as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    width: int = 460,
    height: int = 280,
) -> str:
    """Return an SVG chart with a line and a legend entry a series."""
    clean = {
        name: [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log)]
        for name, points in series.items()
    }
    every = [p for points in clean.values() for p in points]
    if not every:
        return f"<p>{escape(y)}: nothing to draw.</p>"
    left, right, top, bottom = 58, 12, 12 + 16 * len(clean), 40
    x0, x1 = _spread(min(a for a, _ in every), max(a for a, _ in every))
    values = [math.log10(b) if log else b for _, b in every]
    y0, y1 = _spread(min(values), max(values))

    def at(a: float, b: float) -> tuple[float, float]:
        across = left + (a - x0) / (x1 - x0) * (width - left - right)
        down = height - bottom - ((math.log10(b) if log else b) - y0) / (y1 - y0) * (height - top - bottom)
        return across, down

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="11" fill="#444">']
    for tick in _ticks(y0, y1):
        _, down = at(x0, 10**tick if log else tick)
        label = f"{10**tick:.3g}" if log else f"{tick:.4g}"
        parts.append(f'<path d="M{left} {down:.1f}H{width - right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(x0, x1):
        across, _ = at(tick, every[0][1])
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    parts.append(f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="#888"/>')
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text transform="translate(12 {height / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    for i, (name, points) in enumerate(clean.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        line = " ".join("{:.1f},{:.1f}".format(*at(a, b)) for a, b in points)
        if len(points) == 1:
            across, down = at(*points[0])
            parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<rect x="{left}" y="{4 + 16 * i}" width="12" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18}" y="{9 + 16 * i}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
