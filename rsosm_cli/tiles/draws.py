"""Random draws as functions of numbers: the same (seed, epoch, sample) gives the same draw in any process, at any time.

No generator has a state, so that a resumed run, another number of workers or another number of ranks sees the same
crops, masks and order. The mixer is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ROUNDS = 4  # Luby and Rackoff: four Feistel rounds are a strong pseudorandom permutation


def hashed(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits of integer ``keys``, which broadcast against each other."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix(state + _GOLDEN + np.asarray(key).astype(np.int64).view(np.uint64))
    return np.asarray(state)


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """Return draws in [0, 1) as a function of integer ``keys``, which broadcast against each other."""
    return (hashed(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Shuffle:
    """A random order of ``range(n)`` in constant memory: a Feistel network over the next power of four.

    Places beyond ``n`` are walked on until they fall inside (at most four times as many steps on average).
    """

    n: int
    seed: int
    epoch: int

    def at(self, places: ArrayLike) -> NDArray[np.int64]:
        """Return what stands at ``places`` (0..n-1) of the order."""
        values = np.array(places, dtype=np.uint64, ndmin=1)
        if self.n <= 1:
            return np.zeros(values.shape, dtype=np.int64)
        half = max(1, -(-(self.n - 1).bit_length() // 2))
        values = self._walk(values, half)
        while (outside := values >= np.uint64(self.n)).any():
            values[outside] = self._walk(values[outside], half)
        return values.astype(np.int64)

    def _walk(self, values: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
        bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
        left, right = values >> bits, values & mask
        for r in range(_ROUNDS):
            left, right = right, left ^ (hashed(self.seed, self.epoch, r, right.view(np.int64)) & mask)
        return (left << bits) | right
