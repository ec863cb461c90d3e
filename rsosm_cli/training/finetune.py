"""Training a task: the head, and as far as the protocol has it the encoder, on labelled ground.

The epoch is chosen on validation ground alone; test ground is looked at once, at the end. GeoLink (NeurIPS 2025),
section 4: AdamW, the encoder's rate a fraction of the head's, linear warm-up and cosine.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsosm_cli.errors import FormatError, RsosmError
from rsosm_cli.models.checkpoint import Description, load_checkpoint, save_checkpoint
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.models.methods import build_encoder
from rsosm_cli.progress import Progress
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.draws import hashed
from rsosm_cli.tiles.shards import TileShards
from rsosm_cli.training.calibration import Calibration, calibrate
from rsosm_cli.training.features import Features, cache_features
from rsosm_cli.training.kinds import at_truth, kind_of
from rsosm_cli.training.metrics import Metric
from rsosm_cli.training.runs import Run, replacing
from rsosm_cli.training.schedule import decay_groups, falls_of, lr_factor, optimizer_of, set_lr
from rsosm_cli.training.splits import PARTS
from rsosm_cli.training.task_data import Inputs, TaskBatch, TaskBatches, TaskTiles, load_rows, target_moments

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger("rsosm")

_DROPOUT_DRAWS = 0x66696E65
# Seconds between states that an interrupted training is taken up from.
SAVE_SECONDS = 300.0
# Tiles at a time where no gradient is kept.
EVAL_BATCH = 16
# Tiles whose prediction the report shows.
WORST = 6


@dataclass(frozen=True)
class Job:
    """What a training is of; picklable. ``part`` and ``block`` (L,): see :class:`splits.Split`."""

    stores: tuple[Path, ...]
    tiles: NDArray[np.int64]  # (L,) labelled tiles, numbers over all stores
    truth: NDArray[np.uint8] | NDArray[np.float64]  # see :class:`TaskTiles`
    part: NDArray[np.int8]  # (L,)
    block: NDArray[np.int64]  # (L,)
    train_rows: NDArray[np.int64]  # the training tiles, or a share of them
    description: Description  # with the task
    encoder: Path | None  # checkpoint; None: from scratch
    seed: int
    folder: Path  # the run
    key: str
    offline: bool = False

    @property
    def task(self) -> TaskSettings:
        task = self.description.task
        assert task is not None
        return task

    def rows(self, part: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.part == PARTS.index(part))


@dataclass
class Outcome:
    """What a training of one seed gave. Of the test ground, ``T`` tiles."""

    seed: int
    history: list[dict[str, float]]
    best_epoch: int
    score: float  # of the best epoch on validation ground: see :mod:`rsosm_cli.training.kinds`
    test: list[Metric]
    rows: NDArray[np.int64]  # (T,) labelled tiles
    matrices: NDArray[np.int64] | None = None  # (T, K, K)
    predicted: NDArray[np.float64] | None = None  # (T, 1) regression, (T, K) distribution
    worst: list[dict[str, Any]] = field(default_factory=list)  # row, image, truth, prediction, error
    calibration: Calibration | None = None
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, float]:
        return {m.name: m.value for m in self.test}


def build_model(job: Job) -> TaskModel:
    """Return the model of a job on the CPU: its encoder loaded or drawn anew, the head drawn by the seed."""
    torch.manual_seed(job.seed)
    if job.encoder is None:
        d = job.description
        encoder = build_encoder(d.model, d.text.width, len(d.categories))
    else:
        encoder = load_checkpoint(job.encoder).encoder
    torch.manual_seed(job.seed)
    model = TaskModel(encoder, job.task)
    if job.task.protocol in ("frozen", "linear"):
        model.encoder.requires_grad_(False)
    if job.task.kind == "regression":
        model.set_target(*target_moments(job.task, np.asarray(job.truth[job.train_rows], np.float64)))
    return model


def train(fabric: Fabric, progress: Progress, job: Job) -> Outcome:
    """Train one seed and test it; the checkpoint of the best epoch is in ``checkpoints/best`` of the run's folder."""
    return Trainer(fabric, progress, job).train()


