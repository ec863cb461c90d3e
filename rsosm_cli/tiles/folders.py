"""Folders whose arrangement is the label: chips with label images, folders of classes, pairs of images for change.

- ``chips``: ``a.png`` (or ``a_img.png``, with a ready graph or vector files) and ``a_label.png``.
- ``classes``: one folder a class, as EuroSAT, NWPU-RESISC45 and UC Merced are distributed.
- ``pairs``: folders ``A`` and ``B`` (``before`` and ``after``, ``im1`` and ``im2``, ``t1`` and ``t2``) with images of
  the same names, and ``label`` (``OUT``, ``gt``, ``mask``), as LEVIR-CD and CDD are distributed.

Any of them may lie in folders ``train``, ``val`` and ``test``, which then are the split, and in folders that hold
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.schema import EDGE_WIDTHS, KEY_POINTS, NODE_TYPES
from rsosm_cli.progress import Advance
from rsosm_cli.settings import BuildSettings, ClassSettings, GridSettings, TaskSettings
from rsosm_cli.tiles.chips import CHIPS_A_BLOCK, Chip, read_chip_image
from rsosm_cli.tiles.label_files import IGNORE, class_codes
from rsosm_cli.tiles.labels import MIN_COVER, TileLabels
from rsosm_cli.tiles.parts import assemble, finished, image_part, write_part
from rsosm_cli.workspace import fingerprint

Layout = Literal["chips", "classes", "pairs"]
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
PART_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
_BEFORE, _AFTER = ("a", "before", "im1", "t1", "time1"), ("b", "after", "im2", "t2", "time2")
_MASKS = ("label", "labels", "out", "gt", "mask", "masks")
# Hues of classes that bring no colour go round the circle by the golden angle, so that neighbours in the list differ.
_GOLDEN = 0.618034


@dataclass(frozen=True)
class Item:
    """One labelled tile of a folder. ``part``: 0 train, 1 validation, 2 test, -1 where the folder does not say."""

    name: str
    images: tuple[Path, ...]  # one, or two dates; of chips none: they have a store of their own
    mask: Path | None
    category: str | None
    part: int


@dataclass(frozen=True)
class LabelFolder:
    path: Path
    layout: Layout
    items: tuple[Item, ...]

    @property
    def categories(self) -> list[str]:
        return sorted({item.category for item in self.items if item.category is not None})

    def key(self, tile_px: int) -> str:
        """Return what changes when the images do, or their size in the store."""
        stamps = [(i.name, [(p.stat().st_size, p.stat().st_mtime_ns) for p in i.images]) for i in self.items]
        return fingerprint("folder", 1, str(self.path.resolve()), tile_px, stamps)


def read_folder(path: Path) -> LabelFolder:
    """Return what a folder of labels holds. Raises :class:`FormatError` where it is arranged in none of the ways."""
    folder = path
    while True:
        inside = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
        folders = [p for p in inside if p.is_dir()]
        if len(folders) != 1 or any(p.suffix.lower() in IMAGES for p in inside):
            break
        folder = folders[0]
    roots = [(folder, -1)]
    if folders and all(p.name.casefold() in PART_FOLDERS for p in folders):
        roots = [(p, PART_FOLDERS[p.name.casefold()]) for p in folders]
    layout: Layout
    for layout, find in (("chips", _chips), ("pairs", _pairs), ("classes", _classes)):
        items = [item for root, part in roots for item in find(root, part)]
        if items:
            return LabelFolder(path, layout, tuple(items))
    raise FormatError(
        f"{path} holds no labels in an arrangement that is known.",
        hint="Known: chips with NAME_label.png beside them; one folder a class; folders A, B and label of image pairs.",
    )


def _chips(root: Path, part: int) -> Iterator[Item]:
    for mask in sorted(p for p in root.rglob("*_label.*") if p.suffix.lower() in IMAGES):
        stem = mask.with_suffix("").relative_to(root).as_posix().removesuffix("_label")
        yield Item(stem if part < 0 else f"{root.name}/{stem}", (), mask, None, part)


def _pairs(root: Path, part: int) -> Iterator[Item]:
    names = {p.name.casefold(): p for p in root.iterdir() if p.is_dir()}
    found = [next((names[n] for n in wanted if n in names), None) for wanted in (_BEFORE, _AFTER, _MASKS)]
    if any(f is None for f in found):
        return
    before, after, masks = ({p.stem: p for p in _images(f)} for f in found if f is not None)
    for stem in sorted(before):
        if stem not in after or stem not in masks:
            raise MissingError(f"{before[stem]} has no later image or no label of the same name under {root}.")
        yield Item(_prefixed(stem, part), (before[stem], after[stem]), masks[stem], None, part)


def _classes(root: Path, part: int) -> Iterator[Item]:
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if len(folders) < 2 or not all(any(True for _ in _images(p)) for p in folders):
        return
    for folder in folders:
        for image in _images(folder):
            yield Item(_prefixed(f"{folder.name}/{image.stem}", part), (image,), None, folder.name, part)


def _images(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGES and not p.name.startswith("."))


def _prefixed(name: str, part: int) -> str:
    return name if part < 0 else f"{('train', 'val', 'test')[part]}/{name}"


def with_classes(task: TaskSettings, folder: LabelFolder) -> TaskSettings:
    """Return the task with the folder's classes where it has none of its own."""
    import colorsys

    if task.classes or task.kind != "classification" or not folder.categories:
        return task
    made = []
    for i, name in enumerate(folder.categories):
        red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.6, 0.55 + 0.35 * (i % 2)))
        made.append(ClassSettings(name=name, colour=f"#{red:02x}{green:02x}{blue:02x}"))
    return TaskSettings.model_validate(task.model_dump() | {"classes": made})


