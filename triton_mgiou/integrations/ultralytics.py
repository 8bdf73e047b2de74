"""MGIoU in Ultralytics YOLO 8.4: trainers and validators for polygons (pose heads) and oriented boxes (OBB heads).

    from ultralytics import YOLO
    from triton_mgiou.integrations.ultralytics import MGIoUOBBTrainer, MGIoUPoseTrainer

    YOLO("yolo11n-pose.yaml").train(trainer=MGIoUPoseTrainer, data="polygons.yaml", epochs=100)
    YOLO("yolo11n-obb.yaml").train(trainer=MGIoUOBBTrainer, data="boxes.yaml", epochs=100)

Heads of YOLOv8, YOLO11 and YOLO26. Options are class attributes of a subclass:

    class MyTrainer(MGIoUPoseTrainer):
        mode = "mgiou"

Let it stand in a module that can be imported: a training on several GPUs starts other processes, which import it by
name in some versions of Ultralytics.

A checkpoint holds nothing of this package: it loads, predicts and exports without it, and resumes with
`YOLO("last.pt").train(resume=True, trainer=...)`, schedule included. What judges polygons has to be named here too:

    YOLO("best.pt").val(validator=PolygonPoseValidator, data="polygons.yaml")

`YOLO.tune` without Ray takes no `trainer`: the processes that it starts train with Ultralytics' own loss.

Needs `pip install "triton-mgiou[ultralytics]"`. Ultralytics is licensed under AGPL-3.0, this module under MIT: it calls
and subclasses, and copies nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import triton_mgiou
from triton_mgiou.arguments import check_factor, check_names
from triton_mgiou.functional import box_mgiou_loss, mgiou_loss
from triton_mgiou.metrics import polygon_iou_matrix
from triton_mgiou.modules import BoxMGIoULoss, MGIoULoss, PolygonLoss
from triton_mgiou.options import PAPER, Options
from triton_mgiou.training.schedules import AlphaSchedule

TESTED = "8.4.190"

try:
    import cv2
    import ultralytics
except ModuleNotFoundError as error:
    raise ImportError(
        'this adapter needs ultralytics; install it with: pip install "triton-mgiou[ultralytics]"'
    ) from error


def _other_version(found: str, known: str) -> str:
    return (
        f"ultralytics {ultralytics.__version__} {found}, but triton-mgiou {triton_mgiou.__version__} was made for "
        f"ultralytics {TESTED}, which {known}"
    )


try:
    from ultralytics.models.yolo.obb import OBBTrainer, OBBValidator
    from ultralytics.models.yolo.pose import PoseTrainer, PoseValidator
    from ultralytics.nn import tasks
    from ultralytics.utils import DEFAULT_CFG, LOGGER, ops, tal
    from ultralytics.utils.loss import KeypointLoss, RotatedBboxLoss
    from ultralytics.utils.metrics import Metric, OBBMetrics, PoseMetrics, ap_per_class
    from ultralytics.utils.plotting import plot_images
    from ultralytics.utils.torch_utils import unwrap_model
except ImportError as error:
    raise ImportError(_other_version(f"lacks something ({error})", "has it")) from error

SHOWN_IMAGES = 16  # of a batch, in a plot
SHOWN_CONFIDENCE = 0.25
SHRINK = 4  # of the masks in a plot, as of Ultralytics' own: thousands of whole ones would not fit into memory
FARTHEST = 1e6  # pixels, in a plot: OpenCV fills a polygon of 1e10, or of NaN, for half a minute
ALIKE = 0.85  # of two names, by difflib: from here on one is taken for the other, misspelt
LEAST_OVERLAP = 0.5  # the assigner of boxes takes an MGIoU below for about this
SLOPE_BELOW = 2.0**-10  # at which what it takes falls there
VISIBLE = 0.5  # a predicted vertex is there from this confidence on
START_SCALE = 16.0  # of a GradScaler: trainings end at 64 to 512 (bench/detectors), and it grows where it can
OVERLAP = "probiou"  # by this name Ultralytics' loss of boxes calls what MGIoU replaces

# What is called here, or called by Ultralytics with these arguments.
PoseAssigner = getattr(tal, "PoseTaskAlignedAssigner", None)  # not in 8.4.170 yet
CALLS: dict[Callable[..., Any], tuple[str, ...]] = {
    KeypointLoss.forward: ("self", "pred_kpts", "gt_kpts", "kpt_mask", "area"),
    RotatedBboxLoss.forward: (
        *("self", "pred_dist", "pred_bboxes", "anchor_points", "target_bboxes", "target_scores"),
        *("target_scores_sum", "fg_mask", "imgsz", "stride"),
    ),
    tal.RotatedTaskAlignedAssigner.iou_calculation: ("self", "gt_bboxes", "pd_bboxes"),
    PoseTrainer.resume_training: ("self", "ckpt"),
    PoseTrainer.get_model: ("self", "cfg", "weights", "verbose"),
    OBBTrainer.get_model: ("self", "cfg", "weights", "verbose"),
    OBBTrainer.run_callbacks: ("self", "event"),
}
if PoseAssigner is not None:
    CALLS[tal.TaskAlignedAssigner.pair_overlaps] = ("self", "indices", "gt_bboxes", "pd_bboxes")
    CALLS[PoseAssigner.pair_overlaps] = ("self", "indices", "gt_bboxes", "pd_bboxes", "pd_kpts", "gt_kpts")


def check_version() -> None:
    """Raise a RuntimeError that names both versions if this Ultralytics calls its losses in another way."""
    for function, known in CALLS.items():
        found = tuple(inspect.signature(function).parameters)
        if found != known:
            name = function.__qualname__
            raise RuntimeError(_other_version(f"has {name}({', '.join(found)})", f"has {name}({', '.join(known)})"))
    if OVERLAP not in RotatedBboxLoss.forward.__code__.co_names:
        name = RotatedBboxLoss.forward.__qualname__
        raise RuntimeError(_other_version(f"has a {name} that does not call {OVERLAP}", "calls it there"))


# ---- losses


class MGIoUBoxLoss(RotatedBboxLoss):
    """Ultralytics' loss of oriented boxes with MGIoU in the place of ProbIoU; the distribution's part is theirs.

    A box weighs as much as the root of its score, which is about its MGIoU (see `_box_overlap`). With the score itself,
    what is far off would hardly count, and stay there.

    Args:
        reg_max: Bins of the distributions.
        options: Of `box_mgiou_loss`.
        gain: Factor on the loss of the boxes, beside Ultralytics' own gain (`box`, 7.5).
    """

    def __init__(self, reg_max: int, options: Mapping[str, Any], gain: float) -> None:
        super().__init__(reg_max)
        self.options = options
        self.gain = gain

    def losses(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of paired boxes (P, 5): centre, size, angle in radians. Shape (P,)."""
        return box_mgiou_loss(pred, target, reduction="none", **self.options)

    def weights(self, scores: Tensor) -> Tensor:
        """Return the weight of each anchor, shape (B, A, 1), by the scores of its classes, (B, A, C)."""
        return scores.sum(-1, keepdim=True).sqrt()

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,  # noqa: ARG002 - theirs is passed by this name
        *rest: Tensor,
        **named: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the boxes and that of the distribution, both over the sum of the weights.

        Takes what Ultralytics' own takes, and is its own, which computes one minus ProbIoU, with ours in that place.
        """

        def overlap(pred: Tensor, target: Tensor, **_: Any) -> Tensor:
            return 1 - self.losses(pred, target).unsqueeze(-1)

        own = RotatedBboxLoss.forward
        names = own.__globals__ | {OVERLAP: overlap}
        ours = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        weights = self.weights(target_scores)
        total = weights.sum().clamp(min=1)
        boxes = (pred_dist, pred_bboxes, anchor_points, target_bboxes)
        box, distribution = ours(self, *boxes, weights, total, *rest, **named)
        return self.gain * box, distribution


def _angle_loss(criterion: Any, *arguments: Any) -> Tensor | float:
    """Ultralytics' loss of the angle, unless nothing is taken of it."""
    if criterion.hyp.angle == 0:
        return 0.0
    loss: Tensor = type(criterion).calculate_angle_loss(criterion, *arguments)
    return loss


