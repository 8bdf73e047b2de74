"""MGIoU of boxes in plain PyTorch, without corners: the definition that the kernel of boxes is held against.

A box is a centre, D half-sizes a_i and D directions u_i. On an axis it is the interval of its centre +- a half-length,
the sum of a_i |u_i . axis|. With the distance s of the two centres along the axis and the half-lengths a and b,

    m = max(|s|, |a - b|),    hull = a + b + m,    (1 - GIoU1D) / 2 = m / (a + b + m)

which is section 2 for intervals: |max_p - max_g| + |min_p - min_g| = |s + (a - b)| + |s - (a - b)| = 2 m. It is exactly
0 for equal boxes, and `abs` and `maximum` share its gradient at ties as those of vertices do.

The axes are the directions of both boxes, which are unit vectors here. Everything that the directions of one box are
to those of the other is in the difference of their angles: its sine is exactly 0 where the angles are equal.

Every step is differentiable by autograd, forward or backward, and works under vmap and on any device. Sections are
those of `DEFINITION.md`, above all 10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_mgiou.options import MIN_AXIS_LENGTH, SOFT_AXIS_LENGTH
from triton_mgiou.reference.polygons import (
    _RESOLUTION,
    _TIE,
    _TINY,
    _extreme,
    _inverse_power_of_two,
    _quotient,
    _scale,
    _slack,
    compute_dtype,
)


class _Pair(NamedTuple):
    """Two boxes of each sample, scaled by one power of two; D is 2, or 3 in space."""

    offset: Tensor  # (B, D), from the centre of G to that of P
    p_half: Tensor  # (B, D), half of w, h, or of l, w, h
    g_half: Tensor
    p_angle: Tensor  # (B,), reduced by itself to less than two turns, in the caller's unit; 0 for upright boxes
    g_angle: Tensor


_Intervals = tuple[Tensor, Tensor, Tensor]  # on D axes: the offset of the middles, both half-lengths; all (B, D)


def per_sample_loss(
    pred: Tensor,
    target: Tensor,
    *,
    fmt: str,
    angle: str = "radians",
    clockwise: bool = True,
    axis_weight: str,
    axis_grad: bool,
    boundary_weight: float,
) -> Tensor:
    """The loss of every sample, shape (B,), before weights and reduction; arguments as in `box_mgiou_loss`.

    `fmt` is one that has a closed form, or "corners3d".
    """
    dtype = compute_dtype(pred.dtype, target.dtype)
    pred, target = pred.to(dtype), target.to(dtype)
    if fmt == "corners3d":
        return _corners_loss(pred, target, axis_grad)
    pair = _pair(pred, target, fmt, angle, clockwise)

    # `axis_grad` says whether the axes of P and of G, directions and weights, are variables (section 4).
    axes = pair if axis_grad else _Pair(*(each.detach() for each in pair))
    rounding = 2.0 * _TIE[dtype] if fmt == "cxcywhr" else 0.0  # other directions are exact, or edges themselves
    p_distance, g_distance = (_distance(*intervals, rounding) for intervals in _on_axes(pair, axes, angle))
    extent = _extent(pair, angle)
    p_weights = _axis_weights(axes.p_half, extent, axis_weight)
    g_weights = _axis_weights(axes.g_half, extent, axis_weight)
    total = (p_weights * p_distance).sum(1) + (g_weights * g_distance).sum(1)
    weight = p_weights.sum(1) + g_weights.sum(1)
    loss = total / torch.where(weight == 0, 1.0, weight)
    if boundary_weight:
        loss = loss + boundary_weight * _boundary(pair, angle)
    return loss


def _pair(pred: Tensor, target: Tensor, fmt: str, unit: str, clockwise: bool) -> _Pair:
    """Scale each sample by the power of two that brings its largest number near 1 (section 6), and read its format.

    The offset is that of the differences, which keep the digits that a mean of two corners would round away. A sample
    with NaN or Inf becomes NaN as a whole.
    """
    if fmt in ("xyxy", "cxcywh"):
        p_angle = g_angle = pred.new_zeros(pred.shape[0])
    else:
        p_angle, g_angle = _reduced(pred[:, -1], unit), _reduced(target[:, -1], unit)
        pred, target = pred[:, :-1], target[:, :-1]
        if not clockwise:
            p_angle, g_angle = -p_angle, -g_angle
    largest = torch.cat((pred, target), dim=1).detach().abs().amax(1, keepdim=True)
    finite = largest.isfinite() & (p_angle + g_angle).detach().isfinite().unsqueeze(1)
    scale = torch.where(finite, _inverse_power_of_two(largest), torch.nan)
    p, g = _scale(pred, scale), _scale(target, scale)
    first, second = (p - g).chunk(2, dim=1)
    offset = (first + second) / 2 if fmt == "xyxy" else first
    return _Pair(offset, _half_sizes(p, fmt), _half_sizes(g, fmt), p_angle, g_angle)


def _half_sizes(boxes: Tensor, fmt: str) -> Tensor:
    first, second = boxes.chunk(2, dim=1)
    size = second - first if fmt == "xyxy" else second
    return size.abs() / 2


def _reduced(angles: Tensor, unit: str) -> Tensor:
    """The same box by a smaller angle. In degrees this is exact, so that turns by 180 stay exactly that.

    No `atan2`: on a CPU its bits depend on the place in the tensor. The derivative is 1, and that of the quotient would
    lose its second one to rounding where the cosine is near 0.
    """
    if unit == "degrees":
        return torch.fmod(angles, 180.0)
    given = angles.detach()
    reduced = torch.atan(given.sin() / given.cos())
    return torch.where(given.abs() <= math.pi, angles, reduced + (angles - given))


def _cos_sin(angles: Tensor, unit: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine, in degrees up to one sign for both, which turns a box by 180 degrees: the same box.

    Multiples of 90 degrees give exactly 0 and 1.
    """
    if unit == "radians":
        return angles.cos(), angles.sin()
    quarters = (angles.detach() / 90.0).round()
    rest = torch.deg2rad(angles - 90.0 * quarters)
    cos, sin = rest.cos(), rest.sin()
    is_odd = quarters.remainder(2.0) == 1.0
    return torch.where(is_odd, -sin, cos), torch.where(is_odd, cos, sin)


