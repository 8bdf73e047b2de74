"""MGIoU of boxes in float64, by the definition taken literally: corners, loops, extremes, differences for the gradient.

In the plane a box is its four corners and the loss is that of the polygons' oracle. In space its eight corners are
projected on the three edges at vertex 0 of both boxes. Nothing here knows the closed form, or the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests import oracle as polygons

Corners = list[tuple[float, ...]]

STEP = 1e-6  # of the extent, or of a radian: the step of the central differences
COLUMNS = {"cxcywhr": 5, "cxcywh": 4, "xyxy": 4, "cxcyczlwhr": 7}


def corners(box: Any, fmt: str, angle: str = "radians", clockwise: bool = True) -> Corners:
    """Return the corners of one box, a list of points: four in order along the outline, or eight in space."""
    if fmt == "corners3d":
        return [tuple(float(c) for c in corner) for corner in box]
    box = [float(number) for number in box]
    if fmt == "xyxy":
        left, top, right, bottom = box
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    turn = 0.0
    if fmt in ("cxcywhr", "cxcyczlwhr"):
        turn = math.radians(box[-1]) if angle == "degrees" else box[-1]
        turn = turn if clockwise else -turn
    cos, sin = math.cos(turn), math.sin(turn)
    if fmt == "cxcyczlwhr":
        x, y, z, length, width, height, _ = box
        flat = _rectangle(x, y, length, width, cos, sin)
        return [(*corner, z + side * height / 2) for side in (-1, 1) for corner in flat]
    x, y, width, height = box[:4]
    return _rectangle(x, y, width, height, cos, sin)


def _rectangle(x: float, y: float, w: float, h: float, cos: float, sin: float) -> Corners:
    """Return c + (u cos - v sin, u sin + v cos) for the four corners (u, v) = (+-w/2, +-h/2)."""
    points: Corners = []
    for along, across in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        u, v = along * w / 2, across * h / 2
        points.append((x + u * cos - v * sin, y + u * sin + v * cos))
    return points


def _extent_in_space(*boxes: Corners) -> float:
    points = [corner for box in boxes for corner in box]
    return max(max(p[i] for p in points) - min(p[i] for p in points) for i in range(3))


def _edges_in_space(box: Corners, shortest: float) -> Corners:
    """Return the edges at vertex 0 that are axes."""
    edges = [tuple(box[end][i] - box[0][i] for i in range(3)) for end in (1, 3, 4)]
    return [edge for edge in edges if math.hypot(*edge) > shortest]


def _interval_in_space(box: Corners, axis: Sequence[float]) -> tuple[float, float]:
    projections = [sum(a * c for a, c in zip(axis, corner, strict=True)) for corner in box]
    return min(projections), max(projections)


def loss_in_space(
    pred: Corners, target: Corners, *, base: tuple[Corners, Corners] | None = None, axis_grad: bool = True
) -> float:
    """Return the loss of two boxes of eight corners; `base` as in the polygons' oracle."""
    numbers = [number for box in (pred, target) for corner in box for number in corner]
    if not all(math.isfinite(number) for number in numbers):
        return math.nan
    base_pred, base_target = (pred, target) if base is None else base
    shortest = polygons.SHORTEST_EDGE * _extent_in_space(base_pred, base_target)
    fixed = (pred, target) if axis_grad else (base_pred, base_target)
    axes = [axis for box in fixed for axis in _edges_in_space(box, shortest)]
    if not axes:
        return 0.0
    values = [polygons.giou_1d(_interval_in_space(pred, a), _interval_in_space(target, a)) for a in axes]
    return (1 - sum(values) / len(values)) / 2


def sample_loss(
    pred: Any, target: Any, fmt: str, angle: str, clockwise: bool, *,
    base: tuple[Any, Any] | None = None, axis_grad: bool = True, **options: Any,
) -> float:  # fmt: skip
    """Return the loss of two boxes by their numbers; `base` is the pair around which differences are taken."""
    first, second = (corners(box, fmt, angle, clockwise) for box in (pred, target))
    around: Any = None if base is None else tuple(corners(box, fmt, angle, clockwise) for box in base)
    flat: Any = first, second
    if fmt in ("cxcyczlwhr", "corners3d"):
        return loss_in_space(first, second, base=around, axis_grad=axis_grad)
    return polygons.sample_loss(*flat, base=around, axis_grad=axis_grad, **options)


def per_sample_loss(
    pred: Any, target: Any, fmt: str, angle: str = "radians", clockwise: bool = True, **options: Any
) -> NDArray[np.float64]:
    """Return each sample's loss, (B,). Options are `axis_weight` and `boundary_weight`."""
    return np.array([sample_loss(p, g, fmt, angle, clockwise, **options) for p, g in zip(pred, target, strict=True)])


def gradient(
    pred: ArrayLike, target: ArrayLike, fmt: str, angle: str = "radians", clockwise: bool = True, *,
    side: str = "pred", axis_grad: bool = True, **options: Any,
) -> NDArray[np.float64]:  # fmt: skip
    """Return each sample's own gradient with respect to `side`, by central differences: the even split of a tie."""
    pred, target = np.asarray(pred, dtype=np.float64), np.asarray(target, dtype=np.float64)
    moved = pred if side == "pred" else target
    result = np.zeros_like(moved)
    for b in range(len(moved)):
        for place in np.ndindex(moved.shape[1:]):
            is_angle = fmt in ("cxcywhr", "cxcyczlwhr") and place == (moved.shape[1] - 1,)
            if is_angle:
                step = math.degrees(STEP) if angle == "degrees" else STEP
            else:
                points = [c for box in (pred[b], target[b]) for c in corners(box, fmt, angle, clockwise)]
                step = STEP * max(max(axis) - min(axis) for axis in zip(*points, strict=True))
            values = []
            for signed in (step, -step):
                box = moved[b].copy()
                box[place] += signed
                pair = (box, target[b]) if side == "pred" else (pred[b], box)
                base = (pred[b], target[b])
                values.append(sample_loss(*pair, fmt, angle, clockwise, base=base, axis_grad=axis_grad, **options))
            result[b][place] = (values[0] - values[1]) / (2 * step) if step else 0.0
    return result
