"""Polygons to test with, what several tests do, and asserts that name the worst element, its place and both values."""

from __future__ import annotations

import enum
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import device_mesh

NAN, INF = math.nan, math.inf
# `clamp(min=1e-9)` of a 0 in float16 is at its bound. There its derivative is 0 from PyTorch 2.14 on, and was 1 before.
CLAMP_STOPS_NAN = torch.__version__ >= "2.14"
BOTH = ("pred", "target")
AXIS_WEIGHTS = ("uniform", "length", "soft")
axis_weights = pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
axis_grads = pytest.mark.parametrize("axis_grad", [True, False])


class Name(str, enum.Enum):
    """Names of options as a configuration with types has them; the text of a member is not its value."""

    CXCYWHR = "cxcywhr"
    XYXY = "xyxy"
    POLYGONS = "polygons"
    DEGREES = "degrees"
    UNIFORM = "uniform"
    LENGTH = "length"
    SUM = "sum"
    MIN = "min"


@contextmanager
def one_process() -> Iterator[device_mesh.DeviceMesh]:
    """A process group of this process alone, and its device mesh."""
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield device_mesh.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(shape: Sequence[int], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)


def _around(angles: Tensor, radii: Tensor, batch: int, rng: torch.Generator) -> Tensor:
    """Vertices at `angles` and `radii` on a random ellipse, turned and moved; (B, N, 2) in float64."""
    turn = uniform((batch, 1), 0, 2 * math.pi, rng)
    x = radii * angles.cos() * uniform((batch, 1), 0.5, 1.5, rng)
    y = radii * angles.sin() * uniform((batch, 1), 0.5, 1.5, rng)
    points = torch.stack((x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()), dim=-1)
    return points + uniform((batch, 1, 2), -0.8, 0.8, rng)


def _angles(batch: int, size: int, rng: torch.Generator) -> Tensor:
    steps = torch.arange(size, dtype=torch.float64) + uniform((batch, size), -0.3, 0.3, rng)
    return steps * (2 * math.pi / size)


def convex(batch: int, size: int, rng: torch.Generator) -> Tensor:
    """Strictly convex polygons in order."""
    return _around(_angles(batch, size, rng), torch.ones(batch, size, dtype=torch.float64), batch, rng)


def star(batch: int, size: int, rng: torch.Generator) -> Tensor:
    """Polygons with dents, in order."""
    return _around(_angles(batch, size, rng), uniform((batch, size), 0.3, 1.0, rng), batch, rng)


def crossing(batch: int, size: int, rng: torch.Generator) -> Tensor:
    """Vertices anywhere, so that most polygons cross themselves."""
    return uniform((batch, size, 2), -1, 1, rng)


POLYGONS = {"convex": convex, "star": star, "crossing": crossing}
kinds = pytest.mark.parametrize("kind", POLYGONS)


def either_way(polygons: Tensor, rng: torch.Generator) -> Tensor:
    """Some in the other direction."""
    return torch.where(uniform((len(polygons), 1, 1), 0, 1, rng) < 0.5, polygons, polygons.flip(1))


def rectangle_corners(boxes: Tensor) -> Tensor:
    """Corners (B, 4, 2) of boxes (B, 5): x, y, w, h and the angle by which x turns towards y."""
    x, y, w, h, angle = boxes.unbind(-1)
    signs = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=boxes.dtype, device=boxes.device) / 2
    dx, dy = w.unsqueeze(1) * signs[:, 0], h.unsqueeze(1) * signs[:, 1]
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.stack((x.unsqueeze(1) + dx * cos - dy * sin, y.unsqueeze(1) + dx * sin + dy * cos), dim=-1)


def random_boxes(batch: int, rng: torch.Generator) -> Tensor:
    low = torch.tensor([-0.5, -0.5, 0.5, 0.5, -math.pi], dtype=torch.float64)
    high = torch.tensor([0.5, 0.5, 1.5, 1.5, math.pi], dtype=torch.float64)
    return low + (high - low) * torch.rand(batch, 5, generator=rng, dtype=torch.float64)


