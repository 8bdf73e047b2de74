"""Random boxes of every format, and what each format allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.boxes import oracle
from tests.helpers import uniform

CLOSED = ("cxcywhr", "cxcywh", "xyxy", "cxcyczlwhr")  # the formats with a closed form
FORMATS = (*CLOSED, "corners3d")
SPACE = ("cxcyczlwhr", "corners3d")
ANGLED = ("cxcywhr", "cxcyczlwhr")

formats = pytest.mark.parametrize("fmt", FORMATS)
closed_formats = pytest.mark.parametrize("fmt", CLOSED)


def random_boxes(fmt: str, batch: int, rng: torch.Generator, smallest: float = 0.3, largest: float = 1.5) -> Tensor:
    """Boxes in float64 that mostly overlap; angles are radians, of several turns."""
    if fmt == "corners3d":
        numbers = random_boxes("cxcyczlwhr", batch, rng, smallest, largest)
        return corners3d(numbers) + 0.05 * torch.randn(batch, 8, 3, generator=rng, dtype=torch.float64)
    dimensions = 3 if fmt == "cxcyczlwhr" else 2
    centre = uniform((batch, dimensions), -0.7, 0.7, rng)
    size = uniform((batch, dimensions), smallest, largest, rng)
    if fmt == "xyxy":
        return torch.cat((centre - size / 2, centre + size / 2), dim=1)
    if fmt == "cxcywh":
        return torch.cat((centre, size), dim=1)
    return torch.cat((centre, size, uniform((batch, 1), -7, 7, rng)), dim=1)


def corners3d(numbers: Tensor) -> Tensor:
    """The eight corners of boxes (B, 7), by the oracle."""
    return torch.tensor([oracle.corners(box, "cxcyczlwhr") for box in numbers.tolist()], dtype=torch.float64)


def in_degrees(boxes: Tensor) -> Tensor:
    """The same boxes with their angle in degrees."""
    return torch.cat((boxes[:, :-1], boxes[:, -1:] * (180 / math.pi)), dim=1)


def options_of(fmt: str, **options: Any) -> dict[str, Any]:
    """The options without those that the format does not have."""
    if fmt in SPACE:
        options = options | {"axis_weight": "uniform", "boundary_weight": 0.0}
    return options


def oracle_options(fmt: str, **options: Any) -> dict[str, Any]:
    """What the oracle takes of them."""
    if fmt in SPACE:
        return {}
    return {name: options[name] for name in ("axis_weight", "boundary_weight") if name in options}
