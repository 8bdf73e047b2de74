"""What holds for every input, looked for with hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import (
    assert_close,
    assert_finite,
    assert_gradient_close,
    assert_same,
    assert_zero,
    axis_weights,
    generator,
    uniform,
)
from tests.strategies import LARGEST, any_pairs, pairs, seeds


@axis_weights
@given(pair=any_pairs())
def test_any_finite_float32_has_a_finite_value_and_gradient(backend, pair, axis_weight):
    pred, target = pair
    for axis_grad in (True, False):
        options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 1.0}
        value, *gradients = backend.value_and_gradient(
            pred, target, wrt=("pred", "target"), reduction="none", **options
        )
        assert_finite(value)
        assert (value >= 0).all()
        assert (value <= 1.5).all()  # the convexity term is at most one half
        for gradient in gradients:
            assert_finite(gradient, "gradient")


@axis_weights
@given(pair=any_pairs())
def test_the_range_and_symmetry_hold_for_any_finite_float32(backend, pair, axis_weight):
    """1 itself is reached, by two different points on every axis, as two parallel segments are; see the next test."""
    pred, target = (vertices.to(backend.device) for vertices in pair)
    options = {"axis_weight": axis_weight, "reduction": "none"}
    value = backend.loss(pred, target, **options)
    assert (value >= 0).all()
    assert (value <= 1).all()
    assert_same(backend.loss(target, pred, **options), value, "swapped")
    assert_zero(backend.loss(pred, pred, **options), "loss of equal polygons")


@axis_weights
@given(pair=pairs(), distance=st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
def test_polygons_with_an_area_have_a_loss_below_one(backend, pair, distance, axis_weight):
    pred, target = pair[0].float().to(backend.device), (pair[1] + distance).float().to(backend.device)
    value = backend.loss(pred, target, axis_weight=axis_weight, reduction="none")
    assert (value > 0).all()
    assert (value < 1).all()
    if distance > 4:
        assert (value > 0.5).all()


@axis_weights
@given(pair=pairs(), shift=st.tuples(st.integers(-512, 512), st.integers(-512, 512)))
def test_translation(backend, pair, shift, axis_weight):
    """The shifted float32 coordinates are exact."""
    pred, target = pair
    shift = torch.tensor(shift, dtype=torch.float64)
    options = {"axis_weight": axis_weight, "convexity_weight": 0.5, "reduction": "none"}
    for dtype, atol, rtol in [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-10)]:
        value, gradient = backend.value_and_gradient(pred.to(dtype), target.to(dtype), **options)
        moved = backend.value_and_gradient((pred + shift).to(dtype), (target + shift).to(dtype), **options)
        assert_close(moved[0], value, atol=atol)
        assert_gradient_close(moved[1], gradient, rtol=rtol)


@axis_weights
@given(pair=pairs(), angle=st.floats(-math.pi, math.pi))
def test_rotation(backend, pair, angle, axis_weight):
    """Only "soft" sees the turn, through the extent, the side of a box that does not turn with the polygons."""
    pred, target = pair
    cos, sin = (math.cos(angle), math.sin(angle)) if axis_weight != "soft" else (0.0, 1.0)
    rotation = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    options = {"axis_weight": axis_weight, "convexity_weight": 0.5, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    turned = backend.value_and_gradient(pred @ rotation, target @ rotation, **options)
    assert_close(turned[0], value, atol=1e-12)
    assert_gradient_close(turned[1], gradient.cpu() @ rotation, rtol=1e-9)
    value = backend.loss(pred.float().to(backend.device), target.float().to(backend.device), **options)
    turned = ((vertices @ rotation).float().to(backend.device) for vertices in pair)
    assert_close(backend.loss(*turned, **options), value, atol=2e-6)


@axis_weights
@given(pair=pairs())
def test_a_mirror(backend, pair, axis_weight):
    mirror = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    options = {"axis_weight": axis_weight, "convexity_weight": 0.5, "reduction": "none"}
    value, gradient = backend.value_and_gradient(*pair, **options)
    mirrored = backend.value_and_gradient(pair[0] * mirror, pair[1] * mirror, **options)
    assert_close(mirrored[0], value, atol=1e-13)
    assert_gradient_close(mirrored[1], gradient.cpu() * mirror, rtol=1e-10)


@axis_weights
@given(pair=pairs(), factor=st.floats(1e-3, 1e3))
def test_scaling(backend, pair, factor, axis_weight):
    pred, target = pair
    options = {"axis_weight": axis_weight, "convexity_weight": 0.5, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    scaled = backend.value_and_gradient(pred * factor, target * factor, **options)
    assert_close(scaled[0], value, atol=1e-12)
    assert_gradient_close(scaled[1] * factor, gradient, rtol=1e-9)
    value = backend.loss(pred.float().to(backend.device), target.float().to(backend.device), **options)
    scaled = ((vertices * factor).float().to(backend.device) for vertices in pair)
    assert_close(backend.loss(*scaled, **options), value, atol=2e-6)


@axis_weights
@given(axis_grad=st.booleans(), pair=pairs(least=1), exponent=st.integers(-100, 100), double=st.booleans())
def test_powers_of_two_change_no_bit(backend, pair, exponent, double, *, axis_weight, axis_grad):
    dtype = torch.float64 if double else torch.float32
    exponent = exponent * 8 if double else exponent
    pred, target = pair[0].to(dtype), pair[1].to(dtype)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    scaled = backend.value_and_gradient(pred * 2.0**exponent, target * 2.0**exponent, **options)
    assert_same(scaled[0], value)
    if abs(exponent) <= (500 if double else 60):  # the smallest parts of the gradient stay normal, too
        assert_same(scaled[1] * 2.0**exponent, gradient, "gradient")


@axis_weights
@given(
    axis_grad=st.booleans(),
    pair=pairs(least=1),
    shifts=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    flips=st.tuples(*[st.booleans()] * 2),
)
def test_first_vertex_and_direction_do_not_matter(backend, pair, shifts, flips, *, axis_weight, axis_grad):
    def reorder(vertices, side):
        vertices = vertices.roll(shifts[side], 1)
        return vertices.flip(1) if flips[side] else vertices

    pred, target = pair
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5, "reduction": "none"}
    for dtype, atol, rtol in [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-10)]:
        value, gradient = backend.value_and_gradient(pred.to(dtype), target.to(dtype), **options)
        other = backend.value_and_gradient(reorder(pred, 0).to(dtype), reorder(target, 1).to(dtype), **options)
        assert_close(other[0], value, atol=atol)
        assert_gradient_close(other[1], reorder(gradient, 0), rtol=rtol, atol=atol / 10)


@axis_weights
@given(axis_grad=st.booleans(), pair=pairs(), counts=st.lists(st.integers(1, 3), min_size=16, max_size=16))
def test_repeated_vertices(backend, pair, counts, *, axis_weight, axis_grad):
    """A repeated vertex changes no value, and its gradient is spread over the copies.

    With the path through the axes stopped, the copies of an edge's end take more than half of what the edge gets, so
    only the sum over the polygon is the same.
    """
    pred, target = pair
    copies = torch.repeat_interleave(torch.arange(pred.shape[1]), torch.tensor(counts[: pred.shape[1]]))
    target_copies = torch.repeat_interleave(torch.arange(target.shape[1]), torch.tensor(counts[-target.shape[1] :]))
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "none"}
    for dtype, atol, rtol in [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-10)]:
        value, gradient = backend.value_and_gradient(pred.to(dtype), target.to(dtype), **options)
        repeated = backend.value_and_gradient(pred[:, copies].to(dtype), target[:, target_copies].to(dtype), **options)
        assert_close(repeated[0], value, atol=atol)
        together = torch.zeros_like(gradient).index_add_(1, copies.to(gradient.device), repeated[1])
        if axis_grad:
            assert_gradient_close(together, gradient, rtol=rtol)
        else:
            scale = gradient.abs().amax().item()
            assert_close(together.sum(1), gradient.sum(1), atol=10 * rtol * scale, what="sum of the gradient")


@axis_weights
@given(pair=pairs(), extra=st.integers(1, 4))
def test_padding_by_the_last_vertex_needs_no_lengths(backend, pair, extra, axis_weight):
    pred, target = (vertices.float() for vertices in pair)
    options = {"axis_weight": axis_weight, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    padded = torch.cat((pred, pred[:, -1:].expand(-1, extra, -1)), dim=1)
    padded_target = torch.cat((target, target[:, -1:].expand(-1, extra, -1)), dim=1)
    again = backend.value_and_gradient(padded, padded_target, **options)
    assert_close(again[0], value, atol=1e-6)
    last = pred.shape[1] - 1
    together = torch.cat((again[1][:, :last], again[1][:, last:].sum(1, keepdim=True)), dim=1)
    assert_gradient_close(together, gradient, rtol=1e-4)


GARBAGE = [math.nan, math.inf, -math.inf, LARGEST, -LARGEST, 2**-149, -0.0, 1e10, 0.5]


def fill(vertices, real, draw):
    """The same real vertices with garbage in every other place."""
    garbage = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), vertices.shape, generator=draw)]
    return torch.where(real.unsqueeze(-1), vertices, garbage)


@pytest.mark.parametrize("by", ["lengths", "mask"])
@axis_weights
@given(axis_grad=st.booleans(), pair=pairs(), seed=seeds)
def test_padding_changes_no_bit_and_gets_no_gradient(backend, pair, seed, *, axis_weight, axis_grad, by):
    rng = generator(seed)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5, "reduction": "none"}
    clean, filled, masks = [], [], []
    for side, vertices in zip(("pred", "target"), pair, strict=True):
        batch, size, _ = vertices.shape
        if by == "lengths":
            lengths = torch.randint(0, size + 1, (batch,), generator=rng)
            options["pred_lengths" if side == "pred" else "target_lengths"] = lengths
            real = torch.arange(size) < lengths.unsqueeze(1)
        else:
            real = uniform((batch, size), 0, 1, rng) < 0.6
            options["pred_mask" if side == "pred" else "target_mask"] = real
        masks.append(real)
        clean.append(torch.where(real.unsqueeze(-1), vertices.float(), 0.0))
        filled.append(fill(vertices.float(), real, rng))
    wrt = ("pred", "target")
    expected = backend.value_and_gradient(*clean, wrt=wrt, **options)
    actual = backend.value_and_gradient(*filled, wrt=wrt, **options)
    assert_finite(expected[0])
    for name, got, want in zip(("value", "gradient of pred", "gradient of target"), actual, expected, strict=True):
        assert_same(got, want, name)
    for gradient, real in zip(actual[1:], masks, strict=True):
        assert_zero(gradient.cpu()[~real], "gradient of the padding")


@axis_weights
@given(axis_grad=st.booleans(), pair=pairs(least=1), seed=seeds)
def test_lengths_masks_and_slices_agree(backend, pair, seed, *, axis_weight, axis_grad):
    rng = generator(seed)
    pred, target = (vertices.float() for vertices in pair)
    n, m = pred.shape[1], target.shape[1]
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5, "reduction": "none"}
    pred_lengths = torch.randint(1, n + 1, (3,), generator=rng)
    target_lengths = torch.randint(1, m + 1, (3,), generator=rng)
    by_lengths = backend.value_and_gradient(
        pred, target, pred_lengths=pred_lengths, target_lengths=target_lengths, **options
    )
    pred_mask = torch.arange(n) < pred_lengths.unsqueeze(1)
    target_mask = torch.arange(m) < target_lengths.unsqueeze(1)
    by_mask = backend.value_and_gradient(pred, target, pred_mask=pred_mask, target_mask=target_mask, **options)
    assert_same(by_mask[0], by_lengths[0])
    assert_same(by_mask[1], by_lengths[1], "gradient")
    for b in range(3):
        one = slice(b, b + 1)
        sliced = backend.value_and_gradient(pred[one, : pred_lengths[b]], target[one, : target_lengths[b]], **options)
        assert_close(sliced[0], by_lengths[0][one], atol=5e-7, what="value of the slice")
        assert_gradient_close(sliced[1], by_lengths[1][one, : pred_lengths[b]], rtol=1e-5, atol=1e-7, what="slice")


@axis_weights
@given(axis_grad=st.booleans(), pair=pairs(least=2), seed=seeds)
def test_masks_with_holes_agree_with_the_compacted_polygons(backend, pair, seed, *, axis_weight, axis_grad):
    rng = generator(seed)
    pred, target = (vertices.float() for vertices in pair)
    masks = [uniform(vertices.shape[:2], 0, 1, rng) < 0.6 for vertices in (pred, target)]
    for mask in masks:
        mask[:, 1] = True
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5, "reduction": "none"}
    holes = backend.value_and_gradient(pred, target, pred_mask=masks[0], target_mask=masks[1], **options)
    for b in range(3):
        one = slice(b, b + 1)
        compact = backend.value_and_gradient(pred[one, masks[0][b]], target[one, masks[1][b]], **options)
        assert_close(compact[0], holes[0][one], atol=5e-7)
        assert_gradient_close(compact[1], holes[1].cpu()[one, masks[0][b]], rtol=1e-5, atol=1e-7)


@given(pair=pairs(), order=st.permutations(range(3)))
def test_samples_do_not_see_each_other(backend, pair, order):
    pred, target = (vertices.float() for vertices in pair)
    options = {"convexity_weight": 0.5, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    permuted = backend.value_and_gradient(pred[order], target[order], **options)
    assert_same(permuted[0], value[order])
    assert_same(permuted[1], gradient[order], "gradient")


def wild(shape, dtype, rng):
    """Finite values with every exponent there is, the signs at random, some 0, some the largest."""
    lowest, highest = (-149, 127) if dtype == torch.float32 else (-1074, 1023)
    exponents = torch.randint(lowest, highest + 1, shape, generator=rng)
    mantissas = uniform(shape, 1, 2, rng) * torch.where(uniform(shape, 0, 1, rng) < 0.5, -1, 1)
    values = torch.ldexp(torch.ldexp(mantissas, exponents // 2), exponents - exponents // 2).to(dtype)
    special = torch.tensor([0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    chosen = special[torch.randint(4, shape, generator=rng)]
    return torch.where(uniform(shape, 0, 1, rng) < 0.15, chosen, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@axis_weights
def test_wild_magnitudes_have_a_finite_value_and_gradient(backend, axis_weight, dtype):
    rng = generator(51)
    batch = backend.batch(500)
    for _ in range(3):
        pred, target = wild((batch, 4, 2), dtype, rng), wild((batch, 5, 2), dtype, rng)
        # A quarter each: as they are; one magnitude to a sample; the prediction on a line; a vertex in common.
        quarter = batch // 4
        size = pred[quarter : 2 * quarter, :1, :1].abs()
        pred[quarter : 2 * quarter] = size * uniform((quarter, 4, 2), -1, 1, rng).to(dtype)
        target[quarter : 2 * quarter] = size * uniform((quarter, 5, 2), -1, 1, rng).to(dtype)
        pred[2 * quarter : 3 * quarter, :, 1] = pred[2 * quarter : 3 * quarter, :, 0] / 2
        target[3 * quarter :, :2] = pred[3 * quarter :, :2]
        for axis_grad in (True, False):
            options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5}
            value, *gradients = backend.value_and_gradient(
                pred, target, wrt=("pred", "target"), reduction="none", **options
            )
            assert_finite(value)
            assert (value >= 0).all()
            assert (value <= 1.25).all()
            for gradient in gradients:
                assert_finite(gradient, "gradient")