def regular(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One regular polygon, (1, N, 2)."""
    angles = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size) + 0.1
    return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(0).to(dtype)


def points(*vertices: tuple[float, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """One polygon of these vertices, (1, N, 2)."""
    return torch.tensor([vertices], dtype=dtype)


def box(left: float, top: float, right: float, bottom: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """One axis-aligned box, (1, 4, 2)."""
    return points((left, top), (right, top), (right, bottom), (left, bottom), dtype=dtype)


def value_and_gradient(
    loss: Callable[..., Tensor],
    pred: Tensor,
    target: Tensor,
    upstream: Tensor | None = None,
    wrt: Sequence[str] = ("pred",),
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return `loss(pred, target, **options)` and its gradient to each name in `wrt`."""
    tensors = {"pred": pred, "target": target}
    tensors = {name: tensor.detach().requires_grad_(name in wrt) for name, tensor in tensors.items()}
    value = loss(tensors["pred"], tensors["target"], **options)
    upstream = torch.ones_like(value) if upstream is None else upstream
    return value.detach(), *torch.autograd.grad(value, [tensors[name] for name in wrt], upstream)


def run_python(
    *arguments: str, timeout: float = 120, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this Python with these arguments and variables added to the environment, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | (environment or {}),
    )


def numpy64(values: Any) -> npt.NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values, dtype=np.float64)


def numpy_options(**options: Any) -> dict[str, Any]:
    """The same options with numpy arrays in the place of tensors."""
    return {name: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for name, v in options.items()}


def _worst(score: npt.NDArray[np.float64], actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> str:
    """Name the element with the largest score."""
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(score)), actual.shape))
    off = abs(actual[place] - expected[place])
    return f"worst at {place}: got {actual[place]!r}, expected {expected[place]!r}, off by {off:.3e}"


def assert_does_not_wait(step: Callable[[], object]) -> None:
    """Nothing in a step waits for the GPU, but for what is compiled or allocated once."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(actual: Any, expected: Any, *, atol: float, rtol: float = 0.0, what: str = "value") -> None:
    """Each element is within atol + rtol |expected|; a NaN or an Inf only equals itself."""
    actual, expected = numpy64(actual), numpy64(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore"):
        off = np.abs(actual - expected)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        wrong = ~(same | (off <= atol + rtol * np.abs(expected)))
    if wrong.any():
        score = np.where(wrong, np.where(np.isfinite(off), off, np.inf), -1.0)
        worst = _worst(score, actual, expected)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} wrong; {worst}, allowed {atol} + {rtol} |expected|"
        )


def assert_same(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    """Type, shape and every element are the same; NaN equals NaN and 0 equals -0."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_close(actual, expected, atol=0.0, what=what)


def assert_gradient_close(
    actual: Any, expected: Any, *, rtol: float, atol: float = 0.0, what: str = "gradient"
) -> None:
    """In each sample, the norm of the difference is within atol plus rtol times the norm of `expected`."""
    actual, expected = numpy64(actual), numpy64(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite at {np.argwhere(~np.isfinite(actual))[0]}"
    off = np.linalg.norm((actual - expected).reshape(len(actual), -1), axis=1)
    norm = np.linalg.norm(expected.reshape(len(actual), -1), axis=1)
    wrong = off > atol + rtol * norm
    if wrong.any():
        ratio = np.where(norm > 0, off / np.where(norm > 0, norm, 1), np.inf)
        b = int(np.argmax(np.where(wrong, ratio, -1.0)))
        worst = _worst(np.abs(actual[b] - expected[b]), actual[b], expected[b])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} samples wrong; sample {b} has relative norm {ratio[b]:.3e}, "
            f"allowed {rtol} and {atol} in all; {worst}"
        )


def assert_zero(values: Tensor, what: str = "gradient") -> None:
    """Every element is exactly 0."""
    assert_close(values, np.zeros(tuple(values.shape)), atol=0.0, what=what)


def assert_finite(values: Any, what: str = "value") -> None:
    values = numpy64(values)
    bad = ~np.isfinite(values)
    assert not bad.any(), f"{what}: {int(bad.sum())} of {values.size} not finite, first at {np.argwhere(bad)[0]}"
