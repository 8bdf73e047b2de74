"""Losses of boxes that take a box for a Gaussian, and L1, written from the formulas of their papers.

A box is x, y[, z], w, h[, d], angle: (B, 5) in the plane, (B, 7) in space, where the angle turns about z. Each returns
(B,). In space the last axis is shared by both boxes, so what the papers define for matrices splits into the plane's
2 x 2 matrix and a single number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Mean and covariance: xx, xy and yy in the plane, and zz, which is (B, 0) there."""

    mean: Tensor  # (B, 2)
    xx: Tensor  # (B,)
    xy: Tensor
    yy: Tensor
    mean_z: Tensor  # (B, 0) or (B, 1)
    zz: Tensor


def gaussian(boxes: Tensor, per_size: float) -> Gaussian:
    """The Gaussian whose standard deviation along a side is `per_size` times that side."""
    dimensions = boxes.shape[1] // 2
    centre, variance, angle = boxes[:, :dimensions], (per_size * boxes[:, dimensions:-1]).square(), boxes[:, -1]
    (along, across), cos, sin = variance[:, :2].unbind(1), angle.cos(), angle.sin()
    xx, yy = along * cos.square() + across * sin.square(), along * sin.square() + across * cos.square()
    return Gaussian(centre[:, :2], xx, (along - across) * cos * sin, yy, centre[:, 2:], variance[:, 2:])


def _determinant(g: Gaussian) -> Tensor:
    return (g.xx * g.yy - g.xy.square()) * g.zz.prod(1)


def _mahalanobis(p: Gaussian, t: Gaussian, covariance: Gaussian) -> Tensor:
    """The squared distance of the means, measured by a covariance."""
    x, y = (p.mean - t.mean).unbind(1)
    c = covariance
    plane = (c.yy * x.square() - 2 * c.xy * x * y + c.xx * y.square()) / (c.xx * c.yy - c.xy.square())
    return plane + ((p.mean_z - t.mean_z).square() / c.zz).sum(1)


def _sum(p: Gaussian, t: Gaussian, factor: float) -> Gaussian:
    """`factor` times the sum of the covariances; the means are those of P."""
    return p._replace(
        xx=factor * (p.xx + t.xx), xy=factor * (p.xy + t.xy), yy=factor * (p.yy + t.yy), zz=factor * (p.zz + t.zz)
    )


def bhattacharyya(pred: Tensor, target: Tensor) -> Tensor:
    """The Bhattacharyya distance of the boxes' Gaussians, with the variance of a uniform side."""
    p, t = gaussian(pred, 12**-0.5), gaussian(target, 12**-0.5)
    mean = _sum(p, t, 0.5)
    spread = _determinant(mean) / (_determinant(p) * _determinant(t)).sqrt()
    return _mahalanobis(p, t, mean) / 8 + spread.log() / 2


def probiou(pred: Tensor, target: Tensor) -> Tensor:
    """Llerena, Zeni, Kristen, Jung, "Gaussian Bounding Boxes and Probabilistic IoU", arXiv 2106.06072: L1."""
    return (1 - (-bhattacharyya(pred, target).clamp(1e-7, 100.0)).exp() + 1e-7).sqrt()


def kullback_leibler(pred: Tensor, target: Tensor) -> Tensor:
    """KL(P || G) of the boxes' Gaussians, half a side a standard deviation."""
    p, t = gaussian(pred, 0.5), gaussian(target, 0.5)
    plane = (t.yy * p.xx - 2 * t.xy * p.xy + t.xx * p.yy) / (t.xx * t.yy - t.xy.square())
    trace = plane + (p.zz / t.zz).sum(1)
    dimensions = pred.shape[1] // 2
    return 0.5 * (_mahalanobis(p, t, t) + trace + (_determinant(t) / _determinant(p)).log() - dimensions)


def kld(pred: Tensor, target: Tensor) -> Tensor:
    """Yang et al., "Learning High-Precision Bounding Box for Rotated Object Detection via KLD", arXiv 2106.01883."""
    return 1 - 1 / (1 + torch.log1p(kullback_leibler(pred, target).clamp(min=0)))


