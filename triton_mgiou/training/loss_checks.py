"""What `mgiou_loss` does in debug mode: look for NaN and Inf in its input, its output and the gradients.

Values are read on the host, which `torch.compile` must not trace, so it breaks its graph here. Marking that imports the
compiler, which takes a second: only debug mode imports this module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triton_mgiou.training.finite import check_finite


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_input(name: str, vertices: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Check one side's real vertices, and return the tensor to compute the loss with.

    That is a view, whose gradient is the loss's alone and not the sum over all uses.
    """
    if lengths is not None:
        mask = torch.arange(vertices.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    check_finite(vertices, name, "mgiou_loss, input", mask=None if mask is None else mask.unsqueeze(2))
    return vertices.view_as(vertices) if torch.is_grad_enabled() and vertices.requires_grad else vertices


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_factors(**factors: object) -> None:
    """Check the weights and the divisor, if they are tensors."""
    for name, factor in factors.items():
        if isinstance(factor, Tensor):
            check_finite(factor, name, "mgiou_loss, input")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_output(loss: Tensor, pred: Tensor, target: Tensor) -> None:
    """Check the loss now, and in the backward pass the gradient that comes to it and those that go to both sides."""
    check_finite(loss, "loss", "mgiou_loss, output")
    if not loss.requires_grad:
        return
    upstream = 0.0

    def check_upstream(gradient: Tensor) -> None:
        nonlocal upstream
        check_finite(gradient, "gradient of the loss", "mgiou_loss, backward, from what uses the loss")
        upstream = gradient.abs().max().item() if gradient.numel() else 0.0

    def check_gradient(name: str) -> Callable[[Tensor], None]:
        place = "mgiou_loss, backward, with up to {:.6g} from above"
        return lambda gradient: check_finite(gradient, f"gradient of {name}", place.format(upstream))

    loss.register_hook(check_upstream)  # type: ignore[no-untyped-call]
    for name, side in (("pred", pred), ("target", target)):
        if side.requires_grad:
            side.register_hook(check_gradient(name))  # type: ignore[no-untyped-call]
