"""`PolygonLoss` and the schedule of its alpha: values, gradients, masks, state, and what a training run does."""

from __future__ import annotations

import copy
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import oracle
from tests.conftest import INTERPRETED
from tests.helpers import (
    INF,
    NAN,
    assert_close,
    assert_does_not_wait,
    assert_finite,
    assert_gradient_close,
    assert_same,
    assert_zero,
    convex,
    generator,
    numpy64,
    star,
    uniform,
)
from triton_mgiou import PAPER, PolygonLoss, mean_positives, mgiou_loss
from triton_mgiou.training import AlphaSchedule

MODES = ("mgiou", "l2", "hybrid")
ALPHA = 0.7


def make(mode, backend=None, **options):
    """With the paper's loss, and the options."""
    options |= {} if backend is None else {"backend": backend.name}
    return PolygonLoss(mode, alpha=ALPHA, **PAPER | options)


def sample(batch=6, size=5, device="cpu", dtype=torch.float32, seed=201):
    """Keypoints with a third number, a mask with holes and one sample without a visible vertex, and areas."""
    rng = generator(seed)
    pred, gt = star(batch, size, rng), convex(batch, size, rng)
    mask = uniform((batch, size), 0, 1, rng) < 0.7
    mask[-1] = False
    pred, gt = (torch.cat((p, uniform((batch, size, 1), -3, 3, rng)), dim=-1).to(dtype) for p in (pred, gt))
    area = uniform((batch, 1), 0.05, 2, rng).to(dtype)
    return tuple(tensor.to(device) for tensor in (pred, gt, mask, area))


def value_and_gradient(loss, pred, *rest, **options):
    pred = pred.detach().clone().requires_grad_()
    total, parts = loss(pred, *rest, **options)
    (gradient,) = torch.autograd.grad(total, pred)
    return total.detach(), gradient, parts


def l2_by_hand(pred, gt, mask, area, sigmas=None):
    """The keypoint loss of pose heads, every sigma one over the number of vertices; a value a sample."""
    losses = []
    sigmas = sigmas or [1 / pred.shape[1]] * pred.shape[1]
    for pred_row, gt_row, visible, box in zip(*map(numpy64, (pred, gt, mask, area.reshape(-1))), strict=True):
        total = 0.0
        for p, g, v, sigma in zip(pred_row, gt_row, visible, sigmas, strict=True):
            if v:
                squared = (p[0] - g[0]) ** 2 + (p[1] - g[1]) ** 2
                total += 1 - math.exp(-squared / ((2 * sigma) ** 2 * box * 2))
        losses.append(total / max(sum(visible != 0), 1))
    return losses


def by_hand(mode, pred, gt, mask, area, divisor, **options):
    """The loss and its parts."""
    sides = numpy64(pred)[..., :2], numpy64(gt)[..., :2]
    real = numpy64(mask) != 0
    mgiou = sum(oracle.per_sample_loss(*sides, pred_mask=real, target_mask=real, **options)) / divisor
    l2 = sum(l2_by_hand(pred, gt, mask, area)) / divisor
    total = {"mgiou": mgiou, "l2": l2, "hybrid": ALPHA * l2 + (1 - ALPHA) * mgiou}[mode]
    parts = {"mgiou": {"mgiou": mgiou}, "l2": {"l2": l2}, "hybrid": {"l2": l2, "mgiou": mgiou}}[mode]
    return total, parts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"axis_weight": "length", "convexity_weight": 0.5}])
