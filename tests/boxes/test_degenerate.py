"""What the definition says about boxes that are no ordinary pair."""

from __future__ import annotations

import pytest
import torch

from tests.boxes import oracle
from tests.boxes.helpers import (
    ANGLED,
    SPACE,
    closed_formats,
    corners3d,
    formats,
    options_of,
    oracle_options,
    random_boxes,
)
from tests.helpers import (
    AXIS_WEIGHTS,
    BOTH,
    INF,
    NAN,
    assert_close,
    assert_same,
    assert_zero,
    axis_grads,
    axis_weights,
    generator,
    numpy64,
    uniform,
)
from triton_mgiou import PAPER
from triton_mgiou.box_formats import FORMATS as ALL_FORMATS


def rotated(*boxes):
    return torch.tensor(boxes, dtype=torch.float32)


@axis_weights
@axis_grads
@pytest.mark.parametrize("boundary_weight", [0.0, 0.25])
def test_two_points_have_no_axis(boxes, axis_weight, axis_grad, boundary_weight):
    pred = rotated(
        (1, 2, 0, 0, 0.3), (0, 0, 0, 0, 0), (3e38, 0, 0, 0, 1), (1e-45, 0, -0.0, 0, 5), (3e38, 3e38, 0, 0, 0)
    )
    target = rotated(
        (3, 5, 0, 0, 1), (-0.0, 0, 0, 0, 0), (0, -3e38, 0, 0, 3e38), (0, 1e-45, 0, 0, 0), (-3e38, 0, 0, 0, 0)
    )
    value, *gradients = boxes.value_and_gradient(
        pred, target, wrt=BOTH, axis_weight=axis_weight, axis_grad=axis_grad, boundary_weight=boundary_weight,
        reduction="none",
    )  # fmt: skip
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


def test_two_points_in_space_have_no_axis(boxes):
    pred, target = torch.tensor([[1.0, 2, 3, 0, 0, 0, 1]]), torch.tensor([[4.0, 5, 6, 0, 0, 0, 2]])
    corners = [side[:, :3].unsqueeze(1).expand(1, 8, 3) for side in (pred, target)]
    for sides, fmt in (((pred, target), "cxcyczlwhr"), (corners, "corners3d")):
        value, *gradients = boxes.value_and_gradient(*sides, wrt=BOTH, fmt=fmt)
        assert_zero(value, "loss")
        for gradient in gradients:
            assert_zero(gradient)


@axis_grads
@axis_weights
def test_a_point_against_a_box(boxes, axis_weight, axis_grad):
    """Only the box has axes. Inside it, GIoU1D is 0 / h + |g| / h - 1 = 0 on each."""
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "boundary_weight": 0.0, "reduction": "none"}
    square, inside, outside = rotated((1, 1, 2, 2, 0)), rotated((0.5, 1.25, 0, 0, 7)), rotated((4, 1, 0, 0, 7))
    for pred, target in [(inside, square), (square, inside)]:
        value, *gradients = boxes.value_and_gradient(pred, target, wrt=BOTH, **options)
        assert_close(value, [0.5], atol=0.0)
        for gradient in gradients:
            assert_zero(gradient)
    # As for polygons: in x |p| + |g| = 2 and h = 4, so GIoU1D = -1/2, in y 0.
    value, gradient = boxes.value_and_gradient(outside, square, **options)
    assert_close(value, [(1 + 1 / 4) / 2], atol=1e-7)
    assert_close(gradient, [[1 / 32, 0, 0, 0, 0]], atol=1e-8, what="gradient")


def test_points_and_segments_of_the_boundary_term(boxes):
    """Without an area of the target it is 0; of a point or a segment it is 1 against a real target."""
    options = {"axis_weight": "uniform", "reduction": "none"}
    real, point, segment = rotated((1, 1, 2, 3, 0.2)), rotated((1, 1, 0, 0, 0)), rotated((1, 1, 5, 0, 0.4))
    for pred, target, term in [
        (real, point, 0.0), (real, segment, 0.0), (point, segment, 0.0), (point, real, 1.0), (segment, real, 1.0),
    ]:  # fmt: skip
        plain = boxes.value_and_gradient(pred, target, boundary_weight=0.0, **options)[0]
        value, gradient = boxes.value_and_gradient(pred, target, boundary_weight=0.25, **options)
        assert_close(value - plain, [0.25 * term], atol=1e-7)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcywh"])
