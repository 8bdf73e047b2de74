"""IoU of polygons and average precision, against a raster, pair by pair, and COCO's definition by loops."""

from __future__ import annotations

import math
import sys
import tracemalloc
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_mgiou import metrics
from triton_mgiou.metrics import COCO_THRESHOLDS, average_precision, polygon_iou, polygon_iou_matrix

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
BOW_TIE = SQUARE[[0, 1, 3, 2]]


def even_odd(points, polygon):
    """Whether the outline runs an odd number of times around each point, by the angles that it is seen under."""
    start = polygon - points[:, None]
    end = np.roll(start, -1, axis=1)
    cross = start[..., 0] * end[..., 1] - start[..., 1] * end[..., 0]
    turned = np.arctan2(cross, (start * end).sum(-1)).sum(1)
    return np.round(turned / math.tau).astype(int) % 2 == 1


@pytest.mark.parametrize("size", [3, 4, 5, 8, 16])
def test_matrix_against_a_raster(size):
    rng = np.random.default_rng(size)
    grid = (np.stack(np.meshgrid(np.arange(200), np.arange(200)), axis=-1).reshape(-1, 2) + 0.5) / 200
    preds = [rng.random((size, 2)) for _ in range(4)]
    targets = [SQUARE * 0.6 + 0.2, rng.random((6, 2)), BOW_TIE * 0.9]
    expected = np.empty((4, 3))
    for i, pred in enumerate(preds):
        for j, target in enumerate(targets):
            a, b = even_odd(grid, pred), even_odd(grid, target)
            expected[i, j] = (a & b).sum() / (a | b).sum()
    np.testing.assert_allclose(polygon_iou_matrix(preds, targets), expected, atol=0.006)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=7), max_size=3),
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=7), max_size=3),
)
def test_matrix_is_every_pair(preds, targets):
    """On a coarse grid, where vertices repeat and edges overlap all the time."""
    matrix = polygon_iou_matrix(preds, targets)
    assert matrix.shape == (len(preds), len(targets))
    for i, pred in enumerate(preds):
        for j, target in enumerate(targets):
            assert matrix[i, j] == pytest.approx(polygon_iou(pred, target), abs=1e-9)


def exact_iou(pred, target):
    """In fractions, without rounding: within a strip between two vertices or crossings every side is straight."""
    outlines = [[tuple(map(Fraction, vertex)) for vertex in polygon] for polygon in (pred, target)]
    sides = [list(zip(outline, outline[1:] + outline[:1], strict=True)) for outline in outlines]
    levels = {y for outline in outlines for _, y in outline}
    for (a, b), (c, d) in combinations(sides[0] + sides[1], 2):
        across = (b[0] - a[0]) * (d[1] - c[1]) - (b[1] - a[1]) * (d[0] - c[0])
        if across:
            share = ((c[0] - a[0]) * (d[1] - c[1]) - (c[1] - a[1]) * (d[0] - c[0])) / across
            levels.add(a[1] + share * (b[1] - a[1]))
    inter = union = Fraction(0)
    for low, high in pairwise(sorted(levels)):
        y = (low + high) / 2
        inside = []
        for own in sides:
            at = sorted(a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1]) for a, b in own if (a[1] > y) != (b[1] > y))
            inside.append(list(zip(at[::2], at[1::2], strict=True)))
        both = sum(max(min(b, d) - max(a, c), 0) for a, b in inside[0] for c, d in inside[1])
        inter += both * (high - low)
        union += (sum(b - a for each in inside for a, b in each) - both) * (high - low)
    return float(inter / union) if union else 0.0


