"""`mgiou_loss`: checks its arguments, chooses the backend and reduces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import triton_mgiou
from triton_mgiou import debugging
from triton_mgiou.arguments import (
    check_avg_factor,
    check_choice,
    check_options,
    check_polygons,
    check_real,
    check_weight,
)
from triton_mgiou.options import BACKENDS, PAPER, REDUCTIONS, Options, Reduction
from triton_mgiou.reference import polygons as reference

if TYPE_CHECKING:
    import triton_mgiou.launch
    import triton_mgiou.ops

__all__ = ["PAPER", "kernels_unavailable", "mgiou_loss"]


def mgiou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    pred_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    pred_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    axis_weight: str = "length",
    axis_grad: bool = False,
    convexity_weight: float = 0.0,
    boundary_weight: float = 0.25,
    backend: str = "auto",
) -> Tensor:
    """Marginalized GIoU loss between two batches of polygons.

    Each sample's loss is (1 - MGIoU) / 2, in [0, 1], plus `boundary_weight` times its boundary term, in [0, 1], and
    `convexity_weight` times its convexity term; by default it is in [0, 1.25]. MGIoU is the weighted mean, over the
    edge normals of both polygons, of the 1-D GIoU of their projections. It sees only the polygons' hulls; the terms
    see the order of `pred`'s vertices.

    The defaults are not the paper's. They are for polygons that a network predicts as vertices in no order at first:
    there the paper's loss falls while the polygons go on crossing themselves; with the defaults they do not. The
    paper's is `mgiou_loss(pred, target, **PAPER)`.

    The loss is 0 where `pred` is the target and that is convex, from any first vertex and in either direction. A
    target with dents ends as its hull. The loss does not change when both polygons are moved, scaled or turned
    together ("soft" weights: turned by right angles). It does when they are swapped, as the two terms are not
    symmetric; MGIoU is. Coordinates have any one unit.

    A polygon of one vertex is a point, of two a segment. Where a side of a sample has no real vertex, or neither
    polygon has an edge, the sample's loss and gradient are 0. Any finite input gives a finite value and
    gradient; NaN or Inf in a real vertex makes that sample's value and gradient NaN and leaves the others'
    gradients alone.

    Args:
        pred: Predicted vertices, shape (B, N, 2), in order along the outline; float16, bfloat16, float32 or
            float64. Computed in float64 if either input is float64, else in float32.
        target: Target vertices, shape (B, M, 2); M may differ from N. Gets a gradient if it asks for one.
        pred_lengths: How many vertices are real, shape (B,), any integer type; the rest is padding and may hold
            anything. Clamped to 0..N. Without lengths and mask, every vertex is real; repeating a vertex is
            then a padding that changes no MGIoU.
        target_lengths: The same for `target`.
        pred_mask: The other way to say it: shape (B, N), bool, True for a real vertex. Holes are allowed: an
            edge goes to the next real vertex.
        target_mask: The same for `target`, shape (B, M).
        weight: Factor on each sample's loss, shape (B,), or (B, k) to be averaged over k.
        avg_factor: With `reduction="mean"`, divide the sum by this instead of by B. Above 0, a number or a
            tensor of one element. Not allowed with "sum", without effect with "none" (as in mmdetection).
        reduction: "mean", "sum" or "none".
        axis_weight: Weight of an edge's normal in the mean. "length": the edge's share of its polygon's perimeter.
            "uniform": 1 if the edge is longer than 1e-6 of the sample's extent, else 0 (the paper's). "soft":
            1 - exp(-length / (0.01 extent)). The extent is the longer side of the joint bounding box.
        axis_grad: Whether the gradient of MGIoU includes the path through the axes (directions and weights), as the
            paper's does. The value is the same without it.
        convexity_weight: Factor, 0 or above, on a scale-free term that is 0 for a convex `pred` whose vertices
            are in order and grows with dents and crossings.
        boundary_weight: Factor, 0 or above, on a scale-free term in [0, 1] that is 0 only where `pred`, read in its
            order, is the target (a convex one) moved: 1 - (A_p A_t / V^2) (2 V A_t / (V^2 + A_t^2)), of the areas A
            and the mixed area V. Every vertex of `pred` gets a gradient; `target` is a constant of it.
        backend: "eager" (PyTorch), "triton" (fused kernels; an error where they cannot run) or "auto".

    Returns:
        The loss: a scalar, or shape (B,) for "none"; float64 if either input is float64, else float32. For B = 0
        it is 0 and connected to the graph.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
        RuntimeError: `backend="triton"` where the kernels cannot run.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    check_polygons(pred, target)
    if pred_lengths is not None or pred_mask is not None:
        check_real("pred", pred, pred_lengths, pred_mask)
    if target_lengths is not None or target_mask is not None:
        check_real("target", target, target_lengths, target_mask)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    options = Options(axis_weight, axis_grad, convexity_weight, boundary_weight)
    check_options(options)
    if weight is not None:
        check_weight(weight, pred)
    if avg_factor is not None:
        check_avg_factor(avg_factor, reduction, pred)
    checking = debugging.on and not torch._C._are_functorch_transforms_active()
    if checking:
        from triton_mgiou.training import loss_checks  # noqa: PLC0415 - slow, and above this module

        pred = loss_checks.check_input("pred", pred, pred_lengths, pred_mask)
        target = loss_checks.check_input("target", target, target_lengths, target_mask)
        loss_checks.check_factors(weight=weight, avg_factor=avg_factor)
    if pred.shape[0] > 0 and _takes_kernel(backend, pred):
        pred_real = pred_lengths if pred_mask is None else pred_mask
        target_real = target_lengths if target_mask is None else target_mask
        inside = kernel_reduction(pred, target, weight, reduction, avg_factor)
        call = triton_mgiou.launch.PolygonCall(pred_real, target_real, inside or Reduction(None, True, None), options)
        loss = triton_mgiou.ops.polygon_loss(pred, target, call)
        if inside is None:
            loss = reduce(loss, weight, reduction, avg_factor)
    else:
        loss = reference.per_sample_loss(
            pred,
            target,
            pred_lengths=pred_lengths,
            target_lengths=target_lengths,
            pred_mask=pred_mask,
            target_mask=target_mask,
            axis_weight=axis_weight,
            axis_grad=axis_grad,
            convexity_weight=convexity_weight,
            boundary_weight=boundary_weight,
        )
        loss = reduce(loss, weight, reduction, avg_factor)
    if checking:
        loss_checks.check_output(loss, pred, target)
    return loss


