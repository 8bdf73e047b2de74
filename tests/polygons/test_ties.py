"""Repeated vertices, and ties that rounding hides (section 4)."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests import helpers, oracle
from tests.conftest import Backend

OPTIONS = [
    {"axis_weight": weight, "axis_grad": grad, "convexity_weight": convexity, "boundary_weight": boundary}
    for weight, grad, (convexity, boundary) in itertools.product(
        helpers.AXIS_WEIGHTS, (True, False), ((0.0, 0.0), (0.0, 0.25), (0.3, 0.0), (0.3, 0.25))
    )
]
TIMES = {
    "every vertex of both twice": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "every vertex of the prediction three times": ((3, 3, 3, 3, 3), (1, 1, 1, 1, 1)),
    "every vertex of the target three times": ((1, 1, 1, 1, 1), (3, 3, 3, 3, 3)),
}
SOME = ((1, 3, 1, 2, 1), (2, 1, 1, 1, 3))


def summed(gradient, times):
    """The gradient of repeated vertices, summed over the copies of each."""
    vertex = torch.repeat_interleave(torch.arange(len(times)), torch.tensor(times))
    total = torch.zeros(gradient.shape[0], len(times), 2, dtype=gradient.dtype)
    return total.index_add(1, vertex, gradient.cpu())


def pairs(batch, seed):
    """Stars and convex polygons, some of them the same or parallel, in float32."""
    rng = helpers.generator(seed)
    pred, target = helpers.star(batch, 5, rng), helpers.convex(batch, 5, rng)
    pred[0] = target[0]
    target[1] = (16 * target[1]).round() / 16  # such that parallel edges tie to the bit
    pred[1] = target[1] * 1.5
    return pred.float(), target.float()


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repeated_vertices_change_nothing(backend, options, times):
    pred, target = pairs(8, seed=1)
    value, gradient = backend.value_and_gradient(pred, target, reduction="sum", **options)
    twice = (side.repeat_interleave(torch.tensor(n), dim=1) for side, n in zip((pred, target), times, strict=True))
    repeated, repeated_gradient = backend.value_and_gradient(*twice, reduction="sum", **options)
    helpers.assert_close(repeated, value, atol=1e-6, rtol=1e-6)
    helpers.assert_gradient_close(summed(repeated_gradient, times[0]), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_some_repeated_vertices(backend, options):
    """The value is that without the copies, but for convexity; each copy of a place has a share in a tie."""
    pred, target = pairs(8, seed=2)
    value, _ = backend.value_and_gradient(pred, target, reduction="sum", **options)
    copies = [side.repeat_interleave(torch.tensor(n), dim=1) for side, n in zip((pred, target), SOME, strict=True)]
    repeated, gradient = backend.value_and_gradient(*copies, reduction="sum", **options)
    if not options["convexity_weight"]:
        helpers.assert_close(repeated, value, atol=1e-6, rtol=1e-6)
    same = Backend("eager", "cpu").value_and_gradient(*copies, reduction="sum", **options)
    helpers.assert_close(repeated, same[0], atol=1e-6, rtol=1e-6)
    helpers.assert_gradient_close(gradient, same[1], rtol=1e-4, atol=1e-7)


def decoded(boxes, target_boxes, backend, **options):
    """The gradient to the prediction's boxes, decoded to corners in float32."""
    boxes = boxes.float().to(backend.device).requires_grad_()
    target = helpers.rectangle_corners(target_boxes.float().to(backend.device))
    loss = backend.loss(helpers.rectangle_corners(boxes), target, reduction="sum", **options)
    return torch.autograd.grad(loss, boxes)[0].cpu()


