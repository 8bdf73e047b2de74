"""All checks of arguments. An error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Rational, Real
from typing import Any, cast

import torch
from torch import Tensor

from triton_mgiou.box_formats import AMBIGUOUS, FORMATS
from triton_mgiou.options import AXIS_WEIGHTS, BACKENDS, OVERS, REDUCTIONS, Options

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LARGEST_FACTOR = 1e30
PLAIN = (Tensor, torch.nn.Parameter)  # anything else, such as a fake tensor, needs PyTorch's dispatcher
_STRIDED = torch.strided


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, or one whose elements cannot be computed with one by one.

    Subclasses that only add something to a tensor are taken, such as torchvision's `tv_tensors`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) in PLAIN and value.layout is torch.strided and not (value.is_nested or value.is_quantized):
        return  # the usual case, which should take no time
    if hasattr(value, "to_local") and hasattr(value, "device_mesh"):
        raise TypeError(f"{name} must be a plain torch.Tensor, got a DTensor: pass {name}.to_local() or .full_tensor()")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a plain torch.Tensor, got a nested one: pass torch.nested.to_padded_tensor and lengths"
        )
    if value.is_quantized:
        raise TypeError(f"{name} must be a plain torch.Tensor, got a quantized one: pass {name}.dequantize()")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a plain torch.Tensor, got layout {value.layout}: pass {name}.to_dense()")
    if hasattr(value, "get_mask") and hasattr(value, "get_data"):
        raise TypeError(f"{name} must be a plain torch.Tensor, got a MaskedTensor: pass {name}.get_data() and a mask")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def check_floating(name: str, value: Tensor) -> None:
    """Refuse a tensor whose type the loss does not compute with."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating (float16, bfloat16, float32 or float64), got {value.dtype}")


