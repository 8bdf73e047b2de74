"""The same values and gradients as `mgiou` 0.1.0 from PyPI, the paper's own code, where that one is right.

Its "rect" turns by minus the angle, its "sum" is divided by B, and it has no gradient that is finite at a tie of NaN.
"""

from __future__ import annotations

import mgiou
import pytest
import torch

from tests.boxes.helpers import corners3d, random_boxes
from tests.helpers import assert_close, assert_gradient_close, generator, rectangle_corners
from triton_mgiou import PAPER

DTYPES = pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-9)])
FAST = pytest.mark.parametrize("fast_mode", [False, True])


@FAST
@DTYPES
def test_rectangles(boxes, fast_mode, dtype, atol, rtol):
    rng = generator(91)
    batch = 40
    pred, target = random_boxes("cxcywhr", batch, rng).to(dtype), random_boxes("cxcywhr", batch, rng).to(dtype)
    other_way = torch.tensor([1.0, 1, 1, 1, -1], dtype=dtype)
    leaf = pred.clone().requires_grad_()
    corners = rectangle_corners(leaf), rectangle_corners(target)
    for peer, sides in [("corner", corners), ("rect", (leaf * other_way, target * other_way))]:
        if peer == "rect" and dtype == torch.float64:
            continue  # its unit square is float32
        expected = mgiou.MGIoU2D(peer, reduction="sum", fast_mode=fast_mode)(*sides) * batch
        (wanted,) = torch.autograd.grad(expected, leaf)
        actual, gradient = boxes.value_and_gradient(pred, target, reduction="sum", **PAPER)
        assert_close(actual, expected, atol=batch * atol)
        assert_gradient_close(gradient, wanted, rtol=rtol)


@FAST
@DTYPES
@pytest.mark.parametrize("predicted", ["boxes", "free corners"])
def test_eight_corners(boxes, fast_mode, dtype, atol, rtol, predicted):
    rng = generator(92)
    target = corners3d(random_boxes("cxcyczlwhr", 20, rng)).to(dtype)
    pred = corners3d(random_boxes("cxcyczlwhr", 20, rng)).to(dtype)
    if predicted == "free corners":
        pred += 0.1 * torch.randn(pred.shape, generator=rng, dtype=torch.float64).to(dtype)
    leaves = [pred.clone().requires_grad_(), target.clone().requires_grad_()]
    expected = mgiou.MGIoU3D(reduction="none", fast_mode=fast_mode)(*leaves)
    (wanted,) = torch.autograd.grad(expected.sum(), leaves[:1])
    actual, gradient = boxes.value_and_gradient(pred, target, fmt="corners3d", reduction="none", **PAPER)
    assert_close(actual, expected, atol=atol)
    if predicted == "free corners":  # a box's four corners of a face tie, which it breaks by rounding
        assert_gradient_close(gradient, wanted, rtol=rtol)
    mean = mgiou.MGIoU3D(reduction="mean", fast_mode=fast_mode)(pred, target)
    assert_close(boxes.value_and_gradient(pred, target, fmt="corners3d", **PAPER)[0], mean, atol=atol)


@FAST
@DTYPES
def test_boxes_in_space_by_their_corners(boxes, fast_mode, dtype, atol, rtol):
    """The gradient to the numbers does not depend on how a tie of the corners is split."""
    rng = generator(93)
    pred, target = random_boxes("cxcyczlwhr", 20, rng), random_boxes("cxcyczlwhr", 20, rng)
    leaf = pred.clone().requires_grad_()
    signs = torch.tensor(
        [(-1, -1, -1), (1, -1, -1), (1, 1, -1), (-1, 1, -1), (-1, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1)]
    )
    x, y, z = (signs * leaf[:, None, 3:6] / 2).unbind(2)
    cos, sin = leaf[:, 6:].cos(), leaf[:, 6:].sin()
    corners = torch.stack((x * cos - y * sin, x * sin + y * cos, z), dim=2) + leaf[:, None, :3]
    expected = mgiou.MGIoU3D(reduction="sum", fast_mode=fast_mode)(corners, corners3d(target))
    (wanted,) = torch.autograd.grad(expected, leaf)
    actual, gradient = boxes.value_and_gradient(
        pred.to(dtype), target.to(dtype), fmt="cxcyczlwhr", reduction="sum", **PAPER
    )
    assert_close(actual, expected, atol=20 * atol)
    assert_gradient_close(gradient, wanted, rtol=rtol)
