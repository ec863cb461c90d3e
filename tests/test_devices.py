"""What only a GPU shows, and what can be known of it without one: golden values, waits, a whole training and map."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from goldens_of_geolink import read_graphs, read_images, released_state
from graph_batches import join, random_tile
from mapped_city import building_task, write_city, write_head
from pretrain_cases import small_settings
from tile_stores import make_store
from torch.utils._python_dispatch import TorchDispatchMode

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.flat import flatten
from rsosm_cli.models.geolink import GeoLink, Masks
from rsosm_cli.models.methods import build_encoder
from rsosm_cli.models.released import from_released
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.pipeline.pretrain import pretrain
from rsosm_cli.settings import MapSettings, ModelSettings, PretrainSettings, resolve
from rsosm_cli.training.runs import newest_run

# Operations whose result, or its size, the host has to wait for.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes where the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in WAITING
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # the size of what a mask picks is unknown
            waits |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            waits |= (kwargs or {}).get("output_size") is None
        if waits or name == "lift_fresh":
            ours = [frame for frame in traceback.extract_stack() if "rsosm_cli" in frame.filename]
            # A tensor made of numbers is copied to the device at once, one made of an array without a wait.
            waits |= not any("from_numpy" in str(frame.line) for frame in ours[-1:])
        if waits:
            self.places.add(f"{name}: {ours[-1].filename}:{ours[-1].lineno}" if ours else name)
        return func(*args, **(kwargs or {}))


def step_of(method: str, device: torch.device) -> tuple[TileEncoder, dict[str, Any]]:
    """A small model of a method, and what a step of it takes."""
    settings = resolve(PretrainSettings, kind="pretrain", preset=f"{method}-tiny")
    model = build_encoder(settings.model, 16, n_categories=7)
    counts = (4, 5, 6)
    graphs = join([random_tile(counts, seed) for seed in range(4)])
    graphs.counts = np.tile(counts, (4, 1))  # known on the host, as `to_hetero` sets them
    if method == "mmgr":  # its points are numbers of their categories
        for t in NODE_TYPES:
            graphs[t].x[:, 0] = torch.arange(graphs[t].num_nodes) % 7
    side = settings.model.image_size
    images, second = torch.randn(2, 4, 3, side, side).to(device)
    seeds = torch.arange(4, device=device)
    return model.to(device), {
        "images": images, "graphs": graphs.to(device), "seeds": seeds, "gsd_m": None, "second": second,
    }  # fmt: skip


def test_a_wait_is_seen() -> None:
    with Waits() as waits:
        values = torch.arange(4.0)
        values[values > 1].sum().item()
        values.new_tensor((1, 2))
    assert len(waits.places) == 3


@pytest.mark.parametrize("method", ["geolink", "rose", "mmgr"])
def test_a_step_never_waits_for_its_device(method: str) -> None:
    model, given = step_of(method, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.step(**given).total.backward()
    optimizer.step()  # the first makes its state
    optimizer.zero_grad(set_to_none=True)
    with Waits() as waits:
        model.step(**given).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert waits.places == set()


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["geolink", "rose", "mmgr"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_cuda_sees_no_wait_in_a_step(gpu: torch.device, method: str, precision: str) -> None:
    model, given = step_of(method, gpu)
    model.step(**given).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.step(**given).total
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "near"), [("32", 1e-4), ("bf16", 3e-2)])
def test_golden_losses_on_a_gpu(gpu: torch.device, shared: Path, precision: str, near: float) -> None:
    goldens, tiles = shared / "goldens" / "geolink", shared / "data" / "geolink_ufz"
    spec = json.loads((goldens / "weights_spec_w002.json").read_text())
    settings = ModelSettings(image_encoder="vit_tiny_patch16_224", compat="released", objects_max=None)
    model = GeoLink(settings, 512).eval()
    model.load_state_dict(from_released(released_state(spec["rows"])).state)
    gold = np.load(goldens / "pretrain_w002_nocap.npz")
    names = [str(name) for name in np.load(goldens / "batch6_index.npz")["sample_names"]]
    graphs = read_graphs(tiles, names)
    graph = flatten(graphs)
    hidden = torch.zeros(graph.n_nodes, dtype=torch.bool)
    for t in NODE_TYPES:
        hidden[torch.from_numpy(gold[f"mask_nodes__{t}"]) + graph.offsets[NODE_TYPES.index(t)]] = True
    totals = np.bincount(graph.batch[hidden].numpy(), minlength=graph.n_graphs)
    masks = Masks(torch.from_numpy(gold["ids_keep"]).to(gpu), hidden.to(gpu), hidden.to(gpu), totals)
    with torch.no_grad(), torch.autocast(gpu.type, torch.bfloat16, enabled=precision == "bf16"):
        found = model.to(gpu).losses(read_images(goldens, tiles).to(gpu), graphs.to(gpu), masks=masks)
    for ours, theirs in ((found.image, "img_loss"), (found.contrastive, "contrastive_loss"), (found.node, "node_loss")):
        assert ours.item() == pytest.approx(float(gold[theirs]), rel=near)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_pretraining_on_a_gpu(gpu: torch.device, tmp_path: Path, precision: str) -> None:
    store = make_store(tmp_path / "tiles.h5", without_image=2, without_objects=4)
    settings = small_settings().model_copy(update={"precision": precision})
    result = pretrain(root=tmp_path, tiles=[store], settings=settings, device=gpu.type)
    assert result.status == "done"
    rows = newest_run(tmp_path, kind="pretrain").metrics.read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_a_map_of_a_gpu_is_that_of_a_cpu(gpu: torch.device, tmp_path: Path) -> None:
    write_city(tmp_path)
    write_head(tmp_path / "head", building_task())
    found = []
    for device in ("cpu", gpu.type):
        done = map_city(
            "building", "Little Town", root=tmp_path, checkpoint=tmp_path / "head", device=device, offline=True,
            output=tmp_path / device, settings=MapSettings(probability=True),
        )  # fmt: skip
        with rasterio.open(done.paths["probability"]) as raster:
            found.append(raster.read().astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1  # of 250
