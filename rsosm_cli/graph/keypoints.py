"""Key points of lines and polygons: the few places that tell the fusion module where an object lies (GeoLink, 3.2)."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.pairs import ragged

Points = NDArray[np.float64]

_ANGLES = np.radians([0.0, 120.0, 240.0])
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (3, 2) unit vectors, y upwards
_STEPS = np.linspace(1.0, 0.0, 10)  # the released code draws a point back to the centroid in these steps


def unit_draws(element: NDArray[np.int64], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Return (N, draws) numbers in [0, 1) that depend on each element's number and ``seed`` alone.

    SplitMix64 (Steele, Lea and Flood, 2014) as a hash: the same element draws the same in any tile, city and process.
    """
    with np.errstate(over="ignore"):
        state = element.astype(np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95) + np.uint64(seed)
        state = state + np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def line_points(lines: NDArray[np.object_], middle: Points | None = None) -> Points:
    """Return (N, 3, 2) midpoint (or the ``middle`` given) and both ends of lines, in their CRS.

    Of a line in several parts: the midpoint of the length of all, the start of the first and the end of the last.
    """
    out = np.empty((len(lines), 3, 2))
    if not len(lines):
        return out
    if middle is None:
        middle = shapely.get_coordinates(shapely.line_interpolate_point(lines, 0.5, normalized=True))
    coordinates, owner = shapely.get_coordinates(lines, return_index=True)
    first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    out[:, 0] = middle
    out[:, 1] = coordinates[first]
    out[:, 2] = coordinates[np.r_[first[1:], len(coordinates)] - 1]
    return out


def polygon_points(polygons: NDArray[np.object_], centroid: Points, draws: NDArray[np.float64]) -> Points:
    """Return (N, 4, 2) three points inside each polygon, 120 degrees apart round the centroid, and the centroid.

    ``draws`` (N, 3) in [0, 1) choose where along each ray: uniformly over the stretches of it that lie inside, so that
    holes and concave shapes need no retry. A ray that meets no interior (the centroid lies outside) gives a point on
    the surface instead.
    """
    out = np.repeat(centroid[:, None, :], 4, axis=1)
    if not len(polygons):
        return out
    start, end, owner = _segments(polygons)
    # Columns: passes over one coordinate are what costs.
    origin = centroid.T[:, owner]
    (x, y), (to_x, to_y) = start.T - origin, end.T - origin
    surface: NDArray[np.bool_] = np.zeros((len(polygons), 3), bool)
    for k, ray in enumerate(_RAYS):
        # Along the ray and across it; half-open in the crossing, so that a ray through a vertex counts it once.
        across_a = y * ray[0] - x * ray[1]
        across_b = to_y * ray[0] - to_x * ray[1]
        crossing = np.flatnonzero((across_a >= 0) != (across_b >= 0))
        a, b = across_a[crossing], across_b[crossing]
        at, to = (u[crossing] * ray[0] + v[crossing] * ray[1] for u, v in ((x, y), (to_x, to_y)))
        along = at + (to - at) * (a / (a - b))
        who = owner[crossing]
        ahead = along > 0
        along, who = along[ahead], who[ahead]
        order = np.lexsort((along, who))
        along, who = along[order], who[order]
        radius, hit = _along_inside(along, who, draws[:, k], len(polygons))
        out[:, k] = centroid + radius[:, None] * ray
        surface[:, k] = ~hit
    if surface.any():
        rows = np.flatnonzero(surface.any(axis=1))
        inside = shapely.get_coordinates(shapely.point_on_surface(polygons[rows]))
        out[rows, :3] = np.where(surface[rows][..., None], inside[:, None, :], out[rows, :3])
    return out


def _along_inside(
    along: NDArray[np.float64], who: NDArray[np.int64], draw: NDArray[np.float64], n: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (n,) distance along the ray at share ``draw`` of its length inside, and whether it meets the inside."""
    counts = np.bincount(who, minlength=n)
    # An odd number of crossings ahead: the centroid is inside, and its stretch begins at 0.
    inside = counts % 2 == 1
    stops = np.zeros(len(along) + inside.sum())
    total = counts + inside
    offsets = np.r_[0, np.cumsum(total)]
    stops[ragged(offsets[:-1] + inside, counts)] = along
    enter, leave = stops[0::2], stops[1::2]  # every `total` is even, so stretches never straddle two polygons
    length = leave - enter
    run = np.r_[0.0, np.cumsum(length)]
    first, last = offsets[:-1] // 2, offsets[1:] // 2
    hit = run[last] - run[first] > 0
    target = run[first] + draw * (run[last] - run[first])
    stretch = np.clip(np.searchsorted(run, target, side="right") - 1, first, np.maximum(last - 1, first))
    stretch = np.minimum(stretch, max(len(enter) - 1, 0))
    radius = np.zeros(n)
    if len(enter):
        radius = np.minimum(enter[stretch] + np.maximum(target - run[stretch], 0.0), leave[stretch])
    return np.where(hit, radius, 0.0), hit


def released_polygon_points(
    polygons: NDArray[np.object_],
    centroid: Points,
    draws: NDArray[np.float64] | None = None,
    radii: NDArray[np.float64] | None = None,
) -> Points:
    """Return (N, 4, 2) key points as the released code places them.

    A radius between half the distance of the nearest and of the farthest vertex from the centroid is drawn (``draws``
    in [0, 1), (N, 3)) or given (``radii``, in units of the CRS); the point is drawn back to the centroid in ninths
    until it is inside. Where even the centroid is outside, the radius is a hundredth of the smallest.
    """
    out = np.repeat(centroid[:, None, :], 4, axis=1)
    if not len(polygons):
        return out
    start, _, owner = _segments(polygons)
    distance = np.hypot(*(start - centroid[owner]).T)
    first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    nearest, farthest = np.minimum.reduceat(distance, first) / 2, np.maximum.reduceat(distance, first) / 2
    if radii is None:
        assert draws is not None
        radii = nearest[:, None] + draws * (farthest - nearest)[:, None]
    shapely.prepare(polygons)
    for k, ray in enumerate(_RAYS):
        tries = centroid[:, None] + radii[:, k, None, None] * _STEPS[:, None] * ray  # (N, 10, 2)
        inside = shapely.contains_xy(polygons[:, None], tries[..., 0], tries[..., 1])
        chosen = tries[np.arange(len(polygons)), inside.argmax(axis=1)]
        small = centroid + 0.01 * nearest[:, None] * ray
        out[:, k] = np.where(inside.any(axis=1)[:, None], chosen, small)
    return out


def _segments(polygons: NDArray[np.object_]) -> tuple[Points, Points, NDArray[np.int64]]:
    """Return (S, 2) starts and ends of the segments of all rings, and the (S,) polygon of each."""
    coordinates, owner = shapely.get_coordinates(polygons, return_index=True)
    begins = np.r_[True, owner[1:] != owner[:-1]]
    several = np.flatnonzero((shapely.get_type_id(polygons) != 3) | (shapely.get_num_interior_rings(polygons) > 0))
    if len(several):
        parts, part_owner = shapely.get_parts(polygons[several], return_index=True)
        rings, ring_part = shapely.get_rings(parts, return_index=True)
        sizes = shapely.get_num_coordinates(rings)
        who = part_owner[ring_part]
        place = np.cumsum(sizes) - sizes
        place -= place[np.searchsorted(who, who)]  # of the ring within its polygon
        begins[np.flatnonzero(begins)[several[who]] + place] = True
    joined = ~begins[1:]
    return coordinates[:-1][joined], coordinates[1:][joined], owner[:-1][joined]
