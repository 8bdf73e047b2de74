"""MGIoU by the paper's Algorithm 1 in float64 numpy: one loop per sample, axis and vertex, nothing from the package.

Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

SHORTEST_EDGE = 1e-6  # of the extent: shorter edges are no axes under "uniform"
SOFT_LENGTH = 0.01  # of the extent: the scale of "soft"
STEP = 1e-6  # of the extent: the step of the central differences

Vector = tuple[float, float]
Polygon = list[Vector]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """The normal of an edge, not normalised, and its weight in the mean."""

    x: float
    y: float
    weight: float


def real_vertices(row: Sequence[Any], length: float | None = None, mask: Sequence[Any] | None = None) -> list[int]:
    """Return which vertices of one row are real, as a list of indices."""
    if length is not None:
        return list(range(min(max(int(length), 0), len(row))))
    return [i for i in range(len(row)) if mask is None or mask[i]]


def polygon_edges(polygon: Polygon) -> list[Vector]:
    """Return the edges of a polygon, each to the next vertex and the last to the first."""
    edges = []
    for i, (x, y) in enumerate(polygon):
        next_x, next_y = polygon[(i + 1) % len(polygon)]
        edges.append((next_x - x, next_y - y))
    return edges


def joint_extent(pred: Polygon, target: Polygon) -> float:
    """Return the longer side of the bounding box of both polygons."""
    xs = [x for x, _ in [*pred, *target]]
    ys = [y for _, y in [*pred, *target]]
    return max(max(xs) - min(xs), max(ys) - min(ys))


def polygon_axes(polygon: Polygon, axis_weight: str, extent: float) -> list[Axis]:
    """Return an `Axis` for each edge of a polygon; one that is no axis has weight 0."""
    edges = polygon_edges(polygon)
    lengths = [math.hypot(x, y) for x, y in edges]
    perimeter = sum(lengths)
    axes = []
    for (x, y), length in zip(edges, lengths, strict=True):
        if length == 0:
            weight = 0.0
        elif axis_weight == "uniform":
            weight = 1.0 if length > SHORTEST_EDGE * extent else 0.0
        elif axis_weight == "length":
            weight = length / perimeter
        elif axis_weight == "soft":
            weight = 1 - math.exp(-length / (SOFT_LENGTH * extent))
        else:
            raise ValueError(axis_weight)
        axes.append(Axis(y, -x, weight))
    return axes


def interval(polygon: Polygon, axis: Axis) -> Vector:
    """Return the least and the largest projection of a polygon on an axis."""
    least, largest = math.inf, -math.inf
    for x, y in polygon:
        projection = x * axis.x + y * axis.y
        least, largest = min(least, projection), max(largest, projection)
    return least, largest


def giou_1d(pred: Vector, target: Vector) -> float:
    """Return the GIoU of two intervals in the paper's form: inter / union - (hull - union) / hull."""
    (min_p, max_p), (min_g, max_g) = pred, target
    hull = max(max_p, max_g) - min(min_p, min_g)
    if hull == 0:  # everything projects to one point
        return 1.0
    inter = max(0.0, min(max_p, max_g) - max(min_p, min_g))
    union = (max_p - min_p) + (max_g - min_g) - inter
    iou = inter / union if union > 0 else 0.0  # two different points share nothing
    return iou - (hull - union) / hull


def mgiou(pred: Polygon, target: Polygon, axes: list[Axis]) -> float:
    """Return the weighted mean of the 1-D GIoUs over the axes, 1 where there is no axis."""
    total = weights = 0.0
    for axis in axes:
        if axis.weight > 0:
            total += axis.weight * giou_1d(interval(pred, axis), interval(target, axis))
            weights += axis.weight
    return total / weights if weights > 0 else 1.0


