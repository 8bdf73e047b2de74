"""MGIoU of padded polygon batches in plain PyTorch: the definition that every other backend is held against.

Every step here is differentiable by autograd, launches no host synchronisation and works on any device.

On an axis, p and g are the intervals of the projections of P and G, and h is the length of their joint hull:

    GIoU1D = (|p| + |g|) / h - 1,  so  (1 - GIoU1D) / 2 = (|max_p - max_g| + |min_p - min_g|) / (2 h)

The right-hand side is what is computed. It is exactly 0 at P == G, keeps its relative accuracy near 0, and
its derivative is that of `abs` and `maximum`: bounded, and 0 at a tie of the two intervals.

Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU", AAAI-26, arXiv 2504.16443.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_mgiou.options import MIN_AXIS_LENGTH, RESOLUTION, SOFT_AXIS_LENGTH, TIE, TINY, WIDEST_TIE

_TINY = {torch.float32: TINY[32], torch.float64: TINY[64]}
_TIE = {torch.float32: TIE[32], torch.float64: TIE[64]}
_RESOLUTION = {torch.float32: RESOLUTION[32], torch.float64: RESOLUTION[64]}

_LARGEST_SCALE = {torch.float32: 2.0**125, torch.float64: 2.0**1021}


class _Polygons(NamedTuple):
    vertices: Tensor  # (B, N, 2), the real ones first; 0 behind them
    shape: Tensor  # (B, N, 2), the same relative to the polygon's first vertex
    real: Tensor  # (B, N), True for a real vertex
    following: Tensor  # (B, N, 1), the index of the next real vertex of each real one
    edges: Tensor  # (B, N, 2), edge k runs from vertex k to the next real one; 0 behind the real ones


def compute_dtype(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The type that two inputs are computed and returned in: float64 if either has it, else float32."""
    return torch.promote_types(torch.promote_types(first, second), torch.float32)


def per_sample_loss(
    pred: Tensor,
    target: Tensor,
    *,
    pred_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    axis_weight: str,
    axis_grad: bool,
    convexity_weight: float,
    boundary_weight: float,
) -> Tensor:
    """The loss of every sample, shape (B,), before weights and reduction; arguments as in `mgiou_loss`."""
    dtype = compute_dtype(pred.dtype, target.dtype)
    p, p_count = _real_first(pred.to(dtype), pred_lengths, pred_mask)
    g, g_count = _real_first(target.to(dtype), target_lengths, target_mask)

    # Where a side has no vertex, both become single points at the origin: no axis, so loss 0 and gradient 0.
    present = (p_count > 0) & (g_count > 0)
    p, p_real = _clear_padding(p, p_count, present)
    g, g_real = _clear_padding(g, g_count, present)

    p_polygons, g_polygons, extent = _normalise(p, p_real, g, g_real)

    p_sum, p_weight, p_is_axis, p_hull = _sum_over_axes(p_polygons, g_polygons, extent, axis_weight, axis_grad)
    g_sum, g_weight, _, g_hull = _sum_over_axes(g_polygons, p_polygons, extent, axis_weight, axis_grad)
    weight = p_weight + g_weight
    loss = 0.5 * (p_sum + g_sum) / torch.where(weight == 0, 1.0, weight)
    if convexity_weight:
        loss = loss + convexity_weight * _convexity(p_polygons, p_is_axis)
    if boundary_weight:
        loss = loss + boundary_weight * _boundary(p_polygons, g_polygons, extent, up_to_rounding=not axis_grad)
    is_line = _is_line(p_polygons, g_polygons, torch.maximum(p_hull, g_hull), extent, axis_weight)
    return torch.where(is_line, 0.0, loss)