def _box_overlap(gt_bboxes: Tensor, pd_bboxes: Tensor) -> Tensor:
    """The square of MGIoU of paired boxes (P, 5), without terms, but at least about 1/4, for the assigner.

    The assigner takes a power of the overlap and makes scores of it, chosen for an IoU. A box of side w that is shifted
    by d along that side has an IoU of (w - d) / (w + d) and an MGIoU of w / (w + d), which falls half as fast; the
    square falls as fast as IoU. Below an MGIoU of 1/2, where nothing is right yet, the class alone decides which
    predictions learn a target, and they learn it with some weight. What a detector gains by both: bench/detectors.
    A place in two targets belongs to the one that its prediction overlaps more: so it falls a little there too.
    """
    overlap = 1 - 2 * box_mgiou_loss(pd_bboxes, gt_bboxes, reduction="none", **PAPER)
    return overlap.clamp(min=LEAST_OVERLAP).square() + SLOPE_BELOW * (overlap - LEAST_OVERLAP).clamp(max=0)


def _polygon_overlap(
    assigner: Any, indices: tuple[Tensor, ...], gt_bboxes: Tensor, pd_bboxes: Tensor, pd_kpts: Tensor, gt_kpts: Tensor
) -> Tensor:
    """MGIoU of paired polygons, at least 0, for YOLO26's assigner, which else compares vertex i with vertex i.

    Targets with fewer than three visible vertices keep the IoU of the upright boxes.
    """
    box: Tensor = tal.TaskAlignedAssigner.pair_overlaps(assigner, indices, gt_bboxes, pd_bboxes)
    image, target, anchor = indices
    vertices, visible = gt_kpts[image, target, :, :2], gt_kpts[image, target, :, 2] > 0
    losses = mgiou_loss(
        pd_kpts[image, anchor].float(), vertices, pred_mask=visible, target_mask=visible, reduction="none", **PAPER
    )
    return torch.where(visible.sum(-1) >= 3, (1 - 2 * losses).clamp(min=0).to(box.dtype), box)


