"""Two boxes on one axis: intervals by their middles and half-lengths, weights, the distance and its derivatives.

On an axis with the offset s of the two middles and the half-lengths a and b:

    e = a - b,   m = max(|s|, |e|),   D = (1 - GIoU1D) / 2 = m / (a + b + m)

    d D / d s =  u sign(s) [|s| > |e|]                        u = (1 - D) / (a + b + m); [.] is 1/2 at equality
    d D / d a =  u sign(e) [|e| > |s|] - D / (a + b + m)
    d D / d b = -u sign(e) [|e| > |s|] - D / (a + b + m)
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, minus
from triton_mgiou.kernels.axis import LENGTH, SHORTEST, SOFT, SOFT_UNIT, UNIFORM, axis_weight
from triton_mgiou.kernels.box_types import CXCYCZLWHR, XYXY, Distance, Side, Slopes, Sums, Weights


@triton.jit
def side_of(pred, target, scale, place: tl.constexpr, FORMAT: tl.constexpr):
    """Two boxes along coordinate number `place`."""
    SIZE: tl.constexpr = place + (3 if FORMAT == CXCYCZLWHR else 2)
    offset = tl.fma(pred[place], scale, minus(target[place] * scale))
    if FORMAT == XYXY:
        other = tl.fma(pred[SIZE], scale, minus(target[SIZE] * scale))
        pred_size = tl.fma(pred[SIZE], scale, minus(pred[place] * scale))
        target_size = tl.fma(target[SIZE], scale, minus(target[place] * scale))
        offset = 0.5 * (offset + other)
    else:
        pred_size = pred[SIZE] * scale
        target_size = target[SIZE] * scale
    return Side(offset, pred_size, 0.5 * tl.abs(pred_size), 0.5 * tl.abs(target_size))


@triton.jit
def half_length(along, across, turn):
    """The half-length of a box on another one's direction, by its half-sizes along and across that at no turn."""
    return tl.fma(along, tl.abs(turn.cos), across * tl.abs(turn.sin))


@triton.jit
def reach(offset, pred, target):
    """The joint length of two intervals."""
    return pred + target + tl.maximum(tl.abs(offset), tl.abs(pred - target))


@triton.jit
def edge_weights(x, y, z, extent, V: tl.constexpr):
    """Section 3, by half of the edges that the directions x, y, z belong to."""
    floor = tl.full(extent.shape, V.NO_LENGTH, extent.dtype)
    per_unit = floor
    if V.AXIS_WEIGHT == UNIFORM:
        floor = tl.maximum(floor, extent * tl.full(extent.shape, SHORTEST, extent.dtype))
    if V.AXIS_WEIGHT == SOFT:
        per_unit = 1.0 / (tl.maximum(extent, floor) * tl.full(extent.shape, SOFT_UNIT, extent.dtype))
    x, y = 2.0 * x, 2.0 * y
    is_x, is_y = x > floor, y > floor
    x, y = tl.where(is_x, x, 0.0), tl.where(is_y, y, 0.0)
    if V.AXIS_WEIGHT == LENGTH:
        per_unit = 1.0 / tl.where(is_x | is_y, x + y, 1.0)
    on_x = axis_weight(x, is_x, per_unit, V.AXIS_WEIGHT)
    on_y = axis_weight(y, is_y, per_unit, V.AXIS_WEIGHT)
    slope_x, slope_y = tl.where(is_x, on_x.slope, 0.0), tl.where(is_y, on_y.slope, 0.0)
    return Weights(on_x.value, on_y.value, (2.0 * z > floor).to(x.dtype), slope_x, slope_y)


@triton.jit
def with_sign(values, signs):
    """|values| with the sign bits of `signs`."""
    if values.dtype == tl.float64:
        bits = signs.to(tl.int64, bitcast=True) & (-(2**63))
        return (values.to(tl.int64, bitcast=True) | bits).to(tl.float64, bitcast=True)
    else:
        bits = signs.to(tl.int32, bitcast=True) & (-(2**31))
        return (values.to(tl.int32, bitcast=True) | bits).to(tl.float32, bitcast=True)


@triton.jit
def times_sign(values, signs):
    """Values times 1, -1, or 0 where `signs` is 0: a sign bit is fewer instructions than a factor."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True) ^ (signs.to(tl.int64, bitcast=True) & (-(2**63)))
        product = bits.to(tl.float64, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True) ^ (signs.to(tl.int32, bitcast=True) & (-(2**31)))
        product = bits.to(tl.float32, bitcast=True)
    return tl.where(signs == 0, 0.0, product)


@triton.jit
def distance(offset, pred, target, weight, V: tl.constexpr):
    """D of an axis and the derivatives of w D."""
    difference = pred - target
    by_offset, by_size = tl.abs(offset), tl.abs(difference)
    larger = tl.maximum(by_offset, by_size)
    hull = pred + target + larger
    per_hull = tl.where(hull > V.NO_LENGTH, inverse(hull), 0.0)
    apart = larger * per_hull
    if not V.GRAD:
        return Distance(apart, Slopes(offset, offset, offset))
    shrink = weight * per_hull
    grow = tl.where(larger > 0, shrink * (1.0 - apart), 0.0)
    to_offset = tl.where(by_offset > by_size, grow, tl.where(by_offset == by_size, 0.5 * grow, 0.0))
    to_size = with_sign(grow - to_offset, difference)
    shrink *= apart
    return Distance(apart, Slopes(with_sign(to_offset, offset), to_size - shrink, minus(to_size) - shrink))


@triton.jit
def add(sums, on_axis, weight):
    """`sums` with one more axis."""
    return Sums(tl.fma(weight, on_axis.value, sums.distance), sums.weight + weight)
