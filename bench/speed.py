"""Measure the loss against its peers and write one JSON.

    python -m bench.speed --out speed.json
    python -m bench.speed --out h200.json --only training large batch                # 5 minutes
    python -m bench.speed --out h200_others.json --only bfloat16 vertices            # 2 minutes
    python -m bench.speed --out h200_compiled.json --only compiled                   # 2 minutes

Each implementation is first held against its definition in float64 on the same input; one that disagrees, and one
that cannot run here, is named in the file instead of timed. The file is written after each size, the most
important first, so a run that is cut off leaves what it has. Without a CUDA device the sizes are small, and wall times
are all there is. `python -m bench.report` makes a table and figures of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.arguments import out_file
from bench.machine import machine
from bench.peers import TOLERANCE, Peer, errors, find_peers, polygons


class Group(NamedTuple):
    """Sizes (B, N) that are measured for the same peers."""

    sizes: list[tuple[int, int]]
    peers: tuple[str, ...] = ()  # all that are not compiled, if empty
    dtype: torch.dtype = torch.float32
    rounds: int = 3


CHEAPEST = ("kernel", "kernel, defaults", "reference", "smooth L1", "L1")
GPU_GROUPS = {
    "training": Group([(batch, n) for n in (4, 8) for batch in (512, 4096, 16384, 65536)], rounds=21),
    "large": Group([(2**20, 4), (2**20, 8), (2**18, 16), (65536, 32), (16384, 64)], (*CHEAPEST, "angle-sorted")),
    "batch": Group([(2**22, 8), (2**18, 8), (128, 8)], (*CHEAPEST, "angle-sorted")),
    "vertices": Group([(65536, n) for n in (3, 16, 64, 128, 12, 24, 48, 96)], (*CHEAPEST, "angle-sorted")),
    "bfloat16": Group([(65536, 8), (2**20, 8), (65536, 4)], dtype=torch.bfloat16),
    "compiled": Group(
        [
            *((4096, 8), (4096, 4), (16384, 4), (65536, 4), (512, 8), (16384, 8)),
            *((2**20, 4), (2**18, 16), (65536, 32), (16384, 64), (2**20, 8), (512, 4), (65536, 8)),
        ],
        ("kernel", "reference", "compiled dynamic", "compiled"),
    ),
}
CPU_GROUPS = {
    "training": Group([(batch, n) for n in (4, 8) for batch in (128, 512, 2048)]),
    "vertices": Group([(512, n) for n in (3, 16, 32)], ("reference", "angle-sorted", "smooth L1", "L1")),
    "bfloat16": Group([(512, 8)], dtype=torch.bfloat16),
    "compiled": Group([(512, 4), (512, 8), (2048, 8)], ("reference", "compiled dynamic", "compiled")),
}
STATIC_SIZES = {(512, 4), (4096, 8), (65536, 8), (2**20, 8)}  # a static graph takes long to compile
LAUNCHES_SIZE = (4096, 8)


def main(argv: list[str] | None = None) -> None:
    """Measure, print what was found, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="the JSON to write")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = groups_of(device)
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups), help="groups of sizes; all of them")
    arguments = parser.parse_args(argv)
    peers, missing = find_peers(device)
    command = ["python -m bench.speed", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**machine(command, device), "missing": missing, "rates": {}, "left_out": [], "rows": []}

    def write() -> None:
        partly = arguments.out.with_suffix(".part")
        partly.write_text(json.dumps(result, indent=1) + "\n")
        partly.replace(arguments.out)

    for name, reason in missing.items():
        log(f"missing: {name}: {reason}")
    if "kernel" not in missing:
        from bench.rates import measure_rates  # noqa: PLC0415 - needs Triton

        result["rates"] = measure_rates()
        log(f"a second: {result['rates']}")
    start = time.perf_counter()
    for group_name in arguments.only:
        group = groups[group_name]
        for batch, vertices in group.sizes:
            chosen = chosen_peers(peers, group, batch, vertices)
            try:
                rows, left_out = measure_size(chosen, batch, vertices, group, device)
            except Exception as error:  # out of memory, say; the sizes after this one are worth trying
                rows = []
                left_out = [{"peer": "all", "batch": batch, "vertices": vertices, "reason": first_line(error)}]
            result["rows"] += [{"group": group_name, **row} for row in rows]
            result["left_out"] += left_out
            result["seconds"] = round(time.perf_counter() - start, 1)
            write()
            for row in rows:
                log(line(row))
            for row in left_out:
                log(f"left out: {row}")
            log(f"{result['seconds']:.0f} s")
    if device.type == "cuda":  # at the end: what a profiler leaves behind might slow what comes after it
        ready = [peer for peer in peers if not peer.compiled or "compiled" in arguments.only]
        result["launches"] = count_launches(ready, device)
        log(f"launches: {result['launches']}")
    write()


def groups_of(device: torch.device) -> dict[str, Group]:
    """Full sizes on a GPU, small ones on a CPU."""
    return GPU_GROUPS if device.type == "cuda" else CPU_GROUPS


def chosen_peers(peers: Sequence[Peer], group: Group, batch: int, vertices: int) -> list[Peer]:
    """The peers of the group, without those that would compile again for each size."""
    named = [peer for peer in peers if (peer.name in group.peers if group.peers else not peer.compiled)]
    return [peer for peer in named if peer.name != "compiled" or (batch, vertices) in STATIC_SIZES]