@pytest.mark.parametrize("avg_factor", [None, 2.5])
def test_value_and_parts(backend, mode, options, avg_factor):
    given = sample(device=backend.device)
    divisor = 6 if avg_factor is None else avg_factor
    expected, expected_parts = by_hand(mode, *given, divisor, **options)
    for factor in {avg_factor, avg_factor and torch.tensor(avg_factor, device=backend.device)}:
        total, parts = make(mode, backend, **options)(*given, avg_factor=factor)
        assert total.dtype == torch.float32
        assert_close(total, expected, atol=1e-6)
        assert list(parts) == list(expected_parts)
        for name, part in parts.items():
            assert_close(part, expected_parts[name], atol=1e-6, what=name)
            assert not part.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_formula(backend, mode):
    """Its L2 term against one written with other operations, its MGIoU term against the function itself."""
    pred, gt, mask, area = sample(device=backend.device)
    _, gradient, _ = value_and_gradient(make(mode, backend), pred, gt, mask, area, avg_factor=4.0)

    leaf = pred.double().requires_grad_()
    distance = (leaf - gt)[..., :2].norm(dim=-1)
    squared = distance.square() / (8 * 0.2**2)
    l2 = sum((1 - (-d[m] / a).exp()).mean() for d, m, a in zip(squared, mask, area, strict=True) if m.any())
    masks = {"pred_mask": mask, "target_mask": mask}
    mgiou = mgiou_loss(leaf[..., :2], gt[..., :2].double(), avg_factor=4.0, backend="eager", **masks, **PAPER)
    total = {"mgiou": mgiou, "l2": l2 / 4, "hybrid": ALPHA * l2 / 4 + (1 - ALPHA) * mgiou}[mode]
    (expected,) = torch.autograd.grad(total, leaf)
    assert_gradient_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert_zero(gradient[..., 2], "gradient to the third number")


SIGMAS = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(("given", "each"), [(SIGMAS, SIGMAS), (torch.tensor(SIGMAS), SIGMAS), (0.3, [0.3] * 5)])
def test_sigmas(given, each):
    batch = sample()
    total, _ = make("l2", sigmas=given)(*batch)
    assert_close(total, sum(l2_by_hand(*batch, each)) / 6, atol=1e-6)


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x.astype(">f4"), lambda x: (10 * x).astype(">i4")])
def test_sigmas_of_an_array_in_another_order(change):
    given = change(np.array(SIGMAS))
    torch.testing.assert_close(make("l2", sigmas=given).sigmas, torch.tensor([float(each) for each in given]))


def test_sigmas_are_those_that_were_given():
    given, batch = torch.tensor(SIGMAS), sample()
    loss = make("l2", sigmas=given)
    given.fill_(1.0)
    assert_close(loss(*batch)[0], sum(l2_by_hand(*batch, SIGMAS)) / 6, atol=1e-6)


def test_sigmas_are_no_part_of_the_modules_state():
    assert make("l2", sigmas=SIGMAS).state_dict() == {}
    assert "sigmas=[0.1" in repr(make("l2", sigmas=0.1))


@pytest.mark.gpu
def test_sigmas_follow_the_module():
    assert make("l2", sigmas=SIGMAS).cuda().sigmas.is_cuda


@pytest.mark.parametrize(
    "move",
    [
        lambda loss: loss.half(),
        lambda loss: loss.bfloat16(),
        lambda loss: loss.to("meta").to_empty(device="cpu"),
        lambda loss: loss.to_empty(device="cpu"),
    ],
)
def test_sigmas_keep_their_values_where_the_module_is_moved(move):
    loss, batch = move(make("l2", sigmas=SIGMAS)), sample()
    assert_close(loss(*batch)[0], sum(l2_by_hand(*batch, SIGMAS)) / 6, atol=1e-6)
    assert "sigmas=[0.1" in repr(loss.to("meta"))


def test_sigmas_keep_their_values_where_new_tensors_have_none():
    with torch.device("meta"):
        loss = make("l2", sigmas=SIGMAS)
    batch = sample()
    assert_same(loss(*batch)[0], make("l2", sigmas=SIGMAS)(*batch)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_weight_and_reduction(backend, mode, reduction, weighted):
    given = sample(device=backend.device)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.3, 3.0], device=backend.device) if weighted else None
    each = [by_hand(mode, *(tensor[k : k + 1] for tensor in given), 1) for k in range(6)]
    factors = numpy64(weight) if weighted else [1.0] * 6
    divisor = 6 if reduction == "mean" else 1

    def reduced(values):
        weighed = [factor * value for factor, value in zip(factors, values, strict=True)]
        return weighed if reduction == "none" else sum(weighed) / divisor

    total, parts = make(mode, backend, reduction=reduction)(*given, weight=weight)
    assert_close(total, reduced([value for value, _ in each]), atol=1e-6)
    for name, part in parts.items():
        assert_close(part, reduced([of_sample[name] for _, of_sample in each]), atol=1e-6, what=name)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_positive_weight_the_loss_is_0_and_connected(mode):
    pred, *rest = sample()
    total, gradient, _ = value_and_gradient(make(mode), pred, *rest, weight=torch.tensor([0.0, -1, 0, 0, -2, 0]))
    assert_zero(total, "loss")
    assert_zero(gradient, "gradient")


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_alone(mode):
    given = sample()
    total, _ = make(mode)(*given)
    alone = make(mode, return_parts=False)(*given)
    assert alone.shape == ()
    assert_same(alone, total)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    pred, gt, mask, area = sample(batch=3, dtype=torch.float64)
    loss = make(mode, convexity_weight=0.5)
    pred.requires_grad_()
    gt.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, g: loss(p, g, mask, area)[0], (pred, gt))


