"""Measure the first call of a process, the host's share of a warm call, and the gain of tuning, on a GPU.

    python -m bench.startup --out bench/results/h200_startup.json                      all parts
    python -m bench.startup --out bench/results/h200_startup.json --parts first host   these; the others stay

The file is written after each part. Only what a user can see is measured:
    first     seconds of the first call in fresh processes: empty caches, Triton's cache on disk, after a warm-up
    host      microseconds of the host in a warm call
    tuning    what `warmup` gains for each vertex count and batch size
    training  2,000 steps of random B and N after a warm-up: what was compiled or tuned, and the slowest step
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.arguments import earlier_results, need_gpu, out_file

ROOT = Path(__file__).parent.parent
CACHES = {"triton": "TRITON_CACHE_DIR", "mgiou": "TRITON_MGIOU_CACHE_DIR"}  # folder to variable
WARMUP = ("-m", "triton_mgiou", "warmup", "--vertices", "8", "--batch", "512")
SIZES = [(vertices, batch) for vertices in (4, 8, 16, 32) for batch in (512, 65536)]
PROCESSES = 7  # whose median is taken
STEPS = 2000
LARGEST_BATCH = 70_000


def variables(folder: str, caches: str) -> dict[str, str]:
    """The environment of a process with caches of its own; all in a folder share the bytecode of the modules."""
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
    return bytecode | {name: f"{folder}/{caches}/{part}" for part, name in CACHES.items()}


def first() -> dict[str, dict[str, float]]:
    """Fresh processes; every first call has a backward with it. Modules are compiled before, as by an installation.

    Where the caches are filled, the medians of some processes, in turns: one alone says little about a few hundredths.
    """
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(caches: str, *arguments: str) -> str:
            environment = os.environ | variables(folder, caches)
            command = (sys.executable, *arguments)
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}: {done.stderr}")
            return done.stdout

        def measured(caches: str, call: str) -> dict[str, float]:
            times: dict[str, float] = json.loads(run(caches, "-m", "bench.startup", "--process", call))
            return times

        for call in ("loss", "trivial"):
            measured("bytecode", call)
        result["empty caches"] = measured("loss", "loss")
        result["trivial kernel, empty cache"] = measured("trivial", "trivial")
        start = time.perf_counter()
        run("warm", *WARMUP)
        result["the warm-up's process"] = {"total": time.perf_counter() - start}
        filled = {
            "Triton's cache": ("loss", "loss"),
            "after a warm-up": ("warm", "loss"),
            "trivial kernel, Triton's cache": ("trivial", "trivial"),
        }
        rounds = [{name: measured(*each) for name, each in filled.items()} for _ in range(PROCESSES)]
        for name in filled:
            result[name] = {part: statistics.median(each[name][part] for each in rounds) for part in rounds[0][name]}
    return result


def process(call: str) -> dict[str, float]:
    """Seconds of each thing that a fresh process does up to its first call; `call` is "loss" or "trivial"."""
    times: dict[str, float] = {}
    start = time.perf_counter()

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        nonlocal start
        start = time.perf_counter()
        yield
        times[name] = time.perf_counter() - start

    with timed("import torch"):
        import torch  # noqa: PLC0415 - timed
    with timed("import triton_mgiou"):
        import triton_mgiou  # noqa: PLC0415 - timed
    with timed("start CUDA"):
        pred = torch.rand(512, 8, 2, device="cuda").requires_grad_()
        target = torch.rand(512, 8, 2, device="cuda")
        torch.autograd.grad((pred.square() * target).sum(), pred)
        torch.cuda.synchronize()
    with timed("import kernels"):  # Triton comes with them
        if call == "trivial":
            from bench.rates import trivial  # noqa: PLC0415 - timed
        else:
            import triton_mgiou.ops  # noqa: PLC0415 - timed
    function: dict[str, Callable[[], Any]] = {
        "trivial": lambda: trivial[(1,)](target),
        "loss": lambda: torch.autograd.grad(triton_mgiou.mgiou_loss(pred, target), pred),
    }
    for name in ("first call", "second call"):
        with timed(name):
            function[call]()
            torch.cuda.synchronize()
    return times


def host() -> dict[str, Any]:
    """Bursts of calls that the GPU is faster than, so that nothing waits for it; median of 30 rounds in turns."""
    import torch  # noqa: PLC0415
    import torch.nn.functional as F  # noqa: N812, PLC0415

    from bench.peers import polygons  # noqa: PLC0415
    from bench.rates import trivial  # noqa: PLC0415
    from triton_mgiou import mgiou_loss  # noqa: PLC0415

    pred, target = polygons(512, 8, torch.float32, torch.device("cuda"))
    leaf = pred.clone().requires_grad_()
    functions: dict[str, Callable[[], Any]] = {
        "value": lambda: mgiou_loss(pred, target),
        "value and gradient": lambda: mgiou_loss(leaf, target),
        "value, gradient, backward": lambda: torch.autograd.grad(mgiou_loss(leaf, target), leaf),
        "a trivial Triton kernel": lambda: trivial[(1,)](target),
        "smooth_l1_loss, value and gradient": lambda: F.smooth_l1_loss(leaf, target),
        "smooth_l1_loss, value, gradient, backward": lambda: torch.autograd.grad(F.smooth_l1_loss(leaf, target), leaf),
        "torch.empty_like": lambda: torch.empty_like(pred),
    }
    for function in functions.values():
        function()
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(30):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                function()
            times[name].append((time.perf_counter() - start) * 1e4)
    return {"us": {name: statistics.median(values) for name, values in times.items()}}


def tuning() -> dict[str, Any]:
    """One warm-up for each size; a gain of 0 where the shipped configuration is the fastest."""
    import triton_mgiou  # noqa: PLC0415

    rows = []
    for vertices, batch in SIZES:
        start = time.perf_counter()
        found = triton_mgiou.warmup((vertices,), (batch,))
        seconds = time.perf_counter() - start  # of the two variants together
        rows += [
            {
                "vertices": vertices,
                "batch": batch,
                "gradient": each.gradient,
                "us": each.us,
                "gain": each.gain or 0.0,
                "configuration": each.configuration,
                "seconds": seconds,
            }
            for each in found
        ]
    return {"rows": rows}


def training() -> dict[str, Any]:
    """Steps of random size, with everything compiled before; files that a step adds to a cache are what it compiled."""
    import torch  # noqa: PLC0415

    import triton_mgiou  # noqa: PLC0415
    from bench.peers import BLOCK, polygons  # noqa: PLC0415

    start = time.perf_counter()
    triton_mgiou.warmup((4, 8), (512, 65536), tune=False)
    result: dict[str, Any] = {"warm-up seconds": time.perf_counter() - start, "steps": STEPS}
    before = {part: _files(os.environ[name]) for part, name in CACHES.items()}
    rng = random.Random(0)
    whole = -(-LARGEST_BATCH // BLOCK) * BLOCK
    pool = {n: polygons(whole, n, torch.float32, torch.device("cuda")) for n in range(3, 9)}
    slowest = 0.0
    for _ in range(STEPS):
        batch, n = int(LARGEST_BATCH ** rng.random()) - 1, rng.choice(list(pool))
        pred, target = (vertices[:batch] for vertices in pool[n])
        leaf = pred.detach().requires_grad_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        if rng.random() < 0.1:
            triton_mgiou.mgiou_loss(pred, target)
        else:
            torch.autograd.grad(triton_mgiou.mgiou_loss(leaf, target), leaf)
        torch.cuda.synchronize()
        slowest = max(slowest, time.perf_counter() - start)
    added = {part: len(_files(os.environ[name]) - before[part]) for part, name in CACHES.items()}
    return result | {"compiled": added["triton"], "tuned": added["mgiou"], "slowest step seconds": slowest}


def _files(folder: str) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"first": first, "host": host, "tuning": tuning, "training": training}


def main(argv: list[str] | None = None) -> None:
    """Measure the parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="the JSON to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all of them by default")
    parser.add_argument("--process", choices=("loss", "trivial"), help=argparse.SUPPRESS)  # one of `first`
    arguments = parser.parse_args(argv)
    if arguments.process is not None:
        sys.stdout.write(json.dumps(process(arguments.process)) + "\n")
        return
    if arguments.out is None:
        parser.error("the following arguments are required: --out")
    earlier = earlier_results(parser, arguments.out, lambda content: bool(content.keys() & PARTS))
    content: dict[str, Any] = earlier or {}
    need_gpu(parser, "bench.startup")
    with tempfile.TemporaryDirectory() as folder:  # the user's caches take no part
        os.environ |= {name: f"{folder}/{part}" for part, name in CACHES.items()}
        for part in arguments.parts:
            start = time.perf_counter()
            result = PARTS[part]()
            import torch  # noqa: PLC0415 - a process of `first` times it

            from bench.machine import machine  # noqa: PLC0415 - imports torch

            command = ["python -m bench.startup", *(sys.argv[1:] if argv is None else argv)]
            content |= machine(command, torch.device("cuda"))
            content[part] = {"seconds": time.perf_counter() - start, "result": result}
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
            sys.stdout.write(f"{part}: {json.dumps(result)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
