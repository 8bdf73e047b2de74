"""The L2 term of `PolygonLoss` by itself: how its numbers lie in memory, sizes, types, precision, derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import HAS_KERNELS, INTERPRETED
from tests.helpers import assert_close, assert_gradient_close, assert_same, generator, uniform
from triton_mgiou import PolygonLoss
from triton_mgiou.tuning import layouts

REDUCTIONS = [("none", None), ("mean", None), ("mean", 3.5), ("sum", None)]


def by_formula(pred, target, mask, area, sigmas=None):
    """Each sample's value, in float64, with operations that autograd differentiates."""
    pred, target, area = pred[..., :2].double(), target[..., :2].double(), area.double().reshape(-1)
    visible = mask != 0
    pred, target = (torch.where(visible.unsqueeze(-1), each, 0.0) for each in (pred, target))
    sigmas = torch.full((pred.shape[1],), 1 / pred.shape[1]) if sigmas is None else torch.as_tensor(sigmas)
    squared = (pred - target).square().sum(-1)
    lost = -torch.expm1(-squared / (8 * sigmas.to(pred).square() * area.unsqueeze(-1)))
    return lost.sum(1) / visible.sum(1).clamp(min=1)


def keypoints(batch, size, device, seed=0, reach=0.3):
    """Vertices about a tolerance from their targets, a mask with holes, areas from .05 to 2."""
    rng = generator(seed)
    target = uniform((batch, size, 2), -1 / size, 1 / size, rng).float()
    area = uniform((batch,), 0.05, 2, rng).float()
    pred = target + (reach / size * area.sqrt()[:, None, None] * uniform((batch, size, 2), -4, 4, rng)).float()
    mask = uniform((batch, size), 0, 1, rng) < 0.8
    return tuple(each.to(device) for each in (pred, target, mask, area))


def assert_right(backend, pred, target, mask, area, rtol=1e-5, sigmas=None):
    """Value and gradient are the formula's."""
    leaf = pred.detach().requires_grad_()
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name, reduction="none", sigmas=sigmas)
    got = loss(leaf, target, mask, area)
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    right = pred.detach().double().requires_grad_()
    values = by_formula(right, target, mask, area, sigmas)
    (right_gradient,) = torch.autograd.grad(values.sum(), right)
    assert_close(got, values, atol=rtol)
    assert gradient.dtype == pred.dtype
    assert_gradient_close(gradient, right_gradient, rtol=rtol)


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (33, 3), (130, 4), (7, 8), (5, 17), (3, 64), (2, 65), (2, 200)])
def test_sizes(backend, batch, size):
    assert_right(backend, *keypoints(batch, size, backend.device, seed=size))


@pytest.mark.parametrize("sigmas", [0.2, [0.05, 0.1, 0.2, 0.4, 0.8]])
def test_tolerances(backend, sigmas):
    assert_right(backend, *keypoints(6, 5, backend.device), sigmas=sigmas)


VIEWS = {
    "a part of more numbers": lambda x: torch.cat((x, x + 1), dim=-1)[..., : x.shape[-1]],
    "the other way round": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second sample": lambda x: torch.stack((x, x + 1), dim=1).flatten(0, 1)[::2],
    "from the second number on": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "one for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("side", ["pred", "target", "mask", "area"])
def test_any_place_in_memory(backend, side, view):
    given = dict(zip(("pred", "target", "mask", "area"), keypoints(9, 6, backend.device), strict=True))
    given[side] = VIEWS[view](given[side].float() if side == "mask" else given[side])  # whose bools lie as it does
    assert_right(backend, **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.int32])
