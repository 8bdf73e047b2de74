"""What other libraries call a box: our loss of their numbers is that of the corners that they make of them."""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import math

import cv2
import numpy as np
import pytest
import torch

from bench.detectors.nms import provide_nms
from tests.boxes import oracle
from tests.boxes.helpers import random_boxes
from tests.helpers import assert_close, assert_same, assert_zero, generator
from triton_mgiou import box_mgiou, box_mgiou_loss, mgiou_loss

OPTIONS = {"axis_weight": "uniform", "axis_grad": True, "boundary_weight": 0.25, "reduction": "none"}


def imported(name):
    """The module, or a skip where it is not installed or does not load."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    try:
        if name.startswith("torchvision") and importlib.util.find_spec("ultralytics") is not None:
            provide_nms()
        return importlib.import_module(name)
    except Exception as error:  # torchvision without its operators
        pytest.skip(f"{name} does not load: {error}")


def of_corners(pred, target):
    return mgiou_loss(pred, target, backend="eager", **OPTIONS)


def in_degrees(boxes):
    return torch.cat((boxes[:, :4], torch.rad2deg(boxes[:, 4:])), dim=1)


def pixels(rng):
    """Two batches of rotated boxes of some 10 pixels, in degrees."""
    return [in_degrees(random_boxes("cxcywhr", 40, rng) * torch.tensor([10.0, 10, 10, 10, 0.4])) for _ in range(2)]


def test_opencv_box_points():
    pred, target = pixels(generator(81))
    corners = [
        torch.tensor(np.array([cv2.boxPoints(((x, y), (w, h), r)) for x, y, w, h, r in side.tolist()])).double()
        for side in (pred, target)
    ]
    assert_close(box_mgiou_loss(pred, target, angle="degrees", **OPTIONS), of_corners(*corners), atol=1e-5)


def test_opencv_min_area_rect_of_either_era():
    """Until 4.5.0 the angle was in [-90, 0), since then it is in (0, 90]: a quarter turn and w, h swapped."""
    rng = generator(82)
    pred, target = pixels(rng)
    for box, other in zip(pred.tolist(), target.tolist(), strict=True):
        points = cv2.boxPoints((tuple(box[:2]), tuple(box[2:4]), box[4]))
        (x, y), (w, h), angle = cv2.minAreaRect(points)
        found = torch.tensor([[x, y, w, h, angle]], dtype=torch.float64)
        eras = [found, torch.tensor([[x, y, h, w, angle - 90]], dtype=torch.float64)]
        given = torch.tensor([box], dtype=torch.float64)
        goal = torch.tensor([other], dtype=torch.float64)
        want = box_mgiou_loss(given, goal, angle="degrees")
        for era in eras:
            assert_close(box_mgiou_loss(era, goal, angle="degrees"), want, atol=1e-4)
            assert box_mgiou_loss(given, era, angle="degrees") < 1e-3
        assert_zero(box_mgiou_loss(*eras, angle="degrees"), "loss")


def test_ultralytics():
    ops = imported("ultralytics.utils.ops")
    rng = generator(83)
    pred, target = random_boxes("cxcywhr", 40, rng), random_boxes("cxcywhr", 40, rng)
    corners = ops.xywhr2xyxyxyxy(pred), ops.xywhr2xyxyxyxy(target)
    assert_close(box_mgiou_loss(pred, target, **OPTIONS), of_corners(*corners), atol=1e-12)


def test_torchvision_plain_tensors():
    convert = imported("torchvision.ops").box_convert
    pred, target = pixels(generator(84))
    corners = [convert(side, "cxcywhr", "xyxyxyxy") for side in (pred, target)]
    got = box_mgiou_loss(pred, target, angle="degrees", clockwise=False, **OPTIONS)
    assert_close(got, of_corners(*(side.view(-1, 4, 2) for side in corners)), atol=1e-12)
    got = box_mgiou_loss(*corners, fmt="xyxyxyxy", **OPTIONS)
    assert_close(got, of_corners(*(side.view(-1, 4, 2) for side in corners)), atol=1e-12)
    upright = [side[:, :4].abs() + 0.1 for side in (pred, target)]
    ends = [convert(side, "cxcywh", "xyxy") for side in upright]
    got = box_mgiou_loss(*upright, fmt="cxcywh", **OPTIONS)
    assert_close(got, box_mgiou_loss(*ends, fmt="xyxy", **OPTIONS), atol=1e-12)


ROTATED = ("CXCYWHR", "XYWHR", "XYXYXYXY")
UPRIGHT = ("CXCYWH", "XYWH", "XYXY")


def converted(boxes, own):
    """Boxes of centre, sizes and, where `own` has an angle, degrees as torchvision turns them, in another format."""
    if own.startswith("CXCYWH"):
        return boxes
    rows = []
    for x, y, w, h, *turn in boxes.tolist():
        corners = oracle.corners((x, y, w, h, *(turn or [0.0])), "cxcywhr", "degrees", clockwise=False)
        first, _, opposite, _ = corners  # the upper left one at no turn
        if own == "XYXYXYXY":
            rows.append([number for corner in corners for number in corner])
        else:
            rows.append([*first, *opposite] if own == "XYXY" else [*first, w, h, *turn])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("own", [*ROTATED, *UPRIGHT])
def test_the_formats_are_those_of_torchvision(own):
    convert = imported("torchvision.ops").box_convert
    boxes = pixels(generator(83))[0][:, : 5 if own in ROTATED else 4]
    theirs = convert(boxes, "cxcywhr" if own in ROTATED else "cxcywh", own.lower())
    assert_close(converted(boxes, own), theirs, atol=1e-12)


Format = enum.Enum("Format", [*ROTATED, *UPRIGHT])


class BoundingBoxes(torch.Tensor):
    """What our code sees of torchvision's: a format, and operations that forget the class."""

    format = Format.CXCYWHR

    @classmethod
    def __torch_function__(cls, function, _types, arguments=(), keywords=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **keywords or {})