def kernel_reduction(
    pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None
) -> Reduction | None:
    """The reduction as a kernel does it. None where it cannot: a tensor divides, or the weight wants a gradient."""
    if isinstance(avg_factor, Tensor) or (weight is not None and weight.requires_grad):
        return None
    if weight is not None:
        weight = _per_sample(weight, reference.compute_dtype(pred, target))
    if reduction == "mean":
        return Reduction(weight, False, pred.shape[0] if avg_factor is None else avg_factor)
    return Reduction(weight, reduction == "none", None)


def _takes_kernel(backend: str, pred: Tensor) -> bool:
    if backend == "eager" or (backend == "auto" and not pred.is_cuda):
        return False
    reason = kernels_unavailable(pred.device)
    if torch._C._are_functorch_transforms_active():
        reason = "a torch.func transform is active, and the kernels know only autograd"
    if reason is not None and backend == "triton":
        raise RuntimeError(
            f'backend="triton" cannot run: {reason}; expected a GPU that can, or backend "auto" or "eager"'
        )
    return reason is None


_reasons: dict[torch.device, str | None] = {}


def kernels_unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None if they can."""
    if device not in _reasons:
        _reasons[device] = _find_reason(device)
    return _reasons[device]


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes a second.
kernels_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_reason(device: torch.device) -> str | None:
    try:
        import triton  # noqa: PLC0415 - not everywhere, and slow
    except ImportError:
        return "Triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        return f"the kernels need Triton 3.4, and {triton.__version__} is installed"
    from triton_mgiou import launch, ops  # noqa: F401, PLC0415 - from here on the package has both

    if launch.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels need an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels need an NVIDIA GPU"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"PyTorch finds {torch.cuda.device_count()} NVIDIA GPUs, and the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


def reduce(loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """Weigh the samples' losses, (B,), and reduce them."""
    if weight is not None:
        loss = loss * _per_sample(weight, loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum" or loss.shape[0] == 0:
        return total
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.reshape(())
    return total / (loss.shape[0] if avg_factor is None else avg_factor)


def _per_sample(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """One weight for each sample, (B,)."""
    weight = weight.to(dtype)
    return weight if weight.dim() == 1 else weight.mean(1)
