"""Vertices in memory and in registers: load, store, scale and move.

A slot without a real vertex has some coordinates, and NaN to add to its projections.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse_power_of_two, minus
from triton_mgiou.kernels.slots import bounds, bounds_or_nan, highest, over_lanes, total
from triton_mgiou.kernels.types import Addresses, Frame, Interval, Placed, Point, Source, Vertices

# What says which vertices are real.
ALL = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
MASK = tl.constexpr(2)
FULL = tl.constexpr(3)  # all, and they fill the slots: both sides are contiguous and of the same power of two


@triton.jit
def row_start(rows, stride, EVEN: tl.constexpr):
    """Offsets of rows, such that the compiler sees that they are even: a thread then takes two neighbours at once."""
    return rows * (stride // 2) * 2 if EVEN else rows * stride


@triton.jit
def source_of(side, rows, EVEN: tl.constexpr):
    """The side of the samples `rows`."""
    first = row_start(rows, side.stride_b, EVEN)
    real_first = rows * side.real_stride_b
    return Source(side.vertices_ptr, first, side.stride, side.size, side.real_ptr, real_first, side.real_stride)


@triton.jit
def addresses_of(source, index):
    """Addresses of vertices number `index`. A vertex of up to 64 bits is one access."""
    offsets = source.first + index * source.stride
    DTYPE: tl.constexpr = source.vertices_ptr.dtype.element_ty
    if DTYPE == tl.float64:
        return source.vertices_ptr + 2 * offsets
    elif DTYPE == tl.float32:
        return source.vertices_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + offsets
    else:
        return source.vertices_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + offsets


@triton.jit
def next_addresses(source, addresses, count: tl.constexpr):
    """The addresses of the vertices `count` further on."""
    return addresses + count * source.stride * (2 if source.vertices_ptr.dtype.element_ty == tl.float64 else 1)


@triton.jit
def flags_of(source, index, REAL: tl.constexpr):
    """Addresses of the mask's elements number `index`; anything where there is none."""
    return source.real_ptr + source.real_first + index * source.real_stride if REAL == MASK else source.first


@triton.jit
def next_flags(source, flags, count: tl.constexpr, REAL: tl.constexpr):
    """The same of the mask's elements."""
    return flags + count * source.real_stride if REAL == MASK else flags


