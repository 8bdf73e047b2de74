"""Values of the matrix: against the oracle, against the loss, and what swapping and ordering must not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import AXIS_WEIGHTS, assert_close, assert_same, convex, generator, rectangle_corners, star, uniform
from tests.pairs import oracle
from tests.pairs.helpers import FORMATS, OVER, PLANE, ULP, needs_kernel, random_boxes
from triton_mgiou import PAPER, box_mgiou, box_mgiou_loss, mgiou_loss, polygon_mgiou
from triton_mgiou.metrics import polygon_iou

SEEDS = st.integers(0, 2**32 - 1)


def matrix(backend, first, second, **options):
    options = {name: v.to(backend.device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    function = polygon_mgiou if first.dim() > 2 and first.shape[-1] == 2 else box_mgiou
    needs_kernel(backend, options.get("fmt"))
    return function(first.to(backend.device), second.to(backend.device), backend=backend.name, **options)


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_mgiou_is_about_the_root_of_the_iou(iou):
    """As the adapter of assigners says of thresholds: exactly so of a box in another size, else in the median."""
    rng = generator(66)
    upright = torch.tensor([[0.0, 0.0, 3.0, 1.0, 0.0]])
    smaller = upright * iou**0.5
    assert_close(box_mgiou(upright, smaller), [[iou**0.5]], atol=1e-6)
    moved = torch.tensor([[0.0, (1 - iou) / (1 + iou), 3.0, 1.0, 0.0]])
    assert_close(box_mgiou(upright, moved), [[(1 + iou) / 2]], atol=1e-6)
    target = torch.cat((torch.zeros(4000, 2), (1 + 2 * torch.rand(4000, 2, generator=rng)), torch.zeros(4000, 1)), 1)
    noise = torch.randn(4000, 5, generator=rng) * torch.tensor([0.2, 0.2, 0.3, 0.3, 0.2])
    pred = torch.cat((noise[:, :2] * target[:, 2:4], target[:, 2:4] * noise[:, 2:4].exp(), noise[:, 4:]), 1)
    ious = [polygon_iou(*pair) for pair in zip(*map(rectangle_corners, (pred, target)), strict=True)]
    near = torch.tensor([abs(each - iou) < 0.02 for each in ious])
    assert near.sum() > 50
    mgiou = 1 - 2 * box_mgiou_loss(pred, target, reduction="none", **PAPER)
    assert_close(mgiou[near].median(), iou**0.5, atol=0.03)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_match_the_oracle(backend, fmt, over, dtype):
    rng = generator(1)
    first, second = random_boxes(9, fmt, rng).to(dtype), random_boxes(20, fmt, rng).to(dtype)
    expected = oracle.box_matrix(first.double().numpy(), second.double().numpy(), fmt=fmt, over=over)
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(matrix(backend, first, second, fmt=fmt, over=over), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
@pytest.mark.parametrize("fmt", PLANE)
def test_axis_weights_match_the_oracle(backend, fmt, axis_weight, over):
    rng = generator(2)
    first, second = random_boxes(5, fmt, rng), random_boxes(18, fmt, rng)
    second[:, 2:4] *= 0.01 if fmt != "xyxy" else 1.0  # short edges, whose weights differ
    expected = oracle.box_matrix(first.numpy(), second.numpy(), fmt=fmt, over=over, axis_weight=axis_weight)
    assert_close(
        matrix(backend, first, second, fmt=fmt, over=over, axis_weight=axis_weight), expected, atol=1e-14, rtol=1e-14
    )


@pytest.mark.parametrize("angle", ["radians", "degrees"])
@pytest.mark.parametrize("clockwise", [True, False])
def test_conventions_of_the_angle_match_the_oracle(backend, angle, clockwise):
    rng = generator(3)
    first, second = random_boxes(5, "cxcywhr", rng), random_boxes(18, "cxcywhr", rng)
    if angle == "degrees":
        first[:, 4], second[:, 4] = (each[:, 4].rad2deg() for each in (first, second))
    options = {"angle": angle, "clockwise": clockwise}
    expected = oracle.box_matrix(first.numpy(), second.numpy(), **options)
    assert_close(matrix(backend, first, second, **options), expected, atol=1e-14)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_boxes_near_a_quarter_turn(backend, over, dtype):
    """No number is a quarter turn in radians: at the end of a box of 2^18 the 4e-8 that float32 is off are 1 / 100."""
    eighth = math.pi / 4
    square = torch.tensor([[0, 0, 1, 1, turn] for turn in (0, -eighth, eighth)], dtype=dtype)
    long = torch.tensor([[0, 0, 2**18, 1, turn] for turn in (2 * eighth, -2 * eighth, eighth, -eighth)], dtype=dtype)
    expected = oracle.box_matrix(square.double().numpy(), long.double().numpy(), over=over)
    assert_close(matrix(backend, square, long, over=over), expected, atol=1e-6 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
@pytest.mark.parametrize("sizes", [(4, 4), (3, 9)])
def test_polygons_match_the_oracle(backend, sizes, axis_weight, over):
    rng = generator(4)
    first, second = convex(5, sizes[0], rng), star(6, sizes[1], rng)
    lengths1 = torch.tensor([sizes[0], 3, 2, 1, sizes[0]])
    lengths2 = torch.tensor([sizes[1], 3, sizes[1] + 5, 2, sizes[1] - 1, 3])
    first[4] += 3
    options = {"over": over, "axis_weight": axis_weight}
    expected = oracle.polygon_matrix(
        first.numpy(), second.numpy(), lengths1=lengths1.numpy(), lengths2=lengths2.numpy(), **options
    )
    actual = matrix(backend, first, second, lengths1=lengths1, lengths2=lengths2, **options)
    assert_close(actual, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("over", ["min", "depth"])
def test_the_sign_beside_a_dent(backend, over):
    """Below 0 the hulls are apart; above 0 they may be too, as here across the dent of an L, but not of its hull."""
    shapely = pytest.importorskip("shapely")
    rng = generator(67)
    places = uniform((12, 1, 2), -1, 4, rng)
    squares = torch.tensor([[0.0, 0], [0.8, 0], [0.8, 0.8], [0, 0.8]], dtype=torch.float64) + places
    squares[0] += 2.2 - places[0]  # beyond the bridge of the dent, on which x + y is 4
    dented = torch.tensor([[[0.0, 0], [3, 0], [3, 1], [1, 1], [1, 3], [0, 3]]], dtype=torch.float64)
    hull = dented[:, [0, 1, 2, 4, 5]]
    bodies = [shapely.Polygon(square) for square in squares.tolist()]
    overlap = torch.tensor([shapely.Polygon(hull[0].tolist()).intersects(body) for body in bodies])
    of_dented, of_hull = (matrix(backend, each, squares, over=over)[0].cpu() for each in (dented, hull))
    assert 2 < overlap.sum() < 10
    assert_same(of_hull > 0, overlap)
    assert (of_dented[overlap] > 0).all()
    assert of_dented[0] > 0
    assert not overlap[0]


@pytest.mark.parametrize("of", ["boxes", "polygons"])
def test_a_mask_without_a_batch_is_that_of_each_set(backend, of):
    rng = generator(15)
    first, second = (random_boxes(2 * n, "xyxyxyxy", rng).float() for n in (3, 4))
    if of == "boxes":
        first, second = first[:, :5].reshape(2, 3, 5), second[:, :5].reshape(2, 4, 5)
    else:
        first, second = first.reshape(2, 3, 4, 2), second.reshape(2, 4, 4, 2)
    mask1, mask2 = torch.tensor([True, False, True]), torch.tensor([True, True, False, True])
    actual = matrix(backend, first, second, mask1=mask1, mask2=mask2)
    sets = [matrix(backend, first[k], second[k], mask1=mask1, mask2=mask2) for k in range(2)]
    assert_same(actual, torch.stack(sets))
    assert_same(actual == -1, ~(mask1[:, None] & mask2).expand(2, 3, 4).to(actual.device))
    assert matrix(backend, first[:0], second[:0], mask1=mask1).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_lengths_of_8_bits_count_vertices_of_more(backend, dtype):
    if backend.is_slow:
        pytest.skip("so many vertices take minutes")
    polygons = star(2, 300, generator(14)).float()
    lengths = torch.tensor([3, 100], dtype=dtype)
    shorter = [polygons[k : k + 1, :n] for k, n in enumerate(lengths.tolist())]
    actual = matrix(backend, polygons, polygons[:1, :4], lengths1=lengths)
    values = [matrix(backend, each, polygons[:1, :4]) for each in shorter]
    sums_depend_on_the_row = backend.name == "eager" and backend.device == "cuda"  # in PyTorch on a GPU
    assert_close(actual, torch.cat(values), atol=1e-6 if sums_depend_on_the_row else 0.0)
    losses = [mgiou_loss(polygons[:1, :4], each, reduction="none") for each in shorter]
    actual = mgiou_loss(polygons[[0, 0], :4], polygons, target_lengths=lengths, reduction="none")
    assert_close(actual, torch.cat(losses), atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
@given(seed=SEEDS)
def test_mean_is_the_loss_entry_by_entry(backend, fmt, seed):
    rng = generator(seed)
    first, second = random_boxes(5, fmt, rng, 20).float(), random_boxes(7, fmt, rng, 20).float()
    pairs = first.repeat_interleave(7, 0), second.repeat(5, *[1] * (second.dim() - 1))
    pairs = (each.to(backend.device) for each in pairs)
    loss = box_mgiou_loss(*pairs, fmt=fmt, reduction="none", backend=backend.name, **PAPER)
    expected = 1 - 2 * loss.reshape(5, 7)
    assert_close(matrix(backend, first, second, fmt=fmt), expected, atol=4 * ULP)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
@given(seed=SEEDS)
def test_swapping_the_sets_changes_no_bit(backend, fmt, over, seed):
    rng = generator(seed)
    first, second = random_boxes(5, fmt, rng).float(), random_boxes(18, fmt, rng).float()
    there = matrix(backend, first, second, fmt=fmt, over=over)
    back = matrix(backend, second, first, fmt=fmt, over=over)
    assert_same(back.T, there)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
@given(seed=SEEDS)
def test_swapping_polygons_changes_no_bit(backend, axis_weight, over, seed):
    """Those of any vertex count, of other sizes and places, and those that are segments on one line, or points."""
    rng = generator(seed)
    options = {"over": over, "axis_weight": axis_weight}
    first, second = convex(4, 4, rng).float(), star(5, 6, rng).float() * 0.3 + 1.7
    line = 5 * torch.rand(9, 2, 1, generator=rng) * torch.tensor([0.8, 0.3])
    for one, other in ((first, second), (first, first.flip(0) * 0.7), (line[:4], line[4:]), (line[:4, :1], line[4:])):
        assert_same(matrix(backend, other, one, **options).T, matrix(backend, one, other, **options))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
def test_ordering_a_set_changes_no_bit(backend, fmt, over):
    rng = generator(6)
    first, second = random_boxes(70, fmt, rng).float(), random_boxes(19, fmt, rng).float()
    rows, columns = torch.randperm(70, generator=rng), torch.randperm(19, generator=rng)
    plain = matrix(backend, first, second, fmt=fmt, over=over).cpu()
    assert_same(matrix(backend, first[rows], second[columns], fmt=fmt, over=over).cpu(), plain[rows][:, columns])
    assert_same(matrix(backend, first[3:4], second[5:6], fmt=fmt, over=over).cpu(), plain[3:4, 5:6])


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
@given(seed=SEEDS, shift=st.sampled_from([0.0, 4e4]))
def test_equal_boxes_are_exactly_1(backend, fmt, over, seed, shift):
    boxes = random_boxes(8, fmt, generator(seed), 50)
    if shift:
        boxes[..., : 2 if fmt.startswith("cxcy") else None] += shift
    boxes = boxes.float()
    diagonal = matrix(backend, boxes, boxes, fmt=fmt, over=over).diagonal()
    assert_close(diagonal, np.ones(8), atol=0)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
def test_small_boxes_far_away_are_those_near_the_origin(backend, fmt, over):
    """One unit at coordinates of 40000, in steps of 1/128 that float32 holds."""
    rng = generator(16)
    near = [(random_boxes(n, fmt, rng) * 128).round() / 128 for n in (5, 18)]
    far = [each.clone() for each in near]
    places = 3 if fmt == "cxcyczlwhr" else 2 if fmt.startswith("cxcy") else None
    for boxes in far:
        boxes[:, :places] += 40000
    near, far = ([each.float() for each in sides] for sides in (near, far))
    assert_close(
        matrix(backend, *far, fmt=fmt, over=over), matrix(backend, *near, fmt=fmt, over=over), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("exponent", [-100, -30, 60, 110])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_power_of_two_changes_no_bit(backend, fmt, exponent):
    rng = generator(8)
    first, second = random_boxes(4, fmt, rng).float(), random_boxes(17, fmt, rng).float()
    plain = matrix(backend, first, second, fmt=fmt)
    for boxes in (first, second):
        boxes[..., : boxes.shape[-1] - fmt.endswith("r")] *= 2.0**exponent
    assert_same(matrix(backend, first, second, fmt=fmt), plain)


def test_degrees_know_their_turns_exactly(backend):
    rng = generator(9)
    boxes = random_boxes(6, "cxcywhr", rng).float()
    boxes[:, 4] = torch.tensor([0, 30, -45, 90, 179.5, 12.25])
    half, quarter = boxes.clone(), boxes[:, [0, 1, 3, 2, 4]]
    half[:, 4] += 180
    quarter[:, 4] += 90
    for turned in (half, quarter):
        assert_close(matrix(backend, boxes, turned, angle="degrees").diagonal(), np.ones(6), atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", ["boxes", "polygons"])
def test_half_types_are_computed_in_float32(backend, of, dtype):
    rng = generator(10)
    first, second = (random_boxes(n, "cxcywhr" if of == "boxes" else "xyxyxyxy", rng) for n in (4, 20))
    for each in (first, second):
        each[:, : 4 if of == "boxes" else None] *= 256  # their squares overflow float16
    first, second = first.to(dtype), second.to(dtype)
    if of == "polygons":
        first, second = first.unflatten(1, (4, 2)), second.unflatten(1, (4, 2))
    actual = matrix(backend, first, second)
    assert actual.dtype == torch.float32
    assert_same(actual, matrix(backend, first.float(), second.float()))
    for sides in ((first, second.double()), (first.double(), second)):
        assert_same(matrix(backend, *sides), matrix(backend, first.double(), second.double()))


def test_batches_are_their_matrices(backend):
    rng = generator(11)
    first, second = (
        random_boxes(12, "cxcywhr", rng).reshape(3, 4, 5),
        random_boxes(51, "cxcywhr", rng).reshape(3, 17, 5),
    )
    batched = matrix(backend, first, second)
    assert batched.shape == (3, 4, 17)
    for b in range(3):
        assert_same(batched[b], matrix(backend, first[b], second[b]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_boxes_make_an_empty_matrix(backend, shape):
    first, second = (torch.ones(n, 5, device=backend.device, requires_grad=True) for n in shape)
    value = matrix(backend, first, second)
    assert value.shape == shape
    assert value.dtype == torch.float32
    for leaf, grad in zip((first, second), torch.autograd.grad(value.sum(), (first, second)), strict=True):
        assert_close(grad, np.zeros(tuple(leaf.shape)), atol=0)


def test_strides_do_not_matter(backend):
    rng = generator(12)
    first, second = random_boxes(5, "cxcywhr", rng).float(), random_boxes(18, "cxcywhr", rng).float()
    spread = torch.full((10, 11), torch.nan)[::2, ::2]
    spread = spread[:, :5].copy_(first)
    assert_same(matrix(backend, spread, second.T.contiguous().T), matrix(backend, first, second))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_neighbour_of_any_kind_changes_no_bit(backend, fmt, over):
    """A point, a speck, a huge and a distant box, and one that is not finite, among ordinary ones on either side."""
    rng = generator(13)
    first, second = random_boxes(9, fmt, rng).float(), random_boxes(35, fmt, rng).float()
    kinds = torch.tensor([0.0, 1e-9, 1e30, 1e-42, torch.nan])
    odd = (first[:5].flatten(1) * kinds.unsqueeze(1)).reshape(first[:5].shape)
    plain = matrix(backend, first, second, fmt=fmt, over=over)
    for place in (0, 4, 9):
        mixed = torch.cat((first[:place], odd, first[place:]))
        rows = (torch.arange(14) < place) | (torch.arange(14) >= place + 5)
        assert_same(matrix(backend, mixed, second, fmt=fmt, over=over)[rows], plain)
    mixed = torch.cat((second[:17], odd, second[17:]))
    columns = (torch.arange(40) < 17) | (torch.arange(40) >= 22)
    assert_same(matrix(backend, first, mixed, fmt=fmt, over=over)[:, columns], plain)
