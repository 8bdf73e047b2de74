"""Forward mode of the eager loss: `torch.func` and dual tensors."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from tests import helpers
from triton_mgiou import mgiou_loss

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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jacobians_and_hessians_agree(sample, options):
    pred, target, _ = sample
    loss = loss_of(target, options)
    helpers.assert_close(jacfwd(loss)(pred), jacrev(loss)(pred), atol=1e-12)

    def total(pred):
        return loss(pred).sum()

    helpers.assert_close(hessian(total)(pred), jacrev(jacrev(total))(pred), atol=1e-9)