def _real_first(vertices: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move the real vertices to the front, in order, and count them: (B, N, 2) and (B,) (section 1)."""
    if mask is not None:
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        return vertices.gather(1, order.unsqueeze(-1).expand(-1, -1, 2)), mask.sum(1)
    return vertices, real_count(vertices, lengths)


def real_count(vertices: Tensor, lengths: Tensor | None) -> Tensor:
    """How many vertices of each polygon are real, of (..., N, 2): (...)."""
    *polygons, size, _ = vertices.shape
    if lengths is None:
        return torch.full(polygons, size, device=vertices.device)
    return lengths.long().clamp(0, size)  # a type of 8 bits may not hold the size


def _clear_padding(vertices: Tensor, count: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Put 0 in the padding, so that what stood there reaches neither the value nor a gradient."""
    index = torch.arange(vertices.shape[1], device=vertices.device)
    real = index < torch.where(present, count, 1).unsqueeze(1)
    return torch.where((real & present.unsqueeze(1)).unsqueeze(-1), vertices, 0.0), real


def _normalise(p: Tensor, p_real: Tensor, g: Tensor, g_real: Tensor) -> tuple[_Polygons, _Polygons, Tensor]:
    """Scale each sample by a power of two, move it to the origin, and measure its extent (section 6).

    The scale brings the largest coordinate near 1 and is exact. The lower corner of the joint bounding box
    goes to the origin. The extent, (B, 1), is the longer side of that box; no gradient flows through either.
    A sample with NaN or Inf in a real vertex becomes NaN as a whole.
    """
    vertices = torch.cat((p, g), dim=1).detach()
    real = torch.cat((p_real, g_real), dim=1).unsqueeze(-1)
    low = vertices.masked_fill(~real, torch.inf).amin(1, keepdim=True)  # (B, 1, 2)
    high = vertices.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()).amax(2, keepdim=True)  # (B, 1, 1)
    scale = torch.where(largest.isfinite(), _inverse_power_of_two(largest), torch.nan)
    low, high = low * scale, high * scale
    return _polygons(_scale(p, scale), p_real, low), _polygons(_scale(g, scale), g_real, low), (high - low).amax(2)


def _inverse_power_of_two(values: Tensor) -> Tensor:
    """2^-k for values in [2^k, 2^(k+1)); k stays where both 2^k and 2^-k are normal.

    The quotient is a power of two, and so exact. (The bits as integers would be simpler, but PyTorch 2.11 has no `vmap`
    of that.)
    """
    largest = _LARGEST_SCALE[values.dtype]
    scale = 2.0 * (torch.frexp(values).mantissa / values)
    return torch.where(values == 0, largest, scale).clamp(1.0 / largest, largest)


class _Scale(torch.autograd.Function):
    """`values * scale`, with a gradient that saturates at the largest finite number instead of overflowing.

    An Inf that comes from above is passed on: a GradScaler needs to see it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, scale: Tensor) -> Tensor:
        return values * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        largest = torch.finfo(grad.dtype).max
        scaled = grad * scale
        return torch.where(grad.isinf(), scaled, scaled.clamp(-largest, largest)), None


class _ScaleBothModes(_Scale):
    """The same with forward-mode derivatives, which `torch.compile` refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        scale: Tensor = ctx.saved_tensors[0]
        return tangent * scale


def takes_no_function() -> bool:
    """Whether a transform of `torch.func` is active that knows no `autograd.Function`.

    In compiled code it may be any: there is no `vmap` of one. Elsewhere it is `functionalize`.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    functionalize = torch._C._functorch.TransformType.Functionalize
    return torch.compiler.is_compiling() or any(
        transform.key() == functionalize for transform in torch._C._functorch.get_interpreter_stack()
    )


def _scale(values: Tensor, scale: Tensor) -> Tensor:
    if takes_no_function():
        return values * scale  # its gradient may overflow
    function: type[_Scale] = _Scale if torch.compiler.is_compiling() else _ScaleBothModes
    return cast("Tensor", function.apply(values, scale))  # type: ignore[no-untyped-call]


def _polygons(vertices: Tensor, real: Tensor, low: Tensor) -> _Polygons:
    """Move scaled vertices by `low`. The move rounds, so edges and shape come from before it: small polygons stay."""
    index = torch.arange(vertices.shape[1], device=vertices.device)
    is_last = index == real.sum(1, keepdim=True) - 1  # (B, N)
    end = torch.where(is_last.unsqueeze(-1), vertices[:, :1], _next(vertices))
    edges = torch.where(real.unsqueeze(-1), end - vertices, 0.0)
    following = torch.where(is_last, 0, (index + 1).clamp(max=index.shape[0] - 1)).unsqueeze(-1)
    moved, shape = (torch.where(real.unsqueeze(-1), vertices - to, 0.0) for to in (low, vertices[:, :1].detach()))
    return _Polygons(moved, shape, real, following, edges)


def _next(values: Tensor) -> Tensor:
    """What follows in each row, behind the last one the first.

    `roll` asks how many numbers there are, and a part of N - 1 numbers has a graph of its own where N is 2.
    """
    return torch.cat((values, values[:, :1]), dim=1)[:, 1:]


def _axes(edges: Tensor) -> Tensor:
    return torch.stack((edges[..., 1], -edges[..., 0]), dim=-1)


def _project(vertices: Tensor, axes: Tensor) -> Tensor:
    """Project all vertices on all axes: (B, K, N). Never a matrix product: autocast would halve its inputs.

    A compiler must not compute these again in the backward pass: fused another way, they would no longer be equal
    to the extremes that were found among them, and a gradient would be lost or NaN. So it gets an opaque operator. That
    one knows the reverse mode of autograd only: transforms of `torch.func` refuse it, and a tangent would be dropped.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if torch.compiler.is_compiling() and not transformed:
        return cast("Tensor", _projections_operator(axes, vertices))
    return _projections(axes, vertices)


