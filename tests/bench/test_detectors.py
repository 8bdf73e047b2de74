"""What the two reports saw, reproduced on a CPU, and the parts of bench/detectors."""

from __future__ import annotations

import pytest
import torch

from bench.detectors.losses import Reported, Watched
from tests.helpers import convex, generator
from triton_mgiou import PolygonLoss

SAMPLES = 64
OURS = PolygonLoss("mgiou")


def batch(seed=0):
    """Predictions near targets of four vertices, one of them not visible, in grid cells, as a pose head has them."""
    rng = generator(seed)
    target = 20 * convex(SAMPLES, 4, rng).float()
    pred = (target + torch.randn(target.shape, generator=rng)).requires_grad_()
    mask = torch.ones(SAMPLES, 4, dtype=torch.bool)
    mask[:, 3] = False
    return pred, target, mask, torch.full((SAMPLES, 1), 400.0)


def train_step(loss, dtype, scale=1.0):
    """The value, and for each sample whether its gradient is finite, under autocast to `dtype` (None: none)."""
    pred, target, mask, area = batch()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        value = loss(pred, target, mask, area)
        value = value[0] if isinstance(value, tuple) else value
    (scale * value).backward()
    return value.item(), pred.grad.flatten(1).isfinite().all(1)


def test_the_reported_loss_hides_its_nan_under_float16():
    """The value looks well, and no sample has a usable gradient: GradScaler would skip this step and every other."""
    value, finite = train_step(Reported(), torch.float16)
    assert 0 < value < 1
    assert not finite.any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_reported_loss_has_a_gradient_in_other_types(dtype):
    value, finite = train_step(Reported(), dtype)
    assert 0 < value < 1
    assert finite.all()


@pytest.mark.parametrize("options", [{"mask": "conditional"}, {"mask": "soft"}, {"clamp": False}, {"sort": False}])
def test_no_other_mask_and_no_missing_clamp_cures_it(options):
    assert not train_step(Reported(**options), torch.float16)[1].any()


def test_without_nan_to_num_the_loss_is_nan_at_once():
    """This was the first report; the "fix" made it the second."""
    value, finite = train_step(Reported(nan_to_num=False), torch.float16)
    assert value != value  # noqa: PLR0124
    assert not finite.any()


def test_an_epsilon_that_float16_has_or_float32_projections_cure_it():
    assert train_step(Reported(epsilon=1e-3), torch.float16)[1].all()
    assert train_step(Reported(full_precision=True), torch.float16)[1].all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_ours_has_a_gradient_under_every_autocast(dtype):
    value, finite = train_step(OURS, dtype, scale=2.0**16)
    assert 0 < value < 1
    assert finite.all()


def test_the_reported_loss_in_a_pose_head_takes_hidden_vertices_for_padding():
    """It equals the loss of the visible vertices alone, wherever the hidden one is."""
    pred, target, mask, area = batch()
    expected = Reported()(pred, target, mask, area)
    moved = Reported()(pred, target.roll(1, 1), mask.roll(1, 1), area)
    torch.testing.assert_close(moved, expected)
    hidden = target.clone()
    hidden[:, 3] = torch.nan
    torch.testing.assert_close(Reported()(pred, hidden, mask, area), expected)


def test_watched_counts_the_samples_with_a_bad_gradient():
    class Spoilt(torch.nn.Module):
        def forward(self, pred, *_):
            return (pred[:16] * torch.inf).sum() + pred.sum()

    watched = Watched(Spoilt())
    for seed in range(2):
        watched(*batch(seed)).backward()
    assert [share.item() for share in watched.bad] == [0.25, 0.25]
    with torch.no_grad():
        watched(*batch())
    assert len(watched.bad) == 2