class _Places(nn.Module):
    """Hands a loss the places of the vertices alone: a YOLO26 head predicts a deviation of each beside them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, pred_kpts: Tensor, *rest: Tensor) -> Tensor:
        """Return the loss of pred_kpts, shape (P, K, 2 or more), and of Ultralytics' further arguments."""
        value: Tensor = self.loss(pred_kpts[..., :2], *rest)
        return value


# ---- trainers


@contextmanager
def _naming(owner: str) -> Iterator[None]:
    """Errors about an argument say whose it is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}: {error}") from error


def _check_names(name: str, options: Any, known: Collection[str]) -> None:
    """Refuse options that are none of these: what a trainer sets itself is no option of it."""
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(options).__name__}")
    check_names(name, options, known)


def _check_spelling(trainer: type[_MGIoUTrainer]) -> None:
    """Refuse values in a subclass that nobody reads: under an option's name that is misspelt, or in a wrong place.

    A name that contains an option's, or is part of one, such as `model` or `scheduler`, may be the subclass's own, and
    its own methods may read an option of the loss there, or a constant whose name is an option's but for its case.
    """
    classes = trainer.__mro__
    ours = next(index for index, each in enumerate(classes) if each.__module__ == __name__)
    own = {name: each for cls in classes[:ours] for name, each in vars(cls).items() if not name.startswith("__")}
    methods = {name for name, each in own.items() if callable(each) or hasattr(each, "__get__")}
    for name in own:
        if hasattr(classes[ours], name) or name in methods:
            continue
        other_case = name.lower() in trainer.OPTIONS and name.lower() not in own  # no constant that gives the option
        if (other_case and not methods) or any(_is_misspelt(name, known) for known in trainer.OPTIONS):
            raise TypeError(f"attributes must be among {', '.join(trainer.OPTIONS)}, got {name}")
        is_option = name in Options._fields and not methods
        if is_option or any(_is_misspelt(name, known) for known in Options._fields):
            raise TypeError(
                f"options of the loss belong into options, such as {', '.join(Options._fields)}, got {name}"
            )


def _is_misspelt(name: str, known: str) -> bool:
    if name in known or known in name:
        return False
    swapped = (known[:k] + known[k + 1] + known[k] + known[k + 2 :] for k in range(len(known) - 1))
    return name in swapped or SequenceMatcher(None, name, known).ratio() >= ALIKE


class _MGIoUTrainer:
    """The base of both trainers: the criteria of the model and of its average get another loss before each epoch.

    Before each epoch, and not once, since a resumed training, one that recovers from NaN or from a lack of memory makes
    new ones. They belong to no model's class and are not saved, which keeps checkpoints plain.

    Raises:
        TypeError: An attribute has the wrong type, or the name of an option misspelt.
        ValueError: An attribute has the wrong value.
        RuntimeError: This Ultralytics calls its losses in another way.
    """

    HEAD: ClassVar[type[nn.Module]]
    PARTS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]]  # attributes that a subclass sets

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        check_version()
        with _naming(type(self).__name__):
            _check_spelling(type(self))
            self.check_attributes()
        super().__init__(cfg, overrides, _callbacks)  # type: ignore[call-arg]

    def check_attributes(self) -> None:
        """Refuse attributes that no loss can be made of, before any data are read."""
        raise NotImplementedError

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Make the model.

        Raises:
            ValueError: It has the head of another task.
        """
        config = cfg if isinstance(cfg, dict) else tasks.yaml_model_load(cfg)
        name = config["head"][-1][2]
        head = getattr(tasks, name, None)  # where Ultralytics looks for it
        if isinstance(head, type) and not issubclass(head, self.HEAD):
            owner, known = type(self).__name__, self.HEAD.__name__
            raise ValueError(f"{owner} must have a model with the head {known}, got one with {name}")
        model: nn.Module = super().get_model(config, weights, verbose)  # type: ignore[misc]
        return model

    def resume_training(self, ckpt: Any) -> None:
        """Start the GradScaler low; where a training is resumed, it goes on with its own scale.

        PyTorch's start, 65536, is for a loss that is a mean; Ultralytics multiplies its own by the size of the batch.
        So the scaler would skip some ten steps, one at a time, whenever the gradient outgrows float16 once more.
        """
        scaler: Any = self.scaler  # type: ignore[attr-defined]
        scaler.load_state_dict(scaler.state_dict() | {"scale": START_SCALE})  # without effect if it is not enabled
        super().resume_training(ckpt)  # type: ignore[misc]

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event; at the start of an epoch set the losses first.

        A callback would not do: `set_callback` and `clear_callback` replace it, and the loss is Ultralytics' own.
        """
        if event == "on_train_epoch_start":
            set_losses(self)
        super().run_callbacks(event)  # type: ignore[misc]

    def train(self) -> None:
        """Train. However it ends, the models are left without a criterion, as what is saved of them has to be plain."""
        try:
            super().train()  # type: ignore[misc]
        finally:
            for model in _models(self):
                if isinstance(model, nn.Module):  # before the training it is a name
                    model.criterion = None  # type: ignore[assignment]

    def save_model(self) -> Any:
        """Save the average without its criterion, which the first 8.4 versions would put into `last.pt`."""
        trainer: Any = self
        average = trainer.ema.ema
        criterion, average.criterion = average.criterion, None
        try:
            return super().save_model()  # type: ignore[misc]
        finally:
            average.criterion = criterion

    def set_loss(self, criterion: Any) -> None:
        """Put the loss into an Ultralytics criterion; called before each epoch for each criterion.

        Args:
            criterion: A `v8PoseLoss`, `PoseLoss26` or `v8OBBLoss`.
        """
        raise NotImplementedError


def set_losses(trainer: Any) -> None:
    """Put the loss of one of our trainers into the criteria of its model and of the model's average."""
    for model in _models(trainer):
        if getattr(model, "criterion", None) is None:
            model.criterion = model.init_criterion()
        both = (getattr(model.criterion, "one2many", None), getattr(model.criterion, "one2one", None))
        for criterion in both if all(both) else (model.criterion,):
            for part in trainer.PARTS:
                if not hasattr(criterion, part):
                    kind = type(criterion).__name__
                    raise RuntimeError(_other_version(f"has a {kind} without {part}", f"has {kind}.{part}"))
            trainer.set_loss(criterion)


