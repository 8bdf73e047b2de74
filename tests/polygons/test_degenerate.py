"""What the definition says about input that is no ordinary pair of polygons."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.helpers import (
    AXIS_WEIGHTS,
    BOTH,
    INF,
    NAN,
    assert_close,
    assert_gradient_close,
    assert_same,
    assert_zero,
    axis_grads,
    axis_weights,
    box,
    convex,
    generator,
    numpy64,
    points,
    star,
    uniform,
)


@pytest.mark.parametrize("convexity_weight", [0.0, 1.0])
@axis_grads
@axis_weights
@pytest.mark.parametrize(
    ("pred", "target"),
    [
        pytest.param(points((1, 2)), points((3, 5)), id="one vertex each"),
        pytest.param(points((1, 2)), points((1, 2)), id="the same vertex"),
        pytest.param(points((1, 2), (1, 2), (1, 2)), points((3, 5), (3, 5)), id="repeated vertices"),
        pytest.param(points((0, 0), (0, 0)), points((0, 0), (0, 0)), id="all at the origin"),
        pytest.param(points((-0.0, 0)), points((0, -0.0)), id="signed zeros"),
        pytest.param(points((1e-45, 0)), points((0, 1e-45)), id="subnormal"),
        pytest.param(points((1, 0)), points((1, 1e-45)), id="apart by the smallest number there is"),
        pytest.param(points((3e38, 0)), points((0, -3e38)), id="huge"),
        pytest.param(points((3e38, 3e38), (3e38, 3e38)), points((-3e38, -3e38)), id="huge and apart"),
    ],
)
def test_two_points_have_no_axis(backend, pred, target, *, axis_weight, axis_grad, convexity_weight):
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": convexity_weight}
    value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, reduction="none", **options)
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


@axis_grads
@axis_weights
@pytest.mark.parametrize("copies", [1, 4])
def test_a_point_against_a_polygon(backend, copies, axis_weight, axis_grad):
    """Only the polygon has axes. Inside it, GIoU1D is 0 / h + |g| / h - 1 = 0 on each."""
    square = box(0, 0, 2, 2)
    inside, outside = points((0.5, 1.25)).expand(1, copies, 2), points((4.0, 1.0)).expand(1, copies, 2)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "none"}
    for pred, target in [(inside, square), (square, inside)]:
        value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, **options)
        assert_close(value, [0.5], atol=0.0)
        for gradient in gradients:
            assert_zero(gradient)
    # Outside, in x: |p| + |g| = 2 and h = 4, so GIoU1D = -1/2; in y 0. Each unit towards it takes 2/16 of GIoU1D
    # in x, which is half of the axes: 1/2 * 1/2 * 1/8 in all.
    value, gradient = backend.value_and_gradient(outside, square, **options)
    assert_close(value, [(1 + 1 / 4) / 2], atol=1e-7)
    assert_close(gradient.sum(1), [[1 / 32, 0.0]], atol=1e-8, what="gradient")
    value, gradient = backend.value_and_gradient(square, outside, **options)
    assert_close(value, [(1 + 1 / 4) / 2], atol=1e-7)
    assert_close(gradient.sum(1), [[-1 / 32, 0.0]], atol=1e-8, what="gradient")


@axis_grads
@axis_weights
def test_segments(backend, axis_weight, axis_grad):
    """A segment has two opposite edges: twice the same axis."""
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 1.0, "reduction": "none"}
    pred = points((0.0, 0.0), (4.0, 0.0))
    for target, expected, what in [
        (points((0.0, 0.0), (4.0, 0.0)), 0.0, "equal"),
        (points((4.0, 0.0), (0.0, 0.0)), 0.0, "the other way round"),
        (points((1.0, 0.0), (9.0, 0.0)), 0.0, "on one line: all projections equal"),
        (points((0.0, 1.0), (4.0, 1.0)), 1.0, "parallel: two different points"),
        # In y: 0 and [0, 2], so 0; in x: [0, 4] and 0, so 0.
        (points((1.0, 0.0), (1.0, 2.0)), 0.5, "a corner"),
        (box(0, 0, 4, 4), 0.25, "a side of a square"),
    ]:
        value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, **options)
        want = oracle.per_sample_loss(numpy64(pred), numpy64(target), axis_weight=axis_weight)
        assert_close(value, want, atol=1e-6, what=what)
        if what != "a side of a square":
            assert_close(value, [expected], atol=1e-7, what=what)
        for gradient in gradients:
            assert torch.isfinite(gradient).all(), what
            if expected == 0:
                assert_zero(gradient, f"gradient, {what}")


@axis_weights
def test_all_projections_equal_counts_as_an_axis_without_loss(backend, axis_weight):
    """Three vertices on the target's line: h is 0 on its normal."""
    line = points((0, 0), (1, 1), (3, 3))
    other = points((5, 5), (7, 7))
    value, *gradients = backend.value_and_gradient(line, other, wrt=BOTH, axis_weight=axis_weight)
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


