"""How predicted polygons are judged: their IoU, read in the order of their vertices, and COCO's average precision.

Numbers are taken as lists, arrays and tensors, those of any device and with a gradient too; results are float64.
`polygon_iou_matrix` needs Shapely (`pip install "triton-mgiou[demo]"`), which is imported by its first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from triton_mgiou.arguments import check_real_numbers

COCO_THRESHOLDS = tuple(threshold / 100 for threshold in range(50, 100, 5))
HIGHEST_THRESHOLD = 1 - 1e-10  # as COCO's: the IoU of what is the same may be less than 1 by rounding
LARGEST = 1e100  # a coordinate above it counts as not finite, since products of coordinates would overflow
SMALLEST = 1e-80  # a polygon whose bounding box is smaller counts as a point, since they would underflow
MOST_NUMBERS = 2**20  # that are computed at once
ROUNDING = 8 * 2.0**-52  # of products of coordinates
MOST_TIMES_LARGER = 2.0**40  # of two polygons that float64 can cut with each other

Floats = NDArray[np.float64]


def polygon_iou(pred: ArrayLike, target: ArrayLike) -> float:
    """Intersection over union of two polygons, each read in the order of its vertices, by the even-odd rule.

    There is nothing to repair in a polygon that crosses itself: a bow-tie covers its two lobes, the inside of a loop
    that runs around twice is outside. Where neither polygon covers any area, or a coordinate is not finite or above
    1e100, it is 0. So it is where the longer side of one polygon's bounding box is below 1e-80, or more than 2^40
    times that of the other's, as of a prediction that has diverged: float64 cannot cut such outlines with each other.

    Args:
        pred: Vertices, shape (N, 2), N >= 3.
        target: Vertices, shape (M, 2), M >= 3.

    Returns:
        The IoU, in 0..1.

    Raises:
        TypeError: A polygon is not made of real numbers.
        ValueError: A polygon has another shape.
    """
    p, g = _vertices("pred", pred), _vertices("target", target)
    return _iou(p, g) if _may_overlap([p], [g]).all() else 0.0


def polygon_iou_matrix(
    pred: Sequence[ArrayLike] | NDArray[Any] | Tensor, target: Sequence[ArrayLike] | NDArray[Any] | Tensor
) -> Floats:
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
    (p, p_rounding), (g, g_rounding) = _geometries(preds, row), _geometries(targets, column)
    valid = shapely.is_valid(p)[row] & shapely.is_valid(g)[column]
    shared = np.full(len(row), None)
    shared[valid] = shapely.intersection(p[row[valid]], g[column[valid]])
    # Of polygons that differ by rounding alone GEOS may find but points.
    by_shapely = shapely.is_empty(shared) | (shapely.area(shared) > 0)
    for i, j in zip(row[~by_shapely], column[~by_shapely], strict=True):
        ious[i, j] = _iou(preds[i], targets[j])
    row, column, inter = row[by_shapely], column[by_shapely], shapely.area(shared[by_shapely])
    p_area, g_area = shapely.area(p[row]), shapely.area(g[column])
    inter = np.minimum(inter, np.minimum(p_area, g_area))  # rounding may make it larger
    union = p_area + g_area - inter
    has_area = union > p_rounding[row] + g_rounding[column]
    ious[row, column] = np.divide(inter, union, out=np.zeros_like(inter), where=has_area)
    return ious


def average_precision(images: Iterable[tuple[ArrayLike, ArrayLike]], thresholds: ArrayLike = COCO_THRESHOLDS) -> Floats:
    """COCO's average precision of one class.

    In each image the predictions choose in the order of their scores, each the free target with the highest IoU that
    reaches the threshold, the last of several. Then all predictions of all images are ranked by score, and the
    precision, made non-increasing from the right, is averaged over the recalls 0, 0.01 .. 1. Unlike COCO's, the number
    of predictions in an image is not limited, and a recall of exactly 0.35 or 0.7 is reached: in pycocotools these
    steps and some more are larger by rounding.

    Args:
        images: For each image the IoUs of its predictions with its targets, shape (P, T), and the predictions'
            scores, shape (P,). An image without predictions is given as (0, T): its targets count as missed. An IoU
            that is NaN reaches no threshold, and a score that is NaN comes last.
        thresholds: IoUs from which on a prediction is right, each in 0..1. A threshold of 1 is 1 - 1e-10, as COCO's.

    Returns:
        The average precision at each threshold, in 0..1; NaN if there is no target at all.

    Raises:
        TypeError: An argument is not made of real numbers, or an image is no pair.
        ValueError: IoUs and scores of an image do not fit together, or a threshold is not in 0..1.
    """
    limits = _numbers("thresholds", thresholds)
    if limits.ndim != 1 or not ((limits >= 0) & (limits <= 1)).all():
        raise ValueError(f"thresholds must be a sequence of numbers in 0..1, got {thresholds!r}")
    all_scores, all_correct, total = [np.zeros(0)], [np.zeros((0, len(limits)), dtype=bool)], 0
    if not _is_iterable(images):
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
        all_correct.append(_match(ious, scores, np.minimum(limits, HIGHEST_THRESHOLD)))
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
    for k, limit in enumerate(limits):
        free = np.ones(ious.shape[1], dtype=bool)
        for row in np.argsort(-scores, kind="stable"):
            candidates = free & (ious[row] >= limit)
            if candidates.any():
                correct[row, k] = True
                free[-1 - np.where(candidates, ious[row], -1.0)[::-1].argmax()] = False
    return correct


def _iou(p: Floats, g: Floats) -> float:
    """IoU by the even-odd rule, in level strips between all vertices and crossings: within one no two edges cross.

    Strips have no case that rounding could tip over, as faces of the plane have with edges that nearly meet.
    """
    rounding = _rounding(p) + _rounding(g)
    p, g = p - g[0], g - g[0]  # far from the origin this takes nothing from them, and the digits of what follows count
    start = np.concatenate((p, g))
    end = np.concatenate((np.roll(p, -1, axis=0), np.roll(g, -1, axis=0)))
    falls = (start[:, 1] > end[:, 1])[:, None]  # an edge that is gone there and back is twice the same, digit for digit
    start, end = np.where(falls, end, start), np.where(falls, start, end)
    levels = np.unique(np.concatenate((p[:, 1], g[:, 1], _crossings(start, end))))
    middles, heights = levels[:-1] / 2 + levels[1:] / 2, np.diff(levels)
    width, rise = (end - start).T
    inter = only_one = 0.0
    for rows in _rows(len(middles), len(start)):
        y = middles[rows, None]  # (S, 1), against (E,) edges
        spans = (start[:, 1] > y) != (end[:, 1] > y)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of edges that do not span it
            x = np.where(spans, start[:, 0] + (y - start[:, 1]) / rise * width, np.inf)
            order = x.argsort(axis=1)
            areas = np.diff(np.take_along_axis(x, order, 1)) * heights[rows, None]
        spans, is_p = np.take_along_axis(spans, order, 1), order < len(p)
        in_p, in_g = ((spans & own).cumsum(1)[:, :-1] % 2 == 1 for own in (is_p, ~is_p))
        inter += areas[in_p & in_g].sum()
        only_one += areas[in_p ^ in_g].sum()
    union = inter + only_one
    return float(inter / union) if union > rounding else 0.0


def _rounding(polygon: Floats) -> float:
    """The most that rounding can make of a polygon without an area, as of one whose vertices lie on a line."""
    lengths = np.abs(polygon - np.roll(polygon, 1, axis=0)).sum(0)
    return float(ROUNDING * (np.abs(polygon).max(0) * lengths[::-1]).sum())


def _crossings(start: Floats, end: Floats) -> Floats:
    """The heights at which edges, (E, 2) each, cross each other."""
    step = end - start
    found = [np.zeros(0)]
    for rows in _rows(len(start), len(start)):
        own = step[rows, None]
        away = start - start[rows, None]  # from the start of the first to that of the second
        turn = _cross(own, step)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # of parallel edges
            share, other_share = _cross(away, step) / turn, _cross(away, own) / turn  # of each, before they cross
        first, second = np.nonzero((share > 0) & (share < 1) & (other_share > 0) & (other_share < 1))
        once = first + rows.start < second
        first, second = first[once], second[once]
        found.append(start[rows][first, 1] + share[first, second] * step[rows][first, 1])
    return np.concatenate(found)


def _cross(a: Floats, b: Floats) -> Floats:
    product: Floats = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def _rows(count: int, size: int) -> Iterator[slice]:
    """All of `count` rows of `size` numbers, as many at once as MOST_NUMBERS allow."""
    step = max(MOST_NUMBERS // size, 1)
    return (slice(at, at + step) for at in range(0, count, step))


def _geometries(polygons: list[Floats], needed: NDArray[np.intp]) -> tuple[NDArray[Any], Floats]:
    """Shapely's geometries, and `_rounding`, of those that are needed: in a validation most meet no target."""
    shapely, geometries, rounding = _shapely(), np.full(len(polygons), None), np.zeros(len(polygons))
    for place in np.unique(needed):
        geometries[place], rounding[place] = shapely.polygons(polygons[place]), _rounding(polygons[place])
    return geometries, rounding


