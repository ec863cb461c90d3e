"""MMGR against golden values of the published method (see the folder's README)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens_of_geolink import released_state

from rsosm_cli.models.mmgr import Mmgr, PointEncoder, PointSets, nt_xent
from rsosm_cli.settings import MmgrSettings


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "mmgr"


@pytest.mark.parametrize("case", ["B8_D128_t0.5", "B4_D16_t0.07", "B2_D3_t0.5", "B128_D128_t0.5"])
def test_nt_xent_and_its_gradients(goldens, case):
    gold = np.load(goldens / "nt_xent.npz")
    a, b = (torch.from_numpy(gold[f"{case}__{part}"]).requires_grad_() for part in ("zi", "zj"))
    loss = nt_xent(a, b, torch.ones(len(a), dtype=torch.bool), float(case.rpartition("t")[2]))
    assert loss.item() == pytest.approx(float(gold[f"{case}__loss"]), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(a.grad, gold[f"{case}__grad_zi"], atol=1e-6)
    np.testing.assert_allclose(b.grad, gold[f"{case}__grad_zj"], atol=1e-6)


def test_point_encoder(goldens):
    gold = np.load(goldens / "poi_encoder_w002.npz")
    names = {
        "set2set.lstm.weight_ih_l0": "read.weight_input", "set2set.lstm.weight_hh_l0": "read.weight_state",
        "set2set.lstm.bias_ih_l0": "read.bias_input", "set2set.lstm.bias_hh_l0": "read.bias_state",
        "linear1.weight": "project.0.weight", "linear1.bias": "project.0.bias",
        "projector.1.weight": "project.2.weight", "projector.1.bias": "project.2.bias",
    }  # fmt: skip
    encoder = PointEncoder()
    own = encoder.state_dict()
    spec = json.loads((goldens / "poi_weights_spec_w002.json").read_text())
    state = released_state(spec["rows"])
    encoder.load_state_dict({names[n]: t.view(own[names[n]].shape) for n, t in state.items()})
    points = PointSets(
        torch.from_numpy(np.concatenate([gold[f"x_{i}"] for i in range(4)])), torch.from_numpy(gold["batch"]), 4
    )
    with torch.no_grad():
        vectors, projected = encoder(points)
    np.testing.assert_allclose(vectors, gold["set2set"], atol=1e-5)
    np.testing.assert_allclose(projected, gold["out"], atol=1e-5)


def test_image_encoder(goldens):
    gold = np.load(goldens / "image_encoder_w002.npz")
    images = np.random.default_rng(778).standard_normal((4, 3, 224, 224), dtype=np.float32)
    np.testing.assert_allclose(images.ravel()[:8], gold["img_first8"])
    model = Mmgr(MmgrSettings(), 64).eval()
    spec = json.loads((goldens / "image_weights_spec_w002.json").read_text())
    state = {n.removeprefix("encoder."): t for n, t in released_state(spec["rows"]).items() if "num_batches" not in n}
    model.project.load_state_dict({n.removeprefix("fc."): t for n, t in state.items() if n.startswith("fc.")})
    rest = {n: t for n, t in state.items() if not n.startswith("fc.")}
    missing, unexpected = model.image_encoder.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all("num_batches" in name for name in missing)
    with torch.no_grad():
        pooled = model.encode(torch.from_numpy(images), None).image
        projected = model.project(pooled)
    np.testing.assert_allclose(pooled, gold["pool"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(projected, np.concatenate((gold["h1"], gold["h2"])), atol=1e-4)


def test_cells_without_points_are_finite_and_do_not_count():
    torch.manual_seed(0)
    model = Mmgr(MmgrSettings(image_encoder="resnet18", points="text", width=8), 16).train()
    points = PointSets(torch.randn(5, 16), torch.tensor([0, 0, 2, 2, 2]), 4)
    views = torch.randn(2, 4, 3, 32, 32)
    found = model.losses(views[0], views[1], points)
    found.total.backward()
    assert torch.isfinite(found.total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    nothing = model.losses(views[0], views[1], PointSets(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), 4))
    assert nothing.points == 0
