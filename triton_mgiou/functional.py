"""The losses and the matrices of all pairs: check their arguments, choose the backend and reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import triton_mgiou
from triton_mgiou import debugging
from triton_mgiou.arguments import (
    check_box_format,
    check_box_options,
    check_boxes,
    check_lengths,
    check_matrix_options,
    check_options,
    check_pairs,
    check_polygons,
    check_real,
    check_reduction,
    check_set_mask,
)
from triton_mgiou.backends import are_transforms_active, is_empty, takes_kernel
from triton_mgiou.bounding_boxes import is_bounding_boxes, plain_boxes, without_classes
from triton_mgiou.box_formats import FORMATS, PAIR_FORMATS
from triton_mgiou.options import AXIS_WEIGHTS, Options, Reduction
from triton_mgiou.reduction import as_divisor, kernel_reduction, reduce
from triton_mgiou.reference import boxes as box_reference
from triton_mgiou.reference import keypoints as keypoint_reference
from triton_mgiou.reference import pairs as pair_reference
from triton_mgiou.reference import polygons as reference

if TYPE_CHECKING:
    import triton_mgiou.launch
    import triton_mgiou.ops
    import triton_mgiou.pairs
    from triton_mgiou.training.loss_checks import Checks


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
    symmetric; MGIoU is. Any unit will do, the same for both polygons.

    A polygon of one vertex is a point, of two a segment. Where a side of a sample has no real vertex, neither polygon
    has an edge, or all vertices of both are on one line, the sample's loss and gradient are 0. Any finite input gives
    a finite value and gradient, with weights of the terms up to 1e9; NaN or Inf in a real vertex makes that sample's
    value and gradient NaN and leaves the others' gradients alone.

    Args:
        pred: Predicted vertices, shape (B, N, 2), in order along the outline; float16, bfloat16, float32 or
            float64. Computed in float64 if either input is float64, else in float32.
        target: Target vertices, shape (B, M, 2); M may differ from N. Gets a gradient if it asks for one.
        pred_lengths: How many vertices are real, shape (B,), int8 to int64 or uint8; the rest is padding and may
            hold anything. Clamped to 0..N. Without lengths and mask, every vertex is real; padding by a repeated
            vertex does not change MGIoU then.
        target_lengths: The same for `target`.
        pred_mask: The other way to say it: shape (B, N), bool, True for a real vertex. Holes are allowed: an
            edge goes to the next real vertex.
        target_mask: The same for `target`, shape (B, M).
        weight: Factor on each sample's loss, shape (B,), or (B, k) to be averaged over k.
        avg_factor: With `reduction="mean"`, divide the sum by this instead of by B: a number or a tensor of one
            element. Where it and the weighted sum are 0, as for an image without objects, the loss and its gradient
            are 0; where only it is 0, the loss is Inf. A number below 0 (unless B is 0) or not finite is an error, and
            such a tensor, which is never read on the host, gives NaN; so do, in compiled code, a number that is read
            from one there and one of numpy's. Not allowed with "sum", without effect with "none", as in mmdetection.
        reduction: "mean", "sum" or "none".
        axis_weight: Weight of an edge's normal in the mean. "length": the edge's share of its polygon's perimeter.
            "uniform": 1 if the edge is longer than 1e-6 of the sample's extent, else 0 (the paper's). "soft":
            1 - exp(-length / (0.01 extent)). The extent is the longer side of the joint bounding box.
        axis_grad: Whether the gradient of MGIoU includes the path through the axes (directions and weights), as the
            paper's does. The value is the same without it. A second derivative then takes the axes for constants too,
            and is not what finite differences of the gradient give.
        convexity_weight: Factor, 0 to 1e30, on a scale-free term that is 0 for a convex `pred` whose vertices
            are in order and grows with dents and crossings.
        boundary_weight: Factor, 0 to 1e30, on a scale-free term in [0, 1] that is 0 only where `pred`, read in its
            order, is the target (a convex one) moved: 1 - (A_p A_t / V^2) (2 V A_t / (V^2 + A_t^2)), of the areas A
            and the mixed area V. Every vertex of `pred` gets a gradient; `target` is a constant of it.
        backend: "eager" (PyTorch), "triton" (fused kernels; an error where they cannot run) or "auto".

    Returns:
        The loss: a scalar, or shape (B,) for "none"; float64 if either input is float64, else float32. For B = 0
        it is 0 and connected to the graph.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
        RuntimeError: `backend="triton"` where the kernels cannot run, or a call under `torch.jit.trace`.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    if torch.compiler.is_dynamo_compiling():
        pred, target, weight = without_classes(pred, target, weight)
        pred_lengths, target_lengths, pred_mask, target_mask = without_classes(
            pred_lengths, target_lengths, pred_mask, target_mask
        )
    check_polygons(pred, target)
    if pred_lengths is not None or pred_mask is not None:
        check_real("pred", pred, pred_lengths, pred_mask)
    if target_lengths is not None or target_mask is not None:
        check_real("target", target, target_lengths, target_mask)
    options = Options(axis_weight, axis_grad, convexity_weight, boundary_weight)
    check_options(options)
    if avg_factor is not None:
        avg_factor = as_divisor(avg_factor)
    check_reduction(pred, weight, avg_factor, reduction, backend)
    checks = debugging.on and debug_checks("mgiou_loss", pred, target)
    if checks:
        pred = checks.input("pred", pred, pred_lengths, pred_mask)
        target = checks.input("target", target, target_lengths, target_mask)
        checks.factors(weight=weight, avg_factor=avg_factor)
    inside = None
    if not is_empty(pred.shape[0]) and takes_kernel(backend, pred):
        pred_real = pred_lengths if pred_mask is None else pred_mask
        target_real = target_lengths if target_mask is None else target_mask
        inside = kernel_reduction(pred, target, weight, reduction, avg_factor)
        call = triton_mgiou.launch.PolygonCall(pred_real, target_real, inside or Reduction(), options)
        loss = triton_mgiou.ops.polygon_loss(pred, target, call)
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
    if inside is None:
        loss = reduce(loss, weight, reduction, avg_factor)
    if checks:
        checks.output("loss", loss, pred=pred, target=target)
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
    where the numbers of `pred` are those of `target`. Other numbers of the same box (turned by 180 degrees, or by 90
    with w and h swapped) have exactly 0 in degrees, in radians a loss of rounding, up to 1e-6 times the aspect ratio
    for angles of up to two turns. The loss does not change when both boxes are moved, scaled or turned together
    ("soft" weights: turned by right angles).

    `fmt`, `angle` and `clockwise` say what the numbers of a box are:

    ============================================== ============ ========= =========== ==============
    library                                        `fmt`        `angle`   `clockwise` centre
    ============================================== ============ ========= =========== ==============
    torchvision, plain "cxcywhr": not our default  "cxcywhr"    "degrees" False       of the box
    detectron2 `RotatedBoxes`                      "cxcywhr"    "degrees" False       of the box
    mmcv, mmrotate `RotatedBoxes`                  "cxcywhr"    "radians" True        of the box
    Ultralytics "xywhr"                            "cxcywhr"    "radians" True        of the box
    OpenCV `minAreaRect`, of any version           "cxcywhr"    "degrees" True        of the box
    torchvision and mmdetection "xyxy"             "xyxy"       -         -           -
    torchvision "cxcywh", DETR, Ultralytics "xywh" "cxcywh"     -         -           of the box
    torchvision "xyxyxyxy", DOTA, mmrotate "qbox"  "xyxyxyxy"   -         -           -
    OpenPCDet                                      "cxcyczlwhr" "radians" True        of gravity
    mmdet3d LiDAR and depth boxes                  "cxcyczlwhr" "radians" True        of the bottom!
    pytorch3d, OpenPCDet, mmdet3d `corners`        "corners3d"  -         -           -
    nuScenes `Box.corners().T`                     "corners3d"  -         -           -
    ============================================== ============ ========= =========== ==============

    Mind the first row: torchvision's plain "cxcywhr" has our default's name, but degrees and the other direction.
    mmdet3d's `.tensor` (from 1.0 on; before, sizes and yaw were others) has the centre of the bottom: put
    `.gravity_center` in the place of its first three numbers. nuScenes' `corners()` is (3, 8), and its sizes are width,
    length, height. KITTI's camera boxes, whose angle turns about another axis, are not covered.

    A `tv_tensors.BoundingBoxes` knows its own format, angle and direction: it is converted to what the arguments say,
    each side by itself, in float32 or float64, which numbers near the largest one may overflow. The arguments speak of
    plain tensors.

    A size below 0 counts as its absolute value. A box whose sizes are 0 is a point: against another box only that one
    has axes, and two points have loss and gradient 0. Any finite input gives a finite value and gradient, with a
    `boundary_weight` up to 1e9; angles may be as large as they like. NaN or Inf makes that sample's value and gradient
    NaN and leaves the others' alone. For a square turned by exactly 45 degrees to its target the gradient to the angle
    is 0, by symmetry.

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
            axes are these three edges, as in the paper, so vertex 0 counts most. For a box, any order of the corners
            with these edges gives the same loss.
        angle: "radians" or "degrees".
        clockwise: Whether (x, y) = centre + (u cos r - v sin r, u sin r + v cos r), so that angles turn x towards y.
            That is clockwise on a screen, where y points down, and counter-clockwise from above in a right-handed
            space, where only True is allowed.
        weight: Factor on each sample's loss, shape (B,), or (B, k) to be averaged over k.
        avg_factor: With `reduction="mean"`, divide the sum by this instead of by B, as in `mgiou_loss`: it may be 0
            where the weighted sum is 0. Not allowed with "sum", without effect with "none", as in mmdetection.
        reduction: "mean", "sum" or "none".
        axis_weight: As in `mgiou_loss`. None: "uniform", for "xyxyxyxy" "length"; in space only "uniform".
        axis_grad: As in `mgiou_loss`. None: True; False for "xyxyxyxy" and "corners3d", free corners.
        boundary_weight: As in `mgiou_loss`. None: 0.25; in space, where there is no such term, 0.
        convexity_weight: As in `mgiou_loss`, for "xyxyxyxy" only. None: 0.
        backend: "eager" (PyTorch), "triton" (fused kernels; an error where they cannot run) or "auto".

    Returns:
        The loss: a scalar, or shape (B,) for "none"; float64 if either input is float64, else float32. For B = 0
        it is 0 and connected to the graph.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the format does not have the option.
        RuntimeError: `backend="triton"` where the kernels cannot run, or a call under `torch.jit.trace`.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    check_box_format(fmt, angle, clockwise)
    if is_bounding_boxes(pred):
        pred = plain_boxes("pred", pred, fmt, angle, clockwise)
    if is_bounding_boxes(target):
        target = plain_boxes("target", target, fmt, angle, clockwise)
    if torch.compiler.is_dynamo_compiling():
        pred, target, weight = without_classes(pred, target, weight)
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
        vertices = [side.reshape(side.shape[0], 4, 2) for side in (pred, target)]
        # Not `_asdict`, which PyTorch 2.8 cannot compile.
        given: dict[str, Any] = dict(zip(Options._fields, options, strict=True))
        return mgiou_loss(
            *vertices, weight=weight, avg_factor=avg_factor, reduction=reduction, backend=backend, **given
        )
    if avg_factor is not None:
        avg_factor = as_divisor(avg_factor)
    check_reduction(pred, weight, avg_factor, reduction, backend)
    checks = debugging.on and debug_checks("box_mgiou_loss", pred, target)
    if checks:
        in_radians = FORMATS[fmt].has_angle and angle == "radians"
        pred = checks.input("pred", pred, in_radians=in_radians)
        target = checks.input("target", target, in_radians=in_radians)
        checks.factors(weight=weight, avg_factor=avg_factor)
    inside = None
    if not is_empty(pred.shape[0]) and takes_kernel(backend, pred):
        inside = kernel_reduction(pred, target, weight, reduction, avg_factor)
        call = triton_mgiou.launch.BoxCall(fmt, angle, clockwise, inside or Reduction(), options)
        loss = triton_mgiou.ops.box_loss(pred, target, call)
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
    if inside is None:
        loss = reduce(loss, weight, reduction, avg_factor)
    if checks:
        checks.output("loss", loss, pred=pred, target=target)
    return loss


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
    """MGIoU of every box of one set with every box of another: for matching, assignment and keeping boxes apart.

    MGIoU is 1 for boxes that coincide, exactly so for equal numbers, and falls towards -1 for boxes far apart. It is
    1 - 2 `box_mgiou_loss` without terms, entry by entry, with the same `axis_weight` (its default for "xyxyxyxy" is
    another one), except for pairs whose axes cannot tell them apart: two points and two segments on one line are
    compared along the line that joins them, in space plates also along their normals, so that only what coincides has
    1. A box of zeros, as padding has, is a point: with any box that has an extent its MGIoU is 0 at most. Swapped sets
    give the transposed matrix, to the bit.

    A pair of which one is not there (`mask1`, `mask2`) has -1 and no gradient. A solver of assignments takes it for a
    number like any other, and may choose it where too few columns are there, so drop these choices:

        matrix = box_mgiou(pred.detach(), gt, mask2=mask).cpu()
        rows, columns = scipy.optimize.linear_sum_assignment(matrix, maximize=True)
        kept = mask.cpu()[columns]
        rows, columns = rows[kept], columns[kept]

    To push boxes apart, descend on their depth in each other:

        pairs = torch.ones(n, n, dtype=torch.bool).triu(1)  # each once, and no box with itself
        loss = (relu(margin + box_mgiou(boxes, boxes, over="depth")) * pairs).sum()

    Where two centres are exactly the same there is no direction to push, and the gradient to both centres is 0, as it
    is for the centres of two boxes of which each is pushed both ways alike: start from centres that differ.

    Args:
        boxes1: Boxes, (P, ...) or in batches (B, P, ...); float16, bfloat16, float32 or float64. Computed in float64
            if either set is float64, else in float32. Each set gets a gradient if it asks for one.
        boxes2: Boxes, (T, ...) or (B, T, ...).
        fmt: What the numbers of a box are, as in `box_mgiou_loss`.
        angle: "radians" or "degrees".
        clockwise: As in `box_mgiou_loss`.
        mask1: Which boxes of the first set are there, bool, (P,) or (B, P); (P,) beside a batch speaks of each of its
            sets. What is not there may hold anything.
        mask2: The same for the second set, (T,) or (B, T).
        over: What to take over the axes.
            "mean": MGIoU, in (-1, 1], or -1 for points apart and for parallel segments beside each other.
            "min": the smallest 1-D GIoU. Below 0 the two are apart. In the plane they overlap where it is above 0 (free
            corners with a dent or a crossing: see `polygon_mgiou`); in space they may still be apart where it is, as
            the normals of faces alone cannot tell an edge from an edge. Its gradient is 0 where one interval lies
            inside the other on that axis, however the boxes move there. Its positive part is the paper's MGIoU-.
            "depth": the smallest 1 - |distance of the middles| / (sum of the half-lengths), with the same sign: it
            says how far one must move. It has no lower bound of -1: for two points it is down to about -10^6, as an
            extent below a millionth of the pair's counts as that.
        axis_weight: As in `mgiou_loss`; in space "uniform" only. For "min" and "depth" it says which axes there are.
        backend: "eager" (PyTorch), "triton" (fused kernels; an error where they cannot run) or "auto". The kernels
            need no memory but the matrix; eager PyTorch takes up to `triton_mgiou.reference.pairs.MEMORY` bytes more,
            without a limit under transforms of `torch.func`, in forward mode and in `torch.compile`. There is no kernel
            for "corners3d" and none with a gradient for "xyxyxyxy": with "auto" these are eager on a GPU too.

    Returns:
        The matrix, (P, T) or (B, P, T); float64 if either set is float64, else float32. NaN where a number of either
        box is NaN or Inf; the gradient is then NaN for that box alone.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the format does not have the option.
        RuntimeError: `backend="triton"` where the kernels cannot run, or a call under `torch.jit.trace`.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    check_box_format(fmt, angle, clockwise)
    if is_bounding_boxes(boxes1):
        boxes1 = plain_boxes("boxes1", boxes1, fmt, angle, clockwise)
    if is_bounding_boxes(boxes2):
        boxes2 = plain_boxes("boxes2", boxes2, fmt, angle, clockwise)
    if torch.compiler.is_dynamo_compiling():
        boxes1, boxes2, mask1, mask2 = without_classes(boxes1, boxes2, mask1, mask2)
    kind = FORMATS[fmt]
    numbers = ", ".join(map(str, kind.shape))
    check_pairs(
        "box_mgiou",
        "boxes",
        boxes1,
        boxes2,
        kind.shape,
        f"(P, {numbers}) or (B, P, {numbers}) for fmt={fmt!r} ({kind.numbers})",
        fmt,
    )
    check_matrix_options(over, axis_weight, kind.axis_weights, backend)
    sizes = len(kind.shape)
    mask1 = check_set_mask("mask1", mask1, "boxes1", boxes1, sizes)
    mask2 = check_set_mask("mask2", mask2, "boxes2", boxes2, sizes)
    if fmt == "xyxyxyxy":
        corners = (each.reshape(*each.shape[:-1], 4, 2) for each in (boxes1, boxes2))
        return polygon_mgiou(*corners, mask1=mask1, mask2=mask2, over=over, axis_weight=axis_weight, backend=backend)
    checks = debugging.on and debug_checks("box_mgiou", boxes1, boxes2)
    if checks:
        in_radians = kind.has_angle and angle == "radians"
        boxes1 = checks.input("boxes1", boxes1, mask=mask1, in_radians=in_radians)
        boxes2 = checks.input("boxes2", boxes2, mask=mask2, in_radians=in_radians)
    missing = None if fmt in PAIR_FORMATS else f"pairs of {fmt!r}"
    if not (is_empty(boxes1.numel()) or is_empty(boxes2.numel())) and takes_kernel(backend, boxes1, missing):
        call = triton_mgiou.pairs.BoxPairs(fmt, angle, clockwise, over, axis_weight)
        matrix = triton_mgiou.pairs.box_matrix(boxes1, boxes2, mask1, mask2, call)
    else:
        is_batched = boxes1.dim() > 1 + sizes
        batches = _batches((boxes1, boxes2, mask1, mask2), is_batched)
        matrix = pair_reference.box_matrix(
            *batches, fmt=fmt, angle=angle, clockwise=clockwise, over=over, axis_weight=axis_weight
        )
        matrix = matrix if is_batched else matrix.squeeze(0)
    if checks:
        checks.output("matrix", matrix, boxes1=boxes1, boxes2=boxes2)
    return matrix


