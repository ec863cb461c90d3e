"""Cost, memory and seams of `map`.

    python benchmarks/map_city.py                     # a made-up city and a model that was never trained
    python benchmarks/map_city.py --root ROOT --city NAME --task TASK [--checkpoint RUN]

Prints, each against a baseline of the same run:

- time: the mapping (cutting windows, graphs, model, blending, strips) over the model's bare forward pass on the very
  same windows with ready inputs; the files beside the map are timed apart. Windows are cut and graphs built in a thread
  of their own: on a machine that is busy otherwise, the processor time of the mapping thread over that of the forward
  pass (with OMP_NUM_THREADS=1) is the steadier number;
- memory (made-up city only): peak of a whole process that maps 1 x, 4 x and 16 x the area;
- seams: mean step of probability where windows begin or end, over that at other borders of the model's patches (so
  that what a ViT does between its patches, and what upsampling does between cells, is on both sides); 1 is seamless.
  The same with overlap 0 is the control: it must read above 1.05, else the measure is blind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsosm_cli.settings import MapSettings

TESTS = str(Path(__file__).resolve().parents[1] / "tests")  # whose helpers serve here, too
WEST, NORTH, CRS, GSD = 499_200.0, 3_056_000.0, "EPSG:32645", 0.6


def make_city(root: Path, side_px: int) -> str:
    """Write a square city of ``side_px`` pixels: smooth ground, a grid of roads, houses (2,000 a square kilometre)."""
    import rasterio
    import shapely
    from affine import Affine
    from rasterio.features import rasterize

    sys.path.append(TESTS)
    from element_tables import write_elements

    from rsosm_cli.geometry import WGS84, reproject
    from rsosm_cli.osm.elements import Elements
    from rsosm_cli.places.place import Place, write_place
    from rsosm_cli.workspace import Workspace

    files = Workspace(root).city("Bench")
    files.folder.mkdir(parents=True)
    side = side_px * GSD
    rng = np.random.default_rng(0)
    n = max(20, int(2000 * side**2 / 1e6))
    x, y = WEST + rng.uniform(0, side - 12, n), NORTH - rng.uniform(12, side, n)
    houses = shapely.box(x, y, x + rng.uniform(6, 12, n), y + rng.uniform(6, 12, n))
    lines = np.arange(60, side, 120)
    roads = [shapely.LineString([(WEST + v, NORTH), (WEST + v, NORTH - side)]) for v in lines]
    roads += [shapely.LineString([(WEST, NORTH - v), (WEST + side, NORTH - v)]) for v in lines]
    shapes = np.array([*roads, *houses], dtype=object)
    kinds = np.array([1] * len(roads) + [2] * n, np.uint8)
    tags = [{"highway": "residential"}] * len(roads) + [{"building": "house"} for _ in range(n)]
    ways, ids = np.ones(len(shapes), np.uint8), np.arange(len(shapes))
    write_elements(files.osm, Elements(WGS84, ways, ids, kinds, tags, reproject(shapes, CRS, WGS84)))
    box = np.array([shapely.box(WEST, NORTH - side, WEST + side, NORTH)], dtype=object)
    write_place(files.place, Place("Bench", reproject(box, CRS, WGS84)[0], "a benchmark"))
    transform = Affine(GSD, 0, WEST, 0, -GSD, NORTH)
    with rasterio.open(
        files.imagery, "w", driver="GTiff", width=side_px, height=side_px, count=3, dtype="uint8", crs=CRS,
        transform=transform, tiled=True, compress="deflate", zlevel=1,
    ) as target:  # fmt: skip
        for top in range(0, side_px, 512):
            height = min(512, side_px - top)
            here = transform * Affine.translation(0, top)
            drawn = rasterize(shapes, out_shape=(height, side_px), transform=here, all_touched=True)
            rows, cols = np.mgrid[top : top + height, :side_px]
            ground = 90 + 40 * np.sin(rows / 70) * np.cos(cols / 90)
            picture = np.stack([ground, ground + 20, ground - 20]) + 90 * drawn
            window = rasterio.windows.Window(0, top, side_px, height)
            target.write((picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8), window=window)
    files.manifest.update(name="Bench")
    return "Bench"


def make_head(folder: Path, vit: str, decoder: str, modality: str, classes: int) -> Path:
    """Write the checkpoint of a head that was never trained."""
    from rsosm_cli.models.checkpoint import Description, save_checkpoint
    from rsosm_cli.models.geolink import GeoLink
    from rsosm_cli.models.heads import TaskModel
    from rsosm_cli.settings import ModelSettings, TaskSettings
    from rsosm_cli.text.encoder import load_text_encoder

    torch.manual_seed(0)
    colours = [f"#{i * 25:02x}80{255 - i * 25:02x}" for i in range(classes)]
    task = TaskSettings(
        name="bench", classes=[{"name": f"class {i}", "colour": c} for i, c in enumerate(colours)], decoder=decoder,
        modality=modality,
    )  # fmt: skip
    model = ModelSettings(image_encoder=vit)
    width = load_text_encoder("minilm", offline=True).width
    description = Description(
        model=model, text={"encoder": "minilm", "width": width}, key_counts={"building": 9, "highway": 3}, tile=224,
        gsd=GSD, mean=(0.4, 0.45, 0.3), std=(0.2, 0.2, 0.2), task=task,
    )  # fmt: skip
    save_checkpoint(folder, TaskModel(GeoLink(model, width), task), description)
    return folder


@dataclass
class Job:
    root: Path
    city: str
    task: str
    checkpoint: Path | None
    device: str

    def map(self, output: Path, **settings: Any) -> Any:
        from rsosm_cli.pipeline.map import map_city

        return map_city(
            self.task, self.city, root=self.root, checkpoint=self.checkpoint, output=output, device=self.device,
            offline=True, force=True, settings=MapSettings(**settings),
        )  # fmt: skip


@contextmanager
def recorded() -> Iterator[list[tuple[Any, Any, Any]]]:
    """Keep the inputs of every forward pass of the mapping: (model, images, graphs) as the model got them."""
    from rsosm_cli.inference.predict import Predictor

    kept: list[tuple[Any, Any, Any]] = []
    inputs = Predictor.inputs

    def keeping(self: Predictor, batch: Any) -> Any:
        images, graphs = inputs(self, batch)
        kept.append((self, images, graphs))
        return images, graphs

    Predictor.inputs = keeping  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        Predictor.inputs = inputs  # type: ignore[method-assign]


@contextmanager
def thread_time_of_mapping() -> Iterator[list[float]]:
    """Collect the processor seconds that the mapping's own thread takes, once the model is loaded."""
    from rsosm_cli.inference import mapping as module

    taken: list[float] = []
    inner = module.map_area

    def timed(*args: Any, **kwargs: Any) -> None:
        start = time.thread_time()
        inner(*args, **kwargs)
        taken.append(time.thread_time() - start)

    module.map_area = timed
    try:
        yield taken
    finally:
        module.map_area = inner


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_ratio(job: Job, folder: Path, repeats: int, batch_size: int) -> dict[str, float]:
    with recorded() as kept:
        job.map(folder / "warm", batch_size=batch_size)
    device = kept[0][0].device
    windows = sum(len(images) for _, images, _ in kept)
    bare, coarse, mapping, whole, bare_cpu, mapping_cpu = [], [], [], [], [], []
    for _ in range(repeats):  # alternating, so that a busy machine slows both alike
        for times, call in ((bare, "forward"), (coarse, "coarse")):
            synchronise(device)
            start, spent = time.perf_counter(), time.thread_time()
            with torch.inference_mode():
                for predictor, images, graphs in kept:
                    getattr(predictor.model, call)(images, graphs, gsd_m=predictor.description.gsd)
            synchronise(device)
            times.append(time.perf_counter() - start)
            if call == "forward":
                bare_cpu.append(time.thread_time() - spent)
        start = time.perf_counter()
        with thread_time_of_mapping() as taken:
            mapping.append(job.map(folder / "timed", batch_size=batch_size).numbers["model_seconds"])
        mapping_cpu += taken
        whole.append(time.perf_counter() - start)
    best = {name: min(times) for name, times in
            (("bare", bare), ("coarse", coarse), ("mapping", mapping), ("whole", whole))}  # fmt: skip
    return {
        "windows": windows,
        "bare_forward_s": best["bare"],
        "forward_at_stride_s": best["coarse"],
        "mapping_s": best["mapping"],
        "files_s": best["whole"] - best["mapping"],
        "mapping_over_bare": best["mapping"] / best["bare"],
        "mapping_over_stride": best["mapping"] / best["coarse"],
        "cpu_mapping_over_bare": min(mapping_cpu) / min(bare_cpu),
    }


