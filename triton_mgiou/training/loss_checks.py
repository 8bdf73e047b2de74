"""The checks of debug mode, for NaN and Inf in the input, the output and the gradients of losses and matrices.

Values are read on the host, which `torch.compile` must not trace, so it breaks its graph here. Marking that imports the
compiler, which takes a second: only debug mode imports this module.
"""

from __future__ import annotations

import math
import sys
import warnings
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from triton_mgiou.training.finite import check_finite


def has_values(tensor: Tensor) -> bool:
    """Whether its values can be read: it is no meta or fake tensor, no batch of gradients, and no tracer runs."""
    if get_proxy_mode() is not None or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return False
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or torch._C._functorch.is_legacy_batchedtensor(tensor))


class Checks:
    """The checks of one call of `function`, which is named in errors and warnings."""

    def __init__(self, function: str) -> None:
        self.function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def input(
        self,
        name: str,
        shapes: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        in_radians: bool = False,
    ) -> Tensor:
        """Check polygons or boxes, and return the tensor to compute with.

        That is a view, whose gradient is this call's alone and not the sum over all uses. What does not count may hold
        anything: a mask is of the first dimensions of `shapes`, lengths are of all but vertices and coordinates.
        """
        if in_radians:
            self._warn_of_degrees(name, shapes, mask)
        if lengths is not None:
            is_real = torch.arange(shapes.shape[-2], device=lengths.device) < lengths.unsqueeze(-1)
            mask = is_real if mask is None else is_real & mask.unsqueeze(-1)
        if mask is not None:
            mask = mask.reshape(*mask.shape, *[1] * (shapes.dim() - mask.dim()))
        check_finite(shapes, name, f"{self.function}, input", mask=mask)
        return shapes.view_as(shapes)

    def _warn_of_degrees(self, name: str, boxes: Tensor, mask: Tensor | None) -> None:
        """Angles that look like degrees: a network may count turns, but hardly more than two."""
        angles = boxes[..., -1].abs()
        angles = angles.flatten() if mask is None else angles[mask]
        count = int((angles > 4 * math.pi).sum())
        if count:
            warnings.warn(
                f"{self.function}, input: {count} of {len(angles)} angles of {name} are above 4 pi, up to "
                f'{angles.max().item():.6g}: expected radians; for degrees give angle="degrees"',
                RuntimeWarning,
                stacklevel=_callers_level(),
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def factors(self, **factors: object) -> None:
        """Check the weights and the divisor, if they are tensors."""
        for name, factor in factors.items():
            if isinstance(factor, Tensor):
                check_finite(factor, name, f"{self.function}, input")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def output(self, name: str, output: Tensor, **sides: Tensor) -> None:
        """Check the output now, and in the backward pass the gradients that come to it and go to both sides."""
        function = self.function
        check_finite(output, name, f"{function}, output")
        if not output.requires_grad:
            return
        upstream = 0.0

        def check_upstream(gradient: Tensor) -> None:
            nonlocal upstream
            if not has_values(gradient):
                return
            check_finite(gradient, f"gradient of the {name}", f"{function}, backward, from what uses the {name}")
            upstream = gradient.abs().max().item() if gradient.numel() else 0.0

        def check_gradient(side: str, gradient: Tensor) -> None:
            if has_values(gradient):
                check_finite(
                    gradient, f"gradient of {side}", f"{function}, backward, upstream gradient up to {upstream:.6g}"
                )

        output.register_hook(check_upstream)  # type: ignore[no-untyped-call]
        for side, shapes in sides.items():
            if shapes.requires_grad:
                shapes.register_hook(partial(check_gradient, side))  # type: ignore[no-untyped-call]


def _callers_level() -> int:
    """The `stacklevel` of a warning that is to name the line of the user's code: past this package and PyTorch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "triton_mgiou",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level
