"""A QGIS style (``.qml``) beside the map: class names and colours, or a colour ramp, as soon as it is opened."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from rsosm_cli.products.view import RAMP, LegendEntry
from rsosm_cli.workspace import write_text


def write_class_style(path: Path, legend: tuple[LegendEntry, ...]) -> None:
    """Write the style of a class raster."""
    root, renderer = _style("paletted")
    palette = ET.SubElement(renderer, "colorPalette")
    for value, entry in enumerate(legend):
        ET.SubElement(palette, "paletteEntry", value=str(value), label=entry.name, color=entry.colour, alpha="255")
    _write(path, root)


def write_value_style(path: Path, low: float, high: float, unit: str) -> None:
    """Write the style of a value raster: a ramp from ``low`` to ``high``."""
    root, renderer = _style("singlebandpseudocolor")
    renderer.set("classificationMin", f"{low:.6g}")
    renderer.set("classificationMax", f"{high:.6g}")
    shader = ET.SubElement(
        ET.SubElement(renderer, "rastershader"), "colorrampshader", colorRampType="INTERPOLATED", clip="0",
        classificationMode="1", minimumValue=f"{low:.6g}", maximumValue=f"{high:.6g}",
    )  # fmt: skip
    for i, colour in enumerate(RAMP):
        value = low + (high - low) * i / (len(RAMP) - 1)
        label = f"{value:,.4g} {unit}".strip()
        ET.SubElement(shader, "item", value=f"{value:.6g}", label=label, color=colour, alpha="255")
    _write(path, root)


def _style(kind: str) -> tuple[ET.Element, ET.Element]:
    root = ET.Element("qgis", version="3.22.0", styleCategories="AllStyleCategories")
    pipe = ET.SubElement(root, "pipe")
    renderer = ET.SubElement(pipe, "rasterrenderer", type=kind, band="1", opacity="1", alphaBand="-1", nodataColor="")
    ET.SubElement(renderer, "rasterTransparency")
    ET.SubElement(pipe, "rasterresampler", maxOversampling="2")
    ET.SubElement(root, "blendMode").text = "0"
    return root, renderer


def _write(path: Path, root: ET.Element) -> None:
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    write_text(path, f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{text}\n")
