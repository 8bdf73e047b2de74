"""Which loss brings a box to its target: free boxes, moved by Adam, in the plane, upright and in space.

    python -m bench.boxes.descent --out bench/results/boxes_descent.json

Every loss moves the same boxes: PAIRS of them for each limit of the targets' aspect ratio, start and seed, all in one
batch, STEPS steps of Adam on the centre in units of 16, the logarithms of the sizes and the angle. The steps keep their
size, or fall to 0 on a cosine. A box is judged by its IoU with the target at the end. "corners" moves the eight corners
themselves, from a box or from noise, to find where the axes of corners that make no box should come from; it is judged
by how far the target's corners are from the nearest predicted one, in units of half the diagonal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import shapely
import torch
from torch import Tensor
from tqdm import tqdm

from bench.arguments import out_file, positive
from bench.boxes import gaussian
from bench.machine import machine
from triton_mgiou import PAPER
from triton_mgiou.reference import boxes as reference

Loss = Callable[[Tensor, Tensor], Tensor]

PAIRS, STEPS, STEP_SIZE, UNIT = 200, 400, 0.05, 16.0
RATIOS = (1.0, 3.0, 10.0, 20.0)  # of the targets' sides, at most
STARTS = ("near", "apart", "one box")
OVERLAP = 0.9


def package(pred: Tensor, target: Tensor, fmt: str = "cxcywhr", **options: Any) -> Tensor:
    """The paper's loss with options."""
    paper = {name: value for name, value in PAPER.items() if name != "convexity_weight"}
    return reference.per_sample_loss(pred, target, fmt=fmt, **{**paper, **options})


def volume_term(pred: Tensor, target: Tensor, power: float = 1.0) -> Tensor:
    """The boundary term's counterpart in space, in [0, 1]: 0 only where P is G moved.

    With the mixed volume V = V(P, P, G), a third of the sum over the faces of P of the area times how far G reaches,
    Minkowski's inequality says V^3 >= |P|^2 |G|. So 1 - |P|^2 |G| / V^3 * 2 V |G| / (V^2 + |G|^2) is 0 only there. A
    `power` of 1/3 of that product measures lengths instead of volumes.
    """
    p, g, turn = pred[:, 3:6], target[:, 3:6], pred[:, 6] - target[:, 6]
    cos, sin = turn.cos().abs(), turn.sin().abs()
    reach = torch.stack((g[:, 0] * cos + g[:, 1] * sin, g[:, 0] * sin + g[:, 1] * cos, g[:, 2]), dim=1)
    faces = p.prod(1, keepdim=True) / p
    mixed, p_volume, g_volume = (faces * reach).sum(1) / 3, p.prod(1), g.prod(1)
    match = p_volume**2 * g_volume / mixed**3 * 2 * mixed * g_volume / (mixed**2 + g_volume**2)
    return 1 - match**power


def with_volume(pred: Tensor, target: Tensor, weight: float, axis_grad: bool, power: float = 1.0) -> Tensor:
    """The paper's loss in space and a share of the term above."""
    loss = package(pred, target, "cxcyczlwhr", axis_grad=axis_grad)
    return loss + weight * volume_term(pred, target, power)


def corners_of_edges(pred: Tensor, target: Tensor, axis_grad: bool) -> Tensor:
    """The loss of corners with axes from the mean of four parallel edges instead of vertex 0."""
    before = reference._edges
    reference._edges = _mean_edges
    try:
        return package(pred, target, "corners3d", axis_grad=axis_grad)
    finally:
        reference._edges = before


def _mean_edges(corners: Tensor) -> Tensor:
    starts, ends = ((0, 3, 4, 7), (0, 1, 4, 5), (0, 1, 2, 3)), ((1, 2, 5, 6), (3, 2, 7, 6), (4, 5, 6, 7))
    edges = [(corners[:, end] - corners[:, start]).mean(1) for start, end in zip(starts, ends, strict=True)]
    return torch.stack(edges, dim=1)


def nearest_corners(pred: Tensor, target: Tensor) -> Tensor:
    """L1 of corners, corner i to corner i."""
    return (pred - target).abs().mean((1, 2))