def stand_in(boxes, own):
    made = boxes.clone().as_subclass(BoundingBoxes)
    made.format = Format[own]
    return made


@pytest.fixture(params=["stand-in", "torchvision"])
def bounding(request):
    """Makes `BoundingBoxes` of numbers and the name of their format."""
    if request.param == "stand-in":
        return stand_in
    tv_tensors = imported("torchvision.tv_tensors")
    return lambda boxes, own: tv_tensors.BoundingBoxes(boxes, format=own, canvas_size=(100, 100))


CONVENTIONS = [
    ("cxcywhr", {}),
    ("cxcywhr", {"clockwise": False}),
    ("cxcywhr", {"angle": "degrees"}),
    ("cxcywhr", {"angle": "degrees", "clockwise": False}),
    ("xyxyxyxy", {}),
]


@pytest.mark.parametrize("own", ROTATED)
@pytest.mark.parametrize(("fmt", "convention"), CONVENTIONS, ids=str)
def test_rotated_bounding_boxes_know_their_own_format(bounding, own, fmt, convention):
    """Each side by itself: the plain one keeps the convention of the arguments. Two are upright, one has no width."""
    pred, target = pixels(generator(85))
    pred[:2, 4], pred[1, 2] = 0, 0
    corners = [converted(side, "XYXYXYXY") for side in (pred, target)]
    want = of_corners(*(side.view(-1, 4, 2) for side in corners))
    theirs = [bounding(converted(side, own), own) for side in (pred, target)]
    options = OPTIONS | convention
    assert_close(box_mgiou_loss(*theirs, fmt=fmt, **options), want, atol=1e-11)
    if fmt == "xyxyxyxy":
        plain = corners[1]
    else:
        turn = target[:, 4:] if convention.get("clockwise") is False else -target[:, 4:]
        turn = turn if convention.get("angle") == "degrees" else torch.deg2rad(turn)
        plain = torch.cat((target[:, :4], turn), dim=1)
    assert_close(box_mgiou_loss(theirs[0], plain, fmt=fmt, **options), want, atol=1e-11)
    loss = box_mgiou_loss(plain.clone().requires_grad_(), theirs[0], fmt=fmt, **options)
    assert type(loss) is torch.Tensor
    assert loss.requires_grad


