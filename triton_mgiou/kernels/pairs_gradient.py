"""The gradient of the matrix of all pairs of boxes to one of the two sets.

A program takes ROWS of its boxes along all boxes of the other set, and adds in a fixed order. With the distances of
`pair_axes`:

    d D / d s =  u sign(s) [|s| > |a - b|]                               u = (1 - D) / (a + b + m); [.] is 1/2 at a tie
    d D / d a =  u sign(a - b) [|a - b| > |s|] - D / (a + b + m)
    d D / d b = -u sign(a - b) [|a - b| > |s|] - D / (a + b + m)

What belongs to P's own directions is added along these, and turned to x and y at the end.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, reciprocal, saturate, sign
from triton_mgiou.kernels.axis import LENGTH, UNIFORM
from triton_mgiou.kernels.box_axes import above_zero
from triton_mgiou.kernels.box_types import CXCYCZLWHR, CXCYWHR, NO_LENGTH_32, NO_LENGTH_64, TIE_32, TIE_64, XYXY
from triton_mgiou.kernels.pair_axes import (
    DEPTH,
    MEAN,
    distance_on,
    largest_distance,
    one_over_hull,
    rule_of,
    scaled_pair,
    sums_over_axes,
    total_weight,
)
from triton_mgiou.kernels.pair_boxes import (
    HAS_ANGLE,
    IS_IN_SPACE,
    NUMBERS,
    PairVariant,
    boxes_of,
    direction_of,
    is_there,
    load_boxes,
    poison_of,
    sizes_of,
)


class Slopes(NamedTuple):
    """Derivatives of the value by what an axis measures."""

    offset: tl.tensor
    first: tl.tensor  # by the half-length of P
    second: tl.tensor


@triton.jit
def _no_slopes(pair):
    none = tl.zeros_like(pair.p1.hull)
    return Slopes(none, none, none)


@triton.jit
def _slopes(axis, factor, V: tl.constexpr):
    """`factor` times the derivatives of D by what an axis measures; as in `box_axes`.

    At a tie of |offset| and |difference| both have half.
    """
    per_hull = one_over_hull(axis, False, V)
    by_offset, by_size = tl.abs(axis.offset), tl.abs(axis.difference)
    shrink = factor * per_hull
    grow = tl.where(axis.larger > 0, shrink * (1.0 - axis.larger * per_hull), 0.0)
    to_offset = tl.where(by_offset > by_size, grow, tl.where(by_offset == by_size, 0.5 * grow, 0.0))
    to_size = (grow - to_offset) * sign(axis.difference)
    shrink = shrink * (axis.larger * per_hull)
    return Slopes(to_offset * sign(axis.offset), to_size - shrink, minus(to_size) - shrink)


@triton.jit
def _depth_slopes(axis, factor, limit):
    """The same of `apart`."""
    per_half = reciprocal(tl.maximum(axis.halves, limit))
    to_offset = factor * per_half
    to_halves = tl.where(axis.halves > limit, minus(tl.abs(axis.offset) * per_half) * to_offset, 0.0)
    return Slopes(to_offset * sign(axis.offset), to_halves, to_halves)


@triton.jit
def _share(axis, weight, limit, largest, V: tl.constexpr):
    """1 where an axis that counts has the largest distance."""
    return ((weight > 0) & (distance_on(axis, weight, limit, False, V) == largest)).to(largest.dtype)


@triton.jit
def _times(upstream, factor):
    """Their product; NaN for Inf from above, which must not become a finite gradient where that saturates."""
    return tl.fma(upstream, factor, upstream * 0.0)


@triton.jit
def _slopes_over_axes(pair, rule, upstream, V: tl.constexpr):
    """`upstream` times the derivatives of the value by the intervals on all axes, and by the edges of P's weights."""
    none = tl.zeros_like(pair.p1.hull)
    f1, f2, f3, f4, f5 = rule.p1, rule.p2, rule.g1, rule.g2, rule.pz + rule.gz
    to_edge_1, to_edge_2 = none, none
    if V.OVER == MEAN:
        p, g = sums_over_axes(pair, rule, False, V)
        each = _times(upstream, -2.0 * reciprocal(total_weight(rule)))
        f1, f2, f3, f4, f5 = f1 * each, f2 * each, f3 * each, f4 * each, f5 * each
        if V.AXIS_WEIGHT != UNIFORM:
            mean = p if V.AXIS_WEIGHT == LENGTH else (p + g) * reciprocal(total_weight(rule))
            to_edge_1 = rule.slope_1 * each * (pair.p1.larger * one_over_hull(pair.p1, False, V) - mean)
            to_edge_2 = rule.slope_2 * each * (pair.p2.larger * one_over_hull(pair.p2, False, V) - mean)
    else:
        largest = largest_distance(pair, rule, False, V)
        f1, f2 = _share(pair.p1, f1, rule.limit, largest, V), _share(pair.p2, f2, rule.limit, largest, V)
        f3, f4 = _share(pair.g1, f3, rule.limit, largest, V), _share(pair.g2, f4, rule.limit, largest, V)
        count = (f1 + f2) + (f3 + f4)
        if V.IN_SPACE:  # upwards there is an axis of each
            shares = _share(pair.z, f5, rule.limit, largest, V)
            f5 = shares * ((rule.pz > 0).to(none.dtype) + (rule.gz > 0).to(none.dtype))
            count += f5
        each = _times(upstream, (-1.0 if V.OVER == DEPTH else -2.0) * reciprocal(tl.maximum(count, 1.0)))
        f1, f2, f3, f4, f5 = f1 * each, f2 * each, f3 * each, f4 * each, f5 * each
    on_z = _no_slopes(pair)
    if V.OVER == DEPTH:
        limit = rule.limit
        p1, p2 = _depth_slopes(pair.p1, f1, limit), _depth_slopes(pair.p2, f2, limit)
        g1, g2 = _depth_slopes(pair.g1, f3, limit), _depth_slopes(pair.g2, f4, limit)
        if V.IN_SPACE:
            on_z = _depth_slopes(pair.z, f5, limit)
    else:
        p1, p2 = _slopes(pair.p1, f1, V), _slopes(pair.p2, f2, V)
        g1, g2 = _slopes(pair.g1, f3, V), _slopes(pair.g2, f4, V)
        if V.IN_SPACE:
            on_z = _slopes(pair.z, f5, V)
    return p1, p2, g1, g2, on_z, to_edge_1, to_edge_2


