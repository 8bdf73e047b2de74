"""The L2 term of `PolygonLoss` in plain PyTorch: one minus an object keypoint similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_mgiou.options import FAR, MIN_AREA


def per_sample_l2(pred: Tensor, target: Tensor, visible: Tensor, area: Tensor, sigmas: Tensor | float) -> Tensor:
    """The mean over each sample's visible vertices of 1 - exp(-d^2 / (8 sigma^2 area)), d their distances.

    Args:
        pred: Predicted vertices, shape (B, N, 2), float32 or float64.
        target: Target vertices, likewise.
        visible: Which of them count, shape (B, N), bool; the others may hold anything.
        area: Of each sample, shape (B,), likewise.
        sigmas: Tolerances of the vertices, shape (N,) or (1,), or one for all.

    Returns:
        Shape (B,), in the same type; 0 for a sample without a visible vertex.
    """
    if isinstance(sigmas, Tensor):
        sigmas = sigmas.to(pred.dtype).unsqueeze(-1)
    difference = torch.sub(pred / 2, target, alpha=0.5)  # of halves, which does not overflow
    difference = torch.where(visible.unsqueeze(-1), difference, 0.0)
    difference = torch.add(difference, difference, alpha=0)  # an Inf is not far away, but NaN
    area = torch.where(visible.any(1), area, 1.0).clamp(min=MIN_AREA)
    scaled = difference / area.sqrt()[:, None, None] / (sigmas * math.sqrt(2))
    scaled = torch.where(scaled.abs() > FAR, FAR, scaled)
    losses = -torch.expm1(-scaled.square().sum(-1))
    return losses.sum(1) / visible.sum(1).clamp(min=1)
