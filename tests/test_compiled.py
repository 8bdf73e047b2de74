"""The compiled kernels, run on a machine without a GPU by `tests/ptx_machine.py`, against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests import ptx
from tests.boxes.helpers import SPACE, random_boxes
from tests.boxes.test_kernels import compiled as compiled_boxes
from tests.helpers import assert_close, assert_gradient_close, convex, generator, regular, star
from tests.polygons.test_kernels import compiled as compiled_polygons
from tests.polygons.test_kernels import compiled_keypoints
from tests.ptx_machine import launch as run
from triton_mgiou import box_mgiou_loss, launch, mgiou_loss
from triton_mgiou.tuning import layouts

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter replaces the kernels")

DEFAULTS = {"axis_weight": "length", "axis_grad": False, "boundary_weight": 0.25}
UNIFORM = {"axis_weight": "uniform", "axis_grad": True, "boundary_weight": 0.0}
EVERYTHING = {"axis_weight": "soft", "axis_grad": True, "boundary_weight": 0.25, "convexity_weight": 0.5}
TOLERANCES = {torch.float32: (2e-6, 1e-4), torch.float64: (1e-12, 1e-9)}


def reference(loss, pred, target, **options):
    """The mean loss and its gradient; in the same type, in which what ties by rounding does so alike."""
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, target, backend="eager", **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def polygons_compiled(pred, target, large=False, **options):
    """The mean loss and its gradient by the compiled kernel."""
    (batch, n, _), m = pred.shape, target.shape[1]
    weights = {name: options.pop(name, 0.0) for name in ("boundary_weight", "convexity_weight")}
    terms = {name.removesuffix("_weight"): weight > 0 for name, weight in weights.items()}
    kernel = compiled_polygons(90, n, m, **options, **terms, even=(n | m) % 2 == 0, dtype=pred.dtype, large_batch=large)
    value, gradient = torch.empty(1, dtype=pred.dtype), torch.empty_like(pred)
    arguments = {
        "pred_ptr": pred, "target_ptr": target, "loss_ptr": value, "grad_ptr": gradient,
        "partial_ptr": torch.full((layouts.MAX_PROGRAMS,), math.nan, dtype=pred.dtype),
        "counter_ptr": torch.zeros(1, dtype=torch.int32),
        "pred_stride_b": n, "pred_stride_n": 1, "target_stride_b": m, "target_stride_n": 1,
        "pred_real_stride_b": 0, "pred_real_stride_n": 0, "target_real_stride_b": 0, "target_real_stride_n": 0,
        "weight_stride": 0, "batch": batch, "pred_size": n, "target_size": m, "divisor": float(batch), **weights,
    }  # fmt: skip
    buckets = layouts.bucket(n), layouts.bucket(m)
    grid = layouts.layout(*buckets, large, sum(terms.values()), pred.dtype == torch.float64).grid(batch)
    run(kernel, arguments, grid[0])
    assert arguments["counter_ptr"] == 0
    return value[0], gradient


@pytest.mark.parametrize("options", [DEFAULTS, UNIFORM, EVERYTHING], ids=["defaults", "uniform", "everything"])
@pytest.mark.parametrize(
    ("n", "m", "batch", "large"),
    [(4, 4, 70, False), (4, 4, 70, True), (8, 8, 9, False), (5, 11, 9, False), (12, 40, 3, False)],
)
def test_polygons(n, m, batch, large, options):
    rng = generator(n * m)
    pred, target = star(batch, n, rng).float(), convex(batch, m, rng).float()
    value, gradient = polygons_compiled(pred, target, large, **options)
    expected = reference(mgiou_loss, pred, target, **options)
    atol, rtol = TOLERANCES[torch.float32]
    assert_close(value, expected[0], atol=atol)
    assert_gradient_close(gradient, expected[1], rtol=rtol)


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_a_target_whose_vertices_are_sorted(turns):
    ordered = regular(11, torch.float32)
    pred = star(1, 6, generator(turns)).float()
    for target in (ordered[:, [turns * k % 11 for k in range(11)]], ordered.repeat(1, turns, 1)):
        value, gradient = polygons_compiled(pred, target.contiguous(), **DEFAULTS)
        expected = reference(mgiou_loss, pred, target, **DEFAULTS)
        assert_close(value, expected[0], atol=2e-6)
        assert_gradient_close(gradient, expected[1], rtol=1e-4)


@pytest.mark.parametrize("place", range(12))
def test_a_target_with_vertices_at_one_angle(place):
    """An H, whose arms' ends are at the angle of its inner corners, and each vertex as the last of another order."""
    quarter = torch.tensor([(3, 3), (1, 3), (1, 1)], dtype=torch.float32)
    target = torch.cat([quarter * torch.tensor(signs) for signs in [(1, 1), (-1, 1), (-1, -1), (1, -1)]])
    target = target[[5 * (k + place) % 12 for k in range(12)]].unsqueeze(0)
    pred = 3 * star(1, 6, generator(place)).float()
    value, gradient = polygons_compiled(pred, target, **DEFAULTS)
    expected = reference(mgiou_loss, pred, target, **DEFAULTS)
    assert_close(value, expected[0], atol=2e-6)
    assert_gradient_close(gradient, expected[1], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr", "cxcywh", "xyxy", "corners3d"])
@pytest.mark.parametrize(("batch", "packed"), [(1, True), (63, True), (150, True), (150, False)])
def test_boxes(fmt, dtype, batch, packed):
    rng = generator(batch)
    pred, target = (random_boxes(fmt, batch, rng).to(dtype) for _ in range(2))
    if batch == 150 and fmt != "corners3d":  # far away from each other for their sizes, which is the long way
        pred[3, 0] += 3e4
    options = {"axis_grad": True, "boundary_weight": 0.0 if fmt in SPACE else 0.25}
    kernel = compiled_boxes(fmt, pred_dtype=dtype, target_dtype=dtype, packed=packed, boundary=fmt not in SPACE)
    value, gradient = torch.empty(1, dtype=dtype), torch.empty_like(pred)
    strides = (*pred.stride(), 0)[:3]
    arguments = {
        "pred_ptr": pred, "target_ptr": target, "loss_ptr": value, "grad_ptr": gradient,
        "partial_ptr": torch.full((layouts.MAX_PROGRAMS,), math.nan, dtype=dtype),
        "counter_ptr": torch.zeros(1, dtype=torch.int32),
        **{f"{side}_stride_{axis}": strides[i] for side in ("pred", "target") for i, axis in enumerate("bnc")},
        "weight_stride": 0, "batch": batch, "divisor": float(batch), "boundary_weight": options["boundary_weight"],
    }  # fmt: skip
    numbers = int(np.prod(pred.shape[1:]))
    run(kernel, arguments, layouts.box_candidates(numbers, dtype == torch.float64, 132)[0].grid(batch)[0])
    expected = reference(box_mgiou_loss, pred, target, fmt=fmt, **options)
    atol, rtol = TOLERANCES[dtype]
    assert_close(value[0], expected[0], atol=atol)
    assert_gradient_close(gradient, expected[1], rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "size", "sigmas", "weighted"), [(70, 4, False, False), (5, 11, True, False), (3, 130, True, True)]
)
def test_keypoints(dtype, batch, size, sigmas, weighted):
    rng = generator(batch)
    target = convex(batch, size, rng).to(dtype)
    pred = (target + star(batch, size, rng) / size).to(dtype)
    visible = torch.rand(batch, size, generator=torch.Generator().manual_seed(size)) < 0.8
    area, weight = torch.linspace(0.1, 3, batch, dtype=dtype), torch.linspace(2, 0.5, batch, dtype=dtype)
    tolerances = torch.linspace(0.5, 1.5, size) / size
    kernel = compiled_keypoints(90, size, dtype, sigmas, weighted)
    value, gradient = torch.empty(1, dtype=dtype), torch.full_like(pred, math.nan)
    arguments = {
        "pred_ptr": pred, "target_ptr": target, "visible_ptr": visible.view(torch.uint8), "area_ptr": area,
        **({"sigmas_ptr": tolerances} if sigmas else {}), **({"weight_ptr": weight} if weighted else {}),
        "loss_ptr": value, "grad_ptr": gradient,
        "partial_ptr": torch.full((layouts.MAX_PROGRAMS,), math.nan, dtype=dtype),
        "counter_ptr": torch.zeros(1, dtype=torch.int32),
        **{f"{side}_stride_{axis}": pred.stride(i) for side in ("pred", "target") for i, axis in enumerate("bnc")},
        "visible_stride_b": size, "visible_stride_n": 1, "area_stride": 1, "sigmas_stride": 1, "weight_stride": 1,
        "batch": batch, "size": size, "divisor": float(batch), "sigma": 1 / size,
    }  # fmt: skip
    run(kernel, arguments, layouts.keypoint_layout(layouts.keypoints_of_tile(size), False).grid(batch)[0])
    leaf = pred.double().requires_grad_()
    sigma = tolerances.double() if sigmas else 1 / size
    lost = 1 - torch.exp(-(leaf - target).square().sum(-1) / (8 * sigma**2 * area.double().unsqueeze(-1)))
    expected = torch.where(visible, lost, 0).sum(1) / visible.sum(1).clamp(min=1)
    expected = (expected * (weight.double() if weighted else 1)).mean()
    assert_close(value[0], expected, atol=TOLERANCES[dtype][0])
    assert_gradient_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=TOLERANCES[dtype][1])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "("], r"--only: expected a regular expression, got '(': "),
        (["--only", "nonagon"], "--only: no variant's name has 'nonagon' in it, as 4-default-sm80 has"),
        (["--processes", "0"], "--processes: expected an integer of 1 or above, got '0'"),
    ],
)
def test_what_would_write_nothing_is_refused(arguments, error, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ptx.main([str(tmp_path / "folder"), *arguments])
    assert f"error: argument {error}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
