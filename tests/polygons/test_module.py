"""`MGIoULoss` as a detector built on mmdetection or mmrotate calls it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from tests.helpers import assert_close, assert_same, assert_zero, convex, generator, star, uniform
from triton_mgiou import BoxMGIoULoss, MGIoULoss, PolygonLoss, box_mgiou_loss, mgiou_loss


@pytest.fixture
def pair(backend):
    rng = generator(81)
    return star(5, 6, rng).float().to(backend.device), convex(5, 4, rng).float().to(backend.device)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"axis_weight": "soft", "axis_grad": False}, {"axis_weight": "length", "convexity_weight": 0.5}]
)
def test_it_is_the_function_times_its_weight(backend, pair, options, reduction):
    pred, target = pair[0].requires_grad_(), pair[1]
    expected = mgiou_loss(pred, target, reduction=reduction, backend=backend.name, **options)
    (wanted,) = torch.autograd.grad(expected.sum(), pred)
    actual = MGIoULoss(reduction, backend=backend.name, **options)(pred, target)
    assert_same(actual.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(actual.sum(), pred)
    assert_same(gradient, wanted, "gradient")
    doubled = MGIoULoss(reduction=reduction, loss_weight=2.0, backend=backend.name, **options)(pred, target)
    assert_same(doubled.detach(), 2 * expected.detach())
    (gradient,) = torch.autograd.grad(doubled.sum(), pred)
    assert_same(gradient, 2 * wanted, "gradient")


def test_the_defaults_are_the_functions(backend, pair):
    assert_close(MGIoULoss()(*pair), mgiou_loss(*pair, backend=backend.name), atol=1e-6)


@pytest.mark.parametrize("override", ["none", "sum", "mean"])
def test_reduction_override(backend, pair, override):
    loss = MGIoULoss("sum", backend=backend.name)
    expected = mgiou_loss(*pair, reduction=override, backend=backend.name)
    assert_same(loss(*pair, reduction_override=override), expected)
    assert_same(loss(*pair), mgiou_loss(*pair, reduction="sum", backend=backend.name))
    with pytest.raises(ValueError, match=r"^reduction .*'avg'"):
        loss(*pair, reduction_override="avg")


@pytest.mark.parametrize("columns", [None, 1, 2, 8])
def test_a_weight_per_sample_or_per_coordinate(backend, pair, columns):
    rng = generator(82)
    weight = uniform((5,) if columns is None else (5, columns), 0, 2, rng).float().to(backend.device)
    weight[1] = 0
    each = mgiou_loss(*pair, reduction="none", backend=backend.name)
    expected = each * (weight if columns is None else weight.mean(1))
    loss = MGIoULoss(loss_weight=3.0, backend=backend.name)
    assert_close(loss(*pair, weight, reduction_override="none"), 3 * expected, atol=1e-6)
    assert_close(loss(*pair, weight, reduction_override="sum"), 3 * expected.sum(), atol=1e-5)
    assert_close(loss(*pair, weight), 3 * expected.sum() / 5, atol=1e-6)
    assert_close(loss(*pair, weight=weight, avg_factor=2.5), 3 * expected.sum() / 2.5, atol=1e-5)


def test_avg_factor_as_a_number_and_as_a_tensor(backend, pair):
    loss = MGIoULoss(backend=backend.name)
    expected = mgiou_loss(*pair, reduction="sum", backend=backend.name) / 4
    for factor in (4, 4.0, torch.tensor(4.0), torch.tensor(4.0, device=backend.device)):
        actual = loss(*pair, None, factor)
        assert actual.shape == ()
        assert_close(actual, expected, atol=1e-6)
    each = mgiou_loss(*pair, reduction="none", backend=backend.name)
    assert_same(loss(*pair, avg_factor=4.0, reduction_override="none"), each)
    with pytest.raises(ValueError, match=r'^avg_factor .*"sum"'):
        loss(*pair, avg_factor=4.0, reduction_override="sum")


def through_polygon_loss(mode):
    """The sum of the weights is that of visible samples: without one, every loss is 0."""

    def loss(pred, target, weight, avg_factor, backend):
        size = pred.shape[1]
        area = torch.ones(len(pred), device=pred.device)
        visible = (weight > 0).unsqueeze(1).expand(-1, size)
        alpha = 0.5 if mode == "hybrid" else None
        module = PolygonLoss(mode, alpha=alpha, backend=backend)
        return module(pred, target[:, :1].expand(-1, size, -1), visible, area, avg_factor=avg_factor)[0]

    return loss


def upright(*polygons):
    """Boxes whose opposite corners are the first two vertices."""
    return [each[:, :2].flatten(1) for each in polygons]


LOSSES = {
    "mgiou_loss": lambda p, t, w, avg_factor, backend: mgiou_loss(
        p, t, weight=w, avg_factor=avg_factor, backend=backend
    ),
    "MGIoULoss": lambda p, t, w, avg_factor, backend: MGIoULoss(backend=backend)(p, t, w, avg_factor=avg_factor),
    "a weight with a gradient": lambda p, t, w, avg_factor, backend: mgiou_loss(
        p, t, weight=w.clone().requires_grad_(), avg_factor=avg_factor, backend=backend
    ),
    "box_mgiou_loss": lambda p, t, w, avg_factor, backend: box_mgiou_loss(
        *upright(p, t), fmt="xyxy", weight=w, avg_factor=avg_factor, backend=backend
    ),
    "BoxMGIoULoss": lambda p, t, w, avg_factor, backend: BoxMGIoULoss(fmt="xyxy", backend=backend)(
        *upright(p, t), w, avg_factor=avg_factor
    ),
    **{f"PolygonLoss {mode}": through_polygon_loss(mode) for mode in ("mgiou", "l2", "hybrid")},
}
ZEROS = {
    "int": lambda _: 0,
    "float": lambda _: -0.0,
    "subnormal": lambda _: 1e-40,
    "below the least float32": lambda _: 1e-60,
    "tensor": lambda device: torch.zeros((), device=device),
    "integer tensor": lambda device: torch.zeros(1, dtype=torch.int64, device=device),
    "float64 tensor on the CPU": lambda _: torch.zeros((), dtype=torch.float64),
    "subnormal tensor": lambda device: torch.full((), 1e-40, device=device),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_objects(backend, pair, name, zero):
    """Its weights are 0, and the divisor is their sum: the loss is 0 and connected, and so is every gradient."""
    pred, target = pair[0].requires_grad_(), pair[1].requires_grad_(name.startswith("mgiou"))
    factor = ZEROS[zero](backend.device)
    loss = LOSSES[name](pred, target, torch.zeros(5, device=backend.device), factor, backend.name)
    assert loss.dtype == torch.float32
    assert_zero(loss, "loss")
    for gradient in torch.autograd.grad(loss, [side for side in (pred, target) if side.requires_grad]):
        assert_zero(gradient)
    some = torch.tensor([0.0, 0, 1, 0, 0], device=backend.device)
    assert LOSSES[name](pred, target, some, factor, backend.name).isinf()


@pytest.mark.parametrize("name", LOSSES)
def test_a_tensor_that_is_finite_in_float64_only_divides(backend, pair, name):
    """As the number does: the loss is 0 in float32."""
    factor = torch.tensor(1e300, dtype=torch.float64)
    pred = pair[0].requires_grad_()
    loss = LOSSES[name](pred, pair[1], torch.ones(5, device=backend.device), factor, backend.name)
    assert_zero(loss, "loss")
    assert_zero(torch.autograd.grad(loss, pred)[0])


@pytest.mark.parametrize("make", [MGIoULoss, BoxMGIoULoss])
@pytest.mark.parametrize(
    ("loss_weight", "error", "came"),
    [
        ("2", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (math.nan, ValueError, "nan"),
        (-1e39, ValueError, r"-1e\+39"),
        (2**99, ValueError, "101"),
    ],
)
def test_a_wrong_loss_weight(make, loss_weight, error, came):
    with pytest.raises(error, match=f"^loss_weight must be .*, got .*{came}"):
        make(loss_weight=loss_weight)


@pytest.mark.parametrize("make", [MGIoULoss, BoxMGIoULoss])
def test_the_range_of_a_loss_weight_is_named(make):
    assert [make(loss_weight=end).loss_weight for end in (-1e30, 1e30)] == [-1e30, 1e30]
    with pytest.raises(ValueError, match=r"^loss_weight must be -1e\+30 or above, got -1e\+31"):
        make(loss_weight=-1e31)
    with pytest.raises(ValueError, match=r"^loss_weight must be at most 1e\+30, got 1e\+31"):
        make(loss_weight=1e31)
    with pytest.raises(ValueError, match=r"^boundary_weight must be 0 or above, got -1e\+31"):
        make(boundary_weight=-1e31)
    with pytest.raises(ValueError, match=r"^loss_weight must be an integer of 64 bits .*, got an integer of 71 bits"):
        make(loss_weight=2**69)


@pytest.mark.parametrize("make", [MGIoULoss, BoxMGIoULoss])
def test_a_wrong_loss_weight_in_a_tensor(make):
    with pytest.raises(ValueError, match=r"^loss_weight must have one element, got shape \(2,\)"):
        make(loss_weight=torch.ones(2))
    with pytest.raises(TypeError, match=r"^loss_weight must hold real numbers .*, got torch\.complex64"):
        make(loss_weight=torch.tensor(1j))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [torch.tensor(2.0, dtype=torch.float64), torch.tensor([2.0]), torch.tensor([[2]])])
def test_a_loss_weight_in_a_tensor_keeps_the_losss_shape_and_type(backend, pair, reduction, factor):
    want = 2 * MGIoULoss(reduction, backend=backend.name)(*pair)
    assert_same(MGIoULoss(reduction, factor, backend=backend.name)(*pair), want)


def test_a_loss_weight_that_is_learnt_has_a_gradient(pair):
    loss = MGIoULoss(loss_weight=torch.nn.Parameter(torch.ones(1)))
    loss(*pair).backward()
    assert_close(loss.loss_weight.grad, MGIoULoss()(*pair).reshape(1), atol=1e-7)


def test_an_image_without_objects_leaves_the_weights_gradient_finite(backend, pair):
    weight = torch.zeros(5, device=backend.device, requires_grad=True)
    loss = mgiou_loss(*pair, weight=weight, avg_factor=weight.detach().sum(), backend=backend.name)
    assert_zero(torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_an_avg_factor_is_the_same_as_a_number_and_as_a_tensor(backend, pair, name):
    """Below 0 a number is refused, and a tensor, which is not read, does not pass either."""
    device, weight = backend.device, torch.tensor([0.5, 0, 2, 1, 1], device=pair[0].device)
    results = []
    for factor in (3, 3.0, torch.tensor(3, device=device), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)):
        given = factor.to(device) if isinstance(factor, torch.Tensor) and factor.dim() else factor
        leaf = pair[0].clone().requires_grad_()
        loss = LOSSES[name](leaf, pair[1], weight, given, backend.name)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert loss.dtype == torch.float32
    for value, gradient in results[1:]:
        assert_close(value, results[0][0], atol=1e-7)
        assert_close(gradient, results[0][1], atol=1e-7)
    for number in (math.inf, math.nan):
        factor = torch.tensor(number, device=device)
        assert LOSSES[name](*pair, weight, factor, backend.name).isnan()
        with pytest.raises(ValueError, match=r"^avg_factor must be finite, got"):
            LOSSES[name](*pair, weight, number, backend.name)
    with pytest.raises(ValueError, match=r"^avg_factor must be 0 or above, got -3"):
        LOSSES[name](*pair, weight, -3, backend.name)
    assert LOSSES[name](*pair, weight, torch.tensor(-3.0, device=device), backend.name).isnan()


def test_no_digit_of_an_avg_factor_is_lost(backend, pair):
    """It is an integer that float32 does not have, and the loss is computed in float64."""
    pred, target = (each.double() for each in pair)
    total = mgiou_loss(pred, target, reduction="sum", backend=backend.name).item()
    for factor in (2**24 + 1, torch.tensor(2**24 + 1), torch.tensor(2**24 + 1.0, dtype=torch.float64)):
        actual = mgiou_loss(pred, target, avg_factor=factor, backend=backend.name)
        assert actual.item() == pytest.approx(total / (2**24 + 1), rel=1e-14)


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("shape", [(5,), (5, 3)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_weight_without_a_positive_entry_gives_a_zero_in_the_graph(backend, pair, reduction, shape, value):
    pred, target = pair[0].requires_grad_(), pair[1]
    weight = torch.full(shape, value, device=backend.device)
    actual = MGIoULoss(reduction, loss_weight=2.0, backend=backend.name)(pred, target, weight)
    assert actual.shape == ()
    assert_zero(actual, "loss")
    (gradient,) = torch.autograd.grad(actual, pred)
    assert_zero(gradient)


def test_one_positive_entry_is_enough(backend, pair):
    weight = torch.tensor([[0.0, -1], [0, 0], [0, 3], [0, 0], [0, 0]], device=backend.device)
    each = mgiou_loss(*pair, reduction="none", backend=backend.name)
    actual = MGIoULoss("sum", backend=backend.name)(*pair, weight)
    assert_close(actual, -0.5 * each[0] + 1.5 * each[2], atol=1e-6)


@pytest.mark.parametrize("module", [MGIoULoss, BoxMGIoULoss, PolygonLoss])
def test_weights_of_any_type(backend, pair, module):
    """Also of those integers that PyTorch hardly computes with; NaN beside no positive one is not passed over."""
    pred, target = pair[0], pair[0].flip(0)
    if module is BoxMGIoULoss:
        call, given = module(fmt="xyxy", backend=backend.name), upright(pred, target)
    elif module is MGIoULoss:
        call, given = module(backend=backend.name), (pred, target)
    else:
        call = module("hybrid", alpha=0.5, backend=backend.name, return_parts=False)
        given = pred, target, torch.ones_like(pred[..., 0]), torch.ones_like(pred[:, 0, 0])
    weight = torch.tensor([0, 2, 1, 0, 3], device=pred.device)
    expected = call(*given, weight=weight.float())
    assert expected > 0
    for dtype in (torch.uint8, torch.int8, torch.int64, torch.uint16, torch.uint32, torch.float16, torch.float64):
        assert_close(call(*given, weight=weight.to(dtype)), expected, atol=1e-7)
        assert_zero(call(*given, weight=torch.zeros_like(weight).to(dtype)), "loss")
    assert_same(call(*given, weight=weight > 0), call(*given, weight=(weight > 0).float()))
    assert call(*given, weight=torch.tensor([0, math.nan, 0, -1, 0], device=pred.device)).isnan()


def test_a_weight_without_a_positive_entry_and_no_reduction(backend, pair):
    weight = torch.tensor([0.0, -1, 0, -2, 0], device=backend.device)
    actual = MGIoULoss("none", backend=backend.name)(*pair, weight)
    each = mgiou_loss(*pair, reduction="none", backend=backend.name)
    assert_same(actual, each * weight)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_positive_sample_at_all(backend, reduction):
    """The empty batch of an image without objects, as a head passes it: empty weights, a factor of 1 or their sum."""
    pred = torch.zeros(0, 4, 2, device=backend.device, requires_grad=True)
    target, weight = torch.zeros(0, 4, 2, device=backend.device), torch.zeros(0, 4, device=backend.device)
    for factor in [None] if reduction == "sum" else [None, 1.0, 0, weight.sum()]:
        actual = MGIoULoss(reduction, backend=backend.name)(pred, target, weight, avg_factor=factor)
        assert_zero(actual, "loss")
        (gradient,) = torch.autograd.grad(actual.sum(), pred)
        assert gradient.shape == pred.shape


def test_keywords_of_a_call(backend, pair):
    rng = generator(83)
    lengths = torch.tensor([6, 3, 4, 5, 6], device=backend.device)
    mask = (uniform((5, 4), 0, 1, rng) < 0.7).to(backend.device)
    loss = MGIoULoss("none", axis_weight="length", backend=backend.name)
    options = {"pred_lengths": lengths, "target_mask": mask, "reduction": "none", "backend": backend.name}
    expected = mgiou_loss(*pair, axis_weight="length", **options)
    assert_same(loss(*pair, pred_lengths=lengths, target_mask=mask), expected)
    assert (expected != loss(*pair)).any()
    overridden = loss(*pair, pred_lengths=lengths, target_mask=mask, axis_weight="soft", convexity_weight=0.5)
    assert_same(overridden, mgiou_loss(*pair, axis_weight="soft", convexity_weight=0.5, **options))
    assert_same(loss(*pair, pred_lengths=lengths, target_mask=mask), expected, "after a call with another option")
    with pytest.raises(TypeError):
        loss(*pair, pred_length=lengths)


def test_repr():
    loss = MGIoULoss("sum", loss_weight=5.0, axis_weight="soft", axis_grad=False, convexity_weight=0.25)
    for part in ("reduction='sum'", "loss_weight=5.0", "axis_weight='soft'", "axis_grad=False"):
        assert part in loss.extra_repr()
        assert part in repr(loss)
    assert "convexity_weight=0.25" in repr(loss)
    assert repr(loss).startswith("MGIoULoss(")
    assert "reduction='mean'" in repr(MGIoULoss())
    assert "MGIoULoss(reduction='none'" in repr(torch.nn.ModuleDict({"bbox": MGIoULoss("none")}))


def test_options_that_do_not_exist():
    with pytest.raises(TypeError, match="axis_wieght") as caught:
        MGIoULoss(axis_wieght="soft")
    for option in ("axis_weight", "axis_grad", "convexity_weight", "boundary_weight", "backend"):
        assert option in str(caught.value)
    with pytest.raises(TypeError, match="pred_lengths"):
        MGIoULoss(pred_lengths=torch.ones(3))  # an argument of a call, not an option
    with pytest.raises(ValueError, match=r"^reduction .*'none'.*'avg'"):
        MGIoULoss("avg")


@pytest.mark.parametrize("make", [MGIoULoss, BoxMGIoULoss, PolygonLoss])
@pytest.mark.parametrize(
    ("name", "value", "error", "came"),
    [
        ("axis_weight", "area", ValueError, "'area'"),
        ("axis_grad", 1, TypeError, "int"),
        ("convexity_weight", -1, ValueError, "-1"),
        ("boundary_weight", "1", TypeError, "str"),
        ("boundary_weight", math.nan, ValueError, "nan"),
        ("backend", "cuda", ValueError, "'cuda'"),
    ],
)
def test_an_option_of_a_wrong_value_is_told_when_the_module_is_made(make, name, value, error, came):
    """Not by the first batch with objects."""
    with pytest.raises(error, match=f"^{name} must be .*got {came}"):
        make(**{name: value})


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(backend, pair, copy_of):
    loss = MGIoULoss("sum", 2.0, axis_weight="soft", convexity_weight=0.5, backend=backend.name)
    again = copy_of(loss)
    assert again is not loss
    assert repr(again) == repr(loss)
    assert_same(again(*pair), loss(*pair))


def test_it_has_no_state_and_follows_its_parent(backend, pair):
    loss = MGIoULoss(backend=backend.name)
    assert isinstance(loss, torch.nn.Module)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    model = torch.nn.Sequential(loss).to(backend.device).double().eval()
    assert_same(model[0](*pair), mgiou_loss(*pair, backend=backend.name))