def convexity_term(pred: Polygon, edge_is_axis: list[bool]) -> float:
    """Return how far a polygon is from convex, without a scale: 0 if it is convex and in order."""
    total = count = 0.0
    for i, (edge_x, edge_y) in enumerate(polygon_edges(pred)):
        if not edge_is_axis[i]:
            continue
        count += 1
        start_x, start_y = pred[i]
        length = math.hypot(edge_x, edge_y)
        above = below = 0.0
        distances = []
        for x, y in pred:
            distance = ((x - start_x) * edge_y - (y - start_y) * edge_x) / length
            above += max(0.0, distance)
            below += max(0.0, -distance)
            distances.append(distance)
        width = max(distances) - min(distances)
        if width > 0:
            total += min(above, below) / (len(pred) * width)
    return total / count if count > 0 else 0.0


def signed_area(polygon: Polygon) -> float:
    """Return the area by triangles from the first vertex; a clockwise one (y up) counts below 0."""
    start_x, start_y = polygon[0]
    return sum(
        ((x - start_x) * (next_y - start_y) - (next_x - start_x) * (y - start_y)) / 2
        for (x, y), (next_x, next_y) in zip(polygon, [*polygon[1:], polygon[0]], strict=True)
    )


def in_order(polygon: Polygon) -> Polygon:
    """Return the vertices by their angle about their mean: the outline of a convex polygon, however they are listed.

    In exact fractions, relative to that mean. Those at one angle are their own mean, and one without an angle is
    straight along y.
    """
    vertices = [(Fraction(x), Fraction(y)) for x, y in polygon]
    mean_x, mean_y = (sum(numbers) / len(polygon) for numbers in zip(*vertices, strict=True))
    rays: dict[tuple[Fraction, Fraction], list[tuple[Fraction, Fraction]]] = {}
    for vertex_x, vertex_y in vertices:
        x, y = vertex_x - mean_x, vertex_y - mean_y
        size = abs(x) + abs(y)
        rays.setdefault((x / size, y / size) if size else (Fraction(0), Fraction(1)), []).append((x, y))
    return [
        (float(sum(x for x, _ in ray)) / len(ray), float(sum(y for _, y in ray)) / len(ray))
        for _, ray in sorted(rays.items(), key=lambda each: math.atan2(each[0][1], each[0][0]))
    ]


def boundary_term(pred: Polygon, target: Polygon) -> float:
    """Return how far the outline of `pred` is from the target's but for a shift: 0 if it is the same."""
    target_area = abs(signed_area(in_order(target)))
    if 2 * target_area <= SHORTEST_EDGE * sum(x * x + y * y for x, y in polygon_edges(target)):
        return 0.0  # the target is a line
    area = signed_area(pred)
    mixed = 0.0
    for x, y in polygon_edges(pred):
        length = math.hypot(x, y)
        if length > 0:
            outward = (y / length, -x / length) if area > 0 else (-y / length, x / length)
            reach = max(outward[0] * (gx - target[0][0]) + outward[1] * (gy - target[0][1]) for gx, gy in target)
            mixed += reach * length / 2
    if mixed == 0:
        return 1.0
    shape = abs(area) * target_area / mixed**2
    size = 2 * mixed * target_area / (mixed**2 + target_area**2)
    return max(0.0, 1 - shape * size)


def sample_loss(
    pred: Polygon,
    target: Polygon,
    axis_weight: str = "uniform",
    convexity_weight: float = 0.0,
    boundary_weight: float = 0.0,
    *,
    base: tuple[Polygon, Polygon] | None = None,
    axis_grad: bool = True,
) -> float:
    """Return the loss of one sample, two lists of real vertices.

    `base` is the pair of polygons around which differences are taken: the extent, which edges of the prediction the
    convexity term runs over, and the boundary term's target are those of `base`; with `axis_grad=False` so are the
    axes and their weights.
    """
    if not pred or not target:
        return 0.0
    if not all(math.isfinite(value) for vertex in [*pred, *target] for value in vertex):
        return math.nan
    base_pred, base_target = (pred, target) if base is None else base
    extent = joint_extent(base_pred, base_target)
    base_pred_axes = polygon_axes(base_pred, axis_weight, extent)
    if axis_grad:
        axes = [*polygon_axes(pred, axis_weight, extent), *polygon_axes(target, axis_weight, extent)]
    else:
        axes = [*base_pred_axes, *polygon_axes(base_target, axis_weight, extent)]
    loss = (1 - mgiou(pred, target, axes)) / 2
    if convexity_weight:
        loss += convexity_weight * convexity_term(pred, [axis.weight > 0 for axis in base_pred_axes])
    if boundary_weight:
        loss += boundary_weight * boundary_term(pred, base_target)
    return loss


