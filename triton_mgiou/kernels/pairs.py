"""The matrix of all pairs of two sets of boxes (section 11).

    value = 1 - 2 sum_k w_k D_k / sum_k w_k,  or  1 - 2 max_k D_k,  or  1 - max_k apart_k

with the distances of `pair_axes`. A program is one warp. It keeps four or eight columns of each lane in registers, with
all that these boxes have by themselves, and goes down the rows, ROWS at a time; the next rows are loaded meanwhile.

Most rows are plain: with all boxes of the columns they are finite, and none is so small beside another that an edge is
no axis or a number leaves its range (the bounds are those of `box_types`). These take a fraction of the instructions,
and give the same bits.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import reciprocal
from triton_mgiou.kernels.axis import UNIFORM
from triton_mgiou.kernels.box_types import (
    NO_LENGTH_32,
    NO_LENGTH_64,
    PLAIN_ANGLE,
    PLAIN_NUMBER,
    PLAIN_RATIO,
    PLAIN_SIZE,
    TIE_32,
    TIE_64,
)
from triton_mgiou.kernels.pair_axes import (
    DEPTH,
    MEAN,
    NOT_THERE,
    Rule,
    largest_distance,
    pair_of,
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
    is_there,
    load_boxes,
    named,
    plain_direction,
    poison_of,
    size_of_numbers,
    sizes_of,
)


@triton.jit
def _value(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    AXES: tl.constexpr = 6 if V.IN_SPACE else 4
    if V.OVER == MEAN:
        p, g = sums_over_axes(pair, rule, PLAIN, V)
        each = tl.full((p + g).shape, -2.0 / AXES, p.dtype)
        if not PLAIN:
            weight = total_weight(rule)
            each = tl.where(weight == AXES, each, -2.0 * reciprocal(weight))
        return tl.fma(p + g, each, 1.0)
    else:
        return tl.fma(largest_distance(pair, rule, PLAIN, V), -1.0 if V.OVER == DEPTH else -2.0, 1.0)


@triton.jit
def _plain_value(p, g, V: tl.constexpr):
    pair = pair_of(p, g, V)
    any = pair.p1.hull  # noqa: A001 - in the place of a rule where every axis counts alike
    return _value(pair, Rule(any, any, any, any, any, any, any, any, any), True, V)


@triton.jit
def _any_value(p_numbers, g_numbers, V: tl.constexpr):
    pair, _ = scaled_pair(p_numbers, g_numbers, V)
    value = _value(pair, rule_of(pair, V), False, V)
    if V.OVER != DEPTH:
        value = tl.maximum(value, -1.0)  # which reciprocals may round past; that of plain pairs is not so near
    return value + (poison_of(p_numbers) + poison_of(g_numbers))


@triton.jit
def _least_and_total(numbers, V: tl.constexpr):
    """The least size, and the sum of the numbers' absolute values: NaN or Inf where one is; the least is then -1."""
    width, height, depth = sizes_of(numbers, V)
    least = tl.minimum(tl.abs(width), tl.abs(height))
    if V.IN_SPACE:
        least = tl.minimum(least, tl.abs(depth))
    total = size_of_numbers(numbers, V)
    is_plain = total < PLAIN_NUMBER
    if V.TURNS:
        is_plain = is_plain & (tl.abs(numbers[len(numbers) - 1]) < PLAIN_ANGLE)
    return tl.where(is_plain, least, -1.0), total


@triton.jit
def _column(lane, group, LANES: tl.constexpr, VECTORS: tl.constexpr):
    """The columns of a group, one of each lane: every fourth in VECTORS, so that a lane has four that can be stored."""
    if VECTORS:
        return group // 4 * (4 * LANES) + 4 * lane + group % 4
    else:
        return LANES * group + lane


