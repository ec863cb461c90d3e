"""Draws that are a function of (seed, sample, place) alone, whatever batch a sample is in.

A counter-based generator: the draw at a counter is the SplitMix64 finaliser (Steele et al., 2014) of it, so that all
draws of a batch are made at once and none depends on another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the 64 low bits of ``value``."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(value: Tensor, bits: int) -> Tensor:
    # Torch shifts signed integers arithmetically; the mask makes the shift logical.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(seeds: Tensor, counter: Tensor | int) -> Tensor:
    """Return int64 hashes of ``seeds`` and ``counter``, broadcast together; multiplication wraps at 64 bits."""
    # A plain number is wrapped here: torch takes none beyond 64 bits.
    value = seeds + ((counter + 1) * _STEP if isinstance(counter, Tensor) else _signed((counter + 1) * _STEP))
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def sample_seeds(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """Return the seeds (B,) int64 of samples (B,) int64 in an epoch: what the masks of a step are drawn from."""
    root = mix(mix(torch.full((), seed, dtype=torch.int64, device=samples.device), 0), epoch)
    return mix(root, samples.long())


def fresh_seeds(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return ``count`` seeds (count,) int64 from ``generator``, or from torch's own."""
    where = generator.device if generator is not None else device
    high = torch.iinfo(torch.int64).max
    return torch.randint(high, (count,), generator=generator, device=where, dtype=torch.int64).to(device)
