"""The matrix of all pairs of two sets of boxes, and its gradient to one of them (section 11).

On an axis with the offset s of the two middles and the half-lengths a and b, as in `boxes`:

    m = max(|s|, |a - b|),   D = (1 - GIoU1D) / 2 = m / (a + b + m),   apart = |s| / (a + b)
    value = 1 - 2 sum_k w_k D_k / sum_k w_k,  or  1 - 2 max_k D_k,  or  1 - max_k apart_k

A program takes a tile of ROWS boxes of one set and COLUMNS of the other. What a box has by itself is computed once for
its row or column, (ROWS, 1) or (1, COLUMNS). A box that is turned by more than an eighth of a turn is first named by
its other side: then two directions differ by up to a quarter turn, and sine and cosine of the difference are two short
series. It is a difference of angles, so that it is exactly 0 for equal boxes.

Most tiles are plain: all their boxes are finite, and none so small beside another that an edge is no axis or a number
leaves its range. These take half the instructions. Scaling by powers of two is exact, so both ways give the same bits.
Sums run over the axes of each box by itself: swapping the sets changes no bit.

The gradient has one launch for each set. A program takes ROWS of its boxes along all boxes of the other set, and adds
in a fixed order.
"""

import math
import os
from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.box_formats import FORMATS, KERNEL_FORMATS
from triton_mgiou.kernels.arithmetic import inverse_power_of_two, minus, sign
from triton_mgiou.kernels.axis import LENGTH, UNIFORM
from triton_mgiou.kernels.boxes import (
    CXCYCZLWHR,
    CXCYWHR,
    NO_LENGTH_32,
    NO_LENGTH_64,
    QUARTER_32,
    QUARTER_64,
    QUARTER_REST_32,
    QUARTER_REST_64,
    XYXY,
    Direction,
    _directions,
    _quarters,
    _reach,
    _weights,
    _with_sign,
)
from triton_mgiou.options import ABSENT, MIN_AXIS_LENGTH, OVERS

# OVER
MEAN = tl.constexpr(OVERS.index("mean"))
MIN = tl.constexpr(OVERS.index("min"))
DEPTH = tl.constexpr(OVERS.index("depth"))

SHORTEST = tl.constexpr(MIN_AXIS_LENGTH)
NOT_THERE = tl.constexpr(ABSENT)
NUMBERS = tl.constexpr(tuple(math.prod(FORMATS[fmt].shape) for fmt in KERNEL_FORMATS))
HAS_ANGLE = tl.constexpr(tuple(FORMATS[fmt].has_angle for fmt in KERNEL_FORMATS))
IS_IN_SPACE = tl.constexpr(tuple(FORMATS[fmt].in_space for fmt in KERNEL_FORMATS))
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# sin x = x + x^3 (...) for x up to a quarter turn: relative error 6e-9, and exactly 1 there.
SINE = tl.constexpr((2.605780491878705e-06, -0.0001980960284001521, 0.008333066245301491, -0.1666665955040033))

# A tile is plain if its sizes are above the first of its largest number and above the second, and its numbers and
# angles below the others.
PLAIN_RATIO = tl.constexpr(1e-5)
PLAIN_SIZE = tl.constexpr(2.0**-40)
PLAIN_NUMBER = tl.constexpr(2.0**40)
PLAIN_ANGLE = tl.constexpr(2.0**22)


class PairVariant(NamedTuple):
    """What is decided at compile time."""

    NO_LENGTH: float  # the longest length that counts as 0
    FORMAT: int
    DEGREES: bool
    CLOCKWISE: bool
    OVER: int
    AXIS_WEIGHT: int
    TURNS: bool  # whether boxes have an angle
    IN_SPACE: bool