@axis_weights
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_convexity_term_of_small_polygons_is_zero(backend, size, axis_weight):
    rng = generator(61)
    pred, target = uniform((6, size, 2), -1, 1, rng).float(), convex(6, 5, rng).float()
    plain = backend.value_and_gradient(pred, target, axis_weight=axis_weight, reduction="none")
    with_term = backend.value_and_gradient(
        pred, target, axis_weight=axis_weight, reduction="none", convexity_weight=5.0
    )
    assert_close(with_term[0], plain[0], atol=0)
    assert_close(with_term[1], plain[1], atol=0, what="gradient")


@axis_weights
def test_the_convexity_term_of_collinear_vertices_is_zero(backend, axis_weight):
    target = box(0, 0, 4, 4)
    for pred in (points((0, 0), (1, 0), (4, 0), (2, 0)), points((0, 0), (2, 0), (4, 0), (4, 4), (0, 4))):
        plain = backend.value_and_gradient(pred, target, axis_weight=axis_weight)
        with_term = backend.value_and_gradient(pred, target, axis_weight=axis_weight, convexity_weight=5.0)
        assert_close(with_term[0], plain[0], atol=0)
        assert_close(with_term[1], plain[1], atol=0, what="gradient")


@pytest.mark.parametrize("convexity_weight", [0.0, 1.0])
@axis_weights
@pytest.mark.parametrize("by", ["lengths", "mask"])
@pytest.mark.parametrize("empty", ["pred", "target", "both"])
def test_a_side_without_a_vertex_has_no_loss_whatever_the_other_holds(
    backend, empty, by, *, axis_weight, convexity_weight
):
    rng = generator(62)
    pred, target = star(4, 5, rng).float(), star(4, 6, rng).float()
    lengths = {"pred": torch.tensor([5, 4, 3, 5]), "target": torch.tensor([6, 4, 6, 3])}
    for side in BOTH:
        if empty in (side, "both"):
            lengths[side][1:3] = 0
    pred[2, 0, 0], target[2, 1, 1] = NAN, INF  # loses against the length of 0
    if by == "lengths":
        options = {f"{side}_lengths": lengths[side] for side in BOTH}
    else:
        sizes = {"pred": 5, "target": 6}
        options = {f"{side}_mask": torch.arange(sizes[side]) < lengths[side].unsqueeze(1) for side in BOTH}
    options |= {"axis_weight": axis_weight, "convexity_weight": convexity_weight, "reduction": "none"}
    value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, **options)
    assert_zero(value[1:3], "loss")
    assert (value[[0, 3]] > 0).all()
    for gradient in gradients:
        assert_zero(gradient[1:3])
        assert (gradient[[0, 3]].abs().amax((1, 2)) > 0).all()


def test_lengths_outside_the_row_are_clamped(backend):
    rng = generator(63)
    pred, target = star(4, 5, rng).float(), star(4, 6, rng).float()
    wild, real = torch.tensor([-7, 99, 3, 2**31 - 1]), torch.tensor([0, 5, 3, 5])
    actual = backend.value_and_gradient(pred, target, pred_lengths=wild, reduction="none")
    expected = backend.value_and_gradient(pred, target, pred_lengths=real, reduction="none")
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], "gradient")
    wild, real = torch.tensor([-(2**31), 99, 3, 6]), torch.tensor([0, 6, 3, 6])
    actual = backend.value_and_gradient(pred, target, target_lengths=wild, reduction="none")
    expected = backend.value_and_gradient(pred, target, target_lengths=real, reduction="none")
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], "gradient")


