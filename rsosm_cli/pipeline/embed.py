"""``embed``: every tile of a city to an image, an OSM and a fused vector, in ``embeddings.h5``."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import UsageError
from rsosm_cli.pipeline.inputs import (
    Chosen,
    GroundFiles,
    choose_checkpoint,
    find_ground,
    need_image,
    need_osm,
    opened_image,
    projection_of,
    torch_device,
)
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.workspace import Workspace, file_stamp, fingerprint, locked, write_text

if TYPE_CHECKING:
    import torch

    from rsosm_cli.inference.embedding import TileSource
    from rsosm_cli.tiles.store import TileStore

log = logging.getLogger("rsosm")

# Raised when the same inputs would give other embeddings.
VERSION = 1
# Ground of a store's tile against that of the checkpoint's, beyond which a word is due.
ODD_GROUND = 0.25


def embed(
    city: str | None = None,
    *,
    root: Path | None = None,
    tiles: Path | None = None,
    checkpoint: Path | None = None,
    output: Path | None = None,
    patch_maps: bool = False,
    parquet: bool = False,
    preview: bool = False,
    device: str = "auto",
    batch_size: int = 32,
    precision: str = "32",
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Encode the tiles of ``city`` (or of the store ``tiles``) into its ``embeddings.h5`` (or ``output``).

    The encoder is that of the newest pretraining run under ``root`` unless ``checkpoint`` says; a fine-tuned
    checkpoint's encoder serves, too. Without a ``tiles.h5``, tiles are cut from the city's imagery and elements.
    Without images, the OSM vectors alone are written. ``patch_maps`` adds the maps of patches, ``parquet`` a
    GeoParquet of the pooled vectors and ``preview`` a picture of their first three principal components beside it.
    Finished blocks of tiles outlive an interruption. ``precision`` ``bf16`` takes a fraction of the
    time on a GPU, at two to three digits.

    Raises :class:`MissingError`, :class:`UsageError`, :class:`FormatError` or :class:`DiskError`.
    """
    from rsosm_cli.products.embeddings import Pooled, draw_components, recorded_key, write_parquet

    started = time.monotonic()
    if batch_size < 1:
        raise UsageError(f"A batch of {batch_size} tiles is none.", hint="Give 1 or more.")
    if precision not in ("32", "bf16"):
        raise UsageError(f"There is no precision {precision!r}.", hint="Give 32 or bf16.")
    space = Workspace.at(root)
    chosen = choose_checkpoint(space, checkpoint, lambda: _newest(space))
    order = _order(space, city, tiles, chosen, output, patch_maps, precision)
    key = order.key()
    target = order.target
    wanted = {"embeddings": target}
    if parquet:
        wanted["parquet"] = target.with_suffix(".parquet")
    if preview:
        wanted["preview"] = target.with_suffix(".png")
    paths = {name: str(path) for name, path in wanted.items()}
    current = not force and recorded_key(target) == key
    fresh = current and all(p.exists() and p.stat().st_mtime_ns >= target.stat().st_mtime_ns for p in wanted.values())
    if dry_run:
        tile_count = order.count()
        status: Any = "skipped" if fresh else "planned"
        numbers = {"tiles": tile_count, "vectors_mb": round(order.bytes_a_tile() * tile_count / 1e6, 2)}
        return Result("embed", order.name, status, numbers=numbers, notes=tuple(order.notes()))
    if not fresh:
        with locked(target.parent, f"{target.name}.lock"):
            if not current:
                for note in order.notes():
                    log.info("%s", note)
                _encode(order, key, torch_device(device), batch_size, offline, force, progress)
            pooled = Pooled.open(target)
            if parquet:
                write_parquet(wanted["parquet"], pooled)
            if preview:
                draw_components(
                    wanted["preview"], pooled, city=order.name, place=order.local_place(pooled.crs),
                    attribution=order.attribution(),
                )  # fmt: skip
    pooled = Pooled.open(target)
    numbers = {"tiles": int(pooled.facts["tiles"])}
    numbers |= {f"{name}_width": int(pooled.facts[f"{name}_width"]) for name in pooled.vectors}
    seconds = time.monotonic() - started
    if order.city_folder is not None and output is None and not fresh:
        config = order.city_folder / "config.embed.yaml"
        write_text(config, order.config())
        space.city(str(city)).manifest.record(
            "embed", key, files=[*wanted.values(), config], seconds=seconds, numbers=numbers, notes=order.notes(),
            checkpoint=chosen.name, sources=order.sources(),
        )  # fmt: skip
    return Result(
        "embed", order.name, "skipped" if fresh else "done", paths, numbers, tuple(order.notes()), seconds=seconds
    )


