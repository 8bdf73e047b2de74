"""The loss and the gradient of one pair of boxes in closed form, in the plane or in space (section 10).

    loss = sum_k w_k D_k / sum_k w_k + boundary_weight * boundary

With d = angle of P - angle of G, c = |cos d| and z = |sin d|, a box of half-sizes w, h has the half-lengths w c + h z
and w z + h c on the other one's directions. P's directions are p1 and p2, G's are g1 and g2; z is the same for both.
"""

import math

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, inverse_power_of_two, minus, reciprocal
from triton_mgiou.kernels.axis import LENGTH, SHORTEST, UNIFORM
from triton_mgiou.kernels.box_angles import direction_of_angle, quarters, turn_of
from triton_mgiou.kernels.box_axes import (
    above_zero,
    add,
    distance,
    edge_weights,
    half_length,
    reach,
    side_of,
    times_sign,
    weighted,
)
from triton_mgiou.kernels.box_types import (
    CXCYCZLWHR,
    CXCYWH,
    CXCYWHR,
    PLAIN_ANGLE,
    PLAIN_NUMBER,
    PLAIN_RATIO,
    PLAIN_SIZE,
    XYXY,
    AxisWeights,
    BoundarySlopes,
    Crossing,
    Direction,
    Distances,
    Row,
    Sides,
    Turn,
    Turns,
    Weights,
)

# Of the areas of the term: its square is finite, and one more is nothing to it. What is plain stays below.
LARGEST_RATIO = tl.constexpr(2.0**60)


@triton.jit
def is_plain(pred, target, V: tl.constexpr):
    """Whether nothing of a pair needs care: all is finite, no edge is too short for an axis, nothing leaves its range.

    `box_row` takes half the instructions for such a pair, and gives the same bits.
    """
    COORDINATES: tl.constexpr = 3 if V.FORMAT == CXCYCZLWHR else 2
    total = tl.abs(pred[0]) + tl.abs(target[0])
    for place in tl.static_range(COORDINATES):
        if place > 0:
            total += tl.abs(pred[place]) + tl.abs(target[place])
        pred_size, target_size = pred[place + COORDINATES], target[place + COORDINATES]
        total += tl.abs(pred_size) + tl.abs(target_size)
        if V.FORMAT == XYXY:
            pred_size, target_size = pred_size - pred[place], target_size - target[place]
        smaller = tl.minimum(tl.abs(pred_size), tl.abs(target_size))
        least = smaller if place == 0 else tl.minimum(least, smaller)
    ratio, size = tl.full(total.shape, PLAIN_RATIO, total.dtype), tl.full(total.shape, PLAIN_SIZE, total.dtype)
    has_axes = least > tl.fma(total, ratio, size)
    if V.HAS_ANGLE:
        angles = tl.abs(pred[2 * COORDINATES]) + tl.abs(target[2 * COORDINATES])
        total = tl.fma(angles, tl.full(total.shape, PLAIN_NUMBER / PLAIN_ANGLE, total.dtype), total)
    return has_axes & (total < PLAIN_NUMBER)  # both False where a number is NaN