@pytest.mark.parametrize("convexity_weight", [0.0, 1.0])
@axis_grads
@axis_weights
@pytest.mark.parametrize("side", BOTH)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_sample(backend, bad, side, *, axis_weight, axis_grad, convexity_weight):
    rng = generator(64)
    clean = {"pred": star(4, 5, rng).float(), "target": star(4, 6, rng).float()}
    lengths = {"pred_lengths": torch.tensor([5, 4, 3, 5]), "target_lengths": torch.tensor([6, 5, 4, 6])}
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": convexity_weight, **lengths}
    spoilt = {name: vertices.clone() for name, vertices in clean.items()}
    others = [0, 1, 3]
    for place in [(2, 0, 0), (2, 2, 1)]:  # the first vertex; the last real one
        spoilt[side] = clean[side].clone()
        spoilt[side][place] = bad
        for reduction in ("none", "sum", "mean"):
            want = backend.value_and_gradient(**clean, wrt=BOTH, reduction=reduction, **options)
            got = backend.value_and_gradient(**spoilt, wrt=BOTH, reduction=reduction, **options)
            if reduction == "none":
                assert torch.isnan(got[0][2]), place
                assert_same(got[0][others], want[0][others])
            else:
                assert torch.isnan(got[0]), place
            for name, got_gradient, want_gradient in zip(BOTH, got[1:], want[1:], strict=True):
                what = f"gradient of {name} with {bad} at {place}, {reduction}"
                real = lengths[f"{name}_lengths"][2]
                assert_same(got_gradient[others], want_gradient[others], what)
                assert torch.isnan(got_gradient[2, :real]).all(), what
                assert_zero(got_gradient[2, real:], f"{what}: padding")


@axis_grads
@axis_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0, -1, -20, -100, -120])
def test_an_extent_far_below_the_coordinates(backend, exponent, dtype, *, axis_weight, axis_grad):
    """All x are equal and y is some of the smallest numbers there are: any value in range will do, but no NaN."""
    smallest = 2.0**-149 if dtype == torch.float32 else 2.0**-1074
    x = 2.0**exponent
    flat = points((x, 0), (x, 3 * smallest), dtype=dtype)
    other = points((x, smallest), (x, 2 * smallest), (x, 5 * smallest), dtype=dtype)
    slanted = points((x, 0), (x, smallest), (x * (1 + torch.finfo(dtype).eps), 3 * smallest), dtype=dtype)
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "convexity_weight": 1.0}
    for pred, target in [(flat, other), (other, slanted), (slanted, flat), (flat, flat), (slanted, slanted)]:
        value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, **options)
        assert 0 <= value <= 1.5, (pred, target)
        for gradient in gradients:
            assert torch.isfinite(gradient).all(), (pred, target)
        if pred is target:
            assert_zero(value, "loss")


@pytest.mark.parametrize("convexity_weight", [0.0, 1.0])
@axis_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_against_a_point_or_a_single_vertex(backend, dtype, axis_weight, convexity_weight):
    """NaN is not lost where a comparison with it would be false: no edge, no axis, equal extremes."""
    for pred, target in [
        (points((NAN, 0), dtype=dtype), points((1, 1), dtype=dtype)),
        (points((1, 1), dtype=dtype), points((NAN, 0), dtype=dtype)),
        (points((NAN, NAN), (NAN, NAN), dtype=dtype), points((NAN, NAN), (NAN, NAN), dtype=dtype)),
        (points((0, 0), (1, 0), (INF, INF), dtype=dtype), box(0, 0, 1, 1, dtype=dtype)),
        (points((INF, INF), (INF, INF), dtype=dtype), points((INF, INF), dtype=dtype)),
        (box(0, 0, 1, 1, dtype=dtype), points((0, 0), (1, 0), (0, NAN), dtype=dtype)),
    ]:
        value, *gradients = backend.value_and_gradient(
            pred, target, wrt=BOTH, axis_weight=axis_weight, convexity_weight=convexity_weight
        )
        assert torch.isnan(value), (pred, target)
        for gradient in gradients:
            assert torch.isnan(gradient).all(), (pred, target)