def _along(offset: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """The offset along the directions of a box, (B, D)."""
    (x, y), (cos, sin) = offset[:, :2].unbind(1), cos_sin
    return torch.cat((torch.stack((x * cos + y * sin, y * cos - x * sin), dim=1), offset[:, 2:]), dim=1)


def _half_lengths(half: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """The half-lengths of a box on the directions of another one, (B, D), by the difference of their angles."""
    (w, h), (cos, sin) = half[:, :2].unbind(1), (each.abs() for each in cos_sin)
    return torch.cat((torch.stack((w * cos + h * sin, w * sin + h * cos), dim=1), half[:, 2:]), dim=1)


def _on_axes(pair: _Pair, axes: _Pair, unit: str) -> tuple[_Intervals, _Intervals]:
    """The intervals of both boxes on the directions of P, and on those of G, where `axes` has them."""
    return (
        (
            _along(pair.offset, _cos_sin(axes.p_angle, unit)),
            pair.p_half,
            _half_lengths(pair.g_half, _cos_sin(axes.p_angle - pair.g_angle, unit)),
        ),
        (
            _along(pair.offset, _cos_sin(axes.g_angle, unit)),
            _half_lengths(pair.p_half, _cos_sin(pair.p_angle - axes.g_angle, unit)),
            pair.g_half,
        ),
    )


def _distance(offset: Tensor, a: Tensor, b: Tensor, rounding: float = 0.0) -> Tensor:
    """(1 - GIoU1D) / 2 of two intervals, by the offset of their middles and their half-lengths.

    Two points, of half-lengths up to half of what counts as 0, are one where their offset is no more than `rounding`.
    """
    larger = torch.maximum(offset.abs(), (a - b).abs())
    hull = a + b + larger
    nothing = _no_length(hull)
    scale, limit = (2.0 * rounding / nothing, rounding) if rounding else (1.0, nothing)
    flat = (a + b) * scale + larger <= limit
    return torch.where(flat, 0.0, larger / torch.where(flat, 1.0, hull))


def _extent(pair: _Pair, unit: str) -> Tensor:
    """The longer side of the bounding box of both boxes, (B, 1); a constant (section 3)."""
    pair = _Pair(*(each.detach() for each in pair))
    p = _half_lengths(pair.p_half, _cos_sin(pair.p_angle, unit))
    g = _half_lengths(pair.g_half, _cos_sin(pair.g_angle, unit))
    return (p + g + torch.maximum(pair.offset.abs(), (p - g).abs())).amax(1, keepdim=True)


def _axis_weights(half: Tensor, extent: Tensor, axis_weight: str) -> Tensor:
    """The weights w_k of the directions of a box, (B, D), by the edges that they belong to.

    In the plane an axis is the normal of an edge: the axis along w belongs to the edges of length h (section 10). In
    space it is the edge.
    """
    edges = 2.0 * (half.flip(1) if half.shape[1] == 2 else half)
    floor = torch.full_like(extent, _no_length(half))
    if axis_weight == "uniform":
        floor = torch.maximum(floor, MIN_AXIS_LENGTH * extent)
    is_axis = ~(edges <= floor)  # a NaN edge is an axis: its NaN must reach the loss
    if axis_weight == "uniform":
        return is_axis.to(edges.dtype)
    edges = torch.where(is_axis, edges, 0.0)
    if axis_weight == "length":
        total = edges.sum(1, keepdim=True)
        return edges / torch.where(total == 0, 1.0, total)
    return -torch.expm1(-edges / (SOFT_AXIS_LENGTH * extent.clamp(min=_no_length(half))))


def _boundary(pair: _Pair, unit: str) -> Tensor:
    """How far P is from being G moved, (B,), in [0, 1]: section 7 of two rectangles, whose areas are known.

        boundary = 1 - |P| |G| / V^2 * 2 V |G| / (V^2 + |G|^2)

    The mixed area V is half the sum over the edges of P of the edge's length times how far G reaches along its normal.
    Where G has no area the term is 0. G is a constant of it. All areas below are halves.
    """
    p, g = pair.p_half, pair.g_half.detach()
    reach = _half_lengths(g, _cos_sin(pair.p_angle - pair.g_angle.detach(), unit))
    # Not `prod`, whose derivative asks the host whether there is a 0.
    p_area, g_area, mixed = 2.0 * p[:, 0] * p[:, 1], 2.0 * g[:, 0] * g[:, 1], (p.flip(1) * reach).sum(1)
    tiny = _TINY[p.dtype]
    flat = g_area <= (2.0 * MIN_AXIS_LENGTH * g.square().sum(1)).clamp(min=tiny)
    shrunk = mixed <= tiny
    one = torch.where(flat, 1.0, torch.maximum(mixed, g_area)).detach()
    p_area, g_area, mixed = p_area / one, g_area / one, mixed / one
    denominator = torch.where(shrunk, 1.0, mixed) * (mixed.square() + g_area.square())
    match = 2.0 * p_area * g_area.square() / torch.where(flat, 1.0, denominator)
    term = 1.0 - torch.where(shrunk, 0.0, match)
    return torch.where(flat | (term <= _RESOLUTION[term.dtype]), 0.0, term)


def _no_length(values: Tensor) -> float:
    """The longest length that counts as 0: its square does in section 6."""
    return math.sqrt(_TINY[values.dtype])


def _corners_loss(pred: Tensor, target: Tensor, axis_grad: bool) -> Tensor:
    """The loss of eight corners each, (B,): their projections on the three edges at vertex 0 of each box."""
    p, g, low, extent = _scaled_corners(pred, target)
    total = weight = torch.zeros_like(extent[:, 0])
    for own in (p, g):
        edges = _edges(own if axis_grad else own.detach())  # before the move, which rounds
        is_axis = _is_axis(edges, extent)
        (p_low, p_high), (g_low, g_high) = (_interval(each - low, edges) for each in (p, g))
        difference = (p_high - g_high).abs() + (p_low - g_low).abs()
        hull = torch.maximum(p_high, g_high) - torch.minimum(p_low, g_low)
        total = total + (is_axis * _quotient(difference, hull)).sum(1)
        weight = weight + is_axis.sum(1)
    return 0.5 * total / torch.where(weight == 0, 1.0, weight)


def _scaled_corners(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both scaled by one power of two, their joint lower corner (B, 1, 3) and extent (B, 1)."""
    corners = torch.cat((pred, target), dim=1).detach()
    largest = corners.abs().amax((1, 2), keepdim=True)
    scale = torch.where(largest.isfinite(), _inverse_power_of_two(largest), torch.nan)
    low = (corners * scale).amin(1, keepdim=True)
    high = (corners * scale).amax(1, keepdim=True)
    return _scale(pred, scale), _scale(target, scale), low, (high - low).amax(2)


def _is_axis(edges: Tensor, extent: Tensor) -> Tensor:
    """1 where an edge is long enough to be an axis, else 0, (B, 3)."""
    squared = edges.square().sum(2)
    floor = torch.maximum((MIN_AXIS_LENGTH * extent).square(), torch.full_like(extent, _TINY[extent.dtype]))
    return (~(squared <= floor)).to(edges.dtype)


def _edges(corners: Tensor) -> Tensor:
    """The three edges at vertex 0, (B, 3, 3), as in the paper's code."""
    return corners[:, (1, 3, 4)] - corners[:, :1]


def _interval(corners: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest projection on each axis, both (B, 3). Never a matrix product: see `polygons`.

    The four corners of a face have one projection on its normal, but for rounding: section 4 says what is tied.
    """
    projections = (axes.unsqueeze(2) * corners.unsqueeze(1)).sum(3)  # (B, 3, 8)
    values = projections.detach()
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    extent = (corners.detach().amax(1) - corners.detach().amin(1)).amax(1, keepdim=True)
    slack = _slack(extent).unsqueeze(2) * axes.detach().abs().sum(2, keepdim=True)
    return _extreme(low, values <= low + slack, projections), _extreme(high, values >= high - slack, projections)
