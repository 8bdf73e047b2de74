"""The losses that are compared: the one of the reports and its repairs, L1 and L2 on vertices, and this package's.

A loss takes pred (B, N, 2), target (B, M, 2) with NaN behind the real vertices, their lengths (B,), and how much of the
training is over, in 0..1; it returns (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_mgiou import PAPER, mgiou_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]

SHORTEST = 1e-6  # the reported loss takes a shorter edge for padding
EPSILON = 1e-9


def reported(
    pred: Tensor,
    target: Tensor,
    lengths: Tensor,
    progress: float,  # noqa: ARG001
    *,
    mask: str = "hard",
    nan_to_num: bool = True,
    clamp: bool = True,
    sort: bool = True,
    factor: float = 1.0,
    epsilon: float = EPSILON,
) -> Tensor:
    """The polygon loss of the two reports, written from their description.

    Vertices are sorted by angle, padding is repeated vertices that a threshold on the edge's length has to find, and
    every quotient is guarded. `mask` is "hard" (mean over the edges above the threshold), "conditional" (mean over all
    edges if more than half are above it, else "hard") or "soft" (a sigmoid of the length). The other arguments turn
    off one suspect each; `factor` undoes a division by the batch size, `epsilon` guards the quotients.
    """
    padding = torch.arange(target.shape[1]) >= lengths.unsqueeze(1)
    target = torch.where(padding.unsqueeze(-1), target[:, :1], target)
    if sort:
        pred, target = _by_angle(pred), _by_angle(target)
    tidy = torch.nan_to_num if nan_to_num else lambda values: values
    edges = torch.cat([polygon.roll(-1, 1) - polygon for polygon in (pred, target)], dim=1)
    length = edges.norm(dim=2)
    axes = tidy(torch.stack((edges[..., 1], -edges[..., 0]), dim=2) / (length + epsilon).unsqueeze(2))
    p, g = (tidy(axes @ polygon.transpose(1, 2)) for polygon in (pred, target))
    inter = tidy((torch.minimum(p.amax(2), g.amax(2)) - torch.maximum(p.amin(2), g.amin(2))).clamp(min=0))
    hull = tidy(torch.maximum(p.amax(2), g.amax(2)) - torch.minimum(p.amin(2), g.amin(2))).clamp(min=epsilon)
    union = ((p.amax(2) - p.amin(2)) + (g.amax(2) - g.amin(2)) - inter).clamp(min=epsilon)
    giou = tidy(inter / union) - tidy((hull - union) / hull)
    if clamp:
        giou = giou.clamp(-1, 1)
    valid = (length > SHORTEST).to(giou)
    weight = torch.sigmoid(100 * (length - SHORTEST)) if mask == "soft" else valid
    mean = (giou * weight).sum(1) / weight.sum(1).clamp(min=SHORTEST)
    if mask == "conditional":
        mean = torch.where(valid.mean(1) > 0.5, giou.mean(1), mean)
    return factor * (1 - mean) / 2


def _by_angle(polygons: Tensor) -> Tensor:
    x, y = (polygons - polygons.mean(1, keepdim=True)).unbind(2)
    order = torch.atan2(y, x).argsort(1)
    return polygons.gather(1, order.unsqueeze(2).expand_as(polygons))


def vertices(pred: Tensor, target: Tensor, lengths: Tensor, progress: float, *, power: int) -> Tensor:  # noqa: ARG001
    """Mean |difference|^power to N points evenly spaced on the target's outline, from the best start, either way."""
    points = _resample(target, lengths, pred.shape[1])
    shifts = torch.arange(pred.shape[1])
    order = (shifts.unsqueeze(1) + shifts) % pred.shape[1]
    candidates = torch.cat((points[:, order], points.flip(1)[:, order]), dim=1)  # (B, 2N, N, 2)
    distances: Tensor = (pred.unsqueeze(1) - candidates).abs().pow(power).mean((2, 3))
    return distances.amin(1)


def _resample(target: Tensor, lengths: Tensor, count: int) -> Tensor:
    padding = torch.arange(target.shape[1]) >= lengths.unsqueeze(1)
    start = torch.where(padding.unsqueeze(-1), target[:, :1], target)
    edges = start.roll(-1, 1) - start  # padding is the first vertex, so the last real edge closes the outline
    length = edges.norm(dim=2)
    reached = length.cumsum(1)
    position = reached[:, -1:] * torch.arange(count) / count
    edge = torch.searchsorted(reached, position, right=True).clamp(max=target.shape[1] - 1)
    along = (position - (reached - length).gather(1, edge)) / length.gather(1, edge).clamp(min=EPSILON)
    index = edge.unsqueeze(2).expand(-1, -1, 2)
    points: Tensor = start.gather(1, index) + along.unsqueeze(2) * edges.gather(1, index)
    return points


def package(pred: Tensor, target: Tensor, lengths: Tensor, progress: float, **options: Any) -> Tensor:  # noqa: ARG001
    """The paper's loss with options."""
    given = PAPER | options
    return mgiou_loss(pred, target, target_lengths=lengths, reduction="none", backend="eager", **given)


def from_l1(pred: Tensor, target: Tensor, lengths: Tensor, progress: float, **options: Any) -> Tensor:
    """L1 at the start, MGIoU at the end, in proportion between."""
    l1 = vertices(pred, target, lengths, progress, power=1)
    return (1 - progress) * l1 + progress * package(pred, target, lengths, progress, **options)


HULL: dict[str, Any] = {"axis_weight": "length", "axis_grad": False}

OURS = "length, no axis_grad, boundary 0.25"  # the package's defaults
LOSSES: dict[str, Loss] = {
    "reported": reported,
    "reported, conditional mask": partial(reported, mask="conditional"),
    "reported, soft mask": partial(reported, mask="soft"),
    "reported, no nan_to_num": partial(reported, nan_to_num=False),
    "reported, no clamp": partial(reported, clamp=False),
    "reported, times 8": partial(reported, factor=8.0),
    "reported, not sorted by angle": partial(reported, sort=False),
    "MGIoU as published": package,
    "axis_weight length": partial(package, axis_weight="length"),
    "axis_grad False": partial(package, axis_grad=False),
    "convexity 0.25": partial(package, convexity_weight=0.25),
    "boundary 0.25": partial(package, boundary_weight=0.25),
    "length, no axis_grad": partial(package, **HULL),
    "length, no axis_grad, convexity 0.25": partial(package, **HULL, convexity_weight=0.25),
    "length, no axis_grad, boundary 0.1": partial(package, **HULL, boundary_weight=0.1),
    OURS: partial(package, **HULL, boundary_weight=0.25),
    "length, no axis_grad, boundary 0.5": partial(package, **HULL, boundary_weight=0.5),
    "length, no axis_grad, boundary 1": partial(package, **HULL, boundary_weight=1.0),
    "length, no axis_grad, convexity 0.25, boundary 0.25": partial(
        package, **HULL, convexity_weight=0.25, boundary_weight=0.25
    ),
    "L1 to resampled vertices": partial(vertices, power=1),
    "L2 to resampled vertices": partial(vertices, power=2),
    "L1, then length, no axis_grad": partial(from_l1, **HULL),
}
