"""Pairs on one line, or plates in one plane, whose slope no coordinates can have: the line that joins them decides."""

import math

import pytest
import torch

from tests.helpers import AXIS_WEIGHTS, assert_close, generator, uniform
from tests.pairs.helpers import OVER
from tests.pairs.test_gradient import gradients
from tests.pairs.test_value import matrix
from triton_mgiou import box_mgiou_loss, mgiou_loss

COUNT = 12
# The extent of the pairs and how far they are from the origin; the rest of the coordinates' digits is the tolerance.
PLACES = [(1.0, 0.0, 1e-3), (1.0, 1.0, 1e-3), (0.1, 1.0, 1e-2), (30.0, 1000.0, 2e-2)]
places = pytest.mark.parametrize(("extent", "distance", "tolerance"), PLACES)


def line(extent, distance, seed):
    """A direction between 0.2 and 1.2 from x, and a point on the line, `distance` from the origin, in float64."""
    rng = generator(seed)
    turn, first = uniform((1,), 0.2, 1.2, rng), uniform((1,), 0, 2 * math.pi, rng)
    origin = distance * torch.cat((first.cos(), first.sin()))
    ends = extent * uniform((2, COUNT, 4), 0, 1, rng)
    return turn, origin, ends[0], ends[1]


def along(first, second, over):
    """The value of all pairs of two sets of intervals on the line, each the hull of some numbers."""
    low, high = first.amin(1).unsqueeze(1), first.amax(1).unsqueeze(1)
    other_low, other_high = second.amin(1).unsqueeze(0), second.amax(1).unsqueeze(0)
    halves = (high - low + other_high - other_low) / 2
    if over == "depth":
        return 1 - ((high + low) - (other_high + other_low)).abs() / 2 / halves
    return 2 * halves / (torch.maximum(high, other_high) - torch.minimum(low, other_low)) - 1


def placed(numbers, turn, origin):
    """Vertices at these places along the line, float32."""
    return (origin + numbers.unsqueeze(-1) * torch.cat((turn.cos(), turn.sin()))).float()


def rods(numbers, turn, origin):
    """The boxes (x, y, w, h, angle) without a height whose ends are the first two of the numbers, float32."""
    centre = origin + numbers[:, :2].mean(1, keepdim=True) * torch.cat((turn.cos(), turn.sin()))
    length = (numbers[:, :1] - numbers[:, 1:2]).abs()
    return torch.cat((centre, length, 0 * length, turn.expand_as(length)), dim=1).float()


@places
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
def test_boxes_without_a_height_on_one_line(backend, axis_weight, over, extent, distance, tolerance):
    turn, origin, first, second = line(extent, distance, 11)
    boxes = rods(first, turn, origin), rods(second, turn, origin)
    expected = along(first[:, :2], second[:, :2], over)
    value = matrix(backend, *boxes, over=over, axis_weight=axis_weight)
    assert_close(value, expected, atol=tolerance, rtol=tolerance)
    loss = box_mgiou_loss(*boxes, axis_weight=axis_weight, reduction="none", backend="eager")
    assert not loss.any()  # the loss has no other axes


@places
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 3), (2, 1)])
def test_polygons_on_one_line(backend, sizes, axis_weight, over, extent, distance, tolerance):
    turn, origin, first, second = line(extent, distance, 13)
    first, second = first[:, : sizes[0]], second[:, : sizes[1]]
    polygons = placed(first, turn, origin), placed(second, turn, origin)
    value = matrix(backend, *polygons, over=over, axis_weight=axis_weight)
    assert_close(value, along(first, second, over), atol=tolerance, rtol=tolerance)
    assert not mgiou_loss(*polygons, axis_weight=axis_weight, reduction="none", backend="eager").any()


@places
def test_plates_in_one_plane(backend, extent, distance, tolerance):
    """Upright ones: two edges each along the plane and two upwards, and across it nothing that tells them apart."""
    turn, origin, first, second = line(extent, distance, 17)
    flat = [rods(numbers, turn, origin) for numbers in (first, second)]
    heights = [(numbers[:, 2:] / 2).float() for numbers in (first, second)]
    boxes = [
        torch.cat((rod[:, :2], height[:, :1], rod[:, 2:4], height[:, 1:], rod[:, 4:]), dim=1)
        for rod, height in zip(flat, heights, strict=True)
    ]
    upwards = [torch.stack((h[:, 0] - h[:, 1] / 2, h[:, 0] + h[:, 1] / 2), dim=1).double() for h in heights]
    expected = (along(first[:, :2], second[:, :2], "mean") + along(*upwards, "mean")) / 2
    assert_close(matrix(backend, *boxes, fmt="cxcyczlwhr"), expected, atol=tolerance)


def test_the_gradient_on_one_line_is_not_that_of_rounding(backend):
    """To the centres it goes along the line, and is that of intervals on it; it was up to 1e6 over the extent."""
    turn, origin, first, second = line(1.0, 10.0, 19)
    boxes = rods(first, turn, origin), rods(second, turn, origin)
    gradient, _ = gradients(backend, *boxes, torch.ones(COUNT, COUNT))
    moved = first[:, :2].clone().requires_grad_()
    along(moved, second[:, :2], "mean").sum().backward()
    expected = moved.grad.sum(1, keepdim=True) * torch.cat((turn.cos(), turn.sin()))
    assert_close(gradient[:, :2], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["boxes", "polygons"])
def test_beside_one_line_axes_decide(backend, kind):
    """Two segments of 0.1 at (1, 0), beside each other by 2^-18: on the normal of both they are points apart."""
    turn = torch.tensor([0.0], dtype=torch.float64)
    ends = torch.tensor([[0.0, 0.1]], dtype=torch.float64)
    origins = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 2.0**-18], dtype=torch.float64)
    shape = rods if kind == "boxes" else placed
    assert_close(matrix(backend, *(shape(ends, turn, origin) for origin in origins)), [[-1.0]], atol=1e-6)