class Boxes(NamedTuple):
    """A row or column of boxes."""

    x: tl.tensor  # the centre, or the left upper corner
    y: tl.tensor
    z: tl.tensor
    right: tl.tensor  # of XYXY alone
    bottom: tl.tensor
    a: tl.tensor  # half-sizes along the direction, across it, and upwards
    b: tl.tensor
    c: tl.tensor
    angle: tl.tensor  # of the direction, up to an eighth of a turn, in the caller's unit
    cos: tl.tensor
    sin: tl.tensor


class Scale(NamedTuple):
    """The power of two that brings a box near 1, and its inverse."""

    down: tl.tensor
    up: tl.tensor


class Axis(NamedTuple):
    """Two intervals on an axis."""

    offset: tl.tensor
    halves: tl.tensor  # the sum of the half-lengths
    difference: tl.tensor
    larger: tl.tensor  # of |offset| and |difference|
    hull: tl.tensor


class Pair(NamedTuple):
    """Two boxes on their axes: those of P (p1, p2), of G (g1, g2), and upwards."""

    p1: Axis
    p2: Axis
    g1: Axis
    g2: Axis
    z: Axis
    p: Boxes
    g: Boxes
    x: tl.tensor  # offset of the centres
    y: tl.tensor
    cos: tl.tensor  # of the difference of the angles, both at least 0
    sin: tl.tensor
    turn: tl.tensor  # the difference


class Rule(NamedTuple):
    """Weights of the axes, their slopes by the edges' lengths, and what is no longer than a point."""

    p1: tl.tensor
    p2: tl.tensor
    g1: tl.tensor
    g2: tl.tensor
    pz: tl.tensor
    gz: tl.tensor
    slope_1: tl.tensor  # of P's weights, by the edges that its axes belong to
    slope_2: tl.tensor
    limit: tl.tensor


class Slopes(NamedTuple):
    """Derivatives of the value by what an axis measures."""

    offset: tl.tensor
    first: tl.tensor  # by the half-length of P
    second: tl.tensor


@triton.jit
def _reciprocal(values):
    """1 / values. A power of two times `values` gives the same bits."""
    if values.dtype == tl.float64 or INTERPRETED:
        return 1.0 / values
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sine(angle):
    """Of angles from 0 to a quarter turn, in radians."""
    if angle.dtype == tl.float64:
        return tl.sin(angle)
    else:
        square = angle * angle
        series = tl.full(angle.shape, SINE[0], angle.dtype)
        for step in tl.static_range(3):
            series = tl.fma(series, square, tl.full(angle.shape, SINE[step + 1], angle.dtype))
        return tl.fma(square * angle, series, angle)


@triton.jit
def _cos_sin(turn, DEGREES: tl.constexpr):
    """Cosine and |sine| of up to a quarter turn; exact at 0 and at a quarter."""
    IS_64: tl.constexpr = turn.dtype == tl.float64
    turn = tl.abs(turn)
    if DEGREES:
        RADIAN: tl.constexpr = 0.017453292519943295
        rest = (90.0 - turn) * tl.full(turn.shape, RADIAN, turn.dtype)
        turn = turn * tl.full(turn.shape, RADIAN, turn.dtype)
    else:
        QUARTER: tl.constexpr = QUARTER_64 if IS_64 else QUARTER_32
        QUARTER_REST: tl.constexpr = QUARTER_REST_64 if IS_64 else QUARTER_REST_32
        rest = tl.full(turn.shape, QUARTER, turn.dtype) - turn + tl.full(turn.shape, QUARTER_REST, turn.dtype)
    return _sine(rest), _sine(turn)


