"""Angles of boxes: their quarter turns, and cosine and sine of what is left.

Half a turn of a box changes nothing, so angles are known up to that. Quarter turns are taken away from each angle by
itself, without loss, however large it is.
"""

import math

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus
from triton_mgiou.kernels.box_types import Direction, Turn

# Sine after x and cosine after 1, up to an eighth of a turn: the polynomials of the least largest error, 1.8e-9 and
# 3.3e-8, which is that of series with one more term; and the series.
SINE_32 = tl.constexpr((-0.166666505734, 0.008331973264, -0.0001949495))
COSINE_32 = tl.constexpr((-0.499998941513, 0.041656253277, -0.001359724598))
SINE_64 = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9)))
COSINE_64 = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k) for k in range(1, 9)))

# A quarter turn in radians as a sum of two numbers of each type.
QUARTER_32 = tl.constexpr(1.57079637050628662109375)
QUARTER_REST_32 = tl.constexpr(-4.37113900018624283e-8)
QUARTER_64 = tl.constexpr(1.5707963267948966)
QUARTER_REST_64 = tl.constexpr(6.123233995736766e-17)


def _quarters_in_a_radian(words):
    """2 / pi in words of 64 bits, the first in front of the point; by Machin's formula."""
    unit = 1 << (64 * words + 64)

    def arctangent_of_inverse(number):
        total, power, k = 0, unit // number, 0
        while power:
            total += (-1) ** k * power // (2 * k + 1)
            power //= number * number
            k += 1
        return total

    pi = 4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239))
    bits = 2 * unit * unit // pi >> 64 + 64
    return tuple(bits >> 64 * (words - 1 - i) & 0xFFFFFFFFFFFFFFFF for i in range(words))


# As many as the largest number of each type needs.
WORDS_32 = tl.constexpr(5)
WORDS_64 = tl.constexpr(19)
QUARTERS_IN_A_RADIAN = tl.constexpr(_quarters_in_a_radian(19))


@triton.jit
def quarters(angle, DEGREES: tl.constexpr):
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
def _words(index, WORDS: tl.constexpr):
    """Three words of 2 / pi, from one of them on."""
    none = tl.zeros_like(index).to(tl.uint64)
    first, second, third = none, none, none
    for place in tl.static_range(WORDS - 2):
        is_here = index == place
        first = tl.where(is_here, QUARTERS_IN_A_RADIAN[place], first)
        second = tl.where(is_here, QUARTERS_IN_A_RADIAN[place + 1], second)
        third = tl.where(is_here, QUARTERS_IN_A_RADIAN[place + 2], third)
    return first, second, third


@triton.jit
def _shifted(first, second, shift):
    """The first word of two that are moved up by `shift` bits."""
    return (first << shift) | ((second >> 1) >> (63 - shift))


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
        found = quarters(rest.to(tl.int32).to(angle.dtype), True)
    else:
        start = tl.maximum(exponent + 63, 0)
        first, second, third = _words(start >> 6, WORDS_64 if IS_64 else WORDS_32)
        shift = (start & 63).to(tl.uint64)
        turned = integer * _shifted(first, second, shift)  # half turns, in units of 2^-64, without the whole ones
        if IS_64:
            turned += tl.umulhi(integer, _shifted(second, third, shift))
        is_odd = ((turned + (1 << 62)) >> 63) != 0
        rest = (turned - tl.where(is_odd, 1 << 63, 0).to(tl.uint64)).to(tl.int64, bitcast=True).to(angle.dtype)
        found = Direction(is_odd, rest * tl.full(angle.shape, math.pi / 2 * 2.0**-63, angle.dtype))
    return Direction(found.is_odd, tl.where(angle < 0, minus(found.rest), found.rest))


@triton.jit
def direction_of_angle(angle, MAY_BE_HUGE: tl.constexpr, DEGREES: tl.constexpr):
    """The direction of a box. Only a program that has a huge angle takes the long way."""
    IS_64: tl.constexpr = angle.dtype == tl.float64
    if DEGREES:
        HUGE: tl.constexpr = 2.0**56 if IS_64 else 2.0**26
    else:
        HUGE: tl.constexpr = 2.0**50 if IS_64 else 2.0**22
    is_odd, rest = quarters(angle, DEGREES)
    if MAY_BE_HUGE:
        is_huge = tl.abs(angle) >= HUGE  # False for NaN, which a maximum would have to pass over
        if tl.max(is_huge.to(tl.int32)) > 0:
            far = _far_quarters(angle, DEGREES)
            is_odd = tl.where(is_huge, far.is_odd, is_odd)
            rest = tl.where(is_huge, far.rest, rest)
    return Direction(is_odd, rest)


@triton.jit
def turn_of(direction, DEGREES: tl.constexpr):
    """Cosine and sine by polynomials; exactly 0 and 1 at quarter turns."""
    IS_64: tl.constexpr = direction.rest.dtype == tl.float64
    SINE: tl.constexpr = SINE_64 if IS_64 else SINE_32
    COSINE: tl.constexpr = COSINE_64 if IS_64 else COSINE_32
    TERMS: tl.constexpr = 8 if IS_64 else 3
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
