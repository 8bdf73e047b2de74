"""Errors of `box_mgiou_loss` and `BoxMGIoULoss`: what was expected and what came; defaults; debug mode."""

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from tests.boxes.helpers import FORMATS, SPACE, random_boxes
from tests.helpers import Name, assert_close, assert_same, generator, rectangle_corners
from triton_mgiou import PAPER, BoxMGIoULoss, box_mgiou, box_mgiou_loss
from triton_mgiou.box_formats import FORMATS as ALL_FORMATS
from triton_mgiou.training import NonFiniteError, debug

BOXES = {fmt: torch.rand(3, *each.shape) + 0.5 for fmt, each in ALL_FORMATS.items()}


def loss_of(fmt, **options):
    return box_mgiou_loss(BOXES[fmt], BOXES[fmt] * 1.1, fmt=fmt, **options)


@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4), (3, 7), (3, 8), (3, 6), (3, 4, 2), (3, 3, 8), (3, 8, 3), (5,)])
@pytest.mark.parametrize("side", ["pred", "target"])
def test_a_wrong_shape_names_the_formats_that_have_it(fmt, shape, side):
    if shape[1:] == ALL_FORMATS[fmt].shape:
        return
    sides = {"pred": BOXES[fmt], "target": BOXES[fmt]} | {side: torch.zeros(shape)}
    with pytest.raises(ValueError, match=side) as error:
        box_mgiou_loss(**sides, fmt=fmt)
    text = str(error.value)
    assert str(shape) in text
    assert f"fmt={fmt!r}" in text
    others = [other for other, each in ALL_FORMATS.items() if each.shape == shape[1:]]
    assert all(repr(other) in text for other in others)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("other", ALL_FORMATS)
def test_a_matrix_names_the_formats_that_have_a_wrong_shape(fmt, other, batch):
    shapes = {each: ALL_FORMATS[each].shape for each in ALL_FORMATS}
    if shapes[fmt] == shapes[other]:
        return
    with pytest.raises(ValueError, match="boxes2") as error:
        box_mgiou(torch.zeros(*batch, 4, *shapes[fmt]), torch.zeros(*batch, 4, *shapes[other]), fmt=fmt)
    hint = str(error.value).rpartition(", which ")[2]
    named = {each for each in ALL_FORMATS if f"'{each}'" in hint}
    assert named == {each for each in ALL_FORMATS if shapes[each] == shapes[other]}


def test_corners_by_coordinate_are_told_to_transpose():
    for function in (box_mgiou_loss, box_mgiou):
        with pytest.raises(ValueError, match="transpose"):
            function(torch.zeros(2, 3, 8), torch.zeros(2, 8, 3), fmt="corners3d")


@pytest.mark.parametrize(
    ("fmt", "meanings"), [("xywhr", ("degrees", "radians", "corner")), ("xywh", ("corner", "centre"))]
)
def test_ambiguous_formats_tell_their_meanings(fmt, meanings):
    for call in (lambda: box_mgiou_loss(BOXES["xyxy"], BOXES["xyxy"], fmt=fmt), lambda: BoxMGIoULoss(fmt=fmt)):
        with pytest.raises(ValueError, match=repr(fmt)) as error:
            call()
        text = str(error.value)
        assert all(word in text for word in (*meanings, "torchvision", "Ultralytics"))


@pytest.mark.parametrize(
    ("fmt", "options", "name"),
    [
        ("cxcy", {}, "fmt"),
        (None, {}, "fmt"),
        ("cxcywhr", {"angle": "turns"}, "angle"),
        ("xyxy", {"angle": "degrees"}, "angle.*got 'degrees' and True"),
        ("xyxyxyxy", {"clockwise": False}, "clockwise.*got 'radians' and False"),
        ("corners3d", {"angle": "degrees"}, "angle"),
        ("cxcyczlwhr", {"clockwise": False}, "clockwise"),
        ("cxcyczlwhr", {"boundary_weight": 0.25}, "boundary_weight"),
        ("corners3d", {"boundary_weight": 1}, "boundary_weight"),
        ("cxcywhr", {"convexity_weight": 0.1}, "convexity_weight"),
        ("corners3d", {"convexity_weight": 0.1}, "convexity_weight"),
        ("cxcyczlwhr", {"axis_weight": "length"}, "axis_weight"),
        ("corners3d", {"axis_weight": "soft"}, "axis_weight"),
        ("cxcywhr", {"axis_weight": "equal"}, "axis_weight"),
        ("cxcywhr", {"boundary_weight": -1.0}, "boundary_weight"),
        ("cxcywhr", {"boundary_weight": math.nan}, "boundary_weight"),
        ("cxcywhr", {"boundary_weight": 10**400}, "boundary_weight"),
        ("cxcywhr", {"avg_factor": -(10**400)}, "avg_factor"),
        ("cxcywhr", {"reduction": "max"}, "reduction"),
        ("cxcywhr", {"backend": "cuda"}, "backend"),
        ("cxcywhr", {"reduction": "sum", "avg_factor": 2.0}, "avg_factor"),
        ("cxcywhr", {"weight": torch.ones(4)}, "weight"),
        ("xyxyxyxy", {"reduction": "max"}, "reduction"),
    ],
)
def test_values_that_are_refused(fmt, options, name):
    boxes = BOXES.get(fmt, BOXES["cxcywhr"])
    with pytest.raises(ValueError, match=name):
        box_mgiou_loss(boxes, boxes, fmt=fmt, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clockwise": 1}, "clockwise must be a bool, got int"),
        ({"clockwise": np.True_}, "clockwise must be a bool, got numpy"),
        ({"axis_grad": 1}, "axis_grad"),
        ({"boundary_weight": "0.1"}, "boundary_weight"),
        ({"pred": [[0.0] * 5]}, "pred"),
        ({"target": torch.zeros(3, 5, dtype=torch.int64)}, "target"),
        ({"weight": [1.0] * 3}, "weight"),
    ],
)
def test_types_that_are_refused(options, name):
    with pytest.raises(TypeError, match=name):
        box_mgiou_loss(**{"pred": BOXES["cxcywhr"], "target": BOXES["cxcywhr"], **options})