def _projections(axes: Tensor, vertices: Tensor) -> Tensor:
    x, y = vertices.unsqueeze(1).unbind(-1)
    return axes[..., :1] * x + axes[..., 1:] * y


def refuse_forward_mode(operator: str) -> None:
    """Raise in forward mode, for an operator whose tangent PyTorch would drop: an exported program may be called so."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"triton_mgiou::{operator} knows only the reverse mode, and forward-mode differentiation is active; "
            'expected the function itself, with backend "auto" or "eager", in the place of a traced program'
        )


@torch.library.custom_op("triton_mgiou::project", mutates_args=())
def _projections_operator(axes: Tensor, vertices: Tensor) -> Tensor:
    refuse_forward_mode("project")
    return _projections(axes, vertices)


@_projections_operator.register_fake
def _(axes: Tensor, vertices: Tensor) -> Tensor:
    return axes.new_empty((*axes.shape[:2], vertices.shape[1]))


def _save_projected(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _projections_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    axes, vertices = ctx.saved_tensors
    grad = grad.unsqueeze(-1)  # (B, K, N, 1)
    return (grad * vertices.unsqueeze(1)).sum(2), (grad * axes.unsqueeze(2)).sum(1)


_projections_operator.register_autograd(_projections_backward, setup_context=_save_projected)


def _interval(
    polygons: _Polygons, projections: Tensor, axes: Tensor, *, is_own: bool = False, up_to_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """The interval of the projections on each axis, low and high, both (B, K); the gradient is shared evenly at a tie.

    The two ends of an edge have one projection on its normal, so on a polygon's own axes (`is_own`) both are at an
    extreme if one is. Those of a parallel edge are tied too, but the rounding of coordinates tells them apart:
    `up_to_rounding` ties what is closer than that to an extreme.
    """
    values, real = projections.detach(), polygons.real.unsqueeze(1)
    low = values.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    highest_low, lowest_high = low, high
    if is_own:
        ends = values.diagonal(dim1=1, dim2=2).unsqueeze(-1), values.gather(2, polygons.following)
        edge_low, edge_high = torch.minimum(*ends), torch.maximum(*ends)
        highest_low = torch.where(edge_low == low, edge_high, low)
        lowest_high = torch.where(edge_high == high, edge_low, high)
    if up_to_rounding:
        slack = _slack(_extent(polygons)).unsqueeze(-1) * axes.detach().abs().sum(-1, keepdim=True)
        highest_low, lowest_high = torch.maximum(highest_low, low + slack), torch.minimum(lowest_high, high - slack)
    at_low, at_high = real & (values <= highest_low), real & (values >= lowest_high)
    return _extreme(low, at_low, projections), _extreme(high, at_high, projections)


def _slack(extent: Tensor) -> Tensor:
    """By how much rounding tells equal coordinates apart, by the extent (section 4)."""
    return (WIDEST_TIE * extent).clamp(max=_TIE[extent.dtype])


def _line(extent: Tensor) -> Tensor:
    """The longest interval that is rounding on each of the axes of vertices on one line (section 5), (B,) by (B, 1)."""
    return (2.0 * _slack(extent) * extent).squeeze(1)


def _is_line(p: _Polygons, g: _Polygons, hull: Tensor, extent: Tensor, axis_weight: str) -> Tensor:
    """Whether all vertices of both are on one line but for rounding, by the largest h_k (section 5), (B,)."""
    is_line = hull <= _line(extent)
    if axis_weight == "uniform":
        return is_line
    return is_line & (torch.maximum(_extent(p), _extent(g)) > 2.0 * _slack(extent)).squeeze(1)


def _extent(polygons: _Polygons) -> Tensor:
    """The longer side of a polygon's own bounding box, (B, 1)."""
    vertices, real = polygons.vertices.detach(), polygons.real.unsqueeze(-1)
    high, low = vertices.masked_fill(~real, -torch.inf).amax(1), vertices.masked_fill(~real, torch.inf).amin(1)
    return (high - low).amax(1, keepdim=True)


