"""The boundary term: its value, its gradient, what it is 0 for, and what it is there for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.helpers import (
    POLYGONS,
    assert_close,
    assert_finite,
    assert_gradient_close,
    assert_same,
    assert_zero,
    box,
    convex,
    crossing,
    either_way,
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
from tests.strategies import any_pairs, pairs
from triton_mgiou import PAPER, demo, mgiou_loss

SHAPES = [(1, 4), (2, 3), (3, 1), (3, 2), (4, 4), (5, 8), (8, 5), (12, 3), (4, 33), (20, 17)]  # N, M


def term(pred, target, **options):
    """The term alone, (B,): what weight 1 adds to the loss in float64."""
    pred, target = pred.double(), target.double()
    both = [mgiou_loss(pred, target, reduction="none", **PAPER | options | {"boundary_weight": w}) for w in (1.0, 0.0)]
    return both[0] - both[1]


@kinds
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_value(backend, kind, dtype, atol):
    rng = generator(201)
    options = {"reduction": "none", "boundary_weight": 0.7, "convexity_weight": 0.3}
    for n, m in SHAPES:
        pred = either_way(POLYGONS[kind](4, n, rng), rng).to(dtype)
        target = either_way(POLYGONS[kind](4, m, rng), rng).to(dtype)
        expected = oracle.loss(numpy64(pred), numpy64(target), **options)
        assert expected.max() <= 0.7 + 0.15 + 1
        actual = backend.loss(pred.to(backend.device), target.to(backend.device), **options)
        assert_close(actual, expected, atol=atol, what=f"{kind} with {n} and {m} vertices")


def test_the_mixed_area_of_convex_polygons_is_that_of_their_sum():
    """|P + G| = |P| + 2 V + |G| for the sum of two convex sets, the hull of all sums of two vertices."""
    rng = generator(202)
    pred, target = either_way(convex(20, 6, rng), rng), either_way(convex(20, 5, rng), rng)
    for p, g, actual in zip(pred.numpy(), target.numpy(), term(pred, target), strict=True):
        p_area, g_area, sum_area = (
            shapely.area(shapely.convex_hull(shapely.multipoints(points)))
            for points in (p, g, (p[:, None] + g).reshape(-1, 2))
        )
        mixed = (sum_area - p_area - g_area) / 2
        match = (p_area * g_area / mixed**2) * (2 * mixed * g_area / (mixed**2 + g_area**2))
        assert actual == pytest.approx(1 - match, abs=1e-12)


def test_numbers_worked_out_by_hand():
    square = box(0.0, 0.0, 1.0, 1.0, dtype=torch.float64)
    assert_close(term(3 * square, square), [1 - 2 * 3 / (1 + 9)], atol=1e-15)  # the shape fits, the size does not
    assert_close(term(square / 3 + 7, square), [1 - 2 * 3 / (1 + 9)], atol=1e-14)
    assert_close(term(square.repeat(1, 2, 1), square), [1 - 2 * 2 / (2 * (4 + 1))], atol=1e-15)  # around twice
    assert_close(term(square[:, [0, 2, 1, 3]], square), [1.0], atol=0)  # a bow-tie: both lobes cancel
    diamond = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])  # area 2, V 2
    assert_close(term(diamond, square), [1 - 2 * 2 / (2 * (4 + 1))], atol=1e-15)


@kinds
@pytest.mark.parametrize("axis_grad", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_central_differences(backend, kind, axis_grad, dtype, rtol):
    rng = generator(213)
    options = {"boundary_weight": 0.8, "axis_grad": axis_grad}
    for n, m in [(4, 4), (6, 3), (3, 7), (12, 5)]:
        pred = either_way(POLYGONS[kind](4, n, rng), rng).to(dtype)
        target = either_way(POLYGONS[kind](4, m, rng), rng).to(dtype)
        _, *actual = backend.value_and_gradient(pred, target, wrt=("pred", "target"), reduction="sum", **options)
        for side, gradient in zip(("pred", "target"), actual, strict=True):
            if side == "target" and not axis_grad:
                continue  # the differences know stopped axes only of the prediction
            expected = oracle.gradient(numpy64(pred), numpy64(target), side=side, **options)
            assert_gradient_close(gradient, expected, rtol=rtol, what=f"{side}, {n} against {m}")


def test_lengths_and_masks(backend):
    rng = generator(204)
    pred, target = star(8, 7, rng).float(), star(8, 6, rng).float()
    cases = [
        {
            "pred_lengths": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]),
            "target_lengths": torch.tensor([6, 5, 4, 3, 2, 1, 3, 0]),
        },
        {"pred_mask": uniform((8, 7), 0, 1, rng) < 0.6, "target_mask": uniform((8, 6), 0, 1, rng) < 0.6},
    ]
    for real in cases:
        options = {"boundary_weight": 1.0, **real}
        value, actual = backend.value_and_gradient(pred, target, reduction="none", **options)
        arrays = (numpy64(pred), numpy64(target))
        expected = oracle.loss(*arrays, reduction="none", **numpy_options(**options))
        assert_close(value, expected, atol=2e-6)
        assert_gradient_close(actual, oracle.gradient(*arrays, **numpy_options(**options)), rtol=1e-4)
        padded = [pred.clone(), target.clone()]
        for side, vertices in zip(("pred", "target"), padded, strict=True):
            if (mask := real.get(f"{side}_mask")) is None:
                mask = torch.arange(vertices.shape[1]) < real[f"{side}_lengths"].unsqueeze(1)
            vertices[~mask] = math.nan
        poisoned = backend.value_and_gradient(*padded, reduction="none", **options)
        assert_same(poisoned[0], value)
        assert_same(poisoned[1], actual)


def test_gradcheck(backend):
    """The polygons are centred on each other, so that the extent, which has no gradient, does not move."""
    rng = generator(205)
    target = either_way(convex(4, 5, rng), rng).to(backend.device) * 10
    pred = target.mean(1, keepdim=True) + star(4, 6, rng).to(backend.device) * 0.2

    def loss(pred):
        return backend.loss(pred, target, boundary_weight=2.0, reduction="none")

    assert torch.autograd.gradcheck(loss, pred.requires_grad_(), eps=1e-6, atol=1e-7)
    if backend.name == "eager":
        assert torch.autograd.gradgradcheck(loss, pred, eps=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_the_term_and_the_targets_is_none(backend):
    rng = generator(206)
    pred, target = star(6, 7, rng), convex(6, 5, rng)
    parts = []
    for axis_weight, axis_grad in itertools.product(("uniform", "length"), (True, False)):
        options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "sum"}
        _, *plain = backend.value_and_gradient(pred, target, wrt=("pred", "target"), **options)
        _, *with_term = backend.value_and_gradient(pred, target, wrt=("pred", "target"), boundary_weight=1.0, **options)
        parts.append(with_term[0] - plain[0])
        assert_same(with_term[1], plain[1], "gradient of the target")
    assert (parts[0].abs().amax(-1) > 1e-4).all(), "every vertex has a gradient"
    for part in parts[1:]:
        assert_gradient_close(part, parts[0], rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_exactly_zero_at_the_target(backend, dtype):
    """From any first vertex, in either direction, with vertices repeated or added on a side."""
    rng = generator(207)
    shapes = {
        "a box": box(3, 5, 10, 7),
        "a large box": box(-3e4, 5, 1e4, 7),
        "boxes": rectangle_corners(random_boxes(6, rng)),
        "polygons": convex(6, 7, rng),
        "a regular polygon": regular(12),
        "a triangle": regular(3) * 100,
    }
    for name, shape in shapes.items():
        if dtype in (torch.float16, torch.bfloat16) and name != "a box":
            continue  # rounding may have made it slightly concave
        target = shape.to(dtype)
        size = target.shape[1]
        preds = [target.roll(k, 1) for k in range(size)] + [target.flip(1), target[:, [0, *range(size), size - 1]]]
        for pred in preds:
            value, gradient = backend.value_and_gradient(pred, target, reduction="none", boundary_weight=2.0)
            assert_zero(value, f"loss of {name}")
            assert_zero(gradient, f"gradient of {name}")
    square, split = box(0, 0, 4, 2).to(dtype), torch.tensor([[[0, 0], [1, 0], [4, 0], [4, 2], [0, 2]]]).to(dtype)
    value, gradient = backend.value_and_gradient(split, square, boundary_weight=2.0)
    assert_zero(value)
    assert_zero(gradient)


@pytest.mark.parametrize("size", [3, 4, 5, 7, 12, 33])
@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 2.0**29), (torch.float64, 2.0**60)])
def test_a_convex_target_in_order_keeps_its_own_area_to_the_bit(backend, dtype, weight, size):
    """A target k times as large has the areas A and k^2 A and the mixed area k A, from the same products.

    So for a power of two only the last quotient rounds: one number for all polygons, in a kernel two neighbours, as it
    multiplies by an inverse. An area by other sums moves it by some units in its last place. Beside the weight the rest
    of the loss, at most 1, is lost.
    """
    rng = generator(240 + size)
    target = either_way(convex(backend.batch(256), size, rng), rng).to(dtype)
    rounding = {"eager cpu": 0, "triton cpu": 1}.get(f"{backend.name} {backend.device}", 8)
    one = torch.ones((), dtype=dtype)
    for k in (2.0, 0.5, 4.0):
        options = {"reduction": "none", "boundary_weight": weight}
        value = backend.loss((k * target).to(backend.device), target.to(backend.device), **options) / weight
        expected = 1 - one / ((k * k + 1) / (2 * k))
        assert_close(value, expected.expand(len(target)), atol=rounding * torch.finfo(dtype).eps)


def assert_term_of_a_larger_one(backend, target, k, weight, counts, rtol):
    """A pred k times as large as the target has the term (k - 1)^2 / (k^2 + 1), or none if it is rounding."""
    value, gradient = backend.value_and_gradient(target * k, target, reduction="none", boundary_weight=weight)
    if counts:
        assert_close(value / weight, [(k - 1) ** 2 / (k * k + 1)], atol=0.0, rtol=rtol)
    else:
        without = backend.value_and_gradient(target * k, target, reduction="none")
        assert_same(value, without[0])
        assert_same(gradient, without[1], "gradient")


@pytest.mark.parametrize(("bits", "counts"), [(10, False), (9, True)])
@pytest.mark.parametrize(("dtype", "more", "weight"), [(torch.float32, 0, 2.0**29), (torch.float64, 14, 2.0**60)])
def test_a_term_that_is_rounding(backend, dtype, more, weight, bits, counts):
    """A target k = 1 + e times as large has the term (k - 1)^2 / (k^2 + 1): up to 2^-20, in float64 2^-48, it is 0."""
    target = regular(8, dtype)
    k = 1 + 2.0 ** -(bits + more)
    assert_term_of_a_larger_one(backend, target, k, weight, counts, rtol=0.3)


@pytest.mark.parametrize(("part", "counts"), [(1.1, True), (0.9, False)])
@pytest.mark.parametrize(("dtype", "bits", "weight"), [(torch.float32, 8, 2.0**26), (torch.float64, 22, 2.0**50)])
def test_a_term_that_is_rounding_beside_a_thin_target(backend, dtype, bits, weight, part, counts):
    """A rectangle of 1 x 1/16: the bound is 1 + 2^-8 over 2 / 16 of that of others, 8 times as high."""
    target = box(0, 0, 1, 2.0**-4, dtype)
    k = 1 + part * 2.0**-bits
    assert_term_of_a_larger_one(backend, target, k, weight, counts, rtol=0.15)


def shuffled(polygons, rng):
    """Each polygon's vertices in an order of its own."""
    order = torch.rand(polygons.shape[:2], generator=rng).argsort(1)
    return polygons.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))


