"""A row or column of boxes, and what each has by itself: for the kernels of all pairs.

A box that is turned by more than an eighth of a turn is named by its other side: then two directions differ by up to
a quarter turn, and sine and cosine of the difference are two short series. It is a difference of angles, so that it is
exactly 0 for equal boxes.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.box_formats import FORMATS, KERNEL_FORMATS
from triton_mgiou.kernels.arithmetic import inverse_power_of_two, minus
from triton_mgiou.kernels.box_angles import (
    QUARTER_32,
    QUARTER_64,
    QUARTER_REST_32,
    QUARTER_REST_64,
    direction_of_angle,
    quarters,
    turn_of,
)
from triton_mgiou.kernels.box_types import XYXY, Direction

NUMBERS = tl.constexpr(tuple(math.prod(FORMATS[fmt].shape) for fmt in KERNEL_FORMATS))
HAS_ANGLE = tl.constexpr(tuple(FORMATS[fmt].has_angle for fmt in KERNEL_FORMATS))
IS_IN_SPACE = tl.constexpr(tuple(FORMATS[fmt].in_space for fmt in KERNEL_FORMATS))

# sin x = x + x^3 (...) for x up to a quarter turn: relative error 6e-9, and exactly 1 there.
SINE = tl.constexpr((2.605780491878705e-06, -0.0001980960284001521, 0.008333066245301491, -0.1666665955040033))


class PairVariant(NamedTuple):
    """What is decided at compile time."""

    NO_LENGTH: float  # the longest length that counts as 0
    TIE: float
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
def cos_sin(turn, DEGREES: tl.constexpr):
    """|Cosine| and |sine| of up to a quarter turn, but for rounding; exact at 0 and at a quarter."""
    IS_64: tl.constexpr = turn.dtype == tl.float64
    turn = tl.abs(turn)
    if DEGREES:
        rest = (90.0 - turn) * tl.full(turn.shape, math.pi / 180, turn.dtype)
        turn = turn * tl.full(turn.shape, math.pi / 180, turn.dtype)
    else:
        QUARTER: tl.constexpr = QUARTER_64 if IS_64 else QUARTER_32
        QUARTER_REST: tl.constexpr = QUARTER_REST_64 if IS_64 else QUARTER_REST_32
        rest = tl.full(turn.shape, QUARTER, turn.dtype) - turn + tl.full(turn.shape, QUARTER_REST, turn.dtype)
    return tl.abs(_sine(rest)), _sine(turn)  # the difference of two angles may round to more than a quarter


@triton.jit
def load_boxes(ptr, index, stride_n, stride_c, NUMBERS: tl.constexpr, PACKED: tl.constexpr, COMPUTE: tl.constexpr):
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
def is_there(mask_ptr, index, stride):
    """Whether boxes number `index` are there."""
    return tl.load(mask_ptr + index.to(tl.int64) * stride) != 0


@triton.jit
def poison_of(numbers):
    """0, or NaN where a number is NaN or Inf."""
    zero = numbers[0] * 0.0
    for number in tl.static_range(len(numbers)):
        zero = tl.fma(numbers[number], 0.0, zero)
    return zero


@triton.jit
def largest_number(numbers, V: tl.constexpr):
    """Of each box, its angle apart."""
    LINEAR: tl.constexpr = 6 if V.IN_SPACE else 4
    largest = tl.abs(numbers[0])
    for number in tl.static_range(LINEAR):
        largest = tl.maximum(largest, tl.abs(numbers[number]))
    return largest


@triton.jit
def size_of_numbers(numbers, V: tl.constexpr):
    """The sum of the absolute values, the angle apart: not finite where one of them is not."""
    LINEAR: tl.constexpr = 6 if V.IN_SPACE else 4
    total = tl.abs(numbers[0])
    for number in tl.static_range(1, LINEAR):
        total += tl.abs(numbers[number])
    return total


@triton.jit
def scale_of(numbers, V: tl.constexpr):
    """By the largest number."""
    down = inverse_power_of_two(largest_number(numbers, V))
    return Scale(down, 1.0 / down)


@triton.jit
def scaled_numbers(numbers, scale, V: tl.constexpr):
    """All but the angle."""
    LINEAR: tl.constexpr = 6 if V.IN_SPACE else 4
    new = ()
    for number in tl.static_range(len(numbers)):
        new = new + (numbers[number] * scale if number < LINEAR else numbers[number],)
    return new


@triton.jit
def sizes_of(numbers, V: tl.constexpr):
    """With their signs; the third is the first again in the plane."""
    if V.FORMAT == XYXY:
        return numbers[2] - numbers[0], numbers[3] - numbers[1], numbers[2] - numbers[0]
    elif V.IN_SPACE:
        return numbers[3], numbers[4], numbers[5]
    else:
        return numbers[2], numbers[3], numbers[2]


@triton.jit
def boxes_of(numbers, direction, V: tl.constexpr):
    """Boxes by their numbers, and by their directions if they have an angle."""
    width, height, depth = sizes_of(numbers, V)
    a, b, c = 0.5 * tl.abs(width), 0.5 * tl.abs(height), 0.5 * tl.abs(depth)
    cos, sin = a, a
    if V.TURNS:
        a, b = tl.where(direction.is_odd, b, a), tl.where(direction.is_odd, a, b)
        cos, sin = turn_of(Direction(tl.zeros_like(direction.is_odd), direction.rest), V.DEGREES)
    return Boxes(numbers[0], numbers[1], numbers[2], numbers[2], numbers[3], a, b, c, direction.rest, cos, sin)


@triton.jit
def named(boxes):
    """`boxes` out of a tuple, in which Triton 3.6 forgets the names of their fields."""
    return Boxes(
        boxes[0], boxes[1], boxes[2], boxes[3], boxes[4], boxes[5], boxes[6], boxes[7], boxes[8], boxes[9], boxes[10]
    )


@triton.jit
def plain_direction(numbers, V: tl.constexpr):
    """Whether a box is named by its other side, and the angle of its direction; unless that is huge."""
    if V.TURNS:
        return quarters(_clockwise(numbers, V), V.DEGREES)
    else:
        return Direction(numbers[0] > 0, numbers[0])


@triton.jit
def direction_of(numbers, V: tl.constexpr):
    """The same for any angle."""
    if V.TURNS:
        return direction_of_angle(_clockwise(numbers, V), True, V.DEGREES)
    else:
        return Direction(numbers[0] > 0, numbers[0])


@triton.jit
def _clockwise(numbers, V: tl.constexpr):
    angle = numbers[len(numbers) - 1]
    return angle if V.CLOCKWISE else minus(angle)


@triton.jit
def rescaled_boxes(boxes, scale):
    """By another power of two."""
    return Boxes(
        boxes.x * scale, boxes.y * scale, boxes.z * scale, boxes.right * scale, boxes.bottom * scale,
        boxes.a * scale, boxes.b * scale, boxes.c * scale, boxes.angle, boxes.cos, boxes.sin,
    )  # fmt: skip