def test_batches_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="batch size 3, got 2"):
        box_mgiou_loss(BOXES["cxcywhr"], BOXES["cxcywhr"][:2])


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_the_papers_options_work_for_every_format(fmt):
    assert torch.isfinite(loss_of(fmt, **PAPER))
    assert torch.isfinite(BoxMGIoULoss.paper(fmt=fmt)(BOXES[fmt], BOXES[fmt] * 1.1))
    assert BoxMGIoULoss.paper(fmt=fmt, axis_grad=False).options["axis_grad"] is False


def gradient(fmt, **options):
    pred = BOXES[fmt].clone().requires_grad_()
    return torch.autograd.grad(box_mgiou_loss(pred, BOXES[fmt].flip(0), fmt=fmt, **options), pred)[0]


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_what_is_not_given_is_the_formats_default(fmt):
    expected = {
        "xyxyxyxy": {"axis_weight": "length", "axis_grad": False, "boundary_weight": 0.25},
        "cxcyczlwhr": {"axis_weight": "uniform", "axis_grad": True},
        "corners3d": {"axis_weight": "uniform", "axis_grad": False},
    }.get(fmt, {"axis_weight": "uniform", "axis_grad": True, "boundary_weight": 0.25})
    assert_same(loss_of(fmt), loss_of(fmt, **expected))
    assert_same(gradient(fmt), gradient(fmt, **expected))
    for name, value in expected.items():
        assert_same(gradient(fmt, **{name: None}), gradient(fmt, **{name: value}))


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_the_module_is_the_function(boxes, fmt):
    pred, target = (side.to(boxes.device) for side in (BOXES[fmt], BOXES[fmt].flip(0)))
    weight = torch.tensor([0.5, 0.0, 2.0], device=boxes.device)
    assert_same(BoxMGIoULoss(fmt=fmt, backend=boxes.name)(pred, target), boxes.loss(pred, target, fmt=fmt))
    module = BoxMGIoULoss("sum", 3.0, fmt, backend=boxes.name)
    assert_close(
        module(pred, target, weight), 3 * boxes.loss(pred, target, fmt=fmt, weight=weight, reduction="sum"), atol=1e-6
    )
    got = module(pred, target, weight, reduction_override="none")
    assert_close(got, 3 * boxes.loss(pred, target, fmt=fmt, weight=weight, reduction="none"), atol=1e-6)
    got = module(pred, target, weight, avg_factor=2.0, reduction_override="mean")
    assert_close(got, 3 * boxes.loss(pred, target, fmt=fmt, weight=weight, avg_factor=2.0), atol=1e-6)
    columns = weight.unsqueeze(1).expand(3, 5)  # mmdetection's weights of boxes
    assert_close(module(pred, target, columns), module(pred, target, weight), atol=1e-6)
    assert pickle.loads(pickle.dumps(module)).options == module.options


def test_a_module_without_positives_is_a_zero_in_the_graph():
    pred = BOXES["cxcywhr"].clone().requires_grad_()
    pred_nan = torch.where(torch.arange(3).unsqueeze(1) == 1, math.nan, pred)
    loss = BoxMGIoULoss()(pred, BOXES["cxcywhr"].flip(0), torch.zeros(3))
    assert loss == 0
    loss.backward()
    assert (pred.grad == 0).all()
    assert torch.isnan(BoxMGIoULoss()(pred_nan, BOXES["cxcywhr"], torch.zeros(3)))


