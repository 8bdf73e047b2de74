"""Weigh the samples' losses and reduce them: in a kernel where it can, in PyTorch elsewhere (section 8)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_mgiou.backends import is_empty
from triton_mgiou.options import Reduction
from triton_mgiou.reference.polygons import compute_dtype

LEAST_DIVISOR = 1e-30  # over a smaller one a gradient could overflow, and times a weight of 0 give NaN


def as_divisor(avg_factor: float | Tensor) -> float | Tensor:
    """`avg_factor`; as a tensor if it is a number that the compiler does not know, such as that of an `.item()`.

    One of numpy's is an array to the compiler, by which a float32 loss would become float64.
    """
    if not torch.compiler.is_compiling():
        return avg_factor
    if isinstance(avg_factor, np.ndarray):
        return torch.as_tensor(avg_factor)
    if isinstance(avg_factor, (int, float)):
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true  # noqa: PLC0415 - slow

        for known in (avg_factor >= LEAST_DIVISOR, avg_factor < 2**62):
            if guard_or_true(known) != guard_or_false(known):
                return torch.full((), avg_factor, dtype=torch.float64, device="cpu")
    return avg_factor


def kernel_reduction(
    pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None
) -> Reduction | None:
    """The reduction as a kernel does it; None where `reduce` has to, since a kernel divides by a number above 0 only.

    Nor does a kernel have a gradient to the weight.
    """
    if isinstance(avg_factor, Tensor) or (avg_factor is not None and avg_factor < LEAST_DIVISOR):
        return None
    if weight is not None:
        if weight.requires_grad:
            return None
        weight = _per_sample(weight, compute_dtype(pred.dtype, target.dtype)).resolve_neg()  # the kernel reads memory
    if reduction == "mean":
        return Reduction(weight, "mean" if avg_factor is None else "sum", avg_factor)
    return Reduction(weight, reduction, None)


def reduce(loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """Weigh the samples' losses, (B,), and reduce them."""
    if weight is not None:
        loss = loss * _per_sample(weight, loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum" or is_empty(loss.shape[0]):
        return total
    if avg_factor is None:
        return total / max(loss.shape[0], 1)
    quotient = _divide(total, avg_factor)
    if is_empty(loss.shape[0], unknown=True):  # then it is 0, whatever the divisor
        quotient = torch.where(torch.ones_like(loss, dtype=torch.bool).any(), quotient, total)
    return quotient


def _divide(total: Tensor, avg_factor: float | Tensor) -> Tensor:
    """`total / avg_factor`; where both are 0 it is 0, with a gradient of 0. A tensor below 0 or not finite gives NaN.

    Nothing here reads a value on the host.
    """
    if not isinstance(avg_factor, Tensor):
        if avg_factor >= LEAST_DIVISOR:
            return total / factor_for(total, avg_factor)
        avg_factor = torch.full((), avg_factor, dtype=total.dtype, device="cpu")
    kept = torch.promote_types(avg_factor.dtype, total.dtype)  # 1e300 is finite, if only in float64
    given = avg_factor.reshape(()).to(kept)
    divisor = torch.where((given >= 0) & given.isfinite(), given, torch.nan).to(total.dtype)
    # A sum of 0 is divided by Inf instead. Added, because a GPU takes a divisor on the CPU only as an operand.
    more = torch.where(torch.logical_or(total, divisor >= LEAST_DIVISOR), 0.0, torch.inf)
    return total / (divisor + more.to(total.dtype))


def factor_for(loss: Tensor, number: float | Tensor) -> float | Tensor:
    """A number, or a tensor of one, to multiply or divide a loss by, which keeps its shape and type.

    In forward mode PyTorch would make the tangent of a scalar float64.
    """
    if isinstance(number, Tensor):
        return number.reshape(()).to(loss.dtype)
    if forward_ad._current_level < 0:
        return number
    return torch.full((), number, dtype=loss.dtype, device="cpu")


def _per_sample(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """One weight for each sample, (B,)."""
    if weight.dtype != dtype:  # `to` takes a microsecond to see that
        weight = weight.to(dtype)
    return weight if weight.dim() == 1 else weight.mean(1)
