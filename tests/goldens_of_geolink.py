"""The deterministic weights and the inputs of the GeoLink goldens (see the README of their folder)."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_geometric.data import HeteroData

from rsosm_cli.graph.schema import EDGE_TYPES, EDGE_WIDTHS, KEY_POINTS, NODE_TYPES


def released_state(rows: list, strip: str = "") -> dict[str, torch.Tensor]:
    """The deterministic weights of the goldens."""
    state = {}
    for name, shape, rule in rows:
        if rule.startswith("alias of "):
            rule, seed = "hash", rule.removeprefix("alias of ")
        else:
            seed = name.removeprefix(strip)
        noise = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, dtype=np.float32) * 0.02
        if rule == "1+hash":
            noise = 1 + noise
        elif rule == "1+|hash|":
            noise = 1 + np.abs(noise)
        state[name] = torch.from_numpy(np.asarray(noise, np.float32))
    return state


def read_graphs(folder: Path, names: list[str]) -> HeteroData:
    """The published graphs of some tiles as one batch in our layout."""
    tiles = [np.load(folder / f"{name}.npz") for name in names]
    data = HeteroData()
    data.n_graphs = len(tiles)
    for t in NODE_TYPES:
        x = np.concatenate([tile[f"x__{t}"] for tile in tiles])
        data[t].x = torch.from_numpy(x[:, :512]).float()
        data[t].pos = torch.from_numpy(x[:, 512:]).float().view(-1, KEY_POINTS[t], 2)
        sizes = [len(tile[f"x__{t}"]) for tile in tiles]
        data[t].batch = torch.arange(len(tiles)).repeat_interleave(torch.tensor(sizes))
        data[t].num_nodes = len(x)
    for a, _, b in EDGE_TYPES:
        first = {t: np.cumsum([0] + [len(tile[f"x__{t}"]) for tile in tiles]) for t in (a, b)}
        index, attr = [], []
        for i, tile in enumerate(tiles):
            index.append(tile[f"edge_index__{a}__{b}"].reshape(2, -1) + np.array([[first[a][i]], [first[b][i]]]))
            width = EDGE_WIDTHS[a, b]
            published = tile[f"edge_attr__{a}__{b}"]
            columns = np.zeros((index[-1].shape[1], width), np.float32)
            if published.size:
                columns[:, : published.shape[1]] = published
            attr.append(columns)
        data[a, "to", b].edge_index = torch.from_numpy(np.concatenate(index, 1)).long()
        data[a, "to", b].edge_attr = torch.from_numpy(np.concatenate(attr)).float()
    return data


def read_images(goldens: Path, folder: Path) -> torch.Tensor:
    """The published tiles (6, 3, 224, 224), normalised as the goldens were made."""
    index = np.load(goldens / "batch6_index.npz")
    mean, std = index["img_norm_stats"]
    stack = []
    for name in index["sample_names"]:
        pixels = np.asarray(Image.open(folder / f"{name}_img.png").convert("RGB")) / 255.0
        stack.append(((pixels - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(stack)).float()
