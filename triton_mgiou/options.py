"""The options of the losses and the constants of the definition, for reference, kernels and callers.

Nothing here needs torch or Triton. Sections are those of `reference/DEFINITION.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
AXIS_WEIGHTS = ("uniform", "length", "soft")  # a kernel's code is the place in this tuple
BACKENDS = ("auto", "eager", "triton")
OVERS = ("mean", "min", "depth")  # what the matrix of all pairs takes over the axes
ABSENT = -1.0  # in that matrix: one of the two is not there

MIN_AXIS_LENGTH = 1e-6  # of the extent: a shorter edge is no axis under "uniform" weights (section 3)
SOFT_AXIS_LENGTH = 0.01  # of the extent: the edge whose "soft" weight is 1 - 1/e (section 3)

# By the bits of the type that is computed in. Coordinates are scaled to about 1, so squared lengths below TINY are far
# under their resolution and count as 0: no quotient can then overflow. A boundary term below RESOLUTION (more
# where the target is thin) is rounding and counts as 0: at the target itself value and gradient are exactly 0
# (sections 6 and 7).
TINY = {32: 2.0**-96, 64: 2.0**-800}
RESOLUTION = {32: 2.0**-20, 64: 2.0**-48}

# By the same bits: a polygon's projections on an axis that differ by less than this times |a_x| + |a_y| are equal but
# for the rounding of coordinates near 1, four units in their last place; but never more than this part of the polygon's
# own extent (section 4).
TIE = {32: 2.0**-21, 64: 2.0**-50}
WIDEST_TIE = 2.0**-15

# Of the L2 term of `PolygonLoss`: the least area, and the distance, in units of the tolerance, at which exp(-FAR^2) is
# 0 already, so that the squares of farther ones, which might overflow, are not needed.
MIN_AREA = 1e-6
FAR = 64.0


class Options(NamedTuple):
    """The options of a loss, as in `mgiou_loss`."""

    axis_weight: str = "length"
    axis_grad: bool = False
    convexity_weight: float = 0.0
    boundary_weight: float = 0.25


class Reduction(NamedTuple):
    """How a kernel reduces the samples' losses; by default not at all."""

    weight: Tensor | None = None  # (B,)
    rule: str = "none"  # as in `mgiou_loss`; the mean is the sum over B
    divisor: float | None = None  # of the sum


PAPER: dict[str, Any] = Options("uniform", True, 0.0, 0.0)._asdict()
"""The options that make the loss the paper's: `mgiou_loss(pred, target, **PAPER)`."""
