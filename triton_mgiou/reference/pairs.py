"""MGIoU of every shape of one set with every shape of another, in plain PyTorch (section 11).

The intervals of a pair on its axes are those of the losses, by the same functions, and the gradient takes the path
through the axes. What is added is that a pair is 1 only if the two coincide: where the axes of the loss cannot tell
two points, or two collinear segments, apart, other axes decide.

Computing all pairs takes far more memory than the matrix, so a large one is computed in blocks of up to `MEMORY`
bytes, and the backward pass computes each block again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_mgiou.box_formats import FORMATS
from triton_mgiou.options import ABSENT, MIN_AXIS_LENGTH
from triton_mgiou.reference import boxes, polygons
from triton_mgiou.reference.polygons import compute_dtype, real_count, takes_no_function

MEMORY = 2**28
"""Bytes that the eager backend may take for a matrix, beside the matrix itself and its gradient."""


class _Shapes(NamedTuple):
    """A set. A shape that is not there, or not finite, is 0; its gradient is 0 or NaN."""

    numbers: Tensor  # (B, P, ...)
    is_there: Tensor  # (B, P)
    is_finite: Tensor  # (B, P)
    is_real: Tensor  # (B, P, N) of a polygon's vertices, the real ones first and at least one; (B, P, 0) of boxes


class _Axes(NamedTuple):
    """The intervals of n pairs on K axes, all (n, K)."""

    gap: Tensor  # 1 - GIoU1D
    apart: Tensor  # the distance of their middles over the sum of their half-lengths, that of points being the limit
    halves: Tensor  # that sum
    hull: Tensor  # the length of their joint hull
    weight: Tensor


_Values = Callable[[_Shapes, _Shapes], Tensor]  # of n pairs, (n,)


def box_matrix(
    boxes1: Tensor,
    boxes2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    *,
    fmt: str,
    angle: str,
    clockwise: bool,
    over: str,
    axis_weight: str,
) -> Tensor:
    """The matrix (B, P, T) of boxes (B, P, ...) and (B, T, ...) of any format but that of four free corners."""
    dtype = compute_dtype(boxes1.dtype, boxes2.dtype)

    def values(first: _Shapes, second: _Shapes) -> Tensor:
        if fmt == "corners3d":
            return _over_axes(_axes_of_corners(first.numbers, second.numbers), over)
        pair = boxes._pair(first.numbers, second.numbers, fmt, angle, clockwise)
        return _over_axes(_axes_of_boxes(pair, angle, axis_weight, FORMATS[fmt].has_angle), over)

    floats = 1200 if fmt == "corners3d" else 300  # of one pair, with the gradient
    return _matrix(values, _boxes(boxes1.to(dtype), mask1), _boxes(boxes2.to(dtype), mask2), floats * dtype.itemsize)


def polygon_matrix(
    polygons1: Tensor,
    polygons2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    mask1: Tensor | None,
    mask2: Tensor | None,
    *,
    over: str,
    axis_weight: str,
) -> Tensor:
    """The matrix (B, P, T) of polygons (B, P, N, 2) and (B, T, M, 2)."""
    dtype = compute_dtype(polygons1.dtype, polygons2.dtype)
    first = _polygons(polygons1.to(dtype), lengths1, mask1)
    second = _polygons(polygons2.to(dtype), lengths2, mask2)

    def values(first: _Shapes, second: _Shapes) -> Tensor:
        return _over_axes(_axes_of_polygons(first, second, axis_weight), over)

    vertices = polygons1.shape[2] + polygons2.shape[2]
    return _matrix(values, first, second, 12 * vertices * (vertices + 12) * dtype.itemsize)


def _boxes(numbers: Tensor, mask: Tensor | None) -> _Shapes:
    is_there = numbers.new_ones(numbers.shape[:2], dtype=torch.bool) if mask is None else mask
    return _shapes(numbers, is_there, numbers.new_zeros((*numbers.shape[:2], 0), dtype=torch.bool))


def _polygons(vertices: Tensor, lengths: Tensor | None, mask: Tensor | None) -> _Shapes:
    count = real_count(vertices, lengths)
    is_there = count > 0 if mask is None else mask & (count > 0)
    is_real = torch.arange(vertices.shape[2], device=vertices.device) < count.clamp(min=1).unsqueeze(2)
    return _shapes(torch.where(is_real.unsqueeze(3), vertices, 0.0), is_there, is_real)


def _shapes(numbers: Tensor, is_there: Tensor, is_real: Tensor) -> _Shapes:
    each = (*numbers.shape[:2], *[1] * (numbers.dim() - 2))  # one for each shape
    numbers = torch.where(is_there.reshape(each), numbers, 0.0)
    is_finite = numbers.detach().flatten(2).isfinite().all(2)
    poison = torch.where(is_finite, 1.0, torch.nan).to(numbers.dtype)  # makes NaN of a gradient of 0
    numbers = torch.where(is_finite.reshape(each), numbers * poison.reshape(each), 0.0)
    return _Shapes(numbers, is_there, is_finite, is_real)


def _matrix(values: _Values, first: _Shapes, second: _Shapes, pair_bytes: int) -> Tensor:
    """All pairs, (B, P, T): at once if that fits into `MEMORY` or must be seen through by a transform, or in blocks."""
    sizes = (*first.is_there.shape, second.is_there.shape[1])

    def block(first: _Shapes, second: _Shapes) -> Tensor:
        shape = (*first.is_there.shape, second.is_there.shape[1])
        p = _Shapes(*(_repeat(each, 2, shape[2], sizes[2]).flatten(0, 2) for each in first))
        g = _Shapes(*(_repeat(each, 1, shape[1], sizes[1]).flatten(0, 2) for each in second))
        found = torch.where(p.is_finite & g.is_finite, values(p, g), torch.nan)
        return torch.where(p.is_there & g.is_there, found, ABSENT).reshape(shape)

    pairs = max(1, MEMORY // pair_bytes)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or sizes[0] * sizes[1] * sizes[2] <= pairs or forward_ad._current_level >= 0:
        return block(first, second)
    return cast("Tensor", _InBlocks.apply(block, pairs, *first, *second))  # type: ignore[no-untyped-call]


class _Repeat(torch.autograd.Function):
    """`values` repeated along a new dimension. Gradients saturate such that their sum cannot overflow (section 5)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, dim: int, count: int, total: int) -> Tensor:  # noqa: ARG004
        return values.unsqueeze(dim).expand(*values.shape[:dim], count, *values.shape[dim:]).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, int], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.dim, ctx.count, total = inputs
        # The bits of a number would make it a constant of compiled code, compiled again for each other one.
        ctx.terms = 2 * total + 1 if torch.compiler.is_compiling() else 1 << (total - 1).bit_length()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        largest = torch.finfo(grad.dtype).max / ctx.terms
        return torch.where(grad.isinf(), grad, grad.clamp(-largest, largest)).sum(ctx.dim), None, None, None


