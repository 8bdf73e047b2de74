"""A program of a user who checks types: mypy reads it (see pyproject.toml), and it runs."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from triton_mgiou import PAPER, BoxMGIoULoss, MGIoULoss, mgiou_loss
from triton_mgiou.metrics import average_precision, polygon_iou, polygon_iou_matrix


def test_the_paper_s_loss_is_of_its_own_class() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 1, 3, 3]])
    polygons = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(2, 4, 2)
    of_boxes: BoxMGIoULoss = BoxMGIoULoss.paper(fmt="xyxy")
    of_polygons: MGIoULoss = MGIoULoss.paper(loss_weight=2)
    assert typing.get_type_hints(BoxMGIoULoss.paper)  # names that there are at run time too
    want: Tensor = mgiou_loss(polygons, polygons.flip(0), **PAPER)
    assert torch.allclose(of_boxes(boxes, boxes.flip(0)), want)
    assert torch.allclose(of_polygons(polygons, polygons.flip(0)), 2 * want)


def test_metrics_of_tensors() -> None:
    pytest.importorskip("shapely")
    squares = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]]).expand(2, 4, 2)
    ious = polygon_iou_matrix(squares, [squares[0], squares[0] + 0.5])
    assert ious.tolist() == [[polygon_iou(square, squares[0]), 0.25 / 1.75] for square in squares]
    precision = average_precision([(ious, [0.9, 0.8])], thresholds=torch.tensor([0.1, 0.5]))
    assert precision.tolist() == [1.0, 51 / 101]
