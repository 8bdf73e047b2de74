"""`mgiou_loss` and `box_mgiou_loss`: check their arguments, choose the backend and reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import triton_mgiou
from triton_mgiou import debugging
from triton_mgiou.arguments import (
    check_avg_factor,
    check_box_format,
    check_box_options,
    check_boxes,
    check_choice,
    check_options,
    check_polygons,
    check_real,
    check_weight,
)
from triton_mgiou.bounding_boxes import is_bounding_boxes, plain_boxes
from triton_mgiou.box_formats import FORMATS
from triton_mgiou.options import BACKENDS, PAPER, REDUCTIONS, Options, Reduction
from triton_mgiou.reference import boxes as box_reference
from triton_mgiou.reference import polygons as reference

if TYPE_CHECKING:
    import triton_mgiou.launch
    import triton_mgiou.ops

__all__ = ["PAPER", "box_mgiou_loss", "kernels_unavailable", "mgiou_loss"]


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


def box_mgiou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    fmt: str = "cxcywhr",
    angle: str = "radians",
    clockwise: bool = True,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    axis_weight: str | None = None,
    axis_grad: bool | None = None,
    boundary_weight: float | None = None,
    convexity_weight: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Marginalized GIoU loss between two batches of boxes: rotated, upright or in space.

    It is `mgiou_loss` of the boxes' corners, in closed form, with the gradient to the boxes' numbers. Each sample's
    loss is (1 - MGIoU) / 2, in [0, 1], plus, in the plane, `boundary_weight` times a term in [0, 1]. It is exactly 0
    where the numbers of `pred` are those of `target`, in degrees also where they are after a turn by 180 or after a
    turn by 90 with w and h swapped; in radians these have a loss of rounding, up to 1e-6 times the aspect ratio. It
    does not change when both boxes are moved, scaled or turned together ("soft" weights: turned by right angles).

    Which numbers a box has is said by `fmt`, `angle` and `clockwise`:

    =================================================== ============== =========== ======================= =============
    library                                             `fmt`          `angle`     `clockwise`             centre
    =================================================== ============== =========== ======================= =============
    torchvision, plain "cxcywhr" (not our default!)     "cxcywhr"      "degrees"   False                   centre
    detectron2 `RotatedBoxes`                           "cxcywhr"      "degrees"   False                   centre
    mmcv, mmrotate `RotatedBoxes`                       "cxcywhr"      "radians"   True                    centre
    Ultralytics "xywhr"                                 "cxcywhr"      "radians"   True                    centre
    OpenCV `minAreaRect`, of any version                "cxcywhr"      "degrees"   True                    centre
    torchvision "xyxy", mmdetection                     "xyxy"         -           -                       -
    torchvision "cxcywh", DETR, Ultralytics "xywh"      "cxcywh"       -           -                       centre
    torchvision "xyxyxyxy", DOTA, mmrotate "qbox"       "xyxyxyxy"     -           -                       -
    OpenPCDet                                           "cxcyczlwhr"   "radians"   True                    gravity centre
    mmdet3d LiDAR and depth boxes                       "cxcyczlwhr"   "radians"   True                    see below
    pytorch3d, OpenPCDet, mmdet3d `corners`             "corners3d"    -           -                       -
    nuScenes `Box.corners().T`                          "corners3d"    -           -                       -
    =================================================== ============== =========== ======================= =============

    The first row is the trap: torchvision's plain "cxcywhr" has our default's name, but degrees and the other direction.
    mmdet3d's `.tensor` has the centre of the bottom: put `.gravity_center` in the place of its first three numbers.
    nuScenes' `corners()` is (3, 8), and its sizes are width, length, height. KITTI's camera boxes, whose angle turns
    about another axis, are not covered.

    A `tv_tensors.BoundingBoxes` knows its own format, angle and direction: it is converted to what the arguments say,
    each side by itself. The arguments speak of plain tensors.

    A size below 0 counts as its absolute value. A box whose sizes are 0 is a point: against another box only that one
    has axes, and two points have loss and gradient 0. Any finite input gives a finite value and gradient; angles may be
    as large as they like. NaN or Inf makes that sample's value and gradient NaN and leaves the others' alone. For
    a square turned by exactly 45 degrees to its target the gradient to the angle is 0, by symmetry.

    Args:
        pred: Predicted boxes; float16, bfloat16, float32 or float64. Computed in float64 if either input is float64,
            else in float32.
        target: Target boxes, as many. Gets a gradient if it asks for one: that of MGIoU, since the term takes it for a
            constant.
        fmt: What the numbers of a box are.
            "cxcywhr", (B, 5): centre x and y, width, height, angle. "cxcywh", (B, 4): the same without an angle.
            "xyxy", (B, 4): two opposite corners.
            "xyxyxyxy", (B, 8): four free corners in order along the outline, which need not make a rectangle:
            `mgiou_loss` of (B, 4, 2), with its defaults.
            "cxcyczlwhr", (B, 7): gravity centre x, y and z, length along x, width along y, height along z, yaw about z.
            "corners3d", (B, 8, 3): eight corners, of which 0-1, 0-3 and 0-4 are edges. `pred` need not be a box: its
            axes are these three edges, as in the paper; vertex 0 is the one to be most careful with. Of a box any
            labels with these edges give the same loss.
        angle: "radians" or "degrees".
        clockwise: Whether (x, y) = centre + (u cos r - v sin r, u sin r + v cos r), so that angles turn x towards y.
            That is clockwise on a screen, where y points down, and counter-clockwise from above in a right-handed
            space, where only True is allowed.
        weight: Factor on each sample's loss, shape (B,), or (B, k) to be averaged over k.
        avg_factor: With `reduction="mean"`, divide the sum by this instead of by B. Above 0, a number or a
            tensor of one element. Not allowed with "sum", without effect with "none" (as in mmdetection).
        reduction: "mean", "sum" or "none".
        axis_weight: As in `mgiou_loss`. None: "uniform"; in space there is no other.
        axis_grad: As in `mgiou_loss`. None: True; for "corners3d", where free corners get nearer without it, False.
        boundary_weight: As in `mgiou_loss`. None: 0.25; in space, where there is no such term, 0.
        convexity_weight: As in `mgiou_loss`, for "xyxyxyxy" only. None: 0.
        backend: "eager" (PyTorch), "triton" (fused kernels; an error where they cannot run) or "auto".

    Returns:
        The loss: a scalar, or shape (B,) for "none"; float64 if either input is float64, else float32. For B = 0
        it is 0 and connected to the graph.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the format does not have the option.
        RuntimeError: `backend="triton"` where the kernels cannot run.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    check_box_format(fmt, angle, clockwise)
    if is_bounding_boxes(pred):
        pred = plain_boxes("pred", pred, fmt, angle, clockwise)
    if is_bounding_boxes(target):
        target = plain_boxes("target", target, fmt, angle, clockwise)
    check_boxes(pred, target, fmt)
    default = FORMATS[fmt].defaults
    options = Options(
        default.axis_weight if axis_weight is None else axis_weight,
        default.axis_grad if axis_grad is None else axis_grad,
        default.convexity_weight if convexity_weight is None else convexity_weight,
        default.boundary_weight if boundary_weight is None else boundary_weight,
    )
    check_box_options(fmt, options)
    if fmt == "xyxyxyxy":
        vertices = (side.unflatten(1, (4, 2)) for side in (pred, target))
        return mgiou_loss(
            *vertices, weight=weight, avg_factor=avg_factor, reduction=reduction, backend=backend, **options._asdict()
        )
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    if weight is not None:
        check_weight(weight, pred)
    if avg_factor is not None:
        check_avg_factor(avg_factor, reduction, pred)
    checking = debugging.on and not torch._C._are_functorch_transforms_active()
    if checking:
        from triton_mgiou.training import loss_checks  # noqa: PLC0415 - slow, and above this module

        pred = loss_checks.check_input("pred", pred, function="box_mgiou_loss")
        target = loss_checks.check_input("target", target, function="box_mgiou_loss")
        loss_checks.check_factors(weight=weight, avg_factor=avg_factor, function="box_mgiou_loss")
        if FORMATS[fmt].has_angle and angle == "radians":
            loss_checks.check_radians(pred, target)
    if pred.shape[0] > 0 and _takes_kernel(backend, pred):
        inside = kernel_reduction(pred, target, weight, reduction, avg_factor)
        call = triton_mgiou.launch.BoxCall(fmt, angle, clockwise, inside or Reduction(None, True, None), options)
        loss = triton_mgiou.ops.box_loss(pred, target, call)
        if inside is None:
            loss = reduce(loss, weight, reduction, avg_factor)
    else:
        loss = box_reference.per_sample_loss(
            pred,
            target,
            fmt=fmt,
            angle=angle,
            clockwise=clockwise,
            axis_weight=options.axis_weight,
            axis_grad=options.axis_grad,
            boundary_weight=options.boundary_weight,
        )
        loss = reduce(loss, weight, reduction, avg_factor)
    if checking:
        loss_checks.check_output(loss, pred, target, function="box_mgiou_loss")
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
