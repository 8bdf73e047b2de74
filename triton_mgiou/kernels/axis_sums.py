"""Sums over the axes of a pair of polygons: what each axis adds to the value, and to the gradient to P."""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus
from triton_mgiou.kernels.axis import (
    UNIFORM,
    add_distance,
    add_gradient,
    axis_weight,
    compare,
    edge_axis,
    near_ends,
    own_interval,
    shares,
    slopes,
    tie,
)
from triton_mgiou.kernels.boundary import reach
from triton_mgiou.kernels.convexity import convexity_along, convexity_gradient, convexity_of
from triton_mgiou.kernels.edges import ends_in_slots, hand_opposite, hand_over, handed_to
from triton_mgiou.kernels.slots import add, dot, over_axes, pick
from triton_mgiou.kernels.types import AxisSums, Gradient, Interval, Point, PredSums


@triton.jit
def pred_axis(sums, edge, sample, VARIANT: tl.constexpr):
    """Add the axes of edges of P."""
    axis = edge_axis(edge, sample.pred_rule.floor)
    weight = axis_weight(axis.length, axis.is_axis, sample.pred_rule.per_unit, VARIANT.AXIS_WEIGHT)
    compared = compare(axis, sample.pred, sample.target, VARIANT.TINY)
    mean = add_distance(sums.mean, compared, weight.value)
    convexity = sums.convexity
    mixed = sums.mixed
    gradient = sums.gradient
    by_edge = sums.by_edge
    by_weight = sums.by_weight
    by_mixed = sums.by_mixed
    ends = ends_in_slots(edge, sample.lane, len(gradient.xs), VARIANT.LANES)
    if VARIANT.CONVEXITY:
        term = convexity_of(
            axis, edge, sample.pred_shape, sample.pred_count, sample.convexity_factor, sample.pred_line, VARIANT.GRAD
        )
        convexity += term.value
        if VARIANT.GRAD:
            bent = convexity_gradient(term)
    if VARIANT.BOUNDARY:
        reached = reach(axis, sample.direction, sample.target_shape, sample.target_slack, VARIANT.AXIS_GRAD)
        mixed += reached.length
        if VARIANT.GRAD:
            by_mixed = hand_opposite(by_mixed, edge, ends, Point(minus(reached.at.y), reached.at.x), VARIANT.AXES)
    if VARIANT.GRAD:
        to_pred, to_target = slopes(compared.pred, compared.target, compared.distance, weight.value * compared.per_hull)
        if VARIANT.UNROLLED:  # a lane has both
            start, end = pick(compared.on_pred, ends.start), pick(compared.on_pred, ends.end)
            edge_ends = Interval(tl.minimum(start, end), tl.maximum(start, end))
        else:
            _, edge_ends = own_interval(axis, edge, sample.pred.origin)
        pred_ends = tie(compared.pred, edge_ends)
        if not VARIANT.AXIS_GRAD:
            near = near_ends(compared.pred, axis, sample.pred_slack)
            pred_ends = Interval(tl.maximum(pred_ends.low, near.low), tl.minimum(pred_ends.high, near.high))
        derivatives = shares(compared.on_pred, pred_ends, to_pred)
        along = Point(tl.zeros_like(axis.length), tl.zeros_like(axis.length))  # derivative to the edge
        if VARIANT.AXIS_GRAD:
            on_target = shares(compared.on_target, compared.target, to_target)
            x = minus(dot(on_target + derivatives, sample.target.ys + sample.pred.ys))
            along = Point(x, dot(on_target + derivatives, sample.target.xs + sample.pred.xs))
        if VARIANT.CONVEXITY:
            along = convexity_along(along, bent, edge, sample.pred_shape)
            derivatives = add(derivatives, bent.shares)
        gradient = add_gradient(gradient, axis, derivatives)
        if VARIANT.AXIS_WEIGHT != UNIFORM and VARIANT.AXIS_GRAD:
            slope = tl.where(axis.is_axis, weight.slope / tl.where(axis.is_axis, axis.length, 1.0), 0.0)
            to_end = Point(slope * axis.edge.x, slope * axis.edge.y)
            along = Point(tl.fma(compared.distance, to_end.x, along.x), tl.fma(compared.distance, to_end.y, along.y))
            by_weight = hand_opposite(by_weight, edge, ends, to_end, VARIANT.AXES)
        if VARIANT.CONVEXITY:
            x = tl.fma(minus(bent.to_start), axis.x, minus(along.x))
            to_start = Point(x, tl.fma(minus(bent.to_start), axis.y, minus(along.y)))
            by_edge = hand_over(by_edge, edge, ends, to_start, along, VARIANT.AXES)
        elif VARIANT.AXIS_GRAD:
            by_edge = hand_opposite(by_edge, edge, ends, along, VARIANT.AXES)
    return PredSums(mean, convexity, mixed, gradient, by_edge, by_weight, by_mixed)


@triton.jit
def target_axis(sums, edge, sample, VARIANT: tl.constexpr):
    """Add the axes of edges of G."""
    axis = edge_axis(edge, sample.target_rule.floor)
    weight = axis_weight(axis.length, axis.is_axis, sample.target_rule.per_unit, VARIANT.AXIS_WEIGHT)
    compared = compare(axis, sample.pred, sample.target, VARIANT.TINY)
    mean = add_distance(sums.mean, compared, weight.value)
    gradient = sums.gradient
    if VARIANT.GRAD:
        to_pred, _ = slopes(compared.pred, compared.target, compared.distance, weight.value * compared.per_hull)
        pred_ends = compared.pred
        if not VARIANT.AXIS_GRAD:
            pred_ends = near_ends(pred_ends, axis, sample.pred_slack)
        gradient = add_gradient(gradient, axis, shares(compared.on_pred, pred_ends, to_pred))
    reach = sums.reach
    if VARIANT.BOUNDARY:
        reach += tl.where(sample.target_direction > 0, compared.target.high, minus(compared.target.low))
    return AxisSums(mean, gradient, reach)


@triton.jit
def gradient_of(vertices, lane, gradient, sums, area_gradient, factors, VARIANT: tl.constexpr):
    """The gradient of the vertices, in the units of `gradient`, the part through projections."""
    xs = ()
    ys = ()
    for slot in tl.static_range(len(gradient.xs)):
        is_last = slot * VARIANT.LANES + lane == vertices.last
        x = gradient.xs[slot]
        y = gradient.ys[slot]
        if VARIANT.AXIS_GRAD or VARIANT.CONVEXITY:
            handed = handed_to(sums.by_edge, slot, is_last, VARIANT.AXES)
            x += handed.x
            y += handed.y
        if VARIANT.BOUNDARY:
            mixed = handed_to(sums.by_mixed, slot, is_last, VARIANT.AXES)
            x = tl.fma(factors.by_mixed, mixed.x, tl.fma(factors.by_area, area_gradient.xs[slot], x))
            y = tl.fma(factors.by_mixed, mixed.y, tl.fma(factors.by_area, area_gradient.ys[slot], y))
        if VARIANT.AXIS_GRAD and VARIANT.AXIS_WEIGHT != UNIFORM:
            handed = handed_to(sums.by_weight, slot, is_last, VARIANT.AXES)
            x = tl.fma(minus(factors.mean), handed.x, x)
            y = tl.fma(minus(factors.mean), handed.y, y)
        xs = xs + (over_axes(x),)
        ys = ys + (over_axes(y),)
    return Gradient(xs, ys)
