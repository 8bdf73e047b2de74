"""The convexity term (section 7): 0 for a convex polygon in order, above 0 for a dent or a crossing.

For each edge of P the vertices on either side of its line count with their distances from it, and the smaller sum
is the edge's term.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, sign
from triton_mgiou.kernels.axis import own_interval, project, shares, tie
from triton_mgiou.kernels.slots import add, dot, highest, lowest, total
from triton_mgiou.kernels.types import Convexity, ConvexityGradient, Interval, Point


@triton.jit
def convexity_of(axis, edge, shape, count, factor, line, GRAD: tl.constexpr):
    """`factor` times the term of one edge of P, which has `count` vertices."""
    _, edge_ends = own_interval(axis, edge, shape.origin)
    projections = project(axis.x, axis.y, shape)
    ends = Interval(lowest(projections), highest(projections))
    factor = tl.where(axis.is_axis, factor, 0.0)
    above = ()
    below = ()
    for slot in tl.static_range(len(projections)):  # the edge's two ends are on neither side
        above = above + (tl.maximum(projections[slot] - edge_ends.high, 0.0),)
        below = below + (tl.maximum(edge_ends.low - projections[slot], 0.0),)
    sum_above = total(above)
    sum_below = total(below)
    width = ends.high - ends.low
    wide = width > line
    inverse = tl.where(wide, 1.0 / (tl.where(wide, width, 1.0) * count.to(width.dtype)), 0.0) * factor
    value = tl.minimum(sum_above, sum_below) * inverse
    sides = ()
    if GRAD:
        is_above = 0.5 + 0.5 * sign(sum_below - sum_above)  # the smaller side counts; 1/2 at a tie
        above_wins = inverse * is_above
        below_wins = inverse * (1.0 - is_above)
        for slot in tl.static_range(len(projections)):
            side = tl.where(above[slot] > 0, above_wins, 0.0) - tl.where(below[slot] > 0, below_wins, 0.0)
            sides = sides + (side,)
    width_slope = tl.where(wide, value / tl.where(wide, width, 1.0), 0.0)
    return Convexity(value, projections, ends, edge_ends, sides, width_slope)


@triton.jit
def convexity_gradient(convexity):
    """Its derivatives, those to P's interval included."""
    ends = tie(convexity.ends, convexity.edge_ends)
    to_start = total(convexity.sides)
    width_slopes = Interval(convexity.width_slope, minus(convexity.width_slope))
    return ConvexityGradient(add(convexity.sides, shares(convexity.projections, ends, width_slopes)), to_start)


@triton.jit
def convexity_along(along, gradient, edge, shape):
    """`along`, the derivative to an edge, with that of its convexity."""
    x = along.x - tl.fma(minus(gradient.to_start), edge.start.y - shape.origin.y, dot(gradient.shares, shape.ys))
    y = along.y + tl.fma(minus(gradient.to_start), edge.start.x - shape.origin.x, dot(gradient.shares, shape.xs))
    return Point(x, y)
