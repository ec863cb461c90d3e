"""Which ground trains, which chooses the epoch, which tests.

Parts are ground, not files: a block of ground goes whole to one part, whatever number of tiles or cities' stores show
it. A tile that reaches into ground of another part, or nearer to it than the buffer, is used by none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.settings import SplitSettings

if TYPE_CHECKING:
    from shapely import Geometry

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
UNUSED = -1
# Below this many blocks the shares 50 / 10 / 40 cannot be met, and a test on three blocks says little.
MIN_BLOCKS = 16
# Assignments drawn; the one whose parts have the most alike class shares is taken. More hardly improve it.
DRAWS = 64
# Spelling of the parts in users' files.
SPELLINGS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}


@dataclass(frozen=True)
class Ground:
    """Labelled tiles of all cities. ``N`` tiles."""

    city: NDArray[np.int64]  # (N,) index into ``cities``
    cities: tuple[str, ...]
    crs: tuple[str, ...]  # a city
    stride_m: tuple[float, ...]  # a city
    bounds_m: NDArray[np.float64]  # (N, 4) west, south, east, north in the CRS of its city
    content: NDArray[np.float64]  # (N, K) amount of each class in the tile, to make the parts alike


@dataclass(frozen=True)
class Split:
    """The part of each of ``N`` labelled tiles, and the ground that the parts own."""

    part: NDArray[np.int8]  # (N,) index into PARTS, or UNUSED
    block: NDArray[np.int64]  # (N,) block of ground, the unit of the confidence intervals
    block_m: float  # side of a block; 0 where the split is not by blocks
    ground: tuple[dict[str, Any], ...]  # {"city", "crs", "part", "boxes_m": [[w, s, e, n], ...]}
    notes: tuple[str, ...] = ()

    def of(self, part: Part) -> NDArray[np.int64]:
        """Return the tiles of a part."""
        return np.flatnonzero(self.part == PARTS.index(part))


def split_ground(ground: Ground, settings: SplitSettings, seed: int) -> Split:
    """Split labelled tiles by blocks, cities or polygons. Raises :class:`UsageError` where a part is empty."""
    if settings.by == "city":
        split = _by_city(ground, settings, seed)
    elif settings.by == "file":
        split = _by_file(ground, Path(str(settings.file)), settings.block_m)
    else:
        shares = np.array([settings.train, settings.validation, 1 - settings.train - settings.validation])
        split = _by_blocks(ground, settings, shares, seed)
    wanted = [p for p in PARTS if p != "validation" or (settings.validation > 0 and settings.by != "file")]
    for part in wanted:
        if not len(split.of(part)):
            raise UsageError(
                f"The split leaves no tile to the {part} part: {len(ground.city)} tiles have labels.",
                hint="Add labels, use smaller tiles or blocks (--set split.block_m=...), or give less buffer.",
                part=part,
            )
    if not len(split.of("validation")):
        note = "No labelled tile lies on validation ground: the last epoch is kept."
        return replace(split, notes=(*split.notes, note))
    return split


def label_share(tiles: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Return a random share of the training tiles, at least one; smaller shares of a seed lie within larger ones."""
    if share >= 1:
        return tiles
    order = np.random.default_rng(seed).permutation(len(tiles))
    return np.sort(tiles[order[: max(1, round(share * len(tiles)))]])


def used_ground(ground: Sequence[Mapping[str, Any]], crs: str) -> Geometry:
    """Return the ground in ``crs`` that trained a model or chose its epoch; empty where it is not known."""
    import shapely

    areas = []
    for entry in ground:
        if entry["part"] != "test":
            boxes = shapely.box(*np.array(entry["boxes_m"], np.float64).reshape(-1, 4).T)
            areas.append(reproject(np.array([shapely.union_all(boxes)], dtype=object), entry["crs"], crs)[0])
    return shapely.union_all(areas)


