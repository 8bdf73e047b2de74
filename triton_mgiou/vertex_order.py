"""Polygons whose corners are listed crosswise: find them, and put them in order.

The boundary term takes a target's area in the order of its vertices (section 7 of `reference/DEFINITION.md`), so a
target that crosses itself gives the right polygon a loss above 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def crossed(polygons: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Which polygons cross themselves: two of their edges meet at a point inside both.

    Edges that only touch, or lie on each other, do not cross. The comparison is exact but for rounding in float64.

    Args:
        polygons: Vertices in any floating-point type, shape (B, M, 2).
        lengths: How many vertices of each polygon are real, shape (B,); the rest is padding.
        mask: Which vertices are real, bool, shape (B, M); instead of `lengths`.

    Returns:
        bool, shape (B,), on the polygons' device. NaN crosses nothing.
    """
    vertices, count = _real_first(polygons, _real(polygons, lengths, mask))
    index = torch.arange(vertices.shape[1], device=vertices.device)
    following = torch.where(index + 1 < count, index + 1, 0)
    end = vertices.gather(1, following.unsqueeze(-1).expand(-1, -1, 2))
    edges = end - vertices
    # Row k, column j: on which side of the line of edge k the two ends of edge j are.
    from_start, to_end = vertices.unsqueeze(1) - vertices.unsqueeze(2), end.unsqueeze(1) - vertices.unsqueeze(2)
    apart = (_side(edges, from_start) * _side(edges, to_end)) < 0
    is_edge = index < count
    both = apart & apart.transpose(1, 2) & is_edge.unsqueeze(1) & is_edge.unsqueeze(2)
    return both.flatten(1).any(1)


def order_vertices(polygons: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Put the vertices of polygons that cross themselves in order; others are returned as they are, to the bit.

    A crossed polygon's vertices are sorted by their angle about their mean, from its first vertex on, turning from x
    towards y. Vertices in convex position, such as the corners of a quadrangle listed crosswise, become the convex
    polygon that they are the corners of; others a polygon that the mean sees all of.

    Args:
        polygons: Vertices in any floating-point type, shape (B, M, 2).
        lengths: How many vertices of each polygon are real, shape (B,); the rest is padding and stays where it is.
        mask: Which vertices are real, bool, shape (B, M); instead of `lengths`.

    Returns:
        The same vertices, same shape, type and device.
    """
    real = _real(polygons, lengths, mask)
    vertices, count = _real_first(polygons, real)
    is_real = torch.arange(vertices.shape[1], device=vertices.device) < count
    mean = vertices.sum(1, keepdim=True) / count.clamp(min=1).unsqueeze(-1)
    x, y = (vertices - mean).unbind(-1)
    angle = torch.atan2(y, x)
    turn = torch.remainder(angle - angle[:, :1], 2 * math.pi)
    order = torch.argsort(torch.where(is_real, turn, torch.inf), dim=1, stable=True)
    places = _places(real)
    sorted_places = torch.empty_like(places).scatter(1, places, places.gather(1, order))
    ordered = polygons.gather(1, sorted_places.unsqueeze(-1).expand(-1, -1, 2))
    return torch.where(crossed(polygons, lengths, mask)[:, None, None], ordered, polygons)


def _real(polygons: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    if polygons.dim() != 3 or polygons.shape[2] != 2 or not polygons.is_floating_point():
        raise ValueError(
            f"polygons: expected floating point of shape (B, M, 2), got {polygons.dtype} of {tuple(polygons.shape)}"
        )
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask: expected at most one of them, got both")
    shape = tuple(polygons.shape[:2])
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"mask: expected bool of shape {shape}, got {mask.dtype} of {tuple(mask.shape)}")
        return mask.to(polygons.device)
    if lengths is None:
        return torch.ones(shape, dtype=torch.bool, device=polygons.device)
    if lengths.is_floating_point() or tuple(lengths.shape) != shape[:1]:
        raise ValueError(
            f"lengths: expected integers of shape {shape[:1]}, got {lengths.dtype} of {tuple(lengths.shape)}"
        )
    index = torch.arange(shape[1], device=polygons.device)
    return index < lengths.to(polygons.device).unsqueeze(1)


def _places(real: Tensor) -> Tensor:
    """The indices of the real vertices in order, then those of the others, (B, M)."""
    return torch.argsort((~real).to(torch.uint8), dim=1, stable=True)


def _real_first(polygons: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, relative to the first real vertex, 0 behind the real ones: (B, M, 2); and their number, (B, 1)."""
    count = real.sum(1, keepdim=True)
    vertices = polygons.detach().double().gather(1, _places(real).unsqueeze(-1).expand(-1, -1, 2))
    is_real = torch.arange(real.shape[1], device=real.device) < count
    return torch.where(is_real.unsqueeze(-1), vertices - vertices[:, :1], 0.0), count


def _side(edges: Tensor, points: Tensor) -> Tensor:
    """The sign of the cross product of each edge, (B, K, 2), and each point relative to its start, (B, K, J, 2)."""
    return (edges[..., None, 0] * points[..., 1] - edges[..., None, 1] * points[..., 0]).sign()
