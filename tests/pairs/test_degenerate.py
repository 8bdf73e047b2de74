"""Pairs that are points, lines, plates, absent or not finite: what the matrix makes of them, on every backend."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import (
    AXIS_WEIGHTS,
    INF,
    NAN,
    assert_close,
    assert_finite,
    assert_zero,
    box,
    generator,
    points,
    uniform,
)
from tests.pairs import oracle
from tests.pairs.helpers import FORMATS, OVER, corners_in_space, needs_kernel, random_boxes
from tests.pairs.test_value import matrix
from triton_mgiou import box_mgiou, polygon_mgiou

A = 0.3  # an angle
C, S = math.cos(A), math.sin(A)

# What: two boxes (x, y, w, h, angle), the MGIoU of the pair.
PLANE = {
    "two points apart": ([0, 0, 0, 0, 0], [100, 0, 0, 0, 0], -1),
    "two points apart, turned": ([0, 0, 0, 0, A], [3, 4, 0, 0, 1], -1),
    "two points in one place": ([5, 5, 0, 0, 0], [5, 5, 0, 0, 1], 1),
    "two points at the origin": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0], 1),
    "a point in a box": ([0, 0, 2, 4, A], [0, 0, 0, 0, 0], 0),
    "a point outside a box": ([0, 0, 2, 2, 0], [9, 0, 0, 0, 0], (2 / 10 - 1 + 0) / 2),
    "a point outside a box, with an angle": ([0, 0, 2, 2, 0], [9, 0, 0, 0, 1], (2 / 10 - 1 + 0) / 2),
    "zero padding and a box far away": ([0, 0, 0, 0, 0], [1e4, 1e4, 2, 2, 0], 2 / 10001 - 1),
    "collinear segments apart": ([0, 0, 2, 0, 0], [8, 0, 2, 0, 0], 4 / 10 - 1),
    "collinear segments apart, upwards": ([0, 0, 0, 2, 0], [0, 8, 0, 2, 0], 4 / 10 - 1),
    "collinear segments apart, turned": ([0, 0, 2, 0, A], [8 * C, 8 * S, 2, 0, A], 4 / 10 - 1),
    "collinear segments that overlap": ([0, 0, 2, 0, A], [C, S, 2, 0, A], 4 / 3 - 1),
    "collinear segments about one centre": ([1, 1, 2, 0, A], [1, 1, 8, 0, A], 10 / 8 - 1),
    "collinear, one along its height": ([0, 0, 2, 0, 0], [8, 0, 0, 2, math.pi / 2], 4 / 10 - 1),
    "equal segments": ([3, 1, 2, 0, A], [3, 1, 2, 0, A], 1),
    "parallel segments side by side": ([0, 0, 2, 0, A], [-5 * S, 5 * C, 2, 0, A], -1),
    "a segment and a point on it": ([0, 0, 2, 0, 0], [0.5, 0, 0, 0, 1], 0),
    "a segment and a point on its line": ([0, 0, 2, 0, 0], [3, 0, 0, 0, 1], 2 / 4 - 1),
    "tiny boxes that are points at this distance": ([0, 0, 1, 1, 0], [1e8, 0, 1, 1, 0], -1),
    "hairs on a line": ([0, 0, 2, 1e-9, A], [8 * C, 8 * S, 2, 1e-9, A], 4 / 10 - 1),
    "negative sides count as positive": ([1, 2, -3, 2, A], [1, 2, 3, -2, A], 1),
}

# Two boxes (x, y, z, l, w, h, yaw).
SPACE = {
    "points apart": ([0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 1], -1),
    "points in one place": ([1, 2, 3, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 1], 1),
    "plates, one above the other": ([0, 0, 0, 2, 2, 0, A], [0, 0, 5, 2, 2, 0, A], (4 - 2) / 6),
    "one plate": ([0, 0, 1, 2, 2, 0, A], [0, 0, 1, 2, 2, 0, A], 1),
    "plates in one plane": ([0, 0, 1, 2, 2, 0, 0], [8, 0, 1, 2, 2, 0, 0], (4 / 10 - 1 + 1) / 2),
    "rods side by side": ([0, 0, 0, 2, 0, 0, A], [-5 * S, 5 * C, 0, 2, 0, 0, A], 0),
    "rods side by side, one along its width": ([0, 0, 0, 2, 0, 0, A], [-5 * S, 5 * C, 0, 0, 2, 0, A + math.pi / 2], 0),
    "rods on a line": ([0, 0, 0, 2, 0, 0, A], [8 * C, 8 * S, 0, 2, 0, 0, A], 4 / 10 - 1),
    "poles apart": ([0, 0, 0, 0, 0, 2, A], [3, 0, 0, 0, 0, 2, 0], None),
    "zero padding and a box": ([0, 0, 0, 0, 0, 0, 0], [9, 9, 9, 2, 2, 2, 0], 2 / 10 - 1),
}

# Two polygons by their vertices.
POLYGONS = {
    "two points apart": ([(0, 0)], [(100, 0)], -1),
    "two points by repetition": ([(1, 1)] * 4, [(3, 4)] * 3, -1),
    "two points in one place": ([(7, 7)] * 4, [(7, 7)], 1),
    "a point in a square": ([(0, 0), (2, 0), (2, 2), (0, 2)], [(1, 1)] * 4, 0),
    "collinear segments apart": ([(0, 0), (2, 0)], [(8, 0), (10, 0)], 4 / 10 - 1),
    "collinear segments apart, turned": ([(0, 0), (2 * C, 2 * S)], [(8 * C, 8 * S), (10 * C, 10 * S)], 4 / 10 - 1),
    "collinear by repetition": ([(0, 0), (2, 0), (2, 0), (0, 0)], [(1, 0), (1, 0), (4, 0)], 5 / 4 - 1),
    "equal segments": ([(1, 2), (3, 5)], [(3, 5), (1, 2)], 1),
    "a segment and a point on its line": ([(0, 0), (0, 2)], [(0, 4)], 2 / 4 - 1),
    "parallel segments side by side": ([(0, 0), (2, 0)], [(0, 5), (2, 5)], -1),
    "three points on a line and a point": ([(0, 0), (1, 1), (3, 3)], [(2, 2)], 0),
}


DEEP = -1e4  # the depth of two points apart is that of extents of a millionth; which axis says so does not matter


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr"])
def test_degenerate_boxes(backend, fmt, over):
    rows = PLANE if fmt == "cxcywhr" else SPACE
    first, second = (torch.tensor([row[side] for row in rows.values()], dtype=torch.float32) for side in (0, 1))
    for dtype in (torch.float32, torch.float64):
        there = matrix(backend, first.to(dtype), second.to(dtype), fmt=fmt, over=over).diagonal().cpu()
        back = matrix(backend, second.to(dtype), first.to(dtype), fmt=fmt, over=over).diagonal().cpu()
        assert_close(back, there, atol=0)
        for value, (name, (p, g, expected)) in zip(there, rows.items(), strict=True):
            exact = oracle.box_pair(np.float64(p), np.float64(g), fmt, over=over)
            if over == "mean" and expected is not None:
                assert exact == pytest.approx(expected, abs=3e-6), f"the oracle: {name}"
            assert_close(value.clamp(min=DEEP), max(exact, DEEP), atol=3e-6, rtol=1e-5, what=f"{name}, {dtype}")


@pytest.mark.parametrize("over", OVER)
def test_degenerate_polygons(backend, over):
    for name, (p, g, expected) in POLYGONS.items():
        exact = oracle.polygon_pair(p, g, over)
        if over == "mean":
            assert exact == pytest.approx(expected, abs=3e-6), f"the oracle: {name}"
        first, second = torch.tensor([p], dtype=torch.float32), torch.tensor([g], dtype=torch.float32)
        for pair in ((first, second), (second, first)):
            value = matrix(backend, *pair, over=over).clamp(min=DEEP)
            assert_close(value, [[max(exact, DEEP)]], atol=3e-6, rtol=1e-5, what=name)


@pytest.mark.parametrize("axis_weight", ["length", "soft"])
@pytest.mark.parametrize("name", [name for name, row in PLANE.items() if "points" in name or "egments" in name])
def test_weights_make_no_match_of_points_and_lines(backend, name, axis_weight):
    first, second, expected = PLANE[name]
    actual = matrix(backend, torch.tensor([first]).float(), torch.tensor([second]).float(), axis_weight=axis_weight)
    if "tiny" in name or "hairs" in name:  # no threshold under these weights
        assert actual.item() < 0.5
    else:
        assert_close(actual, [[expected]], atol=3e-6)


@pytest.mark.parametrize("over", ["mean", "min"])
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
def test_nothing_is_below_minus_1(backend, axis_weight, over):
    """Segments far above each other, whose weights add up to any number, and points, whose directions are any."""
    rng = generator(6)
    sizes = uniform((40, 1), 0, 3, rng)
    level, raised = torch.zeros(20, 5, dtype=torch.float64), torch.zeros(20, 5, dtype=torch.float64)
    level[:, 2:3], raised[:, 2:3], raised[:, 1:2] = sizes[:20], sizes[20:], uniform((20, 1), 100, 150, rng)
    points = random_boxes(40, "cxcywhr", rng) * torch.tensor([1, 1, 0, 0, 1])
    for first, second in ((level, raised), (points[:20], points[20:])):
        for dtype in (torch.float32, torch.float64):
            value = matrix(backend, first.to(dtype), second.to(dtype), axis_weight=axis_weight, over=over)
            assert (value >= -1).all()
        segments = [box_ends(each).float() for each in (first, second)]
        assert (matrix(backend, *segments, axis_weight=axis_weight, over=over) >= -1).all()


def box_ends(boxes):
    """The two ends of boxes (n, 5) without a height."""
    along = 0.5 * boxes[:, 2:3] * torch.stack((boxes[:, 4].cos(), boxes[:, 4].sin()), dim=1)
    return torch.stack((boxes[:, :2] - along, boxes[:, :2] + along), dim=1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_padding_matches_nothing(backend, fmt):
    boxes = random_boxes(30, fmt, generator(0)).float()
    padding = torch.zeros(3, *boxes.shape[1:])
    for over in OVER:
        assert (matrix(backend, boxes, padding, fmt=fmt, over=over) <= (1 if over == "depth" else 1e-6)).all()
    assert (matrix(backend, boxes + 3, padding, fmt=fmt) < 0).all()


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", ["cxcyczlwhr", "corners3d"])
def test_no_pair_knows_of_the_others(backend, fmt, over):
    """The same pair several times in one matrix, and beside pairs that other axes decide."""
    needs_kernel(backend, fmt)
    sides = [torch.tensor([row[side] for row in SPACE.values()], dtype=torch.float64) for side in (0, 1)]
    if fmt == "corners3d":
        sides = [corners_in_space(each) for each in sides]
    repeated = matrix(backend, *(each.repeat_interleave(2, dim=0) for each in sides), fmt=fmt, over=over)
    for i, j in np.ndindex(len(SPACE), len(SPACE)):
        alone = matrix(backend, sides[0][i, None], sides[1][j, None], fmt=fmt, over=over)
        assert_close(repeated[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], alone.expand(2, 2), atol=1e-9, rtol=1e-9)


def test_plates_and_rods_by_their_corners(backend):
    """The corners of a plate do not say where its third edge looks."""
    first, second = (torch.tensor([row[side] for row in SPACE.values()], dtype=torch.float64) for side in (0, 1))
    by_corners = matrix(backend, *(corners_in_space(each) for each in (first, second)), fmt="corners3d").diagonal()
    for value, (name, (_, _, expected)) in zip(by_corners.tolist(), SPACE.items(), strict=True):
        if expected == 1:
            assert value == 1, name
        else:
            assert value < 0.9, name


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scale", [3e38, 1e30, 1e-30, 1e-38, 1e-44])
def test_any_finite_float32_is_finite(backend, fmt, scale, over):
    needs_kernel(backend, fmt)
    boxes = random_boxes(8, fmt, generator(1))
    boxes[..., : boxes.shape[-1] - fmt.endswith("r")] *= scale / boxes.abs().amax()
    if fmt.endswith("r"):
        boxes[:, -1] = torch.tensor([0, 3e38, -3e38, 1e30, 1e10, 1e5, 1e-38, 100.0])
    boxes[3] = 0
    boxes = boxes.float()
    first, second = boxes[:4].clone().to(backend.device), boxes[4:].clone().to(backend.device)
    has_gradient = backend.name == "eager" or fmt != "xyxyxyxy"
    first.requires_grad_(has_gradient), second.requires_grad_(has_gradient)
    value = box_mgiou(first, second, fmt=fmt, over=over, backend=backend.name)
    assert_finite(value)
    assert (value <= 1).all()
    assert (value >= (-2e6 if over == "depth" else -1)).all()
    if has_gradient:
        for grad in torch.autograd.grad(value.sum(), (first, second)):
            assert_finite(grad, "gradient")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_box(backend, fmt, bad):
    rng = generator(2)
    first, second = random_boxes(4, fmt, rng).float(), random_boxes(5, fmt, rng).float()
    clean = value_and_gradients(backend, first, second, torch.ones(4, 5), fmt)
    without = torch.ones(4, 5)
    without[1] = 0
    rest = value_and_gradients(backend, first, second, without, fmt)
    first.flatten(1)[1, 2] = bad
    value, first_grad, second_grad = value_and_gradients(backend, first, second, torch.ones(4, 5), fmt)
    assert value[1].isnan().all()
    assert first_grad[1].isnan().all()
    others = [0, 2, 3]
    assert_close(value[others], clean[0][others], atol=0)
    assert_close(first_grad[others], clean[1][others], atol=0)
    assert_close(second_grad, rest[2], atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_not_there_is_minus_1_and_has_no_gradient(backend, fmt):
    rng = generator(3)
    first, second = random_boxes(4, fmt, rng).float(), random_boxes(5, fmt, rng).float()
    first.flatten(1)[2] = NAN
    second.flatten(1)[0] = INF
    mask1, mask2 = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([0, 1, 1, 0, 1]).bool()
    value, *grads = value_and_gradients(backend, first, second, torch.ones(4, 5), fmt, mask1=mask1, mask2=mask2)
    kept, *kept_grads = value_and_gradients(backend, first[mask1], second[mask2], torch.ones(3, 3), fmt)
    both = mask1[:, None] & mask2
    assert_close(value[~both], -np.ones(11), atol=0)
    assert_close(value[both].reshape(3, 3), kept, atol=0)
    for grad, kept_grad, mask in zip(grads, kept_grads, (mask1, mask2), strict=True):
        assert_zero(grad[~mask])
        assert_close(grad[mask], kept_grad, atol=1e-6)


def test_polygons_without_a_vertex_are_not_there(backend):
    rng = generator(4)
    first, second = (random_boxes(n, "xyxyxyxy", rng).reshape(n, 4, 2).float() for n in (3, 4))
    lengths1, lengths2 = torch.tensor([4, 0, -3]), torch.tensor([4, 3, 0, 4])
    first[1] = NAN
    all_there = {"mask1": torch.ones(3, dtype=torch.bool), "mask2": torch.ones(4, dtype=torch.bool)}
    for masks in ({}, all_there):
        value = matrix(backend, first, second, lengths1=lengths1, lengths2=lengths2, **masks)
        assert_close(value[1:], -np.ones((2, 4)), atol=0)
        assert value[0, 2] == -1
        assert (value[0, [0, 1, 3]] > -1).all()


def value_and_gradients(backend, first, second, upstream, fmt, **options):
    options = {name: v.to(backend.device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    needs_kernel(backend, fmt, gradient=True)
    leaves = [each.clone().to(backend.device).requires_grad_() for each in (first, second)]
    function = box_mgiou
    value = function(*leaves, fmt=fmt, backend=backend.name, **options)
    grads = torch.autograd.grad(value, leaves, upstream.to(backend.device))
    return value.detach().cpu(), *(grad.cpu() for grad in grads)


def test_padded_vertices_may_hold_anything(backend):
    rng = generator(5)
    first, second = (random_boxes(n, "xyxyxyxy", rng).reshape(n, 4, 2).float() for n in (3, 4))
    wide = torch.cat((first, torch.full((3, 2, 2), NAN)), dim=1)
    lengths = torch.full((3,), 4)
    assert_close(matrix(backend, wide, second, lengths1=lengths), matrix(backend, first, second), atol=0)
    assert polygon_mgiou(wide, second).isnan().all()


@pytest.mark.parametrize(
    ("sizes", "heights", "mean", "least"),
    [((1.0, 1.0), (1.0, 3.0), (4 - 1) / 5, -1.0), ((1.0, 2.0), (1.0, 1.0), 0.5, 0.5)],
    ids=["above each other", "in each other"],
)
def test_plates_of_eight_corners_by_hand(sizes, heights, mean, least):
    """Axes along x and y of both; and along z, which no edge has, only where they are apart. Away from the origin."""
    boxes = [[[2.0, 3.0, z, size, size, 0.0, 0.0]] for size, z in zip(sizes, heights, strict=True)]
    plates = [corners_in_space(torch.tensor(box, dtype=torch.float64)) for box in boxes]
    assert_close(box_mgiou(*plates, fmt="corners3d"), [[mean]], atol=1e-12)
    assert_close(box_mgiou(*plates, fmt="corners3d", over="min"), [[least]], atol=1e-12)


@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr", "xyxy", "polygons"])
def test_points_have_a_finite_depth(backend, fmt):
    """On each axis a millionth of the extent, 4, stands for the sum of the half-lengths: 1 - 4 / 4e-6 where it is 4."""
    there = {
        "cxcywhr": [3.0, 4.0, 0.0, 0.0, 0.0],
        "cxcyczlwhr": [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        "xyxy": [3.0, 4.0, 3.0, 4.0],
        "polygons": [[3.0, 4.0]],
    }
    second = torch.tensor([there[fmt]])
    sides, options = (torch.zeros_like(second), second), {} if fmt == "polygons" else {"fmt": fmt}
    for pair in (sides, sides[::-1]):
        assert_close(matrix(backend, *pair, over="depth", **options), [[1 - 1e6]], atol=0, rtol=1e-6)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
def test_points_in_one_place_have_no_gradient(backend, fmt, over):
    boxes = torch.ones(2, *([8, 3] if fmt == "corners3d" else [8] if fmt == "xyxyxyxy" else [4]))
    if fmt.startswith("cxcy"):
        dims = 3 if fmt == "cxcyczlwhr" else 2
        boxes = torch.tensor([[1.0] * dims + [0.0] * dims + [0.5] * fmt.endswith("r")] * 2)
    value, *grads = value_and_gradients(backend, boxes, boxes, torch.ones(2, 2), fmt, over=over)
    assert_close(value, np.ones((2, 2)), atol=0)
    for grad in grads:
        assert_zero(grad)


def test_points_of_eight_corners_by_hand(backend):
    """The line through both is the only axis, and on it half a millionth of the extent, 4, stands for each length."""
    needs_kernel(backend, "corners3d")
    first, second = (torch.tensor(point).expand(1, 8, 3) for point in ([1.0, 1.0, 1.0], [4.0, 5.0, 1.0]))
    for over, expected in (("mean", -1.0), ("min", -1.0), ("depth", 1 - 5 / 4e-6)):
        assert_close(box_mgiou(first, second, fmt="corners3d", over=over), [[expected]], atol=0, rtol=1e-5)


@pytest.mark.parametrize(("height", "is_line"), [(0.7e-6, True), (1.2e-6, False)])
@pytest.mark.parametrize("over", OVER)
def test_a_pair_is_a_line_below_a_millionth_of_the_extent(backend, over, height, is_line):
    """Two hairs of 2 on the x axis, 8 apart, one of this height and one of the same or half of it."""
    extent, along = 10.0, 4 / 10 - 1
    for part in (1.0, 0.5):
        boxes = torch.tensor([[0, 0, 2, height * extent, 0], [8, 0, 2, part * height * extent, 0]], dtype=torch.float64)
        expected = 1 - 8 / 2 if over == "depth" else along
        if over == "mean" and not is_line:  # the normals of long edges see the heights, those of short ones the line
            ends = 2 if part == 1 else 1  # half of the height is too short for an axis
            expected = (2 * part + ends * along) / (2 + ends)
        for sides in (boxes, boxes.flip(0)):
            assert_close(matrix(backend, sides[:1], sides[1:], over=over), [[expected]], atol=1e-9)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 48), (torch.float64, 400)])
def test_the_longest_length_that_counts_as_0(backend, dtype, bits, more):
    """A segment along x, left of a square: MGIoU is -1/4 on the square's axes, and 0 on the segment's."""
    segment = points((0, 0), (2.0**-bits * (2 if more else 1), 0), dtype=dtype)
    value = matrix(backend, segment, box(0.5, 0, 1, 0.5, dtype), axis_weight="length")
    assert_close(value, [[-0.125 if more else -0.25]], atol=1e-6)
