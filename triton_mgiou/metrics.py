"""How predicted polygons are judged: their IoU, read in the order of their vertices, and COCO's average precision.

Numbers are taken as lists, arrays and tensors, those of any device and with a gradient too; results are float64.
Needs Shapely (`pip install "triton-mgiou[demo]"`), which is imported by the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from triton_mgiou.arguments import check_real_numbers

COCO_THRESHOLDS = tuple(threshold / 100 for threshold in range(50, 100, 5))
LARGEST = 1e100  # a coordinate above it counts as not finite, since products of coordinates would overflow
MOST_TIMES_LARGER = 2.0**40  # of two polygons that float64 can cut with each other

Floats = NDArray[np.float64]


def polygon_iou(pred: ArrayLike, target: ArrayLike) -> float:
    """Intersection over union of two polygons, each read in the order of its vertices, by the even-odd rule.

    Both outlines together cut the plane into faces; each face lies wholly inside or outside of either polygon. So
    there is nothing to repair in a polygon that crosses itself: a bow-tie covers its two lobes, the inside of a loop
    that runs around twice is outside. Where neither polygon covers any area, or a coordinate is not finite or above
    1e100, it is 0. So it is where the longer side of one polygon's bounding box is more than 2^40 times that of the
    other's, as of a prediction that has diverged: float64 cannot cut such outlines with each other.

    Args:
        pred: Vertices, shape (N, 2), N >= 3.
        target: Vertices, shape (M, 2), M >= 3.

    Returns:
        The IoU, in 0..1.

    Raises:
        ImportError: Shapely is not installed.
        TypeError: A polygon is not made of real numbers.
        ValueError: A polygon has another shape.
    """
    p, g = _vertices("pred", pred), _vertices("target", target)
    if not _may_overlap([p], [g]).all():
        return 0.0
    faces, (in_p, in_g) = _faces(p, g)
    areas = _shapely().area(faces)
    inter, only_one = areas[in_p & in_g].sum(), areas[in_p ^ in_g].sum()
    union = inter + only_one
    return float(inter / union) if union > 0 else 0.0


def polygon_iou_matrix(pred: Sequence[ArrayLike] | NDArray[Any], target: Sequence[ArrayLike] | NDArray[Any]) -> Floats:
    """`polygon_iou` of every polygon of one set with every one of another, for the many pairs of a validation.

    Args:
        pred: P polygons, shapes (N, 2), N >= 3; N may differ.
        target: T polygons, likewise.

    Returns:
        The IoUs, shape (P, T).

    Raises:
        ImportError: Shapely is not installed.
        TypeError: A polygon is not made of real numbers.
        ValueError: A polygon has another shape.
    """
    shapely = _shapely()
    preds, targets = (
        [_vertices(f"{name}[{k}]", polygon) for k, polygon in enumerate(_polygons(name, polygons))]
        for name, polygons in (("pred", pred), ("target", target))
    )
    ious = np.zeros((len(preds), len(targets)))
    if not ious.size:
        return ious
    row, column = np.nonzero(_may_overlap(preds, targets))
    p, g = _regions(preds, row), _regions(targets, column)
    p_area, g_area = shapely.area(p[row]), shapely.area(g[column])
    inter = shapely.area(shapely.intersection(p[row], g[column]))
    inter = np.minimum(inter, np.minimum(p_area, g_area))  # rounding may make it larger
    union = p_area + g_area - inter
    ious[row, column] = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return ious


def average_precision(
    images: Iterable[tuple[ArrayLike, ArrayLike]], thresholds: Sequence[float] = COCO_THRESHOLDS
) -> Floats:
    """COCO's average precision of one class.

    In each image the predictions choose in the order of their scores, each the free target with the highest IoU that
    reaches the threshold. Then all predictions of all images are ranked by score, and the precision, made
    non-increasing from the right, is averaged over the recalls 0, 0.01 .. 1. Unlike COCO's, the number of predictions
    in an image is not limited.

    Args:
        images: For each image the IoUs of its predictions with its targets, shape (P, T), and the predictions'
            scores, shape (P,). An image without predictions is given as (0, T): its targets count as missed. An IoU
            that is NaN reaches no threshold, and a score that is NaN comes last.
        thresholds: IoUs from which on a prediction is right, each in 0..1.

    Returns:
        The average precision at each threshold, in 0..1; NaN if there is no target at all.

    Raises:
        TypeError: An argument is not made of real numbers, or an image is no pair.
        ValueError: IoUs and scores of an image do not fit together, or a threshold is not in 0..1.
    """
    limits = _numbers("thresholds", thresholds)
    if limits.ndim != 1 or not ((limits >= 0) & (limits <= 1)).all():
        raise ValueError(f"thresholds must be a sequence of numbers in 0..1, got {thresholds}")
    all_scores, all_correct, total = [np.zeros(0)], [np.zeros((0, len(limits)), dtype=bool)], 0
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be pairs (IoUs, scores), got {type(images).__name__}")
    for index, image in enumerate(images):
        if not isinstance(image, Sequence) or len(image) != 2:
            raise TypeError(f"images[{index}] must be a pair (IoUs, scores), got {type(image).__name__}")
        ious, scores = (_numbers(f"images[{index}][{k}]", item) for k, item in enumerate(image))
        if ious.ndim != 2 or scores.shape != ious.shape[:1]:
            raise ValueError(
                f"images[{index}] must be IoUs of shape (P, T) and scores of shape (P,), "
                f"got {ious.shape} and {scores.shape}"
            )
        all_scores.append(scores)
        all_correct.append(_match(ious, scores, limits))
        total += ious.shape[1]
    if total == 0:
        return np.full(len(limits), np.nan)
    order = np.argsort(-np.concatenate(all_scores), kind="stable")
    correct = np.concatenate(all_correct)[order]
    hits = correct.cumsum(0)
    recall = hits / total
    precision = hits / np.arange(1, len(hits) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    result = np.zeros(len(limits))
    for k in range(len(limits)):
        place = np.searchsorted(recall[:, k], np.arange(101) / 100, side="left")
        result[k] = np.append(precision[:, k], 0.0)[place].mean()
    return result


def _match(ious: Floats, scores: Floats, limits: Floats) -> NDArray[np.bool_]:
    """Whether each prediction is right at each limit, (P, L)."""
    correct = np.zeros((len(ious), len(limits)), dtype=bool)
    if not ious.size:
        return correct
    for k, limit in enumerate(limits):
        free = np.ones(ious.shape[1], dtype=bool)
        for row in np.argsort(-scores, kind="stable"):
            candidates = free & (ious[row] >= limit)
            if candidates.any():
                correct[row, k] = True
                free[np.where(candidates, ious[row], -1.0).argmax()] = False
    return correct


def _faces(*outlines: Floats) -> tuple[NDArray[Any], list[NDArray[np.bool_]]]:
    """The faces that the outlines together cut the plane into, and for each outline which of them it covers."""
    shapely = _shapely()
    lines = shapely.union_all([shapely.linearrings(outline) for outline in outlines])  # cut at all crossings
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(lines)))
    points = shapely.get_coordinates(shapely.point_on_surface(faces))  # one inside each face
    return faces, [_is_inside(points, outline) for outline in outlines]


def _region(outline: Floats) -> Any:
    """What a finite outline covers by the even-odd rule, as a valid geometry."""
    shapely = _shapely()
    polygon = shapely.polygons(outline)
    if shapely.is_valid(polygon):
        return polygon
    faces, (inside,) = _faces(outline)
    return shapely.union_all(faces[inside])


def _regions(polygons: list[Floats], needed: NDArray[np.intp]) -> NDArray[Any]:
    """The regions of those that are needed: they are costly, and in a validation most predictions meet no target."""
    regions = np.full(len(polygons), None)
    for place in np.unique(needed):
        regions[place] = _region(polygons[place])
    return regions


def _may_overlap(preds: list[Floats], targets: list[Floats]) -> NDArray[np.bool_]:
    """Which pairs have an IoU that may be above 0 and can be computed, (P, T)."""
    (p_low, p_high), (g_low, g_high) = _bounds(preds), _bounds(targets)
    overlap = ((p_low[:, None] < g_high) & (g_low < p_high[:, None])).all(2)
    p_size, g_size = (p_high - p_low).max(1)[:, None], (g_high - g_low).max(1)
    comparable = (p_size <= MOST_TIMES_LARGER * g_size) & (g_size <= MOST_TIMES_LARGER * p_size)
    may: NDArray[np.bool_] = overlap & comparable
    return may


def _bounds(polygons: list[Floats]) -> tuple[Floats, Floats]:
    """The lower and the upper bounds of x and y, (P, 2) each; NaN where a coordinate is not finite or above LARGEST."""
    bounds = np.array([(polygon.min(0), polygon.max(0)) for polygon in polygons])
    bounds[~(np.abs(bounds) <= LARGEST).all((1, 2))] = np.nan  # which is near nothing
    return bounds[:, 0], bounds[:, 1]


def _is_inside(points: Floats, polygon: Floats) -> NDArray[np.bool_]:
    """Whether a ray from each point, (K, 2), to the right crosses the polygon's outline an odd number of times."""
    x, y = points[:, :1], points[:, 1:]  # (K, 1), against (N,) edges
    start, end = polygon.T, np.roll(polygon, -1, axis=0).T
    spans = (start[1] > y) != (end[1] > y)
    rise = np.where(start[1] == end[1], 1.0, end[1] - start[1])  # a level edge spans nothing
    crosses = spans & (start[0] + (y - start[1]) * (end[0] - start[0]) / rise > x)
    inside: NDArray[np.bool_] = crosses.sum(axis=1) % 2 == 1
    return inside


