"""What the loss of boxes costs, against smooth L1 on the same numbers and ProbIoU, and write one JSON.

    python -m bench.boxes.speed --out bench/results/h200_boxes.json

First every implementation is held against its definition in float64 on the same input; one that disagrees is named
instead of timed. Then steps (forward and backward of the mean) in a loop and as CUDA graphs, launches of a million
boxes of each format, the memory of a step, and the first call of a fresh process with empty caches. A short table comes
last. Without a CUDA device the sizes are small and there are only wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench import measure
from bench.boxes import gaussian
from bench.machine import machine
from tests.boxes import oracle
from tests.boxes.helpers import SPACE, random_boxes
from tests.helpers import generator, rectangle_corners
from triton_mgiou import box_mgiou_loss, mgiou_loss
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.box_formats import FORMATS

Loss = Callable[[Tensor, Tensor], Tensor]

BLOCK = 32  # pairs, repeated to any batch
SIZES = {"cuda": (512, 4096, 16384, 65536), "cpu": (512, 2048)}
MILLION = {"cuda": 2**20, "cpu": 2**12}
LAUNCHED = ("cxcywhr", "cxcywh", "xyxy", "cxcyczlwhr", "corners3d")
VALUE_ERROR, GRADIENT_ERROR = 1e-5, 1e-4  # ProbIoU has guards of 1e-7 in its quotients and roots
ROUNDS = 21
FIRST_CALL = """
import time, torch
from triton_mgiou import box_mgiou_loss
torch.zeros(1, device="cuda")
pred, target = (torch.rand(512, 5, device="cuda", requires_grad=True) for _ in range(2))
start = time.perf_counter()
box_mgiou_loss(pred, target.detach()).backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def probiou(pred: Tensor, target: Tensor) -> Tensor:
    """ProbIoU of the paper's formulas, with the operations and guards that Ultralytics runs; mean over the batch."""
    (px, py, pa, pb, pc), (tx, ty, ta, tb, tc) = (_covariance(boxes) for boxes in (pred, target))
    a, b, c = pa + ta, pb + tb, pc + tc
    determinant = a * b - c.pow(2)
    first = ((a * (py - ty).pow(2) + b * (px - tx).pow(2)) / (determinant + 1e-7)) * 0.25
    second = ((c * (tx - px) * (py - ty)) / (determinant + 1e-7)) * 0.5
    product = (pa * pb - pc.pow(2)).clamp(0) * (ta * tb - tc.pow(2)).clamp(0)
    third = (determinant / (4 * product.sqrt() + 1e-7) + 1e-7).log() * 0.5
    distance = (first + second + third).clamp(1e-7, 100.0)
    return (1.0 - (-distance).exp() + 1e-7).sqrt().mean()