def _newest(space: Workspace) -> Path:
    from rsosm_cli.training.runs import newest_run

    return newest_run(space.root, kind="pretrain").folder


@dataclass(frozen=True)
class _Order:
    """One file of embeddings, resolved: from ``store``, else from ``ground``."""

    name: str
    chosen: Chosen
    store: TileStore | None
    ground: GroundFiles | None
    target: Path
    city_folder: Path | None
    patch_maps: bool
    precision: Any

    def key(self) -> str:
        if self.store is not None:
            inputs: list[Any] = [file_stamp(self.store.path)]
        else:
            assert self.ground is not None
            files = [p for p in (self.ground.imagery, self.ground.osm) if p is not None]
            inputs = [*(file_stamp(p) for p in files), self.ground.place_stamp]
        return fingerprint("embed", VERSION, self.chosen.stamps(), inputs, self.patch_maps, self.precision)

    def notes(self) -> list[str]:
        d, notes = self.chosen.description, [self.chosen.note]
        if self.store is None:
            notes.append("There is no tiles.h5: tiles are cut from the imagery and the OSM elements.")
        elif self.store.gsd_m:
            theirs, ours = self.store.gsd_m * self.store.tile_px, d.gsd * d.tile
            if abs(theirs / ours - 1) > ODD_GROUND:
                notes.append(
                    f"The tiles show {theirs:.4g} m of ground, and the checkpoint was trained on tiles of {ours:.4g} m."
                )
        if not self.has_images:
            notes.append("There are no images: tiles are encoded from their OSM objects alone.")
        elif d.method == "mmgr":
            notes.append("MMGR has an encoding of the image and one of the points of interest, and none of both fused.")
        return notes

    @property
    def has_images(self) -> bool:
        if self.store is not None:
            return bool(self.store.has_images)
        return self.ground is not None and self.ground.imagery is not None

    def count(self) -> int:
        return len(self.store) if self.store is not None else len(self.grid())

    def grid(self) -> Any:
        from rsosm_cli.geometry import Grid

        assert self.ground is not None
        d = self.chosen.description
        return Grid.covering(self.ground.place, tile_px=d.tile, stride_px=d.tile, gsd_m=d.gsd)

    def bytes_a_tile(self) -> int:
        import torch

        from rsosm_cli.models.methods import build_encoder

        d = self.chosen.description
        with torch.device("meta"):
            model = build_encoder(d.model, d.text.width, len(d.categories))
        if not self.has_images:
            return 4 * model.widths["osm"]
        rows, columns = model.check_size(d.tile, d.tile)
        maps = sum(width for name, width in model.widths.items() if name != "osm" and name in model.MAPS)
        return 4 * sum(model.widths.values()) + self.patch_maps * 2 * rows * columns * maps

    def sources(self) -> list[dict[str, Any]]:
        if self.ground is not None:
            return self.ground.sources(image=self.has_images, osm=True)
        assert self.store is not None
        return [dict(s) for s in self.store.provenance.get("sources", [])]

    def attribution(self) -> str:
        said = [str(s.get("attribution") or s.get("name") or "") for s in self.sources()]
        return " · ".join(dict.fromkeys(s for s in said if s))

    def local_place(self, crs: str) -> Any:
        """Return the boundary in ``crs``, where it is known."""
        from rsosm_cli.places.place import read_place
        from rsosm_cli.products.publish import local

        if self.ground is not None:
            return local(self.ground.place, crs)
        if self.city_folder is not None and (self.city_folder / "place.geojson").exists():
            return local(read_place(self.city_folder / "place.geojson").geometry, crs)
        return None

    def config(self) -> str:
        import yaml

        files = None if self.ground is None else [str(p) for p in (self.ground.imagery, self.ground.osm) if p]
        facts = {
            "checkpoint": str(self.chosen.folder),
            "tiles": None if self.store is None else str(self.store.path),
            "files": files,
            "patch_maps": self.patch_maps,
            "precision": self.precision,
        }
        return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _order(
    space: Workspace, city: str | None, tiles: Path | None, chosen: Chosen, output: Path | None, patch_maps: bool,
    precision: str,
) -> _Order:  # fmt: skip
    from rsosm_cli.tiles.checksums import check
    from rsosm_cli.tiles.store import TileStore

    files = space.city(city) if city is not None else None
    path = tiles
    if path is None and files is not None and files.tiles.exists():
        path = files.tiles
    if files is not None:
        name = str(files.manifest.read().get("name") or city)
        target = output or files.embeddings
    elif path is not None:
        name = path.parent.name if path.stem == "tiles" else path.stem
        beside = "embeddings.h5" if path.name == "tiles.h5" else f"{path.stem}_embeddings.h5"
        target = output or path.with_name(beside)
    else:
        raise UsageError("No ground is named.", hint="Name a --city, or a store with --tiles.")
    folder = files.folder if files is not None else None
    if path is not None:
        store = TileStore.open(path)
        check(path)
        _check_bands(store, chosen)
        return _Order(name, chosen, store, None, target, folder, patch_maps, precision)
    ground = find_ground(space, city, imagery=None, osm=None, place=None)
    need_osm(ground)
    if ground.imagery is not None:
        need_image(ground, chosen.description)
    return _Order(name, chosen, None, ground, target, folder, patch_maps, precision)


