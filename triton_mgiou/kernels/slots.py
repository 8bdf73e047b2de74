"""Slots, tuples of tiles with one for each vertex that a lane keeps: sums, extremes, and arithmetic slot by slot."""

import triton
import triton.language as tl

from triton_mgiou.kernels.types import Interval


@triton.jit
def _smaller(left, right):
    return tl.minimum(left, right)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right)


@triton.jit
def _plus(left, right):
    return left + right


@triton.jit
def _halve(values, COMBINE: tl.constexpr):
    halves = ()
    for slot in tl.static_range(len(values) // 2):
        halves = halves + (COMBINE(values[2 * slot], values[2 * slot + 1]),)
    return halves


@triton.jit
def _fold(values, COMBINE: tl.constexpr):
    """Combine up to 8 slots as a tree: short chains of dependent instructions."""
    if len(values) >= 8:
        values = _halve(values, COMBINE)
    if len(values) >= 4:
        values = _halve(values, COMBINE)
    if len(values) >= 2:
        values = _halve(values, COMBINE)
    return values[0]


@triton.jit
def _over_lanes(values, REDUCE: tl.constexpr):
    if len(values.shape) == 1:  # boxes: a lane has all of one
        return values
    else:
        return values if values.shape[2] == 1 else REDUCE(values, axis=2, keep_dims=True)


@triton.jit
def lowest(values):
    """The lowest value of all slots and lanes, (POLYGONS, AXES, 1)."""
    return _over_lanes(_fold(values, _smaller), tl.min)


@triton.jit
def highest(values):
    """The highest value of all slots and lanes, (POLYGONS, AXES, 1)."""
    return _over_lanes(_fold(values, _larger), tl.max)


@triton.jit
def total(values):
    """The sum over all slots and lanes, (POLYGONS, AXES, 1)."""
    return _over_lanes(_fold(values, _plus), tl.sum)


@triton.jit
def dot(left, right):
    """The sum of products over all slots and lanes, (POLYGONS, AXES, 1)."""
    products = left[0] * right[0]
    for slot in tl.static_range(1, len(left)):
        products = tl.fma(left[slot], right[slot], products)
    return total((products,))


@triton.jit
def _smaller_or_nan(left, right):
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger_or_nan(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounds(values, real):
    """The interval of the values of real vertices."""
    kept = ()
    for slot in tl.static_range(len(values)):
        kept = kept + (tl.where(real[slot], values[slot], float("nan")),)
    return Interval(lowest(kept), highest(kept))


@triton.jit
def bounds_or_nan(values):
    """The interval of each lane's values, and NaN if one of them is: the same number of instructions."""
    return Interval(_fold(values, _smaller_or_nan), _fold(values, _larger_or_nan))


@triton.jit
def over_lanes(interval):
    """The interval of all lanes."""
    return Interval(_over_lanes(interval.low, tl.min), _over_lanes(interval.high, tl.max))


@triton.jit
def over_axes(values):
    """The sum over the axes that are taken at a time, (POLYGONS, 1, LANES)."""
    if values.shape[1] == 1:
        return values
    return tl.sum(values, axis=1, keep_dims=True)


@triton.jit
def highest_over_axes(values):
    """The highest value over the axes that are taken at a time, (POLYGONS, 1, 1)."""
    if values.shape[1] == 1:
        return values
    return tl.max(values, axis=1, keep_dims=True)


@triton.jit
def pick(slots, here):
    """What is in the one slot where `here`."""
    value = slots[0]
    for slot in tl.static_range(1, len(slots)):
        value = tl.where(here[slot], slots[slot], value)
    return value


@triton.jit
def dealt_out(slots, first: tl.constexpr, axis, NUMBER: tl.constexpr):
    """To each axis one of `NUMBER` slots from the `first` on, in turn."""
    value = slots[first]
    for number in tl.static_range(1, NUMBER):
        value = tl.where(axis == number, slots[first + number], value)
    return value


@triton.jit
def zeros(slots):
    """0 in every slot."""
    new = ()
    for slot in tl.static_range(len(slots)):
        new = new + (tl.zeros_like(slots[slot]),)
    return new


@triton.jit
def add(totals, values):
    """Sums slot by slot."""
    new = ()
    for slot in tl.static_range(len(totals)):
        new = new + (totals[slot] + values[slot],)
    return new


@triton.jit
def add_scaled(totals, factor, values):
    """Sums of `totals` and `factor` times `values`, slot by slot."""
    new = ()
    for slot in tl.static_range(len(totals)):
        new = new + (tl.fma(values[slot], factor, totals[slot]),)
    return new


@triton.jit
def put(slots, value, here):
    """`value` in the place of what is there, where `here`."""
    new = ()
    for slot in tl.static_range(len(slots)):
        new = new + (tl.where(here[slot], value, slots[slot]),)
    return new