@pytest.mark.parametrize("mode", MODES)
def test_equal_polygons_have_no_loss_and_no_gradient(backend, mode):
    _, gt, mask, area = sample(device=backend.device)
    total, gradient, _ = value_and_gradient(make(mode, backend), gt, gt, mask, area)
    assert_zero(total, "loss")
    assert_zero(gradient)


def test_small_distances_keep_their_digits():
    """1 - exp(-e) would be 0 where e is below 6e-8."""
    gt = torch.zeros(1, 1, 2)
    pred = gt + torch.tensor([3e-5, 4e-5])
    total, _ = make("l2")(pred, gt, torch.ones(1, 1), torch.ones(1))
    assert_close(total, 2.5e-9 / 8, atol=0, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [NAN, INF, 1e30])
def test_masked_vertices_do_not_exist(backend, mode, padding):
    pred, gt, mask, area = sample(device=backend.device)
    loss = make(mode, backend, convexity_weight=0.5)
    expected = value_and_gradient(loss, pred, gt, mask, area)
    hidden = ~mask.unsqueeze(-1)
    area[-1] = padding  # a sample without a visible vertex
    actual = value_and_gradient(loss, pred.masked_fill(hidden, padding), gt.masked_fill(hidden, padding), mask, area)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], "gradient")
    assert_zero(actual[1][~mask])
    assert_zero(actual[1][-1])


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_any_type_and_keypoints_of_two_or_three_numbers(backend, mode):
    pred, gt, mask, area = sample(device=backend.device)
    loss = make(mode, backend)
    expected, expected_parts = loss(pred, gt, mask, area)
    visibility = mask * torch.tensor([1, 2, 1, 2, 2], device=mask.device)  # COCO: 1 is occluded, 2 is in sight
    for other in (mask.float(), mask.half(), mask.to(torch.uint8), visibility, -mask.float()):
        assert_same(loss(pred, gt, other, area)[0], expected)
    for other in ((pred[..., :2], gt), (pred, gt[..., :2]), (pred[..., :2].contiguous(), gt[..., :2].contiguous())):
        total, parts = loss(*other, mask, area.squeeze(1))
        assert_same(total, expected)
        for name, part in parts.items():
            assert_same(part, expected_parts[name])


def test_options_reach_mgiou_loss(backend):
    pred, gt, mask, area = sample(size=8, device=backend.device)
    masks = {"pred_mask": mask, "target_mask": mask, "backend": backend.name}
    seen = set()
    for options in ({}, {"axis_weight": "soft"}, {"axis_grad": False}, {"convexity_weight": 2.0}):
        total, gradient, parts = value_and_gradient(make("mgiou", backend, **options), pred, gt, mask, area)
        leaf = pred[..., :2].clone().requires_grad_()
        expected = mgiou_loss(leaf, gt[..., :2], **masks, **PAPER | options)
        (expected_gradient,) = torch.autograd.grad(expected, leaf)
        assert_same(total, expected.detach())
        assert_same(gradient[..., :2], expected_gradient, "gradient")
        assert_same(parts["mgiou"], total)
        seen.add((total.item(), gradient.norm().item()))
    assert len(seen) == 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("area", [0.0, 1e-45, -1.0, 1e-6, 3e38])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-20, 1e-3, 1.0, 1e19, 3e38])
