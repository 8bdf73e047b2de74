"""`MGIoULoss`: the loss as a module, with the calling convention of mmdetection's losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_mgiou.functional import REDUCTIONS, mgiou_loss


class MGIoULoss(nn.Module):
    """`mgiou_loss` as a module that a detector built on mmdetection or mmrotate takes as it is.

    Args:
        reduction: "mean", "sum" or "none".
        loss_weight: Factor on the result.
        **options: `axis_weight`, `axis_grad`, `convexity_weight`, `boundary_weight` and `backend` of `mgiou_loss`.

    Raises:
        TypeError: An option that `mgiou_loss` does not have.
        ValueError: An unknown `reduction`. Other options are checked by the first call.
    """

    OPTIONS = ("axis_weight", "axis_grad", "convexity_weight", "boundary_weight", "backend")

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__()
        if unknown := sorted(set(options) - set(self.OPTIONS)):
            raise TypeError(f"options must be among {', '.join(self.OPTIONS)}, got {', '.join(unknown)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.options = options

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the weighted loss.

        Args:
            pred: Predicted vertices, shape (B, N, 2), floating.
            target: Target vertices, shape (B, M, 2), floating.
            weight: Shape (B,), or (B, k) to be averaged over k. If no entry is positive, a reduced loss is 0 and
                connected to the graph.
            avg_factor: Divides the sum instead of B when the reduction is "mean".
            reduction_override: Replaces the module's `reduction` for this call.
            **kwargs: Further arguments of `mgiou_loss` for this call: lengths, masks, or an option to override.

        Returns:
            A scalar, or shape (B,) for "none".

        Raises:
            TypeError: As `mgiou_loss`.
            ValueError: As `mgiou_loss`.
        """
        reduction = self.reduction if reduction_override is None else reduction_override
        if weight is not None and reduction != "none":
            weight = torch.where((weight > 0).any(), weight, 0)
        return self.loss_weight * mgiou_loss(
            pred,
            target,
            weight=weight,
            avg_factor=avg_factor,
            reduction=reduction,
            **{**self.options, **kwargs},
        )

    def extra_repr(self) -> str:
        """Show the options that were given."""
        shown = {"reduction": self.reduction, "loss_weight": self.loss_weight, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
