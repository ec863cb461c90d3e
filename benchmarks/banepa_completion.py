"""Complete an incomplete map: buildings of Banepa, Nepal, of which half are given as OSM and half are withheld.

    python benchmarks/banepa_completion.py DATA_FOLDER [--quick] [--seeds N] [--root DIR]

DATA_FOLDER holds ``mosaic_0.3m.tif`` and ``buildings.geojson`` (the OSM buildings of the labelled block). A random half
of the buildings (seeded) is the graph; labels are all of them. The north of the block trains, the next strip
chooses the epoch, the southern rest tests. Pretraining and tag counts see neither withheld buildings nor test ground:
the place that is pretrained on ends a tile's width before it.

Reported on test ground, one split and the same seeds for all: image only, OSM only, fused, fused with positions in the
attention's values (`model.fusion_values=position`, pretrained alike), and the trivial answer "the given half,
rasterised"; each as IoU over all buildings and as recall on the withheld ones. Everything goes
through the functions that the commands call: fetch, build_graph, pretrain, finetune, map, evaluate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# Two cores are shared by torch and GDAL; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import geopandas
import numpy as np
import rasterio
import shapely
from rasterio.features import rasterize

from rsosm_cli.geometry import WGS84
from rsosm_cli.pipeline.build_graph import build_graph
from rsosm_cli.pipeline.evaluate import evaluate
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.finetune import finetune
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.pipeline.pretrain import pretrain
from rsosm_cli.settings import BuildSettings, MapSettings, PretrainSettings, TaskSettings, resolve

log = logging.getLogger("rsosm")

# The only labelled ground (lon, lat): outside it, buildings stand that nobody has drawn.
LABELLED = (85.518782, 27.629193, 85.523263, 27.634351)
UTM = "EPSG:32645"
# A patch of 16 pixels is 6.4 m, less than a house; training tiles overlap by half, as there are few.
GSD, TILE, STRIDE = 0.4, 128, 64
# Shares of the block from the north: training, choosing the epoch (two tiles wide, else no tile fits), testing.
TRAIN, VALIDATION = 0.42, 0.18
MODALITIES = ("image", "osm", "fused")
PLACED = "fused, placed values"
# Keys of the file that are not tags of OpenStreetMap.
NO_TAGS = ("osm_id", "osm_type", "label")


@dataclass(frozen=True)
class Ground:
    """The files that the experiment is made of."""

    imagery: Path
    buildings: Path  # all, the labels
    given: Path  # the half that is the map
    withheld: Path
    split: Path  # polygons with an attribute `split`
    test: Path  # test ground, cut to the labelled block
    apart: Path  # all imagery but test ground and a tile's width around it


def prepare(data: Path, folder: Path, seed: int) -> Ground:
    """Divide the buildings at random and the block from north to south; write what the commands read."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ("buildings", "given", "withheld", "split", "test", "apart")
    ground = Ground(data / "mosaic_0.3m.tif", *(folder / f"{name}.geojson" for name in files))
    if ground.apart.exists():  # written last; new files would have everything made anew
        return ground
    frame = geopandas.read_file(data / "buildings.geojson")
    number = frame["osm_id"]
    frame = frame.drop(columns=[c for c in NO_TAGS if c in frame.columns])
    given = np.zeros(len(frame), bool)
    given[np.random.default_rng(seed).permutation(len(frame))[: len(frame) // 2]] = True
    frame["osm_id"] = number
    for name, chosen in (("buildings", given | ~given), ("given", given), ("withheld", ~given)):
        kept = frame[chosen].drop(columns="osm_id")
        if name == "withheld":  # labels alone, never OSM: the class is named, as their task has no background
            kept = kept[["geometry"]].assign(**{"class": "building"})
        kept.to_file(folder / f"{name}.geojson", driver="GeoJSON")
    block = _local(shapely.box(*LABELLED))
    west, south, east, north = block.bounds
    height = north - south
    cuts = (north, north - TRAIN * height, north - (TRAIN + VALIDATION) * height, south)
    # Strips reach beyond the block: tiles at its rim have their centre outside.
    far = 1000.0
    strips = [
        shapely.box(west - far, low - (far if low == south else 0), east + far, high + (far if high == north else 0))
        for high, low in pairwise(cuts)
    ]
    _save(folder / "split.geojson", strips, split=["train", "validation", "test"])
    test = shapely.box(west, south, east, cuts[2])
    _save(folder / "test.geojson", [test])
    with rasterio.open(data / "mosaic_0.3m.tif") as source:
        image = geopandas.GeoSeries([shapely.box(*source.bounds)], crs=source.crs).to_crs(UTM).iloc[0]
    side = TILE * GSD
    _save(folder / "apart.geojson", [image.buffer(-side).difference(test.buffer(1.5 * side))])
    return ground


def _local(shape: shapely.Geometry) -> shapely.Geometry:
    return geopandas.GeoSeries([shape], crs=WGS84).to_crs(UTM).iloc[0].envelope


def _save(path: Path, shapes: list[shapely.Geometry], **columns: list[str]) -> None:
    geopandas.GeoDataFrame(columns, geometry=shapes, crs=UTM).to_crs(WGS84).to_file(path, driver="GeoJSON")


def settings_of(split: Path, quick: bool, seed: int) -> tuple[PretrainSettings, TaskSettings]:
    pre = resolve(
        PretrainSettings, kind="pretrain", preset="geolink-tiny",
        options={
            "model.image_size": TILE, "optim.epochs": 2 if quick else 8, "optim.warmup_epochs": 1, "seed": seed,
            # All of ViT-Ti, the paper's augmentation and weights: with these the table in docs/methods.md was measured.
            "model.image_depth": 12, "augment.colour": 0.4, "augment.turns": False, "text.tag_weight": "count",
        },
    )  # fmt: skip
    task = resolve(
        TaskSettings, kind="tasks", preset="building",
        options={
            "split.by": "file", "split.file": str(split), "split.block_m": TILE * GSD, "decoder_width": 64,
            "encoder_lr": 1.0, "optim.lr": 6e-4, "optim.epochs": 2 if quick else 12, "optim.warmup_epochs": 1,
            "optim.batch_size": 8, "seed": seed,
        },
    )  # fmt: skip
    return pre, task


def run(data: Path, root: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run the experiment under ``root``; finished steps are skipped. Return the table."""
    ground = prepare(data, root / "inputs", seed)
    pre, task = settings_of(ground.split, quick, seed)
    common = {"osm": [ground.given], "imagery": [str(ground.imagery)], "root": root}
    timed("fetch", fetch, "Banepa", bbox=LABELLED, **common)
    timed("fetch", fetch, "Banepa apart", boundary=ground.apart, **common)
    for city, stride in (("Banepa", STRIDE), ("Banepa apart", TILE)):
        grid = resolve(BuildSettings, options={"grid.tile": TILE, "grid.stride": stride, "grid.gsd": GSD})
        timed("build-graph", build_graph, city, root=root, settings=grid)
    encoder = timed("pretrain", pretrain, ["Banepa apart"], root=root, settings=pre, device="cpu", offline=True)
    compared = timed(
        "finetune", finetune, task, labels=[ground.buildings], labels_extent=LABELLED, cities=["Banepa"], root=root,
        compare=True, checkpoint=Path(encoder.paths["run"]), device="cpu", offline=True,
    )  # fmt: skip
    runs = {modality: Path(compared.paths[f"{modality}_run"]) for modality in MODALITIES}
    placed = pre.model_copy(update={"model": pre.model.model_copy(update={"fusion_values": "position"})})
    encoder = timed("pretrain", pretrain, ["Banepa apart"], root=root, settings=placed, device="cpu", offline=True)
    tuned = timed(
        "finetune", finetune, task, labels=[ground.buildings], labels_extent=LABELLED, cities=["Banepa"], root=root,
        checkpoint=Path(encoder.paths["run"]), device="cpu", offline=True,
    )  # fmt: skip
    runs[PLACED] = Path(tuned.paths["run"])
    rows: dict[str, dict[str, Any]] = {}
    for name, trained in runs.items():
        folder = root / "maps" / name.replace(", ", "-").replace(" ", "-")
        timed(
            f"map {name}", map_city, "building", "Banepa", root=root, output=folder, device="cpu", offline=True,
            checkpoint=trained, settings=MapSettings(),
        )  # fmt: skip
        rows[name] = score(folder / "building.tif", task, ground, root)
        rows[name]["tile IoU"] = _tile_iou(trained)
    trivial = root / "maps" / "given" / "building.tif"
    rasterise_given(root / "maps" / "fused" / "building.tif", ground.given, trivial)
    rows["given half, rasterised"] = score(trivial, task, ground, root)
    table = {"rows": rows, "split": {k: v for k, v in tuned.numbers.items() if "tiles" in k}, "seed": seed}
    (root / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


def score(path: Path, task: TaskSettings, ground: Ground, root: Path) -> dict[str, Any]:
    """Return IoU over all buildings and recall on the withheld ones, on test ground, with 95 % intervals by blocks."""
    kind: dict[str, Any] = {"map": path, "labels_extent": ground.test, "root": root, "held_out": False}
    every = evaluate(task, labels=[ground.buildings], output=path.parent / "all", **kind).numbers
    # Without a background class, the withheld buildings alone are labelled ground: the share found is their recall.
    found = evaluate(
        task.model_copy(update={"background": None}), labels=[ground.withheld], output=path.parent / "withheld", **kind
    ).numbers
    return {
        "IoU": every["iou/building"], "precision": every["precision/building"], "recall": every["recall/building"],
        "withheld recall": found["recall/building"],
    }  # fmt: skip


def _tile_iou(run_folder: Path) -> float:
    """Return the IoU that finetune itself reports, tile by tile, without blending."""
    facts = json.loads((run_folder / "manifest.json").read_text())
    return facts["numbers"]["iou/building"]


def rasterise_given(like: Path, given: Path, target: Path) -> None:
    """Write the given buildings as a map on the grid of another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(like) as source:
        shapes = geopandas.read_file(given).to_crs(source.crs).geometry
        values = rasterize([(s, 1) for s in shapes], out_shape=source.shape, transform=source.transform, dtype="uint8")
        profile = {
            "driver": "GTiff", "width": source.width, "height": source.height, "count": 1, "dtype": "uint8",
            "crs": source.crs, "transform": source.transform, "nodata": 255, "compress": "deflate",
        }  # fmt: skip
        with rasterio.open(target, "w", **profile) as out:
            out.write(values, 1)
            out.update_tags(RSOSM_TASK="building")


def timed(what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    started = time.monotonic()
    result = function(*args, **kwargs)
    print(f"{what:<16} {result.subject:<24} {result.status:<8} {time.monotonic() - started:7.1f} s", flush=True)
    return result


def show(tables: list[dict[str, Any]]) -> None:
    """Print means over the seeds, with the least and the greatest of them where there are several."""
    columns = ("IoU", "precision", "recall", "withheld recall", "tile IoU")
    print(f"\nTest ground, seeds {', '.join(str(t['seed']) for t in tables)}; {tables[0]['split']}")
    print(f"{'':<24}" + "".join(f"{c:>22}" for c in columns) + f"{'IoU / trivial':>16}")
    for name in tables[0]["rows"]:
        rows = [t["rows"][name] for t in tables]
        cells = "".join(f"{_spread([r[c] for r in rows]) if c in rows[0] else '':>22}" for c in columns)
        ratio = np.mean(
            [r["IoU"] / t["rows"]["given half, rasterised"]["IoU"] for r, t in zip(rows, tables, strict=True)]
        )
        print(f"{name:<24}{cells}{ratio:>16.2f}")


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with mosaic_0.3m.tif and buildings.geojson")
    parser.add_argument("--root", type=Path, help="where to work; kept, and resumed when given again")
    parser.add_argument("--quick", action="store_true", help="a few epochs: shows that the chain works, not how well")
    parser.add_argument("--seeds", type=int, default=1, help="how many: of the withheld half and of the training")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary)
        tables = [
            run(arguments.data, root / f"seed-{seed}", quick=arguments.quick, seed=seed)
            for seed in range(arguments.seeds)
        ]
    show(tables)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
