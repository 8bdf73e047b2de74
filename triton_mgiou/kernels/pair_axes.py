"""Two boxes on their axes: intervals, weights, and the sums or the largest of the distances (section 11).

On an axis with the offset s of the two middles and the half-lengths a and b, as in `box_axes`:

    m = max(|s|, |a - b|),   D = (1 - GIoU1D) / 2 = m / (a + b + m),   apart = |s| / (a + b)

Sums run over the axes of each box by itself: swapping the boxes changes no bit. PLAIN says that every axis counts alike
and nothing leaves its range; scaling by powers of two is exact, so the bits are the same without it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, reciprocal
from triton_mgiou.kernels.axis import SHORTEST, WIDEST
from triton_mgiou.kernels.box_axes import edge_weights, reach
from triton_mgiou.kernels.box_types import XYXY
from triton_mgiou.kernels.pair_boxes import (
    Boxes,
    boxes_of,
    cos_sin,
    direction_of,
    rescaled_boxes,
    scale_of,
    scaled_numbers,
)
from triton_mgiou.options import ABSENT, OVERS

# OVER
MEAN = tl.constexpr(OVERS.index("mean"))
MIN = tl.constexpr(OVERS.index("min"))
DEPTH = tl.constexpr(OVERS.index("depth"))

NOT_THERE = tl.constexpr(ABSENT)


class Axis(NamedTuple):
    """Two intervals on an axis."""

    offset: tl.tensor
    halves: tl.tensor  # the sum of the half-lengths
    difference: tl.tensor
    larger: tl.tensor  # of |offset| and |difference|
    hull: tl.tensor


class Pair(NamedTuple):
    """Two boxes on their axes: those of P (p1, p2), of G (g1, g2), and upwards."""

    p1: Axis
    p2: Axis
    g1: Axis
    g2: Axis
    z: Axis
    p: Boxes
    g: Boxes
    x: tl.tensor  # offset of the centres
    y: tl.tensor
    cos: tl.tensor  # of the difference of the angles, both at least 0
    sin: tl.tensor
    turn: tl.tensor  # the difference


class Rule(NamedTuple):
    """Weights of the axes, their slopes by the edges' lengths, and what is no longer than a point."""

    p1: tl.tensor
    p2: tl.tensor
    g1: tl.tensor
    g2: tl.tensor
    pz: tl.tensor
    gz: tl.tensor
    slope_1: tl.tensor  # of P's weights, by the edges that its axes belong to
    slope_2: tl.tensor
    limit: tl.tensor


@triton.jit
def _axis(offset, a, b):
    difference = a - b
    halves = a + b
    larger = tl.maximum(tl.abs(offset), tl.abs(difference))
    return Axis(offset, halves, difference, larger, halves + larger)


@triton.jit
def pair_of(p, g, V: tl.constexpr):
    """The intervals of each pair on all axes."""
    x, y, z = p.x - g.x, p.y - g.y, p.z - g.z
    if V.FORMAT == XYXY:
        x, y = 0.5 * (x + (p.right - g.right)), 0.5 * (y + (p.bottom - g.bottom))
    on_x, on_y = _axis(x, p.a, g.a), _axis(y, p.b, g.b)
    on_z = on_x
    if V.IN_SPACE:
        on_z = _axis(z, p.c, g.c)
    if V.TURNS:
        turn = p.angle - g.angle
        cos, sin = cos_sin(turn, V.DEGREES)
        p1, p2 = tl.fma(p.cos, x, p.sin * y), tl.fma(p.cos, y, minus(p.sin) * x)
        g1, g2 = tl.fma(g.cos, x, g.sin * y), tl.fma(g.cos, y, minus(g.sin) * x)
        return Pair(
            _axis(p1, p.a, tl.fma(g.a, cos, g.b * sin)),
            _axis(p2, p.b, tl.fma(g.a, sin, g.b * cos)),
            _axis(g1, tl.fma(p.a, cos, p.b * sin), g.a),
            _axis(g2, tl.fma(p.a, sin, p.b * cos), g.b),
            on_z, p, g, x, y, cos, sin, turn,
        )  # fmt: skip
    else:  # both boxes have the same axes
        return Pair(on_x, on_y, on_x, on_y, on_z, p, g, x, y, x, x, x)


@triton.jit
def scaled_pair(p_numbers, g_numbers, V: tl.constexpr):
    """Each pair scaled by its own power of two, which comes second (section 6)."""
    p_scale, g_scale = scale_of(p_numbers, V), scale_of(g_numbers, V)
    p = boxes_of(scaled_numbers(p_numbers, p_scale.down, V), direction_of(p_numbers, V), V)
    g = boxes_of(scaled_numbers(g_numbers, g_scale.down, V), direction_of(g_numbers, V), V)
    down = tl.minimum(p_scale.down, g_scale.down)
    return pair_of(rescaled_boxes(p, down * p_scale.up), rescaled_boxes(g, down * g_scale.up), V), down


@triton.jit
def _bounds(boxes):
    """Half of the bounding rectangle of a box."""
    sin = tl.abs(boxes.sin)
    return tl.fma(boxes.a, boxes.cos, boxes.b * sin), tl.fma(boxes.a, sin, boxes.b * boxes.cos)


@triton.jit
def rounding_of(extent, V: tl.constexpr):
    """2 t of section 5: up to there two offsets may differ by rounding."""
    return tl.minimum(extent * (2.0 * WIDEST), tl.full(extent.shape, 2.0 * V.TIE, extent.dtype))


@triton.jit
def _seen(axis, point):
    return (axis.hull > point).to(point.dtype)


