"""One object in a crop, a small network, no detector around it: what a loss teaches, in a minute on a core.

    python -m bench.detectors.crops                       everything that is not in the file yet, about two hours
    python -m bench.detectors.crops --only squares        the rows whose name has this in it

The network sees 48 x 48 pixels of the scenes of `scenes.py` and predicts one object as Ultralytics' heads do: a box by
the distribution of four distances and an angle, with its loss of the distribution beside the loss of the box, or the
vertices of a polygon. Optimizer, gains, clipping of gradients, schedule and average are Ultralytics' own. Polygons are
cut off by the border of the crop as often as mosaics cut them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from bench.arguments import earlier_rows, need_packages, out_file
from bench.detectors import plan, scenes
from bench.detectors.losses import FewVisible
from bench.machine import machine
from triton_mgiou import PAPER, PolygonLoss, box_mgiou_loss
from triton_mgiou.metrics import polygon_iou

SIDE, STRIDE, BINS = 48, 4, 16
SIZES = (14.0, 28.0)  # of an object, in pixels
NEAR = 0.35  # the share of polygons whose middle is near the crop's, so that as many are cut off as in mosaics
IMAGES, BATCH, STEPS = 6000, 64, 800  # a quarter as many images again to judge by
RATE, DECAY, CLIP, WARM = 2e-3, 5e-4, 10.0, 8
BOX_GAIN, DISTRIBUTION_GAIN, POSE_GAIN = 7.5, 1.5, 12.0
BOX_OPTIONS: dict[str, Any] = {"boundary": plan.BOUNDARY["options"], "mgiou": PAPER}
OUT = Path("bench/results/detectors/crops.json")
NEEDED = ("ultralytics", "shapely", "sklearn", "skimage", "cv2")

# Losses of boxes: which, its gain, below which value it is quadratic, whether the angle loss is added
BOXES: dict[str, tuple[str, float, float, bool]] = {
    "ProbIoU + angle": ("ProbIoU", 1.0, 0.0, True),
    "ProbIoU": ("ProbIoU", 1.0, 0.0, False),
    "ProbIoU x 2.5 + angle": ("ProbIoU", 2.5, 0.0, True),
    "boundary": ("boundary", 1.0, 0.0, False),
    "boundary x 2.5": ("boundary", 2.5, 0.0, False),
    "boundary x 4": ("boundary", 4.0, 0.0, False),
    "boundary x 2.5, smooth .1": ("boundary", 2.5, 0.1, False),
    "boundary + angle": ("boundary", 1.0, 0.0, True),
    "boundary x 2.5 + angle": ("boundary", 2.5, 0.0, True),
    "mgiou x 2.5": ("mgiou", 2.5, 0.0, False),
    "mgiou x 2.5 + angle": ("mgiou", 2.5, 0.0, True),
}
HULL = "the target's hull"  # no training, but the most that a loss of hulls can reach
POLYGONS = ("mgiou", "mgiou, none below 3", "mgiou, L2 below 3", "hybrid", "OKS")
OF_ANY_SHAPE = (
    "ProbIoU + angle",
    "boundary + angle",
    "boundary x 2.5 + angle",
    "mgiou x 2.5 + angle",
    "mgiou x 2.5",
    "ProbIoU",
)
BY_TASK = {
    "squares": BOXES,
    "corners": POLYGONS,
    "hulls": POLYGONS,
    "outlines": ("mgiou", "hybrid", "OKS", HULL),
    "boxes": OF_ANY_SHAPE,
    "long": OF_ANY_SHAPE,
}
SEEDS = {"boxes": 4, "long": 4}  # where losses are close
PLAN = [(task, name, seed) for task, names in BY_TASK.items() for seed in range(SEEDS.get(task, 2)) for name in names]


def ultralytics(name: str) -> Any:
    """A module of Ultralytics' `utils`; the program says by itself that it is not installed."""
    return importlib.import_module(f"ultralytics.utils.{name}")