def seam_ratio(job: Job, folder: Path, overlap: float, batch_size: int) -> float:
    """Return the mean step of probability at window borders over that at the other patch borders."""
    import rasterio

    from rsosm_cli.models.checkpoint import read_description
    from rsosm_cli.pipeline.map import newest_head
    from rsosm_cli.workspace import Workspace

    checkpoint = job.checkpoint or newest_head(Workspace(job.root), job.task)
    d = read_description(checkpoint)
    result = job.map(folder / f"seam-{overlap}", overlap=overlap, probability=True, batch_size=batch_size)
    with rasterio.open(result.paths["probability"]) as raster:
        p = raster.read().astype(np.float32)
        left, top = round(raster.transform.c / d.gsd), round(-raster.transform.f / d.gsd)
    known = p[0] != 255
    step = int((1 - overlap) * d.tile)
    patch = 16
    at, elsewhere = [], []
    for axis, first in ((2, left), (1, top)):
        change = np.abs(np.diff(p, axis=axis)).mean(axis=0)  # between pixel i and i + 1
        both = known[:, 1:] & known[:, :-1] if axis == 2 else known[1:] & known[:-1]
        place = first + 1 + np.arange(change.shape[axis - 1])
        for chosen, out in (((place % step) == 0, at), (((place % patch) == 0) & ((place % step) != 0), elsewhere)):
            picked = (change[:, chosen], both[:, chosen]) if axis == 2 else (change[chosen], both[chosen])
            out.append(picked[0][picked[1]])
    return float(np.concatenate(at).mean() / np.concatenate(elsewhere).mean())


