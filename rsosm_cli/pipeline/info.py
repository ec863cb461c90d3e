"""``info``: what any file of ours holds and where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsosm_cli.errors import FormatError, MissingError, NoFileError, SourceError, UsageError
from rsosm_cli.pipeline.overview import describe_city, folder_bytes, overview, sources_of
from rsosm_cli.pipeline.result import Result
from rsosm_cli.workspace import CityFiles, Manifest, Workspace


def info(
    file: Path | None = None,
    *,
    root: Path | None = None,
    tile: int | None = None,
    preview: Path | None = None,
    city: str | None = None,
    epoch: str | None = None,
    check: bool = False,
) -> Result | list[Result]:
    """Return what ``file`` holds; without it, one result a city and a run under ``root``, with the next step of each.

    ``city``: what is known of it; with ``preview`` its OSM outlines over its image (of ``epoch``) are drawn to a PNG,
    to check that they lie on each other. ``tile``: number of a tile of a ``tiles.h5``, or of the city's; ``preview``:
    a PNG to draw that tile to. ``check``: compare the images of a ``tiles.h5``, too, with their checksums (its other
    arrays always are).
    Raises :class:`MissingError` where there is no such file, :class:`FormatError` where it is damaged or not
    ours.
    """
    if city is not None:
        if file is not None:
            raise UsageError(f"--city {city} and {file} both say what to tell of.", hint="Give one of them.")
        if tile is not None:  # of its store
            store = Workspace.at(root).require(city).tiles
            if not store.exists():
                raise MissingError(f"{city} has no tiles.h5.", hint=f"Make it: rsosm build-graph --city {city}")
            return _tile(store, tile, preview)
        return _of_city(Workspace.at(root).require(city), preview, epoch)
    if file is None:
        if tile is not None or preview is not None:
            raise UsageError("--tile and --preview need a file or a city.", hint="Name a tiles.h5, or a --city.")
        base = Workspace.at(root).root
        if not base.is_dir():
            raise MissingError(
                f"There is no folder {base}.", hint="Begin with `rsosm demo` or `rsosm fetch --city NAME`."
            )
        return overview(base)
    if not file.exists():
        raise NoFileError(f"There is no file {file}.", hint="`rsosm info` lists what is there.", path=str(file))
    if tile is not None or preview is not None:
        return _tile(file, tile, preview)
    if file.is_dir():
        return _folder(file)
    if file.suffix in (".h5", ".hdf5"):
        return _hdf5(file, check)
    if check:
        raise UsageError(f"{file.name} has no checksums to compare.", hint="Name a tiles.h5.")
    describe = _KINDS.get(file.suffix.lower())
    if describe is None:
        known = ", ".join(sorted({".h5", *_KINDS}))
        raise UsageError(f"{file.name} is no file that rsosm writes.", hint=f"It reads {known}, cities and runs.")
    numbers, notes = describe(file)
    return _result(file, numbers, notes)


def _of_city(files: CityFiles, preview: Path | None, epoch: str | None) -> Result:
    told = describe_city(files, None)
    if preview is None:
        return told
    from rsosm_cli.places.place import read_place
    from rsosm_cli.products.city_preview import draw_city

    image = files.imagery_of(epoch)
    if epoch is not None and not image.exists():
        known = ", ".join(files.epochs()) or "none"
        raise MissingError(f"{files.name} has no imagery of the epoch {epoch}.", hint=f"It has: {known}.")
    there = image if image.exists() else None
    made = _place_for(preview)
    shown, notes = draw_city(
        files.name, read_place(files.place).geometry, files.osm, there, preview,
        sources=sources_of(files.manifest.read(), files.place, files.osm, image),
    )  # fmt: skip
    paths = {**told.paths, "preview": str(preview)}
    return replace(told, paths=paths, numbers={**told.numbers, **shown}, notes=notes + made + told.notes)


def _place_for(preview: Path) -> tuple[str, ...]:
    """Check the name of a picture before it is made; return a note where its folder is made for it."""
    if preview.suffix.lower() != ".png" or preview.is_dir():
        raise UsageError(f"--preview {preview} is no name of a PNG.", hint="Give a file that ends in .png.")
    folder = preview.parent
    return () if folder.is_dir() else (f"The folder {folder} was not there and was made.",)


def _result(file: Path, numbers: dict[str, Any], notes: tuple[str, ...] = ()) -> Result:
    size = folder_bytes(file) if file.is_dir() else file.stat().st_size
    return Result("info", file.name, "done", {"path": str(file)}, {"size_bytes": size, **numbers}, notes)


def _folder(folder: Path) -> Result | list[Result]:
    if (folder / "model.json").exists():
        return _result(folder, *_model(folder / "model.json"))
    if folder.name in ("maps", "checkpoints") and (folder.parent / "manifest.json").exists():
        folder = folder.parent
    # A comparison is a folder among the runs with a report alone.
    named = folder.parent.name == "runs" and any((folder / name).exists() for name in ("config.yaml", "report.html"))
    if (folder / "checkpoints").is_dir() or named:
        return _run(folder)
    if (folder / "manifest.json").exists():
        name = Manifest(folder / "manifest.json").read().get("name") or folder.name
        return describe_city(CityFiles(str(name), folder), None)
    if (folder / "cities").is_dir() or (folder / "runs").is_dir():
        return overview(folder)
    raise FormatError(f"{folder} is no city, run, checkpoint or root of rsosm.", path=str(folder))


def _run(folder: Path) -> Result:
    facts = Manifest(folder / "manifest.json").read()
    numbers = {k: v for k, v in facts.items() if isinstance(v, (str, int, float, bool))}
    paths = {p.name: str(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".")}
    notes: tuple[str, ...] = ()
    for which in ("best", "last"):
        model = folder / "checkpoints" / which / "model.json"
        if model.exists():
            more, notes = _model(model)
            numbers |= {k: v for k, v in more.items() if k not in numbers}
            break
    return Result("info", folder.name, "done", paths, {"size_bytes": folder_bytes(folder), **numbers}, notes)


def _hdf5(file: Path, check: bool) -> Result:
    import h5py

    try:
        with h5py.File(file, "r") as data:
            if str(data.attrs.get("format", "")) != "rsosm embeddings":
                described: dict[str, Any] | None = None
            else:
                described = {k: _plain(v) for k, v in data.attrs.items() if _short(v)}
                for name, item in data.items():
                    if isinstance(item, h5py.Dataset):
                        described[name] = f"{' x '.join(str(n) for n in item.shape)} {item.dtype}"
    except OSError as error:
        raise FormatError(
            f"{file} is damaged or no HDF5 file.", hint="Make it again with --force.", path=str(file)
        ) from error
    if described is None:
        from rsosm_cli.tiles.describe import describe

        described = describe(file, images=check)  # refuses what is no store of ours
    return _result(file, described)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def _short(value: Any) -> bool:
    return len(str(value)) <= 80


def _tile(file: Path, tile: int | None, preview: Path | None) -> Result:
    from rsosm_cli.products.tile_preview import draw_tile
    from rsosm_cli.tiles.describe import describe_tile

    if file.suffix != ".h5":
        raise UsageError(f"{file.name} has no tiles to draw.", hint="Name a tiles.h5.")
    number = 0 if tile is None else tile
    numbers = describe_tile(file, number)
    paths = {"path": str(file)}
    notes: tuple[str, ...] = ()
    if preview is not None:
        notes = _place_for(preview)
        draw_tile(file, number, preview)
        paths["preview"] = str(preview)
    return Result("info", f"{file.name}, tile {number}", "done", paths, numbers, notes)


Described = tuple[dict[str, Any], tuple[str, ...]]


def _parquet(file: Path) -> Described:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        parquet = pq.ParquetFile(file)
        numbers: dict[str, Any] = {"rows": parquet.metadata.num_rows, "row_groups": parquet.metadata.num_row_groups}
        numbers["columns"] = ", ".join(parquet.schema_arrow.names)
        if "kind" in parquet.schema_arrow.names:
            counts = parquet.read(["kind"]).column("kind").value_counts().to_pylist()
            numbers["elements"] = {str(c["values"]): int(c["counts"]) for c in counts}
        geo = json.loads((parquet.schema_arrow.metadata or {}).get(b"geo", b"{}"))
    except (ArrowException, OSError) as error:
        raise FormatError(f"{file} is damaged or no Parquet file.", path=str(file)) from error
    column = geo.get("columns", {}).get(geo.get("primary_column", ""), {})
    if column.get("bbox"):
        numbers["bounds_deg"] = [round(float(v), 5) for v in column["bbox"]]
    return numbers, ()


def _raster(file: Path) -> Described:
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(file) as raster:
            numbers = {
                "pixels": f"{raster.width} x {raster.height}",
                "bands": raster.count,
                "type": raster.dtypes[0],
                "crs": raster.crs.to_string() if raster.crs else "none",
                "gsd_m": _ground_px_m(file) if raster.crs else None,
                "nodata": raster.nodata,
                "overviews": len(raster.overviews(1)),
            }
            tags = {k.lower(): v for k, v in raster.tags().items() if k not in ("AREA_OR_POINT",)}
    except RasterioIOError as error:
        raise FormatError(f"{file} is damaged or no raster.", path=str(file)) from error
    return numbers | {k: v for k, v in tags.items() if _short(v)}, ()


def _ground_px_m(file: Path) -> float | None:
    """Return the metres on the ground of a pixel's side in a raster's middle; None where it lies nowhere."""
    import shapely

    from rsosm_cli.geometry import utm_crs
    from rsosm_cli.imagery.raster import inspect
    from rsosm_cli.imagery.reader import gsd_in

    try:
        raster = inspect(str(file))
        return round(gsd_in(raster, utm_crs(shapely.box(*raster.bounds_wgs84()))), 4)
    except (SourceError, UsageError):  # no position on the ground, nothing but alpha, or too near a pole
        return None


def _vector(file: Path) -> Described:
    import pyogrio
    from pyogrio.errors import DataSourceError

    try:
        layers = {str(name): pyogrio.read_info(file, layer=name) for name, _ in pyogrio.list_layers(file)}
    except DataSourceError as error:
        raise FormatError(f"{file} is damaged or no vector file.", path=str(file)) from error
    numbers: dict[str, Any] = {}
    for name, layer in layers.items():
        numbers[name] = f"{layer['features']:,} {layer['geometry_type'] or 'rows'}, {layer['crs']}"
        numbers[f"{name} fields"] = ", ".join(layer["fields"])
    return numbers, ()


def _geojson(file: Path) -> Described:
    numbers, notes = _vector(file)
    features = json.loads(file.read_text(encoding="utf-8")).get("features", ())
    if len(features) == 1:  # a place: what is said of it
        said = features[0].get("properties") or {}
        numbers |= {k: v for k, v in said.items() if v is not None and _short(v)}
    return numbers, notes


def _json(file: Path) -> Described:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} is damaged: it is no JSON.", path=str(file)) from error
    if file.name == "model.json":
        return _model(file)
    if not isinstance(data, dict):
        return {"entries": len(data)}, ()
    if data.get("type") == "FeatureCollection":
        return _vector(file)
    facts = data["properties"] if data.get("type") == "Feature" else data
    return {k: v for k, v in facts.items() if _short(v)}, ()


def _weights(file: Path) -> Described:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            count = sum(_product(tensors.get_slice(n).get_shape()) for n in names)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is damaged or no safetensors file.", path=str(file)) from error
    numbers = {"tensors": len(names), "parameters": count}
    described = file.with_name("model.json")
    if described.exists():
        more, notes = _model(described)
        return numbers | more, notes
    return numbers, ()


def _picture(file: Path) -> Described:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return {"pixels": f"{picture.width} x {picture.height}", "mode": picture.mode}, ()
    except UnidentifiedImageError as error:
        raise FormatError(f"{file} is damaged or no picture.", path=str(file)) from error


def _table(file: Path) -> Described:
    import csv

    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.reader(text))
    return {"rows": max(len(rows) - 1, 0), "columns": ", ".join(rows[0]) if rows else ""}, ()


def _yaml(file: Path) -> Described:
    from rsosm_cli.settings import load_yaml

    return {k: v for k, v in load_yaml(file).items() if _short(v)}, ()


def _page(file: Path) -> Described:
    return {"lines": len(file.read_text(encoding="utf-8").splitlines())}, ()


def _product(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _model(file: Path) -> Described:
    """Return the main lines of a checkpoint's description."""
    data = json.loads(file.read_text(encoding="utf-8"))
    numbers = {k: v for k, v in data.items() if isinstance(v, (str, int, float, bool)) and _short(v)}
    model, task, text = (data.get(k) or {} for k in ("model", "task", "text"))
    numbers |= {k: model[k] for k in ("image_encoder", "osm_encoder", "image_size") if k in model}
    if isinstance(text, dict) and "encoder" in text:
        numbers["text_encoder"] = text["encoder"]
    if isinstance(task, dict) and task.get("name"):
        numbers["task"] = task["name"]
        numbers["classes"] = ", ".join(c["name"] for c in task.get("classes", [])) or task.get("unit", "")
    metrics = data.get("metrics")
    if isinstance(metrics, dict):
        numbers |= {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return numbers, ()


_KINDS: dict[str, Callable[[Path], Described]] = {
    ".parquet": _parquet,
    ".tif": _raster,
    ".vrt": _raster,
    ".gpkg": _vector,
    ".geojson": _geojson,
    ".json": _json,
    ".safetensors": _weights,
    ".png": _picture,
    ".csv": _table,
    ".yaml": _yaml,
    ".html": _page,
    ".qml": _page,
}
