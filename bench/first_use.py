"""What the first step costs, what the host does in a warm call, and what tuning gains, on an NVIDIA GPU.

    python bench/first_use.py --out bench/results/first_use.json                      all
    python bench/first_use.py --out bench/results/first_use.json --parts first host   these, others stay

The file is written after each measurement. Parts:
    first     seconds of the first call in fresh processes: empty caches, Triton's cache on disk, after a warm-up
    host      microseconds of the host in a warm call, and by line
    tuning    seconds to tune each variant, and the time of every configuration
    training  compilations and tuning runs in 2,000 steps of random B and N after a warm-up
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("first", "host", "tuning", "training")
VARIANTS = [(vertices, batch) for vertices in (4, 8, 16, 32) for batch in (512, 65536)]
STEPS = 2000

FIRST = """
import json, sys, time
start = time.perf_counter()
times = {}
def lap(name):
    global start
    times[name] = time.perf_counter() - start
    start = time.perf_counter()
import torch
lap("import torch")
import triton_mgiou
lap("import triton_mgiou")
pred = torch.rand(512, 8, 2, device="cuda").requires_grad_()
target = torch.rand(512, 8, 2, device="cuda")
(pred.square() * target).sum().backward()
torch.cuda.synchronize()
lap("start CUDA")
if sys.argv[1] == "trivial":
    import triton
    lap("import triton")
    from trivial import trivial
    trivial[(1,)](target)
else:
    from triton_mgiou import ops
    lap("import triton")
    triton_mgiou.mgiou_loss(pred, target).backward()
torch.cuda.synchronize()
lap("first call")
if sys.argv[1] != "trivial":
    triton_mgiou.mgiou_loss(pred, target).backward()
    torch.cuda.synchronize()
    lap("second call")
print(json.dumps(times))
"""

TRIVIAL = """
import triton
import triton.language as tl

@triton.jit
def trivial(ptr):
    tl.store(ptr, 1.0)
"""


def first(save: Any) -> None:
    """Fresh processes; every first call has a backward with it."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trivial.py").write_text(TRIVIAL)
        (Path(folder) / "first.py").write_text(FIRST)

        def run(caches: str, *command: str) -> str:
            environment = os.environ | {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
                "TRITON_CACHE_DIR": f"{folder}/{caches}/triton",
                "TRITON_MGIOU_CACHE_DIR": f"{folder}/{caches}/mgiou",
            }
            command = (sys.executable, *command)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise SystemExit(f"{command}: {done.stderr}")
            return done.stdout

        for name, caches, what in [
            ("empty caches", "loss", "loss"),
            ("Triton's cache", "loss", "loss"),
            ("trivial kernel, empty cache", "trivial", "trivial"),
            ("trivial kernel, Triton's cache", "trivial", "trivial"),
            ("after a warm-up", "warm", "loss"),
        ]:
            if caches == "warm":
                start = time.perf_counter()
                print(run(caches, "-m", "triton_mgiou", "warmup", "--vertices", "8", "--batch", "512"))  # noqa: T201
                result["the warm-up's process"] = {"total": time.perf_counter() - start}
            result[name] = json.loads(run(caches, f"{folder}/first.py", what))
            print(name, {key: round(value, 3) for key, value in result[name].items()}, flush=True)  # noqa: T201
            save(result)


