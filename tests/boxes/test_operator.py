"""The kernel of boxes as an operator of PyTorch's, compiled, and warmed up."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from tests.boxes.helpers import FORMATS, SPACE, formats, options_of, random_boxes
from tests.helpers import assert_close, assert_gradient_close, assert_same, generator
from triton_mgiou import BoxMGIoULoss, box_mgiou_loss


@pytest.fixture
def kernels(boxes):
    if boxes.name != "triton":
        pytest.skip("is about the kernels")
    importlib.import_module("triton_mgiou.ops")  # registers the operator
    return boxes


@pytest.mark.parametrize("rule", ["sum", "none"])
@formats
def test_opcheck(kernels, fmt, rule):
    rng = generator(5)
    sides = [random_boxes(fmt, 6, rng).float().to(kernels.device).requires_grad_() for _ in range(2)]
    weight = torch.rand(6, device=kernels.device)
    boundary_weight = (0.0, None) if fmt in SPACE else (0.0, torch.tensor(0.3, dtype=torch.float64))
    arguments = (*sides, weight, rule, fmt, "radians", True, "uniform", True, *boundary_weight, True, True)
    torch.library.opcheck(torch.ops.triton_mgiou.box_loss.default, arguments)


@formats
def test_the_operator_is_the_direct_path(kernels, fmt):
    rng = generator(6)
    sides = [random_boxes(fmt, 6, rng).float().to(kernels.device).requires_grad_() for _ in range(2)]
    options = options_of(fmt, axis_weight="uniform", axis_grad=True, boundary_weight=0.25)
    direct = box_mgiou_loss(*sides, fmt=fmt, reduction="sum", backend="triton", **options)
    boundary_weight = options["boundary_weight"]
    operator = torch.ops.triton_mgiou.box_loss(
        *sides, None, "sum", fmt, "radians", True, "uniform", True, boundary_weight, None, True, True
    )[0]
    assert_same(direct.detach(), operator.detach())
    for got, want in zip(torch.autograd.grad(operator, sides), torch.autograd.grad(direct, sides), strict=True):
        assert_same(got, want)


def test_no_second_derivative(kernels):
    rng = generator(7)
    pred, target = (random_boxes("cxcywhr", 3, rng).float().to(kernels.device) for _ in range(2))
    loss = box_mgiou_loss(pred.requires_grad_(), target, backend="triton")
    with pytest.raises(RuntimeError, match=r'no second derivative.*backend="eager"'):
        torch.autograd.grad(loss, pred, create_graph=True)


@pytest.mark.parametrize("fmt", [*FORMATS, "xyxyxyxy"])
def test_compiled(boxes, fmt):
    """Under torch.compile, without a break of the graph, at more than one batch size."""
    rng = generator(8)
    torch.compiler.reset()
    options = {"fmt": fmt, "backend": boxes.name}
    compiled = torch.compile(
        lambda p, g, w: box_mgiou_loss(p, g, weight=w, **options), fullgraph=True, backend="aot_eager"
    )
    for batch in (4, 7, 9):
        if fmt == "xyxyxyxy":
            pred, target = (torch.rand(batch, 8, generator=rng) for _ in range(2))
        else:
            pred, target = (random_boxes(fmt, batch, rng).float() for _ in range(2))
        pred, target = pred.to(boxes.device).requires_grad_(), target.to(boxes.device)
        weight = torch.rand(batch, generator=rng).to(boxes.device)
        want = box_mgiou_loss(pred, target, weight=weight, **options)
        got = compiled(pred, target, weight)
        assert_close(got, want, atol=1e-7)
        (wanted,) = torch.autograd.grad(want, pred)
        assert_gradient_close(torch.autograd.grad(got, pred)[0], wanted, rtol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@formats
def test_compiled_with_a_batch_that_a_mask_selects(boxes, fmt):
    """Of how many there are the compiler knows nothing, and there may be none."""
    rng = generator(12)
    pred, target = (random_boxes(fmt, 6, rng).float().to(boxes.device) for _ in range(2))
    pred.requires_grad_()

    def loss(pred, target, is_positive):
        return box_mgiou_loss(pred[is_positive], target[is_positive], fmt=fmt, backend=boxes.name)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (3, 0, 6):
            is_positive = torch.arange(6, device=boxes.device) < count
            got, want = compiled(pred, target, is_positive), loss(pred, target, is_positive)
            assert_close(got, want, atol=1e-7)
            assert_gradient_close(*(torch.autograd.grad(each, pred)[0] for each in (got, want)), rtol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_divisor_that_is_read_in_the_graph(boxes):
    """Of which the compiler knows nothing."""
    rng = generator(13)
    pred, target = (random_boxes("cxcywhr", 6, rng).float().to(boxes.device) for _ in range(2))

    def loss(scores):
        return box_mgiou_loss(pred, target, avg_factor=max(scores.sum().item(), 1), backend=boxes.name)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    total = box_mgiou_loss(pred, target, reduction="sum", backend=boxes.name)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for score in (0.0, 0.5, 2.0):
            assert_close(compiled(torch.full((3,), score)), total / max(3 * score, 1), atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_compiled_with_numbers_of_numpy(boxes, kind, fullgraph):
    """To the compiler they are arrays of float64."""
    rng = generator(14)
    pred, target = (random_boxes("cxcywhr", 6, rng).float().to(boxes.device) for _ in range(2))
    loss = BoxMGIoULoss(loss_weight=kind(3), boundary_weight=kind(1), backend=boxes.name)
    got = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")(pred, target, avg_factor=kind(2))
    want = box_mgiou_loss(pred, target, boundary_weight=1.0, reduction="sum", backend=boxes.name) * 1.5
    assert got.dtype == torch.float32
    assert_close(got, want, atol=2e-6)


@formats
@pytest.mark.parametrize("axis_weight", ["uniform", "length", "soft"])
def test_nothing_waits_for_the_device(fmt, axis_weight):
    """A step that reads a number on the host waits for the GPU, and cannot be captured as a CUDA graph."""
    rng = generator(9)
    pred, target = (random_boxes(fmt, 4, rng).requires_grad_() for _ in range(2))
    options = options_of(fmt, axis_weight=axis_weight, boundary_weight=0.25)
    weight = torch.rand(4, generator=rng)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        box_mgiou_loss(pred, target, fmt=fmt, weight=weight, backend="eager", **options).backward()
    assert {event.name for event in profile.events()}.isdisjoint(
        {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    )
