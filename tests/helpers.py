"""Polygons to test with, and asserts that name the worst element, its place and both values."""

from __future__ import annotations

import math

import numpy as np
import torch

AXIS_WEIGHTS = ("uniform", "length", "soft")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def uniform(shape, low, high, rng):
    return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)


def _around(angles, radii, batch, rng):
    """Vertices at `angles` and `radii` on a random ellipse, turned and moved; (B, N, 2) in float64."""
    turn = uniform((batch, 1), 0, 2 * math.pi, rng)
    x = radii * angles.cos() * uniform((batch, 1), 0.5, 1.5, rng)
    y = radii * angles.sin() * uniform((batch, 1), 0.5, 1.5, rng)
    points = torch.stack((x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()), dim=-1)
    return points + uniform((batch, 1, 2), -0.8, 0.8, rng)


def _angles(batch, size, rng):
    steps = torch.arange(size, dtype=torch.float64) + uniform((batch, size), -0.3, 0.3, rng)
    return steps * (2 * math.pi / size)


def convex(batch, size, rng):
    """Strictly convex polygons in order."""
    return _around(_angles(batch, size, rng), torch.ones(batch, size, dtype=torch.float64), batch, rng)


def star(batch, size, rng):
    """Polygons with dents, in order."""
    return _around(_angles(batch, size, rng), uniform((batch, size), 0.3, 1.0, rng), batch, rng)


def crossing(batch, size, rng):
    """Vertices anywhere, so that most polygons cross themselves."""
    return uniform((batch, size, 2), -1, 1, rng)


POLYGONS = {"convex": convex, "star": star, "crossing": crossing}


def rectangle_corners(boxes):
    """Corners (B, 4, 2) of boxes (B, 5): x, y, w, h and the angle by which x turns towards y."""
    x, y, w, h, angle = boxes.unbind(-1)
    signs = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=boxes.dtype, device=boxes.device) / 2
    dx, dy = w.unsqueeze(1) * signs[:, 0], h.unsqueeze(1) * signs[:, 1]
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.stack((x.unsqueeze(1) + dx * cos - dy * sin, y.unsqueeze(1) + dx * sin + dy * cos), dim=-1)


def random_boxes(batch, rng):
    low = torch.tensor([-0.5, -0.5, 0.5, 0.5, -math.pi], dtype=torch.float64)
    high = torch.tensor([0.5, 0.5, 1.5, 1.5, math.pi], dtype=torch.float64)
    return low + (high - low) * torch.rand(batch, 5, generator=rng, dtype=torch.float64)


def regular(size, dtype=torch.float64):
    """One regular polygon, (1, N, 2)."""
    angles = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size) + 0.1
    return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(0).to(dtype)


def box(left, top, right, bottom, dtype=torch.float32):
    """One axis-aligned box, (1, 4, 2)."""
    return torch.tensor([[[left, top], [right, top], [right, bottom], [left, bottom]]], dtype=dtype)


def numpy64(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values, dtype=np.float64)


def numpy_options(**options):
    """The same options with numpy arrays in the place of tensors."""
    return {name: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for name, v in options.items()}


def _worst(score, actual, expected):
    """Name the element with the largest score."""
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(score)), actual.shape))
    off = abs(actual[place] - expected[place])
    return f"worst at {place}: got {actual[place]!r}, expected {expected[place]!r}, off by {off:.3e}"


def assert_does_not_wait(step):
    """Nothing in a step waits for the GPU, but for what is compiled or allocated once."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(actual, expected, *, atol, rtol=0.0, what="value"):
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


def assert_same(actual, expected, what="value"):
    """Type, shape and every element are the same; NaN equals NaN and 0 equals -0."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_close(actual, expected, atol=0.0, what=what)


def assert_gradient_close(actual, expected, *, rtol, atol=0.0, what="gradient"):
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


def assert_zero(values, what="gradient"):
    """Every element is exactly 0."""
    assert_close(values, np.zeros(tuple(values.shape)), atol=0.0, what=what)


def assert_finite(values, what="value"):
    values = numpy64(values)
    bad = ~np.isfinite(values)
    assert not bad.any(), f"{what}: {int(bad.sum())} of {values.size} not finite, first at {np.argwhere(bad)[0]}"
