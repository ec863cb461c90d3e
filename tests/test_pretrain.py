"""Pretraining on small stores: what it leaves, resuming after a kill, and bad input."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from pretrain_cases import small_settings
from safetensors.torch import load_file
from tile_stores import make_store

from rsosm_cli.errors import FormatError, MissingError, RsosmError, UsageError
from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.pipeline.pretrain import pretrain
from rsosm_cli.settings import OptimSettings, PretrainSettings, resolve
from rsosm_cli.tiles.apart import groups_apart
from rsosm_cli.tiles.shards import Ground, TileShards, key_counts
from rsosm_cli.training import heldout
from rsosm_cli.training.runs import Run, newest_run, recover_folder, replacing
from rsosm_cli.training.schedule import decay_groups, lr_factor, scaled_lr

TIMINGS = {"samples_per_s", "waiting_share"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    # The same sums in the same order as in the processes that the tests start.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "tiles.h5", without_image=2, without_objects=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A root with a finished run."""
    root = tmp_path_factory.mktemp("root")
    result = pretrain(root=root, tiles=[store], settings=small_settings(), device="cpu")
    assert result.status == "done"
    assert any("2 of 64 tiles have an image over less than half" in note for note in result.notes)
    assert any("no OSM object" in note for note in result.notes)
    return root


def rows_of(run: Run) -> list[dict[str, str]]:
    with run.metrics.open() as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def run_of(root: Path) -> Run:
    return newest_run(root, kind="pretrain")


def test_losses_fall_and_are_recorded(trained: Path) -> None:
    run = run_of(trained)
    rows = rows_of(run)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for name in ("loss", "image", "node"):
        assert float(rows[-1][name]) < float(rows[0][name])
    assert float(rows[0]["chance"]) == pytest.approx(1 / float(rows[0]["candidates"]), rel=0.05)
    page = run.report.read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "<svg" in page
    assert "nearest tags" in page
    assert list(run.folder.glob("events.out.tfevents.*"))


def test_the_checkpoint_says_how_inputs_are_made(trained: Path, store: Path) -> None:
    loaded = load_checkpoint(run_of(trained).folder)
    d = loaded.description
    assert isinstance(loaded.model, GeoLink)
    assert (d.tile, d.gsd, d.bands) == (32, 0.5, (1, 2, 3))
    assert d.provenance["sources"][0]["name"] == "squares"
    # Counts are of training tiles alone: held-out tiles and tiles without image are not in them.
    shards = TileShards([store])
    assert 0 < d.key_counts["building"] < key_counts(shards, torch.arange(64).numpy())["building"]


