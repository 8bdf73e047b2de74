"""The matrix of MGIoU in float64, by the definition taken literally: corners, loops over pairs, axes and vertices.

Shapes are lists of points, in the plane or in space. A pair that its own axes cannot tell apart although it is not one
shape also takes the line that joins it (in the plane that of a collinear or pointlike pair, in space the directions in
which neither has an extent). Nothing here knows the closed form, or the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import oracle as polygons
from tests.boxes.oracle import corners

SHORT = polygons.SHORTEST_EDGE  # of the extent: below it an edge is no axis, and a pair is a line or a point
ABSENT = -1.0

Point = Any  # two or three numbers
Points = list[Any]  # of points
Axes = list[tuple[Point, float]]  # direction and weight
Interval = tuple[float, float]
Matrix = NDArray[np.float64]


def dot(a: Point, b: Point) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)))


def minus(a: Point, b: Point) -> Point:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def interval(points: Points, axis: Point) -> Interval:
    projections = [dot(point, axis) for point in points]
    return min(projections), max(projections)


def extent(points: Points) -> float:
    return float(max(max(values) - min(values) for values in zip(*points, strict=True)))


def hull(first: Points, second: Points, axis: Point) -> float:
    (low, high), (other_low, other_high) = interval(first, axis), interval(second, axis)
    return max(high, other_high) - min(low, other_low)


def unit(vector: Point) -> Point:
    length = math.hypot(*vector)
    return tuple(x / length for x in vector)


def longest(points: Points) -> Point:
    """Return the vector between the two points that are furthest apart."""
    return max((minus(a, b) for a in points for b in points), key=lambda vector: math.hypot(*vector))


def edge_lengths(shape: Points) -> list[float]:
    """Return the lengths of the edges of a box in space along its three directions."""
    return [math.hypot(*minus(shape[end], shape[0])) for end in (1, 3, 4)]


def axes_in_plane(first: Points, second: Points, axis_weight: str) -> Axes:
    whole = extent([*first, *second])
    weighted = [
        ((axis.x, axis.y), axis.weight)
        for shape in (first, second)
        for axis in polygons.polygon_axes(shape, axis_weight, whole)
        if axis.weight > 0
    ]
    flat = any(hull(first, second, unit(axis)) <= SHORT * whole for axis, _ in weighted)
    if flat or not weighted:
        line = longest([*first, *second])
        return [(unit(line), 1.0)] if math.hypot(*line) > 0 else []
    return weighted


def axes_in_space(first: Points, second: Points, frames: list[list[Point]]) -> Axes:
    """Return the axes of two boxes whose directions are known even where an edge has no length."""
    whole = extent([*first, *second])
    found: Axes = []
    for shape, frame in zip((first, second), frames, strict=True):
        for axis, length in zip(frame, edge_lengths(shape), strict=True):
            (low, high), (other_low, other_high) = interval(first, axis), interval(second, axis)
            points = (high - low + other_high - other_low) / 2 <= SHORT * whole
            if length > SHORT * whole or (points and hull(first, second, axis) > SHORT * whole):
                found.append((axis, 1.0))
    return found


def frame_of(box: Any, fmt: str, angle: str, clockwise: bool) -> list[Point]:
    """Return the unit directions of one box in space."""
    if fmt == "corners3d":
        return [unit(minus(box[end], box[0])) for end in (1, 3, 4)]
    turn = math.radians(box[-1]) if angle == "degrees" else box[-1]
    turn = turn if clockwise else -turn
    return [(math.cos(turn), math.sin(turn), 0.0), (-math.sin(turn), math.cos(turn), 0.0), (0.0, 0.0, 1.0)]


def depth(first: Interval, second: Interval, shortest: float) -> float:
    """Return 1 - |distance of the middles| / (sum of the half-lengths, at least `shortest`) of two intervals."""
    (low, high), (other_low, other_high) = first, second
    apart = abs((low + high) - (other_low + other_high)) / 2
    halves = (high - low + other_high - other_low) / 2
    return 1 - apart / max(halves, shortest) if apart > 0 else 1.0


def over_axes(first: Points, second: Points, axes: Axes, over: str) -> float:
    if not axes:
        return 1.0
    if over == "depth":
        shortest = SHORT * extent([*first, *second])
        units = [unit(axis) for axis, _ in axes]
        return min(depth(interval(first, axis), interval(second, axis), shortest) for axis in units)
    values = [polygons.giou_1d(interval(first, axis), interval(second, axis)) for axis, _ in axes]
    if over == "min":
        return min(values)
    return sum(weight * value for (_, weight), value in zip(axes, values, strict=True)) / sum(w for _, w in axes)


def is_finite(points: Points) -> bool:
    return all(math.isfinite(number) for point in points for number in point)


def box_pair(
    first: Any,
    second: Any,
    fmt: str = "cxcywhr",
    angle: str = "radians",
    clockwise: bool = True,
    over: str = "mean",
    axis_weight: str = "uniform",
) -> float:
    """Return the value of two boxes by their numbers."""
    if fmt == "xyxyxyxy":
        one, other = ([tuple(point) for point in np.reshape(box, (4, 2))] for box in (first, second))
        return polygon_pair(one, other, over, axis_weight)
    shape1, shape2 = (corners(box, fmt, angle, clockwise) for box in (first, second))
    if not is_finite([*shape1, *shape2]):
        return math.nan
    if fmt in ("cxcyczlwhr", "corners3d"):
        axes = axes_in_space(shape1, shape2, [frame_of(box, fmt, angle, clockwise) for box in (first, second)])
    else:
        axes = axes_in_plane(shape1, shape2, axis_weight)
    return over_axes(shape1, shape2, axes, over)


def polygon_pair(first: Any, second: Any, over: str = "mean", axis_weight: str = "uniform") -> float:
    """Return the value of two lists of real vertices."""
    if not first or not second:
        return ABSENT
    if not is_finite([*first, *second]):
        return math.nan
    return over_axes(first, second, axes_in_plane(first, second, axis_weight), over)


def box_matrix(boxes1: Any, boxes2: Any, *, mask1: Any = None, mask2: Any = None, **options: Any) -> Matrix:
    """Return the matrix of boxes (P, ...) and (T, ...), float64."""
    result = np.full((len(boxes1), len(boxes2)), ABSENT)
    for i, j in itertools.product(range(len(boxes1)), range(len(boxes2))):
        if (mask1 is None or mask1[i]) and (mask2 is None or mask2[j]):
            result[i, j] = box_pair(np.asarray(boxes1[i]), np.asarray(boxes2[j]), **options)
    return result


def polygon_matrix(
    polygons1: Any,
    polygons2: Any,
    *,
    lengths1: Any = None,
    lengths2: Any = None,
    mask1: Any = None,
    mask2: Any = None,
    **options: Any,
) -> Matrix:
    """Return the matrix of polygons (P, N, 2) and (T, M, 2), float64."""
    result = np.full((len(polygons1), len(polygons2)), ABSENT)
    for i, j in itertools.product(range(len(polygons1)), range(len(polygons2))):
        if (mask1 is None or mask1[i]) and (mask2 is None or mask2[j]):
            first, second = (
                [tuple(map(float, row[k])) for k in polygons.real_vertices(row, None if n is None else n[place])]
                for row, n, place in ((polygons1[i], lengths1, i), (polygons2[j], lengths2, j))
            )
            result[i, j] = polygon_pair(first, second, **options)
    return result


def gradient(
    matrix: Callable[..., Matrix],
    first: Matrix,
    second: Matrix,
    upstream: Matrix,
    *,
    side: int,
    step: float = 1e-6,
    **options: Any,
) -> Matrix:
    """Return the gradient of `(matrix(first, second) * upstream).sum()` to one side, by central differences."""
    moved = (first, second)[side]
    result = np.zeros_like(moved)
    for place in np.ndindex(moved.shape):
        values = []
        for signed in (step, -step):
            other = moved.copy()
            other[place] += signed
            pair = (other, second) if side == 0 else (first, other)
            values.append((np.where(upstream != 0, matrix(*pair, **options), 0) * upstream).sum())
        result[place] = (values[0] - values[1]) / (2 * step)
    return result
