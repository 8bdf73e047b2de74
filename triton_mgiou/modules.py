"""The losses as modules: `MGIoULoss` and `BoxMGIoULoss` as mmdetection's heads call them, and `PolygonLoss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from triton_mgiou import debugging
from triton_mgiou.arguments import (
    LARGEST_FACTOR,
    check_avg_factor,
    check_bool,
    check_box_format,
    check_box_options,
    check_choice,
    check_factor,
    check_is_number,
    check_keypoints,
    check_names,
    check_number,
    check_one_number,
    check_options,
    check_real_numbers,
    check_weight,
)
from triton_mgiou.bounding_boxes import without_classes
from triton_mgiou.box_formats import FORMATS
from triton_mgiou.functional import box_mgiou_loss, debug_checks, keypoint_l2, mgiou_loss
from triton_mgiou.options import BACKENDS, PAPER, REDUCTIONS, Options
from triton_mgiou.reduction import as_divisor, factor_for
from triton_mgiou.reference.polygons import compute_dtype

_Loss = TypeVar("_Loss", bound="MGIoULoss")
MODES = ("mgiou", "l2", "hybrid")


def _none_if_none_is_positive(weight: Tensor) -> Tensor:
    """The weights, or 0 for all; NaN is no weight to be passed over."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # not all integers can be compared
    return torch.where((weight <= 0).all(), 0, weight)


def _without_numpy(value: Any) -> Any:
    """A number as Python's: the compiler takes one of numpy's for an array, and would make the loss float64."""
    return value.item() if isinstance(value, np.generic) else value