@pytest.mark.parametrize(
    ("size", "slope"),
    [((1e-15, 1e-15), (1.0, 1.0)), ((1e-28, 1e-28), (0, 0)), ((1e-28, 0), (0, 0)), ((0, 1e-26), (0, 0))],
)
def test_the_boundary_term_of_a_speck(boxes, fmt, size, slope):
    """A square p in the middle of a square W has the term 1 - 2 p W / (p^2 + W^2), so far below W its slope is -2 / W.

    Where p W is below 2^-96, under which squared lengths are rounding, it is a point: the term is 1, without a slope.
    """
    side = 1e-12
    pred, target = (torch.tensor([[1.0, 1.0, *sizes, 0.0][: len(fmt) - 2]]) for sizes in (size, (side, side)))
    value, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none", boundary_weight=0.25)
    assert_close(value, [0.5 + 0.25], atol=2e-3)
    # Of MGIoU: only G has axes, and on both D is (1 - p / W) / 2.
    want = [-(0.25 * (s != 0) + 0.25 * t) / side for s, t in zip(size, slope, strict=True)]
    assert_close(gradient[0, 2:4], want, rtol=5e-3, atol=0.0, what="gradient")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 48), (torch.float64, 400)])
def test_the_largest_target_without_an_area(boxes, dtype, bits):
    """A square as long as what counts as 0, and longer ones: the term of a square of 1 is 0, and then nearly 1."""
    for side, expected in ((2.0**-bits, 0.0), (2.0 ** (1 - bits), 0.25)):
        target = torch.zeros(1, 5, dtype=dtype)
        target[0, 2:4] = side
        pred = torch.tensor([[0, 0, 1, 1, 0]], dtype=dtype)
        losses = [boxes.value_and_gradient(pred, target, boundary_weight=weight) for weight in (0.25, 0.0)]
        assert_close(losses[0][0] - losses[1][0], expected, atol=1e-6)
        assert torch.isfinite(losses[0][1]).all()
        if not expected:
            assert_same(losses[0][1], losses[1][1], "gradient")


@pytest.mark.parametrize(("bits", "counts"), [(10, False), (9, True)])
@pytest.mark.parametrize(("dtype", "more", "weight"), [(torch.float32, 0, 2.0**29), (torch.float64, 14, 2.0**60)])
def test_a_boundary_term_that_is_rounding(boxes, dtype, more, weight, bits, counts):
    """Boxes k = 1 + e times as large as their target have the term (k - 1)^2 / (k^2 + 1): e^2 / 2, but for e^3.

    Up to 2^-20, in float64 2^-48, it counts as 0. Beside the weight the rest of the loss is lost.
    """
    target = random_boxes("cxcywhr", 16, generator(31)).to(dtype)
    k = 1 + 2.0 ** -(bits + more)
    pred = target * torch.tensor([1, 1, k, k, 1], dtype=dtype)
    options = {"reduction": "none", "axis_weight": "length"}
    value, *gradient = boxes.value_and_gradient(pred, target, boundary_weight=weight, **options)
    if counts:
        assert_close(value / weight, torch.full((16,), (k - 1) ** 2 / (k * k + 1)), atol=0.0, rtol=0.3)
    else:
        assert_same(value, boxes.loss(pred.to(boxes.device), target.to(boxes.device), boundary_weight=0.0, **options))
        plain = boxes.value_and_gradient(pred, target, boundary_weight=0.0, **options)[1]
        assert_same(gradient[0], plain, "gradient")


