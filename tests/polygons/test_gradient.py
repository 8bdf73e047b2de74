"""The gradient against central differences, autograd of the paper's formula, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import literal, oracle
from tests.helpers import (
    POLYGONS,
    assert_close,
    assert_gradient_close,
    assert_same,
    assert_zero,
    axis_grads,
    axis_weights,
    box,
    convex,
    crossing,
    generator,
    kinds,
    numpy64,
    numpy_options,
    random_boxes,
    rectangle_corners,
    regular,
    star,
    uniform,
)
from triton_mgiou import PAPER, mgiou_loss
from triton_mgiou.tuning import layouts


def differences(pred, target, **options):
    return oracle.gradient(numpy64(pred), numpy64(target), **numpy_options(**options))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("convexity_weight", [0.0, 0.7])
@axis_grads
@axis_weights
@kinds
def test_central_differences(backend, kind, *, axis_weight, axis_grad, convexity_weight, dtype, rtol):
    rng = generator(21)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": convexity_weight}
    for n, m in [(4, 4), (6, 3), (3, 7)]:
        pred, target = POLYGONS[kind](3, n, rng).to(dtype), POLYGONS[kind](3, m, rng).to(dtype)
        _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options)
        assert actual.dtype == dtype
        assert_gradient_close(actual, differences(pred, target, **options), rtol=rtol, what=f"{n} against {m}")


@axis_grads
@axis_weights
def test_central_differences_with_lengths_and_masks(backend, axis_weight, axis_grad):
    rng = generator(22)
    pred, target = star(8, 7, rng).float(), star(8, 6, rng).float()
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5}
    real = {
        "pred_lengths": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]),
        "target_lengths": torch.tensor([6, 5, 4, 3, 2, 1, 3, 0]),
    }
    _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options, **real)
    assert_gradient_close(actual, differences(pred, target, **options, **real), rtol=1e-4, what="lengths")
    real = {"pred_mask": uniform((8, 7), 0, 1, rng) < 0.6, "target_mask": uniform((8, 6), 0, 1, rng) < 0.6}
    _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options, **real)
    assert_gradient_close(actual, differences(pred, target, **options, **real), rtol=1e-4, what="masks")


@pytest.mark.parametrize("convexity_weight", [0.0, 0.7])
@axis_grads
@axis_weights
@kinds
def test_autograd_of_the_formula(backend, kind, axis_weight, axis_grad, convexity_weight):
    rng = generator(23)
    batch = 12
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": convexity_weight}
    for n, m in [(5, 8), (9, 4)]:
        pred, target = POLYGONS[kind](batch, n, rng), POLYGONS[kind](batch, m, rng)
        real = {
            "pred_lengths": torch.randint(3, n + 1, (batch,), generator=rng),
            "target_lengths": torch.randint(3, m + 1, (batch,), generator=rng),
        }
        leaf = pred.clone().requires_grad_()
        (expected,) = torch.autograd.grad(literal.per_sample_loss(leaf, target, **options, **real).sum(), leaf)
        _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options, **real)
        assert_gradient_close(actual, expected, rtol=1e-9, what="float64")
        leaf = pred.float().requires_grad_()
        (expected,) = torch.autograd.grad(literal.per_sample_loss(leaf, target.float(), **options, **real).sum(), leaf)
        _, actual = backend.value_and_gradient(leaf, target.float(), reduction="sum", **options, **real)
        assert_gradient_close(actual, expected, rtol=1e-4, what="float32")


@axis_grads
@axis_weights
@pytest.mark.parametrize("shift", [0.0, 8192.0])
def test_one_pixel_boxes(backend, shift, axis_weight, axis_grad):
    """Turned boxes, so that opposite edges, which tie in exact arithmetic, are told apart by the input's rounding.

    Where the axes are constants, boxes that are large for their coordinates stay tied: those samples are left out.
    """
    rng = generator(24)
    batch = backend.batch(32)
    low, high = torch.tensor([0.0, 0, 1, 1, 0.1]), torch.tensor([2.0, 2, 2, 2, 1.4])
    pred, target = (
        (rectangle_corners(low + (high - low) * uniform((batch, 5), 0, 1, rng)) + shift).float() for _ in range(2)
    )
    # A quadrangle near the box: three corners stay, one moves by up to a quarter of a pixel.
    pred[:, 0] += uniform((batch, 2), 0.05, 0.25, rng).float()
    target[:, 1] += uniform((batch, 2), 0.05, 0.25, rng).float()
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad}
    leaf = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(literal.per_sample_loss(leaf, target, **options).sum(), leaf)
    _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options)
    if not axis_grad and shift == 0:
        clear = ~nearly_tied(pred, target, 2e-6)
        assert clear.sum() > batch / 2
        actual, expected = actual.cpu()[clear], expected[clear]
    assert_gradient_close(actual, expected, rtol=1e-4)


def nearly_tied(pred, target, rounding):
    """Whether on some axis a vertex of the prediction is almost, but not exactly, at an extreme."""
    pred, target = pred.double(), target.double()
    edges = torch.cat([side.roll(-1, 1) - side for side in (pred, target)], dim=1)
    axes = torch.stack((edges[..., 1], -edges[..., 0]), dim=-1)
    projections = axes @ (pred - pred[:, :1]).mT
    gaps = torch.cat((projections.amax(-1, True) - projections, projections - projections.amin(-1, True)), dim=1)
    near = (gaps > 1e-9) & (gaps < rounding * axes.abs().sum(-1, keepdim=True).repeat(1, 2, 1))
    return near.flatten(1).any(1)


@pytest.mark.parametrize(
    ("ratio", "axis_grad", "unit"),
    [
        (1e-2, True, 0.0),
        (1e-2, False, 0.0),
        (1e2, True, 0.0),
        (1e2, False, 0.0),
        (1e-4, False, 0.0),
        # Here 1 / h and (|p| + |g|) / h^2 cancel to 1e-4 of themselves. The unit is one over the prediction's size.
        (1e-4, True, 1e-7),
        (1e4, True, 1e-7),
        (1e4, False, 1e-7),
    ],
)
@axis_weights
def test_very_different_sizes(backend, ratio, axis_grad, unit, axis_weight):
    rng = generator(25)
    batch = backend.batch(32)
    pred, target = (star(batch, 5, rng) * ratio).float(), convex(batch, 6, rng).float()
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad}
    leaf = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(literal.per_sample_loss(leaf, target, **options).sum(), leaf)
    _, actual = backend.value_and_gradient(pred, target, reduction="sum", **options)
    assert_gradient_close(actual, expected, rtol=1e-4, atol=unit / ratio)


@pytest.mark.parametrize("shape", [None, (6,), (6, 3)])
@pytest.mark.parametrize(
    ("reduction", "avg_factor"), [("none", None), ("none", 4.0), ("sum", None), ("mean", None), ("mean", 2.5)]
)
def test_every_reduction_with_an_upstream_gradient(backend, reduction, avg_factor, shape):
    rng = generator(26)
    pred, target = star(6, 5, rng).float(), convex(6, 4, rng).float()
    weight = None if shape is None else uniform(shape, 0, 2, rng).float()
    if weight is not None:
        weight[2] = 0
    upstream = uniform((6,), -2, 2, rng).float() if reduction == "none" else torch.tensor(-3.5)
    options = {"weight": weight, "reduction": reduction, "avg_factor": avg_factor}
    factors = oracle.sample_factors(6, **numpy_options(**options)) * numpy64(upstream)
    expected = differences(pred, target) * factors.reshape(6, 1, 1)
    _, actual = backend.value_and_gradient(pred, target, upstream, **options)
    assert_gradient_close(actual, expected, rtol=1e-4)
    if weight is not None:
        assert_zero(actual[2])


def test_the_gradient_is_linear_in_the_upstream_gradient(backend):
    rng = generator(27)
    pred, target = star(5, 5, rng).float(), convex(5, 4, rng).float()
    options = {"reduction": "none", "convexity_weight": 0.5}
    _, ones = backend.value_and_gradient(pred, target, **options)
    upstream = torch.tensor([4.0, 0.0, -0.5, 1.0, 2.0])
    _, scaled = backend.value_and_gradient(pred, target, upstream, **options)
    assert_same(scaled, ones * upstream.to(ones.device).reshape(5, 1, 1))


def test_an_expanded_upstream_gradient(backend):
    rng = generator(28)
    pred, target = star(5, 5, rng).float(), convex(5, 4, rng).float()
    upstream = torch.tensor(2.0).expand(5)
    assert upstream.stride() == (0,)
    _, expanded = backend.value_and_gradient(pred, target, upstream, reduction="none")
    _, full = backend.value_and_gradient(pred, target, torch.full((5,), 2.0), reduction="none")
    assert_same(expanded, full)
    _, total = backend.value_and_gradient(pred, target, reduction="sum")
    assert_same(total * 2, full)
    strided = torch.tensor([2.0, 9.0]).repeat(5)[::2]
    _, strided = backend.value_and_gradient(pred, target, strided, reduction="none")
    assert_same(strided, full)


@axis_grads
@axis_weights
def test_the_target_has_the_gradient_of_the_swapped_call(backend, axis_weight, axis_grad):
    rng = generator(29)
    batch = backend.batch(32)
    pred, target = star(batch, 6, rng), convex(batch, 5, rng)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "none"}
    lengths = {"pred_lengths": torch.randint(3, 7, (batch,), generator=rng)}
    lengths["target_lengths"] = torch.randint(3, 6, (batch,), generator=rng)
    swapped_lengths = {"pred_lengths": lengths["target_lengths"], "target_lengths": lengths["pred_lengths"]}
    upstream = uniform((batch,), -1, 2, rng)
    _, to_target = backend.value_and_gradient(pred, target, upstream, ("target",), **options, **lengths)
    _, swapped = backend.value_and_gradient(target, pred, upstream, ("pred",), **options, **swapped_lengths)
    assert_gradient_close(to_target, swapped, rtol=1e-12, what="swapped")
    expected = differences(pred, target, side="target", axis_weight=axis_weight, axis_grad=axis_grad, **lengths)
    assert_gradient_close(to_target, expected * numpy64(upstream).reshape(-1, 1, 1), rtol=1e-6, what="differences")
    _, to_pred = backend.value_and_gradient(pred, target, upstream, ("pred",), **options, **lengths)
    _, *both = backend.value_and_gradient(pred, target, upstream, ("pred", "target"), **options, **lengths)
    assert_same(both[0], to_pred, "pred, asked for with target")
    assert_same(both[1], to_target, "target, asked for with pred")


@pytest.mark.parametrize("term", ["convexity_weight", "boundary_weight"])
def test_a_term_gives_the_target_no_gradient(backend, term):
    """One with a dent, which the convexity term would straighten in a prediction."""
    rng = generator(30)
    pred, target = crossing(6, 6, rng).float(), star(6, 5, rng).float()
    target[:, 1] = target.mean(1) + 0.1 * target[:, 1]
    _, plain = backend.value_and_gradient(pred, target, wrt=("target",))
    _, with_term = backend.value_and_gradient(pred, target, wrt=("target",), **{term: 2.0})
    assert_same(with_term, plain)


@axis_weights
def test_the_convexity_terms_gradient_ignores_axis_grad(backend, axis_weight):
    rng = generator(31)
    pred, target = crossing(6, 6, rng), star(6, 5, rng)
    parts = []
    for axis_grad in (True, False):
        options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "sum"}
        _, plain = backend.value_and_gradient(pred, target, **options)
        _, with_term = backend.value_and_gradient(pred, target, convexity_weight=1.0, **options)
        parts.append(with_term - plain)
    assert parts[0].abs().amax() > 0.01
    assert_gradient_close(parts[1], parts[0], rtol=1e-10)


@pytest.mark.parametrize("convexity_weight", [0.0, 3.0])
@axis_grads
@axis_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_gradient_at_the_target_is_exactly_zero(backend, dtype, axis_weight, axis_grad, convexity_weight):
    rng = generator(32)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": convexity_weight}
    shapes = {
        "a box": box(3, 5, 10, 7),
        "a large box": box(-3e4, 5, 1e4, 7),
        "boxes": rectangle_corners(random_boxes(6, rng)),
        "polygons": convex(6, 7, rng),
        "a regular polygon": regular(12),
        "a triangle": regular(3) * 100,
    }
    if convexity_weight == 0:
        shapes |= {"stars": star(6, 7, rng), "crossing": crossing(6, 7, rng)}
    for name, shape in shapes.items():
        polygon = shape.to(dtype)
        if convexity_weight and dtype in (torch.float16, torch.bfloat16) and name != "a box":
            continue  # rounding may have made it slightly concave
        value, *gradients = backend.value_and_gradient(
            polygon, polygon.clone(), wrt=("pred", "target"), reduction="none", **options
        )
        assert_zero(value, f"loss of {name}")
        for gradient in gradients:
            assert_zero(gradient, f"gradient of {name}")


@axis_grads
def test_the_gradient_at_a_padded_target_is_exactly_zero(backend, axis_grad):
    polygon = convex(6, 8, generator(33)).float()
    lengths = torch.tensor([3, 4, 5, 6, 7, 8])
    other = torch.full((6, 9, 2), torch.nan)
    other[:, :8] = polygon
    value, gradient = backend.value_and_gradient(
        polygon, other, pred_lengths=lengths, target_lengths=lengths, axis_grad=axis_grad, reduction="none"
    )
    assert_zero(value, "loss")
    assert_zero(gradient)


# Boxes of width 1 and height 1, and what d loss / d vertex is: the axes are 4 in x and 4 in y, so each carries 1/16.
# An extreme of the prediction that reaches past the target's has c - q, one within it c, one at it c - q / 2, with
# c = 1 / h and q = (|p| + |g|) / h^2; two corners share it. In y everything ties and c - q / 2 = 1 - 2 / 2 = 0.
UNIT = box(0, 0, 1, 1)
ALIGNED = [
    # h = 3/2, |p| + |g| = 2: c = 2/3, q = 8/9. Left -(c - q) = 2/9, right c = 2/3; times -4/16/2.
    pytest.param(box(0.5, 0, 1.5, 1), (-1 / 36, -1 / 12), id="target to the right"),
    pytest.param(box(-0.5, 0, 0.5, 1), (1 / 12, 1 / 36), id="target to the left"),
    # h = 2, |p| + |g| = 3: c = 1/2, q = 3/4. Left ties: -(c - q / 2) = -1/8, right c = 1/2.
    pytest.param(box(0, 0, 2, 1), (1 / 64, -1 / 16), id="target twice as wide, left sides aligned"),
    # h = 1, |p| + |g| = 3/2: c = 1, q = 3/2. Left ties: -(c - q / 2) = -1/4, right c - q = -1/2.
    pytest.param(box(0, 0, 0.5, 1), (1 / 32, 1 / 16), id="target half as wide, left sides aligned"),
    # h = 2, |p| + |g| = 2: c = 1/2, q = 1/2. Left -(c - q) = 0, right c = 1/2.
    pytest.param(box(1, 0, 2, 1), (0.0, -1 / 16), id="touching"),
]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@axis_grads
@pytest.mark.parametrize(("target", "expected"), ALIGNED)
def test_aligned_boxes_by_hand(backend, target, expected, *, axis_grad, transpose, reverse, start):
    """The path through the axes adds nothing: no axis turns, by symmetry, and its length does not matter."""
    left, right = expected
    pred, wanted = UNIT, torch.tensor([[[left, 0.0], [right, 0], [right, 0], [left, 0]]])
    if transpose:
        pred, target, wanted = pred.flip(-1), target.flip(-1), wanted.flip(-1)
    if reverse:
        pred, wanted = pred.flip(1), wanted.flip(1)
    pred, wanted = pred.roll(start, 1), wanted.roll(start, 1)
    _, actual = backend.value_and_gradient(pred, target, axis_grad=axis_grad)
    assert_close(actual, wanted, atol=1e-7)


def with_midpoints(polygon):
    """The same outline with a vertex in the middle of each side."""
    return torch.stack((polygon, (polygon + polygon.roll(-1, 1)) / 2), dim=2).flatten(1, 2)


@axis_grads
@pytest.mark.parametrize(("target", "expected"), ALIGNED)
def test_aligned_boxes_with_vertices_on_their_sides(backend, target, expected, axis_grad):
    """Twice as many axes on one side, and three vertices to share an extreme: each gets a third."""
    left, right = expected
    two = torch.tensor([[[left, 0.0], [right, 0], [right, 0], [left, 0]]])
    left, right = left * 2 / 3, right * 2 / 3
    three = [[left, 0.0], [0, 0], [right, 0], [right, 0], [right, 0], [0, 0], [left, 0], [left, 0]]
    _, actual = backend.value_and_gradient(UNIT, with_midpoints(target), axis_grad=axis_grad)
    assert_close(actual, two, atol=1e-7, what="vertices on the target's sides")
    _, actual = backend.value_and_gradient(with_midpoints(UNIT), target, axis_grad=axis_grad)
    assert_close(actual, torch.tensor([three]), atol=1e-7, what="vertices on the prediction's sides")


def test_aligned_boxes_by_hand_with_length_weights(backend):
    """Without the path as with uniform weights; with it, each edge's length l adds -(GIoU1D - MGIoU) / 16 per unit.

    The target is half a width to the right: GIoU1D is 1/3 in x, 1 in y, MGIoU 2/3. Longer vertical edges (normals in
    x) add 1/48, longer horizontal ones -1/48: the corners are pulled outwards in x and inwards in y.
    """
    _, stopped = backend.value_and_gradient(UNIT, box(0.5, 0, 1.5, 1), axis_weight="length", axis_grad=False)
    plain = torch.tensor([[[-1 / 36, 0.0], [-1 / 12, 0], [-1 / 12, 0], [-1 / 36, 0]]])
    assert_close(stopped, plain, atol=1e-7)
    _, whole = backend.value_and_gradient(UNIT, box(0.5, 0, 1.5, 1), axis_weight="length", axis_grad=True)
    outwards = torch.tensor([[[1.0, -1], [-1, -1], [-1, 1], [1, 1]]]) / 48
    assert_close(whole, plain + outwards, atol=1e-7)


@axis_grads
@axis_weights
def test_aligned_boxes_have_symmetric_gradients(backend, axis_weight, axis_grad):
    """Mirrored in x or y the sample is the same, so its gradient is mirrored too, from corner to corner."""
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad}
    for target in (box(-2, -1, 2, 1), box(-0.5, -0.25, 0.5, 0.25), box(-2, -0.25, 2, 0.25), box(-1, -3, 1, 3)):
        _, gradient = backend.value_and_gradient(box(-1, -1, 1, 1), target, **options)
        gradient = gradient[0].cpu()
        assert gradient.abs().amax() > 0.01
        for corner, signs in [(1, (-1, 1)), (2, (-1, -1)), (3, (1, -1))]:
            assert_close(gradient[corner] * torch.tensor(signs), gradient[0], atol=1e-8, what=f"corner {corner}")


@axis_weights
def test_the_gradient_has_no_part_that_moves_or_scales_both(backend, axis_weight):
    """The loss does not change when both polygons are moved or scaled, so neither does any part of the gradient."""
    rng = generator(34)
    batch = backend.batch(16)
    pred, target = star(batch, 6, rng), star(batch, 5, rng)
    _, to_pred, to_target = backend.value_and_gradient(
        pred, target, wrt=("pred", "target"), axis_weight=axis_weight, reduction="sum"
    )
    moved = to_pred.cpu().sum(1) + to_target.cpu().sum(1)
    assert_close(moved, torch.zeros(batch, 2), atol=1e-14, what="translation")
    if axis_weight != "soft":  # its extent has no gradient
        scaled = (to_pred.cpu() * pred).sum((1, 2)) + (to_target.cpu() * target).sum((1, 2))
        assert_close(scaled, torch.zeros(batch), atol=1e-14, what="scaling")


def test_a_step_against_the_gradient_lowers_the_loss(backend):
    rng = generator(35)
    batch = backend.batch(32)
    pred, target = star(batch, 6, rng), convex(batch, 6, rng)
    value, gradient = backend.value_and_gradient(pred, target, reduction="none")
    step = 1e-5 * gradient / gradient.square().sum((1, 2), keepdim=True).sqrt()
    after = backend.loss(pred.to(backend.device) - step, target.to(backend.device), reduction="none")
    expected = -(step * gradient).sum((1, 2))
    assert_close(after - value, expected, atol=1e-9)
    assert (after < value).all()


def test_no_gradient_where_none_is_asked_for(backend):
    rng = generator(36)
    pred, target = star(4, 5, rng).to(backend.device), star(4, 5, rng).to(backend.device)
    leaf = pred.clone().requires_grad_()
    backend.loss(leaf, target).backward()
    assert target.grad is None
    first = leaf.grad.clone()
    backend.loss(leaf, target).backward()  # accumulates
    assert_close(leaf.grad, 2 * first, atol=0.0)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_weight_that_is_learned(backend, shape):
    """Its gradient is the sample's loss, spread over the columns; the prediction's stays as it is."""
    rng = generator(42)
    pred, target = star(5, 5, rng).float(), convex(5, 4, rng).float()
    weight = uniform(shape, 0, 2, rng).float().to(backend.device)
    _, expected = backend.value_and_gradient(pred, target, weight=weight, avg_factor=2.0)
    each = backend.loss(pred.to(backend.device), target.to(backend.device), reduction="none").cpu()
    leaf, weight = pred.to(backend.device).requires_grad_(), weight.requires_grad_()
    backend.loss(leaf, target.to(backend.device), weight=weight, avg_factor=2.0).backward()
    columns = 1 if len(shape) == 1 else shape[1]
    wanted = each.reshape(5, *[1] * (len(shape) - 1)).expand(shape) / 2 / columns
    assert_close(weight.grad, wanted, atol=1e-6, what="gradient of the weight")
    assert_gradient_close(leaf.grad, expected, rtol=1e-6)


@axis_weights
@pytest.mark.parametrize("convexity_weight", [0.0, 0.5])
def test_gradcheck(backend, axis_weight, convexity_weight):
    """Around the whole prediction lies the target, so that the extent, which has no gradient, does not move."""
    rng = generator(37)
    batch = 1 if backend.is_slow else 3
    pred = star(batch, 5, rng) * 0.2
    target = convex(batch, 4, rng) * 10
    pred = pred + target.mean(1, keepdim=True)
    lengths = torch.tensor([4, 3, 5], device=backend.device)[:batch]

    def loss(pred):
        return backend.loss(
            pred,
            target.to(backend.device),
            pred_lengths=lengths,
            axis_weight=axis_weight,
            convexity_weight=convexity_weight,
            reduction="none",
        )

    assert torch.autograd.gradcheck(loss, pred.to(backend.device).requires_grad_(), eps=1e-6, atol=1e-7)


def test_gradcheck_of_both_sides(backend):
    rng = generator(38)
    batch = 1 if backend.is_slow else 3
    pred, target = star(batch, 4, rng).to(backend.device), star(batch, 3, rng).to(backend.device)

    def loss(pred, target):
        return backend.loss(pred, target, axis_weight="uniform", weight=pred.new_tensor([2.0, 1.0, 0.5])[:batch])

    assert torch.autograd.gradcheck(loss, (pred.requires_grad_(), target.requires_grad_()), eps=1e-6, atol=1e-7)


@axis_grads
@pytest.mark.parametrize("axis_weight", ["uniform", "length"])
def test_double_backward(axis_weight, axis_grad):
    """Only the eager backend has a second derivative."""
    rng = generator(39)
    pred, target = star(2, 5, rng).requires_grad_(), star(2, 4, rng)

    def loss(pred):
        options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 0.5}
        return mgiou_loss(pred, target, backend="eager", reduction="none", **PAPER | options)

    if axis_grad:
        assert torch.autograd.gradgradcheck(loss, pred, eps=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss(pred).sum(), pred, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), pred)
    assert np.isfinite(numpy64(second)).all()
    assert second.abs().amax() > 0.01


def test_torch_func_grad(backend):
    rng = generator(40)
    pred, target = star(4, 5, rng).float().to(backend.device), star(4, 4, rng).float().to(backend.device)
    options = {"reduction": "sum", "convexity_weight": 0.5}
    if backend.name == "triton":
        with pytest.raises(RuntimeError, match=r"torch\.func transform.*expected.*\"auto\" or \"eager\""):
            torch.func.grad(lambda pred: backend.loss(pred, target, **options))(pred)
        return
    _, expected = backend.value_and_gradient(pred, target, **options)
    actual, value = torch.func.grad_and_value(lambda pred: backend.loss(pred, target, **options))(pred)
    assert_same(actual, expected)
    assert_same(value, backend.loss(pred, target, **options))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch.func.vmap knows Tensor.view(dtype) since 2.13")
def test_per_sample_gradients_by_vmap():
    rng = generator(41)
    pred, target = star(4, 5, rng), star(4, 4, rng)

    def loss(pred, target):
        return mgiou_loss(pred.unsqueeze(0), target.unsqueeze(0), reduction="sum", backend="eager")

    actual = torch.func.vmap(torch.func.grad(loss))(pred, target)
    leaf = pred.clone().requires_grad_()
    mgiou_loss(leaf, target, reduction="sum", backend="eager").backward()
    assert_close(actual, leaf.grad, atol=1e-14)


@pytest.mark.parametrize("boundary_weight", [0.0, 0.25])
@pytest.mark.parametrize("real", ["all", "some"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_program_goes_on_with_other_samples(backend, monkeypatch, reduction, real, boundary_weight):
    """Two programs take five blocks, the last of which is not full, as where there are more samples than programs."""
    if backend.name == "eager":
        pytest.skip("of the kernel")
    monkeypatch.setattr(layouts.Layout, "grid", lambda *_: (2, 1, 1))
    rng = generator(37)
    batch = 4 * 128 + 5
    pred, target = star(batch, 3, rng).float(), convex(batch, 3, rng).float()
    options = {"reduction": reduction, "boundary_weight": boundary_weight}
    if real == "some":
        options["pred_lengths"] = torch.arange(batch) % 4
    upstream = uniform((batch,), 0.5, 2, rng).float() if reduction == "none" else None
    value, gradient = backend.value_and_gradient(pred, target, upstream, **options)
    leaf = pred.double().requires_grad_()
    want = mgiou_loss(leaf, target.double(), backend="eager", **PAPER | options)
    (right,) = torch.autograd.grad(want, leaf, None if upstream is None else upstream.double())
    assert_close(value, want, atol=2e-6)
    assert_gradient_close(gradient, right, rtol=1e-4)