# In sevenths and thirds: vertices that lie on edges but for rounding, and edges that nearly meet in one point.
NEARLY = [
    (
        [(2, 1), (2, 3), (1, 2), (2, 0), (2, 3), (0, 1), (1, 0)],
        [(2, 1), (3, 2), (0, 1), (0, 1), (0, 2), (1, 1), (0, 1)],
    ),
    ([(4, 9), (3, 19), (17, 11)], [(12, 7), (0, 8), (12, 12), (5, 0), (20, 15)]),
    (
        [(4, 2), (3, 3), (3, 4), (0, 4), (4, 1), (2, 2), (1, 1), (2, 3)],
        [(2, 3), (4, 1), (1, 4), (0, 1), (1, 3), (4, 4), (4, 0), (4, 4)],
    ),
    (
        [(3, 17), (9, 8), (18, 15), (7, 14), (15, 11), (12, 7), (18, 2), (0, 17), (0, 18)],
        [(18, 19), (6, 5), (14, 4), (15, 18), (20, 13), (9, 5), (12, 20), (18, 8), (19, 0)],
    ),
    # On a line: no area but for rounding.
    ([(1, 3), (8, 24), (1, 3), (2, 6), (3, 9)], [(4, 12), (2, 6), (0, 0), (7, 21), (9, 27)]),
    ([(24, 56), (9, 21), (0, 0), (21, 49), (24, 56)], [(12, 28), (24, 56), (15, 35), (9, 21), (3, 7)]),
    (
        [(3003, 1), (3005, 1), (3006, 5), (3003, 3), (3002, 3), (3004, 6), (3004, 5), (3004, 6), (3004, 5)],
        [(3004, 6), (3006, 0), (3003, 6), (3000, 2), (3005, 2), (3004, 4), (3005, 4), (3006, 3)],
    ),
]


@pytest.mark.parametrize("numbers", [None, 1])
@pytest.mark.parametrize(("many", "parts"), [(1, 3), (1, 7), (1000, 3)])
@pytest.mark.parametrize(("pred", "target"), NEARLY)
def test_edges_that_nearly_meet(monkeypatch, pred, target, many, parts, numbers):
    """As edges and vertices of many shapes do; and strip by strip."""
    if numbers:
        monkeypatch.setattr(metrics, "MOST_NUMBERS", numbers)
    expected = exact_iou(pred, target)
    pred, target = (np.array(polygon) * many / parts for polygon in (pred, target))
    for first, second in ((pred, target), (target, pred), (pred[:, ::-1], target[:, ::-1])):
        assert polygon_iou(first, second) == pytest.approx(expected, abs=1e-10)
        assert polygon_iou_matrix([first], [second]).item() == pytest.approx(expected, abs=1e-10)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=8),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=8),
    st.sampled_from([1, 3, 7]),
)
def test_any_polygons_on_a_grid(pred, target, parts):
    expected = exact_iou(pred, target)
    pred, target = (np.array(polygon) / parts for polygon in (pred, target))
    assert polygon_iou(pred, target) == pytest.approx(expected, abs=1e-10)
    assert polygon_iou_matrix([pred], [target]).item() == pytest.approx(expected, abs=1e-10)