class _RepeatBothModes(_Repeat):
    """The same with forward-mode derivatives, which `torch.compile` refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_rest: None) -> Tensor:
        return _Repeat.forward(tangent, ctx.dim, ctx.count, 0)


def _repeat(values: Tensor, dim: int, count: int, total: int) -> Tensor:
    """For each of `count` shapes of the other set, of which there are `total`."""
    if takes_no_function():
        return _Repeat.forward(values, dim, count, total)
    function = _Repeat if torch.compiler.is_compiling() else _RepeatBothModes
    return cast("Tensor", function.apply(values, dim, count, total))  # type: ignore[no-untyped-call]


class _InBlocks(torch.autograd.Function):
    """`block` on up to `pairs` pairs at a time, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, block: Callable[[_Shapes, _Shapes], Tensor], pairs: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.block, ctx.pairs = block, pairs
        first, second = _Shapes(*tensors[:4]), _Shapes(*tensors[4:])
        result = first.numbers.new_empty((*first.is_there.shape, second.is_there.shape[1]))
        for place in _places(result.shape, pairs):
            result[place] = block(_part(first, place[0], place[1]), _part(second, place[0], place[2]))
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        for is_wanted, what, argument in (
            (torch.is_grad_enabled(), "second derivative", "create_graph"),
            (torch._C._functorch.is_legacy_batchedtensor(upstream), "batch of gradients", "is_grads_batched"),
        ):
            if is_wanted:
                raise RuntimeError(
                    f"a matrix of {upstream.numel()} pairs has no {what}, as more than {ctx.pairs} are computed in "
                    f"blocks: expected {argument}=False, got {argument}=True; triton_mgiou.reference.pairs.MEMORY says "
                    "how many bytes may be taken"
                )
        tensors = ctx.saved_tensors  # once: under a checkpoint there is no second time
        first, second = _Shapes(*tensors[:4]), _Shapes(*tensors[4:])
        grads = torch.zeros_like(first.numbers), torch.zeros_like(second.numbers)
        asked = ctx.needs_input_grad[2], ctx.needs_input_grad[6]
        for place in _places(upstream.shape, ctx.pairs):
            parts = [_part(each, place[0], rows) for each, rows in zip((first, second), place[1:], strict=True)]
            leaves = [part.numbers.detach().requires_grad_(need) for part, need in zip(parts, asked, strict=True)]
            with torch.enable_grad():
                value = ctx.block(*(part._replace(numbers=leaf) for part, leaf in zip(parts, leaves, strict=True)))
            found = iter(torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], upstream[place]))
            for grad, rows, need in zip(grads, place[1:], asked, strict=True):
                if need:
                    grad[place[0], rows] += next(found)
        p, g = (grad if need else None for grad, need in zip(grads, asked, strict=True))
        return None, None, p, None, None, None, g, None, None, None