def _extreme(value: Tensor, tied: Tensor, projections: Tensor) -> Tensor:
    """`value`, (B, K, 1), as (B, K), with the mean derivative of the projections that are tied, (B, K, N)."""
    share = tied.to(value.dtype)
    share = share / share.sum(-1, keepdim=True)
    return value.squeeze(-1) + (share * (projections - projections.detach())).sum(-1)


def _axis_weights(edges: Tensor, extent: Tensor, axis_weight: str) -> tuple[Tensor, Tensor]:
    """The weights w_k of section 3 and which edges are axes at all, both (B, N)."""
    floor = torch.full_like(extent, _TINY[edges.dtype])
    if axis_weight == "uniform":
        floor = torch.maximum(floor, (MIN_AXIS_LENGTH * extent).square())
    squared = edges.square().sum(-1)
    is_axis = ~(squared <= floor)  # a NaN edge is an axis: its NaN must reach the loss
    if axis_weight == "uniform":
        return is_axis.to(edges.dtype), is_axis
    lengths = torch.where(is_axis, torch.where(is_axis, squared, 1.0).sqrt(), 0.0)
    if axis_weight == "length":
        perimeter = lengths.sum(1, keepdim=True)
        return lengths / torch.where(perimeter == 0, 1.0, perimeter), is_axis
    return -torch.expm1(-lengths / (SOFT_AXIS_LENGTH * extent.clamp(min=_TINY[edges.dtype]))), is_axis