def _models(trainer: Any) -> list[Any]:
    return [unwrap_model(trainer.model)] + ([trainer.ema.ema] if trainer.ema else [])


class MGIoUPoseTrainer(_MGIoUTrainer, PoseTrainer):
    """Train a pose head whose keypoints are the vertices of a polygon, in order along its outline, by `PolygonLoss`.

    `PolygonPoseValidator` judges it and chooses `best.pt`. Set these in a subclass:

    Attributes:
        mode: "hybrid" where vertex i has a meaning, such as a certain corner; "mgiou" where the first vertex is
            arbitrary; "l2". A YOLO26 head has two more parts that compare vertex i with vertex i: in "mgiou" its
            assigner takes MGIoU instead, and its RLE loss should be turned off (`rle=0`).
        alpha: The weight of L2 in "hybrid"; None for an `AlphaSchedule` over the epochs.
        schedule: Options of that `AlphaSchedule`: `kind`, `start`, `end`.
        sigmas: Tolerances of the vertices in L2; None for Ultralytics' own (`kpt_oks_sigmas` of the data set, or one
            over the number of vertices, 17 too, which are not taken for a person's joints here).
        options: Options of the MGIoU part, those of `MGIoULoss`.
    """

    HEAD = tasks.Pose
    PARTS = ("keypoint_loss", "assigner")
    OPTIONS = ("mode", "alpha", "schedule", "sigmas", "options")
    mode: ClassVar[str] = "hybrid"
    alpha: ClassVar[float | None] = None
    schedule: ClassVar[Mapping[str, Any]] = {}
    sigmas: ClassVar[float | Sequence[float] | None] = None
    options: ClassVar[Mapping[str, Any]] = {}
    polygon_loss: nn.Module | None = None

    def check_attributes(self) -> None:
        """Refuse attributes that no loss can be made of."""
        _check_names("schedule", self.schedule, ("kind", "start", "end"))
        with _naming("schedule"):
            AlphaSchedule(1, **self.schedule)
        _check_names("options", self.options, MGIoULoss.OPTIONS)
        with _naming("options"):
            MGIoULoss(**self.options)
        PolygonLoss(self.mode, alpha=0.0 if self.alpha is None else self.alpha, sigmas=self.sigmas)

    def get_dataset(self) -> dict[str, Any]:
        """Return what the data set's file says.

        Raises:
            ValueError: Its objects have fewer than three keypoints, or not as many as `sigmas` has numbers.
        """
        data: dict[str, Any] = super().get_dataset()
        count = data["kpt_shape"][0]
        if count < 3:
            raise ValueError(f"kpt_shape must have 3 or more keypoints, the vertices of a polygon, got {count}")
        if self.sigmas is not None and (given := torch.as_tensor(self.sigmas).numel()) not in (1, count):
            name = type(self).__name__
            raise ValueError(f"{name}: sigmas must be one or {count} numbers, as the data have keypoints, got {given}")
        _are_no_joints(data)
        return data

    def make_loss(self, sigmas: Tensor) -> nn.Module:
        """Make the loss; called once.

        Args:
            sigmas: The tolerances of the keypoints where the attribute `sigmas` gives none, shape (K,).

        Returns:
            A module with Ultralytics' calling convention: (pred_kpts, gt_kpts, kpt_mask, area) to a scalar. A predicted
            keypoint begins with its place; a YOLO26 head has up to five numbers there.
        """
        trainer: Any = self
        alpha: float | nn.Module | None = self.alpha
        if self.mode == "hybrid" and alpha is None:
            alpha = AlphaSchedule(trainer.epochs, **self.schedule)
        tolerances = sigmas if self.sigmas is None else self.sigmas
        loss = PolygonLoss(self.mode, alpha=alpha, sigmas=tolerances, return_parts=False, **self.options)
        return _Places(loss).to(sigmas.device)

    def set_loss(self, criterion: Any) -> None:
        """Put the loss into a `v8PoseLoss` or `PoseLoss26`."""
        trainer: Any = self
        if hasattr(criterion, "target_weights"):  # of the RLE loss
            criterion.target_weights = torch.ones_like(criterion.target_weights)  # those of a person's joints differ
        if self.polygon_loss is None:
            sigmas = criterion.keypoint_loss.sigmas
            if given := trainer.data.get("kpt_oks_sigmas"):  # not known to the first 8.4 versions
                sigmas = torch.as_tensor(given, dtype=sigmas.dtype, device=sigmas.device).flatten()
            self.polygon_loss = self.make_loss(sigmas)
            if self.mode == "mgiou" and getattr(criterion, "rle_loss", None) is not None and criterion.hyp.rle > 0:
                LOGGER.warning('mode "mgiou" and the RLE loss, which compares vertex i with vertex i: rle=0 is better')
        for schedule in self.polygon_loss.modules():
            if isinstance(schedule, AlphaSchedule):
                if trainer.args.time:  # epochs is an estimate, made anew after each of them
                    schedule.total_steps = trainer.epochs
                schedule.set(trainer.epoch)
        criterion.keypoint_loss = self.polygon_loss
        if self.mode == "mgiou" and PoseAssigner is not None and isinstance(criterion.assigner, PoseAssigner):
            criterion.assigner.pair_overlaps = partial(_polygon_overlap, criterion.assigner)

    def get_validator(self) -> PolygonPoseValidator:
        """Return a `PolygonPoseValidator`."""
        super().get_validator()  # where the first 8.4 versions set the names of the losses
        validator: PolygonPoseValidator = _validator(PolygonPoseValidator, self)
        return validator

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """Draw the polygons of a batch into `train_batch{ni}.jpg`."""
        trainer: Any = self
        _plot_targets(batch, trainer.save_dir / f"train_batch{ni}.jpg", trainer)