def test_a_finished_run_is_skipped_and_another_setting_is_another_run(trained: Path, store: Path) -> None:
    again = pretrain(root=trained, tiles=[store], settings=small_settings(workers=1), device="cpu")
    assert again.status == "skipped"
    assert again.numbers["epochs"] == 3
    planned = pretrain(root=trained, tiles=[store], settings=small_settings(seed=4), device="cpu", dry_run=True)
    assert planned.status == "planned"
    assert planned.subject != again.subject
    assert planned.numbers["steps"] == 3 * (planned.numbers["training_tiles"] // 8)
    assert not Path(planned.paths["run"]).exists()
    other = {"tiles": [store], "settings": small_settings(seed=4), "device": "cpu", "name": again.subject}
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="made with other settings"):
            pretrain(root=trained, dry_run=dry_run, **other)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_bit_for_bit_without_geospatial_libraries(
    trained: Path, store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}

    def run(workers: int, after: int) -> subprocess.CompletedProcess[str]:
        script = tests / "pretrain_script.py"
        command = [sys.executable, script, tmp_path, store, str(workers), str(after), str(int(number))]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    # Within the second epoch, after a checkpoint within it; resumed with other workers. No clock asks for a checkpoint
    # before Ctrl-C: the step it meets is finished and saved.
    ended = run(0, 64)
    if number == signal.SIGKILL:
        assert ended.returncode == -number
    else:
        assert ended.returncode != 0
        assert "KeyboardInterrupt" in ended.stderr
        state = torch.load(next((tmp_path / "runs").iterdir()) / "checkpoints/last/state.pt", weights_only=True)
        assert state["step"] == 8
    resumed = run(2, 0)
    assert resumed.stdout == "done\n", resumed.stderr
    ours, theirs = run_of(tmp_path), run_of(trained)
    assert rows_of(ours) == rows_of(theirs)
    for which in ("last", "best"):
        weights = Path("checkpoints") / which / "model.safetensors"
        a, b = (load_file(run.folder / weights) for run in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_diverges_says_so_and_keeps_no_broken_weights(store: Path, tmp_path: Path) -> None:
    optim = OptimSettings(epochs=2, batch_size=16, warmup_epochs=0, lr=1e30)
    with pytest.raises(RsosmError, match="diverged"):
        pretrain(root=tmp_path, tiles=[store], settings=small_settings(optim=optim), device="cpu")
    last = next((tmp_path / "runs").iterdir()) / "checkpoints" / "last"
    if last.exists():
        assert all(p.isfinite().all() for p in load_checkpoint(last).model.parameters())


def test_retrieval_counts_own_pairs_and_knows_chance() -> None:
    eye, one, two = torch.eye(40), torch.zeros(40), torch.arange(40) % 2
    assert heldout.top1_hits(eye, eye, one) == 40
    assert heldout.top1_hits(torch.ones(40, 8), torch.ones(40, 8), one) == 0  # collapsed: all alike
    swapped = eye[torch.arange(40).view(20, 2).flip(1).flatten()]  # each has its neighbour's graph
    blurred = eye + 0.5 * swapped
    assert heldout.top1_hits(eye, blurred, one) == 40
    assert heldout.top1_hits(eye, swapped, one) == 0
    # A rival of another group does not count; what is left is a tie of zeros, or its own.
    assert heldout.top1_hits(eye, eye * 0.1 + swapped, one) == 0
    assert heldout.top1_hits(eye, eye * 0.1 + swapped, two) == 40
    assert heldout.HeldOut({}, hits=1, images=40).at_chance
    assert not heldout.HeldOut({}, hits=9, images=40).at_chance
    assert heldout.HeldOut({}, hits=6, images=128, groups=4).at_chance
    assert not heldout.HeldOut({}, hits=9, images=128, groups=4).at_chance


def test_tiles_of_a_group_share_no_ground() -> None:
    side, stride = 10.0, 5.0
    west, south = (a.ravel() * stride for a in np.meshgrid(np.arange(9), np.arange(7)))
    bounds = np.stack([west, south, west + side, south + side], axis=1)
    grounds = [Ground("EPSG:32626", bounds), Ground("EPSG:32626", np.full((3, 4), np.nan))]
    tiles = np.random.default_rng(0).permutation(len(bounds) + 3)
    groups = groups_apart(grounds, tiles)
    assert len(np.unique(groups)) == 4  # half overlap: two by two
    for group in np.unique(groups):
        boxes = shapely.box(*bounds[[t for t in tiles[groups == group] if t < len(bounds)]].T)
        shared = shapely.area(shapely.intersection(boxes[:, None], boxes))
        assert np.count_nonzero(shared) == len(boxes)


def test_bad_input_is_one_sentence(tmp_path: Path, store: Path) -> None:
    s = small_settings()
    with pytest.raises(MissingError, match=r"no tiles\.h5 under"):
        pretrain(root=tmp_path, settings=s, device="cpu")
    with pytest.raises(MissingError, match=r"There is nothing of Nowhere"):
        pretrain(["Nowhere"], root=tmp_path, settings=s, device="cpu")
    bare = make_store(tmp_path / "bare.h5", side=2, without_image=4)
    with pytest.raises(MissingError, match="has an image"):
        pretrain(root=tmp_path, tiles=[bare], settings=s, device="cpu")
    odd = make_store(tmp_path / "odd.h5", side=3, tile_px=40)
    with pytest.raises(UsageError, match="multiple of 16"):
        pretrain(root=tmp_path, tiles=[odd], settings=s, device="cpu", dry_run=True)
    model = s.model.model_copy(update={"in_chans": 4})
    with pytest.raises(UsageError, match="3 bands, and the model takes 4"):
        pretrain(root=tmp_path, tiles=[store], settings=small_settings(model=model), device="cpu", dry_run=True)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--gpus 9 is more than this machine has: 0"):
            pretrain(root=tmp_path, tiles=[store], settings=s, gpus=9)
    with pytest.raises(UsageError, match="--nodes 2 needs a launcher"):
        pretrain(root=tmp_path, tiles=[store], settings=s, gpus=1, nodes=2, device="cpu")


def test_a_model_too_large_for_a_cpu_is_warned_of(store: Path, tmp_path: Path) -> None:
    large = small_settings(model={"image_encoder": "vit_base_patch16_224", "image_size": 32})
    planned = pretrain(root=tmp_path, tiles=[store], settings=large, device="cpu", dry_run=True)
    assert any("tiles a second" in note and "--preset geolink-tiny" in note for note in planned.notes)
    small = pretrain(root=tmp_path, tiles=[store], settings=small_settings(), device="cpu", dry_run=True)
    assert not any("tiles a second" in note for note in small.notes)


@pytest.mark.parametrize("preset", ["geolink", "geolink-small", "geolink-tiny"])
def test_presets_resolve(preset: str) -> None:
    assert resolve(PretrainSettings, kind="pretrain", preset=preset).method == "geolink"


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    factors = [lr_factor(step, 10, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert scaled_lr(OptimSettings(lr=1e-4), 2560) == pytest.approx(1e-3)


def test_biases_norms_and_tokens_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decayed, plain = decay_groups(model.named_parameters(), 0.05)
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0


def test_a_folder_is_exchanged_whole_even_when_interrupted(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    with replacing(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(FileNotFoundError), replacing(folder) as new:
        (new / "missing" / "a").write_text("2")
    assert (folder / "a").read_text() == "1"
    # Killed between the two renames: the new one is complete and takes its place.
    folder.rename(tmp_path / ".last.old")
    (tmp_path / ".last.new").mkdir()
    (tmp_path / ".last.new" / "a").write_text("3")
    recover_folder(folder)
    assert (folder / "a").read_text() == "3"
    assert not (tmp_path / ".last.old").exists()


def test_tag_counts_of_a_table_weigh_and_travel_in_the_checkpoint(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "counts.txt"
    known = TileShards([store]).tag_keys[0]
    table.write_text(f"{known} 41\nelsewhere 7\n")
    settings = small_settings(
        optim={"epochs": 1, "batch_size": 8, "warmup_epochs": 0}, text={"tag_counts": str(table), "tag_weight": "log"}
    )
    result = pretrain(root=tmp_path, tiles=[store], settings=settings, device="cpu")
    description = load_checkpoint(Path(result.paths["checkpoint"])).description
    assert description.key_counts == {known: 41, "elsewhere": 7}
    assert description.tag_weight == "log"
    assert pretrain(root=tmp_path, tiles=[store], settings=settings, device="cpu").status == "skipped"
    table.write_text("elsewhere 7\n")  # other counts are another run
    planned = pretrain(root=tmp_path, tiles=[store], settings=settings, device="cpu", dry_run=True)
    assert planned.status == "planned"
    assert any("tag keys are not in" in note and "weigh nothing" in note for note in planned.notes)
    table.write_text("many buildings\n")
    with pytest.raises(FormatError, match="no key and count"):
        pretrain(root=tmp_path, tiles=[store], settings=settings, device="cpu")
