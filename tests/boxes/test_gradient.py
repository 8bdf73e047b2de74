"""The gradient of `box_mgiou_loss` to the numbers of the boxes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.boxes import oracle
from tests.boxes.helpers import (
    ANGLED,
    SPACE,
    closed_formats,
    corners3d,
    formats,
    in_degrees,
    options_of,
    oracle_options,
    random_boxes,
)
from tests.helpers import (
    assert_close,
    assert_gradient_close,
    assert_same,
    assert_zero,
    axis_grads,
    axis_weights,
    generator,
    numpy64,
    rectangle_corners,
    uniform,
)
from triton_mgiou import PAPER, box_mgiou, box_mgiou_loss
from triton_mgiou.box_formats import FORMATS as ALL_FORMATS
from triton_mgiou.tuning import layouts


@formats
@axis_weights
@axis_grads
@pytest.mark.parametrize("boundary_weight", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-7)])
def test_against_the_oracle(boxes, fmt, dtype, rtol, *, axis_weight, axis_grad, boundary_weight):
    if fmt in SPACE and (axis_weight != "uniform" or boundary_weight):
        pytest.skip("the format does not have the option")
    rng = generator(31)
    batch = 12
    pred, target = random_boxes(fmt, batch, rng).to(dtype), random_boxes(fmt, batch, rng).to(dtype)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "boundary_weight": boundary_weight}
    _, to_pred, to_target = boxes.value_and_gradient(
        pred, target, wrt=("pred", "target"), fmt=fmt, reduction="sum", **options
    )
    exact = [numpy64(side) for side in (pred, target)]
    given = oracle_options(fmt, **options)
    assert_gradient_close(to_pred, oracle.gradient(*exact, fmt, axis_grad=axis_grad, **given), rtol=rtol)
    without_term = {name: 0.0 if name == "boundary_weight" else value for name, value in given.items()}
    want = oracle.gradient(*exact, fmt, side="target", axis_grad=axis_grad, **without_term)
    assert_gradient_close(to_target, want, rtol=rtol, what="gradient of target")


@pytest.mark.parametrize("fmt", ANGLED)
@axis_grads
@pytest.mark.parametrize(("angle", "clockwise"), [("degrees", True), ("degrees", False), ("radians", False)])
def test_units_and_directions_of_angles(boxes, fmt, axis_grad, angle, clockwise):
    if fmt in SPACE and not clockwise:
        pytest.skip("has one direction")
    rng = generator(32)
    pred, target = random_boxes(fmt, 12, rng), random_boxes(fmt, 12, rng)
    if angle == "degrees":
        pred, target = in_degrees(pred), in_degrees(target)
    convention = {"angle": angle, "clockwise": clockwise}
    options = options_of(fmt, axis_grad=axis_grad, boundary_weight=0.25, axis_weight="uniform")
    _, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="sum", **convention, **options)
    exact = [numpy64(side) for side in (pred, target)]
    want = oracle.gradient(*exact, fmt, **convention, axis_grad=axis_grad, **oracle_options(fmt, **options))
    assert_gradient_close(gradient, want, rtol=1e-7)
    assert_close(gradient[:, -1], want[:, -1], atol=1e-8, what="gradient to the angle")


@closed_formats
@axis_grads
def test_ties_share_evenly(boxes, fmt, axis_grad):
    """Boxes that share sides, middles or sizes: the mean of both one-sided slopes."""
    pairs = {
        "cxcywh": [((0, 0, 4, 2), (1, 0, 2, 2)), ((0, 0, 4, 2), (0, 0, 2, 2)), ((1, 1, 2, 2), (3, 1, 2, 2))],
        "xyxy": [((0, 0, 4, 2), (1, 0, 3, 2)), ((0, 0, 4, 2), (2, 0, 4, 4)), ((0, 0, 2, 2), (2, 0, 4, 2))],
        "cxcywhr": [((0, 0, 4, 2, 0), (1, 0, 2, 2, 0)), ((0, 0, 4, 2, 0), (0, 0, 2, 2, 0))],
        "cxcyczlwhr": [((0, 0, 0, 4, 2, 2, 0), (1, 0, 0, 2, 2, 2, 0)), ((0, 0, 1, 4, 2, 2, 0), (0, 0, 0, 2, 2, 4, 0))],
    }  # fmt: skip
    pred, target = (torch.tensor([pair[i] for pair in pairs[fmt]], dtype=torch.float32) for i in (0, 1))
    options = options_of(fmt, axis_grad=axis_grad, axis_weight="uniform", boundary_weight=0.0)
    _, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="sum", **options)
    want = oracle.gradient(numpy64(pred), numpy64(target), fmt, axis_grad=axis_grad, **oracle_options(fmt, **options))
    assert_gradient_close(gradient, want, rtol=1e-5)


@formats
@axis_weights
def test_gradcheck(fmt, axis_weight):
    if fmt in SPACE and axis_weight != "uniform":
        pytest.skip("the format does not have the option")
    rng = generator(33)
    pred, target = (random_boxes(fmt, 4, rng).requires_grad_() for _ in range(2))

    def loss(pred, target, boundary_weight):
        options = options_of(fmt, axis_weight=axis_weight, axis_grad=True, boundary_weight=boundary_weight)
        return box_mgiou_loss(pred, target, fmt=fmt, reduction="none", backend="eager", **options)

    assert torch.autograd.gradcheck(lambda p, t: loss(p, t, 0.0), (pred, target), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda p: loss(p, target.detach(), 0.25), (pred,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda p: loss(p, target.detach(), 0.25), (pred,))


@pytest.mark.parametrize("fmt", ANGLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quarters", [3, -3, 5, 101])
def test_the_second_derivative_at_many_quarter_turns(fmt, dtype, quarters):
    """Where the cosine of the angle is nearly 0: against the same boxes by angles of less than half a turn."""
    rng = generator(38)
    pred, target = random_boxes(fmt, 3, rng).to(dtype), random_boxes(fmt, 3, rng).to(dtype)
    pred[:, -1] = quarters * math.pi / 2
    near = [side.double() for side in (pred, target)]
    near[0][:, -1] = torch.remainder(near[0][:, -1] + math.pi / 2, math.pi) - math.pi / 2

    def second_derivative(pred, target, function):
        return torch.autograd.functional.hessian(lambda p: function(p, target, fmt=fmt, backend="eager").sum(), pred)

    for function in (box_mgiou_loss, box_mgiou):
        got, want = second_derivative(pred, target, function), second_derivative(*near, function)
        assert_close(got, want, atol=1e-3 if dtype == torch.float32 else 1e-9)


@formats
def test_vmap_is_a_batch(fmt):
    rng = generator(34)
    pred, target = random_boxes(fmt, 6, rng), random_boxes(fmt, 6, rng)

    def one(pred, target):
        return box_mgiou_loss(pred.unsqueeze(0), target.unsqueeze(0), fmt=fmt)

    want = box_mgiou_loss(pred, target, fmt=fmt, reduction="none", backend="eager")
    assert_close(torch.func.vmap(one)(pred, target), want, atol=1e-14)
    leaf = pred.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(box_mgiou_loss(leaf, target, fmt=fmt, reduction="sum", backend="eager"), leaf)
    assert_close(torch.func.vmap(torch.func.grad(one))(pred, target), wanted, atol=1e-14, what="gradient")


@formats
def test_reductions_weights_and_upstream(boxes, fmt):
    rng = generator(35)
    batch = 9
    pred, target = random_boxes(fmt, batch, rng).float(), random_boxes(fmt, batch, rng).float()
    weight, upstream = uniform((batch,), 0, 2, rng).float(), uniform((batch,), -1, 1, rng).float()
    value, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none")
    column = weight.view(-1, *[1] * (pred.dim() - 1)).to(gradient.device)
    weight_on_device = weight.to(gradient.device)
    for options, factor in [
        ({"reduction": "sum"}, 1.0),
        ({"reduction": "mean"}, 1 / batch),
        ({"reduction": "mean", "avg_factor": 3.5}, 1 / 3.5),
        ({"reduction": "mean", "avg_factor": torch.tensor(3.5)}, 1 / 3.5),
    ]:
        got = boxes.value_and_gradient(pred, target, fmt=fmt, **options)
        assert_close(got[0], value.sum() * factor, atol=1e-6, what=str(options))
        assert_gradient_close(got[1], gradient * factor, rtol=1e-6)
        got = boxes.value_and_gradient(pred, target, fmt=fmt, weight=weight, **options)
        assert_close(got[0], (value * weight_on_device).sum() * factor, atol=1e-6, what=str(options))
        assert_gradient_close(got[1], gradient * column * factor, rtol=1e-6)
    columns = torch.stack((weight, 0 * weight, 2 * weight), dim=1)  # their mean is the weight
    got = boxes.value_and_gradient(pred, target, upstream, fmt=fmt, weight=columns, reduction="none")
    assert_close(got[0], value * weight_on_device, atol=1e-6)
    upstream_column = upstream.view_as(column).to(gradient.device)
    assert_gradient_close(got[1], gradient * column * upstream_column, rtol=2e-6)


def test_a_weight_that_wants_a_gradient_gets_it(boxes):
    rng = generator(36)
    pred, target = (random_boxes("cxcywhr", 5, rng).float().to(boxes.device) for _ in range(2))
    weight = torch.ones(5, device=boxes.device, requires_grad=True)
    boxes.loss(pred, target, weight=weight, reduction="sum").backward()
    assert_close(weight.grad, boxes.loss(pred, target, reduction="none"), atol=1e-7)


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_mixed_types_and_half_precision(boxes, fmt):
    """Computed in float32 or more, the gradient in the type of each side."""
    rng = generator(37)
    shape = ALL_FORMATS[fmt].shape
    pred, target = (uniform((6, *shape), 0.1, 2, rng) for _ in range(2))
    half, single, double = torch.float16, torch.float32, torch.float64
    for dtypes in [(half, single), (torch.bfloat16, torch.bfloat16), (single, double), (double, half)]:
        sides = [side.to(dtype) for side, dtype in zip((pred, target), dtypes, strict=True)]
        value, *gradients = boxes.value_and_gradient(*sides, wrt=("pred", "target"), fmt=fmt, reduction="none")
        assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        assert [gradient.dtype for gradient in gradients] == list(dtypes)
        want, *wanted = boxes.value_and_gradient(
            *(side.to(value.dtype) for side in sides), wrt=("pred", "target"), fmt=fmt, reduction="none"
        )
        assert_same(value, want)
        for got, exact in zip(gradients, wanted, strict=True):
            assert_same(got, exact.to(got.dtype), "gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(boxes, dtype):
    rng = generator(38)
    pred, target = (random_boxes("cxcywhr", 5, rng).float() for _ in range(2))
    want = boxes.value_and_gradient(pred, target)
    with torch.autocast(boxes.device, dtype=dtype):
        got = boxes.value_and_gradient(pred, target)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1], "gradient")


def test_the_same_input_gives_the_same_bits(boxes):
    rng = generator(39)
    batch = boxes.batch(70_000)
    pred, target = (random_boxes("cxcywhr", batch, rng).float() for _ in range(2))
    first = boxes.value_and_gradient(pred, target)
    for _ in range(3):
        again = boxes.value_and_gradient(pred, target)
        assert_same(again[0], first[0])
        assert_same(again[1], first[1], "gradient")


def test_the_terms_gradient_does_not_reach_the_target(boxes):
    rng = generator(40)
    pred, target = (random_boxes("cxcywhr", 8, rng).float() for _ in range(2))
    want = boxes.value_and_gradient(pred, target, wrt=("target",), **PAPER)[1]
    got = boxes.value_and_gradient(pred, target, wrt=("target",), **PAPER | {"boundary_weight": 3.0})[1]
    assert_close(got, want, atol=1e-7)


def descend(boxes, pred, target, steps=300):
    """Move free boxes by Adam on centre, logarithms of the sizes and angle."""
    target = target.to(boxes.device)
    leaf = torch.cat((pred[:, :2], pred[:, 2:4].log(), pred[:, 4:]), dim=1).to(boxes.device).requires_grad_()
    optimizer = torch.optim.Adam([leaf], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def current():
        return torch.cat((leaf[:, :2], leaf[:, 2:4].exp(), leaf[:, 4:]), dim=1)

    for _ in range(steps):
        optimizer.zero_grad()
        boxes.loss(current(), target, reduction="sum").backward()
        optimizer.step()
        schedule.step()
    return boxes.loss(current(), target, reduction="none", **PAPER).detach().cpu()


def test_squares_turn_to_their_target(boxes):
    """From 44 degrees off and from any angle; a Gaussian loss does not see the angle of a square."""
    if boxes.is_slow:
        pytest.skip("takes 300 launches")
    rng = generator(41)
    square = torch.tensor([0.5, -0.25, 1.0, 1.0, 0.3])
    off = torch.cat((torch.tensor([44.0, -44.0, 10.0]), 90 * torch.rand(29, generator=rng) - 45))
    pred = square.repeat(32, 1)
    pred[:, 4] += torch.deg2rad(off)
    assert (descend(boxes, pred, square.repeat(32, 1)) < 0.01).all()


def test_a_square_turned_by_45_degrees_is_at_a_point_of_symmetry(boxes):
    pred, target = torch.tensor([[0.0, 0.0, 2.0, 2.0, 45.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
    value, gradient = boxes.value_and_gradient(pred, target, angle="degrees", **PAPER)
    # On each axis the half-lengths are 1 and sqrt(2): GIoU1D is 1 / sqrt(2).
    assert_close(value, (1 - 1 / math.sqrt(2)) / 2, atol=1e-7)
    assert_close(gradient[:, 4], [0.0], atol=1e-8, what="gradient to the angle")
    assert_zero(gradient[:, :2], "gradient to the centre")
    near = pred + torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0])
    _, gradient = boxes.value_and_gradient(near, target, angle="degrees", **PAPER)
    assert (gradient[:, 4] > 1e-5).all()


@pytest.mark.parametrize("size", [2.0**-10, 1.0])
def test_near_ties_in_space_that_are_real_are_not_merged(boxes, size, monkeypatch):
    """One corner stands out by 2^-11 of the edges, more than rounding, and gets all that a face would have shared.

    Of a box that is small beside the extent too.
    """
    monkeypatch.setattr(oracle, "STEP", 1e-9)
    pred = 0.25 + size * corners3d(torch.tensor([[0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64))
    pred[:, 6] += 2.0**-11 * (pred[:, 6] - pred[:, 0])
    target = corners3d(torch.tensor([[-0.9, -0.7, -0.8, 1.0, 0.8, 0.6, 0.2]], dtype=torch.float64)).float()
    _, gradient = boxes.value_and_gradient(pred.float(), target, fmt="corners3d", axis_grad=False)
    expected = oracle.gradient(numpy64(pred), numpy64(target), "corners3d", axis_grad=False)
    assert_gradient_close(gradient[:, 6], expected[:, 6], rtol=1e-3)


def test_near_ties_of_a_target_on_short_axes_are_not_merged(boxes):
    """A turn of a small upright box moves its axes: one corner of the upright target stands out on them by 2^-13.

    What is rounding goes by the axis' length, 2^-10.
    """
    upright = [[0.0, 0.0, 0.0, 1.0, 0.8, 0.6, 0.0]]
    pred, target = (corners3d(torch.tensor(upright, dtype=torch.float64)) for _ in range(2))
    turn = torch.stack((-pred[..., 1], pred[..., 0], torch.zeros(1, 8, dtype=torch.float64)), dim=2) * 2.0**-10
    pred = (1.5 + 2.0**-10 * pred).float()
    target[:, 6, :2] += 2.0**-13
    _, gradient = boxes.value_and_gradient(pred, target.float(), fmt="corners3d", axis_grad=True)
    step = 1e-6
    turned = [
        oracle.per_sample_loss(numpy64(pred + k * turn), numpy64(target.float()), "corners3d") for k in (step, -step)
    ]
    slope = (turned[0] - turned[1]) / (2 * step)
    assert abs(slope[0]) > 1e-3
    assert_close((gradient.cpu() * turn).sum((1, 2)), slope, atol=0, rtol=1e-3)


@axis_grads
def test_the_gradient_of_corners_in_space_does_not_change_when_the_pair_moves(boxes, axis_grad):
    """The corners of a face are tied on its normal, and rounding is another at each place."""
    numbers = torch.tensor([[20.3, 31.1, 12.4, 40.7, 21.9, 15.2, 0.37], [26.2, 27.4, 9.6, 44.1, 18.3, 17.7, 0.52]])
    pairs = numbers.repeat(24, 1, 1)
    pairs[1:, :, :3] += torch.randint(0, 600, (23, 1, 3), generator=generator(37))

    def corners(each):
        flat = rectangle_corners(each[:, (0, 1, 3, 4, 6)])
        heights = (each[:, 2] + each[:, 5] * sign / 2 for sign in (-1, 1))
        return torch.cat([torch.cat((flat, z[:, None, None].expand(-1, 4, 1)), dim=2) for z in heights], dim=1)

    pred, target = (side.to(boxes.device) for side in pairs.unbind(1))
    pred.requires_grad_()
    loss = boxes.loss(corners(pred), corners(target), fmt="corners3d", axis_grad=axis_grad, reduction="sum")
    gradient = torch.autograd.grad(loss, pred)[0].cpu()
    assert gradient[0, 6].abs() > 1e-2
    assert_close(gradient, gradient[:1].expand_as(gradient), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcywh", "xyxy"])
def test_the_target_is_a_constant_of_the_boundary_term(boxes, fmt):
    rng = generator(41)
    pred, target = random_boxes(fmt, 5, rng).float(), random_boxes(fmt, 5, rng).float()
    gradients = [
        boxes.value_and_gradient(pred, target, wrt=("target",), fmt=fmt, boundary_weight=weight)[1]
        for weight in (0.7, 0.0)
    ]
    assert_gradient_close(gradients[0], gradients[1], rtol=1e-6)


@pytest.mark.parametrize("fmt", ["cxcywhr", "corners3d"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_program_goes_on_with_other_boxes(boxes, monkeypatch, reduction, fmt):
    """Two programs take five blocks or more, the last of which is not full, as where the batch is a large one."""
    if boxes.name == "eager":
        pytest.skip("of the kernel")
    monkeypatch.setattr(layouts.BoxLayout, "grid", lambda *_: (2, 1, 1))
    rng = generator(38)
    batch = 4 * 128 + 5
    pred, target = random_boxes(fmt, batch, rng).float(), random_boxes(fmt, batch, rng).float()
    upstream = uniform((batch,), 0.5, 2, rng).float() if reduction == "none" else None
    options = options_of(fmt, axis_weight="uniform", axis_grad=True, boundary_weight=0.0)
    options |= {"fmt": fmt, "reduction": reduction}
    value, gradient = boxes.value_and_gradient(pred, target, upstream, **options)
    leaf = pred.double().requires_grad_()
    want = box_mgiou_loss(leaf, target.double(), backend="eager", **options)
    (right,) = torch.autograd.grad(want, leaf, None if upstream is None else upstream.double())
    assert_close(value, want, atol=2e-6)
    assert_gradient_close(gradient, right, rtol=1e-4)
