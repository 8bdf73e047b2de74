"""The value against the paper's algorithm and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracle
from tests.helpers import (
    POLYGONS,
    assert_close,
    assert_same,
    axis_weights,
    box,
    convex,
    generator,
    kinds,
    numpy64,
    numpy_options,
    rectangle_corners,
    star,
    uniform,
)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
SHAPES = [(1, 4), (2, 3), (3, 1), (4, 4), (5, 8), (8, 5), (12, 3), (4, 33), (20, 17)]  # N, M


def assert_value(backend, pred, target, what="value", **options):
    expected = oracle.loss(numpy64(pred), numpy64(target), **numpy_options(**options))
    moved = {name: v.to(backend.device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    actual = backend.loss(pred.to(backend.device), target.to(backend.device), **moved)
    assert_close(actual, expected, atol=TOLERANCE[actual.dtype], what=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convexity_weight", [0.0, 0.7])
@axis_weights
@kinds
def test_every_shape_has_the_papers_value(backend, kind, axis_weight, convexity_weight, dtype):
    rng = generator(1)
    for n, m in SHAPES:
        pred, target = POLYGONS[kind](4, n, rng).to(dtype), POLYGONS[kind](4, m, rng).to(dtype)
        options = {"axis_weight": axis_weight, "convexity_weight": convexity_weight, "reduction": "none"}
        assert_value(backend, pred, target, f"{kind} with {n} and {m} vertices", **options)


@axis_weights
@kinds
def test_mixed_lengths(backend, kind, axis_weight):
    rng = generator(2)
    batch = backend.batch(40)
    pred, target = POLYGONS[kind](batch, 7, rng).float(), POLYGONS[kind](batch, 9, rng).float()
    options = {
        "pred_lengths": torch.randint(0, 8, (batch,), generator=rng),
        "target_lengths": torch.randint(0, 10, (batch,), generator=rng),
    }
    assert_value(backend, pred, target, axis_weight=axis_weight, convexity_weight=0.5, reduction="none", **options)


@pytest.mark.parametrize("move", [-100, 100])
def test_padding_is_no_vertex_at_the_origin(backend, move):
    """Of polygons far from it, whose extent, and with it the "soft" weights, would be 30 times as large."""
    rng = generator(21)
    pred, target = star(8, 7, rng) + move, convex(8, 6, rng) + move
    lengths = {"pred_lengths": torch.full((8,), 5), "target_lengths": torch.full((8,), 4)}
    assert_value(backend, pred, target, axis_weight="soft", reduction="none", **lengths)


@axis_weights
def test_masks_with_holes(backend, axis_weight):
    rng = generator(3)
    batch = backend.batch(40)
    pred, target = star(batch, 8, rng).float(), star(batch, 5, rng).float()
    options = {"pred_mask": uniform((batch, 8), 0, 1, rng) < 0.6, "target_mask": uniform((batch, 5), 0, 1, rng) < 0.6}
    assert_value(backend, pred, target, axis_weight=axis_weight, convexity_weight=0.5, reduction="none", **options)


def test_lengths_on_one_side_and_a_mask_on_the_other(backend):
    rng = generator(4)
    pred, target = star(8, 6, rng).float(), star(8, 6, rng).float()
    lengths, mask = torch.randint(1, 7, (8,), generator=rng), uniform((8, 6), 0, 1, rng) < 0.7
    assert_value(backend, pred, target, pred_lengths=lengths, target_mask=mask, reduction="none")
    assert_value(backend, pred, target, pred_mask=mask, target_lengths=lengths, reduction="none")


@pytest.mark.parametrize("shape", [None, (6,), (6, 1), (6, 4)])
@pytest.mark.parametrize(
    ("reduction", "avg_factor"),
    [("none", None), ("none", 2.5), ("sum", None), ("mean", None), ("mean", 2.5), ("mean", 7)],
)
def test_reductions_and_weights(backend, reduction, avg_factor, shape):
    rng = generator(5)
    pred, target = star(6, 5, rng).float(), convex(6, 4, rng).float()
    weight = None if shape is None else uniform(shape, 0, 2, rng).float()
    if weight is not None:
        weight[2] = 0
    expected = oracle.loss(
        numpy64(pred),
        numpy64(target),
        weight=None if weight is None else numpy64(weight),
        reduction=reduction,
        avg_factor=avg_factor,
    )
    moved = None if weight is None else weight.to(backend.device)
    pred, target = pred.to(backend.device), target.to(backend.device)
    actual = backend.loss(pred, target, weight=moved, reduction=reduction, avg_factor=avg_factor)
    assert actual.shape == ((6,) if reduction == "none" else ())
    assert_close(actual, expected, atol=6e-6 if reduction == "sum" else 1e-6)
    if avg_factor is not None:
        for factor in (torch.tensor(float(avg_factor)), torch.tensor([avg_factor], device=backend.device)):
            again = backend.loss(pred, target, weight=moved, reduction=reduction, avg_factor=factor)
            assert again.shape == actual.shape
            assert_close(again, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("divisor", "number"),
    [(torch.int32, 2**24 + 1), (torch.uint32, 2**32 - 1), (torch.int64, 2**40 + 3), (torch.int64, 2**63 - 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_divisor_of_integers(backend, dtype, divisor, number):
    """Which float32 holds to half a unit of 2^24 only: the loss is in the type of the polygons, to their precision."""
    pred, target = box(0, 0, 1, 1).repeat(3, 1, 1), box(0.5, 0, 1.5, 1).repeat(3, 1, 1)
    pred = pred.to(backend.device, dtype).requires_grad_()
    factor = torch.tensor(number, dtype=divisor, device=backend.device)
    loss = backend.loss(pred, target.to(backend.device, dtype), avg_factor=factor)
    (gradient,) = torch.autograd.grad(loss, pred)
    right = pred.detach().double().requires_grad_()
    of_sum = backend.loss(right, target.to(backend.device).double(), reduction="sum")
    assert loss.dtype == dtype
    assert_close(loss.double() * number, 0.5, atol=0, rtol=4 * torch.finfo(dtype).eps)
    expected = torch.autograd.grad(of_sum, right)[0]
    assert expected.any()
    assert_close(gradient.double() * number, expected, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_a_weight_of_any_real_type(backend, dtype):
    rng = generator(6)
    pred, target = star(5, 5, rng).float().to(backend.device), star(5, 5, rng).float().to(backend.device)
    weight = torch.tensor([1, 0, 1, 1, 0], device=backend.device)
    expected = backend.loss(pred, target, weight=weight.float(), reduction="none")
    assert_same(backend.loss(pred, target, weight=weight.to(dtype), reduction="none"), expected)


@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        pytest.param(box(0, 0, 1, 1), box(0, 0, 1, 1), 0.0, id="equal"),
        pytest.param(box(0, 0, 1, 1), box(0.5, 0, 1.5, 1), 1 / 6, id="half a width to the right"),
        pytest.param(box(0, 0, 2, 2), box(0.5, 0.5, 1.5, 1.5), 1 / 4, id="half the size, inside"),
        pytest.param(box(0, 0, 1, 1), box(1, 0, 2, 1), 1 / 4, id="touching"),
        pytest.param(box(0, 0, 1, 1), box(3, 0, 4, 1), 3 / 8, id="apart in x"),
        pytest.param(box(0, 0, 1, 1), box(3, 3, 4, 4), 3 / 4, id="apart in both"),
        pytest.param(box(0, 0, 4, 1), box(0, 0, 1, 4), 3 / 8, id="a cross at a corner"),
        # GIoU1D is 1/sqrt(2) on each of the four kinds of axes: a square's width over its diagonal.
        pytest.param(
            box(-1, -1, 1, 1),
            torch.tensor([[[2.0, 0], [0, 2], [-2, 0], [0, -2]]]) / 2**0.5,
            (1 - 0.5**0.5) / 2,
            id="a square turned by 45 degrees",
        ),
    ],
)
@axis_weights
def test_values_by_hand(backend, pred, target, expected, axis_weight):
    """On these every axis has the same GIoU1D, or every edge the same length, so the weights do not matter."""
    actual = backend.loss(pred.to(backend.device), target.to(backend.device), axis_weight=axis_weight)
    assert_close(actual, expected, atol=0.0 if expected == 0 else 1e-7)


SHORT = 1 - math.exp(-1)  # the soft weight of an edge of a hundredth of the extent


@pytest.mark.parametrize(
    ("pred", "target", "axis_weight", "expected"),
    [
        # GIoU1D is 1/4 in x and 1 in y. The normals in x belong to the short edges of the prediction.
        pytest.param(box(0, 0, 4, 1), box(0, 0, 1, 1), "uniform", 3 / 8 * 1 / 2, id="uniform"),
        pytest.param(box(0, 0, 4, 1), box(0, 0, 1, 1), "length", 3 / 8 * (2 / 10 + 1 / 2) / 2, id="length"),
        pytest.param(box(0, 0, 4, 1), box(0, 0, 1, 1), "soft", 3 / 8 * 1 / 2, id="soft, no short edge"),
        # GIoU1D is 1/2 in x and 1 in y.
        pytest.param(box(0, 0, 1, 0.01), box(0, 0, 0.5, 0.01), "uniform", 1 / 8, id="uniform, short edges"),
        pytest.param(box(0, 0, 1, 0.01), box(0, 0, 0.5, 0.01), "soft", SHORT / 4 / (1 + SHORT), id="soft, short edges"),
        # The short edges are under 1e-6 of the extent: only the normals in y are left.
        pytest.param(box(0, 0, 2**21, 1), box(0, 0, 2**20, 1), "uniform", 0.0, id="uniform, too short an edge"),
        pytest.param(box(0, 0, 2**19, 1), box(0, 0, 2**18, 1), "uniform", 1 / 8, id="uniform, just long enough"),
        pytest.param(box(0, 0, 3, 1), box(0, 0, 1.5, 1), "length", (1 / 4 + 1 / 2.5) / 8, id="length, no threshold"),
    ],
)
def test_weights_by_hand(backend, pred, target, axis_weight, expected):
    actual = backend.loss(pred.to(backend.device), target.to(backend.device), axis_weight=axis_weight)
    assert_close(actual, expected, atol=0.0 if expected == 0 else 1e-7)


def test_convexity_by_hand(backend):
    """A square with one corner pushed to its middle: only the two edges of the dent have vertices on both sides.

    The vertices are a = (0,0), b = (2,0), c = (1,1/2), d = (2,2). On the normal (1/2, 1) of b-c, measured from b, a is
    at -1 and d at 2: 1 over 4 vertices times a width of 3. On the normal (3/2, -1) of c-d, a is at -1 and b at 2.
    """
    dent = torch.tensor([[[0.0, 0], [2, 0], [1, 0.5], [2, 2]]], device=backend.device)
    target = box(0, 0, 2, 2).to(backend.device)
    plain = backend.loss(dent, target)
    expected = (0 + 1 / 12 + 1 / 12 + 0) / 4
    assert_close(backend.loss(dent, target, convexity_weight=1.0) - plain, expected, atol=2e-7)
    assert_close(backend.loss(dent, target, convexity_weight=3.0) - plain, 3 * expected, atol=4e-7)
    # A bow tie: the two crossing edges have one vertex on each side, the other two have both on one side.
    bow = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [1, 1]]], device=backend.device)
    expected = (0 + 1 / 8 + 0 + 1 / 8) / 4
    difference = backend.loss(bow, target, convexity_weight=1.0) - backend.loss(bow, target)
    assert_close(difference, expected, atol=2e-7)


@pytest.mark.parametrize("size", [3, 4, 7, 16])
def test_convexity_is_zero_for_a_convex_polygon_in_order(backend, size):
    pred = convex(8, size, generator(7)).float().to(backend.device)
    for vertices in (pred, pred.flip(1)):
        plain = backend.loss(vertices, pred, reduction="none")
        assert_same(backend.loss(vertices, pred, reduction="none", convexity_weight=10.0), plain)


@axis_weights
def test_axis_grad_changes_no_value(backend, axis_weight):
    rng = generator(8)
    pred, target = star(8, 6, rng).float().to(backend.device), star(8, 5, rng).float().to(backend.device)
    options = {"axis_weight": axis_weight, "convexity_weight": 0.3, "reduction": "none"}
    with_path = backend.loss(pred, target, axis_grad=True, **options)
    assert_same(backend.loss(pred, target, axis_grad=False, **options), with_path)


def test_a_result_without_a_graph_is_the_same(backend):
    rng = generator(9)
    pred, target = star(8, 6, rng).float().to(backend.device), star(8, 5, rng).float().to(backend.device)
    with_graph = backend.loss(pred.clone().requires_grad_(), target)
    without = backend.loss(pred, target)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert_same(without, with_graph)
    with torch.no_grad():
        assert_same(backend.loss(pred.clone().requires_grad_(), target), with_graph)


def one_pixel_boxes(batch, rng):
    """Turned boxes of about one pixel, up to two pixels apart, far from the origin, rounded to float32."""
    ranges = [(0, 2), (0, 2), (1, 2), (1, 2), (0, 3)]
    boxes = torch.stack([uniform((batch,), low, high, rng) for low, high in ranges], dim=1)
    return (rectangle_corners(boxes) + 8192).float()


@axis_weights
def test_one_pixel_boxes_at_8192_keep_their_digits(backend, axis_weight):
    rng = generator(10)
    batch = backend.batch(64)
    pred, target = one_pixel_boxes(batch, rng), one_pixel_boxes(batch, rng)
    assert_value(backend, pred, target, axis_weight=axis_weight, reduction="none")


@pytest.mark.parametrize("convexity_weight", [0.0, 0.5])
@axis_weights
@pytest.mark.parametrize("ratio", [1e-9, 1e-4, 1e-2, 1e2, 1e4, 1e9])
def test_very_different_sizes(backend, ratio, axis_weight, convexity_weight):
    rng = generator(11)
    batch = backend.batch(32)
    pred, target = (star(batch, 5, rng) * ratio).float(), convex(batch, 6, rng).float()
    options = {"axis_weight": axis_weight, "convexity_weight": convexity_weight}
    assert_value(backend, pred, target, reduction="none", **options)


def test_a_large_batch(backend):
    """More samples than a launch has blocks to spare, and a batch that fills no block."""
    rng = generator(12)
    batch = backend.batch(1037)
    pred, target = star(batch, 6, rng).float(), convex(batch, 7, rng).float()
    assert_value(backend, pred, target, reduction="none")
    assert_value(backend, pred, target, reduction="mean")
