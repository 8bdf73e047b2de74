"""The data of bench/detectors and its batches: labels lie on what is drawn, before and after augmentation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bench.detectors import scenes
from bench.detectors.loader import Loader

cv2 = pytest.importorskip("cv2")
pytest.importorskip("skimage")

TASKS = (*scenes.KEYPOINTS, *scenes.BOXES)


@pytest.fixture(scope="module")
def drawn():
    return {task: scenes.make(task, range(6), 160, 0) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_scenes_do_not_depend_on_who_draws_them(drawn, task):
    for all_of_them, some in zip(drawn[task], scenes.make(task, range(4, 6), 160, 0), strict=True):
        np.testing.assert_array_equal(all_of_them[4:], some)


@pytest.mark.parametrize("task", TASKS)
def test_objects_lie_where_the_labels_say(task):
    """Drawn on grey, what changes is what the label covers: all ink inside it, and it no larger than the ink."""
    rng = np.random.default_rng(1)
    digits = load_digits().images
    for number in range(6):
        canvas = np.full((200, 200, 3), 127.0, dtype=np.float32)
        polygon = scenes.paste(canvas, digits[number], task, (100.0, 100.0), 120.0, rng.uniform(-3, 3), rng)
        changed = np.abs(canvas - 127).max(2) > 25
        covered = np.zeros((200, 200), dtype=np.uint8)
        cv2.fillPoly(covered, [polygon.round().astype(np.int32)], 1)
        wide = cv2.dilate(covered, np.ones((21, 21), np.uint8))
        assert changed.sum() > 1000
        assert (changed & (wide == 0)).sum() < 0.01 * changed.sum()
        hull = cv2.convexHull(np.argwhere(changed)[:, ::-1].astype(np.int32))
        label = cv2.convexHull(polygon.astype(np.float32))
        least = 0.5 if task in {"corners", "boxes"} else 0.7  # a digit does not fill the rectangle around it
        assert least < cv2.contourArea(hull) / cv2.contourArea(label) < 1.25


def turns(polygons):
    """Cross products of successive edges, (..., K)."""
    edges = np.roll(polygons, -1, -2) - polygons
    after = np.roll(edges, -1, -2)
    return edges[..., 0] * after[..., 1] - edges[..., 1] * after[..., 0]


@pytest.mark.parametrize("task", TASKS)
def test_shapes(drawn, task):
    found = drawn[task]
    polygons = np.concatenate([found.polygons[k, :n] for k, n in enumerate(found.counts)]).astype(np.float64)
    assert len(polygons) >= 3 * 6
    assert polygons.min() >= 0
    assert polygons.max() <= 160
    assert polygons.shape[1] == {"hulls": 8, "tops": 8, "outlines": 16}.get(task, 4)
    if task == "outlines":
        assert (turns(polygons) < -1).any(1).mean() > 0.5  # not convex
        return
    assert (turns(polygons) > -1e-2).all()  # clockwise on a screen, convex
    if task == "tops":
        np.testing.assert_array_equal(polygons[:, 0, 1], polygons[..., 1].min(1))
    elif task != "hulls":
        sides = np.linalg.norm(np.roll(polygons, -1, 1) - polygons, axis=2)
        np.testing.assert_allclose(sides[:, :2], sides[:, 2:], rtol=1e-3)
        ratio = sides[:, 0] / sides[:, 1]
        if task in {"squares", "long"}:
            np.testing.assert_allclose(ratio, 1 if task == "squares" else 4, rtol=1e-3)


@pytest.mark.parametrize("task", scenes.BOXES)
def test_oriented_boxes_are_the_polygons(drawn, task):
    """By OpenCV's corners, in Ultralytics' convention: the long side first, its angle in -45..135 degrees."""
    found = drawn[task]
    for k, count in enumerate(found.counts):
        for box, polygon in zip(found.boxes[k, :count], found.polygons[k, :count], strict=True):
            x, y, w, h, angle = box.tolist()
            assert w >= h
            assert -math.pi / 4 <= angle < 3 * math.pi / 4 + 1e-6
            corners = cv2.boxPoints(((x, y), (w, h), math.degrees(angle)))
            off = np.linalg.norm(corners[:, None] - polygon, axis=2)
            assert off.min(1).max() < 1e-2
        assert not found.boxes[k, count:].any()


# ---- batches


def blocks():
    """Scenes of white squares on black: what is white is what the labels have to cover."""
    rng = np.random.default_rng(2)
    count, side = 7, 96
    found = scenes.Scenes(
        np.zeros((count, 3, side, side), dtype=np.uint8),
        np.full(count, 3),
        np.zeros((count, scenes.OBJECTS, 4, 2), dtype=np.float32),
        np.zeros((count, scenes.OBJECTS, 5), dtype=np.float32),
    )
    for k in range(count):
        for j in range(3):
            x, y = 4 + 30 * j, int(rng.integers(4, 70))
            found.images[k, :, y : y + 20, x : x + 20] = 255
            found.polygons[k, j] = [[x, y], [x + 20, y], [x + 20, y + 20], [x, y + 20]]
            found.boxes[k, j] = x + 10, y + 10, 20, 20, 0
    return found


@pytest.mark.parametrize("task", ["corners", "boxes"])
@pytest.mark.parametrize("mosaic", [True, False])
def test_augmented_labels_cover_what_is_white(monkeypatch, task, mosaic):
    monkeypatch.setattr("bench.detectors.loader.COLOUR", 0.0)
    loader = Loader(blocks(), task, 4, torch.device("cpu"), training=True, seed=0)
    loader.dataset.mosaic = mosaic
    seen = 0
    for found in loader:
        assert found["img"].shape == (4, 3, 96, 96)
        for k in range(4):
            white = found["img"][k].float().amin(0).numpy() > 180
            covered = np.zeros((96, 96), dtype=np.uint8)
            for box in found["bboxes"][found["batch_idx"] == k].numpy():
                x, y, w, h = box[:4] * 96
                corners = np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]])
                low, high = corners.clip(0, 96).round().astype(int)
                covered[low[1] : high[1], low[0] : high[0]] = 1
                seen += 1
            # Less than a tenth of an object, or one whose centre is out, has no label.
            allowed = 0.02 if task == "corners" else 0.12
            assert (white & (covered == 0)).sum() <= max(25, allowed * 96**2)
            if task == "corners":
                assert ((covered == 1) & ~white).sum() <= 0.15 * max(covered.sum(), 1) + 10
    assert seen > 10


def test_vertices_out_of_the_image_are_not_visible():
    loader = Loader(blocks(), "corners", 7, torch.device("cpu"), training=True, seed=1)
    (found,) = loader
    keypoints, boxes = found["keypoints"], found["bboxes"]
    visible = keypoints[..., 2] > 0
    assert 0.5 < visible.float().mean() < 1
    assert ((keypoints[..., :2] >= 0) & (keypoints[..., :2] <= 1)).all()
    assert not keypoints[~visible].any()
    whole = visible.all(1)
    low, high = keypoints[whole, :, :2].amin(1), keypoints[whole, :, :2].amax(1)
    torch.testing.assert_close(boxes[whole], torch.cat(((low + high) / 2, high - low), 1), atol=1e-5, rtol=0)


def test_mosaics_hide_vertices():
    """As many as Ultralytics' own: half of the quadrangles lose one, one in seven keeps at most one."""
    loader = Loader(
        scenes.make("corners", range(60), 160, 0), "corners", 20, torch.device("cpu"), training=True, seed=0
    )
    left = torch.cat([(found["keypoints"][..., 2] > 0).sum(1) for _ in range(3) for found in loader])
    assert len(left) > 1000
    assert (left < 4).float().mean() == pytest.approx(0.47, abs=0.06)
    assert (left == 2).float().mean() == pytest.approx(0.2, abs=0.04)
    assert (left <= 1).float().mean() == pytest.approx(0.14, abs=0.04)


def test_every_image_is_seen_once_and_judged_as_it_is():
    data = blocks()
    loader = Loader(data, "corners", 3, torch.device("cpu"), training=False, seed=0)
    batches = list(loader)
    assert [len(found["img"]) for found in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([found["img"].numpy() for found in batches]), data.images)
    keypoints = np.concatenate([found["keypoints"].numpy() for found in batches])
    np.testing.assert_allclose(keypoints[..., :2] * 96, data.polygons[:, :3].reshape(-1, 4, 2), atol=1e-4)
    assert (keypoints[..., 2] == 2).all()