def test_outlines_of_many_vertices_take_little_memory(monkeypatch):
    """As those of masks have: not the square of their number, for whatever is computed at once."""
    monkeypatch.setattr(metrics, "MOST_NUMBERS", 2**12)
    turn = np.arange(400) * (math.tau / 400)
    outline = (1 + 0.3 * np.sin(40 * turn))[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
    pred = outline * [1.1, 0.9] + 0.1
    tracemalloc.start()
    try:
        found = polygon_iou(pred, outline)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2e6  # one number for each pair of edges takes 5e6
    assert found == pytest.approx(polygon_iou_matrix([pred], [outline]).item(), abs=1e-12)


def test_far_from_the_origin_no_digit_is_lost():
    """As in coordinates of a map: crossing outlines of the size of a house, in metres."""
    rng = np.random.default_rng(0)
    for size in range(3, 9):
        pred, target = rng.random((2, size, 2)) * 10 + (500_000, 5_000_000)
        assert polygon_iou(pred, target) == pytest.approx(exact_iou(pred, target), abs=1e-13)


# The same but for the last digit: GEOS finds only vertices in common.
SAME = [
    (
        [(0.9719734905540728, 0.02350904797309575), (-0.6895810729119161, 0.07242084947593826),
         (-0.28239241764215656, -0.095929897449034)],
        [(0.9719734905540728, 0.023509047973095745), (-0.6895810729119161, 0.07242084947593826),
         (-0.28239241764215656, -0.09592989744903399)],
    ),
    (
        [(919.5252543306565, 393.0309232721281), (-800.1373911918436, 599.8167680356316),
         (-119.38786313881289, -992.8476913077595)],
        [(-119.387863138813, -992.8476913077596), (919.5252543306564, 393.0309232721281),
         (-800.1373911918437, 599.8167680356316)],
    ),
    (
        [(70.88597565371553, 0.7053494492534073), (-70.53494492534071, 0.7088597565371554),
         (-70.88597565371553, -0.7053494492534071), (70.53494492534074, -0.7088597565371552)],
        [(70.88597565371553, 0.7053494492533945), (-70.53494492534071, 0.7088597565371553),
         (-70.88597565371553, -0.7053494492534229), (70.53494492534074, -0.7088597565371559)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pred", "target"), SAME)
def test_polygons_that_differ_by_rounding_alone(pred, target):
    expected = exact_iou(pred, target)
    assert expected > 1 - 1e-12
    np.testing.assert_allclose(polygon_iou_matrix([pred, target], [target, pred]), expected, atol=1e-12)
    assert polygon_iou(pred, target) == pytest.approx(expected, abs=1e-12)


def test_matrix_of_polygons_of_several_sizes_and_without_an_area():
    nan = SQUARE.copy()
    nan[1, 1] = math.nan
    matrix = polygon_iou_matrix([SQUARE, SQUARE[:3], np.zeros((5, 2)), nan, SQUARE + 5], [SQUARE, nan])
    np.testing.assert_allclose(matrix, [[1, 0], [0.5, 0], [0, 0], [0, 0], [0, 0]], atol=1e-12)


@pytest.mark.parametrize("far", [1e15, 1e20, 3e38, 1e200])
def test_a_prediction_that_diverged_overlaps_nothing(far):
    """Whichever vertices went away, it is a point or far larger than the target."""
    rng = np.random.default_rng(0)
    target = SQUARE * 100
    preds = []
    for size in range(3, 9):
        for _ in range(20):
            pred = rng.random((size, 2)) * 100
            pred[rng.permutation(size)[: rng.integers(1, size + 1)]] = rng.standard_normal(2) * far
            preds.append(pred)
    assert not any(polygon_iou(pred, target) or polygon_iou(target, pred) for pred in preds)
    assert not polygon_iou_matrix(preds, [target, BOW_TIE]).any()


@pytest.mark.parametrize(("bits", "expected"), [(40, 2.0**-40), (41, 0.0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_how_much_larger_a_polygon_may_be(axis, bits, expected):
    long = SQUARE.copy()
    long[:, axis] *= 2.0**bits
    for first, second in ((long, SQUARE), (SQUARE, long)):
        assert polygon_iou(first, second) == expected
        assert polygon_iou_matrix([first], [second]).item() == expected


@pytest.mark.parametrize("axis", [0, 1])
def test_a_polygon_may_be_as_thin_as_it_likes(axis):
    """Its longer side decides whether it is a point."""
    thin = SQUARE.copy()
    thin[:, axis] *= 1e-90
    half = thin * 0.5
    assert polygon_iou(thin, half) == pytest.approx(0.25)
    np.testing.assert_allclose(polygon_iou_matrix([thin, half], [thin, half]), [[1, 0.25], [0.25, 1]])


@pytest.mark.parametrize("scale", [1e100, -1e100, 1.1e100, -1.1e100, 1e-80, -1e-80, 0.9e-80])
def test_the_largest_and_the_smallest_unit(scale):
    expected = 0.25 if 1e-80 <= abs(scale) <= 1e100 else 0
    first, second = SQUARE * scale, SQUARE * scale * [0.25, 1]
    for one, other in ((first, second), (second, first)):
        assert polygon_iou(one, other) == pytest.approx(expected, rel=1e-12, abs=0)
        assert polygon_iou_matrix([one], [other]).item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert polygon_iou(SQUARE * 1e-79, SQUARE * 0.9e-80) == polygon_iou(SQUARE * 0.9e-80, SQUARE * 1e-79) == 0


def test_triangles_on_a_line_have_no_area():
    """But for rounding, which GEOS takes for one; whichever is the longer one."""
    rng = np.random.default_rng(0)
    long, short = [], []
    for k in range(400):  # some through the origin, and in every quarter of the plane
        start, step, shares = rng.random(2) * (k % 5 > 0), rng.random(2), rng.permutation(9)[:3]
        start, step = (each * ((1, 1), (-1, 1), (1, -1), (-1, -1))[k % 4] for each in (start, step))
        for scale, kept in ((1, long), (2.0**-20, short)):
            triangle = start + step * (shares / 7 * scale)[:, None]
            if shapely.is_valid(polygon := shapely.polygons(triangle)) and polygon.area > 0:
                kept.append(triangle)
    assert min(len(long), len(short)) > 50
    for preds, targets in ((long, long), (long, short), (short, long)):
        assert not polygon_iou_matrix(preds, targets).any()


def test_a_line_that_rounding_bends_has_no_area():
    """Far away along x it is bent by what x is rounded to, over its whole length along y."""
    rng = np.random.default_rng(1)
    for flip in (False, True):
        for _ in range(50):
            line = [1e9, 0.0] + rng.random((3, 1)) * [1e-3, 1.0]
            assert polygon_iou(line[:, ::-1] if flip else line, (line + 1e-9)[:, ::-1] if flip else line) == 0


def test_what_is_small_and_far_from_the_origin_has_an_area():
    """Of 1e-6, where rounding may make 1e-11 of nothing."""
    first, second = SQUARE * 2.0**-10 + 2.0**23, SQUARE * 2.0**-10 + 2.0**23 + [2.0**-11, 0]
    assert polygon_iou(first, second) == polygon_iou_matrix([first], [second]).item() == 1 / 3


@pytest.mark.parametrize("size", [3, 5, 9])
def test_the_other_direction_is_the_same_to_the_last_digit(size):
    for polygon in np.random.default_rng(size).standard_normal((20, size, 2)):
        assert polygon_iou(polygon, polygon[::-1]) == 1


def test_edges_without_a_height_or_a_length_raise_no_warning():
    pred = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [0.0, 0.0]])
    with np.errstate(all="raise"):
        assert polygon_iou(pred, SQUARE) == polygon_iou(SQUARE, pred) == 0.25
        assert polygon_iou_matrix([pred, BOW_TIE], [SQUARE]).tolist() == [[0.25], [0.5]]


def test_shapely_alone_cuts_what_does_not_cross_itself(monkeypatch):
    """It is several times as fast; what differs by rounding alone is cut in strips."""
    rng = np.random.default_rng(0)
    turn = np.arange(8) * (math.tau / 8)
    polygons = [np.stack((np.cos(turn), np.sin(turn)), axis=1) * rng.random(2) + rng.random(2) for _ in range(8)]
    expected = [[polygon_iou(pred, target) for target in polygons] for pred in polygons]
    assert np.count_nonzero(expected) > 50
    monkeypatch.setattr(metrics, "_iou", None)
    np.testing.assert_allclose(polygon_iou_matrix(polygons, polygons), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-79, 1e-30, 1e30, 1e90])
def test_no_unit_is_too_large_or_small(scale):
    half = SQUARE * [1, 0.5]
    expected = [[0.5, 1], [1 / 3, 0.5]]
    np.testing.assert_allclose(
        polygon_iou_matrix([SQUARE * scale, BOW_TIE * scale], [half * scale, SQUARE * scale]), expected, rtol=1e-12
    )
    assert polygon_iou(BOW_TIE * scale, SQUARE * scale) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-100, 1e-110, 1e-150, 1e-200, 5e-324])
def test_what_underflows_has_no_area(scale):
    """In both functions alike, of GEOS too, which is wrong or raises an error there."""
    rng = np.random.default_rng(0)
    preds = [SQUARE * scale, *(rng.random((40, 3, 2)) * scale)]
    targets = [SQUARE * [0.8, 1e-4] * scale, *(rng.random((10, 3, 2)) * scale)]
    assert not polygon_iou_matrix(preds, targets).any()
    assert not any(polygon_iou(pred, target) for pred in preds for target in targets)


@pytest.mark.parametrize("polygon", [np.zeros((2, 2)), np.zeros((4, 3)), np.zeros(4)])
def test_a_wrong_shape_is_named(polygon):
    with pytest.raises(ValueError, match=r"target must have shape \(N, 2\) with N >= 3, got"):
        polygon_iou(SQUARE, polygon)
    with pytest.raises(ValueError, match=r"pred\[1\] must have shape \(N, 2\) with N >= 3, got"):
        polygon_iou_matrix([SQUARE, polygon], [SQUARE])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_no_iou_is_above_one(offset):
    """Polygons that differ by rounding alone, far from the origin too."""
    rng = np.random.default_rng(0)
    ious = []
    for size in np.tile(np.arange(3, 17), 20):
        turn = np.arange(size) * (math.tau / size) + rng.random()
        target = np.stack((np.cos(turn), np.sin(turn)), axis=1)
        pred = (target + rng.standard_normal((size, 2)) * 10.0 ** rng.integers(-16, -6))[::-1]
        ious += [polygon_iou(pred + offset, target + offset)]
        ious += [polygon_iou_matrix([pred + offset], [target + offset]).item()]
    assert 0.999 < min(ious)
    assert max(ious) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_tensors_of_any_type_and_in_a_graph(dtype):
    pred = torch.tensor(SQUARE * [2, 1]).to(dtype)
    if dtype.is_floating_point:
        pred.requires_grad_()
    assert polygon_iou(pred, torch.tensor(SQUARE).to(dtype)) == pytest.approx(0.5)
    expected = [[0.5, 0.25]]
    targets = [SQUARE, SQUARE * 0.5**0.5]
    np.testing.assert_allclose(polygon_iou_matrix(pred[None], targets), expected)
    np.testing.assert_allclose(polygon_iou_matrix([pred], targets), expected)
    scores = torch.tensor([3, 4]).to(dtype).requires_grad_(dtype.is_floating_point)
    ious = torch.tensor([[0.25], [0.5]], dtype=torch.bfloat16, requires_grad=True)
    assert average_precision([(ious, scores)], torch.tensor([0.5])) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("polygon", "given"),
    [
        ("square", "str"),
        ([["0", "0"], ["1", "0"], ["1", "1"]], "list"),
        (SQUARE.astype("datetime64[s]"), "ndarray"),
        ([[0, 0], [1, 0], [1]], "list"),
        (SQUARE + 1j, "ndarray"),
        (np.ma.masked_equal(SQUARE, 1), "MaskedArray"),
        ([torch.ones(2, requires_grad=True)] * 3, "list"),
        ([[0, 0], [1, None], [1, 1]], "list"),
        (np.array([["0", 0], ["1", 0], ["1", 1]], dtype=object), "ndarray"),
        ([[0, 0], [10**400, 0], [1, 1]], "list"),
    ],
)
def test_a_wrong_type_is_named(polygon, given):
    with pytest.raises(TypeError, match=f"target must be an array of real numbers, got {given}"):
        polygon_iou(SQUARE, polygon)
    with pytest.raises(TypeError, match=rf"pred\[1\] must be an array of real numbers, got {given}"):
        polygon_iou_matrix([SQUARE, polygon], [SQUARE])
    with pytest.raises(TypeError, match=rf"images\[0\]\[0\] must be an array of real numbers, got {given}"):
        average_precision([(polygon, [0.5])])


def test_tensors_that_are_no_real_numbers_are_named():
    polygon = torch.tensor(SQUARE)
    for wrong, kind in ((polygon + 0j, "complex128"), (polygon.to_sparse(), "sparse")):
        with pytest.raises(TypeError, match=f"^target .*{kind}"):
            polygon_iou(SQUARE, wrong)
        with pytest.raises(TypeError, match=rf"^pred\[0\] .*{kind}"):
            polygon_iou_matrix([wrong], [SQUARE])
        with pytest.raises(TypeError, match=f"^pred .*{kind}"):
            polygon_iou_matrix(wrong, [SQUARE])


def test_what_is_no_set_is_named():
    with pytest.raises(TypeError, match="target must be polygons, got NoneType"):
        polygon_iou_matrix([SQUARE], None)
    for scalar in (5, np.array(5), torch.tensor(5)):
        kind = type(scalar).__name__
        with pytest.raises(TypeError, match=f"pred must be polygons, got {kind}"):
            polygon_iou_matrix(scalar, [SQUARE])
        with pytest.raises(TypeError, match=rf"images must be pairs .*, got {kind}"):
            average_precision(scalar)
    with pytest.raises(TypeError, match=r"images\[1\] must be a pair .*, got float"):
        average_precision([([[0.6]], [0.9]), 0.5])
    with pytest.raises(TypeError, match=r"images\[0\] must be a pair .*, got tuple"):
        average_precision([([[0.6]], [0.9], [1])])


def test_without_shapely(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(ImportError, match=r"triton-mgiou\[demo\]"):
        polygon_iou_matrix([SQUARE], [SQUARE])
    assert polygon_iou(SQUARE, BOW_TIE) == 0.5


def literal_average_precision(images, threshold):
    """COCO's definition, one prediction after the other."""
    ranked, total = [], 0
    for ious, scores in images:
        taken = set()
        total += ious.shape[1]
        for row in sorted(range(len(scores)), key=lambda row: -scores[row]):
            best, least = None, min(threshold, 1 - 1e-10)
            for j in range(ious.shape[1]):  # as in pycocotools: of equal ones the last
                if j not in taken and ious[row, j] >= least:
                    best, least = j, ious[row, j]
            taken.add(best)
            ranked.append((scores[row], best is not None))
    ranked.sort(key=lambda pair: -pair[0])
    points, hits = [], 0
    for rank, (_, correct) in enumerate(ranked, 1):
        hits += correct
        points.append((hits / total, hits / rank))
    levels = [max((p for r, p in points if r >= step / 100), default=0.0) for step in range(101)]
    return sum(levels) / 101


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_against_its_definition(seed, steps):
    """With a few IoUs and scores, of which many are equal, too."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(12):
        shape = rng.integers(0, 9), rng.integers(0, 5)
        ious, scores = rng.random(shape) ** 0.5, rng.permutation(1000)[: shape[0]] / 1000
        images.append((ious, scores) if steps is None else (np.round(ious * steps) / steps, np.round(scores * 5)))
    found = average_precision(images)
    np.testing.assert_allclose(found, [literal_average_precision(images, t) for t in COCO_THRESHOLDS], atol=1e-12)
    assert found[0] > found[-1]


def test_of_equal_ious_the_last_target_is_taken():
    """As in pycocotools 2.0.11: the first target is left for the second prediction, which reaches no other."""
    ious = np.array([[0.75, 0.75], [0.6, 0.0]])
    np.testing.assert_array_equal(average_precision([(ious, [0.9, 0.8])], (0.5,)), 1)
    np.testing.assert_allclose(average_precision([(ious[:, ::-1], [0.9, 0.8])], (0.5,)), 51 / 101)


def test_what_is_the_same_reaches_a_threshold_of_one():
    """Whatever rounding makes of its IoU."""
    images = [([[1 - 4e-16]], [0.5]), ([[1.0]], [0.5])]
    np.testing.assert_array_equal(average_precision(images, (0.95, 1.0)), 1)
    np.testing.assert_array_equal(average_precision([([[1 - 1.1e-10]], [0.5])], (0.95, 1.0)), [1, 0])


def test_average_precision_by_hand():
    """Two targets. The best prediction is right, the second wrong, the third right at .5 only."""
    ious = np.array([[0.96, 0.0], [0.3, 0.2], [0.0, 0.6]])
    ap = average_precision([(ious, [0.9, 0.8, 0.7])], thresholds=(0.5, 0.95))
    np.testing.assert_allclose(ap, [(51 + 50 * 2 / 3) / 101, 51 / 101])


@pytest.mark.parametrize("hits", range(21))
def test_a_recall_of_just_a_step_reaches_it(hits):
    """Of 20 targets each hit is five steps; pycocotools' step of 0.35 is larger than 7 / 20."""
    found = average_precision([(np.eye(20)[:hits], np.ones(hits))], (0.5,))
    assert found == pytest.approx([(5 * hits + 1) / 101 if hits else 0])


def test_a_target_is_matched_once():
    """A second prediction of the same target is a false one, and the higher score chooses first."""
    ious = np.array([[0.8], [0.9]])
    assert average_precision([(ious, [0.6, 0.5])], (0.5,)) == pytest.approx([1.0])
    assert average_precision([(ious, [0.5, 0.6])], (0.85,)) == pytest.approx([1.0])
    assert average_precision([(ious, [0.6, 0.5])], (0.85,)) == pytest.approx([0.5])


def test_an_iou_that_is_nan_matches_nothing():
    """And does not hide the target beside it."""
    ious = np.array([[np.nan, 0.9], [0.8, 0.0]])
    assert average_precision([(ious, [0.6, 0.5])], (0.5,)) == pytest.approx([1.0])
    assert average_precision([([[np.nan]], [0.6])], (0.0,)) == pytest.approx([0.0])


def test_a_score_that_is_nan_comes_last():
    ious = np.array([[0.2], [0.8]])
    assert average_precision([(ious, [np.nan, -3.0])], (0.5,)) == pytest.approx([1.0])


def test_the_thresholds_are_cocos():
    """As pycocotools makes them."""
    np.testing.assert_allclose(COCO_THRESHOLDS, np.linspace(0.5, 0.95, 10), rtol=0, atol=1e-15)


@pytest.mark.parametrize("thresholds", [0.5, [50, 75], [1.01], [0.5, np.nan], [-0.1], [[0.5]]])
def test_thresholds_are_shares(thresholds):
    with pytest.raises(ValueError, match=r"thresholds must be a sequence of numbers in 0\.\.1, got"):
        average_precision([([[0.6]], [0.9])], thresholds)


def test_what_is_missing_is_no_number():
    """NumPy would make NaN of it, as which a score comes last."""
    with pytest.raises(TypeError, match=r"^thresholds must be an array of real numbers, got NoneType"):
        average_precision([([[0.6]], [0.9])], None)
    with pytest.raises(TypeError, match=r"^images\[0\]\[1\] must be an array of real numbers, got list"):
        average_precision([([[0.6], [0.7]], [0.9, None])])
    assert polygon_iou(SQUARE, [[Fraction(each) for each in vertex] for vertex in SQUARE.tolist()]) == 1.0


def test_average_precision_without_predictions_or_targets():
    assert average_precision([(np.zeros((0, 3)), [])], (0.5,)) == pytest.approx([0.0])
    assert np.isnan(average_precision([(np.zeros((2, 0)), [0.5, 0.6])], (0.5,))).all()
    assert np.isnan(average_precision([], (0.5,))).all()
    for ious in (np.zeros((2, 1)), np.zeros(1), np.zeros((1, 1, 1))):
        with pytest.raises(ValueError, match=r"images\[1\] must be IoUs of shape \(P, T\)"):
            average_precision([(np.zeros((1, 1)), [0.5]), (ious, [0.5])])