@lru_cache(maxsize=2)
def make(task: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, (I, 3, S, S), the vertices of the object in each, (I, K, 2), and its box, (I, 5), in pixels."""
    rng = np.random.default_rng((seed, count))
    photographs = scenes.load_photographs()
    digits = importlib.import_module("sklearn.datasets").load_digits().images
    images: list[NDArray[np.uint8]] = []
    polygons, boxes = [], []
    is_box = task in scenes.BOXES
    while len(images) < count:
        canvas = scenes.background(photographs[rng.integers(len(photographs))], 2 * SIDE, rng)
        most = math.radians(60) if task in {"corners", "outlines"} else math.pi
        size = rng.uniform(*SIZES) * (1.3 if task == "long" else 1.0)
        digit = digits[rng.integers(len(digits))]
        polygon = scenes.paste(canvas, digit, task, (SIDE, SIDE), size, rng.uniform(-most, most), rng)
        if task == "hulls":
            polygon = np.roll(polygon, rng.integers(len(polygon)), 0)
        near = is_box or rng.random() < NEAR
        corner = SIDE - rng.integers(*((18, 31) if near else (0, SIDE + 1)), 2)
        polygon = polygon - corner
        low, high = polygon.min(0), polygon.max(0)
        if (high.clip(0, SIDE) - low.clip(0, SIDE)).prod() < 0.1 * (high - low).prod():
            continue
        x, y = corner
        images.append(canvas[y : y + SIDE, x : x + SIDE].clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
        polygons.append(polygon)
        boxes.append(scenes.oriented_box(polygon) if is_box else np.zeros(5))
    arrays = (np.stack(images), np.stack(polygons).astype(np.float32), np.stack(boxes).astype(np.float32))
    first, second, third = map(torch.from_numpy, arrays)
    return first, second, third


class Network(nn.Module):
    """Four layers of convolution, and linear heads: distances and angle, or the places of vertices."""

    def __init__(self, vertices: int) -> None:
        super().__init__()

        def layer(old: int, new: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(old, new, 3, 2, 1, bias=False), nn.BatchNorm2d(new), nn.SiLU())

        def head(width: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(9 * 96, width), nn.SiLU(), nn.Linear(width, outputs))

        self.body = nn.Sequential(layer(3, 16), layer(16, 32), layer(32, 64), layer(64, 96))
        self.vertices = vertices
        self.places = head(128, 2 * vertices or 4 * BINS)
        self.angle = None if vertices else head(64, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, 5) and distances (B, 4, bins), or vertices (B, K, 2) twice, in grid cells."""
        features = self.body(images.float() / 255)
        places = self.places(features)
        if self.angle is None:
            vertices = (SIDE / 2 + SIDE / 4 * places.view(len(images), self.vertices, 2)) / STRIDE
            return vertices, vertices
        angle = (self.angle(features).sigmoid() - 0.25) * math.pi
        distances = places.view(len(images), 4, BINS)
        sides = distances.softmax(2) @ torch.arange(float(BINS))
        return torch.cat((ultralytics("tal").dist2rbox(sides, angle, anchor(len(images))), angle), 1), distances


def anchor(count: int) -> Tensor:
    """The middle of the crop, in grid cells, (B, 2)."""
    return torch.full((count, 2), SIDE / 2 / STRIDE)


def box_loss(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of boxes, distances and target boxes, in grid cells."""
    which, gain, smooth, has_angle = BOXES[name]
    distribution = ultralytics("loss").DFLoss(BINS)

    def loss(pred: Tensor, distances: Tensor, target: Tensor) -> Tensor:
        if which == "ProbIoU":
            losses = 1 - ultralytics("metrics").probiou(pred, target, floor=0.01).squeeze(1)
        else:
            losses = box_mgiou_loss(pred, target, reduction="none", **BOX_OPTIONS[which])
        if smooth:
            losses = torch.where(losses < smooth, losses.square() / (2 * smooth), losses - smooth / 2)
        sides = ultralytics("tal").rbox2dist(target[:, :4], anchor(len(target)), target[:, 4:5], reg_max=BINS - 1)
        total: Tensor = BOX_GAIN * gain * losses.mean()
        total = total + DISTRIBUTION_GAIN * distribution(distances.reshape(-1, BINS), sides).mean()
        if has_angle:
            share = torch.exp(-torch.log(target[:, 2] / target[:, 3]).square() / 9)
            total = total + (share * torch.sin(2 * (pred[:, 4] - target[:, 4])).square()).mean()
        return total

    return loss


def polygon_loss(name: str, vertices: int) -> nn.Module:
    """The loss of vertices, as a pose head calls it."""
    own: nn.Module = ultralytics("loss").KeypointLoss(torch.full((vertices,), 1 / vertices))
    if name == "OKS":
        return own
    mode, _, few = name.partition(", ")
    loss = PolygonLoss(mode, alpha=0.5 if mode == "hybrid" else None, return_parts=False)
    return FewVisible(loss, own if "L2" in few else Nothing()) if few else loss


class Nothing(nn.Module):
    """No loss."""

    def forward(self, pred: Tensor, *_: Tensor) -> Tensor:
        """Return 0."""
        zero: Tensor = 0 * pred.sum()
        return zero


def visible(polygons: Tensor) -> Tensor:
    """Which vertices lie in the crop, (B, K)."""
    return ((polygons >= 0) & (polygons <= SIDE)).all(2)


def train(task: str, name: str, seed: int, steps: int = STEPS, images: int = IMAGES) -> dict[str, Any]:
    """Train and judge the average."""
    if name == HULL:
        targets = [polygon.numpy() for polygon in make(task, images // 4, 1)[1]]
        find = importlib.import_module("cv2").convexHull
        return shares(judged([find(target)[:, 0] for target in targets], targets))
    torch.manual_seed(seed)
    vertices = 0 if task in scenes.BOXES else scenes.KEYPOINTS[task]
    network, average = Network(vertices), Network(vertices)
    average.load_state_dict(network.state_dict())
    groups = [[w for w in network.parameters() if (w.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": DECAY}, {"params": groups[1], "weight_decay": 0.0}], RATE
    )
    all_images, all_polygons, all_boxes = make(task, images, 0)
    of_boxes, of_polygons = (box_loss(name), None) if not vertices else (None, polygon_loss(name, vertices))
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - 0.99 * step / steps) * min(1.0, (step + 1) / (steps / WARM))
        chosen = torch.randint(images, (BATCH,), generator=rng)
        colours = 1 + 0.8 * (torch.rand(BATCH, 3, 1, 1, generator=rng) - 0.5)
        pred, distances = network(all_images[chosen] * colours)
        if of_boxes:
            target = all_boxes[chosen] / torch.tensor([STRIDE] * 4 + [1])
            loss = of_boxes(pred, distances, target)
        else:
            polygons = all_polygons[chosen]
            seen = visible(polygons)
            clipped = polygons.clamp(0, SIDE) / STRIDE
            area = (clipped.amax(1) - clipped.amin(1)).prod(1, keepdim=True)
            given = torch.cat((polygons / STRIDE, 2.0 * seen[..., None]), 2)
            loss = POSE_GAIN * of_polygons(pred, given, seen, area)  # type: ignore[misc]
        optimizer.zero_grad()
        torch.autograd.backward(BATCH * loss)
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        kept = 0.9999 * (1 - math.exp(-(step + 1) / 2000))
        with torch.no_grad():
            for old, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                if old.dtype.is_floating_point:
                    old.lerp_(new, 1 - kept)
    return judge(average.eval(), task, images // 4)


@torch.no_grad()
def judge(network: nn.Module, task: str, images: int) -> dict[str, Any]:
    """What the network finds in crops that it has not seen."""
    inputs, polygons, boxes = make(task, images, 1)
    pred, _ = network(inputs)
    if task in scenes.BOXES:
        pred = pred * torch.tensor([STRIDE] * 4 + [1])
        ious = judged(corners(pred), corners(boxes))
        off = (torch.rad2deg(pred[:, 4] - boxes[:, 4]) % 90).sub(45).abs().sub(45).neg().abs()
        return {
            **shares(ious),
            "centre error": median((pred[:, :2] - boxes[:, :2]).norm(dim=1) / boxes[:, 2]),
            "size error": median(((pred - boxes).abs() / boxes)[:, 2:4].mean(1)),
            "angle error": median(off),
        }
    pred, seen = pred * STRIDE, visible(polygons)
    size = (polygons.amax(1) - polygons.amin(1)).amax(1)
    away = torch.cdist(polygons, pred).amin(2) / size[:, None]  # from each vertex to the nearest predicted one
    count, whole = seen.sum(1), seen.all(1)
    row: dict[str, Any] = shares(judged(pred[whole].numpy(), polygons[whole].numpy()))
    for least, most in ((1, 1), (2, 2), (3, seen.shape[1] - 1)):
        those = (count >= least) & (count <= most)
        row[f"{least} visible" if least == most else "more, not all"] = median(away[those][seen[those]])
    return row


def judged(pred: Iterable[NDArray[Any]], target: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """IoU of paired polygons, (P,)."""
    return np.array([polygon_iou(*pair) for pair in zip(pred, target, strict=True)])


def shares(ious: NDArray[np.float64]) -> dict[str, float]:
    """The mean, and how many reach a limit."""
    return {"IoU": float(ious.mean()), **{f"IoU > .{at}": float((ious > at / 100).mean()) for at in (50, 75, 90)}}


def median(values: Tensor) -> float:
    """As a number."""
    return float(values.median())


def corners(boxes: Tensor) -> NDArray[np.float64]:
    """Corners (B, 4, 2) of boxes (B, 5)."""
    x, y, w, h, turn = boxes.double().unbind(1)
    along = torch.stack((turn.cos(), turn.sin()), 1) * w[:, None] / 2
    across = torch.stack((-turn.sin(), turn.cos()), 1) * h[:, None] / 2
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    middle = torch.stack((x, y), 1)
    result: NDArray[np.float64] = torch.stack([middle + a * along + b * across for a, b in signs], 1).numpy()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=out_file, default=str(OUT), help=f"results, continued if they exist (default: {OUT})"
    )
    parser.add_argument("--only", default="", help="only rows whose name, such as 'squares, ProbIoU, 0', has this")
    args = parser.parse_args(argv)
    if not any(args.only in ", ".join(map(str, job)) for job in PLAN):
        parser.error(f"--only: no row's name has {args.only!r} in it, as {', '.join(map(str, PLAN[0]))!r} has")
    need_packages(parser, "bench.detectors.crops", NEEDED)
    torch.set_num_threads(1)
    rows = earlier_rows(parser, args.out, ("task", "loss", "seed"), PLAN)
    done = {(row["task"], row["loss"], row["seed"]) for row in rows}
    left = [job for job in PLAN if job not in done and args.only in ", ".join(map(str, job))]
    for task, name, seed in (progress := tqdm(left)):
        progress.set_description(f"{task}, {name}, {seed}")
        found = {key: round(value, 5) for key, value in train(task, name, seed).items() if math.isfinite(value)}
        rows.append({"task": task, "loss": name, "seed": seed, **found})
        rows.sort(key=lambda row: PLAN.index((row["task"], row["loss"], row["seed"])))
        about = machine(["python -m bench.detectors.crops"], torch.device("cpu"))
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
