"""What the losses do in debug mode: look for NaN and Inf in its input, its output and the gradients.

Values are read on the host, which `torch.compile` must not trace, so it breaks its graph here. Marking that imports the
compiler, which takes a second: only debug mode imports this module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from triton_mgiou.training.finite import check_finite


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_input(
    name: str,
    vertices: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    function: str = "mgiou_loss",
) -> Tensor:
    """Check one side's real vertices, or boxes, and return the tensor to compute the loss with.

    That is a view, whose gradient is the loss's alone and not the sum over all uses.
    """
    if lengths is not None:
        mask = torch.arange(vertices.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    check_finite(vertices, name, f"{function}, input", mask=None if mask is None else mask.unsqueeze(2))
    return vertices.view_as(vertices) if torch.is_grad_enabled() and vertices.requires_grad else vertices


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_radians(pred: Tensor, target: Tensor) -> None:
    """Warn where angles in radians look like degrees: a network may count turns, but hardly more than two."""
    for name, boxes in (("pred", pred), ("target", target)):
        angles = boxes.detach()[:, -1].abs()
        count = int((angles > 4 * math.pi).sum())
        if count:
            warnings.warn(
                f"box_mgiou_loss, input: {count} of {len(angles)} angles of {name} are above 4 pi, up to "
                f'{angles.max().item():.6g}: expected radians; for degrees give angle="degrees"',
                RuntimeWarning,
                stacklevel=3,
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_factors(*, function: str = "mgiou_loss", **factors: object) -> None:
    """Check the weights and the divisor, if they are tensors."""
    for name, factor in factors.items():
        if isinstance(factor, Tensor):
            check_finite(factor, name, f"{function}, input")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_output(loss: Tensor, pred: Tensor, target: Tensor, *, function: str = "mgiou_loss") -> None:
    """Check the loss now, and in the backward pass the gradient that comes to it and those that go to both sides."""
    check_finite(loss, "loss", f"{function}, output")
    if not loss.requires_grad:
        return
    upstream = 0.0

    def check_upstream(gradient: Tensor) -> None:
        nonlocal upstream
        check_finite(gradient, "gradient of the loss", f"{function}, backward, from what uses the loss")
        upstream = gradient.abs().max().item() if gradient.numel() else 0.0

    def check_gradient(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: check_finite(
            gradient, f"gradient of {name}", f"{function}, backward, with up to {upstream:.6g} from above"
        )

    loss.register_hook(check_upstream)  # type: ignore[no-untyped-call]
    for name, side in (("pred", pred), ("target", target)):
        if side.requires_grad:
            side.register_hook(check_gradient(name))  # type: ignore[no-untyped-call]
