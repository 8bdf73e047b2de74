"""Sets of boxes of every format to test with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers import convex, rectangle_corners, uniform

PLANE = ("cxcywhr", "cxcywh", "xyxy")
FORMATS = (*PLANE, "xyxyxyxy", "cxcyczlwhr", "corners3d")
OVER = ("mean", "min", "depth")
ULP = 2.0**-23  # of 1 in float32


def random_boxes(count: int, fmt: str, rng: torch.Generator, aspect: float = 3.0) -> torch.Tensor:
    """Boxes (count, ...) in float64: centres in a unit square or cube, sides up to 1 and down to 1 over `aspect`."""
    dims = 3 if fmt in ("cxcyczlwhr", "corners3d") else 2
    centre = uniform((count, dims), -0.5, 0.5, rng)
    size = aspect ** -uniform((count, dims), 0, 1, rng)
    angle = uniform((count, 1), -2 * math.pi, 2 * math.pi, rng)
    if fmt == "xyxyxyxy":
        return convex(count, 4, rng).flatten(1)
    if fmt == "xyxy":
        return torch.cat((centre - size / 2, centre + size / 2), dim=1)
    if fmt == "cxcywh":
        return torch.cat((centre, size), dim=1)
    boxes = torch.cat((centre, size, angle), dim=1)
    return corners_in_space(boxes) if fmt == "corners3d" else boxes


def corners_in_space(boxes: torch.Tensor) -> torch.Tensor:
    """Corners (B, 8, 3), 0-1, 0-3 and 0-4 along length, width and height, of boxes (B, 7)."""
    flat = rectangle_corners(boxes[:, [0, 1, 3, 4, 6]])
    z, height = boxes[:, 2, None, None], boxes[:, 5, None, None]
    floors = [torch.cat((flat, (z + side * height / 2).expand(-1, 4, 1)), dim=2) for side in (-1, 1)]
    return torch.cat(floors, dim=1)


def needs_kernel(backend: Any, fmt: str | None, gradient: bool = False) -> None:
    """Skip what has no kernel: eight corners, and the gradient of free corners."""
    if backend.name == "triton" and (fmt == "corners3d" or (gradient and fmt in ("xyxyxyxy", "polygons"))):
        pytest.skip("no kernel")
