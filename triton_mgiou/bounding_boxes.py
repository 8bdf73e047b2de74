"""Read `tv_tensors` of torchvision: `BoundingBoxes` know their own format. Does not import torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_mgiou.arguments import INTEGERS, PLAIN, check_floating

_ROTATED = {"XYWHR": 5, "CXCYWHR": 5, "XYXYXYXY": 8}  # and how many numbers a box has; the upright ones have 4


def is_bounding_boxes(value: object) -> bool:
    """Whether this is a `tv_tensors.BoundingBoxes`."""
    return isinstance(value, Tensor) and type(value).__name__ == "BoundingBoxes" and hasattr(value, "format")


def plain_boxes(name: str, boxes: Any, fmt: str, angle: str, clockwise: bool) -> Tensor:
    """The boxes as a plain tensor of this format.

    Torchvision's angles are degrees, counter-clockwise on a screen. Its "XYWHR" has the corner that is the upper left
    one at no turn. Corners are taken for those of a rectangle where its sides are asked for, as torchvision does.

    Raises:
        TypeError: They are integers.
        ValueError: The format has no place for them: for their angle, or for boxes in the plane. Or they have not as
            many numbers as their own format, which torchvision does not check.
    """
    kind = boxes.format.name
    numbers = _plain(boxes)
    check_floating(name, numbers)
    size = _ROTATED.get(kind, 4)
    if numbers.shape[-1:] != (size,):
        raise ValueError(f"{name} must have {size} numbers a box, as its format {kind} has, got {tuple(numbers.shape)}")
    if kind.lower() == fmt and fmt in ("xyxy", "cxcywh", "xyxyxyxy"):
        return numbers
    expected = ("cxcywhr", "xyxyxyxy") if kind in _ROTATED else ("cxcywhr", "cxcywh", "xyxy", "xyxyxyxy")
    if fmt not in expected:
        raise ValueError(
            f"{name} is a BoundingBoxes of format {kind}: expected fmt {' or '.join(map(repr, expected))}, got {fmt!r}"
        )
    if numbers.dtype in (torch.float16, torch.bfloat16):  # in which sums of pixels round, or are Inf
        numbers = numbers.float()
    x, y, w, h, degrees = _centre(kind, numbers)
    if fmt == "cxcywh":
        return torch.stack((x, y, w, h), dim=-1)
    if fmt == "xyxy":
        return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=-1)
    if fmt == "xyxyxyxy":
        return _corners(x, y, w, h, degrees)
    turn = -degrees if clockwise else degrees
    return torch.stack((x, y, w, h, turn if angle == "degrees" else torch.deg2rad(turn)), dim=-1)


def without_classes(*values: Any) -> list[Any]:
    """Tensors without what `tv_tensors.KeyPoints` and others add to them, for compiled code; the rest as it is.

    The compiler knows neither attributes of such a class nor an operator of ours that gets it.
    """
    return [_plain(each) if isinstance(each, Tensor) and type(each) not in PLAIN else each for each in values]


def _plain(tensor: Tensor) -> Tensor:
    """The same tensor without its class: an operation that forgets the class, as compiled code cannot cast it.

    Compiled code gets two more, which change no bit and keep nothing for a gradient. Of a view or a copy alone the
    compiler makes nothing: an operator of ours would get the tensor itself, and PyTorch 2.13 refuses its first call.
    """
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor[...]
    if not torch.compiler.is_dynamo_compiling():
        return plain
    return ~~plain if plain.dtype in (torch.bool, *INTEGERS) else plain.neg().neg()


def _centre(kind: str, numbers: Tensor) -> tuple[Tensor, ...]:
    """Centre, width, height and degrees, counter-clockwise on a screen."""
    first, second, third, fourth, *rest = numbers.unbind(-1)
    none = torch.zeros_like(first)
    if kind == "XYXY":
        return first / 2 + third / 2, second / 2 + fourth / 2, third - first, fourth - second, none
    if kind == "XYWH":
        return first + third / 2, second + fourth / 2, third, fourth, none
    if kind == "CXCYWH":
        return first, second, third, fourth, none
    if kind == "CXCYWHR":
        return first, second, third, fourth, rest[0]
    if kind == "XYWHR":
        along, across = _half_sides(third, fourth, rest[0])
        return first + along[0] + across[0], second + along[1] + across[1], third, fourth, rest[0]
    x, y = (numbers[..., 0::2] / 4).sum(-1), (numbers[..., 1::2] / 4).sum(-1)
    w, turn = _polar(third - first, second - fourth)
    h, _ = _polar(rest[0] - third, rest[1] - fourth)
    return x, y, w, h, torch.rad2deg(turn)


def _polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Length and direction of a vector. Those of 0 are 0 and have the gradient 0, which PyTorch's is NaN."""
    is_none = (x == 0) & (y == 0)
    x, y = torch.where(is_none, 1.0, x), torch.where(is_none, 0.0, y)
    return torch.where(is_none, 0.0, torch.hypot(x, y)), torch.atan2(y, x)


def _half_sides(w: Tensor, h: Tensor, degrees: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Half of the width and half of the height as vectors: to the right and down at no turn."""
    turn = torch.deg2rad(degrees)
    cos, sin = turn.cos() / 2, turn.sin() / 2
    return (w * cos, -w * sin), (h * sin, h * cos)


def _corners(x: Tensor, y: Tensor, w: Tensor, h: Tensor, degrees: Tensor) -> Tensor:
    """From the upper left one at no turn, clockwise on a screen."""
    along, across = _half_sides(w, h, degrees)
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    corners = [(x + i * along[0] + j * across[0], y + i * along[1] + j * across[1]) for i, j in signs]
    return torch.stack([number for corner in corners for number in corner], dim=-1)
