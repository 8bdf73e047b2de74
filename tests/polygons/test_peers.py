"""The same values and gradients as `mgiou` 0.1.0 from PyPI, the paper's own code, where that one is right."""

from __future__ import annotations

import mgiou
import pytest
import torch

from tests.helpers import (
    assert_close,
    assert_gradient_close,
    convex,
    either_way,
    generator,
    random_boxes,
    rectangle_corners,
    uniform,
)

DTYPES = pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-9)])


def in_order(batch, rng):
    """Convex quadrangles, some clockwise, some not, from any first corner."""
    vertices = either_way(convex(batch, 4, rng), rng)
    return torch.stack([polygon.roll(int(k), 0) for polygon, k in zip(vertices, torch.arange(batch) % 4, strict=True)])


@pytest.mark.parametrize("fast_mode", [False, True])
@DTYPES
def test_quadrangles(backend, fast_mode, dtype, atol, rtol):
    rng = generator(91)
    batch = backend.batch(64)
    pred, target = in_order(batch, rng).to(dtype), in_order(batch, rng).to(dtype)
    leaves = [pred.clone().requires_grad_(), target.clone().requires_grad_()]
    expected = mgiou.MGIoU2DPlus(reduction="none", fast_mode=fast_mode)(*leaves)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    actual, *gradients = backend.value_and_gradient(pred, target, wrt=("pred", "target"), reduction="none")
    assert_close(actual, expected, atol=atol)
    for got, want in zip(gradients, wanted, strict=True):
        assert_gradient_close(got, want, rtol=rtol)
    total = mgiou.MGIoU2DPlus(reduction="sum", fast_mode=fast_mode)(pred, target)
    assert_close(backend.value_and_gradient(pred, target, reduction="sum")[0], total, atol=batch * atol)
    mean = mgiou.MGIoU2DPlus(reduction="mean", fast_mode=fast_mode)(pred, target)
    assert_close(backend.value_and_gradient(pred, target, reduction="mean")[0], mean, atol=atol)


def boxes_gradient(backend, pred, target, **options):
    """Our loss of boxes (B, 5) and its gradient with respect to the predicted ones."""
    leaf = pred.clone().to(backend.device).requires_grad_()
    value = backend.loss(rectangle_corners(leaf), rectangle_corners(target.to(backend.device)), **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value, gradient


@pytest.mark.parametrize("fast_mode", [False, True])
@DTYPES
def test_rectangles_by_their_corners(backend, fast_mode, dtype, atol, rtol):
    """Its two axes a box are two of our four, which come in parallel pairs. Its "sum" is divided by B."""
    rng = generator(92)
    batch = backend.batch(64)
    pred, target = random_boxes(batch, rng).to(dtype), random_boxes(batch, rng).to(dtype)
    leaf = pred.clone().requires_grad_()
    peer = mgiou.MGIoU2D(representation="corner", reduction="sum", fast_mode=fast_mode)
    expected = peer(rectangle_corners(leaf), rectangle_corners(target)) * batch
    (wanted,) = torch.autograd.grad(expected, leaf)
    actual, gradient = boxes_gradient(backend, pred, target, reduction="sum")
    assert_close(actual, expected, atol=batch * atol)
    assert_gradient_close(gradient, wanted, rtol=rtol)
    for b in range(4):
        one = slice(b, b + 1)
        expected = peer(rectangle_corners(pred[one]), rectangle_corners(target[one]))
        assert_close(boxes_gradient(backend, pred[one], target[one])[0], expected, atol=atol)


def test_rectangles_by_their_angle(backend):
    """Its corners turn by minus the angle."""
    rng = generator(93)
    batch = backend.batch(64)
    pred, target = random_boxes(batch, rng).float(), random_boxes(batch, rng).float()
    other_way = torch.tensor([1.0, 1, 1, 1, -1])
    leaf = pred.clone().requires_grad_()
    expected = mgiou.MGIoU2D("rect", reduction="sum")(leaf * other_way, target * other_way) * batch
    (wanted,) = torch.autograd.grad(expected, leaf)
    actual, gradient = boxes_gradient(backend, pred, target, reduction="sum")
    assert_close(actual, expected, atol=batch * 1e-6)
    assert_gradient_close(gradient, wanted, rtol=1e-4)


def test_weights(backend):
    """With a weight and no factor, its "sum" is divided by the sum of the weights, at least 1."""
    rng = generator(94)
    pred, target = random_boxes(8, rng).float(), random_boxes(8, rng).float()
    weight = uniform((8,), 0, 2, rng).float()
    expected = mgiou.MGIoU2D("corner", reduction="sum")(rectangle_corners(pred), rectangle_corners(target), weight)
    factor = weight.sum().item()
    actual, _ = boxes_gradient(backend, pred, target, weight=weight.to(backend.device), avg_factor=factor)
    assert_close(actual, expected, atol=1e-6)
    expected = mgiou.MGIoU2D("corner", reduction="sum", loss_weight=2.0)(
        rectangle_corners(pred), rectangle_corners(target), weight, avg_factor=3.0
    )
    actual, _ = boxes_gradient(backend, pred, target, weight=weight.to(backend.device), avg_factor=3.0)
    assert_close(2 * actual, expected, atol=5e-6)
