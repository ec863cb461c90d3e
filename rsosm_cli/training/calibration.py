"""Calibration: a temperature by which logits are divided, so that a class of probability p is right in a share p of
the places (Guo et al. 2017, section 4.2).

It is fitted on validation ground, never on test ground, and kept in the checkpoint. Classes stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsosm_cli.tiles.label_files import IGNORE

if TYPE_CHECKING:
    from rsosm_cli.training.finetune import Trainer

# Pixels a tile that are looked at: neighbours say the same, and a thousand tiles still fit into memory.
PIXELS = 2048
TILES = 512
BINS = 15  # of equal width, as in the paper (section 5)
# Beyond these, validation ground says "always sure" or "never sure", which other ground will not bear out.
LOWEST, HIGHEST = 0.05, 20.0
WORSE = 0.02  # of the calibration error, from which on it is said
EVAL_BATCH = 16


@dataclass(frozen=True)
class Calibration:
    """``before`` and ``after``: expected calibration error on test ground (0..1), without and with the temperature.

    ``found``: whether validation ground has a best temperature; where it has none, the temperature is 1.
    """

    temperature: float
    before: float
    after: float
    found: bool = True

    @property
    def warning(self) -> str:
        """What the user should know of the probabilities; empty where they are what they should be."""
        if not self.found:
            return (
                "Probabilities are not calibrated: by the validation ground the model is always or never sure. More "
                "labelled ground, or a longer training, would tell."
            )
        if self.after > self.before + WORSE:
            return (
                "Probabilities were calibrated on validation ground, and on test ground they are the worse for it "
                f"(calibration error {self.after:.3f}, before {self.before:.3f}): there is too little validation "
                "ground to go by, or it is of another kind."
            )
        return ""


def calibrate(trainer: Trainer) -> Calibration | None:
    """Return the temperature of the trainer's model; None where there is no validation ground. Every rank sees all."""
    logits, truth = _answers(trainer, trainer.job.rows("validation"))
    if not len(truth):
        return None
    temperature = fit_temperature(logits, truth)
    found = LOWEST * 1.05 < temperature < HIGHEST / 1.05
    if not found:
        temperature = 1.0
    logits, truth = _answers(trainer, trainer.job.rows("test"))
    before, after = (expected_error(logits / t, truth) for t in (1.0, temperature))
    return Calibration(temperature, before, after, found)


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """Return the temperature of least negative log-likelihood for logits (N, K) and classes (N,)."""
    from scipy.optimize import minimize_scalar

    def cost(log_t: float) -> float:
        return float(functional.cross_entropy(logits / float(np.exp(log_t)), truth))

    found = minimize_scalar(cost, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-3})
    return round(float(np.exp(found.x)), 4)


def expected_error(logits: Tensor, truth: Tensor) -> float:
    """Return the mean gap between confidence and accuracy over bins of confidence, weighted by their size."""
    sure, said = logits.softmax(dim=1).max(dim=1)
    right = (said == truth).double().numpy()
    where = np.minimum((sure.numpy() * BINS).astype(np.int64), BINS - 1)
    gap = np.bincount(where, sure.double().numpy() - right, BINS)
    return float(np.abs(gap).sum() / max(len(right), 1))


def _answers(trainer: Trainer, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and classes (N,) of labelled places, thinned by the seed."""
    rng = np.random.default_rng(trainer.job.seed)
    if len(rows) > TILES:
        rows = np.sort(rng.choice(rows, TILES, replace=False))
    trainer.module.eval()
    k = len(trainer.task.classes)
    logits, truth = [torch.zeros(0, k)], [torch.zeros(0, dtype=torch.long)]
    for start in range(0, len(rows), EVAL_BATCH):
        out, codes = trainer.predicted(rows[start : start + EVAL_BATCH])
        flat = out.float().movedim(1, -1).reshape(-1, k)
        known = torch.nonzero(codes.reshape(-1) != IGNORE)[:, 0]
        limit = PIXELS * len(codes)
        if len(known) > limit:
            known = known[torch.from_numpy(rng.choice(len(known), limit, replace=False)).to(known.device)]
        logits.append(flat[known].cpu())
        truth.append(codes.reshape(-1)[known].long().cpu())
    return torch.cat(logits), torch.cat(truth)
