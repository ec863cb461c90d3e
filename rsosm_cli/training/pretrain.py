"""The pretraining loop: the same on one device and on many, resumable at any step to the last bit.

A step depends on (seed, epoch, step) and the weights before it: order, crops, masks and dropout have no state of their
own. A checkpoint therefore is weights, optimiser, the number of the next step and the sums of the epoch so far.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from rsosm_cli.errors import FormatError, RsosmError, UsageError
from rsosm_cli.models.checkpoint import Description, TextDescription, load_checkpoint, save_checkpoint
from rsosm_cli.models.draws import sample_seeds
from rsosm_cli.models.encodings import StepLosses, values_of
from rsosm_cli.models.methods import METHODS, build_encoder
from rsosm_cli.models.mmgr import Mmgr
from rsosm_cli.models.weights import load_image_weights
from rsosm_cli.progress import Progress
from rsosm_cli.settings import MmgrSettings, PretrainSettings
from rsosm_cli.text.categories import CategoryRows, TagEncoder
from rsosm_cli.text.encoder import load_text_encoder
from rsosm_cli.text.weights import tag_weights
from rsosm_cli.tiles.augment import normalise
from rsosm_cli.tiles.dataset import Part, PretrainBatches, TileBatch, loader
from rsosm_cli.tiles.draws import hashed
from rsosm_cli.tiles.tags import Selection, TagInputs
from rsosm_cli.training import heldout, pretrain_report
from rsosm_cli.training.clock import Clock, sentence
from rsosm_cli.training.corpus import corpus_notes, corpus_numbers, open_corpus, statistics
from rsosm_cli.training.devices import Devices
from rsosm_cli.training.points import Categories, learn_categories
from rsosm_cli.training.ranks import average_gradients
from rsosm_cli.training.runs import Run, replacing, write_events, write_metrics
from rsosm_cli.training.schedule import decay_groups, falls_of, lr_factor, optimizer_of, scaled_lr, set_lr
from rsosm_cli.training.speed import slow_on_cpu
from rsosm_cli.training.stop import Stop

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger("rsosm")

# Steps between looks at the clock and at the losses where looking costs a synchronisation of devices or ranks.
_CHECK_EVERY = 20
_DROPOUT_DRAWS = 0x64726F70


@dataclass(frozen=True)
class Job:
    """What a pretraining is of; it travels to spawned processes."""

    stores: tuple[Path, ...]
    folder: Path
    key: str
    settings: PretrainSettings
    devices: Devices
    offline: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a model takes of ``B`` tiles, on the device."""

    images: Tensor  # (B, C, H, W) normalised
    graphs: HeteroData
    seeds: Tensor  # (B,) of the masks
    gsd_m: Tensor  # (B,)
    second: Tensor | None  # (B, C, H, W) another view


