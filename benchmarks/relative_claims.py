"""The relative claims of the GeoLink paper, tried on a small scale: which direction, and how sure.

    python benchmarks/relative_claims.py [--root DIR] [--quick]                       # a made-up town, land use
    python benchmarks/relative_claims.py --site banepa --data DATA_FOLDER [--root DIR] # half-mapped buildings of Banepa

Every row is one comparison on one split of the ground, with the same seeds on both sides (three by default), beside the
direction that the paper reports. The made-up town is not built to favour fusion: fields, forest, water and most houses
show in the picture; what a closed row of houses holds only OSM can tell; and a part of the blocks is mapped by nobody,
so that neither source has it. Banepa's task (``banepa_completion.py``) completes a map of which half is given.

Most rows train a head on frozen features, which shows what the encoder holds, and takes minutes on a CPU: a linear one
on the town, UPerNet on Banepa, where houses are smaller than the patches that a linear layer tells apart. The rows
about pretraining against none fine-tune the whole model. Each encoder is pretrained once: the seeds are those of the
head and of the order of the tiles, so the errors do not hold what another pretraining would give.

Everything goes through the functions that the commands call, and what is finished under ``--root`` is not done again,
so that a long run can be taken in pieces (``--minutes``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import numpy as np

from rsosm_cli.pipeline.build_graph import build_graph
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.finetune import finetune
from rsosm_cli.pipeline.pretrain import pretrain
from rsosm_cli.settings import BuildSettings, FetchSettings, PretrainSettings, TaskSettings, resolve

PRETRAINED = {
    "ours": {},
    "reconstruction": {"model.contrastive_weight": 0.0, "model.node_weight": 0.0},
    "no position": {"model.fusion_position": False},
    "placed": {"model.fusion_values": "position"},
    "released": {"model.compat": "released", "text.tag_weight": "log"},
}
STORES = {
    "ours": {},
    "half": {"graph.perturb.drop_objects": 0.5},
    "released": {"graph.compat": "released"},
}


@dataclass(frozen=True)
class Arm:
    """One way of training: tiles, pretraining, and what of the task is different."""

    store: str = "ours"
    encoder: str | None = "ours"  # None: from scratch
    options: dict[str, Any] = field(default_factory=dict)
    label_share: float = 1.0
    protocol: str = "frozen"


ARMS = {
    "fused": Arm(),
    "image only": Arm(options={"modality": "image"}),
    "OSM only": Arm(options={"modality": "osm"}),
    "fused, reconstruction alone": Arm(encoder="reconstruction"),
    "image only, reconstruction alone": Arm(encoder="reconstruction", options={"modality": "image"}),
    "fused, half of the objects": Arm(store="half"),
    "fused, no fusion position": Arm(encoder="no position"),
    "fused, placed values": Arm(encoder="placed"),
    "fused, 10 % of the labels": Arm(label_share=0.1),
    "image only, 10 % of the labels": Arm(options={"modality": "image"}, label_share=0.1),
    "fused, graphs shuffled": Arm(store="shuffled"),
    "fused, released settings": Arm(store="released", encoder="released"),
    "fused, fine-tuned": Arm(protocol="finetune"),
    "fused, from scratch": Arm(encoder=None, protocol="scratch"),
    "image only, fine-tuned": Arm(options={"modality": "image"}, protocol="finetune"),
    "image only, from scratch": Arm(encoder=None, options={"modality": "image"}, protocol="scratch"),
}
# (claim, the one that should win, the other, what the paper reports)
CLAIMS = (
    ("fusion beats the image alone", "fused", "image only", "60.0 against 55.4 (UFZ mIoU)"),
    ("fusion beats OSM alone", "fused", "OSM only", "not reported"),
    ("pretraining beats scratch, fused", "fused, fine-tuned", "fused, from scratch", "pretraining helps throughout"),
    ("pretraining beats scratch, image", "image only, fine-tuned", "image only, from scratch",
     "pretraining helps throughout"),
    ("three losses beat reconstruction, fused", "fused", "fused, reconstruction alone", "three losses win"),
    ("three losses beat reconstruction, image", "image only", "image only, reconstruction alone", "three losses win"),
    ("all objects beat half of them", "fused", "fused, half of the objects", "60.0 against 57.4: little is lost"),
    ("fusion positions help", "fused", "fused, no fusion position", "60.0 against 56.2: much is lost"),
    ("positions in the values help", "fused, placed values", "fused", "not in the paper"),
    ("with them fusion beats the image alone", "fused, placed values", "image only", "not in the paper"),
    ("all labels beat 10 %", "fused", "fused, 10 % of the labels", "60.0 against 53.1"),
    ("with 10 % of the labels fusion helps", "fused, 10 % of the labels", "image only, 10 % of the labels",
     "53.1 against less"),
    ("own graphs beat shuffled ones", "fused", "fused, graphs shuffled", "a control: must hold"),
    ("our settings beat the released ones", "fused", "fused, released settings", "not reported"),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """The ground of an experiment: how its files are made, and the task on it."""

    name: str
    pretrained_on: str  # city
    trained_on: str
    labels: Path
    extent: Any
    grid: dict[str, Any]
    pretrained_grid: dict[str, Any]
    pretraining: PretrainSettings
    task: TaskSettings
    metric: str
    frozen: dict[str, Any]  # settings of heads on frozen features


def town(root: Path, quick: bool, tiles: int, epochs: int) -> Site:
    from rsosm_cli.town.make import Town, make_town

    folder = root / "town"
    if not (folder / "landuse.geojson").exists():
        make_town(folder, seed=1, tiles=8 if quick else tiles)
    made = Town.at(folder)
    fetch(
        made.name, root=root, osm=[str(made.osm)], imagery=[str(made.imagery)], settings=FetchSettings(), offline=True
    )
    grid = {"grid.tile": 112, "grid.stride": 112, "grid.gsd": 1.2}
    pretraining = resolve(
        PretrainSettings, kind="pretrain", preset="geolink-tiny",
        options={"optim.epochs": 1 if quick else epochs, "optim.warmup_epochs": 1.0},
    )  # fmt: skip
    task = resolve(
        TaskSettings, kind="tasks", preset="landuse",
        options={
            "optim.epochs": 1 if quick else 2 * epochs, "optim.lr": 1e-3, "encoder_lr": 0.3,
            "split.block_m": 403.2, "optim.batch_size": 16, "decoder": "linear",
        },
    )  # fmt: skip
    overlapping = {**grid, "grid.stride": 56}  # four views of each place
    # A linear layer alone bears, and wants, a higher rate and more passes.
    frozen = {"optim.lr": 1e-2, "optim.epochs": 2 * task.optim.epochs}
    return Site("town", made.name, made.name, made.labels, None, grid, overlapping, pretraining, task, "miou", frozen)


def banepa(data: Path, root: Path, quick: bool, epochs: int) -> Site:
    sys.path.insert(0, str(Path(__file__).parent))
    import banepa_completion as b

    ground = b.prepare(data, root / "inputs", 0)
    _, task = b.settings_of(ground.split, quick, 0)
    task = task.model_copy(update={"optim": task.optim.model_copy(update={"epochs": 1 if quick else epochs})})
    pretraining = resolve(
        PretrainSettings, kind="pretrain", preset="geolink-tiny",
        options={"model.image_size": b.TILE, "optim.epochs": 1 if quick else epochs, "optim.warmup_epochs": 1.0},
    )  # fmt: skip
    common = {"osm": [ground.given], "imagery": [str(ground.imagery)], "root": root}
    fetch("Banepa", bbox=b.LABELLED, **common)
    fetch("Banepa apart", boundary=ground.apart, **common)
    grid = {"grid.tile": b.TILE, "grid.stride": b.STRIDE, "grid.gsd": b.GSD}
    return Site(
        "banepa", "Banepa apart", "Banepa", ground.buildings, b.LABELLED, grid, {**grid, "grid.stride": b.TILE},
        pretraining, task, "iou/building", {"optim.lr": 2e-3},  # a head alone bears, and wants, a higher rate
    )  # fmt: skip


class Bench:
    """Runs arms, remembers what is done, and stops when its time is up."""

    def __init__(self, site: Site, root: Path, seeds: int, minutes: float | None) -> None:
        self.site, self.root, self.seeds = site, root, seeds
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    def timed(self, what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.until is not None and time.monotonic() > self.until:
            raise TimeoutError(what)
        started = time.monotonic()
        result = function(*args, **kwargs)
        print(f"{what:<44} {result.status:<8} {time.monotonic() - started:7.1f} s", flush=True)
        return result

    def store(self, name: str, *, pretraining: bool = False) -> Path:
        from rsosm_cli.workspace import Workspace, slug

        site = self.site
        city, grid = (site.pretrained_on, site.pretrained_grid) if pretraining else (site.trained_on, site.grid)
        files = Workspace(self.root).city(city)
        path = self.root / "stores" / f"{slug(city)}-{slug(name)}{'-pretraining' * pretraining}.h5"
        if name == "shuffled":
            if not path.exists():
                shuffle_graphs(self.store("ours"), path)
            return path
        settings = resolve(BuildSettings, options={**grid, **STORES[name]})
        self.timed(
            f"tiles: {name}, {city}", build_graph, osm=files.osm, imagery=files.imagery, output=path,
            settings=settings, root=self.root,
        )  # fmt: skip
        return path

    def encoder(self, name: str) -> Path:
        settings = PretrainSettings.model_validate(_merged(self.site.pretraining.model_dump(), PRETRAINED[name]))
        tiles = self.store("released" if name == "released" else "ours", pretraining=True)
        result = self.timed(
            f"pretraining: {name}", pretrain, tiles=[tiles], root=self.root, settings=settings, device="cpu",
            offline=True, name=f"pretrain-{name}",
        )  # fmt: skip
        return Path(result.paths["run"])

    def run(self, name: str) -> list[float]:
        """Return the metric on test ground, one a seed."""
        arm = ARMS[name]
        # From scratch is the architecture of the pretrained one, drawn anew.
        encoder = self.encoder(arm.encoder or "ours")
        options = {**arm.options, "protocol": arm.protocol}
        if arm.protocol == "frozen":
            options |= self.site.frozen
        task = TaskSettings.model_validate(_merged(self.site.task.model_dump(), options))
        tiles = self.store(arm.store)
        run = f"{self.site.name}-{name}"
        result = self.timed(
            f"training: {name}", finetune, task, labels=[self.site.labels], labels_extent=self.site.extent,
            tiles=[tiles], checkpoint=encoder, root=self.root, seeds=self.seeds, label_share=arm.label_share,
            device="cpu", offline=True, name=run.replace("%", "percent"),
        )  # fmt: skip
        import csv

        with open(result.paths["metrics"], newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["part"] == "test" and r["metric"] == self.site.metric]
        return [float(r["value"]) for r in rows]


def _merged(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        *groups, last = key.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        if last == "compat":  # the keys that it sets are not there as explicit values
            inner = values[groups[0]] = {
                k: v for k, v in inner.items()
                if k not in ("type_attention", "edge_dim", "osm_norm", "patch_centre", "objects_max")
            }  # fmt: skip
        inner[last] = value
    return values


def shuffle_graphs(source: Path, target: Path) -> None:
    """Write a store in which every tile has the graph of another one."""
    from rsosm_cli.tiles.parts import assemble, image_part, write_part
    from rsosm_cli.tiles.store import TileStore

    store = TileStore.open(source)
    n = len(store)
    other = np.roll(np.random.default_rng(0).permutation(n), 1)
    order = np.empty(n, np.int64)
    order[np.roll(other, 1)] = other  # a cycle through all tiles: none keeps its own
    part = target.with_suffix(".npz")
    part.parent.mkdir(parents=True, exist_ok=True)
    with image_part(part, n, (len(store.bands), store.tile_px, store.tile_px)) as out:
        for start in range(0, n, 64):
            out.append(store.images(np.arange(start, min(start + 64, n))))
    write_part(
        part, store.graphs(order), list(zip(store.tags, store.tag_keys, strict=True)), cells=store.cells,
        bounds_m=store.bounds_m, image_share=store.image_share, numbers={},
    )  # fmt: skip
    assemble(
        target, [part], settings=store.settings, crs=store.crs, gsd_m=store.gsd_m, provenance=store.provenance,
        has_images=True,
    )  # fmt: skip
    for file in target.parent.glob(f"{target.stem}*.np[yz]"):
        file.unlink()


def verdict(better: list[float], worse: list[float]) -> tuple[float, float, str]:
    """Return the mean difference of paired seeds, its standard error, and what it says (two standard errors)."""
    apart = np.array(better) - np.array(worse)
    error = float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else float("nan")
    mean = float(apart.mean())
    if np.isnan(error) or abs(mean) < 2 * error or abs(mean) < 1e-9:
        return mean, error, "not told apart"
    return mean, error, "holds" if mean > 0 else "the other way"


def show(site: Site, found: dict[str, list[float]], seeds: int) -> None:
    print(f"\n{site.name}: {site.metric} on test ground, {seeds} seeds, one split")
    for name, values in found.items():
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"  {name:<36} {np.mean(values):.3f}{spread}")
    print(f"\n{'claim':<42} {'difference':>20}  {'here':<16} paper")
    for claim, better, worse, paper in CLAIMS:
        if better in found and worse in found:
            mean, error, said = verdict(found[better], found[worse])
            print(f"{claim:<42} {mean:>+9.3f} ± {error:<8.3f}  {said:<16} {paper}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", choices=["town", "banepa"], default="town")
    parser.add_argument("--data", type=Path, help="folder with mosaic_0.3m.tif and buildings.geojson (banepa)")
    parser.add_argument("--root", type=Path, help="where to work; kept, and gone on with when given again")
    parser.add_argument("--tiles", type=int, default=20, help="tiles a side of the made-up town")
    parser.add_argument(
        "--epochs", type=int, default=8, help="of pretraining, and of training on Banepa; on the town, twice as many"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, help="stop before the first step after this time; the rest comes later"
    )
    parser.add_argument("--quick", action="store_true", help="an epoch, one seed: shows that it works, not how well")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        root = (arguments.root or Path(name)) / arguments.site
        root.mkdir(parents=True, exist_ok=True)
        if arguments.site == "banepa" and arguments.data is None:
            parser.error("--site banepa needs --data")
        if arguments.site == "town":
            site = town(root, arguments.quick, arguments.tiles, arguments.epochs)
        else:
            site = banepa(arguments.data, root, arguments.quick, arguments.epochs)
        seeds = 1 if arguments.quick else arguments.seeds
        bench = Bench(site, root, seeds, arguments.minutes)
        found: dict[str, list[float]] = {}
        try:
            for arm in ARMS:
                found[arm] = bench.run(arm)
        except TimeoutError as left:
            print(f"The time is up before: {left}. Run it again with the same --root.")
        show(site, found, seeds)
        (root / "claims.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
