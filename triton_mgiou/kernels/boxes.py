"""The fused kernel of boxes: value, reduction and gradient to `pred` in one launch (section 10).

On an axis with the offset s of the two middles and the half-lengths a and b:

    e = a - b,   m = max(|s|, |e|),   D = (1 - GIoU1D) / 2 = m / (a + b + m)
    loss = sum_k w_k D_k / sum_k w_k + boundary_weight * boundary

    d D / d s =  u sign(s) [|s| > |e|]                        u = (1 - D) / (a + b + m); [.] is 1/2 at equality
    d D / d a =  u sign(e) [|e| > |s|] - D / (a + b + m)
    d D / d b = -u sign(e) [|e| > |s|] - D / (a + b + m)

With d = angle of P - angle of G, c = |cos d| and z = |sin d|, a box of half-sizes w, h has the half-lengths w c + h z
and w z + h c on the other one's directions. Half a turn of either box changes nothing, so angles are known up to that.

A lane works on ROWS boxes, all in registers. Where their numbers fill vectors of four, they are loaded and stored as
such: tiles of (LANES, 4), which a lane takes apart. Other tiles are (LANES,). Eight corners have no closed form: their
projections are compared as those of polygons are.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.box_formats import KERNEL_FORMATS
from triton_mgiou.kernels.arithmetic import inverse, inverse_power_of_two, minus, saturate
from triton_mgiou.kernels.axis import LENGTH, SHORTEST, SOFT, SOFT_UNIT, UNIFORM, axis_weight, rounded, shares
from triton_mgiou.kernels.axis import distance as interval_distance
from triton_mgiou.kernels.axis import slopes as interval_slopes
from triton_mgiou.kernels.boundary import boundary_term
from triton_mgiou.kernels.reduction import reduce_programs
from triton_mgiou.kernels.slots import add_scaled, dot, highest, lowest, zeros
from triton_mgiou.kernels.types import Area, Interval
from triton_mgiou.options import RESOLUTION, TIE, TINY, WIDEST_TIE

# FORMAT
CXCYWHR = tl.constexpr(KERNEL_FORMATS.index("cxcywhr"))
CXCYWH = tl.constexpr(KERNEL_FORMATS.index("cxcywh"))
XYXY = tl.constexpr(KERNEL_FORMATS.index("xyxy"))
CXCYCZLWHR = tl.constexpr(KERNEL_FORMATS.index("cxcyczlwhr"))
CORNERS3D = tl.constexpr(KERNEL_FORMATS.index("corners3d"))

TINY_32 = tl.constexpr(TINY[32])
TINY_64 = tl.constexpr(TINY[64])
NO_LENGTH_32 = tl.constexpr(math.sqrt(TINY[32]))
NO_LENGTH_64 = tl.constexpr(math.sqrt(TINY[64]))
RESOLUTION_32 = tl.constexpr(RESOLUTION[32])
RESOLUTION_64 = tl.constexpr(RESOLUTION[64])
TIE_32 = tl.constexpr(TIE[32])
TIE_64 = tl.constexpr(TIE[64])
WIDEST = tl.constexpr(WIDEST_TIE)

SINE = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(1, 10)))  # its series, after x
COSINE = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k) for k in range(1, 10)))  # after 1

# A quarter turn in radians as a sum of two numbers of each type.
QUARTER_32 = tl.constexpr(1.57079637050628662109375)
QUARTER_REST_32 = tl.constexpr(-4.37113900018624283e-8)
QUARTER_64 = tl.constexpr(1.5707963267948966)
QUARTER_REST_64 = tl.constexpr(6.123233995736766e-17)


def _quarters_in_a_radian(words):
    """2 / pi in words of 32 bits, the first in front of the point; by Machin's formula."""
    unit = 1 << (32 * words + 64)

    def arctangent_of_inverse(number):
        total, power, k = 0, unit // number, 0
        while power:
            total += (-1) ** k * power // (2 * k + 1)
            power //= number * number
            k += 1
        return total

    pi = 4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239))
    bits = 2 * unit * unit // pi >> 64 + 32
    return tuple(bits >> 32 * (words - 1 - i) & 0xFFFFFFFF for i in range(words))


WORDS = tl.constexpr(9)
QUARTERS_IN_A_RADIAN = tl.constexpr(_quarters_in_a_radian(9))


class BoxVariant(NamedTuple):
    """What is decided at compile time. Handed on as a `tl.constexpr`, since a tuple of its own makes tensors of it."""

    TINY: float  # squared lengths and areas up to this count as 0
    NO_LENGTH: float  # its root
    RESOLUTION: float
    TIE: float
    GRAD: bool
    FORMAT: int
    HAS_ANGLE: bool
    NUMBERS: int  # of a box
    ROWS: int  # boxes of a lane
    VECTORS: int  # of four, that their numbers fill
    PACKED: bool  # whether rows of both sides follow each other
    DEGREES: bool
    CLOCKWISE: bool
    AXIS_WEIGHT: int
    AXIS_GRAD: bool
    BOUNDARY: bool


