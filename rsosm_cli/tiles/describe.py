"""What a tile store, or one of its tiles, holds: in numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from rsosm_cli.errors import UsageError
from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES, RELATIONS
from rsosm_cli.graph.vocabulary import CLASS_KEYS
from rsosm_cli.settings.graph import DEFAULT_EXCLUDED_KEYS, DEFAULT_LEFT_OUT
from rsosm_cli.tiles.checksums import check
from rsosm_cli.tiles.store import TileStore

_TOP = 8


def describe(file: Path, *, images: bool = False) -> dict[str, Any]:
    """Return counts by type and relation, top tags, empty tiles, settings and provenance of a store.

    Its arrays are compared with their checksums first, the images only if asked for. Raises :class:`FormatError`.
    """
    store = TileStore.open(file)
    check(file, images=images)
    n = len(store)
    share = store.image_share
    settings = store.settings
    numbers: dict[str, Any] = {
        "tiles": n,
        "tiles_without_osm": int((store.n_objects == 0).sum()),
        "crs": store.crs,
        "tile_px": store.tile_px,
        "stride_px": settings.grid.stride,
        "gsd_m": store.gsd_m if store.gsd_m is not None else "differs from tile to tile",
    }
    if not store.crs:
        numbers["place"] = no_place(store)
    if store.has_images:
        numbers["bands"] = ", ".join(map(str, store.bands))
        numbers["tiles_without_image"] = int((share == 0).sum())
        numbers["tiles_with_part_of_the_image"] = int(((share > 0) & (share < 1)).sum())
    else:
        numbers["images"] = "none"
    numbers |= {f"{name}s": count for name, count in store.n_nodes.items()}
    numbers["objects_a_tile"] = _quartiles(store.n_objects)
    for (a, b), counts in store.relation_counts().items():
        if NODE_TYPES.index(a) <= NODE_TYPES.index(b):
            text = _counts(counts)
            numbers[f"{a}_to_{b}"] = text or "none"
    numbers["tags"] = len(store.tags)
    if store.vector_width:
        numbers["node_vectors"] = f"ready, {store.vector_width} wide"
    else:  # of ready graphs nothing is known of tags, and no setting made them
        top = np.argsort(-store.tag_counts, kind="stable")[:_TOP]
        numbers["top_tags"] = ", ".join(f"{store.tags[i]} {store.tag_counts[i]:,}" for i in top.tolist()) or "none"
        numbers["relations"] = settings.graph.relations
        numbers["key_points"] = settings.graph.key_points
        numbers["names"] = "in" if settings.graph.tags.names else "out"
        numbers["keys_left_out"] = _patterns(settings.graph.tags.exclude, DEFAULT_EXCLUDED_KEYS)
        numbers["objects_left_out"] = _patterns(settings.graph.leave_out, DEFAULT_LEFT_OUT)
    graph = settings.graph
    if graph.perturb.drop_objects or graph.perturb.shift_m or graph.perturb.drop_keys:
        numbers["perturbed"] = ", ".join(f"{k} {v}" for k, v in graph.perturb.model_dump().items() if v)
    numbers |= {k: v for k, v in store.provenance.items() if isinstance(v, str) and v}
    sources = [str(s.get("attribution") or s.get("name")) for s in store.provenance.get("sources", [])]
    if sources:
        numbers["attribution"] = "; ".join(sources)
    return numbers


def no_place(store: TileStore) -> str:
    """Return why the tiles of a store without a CRS lie nowhere."""
    return f"none: {'ready graphs' if store.vector_width else 'images of a folder'} have no place on the ground"


def describe_tile(file: Path, tile: int) -> dict[str, Any]:
    """Return what tile number ``tile`` holds. Raises :class:`UsageError` where there is no such tile."""
    store = TileStore.open(file)
    check_tile(store, tile)
    graphs = store.graphs([tile])
    west, south, east, north = store.bounds_m[tile].tolist()
    numbers: dict[str, Any] = {"tile": tile, "crs": store.crs}
    if not store.crs:
        numbers["place"] = no_place(store)
    else:
        metres = west > 1000 or abs(north) > 90  # a store of the user's chips may lie in degrees
        text = " ".join(f"{v:.2f}" if metres else f"{v}" for v in (west, south, east, north))
        numbers["bounds"] = f"west, south, east, north {text} {'m' if metres else 'degrees'}"
    if store.names:
        numbers["name"] = store.names[tile]
    numbers["image_share"] = round(float(store.image_share[tile]), 3)
    numbers |= {f"{name}s": len(graphs.nodes[name].osm_id) for name in NODE_TYPES}
    for (a, b), edges in graphs.edges.items():
        found = np.bincount(edges.relation, minlength=len(RELATIONS[a, b])).tolist()
        text = _counts(dict(zip(RELATIONS[a, b], found, strict=True)))
        if text and NODE_TYPES.index(a) <= NODE_TYPES.index(b):
            numbers[f"{a}_to_{b}"] = text
    if store.vector_width:
        numbers["node_vectors"] = f"ready, {store.vector_width} wide"
        return numbers
    numbers["top_tags"] = ", ".join(f"{tag} {count:,}" for tag, count in top_tags(store, graphs, _TOP)) or "none"
    classes = Counter(c for name in NODE_TYPES for c in graphs.nodes[name].class_code.tolist())
    numbers["classes"] = ", ".join(f"{CLASS_KEYS[c] if c >= 0 else 'other'} {k:,}" for c, k in classes.most_common())
    return numbers


def check_tile(store: TileStore, tile: int) -> None:
    if not 0 <= tile < len(store):
        raise UsageError(f"{store.path.name} has no tile {tile}.", hint=f"Its tiles are 0 to {len(store) - 1}.")


def top_tags(store: TileStore, graphs: GraphArrays, n: int) -> list[tuple[str, int]]:
    """Return the ``n`` commonest tags of some tiles of the store, with their occurrences."""
    counts = np.bincount(np.concatenate([graphs.nodes[name].tag_ids for name in NODE_TYPES]), minlength=1)
    order = np.argsort(-counts, kind="stable")[:n]
    return [(store.tags[i], int(counts[i])) for i in order.tolist() if counts[i]]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def _patterns(patterns: tuple[str, ...], default: tuple[str, ...]) -> str:
    if patterns == default:
        return f"the default: {patterns[0]} and {len(patterns) - 1} more"
    return ", ".join(patterns[:_TOP]) + (f" and {len(patterns) - _TOP} more" if len(patterns) > _TOP else "") or "none"


def _quartiles(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"median {middle:,.0f}, quartiles {low:,.0f} and {high:,.0f}, most {values.max():,}"