@pytest.mark.parametrize("boundary", [0.0, 0.25])
@pytest.mark.parametrize("axis_weight", helpers.AXIS_WEIGHTS)
@pytest.mark.parametrize("axis_grad", [True, False])
def test_the_gradient_of_a_box_does_not_change_when_the_pair_moves(backend, axis_grad, axis_weight, boundary):
    """Opposite edges are tied on their normals, and rounding is another at each place."""
    rng = helpers.generator(3)
    moves = torch.cat((torch.zeros(1, 2), torch.randint(0, 600, (23, 2), generator=rng))).double()
    box = torch.tensor([20.3, 31.1, 40.7, 21.9, 0.37], dtype=torch.float64)
    target = torch.tensor([26.2, 27.4, 44.1, 18.3, 0.52], dtype=torch.float64)
    moved = [each.repeat(24, 1) for each in (box, target)]
    for each in moved:
        each[:, :2] += moves
    options = {"axis_grad": axis_grad, "axis_weight": axis_weight, "boundary_weight": boundary}
    gradient = decoded(*moved, backend, **options)
    assert float(gradient[0, 4].abs()) > 1e-3
    helpers.assert_close(gradient, gradient[:1].expand_as(gradient), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("axis_weight", helpers.AXIS_WEIGHTS)
@pytest.mark.parametrize("angle", [0.37, math.pi / 4, 1.0])
def test_a_box_at_the_angle_of_its_target_has_no_gradient_to_it(backend, angle, axis_weight):
    """On the normals of its edges two corners of the target tie, in the boundary term too, wherever the pair is."""
    rng = helpers.generator(6)
    boxes = torch.tensor([[20.3, 31.1, 40.7, 21.9, angle], [26.2, 27.4, 44.1, 18.3, angle]], dtype=torch.float64)
    boxes = boxes.repeat(12, 1, 1)
    boxes[:, :, :2] += torch.randint(0, 600, (12, 1, 2), generator=rng)
    gradient = decoded(*boxes.unbind(1), backend, axis_grad=False, axis_weight=axis_weight, boundary_weight=0.25)
    helpers.assert_close(gradient[:, 4], np.zeros(12), atol=2e-5)
    helpers.assert_close(gradient, gradient[:1].expand_as(gradient), atol=2e-5, rtol=1e-3)


def test_opposite_edges_share_as_without_rounding(backend):
    """Turned rectangles in float32 against differences in float64, where a tie is split by its two slopes."""
    rng = helpers.generator(4)
    boxes = helpers.random_boxes(6, rng)
    pred, target = helpers.rectangle_corners(boxes), helpers.convex(6, 5, rng)
    expected = oracle.gradient(pred.numpy(), target.numpy(), axis_grad=False)
    _, gradient = backend.value_and_gradient(pred.float(), target.float(), reduction="sum", axis_grad=False)
    helpers.assert_gradient_close(gradient, expected, rtol=1e-3)


@pytest.mark.parametrize("off", [1e-4, 1e-5])
def test_near_ties_that_are_real_are_not_merged(backend, off):
    """Trapezoids: the edge that faces one is off parallel by this part of the extent, more than any rounding."""
    rng = helpers.generator(5)
    pred = helpers.rectangle_corners(helpers.random_boxes(6, rng))
    pred[:, 2] += off * (pred[:, 2] - pred[:, 1])
    target = helpers.convex(6, 5, rng) + 3.0
    expected = oracle.gradient(pred.numpy(), target.numpy(), axis_grad=False)
    assert np.abs(expected).max() > 0.01
    _, gradient = backend.value_and_gradient(pred.float(), target.float(), reduction="sum", axis_grad=False)
    helpers.assert_gradient_close(gradient, expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"convexity_weight": 0.5}, {"boundary_weight": 0.5}], ids=str)
def test_with_the_path_through_the_axes_ties_are_exact(backend, options, monkeypatch):
    """What would be tied if the axes were constants, 2^-22 apart, is not: the right sides on the other's normals."""
    monkeypatch.setattr(oracle, "STEP", 1e-9)  # of the extent; the sides are off by 2.4e-7
    off = 2.0**-22
    pred = helpers.points((0, 0), (1.5, 0.25), (1.5 - off, 0.75), (0, 1.25))
    target = helpers.points((0.25, -0.5), (1.75, -0.5), (1.75, 1), (0.25 + off, 1))
    expected = oracle.gradient(pred.double().numpy(), target.double().numpy(), **options)
    _, gradient = backend.value_and_gradient(pred, target, reduction="sum", axis_grad=True, **options)
    helpers.assert_gradient_close(gradient, expected, rtol=1e-3)


@pytest.mark.parametrize("padding", [0, 3])
def test_small_polygons_keep_their_digits(backend, padding, monkeypatch):
    """Trapezoids of 2^-10 of the extent: rounding is 2^-12 of them, and an edge is off parallel by 2^-13.

    In the boundary term too, which sees the target on the normals of the prediction.
    """
    monkeypatch.setattr(oracle, "STEP", 1e-9)  # of the extent; the edges are off by 1e-7
    trapezoid = helpers.points((0, 0), (1, 0), (1, 1 + 2**-13), (0, 1)) * 2.0**-10
    pred, target = trapezoid + torch.tensor([0.75, 0]), 1.5 * trapezoid + torch.tensor([0, 0.75])
    options = {"axis_grad": False, "boundary_weight": 0.25, "axis_weight": "length"}
    expected = oracle.gradient(pred.double().numpy(), target.double().numpy(), **options)
    pad = torch.full((1, padding, 2), math.nan)
    lengths = {"pred_lengths": torch.tensor([4]), "target_lengths": torch.tensor([4])} if padding else {}
    padded = torch.cat((pred, pad), dim=1), torch.cat((target, pad), dim=1)
    _, gradient = backend.value_and_gradient(*padded, reduction="sum", **options, **lengths)
    helpers.assert_gradient_close(gradient[:, :4], expected, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"convexity_weight": 0.5}], ids=str)
def test_the_ends_of_an_edge_share_in_a_small_polygon_too(backend, options):
    """Rounding tells their projections apart by more than what else is tied in it."""
    rng = helpers.generator(7)
    turn = helpers.uniform((20, 1), 0, 2 * math.pi, rng) + torch.arange(5) * (2 * math.pi / 5)
    small = torch.stack((turn.cos(), turn.sin()), dim=2) * 2.0**-13 + helpers.uniform((20, 1, 2), 0, 1, rng)
    square = 0.5 * helpers.regular(4) + helpers.uniform((20, 1, 2), 0, 1, rng)
    pred, target = helpers.either_way(small, rng).float(), square.float()
    options = {"axis_weight": "length", "axis_grad": False, **options}
    _, gradient = backend.value_and_gradient(pred, target, reduction="sum", **options)
    expected = oracle.gradient(helpers.numpy64(pred), helpers.numpy64(target), **options)
    helpers.assert_gradient_close(gradient, expected, rtol=1e-3)
