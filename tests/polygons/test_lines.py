"""Vertices on one line whose slope no coordinates can have: the intervals on its normal are rounding (section 5)."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracle
from tests.helpers import (
    BOTH,
    assert_close,
    assert_same,
    assert_zero,
    axis_grads,
    axis_weights,
    box,
    convex,
    generator,
    numpy64,
)


def on_lines(batch, size, extent, distance, rng):
    """Vertices on a line of each sample's own, (batch, size, 2), float32: `extent` long, `distance` from the origin."""
    turn, first = (torch.rand(batch, 1, generator=rng, dtype=torch.float64) * 2 * math.pi for _ in range(2))
    along = torch.rand(batch, size, generator=rng, dtype=torch.float64) * extent
    x, y = along * turn.cos() + distance * first.cos(), along * turn.sin() + distance * first.sin()
    return torch.stack((x, y), dim=-1).float()


@axis_grads
@axis_weights
@pytest.mark.parametrize(("extent", "distance"), [(1.0, 0.0), (1.0, 1.0), (0.1, 1.0), (600.0, 300.0), (1e-30, 1e-30)])
@pytest.mark.parametrize(("pred_size", "target_size"), [(4, 4), (3, 8)])
def test_a_pair_on_one_line_has_loss_zero(backend, pred_size, target_size, extent, distance, *, axis_weight, axis_grad):
    """As on a line along x, where all is exact: nothing but the direction across the line is seen, and there h is 0."""
    both = on_lines(64, pred_size + target_size, extent, distance, generator(1901))
    pred, target = both[:, :pred_size], both[:, pred_size:]
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 1.0, "boundary_weight": 1.0}
    value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, reduction="none", **options)
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


@axis_grads
@axis_weights
def test_no_convexity_of_a_polygon_on_a_line(backend, axis_weight, axis_grad):
    """The target is none, so the rest of the loss is as without the term."""
    pred, target = on_lines(64, 5, 1.0, 1.0, generator(1905)), convex(64, 5, generator(1907)).float()
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "none"}
    plain = backend.value_and_gradient(pred, target, **options)
    value, gradient = backend.value_and_gradient(pred, target, convexity_weight=1.0, **options)
    assert plain[0].min() > 0.01
    assert_same(value, plain[0])
    assert_same(gradient, plain[1], "gradient")


@axis_weights
@pytest.mark.parametrize(("width", "is_line"), [(2.0**-22, True), (2.0**-18, False)])
def test_where_a_strip_becomes_a_line(backend, width, is_line, axis_weight):
    """Two rectangles in a strip: lines are a few units in the last place wide, and what is wider has its own value."""
    pred, target = box(0, 0, 0.75, width), box(0.25, 0, 1, width / 2)
    value, gradient = backend.value_and_gradient(pred, target, axis_weight=axis_weight, reduction="none")
    if is_line:
        assert_zero(value, "loss")
        assert_zero(gradient)
    else:
        want = oracle.per_sample_loss(numpy64(pred), numpy64(target), axis_weight=axis_weight)
        assert want[0] > 0.2
        assert_close(value, want, atol=1e-6)