def test_any_finite_input_gives_a_finite_value_and_gradient(backend, mode, area, size):
    rng = generator(202)
    pred, gt = (uniform((8, 4, 2), -1, 1, rng).float().to(backend.device) * size for _ in "pg")
    gt[0] = pred[0]
    mask, areas = torch.ones(8, 4, device=backend.device), torch.full((8, 1), area, device=backend.device)
    total, gradient, parts = value_and_gradient(make(mode, backend), pred, gt, mask, areas)
    assert_finite(gradient, "gradient")
    assert 0 <= total <= 1
    assert all(0 <= part <= 1 for part in parts.values())


def test_an_area_below_the_least_counts_as_the_least():
    pred, gt, mask, _ = sample(size=4)
    gt[..., :2] = pred[..., :2] + 5e-4
    loss = make("l2")
    expected = value_and_gradient(loss, pred, gt, mask, torch.full((6,), 1e-6))
    assert 0.1 < expected[0] < 0.9
    for area in (0.0, -3.0, 1e-9):
        actual = value_and_gradient(loss, pred, gt, mask, torch.full((6,), area))
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1], "gradient")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1])
def test_a_visible_vertex_that_is_not_finite_spoils_its_sample_only(backend, mode, bad, side):
    given = list(sample(device=backend.device))
    given[2] = torch.ones_like(given[2])
    loss = make(mode, backend)
    _, expected, _ = value_and_gradient(loss, *given)
    given[side] = given[side].clone()
    given[side][2, 1, 0] = bad
    total, gradient, _ = value_and_gradient(loss, *given)
    assert total.isnan()
    assert gradient[2, 1, 0].isnan()
    others = [0, 1, 3, 4, 5]
    assert_same(gradient[others], expected[others], "gradient")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [None, 1.0, torch.tensor(1.0)])
def test_empty_batch(backend, mode, factor):
    """An image without objects: a zero that is connected to the graph, so that every process has gradients."""
    pred = torch.zeros(0, 4, 3, device=backend.device, requires_grad=True)
    rest = (torch.zeros(shape, device=backend.device) for shape in ((0, 4, 3), (0, 4), (0, 1)))
    total, parts = make(mode, backend)(pred, *rest, avg_factor=factor)
    assert_zero(total, "loss")
    for part in parts.values():
        assert_zero(part, "part")
    total.backward()
    assert pred.grad.shape == (0, 4, 3)