_Place = tuple[slice, slice, slice]


def _places(sizes: torch.Size, pairs: int) -> Iterator[_Place]:
    """Blocks of a matrix (B, P, T), none with more than `pairs` pairs."""
    steps, left = [], pairs
    for size in reversed(sizes):
        steps.append(min(size, left))
        left //= steps[-1]
    starts = (range(0, size, step) for size, step in zip(sizes, reversed(steps), strict=True))
    for place in itertools.product(*starts):
        b, p, t = (slice(start, start + step) for start, step in zip(place, reversed(steps), strict=True))
        yield b, p, t


def _part(shapes: _Shapes, batches: slice, rows: slice) -> _Shapes:
    return _Shapes(*(each[batches, rows] for each in shapes))


def _over_axes(sides: tuple[_Axes, ...], over: str) -> Tensor:
    """The value of each pair, (n,). Sums run over each side by itself, so that swapping the two changes no bit."""
    if over == "mean":
        total = torch.stack([(side.weight * side.gap).sum(1) for side in sides]).sum(0)
        weight = torch.stack([side.weight.sum(1) for side in sides]).sum(0)
        return 1.0 - total / torch.where(weight == 0, 1.0, weight)
    distances = [torch.where(side.weight > 0, side.gap if over == "min" else side.apart, 0.0) for side in sides]
    return 1.0 - torch.cat(distances, dim=1).amax(1)


def _axes(offset: Tensor, a: Tensor, b: Tensor, limit: Tensor, weight: Tensor) -> _Axes:
    """By the offset of the middles and the half-lengths, all (n, K)."""
    halves = a + b
    hull = (halves + torch.maximum(offset.abs(), (a - b).abs())).detach()
    return _Axes(2.0 * boxes._distance(offset, a, b), offset.abs() / torch.maximum(halves, limit), halves, hull, weight)


def _axes_by_ends(
    low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor, limit: Tensor, weight: Tensor
) -> _Axes:
    difference = (high - other_high).abs() + (low - other_low).abs()
    hull = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    halves = 0.5 * ((high - low) + (other_high - other_low))
    offset = 0.5 * ((high - other_high) + (low - other_low))
    return _Axes(
        polygons._quotient(difference, hull), offset.abs() / torch.maximum(halves, limit), halves, hull, weight
    )


def _limit(extent: Tensor) -> Tensor:
    """What is no longer than this counts as a point, (n, 1)."""
    return (MIN_AXIS_LENGTH * extent).clamp(min=boxes._no_length(extent))


def _point(extent: Tensor, limit: Tensor) -> Tensor:
    """What is no longer than this is a point on an axis but for rounding, (n, 1)."""
    return torch.maximum(limit, 2.0 * polygons._slack(extent))