class MGIoUOBBTrainer(_MGIoUTrainer, OBBTrainer):
    """Train an OBB head with MGIoU in the place of ProbIoU, in the loss and, squared but at least 1/4, in the assigner.

    The assigner was made for an IoU, and where a box is shifted the square falls as fast as IoU, MGIoU half as fast.
    Boxes weigh as much as the root of their scores, so that the loss goes on to pull at what is far off.
    `PolygonOBBValidator` judges by the IoU of the corners and chooses `best.pt`. Ultralytics' loss of the distribution
    stays as it is. Its angle loss, which ProbIoU needs for squares, is off where the setting `angle` is not given:
    MGIoU sees their angle, and boxes came out less exact with both (bench/detectors). Set in a subclass:

    Attributes:
        options: Options of the loss: `axis_weight`, `axis_grad`, `boundary_weight` and `backend`. The boundary term is
            off: detectors came out less exact with it (bench/detectors). An option that a subclass leaves out is as in
            `box_mgiou_loss`, where it is on; `PAPER | {"axis_grad": False}` changes one and leaves it off.
        gain: Factor on the loss of the boxes. Near the target a shift by d of a box of width w costs d / 2w by MGIoU
            and sqrt(6) times that by ProbIoU, for which Ultralytics chose its gains; with 1 the centres come out less
            exact than with ProbIoU (bench/detectors).
    """

    HEAD = tasks.OBB
    PARTS = ("bbox_loss", "assigner", "calculate_angle_loss", "reg_max")
    OPTIONS = ("options", "gain")
    options: ClassVar[Mapping[str, Any]] = PAPER
    gain: ClassVar[float] = 2.5

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        # Another configuration may have the setting, and the checkpoint of a training that is resumed has it.
        if cfg is DEFAULT_CFG and not (overrides or {}).get("resume"):
            overrides = {"angle": 0.0} | (overrides or {})
        super().__init__(cfg, overrides, _callbacks)

    def check_attributes(self) -> None:
        """Refuse attributes that no loss can be made of."""
        _check_names("options", self.options, MGIoULoss.OPTIONS)
        with _naming("options"):
            BoxMGIoULoss(**self.options)
        check_factor("gain", self.gain)

    def make_loss(self, reg_max: int) -> MGIoUBoxLoss:
        """Make the loss of a criterion whose distributions have `reg_max` bins."""
        return MGIoUBoxLoss(reg_max, self.options, self.gain)

    def set_loss(self, criterion: Any) -> None:
        """Put the loss into a `v8OBBLoss`."""
        if not isinstance(criterion.bbox_loss, MGIoUBoxLoss):
            criterion.bbox_loss = self.make_loss(criterion.reg_max).to(criterion.device)
            criterion.assigner.iou_calculation = _box_overlap
            criterion.calculate_angle_loss = partial(_angle_loss, criterion)

    def get_validator(self) -> PolygonOBBValidator:
        """Return a `PolygonOBBValidator`."""
        super().get_validator()  # where the first 8.4 versions set the names of the losses
        validator: PolygonOBBValidator = _validator(PolygonOBBValidator, self)
        return validator


