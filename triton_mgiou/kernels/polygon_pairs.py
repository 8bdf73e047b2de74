"""The matrix of all pairs of two sets of polygons, the value alone (section 11).

A program takes a tile of ROWS polygons of one set and COLUMNS of the other, and goes through their edges and vertices,
whose numbers are no constants of the code. Each polygon has its own scale and its lower corner for an origin, so what
it has by itself is computed once for its row or column, (ROWS, 1) or (1, COLUMNS); a pair adds powers of two and the
distance of the two corners. Behind its last real vertex a polygon repeats it, which changes nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, inverse_power_of_two, minus
from triton_mgiou.kernels.axis import LENGTH, SHORTEST, SOFT, SOFT_UNIT, UNIFORM, axis_weight
from triton_mgiou.kernels.box_types import NO_LENGTH_32, NO_LENGTH_64, TIE_32, TIE_64, TINY_32, TINY_64
from triton_mgiou.kernels.pair_axes import DEPTH, MEAN, NOT_THERE, rounding_of
from triton_mgiou.kernels.pair_boxes import is_there


class PolygonVariant(NamedTuple):
    """What is decided at compile time."""

    TINY: float
    NO_LENGTH: float  # the longest length that counts as 0
    TIE: float
    OVER: int
    AXIS_WEIGHT: int
    CORNERS: int  # vertices of every polygon of both sets, all of them real, or 0


class Polygons(NamedTuple):
    """A row or column of polygons."""

    ptr: tl.tensor  # of each polygon's first vertex
    stride_n: tl.tensor
    stride_c: tl.tensor
    size: tl.tensor  # vertices in memory
    last: tl.tensor  # index of the last real vertex
    scale: tl.tensor  # the power of two that brings the polygon near 1
    low_x: tl.tensor  # of the scaled polygon
    low_y: tl.tensor
    width: tl.tensor
    height: tl.tensor
    per_unit: tl.tensor  # 1 / the perimeter of the scaled polygon
    poison: tl.tensor  # NaN where a real vertex is NaN or Inf, else 0
    # Of CORNERS, which stay in registers: vertices, from the lower corner, and edges.
    xs: tuple[tl.tensor, ...]
    ys: tuple[tl.tensor, ...]
    edges_x: tuple[tl.tensor, ...]
    edges_y: tuple[tl.tensor, ...]


class Sums(NamedTuple):
    """What the axes of one side add up to."""

    distance: tl.tensor
    weight: tl.tensor
    largest: tl.tensor  # of the axes that count: 1 - GIoU1D, or the distance of the middles over the half-lengths
    is_axis: tl.tensor  # 1 if there is one, else 0
    is_flat: tl.tensor  # 1 if on one the pair is a point, else 0
    widest: tl.tensor  # the largest joint length, of axes as long as their edges


@triton.jit
def _vertex(polygons, index, COMPUTE: tl.constexpr):
    """A vertex, scaled, not moved: an edge is then rounded once."""
    addresses = polygons.ptr + tl.minimum(index, polygons.last) * polygons.stride_n
    x = tl.load(addresses).to(COMPUTE) * polygons.scale
    return x, tl.load(addresses + polygons.stride_c).to(COMPUTE) * polygons.scale


@triton.jit
def _edge(polygons, index, COMPUTE: tl.constexpr):
    """From a vertex to the next; behind the last one nothing."""
    x, y = _vertex(polygons, index, COMPUTE)
    next_x, next_y = _vertex(polygons, tl.where(index == polygons.last, 0, index + 1), COMPUTE)
    return next_x - x, next_y - y


@triton.jit
def _polygons(ptr, stride_n, stride_c, size, count, V: tl.constexpr, COMPUTE: tl.constexpr):
    last = tl.minimum(tl.maximum(count, 1), size) - 1
    none = tl.zeros(last.shape, COMPUTE)
    one = none + 1.0
    raw = Polygons(ptr, stride_n, stride_c, size, last, one, none, none, none, none, none, none, (), (), (), ())
    low_x, low_y = _vertex(raw, last * 0, COMPUTE)
    high_x, high_y = low_x, low_y
    poison = none
    for index in range(size):
        x, y = _vertex(raw, last * 0 + index, COMPUTE)
        low_x, high_x = tl.minimum(low_x, x), tl.maximum(high_x, x)
        low_y, high_y = tl.minimum(low_y, y), tl.maximum(high_y, y)
        poison = tl.fma(x, 0.0, tl.fma(y, 0.0, poison))
    largest_x, largest_y = tl.maximum(tl.abs(low_x), tl.abs(high_x)), tl.maximum(tl.abs(low_y), tl.abs(high_y))
    scale = inverse_power_of_two(tl.maximum(largest_x, largest_y))
    low_x, low_y, high_x, high_y = low_x * scale, low_y * scale, high_x * scale, high_y * scale
    raw = Polygons(ptr, stride_n, stride_c, size, last, scale, low_x, low_y, none, none, none, none, (), (), (), ())
    per_unit = none
    if V.AXIS_WEIGHT == LENGTH:
        perimeter = none
        for index in range(size):
            x, y = _edge(raw, last * 0 + index, COMPUTE)
            perimeter += tl.sqrt(tl.fma(x, x, y * y))
        per_unit = 1.0 / tl.where(perimeter > 0, perimeter, 1.0)
    xs = ()
    ys = ()
    edges_x = ()
    edges_y = ()
    for index in tl.static_range(V.CORNERS):
        x, y = _vertex(raw, last * 0 + index, COMPUTE)
        edge_x, edge_y = _edge(raw, last * 0 + index, COMPUTE)
        xs = xs + (x - low_x,)
        ys = ys + (y - low_y,)
        edges_x = edges_x + (edge_x,)
        edges_y = edges_y + (edge_y,)
    return Polygons(
        ptr, stride_n, stride_c, size, last, scale, low_x, low_y, high_x - low_x, high_y - low_y, per_unit, poison,
        xs, ys, edges_x, edges_y,
    )  # fmt: skip


@triton.jit
def _interval(polygons, axis_x, axis_y, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The least and the largest projection of polygons, from their own corners."""
    if V.CORNERS > 0:
        low = tl.fma(axis_x, polygons.xs[0], axis_y * polygons.ys[0])
        high = low
        for index in tl.static_range(1, V.CORNERS):
            projection = tl.fma(axis_x, polygons.xs[index], axis_y * polygons.ys[index])
            low, high = tl.minimum(low, projection), tl.maximum(high, projection)
    else:
        first = polygons.last * 0
        x, y = _vertex(polygons, first, COMPUTE)
        low = tl.fma(axis_x, x - polygons.low_x, axis_y * (y - polygons.low_y))
        high = low
        for index in range(1, polygons.size):
            x, y = _vertex(polygons, first + index, COMPUTE)
            projection = tl.fma(axis_x, x - polygons.low_x, axis_y * (y - polygons.low_y))
            low, high = tl.minimum(low, projection), tl.maximum(high, projection)
    return low, high


