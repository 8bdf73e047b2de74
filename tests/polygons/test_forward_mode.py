"""Forward mode of the eager loss: `torch.func` and dual tensors."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from tests import helpers
from triton_mgiou import (
    BoxMGIoULoss,
    MGIoULoss,
    PolygonLoss,
    box_mgiou,
    box_mgiou_loss,
    mgiou_loss,
    polygon_mgiou,
)

OPTIONS = [
    {},
    {"axis_weight": "uniform", "axis_grad": True, "boundary_weight": 0.0},
    {"axis_weight": "soft", "axis_grad": True, "convexity_weight": 0.3},
    {"pred_lengths": torch.tensor([3, 5, 4])},
    {"target_mask": torch.tensor([[True, True, False, True, True]]).expand(3, -1)},
]


@pytest.fixture
def sample():
    rng = helpers.generator(6)
    return helpers.star(3, 5, rng), helpers.convex(3, 5, rng), helpers.uniform((3, 5, 2), -1, 1, rng)


def loss_of(target, options):
    return lambda pred: mgiou_loss(pred, target, backend="eager", reduction="none", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tangent_is_the_slope(sample, options):
    pred, target, tangent = sample
    loss, step = loss_of(target, options | {"axis_grad": True}), 1e-6
    slope = (loss(pred + step * tangent) - loss(pred - step * tangent)) / (2 * step)
    value, derivative = jvp(loss, (pred,), (tangent,))
    helpers.assert_same(value, loss(pred))
    helpers.assert_close(derivative, slope, atol=1e-7)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(pred, tangent))).tangent
    helpers.assert_close(dual, slope, atol=1e-7)
    many = vmap(lambda each: jvp(loss, (pred,), (each,))[1])(torch.stack((tangent, -2 * tangent)))
    helpers.assert_close(many, torch.stack((slope, -2 * slope)), atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_compiled_derivatives_are_the_slope(sample, options):
    """Of both modes, taken inside and, of forward mode where PyTorch can, outside of compiled code."""
    pred, target, tangent = sample
    loss, step = loss_of(target, options), 1e-6
    slope = (loss(pred + step * tangent) - loss(pred - step * tangent)) / (2 * step)

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    derivative = compiled(lambda pred, tangent: jvp(loss, (pred,), (tangent,))[1])(pred, tangent)
    helpers.assert_close(derivative, slope, atol=1e-7)
    gradient = compiled(torch.func.grad(lambda pred: loss(pred).sum()))(pred)
    helpers.assert_close((gradient * tangent).sum((1, 2)), slope, atol=1e-7)
    without_a_tangent = compiled(loss)
    without_a_tangent(pred)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(pred, tangent)
        if torch.__version__ >= (2, 14):  # there PyTorch refuses it
            with pytest.raises(RuntimeError, match="dual tensor"):
                without_a_tangent(dual)
        else:
            value = without_a_tangent(dual)
            helpers.assert_close(forward_ad.unpack_dual(value).tangent, slope, atol=1e-7)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss, polygon_mgiou, box_mgiou], ids=lambda f: f.__name__)
def test_compiled_transforms_of_gradients(function):
    """The gradient of each sample by `vmap`, and the second derivative: as without a compiler."""
    rng = helpers.generator(7)
    sides = [helpers.convex(3, 4, rng) for _ in range(2)]
    if function in (box_mgiou_loss, box_mgiou):
        sides = [helpers.random_boxes(3, rng) for _ in range(2)]

    def total(pred, target):
        return function(pred, target).sin().sum()

    def of_each(pred, target):
        return vmap(torch.func.grad(lambda p, t: total(p[None], t[None])))(pred, target)

    for transformed in (of_each, hessian(total)):
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        helpers.assert_close(compiled(*sides), transformed(*sides), atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jacobians_and_hessians_agree(sample, options):
    pred, target, _ = sample
    loss = loss_of(target, options)
    helpers.assert_close(jacfwd(loss)(pred), jacrev(loss)(pred), atol=1e-12)

    def total(pred):
        return loss(pred).sum()

    helpers.assert_close(hessian(total)(pred), jacrev(jacrev(total))(pred), atol=1e-9)


def keypoint_loss(mode, reduction="mean", avg_factor=None):
    loss = PolygonLoss(mode, alpha=0.25, reduction=reduction, return_parts=False)
    return lambda p, t: loss(p, t, torch.ones(3, 5), torch.ones(3), avg_factor)


def boxes(polygons):
    return polygons[:, :2].flatten(1)


LOSSES = {
    "avg_factor": lambda p, t: mgiou_loss(p, t, avg_factor=2.1),
    "boxes, avg_factor": lambda p, t: box_mgiou_loss(boxes(p), boxes(t), fmt="xyxy", avg_factor=2.1),
    "MGIoULoss": MGIoULoss(loss_weight=3.1),
    "MGIoULoss, sum": MGIoULoss("sum", 3.1),
    "MGIoULoss, none": MGIoULoss("none", 3.1),
    "BoxMGIoULoss": lambda p, t: BoxMGIoULoss(fmt="xyxy", loss_weight=3.1)(boxes(p), boxes(t)),
    "PolygonLoss, l2, avg_factor": keypoint_loss("l2", avg_factor=2.1),
    **{f"PolygonLoss, {mode}": keypoint_loss(mode) for mode in ("mgiou", "l2", "hybrid")},
    "PolygonLoss, hybrid, sum": keypoint_loss("hybrid", "sum"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_factor_leaves_the_tangents_type_alone(sample, name, dtype):
    """PyTorch makes the tangent of a float32 scalar times a number float64, with which jacfwd cannot work."""
    pred, target, tangent = (each.to(dtype) for each in sample)

    def loss(pred):
        return LOSSES[name](pred, target)

    value, derivative = jvp(loss, (pred,), (tangent,))
    assert derivative.dtype == value.dtype == torch.promote_types(dtype, torch.float32)
    helpers.assert_close(value, loss(pred), atol={torch.float64: 1e-14}.get(dtype, 1e-6))
    jacobian = jacrev(loss)(pred)
    slope = (jacobian.double() * tangent).sum((-3, -2, -1))
    atol = {torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    helpers.assert_close(derivative.double(), slope, atol=atol)
    helpers.assert_close(jacfwd(loss)(pred).to(dtype), jacobian, atol=1e-2 if dtype == torch.float16 else atol)


def test_without_the_path_a_second_derivative_takes_the_axes_for_constants(sample):
    """As the docstring says: against the gradient on axes that stay where they are."""
    pred, target = ((16 * each).round() for each in sample[:2])  # integers, whose ties are exact
    options = {"axis_weight": "uniform", "boundary_weight": 0.0}

    def on_axes_of(axes):
        """MGIoU on the normals of these edges and of the target's, by intervals."""

        def loss(pred):
            edges = torch.cat([each.roll(-1, 1) - each for each in (axes, target)], dim=1)
            normals = torch.stack((edges[..., 1], -edges[..., 0]), dim=-1)
            p, g = (normals @ each.mT for each in (pred, target))
            (p_low, p_high), (g_low, g_high) = ((each.amin(-1), each.amax(-1)) for each in (p, g))
            hull = torch.maximum(p_high, g_high) - torch.minimum(p_low, g_low)
            return (((p_high - g_high).abs() + (p_low - g_low).abs()) / hull / 2).mean(1).sum()

        return loss

    def total(pred):
        return mgiou_loss(pred, target, backend="eager", reduction="sum", axis_grad=False, **options)

    want = torch.autograd.functional.hessian(on_axes_of(pred.clone()), pred)
    helpers.assert_close(torch.autograd.functional.hessian(total, pred), want, atol=1e-9)


@pytest.mark.parametrize("function", [mgiou_loss, polygon_mgiou, box_mgiou_loss, box_mgiou], ids=lambda f: f.__name__)
def test_functionalize_changes_nothing(function):
    """It knows no `autograd.Function`; alone, around a gradient and within one, under `vmap`."""
    rng = helpers.generator(16)
    first, second = helpers.random_boxes(4, rng), helpers.random_boxes(4, rng)
    if function in (mgiou_loss, polygon_mgiou):
        first, second = helpers.rectangle_corners(first), helpers.rectangle_corners(second)

    def total(shapes):
        return function(shapes, second, backend="eager").sum()

    leaf = first.clone().requires_grad_()
    value = total(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    helpers.assert_same(torch.func.functionalize(total)(first), value.detach())
    slope = torch.func.grad(total)
    for got in (
        torch.func.functionalize(slope)(first),
        torch.func.grad(torch.func.functionalize(total))(first),
        vmap(torch.func.functionalize(slope))(first[None])[0],
        torch.func.functionalize(jacfwd(total))(first),
    ):
        helpers.assert_close(got, gradient, atol=1e-12)