@triton.jit
def box_row(pred, target, boundary_weight, PLAIN: tl.constexpr, V: tl.constexpr):
    """One pair of boxes by their numbers."""
    AXES: tl.constexpr = 6.0 if V.FORMAT == CXCYCZLWHR else 4.0
    none = tl.zeros_like(pred[0])
    scale = none + 1.0
    poison = none
    if not PLAIN:
        scale, poison = _scale(pred, target, V)
    x, y = side_of(pred, target, scale, 0, PLAIN, V), side_of(pred, target, scale, 1, PLAIN, V)
    z = x
    if V.FORMAT == CXCYCZLWHR:
        z = side_of(pred, target, scale, 2, PLAIN, V)
    sides = Sides(x, y, z)
    turns = _turns(pred, target, sides, PLAIN, V)
    crossing = _crossing(sides, turns, V)
    if PLAIN:
        one = none + 1.0
        each = Weights(one, one, one, none, none)
        weights = AxisWeights(each, each)
    else:
        weights = _weights(sides, _extent(sides, turns, crossing, V), V)

    distances = _distances(sides, crossing, weights, PLAIN, V)
    on_p = add(weighted(distances.p1, weights.pred.x), distances.p2, weights.pred.y)
    on_g = add(weighted(distances.g1, weights.target.x), distances.g2, weights.target.y)
    on_z = distances.p1
    if V.FORMAT == CXCYCZLWHR:
        on_z = distance(z.offset, z.pred, z.target, weights.pred.z + weights.target.z, PLAIN, V)
        on_p = add(on_p, on_z, weights.pred.z + weights.target.z)
    weight = on_p.weight + on_g.weight
    total = on_p.distance + on_g.distance
    factor = none + 1.0 / AXES
    if not PLAIN:
        weight = tl.where(weight > 0, weight, 1.0)
        factor = tl.where(weight == AXES, 1.0 / AXES, inverse(weight)) + poison
    loss = total * factor
    if not PLAIN:  # lengths of 0 on every axis: all distances are 1, but for the reciprocals' last bit
        loss = tl.minimum(loss, 1.0, propagate_nan=tl.PropagateNan.ALL)
    boundary = BoundarySlopes(none, none)
    if V.BOUNDARY:
        term, factor_of_term, boundary = _boundary(sides, crossing, weight, boundary_weight, PLAIN, V)
        loss = tl.fma(term, factor_of_term, loss)
    gradient = ()
    if V.GRAD:
        # Of the axes that the weights are shares of: with LENGTH those of P, whose weights add up to one.
        mean = on_p.distance if V.AXIS_WEIGHT == LENGTH else total * factor
        gradient = _gradient(sides, turns, crossing, distances, on_z.slopes, weights.pred, mean, boundary, PLAIN, V)
    return Row(loss, 2.0 * factor, scale, gradient)