def test_options_that_no_module_has_are_refused():
    with pytest.raises(TypeError, match="format"):
        BoxMGIoULoss(format="cxcywhr")
    with pytest.raises(ValueError, match="clockwise"):
        BoxMGIoULoss(fmt="corners3d", clockwise=False)
    for fmt, name, value in (
        ("cxcywhr", "convexity_weight", 0.5),
        ("corners3d", "boundary_weight", 0.25),
        ("cxcyczlwhr", "axis_weight", "length"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be .* for fmt='{fmt}'|^{name} must be 0: fmt='{fmt}'"):
            BoxMGIoULoss(fmt=fmt, **{name: value})
    for fmt in FORMATS:
        BoxMGIoULoss(fmt=fmt, axis_weight=None, axis_grad=None, boundary_weight=None, convexity_weight=None)
    text = repr(BoxMGIoULoss("sum", 2.0, "cxcyczlwhr", angle="degrees"))
    assert all(part in text for part in ("'sum'", "2.0", "'cxcyczlwhr'", "'degrees'"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_debug_mode_warns_of_angles_above_two_turns_in_either_direction(dtype):
    two_turns = torch.tensor(4 * math.pi, dtype=dtype)
    most = torch.stack((two_turns, -two_turns))
    boxes = torch.cat((torch.ones(2, 4, dtype=dtype), most[:, None]), dim=1)
    with debug(), warnings.catch_warnings():
        warnings.simplefilter("error")
        box_mgiou_loss(boxes, boxes.clone())
    for row in range(2):
        more = boxes.clone()
        more[row, 4] *= 1.001
        with debug(), pytest.warns(RuntimeWarning, match=r"1 of 2 angles of target are above 4 pi, up to 12\.57"):
            box_mgiou_loss(boxes, more)


def test_debug_mode_warns_of_degrees_given_as_radians():
    rng = generator(71)
    pred, target = random_boxes("cxcywhr", 4, rng).float(), random_boxes("cxcywhr", 4, rng).float()
    with debug(), warnings.catch_warnings():
        warnings.simplefilter("error")
        box_mgiou_loss(pred, target)
        target[1, 4] = 90.0
        box_mgiou_loss(pred, target, angle="degrees")
    with debug(), pytest.warns(RuntimeWarning, match=r"1 of 4 angles of target.*90.*degrees"):
        box_mgiou_loss(pred, target)
    with debug(), pytest.warns(RuntimeWarning, match="angles of pred"):
        box_mgiou_loss(target, pred)
    for function in (box_mgiou_loss, box_mgiou, BoxMGIoULoss()):
        with debug(), pytest.warns(RuntimeWarning) as caught:
            function(pred, target)
        assert [each.filename for each in caught] == [__file__]  # the user's line, not one of ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box_mgiou_loss(pred, target)


@pytest.mark.parametrize("fmt", FORMATS)
def test_debug_mode_finds_nan_in_boxes(fmt):
    spoilt = BOXES[fmt].clone()
    spoilt[1].fill_(math.nan)
    with debug(), pytest.raises(NonFiniteError, match=r"box_mgiou_loss, input: target: "):
        box_mgiou_loss(BOXES[fmt], spoilt, fmt=fmt)
    with debug():
        box_mgiou_loss(BOXES[fmt].clone().requires_grad_(), BOXES[fmt], fmt=fmt).backward()


def test_free_corners_are_polygons_in_debug_mode_too():
    corners = rectangle_corners(random_boxes("cxcywhr", 3, generator(72))).flatten(1).float()
    spoilt = corners.clone()
    spoilt[0, 0] = math.inf
    with debug(), pytest.raises(NonFiniteError, match="pred"):
        box_mgiou_loss(spoilt, corners, fmt="xyxyxyxy")


@pytest.mark.parametrize("fmt", SPACE)
def test_boxes_in_space_take_a_term_of_zero(fmt):
    assert_same(loss_of(fmt, boundary_weight=0.0, convexity_weight=0), loss_of(fmt))


def test_names_of_an_enumeration_are_names():
    """As configurations have them; `str` of such a name is another text."""
    pred, target = (random_boxes("xyxy", 3, generator(92)) for _ in range(2))
    got = box_mgiou_loss(pred, target, fmt=Name.XYXY, axis_weight=Name.LENGTH, reduction=Name.SUM)
    assert_same(got, box_mgiou_loss(pred, target, fmt="xyxy", axis_weight="length", reduction="sum"))
    got = BoxMGIoULoss(Name.SUM, fmt=Name.XYXY)(pred, target)
    assert_same(got, BoxMGIoULoss("sum", fmt="xyxy")(pred, target))
    assert_same(box_mgiou(pred, target, fmt=Name.XYXY, over=Name.MIN), box_mgiou(pred, target, fmt="xyxy", over="min"))
