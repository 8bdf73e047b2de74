"""The fused MGIoU kernel: value, reduction and gradient to `pred` in one launch.

With p and g the intervals of the projections of P and G on axis k, and h_k the length of their joint hull:

    d_k = 1 - GIoU1D_k = (|top| + |bottom|) / h_k,   top = max_p - max_g,  bottom = min_p - min_g
    loss = sum_k w_k d_k / (2 sum_k w_k) + convexity_weight * convexity + boundary_weight * boundary

    d d_k / d max_p =  (sign(top)    - d_k [max_p > max_g]) / h_k       [.] is 1/2 and sign is 0 at equality
    d d_k / d min_p =  (sign(bottom) + d_k [min_p < min_g]) / h_k
    d d_k / d max_g = -(sign(top)    + d_k [max_g > max_p]) / h_k
    d d_k / d min_g = -(sign(bottom) - d_k [min_g < min_p]) / h_k

An extreme hands its derivative, times the axis, to the vertices that attain it, in equal shares. The axis
a = (e_y, -e_x) of edge e collects the derivative times those vertices and hands it on to the edge's two ends.

A program takes POLYGONS samples at a time. LANES x AXES lanes work on one sample: each keeps SLOTS vertices of P
and of G in registers, vertex index = slot * LANES + lane, as tuples of (POLYGONS, AXES, LANES) tiles, and AXES axes
are taken at a time. Edges come from vertices that are loaded again, so the code's size depends neither on the vertex
counts nor on the batch. What is the same for all axes is computed by the lanes of all of them, at no cost.
A slot without a real vertex has some coordinates, and projections NaN, which `min`, `max` and `==` pass over.
"""

import math

import triton
import triton.language as tl

# AXIS_WEIGHT
UNIFORM = tl.constexpr(0)
LENGTH = tl.constexpr(1)
SOFT = tl.constexpr(2)

# PRED_REAL and TARGET_REAL: what says which vertices are real
ALL = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
MASK = tl.constexpr(2)
FULL = tl.constexpr(3)  # all, and they fill the slots: both sides are contiguous and of the same power of two

FEW = tl.constexpr(128)  # partial sums that the last program adds at a time
MANY = tl.constexpr(1024)

EXPM1 = tl.constexpr(tuple(1 / math.factorial(power) for power in range(1, 15)))  # its series


@triton.jit
def _vertices(polygons, index):
    """Addresses of vertices number `index`. A vertex of up to 64 bits is one access."""
    ptr, offset, stride = polygons[:3]
    offsets = offset + index * stride
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if DTYPE == tl.float64:
        return ptr + 2 * offsets
    elif DTYPE == tl.float32:
        return ptr.to(tl.pointer_type(tl.int64), bitcast=True) + offsets
    else:
        return ptr.to(tl.pointer_type(tl.int32), bitcast=True) + offsets


@triton.jit
def _load_vertices(polygons, addresses, mask, COMPUTE: tl.constexpr):
    """Coordinates, 0 where the mask is False."""
    DTYPE: tl.constexpr = polygons[0].dtype.element_ty
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
    return x.to(COMPUTE), y.to(COMPUTE)


@triton.jit
def _store_vertices(ptr, offsets, x, y, mask, COMPUTE: tl.constexpr):
    """The reverse, in COMPUTE."""
    if COMPUTE == tl.float64:
        tl.store(ptr + 2 * offsets, x, mask=mask)
        tl.store(ptr + 2 * offsets + 1, y, mask=mask)
    else:
        low = x.to(tl.uint32, bitcast=True).to(tl.int64)
        words = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        tl.store(ptr.to(tl.pointer_type(tl.int64), bitcast=True) + offsets, words, mask=mask)