@pytest.mark.parametrize("mode", MODES)
def test_types(backend, mode):
    pred, gt, mask, area = sample(device=backend.device)
    loss = make(mode, backend)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = [tensor.to(dtype) for tensor in (pred, gt, area)]
        expected = value_and_gradient(loss, *(t.float() for t in rounded[:2]), mask, rounded[2].float())
        for enabled in (False, True):
            with torch.autocast(backend.device, dtype=dtype, enabled=enabled):
                total, gradient, _ = value_and_gradient(loss, *rounded[:2], mask, rounded[2])
            assert_same(total, expected[0])
            assert_same(gradient, expected[1].to(dtype), "gradient")
    assert loss(pred, gt.double(), mask, area)[0].dtype == torch.float64


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["l2", "hybrid"])
def test_compile_with_a_divisor_that_is_read_in_the_graph(backend, mode):
    """Of which the compiler knows nothing."""
    loss = make(mode, backend)
    given = sample(6, device=backend.device)

    def total(scores):
        return loss(*given, avg_factor=max(scores.sum().item(), 1))[0]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for score in (0.0, 0.5, 2.0):
            scores = torch.full((3,), score)
            assert_close(compiled(scores), loss(*given)[0] * 6 / max(3 * score, 1), atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_a_batch_size_and_an_alpha_that_change(backend):
    loss = PolygonLoss("hybrid", alpha=AlphaSchedule(4), backend=backend.name).to(backend.device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    factor = torch.tensor(3.0, device=backend.device)
    for seed, batch in enumerate([4, 7, 3, 16, 5]):
        given = sample(batch, device=backend.device, seed=seed)
        expected = value_and_gradient(loss, *given, avg_factor=factor)
        actual = value_and_gradient(compiled, *given, avg_factor=factor)
        assert_close(actual[0], expected[0], atol=1e-6)
        assert_gradient_close(actual[1], expected[1], rtol=1e-5)
        for name, part in expected[2].items():
            assert_close(actual[2][name], part, atol=1e-6)
        loss.alpha.step()
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("mode", MODES)
def test_no_value_of_a_tensor_is_looked_at(backend, mode):
    """A fake tensor has no values: whatever would wait for the GPU raises here."""
    given = sample(device=backend.device)
    loss = PolygonLoss(mode, alpha=AlphaSchedule(4), backend=backend.name)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        pred, *rest = (fake.from_tensor(tensor) for tensor in given)
        pred.requires_grad_()
        factor = mean_positives(fake.from_tensor(torch.ones(6, device=backend.device)).sum())
        loss(pred, *rest, avg_factor=factor)[0].backward()
        assert pred.grad.shape == given[0].shape


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_gpu(backend, mode):
    if backend.device != "cuda":
        pytest.skip("needs a GPU")
    pred, *rest = sample(device="cuda")
    pred.requires_grad_()
    loss = PolygonLoss(mode, alpha=AlphaSchedule(4), backend=backend.name).cuda()

    def step():
        total, _ = loss(pred, *rest, avg_factor=mean_positives((rest[1] != 0).any(1).sum()))
        total.backward()
        loss.alpha.step()

    assert_does_not_wait(step)


CURVES = {
    "cosine": lambda t: 0.2 + 0.35 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 0.9 - 0.7 * t,
    "step": lambda t: 0.9 if t < 0.5 else 0.2,
}


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("total_steps", [1, 7, 10])
def test_schedule(kind, total_steps):
    schedule = AlphaSchedule(total_steps, kind)
    for step in range(total_steps + 3):
        assert_close(schedule(), CURVES[kind](min(step / total_steps, 1)), atol=1e-6)
        schedule.step()
    assert_close(AlphaSchedule(5)(), 0.9, atol=1e-6)
    assert_same(AlphaSchedule(5, "cosine")(), AlphaSchedule(5)())


def test_schedule_from_and_to_other_numbers():
    schedule = AlphaSchedule(2, "linear", start=0, end=1.0)
    values = []
    for _ in range(4):
        values.append(schedule().item())
        schedule.step()
    assert values == [0.0, 0.5, 1.0, 1.0]


def test_alpha_is_the_weight_of_l2():
    """It starts high: at first the loss is mostly L2, at the end mostly MGIoU."""
    given = sample()
    loss = PolygonLoss("hybrid", alpha=AlphaSchedule(4))
    for alpha in (0.9, None, 0.55, None, 0.2, 0.2):
        total, parts = loss(*given)
        if alpha is not None:
            assert_close(total, alpha * parts["l2"] + (1 - alpha) * parts["mgiou"], atol=1e-6)
        loss.alpha.step()
    for alpha, name in ((1, "l2"), (0, "mgiou")):
        assert_same(PolygonLoss("hybrid", alpha=alpha)(*given)[0], PolygonLoss(name)(*given)[0])


def test_any_module_may_give_alpha():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self):
            return self.logit.sigmoid()

    loss = PolygonLoss("hybrid", alpha=Learned())
    total, parts = loss(*sample())
    (gradient,) = torch.autograd.grad(total, loss.parameters())
    sigmoid = 1 / (1 + math.exp(-0.3))
    assert_close(gradient, sigmoid * (1 - sigmoid) * (parts["l2"] - parts["mgiou"]), atol=1e-6)


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self):
        return self.value


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_with_an_alpha_of_numpy(fullgraph):
    loss = PolygonLoss("hybrid", alpha=np.float64(0.5), return_parts=False)
    got = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")(*sample())
    assert_close(got, PolygonLoss("hybrid", alpha=0.5)(*sample())[0], atol=1e-6)
    assert got.dtype == torch.float32