@pytest.mark.parametrize("own", UPRIGHT)
@pytest.mark.parametrize("fmt", ["xyxy", "cxcywh", "cxcywhr", "xyxyxyxy"])
def test_upright_bounding_boxes_know_their_own_format(bounding, own, fmt):
    sides = [side[:, :4] for side in pixels(generator(86))]
    corners = ([oracle.corners(box, "cxcywh") for box in side] for side in sides)
    want = of_corners(*(torch.tensor(side, dtype=torch.float64) for side in corners))
    theirs = [bounding(converted(side, own), own) for side in sides]
    assert_close(box_mgiou_loss(*theirs, fmt=fmt, **OPTIONS), want, atol=1e-11)


@pytest.mark.parametrize("own", [*UPRIGHT, *ROTATED])
@pytest.mark.parametrize("fmt", ["cxcywhr", "xyxyxyxy"])
def test_images_of_bounding_boxes(own, fmt):
    """Each as if it were alone. Torchvision's constructor makes none of three dimensions; `as_subclass` does."""
    size = 5 if own in ROTATED else 4
    images = [[converted(side[:, :size], own) for side in pixels(generator(seed))] for seed in (91, 92)]
    want = [box_mgiou(*(stand_in(side, own) for side in image), fmt=fmt) for image in images]
    batches = [stand_in(torch.stack(sides), own) for sides in zip(*images, strict=True)]
    assert_close(box_mgiou(*batches, fmt=fmt), torch.stack(want), atol=1e-12)


@pytest.mark.parametrize("own", ["XYXY", "CXCYWH", "XYXYXYXY"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bounding_boxes_of_the_same_format_are_taken_as_they_are(bounding, own, dtype):
    """Through their centre they would lose a digit, and their gradient its type."""
    size = 5 if own in ROTATED else 4
    sides = [converted(side[:, :size], own).to(dtype) for side in pixels(generator(93))]
    results = []
    for first, second in (sides, [bounding(side, own) for side in sides]):
        first.requires_grad_()
        loss = box_mgiou_loss(first, second, fmt=own.lower(), **OPTIONS)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), first)))
    for got, want in zip(*results, strict=True):
        assert_same(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["cxcywh", "cxcywhr", "xyxyxyxy"])
def test_bounding_boxes_in_half_precision_lose_nothing(bounding, fmt, dtype):
    """The sum of two pixels may be above what float16 holds, and has more digits than either type."""
    sides = [
        torch.tensor(rows, dtype=dtype)
        for rows in ([[40000, 20, 40960, 35], [1001, 7, 1013, 2000]], [[40064, 22, 41024, 33], [997, 9, 1009, 2010]])
    ]
    want = box_mgiou_loss(*(side.double() for side in sides), fmt="xyxy", **OPTIONS)
    theirs = [bounding(side, "XYXY").requires_grad_() for side in sides]
    loss = box_mgiou_loss(*theirs, fmt=fmt, **OPTIONS)
    assert_close(loss, want, atol=1e-5)
    assert torch.autograd.grad(loss.sum(), theirs[0])[0].dtype == dtype


@pytest.mark.parametrize("own", [*UPRIGHT, *ROTATED])
@pytest.mark.parametrize("place", [0.0, 7.0, 3e38])
def test_bounding_boxes_without_a_size_have_a_finite_gradient(bounding, own, place):
    """Padding, which is zeros, and points elsewhere."""
    numbers = {"XYXY": [1.0] * 4, "XYXYXYXY": [1.0] * 8}.get(own, [1.0, 1, 0, 0, 0][: 5 if own.endswith("R") else 4])
    point = bounding(place * torch.tensor([numbers]), own).requires_grad_()
    for fmt in ("cxcywhr", "xyxyxyxy"):
        target = bounding(torch.tensor([[1.0, 2, 3, 4]]), "CXCYWH")
        loss = box_mgiou_loss(point, target, fmt=fmt, axis_weight="uniform")
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, point)[0]).all()


def test_a_side_without_a_length_has_no_direction_to_learn(bounding):
    """Its first corner then moves the centre only, as the last one does, of which no side is measured."""
    corners = torch.tensor([[5.0, 5, 5, 5, 5, 9, 5, 9]])
    segment = bounding(corners, "XYXYXYXY").requires_grad_()
    target = torch.tensor([[6.0, 8, 3, 5, 0.3]])
    (gradient,) = torch.autograd.grad(box_mgiou_loss(segment, target), segment)
    assert_close(gradient[:, :2], gradient[:, 6:], atol=1e-7, what="gradient to the first corner")
    assert (gradient != 0).any()


