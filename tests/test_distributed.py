"""Two CPU processes give what one gives, however they are started."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pretrain_cases import losses_and_gradients, small_settings
from tile_stores import make_store

from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.progress import SILENT
from rsosm_cli.training import devices
from rsosm_cli.training.pretrain import Job
from rsosm_cli.training.runs import newest_run

TESTS = Path(__file__).parent
PRETRAIN = ["-m", "rsosm_cli", "--json", "pretrain", "--device", "cpu", "--offline"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 36 tiles, 30 have no object: most halves of a batch have objects on one rank only."""
    return make_store(tmp_path_factory.mktemp("store") / "tiles.h5", side=6, without_objects=30)


# Of each method a model without dropout.
MODELS = {
    "geolink": {**small_settings().model.model_dump(), "fusion_dropout": 0.0},
    "rose": {"image_encoder": "vit_tiny_patch16_224", "image_size": 32, "image_depth": 3, "heads": 4},
    "mmgr": {"image_encoder": "resnet18", "image_size": 32, "width": 16, "point_keys": ["building"]},
}


@pytest.mark.parametrize("method", list(MODELS))
def test_losses_and_gradients_of_two_ranks_equal_those_of_one(store: Path, tmp_path: Path, method: str) -> None:
    settings = small_settings(holdout=0.0, method=method, model=MODELS[method])
    steps = [0, 1, 2, 3]
    # Through twenty batch norms of few pixels, the rounding of 32 bits in another order grows to some 3e-5.
    compute = partial(losses_and_gradients, double=method == "mmgr")
    found = {}
    for ranks in (1, 2):
        where = devices.choose(gpus=ranks, device="cpu")
        job = Job((store,), tmp_path, "key", settings, where)
        found[ranks] = devices.run(where, "32", compute, job, steps, progress=SILENT)
    lonely = 0
    for one, two in zip(found[1], found[2], strict=True):
        assert sum(two["objects"]) == one["objects"][0]
        lonely += min(two["objects"]) == 0 < max(two["objects"])
        np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-5)
        for name, gradient in one["gradients"].items():
            np.testing.assert_allclose(two["gradients"][name], gradient, atol=1e-5, err_msg=name)
    assert lonely  # at least one step had a rank without any object


def recipe(title: str) -> str:
    """Return the shell block under a heading of docs/cluster.md."""
    text = (TESTS.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}$.*?```(?:bash|sh)\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found.group(1)


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", **variables}


def options(store: Path, root: Path) -> list[str]:
    config = root / "small.yaml"
    config.write_text(
        "model: {image_encoder: vit_tiny_patch16_224, image_size: 32, image_depth: 3, decoder_width: 32,\n"
        "  decoder_depth: 1, decoder_heads: 2, fusion_width: 64, fusion_heads: 2}\n"
        "optim: {epochs: 1, batch_size: 8, warmup_epochs: 0}\nworkers: 0\n"
    )
    return ["--tiles", str(store), "--config", str(config)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def check(root: Path, outputs: list[str]) -> None:
    """One process shows the result; the run is whole."""
    assert sum('"done"' in text for text in outputs) == 1
    run = newest_run(root, kind="pretrain")
    assert load_checkpoint(run.folder).description.method == "geolink"
    assert "2 CPU processes" in run.report.read_text()


def test_two_slurm_tasks_join_each_other(store: Path, tmp_path: Path) -> None:
    assert "srun rsosm" in recipe("SLURM")
    common = {
        "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1234", "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RSOSM_ROOT": str(tmp_path),
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, *PRETRAIN, *options(store, tmp_path)],
            env=environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [task.communicate(timeout=200) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ended
    check(tmp_path, [out for out, _ in ended])


@pytest.mark.slow
def test_torchrun_starts_two_processes(store: Path, tmp_path: Path) -> None:
    assert "torchrun" in recipe("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        *PRETRAIN, *options(store, tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(RSOSM_ROOT=str(tmp_path)), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path, [done.stdout])


@pytest.mark.slow
def test_the_command_starts_two_cpu_processes(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, *PRETRAIN, "--gpus", "2", *options(store, tmp_path)]
    done = subprocess.run(
        command, env=environment(RSOSM_ROOT=str(tmp_path)), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path, [done.stdout])
    assert done.stderr.count("epoch 1 of 1") == 1