class Giving(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.given = value

    def forward(self):
        return self.given


def test_alpha_of_a_module_is_one_number():
    total, parts = PolygonLoss("hybrid", alpha=Constant(torch.tensor([0.5], dtype=torch.float64)))(*sample())
    assert_same(total, 0.5 * parts["l2"] + 0.5 * parts["mgiou"])
    with pytest.raises(ValueError, match=r"^alpha must have one element, got shape \(2,\)"):
        PolygonLoss("hybrid", alpha=Constant(torch.ones(2)))(*sample())


def test_what_a_module_gives_for_alpha_is_checked_as_alpha_is():
    given = sample()
    for wrong in (None, "0.5", [0.5], np.array(0.5), True):
        with pytest.raises(TypeError, match=rf"^alpha must be a number, got {type(wrong).__name__}"):
            PolygonLoss("hybrid", alpha=Giving(wrong))(*given)
    for wrong in (1.5, -0.1, math.nan, np.float32(2)):
        with pytest.raises(ValueError, match=rf"^alpha must be in 0\.\.1, got {wrong}"):
            PolygonLoss("hybrid", alpha=Giving(wrong))(*given)
    for right in (1, 0.5, np.float32(0.5)):
        want = PolygonLoss("hybrid", alpha=float(right))(*given)[0]
        assert_same(PolygonLoss("hybrid", alpha=Giving(right))(*given)[0], want)


def test_state_dict():
    given = sample()
    loss = PolygonLoss("hybrid", alpha=AlphaSchedule(10))
    first = loss(*given)[0]
    for _ in range(4):
        loss.alpha.step()
    state = copy.deepcopy(loss.state_dict())
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"alpha.step_count": 4}

    resumed = PolygonLoss("hybrid", alpha=AlphaSchedule(10))
    assert_same(resumed(*given)[0], first)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert resumed(*given)[0] != first
    for _ in range(3):
        assert_same(resumed(*given)[0], loss(*given)[0])
        resumed.alpha.step()
        loss.alpha.step()
    assert PolygonLoss("hybrid", alpha=0.5).state_dict() == {}
    assert list(loss.parameters()) == []


def test_half_precision_of_the_module_leaves_the_schedule_alone():
    schedule = AlphaSchedule(10).half()
    for _ in range(3):
        schedule.step()
    assert_close(schedule(), CURVES["cosine"](0.3), atol=1e-6)


def test_repr_and_copies():
    loss = PolygonLoss("hybrid", alpha=AlphaSchedule(10, "linear", end=0.1), axis_weight="soft")
    for part in ("mode='hybrid'", "AlphaSchedule(total_steps=10, kind='linear', start=0.9, end=0.1)", "'soft'"):
        assert part in repr(loss)
    assert "mode='hybrid', alpha=0.5" in repr(PolygonLoss("hybrid", alpha=0.5))
    assert "mode='l2', reduction='sum'" in repr(PolygonLoss("l2", reduction="sum"))
    loss.alpha.step()
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(again) == repr(loss)
        assert_same(again(*sample())[0], loss(*sample())[0])


@pytest.mark.skipif(INTERPRETED, reason="the other run has it")
@pytest.mark.parametrize(
    ("mode", "options"), [("l2", {}), ("hybrid", {}), ("hybrid", PAPER | {"axis_grad": False})], ids=str
)
def test_polygons_learn_their_targets_vertex_by_vertex(mode, options):
    """From random vertices, most of them in a wrong order; MGIoU alone does not know which vertex is which."""
    rng = generator(203)
    gt = convex(6, 5, rng).float()
    pred = uniform((6, 5, 2), -1, 1, rng).float().requires_grad_()
    loss = PolygonLoss(mode, alpha=AlphaSchedule(300), **options)
    optimizer = torch.optim.Adam([pred], lr=0.02)
    for _ in range(300):
        total, _ = loss(pred, gt, torch.ones(6, 5), torch.full((6,), 4.0))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        loss.alpha.step()
    assert (pred - gt).norm(dim=-1).max() < 0.05