def _are_no_joints(data: dict[str, Any]) -> None:
    """Tell Ultralytics that 17 keypoints with visibilities are vertices: by itself it takes them for COCO's person."""
    if list(data["kpt_shape"]) == [17, 3] and not data.get("kpt_oks_sigmas"):
        data["kpt_oks_sigmas"] = [1 / 17] * 17


def _validator(kind: Any, trainer: Any) -> Any:
    return kind(trainer.test_loader, save_dir=trainer.save_dir, args=copy(trainer.args), _callbacks=trainer.callbacks)


# ---- validators


class _PolygonMetrics:
    """Ultralytics' metrics of a task, and precision, recall and mAP by the IoU of polygons, marked (G)."""

    def __init__(self, names: dict[int, str] | None = None) -> None:
        super().__init__(names)  # type: ignore[call-arg]
        self.polygon = Metric()
        self.stats: dict[str, list[Any]]
        self.names: dict[int, str]
        self.stats["tp_g"] = []

    def update_stats(self, stat: dict[str, Any]) -> None:
        """Add an image."""
        super().update_stats(stat)  # type: ignore[misc]
        if hasattr(self.polygon, "update_image_metrics"):  # not in 8.4.0 yet
            self.polygon.update_image_metrics(*(stat[name] for name in ("tp_g", "target_cls", "pred_cls", "im_name")))

    def clear_image_metrics(self) -> None:
        """Forget what each image had."""
        super().clear_image_metrics()  # type: ignore[misc]
        self.polygon.clear_image_metrics()

    def process(self, save_dir: Path = Path(), plot: bool = False, on_plot: Any = None) -> dict[str, NDArray[Any]]:
        """Compute all metrics from what was seen."""
        stats: dict[str, NDArray[Any]] = super().process(save_dir, plot, on_plot=on_plot)  # type: ignore[misc]
        self.polygon.nc = len(self.names)
        self.polygon.update(
            ap_per_class(
                *(stats[name] for name in ("tp_g", "conf", "pred_cls", "target_cls")),
                plot=plot,
                on_plot=on_plot,
                save_dir=save_dir,
                names=self.names,
                prefix="Polygon",
            )[2:]
        )
        return stats

    @property
    def keys(self) -> list[str]:
        """The names of `mean_results`."""
        own = [f"metrics/{name}(G)" for name in ("precision", "recall", "mAP50", "mAP50-95")]
        return [*super().keys, *own]  # type: ignore[misc]

    def mean_results(self) -> list[float]:
        """Return the means over the classes."""
        return [*super().mean_results(), *self.polygon.mean_results()]  # type: ignore[misc]

    def class_result(self, i: int) -> list[float]:
        """Return the results of one class."""
        return [*super().class_result(i), *self.polygon.class_result(i)]  # type: ignore[misc]

    def summary(self, normalize: bool = True, decimals: int = 5) -> list[dict[str, Any]]:
        """Return a row for each class, as for `to_df` and `to_csv`."""
        rows: list[dict[str, Any]] = super().summary(normalize, decimals)  # type: ignore[misc]
        names = ("P", "R", "F1", "mAP50", "mAP50-95")
        own = (self.polygon.p, self.polygon.r, self.polygon.f1, self.polygon.ap50, self.polygon.ap)
        for row, *values in zip(rows, *own, strict=True):
            row |= {f"Polygon-{name}": round(float(value), decimals) for name, value in zip(names, values, strict=True)}
        return rows

    @property
    def fitness(self) -> float:
        """Ultralytics' fitness of the polygons alone, which chooses `best.pt`."""
        return float(self.polygon.fitness())

    @property
    def curves(self) -> list[str]:
        """The names of `curves_results`."""
        own = [f"{name}(G)" for name in ("Precision-Recall", "F1-Confidence", "Precision-Confidence")]
        return [*super().curves, *own, "Recall-Confidence(G)"]  # type: ignore[misc]

    @property
    def curves_results(self) -> list[list[Any]]:
        """The curves."""
        return [*super().curves_results, *self.polygon.curves_results]  # type: ignore[misc]