@triton.jit
def _compare(low, high, other_low, other_high, limit, V: tl.constexpr):
    """1 - GIoU1D, or the distance of the middles over the half-lengths, and the joint length."""
    hull = tl.maximum(high, other_high) - tl.minimum(low, other_low)
    top, bottom = high - other_high, low - other_low
    if V.OVER == DEPTH:
        halves = (high - low) + (other_high - other_low)
        distance = tl.abs(top + bottom) / tl.maximum(halves, 2.0 * limit)
    else:
        distance = (tl.abs(top) + tl.abs(bottom)) * tl.where(hull > V.TINY, inverse(tl.maximum(hull, V.TINY)), 0.0)
    return distance, hull


@triton.jit
def _add_axis(
    sums, x, y, own, other, to_own, to_other, shift_x, shift_y, shortest, per_unit, limit,
    V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`sums` with the normal of one more edge of `own`."""
    axis_x, axis_y = y, minus(x)
    own_length = tl.sqrt(tl.fma(x, x, y * y))
    low, high = _interval(own, axis_x, axis_y, V, COMPUTE)
    other_low, other_high = _interval(other, axis_x, axis_y, V, COMPUTE)
    shift = axis_x * shift_x + axis_y * shift_y
    own_limit = tl.maximum(limit * own_length, V.TINY)
    distance, hull = _compare(
        low * to_own, high * to_own, other_low * to_other + shift, other_high * to_other + shift, own_limit, V
    )
    length = own_length * to_own
    is_axis = length > shortest
    if V.AXIS_WEIGHT == LENGTH:
        weight = tl.where(is_axis, own_length * own.per_unit, 0.0)
    else:
        weight = axis_weight(tl.where(is_axis, length, 0.0), is_axis, per_unit, V.AXIS_WEIGHT).value
    return Sums(
        tl.fma(weight, distance, sums.distance),
        sums.weight + weight,
        tl.where(weight > 0, tl.maximum(sums.largest, distance), sums.largest),
        tl.where(is_axis, 1.0, sums.is_axis),
        tl.where(is_axis & (hull <= own_limit), 1.0, sums.is_flat),
        tl.maximum(sums.widest, hull * to_own),
    )


@triton.jit
def _axes(own, other, to_own, to_other, shift_x, shift_y, extent, limit, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The axes of `own`. `to_own` and `to_other` scale them for their pairs; the shift is from own to other corner."""
    none = tl.zeros_like(extent)
    shortest = tl.full(extent.shape, V.NO_LENGTH, COMPUTE)
    per_unit = none
    if V.AXIS_WEIGHT == UNIFORM:
        shortest = tl.maximum(shortest, limit)
    if V.AXIS_WEIGHT == SOFT:
        per_unit = 1.0 / (tl.maximum(extent, V.TINY) * tl.full(extent.shape, SOFT_UNIT, COMPUTE))
    sums = Sums(none, none, none, none, none, none)
    if V.CORNERS > 0:
        for index in tl.static_range(V.CORNERS):
            x, y = own.edges_x[index], own.edges_y[index]
            sums = _add_axis(
                sums, x, y, own, other, to_own, to_other, shift_x, shift_y, shortest, per_unit, limit, V, COMPUTE
            )
    else:
        for index in range(own.size):
            x, y = _edge(own, own.last * 0 + index, COMPUTE)
            sums = _add_axis(
                sums, x, y, own, other, to_own, to_other, shift_x, shift_y, shortest, per_unit, limit, V, COMPUTE
            )
    return sums


@triton.jit
def _values(p, g, V: tl.constexpr, COMPUTE: tl.constexpr):
    scale = tl.minimum(p.scale, g.scale)
    to_p, to_g = scale * (1.0 / p.scale), scale * (1.0 / g.scale)
    shift_x, shift_y = g.low_x * to_g - p.low_x * to_p, g.low_y * to_g - p.low_y * to_p
    p_width, p_height, g_width, g_height = p.width * to_p, p.height * to_p, g.width * to_g, g.height * to_g
    # From the joint lower corner, so that swapping the two changes no bit.
    p_left, g_left = tl.maximum(minus(shift_x), 0.0), tl.maximum(shift_x, 0.0)
    p_low, g_low = tl.maximum(minus(shift_y), 0.0), tl.maximum(shift_y, 0.0)
    p_right, g_right, p_high, g_high = p_left + p_width, g_left + g_width, p_low + p_height, g_low + g_height
    extent = tl.maximum(tl.maximum(p_right, g_right), tl.maximum(p_high, g_high))
    limit = tl.maximum(extent * tl.full(extent.shape, SHORTEST, COMPUTE), V.NO_LENGTH)
    on_p = _axes(p, g, to_p, to_g, shift_x, shift_y, extent, limit, V, COMPUTE)
    on_g = _axes(g, p, to_g, to_p, minus(shift_x), minus(shift_y), extent, limit, V, COMPUTE)

    # Where these see only a line or nothing, x and y, as far as there is something along them.
    distance_x, hull_x = _compare(p_left, p_right, g_left, g_right, limit, V)
    distance_y, hull_y = _compare(p_low, p_high, g_low, g_high, limit, V)
    rounding = rounding_of(extent, V)
    point = tl.maximum(limit, rounding)
    weight_x, weight_y = (hull_x > point).to(COMPUTE), (hull_y > point).to(COMPUTE)
    is_line = tl.maximum(on_p.widest, on_g.widest) <= rounding * extent  # section 5
    if V.AXIS_WEIGHT != UNIFORM:
        is_line &= tl.maximum(tl.maximum(p_width, p_height), tl.maximum(g_width, g_height)) > rounding
    other = is_line | (on_p.is_flat + on_g.is_flat > 0) | (on_p.is_axis + on_g.is_axis == 0)
    if V.OVER == MEAN:
        distance = tl.where(other, weight_x * distance_x + weight_y * distance_y, on_p.distance + on_g.distance)
        weight = tl.where(other, weight_x + weight_y, on_p.weight + on_g.weight)
        distance = distance / tl.where(weight > 0, weight, 1.0)
    else:
        along = tl.maximum(weight_x * distance_x, weight_y * distance_y)
        distance = tl.where(other, along, tl.maximum(on_p.largest, on_g.largest))
    value = 1.0 - distance
    if V.OVER != DEPTH:
        value = tl.maximum(value, -1.0)  # which quotients may round past
    return value + (p.poison + g.poison)


@triton.jit
def _counts(lengths_ptr, index, stride_n, size):
    if lengths_ptr is None:
        return index * 0 + size
    else:
        length = tl.load(lengths_ptr + index.to(tl.int64) * stride_n)
        return tl.where(length < size, tl.where(length > 0, length, 0), size).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "stride1_b", "stride1_p", "stride1_n", "stride1_c", "stride2_b", "stride2_p", "stride2_n", "stride2_c",
        "lengths1_stride_b", "lengths1_stride_n", "lengths2_stride_b", "lengths2_stride_n",
        "mask1_stride_b", "mask1_stride_n", "mask2_stride_b", "mask2_stride_n", "size1", "size2", "rows", "columns",
    ],
    do_not_specialize_on_alignment=[
        "polygons1_ptr", "polygons2_ptr", "lengths1_ptr", "lengths2_ptr", "mask1_ptr", "mask2_ptr"
    ],
)  # fmt: skip
def polygon_pairs_kernel(
    polygons1_ptr,
    polygons2_ptr,
    lengths1_ptr,  # (B, P)
    lengths2_ptr,  # (B, T)
    mask1_ptr,  # (B, P), uint8
    mask2_ptr,  # (B, T)
    matrix_ptr,  # (B, P, T), contiguous, in COMPUTE
    stride1_b: "i64",
    stride1_p: "i64",
    stride1_n: "i64",
    stride1_c: "i64",
    stride2_b: "i64",
    stride2_p: "i64",
    stride2_n: "i64",
    stride2_c: "i64",
    lengths1_stride_b: "i64",
    lengths1_stride_n: "i64",
    lengths2_stride_b: "i64",
    lengths2_stride_n: "i64",
    mask1_stride_b: "i64",
    mask1_stride_n: "i64",
    mask2_stride_b: "i64",
    mask2_stride_n: "i64",
    size1: "i32",  # N
    size2: "i32",  # M
    rows: "i32",  # P
    columns: "i32",  # T
    COMPUTE: tl.constexpr,
    OVER: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    CORNERS: tl.constexpr,  # 4 if all polygons of both sets have four real vertices, else 0
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The matrix of the values of all pairs. Programs: (rows of tiles, some tiles of each, batch)."""
    V: tl.constexpr = PolygonVariant(
        TINY=TINY_64 if COMPUTE == tl.float64 else TINY_32,
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        TIE=TIE_64 if COMPUTE == tl.float64 else TIE_32,
        OVER=OVER,
        AXIS_WEIGHT=AXIS_WEIGHT,
        CORNERS=CORNERS,
    )
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p_index = tl.minimum(row, rows - 1)  # the last polygon once more, instead of none
    if lengths1_ptr is not None:
        lengths1_ptr += batch * lengths1_stride_b
    p_count = _counts(lengths1_ptr, p_index, lengths1_stride_n, size1)
    p_ptr = polygons1_ptr + batch * stride1_b + p_index.to(tl.int64) * stride1_p
    p = _polygons(p_ptr, stride1_n, stride1_c, size1, p_count, V, COMPUTE)
    p_there = p_count > 0
    if mask1_ptr is not None:
        p_there &= is_there(mask1_ptr + batch * mask1_stride_b, p_index, mask1_stride_n)
    if lengths2_ptr is not None:
        lengths2_ptr += batch * lengths2_stride_b
    for tile in range(tl.program_id(1), tl.cdiv(columns, COLUMNS), tl.num_programs(1)):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        g_index = tl.minimum(column, columns - 1)
        g_count = _counts(lengths2_ptr, g_index, lengths2_stride_n, size2)
        g_ptr = polygons2_ptr + batch * stride2_b + g_index.to(tl.int64) * stride2_p
        g = _polygons(g_ptr, stride2_n, stride2_c, size2, g_count, V, COMPUTE)
        g_there = g_count > 0
        if mask2_ptr is not None:
            g_there &= is_there(mask2_ptr + batch * mask2_stride_b, g_index, mask2_stride_n)
        values = tl.where(p_there & g_there, _values(p, g, V, COMPUTE), NOT_THERE)
        tl.store(matrix_ptr + (batch * rows + row) * columns + column, values, mask=(row < rows) & (column < columns))
