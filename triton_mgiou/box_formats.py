"""The formats of boxes: how many numbers each has, in which space, and which options its loss has.

Nothing here needs torch or Triton. Sections are those of `reference/DEFINITION.md`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton_mgiou.options import Options


class BoxFormat(NamedTuple):
    """What there is to know of a format besides its arithmetic."""

    shape: tuple[int, ...]  # of one box
    numbers: str  # what they are, for an error message
    defaults: Options
    axis_weights: tuple[str, ...] = ("uniform", "length", "soft")
    terms: tuple[str, ...] = ("boundary_weight",)
    has_angle: bool = False
    is_plane: bool = True


_PLANE = Options(axis_weight="uniform", axis_grad=True, convexity_weight=0.0, boundary_weight=0.25)
_SPACE = Options(axis_weight="uniform", axis_grad=True, convexity_weight=0.0, boundary_weight=0.0)
_FREE_CORNERS = Options()

FORMATS = {
    "cxcywhr": BoxFormat((5,), "centre x, y, width, height, angle", _PLANE, has_angle=True),
    "cxcywh": BoxFormat((4,), "centre x, y, width, height", _PLANE),
    "xyxy": BoxFormat((4,), "left, top, right, bottom", _PLANE),
    "xyxyxyxy": BoxFormat(
        (8,), "x, y of four free corners in order", _FREE_CORNERS, terms=("convexity_weight", "boundary_weight")
    ),
    "cxcyczlwhr": BoxFormat(
        (7,),
        "centre x, y, z, length along x, width along y, height, yaw",
        _SPACE,
        axis_weights=("uniform",),
        terms=(),
        has_angle=True,
        is_plane=False,
    ),
    "corners3d": BoxFormat(
        (8, 3), "x, y, z of eight corners", _SPACE, axis_weights=("uniform",), terms=(), is_plane=False
    ),
}


KERNEL_FORMATS = ("cxcywhr", "cxcywh", "xyxy", "cxcyczlwhr", "corners3d")  # a kernel's code is the place in this tuple


def defaults(fmt: str) -> dict[str, Any]:
    """The options that `box_mgiou_loss` takes for this format where none is given."""
    return FORMATS[fmt].defaults._asdict()