def _axes_of_boxes(pair: boxes._Pair, unit: str, axis_weight: str, has_angle: bool) -> tuple[_Axes, _Axes]:
    """The directions of both boxes, (n, D) each. Those of boxes without an angle do not round."""
    extent = boxes._extent(pair, unit)
    limit = _limit(extent)
    point = _point(extent, limit) if has_angle else limit
    p, g = (
        _axes(*intervals, limit, boxes._axis_weights(half, extent, axis_weight))
        for intervals, half in zip(boxes._on_axes(pair, pair, unit), (pair.p_half, pair.g_half), strict=True)
    )
    if pair.offset.shape[1] == 2:
        flat = ((p.hull <= point) | (g.hull <= point)).any(1, keepdim=True)
        none = torch.maximum(p.weight, g.weight).amax(1, keepdim=True) == 0
        p_other, g_other = flat | none, flat | none
    else:  # an axis is the edge itself: without one it counts where both are points on it, and apart
        p_other, g_other = p.halves <= limit, g.halves <= limit
    return _else_seen(p, p_other, point), _else_seen(g, g_other, point)


def _else_seen(side: _Axes, other: Tensor, point: Tensor) -> _Axes:
    """Where `other` is True, all axes count on which the pair is more than a point."""
    return _weighted(side, torch.where(other, (side.hull > point).to(side.weight.dtype), side.weight))


def _weighted(side: _Axes, weight: Tensor) -> _Axes:
    """With another weight; not by `_replace`, which PyTorch 2.8 cannot compile."""
    return _Axes(side.gap, side.apart, side.halves, side.hull, weight)


def _axes_of_polygons(first: _Shapes, second: _Shapes, axis_weight: str) -> tuple[_Axes, ...]:
    """The normals of both, (n, N) and (n, M), or x and y, (n, 2), where these see only a line or nothing."""
    p, g, extent = polygons._normalise(first.numbers, first.is_real, second.numbers, second.is_real)
    limit = _limit(extent)
    sides, is_flat, is_axis = [], [], []
    for own, other in ((p, g), (g, p)):
        weight, counts = polygons._axis_weights(own.edges, extent, axis_weight)
        normals = polygons._axes(own.edges)
        ends = _ends(own, other, normals, is_own=True)
        own_limit = (limit * own.edges.detach().norm(dim=2)).clamp(min=polygons._TINY[limit.dtype])
        side = _axes_by_ends(*ends, own_limit, weight)
        sides.append(side)
        is_flat.append(counts & (side.hull <= own_limit))
        is_axis.append(counts)
    hull = torch.cat([side.hull for side in sides], dim=1).detach().amax(1)
    is_line = polygons._is_line(p, g, hull, extent, axis_weight).unsqueeze(1) | torch.cat(is_flat, 1).any(1, True)
    degenerate = is_line | ~torch.cat(is_axis, dim=1).any(1, keepdim=True)
    x_and_y = torch.eye(2, dtype=extent.dtype, device=extent.device).expand(extent.shape[0], 2, 2)
    coordinates = _axes_by_ends(*_ends(p, g, x_and_y, is_own=False), limit, torch.zeros_like(extent))
    sides = [_weighted(side, torch.where(degenerate, 0.0, side.weight)) for side in sides]
    return *sides, _else_seen(coordinates, degenerate, _point(extent, limit))


def _ends(
    first: polygons._Polygons, second: polygons._Polygons, axes: Tensor, is_own: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least and largest projection of both, (n, K); `is_own` if the axes are the first one's."""
    low, high = polygons._interval(first, polygons._project(first.vertices, axes), axes, is_own=is_own)
    return low, high, *polygons._interval(second, polygons._project(second.vertices, axes), axes)


def _axes_of_corners(first: Tensor, second: Tensor) -> tuple[_Axes, ...]:
    """The three edges at vertex 0 of both, (n, 3) each, and the line that joins two plates, rods or points, (n, 1)."""
    p, g, low, extent = boxes._scaled_corners(first, second)
    limit = _limit(extent)
    p_edges, g_edges = boxes._edges(p), boxes._edges(g)
    between = (p.mean(1, keepdim=True) - g.mean(1, keepdim=True)).detach()
    sides, limits = [], []
    for edges in (p_edges, g_edges, between):
        p_ends, g_ends = (boxes._interval(each - low, edges) for each in (p, g))
        limits.append((limit * edges.detach().norm(dim=2)).clamp(min=polygons._TINY[limit.dtype]))
        sides.append(_axes_by_ends(*p_ends, *g_ends, limits[-1], boxes._is_axis(edges, extent)))
    joins = (sides[2].halves <= limits[2]) & (sides[2].hull > limits[2])
    return sides[0], sides[1], _weighted(sides[2], joins.to(limit.dtype))
