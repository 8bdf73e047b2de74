"""The boundary term (section 7): how far the outline of P, read in its order, is from being G up to a shift.

With doubled areas p of P, a of G and v, their mixed area:

    boundary = 1 - f,   f = 2 p a^2 / (v (v^2 + a^2))
    d f / d p = f / p,  d f / d v = -f (3 v^2 + a^2) / (v (v^2 + a^2))

v is the sum over the edges of P of the edge's length times how far G reaches along the edge's outward normal, and a is
the area with the vertices of G sorted by their angle about their mean.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, minus, quotient, sign
from triton_mgiou.kernels.axis import SHORTEST, near_ends, project
from triton_mgiou.kernels.slots import dot, highest, lowest, over_axes, total
from triton_mgiou.kernels.types import Addresses, Area, BoundaryTerm, Interval, Point, Reach
from triton_mgiou.kernels.vertices import (
    addresses_of,
    flags_of,
    is_real,
    load_last,
    load_scaled,
    next_addresses,
    next_flags,
)


@triton.jit
def area(measured):
    """The area of a polygon from the sums over its edges."""
    above = tl.where(measured.starts > 0, measured.highs, 0.0)
    below = tl.where(measured.starts < 0, minus(measured.lows), 0.0)
    return Area(tl.maximum(above, below), sign(measured.starts), measured.squares)


@triton.jit
def put_in_order(
    area, reach, length, frame, source, vertices, lanes, REAL: tl.constexpr, RESOLUTION: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """The area of G in whatever order its vertices are.

    A polygon that is convex in its order reaches along each edge's outward normal no further than the edge, and goes
    around once: its edges are no longer than the sides of its bounding box, and twice around at least 1.4 times as
    long. Only where a sample of the program is another one are the vertices sorted.
    """
    rounding = tl.full((1, 1, 1), RESOLUTION, frame.extent.dtype) * frame.extent * length
    doubled = area.doubled + tl.zeros_like(rounding)
    other = reach - doubled > rounding
    if len(vertices.xs) * VARIANT.LANES > 4:  # twice around takes six vertices
        other |= length > 1.2 * frame.target_around
    # In all lanes, since then the compiler sees that a warp takes the branch as a whole: what it makes of shuffles
    # where it does not see that is twice the code, and slower.
    everywhere = other.to(tl.int32) + tl.zeros((1, VARIANT.AXES, VARIANT.LANES), tl.int32)
    if tl.max(everywhere) > 0:
        ordered = _area_in_order(source, vertices, lanes, frame.scale, REAL, VARIANT)
        doubled = tl.where(other & (tl.abs(ordered - doubled) > rounding), ordered, doubled)
    return Area(doubled, area.direction, area.squares)


@triton.jit
def _area_in_order(source, vertices, lanes, scale, REAL: tl.constexpr, VARIANT: tl.constexpr):
    """Twice the area with the vertices sorted by their angle about their mean; those at one angle count as their mean.

    Vertices are loaded again each time: the few that need this pay for it, and no register is kept for it.
    """
    origin = load_last(source, vertices, scale)
    x = scale * tl.zeros(lanes.lane.shape, scale.dtype)
    y = x
    at = _address(source, lanes.lane, REAL)
    for first in range(0, source.size, VARIANT.LANES):
        vertex, _ = _vertex(source, at, vertices, first + lanes.lane, lanes, origin, scale, REAL, VARIANT)
        x += vertex.x
        y += vertex.y
        at = _further(source, at, VARIANT.LANES, REAL)
    number = tl.maximum(vertices.count.to(scale.dtype), 1.0)
    origin = Point(origin.x + quotient(total((x,)), number), origin.y + quotient(total((y,)), number))
    doubled = tl.zeros_like(scale)
    here_at = _address(source, lanes.axis, REAL)
    for k in range(0, source.size, VARIANT.AXES):
        here, real = _vertex(source, here_at, vertices, k + lanes.axis, lanes, origin, scale, REAL, VARIANT)
        here_at = _further(source, here_at, VARIANT.AXES, REAL)
        turn = _turn(here)
        nearest = scale * 0.0 + tl.full(lanes.lane.shape, float("inf"), scale.dtype)
        x = tl.zeros_like(nearest)
        y = x
        held = x
        copies = x
        at = _address(source, lanes.lane, REAL)
        for first in range(0, source.size, VARIANT.LANES):
            other, counts = _vertex(source, at, vertices, first + lanes.lane, lanes, origin, scale, REAL, VARIANT)
            at = _further(source, at, VARIANT.LANES, REAL)
            to_other = _turn(other)
            copies += tl.where(counts & (to_other == turn), 1.0, 0.0)
            to_other = tl.where(to_other > turn, to_other, to_other + 4.0)
            is_next = counts & (to_other <= nearest)
            kept = tl.where(to_other < nearest, 0.0, 1.0)
            nearest = tl.where(is_next, to_other, nearest)
            x = tl.where(is_next, tl.fma(kept, x, other.x), x)
            y = tl.where(is_next, tl.fma(kept, y, other.y), y)
            held = tl.where(is_next, tl.fma(kept, held, 1.0), held)
        following = (nearest == lowest((nearest,))).to(scale.dtype)
        cross = tl.fma(here.x, dot((following,), (y,)), minus(here.y * dot((following,), (x,))))
        held = dot((following,), (held,))
        doubled += tl.where(real, cross / (held * tl.maximum(total((copies,)), 1.0)), 0.0)
    return over_axes(doubled)


@triton.jit
def _address(source, index, REAL: tl.constexpr):
    return Addresses((addresses_of(source, index),), (flags_of(source, index, REAL),))


@triton.jit
def _further(source, addresses, count: tl.constexpr, REAL: tl.constexpr):
    """The addresses `count` vertices further on."""
    return Addresses(
        (next_addresses(source, addresses.vertices[0], count),), (next_flags(source, addresses.flags[0], count, REAL),)
    )


@triton.jit
def _vertex(
    source, addresses, vertices, index, lanes, origin, scale, REAL: tl.constexpr, VARIANT: tl.constexpr
):  # fmt: skip
    """Vertices number `index` relative to a point, 0 where they are not real, and whether they are."""
    if VARIANT.AXES == 1:  # in large batches those that a loop carries make the kernel 2 % slower
        addresses = _address(source, index, REAL)
    real = is_real(source, addresses.flags[0], index, vertices.count, lanes.inside, REAL)
    vertex = load_scaled(source, addresses.vertices[0], real, scale)
    return Point(tl.where(real, vertex.x - origin.x, 0.0), tl.where(real, vertex.y - origin.y, 0.0)), real


@triton.jit
def _turn(vector):
    """A number that grows with the angle of a vector, from -2 to 2, as in the reference."""
    size = tl.abs(vector.x) + tl.abs(vector.y)
    turn = 1.0 - quotient(vector.x, tl.where(size > 0, size, 1.0))
    return tl.where(vector.y < 0, minus(turn), turn)


@triton.jit
def reach(axis, direction, shape, slack, AXIS_GRAD: tl.constexpr):
    """How far a polygon reaches along an edge's outward normal, times the edge's length."""
    projections = project(direction * axis.x, direction * axis.y, shape)
    furthest = highest(projections)
    least = furthest
    if not AXIS_GRAD:
        least = near_ends(Interval(furthest, furthest), axis, slack).high
    at = ()
    for slot in tl.static_range(len(projections)):
        at = at + ((projections[slot] >= least).to(furthest.dtype),)
    share = inverse(total(at))
    return Reach(furthest, Point(dot(at, shape.xs) * share, dot(at, shape.ys) * share))


@triton.jit
def boundary_term(mixed, pred, target, TINY: tl.constexpr, RESOLUTION: tl.constexpr):
    """The term of a sample, in units of the larger of v and a.

    Where G has no area, or the term is rounding only, it and its derivatives are 0.
    """
    is_flat = target.doubled <= tl.maximum(TINY, target.squares * tl.full(mixed.shape, SHORTEST, mixed.dtype))
    unit = tl.where(is_flat, 1.0, tl.maximum(mixed, target.doubled))
    per_unit = 1.0 / unit
    v = mixed * per_unit
    a = target.doubled * per_unit
    is_point = v <= TINY
    share = 1.0 / tl.where(is_flat | is_point, 1.0, v * (v * v + a * a))
    per_area = tl.where(is_point, 0.0, 2.0 * a * a * share)
    match = per_area * (pred.doubled * per_unit)
    term = 1.0 - match
    rounding = RESOLUTION * tl.maximum(1.0, target.squares * per_unit * 0.5)  # areas of thin polygons round more
    is_none = is_flat | (term <= rounding)
    mixed_slope = tl.where(is_none | is_point, 0.0, match * (3.0 * v * v + a * a) * share * per_unit)
    return BoundaryTerm(tl.where(is_none, 0.0, term), mixed_slope, tl.where(is_none, 0.0, minus(per_area) * per_unit))
