"""Two boxes on one axis: intervals by their middles and half-lengths, weights, the distance and its derivatives.

On an axis with the offset s of the two middles and the half-lengths a and b:

    e = a - b,   m = max(|s|, |e|),   D = (1 - GIoU1D) / 2 = m / (a + b + m),   2 m = |s + e| + |s - e|

With u = (1 - D) / (a + b + m), and [x] for 0, 1/2 or 1 where x is below, at or above 0:

    d D / d s =  u ([s + e] + [s - e] - 1)
    d D / d a =  u ([s + e] - [s - e]) - D / (a + b + m)
    d D / d b = -u ([s + e] - [s - e]) - D / (a + b + m)
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, reciprocal
from triton_mgiou.kernels.axis import LENGTH, SHORTEST, SOFT, SOFT_UNIT, UNIFORM, axis_weight
from triton_mgiou.kernels.box_types import CXCYCZLWHR, CXCYWHR, XYXY, Distance, Side, Slopes, Sums, Weights


@triton.jit
def _difference(left, right, scale, PLAIN: tl.constexpr):
    """Scaled, and rounded once."""
    return left - right if PLAIN else tl.fma(left, scale, minus(right * scale))


@triton.jit
def side_of(pred, target, scale, place: tl.constexpr, PLAIN: tl.constexpr, V: tl.constexpr):
    """Two boxes along coordinate number `place`."""
    SIZE: tl.constexpr = place + (3 if V.FORMAT == CXCYCZLWHR else 2)
    offset = _difference(pred[place], target[place], scale, PLAIN)
    if V.FORMAT == XYXY:
        offset = 0.5 * (offset + _difference(pred[SIZE], target[SIZE], scale, PLAIN))
        pred_size = _difference(pred[SIZE], pred[place], scale, PLAIN)
        target_size = _difference(target[SIZE], target[place], scale, PLAIN)
    else:
        pred_size, target_size = pred[SIZE] * scale, target[SIZE] * scale
    return Side(offset, pred_size, target_size, 0.5 * tl.abs(pred_size), 0.5 * tl.abs(target_size))


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
def times_sign(values, signs, PLAIN: tl.constexpr):
    """Values times 1, -1, or 0 where `signs` is 0, which it never is in what is PLAIN."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True) ^ (signs.to(tl.int64, bitcast=True) & (-(2**63)))
        product = bits.to(tl.float64, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True) ^ (signs.to(tl.int32, bitcast=True) & (-(2**31)))
        product = bits.to(tl.float32, bitcast=True)
    return product if PLAIN else tl.where(signs == 0, 0.0, product)


@triton.jit
def above_zero(values):
    """0, 1/2 or 1 for values below, at or above 0: one instruction, where comparing and choosing are two each.

    Up to 2^-127 (2^-1001) from 0, far below the rounding of what they are differences of, it is in between.
    """
    HUGE: tl.constexpr = 2.0**1000 if values.dtype == tl.float64 else 2.0**126
    huge, half = tl.full(values.shape, HUGE, values.dtype), tl.full(values.shape, 0.5, values.dtype)
    return tl.clamp(tl.fma(values, huge, half), 0.0, 1.0)


@triton.jit
def distance(offset, pred, target, weight, PLAIN: tl.constexpr, V: tl.constexpr):
    """D of an axis and the derivatives of w D."""
    difference = pred - target
    high, low = offset + difference, offset - difference  # of the upper ends, of the lower ends
    apart = tl.abs(high) + tl.abs(low)
    hull = tl.fma(pred + target, 2.0, apart)  # twice the hull
    per_hull = reciprocal(hull)
    if not PLAIN:
        if V.FORMAT == CXCYWHR:  # two points at an angle are one but for rounding: see the reference
            some = tl.fma(pred + target, 8.0 * V.TIE / V.NO_LENGTH, apart) > 4.0 * V.TIE
        else:
            some = hull > 2.0 * V.NO_LENGTH
        per_hull = tl.where(some, per_hull, 0.0)
    apart *= per_hull
    if not V.GRAD:
        return Distance(apart, Slopes(offset, offset, offset))
    shrink = weight * per_hull
    grow = shrink
    shrink *= apart
    grow -= shrink
    high, low = above_zero(high), above_zero(low)
    to_size = high - low
    to_pred = tl.fma(to_size, grow, minus(shrink))
    return Distance(
        apart, Slopes(tl.fma(high + low, grow, minus(grow)), to_pred, tl.fma(minus(to_size), grow, minus(shrink)))
    )


@triton.jit
def weighted(on_axis, weight):
    """The sums of one axis."""
    return Sums(weight * on_axis.value, weight)


@triton.jit
def add(sums, on_axis, weight):
    """`sums` with one more axis."""
    return Sums(tl.fma(weight, on_axis.value, sums.distance), sums.weight + weight)