@axis_weights
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 48), (torch.float64, 400)])
def test_the_longest_length_that_counts_as_0(boxes, dtype, bits, axis_weight):
    """A square and a point beside it, on the axis through both: D is 1 and, across, 1/2. Without a length no axis.

    Under "uniform" weights they are so near, beside a number of 1, that a millionth of their extent is even shorter.
    """
    distance = 2.0 ** (18 - bits) if axis_weight == "uniform" else 1.0
    for side, expected in ((2.0**-bits, 0.0), (2.0 ** (1 - bits), 0.75)):
        square, point = torch.tensor([[[0, 1, 0, 0, 0]], [[0, 1, 0, 0, 0]]], dtype=dtype)
        square[0, 2:4] = side  # float32 would not have that of float64
        point[0, 0] = distance
        options = {"axis_weight": axis_weight, "boundary_weight": 0.0}
        for pair in ((square, point), (point, square)):
            value = boxes.loss(*(each.to(boxes.device) for each in pair), **options)
            assert_close(value, expected, atol=1e-5)


@axis_grads
@axis_weights
def test_segments(boxes, axis_weight, axis_grad):
    """A box with one side of 0 has one axis, the normal of the other side."""
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "boundary_weight": 0.0, "reduction": "none"}
    pred = rotated((2, 0, 4, 0, 0))
    for target, expected in [
        ((2, 0, 4, 0, 0), 0.0),  # equal
        ((5, 0, 8, 0, 0), 0.0),  # on one line: all projections are equal
        ((2, 1, 4, 0, 0), 1.0),  # parallel: two different points
        ((1, 1, 0, 2, 0), 0.5),  # across: [0, 4] against a point inside, and a point at the end of [0, 2]
    ]:
        value, *gradients = boxes.value_and_gradient(pred, rotated(target), wrt=BOTH, **options)
        assert_close(value, [expected], atol=1e-7, what=str(target))
        for gradient in gradients:
            assert torch.isfinite(gradient).all()


@axis_grads
@axis_weights
@pytest.mark.parametrize(("distance", "length"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.1), (1e-30, 1e-30)])
def test_segments_on_one_line_at_any_slope(boxes, distance, length, axis_weight, axis_grad):
    """As along x. No numbers put a centre on such a line, so across it the offset is rounding."""
    rng = generator(1903)
    turn = uniform((64, 1), -7, 7, rng)
    along = torch.cat((turn.cos(), turn.sin()), dim=1)
    sides = []
    for _ in range(2):
        centre = along * uniform((64, 1), -length / 2, length / 2, rng) + distance * torch.tensor([0.6, -0.8])
        size = uniform((64, 1), 0.1 * length, length, rng)
        sides.append(torch.cat((centre, size, torch.zeros_like(size), turn), dim=1).float())
    options = {"axis_weight": axis_weight, "axis_grad": axis_grad, "reduction": "none"}
    value, *gradients = boxes.value_and_gradient(*sides, wrt=BOTH, **options)
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


@formats
@pytest.mark.parametrize("height", [1.5e-6, 2.5e-6])
def test_an_edge_below_a_millionth_of_the_extent_is_no_axis(boxes, fmt, height):
    """Two boxes whose other sides are 2, one above the other: equal on all axes but the one along the distance.

    In the plane that is the normal of the long edges, in space the short edge itself.
    """
    sides = []
    for place in (0.0, 1.0):
        if fmt in SPACE:
            numbers = rotated((0, 0, place, 2, 2, height, 0))
            sides.append(numbers if fmt != "corners3d" else corners3d(numbers).float())
        elif fmt == "xyxy":
            sides.append(rotated((-1, place - height / 2, 1, place + height / 2)))
        else:
            sides.append(rotated((0, place, 2, height, 0)[: ALL_FORMATS[fmt].shape[0]]))
    value = boxes.loss(*(side.to(boxes.device) for side in sides), fmt=fmt, boundary_weight=0.0)
    without, with_it = (0, 1 / 3) if fmt in SPACE else (1, 1 / 2)
    assert_close(value, with_it if height > 2e-6 else without, atol=2e-6)


