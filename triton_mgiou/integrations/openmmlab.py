"""MGIoU in mmengine's registries, for configs of mmdetection 3, mmrotate 1 and mmdetection3d 1.1 and later.

One line of a config registers the names below; no code is needed:

    custom_imports = dict(imports=["triton_mgiou.integrations.openmmlab"], allow_failed_imports=False)

    loss_bbox = dict(type="BoxMGIoULoss", fmt="cxcywhr", loss_weight=2.0)              # a head's
    match_costs = [dict(type="MGIoUCost", fmt="cxcywhr", weight=2.0)]                  # of a HungarianAssigner
    iou_calculator = dict(type="MGIoUOverlaps2D", fmt="cxcywhr")  # of a MaxIoUAssigner: see its docstring

mmdetection 2 and mmrotate 0 have no mmengine. Their registry takes the losses in a line of code, without this module:
`mmdet.models.builder.LOSSES.register_module(module=BoxMGIoULoss)`. Their costs and overlaps are called otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_mgiou.arguments import check_bool, check_box_format, check_box_numbers, check_device, check_factor
from triton_mgiou.functional import box_mgiou
from triton_mgiou.modules import BoxMGIoULoss, MGIoULoss

try:
    from mmengine.registry import MODELS, TASK_UTILS
except ModuleNotFoundError as error:
    raise ImportError('this adapter needs mmengine; install it with: pip install "triton-mgiou[openmmlab]"') from error


class MGIoUCost:
    """Cost of matching predictions with ground truth, in mmdetection's protocol: `-weight` times their MGIoU.

    Args:
        weight: Factor on the cost, in 0..1e30.
        fmt: What the numbers of a box are, as in `box_mgiou`: "xyxy" for mmdetection, "cxcywhr" for mmrotate.
        angle: "radians" or "degrees".
        clockwise: As in `box_mgiou`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no such format, the weight is above 1e30, or it is negative: it would turn the matching
            around.
    """

    def __init__(self, weight: float = 1.0, fmt: str = "xyxy", angle: str = "radians", clockwise: bool = True) -> None:
        check_factor("weight", weight)
        check_box_format(fmt, angle, clockwise)
        self.weight = weight
        self.options: dict[str, Any] = {"fmt": fmt, "angle": angle, "clockwise": clockwise}

    def __call__(
        self,
        pred_instances: Any,
        gt_instances: Any,
        img_meta: dict[str, Any] | None = None,  # noqa: ARG002 - of the protocol
        **_: Any,
    ) -> Tensor:
        """Return the costs.

        Args:
            pred_instances: Has `bboxes`, (num_preds, n): a tensor, or boxes that have one in `tensor`.
            gt_instances: The same, (num_gts, n).
            img_meta: Not used.

        Returns:
            Shape (num_preds, num_gts). A pair with NaN has the highest cost, since no solver takes a NaN.

        Raises:
            TypeError: Boxes that are no floating tensors.
            ValueError: Boxes of a wrong shape, or on two devices; mmdetection3d's camera boxes.
        """
        pred = _tensor("pred_instances.bboxes", pred_instances.bboxes, self.options["fmt"])
        truth = _tensor("gt_instances.bboxes", gt_instances.bboxes, self.options["fmt"])
        check_device("gt_instances.bboxes", truth, "pred_instances.bboxes", pred)
        mgiou = box_mgiou(pred, truth, **self.options)
        return self.weight * -torch.where(mgiou.isnan(), -1.0, mgiou)


class MGIoUOverlaps2D:
    """MGIoU as an assigner's overlap: in [0, 1], as assigners take what is below 0 for boxes to be ignored.

    It is about the square root of the IoU: exactly so of two boxes of one centre and shape, and in the median of boxes
    near each other. A box that is shifted along a side has (1 + IoU) / 2. So take the square root of an assigner's
    thresholds: 0.5 and 0.4 become 0.71 and 0.63.

    Args:
        fmt: As in `MGIoUCost`.
        angle: "radians" or "degrees".
        clockwise: As in `box_mgiou`.
        bottom_center: Whether a plain tensor of "cxcyczlwhr" has the centre of the bottom in the place of the gravity
            centre, as those of mmdetection3d's assigners have.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no such format, or it has no bottom.
    """

    def __init__(
        self, fmt: str = "xyxy", angle: str = "radians", clockwise: bool = True, bottom_center: bool = False
    ) -> None:
        check_box_format(fmt, angle, clockwise)
        check_bool("bottom_center", bottom_center)
        if bottom_center and fmt != "cxcyczlwhr":
            raise ValueError(f"bottom_center must be False unless fmt='cxcyczlwhr', got True and fmt={fmt!r}")
        self.bottom_center = bottom_center
        self.options: dict[str, Any] = {"fmt": fmt, "angle": angle, "clockwise": clockwise}

    def __call__(self, bboxes1: Any, bboxes2: Any, mode: str = "iou", is_aligned: bool = False) -> Tensor:
        """Return the overlaps.

        Args:
            bboxes1: Boxes, (P, n): a tensor, or boxes that have one in `tensor`.
            bboxes2: Boxes, (T, n).
            mode: "iou" or "giou", which are the same here.
            is_aligned: Whether to compare each box with that of its number only.

        Returns:
            Shape (P, T), or (P,) if `is_aligned`; 0 for a pair with NaN, and for one whose MGIoU is below 0.

        Raises:
            TypeError: Boxes that are no floating tensors.
            ValueError: Another mode: MGIoU is no share of one of the boxes. Or boxes of a wrong shape or number, or on
                two devices; mmdetection3d's camera boxes.
        """
        if mode not in ("iou", "giou"):
            raise ValueError(f"mode must be 'iou' or 'giou', got {mode!r}")
        first = _tensor("bboxes1", bboxes1, self.options["fmt"], self.bottom_center)
        second = _tensor("bboxes2", bboxes2, self.options["fmt"], self.bottom_center)
        check_device("bboxes2", second, "bboxes1", first)
        if is_aligned:
            if first.shape[0] != second.shape[0]:
                raise ValueError(
                    f"bboxes2 must be as many as bboxes1 if is_aligned, got shapes {tuple(second.shape)} and "
                    f"{tuple(first.shape)}"
                )
            mgiou = box_mgiou(first.unsqueeze(1), second.unsqueeze(1), **self.options).flatten()
        else:
            mgiou = box_mgiou(first, second, **self.options)
        return torch.where(mgiou > 0, mgiou, 0.0)


def _tensor(name: str, boxes: Any, fmt: str, bottom_center: bool = False) -> Tensor:
    """The tensor of mmdetection's `BaseBoxes`; with the gravity centre, where mmdetection3d's boxes have another."""
    tensor: Tensor = getattr(boxes, "tensor", boxes)
    check_box_numbers(name, tensor, fmt)
    if fmt == "cxcyczlwhr" and (bottom_center or hasattr(boxes, "bottom_center")):
        if getattr(boxes, "YAW_AXIS", 2) != 2:
            raise ValueError(f"{name} must turn about z, as LiDAR and depth boxes do, got {type(boxes).__name__}")
        numbers = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        x, y, z, length, width, height, yaw = numbers.unbind(-1)
        tensor = torch.stack((x, y, z + height / 2, length, width, height, yaw), dim=-1)
    return tensor


def register() -> None:
    """Put the losses, the cost and the overlaps into mmengine's registries. Importing this module has done it.

    Raises:
        KeyError: Another class has one of the names.
    """
    for registry, classes in ((MODELS, (MGIoULoss, BoxMGIoULoss)), (TASK_UTILS, (MGIoUCost, MGIoUOverlaps2D))):
        for each in classes:
            found = registry.module_dict.get(each.__name__)
            is_ours = found is not None and found.__module__ == each.__module__  # of before the module was reloaded
            registry.register_module(module=each, force=is_ours)


register()