@triton.jit
def _to_boxes(pair, slopes, V: tl.constexpr):
    """The same by P: along its own directions, along x, y, z, by half-sizes, and by its angle."""
    p1, p2, g1, g2, on_z, to_edge_1, to_edge_2 = slopes
    none = tl.zeros_like(to_edge_1)
    if V.TURNS:
        p, g, cos, sin = pair.p, pair.g, pair.cos, pair.sin
        x = tl.fma(g.cos, g1.offset, minus(g.sin) * g2.offset)
        y = tl.fma(g.sin, g1.offset, g.cos * g2.offset)
        a = tl.fma(cos, g1.first, tl.fma(sin, g2.first, p1.first))
        b = tl.fma(sin, g1.first, tl.fma(cos, g2.first, p2.first))
        # The cosine falls and the sine grows with the difference of the angles.
        turn = p1.second * tl.fma(g.b, cos, minus(g.a) * sin)
        turn = tl.fma(p2.second, tl.fma(g.a, cos, minus(g.b) * sin), turn)
        turn = tl.fma(g1.first, tl.fma(p.b, cos, minus(p.a) * sin), turn)
        turn = tl.fma(g2.first, tl.fma(p.a, cos, minus(p.b) * sin), turn)
        turn = turn * tl.fma(above_zero(pair.turn * cos), 2.0, -1.0)  # 0 at a quarter turn, where |cos| has its kink
        turn = tl.fma(p1.offset, pair.p2.offset, tl.fma(minus(p2.offset), pair.p1.offset, turn))
        along, across = p1.offset, p2.offset
    else:
        x, y = p1.offset + g1.offset, p2.offset + g2.offset
        a, b = p1.first + g1.first, p2.first + g2.first
        turn, along, across = none, none, none
    if V.AXIS_WEIGHT != UNIFORM:  # an axis in the plane is the normal of the edge across it, which is two halves long
        b = tl.fma(2.0, to_edge_1, b)
        a = tl.fma(2.0, to_edge_2, a)
    return along, across, x, y, on_z.offset, a, b, on_z.first, turn