GAUSSIAN: dict[str, Loss] = {
    "ProbIoU": gaussian.probiou,
    "KLD": gaussian.kld,
    "GWD": gaussian.gwd,
    "KFIoU": gaussian.kfiou,
    "L1": gaussian.l1,
}
PLANE: dict[str, Loss] = {
    **GAUSSIAN,
    "paper": package,
    "uniform, axes constant": partial(package, axis_grad=False),
    "length": partial(package, axis_weight="length"),
    "length, axes constant": partial(package, axis_weight="length", axis_grad=False),
    "soft": partial(package, axis_weight="soft"),
    "uniform, boundary 0.1": partial(package, boundary_weight=0.1),
    "uniform, boundary 0.25": partial(package, boundary_weight=0.25),
    "uniform, boundary 0.5": partial(package, boundary_weight=0.5),
    "uniform, boundary 1": partial(package, boundary_weight=1.0),
    "uniform, axes constant, boundary 0.25": partial(package, axis_grad=False, boundary_weight=0.25),
    "soft, boundary 0.25": partial(package, axis_weight="soft", boundary_weight=0.25),
    "length, boundary 0.25": partial(package, axis_weight="length", boundary_weight=0.25),
    "length, axes constant, boundary 0.25": partial(
        package, axis_weight="length", axis_grad=False, boundary_weight=0.25
    ),
}
UPRIGHT: dict[str, Loss] = {
    **{kind: partial(gaussian.upright, kind=kind) for kind in ("GIoU", "DIoU", "CIoU")},
    "paper": partial(package, fmt="cxcywh"),
    "length": partial(package, fmt="cxcywh", axis_weight="length"),
    "uniform, boundary 0.1": partial(package, fmt="cxcywh", boundary_weight=0.1),
    "uniform, boundary 0.25": partial(package, fmt="cxcywh", boundary_weight=0.25),
    "uniform, boundary 1": partial(package, fmt="cxcywh", boundary_weight=1.0),
    "length, boundary 0.25": partial(package, fmt="cxcywh", axis_weight="length", boundary_weight=0.25),
}
SPACE: dict[str, Loss] = {
    **GAUSSIAN,
    "paper": partial(package, fmt="cxcyczlwhr"),
    "uniform, axes constant": partial(package, fmt="cxcyczlwhr", axis_grad=False),
    "uniform, volume 0.1": partial(with_volume, weight=0.1, axis_grad=True),
    "uniform, volume 0.25": partial(with_volume, weight=0.25, axis_grad=True),
    "uniform, volume 0.5": partial(with_volume, weight=0.5, axis_grad=True),
    "uniform, axes constant, volume 0.25": partial(with_volume, weight=0.25, axis_grad=False),
    "uniform, root of volume 0.1": partial(with_volume, weight=0.1, axis_grad=True, power=1 / 3),
    "uniform, root of volume 0.25": partial(with_volume, weight=0.25, axis_grad=True, power=1 / 3),
    "uniform, root of volume 0.5": partial(with_volume, weight=0.5, axis_grad=True, power=1 / 3),
    "uniform, axes constant, root of volume 0.25": partial(with_volume, weight=0.25, axis_grad=False, power=1 / 3),
}
CORNERS: dict[str, Loss] = {
    "L1, corner by corner": nearest_corners,
    "vertex 0": partial(package, fmt="corners3d"),
    "vertex 0, axes constant": partial(package, fmt="corners3d", axis_grad=False),
    "mean of parallel edges": partial(corners_of_edges, axis_grad=True),
    "mean of parallel edges, axes constant": partial(corners_of_edges, axis_grad=False),
}
LOSSES = {"plane": PLANE, "upright": UPRIGHT, "space": SPACE, "corners": CORNERS}


def targets(task: str, ratio: float, rng: torch.Generator) -> Tensor:
    """PAIRS boxes: centres in +-32, mean side 8 to 32, ratio of the sides up to `ratio`, any angle."""
    dimensions = 2 if task in ("plane", "upright") else 3
    size = UNIT * 2 ** (2 * torch.rand(PAIRS, 1, generator=rng) - 1)
    spread = math.log(ratio) / 2 * (2 * torch.rand(PAIRS, dimensions, generator=rng) - 1)
    centre = 32 * (2 * torch.rand(PAIRS, dimensions, generator=rng) - 1)
    angle = math.pi * (torch.rand(PAIRS, 1, generator=rng) - 0.5)
    return torch.cat((centre, size * spread.exp()) if task == "upright" else (centre, size * spread.exp(), angle), 1)


