"""Axis weights (section 3) in closed form: a unit square against itself half a unit further, with a corner cut off."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import box

EXTENT = 1.5
WHOLE = 1 / 6  # (1 - GIoU1D) / 2 is 1/3 on half of the eight sides' normals, 0 on the others


def loss_with_cut(backend, size, axis_weight):
    """The cut is an edge of length `size` sqrt(2), whose normal is the diagonal."""
    cut = torch.tensor([[[size, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, size]]], dtype=torch.float64)
    pred = cut + torch.tensor([0.5, 0.0], dtype=torch.float64)
    target = box(0.0, 0.0, 1.0, 1.0, dtype=torch.float64)
    return backend.loss(pred.to(backend.device), target.to(backend.device), axis_weight=axis_weight).item()


@pytest.mark.parametrize(("share", "expected"), [(0.99, WHOLE), (1.01, (8 * WHOLE + 0.2) / 9)])
def test_a_shorter_edge_than_the_threshold_is_no_axis(backend, share, expected):
    size = share * 1e-6 * EXTENT / math.sqrt(2)
    assert loss_with_cut(backend, size, "uniform") == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("axis_weight", "weigh"),
    [
        ("soft", lambda edges: [-math.expm1(-edge / (0.01 * EXTENT)) for edge in edges]),
        ("length", lambda edges: [edge / sum(edges) for edge in edges]),
    ],
)
def test_a_short_edge(backend, axis_weight, weigh):
    size = 0.01
    diagonal = ((0.5 + size) + 0.5) / (2 * 2.5)
    *own, short = weigh([1 - size, 1.0, 1.0, 1 - size, size * math.sqrt(2)])
    across = own[1] + own[3]  # the two sides whose normals are in x
    other = weigh([1.0] * 4)
    expected = ((across + 2 * other[0]) / 3 + short * diagonal) / (sum(own) + short + sum(other))
    assert loss_with_cut(backend, size, axis_weight) == pytest.approx(expected, abs=1e-12)
