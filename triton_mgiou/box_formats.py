"""The formats of boxes: how many numbers each has, which options its loss has, and which of them are its defaults.

Nothing here needs torch or Triton. Sections are those of `reference/DEFINITION.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from triton_mgiou.options import AXIS_WEIGHTS, Options


class BoxFormat(NamedTuple):
    """A format without its arithmetic."""

    shape: tuple[int, ...]  # of one box
    numbers: str  # what they are
    defaults: Options
    axis_weights: tuple[str, ...] = AXIS_WEIGHTS
    terms: tuple[str, ...] = ("boundary_weight",)
    has_angle: bool = False
    in_space: bool = False


_PLANE = Options("uniform", axis_grad=True, convexity_weight=0.0, boundary_weight=0.25)
_SPACE = Options("uniform", axis_grad=True, convexity_weight=0.0, boundary_weight=0.0)

# The defaults come from bench/boxes/descent.py.
FORMATS = {
    "cxcywhr": BoxFormat((5,), "centre x, y, width, height, angle", _PLANE, has_angle=True),
    "cxcywh": BoxFormat((4,), "centre x, y, width, height", _PLANE),
    "xyxy": BoxFormat((4,), "left, top, right, bottom", _PLANE),
    "xyxyxyxy": BoxFormat(
        (8,), "x, y of four free corners in order", Options(), terms=("convexity_weight", "boundary_weight")
    ),
    "cxcyczlwhr": BoxFormat(
        (7,),
        "gravity centre x, y, z, length, width, height, yaw",
        _SPACE,
        axis_weights=("uniform",),
        terms=(),
        has_angle=True,
        in_space=True,
    ),
    "corners3d": BoxFormat(
        (8, 3),
        "x, y, z of eight corners, of which 0-1, 0-3 and 0-4 are edges",
        _SPACE._replace(axis_grad=False),
        axis_weights=("uniform",),
        terms=(),
        in_space=True,
    ),
}
KERNEL_FORMATS = ("cxcywhr", "cxcywh", "xyxy", "cxcyczlwhr", "corners3d")  # a kernel's code is the place in this tuple
PAIR_FORMATS = KERNEL_FORMATS[:4]  # those with a kernel of all pairs

AMBIGUOUS = {
    "xywhr": "torchvision's is a corner and degrees, Ultralytics' is a centre and radians, here 'cxcywhr'",
    "xywh": "torchvision's and COCO's is a corner and a size, Ultralytics' is a centre and a size, here 'cxcywh'",
}
"""Names that two libraries use for two things."""