def polygon_mgiou(
    polygons1: Tensor,
    polygons2: Tensor,
    *,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    over: str = "mean",
    axis_weight: str = "uniform",
    backend: str = "auto",
) -> Tensor:
    """MGIoU of every polygon of one set with every polygon of another.

    See `box_mgiou` for all that is not said here. MGIoU sees the polygons' hulls and the normals of their edges. Entry
    by entry it is 1 - 2 `mgiou_loss(..., boundary_weight=0)` with the same `axis_weight`.

    Args:
        polygons1: Vertices, (P, N, 2) or in batches (B, P, N, 2), in order along the outline; dtypes as for boxes.
        polygons2: Vertices, (T, M, 2) or (B, T, M, 2); M may differ from N.
        lengths1: How many vertices of each polygon are real, (P,) or (B, P), int8 to int64 or uint8; the rest is
            padding and may hold anything. Clamped to 0..N. A polygon without a real vertex is not there.
        lengths2: The same for the second set, (T,) or (B, T).
        mask1: Which polygons of the first set are there, bool, (P,) or (B, P).
        mask2: The same for the second set, (T,) or (B, T).
        over: As in `box_mgiou`. Below 0, "min" and "depth" say that the hulls are apart; above 0 that they overlap, if
            both polygons are convex and in order. The edges of a hull that bridge dents are no axes, so beside a dent
            the hulls may be apart where it is above 0: give the hulls' vertices to know.
        axis_weight: As in `mgiou_loss`.
        backend: As in `box_mgiou`.

    Returns:
        The matrix, (P, T) or (B, P, T), as `box_mgiou`'s.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
        RuntimeError: `backend="triton"` where the kernels cannot run, as with a gradient, or a call under
            `torch.jit.trace`.

    Source: Le, Pham, Cai, Rezatofighi, "Marginalized Generalized IoU (MGIoU)", AAAI-26, arXiv 2504.16443.
    """
    if torch.compiler.is_dynamo_compiling():
        polygons1, polygons2, lengths1, lengths2 = without_classes(polygons1, polygons2, lengths1, lengths2)
        mask1, mask2 = without_classes(mask1, mask2)
    check_pairs("polygon_mgiou", "polygons", polygons1, polygons2, (None, 2), "(P, N, 2) or (B, P, N, 2) with N >= 1")
    check_matrix_options(over, axis_weight, AXIS_WEIGHTS, backend)
    check_lengths("lengths1", lengths1, "polygons1", polygons1)
    check_lengths("lengths2", lengths2, "polygons2", polygons2)
    mask1 = check_set_mask("mask1", mask1, "polygons1", polygons1, 2)
    mask2 = check_set_mask("mask2", mask2, "polygons2", polygons2, 2)
    checks = debugging.on and debug_checks("polygon_mgiou", polygons1, polygons2)
    if checks:
        polygons1 = checks.input("polygons1", polygons1, lengths1, mask1)
        polygons2 = checks.input("polygons2", polygons2, lengths2, mask2)
    wants_gradient = torch.is_grad_enabled() and (polygons1.requires_grad or polygons2.requires_grad)
    missing = "the gradient of pairs of polygons" if wants_gradient else None
    if not (is_empty(polygons1.numel()) or is_empty(polygons2.numel())) and takes_kernel(backend, polygons1, missing):
        call = triton_mgiou.pairs.PolygonPairs(lengths1, lengths2, mask1, mask2, over, axis_weight)
        matrix = triton_mgiou.pairs.polygon_matrix(polygons1, polygons2, call)
    else:
        is_batched = polygons1.dim() == 4
        batches = _batches((polygons1, polygons2, lengths1, lengths2, mask1, mask2), is_batched)
        matrix = pair_reference.polygon_matrix(*batches, over=over, axis_weight=axis_weight)
        matrix = matrix if is_batched else matrix.squeeze(0)
    if checks:
        checks.output("matrix", matrix, polygons1=polygons1, polygons2=polygons2)
    return matrix