class PolygonPoseMetrics(_PolygonMetrics, PoseMetrics):
    """Metrics of boxes (B), keypoints (P) and polygons (G)."""


class PolygonOBBMetrics(_PolygonMetrics, OBBMetrics):
    """Metrics of oriented boxes by ProbIoU (B) and by the IoU of their corners (G)."""


class _PolygonValidator:
    """Matches predictions with targets by the IoU of their polygons too.

    Raises:
        ImportError: Shapely is not installed.
        ValueError: `YOLO.val` of a model of another task.
    """

    TASK: ClassVar[str]
    METRICS: ClassVar[type]

    def __init__(self, dataloader: Any = None, save_dir: Any = None, args: Any = None, _callbacks: Any = None) -> None:
        task = args.get("task") if isinstance(args, Mapping) else None  # an object has a default that says nothing
        if task not in (None, self.TASK):
            raise ValueError(f"{type(self).__name__} must have a model of the task {self.TASK!r}, got one of {task!r}")
        polygon_iou_matrix([], [])  # without Shapely a training shall fail here, not after its first epoch
        super().__init__(dataloader, save_dir, args, _callbacks)  # type: ignore[call-arg]
        self.metrics = self.METRICS()

    def _polygons(self, objects: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
        raise NotImplementedError

    def gather_stats(self) -> None:
        """Gather what the processes of a training on several GPUs have found."""
        super().gather_stats()  # type: ignore[misc]
        if hasattr(self, "_gather_image_metrics"):
            self._gather_image_metrics(self.metrics.polygon)

    def get_desc(self) -> str:
        """The heading of the table of results."""
        columns = ("Polygon(P", "R", "mAP50", "mAP50-95)")
        return str(super().get_desc()) + ("%11s" * len(columns)) % columns  # type: ignore[misc]

    def _process_batch(self, preds: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, NDArray[Any]]:
        validator: Any = self
        found: dict[str, NDArray[Any]] = super()._process_batch(preds, batch)  # type: ignore[misc]
        iou = torch.from_numpy(_ious(self._polygons(batch), self._polygons(preds)))  # on the CPU: MPS has no float64
        found["tp_g"] = validator.match_predictions(preds["cls"].cpu(), batch["cls"].cpu(), iou).numpy()
        return found


def _ious(targets: Sequence[NDArray[np.float64]], preds: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """IoU of each target with each prediction, (T, P); 0 for what has fewer than three vertices."""
    ious = np.zeros((len(targets), len(preds)))
    rows, columns = ([k for k, each in enumerate(polygons) if len(each) >= 3] for polygons in (targets, preds))
    ious[np.ix_(rows, columns)] = polygon_iou_matrix([targets[k] for k in rows], [preds[k] for k in columns])
    return ious


class PolygonPoseValidator(_PolygonValidator, PoseValidator):
    """Ultralytics' validation of a pose head, and precision, recall, mAP50 and mAP50-95 by the IoU of the polygons.

    Keypoints are the vertices of a polygon, read in their order by the even-odd rule (`polygon_iou`). A target's
    invisible vertices are left out, and so are predicted ones with a confidence below one half, where the head predicts
    one. What has fewer than three vertices left matches nothing. Ultralytics' own metric of keypoints compares vertex i
    with vertex i and says nothing about polygons whose first vertex is arbitrary. Plots show the polygons.
    """

    TASK = "pose"
    METRICS = PolygonPoseMetrics

    def init_metrics(self, model: nn.Module) -> None:
        """Begin a validation."""
        _are_no_joints(self.data)
        super().init_metrics(model)

    def _polygons(self, objects: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
        keypoints = objects["keypoints"].cpu().double().numpy()
        if keypoints.shape[-1] == 2:
            return list(keypoints)
        # A target's third number is 0, 1 or 2.
        return [polygon[polygon[:, 2] >= VISIBLE, :2] for polygon in keypoints]

    def plot_val_samples(self, batch: dict[str, Any], ni: int) -> None:
        """Draw the targets of a batch into `val_batch{ni}_labels.jpg`."""
        _plot_targets(batch, self.save_dir / f"val_batch{ni}_labels.jpg", self)

    def plot_predictions(
        self, batch: dict[str, Any], preds: list[dict[str, Tensor]], ni: int, max_det: int | None = None
    ) -> None:
        """Draw the predictions for a batch into `val_batch{ni}_pred.jpg`."""
        parts = []
        for image, pred in enumerate(preds[:SHOWN_IMAGES]):
            most = max_det or self.args.max_det
            sure = pred["conf"][:most] > SHOWN_CONFIDENCE
            shown = {name: pred[name][:most][sure] for name in ("cls", "conf", "bboxes", "keypoints")}
            parts.append({**shown, "batch_idx": torch.full_like(shown["conf"], image)})
        if not parts:
            return
        labels = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels["bboxes"] = ops.xyxy2xywh(labels["bboxes"])
        _plot_polygons(labels, batch["img"], batch["im_file"], self.save_dir / f"val_batch{ni}_pred.jpg", self)


class PolygonOBBValidator(_PolygonValidator, OBBValidator):
    """Ultralytics' validation of an OBB head, and precision, recall and mAP by the IoU of the corners.

    Its own metric is ProbIoU, which takes a square for a circle: a detector that has learnt no angle at all passes.
    """

    TASK = "obb"
    METRICS = PolygonOBBMetrics

    def _polygons(self, objects: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
        return list(ops.xywhr2xyxyxyxy(objects["bboxes"].cpu().double()).numpy())


def _plot_targets(batch: Mapping[str, Any], name: Path, owner: Any) -> None:
    """Draw the targets of a batch, whose places are relative to the image's size."""
    height, width = batch["img"].shape[2:]
    keypoints = batch["keypoints"].clone()
    keypoints[..., :2] *= keypoints.new_tensor((width, height))
    _plot_polygons({**batch, "keypoints": keypoints}, batch["img"], batch["im_file"], name, owner)


def _plot_polygons(labels: Mapping[str, Any], images: Tensor, paths: Sequence[str], name: Path, owner: Any) -> None:
    """Let Ultralytics draw boxes and, as masks, the polygons that the keypoints are, in pixels."""
    first = labels["batch_idx"] < SHOWN_IMAGES
    shown = {key: labels[key][first] for key in ("cls", "bboxes", "batch_idx", "keypoints", "conf") if key in labels}
    keypoints = shown.pop("keypoints").float().cpu().numpy()
    height, width = images.shape[2:]
    keypoints[..., :2] /= SHRINK
    masks = np.zeros((len(keypoints), height // SHRINK, width // SHRINK), dtype=np.uint8)
    for mask, polygon in zip(masks, keypoints, strict=True):
        kept = polygon if polygon.shape[1] == 2 else polygon[polygon[:, 2] >= VISIBLE, :2]
        if len(kept) and np.isfinite(kept).all():
            cv2.fillPoly(mask, [kept.clip(-FARTHEST, FARTHEST).round().astype(np.int32)], 1)
    plot_images(
        labels={**shown, "masks": masks},
        images=images[:SHOWN_IMAGES],
        paths=paths,
        fname=name,
        names=owner.data["names"],
        on_plot=owner.on_plot,
    )