@pytest.mark.parametrize("size", range(4, 13))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convex_target_in_any_order(backend, dtype, size):
    """0 at its outline; elsewhere value and slopes are those of the oracle, whose area is that of the hull."""
    rng = generator(214 + size)
    ordered = either_way(convex(8, size, rng), rng).to(dtype)
    target = shuffled(ordered, rng)
    for scale, move in [(1, 0), (2.0**-60, 0), (2.0**60, 0), (1, 1024)]:
        pair = ordered * scale + move, target * scale + move
        value, gradient = backend.value_and_gradient(*pair, reduction="none", boundary_weight=0.5)
        assert_zero(value, f"loss at {scale}, {move}")
        assert_zero(gradient, f"gradient at {scale}, {move}")
    pred = either_way(star(8, 5, rng), rng).to(dtype)
    value, gradient = backend.value_and_gradient(pred, target, reduction="none", boundary_weight=0.8)
    arrays = numpy64(pred), numpy64(target)
    expected = oracle.loss(*arrays, reduction="none", boundary_weight=0.8)
    assert_close(value, expected, atol=2e-6 if dtype == torch.float32 else 1e-12)
    slopes = oracle.gradient(*arrays, boundary_weight=0.8)
    assert_gradient_close(gradient, slopes, rtol=1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("thickness", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thin_target_in_any_order(backend, dtype, thickness):
    """Its area is a small difference of large products. Next to the outline the gradient is that of 1 / thickness."""
    rng = generator(224)
    boxes = random_boxes(32, rng)
    boxes[:, 3] = thickness * boxes[:, 2]
    ordered = either_way(rectangle_corners(boxes), rng)[:, [0, 0, 1, 2, 3]].to(dtype)
    thicker = rectangle_corners(boxes * torch.tensor([1, 1, 1, 1.02, 1])).to(dtype)
    for target in (ordered.roll(2, 1), ordered.flip(1), shuffled(ordered, rng)):
        value, gradient = backend.value_and_gradient(ordered, target, reduction="none", boundary_weight=0.5)
        assert_zero(value, "loss")
        assert_zero(gradient, "gradient")
        value, gradient = backend.value_and_gradient(thicker, target, reduction="none", boundary_weight=0.5)
        arrays = numpy64(thicker), numpy64(target)
        atol = (2e-6 if dtype == torch.float32 else 1e-14) / thickness
        assert_close(value, oracle.loss(*arrays, reduction="none", boundary_weight=0.5), atol=atol)
        assert float(gradient.abs().amax((1, 2)).min()) > 0.01 / thickness


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_a_quadrangle_in_any_order(backend, order):
    pred = torch.tensor([[[0.0, 0.0], [12.0, 1.0], [9.0, 7.0], [3.0, 5.0]]])
    value, gradient = backend.value_and_gradient(pred, pred[:, list(order)], boundary_weight=0.25)
    assert_zero(value)
    assert_zero(gradient)


@pytest.mark.parametrize(
    "target",
    [
        [(3, 3), (1, 3), (1, 1), (-1, 1), (-1, 3), (-3, 3), (-3, -3), (-1, -3), (-1, -1), (1, -1), (1, -3), (3, -3)],
        [(3, 0), (3, 3), (0, 1), (-3, 3), (-3, 0), (-3, -3), (0, -1), (3, -3), (1, 0), (2, 0)],
        [(4, 2), (0, 0), (-4, 2), (-4, -4), (4, 0)],
        [(1, 3), (0, 0), (-1, 1), (-1, -1), (1, -3)],
        [(4, 1), (0, 0), (-2, 3), (-3, -2), (1, -2)],
    ],
    ids=["an H", "along x", "a vertex at the mean", "the same in a trapezoid", "where its side counts"],
)
def test_vertices_at_one_angle_in_any_order(backend, target):
    """They count as their mean, and a vertex at the mean of all as one along y."""
    rng = generator(232)
    target = shuffled(torch.tensor(target, dtype=torch.float32).expand(16, -1, -1), rng).to(backend.device)
    pred = (either_way(star(16, 5, rng), rng) * 3).float().to(backend.device)
    value = backend.loss(pred, target, reduction="none", boundary_weight=1.0)
    assert_close(value, oracle.loss(numpy64(pred), numpy64(target), reduction="none", boundary_weight=1.0), atol=4e-6)
    same = pred[:1].expand(16, -1, -1), target
    term = backend.loss(*same, reduction="none", boundary_weight=1.0) - backend.loss(*same, reduction="none")
    assert_close(term, numpy64(term[:1].expand(16)), atol=2e-6)


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_a_target_that_goes_around_more_than_once(backend, turns):
    """Its area in its own order counts every turn: that of a star polygon exceeds its hull's."""
    pred = regular(11, torch.float32).to(backend.device)
    for target in (pred[:, [turns * k % 11 for k in range(11)]], pred.repeat(1, turns, 1)):
        for size in (1.0, 1.25):
            term_of = [
                backend.loss(pred * size, each, boundary_weight=1.0) - backend.loss(pred * size, each)
                for each in (target, pred)
            ]
            assert_close(term_of[0], numpy64(term_of[1]), atol=2e-6)


def test_targets_in_any_order_with_lengths_masks_and_copies(backend):
    rng = generator(215)
    ordered = convex(6, 7, rng).float()
    target = shuffled(ordered, rng)
    padded = torch.cat((target, torch.full((6, 4, 2), math.nan)), dim=1)
    mask = torch.tensor([True, True, False, True, False, True, True, False, True, True])
    spread = torch.full((6, 10, 2), math.nan)
    spread[:, mask] = target
    pairs = [
        (padded, {"target_lengths": torch.full((6,), 7)}),
        (spread, {"target_mask": mask.expand(6, -1)}),
        (target.repeat_interleave(torch.tensor([1, 3, 1, 2, 1, 1, 2]), dim=1), {}),
        (shuffled(target.repeat(1, 3, 1), rng), {}),  # copies that are not in a row
    ]
    pred = star(6, 6, rng).float()
    plain = backend.value_and_gradient(pred, target, reduction="none", axis_weight="length")
    fine = backend.value_and_gradient(pred, target, reduction="none", axis_weight="length", boundary_weight=0.5)
    for given_target, real in pairs:
        options = real | {"reduction": "none", "axis_weight": "length"}
        value, gradient = backend.value_and_gradient(ordered, given_target, boundary_weight=0.5, **options)
        assert_zero(value)
        assert_zero(gradient)
        without = backend.value_and_gradient(pred, given_target, **options)
        value, gradient = backend.value_and_gradient(pred, given_target, boundary_weight=0.5, **options)
        assert_close(value - without[0], fine[0] - plain[0], atol=2e-6)
        assert_gradient_close(gradient - without[1], fine[1] - plain[1], rtol=1e-4)


def test_ordered_and_crossed_targets_in_one_batch(backend):
    """A sample gets the bits that it gets alone, whatever the others make the program do."""
    rng = generator(216)
    pred = star(9, 6, rng).float()
    target = torch.cat((convex(3, 6, rng), shuffled(convex(3, 6, rng), rng), star(3, 6, rng))).float()
    target = target[torch.randperm(9, generator=rng)]
    batch = backend.value_and_gradient(pred, target, reduction="none", boundary_weight=1.0)
    for b in range(9):
        one = slice(b, b + 1)
        alone = backend.value_and_gradient(pred[one], target[one], reduction="none", boundary_weight=1.0)
        for got, want in zip(alone, batch, strict=True):
            assert_same(got, want[one])


@given(data=st.data(), pair=pairs(least=4, kinds=("convex",)))
def test_any_other_order_of_the_targets_vertices_is_above_zero(data, pair):
    """Hull and MGIoU are those of the target; only the order tells."""
    target = pair[1]
    order = data.draw(st.permutations(range(target.shape[1])))
    turned = {tuple(order[k:] + order[:k]) for k in range(len(order))}
    in_order = {tuple(range(len(order))), tuple(reversed(range(len(order))))} & turned
    value = term(target[:, order], target)
    if in_order:
        assert_zero(value)
    else:
        assert (value > 1e-3).all()
    loss = mgiou_loss(target[:, order], target, **PAPER)
    assert in_order or loss < 0.5


@given(pair=pairs(), shift=st.tuples(st.integers(-512, 512), st.integers(-512, 512)), power=st.integers(-20, 20))
def test_moving_and_scaling(backend, pair, shift, power):
    pred, target = (each.float() for each in pair)
    options = {"boundary_weight": 1.0, "reduction": "none"}
    value, gradient = backend.value_and_gradient(pred, target, **options)
    moved = backend.value_and_gradient(pred + torch.tensor(shift), target + torch.tensor(shift), **options)
    assert_close(moved[0], value, atol=4e-6)
    assert_gradient_close(moved[1], gradient, rtol=1e-3)
    scaled = backend.value_and_gradient(pred * 2.0**power, target * 2.0**power, **options)
    assert_same(scaled[0], value)
    assert_same(scaled[1] * 2.0**power, gradient)


@given(pair=pairs(kinds=("convex", "star")), entries=st.lists(st.integers(-4, 4), min_size=4, max_size=4))
def test_any_linear_map_of_both(pair, entries):
    linear = torch.tensor(entries, dtype=torch.float64).reshape(2, 2)
    if abs(linear.det()) < 0.5:
        return
    pred, target = pair
    assert_close(term(pred @ linear.T, target @ linear.T), term(pred, target), atol=1e-9)


@given(pair=pairs(), shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_the_position_of_the_target_does_not_count(pair, shift):
    pred, target = pair
    assert_close(term(pred, target + torch.tensor(shift)), term(pred, target), atol=1e-12)


@given(pair=any_pairs())
def test_any_finite_float32_has_a_finite_value_and_gradient(backend, pair):
    value, *gradients = backend.value_and_gradient(*pair, wrt=("pred", "target"), reduction="none", boundary_weight=1.0)
    assert_finite(value)
    assert (value >= 0).all()
    assert (value <= 2).all()
    for gradient in gradients:
        assert_finite(gradient, "gradient")


def test_the_largest_weights_of_the_terms(backend):
    """In units of such a weight the loss is that of the terms alone, at any scale, and no gradient is NaN."""
    rng = generator(225)
    pred, target = crossing(6, 5, rng).float(), convex(6, 5, rng).float()
    pred[0], pred[1], target[2], pred[3] = target[0], pred[1, 0], target[2, 0], pred[3] * 1e-30
    scales = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e30, 1e-30])[:, None, None]
    pred, target = pred * scales, target * scales
    for name in ("boundary_weight", "convexity_weight"):
        parts = [
            backend.value_and_gradient(pred, target, reduction="none", **{name: weight}) for weight in (1e30, 1.0, 0.0)
        ]
        assert_finite(parts[0][1])
        assert_close(parts[0][0] / 1e30, numpy64(parts[1][0] - parts[2][0]), atol=1e-6)


def test_predictions_and_targets_without_an_area(backend):
    square = box(0, 0, 2, 2)
    lines = {
        "a point": torch.tensor([[[0.5, 0.75]]]),
        "a segment": torch.tensor([[[0.0, 0.0], [1.0, 0.25]]]),
        "collinear": torch.tensor([[[0.1, 0.1], [0.3, 0.2], [0.7, 0.4]]]),
        "nothing": square,
    }
    for name, line in lines.items():
        lengths = {"pred_lengths": torch.tensor([0])} if name == "nothing" else {}
        plain = backend.value_and_gradient(line, square, **lengths)
        with_term = backend.value_and_gradient(line, square, boundary_weight=1.0, **lengths)
        assert_close(with_term[0], plain[0] + (name != "nothing"), atol=1e-6, what=f"{name} as pred")
        assert_finite(with_term[1])
        lengths = {"target_lengths": torch.tensor([0])} if name == "nothing" else {}
        plain = backend.value_and_gradient(square, line, **lengths)
        with_term = backend.value_and_gradient(square, line, boundary_weight=1.0, **lengths)
        for got, want in zip(with_term, plain, strict=True):
            assert_same(got, want, f"{name} as target")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_stay_in_their_sample(backend, bad, side):
    rng = generator(208)
    pair = [star(3, 5, rng).float(), convex(3, 4, rng).float()]
    clean = backend.value_and_gradient(*pair, reduction="none", boundary_weight=1.0)
    pair[side][1, 2, 0] = bad
    for got, want in zip(backend.value_and_gradient(*pair, reduction="none", boundary_weight=1.0), clean, strict=True):
        assert got[1].isnan().all()
        assert_same(got[[0, 2]], want[[0, 2]])


def test_ties_share_the_gradient(backend):
    """An aligned box inside another: each corner of the target is reached by two sides of the prediction."""
    _, gradient = backend.value_and_gradient(box(1, 1, 3, 3), box(0, 0, 4, 4), boundary_weight=1.0)
    assert_close(gradient.abs(), torch.full((1, 4, 2), gradient[0, 0, 0].abs().item()), atol=1e-7)
    assert_same(gradient[0].sign(), torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]))