def folder_store(folder: LabelFolder, path: Path, tile_px: int, gsd_m: float, advance: Advance) -> None:
    """Write the images of a folder as a tile store without objects; pairs have the bands of both dates.

    Images are resized to ``tile_px``; how large a pixel is on the ground nobody knows, so ``gsd_m`` is what is said.
    """
    items = folder.items
    n_images = len(items[0].images)
    bands = _bands(items[0].images[0])
    settings = BuildSettings(
        grid=GridSettings(tile=tile_px, stride=tile_px, gsd=gsd_m),
        bands=tuple(b + date * len(bands) for date in range(n_images) for b in bands),
    )
    parts = []
    for start in range(0, len(items), CHIPS_A_BLOCK):
        block = items[start : start + CHIPS_A_BLOCK]
        part = path.with_name(f".{path.stem}.parts") / f"block-{start // CHIPS_A_BLOCK:05d}.npz"
        parts.append(part)
        if not finished(part, True):
            part.parent.mkdir(parents=True, exist_ok=True)
            _write_block(part, block, start, bands, settings)
        advance(len(block))
    assemble(
        path, parts, settings=settings, crs="", gsd_m=None, provenance={"folder": folder.path.name}, has_images=True
    )


def _bands(image: Path) -> tuple[int, ...]:
    from rsosm_cli.imagery.raster import open_raster

    with open_raster(str(image)) as dataset:
        return (1, 2, 3) if dataset.count >= 3 else (1,)


def _write_block(
    part: Path, block: Sequence[Item], start: int, bands: tuple[int, ...], settings: BuildSettings
) -> None:
    side, share = settings.grid.tile, np.zeros(len(block), np.float32)
    with image_part(part, len(block), (len(settings.bands), side, side)) as out:
        for i, item in enumerate(block):
            read = [read_chip_image(Chip(item.name, p, None, (), None), bands, side) for p in item.images]
            share[i] = min(known for _, known in read)
            out.append(np.concatenate([pixels for pixels, _ in read])[None])
    number = np.arange(start, start + len(block))
    write_part(
        part, no_graphs(len(block)), [], cells=np.stack([number, np.zeros_like(number)], axis=1),
        bounds_m=np.tile([0.0, 0.0, 1.0, 1.0], (len(block), 1)), image_share=share, numbers={},
        names=[item.name for item in block],
    )  # fmt: skip