@triton.jit
def load(source, addresses, mask, COMPUTE: tl.constexpr):
    """Coordinates, 0 where the mask is False."""
    DTYPE: tl.constexpr = source.vertices_ptr.dtype.element_ty
    if DTYPE == tl.float64:
        x = tl.load(addresses, mask=mask, other=0.0)
        y = tl.load(addresses + 1, mask=mask, other=0.0)
    elif DTYPE == tl.float32:
        words = tl.load(addresses, mask=mask, other=0)
        x = words.to(tl.int32).to(DTYPE, bitcast=True)
        y = (words >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        words = tl.load(addresses, mask=mask, other=0)
        x = words.to(tl.int16).to(DTYPE, bitcast=True)
        y = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return Point(x.to(COMPUTE), y.to(COMPUTE))


@triton.jit
def load_scaled(source, addresses, mask, scale):
    """Vertices, scaled but not moved: an edge is then rounded once."""
    vertex = load(source, addresses, mask, scale.dtype)
    return Point(vertex.x * scale, vertex.y * scale)


@triton.jit
def store(ptr, offsets, x, y, mask):
    """Store coordinates as vertices."""
    if x.dtype == tl.float64:
        tl.store(ptr + 2 * offsets, x, mask=mask)
        tl.store(ptr + 2 * offsets + 1, y, mask=mask)
    else:
        low = x.to(tl.uint32, bitcast=True).to(tl.int64)
        words = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        tl.store(ptr.to(tl.pointer_type(tl.int64), bitcast=True) + offsets, words, mask=mask)


@triton.jit
def is_real(source, flags, index, count, inside, REAL: tl.constexpr):
    """Whether vertices number `index` are real; none is outside the batch, but for FULL."""
    if REAL == MASK:
        return tl.load(flags, mask=inside & (index < source.size), other=0) != 0
    elif REAL == FULL:
        return inside | True
    else:
        return index < count


@triton.jit
def slot_addresses(source, lane, SLOTS: tl.constexpr, REAL: tl.constexpr):
    """The addresses of all vertices of a side, slot by slot, and of the mask's elements."""
    vertices = ()
    flags = ()
    for slot in tl.static_range(SLOTS):
        index = slot * lane.shape[2] + lane
        vertices = vertices + (addresses_of(source, index),)
        flags = flags + (flags_of(source, index, REAL),)
    return Addresses(vertices, flags)


@triton.jit
def load_vertices(source, addresses, lanes, REAL: tl.constexpr, COMPUTE: tl.constexpr):
    """All vertices of a side, at `slot_addresses`. Vertex `slot` * LANES + `lane` is in that slot of lane `lane`."""
    SLOTS: tl.constexpr = len(addresses.vertices)
    LANES: tl.constexpr = lanes.lane.shape[2]
    count = tl.where(lanes.inside, source.size, 0)
    if REAL == LENGTHS:
        length = tl.load(source.real_ptr + source.real_first, mask=lanes.inside, other=0)
        count = tl.where(length < source.size, tl.where(length > 0, length, 0), source.size).to(tl.int32)
    if REAL == FULL:
        count = tl.full(lanes.inside.shape, SLOTS * LANES, tl.int32)
    last = tl.maximum(count - 1, 0)
    xs = ()
    ys = ()
    reals = ()
    counts = ()
    places = ()
    for slot in tl.static_range(SLOTS):
        index = slot * LANES + lanes.lane
        real = is_real(source, addresses.flags[slot], index, count, lanes.inside, REAL)
        vertex = load(source, addresses.vertices[slot], real, COMPUTE)
        xs = xs + (vertex.x,)
        ys = ys + (vertex.y,)
        reals = reals + (real,)
        counts = counts + (real.to(tl.int32),)
        places = places + (tl.where(real, index, -1),)
    if REAL == MASK:
        count, last = total(counts), tl.maximum(highest(places), 0)
    return Vertices(xs, ys, reals, places, count, last)


@triton.jit
def _poison(xs, ys):
    """0, or NaN where a coordinate is NaN or Inf."""
    zero = tl.zeros_like(xs[0])
    for slot in tl.static_range(len(xs)):
        zero = tl.fma(xs[slot], 0.0, tl.fma(ys[slot], 0.0, zero))
    return total((zero,))


@triton.jit
def frame(pred, target, REAL: tl.constexpr):
    """One power of two for the sample, and its joint lower corner (section 6)."""
    if REAL == FULL:
        pred_x, pred_y = bounds_or_nan(pred.xs), bounds_or_nan(pred.ys)
        target_x, target_y = bounds_or_nan(target.xs), bounds_or_nan(target.ys)
        ends_x = pred_x.low, pred_x.high, target_x.low, target_x.high
        poison = _poison(ends_x, (pred_y.low, pred_y.high, target_y.low, target_y.high))
        pred_x, pred_y = over_lanes(pred_x), over_lanes(pred_y)
        target_x, target_y = over_lanes(target_x), over_lanes(target_y)
    else:
        pred_x, pred_y = bounds(pred.xs, pred.real), bounds(pred.ys, pred.real)
        target_x, target_y = bounds(target.xs, target.real), bounds(target.ys, target.real)
        poison = _poison(pred.xs, pred.ys) + _poison(target.xs, target.ys)
    low_x, high_x = tl.minimum(pred_x.low, target_x.low), tl.maximum(pred_x.high, target_x.high)
    low_y, high_y = tl.minimum(pred_y.low, target_y.low), tl.maximum(pred_y.high, target_y.high)
    largest_x = tl.maximum(tl.abs(low_x), tl.abs(high_x))
    largest_y = tl.maximum(tl.abs(low_y), tl.abs(high_y))
    scale = inverse_power_of_two(tl.maximum(largest_x, largest_y)) + poison
    low = Point(low_x * scale, low_y * scale)
    extent = tl.maximum(_scaled_length(Interval(low_x, high_x), scale), _scaled_length(Interval(low_y, high_y), scale))
    pred_extent = tl.maximum(_scaled_length(pred_x, scale), _scaled_length(pred_y, scale))
    target_width, target_height = _scaled_length(target_x, scale), _scaled_length(target_y, scale)
    target_extent = tl.maximum(target_width, target_height)
    return Frame(scale, low, extent, pred_extent, target_extent, 2.0 * (target_width + target_height), poison)


@triton.jit
def _scaled_length(interval, scale):
    """The length of an interval times a power of two: no difference overflows."""
    return tl.fma(interval.high, scale, minus(interval.low * scale))


@triton.jit
def place(vertices, origin, scale):
    """Scale vertices, and move the origin to 0 (section 6)."""
    xs = ()
    ys = ()
    pads = ()
    for slot in tl.static_range(len(vertices.xs)):
        xs = xs + (tl.fma(vertices.xs[slot], scale, minus(origin.x)),)
        ys = ys + (tl.fma(vertices.ys[slot], scale, minus(origin.y)),)
        pads = pads + (tl.where(vertices.real[slot], 0.0, float("nan")).to(scale.dtype),)
    return Placed(xs, ys, pads, origin)


@triton.jit
def load_last(source, vertices, scale):
    """The last real vertex, scaled but not moved."""
    return load_scaled(source, addresses_of(source, vertices.last), vertices.count > 0, scale)


@triton.jit
def place_at_last(source, vertices, scale):
    """The same as `place` relative to the last real vertex: the common origin may be far away."""
    return place(vertices, load_last(source, vertices, scale), scale)