class Trainer:
    """One process of a pretraining."""

    def __init__(self, fabric: Fabric, progress: Progress, job: Job) -> None:
        self.fabric = fabric
        self.progress = progress
        self.job = job
        self.settings = s = job.settings
        self.run = Run(job.folder)
        self.corpus = open_corpus(job.stores, s)
        shards, division = self.corpus.shards, self.corpus.division
        self.batches = PretrainBatches(
            shards,
            division.train,
            batch_size=s.optim.batch_size,
            size=s.model.image_size,
            augment=s.augment,
            seed=s.seed,
            part=Part(fabric.global_rank, fabric.world_size),
            views=METHODS[s.method].VIEWS,
        )
        self.key_counts = self.corpus.key_counts()
        self.mean, self.std = (fabric.to_device(torch.tensor(v)) for v in statistics(self.corpus))
        self.categories = Categories()
        self._load_text()
        torch.manual_seed(s.seed)
        self.model = build_encoder(s.model, self.text.width, len(self.categories.names))
        self.model.check_size(shards.tile_px, shards.tile_px)
        if isinstance(self.model, Mmgr) and self.model.table is not None:
            self.model.table.copy_(torch.from_numpy(self.categories.vectors))
        if s.image_weights:
            load_image_weights(self.model, Path(s.image_weights))
        self.model.recompute_blocks(s.checkpoint_blocks)
        if s.compile:
            self.model.image_encoder.compile(dynamic=False)
        self.model.to(fabric.device)
        self.names = ("loss", *self.model.LOSSES)
        self.optimizer = optimizer_of(decay_groups(self.model.named_parameters(), s.optim.weight_decay), s.optim)
        self.total = self.batches.steps * s.optim.epochs
        updates = self.batches.steps / s.optim.accumulate
        self.warmup = round(s.optim.warmup_epochs * updates)
        self.updates = math.ceil(s.optim.epochs * updates)
        self.falls = falls_of(s.optim, updates)
        self.peak = scaled_lr(s.optim, self.batches.batch_size * s.optim.accumulate)
        self.step = 0  # the next step, counted over all epochs
        self.rows: list[dict[str, float | int]] = []
        self.best = math.inf
        self.sums = torch.zeros(len(self.names), device=fabric.device)
        self.warned = False
        self.warnings: list[str] = []

    def _load_text(self) -> None:

        s, shards = self.settings, self.corpus.shards
        if shards.vector_width:
            # Imported graphs bring ready vectors, of a text model that only their maker knows.
            self.text = TextDescription(encoder="vectors", width=shards.vector_width)
            vectors = torch.zeros(len(shards.tags), shards.vector_width)
        elif isinstance(s.model, MmgrSettings) and s.model.points == "cooccurrence":
            # One rank learns them for all: sums on another machine may differ in the last bit.
            first = self.fabric.is_global_zero
            found = learn_categories(self.corpus, s.model, s.seed) if first else Categories()
            self.categories = self.fabric.broadcast(found)
            self.text = TextDescription(encoder="categories", width=s.model.point_width)
            vectors = CategoryRows(self.categories.names).encode(shards.tags)
        else:
            with self.fabric.rank_zero_first():  # the others read what the first has cached
                encoder: TagEncoder = load_text_encoder(s.text.encoder, offline=self.job.offline)
                vectors = encoder.encode(shards.tags)
            self.text = TextDescription(encoder=s.text.encoder, width=encoder.width, identity=encoder.identity)
        selection = Selection.of(s.model)
        # The weights stay on the host, where the means' shares are computed.
        weights = tag_weights(shards.tags, self.key_counts, s.text.tag_weight)
        self.tags = TagInputs(self.fabric.to_device(vectors), weights, selection, selection.ranks(shards.tags))

    # The loop

    def train(self) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if there is one; return what happened, in numbers."""
        self.resume()
        s, steps = self.settings, self.batches.steps
        data = loader(
            self.batches,
            epochs=s.optim.epochs,
            start=self.step,
            workers=s.workers,
            pin=self.fabric.device.type == "cuda",
        )
        saved = time.monotonic()
        unit = self.batches.batch_size
        done = self.step * unit
        # One of several ranks never stops alone: the others would wait for it.
        stop = Stop(patient=self.fabric.world_size > 1)
        with stop.listening(), self.progress.task("pretrain", self.total * unit, "tiles") as advance:
            if done:
                advance(done)
            clock = Clock()
            for batch in clock.waiting(data):
                self.model.train()
                self._step(batch)
                self.step += 1
                clock.samples += unit
                advance(unit)
                ends = self.step % steps == 0
                if ends:
                    self._end_epoch(clock)
                    clock.lap()
                if ends or self._looks():
                    saved = self._save_if_due(saved, ends)
                    self._stop_if_asked(stop)
        self._save("last", with_state=True)
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        """Write the report; return the numbers and notes of the run, for the manifest."""
        shown = heldout.example(self, pretrain_report.TILES)
        notes = [*corpus_notes(self.corpus, self.settings), *self.categories.notes, *self.warnings]
        numbers = {
            **corpus_numbers(self.corpus, self.settings, self.fabric.world_size),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{k: v for k, v in self.rows[-1].items() if k not in ("epoch", "lr", "samples_per_s", "waiting_share")},
        }
        if self.fabric.is_global_zero:
            numbers |= self.categories.numbers
            facts = {"method": self.settings.method, "devices": str(self.job.devices), **numbers}
            report = pretrain_report.build_report(
                f"Pretraining {self.run.name}", facts, self.rows, self._shown(shown), method=self.settings.method,
                held_out=len(self.corpus.division.holdout) > 0, warnings=self.warnings,
            )  # fmt: skip
            report.write(self.run.report)
        self.fabric.barrier()
        return {"numbers": numbers, "notes": notes, **self.provenance()}

    def _shown(self, example: heldout.Example | None) -> pretrain_report.Reconstruction | None:
        if example is None:
            return None
        return pretrain_report.show(example, self.model.stride, self.mean, self.std, self.corpus.shards.tags, self.tags)

    def _step(self, batch: TileBatch) -> None:
        s = self.settings
        epoch = self.step // self.batches.steps
        last_of_update = (self.step + 1) % s.optim.accumulate == 0 or self.step + 1 == self.total
        update = self.step // s.optim.accumulate
        set_lr(self.optimizer, self.peak * lr_factor(update, self.warmup, self.updates, self.falls))
        # Dropout has its own numbers a step and rank.
        torch.manual_seed(int(hashed(_DROPOUT_DRAWS, s.seed, self.step, self.fabric.global_rank).view(np.int64)[()]))
        losses = self.losses(self.inputs(batch, epoch))
        (losses.total / s.optim.accumulate).backward()  # type: ignore[no-untyped-call]
        self.sums += values_of(losses)
        if last_of_update:
            average_gradients(self.model)
            if s.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), s.optim.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def losses(self, inputs: Inputs) -> StepLosses:
        """Return the losses of a step; their means over ranks are those of the whole batch."""
        with self.fabric.autocast():
            return self.model.step(
                inputs.images, inputs.graphs, seeds=inputs.seeds, gsd_m=inputs.gsd_m, second=inputs.second
            )

    def inputs(self, batch: TileBatch, epoch: int, *, colour: bool = True) -> Inputs:
        """Return what the model takes, on the device."""

        def there(values: Tensor) -> Tensor:
            return values.to(self.fabric.device, non_blocking=True)

        second = None
        if batch.second is not None and batch.second_colour is not None:
            second = normalise(there(batch.second), self.mean, self.std, there(batch.second_colour))
        return Inputs(
            normalise(there(batch.images), self.mean, self.std, there(batch.colour) if colour else None),
            self.tags.batch(batch.graphs), sample_seeds(self.settings.seed, epoch, there(batch.samples)),
            there(batch.gsd_m), second,
        )  # fmt: skip

    def _stop_if_asked(self, stop: Stop) -> None:
        """Save and leave with KeyboardInterrupt where any rank has been asked to; half an update cannot be saved."""
        asked = stop.asked
        if self.fabric.world_size > 1:
            flag = torch.tensor(float(asked), device=self.fabric.device)
            asked = bool(torch.as_tensor(self.fabric.all_reduce(flag, reduce_op="sum")) > 0)
        if not asked or self.step % self.settings.optim.accumulate:
            return
        self._require_finite(float(self._all_sums().sum()))
        self._save("last", with_state=True)
        log.warning("Stopped at step %d of %d: the same command goes on from there.", self.step, self.total)
        raise KeyboardInterrupt

    def _looks(self) -> bool:
        cheap = self.fabric.device.type == "cpu"
        return cheap or self.step % _CHECK_EVERY == 0

    def _end_epoch(self, clock: Clock) -> None:
        """Average the epoch's losses, evaluate the held-out tiles, say and record both."""
        s, steps = self.settings, self.batches.steps
        epoch = self.step // steps
        means = (self._all_sums().mean(0) / steps).tolist()
        self._require_finite(means[0])
        self.sums.zero_()
        row: dict[str, float | int] = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= dict(zip(self.names, means, strict=True))
        held = heldout.evaluate(self)
        row |= held.metrics
        row |= {"samples_per_s": round(clock.rate, 2), "waiting_share": round(clock.waiting_share, 4)}
        self.rows.append(row)
        log.info("epoch %d of %d: %s", epoch, s.optim.epochs, sentence(row, self.model.LOSSES))
        self._judge(epoch, held)
        score = held.metrics.get("heldout_loss", means[0])
        if score < self.best:
            self.best = score
            self._save("best", with_state=False)
        if self.fabric.is_global_zero:
            write_metrics(self.run.metrics, self.rows)
            write_events(self.run.folder, self.rows)

    def _judge(self, epoch: int, held: heldout.HeldOut) -> None:
        """Say so where the retrieval is at chance after the warm-up and a quarter of the epochs; once, and again where
        it ends like that.
        """
        optim = self.settings.optim
        last = epoch == optim.epochs
        early = epoch <= max(optim.warmup_epochs, optim.epochs / 4) and not last
        if not held.at_chance or early or (self.warned and not last):
            return
        self.warned = True
        if last:
            self.warnings.append(held.verdict(epoch))
        log.warning("%s", held.verdict(epoch))

    def _all_sums(self) -> Tensor:
        """Return the sums of all ranks (ranks, 4)."""
        gathered = self.fabric.all_gather(self.sums)
        return torch.as_tensor(gathered).reshape(-1, len(self.names))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            epoch = (self.step - 1) // self.batches.steps + 1
            kept = f"{self.run.last} holds the weights from before" if self.run.last.exists() else "Nothing was saved"
            raise RsosmError(
                f"The loss of epoch {epoch} is {loss}: the training has diverged.",
                hint=f"{kept}; try a lower optim.lr, a longer warm-up or optim.clip_norm=1, with --force.",
                epoch=epoch,
                step=self.step,
            )

    # Checkpoints

    def _save_if_due(self, saved: float, ends: bool) -> float:
        """Save where the time has come; rank 0's clock decides for all. Returns when it was last done."""
        if self.step % self.settings.optim.accumulate:
            return saved  # half an update cannot be saved
        # The end of an epoch is the better place: a tenth of the time is waited for it.
        due = time.monotonic() - saved > 60 * self.settings.checkpoint_minutes * (0.1 if ends else 1.0)
        if self.fabric.world_size > 1:
            due = bool(self.fabric.broadcast(due))
        if not due:
            return saved
        self._require_finite(float(self._all_sums().sum()))
        self._save("last", with_state=True)
        return time.monotonic()

    def _save(self, which: str, *, with_state: bool) -> None:
        sums = self._all_sums().cpu()
        if self.fabric.is_global_zero:
            with replacing(self.run.last if which == "last" else self.run.best) as folder:
                save_checkpoint(folder, self.model, self.describe())
                if with_state:
                    state = {
                        "key": self.job.key,
                        "step": self.step,
                        "optimizer": self.optimizer.state_dict(),
                        "rows": self.rows,
                        "best": self.best,
                        "warned": self.warned,
                        "sums": sums,
                    }
                    torch.save(state, folder / "state.pt")
        self.fabric.barrier()

    def describe(self) -> Description:
        """Return what the checkpoint says of itself: how inputs must be made, and what it was trained on."""
        s, shards = self.settings, self.corpus.shards
        # The model has seen tiles resized to its own size: that is its tile, and its ground sample distance.
        scale = shards.tile_px / s.model.image_size
        return Description(
            method=s.method,
            model=s.model,
            text=self.text,
            tag_weight=s.text.tag_weight,
            key_counts=self.key_counts,
            categories=self.categories.names,
            graph=shards.graph_settings,
            tile=s.model.image_size,
            gsd=shards.gsd_m * scale,
            bands=shards.bands,
            mean=tuple(self.mean.tolist()),
            std=tuple(self.std.tolist()),
            provenance=self.provenance(),
            metrics=dict(self.rows[-1]) if self.rows else {},
        )

    def provenance(self) -> dict[str, Any]:
        """Return the sources of the stores, each once, and the stores."""
        stores = self.corpus.shards.provenance
        sources: list[Any] = []
        for store in stores:
            sources += [x for x in store.get("sources", []) if x not in sources]
        return {"run": self.run.name, "stores": len(stores), "sources": sources}

    def resume(self) -> None:
        """Take up the last checkpoint of the run, if there is one."""
        if not self.run.state.is_file():
            return
        try:
            state = torch.load(self.run.state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise FormatError(
                f"{self.run.state} is damaged: {' '.join(str(error).split())[:200]}.", hint="Start over with --force."
            ) from None
        if state["key"] != self.job.key:
            raise UsageError(f"{self.run.folder} was made with other settings or inputs.", hint="Use --force.")
        self.model.load_state_dict(load_checkpoint(self.run.last).model.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows, self.best = state["step"], state["rows"], state["best"]
        self.warned = state["warned"]
        sums = state["sums"]
        mine = sums[self.fabric.global_rank] if len(sums) == self.fabric.world_size else sums.mean(0)
        self.sums.copy_(mine)
        if self.step:
            log.info(
                "Resuming at step %d of %d (epoch %d).", self.step, self.total, self.step // self.batches.steps + 1
            )


def train(fabric: Fabric, progress: Progress, job: Job) -> dict[str, Any]:
    """Run one process of a pretraining; return the numbers, notes and sources of the run."""
    return Trainer(fabric, progress, job).train()


def plan(
    stores: tuple[Path, ...], settings: PretrainSettings, devices: Devices
) -> tuple[dict[str, Any], list[str], str | None]:
    """Return what a training would be, in numbers and sentences, and a warning where a CPU is too slow for it."""
    corpus = open_corpus(stores, settings)
    numbers = corpus_numbers(corpus, settings, devices.world)
    with torch.device("meta"):
        model = build_encoder(settings.model, text_width=384)
    model.check_size(corpus.shards.tile_px, corpus.shards.tile_px)
    parameters = sum(p.numel() for p in model.parameters())
    slow = slow_on_cpu(model, numbers["steps"] * numbers["batch"]) if devices.accelerator == "cpu" else None
    # Weights twice (last and best), two moments of the optimiser.
    numbers |= {"parameters": parameters, "disk_bytes": 16 * parameters}
    return numbers, corpus_notes(corpus, settings), slow
