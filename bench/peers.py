"""This package's loss and its peers, their input, and what each must agree with before its time counts.

The input of every size repeats a block of 32 pairs of convex polygons. So a loop in plain Python, which computes each
definition in float64 on the block, checks the value and the gradient of the whole batch, whatever its size.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from tests import oracle
from tests.helpers import convex, generator
from triton_mgiou import PAPER, mgiou_loss
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.options import TIE

Points = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]

BLOCK = 32
STEP = 1e-8  # of the differences of the checks, whose polygons have a size of about 1
MAX_PROJECTIONS = 2**28  # B N^2, of losses that keep all projections in memory: some 15 GB in PyTorch

# Allowed errors: of the mean loss, and of the samples' derivatives in a random direction over their root mean square.
# Now and then rounding decides a near tie between two vertices: SURE of the samples must be this close.
TOLERANCE = {torch.float32: (1e-6, 1e-4), torch.bfloat16: (5e-3, 3e-2)}
SURE = 0.95
NEAR_TIE = 4 * TIE[32]  # of the largest coordinate, at least twice what the definition ties


@dataclass(frozen=True)
class Peer:
    """A loss to measure, and the definition that it is held against."""

    name: str
    quantity: str
    loss: Loss  # mean over the batch
    exact: Callable[..., float]  # the same for one sample, in float64
    prepare: Callable[[Tensor], Tensor] = lambda polygons: polygons  # its kind of input; not timed
    refuses: Callable[[int, int], str | None] = lambda _batch, _vertices: None  # why not at this B and N
    graph: bool = True  # whether a CUDA graph can hold it; a capture that fails could end the run
    compiled: bool = False
    holds: bool = False  # whether `exact` takes as a third argument the prediction whose axes have no gradient


def polygons(batch: int, vertices: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of convex polygons in order, each (batch, vertices, 2); `batch` is a multiple of `BLOCK`."""
    if batch % BLOCK:
        raise ValueError(f"batch must be a multiple of {BLOCK}, got {batch}")
    pred, target = (each.to(device).repeat(batch // BLOCK, 1, 1) for each in _block(vertices, dtype))
    return pred, target


@cache
def _block(vertices: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = generator(vertices)
    pred, target = (convex(BLOCK, vertices, rng).to(dtype) for _ in range(2))
    while (tied := _have_ties(pred.double(), target.double())).any():
        for side in (pred, target):
            side[tied] = convex(BLOCK, vertices, rng).to(dtype)[tied]
    return pred, target


def _have_ties(pred: Tensor, target: Tensor) -> Tensor:
    """Whether vertices other than an edge's two ends are one extreme of a pair up to rounding, (B,).

    There the gradient jumps, and the exact one is not that of rounded coordinates.
    """
    found = torch.zeros(len(pred), dtype=torch.bool)
    for polygon, edges_of, ends in ((pred, pred, 3), (pred, target, 2), (target, pred, 2)):
        x, y = (edges_of.roll(-1, 1) - edges_of).unsqueeze(2).unbind(-1)
        on_axes = y * polygon[:, None, :, 0] - x * polygon[:, None, :, 1]  # (B, K, N)
        slack = NEAR_TIE * polygon.abs().amax((1, 2)).view(-1, 1, 1) * (x.abs() + y.abs())
        at_low = on_axes <= on_axes.amin(2, keepdim=True) + slack
        at_high = on_axes >= on_axes.amax(2, keepdim=True) - slack
        found |= ((at_low.sum(2) + at_high.sum(2)) != ends).any(1)
    return found


def errors(peer: Peer, batch: int, vertices: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Errors of a peer against its definition on the input of this size, to be held against `TOLERANCE`.

    Returns:
        The error of the mean loss, with and without a gradient asked for, and the error that `SURE` of the samples'
        derivatives in a random direction keep, over the root mean square of these derivatives.
    """
    value, slopes, direction = _expected(peer.exact, peer.holds, peer.prepare, vertices, dtype)
    pred, target = (peer.prepare(each) for each in polygons(batch, vertices, dtype, device))
    values = [] if peer.compiled else [peer.loss(pred, target)]
    leaf = pred.requires_grad_()
    values.append(peer.loss(leaf, target))
    (gradient,) = torch.autograd.grad(values[-1], leaf)
    blocks = batch * gradient.double().reshape(-1, BLOCK, *direction.shape[1:])
    actual = (blocks * direction.to(device)).flatten(2).sum(2)
    off = (actual - slopes.to(device)).abs().max(0).values / slopes.square().mean().sqrt()  # (BLOCK,)
    value_off = torch.stack(values).double().sub(value).abs().max()  # NaN if one is
    return value_off.item(), off.quantile(SURE).item()


@cache
def _expected(
    exact: Callable[..., float], holds: bool, prepare: Callable[[Tensor], Tensor], vertices: int, dtype: torch.dtype
) -> tuple[float, Tensor, Tensor]:
    """Mean loss of the block, each sample's derivative in a random direction, and these directions."""
    preds, targets = (prepare(each).double().numpy() for each in _block(vertices, dtype))
    directions = torch.randn(preds.shape, generator=generator(0), dtype=torch.float64)
    values, slopes = [], []
    for pred, target, direction in zip(preds, targets, directions.numpy(), strict=True):
        held = (pred,) if holds else ()
        values.append(exact(pred, target))
        ahead, behind = (exact(pred + step * direction, target, *held) for step in (STEP, -STEP))
        slopes.append((ahead - behind) / (2 * STEP))
    return sum(values) / len(values), torch.tensor(slopes, dtype=torch.float64), directions


def find_peers(device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """The implementations that can run here, ours first, and why each of the others cannot."""
    found, missing = [], {}

    def add(why_not: str | None, *arguments: Any, **options: Any) -> None:
        peer = Peer(*arguments, **options)
        if why_not is None:
            found.append(peer)
        else:
            missing[peer.name] = why_not

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = "TRITON_INTERPRET is set" if interpreted else kernels_unavailable(device)
    add(reason, "kernel", MGIOU, kernel, exact_mgiou)
    add(reason, "kernel, defaults", "MGIoU and boundary", kernel_defaults, exact_defaults, holds=True)
    add(None, "reference", MGIOU, reference, exact_mgiou, refuses=_keeps_projections)
    for name, dynamic, loss in (("compiled", False, compiled), ("compiled dynamic", True, compiled_dynamic)):
        options = {"refuses": _keeps_projections, "compiled": True}
        add(None, name, MGIOU, torch.compile(loss, dynamic=dynamic), exact_mgiou, **options)
    add(None, "angle-sorted", MGIOU, angle_sorted_loss, exact_mgiou, refuses=_keeps_projections)

    package, reason = _imported("mgiou")
    plus, corners = (package.MGIoU2DPlus(), package.MGIoU2D("corner", reduction="sum")) if package else (None, None)
    add(reason, "mgiou MGIoU2DPlus", MGIOU, plus, exact_mgiou, refuses=_loops_over_axes, graph=False)
    # Its "sum" is divided by B, so it is the mean.
    add(reason, "mgiou MGIoU2D", "MGIoU over two axes a box", corners, exact_two_axes, refuses=_boxes_only, graph=False)

    add(None, "smooth L1", "smooth L1 of the vertices", F.smooth_l1_loss, exact_smooth_l1)
    add(None, "L1", "L1 of the vertices", F.l1_loss, exact_l1)
    vision, reason = _imported("torchvision.ops")
    add(
        reason,
        "torchvision GIoU",
        "GIoU of the enclosing boxes",
        lambda pred, target: vision.generalized_box_iou_loss(pred, target, reduction="mean"),
        exact_box_giou,
        prepare=enclosing_boxes,
        graph=False,
    )
    mmcv, reason = _imported("mmcv.ops")
    reason = reason or _imported("shapely")[1]
    add(
        reason,
        "mmcv rotated IoU",
        "1 - IoU of rotated boxes",
        lambda pred, target: 1 - mmcv.diff_iou_rotated_2d(pred.unsqueeze(0), target.unsqueeze(0)).mean(),
        exact_rotated_iou,
        prepare=rotated_boxes,
        graph=False,
    )
    return found, missing


MGIOU = "MGIoU loss"


def kernel(pred: Tensor, target: Tensor) -> Tensor:
    """This package's kernel, with the paper's loss."""
    return mgiou_loss(pred, target, backend="triton", **PAPER)


def kernel_defaults(pred: Tensor, target: Tensor) -> Tensor:
    """This package's kernel, with the default loss."""
    return mgiou_loss(pred, target, backend="triton")


def reference(pred: Tensor, target: Tensor) -> Tensor:
    """This package's reference in eager PyTorch."""
    return mgiou_loss(pred, target, backend="eager", **PAPER)


def compiled(pred: Tensor, target: Tensor) -> Tensor:
    """The reference again: the compiler keeps its graphs by function, and must not share these two."""
    return mgiou_loss(pred, target, backend="eager", **PAPER)


def compiled_dynamic(pred: Tensor, target: Tensor) -> Tensor:
    """The reference a third time, for the same reason."""
    return mgiou_loss(pred, target, backend="eager", **PAPER)


def angle_sorted_loss(pred: Tensor, target: Tensor) -> Tensor:
    """MGIoU as the polygon loss that this project started from computes it, mean over the batch.

    Vertices are sorted by their angle around their mean, edges up to 1e-6 long are masked, the paper's GIoU1D goes
    through `nan_to_num` and a clamp. On convex polygons in order it is the same number.

    Args:
        pred: Shape (B, N, 2).
        target: Shape (B, M, 2).
    """
    edges = torch.cat((_sorted_edges(pred), _sorted_edges(target)), dim=1)
    is_axis = edges.norm(dim=-1) > 1e-6
    axes = torch.stack((-edges[..., 1], edges[..., 0]), dim=-1)
    on_pred, on_target = (torch.einsum("bkc,bnc->bkn", axes, each) for each in (pred, target))
    p_low, p_high, g_low, g_high = (
        bound for each in (on_pred, on_target) for bound in (each.min(dim=-1).values, each.max(dim=-1).values)
    )
    inter = (torch.minimum(p_high, g_high) - torch.maximum(p_low, g_low)).clamp(min=0)
    union = (p_high - p_low) + (g_high - g_low) - inter
    hull = torch.maximum(p_high, g_high) - torch.minimum(p_low, g_low)
    giou = torch.nan_to_num(inter / union - (hull - union) / hull).clamp(-1, 1)
    mgiou = (giou * is_axis).sum(1) / is_axis.sum(1).clamp(min=1)
    losses: Tensor = (1 - mgiou) / 2
    return losses.mean()


def _sorted_edges(vertices: Tensor) -> Tensor:
    around = vertices - vertices.mean(dim=1, keepdim=True)
    order = torch.atan2(around[..., 1], around[..., 0]).argsort(dim=1)
    ordered = vertices.gather(1, order.unsqueeze(-1).expand_as(vertices))
    return ordered.roll(-1, dims=1) - ordered


def enclosing_boxes(vertices: Tensor) -> Tensor:
    """Upright boxes (x1, y1, x2, y2) around polygons, (B, 4)."""
    return torch.cat((vertices.amin(1), vertices.amax(1)), dim=1)


def rotated_boxes(vertices: Tensor) -> Tensor:
    """Boxes (x, y, w, h, angle) in the place of polygons, (B, 5): from mean, width and height, and an edge."""
    size = vertices.amax(1) - vertices.amin(1)
    edge = vertices[:, 1] - vertices[:, 0]
    return torch.cat((vertices.mean(1), size, torch.atan2(edge[:, 1], edge[:, 0]).unsqueeze(1)), dim=1)


def exact_mgiou(pred: Points, target: Points) -> float:
    """The paper's Algorithm 1."""
    return float(oracle.sample_loss(pred.tolist(), target.tolist()))


def exact_defaults(pred: Points, target: Points, held: Points | None = None) -> float:
    """MGIoU by edge lengths and a quarter of the boundary term, on the axes of `held` in the place of `pred`."""
    p, g = pred.tolist(), target.tolist()
    base = (p if held is None else held.tolist(), g)
    return float(oracle.sample_loss(p, g, "length", 0.0, 0.25, base=base, axis_grad=False))


def exact_two_axes(pred: Points, target: Points) -> float:
    """The paper's loss over the two edges at vertex 0 of each box."""
    boxes = pred.tolist(), target.tolist()
    edges = [(box[k][0] - box[0][0], box[k][1] - box[0][1]) for box in boxes for k in (1, 3)]
    axes = [oracle.Axis(y, -x, 1.0) for x, y in edges]
    return float(1 - oracle.mgiou(*boxes, axes)) / 2


def exact_l1(pred: Points, target: Points) -> float:
    """Mean absolute difference."""
    return float(np.abs(pred - target).mean())


def exact_smooth_l1(pred: Points, target: Points) -> float:
    """Mean of half the square where that is below a half, else of the absolute difference less a half."""
    off = np.abs(pred - target)
    return float(np.where(off < 1, off * off / 2, off - 0.5).mean())


def exact_box_giou(pred: Points, target: Points) -> float:
    """1 - (inter / union - (hull - union) / hull) of two boxes (x1, y1, x2, y2)."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    smaller, larger = np.minimum(pred, target), np.maximum(pred, target)
    inter = area(*larger[:2], *smaller[2:])
    hull = area(*smaller[:2], *larger[2:])
    union = area(*pred) + area(*target) - inter
    return float(1 - (inter / union - (hull - union) / hull))


def exact_rotated_iou(pred: Points, target: Points) -> float:
    """1 - IoU of two boxes (x, y, w, h, angle), x turning towards y."""
    shapely = importlib.import_module("shapely")
    first, second = (shapely.Polygon(_corners(*box)) for box in (pred.tolist(), target.tolist()))
    inter = first.intersection(second).area
    return float(1 - inter / (first.area + second.area - inter))


def _corners(x: float, y: float, w: float, h: float, angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    halves = [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
    return [(x + dx * cos - dy * sin, y + dx * sin + dy * cos) for dx, dy in halves]


def _keeps_projections(batch: int, vertices: int) -> str | None:
    return "B N^2 above 2^28: too much memory" if batch * vertices**2 > MAX_PROJECTIONS else None


def _loops_over_axes(batch: int, vertices: int) -> str | None:
    return "a Python loop over the axes: too slow" if vertices > 8 or batch > 65536 else None


def _boxes_only(batch: int, vertices: int) -> str | None:
    return "takes four corners" if vertices != 4 else _keeps_projections(batch, vertices)


def _imported(name: str) -> tuple[Any, str | None]:
    try:
        return importlib.import_module(name), None
    except Exception as error:  # a broken installation is as good as none
        return None, f"{type(error).__name__}: {error}"
