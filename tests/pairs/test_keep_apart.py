"""Boxes pushed apart by the gradient of their depth in each other, until Shapely finds none that overlap."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import assert_zero, generator, rectangle_corners, uniform
from triton_mgiou import box_mgiou

shapely = pytest.importorskip("shapely")

MARGIN = 0.05
COUNT = 64


def push(boxes, mask=None):
    """The loss of `box_mgiou`'s docstring."""
    n = boxes.shape[-2]
    pairs = torch.ones(n, n, dtype=torch.bool).triu(1)
    depth = box_mgiou(boxes, boxes, over="depth", mask1=mask, mask2=mask)
    return (torch.relu(MARGIN + depth) * pairs).sum()


def moved_apart(boxes, mask=None):
    """Move the centres alone, by Adam with steps of a twentieth of the mean side."""
    centres = boxes[..., :2].clone().requires_grad_()
    optimizer = torch.optim.Adam([centres], lr=0.05 * boxes[..., 2:4].mean().item())
    for _ in range(600):
        optimizer.zero_grad()
        loss = push(torch.cat((centres, boxes[..., 2:]), dim=-1), mask)
        if loss == 0:
            break
        loss.backward()
        optimizer.step()
    return torch.cat((centres.detach(), boxes[..., 2:]), dim=-1)


def overlapping(boxes):
    """How many pairs of boxes (n, 5) share an area of more than a millionth."""
    polygons = shapely.polygons(rectangle_corners(boxes.double()).numpy())
    first, second = np.triu_indices(len(boxes), 1)
    return int((shapely.area(shapely.intersection(polygons[first], polygons[second])) > 1e-6).sum())


def scene(kind, rng, count=COUNT):
    centre = uniform((count, 2), 0, 10, rng)
    angle = uniform((count, 1), -math.pi, math.pi, rng)
    size = torch.ones(count, 2, dtype=torch.float64)
    if kind == "sizes of 1 to 10":
        size = 10 ** uniform((count, 1), 0, 1, rng).expand(-1, 2)
    elif kind == "aspect ratios of 1 to 10":
        size = torch.cat((10 ** uniform((count, 1), 0, 1, rng), size[:, :1]), dim=1)
    elif kind == "crossed pairs":
        centre = centre[: count // 2].repeat_interleave(2, 0) + uniform((count, 2), -0.01, 0.01, rng)
        angle = angle[: count // 2].repeat_interleave(2, 0)
        angle[1::2] += math.pi / 2
        size = torch.tensor([[4.0, 0.5]], dtype=torch.float64).expand(count, 2)
    return torch.cat((centre, size, angle), dim=1).float()


@pytest.mark.parametrize("kind", ["equal sizes", "sizes of 1 to 10", "aspect ratios of 1 to 10", "crossed pairs"])
def test_boxes_move_apart_until_none_overlap(kind):
    boxes = scene(kind, generator(1))
    assert overlapping(boxes) > 30
    assert overlapping(moved_apart(boxes)) == 0


def test_agents_that_are_not_there_neither_push_nor_move():
    boxes = scene("equal sizes", generator(2), 40)
    mask = torch.arange(40) % 4 != 0
    boxes[~mask] = torch.nan
    after = moved_apart(boxes.nan_to_num(nan=5.0).where(mask[:, None], torch.tensor(5.0)), mask)
    assert overlapping(after[mask]) == 0
    assert torch.equal(after[~mask], torch.full((10, 5), 5.0))


def test_a_batch_of_time_steps_moves_apart_step_by_step():
    boxes = torch.stack([scene("aspect ratios of 1 to 10", generator(seed), 20) for seed in (3, 4, 5)])
    after = moved_apart(boxes)
    assert [overlapping(step) for step in after] == [0, 0, 0]


def test_min_and_depth_tell_who_overlaps():
    """The separating axis theorem, which is exact in the plane."""
    boxes = scene("aspect ratios of 1 to 10", generator(6))
    polygons = shapely.polygons(rectangle_corners(boxes.double()).numpy())
    first, second = np.triu_indices(COUNT, 1)
    area = shapely.area(shapely.intersection(polygons[first], polygons[second]))
    clear = (area > 1e-4) | (shapely.distance(polygons[first], polygons[second]) > 1e-4)
    assert 100 < (area[clear] > 0).sum() < clear.sum() - 100
    for over in ("min", "depth"):
        found = box_mgiou(boxes, boxes, over=over).numpy()[first, second]
        np.testing.assert_array_equal(found[clear] > 0, area[clear] > 0)


def test_equal_centres_have_no_direction_to_go():
    boxes = torch.tensor([[1, 2, 4, 1, 0.3], [1, 2, 4, 1, 0.3], [1, 2, 2, 2, 1.0]]).requires_grad_()
    (grad,) = torch.autograd.grad(push(boxes), boxes)
    assert_zero(grad[:, :2])
