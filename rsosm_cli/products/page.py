"""The map as one HTML page over its image: everything inline, nothing fetched from the network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsosm_cli.products.preview import percent
from rsosm_cli.products.view import RAMP, MapView, rgb
from rsosm_cli.workspace import write_text

_TEMPLATE = Path(__file__).parent / "assets" / "page.html"
JPEG_QUALITY = 80
BACKGROUND_ALPHA = 70  # of 255: the image shows under the class that stands back


def write_page(path: Path, view: MapView, numbers: Sequence[tuple[str, str]]) -> None:
    """Write the page of ``view``; ``numbers``: rows (label, value) of the table beside it."""
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in numbers)
    # `</` would end the script element from within a class name.
    data = json.dumps(_data(view), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        heading=html.escape(f"{view.title}: {view.city}"), title=html.escape(view.title), city=html.escape(view.city),
        numbers=rows, attribution=html.escape(view.attribution), data=data,
    )  # fmt: skip
    write_text(path, text)


def _data(view: MapView) -> dict[str, Any]:
    height, width = view.values.shape
    data: dict[str, Any] = {
        "width": width,
        "height": height,
        "metres": round(view.metres_per_pixel, 6),
        "corners": _corners(view),
        "outline": _outline(view),
        "map": _encoded(_grey(view), "PNG", optimize=True),
        "image": None if view.image is None else _encoded(view.image, "JPEG", quality=JPEG_QUALITY),
    }
    if view.is_classes:
        back = None if view.image is None else view.background
        data["colours"] = [[*rgb(e.colour), BACKGROUND_ALPHA if k == back else 255] for k, e in enumerate(view.legend)]
        data["legend"] = [
            {"name": e.name, "colour": e.colour, "share": "" if e.share is None else percent(e.share)}
            for e in view.legend
        ]
    else:
        stops = np.array([rgb(c) for c in RAMP], float)
        at = np.linspace(0, len(RAMP) - 1, 255)
        ramp = np.stack([np.interp(at, np.arange(len(RAMP)), stops[:, i]) for i in range(3)], axis=1)
        data |= {
            "colours": [[*c, 255] for c in ramp.round().astype(int).tolist()],
            "legend": None,
            "ramp": RAMP,
            "unit": view.unit,
        }
        data["low"], data["high"] = view.value_range
    return data


def _grey(view: MapView) -> NDArray[np.uint8]:
    """Return (H, W) one byte a pixel: the class, or the value in 255 steps; 255 for none."""
    if view.is_classes:
        return view.values.astype(np.uint8)
    low, high = view.value_range
    steps = np.clip((np.nan_to_num(view.values) - low) / (high - low), 0, 1) * 254
    return np.where(view.known, steps.round(), 255).astype(np.uint8)


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: Any) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def _corners(view: MapView) -> list[list[float]]:
    """Return (longitude, latitude) of the corners NW, NE, SW, SE."""
    from pyproj import Transformer

    west, south, east, north = view.bounds_m
    to_degrees = Transformer.from_crs(view.crs, "EPSG:4326", always_xy=True)
    lon, lat = to_degrees.transform([west, east, west, east], [north, north, south, south])
    return [[round(x, 7), round(y, 7)] for x, y in zip(lon, lat, strict=True)]


def _outline(view: MapView) -> str:
    """Return the place as an SVG path in pixels of the map, simplified to half a pixel."""
    if view.place is None:
        return ""
    import shapely

    west, _, _, north = view.bounds_m
    step = view.metres_per_pixel
    parts = []
    for line in shapely.get_parts(shapely.boundary(shapely.simplify(view.place, step / 2))):
        xy = shapely.get_coordinates(line)
        points = np.stack([(xy[:, 0] - west) / step, (north - xy[:, 1]) / step], axis=1)
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points.tolist()))
    return "".join(parts)