def test_types(backend, dtype, kind):
    pred, target, mask, area = keypoints(6, 4, backend.device, seed=3)
    area = (area * 4).ceil().to(kind)
    rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert_right(backend, pred.to(dtype), target.to(dtype), mask, area, rtol=rtol)
    assert_right(backend, pred.to(dtype), target, mask, area, rtol=max(rtol, 1e-5))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_relative_precision_near_the_target(backend, dtype, rtol):
    """From 1e-18 of the tolerance to where the term is almost 1."""
    distance = torch.logspace(-18, 0.6, 120, dtype=dtype, device=backend.device)
    pred = torch.stack((distance, torch.zeros_like(distance)), dim=-1).unsqueeze(1).requires_grad_()
    ones = torch.ones(120, 1, device=backend.device)
    got = PolygonLoss("l2", return_parts=False, reduction="none", sigmas=0.5, backend=backend.name)(
        pred, torch.zeros_like(pred), ones, ones
    )
    (gradient,) = torch.autograd.grad(got.sum(), pred)
    exact = distance.double()
    seen = exact > 1e-18 if dtype == torch.float64 else exact > 1e-15  # squares of less are not normal in float32
    assert ((got.double() + exact.square().div(2).neg().expm1()).abs() <= rtol * got.abs())[seen].all()
    slope = exact * (-exact.square() / 2).exp()
    assert ((gradient[:, 0, 0].double() - slope).abs() <= 10 * rtol * torch.where(exact < 1, slope, 1.0)).all()


@pytest.mark.parametrize(("reduction", "avg_factor"), REDUCTIONS)
@pytest.mark.parametrize("weights", [0, 1, 2])
def test_reductions(backend, reduction, avg_factor, weights):
    """With no weight, one a sample, whose neighbours in memory are no weights, and two a sample."""
    batch = 300 if not backend.is_slow else 70
    pred, target, mask, area = keypoints(batch, 4, backend.device, seed=5)
    pairs = uniform((batch, 2), 0, 2, generator(6)).float().to(backend.device)
    weight = (None, pairs[:, 0], pairs)[weights]
    leaf = pred.clone().requires_grad_()
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name, reduction=reduction)
    got = loss(leaf, target, mask, area, avg_factor=avg_factor, weight=weight)
    right = pred.double().requires_grad_()
    values = by_formula(right, target, mask, area) * (1, pairs[:, 0], pairs.mean(1))[weights]
    if reduction != "none":
        values = values.sum() / ((avg_factor or batch) if reduction == "mean" else 1)
    upstream = torch.linspace(0.5, 2, batch, device=backend.device) if reduction == "none" else torch.tensor(1.5)
    (gradient,) = torch.autograd.grad(got, leaf, upstream.to(got))
    (right_gradient,) = torch.autograd.grad(values, right, upstream.to(values))
    assert_close(got, values, atol=2e-6 * max(1, values.abs().max().item()))
    assert_gradient_close(gradient, right_gradient, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_program_goes_on_with_other_samples(backend, reduction, monkeypatch):
    """As where the batch is larger than that of all programs."""
    monkeypatch.setattr(layouts.KeypointLayout, "grid", lambda *_: (2, 1, 1))
    pred, target, mask, area = keypoints(300, 3, backend.device, seed=11)
    leaf = pred.clone().requires_grad_()
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name, reduction=reduction)(leaf, target, mask, area)
    right = pred.double().requires_grad_()
    values = by_formula(right, target, mask, area)
    expected = values if reduction == "none" else values.mean()
    assert_close(loss, expected, atol=2e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert_gradient_close(gradient, torch.autograd.grad(expected.sum(), right)[0], rtol=1e-5)


def test_the_gradient_to_the_target_is_the_opposite(backend):
    pred, target, mask, area = keypoints(5, 4, backend.device, seed=7)
    sides = pred.requires_grad_(), target.requires_grad_()
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name)
    to_pred, to_target = torch.autograd.grad(loss(*sides, mask, area), sides)
    assert to_pred.abs().max() > 0
    assert_same(to_target, -to_pred)
    (alone,) = torch.autograd.grad(loss(pred.detach(), target, mask, area), target)
    assert_same(alone, to_target)


def test_area_and_tolerances_are_constants(backend):
    pred, target, mask, area = keypoints(3, 4, backend.device)
    loss = PolygonLoss("l2", return_parts=False, sigmas=torch.ones(4, requires_grad=True), backend=backend.name)
    assert not loss.to(backend.device)(pred, target, mask, area.requires_grad_()).requires_grad