def wasserstein(pred: Tensor, target: Tensor) -> Tensor:
    """The squared Wasserstein distance of the boxes' Gaussians, half a side a standard deviation."""
    p, t = gaussian(pred, 0.5), gaussian(target, 0.5)
    product = p.xx * t.xx + 2 * p.xy * t.xy + p.yy * t.yy  # trace of the product
    determinants = (p.xx * p.yy - p.xy.square()) * (t.xx * t.yy - t.xy.square())
    root = (product + 2 * determinants.clamp(min=1e-12).sqrt()).clamp(min=1e-12).sqrt()
    plane = (p.mean - t.mean).square().sum(1) + p.xx + p.yy + t.xx + t.yy - 2 * root
    return plane + ((p.mean_z - t.mean_z).square() + (p.zz.sqrt() - t.zz.sqrt()).square()).sum(1)


def gwd(pred: Tensor, target: Tensor) -> Tensor:
    """Yang et al., "Rethinking Rotated Object Detection with Gaussian Wasserstein Distance", arXiv 2101.11952."""
    return 1 - 1 / (1 + torch.log1p(wasserstein(pred, target).clamp(min=0)))


def kalman_iou(pred: Tensor, target: Tensor) -> Tensor:
    """KFIoU: the overlap of two Gaussians with one mean, by the volumes of the boxes with their covariances."""
    p, t = gaussian(pred, 0.5), gaussian(target, 0.5)
    both, volume = _sum(p, t, 1.0), 2.0 ** (pred.shape[1] // 2)
    p_volume, t_volume = volume * _determinant(p).sqrt(), volume * _determinant(t).sqrt()
    # The product of both Gaussians has the covariance P (P + T)^-1 T, so its determinant needs no matrix.
    overlap = volume * (_determinant(p) * _determinant(t) / _determinant(both)).sqrt()
    return overlap / (p_volume + t_volume - overlap)


def kfiou(pred: Tensor, target: Tensor) -> Tensor:
    """Yang et al., "The KFIoU Loss for Rotated Object Detection", arXiv 2201.12558, with its loss of the centre."""
    p, t = gaussian(pred, 0.5), gaussian(target, 0.5)
    return torch.log1p(_mahalanobis(p, t, t)) + (1 - kalman_iou(pred, target)).exp() - 1


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean difference of centre over the target's mean size, of the logarithms of the sizes, and of the angle."""
    dimensions = pred.shape[1] // 2
    unit = target[:, dimensions:-1].mean(1, keepdim=True)
    centre = (pred[:, :dimensions] - target[:, :dimensions]) / unit
    sizes = (pred[:, dimensions:-1] / target[:, dimensions:-1]).log()
    return torch.cat((centre, sizes, pred[:, -1:] - target[:, -1:]), dim=1).abs().mean(1)


def upright(pred: Tensor, target: Tensor, kind: str) -> Tensor:
    """1 - GIoU, DIoU or CIoU of boxes without an angle, (B, 4): x, y, w, h (arXiv 1902.09630, 1911.08287)."""
    (p_low, p_high), (t_low, t_high) = ((b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2) for b in (pred, target))
    inter = (torch.minimum(p_high, t_high) - torch.maximum(p_low, t_low)).clamp(min=0).prod(1)
    union = pred[:, 2:].prod(1) + target[:, 2:].prod(1) - inter
    hull = torch.maximum(p_high, t_high) - torch.minimum(p_low, t_low)
    if kind == "GIoU":
        return 1 - inter / union + (hull.prod(1) - union) / hull.prod(1)
    distance = (pred[:, :2] - target[:, :2]).square().sum(1) / hull.square().sum(1)
    loss = 1 - inter / union + distance
    if kind == "CIoU":
        p_shape, t_shape = (torch.atan(b[:, 2] / b[:, 3]) for b in (pred, target))
        v = (4 / torch.pi**2) * (t_shape - p_shape).square()
        loss = loss + v * (v / (1 - inter / union + v)).detach()
    return loss
