"""One training in the real Ultralytics, and how its detector is judged."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_VERBOSE", "false")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from ultralytics.engine import trainer as ultralytics_trainer
from ultralytics.models.yolo.obb import OBBTrainer, OBBValidator
from ultralytics.models.yolo.pose import PoseTrainer, PoseValidator
from ultralytics.utils import LOGGER, ops
from ultralytics.utils.loss import KeypointLoss

from bench.detectors.loader import Loader
from bench.detectors.losses import FewVisible, Reported, Watched, quadratic
from bench.detectors.nms import provide_nms
from bench.detectors.plan import (
    BOX_LOSSES,
    KEYPOINT_LOSSES,
    PRECISIONS,
    REPORTED,
    SPEED,
    Job,
    Size,
    images_to_judge_by,
)
from bench.detectors.scenes import BOXES, KEYPOINTS, Scenes
from bench.detectors.workers import Tell
from triton_mgiou import PAPER, box_mgiou_loss
from triton_mgiou.integrations import ultralytics as adapter
from triton_mgiou.metrics import COCO_THRESHOLDS, average_precision, polygon_iou_matrix

CONFIDENCE = 0.01  # predictions below have no part in any metric
MOST = 50  # predictions in an image, which has 8 objects at most
SURE = 0.25  # those above are what a user would see
FIRST_STEPS = 20  # the scaler searches its scale

# Ultralytics compares a network under AMP that it would download; where it cannot, it turns AMP on as well.
ultralytics_trainer.check_amp = lambda model: next(model.parameters()).device.type == "cuda"
provide_nms()
LOGGER.setLevel("ERROR")


def train(job: Job, size: Size, scenes: tuple[Scenes, Scenes], device: str, tell: Tell) -> dict[str, Any]:
    """Train and judge.

    Args:
        job: What to train.
        size: How large.
        scenes: To train on and to judge by.
        device: "cpu", or the number of a GPU.
        tell: Called after each epoch with its number, from 1 on, and the seconds that it took, without judging.

    Returns:
        What the file of the training holds: the means of each epoch, what was judged, and the steps that were skipped.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, size, scenes, device, Path(folder))
        begun = []
        trainer.add_callback("on_train_epoch_start", lambda _: begun.append(time.perf_counter()))
        trainer.add_callback("on_train_epoch_end", lambda _: tell((len(begun), time.perf_counter() - begun[-1])))
        trainer.train()
    log = trainer.log
    skipped = skipped_steps(trainer.scales)
    bad: list[float] = torch.stack(trainer.watched.bad).tolist() if trainer.watched and trainer.watched.bad else []
    return {
        "job": job._asdict(),
        "seconds": round(time.perf_counter() - start, 1),
        "amp": bool(trainer.amp),
        "steps": len(trainer.scales),
        "skipped": len(skipped),
        "skipped_after_20": sum(step >= FIRST_STEPS for step in skipped),
        **({"bad_gradients": float(np.mean(bad[FIRST_STEPS:] or bad[-1:]))} if bad else {}),
        "curves": {name: by_epoch(values, job.epochs) for name, values in log.items()},
        "judged": trainer.judged,
    }


def skipped_steps(scales: list[tuple[float, float]]) -> list[int]:
    """The steps after which the loss scale was smaller, or as small as it gets, from the scales before and after."""
    return [step for step, (before, after) in enumerate(scales) if after < before or after == 0]


def by_epoch(values: list[float], epochs: int) -> list[float]:
    """The mean of each epoch, in four digits."""
    return [float(f"{np.mean(part):.4g}") for part in np.array_split(values, epochs)]


