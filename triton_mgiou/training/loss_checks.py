"""What losses and matrices do in debug mode: look for NaN and Inf in their input, their output and the gradients.

Values are read on the host, which `torch.compile` must not trace, so it breaks its graph here. Marking that imports the
compiler, which takes a second: only debug mode imports this module. `function` is the name of the one that checks.
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
    function: str, name: str, shapes: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Check polygons or boxes, and return the tensor to compute with.

    That is a view, whose gradient is this call's alone and not the sum over all uses. What does not count may hold
    anything: a mask is of the first dimensions of `shapes`, lengths are of all but vertices and coordinates.
    """
    if lengths is not None:
        is_real = torch.arange(shapes.shape[-2], device=lengths.device) < lengths.unsqueeze(-1)
        mask = is_real if mask is None else is_real & mask.unsqueeze(-1)
    check_finite(shapes, name, f"{function}, input", mask=_of_all(shapes, mask))
    return shapes.view_as(shapes) if torch.is_grad_enabled() and shapes.requires_grad else shapes


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_radians(function: str, name: str, boxes: Tensor, mask: Tensor | None = None) -> None:
    """Warn where angles in radians look like degrees: a network may count turns, but hardly more than two."""
    angles = boxes.detach()[..., -1].abs()
    angles = angles.flatten() if mask is None else angles[mask]
    count = int((angles > 4 * math.pi).sum())
    if count:
        warnings.warn(
            f"{function}, input: {count} of {len(angles)} angles of {name} are above 4 pi, up to "
            f'{angles.max().item():.6g}: expected radians; for degrees give angle="degrees"',
            RuntimeWarning,
            stacklevel=3,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_factors(function: str, **factors: object) -> None:
    """Check the weights and the divisor, if they are tensors."""
    for name, factor in factors.items():
        if isinstance(factor, Tensor):
            check_finite(factor, name, f"{function}, input")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_output(function: str, name: str, output: Tensor, **sides: Tensor) -> None:
    """Check the output now, and in the backward pass the gradient that comes to it and those that go to both sides."""
    check_finite(output, name, f"{function}, output")
    if not output.requires_grad:
        return
    upstream = 0.0

    def check_upstream(gradient: Tensor) -> None:
        nonlocal upstream
        check_finite(gradient, f"gradient of the {name}", f"{function}, backward, from what uses the {name}")
        upstream = gradient.abs().max().item() if gradient.numel() else 0.0

    def check_gradient(side: str) -> Callable[[Tensor], None]:
        return lambda gradient: check_finite(
            gradient, f"gradient of {side}", f"{function}, backward, with up to {upstream:.6g} from above"
        )

    output.register_hook(check_upstream)  # type: ignore[no-untyped-call]
    for side, shapes in sides.items():
        if shapes.requires_grad:
            shapes.register_hook(check_gradient(side))  # type: ignore[no-untyped-call]


def _of_all(values: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask of the first dimensions as one that broadcasts over the others."""
    return None if mask is None else mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim()))