def _sum_over_axes(
    own: _Polygons, other: _Polygons, extent: Tensor, axis_weight: str, axis_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the axes of `own`: sums of w_k (1 - GIoU1D_k) and w_k, (B,), which edges are axes, the largest h_k, (B,)."""
    edges = own.edges if axis_grad else own.edges.detach()
    weights, is_axis = _axis_weights(edges, extent, axis_weight)
    axes = _axes(edges)
    own_low, own_high = _interval(own, _project(own.vertices, axes), axes, is_own=True, up_to_rounding=not axis_grad)
    other_low, other_high = _interval(other, _project(other.vertices, axes), axes, up_to_rounding=not axis_grad)
    difference = (own_high - other_high).abs() + (own_low - other_low).abs()
    hull = torch.maximum(own_high, other_high) - torch.minimum(own_low, other_low)
    return (weights * _quotient(difference, hull)).sum(1), weights.sum(1), is_axis, hull.detach().amax(1)


def _convexity(polygons: _Polygons, is_axis: Tensor) -> Tensor:
    """The scale-free convexity term of section 7, (B,): 0 for a convex polygon whose vertices are in order."""
    axes = _axes(polygons.edges)
    projections = _project(polygons.shape, axes)
    low, high = _interval(polygons, projections, axes, is_own=True)
    vertex, start, end = (
        polygons.shape.unsqueeze(1),
        polygons.shape.unsqueeze(2),
        polygons.shape.gather(1, polygons.following.expand(-1, -1, 2)).unsqueeze(2),
    )
    on_edge = (vertex == start).all(-1) | (vertex == end).all(-1)  # (B, N, N), the edge's ends and their copies
    counts = polygons.real.unsqueeze(1) & ~on_edge
    distance = torch.where(counts, projections - projections.diagonal(dim1=1, dim2=2).unsqueeze(-1), 0.0)
    smaller_side = torch.minimum(distance.relu().sum(-1), (-distance).relu().sum(-1))
    width = high - low
    is_wide = is_axis & ~(width <= _line(_extent(polygons)).unsqueeze(1))
    terms = torch.where(is_wide, _quotient(smaller_side, width), 0.0)
    return terms.sum(1) / (polygons.real.sum(1) * is_axis.sum(1).clamp(min=1))


def _boundary(p: _Polygons, g: _Polygons, extent: Tensor, *, up_to_rounding: bool) -> Tensor:
    """How far the outline of P, read in its order, is from being G up to a shift, (B,), in [0, 1].

    With the areas |P| and |G| and their mixed area V, which is half the sum over the edges of P of how far G reaches
    in the direction of the edge's outward normal, times the edge's length:

        boundary = 1 - |P| |G| / V^2 * 2 V |G| / (V^2 + |G|^2)

    By Minkowski's inequality the first quotient is at most 1, and 1 only for a convex P in order that is a scaled G.
    The second one is 1 only where V = |G|. Where G has no area the term is 0. G is a constant of it, and
    the order of its vertices does not count.
    """
    normals, p_area = _outward(p)
    g_area, g_squares = _area_in_order(g, extent), g.edges.detach().square().sum((1, 2))
    projections = _project(g.shape.detach(), normals)
    mixed = _interval(g, projections, normals, up_to_rounding=up_to_rounding)[1].sum(1)
    tiny = _TINY[mixed.dtype]
    flat = g_area <= (MIN_AXIS_LENGTH * g_squares).clamp(min=tiny)
    unit = torch.where(flat, 1.0, torch.maximum(mixed, g_area)).detach()
    rounding = _RESOLUTION[mixed.dtype] * (g_squares / (2.0 * unit)).clamp(min=1.0)  # areas of thin polygons round more
    p_area, g_area, mixed = p_area / unit, g_area / unit, mixed / unit
    shrunk = mixed <= tiny
    denominator = torch.where(shrunk, 1.0, mixed) * (mixed.square() + g_area.square())
    match = 2.0 * p_area * g_area.square() / torch.where(flat, 1.0, denominator)
    term = 1.0 - torch.where(shrunk, 0.0, match)
    return torch.where(flat | (term <= rounding), 0.0, term)


def _area_in_order(polygons: _Polygons, extent: Tensor) -> Tensor:
    """Twice the area with the vertices sorted by their angle about their mean, (B,), without a gradient.

    Those at one angle count as their mean. Where the area is that in their own order but for rounding it is that one,
    to the bit: `_outward` says why.
    """
    shape, real = polygons.shape.detach(), polygons.real
    x, y = (shape - shape.sum(1, keepdim=True) / real.sum(1)[:, None, None]).unbind(-1)
    turn = _turn(x, y).masked_fill(~real, torch.inf)
    order = turn.argsort(1)
    alike = turn.unsqueeze(2) == turn.unsqueeze(1)
    x, y = (torch.where(alike, each.unsqueeze(1), 0.0).sum(2) / alike.sum(2) for each in (x, y))
    x, y = x.masked_fill(~real, 0.0).gather(1, order), y.masked_fill(~real, 0.0).gather(1, order)
    is_last = torch.arange(x.shape[1], device=x.device) == real.sum(1, keepdim=True) - 1
    next_x, next_y = (torch.where(is_last, each[:, :1], _next(each)) for each in (x, y))
    ordered = (x * next_y - y * next_x).sum(1)
    area = _outward(polygons)[1].detach()
    rounding = _RESOLUTION[area.dtype] * extent.squeeze(1) * polygons.edges.detach().abs().sum((1, 2))
    return torch.where((ordered - area).abs() > rounding, ordered, area)


def _turn(x: Tensor, y: Tensor) -> Tensor:
    """A number that grows with the angle of a vector, from -2 to 2: 0 along x, 1 along y and where it has no length."""
    size = x.abs() + y.abs()
    turn = 1.0 - x / torch.where(size > 0, size, 1.0)
    return torch.where(y < 0, -turn, turn)


def _outward(polygons: _Polygons) -> tuple[Tensor, Tensor]:
    """The edges' normals, (B, N, 2), on the outside by the sign of the area (0 without one), and twice the area, (B,).

    An edge's projection on its normal, and no shoelace: the mixed area of equal polygons has these same numbers.
    """
    normals = _axes(polygons.edges)
    start = (normals * polygons.shape).sum(-1)
    end = (normals * polygons.shape.gather(1, polygons.following.expand(-1, -1, 2))).sum(-1)
    sign = start.detach().sum(1, keepdim=True).sign()
    return normals * sign.unsqueeze(-1), torch.maximum(start * sign, end * sign).sum(1)


def _quotient(numerator: Tensor, width: Tensor) -> Tensor:
    """`numerator / width`, or 0 with gradient 0 where all projections are equal (section 5)."""
    flat = width <= _TINY[width.dtype]
    return torch.where(flat, 0.0, numerator / torch.where(flat, 1.0, width))