def host(save: Any) -> None:
    """Bursts of calls that the GPU is faster than, so that nothing waits for it."""
    import torch  # noqa: PLC0415
    import torch.nn.functional as F  # noqa: N812, PLC0415

    from triton_mgiou import functional, mgiou_loss, modules, ops  # noqa: PLC0415
    from triton_mgiou.tuning import measure  # noqa: PLC0415
    from triton_mgiou.tuning import warmup as first_use  # noqa: PLC0415

    device = torch.device("cuda")
    pred, target = (first_use._polygons(512, 8, device, seed) for seed in range(2))
    leaf = pred.clone().requires_grad_()
    mgiou_loss(leaf, target).backward()

    def launch(_size: int) -> None:
        ops.forget_plans()
        mgiou_loss(leaf, target)

    calls: list[tuple[Any, ...]] = []
    ops.mgiou_kernel.add_pre_run_hook(lambda *arguments, **options: calls.append((arguments, options)))
    launch(512)
    ops.mgiou_kernel.pre_run_hooks.clear()
    arguments = calls[0][0]
    layout = next(iter(ops._plans.values())).layout
    grid = (-(-512 // layout.polygons), 1, 1)
    compiled = ops.mgiou_kernel[grid](*arguments, **layout.options())
    functions = {
        "value": lambda: mgiou_loss(pred, target),
        "value and gradient": lambda: mgiou_loss(leaf, target),
        "value, gradient, backward": lambda: torch.autograd.grad(mgiou_loss(leaf, target), leaf),
        "kernel[grid](...)": lambda: ops.mgiou_kernel[grid](*arguments, **layout.options()),
        "compiled[grid](...)": lambda: compiled[grid](*arguments),
        "smooth_l1_loss": lambda: F.smooth_l1_loss(leaf, target),
        "torch.empty_like": lambda: torch.empty_like(pred),
    }
    result: dict[str, Any] = {"us": dict.fromkeys(functions, None)}
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(30):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                function()
            times[name].append((time.perf_counter() - start) * 1e4)
    result["us"] = {name: statistics.median(values) for name, values in times.items()}
    print({name: round(value, 1) for name, value in result["us"].items()}, flush=True)  # noqa: T201
    save(result)
    files = {module.__file__ for module in (functional, modules, ops, measure)}
    for name in ("value", "value and gradient"):
        lines = by_line(functions[name], files, 500)
        result[f"lines of {name}"] = lines
        print(name, f"{sum(line['us'] for line in lines):.1f} us with the tracer's share, by line:")  # noqa: T201
        for line in lines[:25]:
            print(f"{line['us']:7.2f}  {line['where']:<22} {line['text'][:90]}")  # noqa: T201
    save(result)


def by_line(function: Any, files: set[str], repetitions: int) -> list[dict[str, Any]]:
    """Microseconds of each line of `files` in one call, without what those lines call there; longest first."""
    spent: collections.Counter[tuple[str, int]] = collections.Counter()
    stack: list[tuple[str, int]] = []
    since = 0

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal since
        now = time.perf_counter_ns()
        if frame.f_code.co_filename not in files:
            return None
        if stack:
            spent[stack[-1]] += now - since
        if event == "call":
            stack.append((frame.f_code.co_filename, frame.f_lineno))
        elif event == "line":
            stack[-1] = (frame.f_code.co_filename, frame.f_lineno)
        elif event == "return":
            stack.pop()
        since = time.perf_counter_ns()
        return trace

    for _ in range(repetitions):
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(None)
    texts = {file: Path(file).read_text().splitlines() for file in files}
    return [
        {"us": ns / repetitions / 1e3, "where": f"{Path(file).name}:{line}", "text": texts[file][line - 1].strip()}
        for (file, line), ns in spent.most_common()
    ]


def tuning(save: Any) -> None:
    """One variant after the other, so that a run that is cut off keeps what it has."""
    import torch  # noqa: PLC0415

    from triton_mgiou import ops  # noqa: PLC0415
    from triton_mgiou.tuning import measure  # noqa: PLC0415
    from triton_mgiou.tuning import warmup as first_use  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    measure, fit = measure.measure, measure._that_fit

    def timed_measure(kernel: Any, arguments: Any, layouts: Any) -> Any:
        times: list[float] = []
        kept: list[Any] = []
        seconds = {}

        def timed_fit(*given: Any) -> Any:
            start = time.perf_counter()
            kept[:] = fit(*given)
            seconds["compile"] = time.perf_counter() - start
            return kept

        def do_bench(function: Any, quantiles: Any) -> Any:
            result = measure.graph_bench(function, quantiles)
            times.append(result[0] * 1e3)
            return result

        start = time.perf_counter()
        measure._that_fit = timed_fit
        try:
            entry = measure(kernel, arguments, layouts, do_bench)
        finally:
            measure._that_fit = fit
        seconds["total"] = time.perf_counter() - start
        measured = dict(zip(map(str, (layouts[0], *kept)), times, strict=False))
        rows.append({
            "seconds": seconds,
            "layouts": len(layouts),
            "us": measured,
            "left_out": [str(layout) for layout in layouts[1:] if layout not in kept],
            "chosen": str(entry.layout),
            "gain": None if entry.us is None else entry.default_us / entry.us - 1,
        })  # fmt: skip
        return entry

    measure.measure = timed_measure
    ops.forget_plans()
    device, types = torch.device("cuda"), (torch.float32, torch.float32)
    for vertices, batch in VARIANTS:
        for gradient in (True, False):
            start = time.perf_counter()
            with measure.requested(tune=True):
                first_use._training_step((vertices, vertices), types, batch, gradient, device, {})
            row = rows[-1]
            row |= {"vertices": vertices, "batch": batch, "gradient": gradient}
            row["seconds"]["with the first call"] = time.perf_counter() - start
            best = sorted(row["us"].items(), key=lambda pair: pair[1])[:3]
            print(vertices, batch, "gradient" if gradient else "value", row["seconds"], "gain", row["gain"])  # noqa: T201
            print("    default", f"{next(iter(row['us'].values())):.2f} us, best", best, flush=True)  # noqa: T201
            save({"rows": rows})
    measure.measure = measure


def training(save: Any) -> None:
    """Steps of random size, with everything compiled before."""
    import torch  # noqa: PLC0415

    import triton_mgiou  # noqa: PLC0415
    from triton_mgiou import ops  # noqa: PLC0415
    from triton_mgiou.tuning import measure  # noqa: PLC0415
    from triton_mgiou.tuning import warmup as first_use  # noqa: PLC0415

    start = time.perf_counter()
    triton_mgiou.warmup((4, 8), (512, 65536), tune=False)
    result: dict[str, Any] = {"warm-up seconds": time.perf_counter() - start, "steps": STEPS, "tuned": 0}
    measure = measure.measure

    def counted(*arguments: Any) -> Any:
        result["tuned"] += 1
        return measure(*arguments)

    measure.measure = counted
    kernels = ops.mgiou_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(kernels)
    rng = random.Random(0)
    device = torch.device("cuda")
    pool = {n: [first_use._polygons(70_000, n, device, seed) for seed in range(2)] for n in range(3, 9)}
    slowest = 0.0
    for _ in range(STEPS):
        batch, n = int(70_000 ** rng.random()) - 1, rng.choice(list(pool))
        pred, target = (vertices[:batch] for vertices in pool[n])
        torch.cuda.synchronize()
        start = time.perf_counter()
        if rng.random() < 0.1:
            triton_mgiou.mgiou_loss(pred, target)
        else:
            leaf = pred.detach().requires_grad_()
            triton_mgiou.mgiou_loss(leaf, target).backward()
        torch.cuda.synchronize()
        slowest = max(slowest, time.perf_counter() - start)
    result |= {"compiled": len(kernels) - before, "kernels": before, "slowest step seconds": slowest}
    measure.measure = measure
    print(result, flush=True)  # noqa: T201
    save(result)


def main(argv: list[str] | None = None) -> None:
    """Measure the parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args(argv)
    content: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    caches = tempfile.TemporaryDirectory() if "TRITON_MGIOU_CACHE_DIR" not in os.environ else contextlib.nullcontext()
    with caches as folder:
        if folder is not None:
            os.environ |= {"TRITON_MGIOU_CACHE_DIR": f"{folder}/mgiou", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for part in arguments.parts:
            start = time.perf_counter()

            def save(result: Any, part: str = part, start: float = start) -> None:
                machine = {"python": platform.python_version(), "cpu": platform.processor(), "cpus": os.cpu_count()}
                if "torch" in sys.modules:
                    import torch  # noqa: PLC0415
                    import triton  # noqa: PLC0415

                    machine |= {"torch": torch.__version__, "triton": triton.__version__}
                    machine["device"] = torch.cuda.get_device_name()
                content["machine"] = content.get("machine", {}) | machine
                content["command"] = f"python bench/first_use.py --out FILE --parts {part}"
                content["date"] = time.strftime("%Y-%m-%d")
                content[part] = {"seconds": time.perf_counter() - start, "result": result}
                arguments.out.write_text(json.dumps(content, indent=1) + "\n")

            {"first": first, "host": host, "tuning": tuning, "training": training}[part](save)


if __name__ == "__main__":
    main()
