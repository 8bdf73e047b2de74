"""Numbers: sign, inverses, exponentials, powers of two, overflow."""

import math
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

LARGEST_32 = tl.constexpr(3.4028234663852886e38)
LARGEST_64 = tl.constexpr(1.7976931348623157e308)

EXPM1 = tl.constexpr(tuple(1 / math.factorial(power) for power in range(1, 15)))  # its series


@triton.jit
def minus(values):
    """-values as the sign of an operand: what Triton makes of `-values` is 0 - values, an instruction."""
    return values * -1.0


@triton.jit
def sign(values):
    """1, 0 or -1."""
    return tl.where(values > 0, 1.0, 0.0) - tl.where(values < 0, 1.0, 0.0)


@triton.jit
def rough_inverse(values):
    """1 / values, for values in 2^-100 to 2^100; exact at 1. In float32 the last two bits may be wrong."""
    if values.dtype == tl.float64:
        return 1.0 / values
    else:
        root = tl.rsqrt(values)
        return root * root


@triton.jit
def inverse(values):
    """The same, right but for rounding: half the instructions of a division that allows for all values."""
    guess = rough_inverse(values)
    if values.dtype == tl.float64:
        return guess
    else:
        return tl.fma(guess, tl.fma(minus(values), guess, 1.0), guess)


@triton.jit
def quotient(dividend, divisor):
    """The quotient, rounded right, for divisors in 2^-100 to 2^100: equal fractions have equal ones."""
    if divisor.dtype == tl.float64 or INTERPRETED:
        return dividend / divisor
    else:
        per_divisor = inverse(divisor)
        guess = dividend * per_divisor
        return tl.fma(tl.fma(minus(guess), divisor, dividend), per_divisor, guess)


@triton.jit
def reciprocal(values):
    """1 / values in one instruction, of which the last bit may be wrong. A power of two times them gives its bits."""
    if values.dtype == tl.float64 or INTERPRETED:
        return 1.0 / values
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def one_minus_exp(values):
    """1 - exp(-values), for values of 0 or above, with its relative accuracy near 0."""
    TERMS: tl.constexpr = 14 if values.dtype == tl.float64 else 8  # below 1/2 the rest is under rounding
    series = tl.full(values.shape, EXPM1[TERMS - 1], values.dtype)
    for step in tl.static_range(TERMS - 1):
        series = tl.fma(minus(values), series, tl.full(values.shape, EXPM1[TERMS - 2 - step], values.dtype))
    return tl.where(values < 0.5, values * series, 1.0 - tl.exp(minus(values)))


@triton.jit
def inverse_power_of_two(values):
    """2^-k for values in [2^k, 2^(k+1)); k stays where both 2^k and 2^-k are normal (section 6)."""
    if values.dtype == tl.float64:
        exponent = (values.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        power = 2046 - tl.minimum(tl.maximum(exponent, 2), 2044)
        return (power << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (values.to(tl.int32, bitcast=True) >> 23) & 0xFF
        power = 254 - tl.minimum(tl.maximum(exponent, 2), 252)
        return (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def saturate(values):
    """Overflow becomes the largest finite number; NaN stays (section 5)."""
    LARGEST: tl.constexpr = LARGEST_64 if values.dtype == tl.float64 else LARGEST_32
    not_less = tl.maximum(values, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(not_less, LARGEST, propagate_nan=tl.PropagateNan.ALL)
