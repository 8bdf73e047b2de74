"""Is this tree as fast as another one? Steps of both, in turns, in one run.

    git worktree add ../before main
    python -m bench.against ../before --out against.json

A process cannot import both trees under one name. So each tree has a process of its own, which imports its package
from its own root; they wait for each other, and each round times one after the other, in alternating order. A drift of
the machine reaches both: the ratio inside a round is what counts. Neither sees the user's tuning cache. With --graphs a
step is replayed from a CUDA graph of ten, so that the host does not hide what the kernels take. Each row is printed and
written as soon as it is measured. The exit status is 1 if a ratio (median over the rounds) is above --limit.
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

ROOT = Path(__file__).parent.parent if "__file__" in globals() else Path()  # a worker gets this source by -c
LOSSES = ("defaults", "paper")
REPETITION_S = 0.01  # how long one measurement lasts: short, so that little changes between the two of a round
GRAPH_STEPS = 10
PREPARING = 3  # steps of the first order, which finds out how long one takes


class Tree:
    """A checkout, and the process that runs its loss."""

    def __init__(self, root: Path, cache: str, graphs: bool = False) -> None:
        """Start the process; it waits for orders."""
        self.root = root
        source = Path(__file__).read_text(encoding="utf-8")
        environment = os.environ | {"TRITON_MGIOU_CACHE_DIR": cache}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, "--worker", *["--graphs"] * graphs],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def send(self, *order: object) -> None:
        """Send one order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        """Wait for the answer to the first order that has none yet: microseconds of a step."""
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"bench.against: the process of {self.root} has ended; its error is above")
        return float(answer)

    def ask(self, *order: object) -> float:
        """Send one order and wait for its answer."""
        self.send(*order)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_step(loss: Callable[..., Any], pred: Any, target: Any, options: dict[str, Any]) -> None:
    """Forward and backward."""
    import torch  # noqa: PLC0415 - only in a worker

    torch.autograd.grad(loss(pred, target, **options), pred)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Ten steps as one CUDA graph."""
    import torch  # noqa: PLC0415 - only in a worker

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_STEPS):
            step()
    return graph.replay


def worker(graphs: bool) -> None:
    """Serve orders (loss, B, N, steps) with the microseconds of a step; the first one of a size prepares it."""
    import torch  # noqa: PLC0415 - only in a worker

    import triton_mgiou  # noqa: PLC0415 - of the tree in whose root this process runs
    from triton_mgiou import PAPER, mgiou_loss  # noqa: PLC0415

    if Path(triton_mgiou.__file__).parent.parent != Path.cwd():
        raise SystemExit(f"bench.against: expected the package of {Path.cwd()}, got {triton_mgiou.__file__}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if graphs:  # a node that autograd made on the default stream cannot be captured
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    per_call = GRAPH_STEPS if graphs else 1
    steps: dict[tuple[str, int, int], Callable[[], Any]] = {}
    for line in sys.stdin:
        name, batch, vertices, count = json.loads(line)
        if (name, batch, vertices) not in steps:
            rng = torch.Generator().manual_seed(vertices)
            turn = torch.arange(vertices) * (2 * torch.pi / vertices)
            circle = torch.stack((turn.cos(), turn.sin()), dim=-1)
            parts = (circle + 0.3 * torch.rand(batch, vertices, 2, generator=rng) for _ in range(2))
            pred, target = (each.to(device) for each in parts)
            options: dict[str, Any] = PAPER if name == "paper" else {}
            steps[name, batch, vertices] = partial(one_step, mgiou_loss, pred.requires_grad_(), target, options)
            for _ in range(3):
                steps[name, batch, vertices]()
            if graphs:
                steps[name, batch, vertices] = captured(steps[name, batch, vertices])
        step = steps[name, batch, vertices]
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        if gpu:
            torch.cuda.synchronize()
        sys.stdout.write(f"{(time.perf_counter() - start) / (count * per_call) * 1e6}\n")
        sys.stdout.flush()


def compare(this: Tree, other: Tree, loss: str, batch: int, vertices: int, rounds: int) -> dict[str, Any]:
    """One row: median microseconds of both, and the median and quartiles of this tree's over the other's."""
    order = (loss, batch, vertices)
    for tree in (this, other):  # both compile at the same time
        tree.send(*order, PREPARING)
    slowest = max(tree.answer() for tree in (this, other))
    count = max(1, round(REPETITION_S * 1e6 / slowest))
    times: dict[Tree, list[float]] = {this: [], other: []}
    for turn in range(rounds):
        for tree in (this, other) if turn % 2 else (other, this):
            times[tree].append(tree.ask(*order, count))
    ratios = [a / b for a, b in zip(times[this], times[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "loss": loss,
        "batch": batch,
        "vertices": vertices,
        "this_us": statistics.median(times[this]),
        "other_us": statistics.median(times[other]),
        "ratio": middle,
        "quartiles": [low, high],
    }


def line(row: dict[str, Any]) -> str:
    """A row in a line."""
    return (
        f"{row['batch']:>8} x {row['vertices']:<3} {row['loss']:<9} {row['this_us']:8.1f} us to "
        f"{row['other_us']:8.1f}: {row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})"
    )


def main(argv: list[str] | None = None) -> int:
    """Compare, print, write the JSON; return the exit status."""
    from bench.arguments import not_negative, out_file, positive  # noqa: PLC0415 - not in a worker, whose tree may have none

    def size(text: str) -> tuple[int, int]:
        batch, _, vertices = text.partition("x")
        return positive(batch), positive(vertices)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the root of another checkout")
    parser.add_argument("--out", type=out_file, help="a JSON to write")
    usual = [(512, 4), (4096, 8)]
    parser.add_argument("--sizes", type=size, nargs="+", default=usual, metavar="BxN", help="default: 512x4 4096x8")
    parser.add_argument("--rounds", type=int, default=201, help="at least 2; default: 201")
    parser.add_argument("--limit", type=not_negative, default=1.02, help="the ratio that is too slow; default: 1.02")
    parser.add_argument("--graphs", action="store_true", help="replay steps from CUDA graphs")
    arguments = parser.parse_args(argv)
    if not (arguments.other / "triton_mgiou").is_dir():
        parser.error(f"expected the root of a checkout, got {arguments.other}")
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {arguments.rounds}")
    import torch  # noqa: PLC0415 - not in a worker, which must import the package of its own tree

    from bench.machine import machine  # noqa: PLC0415 - as above

    gpu = torch.cuda.is_available()
    if arguments.graphs and not gpu:
        parser.error("--graphs needs a GPU, and PyTorch finds none")
    command = ["python -m bench.against", *(sys.argv[1:] if argv is None else argv)]
    about = machine(command, torch.device("cuda" if gpu else "cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        this, other = (Tree(root, f"{cache}/{k}", arguments.graphs) for k, root in enumerate((ROOT, arguments.other)))
        for batch, vertices in arguments.sizes:
            for loss in LOSSES:
                rows.append(compare(this, other, loss, batch, vertices, arguments.rounds))
                sys.stdout.write(line(rows[-1]) + "\n")
                sys.stdout.flush()
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        for tree in (this, other):
            tree.close()
    return int(any(row["ratio"] > arguments.limit for row in rows))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker("--graphs" in sys.argv)
    else:
        sys.exit(main())
