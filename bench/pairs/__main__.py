"""Measure the matrix of all pairs, and write one JSON.

    python -m bench.pairs --out bench/results/h200_pairs.json

Each matrix is first held against the definition in float64 at places drawn by a fixed seed, and the gradient against
PyTorch's in float64; what disagrees ends the run. Then launches as CUDA graphs, their memory, a step with the gradient
to both sets, and loops beside Ultralytics' `batch_probiou` (our transcription) and the nested vmap of `mgiou`. The file
is written after each row; a short table comes last. Without a CUDA device the sizes are small and there are only wall
times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import measure
from bench.arguments import not_negative, out_file, positive
from bench.machine import machine
from tests.helpers import generator, rectangle_corners
from tests.pairs import oracle
from tests.pairs.helpers import random_boxes
from triton_mgiou import box_mgiou, box_mgiou_loss, polygon_mgiou
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.options import OVERS
from triton_mgiou.reference import pairs as reference

Boxes = tuple[Tensor, Tensor]
Row = dict[str, Any]

VALUES = ((8400, 20), (8400, 100), (21504, 300), (4967, 8400), (256, 65536))
SMALL = ((84, 20), (50, 84))  # without a CUDA device
STEP = (400, 5000)
QUADRANGLES = (21504, 300)
LOOP = (8400, 20)
AGENTS = (64, 256)
TO_REACH = {
    ("boxes", "8400 x 100"): "8",
    ("boxes", "21504 x 300"): "35",
    ("boxes", "4967 x 8400"): "200",
    ("boxes", "256 x 65536"): "80",
    ("boxes with gradient to both", "400 x 5000"): "150, 1 MB",
    ("quadrangles", "21504 x 300"): "300",
    ("in a loop", "8400 x 20"): "15",
}
CHECKED = 64  # pairs of each matrix
VALUE_ERROR, GRADIENT_ERROR = 2e-6, 1e-4
ROUNDS = 11


def say(what: object) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def batch_probiou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of Gaussians of all pairs, (P, T), in eager PyTorch as in Ultralytics.

    Llerena, Zeni, Kristen, Jung, "Gaussian Bounding Boxes and Probabilistic IoU", arXiv 2106.06072.
    """
    (x1, y1), (x2, y2) = (each[:, :2].T.unsqueeze(2) for each in (first, second))
    (a1, b1, c1), (a2, b2, c2) = (_covariance(each) for each in (first, second))
    x2, y2, a2, b2, c2 = (each.T for each in (x2, y2, a2, b2, c2))
    determinant = (a1 + a2) * (b1 + b2) - (c1 + c2).square()
    quadratic = (a1 + a2) * (y1 - y2).square() + (b1 + b2) * (x1 - x2).square()
    distance = 0.25 * quadratic / (determinant + 1e-7)
    distance = distance + 0.5 * (c1 + c2) * (x2 - x1) * (y1 - y2) / (determinant + 1e-7)
    areas = ((a1 * b1 - c1.square()).clamp(min=0) * (a2 * b2 - c2.square()).clamp(min=0)).sqrt()
    distance = distance + 0.5 * (determinant / (4 * areas + 1e-7) + 1e-7).log()
    hellinger: Tensor = (1 - (-distance.clamp(1e-7, 100.0)).exp() + 1e-7).sqrt()
    return 1 - hellinger


