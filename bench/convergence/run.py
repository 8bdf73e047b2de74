"""Why a polygon head's MGIoU loss falls while mAP50 stays 0, and what helps: trains with every loss of `losses.py`.

    python -m bench.convergence.run --out bench/results/convergence.json

Two tasks. "digits" is the demo's: a CNN outlines real handwritten digits, 12 vertices, 30 epochs; its last layer starts
from a circle around the image, as in the demo, or as PyTorch makes it ("scattered": 12 points near the image's centre
in no order, which is what an ordinary polygon head starts from). "vertices" moves 12 free vertices to 24 random convex
polygons by Adam, 400 steps, from four starts. Polygons are judged in the order of their vertices (see the demo).

Every finished training is written at once, and an existing file is continued. Writes a figure next to the results,
and at the end a table to the screen.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.arguments import earlier_rows, out_file, positive
from bench.convergence import report
from bench.convergence.losses import LOSSES, Loss
from bench.machine import machine
from triton_mgiou import PAPER, demo, mgiou_loss
from triton_mgiou.metrics import polygon_iou

EPOCHS, BATCH_SIZE = 30, 64
TARGETS, STEPS, STEP_SIZE = 24, 400, 0.02
PLACES = [  # tasks and starts, each for all losses
    ("digits", "scattered"),
    ("vertices", "random"),
    ("vertices", "tiny"),
    ("vertices", "whole image"),
    ("vertices", "circle"),
    ("digits", "circle"),
]
CURVE_POINTS = 10  # where the polygons are judged on the way, the digits on every third test image

Rows = list[dict[str, Any]]
Job = tuple[str, str, str, list[int]]  # task, start, loss, seeds


class Watch:
    """Collects what every step shows, and averages it over 2 % of the steps at the start, a third and the end."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "zero_gradients": []}
        self.ap50: list[float] = []

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        """Take the losses (B,) and the gradient (B, N, 2) of their sum."""
        self.seen["loss"].append(losses.mean().item())
        self.seen["gradient_norm"].append(gradient.flatten(1).norm(dim=1).mean().item())
        self.seen["zero_gradients"].append((gradient == 0).all(2).float().mean().item())

    def summary(self) -> dict[str, Any]:
        """Name to [start, third, end], and the curves."""
        at = {name: [demo.loss_at(values, part) for part in (0, 1 / 3, 1)] for name, values in self.seen.items()}
        curve = [float(np.mean(part)) for part in np.array_split(self.seen["loss"], 30)]
        return {**at, "loss_curve": curve, "ap50_curve": self.ap50}


def judge(polygons: Tensor, targets: Tensor, lengths: Tensor) -> dict[str, float]:
    """Mean IoU of the polygons in their order and of their hulls, AP, and the share that crosses itself."""
    shapely: Any = importlib.import_module("shapely")  # not where only the kernels are measured
    ious, hulls, crossing = [], [], []
    for polygon, target, length in zip(polygons.double().numpy(), targets.numpy(), lengths.tolist(), strict=True):
        ious.append(polygon_iou(polygon, target[:length]))
        hull, goal = (shapely.convex_hull(shapely.multipoints(points)) for points in (polygon, target[:length]))
        hulls.append(shapely.area(shapely.intersection(hull, goal)) / shapely.area(shapely.union(hull, goal)))
        crossing.append(not shapely.is_simple(shapely.linearrings(polygon)))
    precision = {f"ap{at}": demo.average_precision(np.array(ious), at / 100) for at in (50, 75, 90)}
    means = {"polygon_iou": ious, "hull_iou": hulls, "self_crossing": crossing}
    return {**{name: float(np.mean(values)) for name, values in means.items()}, **precision}


