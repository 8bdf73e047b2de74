"""One axis: the edge that it belongs to, its weight, the distance of two polygons on it, and derivatives."""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, minus, one_minus_exp, rough_inverse, sign
from triton_mgiou.kernels.slots import add_scaled, highest, lowest, total
from triton_mgiou.kernels.types import Axis, AxisRule, Comparison, Gradient, Interval, Mean, Point, Weight
from triton_mgiou.options import AXIS_WEIGHTS, MIN_AXIS_LENGTH, SOFT_AXIS_LENGTH, WIDEST_TIE

UNIFORM = tl.constexpr(AXIS_WEIGHTS.index("uniform"))
LENGTH = tl.constexpr(AXIS_WEIGHTS.index("length"))
SOFT = tl.constexpr(AXIS_WEIGHTS.index("soft"))

SHORTEST = tl.constexpr(MIN_AXIS_LENGTH)
SOFT_UNIT = tl.constexpr(SOFT_AXIS_LENGTH)
WIDEST = tl.constexpr(WIDEST_TIE)


@triton.jit
def axis_rule(extent, TINY: tl.constexpr, AXIS_WEIGHT: tl.constexpr):
    """Which edges are axes; for LENGTH without the unit, which is the perimeter (section 3)."""
    floor = tl.full(extent.shape, TINY, extent.dtype)
    per_unit = floor
    if AXIS_WEIGHT == UNIFORM:
        shortest = extent * tl.full((1, 1, 1), SHORTEST, extent.dtype)
        floor = tl.maximum(floor, shortest * shortest)
    if AXIS_WEIGHT == SOFT:
        per_unit = 1.0 / (tl.maximum(extent, floor) * tl.full((1, 1, 1), SOFT_UNIT, extent.dtype))
    return AxisRule(floor, per_unit)


@triton.jit
def edge_axis(edge, floor):
    """The axis of an edge; 0, and none, if the edge is too short or not real."""
    x = tl.where(edge.real, edge.end.x - edge.start.x, 0.0)
    y = tl.where(edge.real, edge.end.y - edge.start.y, 0.0)
    squared = tl.fma(x, x, y * y)
    is_axis = squared > floor
    length = tl.where(is_axis, tl.sqrt(squared), 0.0)
    return Axis(y, minus(x), Point(x, y), length, is_axis)


@triton.jit
def axis_weight(length, is_axis, per_unit, AXIS_WEIGHT: tl.constexpr):
    """The weight of an axis by the length of its edge (section 3)."""
    if AXIS_WEIGHT == UNIFORM:
        return Weight(is_axis.to(length.dtype), length * 0.0)
    ratio = length * per_unit
    if AXIS_WEIGHT == LENGTH:
        return Weight(ratio, per_unit)
    else:
        weight = one_minus_exp(ratio)
        return Weight(weight, (1.0 - weight) * per_unit)


@triton.jit
def distance(pred, target, TINY: tl.constexpr):
    """1 - GIoU1D of two intervals, 1 / h and h; the first two are 0 where h is 0 (sections 2 and 5)."""
    hull = tl.maximum(pred.high, target.high) - tl.minimum(pred.low, target.low)
    per_hull = tl.where(hull > TINY, inverse(hull), 0.0)
    return (tl.abs(pred.high - target.high) + tl.abs(pred.low - target.low)) * per_hull, per_hull, hull


@triton.jit
def slopes(pred, target, apart, scale):
    """`scale` h times the derivative of `apart`, 1 - GIoU1D, to the ends of both; half of it at a tie (section 4)."""
    half = 0.5 * apart * scale
    top = sign(pred.high - target.high)
    bottom = sign(pred.low - target.low)
    rest = scale - half
    to_pred = Interval(tl.fma(bottom, rest, half), tl.fma(top, rest, minus(half)))
    return to_pred, Interval(tl.fma(minus(bottom), rest, half), tl.fma(minus(top), rest, minus(half)))


@triton.jit
def project(x, y, placed):
    """Projections of all slots on the axis (x, y)."""
    projections = ()
    for slot in tl.static_range(len(placed.xs)):
        projections = projections + (tl.fma(x, placed.xs[slot], tl.fma(y, placed.ys[slot], placed.pads[slot])),)
    return projections


@triton.jit
def compare(axis, pred, target, TINY: tl.constexpr):
    """Both polygons on an axis, and how far they are apart there."""
    on_pred = project(axis.x, axis.y, pred)
    on_target = project(axis.x, axis.y, target)
    pred_ends = Interval(lowest(on_pred), highest(on_pred))
    target_ends = Interval(lowest(on_target), highest(on_target))
    apart, per_hull, hull = distance(pred_ends, target_ends, TINY)
    return Comparison(on_pred, on_target, pred_ends, target_ends, apart, per_hull, hull)


@triton.jit
def own_interval(axis, edge, origin):
    """Projections of an edge's start, and of both ends, on its axis: equal but for rounding."""
    start = Point(edge.start.x - origin.x, edge.start.y - origin.y)
    return interval_of(axis, start, Point(edge.end.x - origin.x, edge.end.y - origin.y))


@triton.jit
def interval_of(axis, start, end):
    """The same of an edge's ends relative to the origin. Bits as from `project`."""
    at_start = tl.fma(axis.x, start.x, axis.y * start.y)
    at_end = tl.fma(axis.x, end.x, axis.y * end.y)
    return at_start, Interval(tl.minimum(at_start, at_end), tl.maximum(at_start, at_end))


@triton.jit
def tie(ends, edge_ends):
    """Thresholds for `shares` by which both ends of the edge are at an extreme if one is."""
    low = tl.where(edge_ends.low == ends.low, edge_ends.high, ends.low)
    return Interval(low, tl.where(edge_ends.high == ends.high, edge_ends.low, ends.high))


@triton.jit
def rounded(ends, rounding):
    """Thresholds for `shares` by which all projections that are at an extreme but for rounding are (section 4)."""
    return Interval(ends.low + rounding, ends.high - rounding)


@triton.jit
def near_ends(ends, axis, slack):
    """The same of projections on an axis whose coordinates are right to `slack`."""
    size = tl.abs(axis.x) + tl.abs(axis.y)
    return Interval(tl.fma(size, slack, ends.low), tl.fma(size, minus(slack), ends.high))


@triton.jit
def shares(projections, ends, derivatives):
    """Derivative of each slot's projection: that of the ends of the interval, in equal shares at a tie (section 4)."""
    at_low = ()
    at_high = ()
    for slot in tl.static_range(len(projections)):
        at_low = at_low + ((projections[slot] <= ends.low).to(ends.low.dtype),)
        at_high = at_high + ((projections[slot] >= ends.high).to(ends.low.dtype),)
    to_low = derivatives.low * rough_inverse(total(at_low))
    to_high = derivatives.high * rough_inverse(total(at_high))
    new = ()
    for slot in tl.static_range(len(projections)):
        new = new + (tl.fma(at_low[slot], to_low, at_high[slot] * to_high),)
    return new


@triton.jit
def add_distance(mean, compared, weight):
    """`mean` with one more axis."""
    widest = tl.maximum(mean.widest, compared.hull)
    return Mean(tl.fma(weight, compared.distance, mean.distance), mean.weight + weight, widest)


@triton.jit
def add_gradient(gradient, axis, derivatives):
    """`gradient` with the derivatives of the projections on one more axis."""
    return Gradient(
        add_scaled(gradient.xs, axis.x, derivatives),
        add_scaled(gradient.ys, axis.y, derivatives),
    )
