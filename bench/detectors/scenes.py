"""The data: real handwritten digits (scikit-learn) on photographs (scikit-learn, scikit-image). Nothing is downloaded.

Each image shows 3 to 8 digits of 8 x 8 pixels, enlarged to an eighth to a third of the image's side, turned, without
overlap. What is to be found, always as one class:

    corners   the digit's upright rectangle, turned by up to 60 degrees; keypoints: its four corners, from the digit's
              own upper left
    hulls     the convex hull of the strokes in eight vertices, any angle, the first one drawn at random
    tops      the same, the first one by a rule: the uppermost in the image
    outlines  the outer outline of the strokes in 16 points, turned by up to 60 degrees, from the digit's own top; most
              are not convex
    boxes     as corners, any angle, as an oriented box
    squares   a visible square tile with the digit on it, any angle, as an oriented box
    long      the same with a tile four times as long as wide
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triton_mgiou import demo

KEYPOINTS = {"corners": 4, "hulls": 8, "tops": 8, "outlines": 16}
BOXES = ("boxes", "squares", "long")
OBJECTS = 8  # at most, in an image
SIDES = (0.125, 0.34)  # of an object, as a share of the image's side
RADIUS = 0.72  # of a circle around it, as a share of its longer side: half the diagonal of a square, and a little more
MARGIN = 2  # pixels around a digit, for the interpolation
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "retina", "rocket"),
)

Floats = NDArray[np.float64]


class Scenes(NamedTuple):
    """I images and what is to be found in them."""

    images: NDArray[np.uint8]  # (I, 3, S, S), RGB
    counts: NDArray[np.int64]  # (I,), the objects in each image
    polygons: NDArray[np.float32]  # (I, 8, K, 2), pixels; 0 behind the real objects
    boxes: NDArray[np.float32]  # (I, 8, 5): centre, long and short side, radians; all 0 for a task with keypoints


def make(task: str, chosen: range, side: int, seed: int) -> Scenes:
    """Draw scenes of a task.

    Args:
        task: One of those above.
        chosen: Their numbers; each image has a random generator of its own, so that several processes can share.
        side: Of an image, in pixels.
        seed: Of everything random.
    """
    images = len(chosen)
    photographs = load_photographs()
    digits = importlib.import_module("sklearn.datasets").load_digits().images
    vertices = KEYPOINTS.get(task, 4)
    scenes = Scenes(
        np.empty((images, 3, side, side), dtype=np.uint8),
        np.zeros(images, dtype=np.int64),
        np.zeros((images, OBJECTS, vertices, 2), dtype=np.float32),
        np.zeros((images, OBJECTS, 5), dtype=np.float32),
    )
    for k, number in enumerate(chosen):
        rng = np.random.default_rng((seed, number))
        canvas = background(photographs[rng.integers(len(photographs))], side, rng)
        places = free_places(int(rng.integers(3, OBJECTS + 1)), side, rng)
        scenes.counts[k] = len(places)
        for j, (x, y, size) in enumerate(places):
            digit = digits[rng.integers(len(digits))]
            most = math.radians(60) if task in {"corners", "outlines"} else math.pi
            polygon = paste(canvas, digit, task, (x, y), size, rng.uniform(-most, most), rng)
            if task == "hulls":
                polygon = np.roll(polygon, rng.integers(vertices), 0)
            elif task == "tops":
                polygon = np.roll(polygon, -polygon[:, 1].argmin(), 0)
            scenes.polygons[k, j] = polygon
            if task in BOXES:
                scenes.boxes[k, j] = oriented_box(polygon)
        scenes.images[k] = canvas.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    return scenes


@lru_cache(maxsize=1)
def load_photographs() -> list[NDArray[np.uint8]]:
    """RGB photographs that the two libraries bring along."""
    data, images = importlib.import_module("skimage.data"), importlib.import_module("sklearn.datasets")
    found = [getattr(data, name)() for name in PHOTOGRAPHS] + list(images.load_sample_images().images)
    return [
        np.repeat(photo[..., None], 3, axis=2) if photo.ndim == 2 else np.ascontiguousarray(photo[..., :3])
        for photo in found
    ]


def background(photograph: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Cut a random square out of a photograph and bring it to the size of an image."""
    cv2 = importlib.import_module("cv2")
    height, width = photograph.shape[:2]
    cut = int(rng.integers(min(height, width) // 3, min(height, width) + 1))
    y, x = int(rng.integers(height - cut + 1)), int(rng.integers(width - cut + 1))
    result: NDArray[np.uint8] = cv2.resize(
        photograph[y : y + cut, x : x + cut], (side, side), interpolation=cv2.INTER_AREA
    )
    return result.astype(np.float32)


def free_places(count: int, side: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and sizes of up to `count` objects, in pixels, whose circles neither overlap nor leave the image."""
    places: list[tuple[float, float, float]] = []
    for _ in range(20 * count):
        size = rng.uniform(*SIDES) * side
        x, y = rng.uniform(RADIUS * size, side - RADIUS * size, 2)
        if all(math.hypot(x - u, y - v) > RADIUS * (size + other) for u, v, other in places):
            places.append((x, y, size))
        if len(places) == count:
            break
    return places


def paste(
    canvas: NDArray[np.float32],
    digit: Floats,
    task: str,
    centre: tuple[float, float],
    size: float,
    turn: float,
    rng: np.random.Generator,
) -> Floats:
    """Draw one object into the canvas, (S, S, 3), in place.

    Args:
        canvas: The image.
        digit: Ink of 8 x 8 pixels, 0..16.
        task: What is drawn and returned, see above.
        centre: Of the object, in pixels.
        size: The longer side of what is to be found, in pixels.
        turn: Radians, clockwise on a screen.
        rng: Chooses the colours.

    Returns:
        The vertices of what is to be found, (K, 2), in pixels.
    """
    cv2 = importlib.import_module("cv2")
    shape = {"hulls": hull, "tops": hull, "outlines": outline}.get(task, rectangle)(digit)
    inner = shape - (shape.max(0) + shape.min(0)) / 2
    length = 1.1 * np.ptp(inner, axis=0).max()
    if task in {"squares", "long"}:
        width = length if task == "squares" else 4 * length
        inner = np.array([[-width, -length], [width, -length], [width, length], [-width, length]]) / 2
    scale = size / np.ptp(inner, axis=0).max()
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]])
    placed: Floats = inner @ matrix.T + centre

    low = np.maximum(np.floor(np.array(centre) - RADIUS * size), 0).astype(int)
    high = np.minimum(np.ceil(np.array(centre) + RADIUS * size), canvas.shape[0]).astype(int)
    part = canvas[low[1] : high[1], low[0] : high[0]]
    dark = part.mean() > 127
    ink, paper = rng.uniform(0, 50, 3), rng.uniform(205, 255, 3)
    if task in {"squares", "long"}:
        tile = np.zeros(part.shape[:2], dtype=np.uint8)
        cv2.fillPoly(tile, [np.round((placed - low) * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
        part += (tile / 255)[..., None] * (paper - part)
    elif not dark:
        ink = paper
    middle = (shape.max(0) + shape.min(0)) / 2 - 0.5 + MARGIN  # of pixel centres
    shift = np.array(centre) - 0.5 - low - matrix @ middle
    alpha = cv2.warpAffine(
        np.pad(digit / demo.FULL_INK, MARGIN),
        np.concatenate((matrix, shift[:, None]), axis=1),
        (part.shape[1], part.shape[0]),
        flags=cv2.INTER_CUBIC,
    )
    part += alpha.clip(0, 1)[..., None] * (ink - part)
    return placed


def rectangle(digit: Floats) -> Floats:
    """Corners of the upright rectangle around the strokes, from the upper left, clockwise, in the digit's pixels."""
    row, column = np.nonzero(digit >= demo.STROKE_INK)
    (x0, y0), (x1, y1) = (column.min(), row.min()), (column.max() + 1, row.max() + 1)
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def hull(digit: Floats) -> Floats:
    """The hull of the strokes in eight vertices: those that matter least are left out, or the first is repeated."""
    vertices = demo.stroke_hull(digit)[::-1] * demo.SIDE  # clockwise on a screen, as the others
    while len(vertices) > KEYPOINTS["hulls"]:
        before, after = np.roll(vertices, 1, 0) - vertices, np.roll(vertices, -1, 0) - vertices
        vertices = np.delete(vertices, np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]).argmin(), 0)
    missing = KEYPOINTS["hulls"] - len(vertices)
    return np.concatenate((vertices, np.repeat(vertices[:1], missing, axis=0)))


def outline(digit: Floats) -> Floats:
    """The longest outline of the strokes in 16 points, evenly along it, from the top, clockwise."""
    find = importlib.import_module("skimage.measure").find_contours
    ink = np.kron(np.pad(digit, 1), np.ones((4, 4)))
    ink = importlib.import_module("skimage.filters").gaussian(ink, 2)
    points = max(find(ink, demo.STROKE_INK), key=len)[:, ::-1]
    points = (points + 0.5) / 4 - 1
    area = np.sum(points[:-1, 0] * points[1:, 1] - points[1:, 0] * points[:-1, 1])
    points = points[:-1] if area > 0 else points[:-1][::-1]  # clockwise where y points down
    points = np.roll(points, -points[:, 1].argmin(), axis=0)
    closed = np.concatenate((points, points[:1]))
    along = np.concatenate(([0], np.hypot(*np.diff(closed, axis=0).T).cumsum()))
    at = np.linspace(0, along[-1], KEYPOINTS["outlines"], endpoint=False)
    return np.stack([np.interp(at, along, closed[:, axis]) for axis in (0, 1)], axis=1)


def oriented_box(corners: Floats) -> Floats:
    """Centre, long side, short side and the long side's angle in [-45, 135) degrees, as Ultralytics has them."""
    first, second = corners[1] - corners[0], corners[2] - corners[1]
    width, height = np.hypot(*first), np.hypot(*second)
    along = first if width >= height else second
    angle = (math.atan2(along[1], along[0]) + math.pi / 4) % math.pi - math.pi / 4
    return np.array([*corners.mean(0), max(width, height), min(width, height), angle])