def _side(vertices: Array, lengths: Any, masks: Any) -> Iterator[tuple[Polygon, list[int]]]:
    """Yield, for each sample, the real vertices of one side and where in their row they stand."""
    for b, row in enumerate(vertices):
        places = real_vertices(row, None if lengths is None else lengths[b], None if masks is None else masks[b])
        yield [(float(row[i][0]), float(row[i][1])) for i in places], places


def per_sample_loss(
    pred: Array,
    target: Array,
    *,
    pred_lengths: Any = None,
    target_lengths: Any = None,
    pred_mask: Any = None,
    target_mask: Any = None,
    axis_weight: str = "uniform",
    convexity_weight: float = 0.0,
    boundary_weight: float = 0.0,
) -> Array:
    """Return each sample's loss, shape (B,), for `pred` (B, N, 2) and `target` (B, M, 2)."""
    samples = zip(_side(pred, pred_lengths, pred_mask), _side(target, target_lengths, target_mask), strict=True)
    losses = [sample_loss(p, g, axis_weight, convexity_weight, boundary_weight) for (p, _), (g, _) in samples]
    return np.array(losses, dtype=np.float64)


def sample_factors(batch: int, weight: Any = None, reduction: str = "mean", avg_factor: float | None = None) -> Array:
    """Return what each sample's loss is multiplied by in the result, shape (B,)."""
    factors = []
    for b in range(batch):
        factor = 1.0
        if weight is not None:
            row = np.atleast_1d(np.asarray(weight[b], dtype=np.float64))
            factor = sum(row) / len(row)
        if reduction == "mean":
            factor /= batch if avg_factor is None else avg_factor
        factors.append(factor)
    return np.array(factors, dtype=np.float64)


def loss(
    pred: Array,
    target: Array,
    *,
    weight: Any = None,
    reduction: str = "mean",
    avg_factor: float | None = None,
    **options: Any,
) -> Any:
    """Return the reduced loss, a float, or shape (B,) for "none"."""
    losses = per_sample_loss(pred, target, **options) * sample_factors(len(pred), weight, reduction, avg_factor)
    return losses if reduction == "none" else float(sum(losses))


def gradient(
    pred: Array,
    target: Array,
    *,
    side: str = "pred",
    pred_lengths: Any = None,
    target_lengths: Any = None,
    pred_mask: Any = None,
    target_mask: Any = None,
    **options: Any,
) -> Array:
    """Return each sample's own gradient with respect to `side`, by central differences.

    Both one-sided slopes are averaged, which is the even split of a tie between two. Padding has 0. Where a polygon
    is convex but has three vertices on a line the convexity term has a kink, and no slope to compare with.
    """
    result = np.zeros(np.shape(pred if side == "pred" else target), dtype=np.float64)
    samples = zip(_side(pred, pred_lengths, pred_mask), _side(target, target_lengths, target_mask), strict=True)
    for b, ((p, p_places), (g, g_places)) in enumerate(samples):
        moved, places = (p, p_places) if side == "pred" else (g, g_places)
        if not p or not g:
            continue
        extent = joint_extent(p, g)
        step = STEP * extent
        for i, place in enumerate(places):
            for coordinate in range(2):
                if not math.isfinite(extent):
                    result[b, place, coordinate] = math.nan
                    continue
                if step == 0:
                    continue
                values = []
                for signed in (step, -step):
                    x, y = moved[i]
                    vertex = (x + signed, y) if coordinate == 0 else (x, y + signed)
                    polygon = [*moved[:i], vertex, *moved[i + 1 :]]
                    pair = (polygon, g) if side == "pred" else (p, polygon)
                    values.append(sample_loss(*pair, base=(p, g), **options))
                result[b, place, coordinate] = (values[0] - values[1]) / (2 * step)
    return result