def make_trainer(job: Job, size: Size, scenes: tuple[Scenes, Scenes], device: str, folder: Path) -> Any:
    """An Ultralytics trainer with the loss of a job, with batches that lie on the device, that saves nothing."""
    is_boxes, is_26 = job.task in BOXES, job.loss.startswith("YOLO26")
    precision = PRECISIONS.get(job.loss, "fp16")
    judged_by = Scenes._make(each[: images_to_judge_by(job, size)] for each in scenes[1])
    base: Any = _boxes(job) if is_boxes else _keypoints(job)

    class BenchTrainer(base):  # type: ignore[misc]
        watched: Watched | None = None

        def get_dataset(self) -> dict[str, Any]:
            shape = {} if is_boxes else {"kpt_shape": [KEYPOINTS[job.task], 3]}
            return {"train": "", "val": "", "nc": 1, "names": {0: "digit"}, "channels": 3, **shape}

        def get_dataloader(self, _path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Loader:  # noqa: ARG002
            training = mode == "train"
            chosen = scenes[0] if training else judged_by
            return Loader(chosen, job.task, size.batch_size, self.device, training=training, seed=job.seed)

        def get_validator(self) -> Any:
            return (JudgeBoxes if is_boxes else JudgeKeypoints)(
                self.test_loader, save_dir=self.save_dir, args=copy(self.args), _callbacks=self.callbacks
            )

        def validate(self) -> tuple[dict[str, float], float]:
            done, last = self.epoch + 1, self.epoch + 1 == self.epochs
            if last or (job.watch and (done in {1, 2} or done % 5 == 0)):
                metrics = self.validator(self)
                own = {key.removeprefix("metrics/"): value for key, value in metrics.items() if "mAP" in key}
                self.judged.append({"epoch": done, **own, **self.validator.summary()})
            return {}, 0.0

        def optimizer_step(self) -> None:
            if job.part == SPEED.part:  # reading the scale waits for the device
                super().optimizer_step()
                return
            before = self.scaler.get_scale()
            super().optimizer_step()
            self.scales.append((before, self.scaler.get_scale()))

        def save_model(self) -> bool:
            return False

        def _handle_nan_recovery(self, epoch: int) -> bool:  # noqa: ARG002 - it would start the epoch again
            return False

        def save_metrics(self, metrics: Any) -> None:
            pass

        def plot_metrics(self) -> None:
            pass

    trainer = BenchTrainer(
        overrides={
            "model": f"{'yolo26n' if is_26 else 'yolo11n'}-{'obb' if is_boxes else 'pose'}.yaml",
            "project": str(folder),
            "imgsz": size.side,
            "batch": size.batch_size,
            "epochs": job.epochs,
            "close_mosaic": max(1, job.epochs // 10),
            "nbs": size.batch_size,  # each batch is a step of the optimizer
            "device": device,
            "amp": precision.split()[0],
            "angle": 1.0 if "+ angle" in job.loss else 0.0,
            "rle": 0.0,  # of YOLO26, which compares vertex i with vertex i
            "conf": CONFIDENCE,
            "max_det": MOST,
            "seed": job.seed,
            "workers": 0,
            "deterministic": False,
            "plots": False,
            "val": job.watch,
        }
    )
    trainer.scales, trainer.judged, trainer.log = [], [], {"loss": [], "box_loss": [], "scale": []}

    def note(trainer: Any) -> None:
        items = trainer.loss_items
        trainer.log["loss"].append(items["box_loss" if is_boxes else "pose_loss"].item())
        trainer.log["box_loss"].append(items["box_loss"].item())
        trainer.log["scale"].append(trainer.scaler.get_scale())

    def begin(trainer: Any) -> None:
        if precision.endswith("without scaler"):
            trainer.scaler = torch.amp.GradScaler("cuda", enabled=False)

    trainer.add_callback("on_train_start", begin)
    trainer.add_callback("on_train_batch_end", note)
    return trainer


def _keypoints(job: Job) -> Any:
    name = job.loss
    is_reported = name in REPORTED or name in PRECISIONS
    given = {} if is_reported else KEYPOINT_LOSSES[name]
    if given is None:
        return PoseTrainer
    options: Mapping[str, Any] = given

    class Trainer(adapter.MGIoUPoseTrainer):
        few = False
        float32 = False
        assigner: str | None = None

        def set_loss(self, criterion: Any) -> None:
            super().set_loss(criterion)
            overlaps = vars(criterion.assigner)
            if self.assigner == "squared":
                overlaps["pair_overlaps"] = partial(squared_polygon_overlap, criterion.assigner)
            if self.assigner == "OKS":
                overlaps.pop("pair_overlaps", None)  # the class has Ultralytics' own
            if self.float32:
                criterion.kpts_decode = partial(in_float32, type(criterion).kpts_decode)

        def make_loss(self, sigmas: Tensor) -> nn.Module:
            loss = Reported(**REPORTED.get(name, {})) if is_reported else super().make_loss(sigmas)
            if self.few:
                loss = FewVisible(loss, KeypointLoss(sigmas))
            if job.part != SPEED.part:
                loss = self.watched = Watched(loss)
            return loss.to(sigmas.device)

    for attribute, value in options.items():
        setattr(Trainer, attribute, value)
    return Trainer


def squared_polygon_overlap(*arguments: Any, **polygons: Any) -> Tensor:
    """The square of what the package's assigner takes for the polygons of YOLO26."""
    return adapter._polygon_overlap(*arguments, **polygons).square()


class BoxVariant(adapter.MGIoUBoxLoss):
    """Our loss of boxes with something changed.

    Args:
        root: A box weighs as much as the root of its score, as in `MGIoUBoxLoss`; else as its score.
        quadratic: The root of the mean of the axes' squared distances, in place of their mean.
        saturating: What is far off costs no more than by ProbIoU, (1 - exp(-gain loss)) / gain; the slope near the
            target is the same.
        centre: The weight of the centre's distance along the target's sides, each relative to that side.
        *arguments: Those of `MGIoUBoxLoss`.
    """

    def __init__(
        self,
        *arguments: Any,
        root: bool = False,
        quadratic: bool = False,
        saturating: bool = False,
        centre: float = 0.0,
    ) -> None:
        super().__init__(*arguments)
        self.root = root
        self.quadratic = quadratic
        self.saturating = saturating
        self.centre = centre

    def weights(self, scores: Tensor) -> Tensor:
        """Return the weight of each anchor, shape (B, A, 1), by the scores of its classes, (B, A, C)."""
        return super().weights(scores) if self.root else scores.sum(-1, keepdim=True)

    def losses(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of paired boxes (P, 5). Shape (P,)."""
        pred, target = pred.float(), target.float()
        losses = quadratic(pred, target) if self.quadratic else super().losses(pred, target)
        if self.saturating:
            losses = (1 - torch.exp(-self.gain * losses)) / self.gain
        away, turn = pred[:, :2] - target[:, :2], target[:, 4]
        along = away[:, 0] * turn.cos() + away[:, 1] * turn.sin()
        across = away[:, 1] * turn.cos() - away[:, 0] * turn.sin()
        return losses + self.centre * (along.abs() / target[:, 2] + across.abs() / target[:, 3])


def in_float32(decode: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Decode what a head predicts in float32, whatever autocast says: in float16 a place is rounded to 1/4 pixel."""
    with torch.autocast("cuda", enabled=False):
        return decode(*(each.float() if isinstance(each, Tensor) else each for each in arguments))


OVERLAPS: dict[str, Callable[[Tensor], Tensor]] = {  # what an assigner takes where MGIoU is m; "floor" is the package's
    "itself": lambda m: m.clamp(min=0),
    "power 1.5": lambda m: m.clamp(min=0) ** 1.5,
    "squared": lambda m: m.clamp(min=0).square(),
    "Jaccard": lambda m: m.clamp(min=0) / (2 - m),  # near 1 it falls as the square does, and far from it more slowly
    "shifted": lambda m: ((1 + m) / 2) ** 4,  # likewise, and it is above 0 for every m
    "exponential 3": lambda m: torch.exp(-1.5 * (1 - m)),
    "exponential 4": lambda m: torch.exp(-2 * (1 - m)),  # as "shifted", and the further off the slower
    "floor .7": lambda m: m.clamp(min=0.7).square(),
}


def overlap_by(overlap: Callable[[Tensor], Tensor], gt_bboxes: Tensor, pd_bboxes: Tensor) -> Tensor:
    """A function of the MGIoU of paired boxes (P, 5)."""
    return overlap(1 - 2 * box_mgiou_loss(pd_bboxes, gt_bboxes, reduction="none", **PAPER))


def _boxes(job: Job) -> Any:
    given = BOX_LOSSES[job.loss]
    if given is None:
        return OBBTrainer
    options: Mapping[str, Any] = given

    class Trainer(adapter.MGIoUOBBTrainer):
        assigner = "itself"
        float32 = False

        def make_loss(self, reg_max: int) -> adapter.MGIoUBoxLoss:
            names = ("root", "quadratic", "saturating", "centre")
            changes = {name: options[name] for name in names if name in options}
            if changes == {"root": True}:
                return super().make_loss(reg_max)
            return BoxVariant(reg_max, self.options, self.gain, **changes)

        def set_loss(self, criterion: Any) -> None:
            super().set_loss(criterion)
            if self.assigner in OVERLAPS:
                criterion.assigner.iou_calculation = partial(overlap_by, OVERLAPS[self.assigner])
            if self.assigner == "ProbIoU":
                vars(criterion.assigner).pop("iou_calculation", None)  # the class has Ultralytics' own
            if self.float32:
                criterion.bbox_decode = partial(in_float32, type(criterion).bbox_decode, criterion)

    for attribute, value in options.items():
        setattr(Trainer, attribute, value)
    return Trainer


class _Judge:
    """Collects the polygons of all images during a validation, and judges them by this package's metrics."""

    def init_metrics(self, model: nn.Module) -> None:
        super().init_metrics(model)  # type: ignore[misc]
        self.images: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def _polygons(self, objects: Mapping[str, Tensor]) -> NDArray[Any]:
        raise NotImplementedError

    def _process_batch(self, preds: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = super()._process_batch(preds, batch)  # type: ignore[misc]
        self.images.append((self._polygons(preds), preds["conf"].float().cpu().numpy(), self._polygons(batch)))
        return found

    def summary(self) -> dict[str, float]:
        """AP by the polygons and by their hulls, mean IoU, the share that crosses itself, the error of the angle."""
        ious = [polygon_iou_matrix(pred, target) for pred, _, target in self.images]
        hulls = [polygon_iou_matrix(hull(pred), hull(target)) for pred, _, target in self.images]
        scores = [scores for _, scores, _ in self.images]
        by_polygon = dict(zip(COCO_THRESHOLDS, average_precision(zip(ious, scores, strict=True)), strict=True))
        by_hull = average_precision(zip(hulls, scores, strict=True), (0.5,))
        sure = [values > SURE for values in scores]
        best = [iou[keep].max(1) for iou, keep in zip(ious, sure, strict=True) if iou.size]
        crossing = [crosses(pred[keep]) for (pred, _, _), keep in zip(self.images, sure, strict=True)]
        angles = [
            angle_errors(pred[keep], target, iou[keep])
            for (pred, _, target), iou, keep in zip(self.images, ious, sure, strict=True)
        ]
        numbers = {
            **{f"AP{round(100 * at)}": by_polygon[at] for at in (0.5, 0.75, 0.9)},
            "AP50-95": np.mean(list(by_polygon.values())),
            "hull AP50": by_hull[0],
            "IoU": np.mean(np.concatenate([*best, []])) if sum(map(len, best)) else 0.0,
            "crossing": np.mean(np.concatenate([*crossing, []])) if sum(map(len, crossing)) else 0.0,
            "angle error": np.median(np.concatenate([*angles, []])) if sum(map(len, angles)) else math.nan,
        }
        return {name: round(float(value), 5) for name, value in numbers.items() if math.isfinite(value)}


class JudgeKeypoints(_Judge, PoseValidator):  # type: ignore[misc]
    """Ultralytics' own metrics of keypoints, and ours."""

    def _polygons(self, objects: Mapping[str, Tensor]) -> NDArray[Any]:
        polygons: NDArray[Any] = objects["keypoints"][..., :2].double().cpu().numpy()
        return polygons


class JudgeBoxes(_Judge, OBBValidator):  # type: ignore[misc]
    """Ultralytics' own metrics of oriented boxes, and ours."""

    def _polygons(self, objects: Mapping[str, Tensor]) -> NDArray[Any]:
        polygons: NDArray[Any] = ops.xywhr2xyxyxyxy(objects["bboxes"].double()).cpu().numpy()
        return polygons


def hull(polygons: NDArray[Any]) -> list[NDArray[Any]]:
    """The convex hull of each polygon; the polygon itself where its hull has no area."""
    shapely = importlib.import_module("shapely")
    hulls = shapely.convex_hull(shapely.multipoints(list(polygons))) if len(polygons) else []
    return [
        shapely.get_coordinates(each)[:-1] if each.geom_type == "Polygon" else polygon
        for each, polygon in zip(hulls, polygons, strict=True)
    ]


def crosses(polygons: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the outline of each polygon touches itself."""
    shapely = importlib.import_module("shapely")
    result: NDArray[np.bool_] = (
        ~shapely.is_simple(shapely.linearrings(polygons)) if len(polygons) else np.zeros(0, bool)
    )
    return result


def angle_errors(pred: NDArray[Any], target: NDArray[Any], ious: NDArray[Any]) -> NDArray[Any]:
    """Degrees, 0..45, between the first edges of each prediction and of the target that it overlaps by a half."""
    if not ious.size:
        return np.zeros(0)
    right = ious.max(1) >= 0.5
    edges = [polygons[:, 1] - polygons[:, 0] for polygons in (pred[right], target[ious.argmax(1)[right]])]
    turns = [np.degrees(np.arctan2(edge[:, 1], edge[:, 0])) for edge in edges]
    off = (turns[0] - turns[1]) % 90
    errors: NDArray[Any] = np.minimum(off, 90 - off)
    return errors
