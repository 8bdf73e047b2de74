"""Matching by the matrix: padded ground truth with a Hungarian solver, and inside the matcher of transformers' DETR."""

import textwrap

import pytest
import torch

from tests.helpers import generator
from tests.pairs.helpers import random_boxes
from triton_mgiou import box_mgiou


def test_padded_ground_truth_is_filtered_after_the_solver():
    """By the example of `box_mgiou`'s docstring, in a step of training: the solver takes padding too."""
    scipy = pytest.importorskip("scipy")
    solve = pytest.importorskip("scipy.optimize").linear_sum_assignment
    rng = generator(0)
    truth = random_boxes(6, "cxcywhr", rng).float()
    order = torch.tensor([4, 1, 5, 0])
    pred = torch.cat((truth[order] + 0.01, random_boxes(5, "cxcywhr", rng).float() + 20)).requires_grad_()
    padded = torch.cat((truth, torch.zeros(4, 5)))
    mask = torch.arange(10) < 6
    _, columns = solve(box_mgiou(pred.detach(), padded, mask2=mask), maximize=True)
    assert not mask[columns].all()
    _, _, text = box_mgiou.__doc__.partition("drop these choices:\n\n")
    names = {"scipy": scipy, "box_mgiou": box_mgiou, "pred": pred, "gt": padded, "mask": mask}
    exec(textwrap.dedent(text.partition("\n\n")[0]), names, found := {})
    matched = dict(zip(found["rows"].tolist(), found["columns"].tolist(), strict=True))
    assert set(matched.values()) == set(range(6))
    assert [matched[row] for row in range(4)] == order.tolist()


def test_inside_the_matcher_of_transformers(monkeypatch):
    """Its cost of boxes, -GIoU of upright boxes, replaced by -MGIoU: the same protocol, another matrix."""
    loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
    pytest.importorskip("scipy")
    matcher = loss.HungarianMatcher(class_cost=0, bbox_cost=0, giou_cost=1)
    monkeypatch.setattr(loss, "generalized_box_iou", lambda pred, gt: box_mgiou(pred, gt, fmt="xyxy"))
    rng = generator(1)
    truth = random_boxes(5, "cxcywh", rng).float()
    order = torch.randperm(5, generator=rng)
    outputs = {"logits": torch.zeros(1, 5, 3), "pred_boxes": (truth[order] + 0.02).unsqueeze(0)}
    ((rows, columns),) = matcher(outputs, [{"class_labels": torch.zeros(5, dtype=torch.long), "boxes": truth}])
    assert torch.equal(columns, order[rows])