def _covariance(boxes: Tensor) -> tuple[Tensor, ...]:
    x, y = torch.split(boxes[..., :2], 1, dim=-1)
    a, b, angle = torch.split(torch.cat((boxes[:, 2:4].pow(2) / 12, boxes[:, 4:]), dim=-1), 1, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    cos_squared, sin_squared = cos.pow(2), sin.pow(2)
    return x, y, a * cos_squared + b * sin_squared, a * sin_squared + b * cos_squared, (a - b) * cos * sin


def by_corners(pred: Tensor, target: Tensor) -> Tensor:
    """What there was before: corners by PyTorch, and the loss of polygons with the options of boxes."""
    options: dict[str, Any] = {"axis_weight": "uniform", "axis_grad": True, "boundary_weight": 0.25}
    return mgiou_loss(rectangle_corners(pred), rectangle_corners(target), **options)


def peers(device: torch.device) -> dict[str, Loss]:
    """The losses of (B, 5), ours first."""
    found: dict[str, Loss] = {}
    if kernels_unavailable(device) is None and device.type == "cuda":
        found["kernel"] = lambda p, t: box_mgiou_loss(p, t, backend="triton")
    found |= {
        "reference": lambda p, t: box_mgiou_loss(p, t, backend="eager"),
        "corners, then polygons": by_corners,
        "smooth L1": F.smooth_l1_loss,
        "ProbIoU": probiou,
        "ProbIoU, compiled": torch.compile(probiou, dynamic=False),
    }
    return found


def pairs(fmt: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A block of pairs, repeated."""
    rng = generator(7)
    pred, target = (random_boxes(fmt, BLOCK, rng).float() for _ in range(2))
    repeats = (batch // BLOCK, *[1] * (pred.dim() - 1))
    return pred.to(device).repeat(repeats), target.to(device).repeat(repeats)


def expected(name: str, fmt: str) -> tuple[float, Tensor]:
    """Mean loss and gradient of the block, in float64: by corners and loops, or by another way to write ProbIoU."""
    pred, target = (side.double() for side in pairs(fmt, BLOCK, torch.device("cpu")))
    if name in ("smooth L1", "ProbIoU", "ProbIoU, compiled"):
        leaf = pred.requires_grad_()
        if name == "smooth L1":
            difference = leaf - target
            near = difference.abs() < 1
            value = torch.where(near, 0.5 * difference.square(), difference.abs() - 0.5).mean()
        else:
            value = gaussian.probiou(leaf, target).mean()
        return value.item(), torch.autograd.grad(value, leaf)[0]
    default = FORMATS[fmt].defaults
    options: dict[str, Any] = {"axis_weight": default.axis_weight, "boundary_weight": default.boundary_weight}
    options = {} if fmt in SPACE else options
    sides = pred.numpy(), target.numpy()
    gradient = oracle.gradient(*sides, fmt, axis_grad=default.axis_grad, **options)
    return float(oracle.per_sample_loss(*sides, fmt, **options).mean()), torch.from_numpy(gradient) / BLOCK


def disagreement(name: str, loss: Loss, fmt: str, batch: int, device: torch.device) -> str | None:
    """Why a loss must not be timed."""
    value, gradient = expected(name, fmt)
    pred, target = pairs(fmt, batch, device)
    got = loss(pred.requires_grad_(), target)
    (found,) = torch.autograd.grad(got, pred)
    found = (found.double().cpu() * (batch / BLOCK)).view(-1, *gradient.shape)
    off = abs(got.item() - value)
    gradient_off = ((found - gradient).abs().max() / gradient.abs().max()).item()
    if off <= VALUE_ERROR and gradient_off <= GRADIENT_ERROR:
        return None
    return f"disagrees with its definition: value by {off:.1e}, gradient by {gradient_off:.1e}"


def steps(device: torch.device, left_out: list[str]) -> list[dict[str, Any]]:
    """Steps of (B, 5) in a loop, and as graphs on a GPU; memory and launches of a step."""
    rows = []
    for batch in SIZES[device.type]:
        pred, target = pairs("cxcywhr", batch, device)
        leaf = pred.clone().requires_grad_()
        timed: dict[str, measure.Step] = {}
        for name, loss in peers(device).items():
            reason = disagreement(name, loss, "cxcywhr", batch, device)
            if reason is None:
                timed[name] = partial(_step, loss, leaf, target)
            else:
                left_out.append(f"{name} at {batch}: {reason}")
        times = measure.wall_us(timed, device, ROUNDS)
        for name, step in timed.items():
            row: dict[str, Any] = {"peer": name, "batch": batch, "loop_us": statistics.median(times[name])}
            if "smooth L1" in times:
                ratios = [own / l1 for own, l1 in zip(times[name], times["smooth L1"], strict=True)]
                row["loop_to_smooth_l1"] = statistics.median(ratios)
            if device.type == "cuda":
                row |= {"graph_us": measure.graph_row_us(step), "memory_bytes": measure.peak_bytes(step)}
            rows.append(row)
    return rows


def _step(loss: Loss, leaf: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaf = leaf.detach().requires_grad_()  # of this step alone: a graph must not capture what waits for another stream
    return torch.autograd.grad(loss(leaf, target), leaf)


def launches(device: torch.device, left_out: list[str]) -> list[dict[str, Any]]:
    """One launch of many boxes, value with gradient and value alone, behind a flush of the L2 cache."""
    rows = []
    for fmt in LAUNCHED:

        def loss(pred: Tensor, target: Tensor, fmt: str = fmt) -> Tensor:
            return box_mgiou_loss(pred, target, fmt=fmt)

        for batch in (MILLION[device.type], MILLION[device.type] + BLOCK):
            reason = disagreement("kernel", loss, fmt, batch, device)
            if reason is not None:
                left_out.append(f"{fmt} at {batch}: {reason}")
                continue
            pred, target = pairs(fmt, batch, device)
            leaf = pred.clone().requires_grad_()
            timer = measure.gpu_us if device.type == "cuda" else _wall_us
            with_gradient, alone = timer(lambda: loss(leaf, target)), timer(lambda: loss(pred, target))  # noqa: B023
            rows.append(
                {
                    "fmt": fmt,
                    "batch": batch,
                    "launch_us": with_gradient,
                    "value_us": alone,
                    "gb_per_s": 3 * pred.numel() * pred.element_size() / with_gradient / 1e3,
                }
            )
    return rows


def _wall_us(step: measure.Step) -> float:
    step()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def first_call() -> float:
    """Seconds of the first step in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TRITON_MGIOU_CACHE_DIR": f"{folder}/mgiou"}
        command = [sys.executable, "-c", FIRST_CALL]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, cwd=root, env=os.environ | caches, capture_output=True, text=True, check=True, timeout=300
        )
    return float(done.stdout)


def table(results: dict[str, Any]) -> str:
    """What the targets of the kernel of boxes are about."""
    titles = ("B", "loop us", "/ L1", "graph us", "/ L1", "ProbIoU /", "compiled /", "memory B")
    lines = ["".join(f"{title:>11}" for title in titles)]
    by_batch: dict[int, dict[str, dict[str, Any]]] = {}
    for row in results["steps"]:
        by_batch.setdefault(row["batch"], {})[row["peer"]] = row
    for batch, rows in by_batch.items():
        own = rows.get("kernel", rows.get("reference"))
        if own is None:
            continue

        def ratio(name: str, what: str, rows: dict[str, dict[str, Any]] = rows) -> float:
            return float(rows.get(name, {}).get(what, float("nan")))

        graph = own.get("graph_us", float("nan"))
        cells = [
            own["loop_us"],
            own["loop_to_smooth_l1"],
            graph,
            graph / ratio("smooth L1", "graph_us"),
            ratio("ProbIoU", "loop_us") / own["loop_us"],
            ratio("ProbIoU, compiled", "loop_us") / own["loop_us"],
        ]
        numbers = "".join(f"{cell:>11.2f}" for cell in cells)
        lines.append(f"{batch:>11}{numbers}{own.get('memory_bytes', 0):>11}")
    lines += [
        f"{row['fmt']:>11} x {row['batch']}: value and gradient {row['launch_us']:.1f} us "
        f"({row['gb_per_s']:.0f} GB/s), value {row['value_us']:.1f} us"
        for row in results["launches"]
    ]
    if results["first_call_s"] is not None:
        lines.append(f"first call, empty caches: {results['first_call_s']:.2f} s")
    return "\n".join([*lines, *(f"left out: {reason}" for reason in results["left_out"])])


def main() -> None:
    """Measure everything, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left_out: list[str] = []
    results = {
        **machine(["python -m bench.boxes.speed", *sys.argv[1:]], device),
        "launches": launches(device, left_out),
        "steps": steps(device, left_out),
        "first_call_s": first_call() if device.type == "cuda" else None,
        "left_out": left_out,
    }
    temporary = arguments.out.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