@triton.jit
def _store(addresses, values, lane, left, is_row, VECTORS: tl.constexpr):
    """Tiles (ROWS, LANES) of groups of columns, of which there are `left` in all."""
    LANES: tl.constexpr = values[0].shape[1]
    if VECTORS:
        for vector in tl.static_range(len(values) // 4):
            even = tl.join(values[4 * vector], values[4 * vector + 2])
            odd = tl.join(values[4 * vector + 1], values[4 * vector + 3])
            tile = tl.reshape(tl.join(even, odd), (values[0].shape[0], 4 * LANES))
            column = 4 * LANES * vector + tl.arange(0, 4 * LANES)[None, :]
            tl.store(addresses + column, tile, mask=is_row & (column < left))
    else:
        for group in tl.static_range(len(values)):
            column = _column(lane, group, LANES, VECTORS)
            tl.store(addresses + column, values[group], mask=is_row & (column < left))


@triton.jit(
    do_not_specialize=[
        "stride1_b", "stride1_n", "stride1_c", "stride2_b", "stride2_n", "stride2_c",
        "mask1_stride_b", "mask1_stride_n", "mask2_stride_b", "mask2_stride_n", "rows", "columns",
    ],
    do_not_specialize_on_alignment=["boxes1_ptr", "boxes2_ptr", "mask1_ptr", "mask2_ptr"],
)  # fmt: skip
def box_pairs_kernel(
    boxes1_ptr,
    boxes2_ptr,
    mask1_ptr,  # (B, P), uint8
    mask2_ptr,  # (B, T)
    matrix_ptr,  # (B, P, T), contiguous, in COMPUTE
    stride1_b: "i64",
    stride1_n: "i64",
    stride1_c: "i64",
    stride2_b: "i64",
    stride2_n: "i64",
    stride2_c: "i64",
    mask1_stride_b: "i64",
    mask1_stride_n: "i64",
    mask2_stride_b: "i64",
    mask2_stride_n: "i64",
    rows: "i32",  # P
    columns: "i32",  # T
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    DEGREES: tl.constexpr,
    CLOCKWISE: tl.constexpr,
    OVER: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    PACKED1: tl.constexpr,
    PACKED2: tl.constexpr,
    VECTORS: tl.constexpr,  # T is a multiple of 4
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The matrix of the values of all pairs. Programs: (tiles of columns, some tiles of rows, batch)."""
    TURNS: tl.constexpr = HAS_ANGLE[FORMAT]
    IN_SPACE: tl.constexpr = IS_IN_SPACE[FORMAT]
    NO_LENGTH: tl.constexpr = NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32
    TIE: tl.constexpr = TIE_64 if COMPUTE == tl.float64 else TIE_32
    V: tl.constexpr = PairVariant(NO_LENGTH, TIE, FORMAT, DEGREES, CLOCKWISE, OVER, AXIS_WEIGHT, TURNS, IN_SPACE)
    COUNT: tl.constexpr = NUMBERS[FORMAT]
    GROUPS: tl.constexpr = 8 if ROWS * COLUMNS == 256 else 4
    LANES: tl.constexpr = COLUMNS // GROUPS
    if VECTORS:
        columns = columns // 4 * 4
    batch = tl.program_id(2).to(tl.int64)
    boxes1_ptr += batch * stride1_b
    boxes2_ptr += batch * stride2_b
    if mask1_ptr is not None:
        mask1_ptr += batch * mask1_stride_b
    if mask2_ptr is not None:
        mask2_ptr += batch * mask2_stride_b
    lane = tl.arange(0, LANES)[None, :]
    first_column = tl.program_id(0) * COLUMNS

    g = ()
    g_there = ()
    g_least = tl.full((1, LANES), PLAIN_NUMBER, COMPUTE)
    g_total = tl.zeros((1, LANES), COMPUTE)
    if AXIS_WEIGHT == UNIFORM:
        for group in tl.static_range(GROUPS):
            column = first_column + _column(lane, group, LANES, VECTORS)
            g_index = tl.minimum(column, columns - 1)  # the last box once more, instead of none
            g_numbers = load_boxes(boxes2_ptr, g_index, stride2_n, stride2_c, COUNT, PACKED2, COMPUTE)
            g = g + (boxes_of(g_numbers, plain_direction(g_numbers, V), V),)
            there = column >= 0
            if mask2_ptr is not None:
                there = is_there(mask2_ptr, g_index, mask2_stride_n)
            g_there = g_there + (there,)
            least, total = _least_and_total(g_numbers, V)
            g_least = tl.minimum(g_least, tl.where(there, least, PLAIN_NUMBER))
            g_total = tl.maximum(g_total, tl.where(there, total, 0.0))
    g_least = tl.min(g_least)
    smallest = tl.full((ROWS, 1), PLAIN_SIZE, COMPUTE) + tl.max(g_total) * PLAIN_RATIO
    ratio = tl.full((ROWS, 1), PLAIN_RATIO, COMPUTE)

    step = tl.num_programs(1) * ROWS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    addresses = matrix_ptr + (batch * rows + row) * columns + first_column
    p_index = tl.minimum(row, rows - 1)
    p_next = load_boxes(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
    for _ in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        p_numbers = p_next
        next_index = tl.minimum(row, rows - 1 - step) + step  # the last box where there is no next one
        p_next = load_boxes(boxes1_ptr, next_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
        p_index = tl.minimum(row, rows - 1)
        p_there = row < rows
        if mask1_ptr is not None:
            p_there = is_there(mask1_ptr, p_index, mask1_stride_n)
        is_plain = False
        if AXIS_WEIGHT == UNIFORM:
            p_least, p_total = _least_and_total(p_numbers, V)
            is_any = (tl.minimum(p_least, g_least) > tl.fma(p_total, ratio, smallest)) == 0
            if mask1_ptr is not None:
                is_any = is_any & p_there
            is_any = tl.broadcast_to(is_any, (ROWS, LANES))  # by all lanes, and so by one instruction
            is_plain = tl.max(is_any.to(tl.int32)) == 0
        if AXIS_WEIGHT == UNIFORM and is_plain:
            p = boxes_of(p_numbers, plain_direction(p_numbers, V), V)
            values = ()
            for group in tl.static_range(GROUPS):
                value = _plain_value(p, named(g[group]), V)
                if mask1_ptr is not None or mask2_ptr is not None:
                    value = tl.where(p_there & g_there[group], value, NOT_THERE)
                values = values + (value,)
            _store(addresses, values, lane, columns - first_column, row < rows, VECTORS)
        else:
            # One column of a lane after the other, all loaded once more: these pairs need more registers, and what
            # every program has to keep makes the others slow.
            for piece in range(GROUPS):
                g_column = first_column + _column(lane, piece, LANES, False)
                g_index = tl.minimum(g_column, columns - 1)
                p_again = load_boxes(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
                g_again = load_boxes(boxes2_ptr, g_index, stride2_n, stride2_c, COUNT, PACKED2, COMPUTE)
                any_value = _any_value(p_again, g_again, V)
                if mask1_ptr is not None:
                    any_value = tl.where(p_there, any_value, NOT_THERE)
                if mask2_ptr is not None:
                    any_value = tl.where(is_there(mask2_ptr, g_index, mask2_stride_n), any_value, NOT_THERE)
                tl.store(addresses + (g_column - first_column), any_value, mask=(row < rows) & (g_column < columns))
        row += step
        addresses += step.to(tl.int64) * columns