def check_real_numbers(name: str, value: Tensor) -> None:
    """Refuse what is no tensor of real numbers; float8 too, with which PyTorch hardly computes."""
    check_tensor(name, value)
    if value.dtype.is_complex or (value.dtype.is_floating_point and value.dtype not in FLOATING):
        raise TypeError(f"{name} must hold real numbers of 16 bits or more, or integers, got {value.dtype}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices."""
    if not isinstance(value, str) or value not in choices:  # an array is equal to each, or to none
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def plain_name(choice: str) -> str:
    """The text of a choice that may be a member of an enumeration, of which `str` and formatting give another text."""
    return str.__str__(choice)


def check_bool(name: str, value: object) -> None:
    """Refuse what is no bool of Python's; numpy's is none."""
    if not isinstance(value, bool):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a bool, got {kind}")


def check_names(name: str, options: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are none of the known ones."""
    if unknown := sorted(map(str, set(options).difference(known))):
        raise TypeError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")


def check_integer(name: str, value: object) -> None:
    """Refuse what is no integer; numpy's are, as a table of results has them, and a bool is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_is_number(name: str, value: object) -> None:
    """Refuse what is no number; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no finite number that PyTorch can compute with: no fraction, and no integer beyond 64 bits."""
    if type(value) is not float:
        check_is_number(name, value)
        if isinstance(value, Rational) and not isinstance(value, Integral):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        raise ValueError(
            f"{name} must be an integer of 64 bits or a float, got an integer of {int(value).bit_length() + 1} bits"
        )
    size = abs(float(value))
    if not size < math.inf:  # `math.isfinite` of a number that changes has no graph in PyTorch 2.11
        raise ValueError(f"{name} must be finite, got {value}")


def check_factor(name: str, value: Any, least: float = 0.0) -> None:
    """Refuse what is no factor on a loss, or one over which float32 overflows, and NaN comes of Inf times 0."""
    check_number(name, value)
    if value < least:
        raise ValueError(f"{name} must be {least:g} or above, got {value}")
    if value > LARGEST_FACTOR:
        raise ValueError(f"{name} must be at most {LARGEST_FACTOR:g}, got {value}")


def check_options(options: Options) -> None:
    """Refuse options that no loss has."""
    check_choice("axis_weight", options.axis_weight, AXIS_WEIGHTS)
    if type(options.axis_grad) is not bool:  # the usual case, which should take no time
        check_bool("axis_grad", options.axis_grad)
    _check_term_weight("convexity_weight", options.convexity_weight)
    _check_term_weight("boundary_weight", options.boundary_weight)


def _check_term_weight(name: str, value: Any) -> None:
    if type(value) is float and 0.0 <= value <= LARGEST_FACTOR:  # the usual case, which should take no time
        return
    check_factor(name, value)


def check_polygons(pred: Tensor, target: Tensor) -> None:
    """Refuse what are no two batches of polygons of the same size, on the same device."""
    batch = _check_vertices("pred", pred, "N")
    target_batch = _check_vertices("target", target, "M")
    check_not_traced("mgiou_loss", batch)
    _check_same_batch(pred, target, batch, target_batch)


def _check_same_batch(pred: Tensor, target: Tensor, batch: int, target_batch: int) -> None:
    if target_batch != batch:
        raise ValueError(f"target must have pred's batch size {batch}, got {target_batch}")
    check_device("target", target, "pred", pred)


def check_not_traced(function: str, size: int) -> None:
    """Refuse `torch.jit.trace`, under which sizes are tensors."""
    if isinstance(size, Tensor):
        raise RuntimeError(f"torch.jit.trace cannot record {function}; expected torch.compile or torch.export")


def _is_usual(value: Tensor) -> bool:
    """Whether there is nothing to refuse but a wrong shape; most are, and this takes least time."""
    return type(value) in PLAIN and value.dtype in FLOATING and value.layout is _STRIDED and not value.is_nested


def _check_vertices(name: str, value: Tensor, size: str) -> int:
    """The batch size."""
    is_usual = _is_usual(value)
    if not is_usual:
        check_tensor(name, value)
    shape = value.shape
    if len(shape) != 3 or shape[2] != 2 or shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, {size}, 2) with {size} >= 1, got {tuple(shape)}")
    if not is_usual:
        check_floating(name, value)
    return shape[0]


def check_box_format(fmt: object, angle: object, clockwise: object) -> None:
    """Refuse a format that there isn't, and a convention of angles that the format doesn't have."""
    if isinstance(fmt, str) and fmt in AMBIGUOUS:
        raise ValueError(f"fmt must say which of two it is, got {fmt!r}: {AMBIGUOUS[fmt]}")
    check_choice("fmt", fmt, tuple(FORMATS))
    check_choice("angle", angle, ("radians", "degrees"))
    if type(clockwise) is not bool:
        check_bool("clockwise", clockwise)
    kind = FORMATS[cast("str", fmt)]  # not `str(fmt)`, which of an enumeration is another text
    if not kind.has_angle and (angle != "radians" or not clockwise):
        raise ValueError(
            f'angle and clockwise must be left at "radians" and True: fmt={fmt!r} has no angle; '
            f"got {angle!r} and {clockwise}"
        )
    if kind.in_space and not clockwise:
        raise ValueError(f"clockwise must be True for fmt={fmt!r}: yaw turns x towards y; got False")


def check_box_options(fmt: str, options: Options) -> None:
    """Refuse options that no loss has, and those that this format doesn't have."""
    check_options(options)
    kind = FORMATS[fmt]
    if options.axis_weight not in kind.axis_weights:
        raise ValueError(
            f"axis_weight must be {' or '.join(map(repr, kind.axis_weights))} for fmt={fmt!r}, "
            f"got {options.axis_weight!r}"
        )
    for name in ("convexity_weight", "boundary_weight"):
        if getattr(options, name) > 0 and name not in kind.terms:
            raise ValueError(f"{name} must be 0: fmt={fmt!r} has no such term; got {getattr(options, name)}")


def check_boxes(pred: Tensor, target: Tensor, fmt: str) -> None:
    """Refuse what are no two batches of boxes of this format and of the same size, on the same device."""
    batch = check_box_numbers("pred", pred, fmt)
    target_batch = check_box_numbers("target", target, fmt)
    check_not_traced("box_mgiou_loss", batch)
    _check_same_batch(pred, target, batch, target_batch)


def check_box_numbers(name: str, value: Tensor, fmt: str) -> int:
    """Refuse what is no batch of boxes of this format; its size."""
    is_usual = _is_usual(value)
    if not is_usual:
        check_tensor(name, value)
    shape = value.shape
    if shape[1:] != FORMATS[fmt].shape:
        raise ValueError(_wrong_box_shape(name, tuple(shape), fmt))
    if not is_usual:
        check_floating(name, value)
    return shape[0]


def _wrong_box_shape(name: str, shape: tuple[int, ...], fmt: str) -> str:
    kind = FORMATS[fmt]
    expected = ", ".join(("B", *map(str, kind.shape)))
    return f"{name} must have shape ({expected}) for fmt={fmt!r} ({kind.numbers}), got {shape}{_hint(fmt, shape[1:])}"


def _hint(fmt: str, *got: tuple[int, ...]) -> str:
    """What else boxes of one of these shapes may be, if not of this format."""
    if FORMATS[fmt].shape[::-1] in got:
        return ": transpose the last two"
    others = [repr(other) for other, each in FORMATS.items() if each.shape in got]
    return f", which {' and '.join(others)} {'has' if len(others) == 1 else 'have'}" if others else ""


def check_pairs(
    function: str,
    name: str,
    first: Tensor,
    second: Tensor,
    shape: tuple[int | None, ...],
    expected: str,
    fmt: str | None = None,
) -> None:
    """Refuse what are no two sets of shapes, (P, *shape) or (B, P, *shape); None in `shape` is any size but 0.

    `fmt` is the format, if they are boxes.
    """
    for side, value in ((f"{name}1", first), (f"{name}2", second)):
        check_tensor(side, value)
        fits = value.dim() - len(shape) in (1, 2) and all(
            got == want or (want is None and got > 0)
            for got, want in zip(value.shape[-len(shape) :], shape, strict=True)
        )
        if not fits:
            got = tuple(value.shape)
            hint = "" if fmt is None else _hint(fmt, got[1:], got[2:])
            raise ValueError(f"{side} must have shape {expected}, got {got}{hint}")
        check_floating(side, value)
    check_not_traced(function, first.shape[0])
    if first.dim() != second.dim():
        raise ValueError(
            f"{name}2 must have a batch if and only if {name}1 has one, got shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.dim() == 2 + len(shape) and first.shape[0] != second.shape[0]:
        raise ValueError(f"{name}2 must have {name}1's batch size {first.shape[0]}, got {second.shape[0]}")
    check_device(f"{name}2", second, f"{name}1", first)


def check_matrix_options(over: object, axis_weight: object, axis_weights: tuple[str, ...], backend: object) -> None:
    """Refuse options that no matrix has."""
    check_choice("over", over, OVERS)
    check_choice("axis_weight", axis_weight, axis_weights)
    check_choice("backend", backend, BACKENDS)


def check_mask(name: str, mask: Tensor | None, side: str, shapes: Tensor, dimensions: int) -> None:
    """Refuse what does not say which of `shapes` are there, but for their last dimensions."""
    if mask is None:
        return
    check_tensor(name, mask)
    check_device(name, mask, side, shapes)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {mask.dtype}")
    _check_shape(name, mask, shapes.shape[:-dimensions])


def check_set_mask(name: str, mask: Tensor | None, side: str, shapes: Tensor, dimensions: int) -> Tensor | None:
    """The mask of a set of `shapes`; one without a batch is that of each set of a batch."""
    shape = shapes.shape[:-dimensions]
    if mask is not None and len(shape) == 2:
        check_tensor(name, mask)
        if mask.shape != (shape[1:] if mask.dim() == 1 else shape):
            raise ValueError(f"{name} must have shape {tuple(shape)} or {tuple(shape[1:])}, got {tuple(mask.shape)}")
        if mask.dim() == 1:
            mask = mask.expand(shape)
    check_mask(name, mask, side, shapes, dimensions)
    return mask


def check_lengths(name: str, lengths: Tensor | None, side: str, polygons: Tensor) -> None:
    """Refuse what does not say how many vertices of each polygon are real."""
    if lengths is None:
        return
    check_tensor(name, lengths)
    check_device(name, lengths, side, polygons)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers (int8 to int64, or uint8), got {lengths.dtype}")
    _check_shape(name, lengths, polygons.shape[:-2])


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_real(side: str, vertices: Tensor, lengths: Tensor | None, mask: Tensor | None) -> None:
    """Refuse lengths and a mask that do not say which vertices of this side are real."""
    if lengths is not None and mask is not None:
        raise ValueError(f"{side}_lengths and {side}_mask say the same: expected at most one, got both")
    check_lengths(f"{side}_lengths", lengths, "pred", vertices)
    check_mask(f"{side}_mask", mask, "pred", vertices, dimensions=1)


def check_reduction(
    pred: Tensor, weight: Tensor | None, avg_factor: float | Tensor | None, reduction: str, backend: str
) -> None:
    """Refuse what says wrongly how to reduce the samples' losses, and where to compute them."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    if weight is not None:
        check_weight(weight, pred)
    if avg_factor is not None:
        check_avg_factor(avg_factor, reduction, pred)


def check_weight(weight: Tensor, pred: Tensor) -> None:
    """Refuse what is no weight of the samples."""
    check_real_numbers("weight", weight)
    check_device("weight", weight, "pred", pred)
    batch = pred.shape[0]
    if weight.dim() not in (1, 2) or weight.shape[0] != batch or (weight.dim() == 2 and weight.shape[1] == 0):
        raise ValueError(f"weight must have shape ({batch},) or ({batch}, k), got {tuple(weight.shape)}")


def check_one_number(name: str, value: Tensor) -> None:
    """Refuse what is no tensor of one real number."""
    check_real_numbers(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")


def check_avg_factor(avg_factor: float | Tensor, reduction: str, pred: Tensor) -> None:
    """Refuse what can't divide the sum of the samples' losses."""
    if reduction == "sum":
        raise ValueError('avg_factor goes with reduction="mean" or "none", got reduction="sum"')
    if isinstance(avg_factor, Tensor):
        check_one_number("avg_factor", avg_factor)
        if avg_factor.dim() > 0 or avg_factor.device.type != "cpu":
            check_device("avg_factor", avg_factor, "pred", pred)
    else:
        check_number("avg_factor", avg_factor)
        if avg_factor < 0 and pred.shape[0] > 0:
            raise ValueError(f"avg_factor must be 0 or above, got {avg_factor}")


def check_keypoints(pred: Tensor, target: Tensor, mask: Tensor, area: Tensor) -> None:
    """Refuse what are no keypoints of a batch with their visibility and their boxes' areas."""
    for name, value in (("pred_kpts", pred), ("gt_kpts", target), ("kpt_mask", mask), ("area", area)):
        check_real_numbers(name, value)
        check_device(name, value, "pred_kpts", pred)
    for name, value in (("pred_kpts", pred), ("gt_kpts", target)):
        if value.dim() != 3 or value.shape[1] == 0 or value.shape[2] not in (2, 3):
            raise ValueError(f"{name} must have shape (B, N, 2) or (B, N, 3) with N >= 1, got {tuple(value.shape)}")
        check_floating(name, value)
    batch, size, _ = pred.shape
    if target.shape[:2] != pred.shape[:2]:
        raise ValueError(f"gt_kpts must have pred_kpts' {batch} samples of {size} vertices, got {tuple(target.shape)}")
    if mask.shape != pred.shape[:2]:
        raise ValueError(f"kpt_mask must have shape ({batch}, {size}), got {tuple(mask.shape)}")
    if area.shape not in ((batch,), (batch, 1)):
        raise ValueError(f"area must have shape ({batch}, 1) or ({batch},), got {tuple(area.shape)}")
