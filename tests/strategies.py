"""What hypothesis draws: pairs of polygons."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import POLYGONS, generator

LARGEST = torch.finfo(torch.float32).max
seeds = st.integers(0, 2**32 - 1)
any_float32 = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2**-149, -(2**-149), 2**-126, 1e-30, 1e-20, 1e20, 1e30, LARGEST, -LARGEST]),
    st.integers(-3, 3).map(float),
)


@st.composite
def pairs(
    draw: st.DrawFn, least: int = 3, most: int = 8, kinds: tuple[str, ...] = tuple(POLYGONS)
) -> tuple[Tensor, Tensor]:
    """Three samples of well-shaped polygons in float64, rounded to 12 binary digits after the point."""
    rng = generator(draw(seeds))
    kind = POLYGONS[draw(st.sampled_from(kinds))]
    pred = kind(3, draw(st.integers(least, most)), rng)
    target = kind(3, draw(st.integers(least, most)), rng)
    return (pred * 4096).round() / 4096, (target * 4096).round() / 4096


@st.composite
def any_polygons(draw: st.DrawFn, batch: int) -> Tensor:
    """Any finite float32, in shapes that are hard."""
    size = draw(st.integers(1, 5))
    values = draw(st.lists(any_float32, min_size=batch * size * 2, max_size=batch * size * 2))
    polygons = torch.tensor(values, dtype=torch.float32).reshape(batch, size, 2)
    shape = draw(st.sampled_from(["as drawn", "coincident", "horizontal", "diagonal", "one point"]))
    if shape == "coincident":
        polygons[:, -1] = polygons[:, 0]
    elif shape == "horizontal":
        polygons[..., 1] = polygons[:, :1, 1]
    elif shape == "diagonal":
        polygons[..., 1] = polygons[..., 0]
    elif shape == "one point":
        polygons[:] = polygons[:, :1]
    return polygons


@st.composite
def any_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Any finite float32 at all, with what polygons do in the worst case: points that meet, lines, equal polygons."""
    batch = draw(st.integers(1, 3))
    pred, target = draw(any_polygons(batch)), draw(any_polygons(batch))
    relation = draw(st.sampled_from(["as drawn", "equal", "one vertex in common"]))
    if relation == "equal":
        target = pred.clone()
    elif relation == "one vertex in common":
        target[:, 0] = pred[:, 0]
    return pred, target