class MGIoULoss(nn.Module):
    """`mgiou_loss` as a module, called as detectors built on mmdetection or mmrotate call their losses.

    Args:
        reduction: "mean", "sum" or "none".
        loss_weight: Factor on the result: a number of size 1e30 at most, or a tensor of one element.
        **options: `axis_weight`, `axis_grad`, `convexity_weight`, `boundary_weight` and `backend` of `mgiou_loss`, with
            its defaults, which are not the paper's: see `paper`.

    Raises:
        TypeError: An option that `mgiou_loss` does not have, or a `loss_weight` that is no real number.
        ValueError: An unknown `reduction`, a `loss_weight` above 1e30 or of several elements, or an option with a
            wrong value.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (*Options._fields, "backend")
    FUNCTION: ClassVar[Callable[..., Tensor]] = staticmethod(mgiou_loss)

    def __init__(self, reduction: str = "mean", loss_weight: float | Tensor = 1.0, **options: Any) -> None:
        super().__init__()
        check_names("options", options, self.OPTIONS)
        check_choice("reduction", reduction, REDUCTIONS)
        if isinstance(loss_weight, Tensor):
            check_one_number("loss_weight", loss_weight)
        else:
            check_factor("loss_weight", loss_weight, least=-LARGEST_FACTOR)
        self.reduction = reduction
        self.loss_weight = _without_numpy(loss_weight)
        self.options = options
        check_choice("backend", options.get("backend", "auto"), BACKENDS)
        check_options(self._all_options())
        self.options = {name: _without_numpy(each) for name, each in options.items()}

    def _all_options(self) -> Options:
        """The options of a call, defaults included."""
        return Options(**{name: value for name, value in self.options.items() if name in Options._fields})

    @classmethod
    def paper(cls: type[_Loss], **arguments: Any) -> _Loss:
        """Make the module with the paper's loss.

        Args:
            **arguments: Those of `MGIoULoss`; an option given here takes the place of the paper's.
        """
        return cls(**{**PAPER, **arguments})

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the weighted loss.

        Args:
            pred: Predicted vertices, shape (B, N, 2), or a `BoxMGIoULoss`'s boxes in its format; floating.
            target: Target vertices, shape (B, M, 2), or boxes, likewise.
            weight: Shape (B,), or (B, k) to be averaged over k. If no entry is positive, a reduced loss is 0 and
                connected to the graph.
            avg_factor: Divides the sum instead of B when the reduction is "mean", as in `mgiou_loss`: with a sum of 0,
                it may be 0, and the loss is 0.
            reduction_override: Replaces the module's `reduction` for this call.
            **kwargs: Further arguments for this call: an option to override; lengths and masks of vertices.

        Returns:
            A scalar, or shape (B,) for "none".

        Raises:
            TypeError: As `mgiou_loss` or `box_mgiou_loss`.
            ValueError: Likewise.
            RuntimeError: Likewise.
        """
        reduction = self.reduction if reduction_override is None else reduction_override
        if weight is not None and reduction != "none":
            check_real_numbers("weight", weight)
            weight = _none_if_none_is_positive(weight)
        loss = self.FUNCTION(
            pred,
            target,
            weight=weight,
            avg_factor=avg_factor,
            reduction=reduction,
            **{**self.options, **kwargs},
        )
        return factor_for(loss, self.loss_weight) * loss

    def extra_repr(self) -> str:
        """Show the options that were given."""
        shown = {"reduction": self.reduction, "loss_weight": self.loss_weight, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class BoxMGIoULoss(MGIoULoss):
    """`box_mgiou_loss` as a module, called as `MGIoULoss` is: for detectors built on mmdetection, mmrotate or mmdet3d.

    Args:
        reduction: "mean", "sum" or "none".
        loss_weight: Factor on the result: a number of size 1e30 at most, or a tensor of one element.
        fmt: What the numbers of a box are, see `box_mgiou_loss`, whose docstring has a table of libraries.
        **options: `angle`, `clockwise`, `axis_weight`, `axis_grad`, `convexity_weight`, `boundary_weight` and `backend`
            of `box_mgiou_loss`, with its defaults, which are not the paper's: see `paper`.

    Raises:
        TypeError: An option that `box_mgiou_loss` does not have, or a `loss_weight` that is no real number.
        ValueError: An unknown `reduction`, `fmt` or `angle`, a `loss_weight` above 1e30 or of several elements, an
            option with a wrong value, or one that the format does not have.
    """

    OPTIONS = ("fmt", "angle", "clockwise", *MGIoULoss.OPTIONS)
    FUNCTION = staticmethod(box_mgiou_loss)

    def __init__(
        self, reduction: str = "mean", loss_weight: float | Tensor = 1.0, fmt: str = "cxcywhr", **options: Any
    ) -> None:
        check_box_format(fmt, options.get("angle", "radians"), options.get("clockwise", True))
        super().__init__(reduction, loss_weight, fmt=fmt, **options)
        check_box_options(fmt, self._all_options())

    def _all_options(self) -> Options:
        given = {name: self.options.get(name) for name in Options._fields}
        return FORMATS[self.options["fmt"]].defaults._replace(**{k: v for k, v in given.items() if v is not None})


class PolygonLoss(nn.Module):
    """Loss of polygons that a head predicts as keypoints, vertex i for vertex i: `mgiou_loss`, an L2 term or both.

    The L2 term is that of pose heads, one minus an object keypoint similarity. A sample's is the mean over its
    visible vertices, d being a vertex's distance to its target:

        1 - exp(-d^2 / (8 sigma^2 area)), the OKS of COCO; in mode "l2" it is Ultralytics' own loss of keypoints

    Mode "hybrid" is alpha L2 + (1 - alpha) `mgiou_loss`. L2 tells every vertex where to go, whatever the others do, but
    knows no shape; `mgiou_loss` sees the shape, but not which vertex is which. So alpha should start high and fall: see
    `triton_mgiou.training.AlphaSchedule`.

    A vertex that is not visible is left out of both polygons, as padding should be. Ultralytics marks a vertex out of
    the image in the same way; then only the visible part is compared: three vertices as a triangle, two as a segment,
    one as a point, whose loss is 0. Where many objects are cut off, "hybrid" keeps a gradient at each visible vertex.

    Args:
        mode: "mgiou", "l2" or "hybrid".
        alpha: The weight of L2 in "hybrid", without effect in the other modes: a number in 0..1, or a module that
            returns one when it is called, such as an `AlphaSchedule`. A module becomes part of this one, its state
            of this one's `state_dict`, and the caller steps it.
        sigmas: Tolerance of each vertex in the L2 term, N numbers above 0, or one for all, which are rounded to float32
            also where the loss is float64; None for 1 / N, which is what Ultralytics takes for N vertices.
        reduction: "mean", "sum" or "none".
        return_parts: Whether a call returns the loss and its parts, or the loss alone, as the keypoint loss of a pose
            head does.
        **options: The options of `MGIoULoss`, with its defaults; `**PAPER` for the paper's. `backend` is that of L2
            too, but under `torch.compile`, which fuses L2 by itself.

    Raises:
        TypeError: `alpha` is neither, `sigmas` are no numbers, `return_parts` is no bool, or an option that `MGIoULoss`
            does not have.
        ValueError: An unknown `mode` or `reduction`, an `alpha` outside 0..1, `sigmas` that are not above 0, or an
            option with a wrong value.
    """

    sigmas: Tensor | None

    def __init__(
        self,
        mode: str = "mgiou",
        *,
        alpha: float | nn.Module | None = None,
        sigmas: float | Sequence[float] | Tensor | None = None,
        reduction: str = "mean",
        return_parts: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        if isinstance(sigmas, Tensor):
            check_real_numbers("sigmas", sigmas)
        if isinstance(sigmas, np.ndarray) and sigmas.dtype.kind in "fiu":
            sigmas = sigmas.astype(np.float64, order="C")  # PyTorch takes no other orders, of numbers or of bytes
        if sigmas is not None:
            device = sigmas.device if isinstance(sigmas, Tensor) else torch.get_default_device()
            wrong = TypeError(f"sigmas must be numbers above 0, got {sigmas!r}")
            if _are_no_numbers(sigmas):
                raise wrong
            try:
                sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").detach().flatten().clone()
            except (OverflowError, RuntimeError, TypeError, ValueError):
                raise wrong from None
            if not (sigmas.numel() and bool(((sigmas > 0) & sigmas.isfinite()).all())):
                raise ValueError(f"sigmas must be finite numbers above 0, got {sigmas.tolist()}")
            sigmas = _with_values(sigmas, device)
        if isinstance(alpha, Real) and not isinstance(alpha, bool):
            _check_alpha(alpha)
        elif not isinstance(alpha, nn.Module) and (mode == "hybrid" or alpha is not None):
            raise TypeError(f"alpha must be a number or a module such as AlphaSchedule, got {type(alpha).__name__}")
        check_bool("return_parts", return_parts)
        check_names("options", options, MGIoULoss.OPTIONS)  # `loss_weight` too, which would weigh one part only
        self.mode = mode
        self.alpha = _without_numpy(alpha)
        self.register_buffer("sigmas", sigmas, persistent=False)
        self.reduction = reduction
        self.return_parts = return_parts
        self.mgiou = MGIoULoss(reduction, 1.0, **options)

    def forward(
        self,
        pred_kpts: Tensor,
        gt_kpts: Tensor,
        kpt_mask: Tensor,
        area: Tensor,
        avg_factor: float | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the positives of a batch, and its parts.

        Args:
            pred_kpts: Predicted vertices, shape (B, N, 2) or (B, N, 3), floating, in order along the outline. A third
                number, such as a confidence, has no part in the loss.
            gt_kpts: Target vertices, the same with a visibility in the third place; vertex i is the target of vertex i.
            kpt_mask: The visible vertices, shape (B, N), bool or numbers: 0 or False for one that is not there. Such a
                vertex belongs to neither polygon, predicted or target, may hold anything, NaN included, and gets no
                gradient. A sample without a visible vertex has loss 0.
            area: Area of each target's box in the unit of the vertices, squared, shape (B, 1) or (B,); a constant. What
                is below 1e-6 counts as 1e-6. Not used in mode "mgiou".
            avg_factor: Divides the sum of the samples' losses instead of B, as in `mgiou_loss`; see `mean_positives`
                for several processes.
            weight: Of each sample, shape (B,), or (B, k) to be averaged over k. If no entry is positive, a reduced loss
                is 0 and connected to the graph.

        Returns:
            The loss, a scalar, or shape (B,) for "none", and its parts before alpha, "l2" and "mgiou", those that the
            mode has, unless `return_parts` is False. The parts are detached. All are float64 if a vertex is, else
            float32. For B = 0 a reduced loss is 0 and connected to the graph.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: An argument has the wrong shape, device or value, or a module gives an `alpha` outside 0..1. The
                value of one in a tensor is never read.
            RuntimeError: As `mgiou_loss`.
        """
        if torch.compiler.is_dynamo_compiling():
            pred_kpts, gt_kpts, kpt_mask, area, weight = without_classes(pred_kpts, gt_kpts, kpt_mask, area, weight)
        check_keypoints(pred_kpts, gt_kpts, kpt_mask, area)
        pred, target, visible = pred_kpts[..., :2], gt_kpts[..., :2], kpt_mask != 0
        checks = self.mode != "mgiou" and debugging.on and debug_checks("PolygonLoss", pred, target)
        if checks:
            pred = checks.input("pred_kpts", pred, mask=visible)
            target = checks.input("gt_kpts", target, mask=visible)
            checks.input("area", area, mask=visible.any(1))
            checks.factors(weight=weight, avg_factor=avg_factor)
        dtype = compute_dtype(pred.dtype, target.dtype)
        sides = {"pred_kpts": pred, "gt_kpts": target}
        pred, target = pred.to(dtype), target.to(dtype)
        if weight is not None:
            check_weight(weight, pred)
            if self.reduction != "none":
                weight = _none_if_none_is_positive(weight)
        parts = {}
        if self.mode != "mgiou":
            if avg_factor is not None:
                avg_factor = as_divisor(avg_factor)
                check_avg_factor(avg_factor, self.reduction, pred)
            keypoints = pred, target, visible, area, self._sigmas(pred)
            backend = self.mgiou.options.get("backend", "auto")
            parts["l2"] = keypoint_l2(*keypoints, weight, avg_factor, self.reduction, backend)
        if self.mode != "l2":
            parts["mgiou"] = self.mgiou(pred, target, weight, avg_factor, pred_mask=visible, target_mask=visible)
        if self.mode == "hybrid":
            alpha: Any = self.alpha() if isinstance(self.alpha, nn.Module) else self.alpha
            if isinstance(alpha, Tensor):
                check_one_number("alpha", alpha)
            elif not (
                torch.compiler.is_compiling() and isinstance(alpha, np.ndarray)
            ):  # there numpy's numbers are arrays
                _check_alpha(alpha)
            alpha = factor_for(parts["l2"], alpha)
            total = alpha * parts["l2"] + (1 - alpha) * parts["mgiou"]
        else:
            total = parts[self.mode]
        if checks:
            checks.output("loss", total, **sides)
        return (total, {name: part.detach() for name, part in parts.items()}) if self.return_parts else total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolygonLoss:
        """Move `sigmas` with the module, with their values: they are not rounded to its type, and no state has them."""
        given = self.sigmas
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if given is not None and self.sigmas is not None:
            self.sigmas = _with_values(given, self.sigmas.device)
        return self

    def _sigmas(self, pred: Tensor) -> Tensor | float:
        """The tolerances: of each vertex, or one."""
        size = pred.shape[1]
        if self.sigmas is None:
            return 1 / size
        if self.sigmas.numel() not in (1, size):
            raise ValueError(f"sigmas must be one or {size} numbers, got {self.sigmas.numel()}")
        return self.sigmas.to(pred.device)

    def extra_repr(self) -> str:
        """Show the mode, and what else was given."""
        shown: dict[str, Any] = {"mode": self.mode}
        if isinstance(self.alpha, Real):
            shown["alpha"] = self.alpha
        if self.sigmas is not None:
            shown["sigmas"] = self.sigmas.tolist()
        if self.reduction != "mean":
            shown["reduction"] = self.reduction
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _check_alpha(alpha: Any) -> None:
    """Refuse what is no share of the L2 term."""
    check_is_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    check_number("alpha", alpha)


def _are_no_numbers(values: Any) -> bool:
    """Whether these are bools or complex numbers, which PyTorch casts to float32; the cast tells of all else."""
    try:
        dtype = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).dtype
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return False
    return dtype == torch.bool or dtype.is_complex


def _with_values(sigmas: Tensor, device: torch.device) -> Tensor:
    """On the device, if that is not meta, from which nothing would bring the values back."""
    return sigmas.to("cpu" if device.type == "meta" else device)
