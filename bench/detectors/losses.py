"""Losses that are compared; those of keypoints as Ultralytics calls them, (pred, target, mask, area) to a scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.convergence.losses import reported
from triton_mgiou.reference import boxes

SHORTEST = 5e-4  # a distance that keeps the slope of `quadratic` finite at the target


class Reported(nn.Module):
    """The polygon loss of the two reports (`bench.convergence.losses.reported`) in a pose head.

    A vertex that is not visible is padding, which it replaces by a repeated vertex.

    Args:
        full_precision: Compute everything in float32, whatever autocast says.
        **options: Those of `reported`: `mask`, `nan_to_num`, `clamp`, `sort`, `epsilon`.
    """

    def __init__(self, *, full_precision: bool = False, **options: Any) -> None:
        super().__init__()
        self.full_precision = full_precision
        self.options = options

    def forward(self, pred_kpts: Tensor, gt_kpts: Tensor, kpt_mask: Tensor, area: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean over the positives: vertices (P, K, 2 or more), visible vertices (P, K)."""
        visible = kpt_mask != 0
        first = torch.argsort((~visible).to(torch.uint8), dim=1, stable=True).unsqueeze(2)
        target = gt_kpts[..., :2].gather(1, first.expand(-1, -1, 2))
        pred, lengths = pred_kpts[..., :2], visible.sum(1)
        device = pred.device
        with device:  # it makes tensors of its own
            if self.full_precision:
                with torch.autocast(device.type, enabled=False):
                    return reported(pred.float(), target.float(), lengths, 0.0, **self.options).mean()
            return reported(pred, target, lengths, 0.0, **self.options).mean()


class FewVisible(nn.Module):
    """One loss for the samples with three visible vertices or more, another for the rest."""

    def __init__(self, loss: nn.Module, for_few: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.for_few = for_few

    def forward(self, pred_kpts: Tensor, gt_kpts: Tensor, kpt_mask: Tensor, area: Tensor) -> Tensor:
        """Return the mean over all samples: a sample without a visible vertex has loss 0 in either."""
        few = (kpt_mask != 0).sum(1, keepdim=True) < 3
        value: Tensor = self.loss(pred_kpts, gt_kpts, kpt_mask & ~few, area)
        rest: Tensor = self.for_few(pred_kpts, gt_kpts, kpt_mask & few, area)
        return value + rest


class Watched(nn.Module):
    """A keypoint loss, and the share of the samples whose gradient is not finite, one number for each backward."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.bad: list[Tensor] = []

    def forward(self, pred_kpts: Tensor, gt_kpts: Tensor, kpt_mask: Tensor, area: Tensor) -> Tensor:
        """Return the loss."""
        if pred_kpts.requires_grad:
            pred_kpts.register_hook(self._count)  # type: ignore[no-untyped-call]
        value: Tensor = self.loss(pred_kpts, gt_kpts, kpt_mask, area)
        return value

    def _count(self, gradient: Tensor) -> None:
        self.bad.append((~gradient.flatten(1).isfinite()).any(1).float().mean())


def quadratic(pred: Tensor, target: Tensor) -> Tensor:
    """The loss of paired boxes (P, 5) by the root of the mean square of the losses on the axes, in place of their mean.

    So the axis that is furthest off has the largest slope, as it has by ProbIoU.
    """
    pair = boxes._pair(pred, target, "cxcywhr", "radians", True)
    on_axes = boxes._on_axes(pair, pair, "radians")
    mean = torch.cat([boxes._distance(*intervals) for intervals in on_axes], 1).square().mean(1)
    loss: Tensor = (mean + SHORTEST**2).sqrt() - SHORTEST
    return loss
