"""The boundary term (section 7): how far the outline of P, read in its order, is from being G up to a shift.

With doubled areas p of P, a of G and v, their mixed area:

    boundary = 1 - f,   f = 2 p a^2 / (v (v^2 + a^2))
    d f / d p = f / p,  d f / d v = -f (3 v^2 + a^2) / (v (v^2 + a^2))

v is the sum over the edges of P of the edge's length times how far G reaches along the edge's outward normal.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, minus, sign
from triton_mgiou.kernels.axis import SHORTEST, project
from triton_mgiou.kernels.slots import dot, highest, total
from triton_mgiou.kernels.types import Area, BoundaryTerm, Point, Reach


@triton.jit
def area(measured):
    """The area of a polygon from the sums over its edges."""
    above = tl.where(measured.starts > 0, measured.highs, 0.0)
    below = tl.where(measured.starts < 0, minus(measured.lows), 0.0)
    return Area(tl.maximum(above, below), sign(measured.starts), measured.squares)


@triton.jit
def reach(axis, direction, shape):
    """How far a polygon reaches along an edge's outward normal, times the edge's length."""
    projections = project(direction * axis.x, direction * axis.y, shape)
    furthest = highest(projections)
    at = ()
    for slot in tl.static_range(len(projections)):
        at = at + ((projections[slot] >= furthest).to(furthest.dtype),)
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
    is_none = is_flat | (term <= RESOLUTION)
    mixed_slope = tl.where(is_none | is_point, 0.0, match * (3.0 * v * v + a * a) * share * per_unit)
    return BoundaryTerm(tl.where(is_none, 0.0, term), mixed_slope, tl.where(is_none, 0.0, minus(per_area) * per_unit))