@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(0)}, {"weight": torch.ones(0, 3)}, {"avg_factor": 4.0}])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_empty_batch_is_a_zero_in_the_graph(backend, reduction, options):
    if reduction == "sum" and "avg_factor" in options:
        options = {"pred_lengths": torch.zeros(0, dtype=torch.long), "target_mask": torch.ones(0, 3, dtype=torch.bool)}
    for dtype in (torch.float32, torch.float16, torch.float64):
        pred, target = torch.zeros(0, 5, 2, dtype=dtype), torch.zeros(0, 3, 2, dtype=dtype)
        value, *gradients = backend.value_and_gradient(pred, target, wrt=BOTH, reduction=reduction, **options)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert_zero(value, "loss")
        assert [gradient.shape for gradient in gradients] == [pred.shape, target.shape]
        assert [gradient.dtype for gradient in gradients] == [dtype, dtype]


def test_an_empty_batch_with_an_avg_factor_of_zero(backend):
    """No positives on any rank: mmdetection then passes a factor of 0, as a number or a tensor."""
    pred = torch.zeros(0, 4, 2, device=backend.device, requires_grad=True)
    for factor in (0, 0.0, torch.tensor(0.0, device=backend.device)):
        value = backend.loss(pred, pred.detach(), avg_factor=factor)
        assert_zero(value, "loss")
        value.backward()
        assert pred.grad.shape == pred.shape


def test_an_empty_batch_with_a_negative_avg_factor(backend):
    """Nothing is divided by it: 0, of a number and of a tensor."""
    pred = torch.zeros(0, 4, 2, device=backend.device)
    for factor in (-1, -0.5, torch.tensor(-1.0, device=backend.device)):
        assert_zero(backend.loss(pred, pred, avg_factor=factor), f"avg_factor={factor}")


def test_an_empty_batch_does_not_spoil_a_network(backend):
    layer = torch.nn.Linear(3, 8, device=backend.device)
    pred = layer(torch.zeros(0, 3, device=backend.device)).view(0, 4, 2)
    backend.loss(pred, torch.zeros(0, 4, 2, device=backend.device)).backward()
    assert_zero(layer.weight.grad)
    assert_zero(layer.bias.grad)


SUBNORMAL = 2.0**-149


def test_subnormal_coordinates_keep_their_value_and_gradient(backend):
    """Coordinates of up to 22 bits times the smallest number there is: exact, and their gradient is just in range."""
    rng = generator(65)
    pred, target = (star(6, 5, rng) * 2**20).round(), (convex(6, 6, rng) * 2**20).round()
    tiny_pred, tiny_target = (pred * SUBNORMAL).float(), (target * SUBNORMAL).float()
    assert (tiny_pred.abs() < torch.finfo(torch.float32).tiny).all()
    assert (tiny_pred.double() == pred * SUBNORMAL).all()
    for axis_weight in AXIS_WEIGHTS:
        options = {"axis_weight": axis_weight, "reduction": "none"}
        want = backend.value_and_gradient(pred, target, **options)
        got = backend.value_and_gradient(tiny_pred, tiny_target, **options)
        assert_close(got[0], want[0], atol=1e-6)
        assert_gradient_close(got[1].double() * SUBNORMAL, want[1], rtol=1e-4)


def test_a_gradient_beyond_float32_saturates(backend):
    """At a thousand times the smallest number the gradient would be near 1e41."""
    rng = generator(66)
    pred, target = (star(6, 5, rng) * 2**10).round(), (convex(6, 6, rng) * 2**10).round()
    _, want = backend.value_and_gradient(pred, target, reduction="none")
    _, got = backend.value_and_gradient((pred * SUBNORMAL).float(), (target * SUBNORMAL).float(), reduction="none")
    largest = torch.finfo(torch.float32).max
    want = want / SUBNORMAL
    beyond = want.abs() > 1.001 * largest
    assert beyond.double().mean() > 0.8
    assert_close(got[beyond], want[beyond].sign() * largest, atol=0.0)
    assert_close(got[~beyond], want[~beyond], atol=1e-3 * largest)


def test_an_infinite_upstream_gradient_is_seen(backend):
    """A GradScaler finds its scale too large by an Inf or a NaN in the gradient: saturation must not hide it."""
    rng = generator(67)
    pred, target = star(3, 5, rng).float(), convex(3, 6, rng).float()
    for size in (1.0, SUBNORMAL * 2**10, 2.0**120):
        upstream = torch.tensor([1.0, INF, NAN])
        _, gradient = backend.value_and_gradient(pred * size, target * size, upstream, reduction="none")
        assert torch.isfinite(gradient[0]).all()
        assert not torch.isfinite(gradient[1]).any()
        assert torch.isnan(gradient[2]).all()