@pytest.mark.parametrize(("thinness", "term"), [(0.95e-6, 0.0), (1.05e-6, 1.0)])
@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcywh", "xyxy"])
def test_a_target_thinner_than_a_millionth_has_no_boundary_term(boxes, fmt, thinness, term):
    """And a little thicker, against a box that is not thin, it is 1 but for the quotient of the areas."""
    pred, target = rotated((1, 1, 2, 1, 0)), rotated((1, 1, 2, 2 * thinness, 0))
    if fmt == "xyxy":
        pred, target = rotated((0, 0.5, 2, 1.5)), rotated((0, -thinness, 2, thinness))
    sides = [side[:, : ALL_FORMATS[fmt].shape[0]].to(boxes.device) for side in (pred, target)]
    plain, value = (boxes.loss(*sides, fmt=fmt, boundary_weight=weight) for weight in (0.0, 0.25))
    assert_close(value - plain, 0.25 * term, atol=1e-6)


@closed_formats
@axis_weights
def test_a_negative_size_counts_as_its_absolute_value(boxes, fmt, axis_weight):
    rng = generator(51)
    pred, target = random_boxes(fmt, 10, rng).float(), random_boxes(fmt, 10, rng).float()
    options = options_of(fmt, axis_weight=axis_weight, boundary_weight=0.25)
    value, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none", **options)
    other, want = pred.clone(), gradient.clone()
    if fmt == "xyxy":  # left and right change places
        other[:, (0, 2)] = pred[:, (2, 0)]
        want[:, (0, 2)] = gradient[:, (2, 0)]
    else:
        size = 3 if fmt in SPACE else 2
        other[:, size] *= -1
        want[:, size] *= -1
    got = boxes.value_and_gradient(other, target, fmt=fmt, reduction="none", **options)
    assert_close(got[0], value, atol=1e-7)
    assert_close(got[1], want, atol=1e-6, what="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@axis_weights
@axis_grads
@pytest.mark.parametrize("weight", [0.5, 1e9])
def test_any_finite_number_gives_a_finite_loss_and_gradient(boxes, axis_weight, axis_grad, dtype, weight):
    largest, smallest = torch.finfo(dtype).max, 2.0**-149 if dtype == torch.float32 else 2.0**-1074
    numbers = [0.0, smallest, -smallest, 1e-30, 1e-12, 1.0, -1.0, 1e20, -largest, largest, torch.finfo(dtype).tiny]
    rng = generator(52)
    for fmt in (*ALL_FORMATS,):
        shape = ALL_FORMATS[fmt].shape
        sides = [
            torch.tensor(numbers, dtype=dtype)[torch.randint(len(numbers), (boxes.batch(400), *shape), generator=rng)]
            for _ in range(2)
        ]
        options = options_of(fmt, axis_weight=axis_weight, axis_grad=axis_grad, boundary_weight=weight)
        value, *gradients = boxes.value_and_gradient(*sides, wrt=BOTH, fmt=fmt, reduction="none", **options)
        assert ((value >= 0) & (value <= (1 + weight) * (1 + 1e-6))).all(), fmt
        for gradient in gradients:
            assert torch.isfinite(gradient).all(), fmt


@closed_formats
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
def test_boxes_of_very_different_sizes(boxes, fmt, axis_weight):
    """Aspect ratios and sizes from 1e-4 to 1e4, by the oracle."""
    rng = generator(53)
    pred, target = random_boxes(fmt, 30, rng), random_boxes(fmt, 30, rng)
    sizes = slice(3, 6) if fmt in SPACE else slice(2, 4)
    if fmt == "xyxy":
        pred[:, 2] += 100.0
    else:
        pred[:, sizes] *= 10 ** (4 * torch.rand(pred[:, sizes].shape, generator=rng, dtype=torch.float64) - 2)
    options = options_of(fmt, axis_weight=axis_weight, boundary_weight=0.0)
    value, _ = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none", **options)
    want = oracle.per_sample_loss(numpy64(pred), numpy64(target), fmt, **oracle_options(fmt, **options))
    assert_close(value, want, atol=1e-12)


@formats
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", BOTH)
def test_nan_and_inf_stay_in_their_sample(boxes, fmt, side, bad):
    rng = generator(54)
    clean = {"pred": random_boxes(fmt, 5, rng).float(), "target": random_boxes(fmt, 5, rng).float()}
    others = [0, 1, 3, 4]
    shape = clean["pred"].shape[1:]
    places = [(0,) * len(shape), tuple(n - 1 for n in shape), tuple(n // 2 for n in shape)]
    for place in places:
        spoilt = dict(clean)
        spoilt[side] = clean[side].clone()
        spoilt[side][(2, *place)] = bad
        for reduction in ("none", "mean"):
            want = boxes.value_and_gradient(**clean, wrt=BOTH, fmt=fmt, reduction=reduction)
            got = boxes.value_and_gradient(**spoilt, wrt=BOTH, fmt=fmt, reduction=reduction)
            if reduction == "none":
                assert torch.isnan(got[0][2]), place
                assert_same(got[0][others], want[0][others])
            else:
                assert torch.isnan(got[0]), place
            for got_gradient, want_gradient in zip(got[1:], want[1:], strict=True):
                assert_same(got_gradient[others], want_gradient[others], f"gradient with {bad} at {place}")
                assert torch.isnan(got_gradient[2]).all(), place


@pytest.mark.parametrize("fmt", ANGLED)
def test_a_nan_angle_of_two_points_is_not_lost(boxes, fmt):
    point = torch.zeros(1, ALL_FORMATS[fmt].shape[0])
    turned = point.clone()
    turned[:, -1] = NAN
    for pred, target in ((turned, point), (point, turned)):
        value, *gradients = boxes.value_and_gradient(pred, target, wrt=BOTH, fmt=fmt)
        assert torch.isnan(value)
        for gradient in gradients:
            assert torch.isnan(gradient).all()


@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_empty_batch_is_a_zero_in_the_graph(boxes, fmt, reduction):
    for dtype in (torch.float32, torch.float16, torch.float64):
        pred = torch.zeros(0, *ALL_FORMATS[fmt].shape, dtype=dtype)
        value, *gradients = boxes.value_and_gradient(pred, pred, wrt=BOTH, fmt=fmt, reduction=reduction)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert_zero(value, "loss")
        assert [gradient.shape for gradient in gradients] == [pred.shape] * 2
    for factor in (0, 0.0, torch.tensor(0.0)):
        assert_zero(boxes.value_and_gradient(pred, pred, fmt=fmt, avg_factor=factor)[0], "loss")


def test_pixels_in_half_precision(boxes):
    """Squares of 1000 pixels are past the largest float16."""
    pred = torch.tensor([[1000, 900, 300, 200, 0.5]], dtype=torch.float16)
    target = torch.tensor([[1100, 950, 280, 220, 0.25]], dtype=torch.float16)
    value, gradient = boxes.value_and_gradient(pred, target, **PAPER)
    want = oracle.per_sample_loss(numpy64(pred), numpy64(target), "cxcywhr", axis_weight="uniform")
    assert_close(value, want[0], atol=1e-6)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, :2] != 0).any()


@closed_formats
@pytest.mark.parametrize("axis_grad", [True, False])
def test_a_sample_that_needs_care_changes_no_bit_of_the_others(boxes, fmt, axis_grad):
    """The kernel takes a shorter way where a whole program's boxes are ordinary ones."""
    rng = generator(57)
    pred, target = (random_boxes(fmt, 9, rng).float() for _ in range(2))
    options = {"fmt": fmt, "axis_grad": axis_grad, "reduction": "none"}
    value, *gradients = boxes.value_and_gradient(pred, target, wrt=BOTH, **options)
    others = torch.arange(9) != 4
    for place in range(pred.shape[1]):
        for number in (0.0, -0.0, 1e-30, 1e30, 3e38, NAN):
            changed = pred.clone()
            changed[4, place] = number
            other_value, *other_gradients = boxes.value_and_gradient(changed, target, wrt=BOTH, **options)
            assert_same(other_value[others], value[others])
            for got, want in zip(other_gradients, gradients, strict=True):
                assert_same(got[others], want[others])