def _polygons(name: str, polygons: Any) -> Sequence[ArrayLike]:
    """The polygons of a set; those of a tensor are copied from its device at once."""
    if isinstance(polygons, Tensor):
        polygons = _numbers(name, polygons)
    if not isinstance(polygons, Iterable):
        raise TypeError(f"{name} must be polygons, got {type(polygons).__name__}")
    return list(polygons)


def _numbers(name: str, value: Any) -> Floats:
    """The array of a list, an array or a tensor."""
    if isinstance(value, Tensor):
        check_real_numbers(name, value)
        value = value.detach().cpu().double().numpy()
    try:
        if not np.iscomplexobj(value):
            return np.asarray(value, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError):  # a RuntimeError of a list of tensors with a gradient
        pass
    raise TypeError(f"{name} must be an array of real numbers, got {type(value).__name__}")


def _vertices(name: str, polygon: ArrayLike) -> Floats:
    vertices = _numbers(name, polygon)
    if vertices.ndim != 2 or vertices.shape[1] != 2 or len(vertices) < 3:
        raise ValueError(f"{name} must have shape (N, 2) with N >= 3, got {vertices.shape}")
    return vertices


def _shapely() -> Any:
    try:
        return importlib.import_module("shapely")
    except ModuleNotFoundError as error:
        raise ImportError('polygon metrics need shapely; install it with: pip install "triton-mgiou[demo]"') from error