def _covariance(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w, h = boxes[:, 2:3].square() / 12, boxes[:, 3:4].square() / 12
    cos, sin = boxes[:, 4:].cos(), boxes[:, 4:].sin()
    return w * cos.square() + h * sin.square(), w * sin.square() + h * cos.square(), (w - h) * cos * sin


def expanded(first: Tensor, second: Tensor) -> Tensor:
    """The matrix as it is computed without this function: the loss of both sets, expanded."""
    size = len(first), len(second)
    pairs = first.unsqueeze(1).expand(*size, 5), second.unsqueeze(0).expand(*size, 5)
    loss = box_mgiou_loss(*(each.reshape(-1, 5) for each in pairs), boundary_weight=0.0, reduction="none")
    return 1 - 2 * loss.reshape(size)


def boxes(size: tuple[int, int], device: torch.device) -> Boxes:
    """Two sets of rotated boxes over a field of 20 x 20, with sides of 1/3 to 1."""
    rng = generator(0)
    first, second = (random_boxes(n, "cxcywhr", rng) for n in size)
    for each in (first, second):
        each[:, :2] *= 20
    return first.float().to(device), second.float().to(device)


def quadrangles(size: tuple[int, int], device: torch.device) -> Boxes:
    """The corners of the same boxes."""
    first, second = (rectangle_corners(each.double()).float() for each in boxes(size, device))
    return first, second


def check_values(name: str, matrix: Tensor, first: Tensor, second: Tensor, exact: Callable[..., float]) -> float:
    """The largest error at some places; an error above what is allowed ends the run."""
    rng = generator(1)
    rows, columns = (torch.randint(n, (CHECKED,), generator=rng) for n in matrix.shape)
    rows[0], columns[0] = matrix.shape[0] - 1, matrix.shape[1] - 1
    pairs = zip(first.cpu()[rows].double().numpy(), second.cpu()[columns].double().numpy(), strict=True)
    expected = torch.tensor([exact(*pair) for pair in pairs])
    off: float = (
        (matrix[rows.to(matrix.device), columns.to(matrix.device)].double().cpu() - expected).abs().max().item()
    )
    if not off <= VALUE_ERROR:
        raise SystemExit(f"{name}: off by {off:.3g}, allowed {VALUE_ERROR}")
    return float(off)


def check_gradient(size: tuple[int, int], device: torch.device) -> float:
    """The largest relative error of the gradient of the first 50 boxes of each set, against eager float64."""
    first, second = (each[:50] for each in boxes(size, device))
    upstream = torch.randn(len(first), len(second), generator=generator(2), dtype=torch.float64).to(device)
    found = []
    for kind in (torch.float32, torch.float64):
        pair = [each.to(kind).requires_grad_() for each in (first, second)]
        backend = "auto" if kind == torch.float32 else "eager"
        value = box_mgiou(*pair, backend=backend)
        found.append(torch.autograd.grad(value, pair, upstream.to(kind)))
    off = max(((got - want).norm() / want.norm()).item() for got, want in zip(*found, strict=True))
    if not off <= GRADIENT_ERROR:
        raise SystemExit(f"gradient: off by {off:.3g}, allowed {GRADIENT_ERROR}")
    return float(off)


def exact_polygons(first: Any, second: Any) -> float:
    """The oracle of two polygons."""
    return float(oracle.polygon_pair([tuple(v) for v in first], [tuple(v) for v in second]))


def exact_boxes(first: Any, second: Any) -> float:
    """The oracle of two boxes."""
    return float(oracle.box_pair(np.asarray(first), np.asarray(second)))


def time_us(step: Callable[[], object], device: torch.device) -> float:
    """Microseconds of a launch: in a CUDA graph, or by the wall."""
    if device.type == "cuda":
        return measure.graph_row_us(step)
    return statistics.median(measure.wall_us({"step": step}, device, 3)["step"])


def step_of(size: tuple[int, int], device: torch.device) -> Callable[[], object]:
    """Value and gradient to both sets from a given upstream matrix."""
    first, second = (each.requires_grad_() for each in boxes(size, device))
    upstream = torch.randn(size, generator=generator(3)).to(device)
    return lambda: torch.autograd.grad(box_mgiou(first, second), (first, second), upstream)


def peer_of_vmap() -> tuple[torch.nn.Module | None, str | None]:
    """`mgiou`'s loss that keeps boxes apart, or why it is missing."""
    try:
        module: torch.nn.Module = importlib.import_module("mgiou").MGIoU2DMinus()
    except Exception as error:  # a broken installation is as good as none
        return None, f"{type(error).__name__}: {error}"
    return module, None


def keep_apart(agents: Tensor) -> Tensor:
    """The loss of `box_mgiou`'s docstring."""
    n = len(agents)
    pairs = torch.ones(n, n, dtype=torch.bool, device=agents.device).triu(1)
    return ((0.1 + box_mgiou(agents, agents, over="depth")).relu() * pairs).sum()


def gradient(loss: Callable[[Tensor], Tensor], agents: Tensor) -> Tensor:
    """The gradient of a loss of one set."""
    (found,) = torch.autograd.grad(loss(agents), agents)
    return found


def of_values(device: torch.device, size: tuple[int, int]) -> Row:
    """A matrix of rotated boxes, launched alone."""
    first, second = boxes(size, device)
    matrix = box_mgiou(first, second)
    row: Row = {"off by": check_values(f"boxes {size}", matrix, first, second, exact_boxes)}
    for over in OVERS:
        row[f"us, {over}"] = time_us(partial(box_mgiou, first, second, over=over), device)
    if device.type == "cuda":
        row["ps a pair"] = row["us, mean"] * 1e6 / matrix.numel()
        row["bytes beside the matrix"] = measure.peak_bytes(partial(box_mgiou, first, second)) - matrix.nbytes
        if matrix.numel() < 10**7:
            step = partial(expanded, first, second)
            row["us, expanded loss"] = time_us(step, device)
            row["bytes beside the matrix, expanded loss"] = measure.peak_bytes(step) - matrix.nbytes
    return row


def of_quadrangles(device: torch.device, size: tuple[int, int]) -> Row:
    """A matrix of polygons of four vertices."""
    first, second = quadrangles(size, device)
    matrix = polygon_mgiou(first, second)
    off = check_values(f"quadrangles {size}", matrix, first, second, exact_polygons)
    return {"off by": off, "us": time_us(lambda: polygon_mgiou(first, second), device)}


def of_step(device: torch.device, size: tuple[int, int]) -> Row:
    """A step with the gradient to both sets."""
    step = step_of(size, device)
    row: Row = {"off by": check_gradient(size, device), "us": time_us(step, device)}
    if device.type == "cuda":
        row["bytes beside the matrix"] = measure.peak_bytes(step) - size[0] * size[1] * 4
        row["launches"] = measure.launches(step)
    return row


def of_loop(device: torch.device, size: tuple[int, int], rounds: int) -> Row:
    """A loop of calls, as an assigner makes them, beside Ultralytics' matrix."""
    first, second = boxes(size, device)
    times = measure.wall_us(
        {"box_mgiou": lambda: box_mgiou(first, second), "batch_probiou": lambda: batch_probiou(first, second)},
        device,
        rounds,
    )
    row: Row = {f"us, {name}": statistics.median(each) for name, each in times.items()}
    return row | {"to batch_probiou": measure.median_ratio(times["box_mgiou"], times["batch_probiou"])}


def of_keeping_apart(device: torch.device, count: int, rounds: int) -> Row:
    """The gradient of a loss that keeps boxes apart, beside that of `mgiou`."""
    agents = boxes((count, 1), device)[0].requires_grad_()
    steps: dict[str, measure.Step] = {"ours": partial(gradient, keep_apart, agents)}
    row: Row = {}
    peer, missing = peer_of_vmap()
    if peer is not None:
        steps["mgiou's vmap"] = partial(gradient, peer.to(device), agents)
        try:
            steps["mgiou's vmap"]()
        except RuntimeError as error:
            missing = str(error).splitlines()[0]
            del steps["mgiou's vmap"]
    if missing is not None:
        row["mgiou's vmap"] = missing
    times = measure.wall_us(steps, device, rounds)
    return row | {f"us, {name}": statistics.median(each) for name, each in times.items()}


def rows_of(device: torch.device, rounds: int) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """What is measured: section, size, and the measurement."""
    cuda = device.type == "cuda"

    def name(size: tuple[int, int]) -> str:
        return " x ".join(map(str, size))

    for size in VALUES if cuda else SMALL:
        yield "boxes", name(size), partial(of_values, device, size)
    size = STEP if cuda else SMALL[1]
    yield "boxes with gradient to both", name(size), partial(of_step, device, size)
    size = QUADRANGLES if cuda else SMALL[0]
    yield "quadrangles", name(size), partial(of_quadrangles, device, size)
    size = LOOP if cuda else SMALL[0]
    yield "in a loop", name(size), partial(of_loop, device, size, rounds)
    for count in AGENTS if cuda else AGENTS[:1]:
        yield "keeping apart", str(count), partial(of_keeping_apart, device, count, rounds)


def run(device: torch.device, rounds: int, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All checks and measurements, handed to `keep` after each; what there was no time for is named."""
    end = time.perf_counter() + seconds
    result: dict[str, Any] = {"kernel": kernels_unavailable(device) or "runs"}
    for section, size, measured in rows_of(device, rounds):
        row = measured() if time.perf_counter() < end else {"left out": f"{seconds:g} seconds were over"}
        result.setdefault(section, {})[size] = row
        say(f"{section}, {size}: {row}")
        keep(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The short table, beside what is to be reached on an H200."""
    lines = ["| | us | to reach | off by | bytes beside the matrix |", "|---|---|---|---|---|"]
    for section, rows in result.items():
        for size, row in rows.items() if isinstance(rows, dict) else ():
            if "to batch_probiou" in row:
                found = f"batch_probiou takes {1 / row['to batch_probiou']:.1f} times as long"
            elif "us, mean" in row:
                found = " / ".join(f"{row[f'us, {over}']:.1f}" for over in OVERS)
            else:
                found = ", ".join(
                    f"{key.removeprefix('us, ')} {value:.1f}" if isinstance(value, float) else f"{key}: {value}"
                    for key, value in row.items()
                    if key not in ("off by", "bytes beside the matrix", "launches")
                )
            off = f"{row['off by']:.1e}" if "off by" in row else ""
            memory = row.get("bytes beside the matrix", "")
            lines.append(f"| {section}, {size} | {found} | {TO_REACH.get((section, size), '')} | {off} | {memory} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help=f"of the loops (default: {ROUNDS})")
    parser.add_argument(
        "--seconds", type=not_negative, default=120.0, help="after these nothing new begins (default: 120)"
    )
    parser.add_argument("--out", type=out_file, help="written after each row")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference.MEMORY = 2**30  # the checks in eager PyTorch
    command = ["python -m bench.pairs", *(sys.argv[1:] if argv is None else argv)]
    head = {"machine": machine(command, device)}

    def keep(result: dict[str, Any]) -> None:
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(head | result, indent=1) + "\n")

    result = run(device, arguments.rounds, arguments.seconds, keep)
    say(table(result))


if __name__ == "__main__":
    main()
