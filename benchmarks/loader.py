"""Milliseconds a sample of loading with augmentation: ours against the data set class of the published code.

    python benchmarks/loader.py TILES_H5 [--rounds 15] [--batch 64] [--train]

The published class keeps one PyTorch Geometric object a tile on disk (read with ``torch.load``) beside an image file,
and augments one tile at a time: a random crop and flip of the image through PIL, then, object by object, of the key
points, and edge by edge of the edges. It is rebuilt here with that structure, for the same tiles and augmentation. Both
run on one core, to the normalised images and the batched graphs that the model takes, and alternate within a round;
medians of the rounds of process time are printed. With ``--train``, a short pretraining (``geolink-tiny``) follows, for
the share of the time that it waits for data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch_geometric.data import Batch, HeteroData

from rsosm_cli.graph.schema import EDGE_TYPES, NODE_TYPES
from rsosm_cli.settings import AugmentSettings, PretrainSettings, resolve
from rsosm_cli.tiles.augment import normalise
from rsosm_cli.tiles.batch import to_hetero
from rsosm_cli.tiles.dataset import PretrainBatches
from rsosm_cli.tiles.shards import TileShards

TEXT_WIDTH = 384


class Published:
    """The data set class of the published code: one file a tile, one object at a time."""

    def __init__(self, folder: Path, shards: TileShards, tiles: np.ndarray, vectors: torch.Tensor, size: int) -> None:
        self.folder, self.size = folder, size
        self.vectors = {tag: vectors[i].clone() for i, tag in enumerate(shards.tags)}
        self.weights = dict.fromkeys(shards.tags, 1.0)
        for place, tile in enumerate(tiles.tolist()):
            one = np.array([tile])
            Image.fromarray(shards.images(one)[0, :3].transpose(1, 2, 0)).save(folder / f"{place}.png")
            graphs = shards.graphs(one)
            hetero = to_hetero(graphs, vectors, torch.ones(len(shards.tags)))
            tags = {
                name: [
                    [shards.tags[i] for i in n.tag_ids[n.tag_offsets[k] : n.tag_offsets[k + 1]]]
                    for k in range(len(n.osm_id))
                ]
                for name, n in graphs.nodes.items()
            }
            stored = {
                "tags": tags,
                "pos": {name: hetero[name].pos for name in NODE_TYPES},
                "edge_index": {e: hetero[e].edge_index for e in EDGE_TYPES},
                "edge_attr": {e: hetero[e].edge_attr for e in EDGE_TYPES},
            }
            torch.save(stored, folder / f"{place}.pt")

    def __getitem__(self, place: int) -> tuple[torch.Tensor, HeteroData]:
        draw = np.random.default_rng(place)
        image = Image.open(self.folder / f"{place}.png").convert("RGB")
        width = image.width
        side = int(np.sqrt(draw.uniform(0.2, 1.0)) * width)
        left, top = draw.integers(0, width - side + 1, 2).tolist()
        flip = draw.random() < 0.5
        image = image.crop((left, top, left + side, top + side)).resize(
            (self.size, self.size), Image.Resampling.BICUBIC
        )
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
        pixels = _jitter(pixels, draw)
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        stored = torch.load(self.folder / f"{place}.pt", weights_only=True)
        data, kept = HeteroData(), {}
        for name in NODE_TYPES:
            vectors, positions, kept[name] = [], [], {}
            for number, (tags, points) in enumerate(zip(stored["tags"][name], stored["pos"][name], strict=True)):
                moved = (points - torch.tensor([left, top]) / width) / (side / width)
                if flip:
                    moved = torch.stack([1 - moved[:, 0], moved[:, 1]], dim=1)
                if not ((moved >= 0) & (moved <= 1)).all(dim=1).any():
                    continue
                kept[name][number] = len(vectors)
                weight = torch.tensor([self.weights[t] for t in tags])
                vectors.append((torch.stack([self.vectors[t] for t in tags]) * weight[:, None]).sum(0) / weight.sum())
                positions.append(moved.clamp(0, 1))
            data[name].x = torch.stack(vectors) if vectors else torch.zeros(0, TEXT_WIDTH)
            data[name].pos = torch.stack(positions) if positions else torch.zeros(0, *stored["pos"][name].shape[1:])
        for a, to, b in EDGE_TYPES:
            pairs, attributes = [], []
            index, attr = stored["edge_index"][a, to, b], stored["edge_attr"][a, to, b]
            for (source, target), row in zip(index.T.tolist(), attr, strict=True):
                if source in kept[a] and target in kept[b]:
                    pairs.append((kept[a][source], kept[b][target]))
                    attributes.append(row)
            data[a, to, b].edge_index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
            data[a, to, b].edge_attr = torch.stack(attributes) if attributes else torch.zeros(0, attr.shape[1])
        return pixels, data

    def batch(self, places: range) -> tuple[torch.Tensor, Any]:
        samples = [self[place] for place in places]
        return torch.stack([image for image, _ in samples]), Batch.from_data_list([graph for _, graph in samples])


def _jitter(pixels: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    brightness, contrast, saturation = draw.uniform(0.6, 1.4, 3)
    pixels = (pixels * brightness).clamp(0, 1)
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    pixels = ((pixels - grey.mean()) * contrast + grey.mean()).clamp(0, 1)
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    return ((pixels - grey) * saturation + grey).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tiles", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--train", action="store_true", help="train for the share of waiting, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shards = TileShards([arguments.tiles])
    usable = np.flatnonzero(shards.image_share > 0.5)
    size = shards.tile_px
    vectors = torch.randn(len(shards.tags), TEXT_WIDTH)
    weights = torch.ones(len(shards.tags))
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    ours = PretrainBatches(shards, usable, batch_size=arguments.batch, size=size, augment=AugmentSettings(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Published(Path(folder), shards, usable[: ours.batch_size], vectors, size)
        # Process time: what one core works, whatever else the machine does.
        spent: dict[str, list[float]] = {"ours": [], "published": []}
        for turn in range(arguments.rounds + 1):
            start = time.process_time()
            batch = ours[turn, 0]
            to_hetero(batch.graphs, vectors, weights)
            normalise(batch.images, mean, std, batch.colour)
            middle = time.process_time()
            theirs.batch(range(ours.batch_size))
            end = time.process_time()
            if turn:  # the first round warms up
                spent["ours"].append((middle - start) / ours.batch_size * 1e3)
                spent["published"].append((end - middle) / ours.batch_size * 1e3)
    objects = shards.n_objects[usable].mean()
    print(f"{len(usable)} tiles of {size} px, {objects:.1f} objects a tile, batches of {ours.batch_size}, one core")
    for name, times in spent.items():
        print(f"{name:>10}: {statistics.median(times):.3f} ms a sample")
    ratio = statistics.median(a / b for a, b in zip(spent["ours"], spent["published"], strict=True))
    print(f"{'ratio':>10}: {ratio:.3f} (bar: at most 0.2)")
    if arguments.train:
        waiting(arguments.tiles)


def waiting(tiles: Path) -> None:
    """Print the share of the time that a short training waits for its data."""
    from rsosm_cli.pipeline.pretrain import pretrain
    from rsosm_cli.training.runs import newest_run

    for workers in (0, 1):
        settings = resolve(
            PretrainSettings, kind="pretrain", preset="geolink-tiny",
            options={"optim.epochs": 2, "workers": workers, "holdout": 0.0},
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as root:
            pretrain(root=Path(root), tiles=[tiles], settings=settings, device="cpu", offline=True)
            last = newest_run(Path(root), kind="pretrain").metrics.read_text().splitlines()
            row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
        print(f"waiting for data with {workers} workers: {float(row['waiting_share']):.1%}")


if __name__ == "__main__":
    main()