class Source(NamedTuple):
    """Where the boxes of one side are in memory."""

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_n: tl.tensor
    stride_c: tl.tensor  # of the coordinates of a corner


class Direction(NamedTuple):
    """The direction of a box, up to half a turn."""

    is_odd: tl.tensor  # whether the quarter turns are odd
    rest: tl.tensor  # beyond them, up to an eighth of a turn, in the caller's unit


class Turn(NamedTuple):
    """Cosine and sine, up to one sign for both."""

    cos: tl.tensor
    sin: tl.tensor


class Side(NamedTuple):
    """Two boxes along one direction of the coordinates, scaled."""

    offset: tl.tensor  # of the middles
    pred_size: tl.tensor  # with its sign
    pred: tl.tensor  # half-sizes
    target: tl.tensor


class Slopes(NamedTuple):
    """Derivatives of w_k D_k."""

    offset: tl.tensor
    pred: tl.tensor  # to P's half-length
    target: tl.tensor


class Sums(NamedTuple):
    """Sums over the axes."""

    distance: tl.tensor  # of w_k D_k
    weight: tl.tensor


class Weights(NamedTuple):
    """The weights of a box's directions, and their derivatives to the lengths that they come from."""

    x: tl.tensor
    y: tl.tensor
    z: tl.tensor
    slope_x: tl.tensor
    slope_y: tl.tensor


class Row(NamedTuple):
    """The loss of one pair, and its derivatives to the numbers of P before they are multiplied by `factor`."""

    loss: tl.tensor
    factor: tl.tensor  # NaN where a number is NaN or Inf
    scale: tl.tensor  # one more factor for all but angles
    gradient: tuple[tl.tensor, ...]


# Memory