def peak_of(side_px: int, vit: str, classes: int) -> dict[str, float]:
    """Return the peak memory in MB of a process that maps a made-up city of ``side_px`` pixels."""
    command = [sys.executable, __file__, "--peak", str(side_px), "--vit", vit, "--classes", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_peak(side_px: int, vit: str, classes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        child = [sys.executable, __file__, "--make", str(root), "--side", str(side_px), "--vit", vit]
        # The city is made by another process: its memory is not that of the mapping.
        subprocess.run([*child, "--classes", str(classes)], check=True)
        job = Job(root, "Bench", "bench", root / "head", "cpu")
        result = job.map(root / "out", batch_size=8)
    # Of this process alone: getrusage tells the peak of the one that started it where that was higher.
    (line,) = (ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024 / 1e6
    print(json.dumps({"peak_mb": peak, "windows": result.numbers["windows"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--city")
    parser.add_argument("--task")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vit", default="vit_tiny_patch16_224", help="image encoder of the made-up model")
    parser.add_argument("--decoder", choices=["upernet", "mlp", "linear"], default="upernet", help="head of that model")
    parser.add_argument("--classes", type=int, default=9)
    parser.add_argument("--side", type=int, default=1024, help="side of the made-up city at 1 x, in pixels")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--skip", choices=["time", "memory", "seams"], action="append", default=[])
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak, args.vit, args.classes)
        return
    if args.make:
        make_city(args.make, args.side)
        make_head(args.make / "head", args.vit, "linear", "fused", args.classes)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.root:
            job = Job(args.root, args.city, args.task, args.checkpoint, args.device)
        else:
            make_city(folder / "root", args.side)
            head = make_head(folder / "head", args.vit, args.decoder, "fused", args.classes)
            job = Job(folder / "root", "Bench", "bench", head, args.device)
        if "time" not in args.skip:
            found = time_ratio(job, folder, args.repeats, args.batch_size)
            print("time:", "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
            print(f"  mapping over bare forward: {found['mapping_over_bare']:.3f} (bar 1.10)")
            print(f"  processor time, mapping thread over forward: {found['cpu_mapping_over_bare']:.3f}")
        if "seams" not in args.skip:
            blended, abutting = (seam_ratio(job, folder, o, args.batch_size) for o in (0.5, 0.0))
            print(f"seams: {blended:.3f} blended (bar 1.00 +- 0.02); control, overlap 0: {abutting:.3f} (above 1.05)")
        if "memory" not in args.skip and not args.root:
            peaks = [peak_of(args.side * k, args.vit, args.classes) for k in (1, 2, 4)]
            text = "  ".join(f"{a} x: {p['peak_mb']:.0f} MB" for a, p in zip((1, 4, 16), peaks, strict=True))
            more = peaks[-1]["peak_mb"] - peaks[0]["peak_mb"]
            print(f"memory: {text}; 16 x above 1 x: {more:.0f} MB (bar 150)")


if __name__ == "__main__":
    main()