def digits(loss: Loss, start: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Train the demo's network as the demo does, one for each seed. The loss takes all their polygons at once."""
    data, test = demo.load_data()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    networks = [make_network(start, seed) for seed in seeds]
    steps = EPOCHS * math.ceil(len(data.images) / BATCH_SIZE)
    optimizer = torch.optim.AdamW([each for network in networks for each in network.parameters()], demo.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, demo.LEARNING_RATE, total_steps=steps)
    watches, step = [Watch() for _ in seeds], 0
    for epoch in range(EPOCHS):
        orders = [torch.split(torch.randperm(len(data.images), generator=each), BATCH_SIZE) for each in generators]
        for batches in zip(*orders, strict=True):
            polygons = torch.cat([network(data.images[b]) for network, b in zip(networks, batches, strict=True)])
            chosen = torch.cat(batches)
            losses = loss(polygons, data.targets[chosen], data.lengths[chosen], step / steps)
            (gradient,) = torch.autograd.grad(losses.sum(), polygons)
            optimizer.zero_grad()
            torch.autograd.backward(polygons, gradient / len(batches[0]))
            optimizer.step()
            schedule.step()
            for watch, own_losses, own_gradient in zip(
                watches, losses.detach().chunk(len(seeds)), gradient.chunk(len(seeds)), strict=True
            ):
                watch.step(own_losses, own_gradient)
            step += 1
        if (epoch + 1) % (EPOCHS // CURVE_POINTS) == 0:
            for network, watch in zip(networks, watches, strict=True):
                watch.ap50.append(judge_network(network, *(each[::3] for each in test))["ap50"])
    return [
        {**judge_network(network, *test), **watch.summary()} for network, watch in zip(networks, watches, strict=True)
    ]


def make_network(start: str, seed: int) -> torch.nn.Module:
    """The demo's network; "scattered" draws its last layer again, around the middle of the image."""
    torch.manual_seed(seed)
    network = demo.make_network()
    if start == "scattered":
        (*_, head) = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
        head.reset_parameters()
        head.bias.data += 0.5
    return network


def judge_network(network: torch.nn.Module, images: Tensor, targets: Tensor, lengths: Tensor) -> dict[str, float]:
    """`judge` what it predicts."""
    with torch.no_grad():
        return judge(network(images), targets, lengths)


def vertices(loss: Loss, start: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Move free vertices by Adam with a falling step."""
    samples = [random_sample(start, torch.Generator().manual_seed(seed)) for seed in seeds]
    polygons, targets, lengths = (torch.cat(each) for each in zip(*samples, strict=True))
    shares = [slice(k * TARGETS, (k + 1) * TARGETS) for k in range(len(seeds))]
    polygons.requires_grad_()
    optimizer = torch.optim.Adam([polygons], lr=STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    watches = [Watch() for _ in seeds]
    results: list[dict[str, float]] = []
    for step in range(STEPS):
        losses = loss(polygons, targets, lengths, step / STEPS)
        (polygons.grad,) = torch.autograd.grad(losses.sum(), polygons)
        optimizer.step()
        schedule.step()
        for watch, share in zip(watches, shares, strict=True):
            watch.step(losses.detach()[share], polygons.grad[share])
        if (step + 1) % (STEPS // CURVE_POINTS) == 0:
            results = [judge(polygons.detach()[share], targets[share], lengths[share]) for share in shares]
            for watch, result in zip(watches, results, strict=True):
                watch.ap50.append(result["ap50"])
    return [{**result, **watch.summary()} for watch, result in zip(watches, results, strict=True)]


def random_sample(start: str, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Polygons to move, their targets and the targets' lengths."""
    targets, lengths = random_targets(rng)
    angle = torch.arange(demo.VERTICES) * (2 * math.pi / demo.VERTICES)
    circle = torch.stack((angle.cos(), angle.sin()), dim=-1).expand(TARGETS, -1, -1)
    if start == "random":
        return torch.rand(circle.shape, generator=rng), targets, lengths
    return 0.5 + {"circle": 0.25, "tiny": 0.005, "whole image": 0.5}[start] * circle, targets, lengths


def random_targets(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Convex polygons of 4 to 10 vertices in the unit square, in either direction, NaN behind the real vertices."""
    lengths = torch.randint(4, 11, (TARGETS,), generator=rng)
    targets = torch.full((TARGETS, 10, 2), math.nan)
    for target, length in zip(targets, lengths.tolist(), strict=True):
        angle = (torch.arange(length) + 0.6 * torch.rand(length, generator=rng)) * (2 * math.pi / length)
        radii = 0.1 + 0.2 * torch.rand(2, generator=rng)
        x, y = radii[0] * angle.cos(), radii[1] * angle.sin()
        turn = 2 * math.pi * torch.rand(1, generator=rng)
        polygon = torch.stack((x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()), dim=-1)
        polygon += 0.3 + 0.4 * torch.rand(2, generator=rng)
        target[:length] = polygon.flip(0) if torch.rand(1, generator=rng) < 0.5 else polygon
    return targets, lengths


def unrelated(smallest: float, largest: float) -> float:
    """Mean MGIoU loss of two objects that have nothing to do with each other: ellipses anywhere in a unit square.

    Their sides are between `smallest` and `largest`. A head whose targets belong to other objects stays near this.
    """
    rng = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * (2 * math.pi / 8)
    circle = 0.5 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    sides = smallest + (largest - smallest) * torch.rand(2, 10_000, 1, 2, generator=rng)
    return mgiou_loss(*(torch.rand(2, 10_000, 1, 2, generator=rng) + sides * circle), **PAPER).item()


TASKS: dict[str, Callable[[Loss, str, list[int]], list[dict[str, Any]]]] = {"digits": digits, "vertices": vertices}


def run(job: Job) -> Rows:
    """One row of the results for each seed."""
    task, start, loss, seeds = job
    torch.set_num_threads(1)
    rows = []
    for seed, found in zip(seeds, TASKS[task](LOSSES[loss], start, seeds), strict=True):
        rounded = {k: [float(f"{x:.4g}") for x in v] if isinstance(v, list) else round(v, 4) for k, v in found.items()}
        rows.append({"task": task, "start": start, "loss_name": loss, "seed": seed, **rounded})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results, JSON; continued if it exists")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds 0, 1, ... (default: 5)")
    parser.add_argument("--processes", type=positive, default=2, help="trainings at a time (default: 2)")
    args = parser.parse_args(argv)

    order = [(task, start, name) for task, start in PLACES for name in LOSSES]
    rows: Rows = earlier_rows(parser, args.out, ("task", "start", "loss_name"), order)
    done = {(row["task"], row["start"], row["loss_name"], row["seed"]) for row in rows}
    jobs = [
        (task, start, name, seeds)
        for task, start in PLACES
        for name in LOSSES
        if (seeds := [seed for seed in range(args.seeds) if (task, start, name, seed) not in done])
    ]
    about = machine(["python -m bench.convergence.run", *(sys.argv[1:] if argv is None else argv)], torch.device("cpu"))
    about["versions"] |= {name: metadata.version(name) for name in ("numpy", "scikit-learn", "shapely")}
    head = {
        "what": "Trainings of bench.convergence.run; its docstring says what the tasks are, losses.py the losses. "
        "loss, gradient_norm (of one polygon's loss) and zero_gradients (share of the vertices): start, a third, end.",
        **about,
        "unrelated_objects": [
            {"sides": sides, "loss": round(unrelated(*sides), 4)} for sides in ([0.02, 0.1], [0.05, 0.2], [0.1, 0.4])
        ],
    }
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for new in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc="trainings"):
            rows += new
            write(args.out, {**head, "rows": rows})
    rows.sort(key=lambda row: (order.index((row["task"], row["start"], row["loss_name"])), row["seed"]))
    write(args.out, {**head, "rows": rows})
    report.draw(args.out.with_suffix(".png"), rows)
    sys.stdout.write(report.table(rows) + "\n")


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step, one row a line."""
    head = [f'"{name}": {json.dumps(value)}' for name, value in results.items() if name != "rows"]
    rows = [json.dumps(row) for row in results["rows"]]
    text = "{\n" + ",\n".join(head) + ',\n"rows": [\n' + ",\n".join(rows) + "\n]\n}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
