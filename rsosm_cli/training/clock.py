"""How fast a loop goes, and how long it waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from torch.utils.data import DataLoader

from rsosm_cli.tiles.dataset import TileBatch


class Clock:
    """Samples a second, and the share of the time that the loop waited for data, since the last lap."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.samples = 0

    def waiting(self, data: DataLoader[TileBatch]) -> Iterator[TileBatch]:
        """Yield from ``data``; the time until an item comes is waiting."""
        items = iter(data)
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            yield item

    @property
    def rate(self) -> float:
        return self.samples / max(1e-9, time.perf_counter() - self.started)

    @property
    def waiting_share(self) -> float:
        return self.waited / max(1e-9, time.perf_counter() - self.started)


def sentence(row: Mapping[str, float | int], losses: Sequence[str]) -> str:
    """Return the numbers of an epoch for the log; ``losses`` are the parts of the loss."""
    parts = [f"loss {row['loss']:.4f} ({', '.join(f'{name} {row[name]:.4f}' for name in losses)})"]
    if "heldout_loss" in row:
        parts.append(f"held out {row['heldout_loss']:.4f}")
    if "retrieval_top1" in row:
        parts.append(f"retrieval {row['retrieval_top1']:.1%} (chance {row['chance']:.1%})")
    return ", ".join([*parts, f"{row['samples_per_s']:.0f} tiles/s"])
