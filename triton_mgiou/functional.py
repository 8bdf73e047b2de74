"""`mgiou_loss`: checks its arguments, picks the backend and reduces."""

from __future__ import annotations

import math
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from triton_mgiou.reference import polygons as reference
from triton_mgiou.training import finite

REDUCTIONS = ("none", "mean", "sum")
AXIS_WEIGHTS = ("uniform", "length", "soft")
BACKENDS = ("auto", "eager", "triton")

PAPER: dict[str, Any] = {
    "axis_weight": "uniform",
    "axis_grad": True,
    "convexity_weight": 0.0,
    "boundary_weight": 0.0,
}
"""The options that make the loss the paper's: `mgiou_loss(pred, target, **PAPER)`."""


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
    if finite.switch.on and not finite.thread.inside:
        return finite.switch.check(mgiou_loss, locals())
    _check_vertices("pred", pred)
    _check_vertices("target", target)
    if target.shape[0] != pred.shape[0]:
        raise ValueError(f"target must have pred's batch size {pred.shape[0]}, got {target.shape[0]}")
    _check_device("target", target, pred)
    _check_real("pred", pred, pred_lengths, pred_mask)
    _check_real("target", target, target_lengths, target_mask)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("axis_weight", axis_weight, AXIS_WEIGHTS)
    _check_choice("backend", backend, BACKENDS)
    if not isinstance(axis_grad, bool):
        raise TypeError(f"axis_grad must be a bool, got {type(axis_grad).__name__}")
    for name, value in (("convexity_weight", convexity_weight), ("boundary_weight", boundary_weight)):
        _check_number(name, value)
        if value < 0:
            raise ValueError(f"{name} must be 0 or above, got {value}")
    _check_weight(weight, pred)
    _check_avg_factor(avg_factor, reduction, pred)
    if pred.shape[0] > 0 and _picks_triton(backend, pred):
        from triton_mgiou import ops  # noqa: PLC0415 - needs Triton

        pred_real = pred_lengths if pred_mask is None else pred_mask
        target_real = target_lengths if target_mask is None else target_mask
        options = (axis_weight, axis_grad, convexity_weight, boundary_weight)
        if isinstance(avg_factor, Tensor) or (weight is not None and weight.requires_grad):
            loss = ops.fused_loss(pred, target, pred_real, target_real, None, "none", None, *options)
            return _reduce(loss, weight, reduction, avg_factor)
        if weight is not None:
            weight = _per_sample(weight, reference.compute_dtype(pred, target))
        return ops.fused_loss(pred, target, pred_real, target_real, weight, reduction, avg_factor, *options)

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
    return _reduce(loss, weight, reduction, avg_factor)


def _picks_triton(backend: str, pred: Tensor) -> bool:
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


def kernels_unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None if they can."""
    return _kernels_unavailable(device)


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes a second.
kernels_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _kernels_unavailable(device: torch.device) -> str | None:
    try:
        import triton  # noqa: PLC0415 - not everywhere, and slow
    except ImportError:
        return "Triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        return f"the kernels need Triton 3.4, and {triton.__version__} is installed"
    from triton_mgiou import ops  # noqa: PLC0415 - needs Triton

    return ops.unavailable(device)


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
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


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_device(name: str, value: Tensor, pred: Tensor) -> None:
    if value.device != pred.device:
        raise ValueError(f"{name} must be on pred's device {pred.device}, got {value.device}")


def _check_vertices(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    size = "N" if name == "pred" else "M"
    if value.dim() != 3 or value.shape[2] != 2 or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, {size}, 2) with {size} >= 1, got {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {value.dtype}")


def _check_real(side: str, vertices: Tensor, lengths: Tensor | None, mask: Tensor | None) -> None:
    if lengths is not None and mask is not None:
        raise ValueError(f"{side}_lengths and {side}_mask say the same: expected at most one, got both")
    if lengths is not None:
        name = f"{side}_lengths"
        _check_tensor(name, lengths)
        _check_device(name, lengths, vertices)
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {lengths.dtype}")
        if lengths.shape != vertices.shape[:1]:
            raise ValueError(f"{name} must have shape {tuple(vertices.shape[:1])}, got {tuple(lengths.shape)}")
    if mask is not None:
        name = f"{side}_mask"
        _check_tensor(name, mask)
        _check_device(name, mask, vertices)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be torch.bool, got {mask.dtype}")
        if mask.shape != vertices.shape[:2]:
            raise ValueError(f"{name} must have shape {tuple(vertices.shape[:2])}, got {tuple(mask.shape)}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(float(value)) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def _check_weight(weight: Tensor | None, pred: Tensor) -> None:
    if weight is None:
        return
    _check_tensor("weight", weight)
    _check_device("weight", weight, pred)
    if weight.dtype.is_complex:
        raise TypeError(f"weight must be real, got {weight.dtype}")
    batch = pred.shape[0]
    if weight.dim() not in (1, 2) or weight.shape[0] != batch or (weight.dim() == 2 and weight.shape[1] == 0):
        raise ValueError(f"weight must have shape ({batch},) or ({batch}, k), got {tuple(weight.shape)}")


def _check_avg_factor(avg_factor: float | Tensor | None, reduction: str, pred: Tensor) -> None:
    if avg_factor is None:
        return
    if reduction == "sum":
        raise ValueError('avg_factor goes with reduction="mean" or "none", got reduction="sum"')
    if isinstance(avg_factor, Tensor):
        if avg_factor.numel() != 1:
            raise ValueError(f"avg_factor must have one element, got shape {tuple(avg_factor.shape)}")
        if avg_factor.dim() > 0 or avg_factor.device.type != "cpu":
            _check_device("avg_factor", avg_factor, pred)
    else:
        _check_number("avg_factor", avg_factor)
        if avg_factor <= 0 and pred.shape[0] > 0:
            raise ValueError(f"avg_factor must be above 0, got {avg_factor}")


def box_mgiou(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    fmt: str = "cxcywhr",
    angle: str = "radians",
    clockwise: bool = True,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    over: str = "mean",
    axis_weight: str = "uniform",
    backend: str = "auto",
) -> Tensor:
    """Matrix."""
    from triton_mgiou.reference import pairs  # noqa: PLC0415

    if fmt == "xyxyxyxy":
        return polygon_mgiou(boxes1.unflatten(-1, (4, 2)), boxes2.unflatten(-1, (4, 2)), mask1=mask1, mask2=mask2, over=over, axis_weight=axis_weight, backend=backend)
    batched = boxes1.dim() == (4 if fmt == "corners3d" else 3)
    up = lambda t: t if t is None or batched else t.unsqueeze(0)
    m = pairs.box_matrix(up(boxes1), up(boxes2), up(mask1), up(mask2), fmt=fmt, angle=angle, clockwise=clockwise, over=over, axis_weight=axis_weight)
    return m if batched else m.squeeze(0)


def polygon_mgiou(polygons1, polygons2, *, lengths1=None, lengths2=None, mask1=None, mask2=None, over="mean", axis_weight="uniform", backend="auto"):
    from triton_mgiou.reference import pairs  # noqa: PLC0415

    batched = polygons1.dim() == 4
    up = lambda t: t if t is None or batched else t.unsqueeze(0)
    m = pairs.polygon_matrix(up(polygons1), up(polygons2), up(lengths1), up(lengths2), up(mask1), up(mask2), over=over, axis_weight=axis_weight)
    return m if batched else m.squeeze(0)