def test_an_overflow_behind_the_upstream_gradient_is_seen(backend):
    """A point's gradient is a difference of two that may overflow: it is the true one, or not finite."""
    rng = generator(68)
    pred, target = torch.randn(500, 1, 2, generator=rng), torch.randn(500, 2, 2, generator=rng)
    upstream = torch.full((500,), 3e38)
    _, *found = backend.value_and_gradient(pred, target, upstream, reduction="none", wrt=BOTH)
    _, *right = backend.value_and_gradient(
        pred.double(), target.double(), upstream.double(), reduction="none", wrt=BOTH
    )
    for got, want in zip(found, right, strict=True):
        assert ((got.double() - want).abs() <= 1e-3 * (want.abs() + 3e38))[got.isfinite()].all()


@axis_weights
@pytest.mark.parametrize("largest", [1.0, 3e38])
def test_a_needle_along_each_half_axis(backend, largest, axis_weight):
    """Each of the four bounds has to be seen by itself: the other three are 2^100 times smaller."""
    thin = 2.0**-100
    sides = box(0, 0, 1, thin, torch.float64), box(0.25, 0, 0.75, thin / 2, torch.float64)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for _ in range(4):
        pred, target = ((side * largest).float() for side in sides)
        value, *gradients = backend.value_and_gradient(
            pred, target, axis_weight=axis_weight, boundary_weight=1.0, wrt=BOTH
        )
        assert 0 <= value <= 2, pred
        for gradient in gradients:
            assert torch.isfinite(gradient).all(), pred
        sides = tuple(side @ turn for side in sides)


@axis_weights
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 3e38), (torch.float64, 1.7e308), (torch.bfloat16, 3e38), (torch.float16, 6e4)],
)
def test_the_largest_coordinates_are_like_any_other(backend, dtype, largest, axis_weight):
    """Boxes from corner to corner of what the type can hold: no difference of coordinates may overflow."""
    pred, target = box(-1, -1, 1, 1, torch.float64), box(-0.5, -1, 1, 0.5, torch.float64)
    options = {"axis_weight": axis_weight, "convexity_weight": 1.0, "reduction": "none"}
    want = backend.value_and_gradient(pred, target, **options)
    scale = torch.tensor(largest, dtype=dtype).double()
    got = backend.value_and_gradient((pred * scale).to(dtype), (target * scale).to(dtype), **options)
    assert_close(got[0], want[0], atol=1e-6)
    if dtype in (torch.float32, torch.float64):
        # Subnormal: a few digits are left.
        unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        expected = want[1] / scale.to(want[1].device)
        assert_close(got[1], expected, atol=2 * unit, rtol=1e-4, what="gradient")


@pytest.mark.parametrize("axis_weight", ["length", "soft"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 48), (torch.float64, 400)])
def test_the_longest_edge_that_counts_as_0(backend, dtype, bits, axis_weight):
    """A square with a corner at 0 and a point at x = 1: (1 - GIoU1D) / 2 is 1 along x and 1/2 along y. Or no axis."""
    for side, expected in ((2.0**-bits, 0.0), (2.0 ** (1 - bits), 0.75)):
        corners = torch.tensor([[[0, 0], [1, 0], [1, 1], [0, 1]]], dtype=dtype) * side
        pair = corners.to(backend.device), torch.tensor([[[1, 0]]], dtype=dtype, device=backend.device)
        for first, second in (pair, pair[::-1]):
            assert_close(backend.loss(first, second, axis_weight=axis_weight), expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 48), (torch.float64, 400)])
def test_the_largest_target_without_an_area(backend, dtype, bits):
    """A square whose doubled area is below what counts as 0, and larger ones: the boundary term is 0, and nearly 1."""
    corners = torch.tensor([[[0, 0], [1, 0], [1, 1], [0, 1]]], dtype=dtype)
    for side, expected in ((2.0 ** -(bits + 1), 0.0), (2.0**-bits, 0.25)):
        losses = [backend.value_and_gradient(corners, corners * side, boundary_weight=weight) for weight in (0.25, 0.0)]
        assert_close(losses[0][0] - losses[1][0], expected, atol=1e-6)
        assert torch.isfinite(losses[0][1]).all()