def measure_size(
    peers: Sequence[Peer], batch: int, vertices: int, group: Group, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the peers that agree with their definition at this size, and why each of the others is left out."""
    rows: dict[str, dict[str, Any]] = {}
    left_out = []
    steps: dict[str, dict[str, measure.Step]] = {}
    inputs = polygons(batch, vertices, group.dtype, device)
    size = {"dtype": str(group.dtype).removeprefix("torch."), "batch": batch, "vertices": vertices}
    for peer in peers:
        reason = peer.refuses(batch, vertices)
        if reason is None:
            value_error, gradient_error, reason = checked(peer, batch, vertices, group.dtype, device)
        if reason is not None:
            left_out.append({"peer": peer.name, **size, "reason": reason})
            continue
        rows[peer.name] = {
            "peer": peer.name,
            "quantity": peer.quantity,
            **size,
            "value_error": value_error,
            "gradient_error": gradient_error,
        }
        steps[peer.name] = steps_of(peer, *inputs)
    for part in ("step", "forward"):
        times = measure.wall_us(
            {name: each[part] for name, each in steps.items() if part in each}, device, group.rounds
        )
        for name, each in times.items():
            first = next(iter(times.values()))
            rows[name].setdefault("wall_us", {})[part] = statistics.median(each)
            rows[name].setdefault("wall_ratio", {})[part] = measure.median_ratio(each, first)
    if device.type == "cuda":
        for peer in peers:
            if peer.name in rows:
                rows[peer.name] |= on_the_gpu(peer, steps[peer.name])
                torch.cuda.empty_cache()
    return list(rows.values()), left_out


def checked(
    peer: Peer, batch: int, vertices: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, str | None]:
    """Errors of the value and of the gradient, and why they are reason to leave the peer out."""
    try:
        value, gradient = errors(peer, batch, vertices, dtype, device)
    except Exception as error:  # of other people's code, or of the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return 0.0, 0.0, first_line(error)
    allowed = TOLERANCE[dtype]
    if value <= allowed[0] and gradient <= allowed[1]:
        return value, gradient, None
    return value, gradient, f"disagrees with its definition: value by {value:.1e}, gradient by {gradient:.1e}"


def steps_of(peer: Peer, pred: torch.Tensor, target: torch.Tensor) -> dict[str, measure.Step]:
    """The steps of a peer that are timed: forward and backward of its mean loss, and forward alone."""
    constant, goal = peer.prepare(pred), peer.prepare(target)
    leaf = constant.clone().requires_grad_()
    steps: dict[str, measure.Step] = {"step": lambda: torch.autograd.grad(peer.loss(leaf, goal), leaf)}
    if not peer.compiled:  # a graph more to compile
        steps["forward"] = lambda: peer.loss(constant, goal)
    if peer.name == "kernel":  # computes the gradient with the value
        steps["forward with gradient"] = lambda: peer.loss(leaf, goal)
    return steps


def on_the_gpu(peer: Peer, steps: dict[str, measure.Step]) -> dict[str, Any]:
    """GPU times and memory; for each that failed, why."""
    row: dict[str, Any] = {"gpu_us": {}, "launch_us": {}, "not_measured": {}}

    def attempt(what: str, function: Callable[[], float]) -> float | None:
        try:
            return function()
        except Exception as error:  # of the memory
            row["not_measured"][what] = first_line(error)
            return None

    step = steps["step"]
    row["memory_bytes"] = attempt("memory_bytes", lambda: measure.peak_bytes(step))
    if peer.name == "kernel":  # its forward is one launch
        for name, part in (("value", "forward"), ("value and gradient", "forward with gradient")):
            row["launch_us"][name] = attempt(f"launch_us, {name}", partial(measure.gpu_us, steps[part]))
    if not peer.graph:
        row["not_measured"]["gpu_us, graph_us"] = "may wait for the GPU, which a graph cannot"
    elif 4 * (row["memory_bytes"] or 0) > torch.cuda.mem_get_info()[0]:
        row["not_measured"]["gpu_us, graph_us"] = "captured graphs might not fit into the memory"
    else:
        for part in ("forward", "step"):
            if part in steps:
                row["gpu_us"][part] = attempt(f"gpu_us, {part}", partial(measure.graph_us, steps[part]))
        row["graph_us"] = attempt("graph_us", lambda: measure.graph_row_us(step))
    return row


def count_launches(peers: Sequence[Peer], device: torch.device) -> dict[str, Any]:
    """Launches of each peer's step, or why they could not be counted."""
    counts: dict[str, Any] = {"batch": LAUNCHES_SIZE[0], "vertices": LAUNCHES_SIZE[1]}
    inputs = polygons(*LAUNCHES_SIZE, torch.float32, device)
    for peer in peers:
        if peer.refuses(*LAUNCHES_SIZE) is None:
            try:
                counts[peer.name] = measure.launches(steps_of(peer, *inputs)["step"])
            except Exception as error:  # of a profiler that is not allowed here
                counts[peer.name] = first_line(error)
    return counts


def first_line(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def line(row: dict[str, Any]) -> str:
    """One row in a line."""
    text = f"{row['batch']:>8} x {row['vertices']:<3} {row['dtype']} {row['peer']:<18}"
    text += f" wall {row['wall_us']['step']:10.1f} us, {row['wall_ratio']['step']:6.2f} times the first"
    if "gpu_us" in row:
        times = {**row["gpu_us"], "graph": row.get("graph_us"), **row["launch_us"]}
        text += f"; gpu { {name: round(each, 1) for name, each in times.items() if each} }; {row['memory_bytes']} B"
        text += f"; {row['not_measured']}" if row["not_measured"] else ""
    return text


def log(text: str) -> None:
    """One line for the user, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
