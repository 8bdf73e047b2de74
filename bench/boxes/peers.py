"""The loss of boxes and its peers, their input, and whether they agree with their definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.boxes import gaussian
from tests.boxes import oracle
from tests.boxes.helpers import SPACE, random_boxes
from tests.helpers import generator
from triton_mgiou import box_mgiou_loss, mgiou_loss
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.box_formats import FORMATS

Loss = Callable[[Tensor, Tensor], Tensor]

BLOCK = 32  # pairs, repeated to any batch
VALUE_ERROR, GRADIENT_ERROR = 1e-5, 1e-4  # ProbIoU has guards of 1e-7 in its quotients and roots


def probiou(pred: Tensor, target: Tensor) -> Tensor:
    """ProbIoU of the paper's formulas, with the operations and guards that Ultralytics runs; mean over the batch."""
    (px, py, pa, pb, pc), (tx, ty, ta, tb, tc) = (_covariance(boxes) for boxes in (pred, target))
    a, b, c = pa + ta, pb + tb, pc + tc
    determinant = a * b - c.pow(2)
    first = ((a * (py - ty).pow(2) + b * (px - tx).pow(2)) / (determinant + 1e-7)) * 0.25
    second = ((c * (tx - px) * (py - ty)) / (determinant + 1e-7)) * 0.5
    product = (pa * pb - pc.pow(2)).clamp(0) * (ta * tb - tc.pow(2)).clamp(0)
    third = (determinant / (4 * product.sqrt() + 1e-7) + 1e-7).log() * 0.5
    distance = (first + second + third).clamp(1e-7, 100.0)
    return (1.0 - (-distance).exp() + 1e-7).sqrt().mean()


def _covariance(boxes: Tensor) -> tuple[Tensor, ...]:
    x, y = torch.split(boxes[..., :2], 1, dim=-1)
    a, b, angle = torch.split(torch.cat((boxes[:, 2:4].pow(2) / 12, boxes[:, 4:]), dim=-1), 1, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    cos_squared, sin_squared = cos.pow(2), sin.pow(2)
    return x, y, a * cos_squared + b * sin_squared, a * sin_squared + b * cos_squared, (a - b) * cos * sin


def by_corners(pred: Tensor, target: Tensor) -> Tensor:
    """Corners by PyTorch, and the loss of polygons with the options of boxes."""
    return mgiou_loss(_corners(pred), _corners(target), **FORMATS["cxcywhr"].defaults._asdict())


def _corners(boxes: Tensor) -> Tensor:
    """Without a constant from the host, which a CUDA graph could not copy."""
    x, y, w, h, angle = boxes.unbind(-1)
    cos, sin = angle.cos() / 2, angle.sin() / 2
    ux, uy, vx, vy = w * cos, w * sin, -h * sin, h * cos
    corners = ((x - ux - vx, y - uy - vy), (x + ux - vx, y + uy - vy), (x + ux + vx, y + uy + vy))
    return torch.stack([torch.stack(each, dim=-1) for each in (*corners, (x - ux + vx, y - uy + vy))], dim=1)


def peers(device: torch.device) -> dict[str, Loss]:
    """The losses of (B, 5), ours first, then in the order in which a run that is cut off should have them."""
    found: dict[str, Loss] = {}
    if kernels_unavailable(device) is None and device.type == "cuda":
        found["kernel"] = partial(box_mgiou_loss, backend="triton")
    return found | {
        "smooth L1": F.smooth_l1_loss,
        "ProbIoU": probiou,
        "ProbIoU, compiled": torch.compile(probiou, dynamic=False),
        "corners, then polygons": by_corners,
        "reference": partial(box_mgiou_loss, backend="eager"),
    }


def pairs(fmt: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A block of pairs, repeated; `batch` is a multiple of `BLOCK`."""
    if batch % BLOCK:
        raise ValueError(f"batch must be a multiple of {BLOCK}, got {batch}")
    rng = generator(7)
    pred, target = (random_boxes(fmt, BLOCK, rng).float() for _ in range(2))
    repeats = (batch // BLOCK, *[1] * (pred.dim() - 1))
    return pred.to(device).repeat(repeats), target.to(device).repeat(repeats)


def expected(name: str, fmt: str) -> tuple[float, Tensor]:
    """Mean loss and gradient of the block, in float64: by corners and loops, or by another way to write ProbIoU."""
    pred, target = (side.double() for side in pairs(fmt, BLOCK, torch.device("cpu")))
    if name in ("smooth L1", "ProbIoU", "ProbIoU, compiled"):
        leaf = pred.requires_grad_()
        if name == "smooth L1":
            difference = leaf - target
            near = difference.abs() < 1
            value = torch.where(near, 0.5 * difference.square(), difference.abs() - 0.5).mean()
        else:
            value = gaussian.probiou(leaf, target).mean()
        return value.item(), torch.autograd.grad(value, leaf)[0]
    default = FORMATS[fmt].defaults
    options: dict[str, Any] = {}
    if fmt not in SPACE:
        options = {"axis_weight": default.axis_weight, "boundary_weight": default.boundary_weight}
    sides = pred.numpy(), target.numpy()
    gradient = oracle.gradient(*sides, fmt, axis_grad=default.axis_grad, **options)
    return float(oracle.per_sample_loss(*sides, fmt, **options).mean()), torch.from_numpy(gradient) / BLOCK


def disagreement(name: str, loss: Loss, fmt: str, batch: int, device: torch.device) -> str | None:
    """Why a loss must not be timed."""
    value, gradient = expected(name, fmt)
    pred, target = pairs(fmt, batch, device)
    got = loss(pred.requires_grad_(), target)
    (found,) = torch.autograd.grad(got, pred)
    found = (found.double().cpu() * (batch / BLOCK)).view(-1, *gradient.shape)
    off = abs(got.item() - value)
    gradient_off = ((found - gradient).abs().max() / gradient.abs().max()).item()
    if off <= VALUE_ERROR and gradient_off <= GRADIENT_ERROR:
        return None
    return f"disagrees with its definition: value by {off:.1e}, gradient by {gradient_off:.1e}"


def step(loss: Loss, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward. The leaf is of this step alone, so its node in autograd is on the step's stream."""
    leaf = pred.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, target), leaf)