class Trainer:
    """One process of a training."""

    def __init__(self, fabric: Fabric, progress: Progress, job: Job) -> None:
        self.fabric, self.progress, self.job, self.task = fabric, progress, job, job.task
        self.run = Run(job.folder)
        self.tiles = TaskTiles(TileShards(job.stores), job.tiles, job.truth, job.description.tile)
        with fabric.rank_zero_first():  # the others read what the first has cached
            inputs = Inputs.of(job.description, self.tiles.shards.tags, offline=job.offline)
        self.inputs = inputs.to(fabric.device)
        self.model = build_model(job)
        self.kind = kind_of(self.task)
        self.frozen = job.task.protocol in ("frozen", "linear")
        optim = job.task.optim
        head = [(n, p) for n, p in self.model.named_parameters() if not n.startswith("encoder.")]
        body = [(n, p) for n, p in self.model.named_parameters() if n.startswith("encoder.")]
        # From scratch there is nothing to be careful with.
        scale = 1.0 if job.task.protocol == "scratch" else job.task.encoder_lr
        groups = decay_groups(head, optim.weight_decay, lr_scale=1.0)
        groups += decay_groups(body, optim.weight_decay, lr_scale=scale)
        loss = self.kind.loss(job.truth[job.train_rows])
        self.step_module = _Step(self.model, loss, job.description.gsd)
        self.module, self.optimizer = fabric.setup(self.step_module, optimizer_of(groups, optim))
        self.batches = TaskBatches(
            self.tiles, job.train_rows, optim.batch_size, seed=job.seed, train=True, augment=not self.frozen,
            rank=fabric.global_rank, world=fabric.world_size,
        )  # fmt: skip
        self.features: Features | None = None
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.best_epoch, self.best = 0, -math.inf

    def train(self) -> Outcome:
        started = time.monotonic()
        self.resume()
        optim = self.task.optim
        if self.frozen:
            every = np.concatenate([self.job.train_rows, self.job.rows("validation"), self.job.rows("test")])
            self.features = cache_features(
                self.model, self.inputs, self.tiles, every, self.fabric, EVAL_BATCH, self.job.description.gsd
            )
        steps = len(self.batches)
        total, warmup, falls = steps * optim.epochs, round(optim.warmup_epochs * steps), falls_of(optim, steps)
        workers = self.task.workers if self.fabric.device.type != "cpu" else 0
        data = None
        if self.features is None:
            data = iter(self.batches.loader(workers=workers, epochs=range(self.epoch, optim.epochs)))
        saved = time.monotonic()
        with self.progress.task(f"{self.task.name} ({self.task.modality})", optim.epochs, "epochs") as advance:
            advance(self.epoch)
            for epoch in range(self.epoch, optim.epochs):
                self._train_mode()
                losses = []
                for step in range(steps):
                    number = epoch * steps + step
                    set_lr(self.optimizer, optim.lr * lr_factor(number, warmup, total, falls))
                    batch = self.batches.rows_at(epoch, step) if data is None else next(data)
                    losses.append(self._update(batch, number))
                self._end_epoch(epoch, float(torch.stack(losses).mean()))
                advance(1)
                if self._due(saved):
                    self._save_state()
                    saved = time.monotonic()
        outcome = self.test()
        outcome.seconds = time.monotonic() - started
        self._finish(outcome)
        return outcome

    def _train_mode(self) -> None:
        self.module.train()
        if self.frozen:
            self.model.encoder.eval()  # no dropout in what is not trained

    def _update(self, batch: TaskBatch | NDArray[np.int64], number: int) -> Tensor:
        draw = hashed(_DROPOUT_DRAWS, self.job.seed, number, self.fabric.global_rank)
        torch.manual_seed(int(draw.view(np.int64)[()]))
        loss = self.module(*self.inputs_of(batch))
        self.fabric.backward(loss)
        if self.task.optim.clip_norm is not None:
            self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.task.optim.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def inputs_of(self, batch: TaskBatch | NDArray[np.int64]) -> tuple[Any, ...]:
        """Return (images, graphs, features, truth) on the device: what the step takes."""
        if isinstance(batch, TaskBatch):
            images, graphs = self.inputs.prepare(batch, self.task.modality)
            return images, graphs, None, batch.truth.to(self.fabric.device)
        assert self.features is not None
        truth = self.tiles.truth[batch]
        values = torch.from_numpy(truth if truth.dtype == np.uint8 else truth.astype(np.float32))
        return None, None, self.features.of(batch, self.fabric.device), values.to(self.fabric.device)

    def _end_epoch(self, epoch: int, train_loss: float) -> None:
        """Measure on validation ground, and keep the weights where they are the best so far."""
        if not math.isfinite(train_loss):
            raise RsosmError(
                f"The loss of epoch {epoch + 1} is {train_loss}: the training has diverged.",
                hint="Try a lower optim.lr, a longer warm-up or optim.clip_norm=1.",
            )
        row: dict[str, float] = {
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
        }
        validation = self.job.rows("validation")
        score = float(epoch)  # without validation ground, the last epoch is the one
        if len(validation):
            found = self.measure(validation)
            measured = {"loss": found.loss} | {m.name: m.value for m in self._metrics(found, validation)}
            row |= {f"validation_{name}": value for name, value in measured.items() if "/" not in name}
            score = self.kind.score(measured)
        self.history.append(row)
        log.info("epoch %d of %d: %s", epoch + 1, self.task.optim.epochs, _sentence(row))
        self.epoch = epoch + 1
        if math.isfinite(score) and score > self.best:
            self.best, self.best_epoch = score, epoch + 1
            self._save_best()

    @torch.no_grad()
    def measure(self, rows: NDArray[np.int64]) -> Measured:
        """Predict tiles, each rank its share, and return what all ranks found."""
        self.module.eval()
        found = torch.zeros((len(rows), self.kind.width), dtype=torch.float64)
        losses = torch.zeros(2, dtype=torch.float64)
        mine = np.arange(self.fabric.global_rank, len(rows), self.fabric.world_size)
        for start in range(0, len(mine), EVAL_BATCH):
            places = mine[start : start + EVAL_BATCH]
            out, truth = self.predicted(rows[places])
            loss = self.step_module.loss(out, self.step_module.target(truth))
            losses += torch.tensor([float(loss) * len(places), len(places)], dtype=torch.float64)
            found[places] = torch.from_numpy(self.kind.rows(self.model, out, truth))
        if self.fabric.world_size > 1:
            found = cast(Tensor, self.fabric.all_reduce(self.fabric.to_device(found), reduce_op="sum")).cpu()
            losses = cast(Tensor, self.fabric.all_reduce(self.fabric.to_device(losses), reduce_op="sum")).cpu()
        return Measured(found.numpy(), float(losses[0] / max(1.0, float(losses[1]))))

    @torch.no_grad()
    def predicted(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the output for some tiles, at the resolution of their truth, and the truth; in evaluation mode."""
        batch = rows if self.features is not None else load_rows(self.tiles, rows)
        *inputs, truth = self.inputs_of(batch)
        with self.fabric.autocast():
            out = self.step_module.predict(*inputs)
        return at_truth(out, truth), truth

    def _metrics(self, found: Measured, rows: NDArray[np.int64]) -> list[Metric]:
        return self.kind.metrics(found.values, self.job.truth[rows], self.job.block[rows])

    def test(self) -> Outcome:
        """Measure the best epoch on test ground."""
        if self.best_epoch == 0:
            raise RsosmError(
                "No epoch could be measured on the validation ground: it has labels of no class.",
                hint="Add labels, or choose other blocks with --set seed=1.",
            )
        self.model.load_state_dict(load_checkpoint(self.run.best).model.state_dict())
        rows = self.job.rows("test")
        found = self.measure(rows)
        outcome = Outcome(self.job.seed, self.history, self.best_epoch, self.best, self._metrics(found, rows), rows)
        if self.task.categorical:
            k = len(self.task.classes)
            outcome.matrices = found.values.reshape(-1, k, k).astype(np.int64)
            outcome.calibration = calibrate(self)
        else:
            outcome.predicted = found.values
        outcome.worst = self._worst(outcome)
        return outcome

    @torch.no_grad()
    def _worst(self, outcome: Outcome) -> list[dict[str, Any]]:
        if outcome.matrices is not None:
            hit = np.trace(outcome.matrices, axis1=1, axis2=2)
            error = 1 - hit / np.maximum(outcome.matrices.sum(axis=(1, 2)), 1)
        else:
            assert outcome.predicted is not None
            truth = np.asarray(self.job.truth[outcome.rows], np.float64).reshape(len(outcome.rows), -1)
            error = np.abs(outcome.predicted - truth).sum(axis=1)
        order = np.argsort(-error, kind="stable")[:WORST]
        rows = outcome.rows[order]
        if outcome.predicted is None:
            predicted = self.predicted(rows)[0].argmax(dim=1).to(torch.uint8).cpu().numpy()
        else:
            predicted = outcome.predicted[order]
        images = load_rows(self.tiles, rows).images.numpy()
        return [
            {"row": int(r), "image": i, "truth": t, "prediction": p, "error": float(e)}
            for r, i, t, p, e in zip(rows, images, self.job.truth[rows], predicted, error[order], strict=True)
        ]

    # Checkpoints

    def _save_best(self) -> None:
        if self.fabric.is_global_zero:
            with replacing(self.run.best) as folder:
                save_checkpoint(folder, self.model, self.job.description)
        self.fabric.barrier()

    def _finish(self, outcome: Outcome) -> None:
        """Write the metrics into the best checkpoint's description; the state for resuming has served."""
        if self.fabric.is_global_zero:
            numbers = {k: v for k, v in outcome.metrics.items() if math.isfinite(v)}
            update: dict[str, Any] = {"metrics": numbers}
            if outcome.calibration is not None:
                update["temperature"] = outcome.calibration.temperature
            described = self.job.description.model_copy(update=update)
            with replacing(self.run.best) as folder:
                save_checkpoint(folder, self.model, described)
            self.run.state.unlink(missing_ok=True)
        self.fabric.barrier()

    def _due(self, saved: float) -> bool:
        due = time.monotonic() - saved > SAVE_SECONDS
        return bool(self.fabric.broadcast(due)) if self.fabric.world_size > 1 else due

    def _save_state(self) -> None:
        if self.fabric.is_global_zero:
            with replacing(self.run.last) as folder:
                save_checkpoint(folder, self.model, self.job.description)
                state = {
                    "key": self.job.key, "seed": self.job.seed, "epoch": self.epoch, "history": self.history,
                    "best": self.best, "best_epoch": self.best_epoch, "optimizer": self.optimizer.state_dict(),
                }  # fmt: skip
                torch.save(state, folder / "state.pt")
        self.fabric.barrier()

    def resume(self) -> None:
        """Take up the state that an interruption left, if it is of this training."""
        if not self.run.state.is_file():
            return
        try:
            state = torch.load(self.run.state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise FormatError(f"{self.run.state} is damaged: {error}.", hint="Start over with --force.") from None
        if state["key"] != self.job.key or state["seed"] != self.job.seed:
            return
        self.model.load_state_dict(load_checkpoint(self.run.last).model.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        log.info("Resuming at epoch %d of %d.", self.epoch + 1, self.task.optim.epochs)


@dataclass(frozen=True)
class Measured:
    values: NDArray[np.float64]  # (T, width of the kind)
    loss: float


class _Step(nn.Module):
    """The forward pass that DDP wraps: the loss of a batch."""

    def __init__(self, model: TaskModel, loss: nn.Module, gsd_m: float) -> None:
        super().__init__()
        self.model, self.loss, self.gsd_m = model, loss, gsd_m

    def forward(self, images: Tensor, graphs: Any, features: list[Tensor] | None, truth: Tensor) -> Tensor:
        out = self.predict(images, graphs, features)
        return self.loss(at_truth(out, truth), self.target(truth))

    def predict(self, images: Tensor, graphs: Any, features: list[Tensor] | None) -> Tensor:
        """Return logits at the head's stride or of a tile, or standardised values (B,)."""
        if features is None:
            features = self.model.features(images, graphs, gsd_m=self.gsd_m)
        return self.model.decode(features)

    def target(self, truth: Tensor) -> Tensor:
        return kind_of(self.model.task).target(self.model, truth)


def _sentence(row: dict[str, float]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k != "epoch")