@triton.jit
def _scale(pred, target, V: tl.constexpr):
    """The power of two that brings the largest number near 1, and 0; both NaN where a number is NaN or Inf."""
    LINEAR: tl.constexpr = 6 if V.FORMAT == CXCYCZLWHR else 4
    largest = tl.abs(pred[0])
    for place in tl.static_range(LINEAR):
        largest = tl.maximum(largest, tl.abs(pred[place]), propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(largest, tl.abs(target[place]), propagate_nan=tl.PropagateNan.ALL)
    poison = largest * 0.0
    if V.HAS_ANGLE:
        poison = tl.fma(pred[LINEAR], 0.0, tl.fma(target[LINEAR], 0.0, poison))
    return inverse_power_of_two(largest) + poison, poison


@triton.jit
def _turns(pred, target, sides, PLAIN: tl.constexpr, V: tl.constexpr):
    """How the boxes are turned; nothing that is used where they have no angle."""
    if V.HAS_ANGLE:
        pred_angle, target_angle = pred[V.NUMBERS - 1], target[V.NUMBERS - 1]
        if not V.CLOCKWISE:
            pred_angle, target_angle = minus(pred_angle), minus(target_angle)
        of_pred = direction_of_angle(pred_angle, not PLAIN, V.DEGREES)
        of_target = direction_of_angle(target_angle, not PLAIN, V.DEGREES)
        between = quarters(of_pred.rest - of_target.rest, V.DEGREES)
        is_odd = between.is_odd ^ of_pred.is_odd ^ of_target.is_odd
        turn = turn_of(Direction(is_odd, between.rest), V.DEGREES)
        return Turns(turn, turn_of(of_target, V.DEGREES))
    else:
        turn = Turn(sides.x.offset, sides.y.offset)
        return Turns(turn, turn)


@triton.jit
def _crossing(sides, turns, V: tl.constexpr):
    x, y, _ = sides
    if V.HAS_ANGLE:
        turn, target = turns
        g1 = tl.fma(target.cos, x.offset, target.sin * y.offset)
        g2 = tl.fma(target.cos, y.offset, minus(target.sin) * x.offset)
        return Crossing(
            p1=tl.fma(turn.cos, g1, turn.sin * g2),
            p2=tl.fma(turn.cos, g2, minus(turn.sin) * g1),
            g1=g1,
            g2=g2,
            g_on_p1=half_length(x.target, y.target, turn),
            g_on_p2=half_length(y.target, x.target, turn),
            p_on_g1=half_length(x.pred, y.pred, turn),
            p_on_g2=half_length(y.pred, x.pred, turn),
        )
    else:
        return Crossing(x.offset, y.offset, x.offset, y.offset, x.target, y.target, x.pred, y.pred)


@triton.jit
def _extent(sides, turns, crossing, V: tl.constexpr):
    """The longer side of the joint bounding box (section 3); nothing that is used where no weight needs it."""
    extent = crossing.g1
    if V.AXIS_WEIGHT != LENGTH:
        x, y, z = sides
        pred_x, pred_y, target_x, target_y = x.pred, y.pred, x.target, y.target
        if V.HAS_ANGLE:
            turn, target = turns
            pred = Turn(
                tl.fma(target.cos, turn.cos, minus(target.sin) * turn.sin),
                tl.fma(target.sin, turn.cos, target.cos * turn.sin),
            )
            pred_x, pred_y = half_length(x.pred, y.pred, pred), half_length(y.pred, x.pred, pred)
            target_x, target_y = half_length(x.target, y.target, target), half_length(y.target, x.target, target)
        extent = tl.maximum(reach(x.offset, pred_x, target_x), reach(y.offset, pred_y, target_y))
        if V.FORMAT == CXCYCZLWHR:
            extent = tl.maximum(extent, reach(z.offset, z.pred, z.target))
    return extent


@triton.jit
def _weights(sides, extent, V: tl.constexpr):
    x, y, z = sides
    if V.FORMAT == CXCYCZLWHR:  # an axis is an edge; in the plane it is the normal of the other edge
        return AxisWeights(
            edge_weights(x.pred, y.pred, z.pred, extent, V), edge_weights(x.target, y.target, z.target, extent, V)
        )
    else:
        return AxisWeights(
            edge_weights(y.pred, x.pred, x.pred, extent, V), edge_weights(y.target, x.target, x.target, extent, V)
        )


@triton.jit
def _distances(sides, crossing, weights, PLAIN: tl.constexpr, V: tl.constexpr):
    x, y, _ = sides
    p, g = weights
    if V.HAS_ANGLE:
        on_p1 = distance(crossing.p1, x.pred, crossing.g_on_p1, p.x, PLAIN, V)
        on_p2 = distance(crossing.p2, y.pred, crossing.g_on_p2, p.y, PLAIN, V)
        on_g1 = distance(crossing.g1, crossing.p_on_g1, x.target, g.x, PLAIN, V)
        on_g2 = distance(crossing.g2, crossing.p_on_g2, y.target, g.y, PLAIN, V)
    else:  # both boxes have the same axes
        on_p1 = distance(x.offset, x.pred, x.target, p.x + g.x, PLAIN, V)
        on_p2 = distance(y.offset, y.pred, y.target, p.y + g.y, PLAIN, V)
        on_g1, on_g2 = on_p1, on_p2
    return Distances(on_p1, on_p2, on_g1, on_g2)


@triton.jit
def _boundary(sides, crossing, weight, boundary_weight, PLAIN: tl.constexpr, V: tl.constexpr):
    """The term of two rectangles, its weight, and slopes of their product; areas are halves, but that of P.

    With r = A_t / V the term is 1 - 2 (A_p / V) r^2 / (1 + r^2), and V times its derivative to V is
    2 (A_p / V) r^2 / (1 + r^2) (1 + 2 / (1 + r^2)). Where G has no area, or the term is rounding only, all is 0.
    """
    x, y, _ = sides
    pred_area, area = tl.abs(x.pred_size) * tl.abs(y.pred_size), tl.abs(x.target_size) * y.target
    mixed = tl.fma(x.pred, crossing.g_on_p2, y.pred * crossing.g_on_p1)
    per_mixed = reciprocal(mixed)
    if not PLAIN:
        squares = 2.0 * tl.fma(x.target, x.target, y.target * y.target)
        is_flat = area <= tl.maximum(V.TINY, squares * tl.full(mixed.shape, SHORTEST, mixed.dtype))
        per_mixed = tl.where(mixed <= V.TINY, 0.0, per_mixed)
    ratio = area * per_mixed
    if not PLAIN:
        ratio = tl.minimum(ratio, LARGEST_RATIO)
    squared = ratio * ratio
    share = reciprocal(squared + 1.0)
    per_area = squared * share
    match = per_area * (pred_area * per_mixed)
    term = 1.0 - match
    is_none = term <= V.RESOLUTION
    if not PLAIN:
        is_none = is_none | is_flat
    factor = tl.where(is_none, 0.0, tl.full(term.shape, boundary_weight, term.dtype))
    scaled = factor * per_mixed
    mixed_slope = match * tl.fma(share, weight, 0.5 * weight) * scaled
    return term, factor, BoundarySlopes(mixed_slope, per_area * (-2.0 * weight * scaled))


@triton.jit
def _gradient(sides, turns, crossing, distances, on_z, p_weights, mean, boundary, PLAIN: tl.constexpr, V: tl.constexpr):
    """Derivatives to the numbers of P, but for the factors in `Row`."""
    x, y, z = sides
    on_p1, on_p2 = distances.p1.slopes, distances.p2.slopes
    on_g1, on_g2 = distances.g1.slopes, distances.g2.slopes
    # To the half-sizes of P, and to the offset, by its components along the coordinates or the directions of G.
    to_x, to_y, along_1, along_2 = on_p1.pred, on_p2.pred, on_p1.offset, on_p2.offset
    by_turn = to_x
    if V.HAS_ANGLE:
        turn = turns.between
        along_1 = tl.fma(turn.cos, on_p1.offset, tl.fma(minus(turn.sin), on_p2.offset, on_g1.offset))
        along_2 = tl.fma(turn.sin, on_p1.offset, tl.fma(turn.cos, on_p2.offset, on_g2.offset))
        cos, sin = tl.abs(turn.cos), tl.abs(turn.sin)
        to_x = tl.fma(cos, on_g1.pred, tl.fma(sin, on_g2.pred, to_x))
        to_y = tl.fma(sin, on_g1.pred, tl.fma(cos, on_g2.pred, to_y))
        # Derivatives of half-lengths by the turn, but for its sign: |cos| becomes -|sin| and |sin| becomes |cos|.
        # The products are those of the half-lengths.
        by_turn = on_g1.pred * tl.fma(y.pred, cos, minus(x.pred * sin))
        by_turn = tl.fma(on_g2.pred, tl.fma(x.pred, cos, minus(y.pred * sin)), by_turn)
        to_1, to_2 = tl.zeros_like(cos), tl.zeros_like(cos)  # to the half-lengths of G on the directions of P
        if V.AXIS_GRAD:
            to_1, to_2 = on_p1.target, on_p2.target
        if V.BOUNDARY:
            to_1, to_2 = tl.fma(boundary.mixed, y.pred, to_1), tl.fma(boundary.mixed, x.pred, to_2)
        if V.AXIS_GRAD or V.BOUNDARY:
            by_turn = tl.fma(to_1, tl.fma(y.target, cos, minus(x.target * sin)), by_turn)
            by_turn = tl.fma(to_2, tl.fma(x.target, cos, minus(y.target * sin)), by_turn)
    if V.AXIS_GRAD and V.AXIS_WEIGHT != UNIFORM:
        to_y = tl.fma(p_weights.slope_x, distances.p1.value - mean, to_y)
        to_x = tl.fma(p_weights.slope_y, distances.p2.value - mean, to_x)
    if V.BOUNDARY:
        to_x = tl.fma(boundary.mixed, crossing.g_on_p2, tl.fma(boundary.area, y.pred, to_x))
        to_y = tl.fma(boundary.mixed, crossing.g_on_p1, tl.fma(boundary.area, x.pred, to_y))
    grad_x, grad_y, grad_angle = along_1, along_2, by_turn
    if V.HAS_ANGLE:
        target = turns.target
        grad_x = tl.fma(target.cos, along_1, minus(target.sin) * along_2)
        grad_y = tl.fma(target.sin, along_1, target.cos * along_2)
        sign = tl.fma(above_zero(turn.cos * turn.sin), 2.0, -1.0)
        if V.AXIS_GRAD:
            of_axes = tl.fma(on_p1.offset, crossing.p2, minus(on_p2.offset) * crossing.p1)
            grad_angle = tl.fma(by_turn, sign, of_axes)
        else:
            grad_angle = by_turn * sign
        if V.DEGREES:
            grad_angle *= tl.full(grad_angle.shape, math.pi / 180, grad_angle.dtype)
        if not V.CLOCKWISE:
            grad_angle = minus(grad_angle)
    to_x, to_y = times_sign(to_x, x.pred_size, PLAIN), times_sign(to_y, y.pred_size, PLAIN)
    if V.FORMAT == XYXY:
        return grad_x - to_x, grad_y - to_y, grad_x + to_x, grad_y + to_y
    elif V.FORMAT == CXCYWH:
        return grad_x, grad_y, to_x, to_y
    elif V.FORMAT == CXCYWHR:
        return grad_x, grad_y, to_x, to_y, grad_angle
    else:
        to_z = times_sign(on_z.pred, z.pred_size, PLAIN)
        return grad_x, grad_y, on_z.offset, to_x, to_y, to_z, grad_angle