@triton.jit
def _load(ptr, index, stride_n, stride_c, NUMBERS: tl.constexpr, PACKED: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of boxes number `index`; PACKED if they follow each other and 32 bits count them."""
    numbers = ()
    for number in tl.static_range(NUMBERS):
        if PACKED:
            addresses = ptr + index * NUMBERS + number
        else:
            addresses = ptr + index.to(tl.int64) * stride_n + number * stride_c
        numbers = numbers + (tl.load(addresses).to(COMPUTE),)
    return numbers


@triton.jit
def _poison(numbers):
    """0, or NaN where a number is NaN or Inf."""
    zero = numbers[0] * 0.0
    for number in tl.static_range(len(numbers)):
        zero = tl.fma(numbers[number], 0.0, zero)
    return zero


@triton.jit
def _largest(numbers, V: tl.constexpr):
    LINEAR: tl.constexpr = 6 if V.IN_SPACE else 4
    largest = tl.abs(numbers[0])
    for number in tl.static_range(LINEAR):
        largest = tl.maximum(largest, tl.abs(numbers[number]))
    return largest


@triton.jit
def _scale(numbers, V: tl.constexpr):
    down = inverse_power_of_two(_largest(numbers, V))
    return Scale(down, 1.0 / down)


@triton.jit
def _scaled(numbers, scale, V: tl.constexpr):
    LINEAR: tl.constexpr = 6 if V.IN_SPACE else 4
    new = ()
    for number in tl.static_range(len(numbers)):
        new = new + (numbers[number] * scale if number < LINEAR else numbers[number],)
    return new


@triton.jit
def _sizes(numbers, V: tl.constexpr):
    """With their signs; the third is the first again in the plane."""
    if V.FORMAT == XYXY:
        return numbers[2] - numbers[0], numbers[3] - numbers[1], numbers[2] - numbers[0]
    elif V.IN_SPACE:
        return numbers[3], numbers[4], numbers[5]
    else:
        return numbers[2], numbers[3], numbers[2]


@triton.jit
def _boxes(numbers, direction, V: tl.constexpr):
    """Boxes by their numbers, and by their directions if they have an angle."""
    width, height, depth = _sizes(numbers, V)
    a, b, c = 0.5 * tl.abs(width), 0.5 * tl.abs(height), 0.5 * tl.abs(depth)
    cos, sin = a, a
    if V.TURNS:
        a, b = tl.where(direction.is_odd, b, a), tl.where(direction.is_odd, a, b)
        cos, sin = _cos_sin(direction.rest, V.DEGREES)
        sin = _with_sign(sin, direction.rest)
    return Boxes(numbers[0], numbers[1], numbers[2], numbers[2], numbers[3], a, b, c, direction.rest, cos, sin)


@triton.jit
def _plain_direction(numbers, V: tl.constexpr):
    """Whether a box is named by its other side, and the angle of its direction; unless that is huge."""
    if V.TURNS:
        return _quarters(_clockwise(numbers, V), V.DEGREES)
    else:
        return Direction(numbers[0] > 0, numbers[0])


@triton.jit
def _direction(numbers, V: tl.constexpr):
    """The same for any angle."""
    if V.TURNS:
        is_odd, rest = _directions((_clockwise(numbers, V),), V.DEGREES)
        return Direction(is_odd[0], rest[0])
    else:
        return Direction(numbers[0] > 0, numbers[0])


@triton.jit
def _clockwise(numbers, V: tl.constexpr):
    angle = numbers[len(numbers) - 1]
    return angle if V.CLOCKWISE else minus(angle)


@triton.jit
def _rescaled(boxes, scale):
    return Boxes(
        boxes.x * scale, boxes.y * scale, boxes.z * scale, boxes.right * scale, boxes.bottom * scale,
        boxes.a * scale, boxes.b * scale, boxes.c * scale, boxes.angle, boxes.cos, boxes.sin,
    )  # fmt: skip


@triton.jit
def _axis(offset, a, b):
    difference = a - b
    halves = a + b
    larger = tl.maximum(tl.abs(offset), tl.abs(difference))
    return Axis(offset, halves, difference, larger, halves + larger)


@triton.jit
def _pair(p, g, V: tl.constexpr):
    """The intervals of each pair on all axes."""
    x, y, z = p.x - g.x, p.y - g.y, p.z - g.z
    if V.FORMAT == XYXY:
        x, y = 0.5 * (x + (p.right - g.right)), 0.5 * (y + (p.bottom - g.bottom))
    on_x, on_y = _axis(x, p.a, g.a), _axis(y, p.b, g.b)
    on_z = on_x
    if V.IN_SPACE:
        on_z = _axis(z, p.c, g.c)
    if V.TURNS:
        turn = p.angle - g.angle
        cos, sin = _cos_sin(turn, V.DEGREES)
        p1, p2 = tl.fma(p.cos, x, p.sin * y), tl.fma(p.cos, y, minus(p.sin) * x)
        g1, g2 = tl.fma(g.cos, x, g.sin * y), tl.fma(g.cos, y, minus(g.sin) * x)
        return Pair(
            _axis(p1, p.a, tl.fma(g.a, cos, g.b * sin)),
            _axis(p2, p.b, tl.fma(g.a, sin, g.b * cos)),
            _axis(g1, tl.fma(p.a, cos, p.b * sin), g.a),
            _axis(g2, tl.fma(p.a, sin, p.b * cos), g.b),
            on_z, p, g, x, y, cos, sin, turn,
        )  # fmt: skip
    else:  # both boxes have the same axes
        return Pair(on_x, on_y, on_x, on_y, on_z, p, g, x, y, x, x, x)


@triton.jit
def _bounds(boxes):
    """Half of the bounding rectangle of a box."""
    sin = tl.abs(boxes.sin)
    return tl.fma(boxes.a, boxes.cos, boxes.b * sin), tl.fma(boxes.a, sin, boxes.b * boxes.cos)


@triton.jit
def _seen(axis, limit):
    return (axis.hull > limit).to(limit.dtype)


@triton.jit
def _rule(pair, V: tl.constexpr):
    """Weights of the axes: those of the loss, but where these see only a line, or nothing (section 11)."""
    p, g = pair.p, pair.g
    if V.TURNS:
        p_x, p_y = _bounds(p)
        g_x, g_y = _bounds(g)
        extent = tl.maximum(_reach(pair.x, p_x, g_x), _reach(pair.y, p_y, g_y))
    else:
        extent = tl.maximum(pair.p1.hull, pair.p2.hull)
    if V.IN_SPACE:
        extent = tl.maximum(extent, pair.z.hull)
    limit = tl.maximum(extent * tl.full(extent.shape, SHORTEST, extent.dtype), V.NO_LENGTH)
    none = tl.zeros_like(limit)
    if V.IN_SPACE:  # an axis is an edge: without one it counts where both are points on it, and apart
        w_p, w_g = (
            _weights(p.a + none, p.b + none, p.c + none, extent, V),
            _weights(g.a + none, g.b + none, g.c + none, extent, V),
        )
        return Rule(
            tl.where(pair.p1.halves <= limit, _seen(pair.p1, limit), w_p.x),
            tl.where(pair.p2.halves <= limit, _seen(pair.p2, limit), w_p.y),
            tl.where(pair.g1.halves <= limit, _seen(pair.g1, limit), w_g.x),
            tl.where(pair.g2.halves <= limit, _seen(pair.g2, limit), w_g.y),
            tl.where(pair.z.halves <= limit, _seen(pair.z, limit), w_p.z),
            tl.where(pair.z.halves <= limit, _seen(pair.z, limit), w_g.z),
            none, none, limit,
        )  # fmt: skip
    else:
        w_p, w_g = (
            _weights(p.b + none, p.a + none, p.a + none, extent, V),
            _weights(g.b + none, g.a + none, g.a + none, extent, V),
        )
        thinnest = tl.minimum(tl.minimum(pair.p1.hull, pair.p2.hull), tl.minimum(pair.g1.hull, pair.g2.hull))
        heaviest = tl.maximum(tl.maximum(w_p.x, w_p.y), tl.maximum(w_g.x, w_g.y))
        other = (thinnest <= limit) | (heaviest == 0)
        return Rule(
            tl.where(other, _seen(pair.p1, limit), w_p.x),
            tl.where(other, _seen(pair.p2, limit), w_p.y),
            tl.where(other, _seen(pair.g1, limit), w_g.x),
            tl.where(other, _seen(pair.g2, limit), w_g.y),
            none, none,
            tl.where(other, 0.0, w_p.slope_x),
            tl.where(other, 0.0, w_p.slope_y),
            limit,
        )  # fmt: skip


@triton.jit
def _per_hull(axis, PLAIN: tl.constexpr, V: tl.constexpr):
    if PLAIN:
        return _reciprocal(axis.hull)
    else:
        return tl.where(axis.hull > V.NO_LENGTH, _reciprocal(axis.hull), 0.0)


@triton.jit
def _weighted(axis, weight, PLAIN: tl.constexpr):
    return axis.larger if PLAIN else axis.larger * weight


@triton.jit
def _distance(axis, weight, limit, PLAIN: tl.constexpr, V: tl.constexpr):
    """D of an axis, or `apart`; 0 if it does not count."""
    if V.OVER == DEPTH:
        halves = axis.halves if PLAIN else tl.maximum(axis.halves, limit)
        distance = tl.abs(axis.offset) * _reciprocal(halves)
    else:
        distance = axis.larger * _per_hull(axis, PLAIN, V)
    return distance if PLAIN else tl.where(weight > 0, distance, 0.0)


@triton.jit
def _sums(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    """Weighted sums of D over the axes of P and over those of G."""
    p = _weighted(pair.p1, rule.p1, PLAIN) * _per_hull(pair.p1, PLAIN, V)
    p = tl.fma(_weighted(pair.p2, rule.p2, PLAIN), _per_hull(pair.p2, PLAIN, V), p)
    g = _weighted(pair.g1, rule.g1, PLAIN) * _per_hull(pair.g1, PLAIN, V)
    g = tl.fma(_weighted(pair.g2, rule.g2, PLAIN), _per_hull(pair.g2, PLAIN, V), g)
    if V.IN_SPACE:
        per_hull = _per_hull(pair.z, PLAIN, V)
        p = tl.fma(_weighted(pair.z, rule.pz, PLAIN), per_hull, p)
        g = tl.fma(_weighted(pair.z, rule.gz, PLAIN), per_hull, g)
    return p, g


@triton.jit
def _total_weight(rule):
    weight = (rule.p1 + rule.p2 + rule.pz) + (rule.g1 + rule.g2 + rule.gz)
    return tl.where(weight > 0, weight, 1.0)


@triton.jit
def _largest_distance(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    p = tl.maximum(_distance(pair.p1, rule.p1, rule.limit, PLAIN, V), _distance(pair.p2, rule.p2, rule.limit, PLAIN, V))
    g = tl.maximum(_distance(pair.g1, rule.g1, rule.limit, PLAIN, V), _distance(pair.g2, rule.g2, rule.limit, PLAIN, V))
    largest = tl.maximum(p, g)
    if V.IN_SPACE:
        largest = tl.maximum(largest, _distance(pair.z, rule.pz + rule.gz, rule.limit, PLAIN, V))
    return largest


@triton.jit
def _value(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    AXES: tl.constexpr = 6 if V.IN_SPACE else 4
    if V.OVER == MEAN:
        p, g = _sums(pair, rule, PLAIN, V)
        each = tl.full((p + g).shape, 1.0 / AXES, p.dtype)
        if not PLAIN:
            weight = _total_weight(rule)
            each = tl.where(weight == AXES, each, _reciprocal(weight))
        return tl.fma((p + g) * each, -2.0, 1.0)
    else:
        return tl.fma(_largest_distance(pair, rule, PLAIN, V), -1.0 if V.OVER == DEPTH else -2.0, 1.0)


@triton.jit
def _plain_rule(pair):
    """What stands in the place of a rule where every axis counts alike."""
    any = pair.p1.hull  # noqa: A001
    return Rule(any, any, any, any, any, any, any, any, any)


@triton.jit
def _plain_values(p, g_numbers, V: tl.constexpr):
    pair = _pair(p, _boxes(g_numbers, _plain_direction(g_numbers, V), V), V)
    return _value(pair, _plain_rule(pair), True, V)


@triton.jit
def _scaled_pair(p_numbers, g_numbers, V: tl.constexpr):
    """Each pair scaled by its own power of two, which comes second (section 6)."""
    p_scale, g_scale = _scale(p_numbers, V), _scale(g_numbers, V)
    p = _boxes(_scaled(p_numbers, p_scale.down, V), _direction(p_numbers, V), V)
    g = _boxes(_scaled(g_numbers, g_scale.down, V), _direction(g_numbers, V), V)
    down = tl.minimum(p_scale.down, g_scale.down)
    return _pair(_rescaled(p, down * p_scale.up), _rescaled(g, down * g_scale.up), V), down


@triton.jit
def _any_values(p_numbers, g_numbers, V: tl.constexpr):
    pair, _ = _scaled_pair(p_numbers, g_numbers, V)
    return _value(pair, _rule(pair, V), False, V) + (_poison(p_numbers) + _poison(g_numbers))


@triton.jit
def _range(numbers, there, V: tl.constexpr):
    """The least size and the largest number of those that are there; -1 and 0 where one is not finite or too large."""
    width, height, depth = _sizes(numbers, V)
    least = tl.minimum(tl.minimum(tl.abs(width), tl.abs(height)), tl.abs(depth))
    largest = _largest(numbers, V)
    is_plain = largest + _poison(numbers) < PLAIN_NUMBER
    if V.TURNS:
        is_plain = is_plain & (tl.abs(numbers[len(numbers) - 1]) < PLAIN_ANGLE)
    least = tl.where(is_plain, least, -1.0)
    return tl.min(tl.where(there, least, PLAIN_NUMBER)), tl.max(tl.where(there & is_plain, largest, 0.0))


@triton.jit
def _is_there(mask_ptr, index, stride):
    return tl.load(mask_ptr + index.to(tl.int64) * stride) != 0


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
    V: tl.constexpr = PairVariant(
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        FORMAT=FORMAT,
        DEGREES=DEGREES,
        CLOCKWISE=CLOCKWISE,
        OVER=OVER,
        AXIS_WEIGHT=AXIS_WEIGHT,
        TURNS=HAS_ANGLE[FORMAT],
        IN_SPACE=IS_IN_SPACE[FORMAT],
    )
    COUNT: tl.constexpr = NUMBERS[FORMAT]
    batch = tl.program_id(2).to(tl.int64)
    boxes1_ptr += batch * stride1_b
    boxes2_ptr += batch * stride2_b
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p_index = tl.minimum(row, rows - 1)  # the last box once more, instead of none
    p_numbers = _load(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
    p_there = row >= 0
    if mask1_ptr is not None:
        p_there = _is_there(mask1_ptr + batch * mask1_stride_b, p_index, mask1_stride_n)
    p_least, p_largest = _range(p_numbers, p_there, V)
    p = _boxes(p_numbers, _plain_direction(p_numbers, V), V)
    matrix_rows = matrix_ptr + (batch * rows + row) * (columns // 4 * 4 if VECTORS else columns)

    for tile in range(tl.program_id(1), tl.cdiv(columns, COLUMNS), tl.num_programs(1)):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        g_index = tl.minimum(column, columns - 1)
        g_numbers = _load(boxes2_ptr, g_index, stride2_n, stride2_c, COUNT, PACKED2, COMPUTE)
        g_there = column >= 0
        if mask2_ptr is not None:
            g_there = _is_there(mask2_ptr + batch * mask2_stride_b, g_index, mask2_stride_n)
        g_least, g_largest = _range(g_numbers, g_there, V)
        least, largest = tl.minimum(p_least, g_least), tl.maximum(p_largest, g_largest)
        if AXIS_WEIGHT == UNIFORM and (least > PLAIN_RATIO * largest) and (least > PLAIN_SIZE):
            values = _plain_values(p, g_numbers, V)
        else:
            # Loaded once more: what every tile would have to keep in registers makes the plain ones slow.
            p_again = _load(boxes1_ptr, p_index, stride1_n, stride1_c, COUNT, PACKED1, COMPUTE)
            values = _any_values(p_again, g_numbers, V)
        if mask1_ptr is not None or mask2_ptr is not None:
            values = tl.where(p_there & g_there, values, NOT_THERE)
        tl.store(matrix_rows + column, values, mask=(row < rows) & (column < columns))


@triton.jit
def _no_slopes(pair):
    none = tl.zeros_like(pair.p1.hull)
    return Slopes(none, none, none)


@triton.jit
def _slopes(axis, factor, V: tl.constexpr):
    """`factor` times the derivatives of D, or of `apart` if `V.OVER` is DEPTH, by what an axis measures; as in `boxes`.

    At a tie of |offset| and |difference| both have half.
    """
    per_hull = _per_hull(axis, False, V)
    by_offset, by_size = tl.abs(axis.offset), tl.abs(axis.difference)
    shrink = factor * per_hull
    grow = tl.where(axis.larger > 0, shrink * (1.0 - axis.larger * per_hull), 0.0)
    to_offset = tl.where(by_offset > by_size, grow, tl.where(by_offset == by_size, 0.5 * grow, 0.0))
    to_size = (grow - to_offset) * sign(axis.difference)
    shrink = shrink * (axis.larger * per_hull)
    return Slopes(to_offset * sign(axis.offset), to_size - shrink, minus(to_size) - shrink)


@triton.jit
def _depth_slopes(axis, factor, limit):
    per_half = _reciprocal(tl.maximum(axis.halves, limit))
    to_offset = factor * per_half
    to_halves = tl.where(axis.halves > limit, minus(tl.abs(axis.offset) * per_half) * to_offset, 0.0)
    return Slopes(to_offset * sign(axis.offset), to_halves, to_halves)


@triton.jit
def _share(axis, weight, limit, largest, V: tl.constexpr):
    """1 where an axis that counts has the largest distance."""
    return ((weight > 0) & (_distance(axis, weight, limit, False, V) == largest)).to(largest.dtype)


@triton.jit
def _slopes_over_axes(pair, rule, V: tl.constexpr):
    """Derivatives of the value by the intervals on all axes, and by the edges of P that its weights come from."""
    none = tl.zeros_like(pair.p1.hull)
    f1, f2, f3, f4, f5 = rule.p1, rule.p2, rule.g1, rule.g2, rule.pz + rule.gz
    to_edge_1, to_edge_2 = none, none
    if V.OVER == MEAN:
        p, g = _sums(pair, rule, False, V)
        each = -2.0 * _reciprocal(_total_weight(rule))
        f1, f2, f3, f4, f5 = f1 * each, f2 * each, f3 * each, f4 * each, f5 * each
        if V.AXIS_WEIGHT != UNIFORM:
            mean = p if V.AXIS_WEIGHT == LENGTH else (p + g) * _reciprocal(_total_weight(rule))
            to_edge_1 = rule.slope_1 * each * (pair.p1.larger * _per_hull(pair.p1, False, V) - mean)
            to_edge_2 = rule.slope_2 * each * (pair.p2.larger * _per_hull(pair.p2, False, V) - mean)
    else:
        largest = _largest_distance(pair, rule, False, V)
        f1, f2 = _share(pair.p1, f1, rule.limit, largest, V), _share(pair.p2, f2, rule.limit, largest, V)
        f3, f4 = _share(pair.g1, f3, rule.limit, largest, V), _share(pair.g2, f4, rule.limit, largest, V)
        count = (f1 + f2) + (f3 + f4)
        if V.IN_SPACE:  # upwards there is an axis of each
            shares = _share(pair.z, f5, rule.limit, largest, V)
            f5 = shares * ((rule.pz > 0).to(none.dtype) + (rule.gz > 0).to(none.dtype))
            count += f5
        each = tl.where(count > 0, (-1.0 if V.OVER == DEPTH else -2.0) * _reciprocal(tl.maximum(count, 1.0)), 0.0)
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
    """Derivatives of the value by P: along its own directions, along x, y, z, by half-sizes, and by its angle."""
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
        turn = turn * sign(pair.turn)
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
    is_finite = _poison(numbers) == 0
    return is_finite, is_finite & there


@triton.jit
def _added(sums, derivatives, scale, upstream, largest):
    """`sums` with one more tile. A derivative saturates such that their sum cannot overflow (section 5)."""
    new = ()
    for number in tl.static_range(9):
        derivative = derivatives[number]
        if number < 8:  # not of the angle
            derivative = tl.minimum(tl.maximum(derivative * scale, minus(largest)), largest)
        new = new + (tl.fma(derivative, upstream, sums[number]),)
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
    V: tl.constexpr = PairVariant(
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        FORMAT=FORMAT,
        DEGREES=DEGREES,
        CLOCKWISE=CLOCKWISE,
        OVER=OVER,
        AXIS_WEIGHT=AXIS_WEIGHT,
        TURNS=HAS_ANGLE[FORMAT],
        IN_SPACE=IS_IN_SPACE[FORMAT],
    )
    COUNT: tl.constexpr = NUMBERS[FORMAT]
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p_index = tl.minimum(row, rows - 1)
    numbers = _load(own_ptr + batch * own_stride_b, p_index, own_stride_n, own_stride_c, COUNT, OWN_PACKED, COMPUTE)
    p_there = row >= 0
    if own_mask_ptr is not None:
        p_there = _is_there(own_mask_ptr + batch * own_mask_stride_b, p_index, own_mask_stride_n)
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
        g_numbers = _load(other_ptr, g_index, other_stride_n, other_stride_c, COUNT, OTHER_PACKED, COMPUTE)
        g_there = column < columns
        if other_mask_ptr is not None:
            g_there &= _is_there(other_mask_ptr + batch * other_mask_stride_b, g_index, other_mask_stride_n)
        _, g_kept = _finite_and_there(g_numbers, g_there)
        upstream = tl.load(upstream_rows + g_index.to(tl.int64) * upstream_stride_other).to(COMPUTE)
        upstream = tl.where(p_kept & g_kept, upstream, 0.0)
        pair, scale = _scaled_pair(p_numbers, _clean(g_numbers, g_kept), V)
        derivatives = _to_boxes(pair, _slopes_over_axes(pair, _rule(pair, V), V), V)
        sums = _added(sums, derivatives, scale, upstream, largest)

    along, across, x, y = _row_sum(sums[0]), _row_sum(sums[1]), _row_sum(sums[2]), _row_sum(sums[3])
    z, a, b, c, turn = _row_sum(sums[4]), _row_sum(sums[5]), _row_sum(sums[6]), _row_sum(sums[7]), _row_sum(sums[8])
    if V.TURNS:
        direction = _direction(p_numbers, V)
        cos, sin = _cos_sin(direction.rest, DEGREES)
        sin = _with_sign(sin, direction.rest)
        x = tl.fma(cos, along, tl.fma(minus(sin), across, x))
        y = tl.fma(sin, along, tl.fma(cos, across, y))
        a, b = tl.where(direction.is_odd, b, a), tl.where(direction.is_odd, a, b)
        if DEGREES:
            turn = turn * tl.full(turn.shape, 0.017453292519943295, COMPUTE)
        if not CLOCKWISE:
            turn = minus(turn)
    width, height, depth = _sizes(p_numbers, V)
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
        value = tl.where(p_there, tl.where(p_finite, gradient[number], float("nan")), 0.0)
        tl.store(addresses + number, value, mask=row < rows)


@triton.jit
def _row_sum(values):
    return tl.sum(values, axis=1, keep_dims=True)