KEYPOINTS, MASK, AREA = torch.zeros(4, 5, 3), torch.ones(4, 5), torch.ones(4, 1)
WRONG = {
    # name: (changed arguments, error, what the message begins with, what it says besides)
    "pred_kpts a list": ({"pred_kpts": [[[0.0, 0.0]]]}, TypeError, "pred_kpts", ["torch.Tensor", "list"]),
    "gt_kpts None": ({"gt_kpts": None}, TypeError, "gt_kpts", ["torch.Tensor", "NoneType"]),
    "kpt_mask None": ({"kpt_mask": None}, TypeError, "kpt_mask", ["torch.Tensor", "NoneType"]),
    "area a number": ({"area": 1.0}, TypeError, "area", ["torch.Tensor", "float"]),
    "pred_kpts flat": ({"pred_kpts": torch.zeros(4, 15)}, ValueError, "pred_kpts", ["(B, N, 2)", "(4, 15)"]),
    "four numbers": ({"pred_kpts": torch.zeros(4, 5, 4)}, ValueError, "pred_kpts", ["(B, N, 3)", "(4, 5, 4)"]),
    "no vertices": ({"gt_kpts": torch.zeros(4, 0, 2)}, ValueError, "gt_kpts", ["N >= 1", "(4, 0, 2)"]),
    "integers": ({"gt_kpts": KEYPOINTS.long()}, TypeError, "gt_kpts", ["floating", "torch.int64"]),
    "other batch": ({"gt_kpts": torch.zeros(3, 5, 3)}, ValueError, "gt_kpts", ["4 samples of 5", "(3, 5, 3)"]),
    "other vertices": ({"gt_kpts": torch.zeros(4, 6, 3)}, ValueError, "gt_kpts", ["4 samples of 5", "(4, 6, 3)"]),
    "mask of another shape": ({"kpt_mask": torch.ones(4, 5, 1)}, ValueError, "kpt_mask", ["(4, 5)", "(4, 5, 1)"]),
    "area of another shape": ({"area": torch.ones(1, 4)}, ValueError, "area", ["(4, 1)", "(4,)", "(1, 4)"]),
    "mask elsewhere": ({"kpt_mask": MASK.to("meta")}, ValueError, "kpt_mask", ["device", "meta"]),
    "area elsewhere": ({"area": AREA.to("meta")}, ValueError, "area", ["device", "meta"]),
    "avg_factor negative": ({"avg_factor": -1}, ValueError, "avg_factor", ["0 or above"]),
    "avg_factor of two": ({"avg_factor": torch.ones(2)}, ValueError, "avg_factor", ["one element", "(2,)"]),
    "weight of another batch": ({"weight": torch.ones(3)}, ValueError, "weight", ["(4,)", "(3,)"]),
    "weight a list": ({"weight": [1.0] * 4}, TypeError, "weight", ["torch.Tensor", "list"]),
    "avg_factor a string": ({"avg_factor": "4"}, TypeError, "avg_factor", ["number", "str"]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("changed", "error", "name", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(mode, changed, error, name, words):
    given = {"pred_kpts": KEYPOINTS, "gt_kpts": KEYPOINTS, "kpt_mask": MASK, "area": AREA} | changed
    with pytest.raises(error, match=f"^{name} must ") as caught:
        make(mode)(**given)
    assert [word for word in words if word not in str(caught.value)] == []


def test_wrong_options():
    with pytest.raises(ValueError, match=r"^mode must be one of 'mgiou', 'l2', 'hybrid', got 'iou'"):
        PolygonLoss("iou")
    with pytest.raises(TypeError, match=r"^alpha must be a number or a module such as AlphaSchedule, got NoneType"):
        PolygonLoss("hybrid")
    for mode in MODES:
        with pytest.raises(TypeError, match=r"^alpha must .*str"):
            PolygonLoss(mode, alpha="cosine")
        with pytest.raises(TypeError, match=r"^alpha must .*bool"):
            PolygonLoss(mode, alpha=True)
        for value in (-0.1, 1.1, NAN):
            with pytest.raises(ValueError, match=rf"^alpha must be in 0\.\.1, got {value}"):
                PolygonLoss(mode, alpha=value)
        for wrong in ("axis_wieght", "loss_weight"):
            with pytest.raises(TypeError, match=rf"^options must be among axis_weight, .*, got {wrong}$"):
                PolygonLoss(mode, alpha=0.5, **{wrong: 1.0})
        with pytest.raises(ValueError, match=r"^reduction must be one of 'none', 'mean', 'sum', got 'max'"):
            PolygonLoss(mode, alpha=0.5, reduction="max")
        for sigmas in (0.0, -0.1, NAN, INF, [0.1, 0.0], []):
            with pytest.raises(ValueError, match=r"^sigmas must be finite numbers above 0, got \["):
                PolygonLoss(mode, alpha=0.5, sigmas=sigmas)
        for sigmas in ("x", 1j, 10**400, ["0.1", None], [[0.1], [0.1, 0.2]], {0: 0.1}, np.array([0.1 + 0.1j] * 5)):
            with pytest.raises(TypeError, match=r"^sigmas must be numbers above 0, got "):
                PolygonLoss(mode, alpha=0.5, sigmas=sigmas)
        for sigmas in (
            True,
            [True] * 5,
            np.bool_(True),
            [np.bool_(True)] * 5,
            np.ones(5, dtype=bool),
            torch.ones(5, dtype=torch.bool),
        ):
            with pytest.raises(TypeError, match=r"^sigmas must be numbers above 0, got "):
                PolygonLoss(mode, alpha=0.5, sigmas=sigmas)
        with pytest.raises(TypeError, match=r"^alpha must be a number, got Fraction"):
            PolygonLoss(mode, alpha=Fraction(1, 2))
        with pytest.raises(TypeError, match=r"^return_parts must be a bool, got str"):
            PolygonLoss(mode, alpha=0.5, return_parts="no")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: torch.complex(t, t), "got torch.complex64"),
        (lambda t: t.to(torch.float8_e5m2), "got torch.float8_e5m2"),
        (torch.Tensor.to_mkldnn, "got layout torch._mkldnn: pass sigmas.to_dense()"),
        (lambda t: torch.masked.masked_tensor(t, t > 0), "got a MaskedTensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.01, 0, torch.quint8), "got a quantized one"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(MaskedTensors|quantize)")
def test_sigmas_that_are_no_plain_tensor(change, words):
    with pytest.raises(TypeError, match=f"^sigmas must .*{re.escape(words)}"):
        PolygonLoss("l2", sigmas=change(torch.tensor(SIGMAS)))


@pytest.mark.parametrize("mode", ["l2", "hybrid"])
def test_sigmas_of_another_number(mode):
    loss = PolygonLoss(mode, alpha=0.5, sigmas=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"^sigmas must be one or 5 numbers, got 3"):
        loss(*sample())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_steps": 2.5}, TypeError, "total_steps must be an integer, got float"),
        ({"total_steps": True}, TypeError, "total_steps must be an integer, got bool"),
        ({"total_steps": 0}, ValueError, "total_steps must be 1 or above, got 0"),
        ({"total_steps": 10**30}, ValueError, r"total_steps must be below 2\^63, got 10+"),
        ({"kind": np.array(["linear", "step"])}, ValueError, r"kind must be one of .*, got array\(.*"),
        ({"kind": "exponential"}, ValueError, "kind must be one of 'cosine', 'linear', 'step', got 'exponential'"),
        ({"start": 1.5}, ValueError, r"start must be in 0\.\.1, got 1\.5"),
        ({"end": NAN}, ValueError, "end must be finite, got nan"),
        ({"end": "0"}, TypeError, "end must be a number, got str"),
    ],
)
def test_wrong_arguments_of_the_schedule(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        AlphaSchedule(**{"total_steps": 5} | arguments)


def test_mean_positives_of_one_process():
    for given, expected in ((torch.tensor(7), 7), (torch.tensor([0]), 1), (torch.tensor([[2.5]]), 2.5)):
        mean = mean_positives(given)
        assert mean.shape == ()
        assert mean.dtype == torch.float32
        assert mean == expected
    assert mean_positives(torch.tensor(3.0, dtype=torch.float64)).dtype == torch.float64
    counted = torch.tensor(0.0, requires_grad=True)
    assert not mean_positives(counted).requires_grad
    assert counted == 0
    with pytest.raises(TypeError, match=r"^num_positives must be a torch\.Tensor, got int"):
        mean_positives(3)
    with pytest.raises(ValueError, match=r"^num_positives must have one element, got shape \(2,\)"):
        mean_positives(torch.ones(2))
