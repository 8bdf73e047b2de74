"""Measure the loss of boxes against smooth L1 on the same numbers and ProbIoU, and write one JSON.

    python -m bench.boxes.speed --out bench/results/h200_boxes.json --seconds 500

First every implementation is held against its definition in float64 on the same input; one that disagrees is named
instead of timed. Then launches of a million boxes of each format, the first call of a fresh process with empty caches,
steps (forward and backward of the mean) in a loop, the memory of a step, and steps as CUDA graphs. The file is written
after each row, and what --seconds leaves no time for is named in it. A short table comes last. Without a CUDA
device the sizes are small and there are only wall times.
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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.arguments import not_negative, out_file
from bench.boxes.peers import BLOCK, Loss, disagreement, pairs, peers, step
from bench.boxes.report import table
from bench.machine import machine
from bench.speed import first_line
from bench.startup import variables
from triton_mgiou import box_mgiou_loss

ROOT = Path(__file__).parents[2]
SIZES = {"cuda": (512, 4096, 16384, 65536), "cpu": (512, 2048)}
MILLION = {"cuda": 2**20, "cpu": 2**12}
LAUNCHED = ("cxcywhr", "cxcyczlwhr", "corners3d", "cxcywh", "xyxy")
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


class Run:
    """The results so far, in a file that is replaced after each row, and the time that is left."""

    def __init__(self, out: Path, seconds: float, head: dict[str, Any]) -> None:
        self.out = out
        self.end = time.monotonic() + seconds
        self.results: dict[str, Any] = {**head, "launches": [], "steps": [], "first_call_s": None, "left_out": []}

    def write(self) -> None:
        """Replace the file."""
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out)

    def leave_out(self, what: str, why: str) -> None:
        """Name what is not measured."""
        self.results["left_out"].append(f"{what}: {why}")
        self.write()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def has_time(self, what: str) -> bool:
        """Whether there is any left; if not, name what it is not there for."""
        if self.left() > 0:
            return True
        self.leave_out(what, "no time left")
        return False


def launches(run: Run, device: torch.device) -> None:
    """One launch of many boxes, value with gradient and value alone, behind a flush of the L2 cache."""
    for fmt in LAUNCHED:
        for batch in (MILLION[device.type], MILLION[device.type] + BLOCK):
            name = f"launch of {batch} {fmt}"
            if not run.has_time(name):
                continue
            loss = partial(box_mgiou_loss, fmt=fmt)
            try:
                reason = disagreement("kernel", loss, fmt, batch, device)
                if reason is None:
                    run.results["launches"].append(launch(loss, fmt, batch, device))
            except Exception as error:  # of the memory
                reason = first_line(error)
            if reason is not None:
                run.leave_out(name, reason)
            run.write()


def launch(loss: Loss, fmt: str, batch: int, device: torch.device) -> dict[str, Any]:
    """A row."""
    pred, target = pairs(fmt, batch, device)
    leaf = pred.clone().requires_grad_()
    timer = measure.gpu_us if device.type == "cuda" else _wall_us
    with_gradient, alone = timer(lambda: loss(leaf, target)), timer(lambda: loss(pred, target))
    rate = 3 * pred.numel() * pred.element_size() / with_gradient / 1e3
    return {"fmt": fmt, "batch": batch, "launch_us": with_gradient, "value_us": alone, "gb_per_s": rate}


def _wall_us(step: measure.Step) -> float:
    step()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def steps(run: Run, device: torch.device) -> None:
    """Steps of (B, 5) in a loop, in turns, and the memory of a step on a GPU."""
    losses = peers(device)
    for batch in SIZES[device.type]:
        if not run.has_time(f"steps of {batch}"):
            continue
        pred, target = pairs("cxcywhr", batch, device)
        timed = agreeing(run, losses, batch, (pred, target), device)
        times = measure.wall_us(timed, device, ROUNDS)
        for name, each in timed.items():
            row: dict[str, Any] = {"peer": name, "batch": batch, "loop_us": statistics.median(times[name])}
            if "smooth L1" in times:
                row["loop_to_smooth_l1"] = measure.median_ratio(times[name], times["smooth L1"])
            if device.type == "cuda":
                row["memory_bytes"] = measure.peak_bytes(each)
            run.results["steps"].append(row)
            run.write()


def agreeing(
    run: Run, losses: dict[str, Loss], batch: int, sides: tuple[Tensor, Tensor], device: torch.device
) -> dict[str, measure.Step]:
    """The steps of the peers that agree with their definition at this size."""
    found: dict[str, measure.Step] = {}
    for name, loss in losses.items():
        try:
            reason = disagreement(name, loss, "cxcywhr", batch, device)
        except Exception as error:  # of a compiler, say
            reason = first_line(error)
        if reason is None:
            found[name] = partial(step, loss, *sides)
        else:
            run.leave_out(f"{name} at {batch}", reason)
    return found


def graphs(run: Run) -> None:
    """Add the times of steps as CUDA graphs to the rows of steps, each peer in a process of its own."""
    rows = {(row["peer"], row["batch"]): row for row in run.results["steps"]}
    for peer in dict.fromkeys(name for name, _ in rows):
        batches = [batch for name, batch in rows if name == peer]
        if not run.has_time(f"graphs of {peer}"):
            continue
        lines, reason = _lines_of(["-m", "bench.boxes.graphs", peer, *map(str, batches)], run.left())
        for found in map(json.loads, lines):
            if "error" in found:
                reason = found["error"]
            else:
                rows[peer, found["batch"]]["graph_us"] = found["graph_us"]
        missing = [str(batch) for batch in batches if "graph_us" not in rows[peer, batch]]
        if reason is not None and missing:
            run.leave_out(f"graphs of {peer} at {', '.join(missing)}", reason)
        run.write()


def first_call(run: Run) -> None:
    """Seconds of the first step in a fresh process with empty caches, the second one, which finds modules compiled."""
    if not run.has_time("first call"):
        return
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("first", "second"):
            lines, reason = _lines_of(["-c", FIRST_CALL], run.left(), variables(folder, caches))
    if reason is None:
        run.results["first_call_s"] = float(lines[-1])
        run.write()
    else:
        run.leave_out("first call", reason)


def _lines_of(arguments: list[str], seconds: float, own: dict[str, str] | None = None) -> tuple[list[str], str | None]:
    """What another process of Python prints, and why it failed, if it did."""
    command = [sys.executable, *arguments]
    environment = os.environ | (own or {})
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            printed, _ = process.communicate(timeout=max(1.0, seconds))
            reason = None
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            reason = "no time left"
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if reason is None and process.returncode != 0:
        reason = said[-1] if said else f"exit status {process.returncode}"
    return printed.splitlines(), reason


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results, JSON")
    parser.add_argument(
        "--seconds", type=not_negative, default=3600.0, help="after these nothing new begins (default: 3600)"
    )
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = ["python -m bench.boxes.speed", *(sys.argv[1:] if argv is None else argv)]
    run = Run(arguments.out, arguments.seconds, machine(command, device))
    launches(run, device)
    if device.type == "cuda":
        first_call(run)
    steps(run, device)
    if device.type == "cuda":
        graphs(run)
    run.write()
    sys.stdout.write(table(run.results) + "\n")


if __name__ == "__main__":
    main()
