"""Speed and memory of the fused kernel against the reference and the cheapest losses there are.

    python bench/speed.py --out bench/results/speed.json

Every implementation of MGIoU is first held against the reference in float64 on the same input. Times are medians
after warm-up; "wall" is what a training loop sees (host time included, synchronised once per repetition), "gpu" is
one launch between CUDA events behind a flush of the L2 cache, "graph" is one replay of a captured CUDA graph.
Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import triton

from triton_mgiou import mgiou_loss

Step = Callable[[], object]

SLOW = ("eager", "compiled")
TRAINING = [(batch, n) for n in (4, 8) for batch in (512, 4096, 16384, 65536)]
LARGE = [(1048576, 4), (1048576, 8), (262144, 16), (65536, 32), (16384, 64)]


def polygons(batch: int, vertices: int, seed: int) -> torch.Tensor:
    """Star-shaped polygons around random centres, (batch, vertices, 2), float32, unit about 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    angle = torch.arange(vertices, device="cuda") * (2 * torch.pi / vertices)
    radius = 0.5 + 0.5 * torch.rand(batch, vertices, 1, device="cuda", generator=generator)
    centre = torch.rand(batch, 1, 2, device="cuda", generator=generator)
    return centre + radius * torch.stack((angle.cos(), angle.sin()), dim=-1)


def wall(step: Step, repetitions: int = 20, inner: int = 50) -> float:
    """Microseconds of one step in a loop."""
    for _ in range(5):
        step()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / inner * 1e6)
    return statistics.median(times)


def interleaved(steps: dict[str, Step], rounds: int = 5) -> dict[str, float]:
    """`wall` of several steps in turns, so that a drift of the machine reaches all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(wall(step, repetitions=3, inner=10 if name in SLOW else 50))
    return {name: statistics.median(values) for name, values in times.items()}


def gpu(step: Step, repetitions: int = 20) -> float:
    """Microseconds on the GPU; the flush is long enough to hide the host's part of the launch."""
    flush = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    step()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def graph(step: Step, repetitions: int = 50) -> float:
    """Microseconds of one step in a captured graph of ten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(10):
            step()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e2)
    return statistics.median(times)


def peak_memory(step: Step) -> int:
    """Bytes that one step allocates at most beyond what stood before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def training_step(loss: Callable[..., torch.Tensor], pred: torch.Tensor, target: torch.Tensor) -> Step:
    """Forward and backward of a mean loss."""
    return lambda: torch.autograd.grad(loss(pred, target), pred)


def error(pred: torch.Tensor, target: torch.Tensor, loss: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Error of the value, and relative error of the gradient, against the reference in float64."""
    exact_pred = pred.detach().double().requires_grad_()
    exact = mgiou_loss(exact_pred, target.double(), backend="eager")
    (exact_grad,) = torch.autograd.grad(exact, exact_pred)
    value = loss(pred, target)
    (grad,) = torch.autograd.grad(value, pred)
    return abs(value.item() - exact.item()), ((grad - exact_grad).norm() / exact_grad.norm()).item()


def fused(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Our kernel."""
    return mgiou_loss(pred, target, backend="triton")


def eager(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Our reference."""
    return mgiou_loss(pred, target, backend="eager")


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    compiled = torch.compile(eager)
    rows = []
    for batch, n in TRAINING + LARGE:
        pred, target = polygons(batch, n, 0).requires_grad_(), polygons(batch, n, 1)
        row: dict[str, object] = {"batch": batch, "vertices": n}
        losses = {"fused": fused, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "compiled": compiled, "eager": eager}
        for name in ("fused", "compiled", "eager"):
            row[f"{name}_value_error"], row[f"{name}_gradient_error"] = errors = error(pred, target, losses[name])
            if not (errors[0] < 1e-6 and errors[1] < 1e-3):  # near-ties that rounding decides count in the gradient
                print(batch, n, name, "disagrees with the reference in float64 and is left out:", errors)  # noqa: T201
                del losses[name]
        steps = {name: training_step(loss, pred, target) for name, loss in losses.items()}
        row["wall_us"] = interleaved(steps, rounds=5 if batch <= 65536 else 2)
        row["memory_bytes"] = {name: peak_memory(step) for name, step in steps.items()}
        if (batch, n) in TRAINING:
            row["graph_us"] = {name: graph(steps[name]) for name in ("fused", "smooth_l1", "l1")}
        detached = pred.detach()
        row["gpu_us"] = {
            "value_and_gradient": gpu(lambda p=pred, t=target: fused(p, t)),
            "value": gpu(lambda p=detached, t=target: fused(p, t)),
        }
        rows.append(row)
        times = {name: round(value, 1) for name, value in row["wall_us"].items()}  # type: ignore[attr-defined]
        print(batch, n, "wall", times, "graph", row.get("graph_us"), "gpu", row["gpu_us"], flush=True)  # noqa: T201
    copy = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(copy)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "copy_bytes_per_s": 2 * 2**30 / (gpu(lambda: other.copy_(copy)) * 1e-6),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