@triton.jit
def rule_of(pair, V: tl.constexpr):
    """Weights of the axes: those of the loss, but where these see only a line, or nothing (section 11)."""
    p, g = pair.p, pair.g
    if V.TURNS:
        p_x, p_y = _bounds(p)
        g_x, g_y = _bounds(g)
        extent = tl.maximum(reach(pair.x, p_x, g_x), reach(pair.y, p_y, g_y))
    else:
        extent = tl.maximum(pair.p1.hull, pair.p2.hull)
    if V.IN_SPACE:
        extent = tl.maximum(extent, pair.z.hull)
    limit = tl.maximum(extent * tl.full(extent.shape, SHORTEST, extent.dtype), V.NO_LENGTH)
    point = limit
    if V.TURNS:  # directions round, and so do offsets along them
        point = tl.maximum(limit, rounding_of(extent, V))
    none = tl.zeros_like(limit)
    if V.IN_SPACE:  # an axis is an edge: without one it counts where both are points on it, and apart
        w_p, w_g = (
            edge_weights(p.a + none, p.b + none, p.c + none, extent, V),
            edge_weights(g.a + none, g.b + none, g.c + none, extent, V),
        )
        return Rule(
            tl.where(pair.p1.halves <= limit, _seen(pair.p1, point), w_p.x),
            tl.where(pair.p2.halves <= limit, _seen(pair.p2, point), w_p.y),
            tl.where(pair.g1.halves <= limit, _seen(pair.g1, point), w_g.x),
            tl.where(pair.g2.halves <= limit, _seen(pair.g2, point), w_g.y),
            tl.where(pair.z.halves <= limit, _seen(pair.z, point), w_p.z),
            tl.where(pair.z.halves <= limit, _seen(pair.z, point), w_g.z),
            none, none, limit,
        )  # fmt: skip
    else:
        w_p, w_g = (
            edge_weights(p.b + none, p.a + none, p.a + none, extent, V),
            edge_weights(g.b + none, g.a + none, g.a + none, extent, V),
        )
        thinnest = tl.minimum(tl.minimum(pair.p1.hull, pair.p2.hull), tl.minimum(pair.g1.hull, pair.g2.hull))
        heaviest = tl.maximum(tl.maximum(w_p.x, w_p.y), tl.maximum(w_g.x, w_g.y))
        other = (thinnest <= point) | (heaviest == 0)
        return Rule(
            tl.where(other, _seen(pair.p1, point), w_p.x),
            tl.where(other, _seen(pair.p2, point), w_p.y),
            tl.where(other, _seen(pair.g1, point), w_g.x),
            tl.where(other, _seen(pair.g2, point), w_g.y),
            none, none,
            tl.where(other, 0.0, w_p.slope_x),
            tl.where(other, 0.0, w_p.slope_y),
            limit,
        )  # fmt: skip


@triton.jit
def one_over_hull(axis, PLAIN: tl.constexpr, V: tl.constexpr):
    """1 / the hull; 0 where there is none."""
    if PLAIN:
        return reciprocal(axis.hull)
    else:
        return tl.where(axis.hull > V.NO_LENGTH, reciprocal(axis.hull), 0.0)


@triton.jit
def _weighted(axis, weight, PLAIN: tl.constexpr):
    return axis.larger if PLAIN else axis.larger * weight


@triton.jit
def distance_on(axis, weight, limit, PLAIN: tl.constexpr, V: tl.constexpr):
    """D of an axis, or `apart`; 0 if it does not count."""
    if V.OVER == DEPTH:
        halves = axis.halves if PLAIN else tl.maximum(axis.halves, limit)
        distance = tl.abs(axis.offset) * reciprocal(halves)
    else:
        distance = axis.larger * one_over_hull(axis, PLAIN, V)
    return distance if PLAIN else tl.where(weight > 0, distance, 0.0)


@triton.jit
def sums_over_axes(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    """Weighted sums of D over the axes of P and over those of G."""
    p = _weighted(pair.p1, rule.p1, PLAIN) * one_over_hull(pair.p1, PLAIN, V)
    p = tl.fma(_weighted(pair.p2, rule.p2, PLAIN), one_over_hull(pair.p2, PLAIN, V), p)
    g = _weighted(pair.g1, rule.g1, PLAIN) * one_over_hull(pair.g1, PLAIN, V)
    g = tl.fma(_weighted(pair.g2, rule.g2, PLAIN), one_over_hull(pair.g2, PLAIN, V), g)
    if V.IN_SPACE:
        per_hull = one_over_hull(pair.z, PLAIN, V)
        p = tl.fma(_weighted(pair.z, rule.pz, PLAIN), per_hull, p)
        g = tl.fma(_weighted(pair.z, rule.gz, PLAIN), per_hull, g)
    return p, g


@triton.jit
def total_weight(rule):
    """Of all axes; 1 where none counts."""
    weight = (rule.p1 + rule.p2 + rule.pz) + (rule.g1 + rule.g2 + rule.gz)
    return tl.where(weight > 0, weight, 1.0)


@triton.jit
def largest_distance(pair, rule, PLAIN: tl.constexpr, V: tl.constexpr):
    """Over the axes that count."""
    p = tl.maximum(
        distance_on(pair.p1, rule.p1, rule.limit, PLAIN, V), distance_on(pair.p2, rule.p2, rule.limit, PLAIN, V)
    )
    g = tl.maximum(
        distance_on(pair.g1, rule.g1, rule.limit, PLAIN, V), distance_on(pair.g2, rule.g2, rule.limit, PLAIN, V)
    )
    largest = tl.maximum(p, g)
    if V.IN_SPACE:
        largest = tl.maximum(largest, distance_on(pair.z, rule.pz + rule.gz, rule.limit, PLAIN, V))
    return largest