def keypoint_l2(
    pred: Tensor,
    target: Tensor,
    visible: Tensor,
    area: Tensor,
    sigmas: Tensor | float,
    weight: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    backend: str,
) -> Tensor:
    """The L2 term of `PolygonLoss`, whose arguments are checked.

    Vertices are (B, N, 2), both in the type that is computed in, `visible` is (B, N) and bool, `sigmas` (N,) or one.
    What is traced is left to the compiler, which fuses it.
    """
    area = area.detach().reshape(-1).to(pred.dtype)
    if is_empty(pred.shape[0]) or not takes_kernel(backend, pred) or triton_mgiou.ops.needs_dispatcher(pred, target):
        losses = keypoint_reference.per_sample_l2(pred, target, visible, area, sigmas)
        return reduce(losses, weight, reduction, avg_factor)
    inside = kernel_reduction(pred, target, weight, reduction, avg_factor)
    call = triton_mgiou.launch.KeypointCall(visible, area.resolve_neg(), sigmas, inside or Reduction())
    loss = triton_mgiou.ops.direct(pred, target, call)
    return reduce(loss, weight, reduction, avg_factor) if inside is None else loss


def debug_checks(function: str, first: Tensor, second: Tensor) -> Checks | None:
    """What debug mode checks; nothing where no value can be read, as under a transform of `torch.func`."""
    if are_transforms_active() or torch.compiler._is_exporting_flag:  # 2.11's graphs take `is_exporting()` for True
        return None
    from triton_mgiou.training.loss_checks import Checks, has_values  # noqa: PLC0415 - slow, and above this module

    has_numbers = torch.compiler.is_compiling() or (has_values(first) and has_values(second))
    return Checks(function) if has_numbers else None


def _batches(tensors: tuple[Any, ...], are_batched: bool) -> list[Any]:
    """Tensors with a batch of one, if they have none."""
    return [each if each is None or are_batched else each.unsqueeze(0) for each in tensors]