def ground_features(ground: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ground of a split as GeoJSON (WGS 84), one feature a city and part."""
    import shapely
    from shapely.geometry import mapping

    features = []
    for entry in ground:
        boxes = np.array(entry["boxes_m"], np.float64).reshape(-1, 4)
        area = shapely.union_all(shapely.box(*boxes.T))
        shape = reproject(np.array([area], dtype=object), entry["crs"], WGS84)[0]
        properties = {"city": entry["city"], "split": entry["part"], "blocks": len(boxes)}
        features.append({"type": "Feature", "properties": properties, "geometry": mapping(shape)})
    return {"type": "FeatureCollection", "features": features}


def _by_blocks(ground: Ground, settings: SplitSettings, shares: NDArray[np.float64], seed: int) -> Split:
    step = max(ground.stride_m)
    widest = float((ground.bounds_m[:, 2] - ground.bounds_m[:, 0]).max())
    least = max(1, int(np.ceil(widest / step - 1e-9)))  # a block narrower than a tile holds none
    cells = max(least, round(settings.block_m / step))
    notes: list[str] = []
    while True:
        keys, block = _blocks(ground, cells * step)
        if len(keys) >= MIN_BLOCKS or cells == least:
            break
        cells = max(least, cells // 2)
    side = cells * step
    if cells < round(settings.block_m / step):
        notes.append(
            f"The labelled ground is small: the blocks of the split were shrunk from {settings.block_m:g} m to "
            f"{side:g} m ({len(keys)} blocks)."
        )
    part_of = draw_parts(block, ground.content, len(keys), shares, seed)
    part = part_of[block]
    mixed = _reaches_other(ground, keys, part_of, part, side, settings.buffer_m)
    part = np.where(mixed, UNUSED, part).astype(np.int8)
    if mixed.any():
        notes.append(f"{int(mixed.sum())} of {len(part)} labelled tiles lie across or near borders and are not used.")
    return Split(part, block, side, _block_ground(ground, keys, part_of, side), tuple(notes))


def _blocks(ground: Ground, side: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the blocks (B, 3: CRS, column, row) that hold centres of tiles, and the block of each tile."""
    _, crs = np.unique(np.array(ground.crs), return_inverse=True)
    centre = (ground.bounds_m[:, :2] + ground.bounds_m[:, 2:]) / 2
    cell = np.floor(centre / side).astype(np.int64)
    keys, block = np.unique(np.column_stack([crs[ground.city], cell]), axis=0, return_inverse=True)
    return keys, block.ravel()


def draw_parts(
    block: NDArray[np.int64], content: NDArray[np.float64], n_blocks: int, wanted: NDArray[np.float64], seed: int
) -> NDArray[np.int8]:
    """Return a part for each block: of many random assignments, the one whose parts are most alike in content.

    ``wanted`` (3,): the share of each part. A part with a share gets one block at least.
    """
    rng = np.random.default_rng(seed)
    needed = np.flatnonzero(wanted > 0)
    if n_blocks < len(needed):
        raise UsageError(
            f"The labels cover {n_blocks} block{'s' if n_blocks != 1 else ''} of ground: too little to split.",
            hint="Add labels elsewhere, build smaller tiles, or split by city or file (--set split.by=city).",
        )
    held = np.zeros((n_blocks, content.shape[1] + 1))  # tiles, then amounts a class
    np.add.at(held, block, np.column_stack([np.ones(len(block)), content]))
    held = held[:, held.sum(axis=0) > 0]
    held /= held.sum(axis=0)
    best, best_score = np.zeros(n_blocks, np.int8), np.inf
    for _ in range(DRAWS):
        order = rng.permutation(n_blocks)
        middle = np.cumsum(held[order, 0]) - held[order, 0] / 2
        drawn = np.empty(n_blocks, np.int8)
        drawn[order] = needed[np.searchsorted(np.cumsum(wanted[needed])[:-1], middle, side="right")]
        for index in needed[~np.isin(needed, drawn)]:  # too few blocks for the shares
            largest = np.bincount(drawn, minlength=3).argmax()
            drawn[order[drawn[order] == largest][0]] = index
        parts = np.stack([held[drawn == p].sum(axis=0) for p in range(3)])  # (3, K + 1)
        score = float(np.abs(parts - wanted[:, None]).mean())
        if score < best_score - 1e-12:
            best, best_score = drawn, score
    return best


def _reaches_other(
    ground: Ground,
    keys: NDArray[np.int64],
    part_of: NDArray[np.int8],
    part: NDArray[np.int8],
    side: float,
    buffer_m: float,
) -> NDArray[np.bool_]:
    """Return which tiles, widened by the buffer, share area with blocks of another part."""
    _, crs = np.unique(np.array(ground.crs), return_inverse=True)
    tiny = 1e-6  # of a block: borders that only touch share no area
    low = np.floor((ground.bounds_m[:, :2] - buffer_m) / side + tiny).astype(np.int64)
    high = np.floor((ground.bounds_m[:, 2:] + buffer_m) / side - tiny).astype(np.int64)
    reach = int((high - low).max()) + 1
    mixed = np.zeros(len(part), bool)
    for dx in range(reach):
        for dy in range(reach):
            cell = np.minimum(low + np.array([dx, dy]), high)
            wanted = np.column_stack([crs[ground.city], cell])
            both, index = np.unique(np.concatenate([keys, wanted]), axis=0, return_inverse=True)
            table = np.full(len(both), UNUSED, np.int8)
            table[index.ravel()[: len(keys)]] = part_of
            other = table[index.ravel()[len(keys) :]]
            mixed |= (other != UNUSED) & (other != part)
    return mixed


def _block_ground(
    ground: Ground, keys: NDArray[np.int64], part_of: NDArray[np.int8], side: float
) -> tuple[dict[str, Any], ...]:
    names, crs = np.unique(np.array(ground.crs), return_inverse=True)
    entries = []
    for index, name in enumerate(names):
        cities = ", ".join(c for c, k in zip(ground.cities, crs, strict=True) if k == index)
        for number, part in enumerate(PARTS):
            cells = keys[(keys[:, 0] == index) & (part_of == number), 1:] * side
            if len(cells):
                boxes = np.column_stack([cells, cells + side]).tolist()
                entries.append({"city": cities, "crs": str(name), "part": part, "boxes_m": boxes})
    return tuple(entries)


def _tile_ground(ground: Ground, part: NDArray[np.int8]) -> tuple[dict[str, Any], ...]:
    entries = []
    for index, city in enumerate(ground.cities):
        for number, name in enumerate(PARTS):
            boxes = ground.bounds_m[(ground.city == index) & (part == number)]
            if len(boxes):
                entries.append({"city": city, "crs": ground.crs[index], "part": name, "boxes_m": boxes.tolist()})
    return tuple(entries)


def _by_city(ground: Ground, settings: SplitSettings, seed: int) -> Split:
    unknown = [c for c in settings.test_cities if c not in ground.cities]
    if unknown:
        raise UsageError(
            f"split.test_cities names {', '.join(unknown)}, which is not among the cities.",
            hint=f"The cities with labels are {', '.join(ground.cities)}.",
        )
    tests = np.isin(np.array(ground.cities), settings.test_cities)[ground.city]
    if tests.all() or not tests.any():
        raise UsageError(
            "A split by city needs labelled tiles in a test city and in another one.", hint="Give two cities or more."
        )
    part = np.full(len(ground.city), PARTS.index("test"), np.int8)
    rest = np.flatnonzero(~tests)
    notes: tuple[str, ...] = ()
    part[rest] = 0
    if settings.validation > 0:  # ground of the training cities, in proportion to what the shares say of the two
        shares = np.array([settings.train, settings.validation, 0.0]) / (settings.train + settings.validation)
        inner = replace(ground, city=ground.city[rest], bounds_m=ground.bounds_m[rest], content=ground.content[rest])
        drawn = _by_blocks(inner, settings, shares, seed)
        part[rest], notes = drawn.part, drawn.notes
    shared = rest[_meets(ground, rest, np.flatnonzero(tests))]
    part[shared] = UNUSED  # neighbouring cities can share tiles
    if len(shared):
        notes += (f"{len(shared)} labelled tiles of training cities overlap test cities and are not used.",)
    _, block = _blocks(ground, max(settings.block_m, max(ground.stride_m)))
    return Split(part, block, 0.0, _tile_ground(ground, part), notes)


def _meets(ground: Ground, tiles: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of ``tiles`` share area with any of ``others``, whatever their CRS."""
    import shapely

    boxes = shapely.box(*ground.bounds_m.T)
    meets = np.zeros(len(tiles), bool)
    for index, crs in enumerate(ground.crs):
        tree = shapely.STRtree(boxes[others[ground.city[others] == index]])
        for source in range(len(ground.crs)):
            mine = np.flatnonzero(ground.city[tiles] == source)
            moved = reproject(boxes[tiles[mine]], ground.crs[source], crs)
            a, b = tree.query(moved, predicate="intersects")
            area = shapely.area(shapely.intersection(moved[a], tree.geometries[b]))
            meets[mine[a[area > 1e-6]]] = True
    return meets


def _by_file(ground: Ground, path: Path, block_m: float) -> Split:
    import shapely

    from rsosm_cli.tiles.label_files import read_frame

    frame = read_frame(path)
    if "split" not in frame.columns:
        raise UsageError(
            f"{path} has no attribute `split`.", hint="Give polygons with train, validation or test in it."
        )
    words = [str(v).strip().casefold() for v in frame["split"]]
    unknown = sorted({w for w in words if w not in SPELLINGS})
    if unknown:
        raise UsageError(
            f"{path}: the attribute `split` holds {', '.join(unknown[:5])}.", hint="Known: train, validation, test."
        )
    number = np.array([SPELLINGS[w] for w in words])
    centre = (ground.bounds_m[:, :2] + ground.bounds_m[:, 2:]) / 2
    part = np.full(len(ground.city), UNUSED, np.int8)
    for index, crs in enumerate(ground.crs):
        here = np.flatnonzero(ground.city == index)
        shapes = reproject(np.asarray(frame.geometry, dtype=object), frame.crs.to_string(), crs)
        tiles = shapely.box(*ground.bounds_m[here].T)
        for name in range(3):
            own = shapely.union_all(shapes[number == name])
            other = shapely.union_all(shapes[number != name])
            inside = shapely.contains_xy(own, centre[here, 0], centre[here, 1])
            shares = shapely.intersects(tiles, other) & ~shapely.touches(tiles, other)
            part[here[inside & ~shares]] = name
    _, block = _blocks(ground, max(block_m, max(ground.stride_m)))
    outside = int((part == UNUSED).sum())
    notes = (f"{outside} of {len(part)} labelled tiles lie outside the polygons of {path.name} or across them.",)
    return Split(part, block, 0.0, _tile_ground(ground, part), notes if outside else ())