def _check_bands(store: TileStore, chosen: Chosen) -> None:
    wanted = tuple(chosen.description.bands)
    if store.has_images and tuple(store.bands) != wanted:
        raise UsageError(
            f"{store.path} has the bands {', '.join(map(str, store.bands))}, and the checkpoint wants "
            f"{', '.join(map(str, wanted))}.",
            hint="Build the tiles with these bands, or choose another --checkpoint.",
        )


def _encode(
    order: _Order, key: str, device: torch.device, batch_size: int, offline: bool, force: bool, progress: Progress
) -> None:
    from rsosm_cli.inference.embedding import Encoder, embed_blocks
    from rsosm_cli.models.checkpoint import load_checkpoint
    from rsosm_cli.products.embeddings import write_embeddings

    target = order.target
    encoder = load_checkpoint(order.chosen.folder).encoder.to(device).eval()
    whole = target.with_name(f".{target.name}.parts")
    for other in whole.glob("*") if whole.exists() else ():
        if other.name != key or force:
            shutil.rmtree(other, ignore_errors=True)
    d = order.chosen.description
    with _source(order, device, offline) as source:
        if not len(source.bounds_m):
            raise UsageError(f"{order.name} has no tiles to encode.", hint="Is its boundary empty?")
        with progress.task(f"embed {order.name}", len(source.bounds_m), "tiles") as advance:
            blocks = embed_blocks(
                source, Encoder(encoder, d, device, order.patch_maps and source.has_images, order.precision),
                whole / key, batch_size=batch_size, on_tiles=advance,
            )  # fmt: skip
        facts: dict[str, Any] = {
            "key": key, "tiles": len(source.bounds_m), "tile_m": d.gsd * d.tile, "checkpoint": order.chosen.name,
            "method": d.method, "provenance": {"sources": order.sources(), "checkpoint": d.provenance},
        }  # fmt: skip
        if order.store is not None:
            facts["tile_m"] = float(order.store.bounds_m[0, 2] - order.store.bounds_m[0, 0])
        widths = encoder.widths if source.has_images else {"osm": encoder.widths["osm"]}
        facts |= {f"{name}_width": width for name, width in widths.items()}
        names = order.store.names if order.store is not None else []
        write_embeddings(
            target, blocks, crs=source.crs, bounds_m=source.bounds_m, cells=source.cells, names=names, facts=facts
        )
    shutil.rmtree(whole, ignore_errors=True)


@contextmanager
def _source(order: _Order, device: torch.device, offline: bool) -> Iterator[TileSource]:
    from rsosm_cli.inference.embedding import GroundTiles, StoreTiles
    from rsosm_cli.inference.ground import ElementBand, Ground
    from rsosm_cli.inference.tags import TagTable

    d = order.chosen.description
    table = TagTable(d, device, offline=offline)
    if order.store is not None:
        yield StoreTiles(order.store, table, d.tile)
        return
    assert order.ground is not None
    projection = projection_of(order.ground, d.gsd)
    row = d.tile, 16384  # of tiles, in all but the widest cities
    with opened_image(order.ground.imagery, d.bands, row) as image:
        elements = ElementBand(need_osm(order.ground), projection.crs)
        yield GroundTiles(order.grid(), Ground(projection, d.tile, image, elements, d.graph, table))