def start_from(boxes: Tensor, start: str, rng: torch.Generator) -> Tensor:
    """Boxes to start from: near the target, apart from it, or all the same one in the middle."""
    dimensions = boxes.shape[1] // 2
    sizes = boxes[:, dimensions : 2 * dimensions]
    if start == "one box":
        first = torch.zeros_like(boxes)
        first[:, dimensions : 2 * dimensions] = UNIT
        return first
    factor = (1.4 * torch.rand(sizes.shape, generator=rng) - 0.7).exp()
    way = torch.nn.functional.normalize(torch.randn(boxes[:, :dimensions].shape, generator=rng), dim=1)
    radius = torch.rand(len(boxes), 1, generator=rng)
    if start == "near":
        distance = 0.5 * radius * sizes.amin(1, keepdim=True)
    else:  # beyond both diagonals
        distance = (0.5 + radius) * sizes.norm(dim=1, keepdim=True) * (1 + factor.amax(1, keepdim=True)) / 2
        distance = distance + 0.5 * sizes.norm(dim=1, keepdim=True)
    angle = math.pi * (torch.rand(len(boxes), boxes.shape[1] % 2, generator=rng) - 0.5)
    return torch.cat((boxes[:, :dimensions] + distance * way, sizes * factor, angle), dim=1)


def corners_of(boxes: Tensor) -> Tensor:
    """Eight corners of boxes in space, (B, 8, 3), in the paper's order."""
    signs = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    cos, sin = boxes[:, 6:].cos(), boxes[:, 6:].sin()
    u, v = boxes[:, 3:4] * signs[:, 0], boxes[:, 4:5] * signs[:, 1]
    flat = torch.stack((boxes[:, :1] + u * cos - v * sin, boxes[:, 1:2] + u * sin + v * cos), dim=2)  # (B, 4, 2)
    z = boxes[:, 2:3] + boxes[:, 5:6] * torch.tensor([-0.5, 0.5])
    return torch.cat((flat.repeat(1, 2, 1), z.repeat_interleave(4, dim=1).unsqueeze(2)), dim=2)


def iou(pred: Tensor, target: Tensor) -> Tensor:
    """IoU of boxes of any of the three tasks, (B,), by polygon clipping."""
    areas, sizes = [], []
    overlap = torch.ones(len(pred))
    if pred.shape[1] == 7:
        low, high = ((b[:, 2] - b[:, 5] / 2, b[:, 2] + b[:, 5] / 2) for b in (pred, target))
        overlap = (torch.minimum(low[1], high[1]) - torch.maximum(low[0], high[0])).clamp(min=0)
    for boxes in (pred, target):
        if boxes.shape[1] == 4:
            flat = torch.cat((boxes, torch.zeros(len(boxes), 1)), dim=1)
        else:
            flat = boxes if boxes.shape[1] == 5 else boxes[:, (0, 1, 3, 4, 6)]
        zeros = torch.zeros(len(boxes), 1)
        solid = torch.cat((flat[:, :2], zeros, flat[:, 2:4], zeros, flat[:, 4:]), dim=1)
        areas.append(shapely.polygons(corners_of(solid)[:, :4, :2].double().numpy()))
        dimensions = boxes.shape[1] // 2
        sizes.append(boxes[:, dimensions : 2 * dimensions].prod(1).double())
    inter: Tensor = torch.from_numpy(shapely.area(shapely.intersection(*areas))) * overlap
    return inter / (sizes[0] + sizes[1] - inter)


def corner_errors(pred: Tensor, target: Tensor) -> Tensor:
    """Mean distance from each corner of the target to the nearest predicted one, in half diagonals, (B,)."""
    half = torch.linalg.vector_norm(target[:, 6] - target[:, 0], dim=1) / 2
    errors: Tensor = torch.cdist(target, pred).amin(2).mean(1) / half
    return errors