def no_graphs(n_tiles: int) -> GraphArrays:
    """Return the graphs of tiles without any object."""
    zero, none = np.zeros(n_tiles + 1, np.int64), np.zeros(0, np.float32)
    nodes = {
        t: NodeArrays(
            zero, np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int32),
            np.zeros((0, KEY_POINTS[t], 2), np.float32), none, none, np.zeros((0, 4, 2), np.float32),
            np.zeros((0, 2), np.float32), np.zeros(0, np.int16),
        )
        for t in NODE_TYPES
    }  # fmt: skip
    edges = {pair: EdgeArrays(zero, np.zeros((2, 0), np.int32), np.zeros(0, np.uint8)) for pair in EDGE_WIDTHS}
    return GraphArrays(nodes, edges)


def match_items(folder: LabelFolder, names: Sequence[str]) -> list[Item | None]:
    """Return the item of each tile: by its name, or by the last part of it where that is unmistakable."""
    whole = {item.name: item for item in folder.items}
    short: dict[str, Item | None] = {}
    for item in folder.items:
        last = item.name.rsplit("/", 1)[-1]
        short[last] = None if last in short else item
    return [whole.get(name) or short.get(name.rsplit("/", 1)[-1]) for name in names]


def folder_labels(folder: LabelFolder, task: TaskSettings, names: Sequence[str], tile_px: int) -> TileLabels:
    """Return the labels of the tiles called ``names`` that the folder has; MissingError where it has none."""
    found = match_items(folder, names)
    tiles = np.array([i for i, item in enumerate(found) if item is not None], np.int64)
    if not len(tiles):
        raise MissingError(
            f"None of the tiles is called as the labels in {folder.path} are, such as {folder.items[0].name}.",
            hint="Build the tiles of the same folder: rsosm build-graph --chips FOLDER --output tiles.h5",
        )
    items = [item for item in found if item is not None]
    if folder.layout == "classes":
        if task.kind != "classification":
            raise UsageError(
                f"{folder.path} has a class a picture, and {task.name} is a {task.kind} task.",
                hint="Choose a task of the kind classification, such as `scene`.",
            )
        codes = class_codes(task, [str(item.category) for item in items], folder.path.name)
        return TileLabels(tiles, codes, None)
    masks = np.stack([_mask(item, task, tile_px) for item in items])
    if task.dense:
        known = (masks != IGNORE).any(axis=(1, 2))
        return TileLabels(tiles[known], masks[known], None)
    flat = masks.reshape(len(masks), -1)
    counts = np.stack([(flat == c).sum(axis=1) for c in range(len(task.classes))], axis=1)
    known = counts.sum(axis=1) >= MIN_COVER * flat.shape[1]
    tiles, counts = tiles[known], counts[known]
    if task.kind == "classification":
        return TileLabels(tiles, counts.argmax(axis=1).astype(np.uint8), None)
    if task.kind == "distribution":
        return TileLabels(tiles, None, counts / counts.sum(axis=1, keepdims=True))
    raise UsageError(f"{folder.path} holds label images of classes, and {task.name} predicts values.")


def _mask(item: Item, task: TaskSettings, tile_px: int) -> NDArray[np.uint8]:
    """Return the class codes of a label image (tile_px, tile_px). Of two classes of change, all but 0 is the second."""
    from PIL import Image, UnidentifiedImageError

    assert item.mask is not None
    try:
        with Image.open(item.mask) as image:
            picture = image if image.mode in ("L", "P", "I", "I;16", "1") else image.convert("L")
            values = np.asarray(picture.resize((tile_px, tile_px), Image.Resampling.NEAREST)).astype(np.int64)
    except (OSError, UnidentifiedImageError) as error:
        raise FormatError(f"The label image {item.mask} cannot be read: {error}.") from error
    if task.kind == "change" and len(task.classes) == 2:
        return (values != 0).astype(np.uint8)
    found, where = np.unique(values, return_inverse=True)
    return class_codes(task, found.tolist(), item.mask.name)[where.reshape(values.shape)]