def _may_overlap(preds: list[Floats], targets: list[Floats]) -> NDArray[np.bool_]:
    """Which pairs have an IoU that may be above 0 and can be computed, (P, T)."""
    (p_low, p_high), (g_low, g_high) = _bounds(preds), _bounds(targets)
    overlap = ((p_low[:, None] < g_high) & (g_low < p_high[:, None])).all(2)
    p_size, g_size = (p_high - p_low).max(1)[:, None], (g_high - g_low).max(1)
    comparable = (p_size <= MOST_TIMES_LARGER * g_size) & (g_size <= MOST_TIMES_LARGER * p_size)
    comparable &= np.minimum(p_size, g_size) >= SMALLEST
    may: NDArray[np.bool_] = overlap & comparable
    return may


def _bounds(polygons: list[Floats]) -> tuple[Floats, Floats]:
    """The lower and the upper bounds of x and y, (P, 2) each; NaN where a coordinate is not finite or above LARGEST."""
    bounds = np.array([(polygon.min(0), polygon.max(0)) for polygon in polygons])
    bounds[~(np.abs(bounds) <= LARGEST).all((1, 2))] = np.nan  # which is near nothing
    return bounds[:, 0], bounds[:, 1]


def _polygons(name: str, polygons: Any) -> Iterable[ArrayLike]:
    """The polygons of a set; those of a tensor are copied from its device at once."""
    if not _is_iterable(polygons):
        raise TypeError(f"{name} must be polygons, got {type(polygons).__name__}")
    return _numbers(name, polygons) if isinstance(polygons, Tensor) else polygons


def _is_iterable(value: Any) -> bool:
    """Whether it can be iterated over; arrays and tensors of a single number only look so."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _numbers(name: str, value: Any) -> Floats:
    """The array of a list, an array or a tensor."""
    if isinstance(value, Tensor):
        check_real_numbers(name, value)
        value = value.detach().cpu().double().numpy()
    try:
        array = np.asarray(value)
        others = array.flat if array.dtype.kind == "O" else ()  # fractions; of None NumPy makes NaN, of text numbers
        is_masked = np.ma.is_masked(value)  # NumPy would take what the mask hides
        has_others = any(each is None or isinstance(each, (str, bytes)) for each in others)
        if array.dtype.kind in "biufO" and not (is_masked or has_others):
            return np.asarray(array, dtype=np.float64)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # a RuntimeError of a list of tensors with a gradient
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