def test_autocast_and_a_second_run_change_no_bit(backend):
    rng = generator(209)
    pred, target = star(64, 8, rng).float(), convex(64, 6, rng).float()
    first = backend.value_and_gradient(pred, target, boundary_weight=1.0)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        again = backend.value_and_gradient(pred, target, boundary_weight=1.0)
    for got, want in zip(again, first, strict=True):
        assert_same(got, want)


def test_vertices_in_a_random_order_are_put_in_order(backend):
    """What it is there for: MGIoU alone fits the hull and leaves the outline crossing itself."""
    rng = generator(210)
    targets = convex(12, 6, rng).float() * 0.25
    results = []
    for boundary_weight in (0.0, 0.5):
        pred = (crossing(12, 8, generator(211)).float() * 0.5).to(backend.device).requires_grad_()
        optimizer = torch.optim.Adam([pred], lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            optimizer.zero_grad()
            options = {"axis_weight": "length", "axis_grad": False, "boundary_weight": boundary_weight}
            backend.loss(pred, targets.to(backend.device), reduction="sum", **options).backward()
            optimizer.step()
            schedule.step()
        polygons = pred.detach().cpu().numpy()
        simple = [shapely.is_simple(shapely.linearrings(polygon)) for polygon in polygons]
        ious = [demo.polygon_iou(polygon, target) for polygon, target in zip(polygons, targets.numpy(), strict=True)]
        results.append((np.mean(simple), np.mean(ious)))
    (_, plain_iou), (simple, iou) = results
    assert plain_iou < 0.7
    assert simple > 0.9
    assert iou > 0.9