def test_samples_do_not_touch_each_other(backend):
    """Each sample alone has the bits that it has in the batch, without a gradient too."""
    given = keypoints(20, 5, backend.device, seed=8)
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name, reduction="none")
    whole = loss(*given)
    alone = torch.cat([loss(*(each[k : k + 1] for each in given)) for k in range(0, 20, 7)])
    assert_same(alone, whole[::7])
    assert_same(loss(given[0].requires_grad_(), *given[1:]).detach(), whole)


def test_a_negated_view(backend):
    pred, target, mask, area = keypoints(4, 3, backend.device, seed=9)
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name)
    expected = loss(-pred, -target, mask, area)
    assert_close(
        loss(torch._neg_view(pred), torch._neg_view(target), mask, torch._neg_view(-area)), expected, atol=1e-6
    )
    assert_close(loss(-pred, -target, mask, torch._neg_view(-area)), expected, atol=1e-6)


def test_second_derivative(backend):
    pred, target, mask, area = keypoints(3, 4, backend.device, seed=10)
    leaf = pred.double().requires_grad_()
    loss = PolygonLoss("l2", return_parts=False, backend=backend.name)
    if backend.name == "eager":
        (first,) = torch.autograd.grad(loss(leaf, target, mask, area), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        right = leaf.detach().requires_grad_()
        (first,) = torch.autograd.grad(by_formula(right, target, mask, area).mean(), right, create_graph=True)
        assert_gradient_close(second, torch.autograd.grad(first.sum(), right)[0], rtol=1e-9)
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(leaf, target, mask, area), leaf, create_graph=True)


@pytest.mark.skipif(HAS_KERNELS and (INTERPRETED or torch.cuda.is_available()), reason="the kernels can run")
def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match='backend="triton" cannot run'):
        PolygonLoss("l2", backend="triton")(*keypoints(2, 4, "cpu"))


@pytest.mark.parametrize("area", [1.0, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_far_vertices_have_lost_everything_and_have_no_gradient(backend, area, sign):
    """Up to differences that no float32 holds."""
    far = sign * torch.tensor([1e2, 1e4, 1e19, 3e38], device=backend.device).view(-1, 1, 1).repeat(1, 1, 2)
    pred = far.clone().requires_grad_()
    ones = torch.ones(4, 1, device=backend.device)
    loss = PolygonLoss("l2", return_parts=False, reduction="none", sigmas=0.01, backend=backend.name)
    value = loss(pred, -far, ones, area * ones)
    assert value.tolist() == [1.0] * 4
    assert torch.autograd.grad(value.sum(), pred)[0].abs().sum() == 0


def test_an_area_that_is_no_number_spoils_its_sample_only(backend):
    """And not one without a visible vertex, which has no use for it."""
    pred, target, _, area = keypoints(3, 3, backend.device)
    area[1:] = math.nan
    visible = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]], device=backend.device)
    loss = PolygonLoss("l2", return_parts=False, reduction="none", backend=backend.name)
    value = loss(pred.requires_grad_(), target, visible, area)
    (gradient,) = torch.autograd.grad(value.sum(), pred)
    assert_close(value[0], by_formula(pred, target, visible, area)[0], atol=1e-6)
    assert value[1].isnan()
    assert value[2] == 0
    assert_same(gradient.isnan().any(-1), torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0]], device=pred.device).bool())
    assert gradient[:, 2].abs().sum() == gradient[2].abs().sum() == 0


def test_the_least_area(backend):
    """What is below 1e-6 counts as 1e-6: two distances to one formula."""
    pred = torch.tensor([[[3e-4, 0.0]], [[3e-4, 0.0]], [[3e-4, 0.0]]], device=backend.device)
    area = torch.tensor([1e-6, 1e-9, -1.0], device=backend.device)
    value = PolygonLoss("l2", return_parts=False, reduction="none", sigmas=0.25, backend=backend.name)(
        pred, torch.zeros_like(pred), torch.ones(3, 1, device=backend.device), area
    )
    assert_close(value, [1 - math.exp(-(3e-4**2) / (8 * 0.25**2 * 1e-6))] * 3, atol=1e-6)