def descend(loss: Loss, first: Tensor, goal: Tensor, dimensions: int, decay: bool) -> Tensor:
    """Move boxes to their targets. With `dimensions` 0 the numbers are the variables themselves, in units of 16."""
    sizes = slice(dimensions, 2 * dimensions)
    variables = first.clone()
    if dimensions:
        variables[:, :dimensions] /= UNIT
        variables[:, sizes] = variables[:, sizes].log()
    else:
        variables /= UNIT
    variables.requires_grad_()

    def boxes() -> Tensor:
        if not dimensions:
            return UNIT * variables
        parts = [dimensions, dimensions, variables.shape[1] - 2 * dimensions]
        centre, log_sizes, rest = torch.split(variables, parts, dim=1)
        return torch.cat((UNIT * centre, log_sizes.exp(), rest), dim=1)

    optimizer = torch.optim.Adam([variables], STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(boxes(), goal).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if decay:
            schedule.step()
    return boxes().detach()


def run(task: str, name: str, decay: bool, seeds: int) -> list[dict[str, Any]]:
    """One row for each start and ratio, over all seeds."""
    parts: list[tuple[str, float]] = []
    firsts, goals = [], []
    starts = ("near", "noise") if task == "corners" else STARTS
    for place, start in enumerate(starts):
        for ratio in RATIOS:
            for seed in range(seeds):
                rng = torch.Generator().manual_seed(1000 * seed + 10 * place + RATIOS.index(ratio))
                goal = targets(task, ratio, rng)
                if start == "noise":
                    first = UNIT * torch.randn(PAIRS, 8, 3, generator=rng)
                else:
                    first = start_from(goal, start, rng)
                if task == "corners":
                    goal = corners_of(goal)
                    first = corners_of(first) if start == "near" else first
                parts.append((start, ratio))
                firsts.append(first)
                goals.append(goal)
    first, goal = torch.cat(firsts), torch.cat(goals)
    last = descend(LOSSES[task][name], first, goal, 0 if task == "corners" else first.shape[1] // 2, decay)
    found = torch.split(corner_errors(last, goal) if task == "corners" else iou(last, goal), PAIRS)
    rows = []
    for start in starts:
        for ratio in RATIOS:
            values = torch.cat([v for v, part in zip(found, parts, strict=True) if part == (start, ratio)]).double()
            steps = "falling" if decay else "constant"
            row: dict[str, Any] = {"task": task, "loss_name": name, "start": start, "steps": steps, "ratio": ratio}
            if task == "corners":
                row |= {
                    "error": round(values.mean().item(), 4),
                    "below_0.1": round((values < 0.1).double().mean().item(), 3),
                }
            else:
                row |= {
                    "iou": round(values.mean().item(), 4),
                    "above_0.9": round((values > OVERLAP).double().mean().item(), 3),
                    "lowest_20th": round(values.quantile(0.05).item(), 3),
                }
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean IoU / share above 0.9 (corners: mean error / share below 0.1), a line a loss, a column a ratio."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        first, second = list(row.values())[5:7]
        group = groups.setdefault((row["task"], row["start"], row["steps"]), {})
        group.setdefault(row["loss_name"], []).append(f"{f'{first:.3f} / {second:.2f}':>16}")
    for (task, start, steps), losses in sorted(groups.items()):
        title = f"{task}, start: {start}, {steps} steps"
        lines += ["", f"{title:<44}" + "".join(f"{f'1 : {ratio:g}':>16}" for ratio in RATIOS)]
        lines += [f"{name:<44}" + "".join(cells) for name, cells in losses.items()]
    return "\n".join(lines)


def main() -> None:
    """Run every loss of every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results, JSON")
    parser.add_argument("--seeds", type=positive, default=2, help="seeds 0, 1, ... (default: 2)")
    parser.add_argument("--task", choices=LOSSES, action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(task, name, decay) for task in args.task or LOSSES for name in LOSSES[task] for decay in (True, False)]
    rows = [row for task, name, decay in tqdm(jobs, desc="losses") for row in run(task, name, decay, args.seeds)]
    results = {
        "what": "Boxes moved by Adam; the docstring of bench/boxes/descent.py says how. iou is the mean at the end, "
        "lowest_20th its 5 % quantile; corners: error is the mean distance to the nearest corner.",
        **machine(["python -m bench.boxes.descent", *sys.argv[1:]], torch.device("cpu")),
    }
    head = [f'"{name}": {json.dumps(value)}' for name, value in results.items()]
    body = ",\n".join(json.dumps(row) for row in rows)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(head) + ',\n"rows": [\n' + body + "\n]\n}\n", encoding="utf-8")
    temporary.replace(args.out)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