@pytest.mark.parametrize("fmt", ["xyxy", "cxcywh", "cxcywhr", "xyxyxyxy"])
def test_bounding_boxes_of_integers_are_refused_whatever_they_become(bounding, fmt):
    whole = bounding(torch.tensor([[1, 2, 3, 4]]), "XYXY")
    with pytest.raises(TypeError, match=r"target must be floating.*int64"):
        box_mgiou_loss(bounding(torch.tensor([[1.0, 2, 3, 4]]), "XYXY"), whole, fmt=fmt)


@pytest.mark.parametrize(("own", "size"), [("XYXY", 5), ("XYWH", 8), ("CXCYWHR", 4), ("XYWHR", 6), ("XYXYXYXY", 5)])
def test_bounding_boxes_with_other_numbers_than_their_format_has(bounding, own, size):
    """Torchvision makes them; a fifth number of upright boxes may be an angle, and must not be dropped."""
    wrong, right = bounding(torch.rand(3, size), own), torch.rand(3, 5)
    with pytest.raises(ValueError, match=rf"target must have . numbers.*{own}.*got \(3, {size}\)"):
        box_mgiou_loss(right, wrong)
    with pytest.raises(ValueError, match=rf"boxes1 must have . numbers.*{own}.*got \(3, {size}\)"):
        box_mgiou(wrong, right)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [box_mgiou_loss, box_mgiou], ids=lambda each: each.__name__)
def test_bounding_boxes_in_compiled_code(function):
    """Torchvision's own are subclasses such as this one."""
    pred, target = (side.float() for side in pixels(generator(89)))
    want = function(pred, target, angle="degrees", clockwise=False)
    got = torch.compile(function, fullgraph=True, backend="inductor")(
        pred.requires_grad_(), target.as_subclass(BoundingBoxes), angle="degrees", clockwise=False
    )
    assert type(got) is torch.Tensor
    assert_close(got.detach(), want, atol=1e-6)


@pytest.mark.parametrize("fmt", ["cxcywh", "xyxy", "cxcywhr", "xyxyxyxy"])
@pytest.mark.parametrize("function", [box_mgiou_loss, box_mgiou], ids=lambda each: each.__name__)
def test_a_result_is_no_bounding_boxes(bounding, function, fmt):
    """Under `set_return_type("TVTensor")` an operation on torchvision's keeps the class, as PyTorch's default is."""
    boxes = pixels(generator(90))[0][:, :4]
    made = bounding(boxes, "CXCYWH")
    if type(made) is BoundingBoxes:
        made = boxes.as_subclass(type("BoundingBoxes", (torch.Tensor,), {"format": Format.CXCYWH}))
        assert type(made + 1) is type(made)
        keeping = contextlib.nullcontext()
    else:
        keeping = imported("torchvision.tv_tensors").set_return_type("TVTensor")
    want = function(bounding(boxes, "CXCYWH"), bounding(boxes.flip(0), "CXCYWH"), fmt=fmt)
    with keeping:
        got = function(made, made.flip(0), fmt=fmt)
    assert type(got) is torch.Tensor
    assert_close(got, want, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [box_mgiou_loss, box_mgiou], ids=lambda each: each.__name__)
def test_bounding_boxes_of_the_format_itself_in_compiled_code(backend, function):
    """There is nothing to convert, and yet an operator must not get the class."""
    pred, target = (side[:, :4].float().to(backend.device) for side in pixels(generator(91)))
    options = {"fmt": "cxcywh", "backend": backend.name}
    compiler = "inductor" if backend.name == "triton" else "eager"  # which generates no code
    compiled = torch.compile(lambda p, t: function(p, t, **options), fullgraph=True, backend=compiler)
    upright = type("BoundingBoxes", (BoundingBoxes,), {"format": Format.CXCYWH})
    got = compiled(pred, target.as_subclass(upright))
    assert_close(got, function(pred, target, **options), atol=1e-6)


def test_bounding_boxes_that_a_format_has_no_place_for(bounding):
    rotated = bounding(pixels(generator(87))[0], "CXCYWHR")
    for fmt in ("xyxy", "cxcywh", "cxcyczlwhr", "corners3d"):
        with pytest.raises(ValueError, match=f"pred is a BoundingBoxes of format CXCYWHR.*{fmt}"):
            box_mgiou_loss(rotated, rotated, fmt=fmt)