@triton.jit
def _offsets(places, source, V: tl.constexpr):
    """Where numbers are in memory, by their places among all numbers of the batch."""
    if V.PACKED:
        return places
    rows = places // V.NUMBERS
    number = places % V.NUMBERS
    if V.FORMAT == CORNERS3D:
        return rows * source.stride_b + (number // 3) * source.stride_n + (number % 3) * source.stride_c
    else:
        return rows * source.stride_b + number * source.stride_n


@triton.jit
def _load(source, first, batch, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of a lane's boxes, one box after the other; 0 behind the batch."""
    numbers = ()
    end = tl.full((1,), V.NUMBERS, tl.int64) * batch
    for vector in tl.static_range(V.VECTORS):
        places = first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]
        four = tl.load(source.ptr + _offsets(places, source, V), mask=places < end, other=0.0).to(COMPUTE)
        even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
        number_0, number_2 = tl.split(even)
        number_1, number_3 = tl.split(odd)
        numbers = numbers + (number_0, number_1, number_2, number_3)
    for number in tl.static_range(4 * V.VECTORS, V.ROWS * V.NUMBERS):
        places = first + number
        offsets = _offsets(places, source, V)
        numbers = numbers + (tl.load(source.ptr + offsets, mask=places < end, other=0.0).to(COMPUTE),)
    return numbers


@triton.jit
def _load_whole(source, first, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The same where all are in the batch and packed, so that four numbers are one access."""
    numbers = ()
    for vector in tl.static_range(V.VECTORS):
        four = tl.load(source.ptr + first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]).to(COMPUTE)
        even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
        number_0, number_2 = tl.split(even)
        number_1, number_3 = tl.split(odd)
        numbers = numbers + (number_0, number_1, number_2, number_3)
    return numbers


@triton.jit
def _store(ptr, first, numbers, batch, whole, V: tl.constexpr):
    """The reverse, packed."""
    end = tl.full((1,), V.NUMBERS, tl.int64) * batch
    for vector in tl.static_range(V.VECTORS):
        even = tl.join(numbers[4 * vector], numbers[4 * vector + 2])
        odd = tl.join(numbers[4 * vector + 1], numbers[4 * vector + 3])
        four = tl.reshape(tl.join(even, odd), (first.shape[0], 4))
        places = first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]
        if V.NUMBERS % 4 != 0 and whole:
            tl.store(ptr + places, four)
        else:
            tl.store(ptr + places, four, mask=places < end)
    for number in tl.static_range(4 * V.VECTORS, V.ROWS * V.NUMBERS):
        tl.store(ptr + first + number, numbers[number], mask=first + number < end)


@triton.jit
def _one_row(numbers, row: tl.constexpr, V: tl.constexpr):
    new = ()
    for number in tl.static_range(V.NUMBERS):
        new = new + (numbers[row * V.NUMBERS + number],)
    return new


# Angles


@triton.jit
def _quarters(angle, DEGREES: tl.constexpr):
    """Take away quarter turns. Fused, so that nothing is lost but what the rest cannot hold; in degrees nothing."""
    IS_64: tl.constexpr = angle.dtype == tl.float64
    if DEGREES:
        QUARTER: tl.constexpr = 90.0
    else:
        QUARTER: tl.constexpr = QUARTER_64 if IS_64 else QUARTER_32
    ROUND: tl.constexpr = 1.5 * 2.0**52 if IS_64 else 1.5 * 2.0**23  # a number this large has no place for a fraction
    quarter = tl.full(angle.shape, QUARTER, angle.dtype)
    large = tl.full(angle.shape, ROUND, angle.dtype)
    rounded = tl.fma(angle, tl.full(angle.shape, 1.0 / QUARTER, angle.dtype), large)
    count = rounded - large
    rest = tl.fma(minus(count), quarter, angle)
    if not DEGREES:
        QUARTER_REST: tl.constexpr = QUARTER_REST_64 if IS_64 else QUARTER_REST_32
        rest = tl.fma(minus(count), tl.full(angle.shape, QUARTER_REST, angle.dtype), rest)
    bits = rounded.to(tl.int64, bitcast=True) if IS_64 else rounded.to(tl.int32, bitcast=True)
    return Direction((bits & 1) != 0, rest)


@triton.jit
def _word(index):
    word = index * 0
    for place in tl.static_range(WORDS):
        word = tl.where(index == place, QUARTERS_IN_A_RADIAN[place], word)
    return word


@triton.jit
def _far_quarters(angle, DEGREES: tl.constexpr):
    """The same for angles so large that their count of quarter turns has more digits than a number holds.

    The angle is an integer times a power of two. In degrees, 8 times the rest modulo 45, of which the powers of two
    repeat after twelve. In radians, times as many digits of 2 / pi as matter modulo two.
    """
    IS_64: tl.constexpr = angle.dtype == tl.float64
    MANTISSA: tl.constexpr = 52 if IS_64 else 23
    BIAS: tl.constexpr = 1075 if IS_64 else 150
    bits = angle.to(tl.uint64, bitcast=True) if IS_64 else angle.to(tl.uint32, bitcast=True).to(tl.uint64)
    exponent = ((bits >> MANTISSA) & (2047 if IS_64 else 255)).to(tl.int32) - BIAS
    integer = (bits & ((1 << MANTISSA) - 1)) | (1 << MANTISSA)
    if DEGREES:
        power = (tl.maximum(exponent - 3, 0) % 12).to(tl.uint64)
        rest = 8 * (((integer % 45) << power) % 45)
        found = _quarters(rest.to(tl.int32).to(angle.dtype), True)
    else:
        start = tl.minimum(tl.maximum(exponent + 31, 0), 159)
        index = (start >> 5).to(tl.uint64)
        shift = (start & 31).to(tl.uint64)
        first, second, third = _word(index), _word(index + 1), _word(index + 2)
        digits = (((first << 32) | second) << shift) | ((third << shift) >> 32)
        turned = integer * digits  # half turns, in units of 2^-64, without the whole ones
        if IS_64:
            fourth, fifth = _word(index + 3), _word(index + 4)
            digits = (((third << 32) | fourth) << shift) | ((fifth << shift) >> 32)
            turned += tl.umulhi(integer, digits)
        is_odd = ((turned + (1 << 62)) >> 63) != 0
        rest = (turned - tl.where(is_odd, 1 << 63, 0).to(tl.uint64)).to(tl.int64, bitcast=True).to(angle.dtype)
        found = Direction(is_odd, rest * tl.full(angle.shape, math.pi / 2 * 2.0**-63, angle.dtype))
    return Direction(found.is_odd, tl.where(angle < 0, minus(found.rest), found.rest))


@triton.jit
def _directions(angles, DEGREES: tl.constexpr):
    """The directions of boxes. Only where one of the program's angles is huge it takes the long way."""
    IS_64: tl.constexpr = angles[0].dtype == tl.float64
    if DEGREES:
        HUGE: tl.constexpr = 2.0**56 if IS_64 else 2.0**26
    else:
        HUGE: tl.constexpr = 2.0**50 if IS_64 else 2.0**22
    is_odd = ()
    rest = ()
    any_huge = tl.abs(angles[0]) >= HUGE  # False for NaN, which a maximum would have to pass over
    for each in tl.static_range(len(angles)):
        direction = _quarters(angles[each], DEGREES)
        is_odd = is_odd + (direction.is_odd,)
        rest = rest + (direction.rest,)
        any_huge = any_huge | (tl.abs(angles[each]) >= HUGE)
    if tl.max(any_huge.to(tl.int32)) > 0:
        far_odd = ()
        far_rest = ()
        for each in tl.static_range(len(angles)):
            is_huge = tl.abs(angles[each]) >= HUGE
            direction = _far_quarters(angles[each], DEGREES)
            far_odd = far_odd + (tl.where(is_huge, direction.is_odd, is_odd[each]),)
            far_rest = far_rest + (tl.where(is_huge, direction.rest, rest[each]),)
        is_odd = far_odd
        rest = far_rest
    return is_odd, rest


@triton.jit
def _turn(direction, DEGREES: tl.constexpr):
    """Cosine and sine by their series; exactly 0 and 1 at quarter turns."""
    TERMS: tl.constexpr = 8 if direction.rest.dtype == tl.float64 else 4
    angle = direction.rest
    if DEGREES:
        angle = angle * tl.full(angle.shape, math.pi / 180, angle.dtype)
    square = angle * angle
    sine = tl.full(angle.shape, SINE[TERMS - 1], angle.dtype)
    cosine = tl.full(angle.shape, COSINE[TERMS - 1], angle.dtype)
    for step in tl.static_range(TERMS - 1):
        sine = tl.fma(sine, square, tl.full(angle.shape, SINE[TERMS - 2 - step], angle.dtype))
        cosine = tl.fma(cosine, square, tl.full(angle.shape, COSINE[TERMS - 2 - step], angle.dtype))
    sine = tl.fma(sine, square * angle, angle)
    cosine = tl.fma(cosine, square, 1.0)
    return Turn(tl.where(direction.is_odd, minus(sine), cosine), tl.where(direction.is_odd, cosine, sine))


# Boxes


@triton.jit
def _side(pred, target, scale, place: tl.constexpr, FORMAT: tl.constexpr):
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
def _half_length(along, across, turn):
    """The half-length of a box on another one's direction, by its half-sizes along and across that at no turn."""
    return tl.fma(along, tl.abs(turn.cos), across * tl.abs(turn.sin))


@triton.jit
def _reach(offset, pred, target):
    """The joint length of two intervals."""
    return pred + target + tl.maximum(tl.abs(offset), tl.abs(pred - target))


@triton.jit
def _weights(x, y, z, extent, V: tl.constexpr):
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
def _with_sign(values, signs):
    """|values| with the sign bits of `signs`."""
    if values.dtype == tl.float64:
        bits = signs.to(tl.int64, bitcast=True) & (-(2**63))
        return (values.to(tl.int64, bitcast=True) | bits).to(tl.float64, bitcast=True)
    else:
        bits = signs.to(tl.int32, bitcast=True) & (-(2**31))
        return (values.to(tl.int32, bitcast=True) | bits).to(tl.float32, bitcast=True)


@triton.jit
def _times_sign(values, signs):
    """Values times 1, -1, or 0 where `signs` is 0: a sign bit is fewer instructions than a factor."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True) ^ (signs.to(tl.int64, bitcast=True) & (-(2**63)))
        product = bits.to(tl.float64, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True) ^ (signs.to(tl.int32, bitcast=True) & (-(2**31)))
        product = bits.to(tl.float32, bitcast=True)
    return tl.where(signs == 0, 0.0, product)


@triton.jit
def _distance(offset, pred, target, weight, V: tl.constexpr):
    """D of an axis and the derivatives of w D."""
    difference = pred - target
    by_offset, by_size = tl.abs(offset), tl.abs(difference)
    larger = tl.maximum(by_offset, by_size)
    hull = pred + target + larger
    per_hull = tl.where(hull > V.NO_LENGTH, inverse(hull), 0.0)
    apart = larger * per_hull
    if not V.GRAD:
        return apart, Slopes(offset, offset, offset)
    shrink = weight * per_hull
    grow = tl.where(larger > 0, shrink * (1.0 - apart), 0.0)
    to_offset = tl.where(by_offset > by_size, grow, tl.where(by_offset == by_size, 0.5 * grow, 0.0))
    to_size = _with_sign(grow - to_offset, difference)
    shrink *= apart
    return apart, Slopes(_with_sign(to_offset, offset), to_size - shrink, minus(to_size) - shrink)


@triton.jit
def _add(sums, apart, weight):
    return Sums(tl.fma(weight, apart, sums.distance), sums.weight + weight)


@triton.jit
def _box_row(pred, target, pred_direction, target_direction, boundary_weight, V: tl.constexpr):
    """One pair of boxes. P's directions are p1 and p2, G's are g1 and g2, and z is the same for both."""
    IN_SPACE: tl.constexpr = V.FORMAT == CXCYCZLWHR
    LINEAR: tl.constexpr = 6 if IN_SPACE else 4
    largest = tl.abs(pred[0])
    for place in tl.static_range(LINEAR):
        largest = tl.maximum(largest, tl.abs(pred[place]), propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(largest, tl.abs(target[place]), propagate_nan=tl.PropagateNan.ALL)
    poison = largest * 0.0
    if V.HAS_ANGLE:
        poison = tl.fma(pred[LINEAR], 0.0, tl.fma(target[LINEAR], 0.0, poison))
    scale = inverse_power_of_two(largest) + poison
    x, y = _side(pred, target, scale, 0, V.FORMAT), _side(pred, target, scale, 1, V.FORMAT)
    z = x
    if IN_SPACE:
        z = _side(pred, target, scale, 2, V.FORMAT)

    g1, g2 = x.offset, y.offset  # offsets along the axes
    p1, p2 = g1, g2
    g_on_p1, g_on_p2, p_on_g1, p_on_g2 = x.target, y.target, x.pred, y.pred
    pred_x, pred_y, target_x, target_y = x.pred, y.pred, x.target, y.target
    turn = Turn(g1, g2)
    target_turn = turn
    if V.HAS_ANGLE:
        between = _quarters(pred_direction.rest - target_direction.rest, V.DEGREES)
        is_odd = between.is_odd ^ pred_direction.is_odd ^ target_direction.is_odd
        turn = _turn(Direction(is_odd, between.rest), V.DEGREES)
        target_turn = _turn(target_direction, V.DEGREES)
        g1 = tl.fma(target_turn.cos, x.offset, target_turn.sin * y.offset)
        g2 = tl.fma(target_turn.cos, y.offset, minus(target_turn.sin) * x.offset)
        p1 = tl.fma(turn.cos, g1, turn.sin * g2)
        p2 = tl.fma(turn.cos, g2, minus(turn.sin) * g1)
        g_on_p1, g_on_p2 = _half_length(x.target, y.target, turn), _half_length(y.target, x.target, turn)
        p_on_g1, p_on_g2 = _half_length(x.pred, y.pred, turn), _half_length(y.pred, x.pred, turn)

    extent = g1
    if V.AXIS_WEIGHT != LENGTH:
        if V.HAS_ANGLE:
            pred_turn = Turn(
                tl.fma(target_turn.cos, turn.cos, minus(target_turn.sin) * turn.sin),
                tl.fma(target_turn.sin, turn.cos, target_turn.cos * turn.sin),
            )
            pred_x, pred_y = _half_length(x.pred, y.pred, pred_turn), _half_length(y.pred, x.pred, pred_turn)
            target_x = _half_length(x.target, y.target, target_turn)
            target_y = _half_length(y.target, x.target, target_turn)
        extent = tl.maximum(_reach(x.offset, pred_x, target_x), _reach(y.offset, pred_y, target_y))
        if IN_SPACE:
            extent = tl.maximum(extent, _reach(z.offset, z.pred, z.target))
    if IN_SPACE:  # an axis is an edge; in the plane it is the normal of the other edge
        w_p = _weights(x.pred, y.pred, z.pred, extent, V)
        w_g = _weights(x.target, y.target, z.target, extent, V)
    else:
        w_p = _weights(y.pred, x.pred, x.pred, extent, V)
        w_g = _weights(y.target, x.target, x.target, extent, V)

    none = tl.zeros_like(scale)
    on_p = Sums(none, none)
    on_g = Sums(none, none)
    if V.HAS_ANGLE:
        apart_1, slopes_1 = _distance(p1, x.pred, g_on_p1, w_p.x, V)
        apart_2, slopes_2 = _distance(p2, y.pred, g_on_p2, w_p.y, V)
        apart_3, slopes_3 = _distance(g1, p_on_g1, x.target, w_g.x, V)
        apart_4, slopes_4 = _distance(g2, p_on_g2, y.target, w_g.y, V)
    else:  # both boxes have the same axes
        apart_1, slopes_1 = _distance(x.offset, x.pred, x.target, w_p.x + w_g.x, V)
        apart_2, slopes_2 = _distance(y.offset, y.pred, y.target, w_p.y + w_g.y, V)
        apart_3, apart_4 = apart_1, apart_2
    on_p = _add(_add(on_p, apart_1, w_p.x), apart_2, w_p.y)
    on_g = _add(_add(on_g, apart_3, w_g.x), apart_4, w_g.y)
    if IN_SPACE:
        apart, slopes_z = _distance(z.offset, z.pred, z.target, w_p.z + w_g.z, V)
        on_p = _add(on_p, apart, w_p.z + w_g.z)
    weight = on_p.weight + on_g.weight
    weight = tl.where(weight > 0, weight, 1.0)
    total = on_p.distance + on_g.distance
    factor = inverse(weight) + poison
    loss = total * factor
    if V.BOUNDARY:
        one_more = weight * tl.full(weight.shape, boundary_weight, weight.dtype)
        p_area = Area(2.0 * x.pred * y.pred, none, none)
        squares = 2.0 * tl.fma(x.target, x.target, y.target * y.target)
        g_area = Area(2.0 * x.target * y.target, none, squares)
        mixed = tl.fma(x.pred, g_on_p2, y.pred * g_on_p1)
        term = boundary_term(mixed, p_area, g_area, V.TINY, V.RESOLUTION)
        loss = tl.fma(term.value, tl.full(weight.shape, boundary_weight, weight.dtype), loss)
        mixed_slope = term.mixed_slope * one_more
        area_slope = 2.0 * term.area_slope * one_more
    gradient = ()
    if V.GRAD:
        # To the half-sizes of P, and to the offset, by its components along the coordinates or the directions of G.
        to_x, to_y, along_1, along_2 = slopes_1.pred, slopes_2.pred, slopes_1.offset, slopes_2.offset
        by_turn, turn_1, turn_2 = none, none, none
        if V.HAS_ANGLE:
            along_1 = tl.fma(turn.cos, slopes_1.offset, tl.fma(minus(turn.sin), slopes_2.offset, slopes_3.offset))
            along_2 = tl.fma(turn.sin, slopes_1.offset, tl.fma(turn.cos, slopes_2.offset, slopes_4.offset))
            cos, sin = tl.abs(turn.cos), tl.abs(turn.sin)
            to_x = tl.fma(cos, slopes_3.pred, tl.fma(sin, slopes_4.pred, to_x))
            to_y = tl.fma(sin, slopes_3.pred, tl.fma(cos, slopes_4.pred, to_y))
            # Derivatives of half-lengths by the turn, but for its sign: |cos| becomes -|sin| and |sin| becomes |cos|.
            by_turn = slopes_3.pred * tl.fma(y.pred, cos, minus(x.pred) * sin)
            by_turn = tl.fma(slopes_4.pred, tl.fma(x.pred, cos, minus(y.pred) * sin), by_turn)
            turn_1 = tl.fma(y.target, cos, minus(x.target) * sin)
            turn_2 = tl.fma(x.target, cos, minus(y.target) * sin)
            if V.AXIS_GRAD:
                by_turn = tl.fma(slopes_1.target, turn_1, tl.fma(slopes_2.target, turn_2, by_turn))
        if V.AXIS_GRAD and V.AXIS_WEIGHT != UNIFORM:
            # Of the axes that the weights are shares of: with LENGTH those of P, whose weights add up to one.
            mean = on_p.distance if V.AXIS_WEIGHT == LENGTH else total * factor
            to_y = tl.fma(2.0 * w_p.slope_x, apart_1 - mean, to_y)
            to_x = tl.fma(2.0 * w_p.slope_y, apart_2 - mean, to_x)
        if V.BOUNDARY:
            to_x = tl.fma(mixed_slope, g_on_p2, tl.fma(area_slope, y.pred, to_x))
            to_y = tl.fma(mixed_slope, g_on_p1, tl.fma(area_slope, x.pred, to_y))
            if V.HAS_ANGLE:
                by_turn = tl.fma(mixed_slope, tl.fma(x.pred, turn_2, y.pred * turn_1), by_turn)
        grad_x, grad_y, grad_angle = along_1, along_2, none
        if V.HAS_ANGLE:
            grad_x = tl.fma(target_turn.cos, along_1, minus(target_turn.sin) * along_2)
            grad_y = tl.fma(target_turn.sin, along_1, target_turn.cos * along_2)
            grad_angle = _times_sign(by_turn, turn.cos * turn.sin)
            if V.AXIS_GRAD:
                grad_angle += tl.fma(slopes_1.offset, p2, minus(slopes_2.offset) * p1)
            if V.DEGREES:
                grad_angle *= tl.full(grad_angle.shape, math.pi / 180, grad_angle.dtype)
            if not V.CLOCKWISE:
                grad_angle = minus(grad_angle)
        to_x = 0.5 * _times_sign(to_x, x.pred_size)
        to_y = 0.5 * _times_sign(to_y, y.pred_size)
        if V.FORMAT == XYXY:
            grad_x, grad_y = 0.5 * grad_x, 0.5 * grad_y
            gradient = (grad_x - to_x, grad_y - to_y, grad_x + to_x, grad_y + to_y)
        elif V.FORMAT == CXCYWH:
            gradient = (grad_x, grad_y, to_x, to_y)
        elif V.FORMAT == CXCYWHR:
            gradient = (grad_x, grad_y, to_x, to_y, grad_angle)
        else:
            to_z = 0.5 * _times_sign(slopes_z.pred, z.pred_size)
            gradient = (grad_x, grad_y, slopes_z.offset, to_x, to_y, to_z, grad_angle)
    return Row(loss, factor, scale, gradient)


# Eight corners


@triton.jit
def _numbers_of(corners, place: tl.constexpr):
    numbers = ()
    for corner in tl.static_range(8):
        numbers = numbers + (corners[3 * corner + place],)
    return numbers


@triton.jit
def _placed(numbers, scale, low):
    new = ()
    for corner in tl.static_range(8):
        new = new + (tl.fma(numbers[corner], scale, minus(low)),)
    return new


@triton.jit
def _project(x, y, z, corners):
    projections = ()
    for corner in tl.static_range(8):
        in_plane = tl.fma(y, corners[1][corner], z * corners[2][corner])
        projections = projections + (tl.fma(x, corners[0][corner], in_plane),)
    return projections


@triton.jit
def _put(numbers, value, at: tl.constexpr):
    """`numbers` with a value added to one of them."""
    new = ()
    for corner in tl.static_range(8):
        new = new + (numbers[corner] + value if corner == at else numbers[corner],)
    return new


@triton.jit
def _corners_axis(
    state, corners, END: tl.constexpr, p, g, floor, p_slack, g_slack, scale, OWN: tl.constexpr, V: tl.constexpr
):
    """Add the edge from vertex 0 to vertex END of P, if OWN, or of G."""
    total, weights, gradient = state
    x = tl.fma(corners[3 * END], scale, minus(corners[0] * scale))
    y = tl.fma(corners[3 * END + 1], scale, minus(corners[1] * scale))
    z = tl.fma(corners[3 * END + 2], scale, minus(corners[2] * scale))
    weight = (tl.fma(x, x, tl.fma(y, y, z * z)) > floor).to(scale.dtype)
    on_p, on_g = _project(x, y, z, p), _project(x, y, z, g)
    p_ends, g_ends = Interval(lowest(on_p), highest(on_p)), Interval(lowest(on_g), highest(on_g))
    apart, per_hull = interval_distance(p_ends, g_ends, V.TINY)
    if V.GRAD:
        to_p, to_g = interval_slopes(p_ends, g_ends, apart, weight * per_hull)
        size = tl.abs(x) + tl.abs(y) + tl.abs(z)
        p_shares = shares(on_p, rounded(p_ends, p_slack * size), to_p)
        grad_x, grad_y, grad_z = gradient
        grad_x = add_scaled(grad_x, x, p_shares)
        grad_y = add_scaled(grad_y, y, p_shares)
        grad_z = add_scaled(grad_z, z, p_shares)
        if OWN and V.AXIS_GRAD:
            both = p_shares + shares(on_g, rounded(g_ends, g_slack * size), to_g)
            along_x, along_y, along_z = dot(both, p[0] + g[0]), dot(both, p[1] + g[1]), dot(both, p[2] + g[2])
            grad_x = _put(_put(grad_x, along_x, END), minus(along_x), 0)
            grad_y = _put(_put(grad_y, along_y, END), minus(along_y), 0)
            grad_z = _put(_put(grad_z, along_z, END), minus(along_z), 0)
        gradient = (grad_x, grad_y, grad_z)
    return tl.fma(weight, apart, total), weights + weight, gradient


@triton.jit
def _corners_row(pred, target, V: tl.constexpr):
    """One pair of eight corners each. The axes are the edges at vertex 0, as long as they are."""
    largest = tl.abs(pred[0])
    for place in tl.static_range(24):
        largest = tl.maximum(largest, tl.abs(pred[place]), propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(largest, tl.abs(target[place]), propagate_nan=tl.PropagateNan.ALL)
    poison = largest * 0.0
    scale = inverse_power_of_two(largest) + poison
    p = ()
    g = ()
    extent = tl.zeros_like(scale)
    p_extent, g_extent = extent, extent
    for place in tl.static_range(3):
        raw_p, raw_g = _numbers_of(pred, place), _numbers_of(target, place)
        p_low, p_high, g_low, g_high = lowest(raw_p), highest(raw_p), lowest(raw_g), highest(raw_g)
        low = tl.minimum(p_low, g_low) * scale
        extent = tl.maximum(extent, tl.maximum(p_high, g_high) * scale - low)
        p_extent = tl.maximum(p_extent, p_high * scale - p_low * scale)
        g_extent = tl.maximum(g_extent, g_high * scale - g_low * scale)
        p = p + (_placed(raw_p, scale, low),)
        g = g + (_placed(raw_g, scale, low),)
    widest = tl.full(extent.shape, V.TIE, extent.dtype)
    p_slack, g_slack = tl.minimum(p_extent * WIDEST, widest), tl.minimum(g_extent * WIDEST, widest)
    floor = extent * tl.full(extent.shape, SHORTEST, extent.dtype)
    floor = tl.maximum(tl.full(extent.shape, V.TINY, extent.dtype), floor * floor)

    gradient = (zeros(p[0]), zeros(p[1]), zeros(p[2]))
    state = (tl.zeros_like(scale), tl.zeros_like(scale), gradient)
    for number in tl.static_range(3):
        state = _corners_axis(state, pred, (1, 3, 4)[number], p, g, floor, p_slack, g_slack, scale, True, V)
    for number in tl.static_range(3):
        state = _corners_axis(state, target, (1, 3, 4)[number], p, g, floor, p_slack, g_slack, scale, False, V)
    total, weights, gradient = state
    weights = tl.where(weights > 0, weights, 1.0)
    derivatives = ()
    if V.GRAD:
        for corner in tl.static_range(8):
            derivatives = derivatives + (gradient[0][corner], gradient[1][corner], gradient[2][corner])
    factor = 0.5 * inverse(weights) + poison
    return Row(total * factor, factor, scale, derivatives)


@triton.jit(
    do_not_specialize=[
        "pred_stride_b",
        "pred_stride_n",
        "pred_stride_c",
        "target_stride_b",
        "target_stride_n",
        "target_stride_c",
        "weight_stride",
        "batch",
    ],
    do_not_specialize_on_alignment=["weight_ptr", "counter_ptr"],
)
def box_kernel(
    pred_ptr,
    target_ptr,
    weight_ptr,  # (B,)
    loss_ptr,  # (B,), or one element if REDUCE
    grad_ptr,  # as pred, contiguous, in COMPUTE
    partial_ptr,  # (number of programs,)
    counter_ptr,  # one int32, 0 before and after
    pred_stride_b: "i64",
    pred_stride_n: "i64",
    pred_stride_c: "i64",  # of the coordinates of corners
    target_stride_b: "i64",
    target_stride_n: "i64",
    target_stride_c: "i64",
    weight_stride: "i64",
    batch: "i32",
    divisor: "fp64",
    boundary_weight: "fp64",
    COMPUTE: tl.constexpr,
    GRAD: tl.constexpr,
    REDUCE: tl.constexpr,
    FORMAT: tl.constexpr,
    DEGREES: tl.constexpr,
    CLOCKWISE: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    AXIS_GRAD: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PACKED: tl.constexpr,  # rows of both sides follow each other
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per-sample loss, or its weighted sum over `divisor`, and the gradient of that to `pred`."""
    NUMBERS: tl.constexpr = (5, 4, 4, 7, 24)[FORMAT]
    V: tl.constexpr = BoxVariant(
        TINY=TINY_64 if COMPUTE == tl.float64 else TINY_32,
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        RESOLUTION=RESOLUTION_64 if COMPUTE == tl.float64 else RESOLUTION_32,
        TIE=TIE_64 if COMPUTE == tl.float64 else TIE_32,
        GRAD=GRAD,
        FORMAT=FORMAT,
        HAS_ANGLE=(True, False, False, True, False)[FORMAT],
        NUMBERS=NUMBERS,
        ROWS=ROWS,
        VECTORS=0 if ROWS * NUMBERS % 4 else ROWS * NUMBERS // 4,
        PACKED=PACKED,
        DEGREES=DEGREES,
        CLOCKWISE=CLOCKWISE,
        AXIS_WEIGHT=AXIS_WEIGHT,
        AXIS_GRAD=AXIS_GRAD,
        BOUNDARY=BOUNDARY,
    )
    pred_source = Source(pred_ptr, pred_stride_b, pred_stride_n, pred_stride_c)
    target_source = Source(target_ptr, target_stride_b, target_stride_n, target_stride_c)
    per_divisor = 1.0 / tl.full((LANES,), divisor, COMPUTE)
    reduced = tl.zeros((LANES,), COMPUTE)
    for block in range(tl.program_id(0), tl.cdiv(batch, LANES * ROWS), tl.num_programs(0)):
        lanes = (block * LANES + tl.arange(0, LANES)).to(tl.int64)
        first = lanes * (ROWS * NUMBERS)
        # Where a box fills vectors, the end of the batch is also that of a vector, which the compiler sees.
        whole = block < batch // (LANES * ROWS)
        if PACKED and V.VECTORS > 0 and NUMBERS % 4 != 0 and whole:
            pred = _load_whole(pred_source, first, V, COMPUTE)
            target = _load_whole(target_source, first, V, COMPUTE)
        else:
            pred = _load(pred_source, first, batch, V, COMPUTE)
            target = _load(target_source, first, batch, V, COMPUTE)
        is_odd = ()
        rest = ()
        if V.HAS_ANGLE:
            angles = ()
            for row in tl.static_range(ROWS):
                own_angle, other_angle = pred[(row + 1) * NUMBERS - 1], target[(row + 1) * NUMBERS - 1]
                if not CLOCKWISE:
                    own_angle, other_angle = minus(own_angle), minus(other_angle)
                angles = angles + (own_angle, other_angle)
            is_odd, rest = _directions(angles, DEGREES)
        gradient = ()
        for row in tl.static_range(ROWS):
            own, other = _one_row(pred, row, V), _one_row(target, row, V)
            if FORMAT == CORNERS3D:
                pair = _corners_row(own, other, V)
            elif V.HAS_ANGLE:
                own_direction = Direction(is_odd[2 * row], rest[2 * row])
                other_direction = Direction(is_odd[2 * row + 1], rest[2 * row + 1])
                pair = _box_row(own, other, own_direction, other_direction, boundary_weight, V)
            else:
                pair = _box_row(own, other, None, None, boundary_weight, V)
            rows = lanes * ROWS + row
            inside = rows < batch
            loss = pair.loss
            factor = pair.factor * per_divisor
            if weight_ptr is not None:
                sample_weight = tl.load(weight_ptr + rows * weight_stride, mask=inside, other=0).to(COMPUTE)
                loss *= sample_weight
                factor *= sample_weight
            if REDUCE:
                reduced += tl.where(inside, loss, 0.0)
            else:
                tl.store(loss_ptr + rows, loss, mask=inside)
            if GRAD:
                for number in tl.static_range(NUMBERS):
                    derivative = pair.gradient[number] * factor
                    if not (V.HAS_ANGLE and number == NUMBERS - 1):
                        derivative *= pair.scale
                    gradient = gradient + (saturate(derivative),)
        if GRAD:
            _store(grad_ptr, first, gradient, batch, whole, V)

    if REDUCE:
        reduce_programs(loss_ptr, partial_ptr, counter_ptr, reduced, divisor, COMPUTE)
