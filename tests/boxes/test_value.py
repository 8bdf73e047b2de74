"""The value of `box_mgiou_loss` against the definition through corners, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.boxes import oracle
from tests.boxes.helpers import (
    ANGLED,
    SPACE,
    closed_formats,
    corners3d,
    formats,
    in_degrees,
    options_of,
    oracle_options,
    random_boxes,
)
from tests.helpers import (
    AXIS_WEIGHTS,
    assert_close,
    assert_gradient_close,
    assert_same,
    assert_zero,
    axis_weights,
    generator,
    numpy64,
    rectangle_corners,
    uniform,
)
from triton_mgiou import PAPER, mgiou_loss

FLOAT_ERRORS = {torch.float32: 1e-6, torch.float64: 1e-14}


@formats
@axis_weights
@pytest.mark.parametrize("boundary_weight", [0.0, 0.25])
@pytest.mark.parametrize("dtype", FLOAT_ERRORS)
def test_against_the_oracle(boxes, fmt, dtype, axis_weight, boundary_weight):
    if fmt in SPACE and (axis_weight != "uniform" or boundary_weight):
        pytest.skip("the format does not have the option")
    rng = generator(11)
    batch = 133  # the kernel's lanes have one box or several, and the last ones none
    pred, target = random_boxes(fmt, batch, rng).to(dtype), random_boxes(fmt, batch, rng).to(dtype)
    options = {"axis_weight": axis_weight, "boundary_weight": boundary_weight}
    value, _ = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none", **options)
    want = oracle.per_sample_loss(numpy64(pred), numpy64(target), fmt, **oracle_options(fmt, **options))
    assert value.dtype == dtype
    assert_close(value, want, atol=3 * FLOAT_ERRORS[dtype])


@pytest.mark.parametrize("fmt", ANGLED)
@pytest.mark.parametrize(("angle", "clockwise"), [("degrees", True), ("degrees", False), ("radians", False)])
def test_units_and_directions_of_angles(boxes, fmt, angle, clockwise):
    if fmt in SPACE and not clockwise:
        pytest.skip("has one direction")
    rng = generator(12)
    pred, target = random_boxes(fmt, 20, rng), random_boxes(fmt, 20, rng)
    if angle == "degrees":
        pred, target = in_degrees(pred), in_degrees(target)
    pred, target = pred.float(), target.float()
    value, _ = boxes.value_and_gradient(
        pred, target, fmt=fmt, angle=angle, clockwise=clockwise, reduction="none", **options_of(fmt)
    )
    options = {} if fmt in SPACE else {"boundary_weight": 0.25}
    want = oracle.per_sample_loss(numpy64(pred), numpy64(target), fmt, angle, clockwise, **options)
    assert_close(value, want, atol=3e-6)


@axis_weights
@pytest.mark.parametrize("boundary_weight", [0.0, 0.25])
def test_boxes_in_the_plane_are_polygons(boxes, axis_weight, boundary_weight):
    """What `mgiou_loss` makes of the four corners."""
    rng = generator(13)
    options = {"axis_weight": axis_weight, "boundary_weight": boundary_weight, "reduction": "none"}
    pred, target = random_boxes("cxcywhr", 50, rng), random_boxes("cxcywhr", 50, rng)
    value, _ = boxes.value_and_gradient(pred.float(), target.float(), **options)
    corners = rectangle_corners(pred), rectangle_corners(target)
    assert_close(value, mgiou_loss(*corners, backend="eager", **options), atol=1e-6)
    free = [side.flatten(1).float() for side in corners]
    value, _ = boxes.value_and_gradient(*free, fmt="xyxyxyxy", **options)
    assert_close(value, mgiou_loss(*corners, backend="eager", **options), atol=2e-6)


def test_free_corners_have_the_defaults_of_polygons(boxes):
    rng = generator(14)
    pred, target = (rectangle_corners(random_boxes("cxcywhr", 9, rng)).float() for _ in range(2))
    want = mgiou_loss(pred, target, backend="eager")
    assert_close(boxes.value_and_gradient(pred.flatten(1), target.flatten(1), fmt="xyxyxyxy")[0], want, atol=1e-6)
    with_terms = {"convexity_weight": 0.5, "boundary_weight": 0.0}
    want = mgiou_loss(pred, target, backend="eager", **with_terms)
    value = boxes.value_and_gradient(pred.flatten(1), target.flatten(1), fmt="xyxyxyxy", **with_terms)[0]
    assert_close(value, want, atol=1e-6)


def test_the_formats_of_one_box_agree(boxes):
    """Upright boxes are rotated ones without a turn, and the corners of boxes in space are these boxes."""
    rng = generator(15)
    pred, target = random_boxes("cxcywh", 30, rng), random_boxes("cxcywh", 30, rng)
    want = boxes.value_and_gradient(pred, target, fmt="cxcywh", reduction="none")[0]
    no_turn = torch.zeros(30, 1, dtype=torch.float64)
    rotated = [torch.cat((side, no_turn), dim=1) for side in (pred, target)]
    assert_close(boxes.value_and_gradient(*rotated, reduction="none")[0], want, atol=1e-14)
    ends = [torch.cat((s[:, :2] - s[:, 2:] / 2, s[:, :2] + s[:, 2:] / 2), dim=1) for s in (pred, target)]
    assert_close(boxes.value_and_gradient(*ends, fmt="xyxy", reduction="none")[0], want, atol=1e-14)
    pred, target = random_boxes("cxcyczlwhr", 30, rng), random_boxes("cxcyczlwhr", 30, rng)
    want = boxes.value_and_gradient(pred, target, fmt="cxcyczlwhr", reduction="none")[0]
    corners = corners3d(pred), corners3d(target)
    assert_close(boxes.value_and_gradient(*corners, fmt="corners3d", reduction="none")[0], want, atol=1e-14)


def test_no_labels_of_the_corners_of_a_box_change_the_loss(boxes):
    rng = generator(16)
    pred, target = (corners3d(random_boxes("cxcyczlwhr", 20, rng)) for _ in range(2))
    want = boxes.value_and_gradient(pred, target, fmt="corners3d", reduction="none")[0]
    for order in ([1, 2, 3, 0, 5, 6, 7, 4], [4, 5, 6, 7, 0, 1, 2, 3], [0, 4, 5, 1, 3, 7, 6, 2]):
        value = boxes.value_and_gradient(pred[:, order], target, fmt="corners3d", reduction="none")[0]
        assert_close(value, want, atol=1e-14)


@formats
@pytest.mark.parametrize("scale", [1.0, 4e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_numbers_give_exactly_zero(boxes, fmt, scale, dtype):
    rng = generator(17)
    pred = random_boxes(fmt, 20, rng)
    if fmt == "corners3d":
        pred = pred + scale
    else:
        places = 3 if fmt in SPACE else 4 if fmt == "xyxy" else 2
        pred[:, :places] += scale
    pred = pred.to(dtype)
    value, *gradients = boxes.value_and_gradient(pred, pred, wrt=("pred", "target"), fmt=fmt, reduction="none")
    assert_zero(value, "loss")
    for gradient in gradients:
        assert_zero(gradient)


def swapped(boxes_, turn):
    """The same boxes by another name: width and height swapped, and a quarter turn."""
    return torch.stack((*boxes_[:, :2].unbind(1), boxes_[:, 3], boxes_[:, 2], boxes_[:, 4] + turn), dim=1)


def test_other_names_of_the_same_box_in_degrees_give_exactly_zero(boxes):
    rng = generator(18)
    pred = random_boxes("cxcywhr", 40, rng)
    pred[:, 4] = (uniform((40,), -180, 180, rng) * 16).round() / 16  # turns by 90 are exact
    pred[:8, 4] = torch.tensor([0.0, 45, -45, 90, 135, 180, -180, 22.5])
    pred = pred.float()
    for turn in (180.0, -180.0, 360.0, 720.0, -1800.0):
        target = torch.cat((pred[:, :4], pred[:, 4:] + turn), dim=1)
        value, gradient = boxes.value_and_gradient(pred, target, angle="degrees", reduction="none")
        assert_zero(value, f"loss after a turn by {turn}")
        assert_zero(gradient)
    for turn in (90.0, -90.0, 270.0, -450.0):
        for axis_weight in AXIS_WEIGHTS:
            value, gradient = boxes.value_and_gradient(
                pred, swapped(pred, turn), angle="degrees", axis_weight=axis_weight, reduction="none"
            )
            assert_zero(value, f"loss with w and h swapped and a turn by {turn}")
            assert_zero(gradient)


def test_other_names_of_the_same_box_in_radians(boxes):
    rng = generator(19)
    pred = random_boxes("cxcywhr", 60, rng)
    pred[:, 2] *= 10 ** uniform((60,), 0, 2, rng)
    ratio = torch.maximum(pred[:, 2] / pred[:, 3], pred[:, 3] / pred[:, 2])
    for turn, target in [
        (math.pi, torch.cat((pred[:, :4], pred[:, 4:] + math.pi), dim=1)),
        (math.pi / 2, swapped(pred, math.pi / 2)),
    ]:
        value, _ = boxes.value_and_gradient(pred.float(), target.float(), reduction="none")
        assert (value.cpu().double() <= 1e-6 * ratio).all(), f"a turn by {turn}"


@closed_formats
def test_powers_of_two_change_no_bit(boxes, fmt):
    rng = generator(20)
    pred, target = random_boxes(fmt, 40, rng).float(), random_boxes(fmt, 40, rng).float()
    places = 6 if fmt in SPACE else 4
    want = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none")
    for exponent in (-100, -7, 1, 30, 100):
        scaled = [side.clone() for side in (pred, target)]
        for side in scaled:
            side[:, :places] *= 2.0**exponent
        value, gradient = boxes.value_and_gradient(*scaled, fmt=fmt, reduction="none")
        gradient[:, :places] *= 2.0**exponent
        assert_same(value, want[0], f"2^{exponent}")
        assert_same(gradient, want[1], f"gradient, 2^{exponent}")


def test_powers_of_two_change_no_bit_of_corners(boxes):
    rng = generator(21)
    pred, target = random_boxes("corners3d", 20, rng).float(), random_boxes("corners3d", 20, rng).float()
    want = boxes.value_and_gradient(pred, target, fmt="corners3d", reduction="none")
    for exponent in (-60, 50):
        scale = 2.0**exponent
        value, gradient = boxes.value_and_gradient(pred * scale, target * scale, fmt="corners3d", reduction="none")
        assert_same(value, want[0])
        assert_same(gradient * scale, want[1], "gradient")


@formats
def test_small_boxes_far_away_keep_their_digits(boxes, fmt):
    """One unit at coordinates of 40000, in steps of 1/128 that float32 holds: as near the origin."""
    rng = generator(29)
    pred, target = ((random_boxes(fmt, 30, rng) * 128).round() / 128 for _ in range(2))
    far = [side.clone() for side in (pred, target)]
    places = 3 if fmt == "cxcyczlwhr" else 2 if fmt.startswith("cxcy") else None
    for side in far:
        side[:, :places] += 40000
    near = boxes.value_and_gradient(pred.float(), target.float(), fmt=fmt, reduction="none")
    value, gradient = boxes.value_and_gradient(*(side.float() for side in far), fmt=fmt, reduction="none")
    assert_close(value, near[0], atol=1e-6)
    assert_close(gradient, near[1], atol=2e-6, what="gradient")


@pytest.mark.parametrize("fmt", ANGLED)
@pytest.mark.parametrize("angle", ["radians", "degrees"])
@pytest.mark.parametrize("dtype", FLOAT_ERRORS)
def test_angles_of_many_turns(boxes, fmt, angle, dtype):
    """As exact as the number itself, up to the largest there is."""
    rng = generator(23)
    largest = torch.finfo(dtype).max
    special = torch.tensor([largest, 2.0**22, 2.0**26, 2.0**50], dtype=torch.float64)
    sizes = torch.cat((10 ** uniform((60,), 0, math.log10(largest), rng), special))
    pred, target = random_boxes(fmt, 64, rng), random_boxes(fmt, 64, rng)
    pred[:, -1] = sizes * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    pred, target = pred.to(dtype), target.to(dtype)
    target[:32, -1] = pred[:32, -1].flip(0)
    value, gradient = boxes.value_and_gradient(pred, target, fmt=fmt, angle=angle, reduction="none")
    exact = [numpy64(side) for side in (pred, target)]
    if angle == "degrees":  # math.radians would round the huge ones
        for side in exact:
            side[:, -1] = [math.radians(math.fmod(number, 360)) for number in side[:, -1]]
    options = {} if fmt in SPACE else {"boundary_weight": 0.25}
    assert_close(value, oracle.per_sample_loss(*exact, fmt, **options), atol=3 * FLOAT_ERRORS[dtype])
    assert torch.isfinite(gradient).all()
    equal = boxes.value_and_gradient(pred, pred, fmt=fmt, angle=angle, reduction="none")
    assert_zero(equal[0], "loss")
    assert_zero(equal[1])


def test_huge_angles_change_no_other_box(boxes):
    rng = generator(24)
    pred, target = random_boxes("cxcywhr", 40, rng).float(), random_boxes("cxcywhr", 40, rng).float()
    want = boxes.value_and_gradient(pred, target, reduction="none")
    spoilt = pred.clone()
    spoilt[7, 4] = 3e38
    value, gradient = boxes.value_and_gradient(spoilt, target, reduction="none")
    for place, bad in ((7, 3e38), (3, math.nan)):  # NaN hides no other's size
        spoilt[place, 4] = bad
        again = boxes.value_and_gradient(spoilt, target, reduction="none")
        others = [i for i in range(40) if i not in (3, 7)]
        assert_same(again[0][others], want[0][others])
        assert_same(again[1][others], want[1][others], "gradient")
        assert_same(again[0][7], value[7])
        assert_same(again[1][7], gradient[7], "gradient")


@formats
def test_the_loss_is_symmetric_but_for_the_term(boxes, fmt):
    rng = generator(25)
    pred, target = random_boxes(fmt, 20, rng).float(), random_boxes(fmt, 20, rng).float()
    one = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none", **PAPER)[0]
    other = boxes.value_and_gradient(target, pred, fmt=fmt, reduction="none", **PAPER)[0]
    assert_close(one, other, atol=5e-7)


@formats
def test_strides_change_no_bit(boxes, fmt):
    """Packed or not, of any batch size that the kernel treats in its own way.

    But for PyTorch's sums on a GPU: their order depends on the strides, so there it is the last bits.
    """
    tolerance = 1e-6 if (boxes.name, boxes.device) == ("eager", "cuda") else 0.0
    rng = generator(26)
    for batch in (3, 131):
        # On the device from the start: a copy to it would be packed.
        pred, target = (random_boxes(fmt, batch, rng).float().to(boxes.device) for _ in range(2))
        weight = uniform((batch,), 0, 1, rng).float()
        for reduction in ("none", "mean"):
            want = boxes.value_and_gradient(pred, target, fmt=fmt, reduction=reduction, weight=weight)
            wide = torch.full((batch, *[2 * n + 3 for n in pred.shape[1:]]), math.nan, device=boxes.device)
            inside = (slice(None), *[slice(1, 2 * n, 2) for n in pred.shape[1:]])
            wide[inside] = pred
            transposed = pred.flatten(1).t().contiguous().t().view_as(pred) if pred.dim() == 2 else pred
            for other in (wide[inside], transposed):
                got = boxes.value_and_gradient(other, target, fmt=fmt, reduction=reduction, weight=weight)
                assert_close(got[0], want[0], atol=tolerance, what=f"{batch} {reduction}")
                assert_gradient_close(got[1], want[1], rtol=tolerance, what=f"gradient, {batch} {reduction}")


@formats
def test_a_box_has_the_same_bits_in_any_batch(boxes, fmt):
    """The kernel gives a lane one box, or several where there are many; the last lanes have fewer."""
    if boxes.name != "triton":
        pytest.skip("PyTorch's sine on a CPU has other bits at the end of a row than in its vectors")
    rng = generator(28)
    pred, target = random_boxes(fmt, 37, rng).float(), random_boxes(fmt, 37, rng).float()
    want = boxes.value_and_gradient(pred, target, fmt=fmt, reduction="none")
    for batch in (133, 2**17 + 3) if boxes.device == "cuda" else (133,):
        rows = torch.arange(batch) % 37
        value, gradient = boxes.value_and_gradient(pred[rows], target[rows], fmt=fmt, reduction="none")
        assert_same(value, want[0][rows.to(value.device)], str(batch))
        assert_same(gradient, want[1][rows.to(value.device)], f"gradient, {batch}")


def test_expanded_boxes(boxes):
    rng = generator(27)
    one, target = (random_boxes("cxcywhr", batch, rng).float().to(boxes.device) for batch in (1, 9))
    for pred, other in ((one, target), (target, one)):
        want = boxes.value_and_gradient(*(side.expand(9, 5).contiguous() for side in (pred, other)), reduction="none")
        got = boxes.value_and_gradient(pred.expand(9, 5), other.expand(9, 5), reduction="none")
        assert_same(got[0], want[0])
        assert_same(got[1], want[1], "gradient")


coordinate = st.floats(-50, 50, width=32)
size = st.floats(0, 40, width=32)
angle = st.floats(-400, 400, width=32)
box = st.tuples(coordinate, coordinate, size, size, angle)


@given(pairs=st.lists(st.tuples(box, box), min_size=1, max_size=8), axis_weight=st.sampled_from(AXIS_WEIGHTS))
def test_any_boxes(boxes, pairs, axis_weight):
    """Value in range, and as the oracle's unless it jumps there.

    It does where an edge is about as short as the shortest axis, and where two segments or points come to lie on one
    line: pairs without any area are not compared.
    """
    pred, target = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
    value, gradient = boxes.value_and_gradient(
        pred, target, angle="degrees", axis_weight=axis_weight, boundary_weight=0.0, reduction="none"
    )
    assert torch.isfinite(gradient).all()
    assert ((value >= 0) & (value <= 1)).all()
    want = oracle.per_sample_loss(numpy64(pred), numpy64(target), "cxcywhr", "degrees", axis_weight=axis_weight)
    sides = torch.stack((pred[:, 2:4], target[:, 2:4]), dim=1)
    fair = (((sides == 0) | (sides > 0.01)).all(2).all(1) & (sides > 0).all(2).any(1)).numpy()
    assert_close(value.cpu()[fair], want[fair], atol=2e-4 if axis_weight == "soft" else 1e-4)
