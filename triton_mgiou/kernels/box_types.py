"""What the functions of the kernel of boxes hand to each other. Tiles are (LANES,): a lane has all of a box."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton.language as tl

from triton_mgiou.box_formats import KERNEL_FORMATS
from triton_mgiou.options import RESOLUTION, TIE, TINY

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

# A pair is plain if its sizes are above the first times the sum of its numbers, and above the second, and if that sum
# over the third and the sum of its angles over the fourth are below 1 together; a batch, if its divisor is above the
# last and the weight of its term below the third.
PLAIN_RATIO = tl.constexpr(1e-5)
PLAIN_SIZE = tl.constexpr(2.0**-40)
PLAIN_NUMBER = tl.constexpr(2.0**40)
PLAIN_ANGLE = tl.constexpr(2.0**22)
PLAIN_DIVISOR = tl.constexpr(2.0**-40)


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
    LANES: int
    PACKED: bool  # whether rows of both sides follow each other
    DEGREES: bool
    CLOCKWISE: bool
    AXIS_WEIGHT: int
    AXIS_GRAD: bool
    BOUNDARY: bool


class BoxSource(NamedTuple):
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
    pred_size: tl.tensor  # with their signs
    target_size: tl.tensor
    pred: tl.tensor  # half-sizes
    target: tl.tensor


class Sides(NamedTuple):
    """Two boxes along every direction of the coordinates; in the plane z is x."""

    x: Side
    y: Side
    z: Side


class Turns(NamedTuple):
    """How the boxes are turned."""

    between: Turn  # P against G
    target: Turn  # G against the coordinates


class Crossing(NamedTuple):
    """What each box is on the directions of the other: p1, p2 are those of P, and g1, g2 those of G."""

    p1: tl.tensor  # the offset along a direction
    p2: tl.tensor
    g1: tl.tensor
    g2: tl.tensor
    g_on_p1: tl.tensor  # half-lengths
    g_on_p2: tl.tensor
    p_on_g1: tl.tensor
    p_on_g2: tl.tensor


class Slopes(NamedTuple):
    """Derivatives of w_k D_k, halved."""

    offset: tl.tensor
    pred: tl.tensor  # to P's half-length
    target: tl.tensor


class Distance(NamedTuple):
    """D_k of an axis."""

    value: tl.tensor
    slopes: Slopes


class Distances(NamedTuple):
    """The distances on the directions of both boxes in their plane."""

    p1: Distance
    p2: Distance
    g1: Distance
    g2: Distance


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


class AxisWeights(NamedTuple):
    """The weights of the axes."""

    pred: Weights
    target: Weights


class BoundarySlopes(NamedTuple):
    """Derivatives of the boundary term times its weight and the sum of the weights, halved."""

    mixed: tl.tensor
    area: tl.tensor  # of P


class Row(NamedTuple):
    """The loss of one pair, and its derivatives to the numbers of P before they are multiplied by `factor`."""

    loss: tl.tensor
    factor: tl.tensor  # NaN where a number is NaN or Inf
    scale: tl.tensor  # one more factor for all but angles; 1 for what is plain
    gradient: tuple[tl.tensor, ...]  # twice that to sizes, and to all numbers of XYXY