class Named(torch.Tensor):
    """A tensor with a name for its memory's format, as a user's own class may have."""

    format = "channels_last"


@pytest.mark.parametrize("made", [Named, type("BoundingBoxes", (torch.Tensor,), {})], ids=["a format", "the name"])
def test_a_tensor_that_has_only_a_format_or_only_the_name_is_a_tensor(made):
    pred, target = (random_boxes("cxcywhr", 20, generator(90 + k)) for k in (0, 1))
    want = box_mgiou_loss(pred, target, **OPTIONS)
    assert_close(box_mgiou_loss(pred.as_subclass(made), target.as_subclass(made), **OPTIONS), want, atol=0)


def test_what_is_no_tensor_is_refused_whatever_its_name():
    boxes = type("BoundingBoxes", (), {"format": Format.CXCYWHR})()
    with pytest.raises(TypeError, match=r"^pred must be a torch\.Tensor, got BoundingBoxes"):
        box_mgiou_loss(boxes, torch.zeros(1, 5))


def test_gravity_centre_of_boxes_by_their_bottom():
    """What the docstring says of mmdet3d: its `.tensor` has the bottom's centre, which is half a height lower."""
    rng = generator(88)
    pred, target = random_boxes("cxcyczlwhr", 20, rng), random_boxes("cxcyczlwhr", 20, rng)
    bottoms = [side.clone() for side in (pred, target)]
    for side in bottoms:
        side[:, 2] -= side[:, 5] / 2
    raised = [torch.cat((side[:, :2], side[:, 2:3] + side[:, 5:6] / 2, side[:, 3:]), dim=1) for side in bottoms]
    want = box_mgiou_loss(pred, target, fmt="cxcyczlwhr", reduction="none")
    assert_close(box_mgiou_loss(*raised, fmt="cxcyczlwhr", reduction="none"), want, atol=1e-12)
    assert (box_mgiou_loss(*bottoms, fmt="cxcyczlwhr", reduction="none") - want).abs().max() > 0.01


LABELS = {  # the corners of half-sizes 1, as each library's source lists them
    "mgiou": [(-1, -1, -1), (1, -1, -1), (1, 1, -1), (-1, 1, -1), (-1, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1)],
    "OpenPCDet": [(1, 1, -1), (1, -1, -1), (-1, -1, -1), (-1, 1, -1), (1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, 1)],
    "nuScenes": [(1, 1, 1), (1, -1, 1), (1, -1, -1), (1, 1, -1), (-1, 1, 1), (-1, -1, 1), (-1, -1, -1), (-1, 1, -1)],
    "mmdet3d": [(-1, -1, -1), (-1, -1, 1), (-1, 1, 1), (-1, 1, -1), (1, -1, -1), (1, -1, 1), (1, 1, 1), (1, 1, -1)],
}


@pytest.mark.parametrize("library", LABELS)
def test_labels_of_eight_corners(library):
    rng = generator(89)
    pred, target = random_boxes("cxcyczlwhr", 20, rng), random_boxes("cxcyczlwhr", 20, rng)
    want = box_mgiou_loss(pred, target, fmt="cxcyczlwhr", reduction="none")
    corners = []
    for side in (pred, target):
        local = torch.tensor(LABELS[library], dtype=torch.float64) * side[:, None, 3:6] / 2
        cos, sin = side[:, 6:].cos(), side[:, 6:].sin()
        x, y, z = local.unbind(2)
        corners.append(torch.stack((x * cos - y * sin, x * sin + y * cos, z), dim=2) + side[:, None, :3])
    assert_close(box_mgiou_loss(*corners, fmt="corners3d", reduction="none"), want, atol=1e-12)


def test_clockwise_is_the_formula():
    """A quarter turn of a long box takes u to y with clockwise=True, and to -y without; seen by a third box."""
    long, target = torch.tensor([[0.0, 0.0, 4.0, 1.0, math.pi / 6]]), torch.tensor([[3.0, 1.7320508, 1.0, 1.0, 0.0]])
    towards = box_mgiou_loss(long, target, clockwise=True)
    away = box_mgiou_loss(long, target, clockwise=False)
    assert towards < away
