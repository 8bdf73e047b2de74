"""The paper's formula in float64 PyTorch, one sample after the other: autograd of it is the gradient to compare with.

Every projection is relative to the start of the axis's own edge, so that both ends of that edge project to exactly
the same number and `amax` and `amin` share the gradient between them.

Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _edges(polygon: Tensor) -> Tensor:
    return torch.roll(polygon, -1, dims=0) - polygon


def _weights(polygon: Tensor, axis_weight: str, extent: Tensor) -> Tensor:
    lengths: Tensor = _edges(polygon).norm(dim=1)
    if axis_weight == "uniform":
        return (lengths > 1e-6 * extent).to(lengths)
    if axis_weight == "length":
        return lengths / lengths.sum()
    return 1 - torch.exp(-lengths / (0.01 * extent))


def _weighted_giou(
    own: Tensor, other: Tensor, axis_weight: str, extent: Tensor, axis_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the sums of w_k GIoU1D_k and of w_k over the axes of `own`."""
    fixed = own if axis_grad else own.detach()
    edges = _edges(fixed)
    axes = torch.stack((edges[:, 1], -edges[:, 0]), dim=1)

    def project(polygon: Tensor) -> Tensor:
        from_start = polygon.unsqueeze(0) - own.detach().unsqueeze(1)  # (axes, vertices, 2)
        return axes[:, :1] * from_start[..., 0] + axes[:, 1:] * from_start[..., 1]

    p, g = project(own), project(other)
    max_p, min_p, max_g, min_g = p.amax(1), p.amin(1), g.amax(1), g.amin(1)
    inter = torch.relu(torch.minimum(max_p, max_g) - torch.maximum(min_p, min_g))
    union = (max_p - min_p) + (max_g - min_g) - inter
    hull = torch.maximum(max_p, max_g) - torch.minimum(min_p, min_g)
    weights = _weights(fixed, axis_weight, extent)
    return (weights * (inter / union - (hull - union) / hull)).sum(), weights.sum()


def _convexity(polygon: Tensor, axis_weight: str, extent: Tensor) -> Tensor:
    edges = _edges(polygon)
    from_start = polygon.unsqueeze(0) - polygon.unsqueeze(1)  # (axes, vertices, 2)
    along = edges[:, 1:] * from_start[..., 0] - edges[:, :1] * from_start[..., 1]
    distances: Tensor = along / edges.norm(dim=1).unsqueeze(1)
    smaller = torch.minimum(torch.relu(distances).sum(1), torch.relu(-distances).sum(1))
    terms = smaller / (len(polygon) * (distances.amax(1) - distances.amin(1)))
    return terms[_weights(polygon, axis_weight, extent) > 0].mean()


def per_sample_loss(
    pred: Tensor,
    target: Tensor,
    *,
    pred_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    axis_weight: str = "uniform",
    axis_grad: bool = True,
    convexity_weight: float = 0.0,
) -> Tensor:
    """Return each sample's loss, shape (B,); for polygons without a degenerate edge, at least two vertices each."""
    losses = []
    for b in range(len(pred)):
        p = pred[b].double() if pred_lengths is None else pred[b, : pred_lengths[b]].double()
        g = target[b].double() if target_lengths is None else target[b, : target_lengths[b]].double()
        both = torch.cat((p, g)).detach()
        extent = (both.amax(0) - both.amin(0)).max()
        p_sum, p_weights = _weighted_giou(p, g, axis_weight, extent, axis_grad)
        g_sum, g_weights = _weighted_giou(g, p, axis_weight, extent, axis_grad)
        loss = (1 - (p_sum + g_sum) / (p_weights + g_weights)) / 2
        if convexity_weight:
            loss = loss + convexity_weight * _convexity(p, axis_weight, extent)
        losses.append(loss)
    return torch.stack(losses)
