"""Pretrains in a process of its own, where no geospatial library can be imported; may kill itself at a step.

Arguments: root, store, workers, the number of tiles seen after which the process is killed (0: never), and the signal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GEOSPATIAL = {
    "shapely", "geopandas", "rasterio", "osmnx", "pyproj", "osmium", "pyogrio", "affine", "pystac",
}  # fmt: skip


class Blocked:
    """Refuses the import of the geospatial libraries, as a machine without them would."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in GEOSPATIAL:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


class Killer:
    """A progress listener that kills the process, once enough tiles have been seen."""

    def __init__(self, after: int, number: int) -> None:
        self.after, self.number = after, number

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[object]:
        seen = 0.0

        def advance(units: float = 1) -> None:
            nonlocal seen
            seen += units
            if self.after and seen >= self.after:
                self.after = 0
                os.kill(os.getpid(), self.number)

        yield advance


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    import torch
    from pretrain_cases import small_settings

    from rsosm_cli.pipeline.pretrain import pretrain

    torch.set_num_threads(1)
    root, store, workers, after, number = sys.argv[1:]
    minutes = 1e-6 if int(number) == signal.SIGKILL else 60.0
    settings = small_settings(workers=int(workers), checkpoint_minutes=minutes)
    result = pretrain(
        root=Path(root), tiles=[Path(store)], settings=settings, device="cpu", progress=Killer(int(after), int(number))
    )  # fmt: skip
    print(result.status)