@triton.jit
def _clean(numbers, is_clean):
    new = ()
    for number in tl.static_range(len(numbers)):
        new = new + (tl.where(is_clean, numbers[number], 0.0),)
    return new


@triton.jit
def _finite_and_there(numbers, there):
    is_finite = poison_of(numbers) == 0
    return is_finite, is_finite & there


@triton.jit
def _added(sums, derivatives, scale, largest):
    """`sums` with one more tile. A pair's gradient saturates such that their sum cannot overflow; NaN stays."""
    new = ()
    for number in tl.static_range(9):
        derivative = derivatives[number]
        if number < 8:  # not of the angle
            derivative = derivative * scale
        derivative = tl.maximum(derivative, minus(largest), propagate_nan=tl.PropagateNan.ALL)
        derivative = tl.minimum(derivative, largest, propagate_nan=tl.PropagateNan.ALL)
        new = new + (sums[number] + derivative,)
    return new


@triton.jit(
    do_not_specialize=[
        "own_stride_b", "own_stride_n", "own_stride_c", "other_stride_b", "other_stride_n", "other_stride_c",
        "own_mask_stride_b", "own_mask_stride_n", "other_mask_stride_b", "other_mask_stride_n",
        "upstream_stride_b", "upstream_stride_own", "upstream_stride_other", "rows", "columns",
    ],
    do_not_specialize_on_alignment=["own_ptr", "other_ptr", "own_mask_ptr", "other_mask_ptr", "upstream_ptr"],
)  # fmt: skip
def box_pairs_gradient_kernel(
    own_ptr,
    other_ptr,
    own_mask_ptr,  # (B, P), uint8
    other_mask_ptr,  # (B, T)
    upstream_ptr,  # (B, P, T) with any strides, in COMPUTE
    grad_ptr,  # as own, contiguous, in COMPUTE
    own_stride_b: "i64",
    own_stride_n: "i64",
    own_stride_c: "i64",
    other_stride_b: "i64",
    other_stride_n: "i64",
    other_stride_c: "i64",
    own_mask_stride_b: "i64",
    own_mask_stride_n: "i64",
    other_mask_stride_b: "i64",
    other_mask_stride_n: "i64",
    upstream_stride_b: "i64",
    upstream_stride_own: "i64",
    upstream_stride_other: "i64",
    rows: "i32",  # P
    columns: "i32",  # T
    saturation: "fp64",  # the largest number over T
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    DEGREES: tl.constexpr,
    CLOCKWISE: tl.constexpr,
    OVER: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    OWN_PACKED: tl.constexpr,
    OTHER_PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient to one set. Programs: (rows of boxes, batch)."""
    TURNS: tl.constexpr = HAS_ANGLE[FORMAT]
    IN_SPACE: tl.constexpr = IS_IN_SPACE[FORMAT]
    NO_LENGTH: tl.constexpr = NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32
    TIE: tl.constexpr = TIE_64 if COMPUTE == tl.float64 else TIE_32
    V: tl.constexpr = PairVariant(NO_LENGTH, TIE, FORMAT, DEGREES, CLOCKWISE, OVER, AXIS_WEIGHT, TURNS, IN_SPACE)
    COUNT: tl.constexpr = NUMBERS[FORMAT]
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p_index = tl.minimum(row, rows - 1)
    numbers = load_boxes(
        own_ptr + batch * own_stride_b, p_index, own_stride_n, own_stride_c, COUNT, OWN_PACKED, COMPUTE
    )
    p_there = row >= 0
    if own_mask_ptr is not None:
        p_there = is_there(own_mask_ptr + batch * own_mask_stride_b, p_index, own_mask_stride_n)
    p_finite, p_kept = _finite_and_there(numbers, p_there)
    p_numbers = _clean(numbers, p_kept)
    upstream_rows = upstream_ptr + batch * upstream_stride_b + p_index.to(tl.int64) * upstream_stride_own
    other_ptr += batch * other_stride_b
    largest = tl.full((ROWS, COLUMNS), saturation, COMPUTE)
    none = tl.zeros((ROWS, COLUMNS), COMPUTE)
    sums = (none, none, none, none, none, none, none, none, none)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        g_index = tl.minimum(column, columns - 1)
        g_numbers = load_boxes(other_ptr, g_index, other_stride_n, other_stride_c, COUNT, OTHER_PACKED, COMPUTE)
        g_there = column < columns
        if other_mask_ptr is not None:
            g_there &= is_there(other_mask_ptr + batch * other_mask_stride_b, g_index, other_mask_stride_n)
        _, g_kept = _finite_and_there(g_numbers, g_there)
        upstream = tl.load(upstream_rows + g_index.to(tl.int64) * upstream_stride_other).to(COMPUTE)
        upstream = tl.where(p_kept & g_kept, upstream, 0.0)
        pair, scale = scaled_pair(p_numbers, _clean(g_numbers, g_kept), V)
        derivatives = _to_boxes(pair, _slopes_over_axes(pair, rule_of(pair, V), upstream, V), V)
        sums = _added(sums, derivatives, scale, largest)

    along, across, x, y = _row_sum(sums[0]), _row_sum(sums[1]), _row_sum(sums[2]), _row_sum(sums[3])
    z, a, b, c, turn = _row_sum(sums[4]), _row_sum(sums[5]), _row_sum(sums[6]), _row_sum(sums[7]), _row_sum(sums[8])
    if V.TURNS:
        direction = direction_of(p_numbers, V)
        p = boxes_of(p_numbers, direction, V)
        x = tl.fma(p.cos, along, tl.fma(minus(p.sin), across, x))
        y = tl.fma(p.sin, along, tl.fma(p.cos, across, y))
        a, b = tl.where(direction.is_odd, b, a), tl.where(direction.is_odd, a, b)
        if DEGREES:
            turn = turn * tl.full(turn.shape, math.pi / 180, COMPUTE)
        if not CLOCKWISE:
            turn = minus(turn)
    width, height, depth = sizes_of(p_numbers, V)
    to_width, to_height = 0.5 * a * sign(width), 0.5 * b * sign(height)
    if FORMAT == XYXY:
        gradient = (0.5 * x - to_width, 0.5 * y - to_height, 0.5 * x + to_width, 0.5 * y + to_height)
    elif FORMAT == CXCYWHR:
        gradient = (x, y, to_width, to_height, turn)
    elif FORMAT == CXCYCZLWHR:
        gradient = (x, y, z, to_width, to_height, 0.5 * c * sign(depth), turn)
    else:
        gradient = (x, y, to_width, to_height)
    addresses = grad_ptr + (batch * rows + row) * COUNT
    for number in tl.static_range(COUNT):
        value = tl.where(p_there, tl.where(p_finite, saturate(gradient[number]), float("nan")), 0.0)
        tl.store(addresses + number, value, mask=row < rows)


@triton.jit
def _row_sum(values):
    return tl.sum(values, axis=1, keep_dims=True)
