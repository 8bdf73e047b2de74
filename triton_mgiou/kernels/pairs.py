"""The matrix of all pairs of two sets of boxes (section 11).

    value = 1 - 2 sum_k w_k D_k / sum_k w_k,  or  1 - 2 max_k D_k,  or  1 - max_k apart_k

with the distances of `pair_axes`. A program takes a tile of ROWS boxes of one set and COLUMNS of the other. What a box
has by itself is computed once for its row or column, (ROWS, 1) or (1, COLUMNS).

Most tiles are plain: all their boxes are finite, and none so small beside another that an edge is no axis or a number
leaves its range. These take half the instructions, and give the same bits.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import reciprocal
from triton_mgiou.kernels.axis import UNIFORM
from triton_mgiou.kernels.box_types import NO_LENGTH_32, NO_LENGTH_64
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
    largest_number,
    load_boxes,
    plain_direction,
    poison_of,
    sizes_of,
)

# A tile is plain if its sizes are above the first of its largest number and above the second, and its numbers and
# angles below the others.
PLAIN_RATIO = tl.constexpr(1e-5)
PLAIN_SIZE = tl.constexpr(2.0**-40)
PLAIN_NUMBER = tl.constexpr(2.0**40)
PLAIN_ANGLE = tl.constexpr(2.0**22)


@triton.jit
def _value(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    AXES: tl.constexpr = 6 if V.IN_SPACE else 4
    if V.OVER == MEAN:
        p, g = sums_over_axes(pair, rule, PLAIN, V)
        each = tl.full((p + g).shape, 1.0 / AXES, p.dtype)
        if not PLAIN:
            weight = total_weight(rule)
            each = tl.where(weight == AXES, each, reciprocal(weight))
        return tl.fma((p + g) * each, -2.0, 1.0)
    else:
        return tl.fma(largest_distance(pair, rule, PLAIN, V), -1.0 if V.OVER == DEPTH else -2.0, 1.0)


@triton.jit
def _plain_rule(pair):
    """What stands in the place of a rule where every axis counts alike."""
    any = pair.p1.hull  # noqa: A001
    return Rule(any, any, any, any, any, any, any, any, any)


@triton.jit
def _plain_values(p, g_numbers, V: tl.constexpr):
    pair = pair_of(p, boxes_of(g_numbers, plain_direction(g_numbers, V), V), V)
    return _value(pair, _plain_rule(pair), True, V)


@triton.jit
def _any_values(p_numbers, g_numbers, V: tl.constexpr):
    pair, _ = scaled_pair(p_numbers, g_numbers, V)
    return _value(pair, rule_of(pair, V), False, V) + (poison_of(p_numbers) + poison_of(g_numbers))


@triton.jit
def _range(numbers, there, V: tl.constexpr):
    """The least size and the largest number of those that are there; -1 and 0 where one is not finite or too large."""
    width, height, depth = sizes_of(numbers, V)
    least = tl.minimum(tl.minimum(tl.abs(width), tl.abs(height)), tl.abs(depth))
    largest = largest_number(numbers, V)
    is_plain = largest + poison_of(numbers) < PLAIN_NUMBER
    if V.TURNS:
        is_plain = is_plain & (tl.abs(numbers[len(numbers) - 1]) < PLAIN_ANGLE)
    least = tl.where(is_plain, least, -1.0)
    return tl.min(tl.where(there, least, PLAIN_NUMBER)), tl.max(tl.where(there & is_plain, largest, 0.0))


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
    """The matrix of the values of all pairs. Programs: (rows of tiles, some tiles of each, batch)."""
    TURNS: tl.constexpr = HAS_ANGLE[FORMAT]
    IN_SPACE: tl.constexpr = IS_IN_SPACE[FORMAT]
    V: tl.constexpr = PairVariant(
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        FORMAT=FORMAT,
        DEGREES=DEGREES,
        CLOCKWISE=CLOCKWISE,
        OVER=OVER,
        AXIS_WEIGHT=AXIS_WEIGHT,
        TURNS=TURNS,
        IN_SPACE=IN_SPACE,
    )
    COUNT: tl.constexpr = NUMBERS[FORMAT]
    batch = tl.program_id(2).to(tl.int64)
    boxes1_ptr += batch * stride1_b
    boxes2_ptr += batch * stride2_b
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p_index = tl.minimum(row, rows - 1)  # the last box once more, instead of none
    p_numbers = load_boxes(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
    p_there = row >= 0
    if mask1_ptr is not None:
        p_there = is_there(mask1_ptr + batch * mask1_stride_b, p_index, mask1_stride_n)
    p_least, p_largest = _range(p_numbers, p_there, V)
    p = boxes_of(p_numbers, plain_direction(p_numbers, V), V)
    matrix_rows = matrix_ptr + (batch * rows + row) * (columns // 4 * 4 if VECTORS else columns)

    for tile in range(tl.program_id(1), tl.cdiv(columns, COLUMNS), tl.num_programs(1)):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        g_index = tl.minimum(column, columns - 1)
        g_numbers = load_boxes(boxes2_ptr, g_index, stride2_n, stride2_c, COUNT, PACKED2, COMPUTE)
        g_there = column >= 0
        if mask2_ptr is not None:
            g_there = is_there(mask2_ptr + batch * mask2_stride_b, g_index, mask2_stride_n)
        g_least, g_largest = _range(g_numbers, g_there, V)
        least, largest = tl.minimum(p_least, g_least), tl.maximum(p_largest, g_largest)
        if AXIS_WEIGHT == UNIFORM and (least > PLAIN_RATIO * largest) and (least > PLAIN_SIZE):
            values = _plain_values(p, g_numbers, V)
        else:
            # Loaded once more: what every tile would have to keep in registers makes the plain ones slow.
            p_again = load_boxes(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
            values = _any_values(p_again, g_numbers, V)
        if mask1_ptr is not None or mask2_ptr is not None:
            values = tl.where(p_there & g_there, values, NOT_THERE)
        tl.store(matrix_rows + column, values, mask=(row < rows) & (column < columns))