@triton.jit
def _first_vertex(rows, stride, EVEN: tl.constexpr):
    """Offsets of rows, such that the compiler sees that they are even: a thread then takes two neighbours at once."""
    return rows * (stride // 2) * 2 if EVEN else rows * stride


@triton.jit
def _flags(polygons, index, REAL: tl.constexpr):
    """Addresses of the mask's elements number `index`; anything where there is none."""
    _, offset, _, _, mask_ptr, mask_offset, mask_stride = polygons
    return mask_ptr + mask_offset + index * mask_stride if REAL == MASK else offset


@triton.jit
def _is_real(flags, polygons, index, count, inside, REAL: tl.constexpr):
    if REAL == MASK:
        return tl.load(flags, mask=inside & (index < polygons[3]), other=0) != 0
    elif REAL == FULL:
        return inside | True
    else:
        return index < count


@triton.jit
def _load_polygons(
    polygons, inside, lane, SLOTS: tl.constexpr, LANES: tl.constexpr, REAL: tl.constexpr, COMPUTE: tl.constexpr
):
    """Slots of x, y, real, and index or -1 if not real; number of real vertices and index of the last."""
    size, real_ptr, real_offset = polygons[3:6]
    count = tl.where(inside, size, 0)
    if REAL == LENGTHS:
        length = tl.load(real_ptr + real_offset, mask=inside, other=0)
        count = tl.where(length < size, tl.where(length > 0, length, 0), size).to(tl.int32)
    if REAL == FULL:
        count = tl.full(inside.shape, SLOTS * LANES, tl.int32)
    last = tl.maximum(count - 1, 0)
    xs = ()
    ys = ()
    reals = ()
    counts = ()
    places = ()
    for slot in tl.static_range(SLOTS):
        index = slot * LANES + lane
        real = _is_real(_flags(polygons, index, REAL), polygons, index, count, inside, REAL)
        x, y = _load_vertices(polygons, _vertices(polygons, index), real, COMPUTE)
        xs = xs + (x,)
        ys = ys + (y,)
        reals = reals + (real,)
        counts = counts + (real.to(tl.int32),)
        places = places + (tl.where(real, index, -1),)
    if REAL == MASK:
        count, last = _sum(counts), tl.maximum(_high(places), 0)
    return xs, ys, reals, places, count, last


@triton.jit
def _over_axes(values):
    if values.shape[1] == 1:
        return values
    return tl.sum(values, axis=1, keep_dims=True)


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
def _low(values):
    folded = _fold(values, _smaller)
    if folded.shape[2] == 1:
        return folded
    return tl.min(folded, axis=2, keep_dims=True)


@triton.jit
def _high(values):
    folded = _fold(values, _larger)
    if folded.shape[2] == 1:
        return folded
    return tl.max(folded, axis=2, keep_dims=True)


@triton.jit
def _sum(values):
    folded = _fold(values, _plus)
    if folded.shape[2] == 1:
        return folded
    return tl.sum(folded, axis=2, keep_dims=True)


@triton.jit
def _minus(values):
    """-values as the sign of an operand: what Triton makes of `-values` is 0 - values, an instruction."""
    return values * -1.0


@triton.jit
def _bounds(values, reals):
    """Lowest and highest value over the real vertices."""
    kept = ()
    for slot in tl.static_range(len(values)):
        kept = kept + (tl.where(reals[slot], values[slot], float("nan")),)
    return _low(kept), _high(kept)


@triton.jit
def _poison(xs, ys):
    """0, or NaN where a vertex is NaN or Inf: `min` and `max` do not pass it on."""
    zero = tl.zeros_like(xs[0])
    for slot in tl.static_range(len(xs)):
        zero = tl.fma(xs[slot], 0.0, tl.fma(ys[slot], 0.0, zero))
    return _sum((zero,))


@triton.jit
def _inverse_power_of_two(values, COMPUTE: tl.constexpr):
    """2^-k for values in [2^k, 2^(k+1)); k stays where both 2^k and 2^-k are normal."""
    if COMPUTE == tl.float64:
        exponent = (values.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        inverse = 2046 - tl.minimum(tl.maximum(exponent, 2), 2044)
        return (inverse << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (values.to(tl.int32, bitcast=True) >> 23) & 0xFF
        inverse = 254 - tl.minimum(tl.maximum(exponent, 2), 252)
        return (inverse << 23).to(tl.float32, bitcast=True)


@triton.jit
def _normalise(xs, ys, reals, low_x, low_y, scale):
    """Scaled and moved coordinates, what makes the projections of an unreal vertex NaN, and the origin (section 6)."""
    new_xs = ()
    new_ys = ()
    pads = ()
    for slot in tl.static_range(len(xs)):
        new_xs = new_xs + (tl.fma(xs[slot], scale, _minus(low_x)),)
        new_ys = new_ys + (tl.fma(ys[slot], scale, _minus(low_y)),)
        pads = pads + (tl.where(reals[slot], 0.0, float("nan")).to(scale.dtype),)
    return new_xs, new_ys, pads, low_x, low_y


@triton.jit
def _vertex(polygons, addresses, real, scale):
    """Vertices, scaled but not moved: an edge is then rounded once."""
    x, y = _load_vertices(polygons, addresses, real, scale.dtype)
    return x * scale, y * scale


@triton.jit
def _start(polygons, last, count, first, scale, REAL: tl.constexpr):
    """What `_edges` takes over from a step: the last real vertex so far, and its index; where the next ones are.

    Addresses that a loop carries save Triton's compiler a walk through the whole kernel for each of them.
    """
    x, y = _vertex(polygons, _vertices(polygons, last), count > 0, scale)
    return x, y, last, _vertices(polygons, first), _flags(polygons, first, REAL)


@triton.jit
def _edges(start, polygons, places, k, count, last, inside, scale, AXES: tl.constexpr, REAL: tl.constexpr):
    """Edges that end at vertices number k: where, where and at which vertex they start, and whether they are real."""
    last_x, last_y, last_k, addresses, flags = start
    ptr, _, stride, _, _, _, mask_stride = polygons
    real = _is_real(flags, polygons, k, count, inside, REAL)
    x, y = _vertex(polygons, addresses, real, scale)
    if AXES == 1:
        previous_x, previous_y, previous = last_x, last_y, last_k
        last_x, last_y, last_k = tl.where(real, x, last_x), tl.where(real, y, last_y), tl.where(real, k, last_k)
    else:
        previous = tl.where(k == 0, last, k - 1)
        if REAL == MASK:
            before = ()
            for slot in tl.static_range(len(places)):
                before = before + (tl.where(places[slot] < k, places[slot], -1),)
            nearest = _high(before)
            previous = tl.where(nearest < 0, last, nearest)
        previous_x, previous_y = _vertex(polygons, _vertices(polygons, previous), real, scale)
    addresses += AXES * stride * (2 if ptr.dtype.element_ty == tl.float64 else 1)
    if REAL == MASK:
        flags += AXES * mask_stride
    return (x, y, previous_x, previous_y, previous, real), (last_x, last_y, last_k, addresses, flags)


@triton.jit
def _kept_edges(raw_xs, raw_ys, k: tl.constexpr, inside, scale):
    """The same of vertices that a lane has all in registers."""
    previous: tl.constexpr = (k + len(raw_xs) - 1) % len(raw_xs)
    x, y = raw_xs[k] * scale, raw_ys[k] * scale
    previous_x, previous_y = raw_xs[previous] * scale, raw_ys[previous] * scale
    return x, y, previous_x, previous_y, previous, inside | True


@triton.jit
def _edge(x, y, previous_x, previous_y, real, floor):
    """The edge that ends at (x, y), and its length: 0, and no axis, if too short or not real."""
    edge_x = tl.where(real, x - previous_x, 0.0)
    edge_y = tl.where(real, y - previous_y, 0.0)
    squared = tl.fma(edge_x, edge_x, edge_y * edge_y)
    is_axis = squared > floor
    return edge_x, edge_y, tl.where(is_axis, tl.sqrt(squared), 0.0), is_axis


@triton.jit
def _axis_weight(length, is_axis, per_unit, AXIS_WEIGHT: tl.constexpr):
    """w_k of section 3 and its derivative to the edge's length. `per_unit` is 1 / the unit of lengths."""
    if AXIS_WEIGHT == UNIFORM:
        return is_axis.to(length.dtype), length * 0.0
    ratio = length * per_unit
    if AXIS_WEIGHT == LENGTH:
        return ratio, per_unit
    else:
        TERMS: tl.constexpr = 14 if length.dtype == tl.float64 else 8  # below 1/2 the rest is under rounding
        series = tl.full(ratio.shape, EXPM1[TERMS - 1], ratio.dtype)
        for step in tl.static_range(TERMS - 1):
            series = tl.fma(_minus(ratio), series, tl.full(ratio.shape, EXPM1[TERMS - 2 - step], ratio.dtype))
        weight = tl.where(ratio < 0.5, ratio * series, 1.0 - tl.exp(_minus(ratio)))
        return weight, (1.0 - weight) * per_unit


@triton.jit
def _own_interval(axis_x, axis_y, x, y, previous_x, previous_y, origin_x, origin_y):
    """Projections of both ends of an edge on its normal: equal but for rounding. Bits as from `_project`."""
    start = tl.fma(axis_x, previous_x - origin_x, axis_y * (previous_y - origin_y))
    end = tl.fma(axis_x, x - origin_x, axis_y * (y - origin_y))
    return start, tl.minimum(start, end), tl.maximum(start, end)


@triton.jit
def _measure_edge(state, edges, origin_x, origin_y, floor, per_unit, AXIS_WEIGHT: tl.constexpr):
    """Add an edge to the sums over a side's edges that need no projection of other vertices."""
    perimeter, axes, weights, squares, starts, lows, highs = state
    x, y, previous_x, previous_y, _, real = edges
    edge_x, edge_y, length, is_axis = _edge(x, y, previous_x, previous_y, real, floor)
    start, low, high = _own_interval(edge_y, _minus(edge_x), x, y, previous_x, previous_y, origin_x, origin_y)
    return (
        perimeter + length,
        axes + is_axis.to(floor.dtype),
        weights + _axis_weight(length, is_axis, per_unit, AXIS_WEIGHT)[0],
        tl.fma(edge_x, edge_x, tl.fma(edge_y, edge_y, squares)),
        starts + start,
        lows + low,
        highs + high,
    )


@triton.jit
def _measure(
    polygons, raw_xs, raw_ys, places, count, last, inside, axis, scale, origin_x, origin_y, floor, per_unit,
    AXIS_WEIGHT: tl.constexpr, REAL: tl.constexpr, UNROLLED: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Sums over the edges of a side: lengths, number of axes, their weights; what `_doubled_area` needs."""
    none = tl.zeros_like(floor)
    state = (none, none, none, none, none, none, none)
    if UNROLLED:
        for k in tl.static_range(len(raw_xs)):
            edges = _kept_edges(raw_xs, raw_ys, k, inside, scale)
            state = _measure_edge(state, edges, origin_x, origin_y, floor, per_unit, AXIS_WEIGHT)
    else:
        start = _start(polygons, last, count, axis, scale, REAL)
        for first in range(0, polygons[3], AXES):
            k = first + axis
            edges, start = _edges(start, polygons, places, k, count, last, inside, scale, AXES, REAL)
            state = _measure_edge(state, edges, origin_x, origin_y, floor, per_unit, AXIS_WEIGHT)
    sums = ()
    for each in tl.static_range(len(state)):
        sums = sums + (_over_axes(state[each]),)
    return sums


@triton.jit
def _doubled_area(measured):
    """Twice the area, the sign of its direction (0 without an area), and the sum of the squared edges."""
    _, _, _, squares, starts, lows, highs = measured
    return tl.maximum(tl.where(starts > 0, highs, 0.0), tl.where(starts < 0, _minus(lows), 0.0)), _sign(starts), squares


@triton.jit
def _project(axis_x, axis_y, xs, ys, pads):
    """Projections of all slots."""
    projections = ()
    for slot in tl.static_range(len(xs)):
        projections = projections + (tl.fma(axis_x, xs[slot], tl.fma(axis_y, ys[slot], pads[slot])),)
    return projections


@triton.jit
def _sign(values):
    return tl.where(values > 0, 1.0, 0.0) - tl.where(values < 0, 1.0, 0.0)


@triton.jit
def _rough_inverse(values):
    """1 / values, for values in 2^-100 to 2^100; exact at 1. In float32 the last two bits may be wrong."""
    if values.dtype == tl.float64:
        return 1.0 / values
    else:
        root = tl.rsqrt(values)
        return root * root


@triton.jit
def _inverse(values):
    """The same, right but for rounding: half the instructions of a division that allows for all values."""
    guess = _rough_inverse(values)
    if values.dtype == tl.float64:
        return guess
    else:
        return tl.fma(guess, tl.fma(_minus(values), guess, 1.0), guess)


@triton.jit
def _distance(ends, TINY: tl.constexpr):
    """1 - GIoU1D of two intervals, and 1 / h; both 0 where h is 0."""
    p_low, p_high, g_low, g_high = ends
    hull = tl.maximum(p_high, g_high) - tl.minimum(p_low, g_low)
    inverse = tl.where(hull > TINY, _inverse(hull), 0.0)
    return (tl.abs(p_high - g_high) + tl.abs(p_low - g_low)) * inverse, inverse


@triton.jit
def _slopes(ends, distance, scale):
    """`scale` h times the derivative of 1 - GIoU1D to the four ends of the intervals; half of it at a tie."""
    p_low, p_high, g_low, g_high = ends
    half = 0.5 * distance * scale
    top = _sign(p_high - g_high)
    bottom = _sign(p_low - g_low)
    rest = scale - half
    low, high = tl.fma(bottom, rest, half), tl.fma(top, rest, _minus(half))
    return low, high, tl.fma(_minus(bottom), rest, half), tl.fma(_minus(top), rest, _minus(half))


@triton.jit
def _share(projections, low, high, low_derivative, high_derivative):
    """Derivative of each slot's projection: that of the ends of the interval, in equal shares at a tie."""
    at_low = ()
    at_high = ()
    for slot in tl.static_range(len(projections)):
        at_low = at_low + ((projections[slot] <= low).to(low.dtype),)
        at_high = at_high + ((projections[slot] >= high).to(low.dtype),)
    low_derivative *= _rough_inverse(_sum(at_low))
    high_derivative *= _rough_inverse(_sum(at_high))
    shares = ()
    for slot in tl.static_range(len(projections)):
        shares = shares + (tl.fma(at_low[slot], low_derivative, at_high[slot] * high_derivative),)
    return shares


@triton.jit
def _tie(low, high, edge_low, edge_high):
    """Thresholds for `_share` by which both ends of the edge are at an extreme if one is."""
    return tl.where(edge_low == low, edge_high, low), tl.where(edge_high == high, edge_low, high)


@triton.jit
def _add_scaled(totals, factor, values):
    new = ()
    for slot in tl.static_range(len(totals)):
        new = new + (tl.fma(values[slot], factor, totals[slot]),)
    return new


@triton.jit
def _add(totals, values):
    new = ()
    for slot in tl.static_range(len(totals)):
        new = new + (totals[slot] + values[slot],)
    return new


@triton.jit
def _dot(left, right):
    total = left[0] * right[0]
    for slot in tl.static_range(1, len(left)):
        total = tl.fma(left[slot], right[slot], total)
    return _sum((total,))


@triton.jit
def _convexity(projections, low, high, edge_low, edge_high, count, factor, TINY: tl.constexpr, GRAD: tl.constexpr):
    """One edge's term of section 7, and its derivatives to every slot's projection and to low and high.

    The edge's two ends, at `edge_low` and `edge_high` by rounding, are on neither side.
    """
    above = ()
    below = ()
    for slot in tl.static_range(len(projections)):
        above = above + (tl.maximum(projections[slot] - edge_high, 0.0),)
        below = below + (tl.maximum(edge_low - projections[slot], 0.0),)
    sum_above = _sum(above)
    sum_below = _sum(below)
    width = high - low
    wide = width > TINY
    inverse = tl.where(wide, 1.0 / (tl.where(wide, width, 1.0) * count), 0.0) * factor
    term = tl.minimum(sum_above, sum_below) * inverse
    shares = ()
    if GRAD:
        is_above = 0.5 + 0.5 * _sign(sum_below - sum_above)  # the smaller side counts; 1/2 at a tie
        above_wins = inverse * is_above
        below_wins = inverse * (1.0 - is_above)
        for slot in tl.static_range(len(projections)):
            share = tl.where(above[slot] > 0, above_wins, 0.0) - tl.where(below[slot] > 0, below_wins, 0.0)
            shares = shares + (share,)
    width_derivative = tl.where(wide, term / tl.where(wide, width, 1.0), 0.0)
    return term, shares, width_derivative


@triton.jit
def _zeros(slots):
    zeros = ()
    for slot in tl.static_range(len(slots)):
        zeros = zeros + (tl.zeros_like(slots[slot]),)
    return zeros


@triton.jit
def _put(slots, value, here):
    new = ()
    for slot in tl.static_range(len(slots)):
        new = new + (tl.where(here[slot], value, slots[slot]),)
    return new


@triton.jit
def _hand_over(state, to_start, to_end, at_start, at_end, real, AXES: tl.constexpr):
    """Edges' derivatives to their ends. One by one, each is stored once: the end's waits for the next edge's start."""
    slots_x, slots_y, pending_x, pending_y = state
    start_x, start_y = to_start
    end_x, end_y = to_end
    if AXES == 1:
        slots_x = _put(slots_x, pending_x + start_x, at_start)
        slots_y = _put(slots_y, pending_y + start_y, at_start)
        return slots_x, slots_y, tl.where(real, end_x, pending_x), tl.where(real, end_y, pending_y)
    else:
        slots_x = _add(slots_x, _put(_put(_zeros(slots_x), start_x, at_start), end_x, at_end))
        slots_y = _add(slots_y, _put(_put(_zeros(slots_y), start_y, at_start), end_y, at_end))
        return slots_x, slots_y, pending_x, pending_y


@triton.jit
def _handed(state, slot: tl.constexpr, is_last, AXES: tl.constexpr):
    """What was handed to the vertices of a slot; nothing starts at the end of the last edge any more."""
    slots_x, slots_y, pending_x, pending_y = state
    if AXES == 1:
        return slots_x[slot] + tl.where(is_last, pending_x, 0.0), slots_y[slot] + tl.where(is_last, pending_y, 0.0)
    else:
        return slots_x[slot], slots_y[slot]


@triton.jit
def _compare(axis_x, axis_y, p_side, g_side, TINY: tl.constexpr):
    """The projections of both polygons on an axis, their intervals, and how far these are apart."""
    on_p = _project(axis_x, axis_y, p_side[0], p_side[1], p_side[2])
    on_g = _project(axis_x, axis_y, g_side[0], g_side[1], g_side[2])
    ends = (_low(on_p), _high(on_p), _low(on_g), _high(on_g))
    distance, inverse = _distance(ends, TINY)
    return on_p, on_g, ends, distance, inverse


@triton.jit
def _pred_axis(
    state, k, edges, lane, p_side, g_side, p_shape, g_shape, floor, per_unit, count,
    convexity_factor, direction, TINY: tl.constexpr, GRAD: tl.constexpr, AXIS_WEIGHT: tl.constexpr,
    AXIS_GRAD: tl.constexpr, CONVEXITY: tl.constexpr, BOUNDARY: tl.constexpr, AXES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the axes of P's edges to vertices number k."""
    total, weights, convexity, mixed, grad_x, grad_y, handed, weight_handed, mixed_handed, area_handed = state
    x, y, previous_x, previous_y, previous, real = edges
    edge_x, edge_y, length, is_axis = _edge(x, y, previous_x, previous_y, real, floor)
    axis_x, axis_y = edge_y, _minus(edge_x)
    weight, weight_slope = _axis_weight(length, is_axis, per_unit, AXIS_WEIGHT)
    on_p, on_g, ends, distance, inverse = _compare(axis_x, axis_y, p_side, g_side, TINY)
    total = tl.fma(weight, distance, total)
    weights += weight
    at_end = ()
    at_start = ()
    for slot in tl.static_range(len(grad_x)):
        index = slot * LANES + lane
        at_end = at_end + ((index == k) & real,)
        at_start = at_start + ((index == previous) & real,)
    if CONVEXITY:
        _, edge_low, edge_high = _own_interval(axis_x, axis_y, x, y, previous_x, previous_y, p_shape[3], p_shape[4])
        on_shape = _project(axis_x, axis_y, p_shape[0], p_shape[1], p_shape[2])
        low, high = _low(on_shape), _high(on_shape)
        factor = tl.where(is_axis, convexity_factor, 0.0)
        term, sides, shrink = _convexity(
            on_shape, low, high, edge_low, edge_high, count.to(floor.dtype), factor, TINY, GRAD
        )
        convexity += term
        if GRAD:
            low, high = _tie(low, high, edge_low, edge_high)
            sides_sum = _sum(sides)
            sides = _add(sides, _share(on_shape, low, high, shrink, _minus(shrink)))
    if BOUNDARY:
        reach, at_x, at_y = _reach(axis_x, axis_y, direction, g_shape)
        mixed += reach
        if GRAD:
            to_start, to_end = (at_y, _minus(at_x)), (_minus(at_y), at_x)
            mixed_handed = _hand_over(mixed_handed, to_start, to_end, at_start, at_end, real, AXES)
            to_both = axis_x, axis_y
            area_handed = _hand_over(area_handed, to_both, to_both, at_start, at_end, real, AXES)
    if GRAD:
        p_low, p_high, g_low, g_high = ends
        low_slope, high_slope, g_low_slope, g_high_slope = _slopes(ends, distance, weight * inverse)
        if not AXIS_GRAD:  # with the path through the axis any split of a tie gives the same gradient
            _, edge_low, edge_high = _own_interval(axis_x, axis_y, x, y, previous_x, previous_y, p_side[3], p_side[4])
            p_low, p_high = _tie(p_low, p_high, edge_low, edge_high)
        shares = _share(on_p, p_low, p_high, low_slope, high_slope)
        along_x = tl.zeros_like(floor)  # derivative to the edge
        along_y = tl.zeros_like(floor)
        if AXIS_GRAD:
            g_shares = _share(on_g, g_low, g_high, g_low_slope, g_high_slope)
            along_x = _minus(_dot(g_shares + shares, g_side[1] + p_side[1]))
            along_y = _dot(g_shares + shares, g_side[0] + p_side[0])
        if CONVEXITY:  # its distances are measured from the edge's start
            along_x -= tl.fma(_minus(sides_sum), previous_y - p_shape[4], _dot(sides, p_shape[1]))
            along_y += tl.fma(_minus(sides_sum), previous_x - p_shape[3], _dot(sides, p_shape[0]))
            shares = _add(shares, sides)
        grad_x = _add_scaled(grad_x, axis_x, shares)
        grad_y = _add_scaled(grad_y, axis_y, shares)
        if AXIS_WEIGHT != UNIFORM and AXIS_GRAD:
            slope = tl.where(is_axis, weight_slope / tl.where(is_axis, length, 1.0), 0.0)
            end_x, end_y = slope * edge_x, slope * edge_y
            along_x = tl.fma(distance, end_x, along_x)
            along_y = tl.fma(distance, end_y, along_y)
            to_start, to_end = (_minus(end_x), _minus(end_y)), (end_x, end_y)
            weight_handed = _hand_over(weight_handed, to_start, to_end, at_start, at_end, real, AXES)
        if AXIS_GRAD or CONVEXITY:
            start_x, start_y = _minus(along_x), _minus(along_y)
            if CONVEXITY:
                start_x = tl.fma(_minus(sides_sum), axis_x, start_x)
                start_y = tl.fma(_minus(sides_sum), axis_y, start_y)
            handed = _hand_over(handed, (start_x, start_y), (along_x, along_y), at_start, at_end, real, AXES)
    return total, weights, convexity, mixed, grad_x, grad_y, handed, weight_handed, mixed_handed, area_handed


@triton.jit
def _target_axis(
    state, edges, p_side, g_side, floor, per_unit, TINY: tl.constexpr, GRAD: tl.constexpr, AXIS_WEIGHT: tl.constexpr
):
    """Add the axes of G's edges."""
    total, weights, grad_x, grad_y = state
    x, y, previous_x, previous_y, _, real = edges
    edge_x, edge_y, length, is_axis = _edge(x, y, previous_x, previous_y, real, floor)
    axis_x, axis_y = edge_y, _minus(edge_x)
    weight = _axis_weight(length, is_axis, per_unit, AXIS_WEIGHT)[0]
    on_p, _, ends, distance, inverse = _compare(axis_x, axis_y, p_side, g_side, TINY)
    total = tl.fma(weight, distance, total)
    weights += weight
    if GRAD:
        low_slope, high_slope, _, _ = _slopes(ends, distance, weight * inverse)
        shares = _share(on_p, ends[0], ends[1], low_slope, high_slope)
        grad_x = _add_scaled(grad_x, axis_x, shares)
        grad_y = _add_scaled(grad_y, axis_y, shares)
    return total, weights, grad_x, grad_y


@triton.jit
def _boundary(mixed, p_area, g_area, g_squares, TINY: tl.constexpr, RESOLUTION: tl.constexpr):
    """The boundary term of three doubled areas, and its derivatives to the mixed one and to P's.

    With f = 2 p a^2 / (v (v^2 + a^2)) of P's, G's and the mixed area p, a and v, it is 1 - f. Areas are measured in
    the larger of v and a. Where G has no area, or the term is rounding only, it and its derivatives are 0.
    """
    is_flat = g_area <= tl.maximum(TINY, g_squares * tl.full((1, 1, 1), 1e-6, g_area.dtype))
    unit = tl.where(is_flat, 1.0, tl.maximum(mixed, g_area))
    v = mixed / unit
    a = g_area / unit
    is_point = v <= TINY
    inverse = 1.0 / tl.where(is_flat | is_point, 1.0, v * (v * v + a * a))
    per_area = tl.where(is_point, 0.0, 2.0 * a * a * inverse)
    match = per_area * (p_area / unit)
    term = 1.0 - match
    is_none = is_flat | (term <= RESOLUTION)
    mixed_slope = tl.where(is_none | is_point, 0.0, match * (3.0 * v * v + a * a) * inverse / unit)
    return tl.where(is_none, 0.0, term), mixed_slope, tl.where(is_none, 0.0, _minus(per_area) / unit)


@triton.jit
def _reach(axis_x, axis_y, direction, shape):
    """How far G reaches along an edge's outward normal, and where, the mean over ties."""
    projections = _project(direction * axis_x, direction * axis_y, shape[0], shape[1], shape[2])
    reach = _high(projections)
    at = ()
    for slot in tl.static_range(len(projections)):
        at = at + ((projections[slot] >= reach).to(reach.dtype),)
    inverse = _inverse(_sum(at))
    return reach, _dot(at, shape[0]) * inverse, _dot(at, shape[1]) * inverse


@triton.jit
def _total(ptr, count, AT_ONCE: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum of `count` numbers, always in the same order."""
    index = tl.arange(0, AT_ONCE)
    addresses = ptr + index
    sums = tl.zeros((AT_ONCE,), COMPUTE)
    for first in range(0, count, AT_ONCE):
        sums += tl.load(addresses, mask=first + index < count, other=0.0, cache_modifier=".cg")
        addresses += AT_ONCE
    return tl.sum(sums)


@triton.jit
def _saturate(values, LARGEST: tl.constexpr):
    """Overflow becomes the largest finite number; NaN stays (section 5)."""
    not_less = tl.maximum(values, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(not_less, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=[
        "pred_stride_b",
        "pred_stride_n",
        "target_stride_b",
        "target_stride_n",
        "pred_real_stride_b",
        "pred_real_stride_n",
        "target_real_stride_b",
        "target_real_stride_n",
        "weight_stride",
        "batch",
        "pred_size",
        "target_size",
    ],
    do_not_specialize_on_alignment=["pred_real_ptr", "target_real_ptr", "weight_ptr", "counter_ptr"],
)
def mgiou_kernel(
    pred_ptr,
    target_ptr,
    pred_real_ptr,  # lengths (B,) or mask (B, N) as uint8
    target_real_ptr,
    weight_ptr,  # (B,)
    loss_ptr,  # (B,), or one element if REDUCE
    grad_ptr,  # (B, N, 2), contiguous, in COMPUTE
    partial_ptr,  # (number of programs,)
    counter_ptr,  # one int32, 0 before and after
    pred_stride_b: "i64",  # strides of pred and target count vertices, not numbers
    pred_stride_n: "i32",
    target_stride_b: "i64",
    target_stride_n: "i32",
    pred_real_stride_b: "i64",
    pred_real_stride_n: "i32",
    target_real_stride_b: "i64",
    target_real_stride_n: "i32",
    weight_stride: "i64",
    batch: "i32",
    pred_size: "i32",
    target_size: "i32",
    divisor: "fp64",
    convexity_weight: "fp64",
    boundary_weight: "fp64",
    COMPUTE: tl.constexpr,
    GRAD: tl.constexpr,
    REDUCE: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    AXIS_GRAD: tl.constexpr,
    CONVEXITY: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PRED_REAL: tl.constexpr,
    TARGET_REAL: tl.constexpr,
    ADJACENT: tl.constexpr,
    EVEN: tl.constexpr,  # strides over the batch, where they are not constants
    POLYGONS: tl.constexpr,
    AXES: tl.constexpr,
    LANES: tl.constexpr,
    PRED_SLOTS: tl.constexpr,
    TARGET_SLOTS: tl.constexpr,
):
    """Per-sample loss, or its weighted sum over `divisor`, and the gradient of that to `pred`."""
    TINY: tl.constexpr = 2.0**-800 if COMPUTE == tl.float64 else 2.0**-96
    LARGEST: tl.constexpr = 1.7976931348623157e308 if COMPUTE == tl.float64 else 3.4028234663852886e38
    WEIGHT_GRAD: tl.constexpr = GRAD and AXIS_GRAD and AXIS_WEIGHT != UNIFORM
    EDGE_GRAD: tl.constexpr = GRAD and (AXIS_GRAD or CONVEXITY)
    # Where a factor of the single axis must be known before all axes are seen.
    MEASURE: tl.constexpr = CONVEXITY or BOUNDARY or AXIS_WEIGHT == LENGTH
    RESOLUTION: tl.constexpr = 2.0**-48 if COMPUTE == tl.float64 else 2.0**-20
    # Quadrangles: faster by a third. With more terms it would take longer than 5 s to compile.
    UNROLLED: tl.constexpr = (
        PRED_REAL == FULL
        and AXES * LANES == 1
        and PRED_SLOTS == 4
        and AXIS_WEIGHT != SOFT
        and not (CONVEXITY and BOUNDARY)
    )

    axis = tl.arange(0, AXES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    divide_by = tl.full((1, 1, 1), divisor, COMPUTE)
    reduced = tl.zeros((POLYGONS, AXES, 1), COMPUTE)
    for block in range(tl.program_id(0), tl.cdiv(batch, POLYGONS), tl.num_programs(0)):
        rows = block * POLYGONS + tl.arange(0, POLYGONS)[:, None, None] + axis * 0
        inside = rows < batch
        if PRED_REAL == FULL:  # the last polygon once more, instead of none
            rows = tl.minimum(rows, batch - 1)
        rows = rows.to(tl.int64)
        pred_rows = _first_vertex(rows, PRED_SLOTS * LANES if PRED_REAL == FULL else pred_stride_b, EVEN)
        target_rows = _first_vertex(rows, TARGET_SLOTS * LANES if TARGET_REAL == FULL else target_stride_b, EVEN)
        grad_rows = _first_vertex(rows, PRED_SLOTS * LANES if PRED_REAL == FULL else pred_size, EVEN)
        pred = (
            pred_ptr,
            pred_rows,
            1 if ADJACENT else pred_stride_n,
            pred_size,
            pred_real_ptr,
            rows * pred_real_stride_b,
            pred_real_stride_n,
        )
        target = (
            target_ptr,
            target_rows,
            1 if ADJACENT else target_stride_n,
            target_size,
            target_real_ptr,
            rows * target_real_stride_b,
            target_real_stride_n,
        )
        raw_px, raw_py, p_real, p_places, p_count, p_last = _load_polygons(
            pred, inside, lane, PRED_SLOTS, LANES, PRED_REAL, COMPUTE
        )
        raw_gx, raw_gy, g_real, g_places, g_count, g_last = _load_polygons(
            target, inside, lane, TARGET_SLOTS, LANES, TARGET_REAL, COMPUTE
        )
        present = (p_count > 0) & (g_count > 0)

        # Section 6: one power of two for the sample, and the joint lower corner at the origin.
        p_low_x, p_high_x = _bounds(raw_px, p_real)
        p_low_y, p_high_y = _bounds(raw_py, p_real)
        g_low_x, g_high_x = _bounds(raw_gx, g_real)
        g_low_y, g_high_y = _bounds(raw_gy, g_real)
        low_x, high_x = tl.minimum(p_low_x, g_low_x), tl.maximum(p_high_x, g_high_x)
        low_y, high_y = tl.minimum(p_low_y, g_low_y), tl.maximum(p_high_y, g_high_y)
        largest_x = tl.maximum(tl.abs(low_x), tl.abs(high_x))
        largest_y = tl.maximum(tl.abs(low_y), tl.abs(high_y))
        poison = _poison(raw_px, raw_py) + _poison(raw_gx, raw_gy)
        scale = _inverse_power_of_two(tl.maximum(largest_x, largest_y), COMPUTE) + poison
        low_x *= scale
        low_y *= scale
        extent = tl.maximum(high_x * scale - low_x, high_y * scale - low_y)
        p_side = _normalise(raw_px, raw_py, p_real, low_x, low_y, scale)
        g_side = _normalise(raw_gx, raw_gy, g_real, low_x, low_y, scale)
        p_shape = p_side
        g_shape = g_side
        if CONVEXITY or BOUNDARY:  # relative to one of its own vertices: the common origin may be far away
            corner = _vertex(pred, _vertices(pred, p_last), p_count > 0, scale)
            p_shape = _normalise(raw_px, raw_py, p_real, corner[0], corner[1], scale)
        if BOUNDARY:
            corner = _vertex(target, _vertices(target, g_last), g_count > 0, scale)
            g_shape = _normalise(raw_gx, raw_gy, g_real, corner[0], corner[1], scale)

        # Section 3: what counts as an axis, and 1 / the unit of its length.
        floor = tl.full((POLYGONS, AXES, 1), TINY, COMPUTE)
        p_per_unit = floor
        g_per_unit = floor
        if AXIS_WEIGHT == UNIFORM:
            shortest = extent * tl.full((1, 1, 1), 1e-6, COMPUTE)
            floor = tl.maximum(floor, shortest * shortest)
        if AXIS_WEIGHT == SOFT:
            p_per_unit = 1.0 / (tl.maximum(extent, floor) * tl.full((1, 1, 1), 0.01, COMPUTE))
            g_per_unit = p_per_unit
        convexity_factor = tl.zeros_like(floor)
        if MEASURE:
            p_measured = _measure(
                pred, raw_px, raw_py, p_places, p_count, p_last, inside, axis, scale, p_shape[3], p_shape[4],
                floor, p_per_unit, AXIS_WEIGHT, PRED_REAL, UNROLLED, AXES,
            )  # fmt: skip
            g_measured = _measure(
                target, raw_gx, raw_gy, g_places, g_count, g_last, inside, axis, scale, g_shape[3], g_shape[4],
                floor, g_per_unit, AXIS_WEIGHT, TARGET_REAL, UNROLLED, AXES,
            )  # fmt: skip
            p_length, p_axes, p_weight = p_measured[:3]
            g_length, _, g_weight = g_measured[:3]
            if AXIS_WEIGHT == LENGTH:
                p_per_unit = 1.0 / tl.where(p_length > 0, p_length, 1.0)
                g_per_unit = 1.0 / tl.where(g_length > 0, g_length, 1.0)
                p_weight = tl.where(p_length > 0, 1.0, 0.0)
                g_weight = tl.where(g_length > 0, 1.0, 0.0)
            # All sums below are divided by twice the weights at the end; the convexity term must not be.
            convexity_factor = 2.0 * (p_weight + g_weight) / tl.maximum(p_axes, 1.0)
            convexity_factor *= tl.full((1, 1, 1), convexity_weight, COMPUTE)
        direction = tl.zeros_like(floor)
        if BOUNDARY:
            p_area, direction, _ = _doubled_area(p_measured)
            g_area, _, g_squares = _doubled_area(g_measured)

        none = tl.zeros_like(floor)
        zeros = _zeros(p_side[0])

        # The axes of P.
        handed = (zeros, zeros, none, none)
        state = (none, none, none, none, zeros, zeros, handed, handed, handed, handed)
        if UNROLLED:
            for k in tl.static_range(PRED_SLOTS):
                edges = _kept_edges(raw_px, raw_py, k, inside, scale)
                state = _pred_axis(
                    state, k, edges, lane, p_side, g_side, p_shape, g_shape, floor, p_per_unit, p_count,
                    convexity_factor, direction, TINY, GRAD, AXIS_WEIGHT, AXIS_GRAD, CONVEXITY, BOUNDARY, AXES, LANES,
                )  # fmt: skip
        else:
            start = _start(pred, p_last, p_count, axis, scale, PRED_REAL)
            for first in range(0, pred_size, AXES):
                k = first + axis
                edges, start = _edges(start, pred, p_places, k, p_count, p_last, inside, scale, AXES, PRED_REAL)
                state = _pred_axis(
                    state, k, edges, lane, p_side, g_side, p_shape, g_shape, floor, p_per_unit, p_count,
                    convexity_factor, direction, TINY, GRAD, AXIS_WEIGHT, AXIS_GRAD, CONVEXITY, BOUNDARY, AXES, LANES,
                )  # fmt: skip
        p_sum, p_weights, convexity, mixed, grad_x, grad_y, handed, weight_handed, mixed_handed, area_handed = state

        # The axes of G.
        state = (none, none, grad_x, grad_y)
        if UNROLLED:
            for k in tl.static_range(TARGET_SLOTS):
                edges = _kept_edges(raw_gx, raw_gy, k, inside, scale)
                state = _target_axis(state, edges, p_side, g_side, floor, g_per_unit, TINY, GRAD, AXIS_WEIGHT)
        else:
            start = _start(target, g_last, g_count, axis, scale, TARGET_REAL)
            for first in range(0, target_size, AXES):
                k = first + axis
                edges, start = _edges(start, target, g_places, k, g_count, g_last, inside, scale, AXES, TARGET_REAL)
                state = _target_axis(state, edges, p_side, g_side, floor, g_per_unit, TINY, GRAD, AXIS_WEIGHT)
        g_sum, g_weights, grad_x, grad_y = state
        p_sum, p_weights, convexity = _over_axes(p_sum), _over_axes(p_weights), _over_axes(convexity)
        g_sum, g_weights, mixed = _over_axes(g_sum), _over_axes(g_weights), _over_axes(mixed)

        weights = p_weights + g_weights
        weights = tl.where(weights > 0, weights, 1.0)
        loss = 0.5 * (p_sum + g_sum + convexity) / weights + poison
        if BOUNDARY:
            boundary, mixed_slope, area_slope = _boundary(mixed, p_area, g_area, g_squares, TINY, RESOLUTION)
            boundary_factor = tl.full((1, 1, 1), boundary_weight, COMPUTE)
            loss += boundary_factor * boundary
            boundary_factor *= direction * 2.0 * weights  # the others are divided by the weights below
            mixed_slope *= boundary_factor
            area_slope *= boundary_factor
        loss = tl.where(present, loss, 0.0)
        factor = 0.5 / (weights * divide_by)
        if weight_ptr is not None:
            sample_weight = tl.load(weight_ptr + rows * weight_stride, mask=inside, other=0).to(COMPUTE)
            loss *= sample_weight
            factor *= sample_weight
        if REDUCE:
            reduced += tl.where(inside & (axis == 0), loss, 0.0)
        else:
            tl.store(loss_ptr + rows, loss, mask=inside & (axis == 0))
        if GRAD:
            if WEIGHT_GRAD:
                mean = p_sum if AXIS_WEIGHT == LENGTH else (p_sum + g_sum) / weights
            for slot in tl.static_range(PRED_SLOTS):
                index = slot * LANES + lane
                x = grad_x[slot]
                y = grad_y[slot]
                if EDGE_GRAD:
                    edge_grad_x, edge_grad_y = _handed(handed, slot, index == p_last, AXES)
                    x += edge_grad_x
                    y += edge_grad_y
                if BOUNDARY:
                    mixed_x, mixed_y = _handed(mixed_handed, slot, index == p_last, AXES)
                    area_x, area_y = _handed(area_handed, slot, index == p_last, AXES)
                    x = tl.fma(mixed_slope, mixed_x, tl.fma(area_slope, area_x, x))
                    y = tl.fma(mixed_slope, mixed_y, tl.fma(area_slope, area_y, y))
                if WEIGHT_GRAD:
                    weight_grad_x, weight_grad_y = _handed(weight_handed, slot, index == p_last, AXES)
                    x = tl.fma(_minus(mean), weight_grad_x, x)
                    y = tl.fma(_minus(mean), weight_grad_y, y)
                x = _over_axes(x)
                y = _over_axes(y)
                kept = p_real[slot] & present
                x = tl.where(kept, _saturate(x * factor * scale, LARGEST), 0.0)
                y = tl.where(kept, _saturate(y * factor * scale, LARGEST), 0.0)
                stored = inside & (axis == 0)
                if PRED_REAL != FULL:
                    stored = stored & (index < pred_size)
                _store_vertices(grad_ptr, grad_rows + index, x, y, stored, COMPUTE)

    if REDUCE:
        # The program that comes last adds all partial sums, always in the same order.
        programs = tl.num_programs(0)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(reduced))
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
            if programs <= FEW:  # less to issue for one warp
                result = _total(partial_ptr, programs, FEW, COMPUTE)
            else:
                result = _total(partial_ptr, programs, MANY, COMPUTE)
            tl.store(loss_ptr, result / tl.full((), divisor, COMPUTE))
            tl.store(counter_ptr, 0)
