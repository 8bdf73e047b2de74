"""Count the machine instructions that a polygon takes, by kind, beside what the mathematics needs.

    python -m bench.instructions --out bench/results/instructions.json      # no GPU is needed, but Triton is

Of the paper's loss with its gradient in large batches, compiled for an H100 or H200. Only what is run for each polygon
counts: the loop over blocks, where a thread has one polygon at a time, and its inner loops as often as there are
vertices. `bench.roofline` says what the mathematics needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.arguments import out_file
from bench.machine import machine
from bench.roofline import operations

SIZES = (4, 8)
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)[^;]*;")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
KINDS = {
    "add, multiply": ("FADD", "FMUL", "FFMA"),
    "min, max, compare, select": ("FMNMX", "FSET", "FSETP", "FSEL"),
    "root": ("MUFU",),
    "shuffle": ("SHFL",),
    "load, store": ("LDG", "STG", "LDS", "STS"),
}
OTHER = "integers, moves, branches"


def counted(sass: str, vertices: int) -> dict[str, float]:
    """How many instructions of each kind one turn of the outer loop runs.

    Args:
        sass: What `nvdisasm -c` prints of a kernel whose longest loop is over blocks.
        vertices: How often each loop within it goes around.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.match(line):
            if jump := BRANCH.search(line):
                jumps.append((len(names), jump[1]))
            names.append(found[1])
    loops = [range(labels[to], at + 1) for at, to in jumps if labels[to] < at]
    outer = max(loops, key=len)
    inner = [loop for loop in loops if loop != outer and loop.start in outer]
    kind_of = {name: kind for kind, each in KINDS.items() for name in each}
    counts = dict.fromkeys((*KINDS, OTHER), 0.0)
    for place in outer:
        counts[kind_of.get(names[place], OTHER)] += vertices ** sum(place in loop for loop in inner)
    return counts


def disassembled(vertices: int) -> str:
    """The kernel of a large batch of such polygons, with all rows full."""
    from triton import knobs  # noqa: PLC0415 - not everywhere

    compiled = importlib.import_module("tests.polygons.test_kernels").compiled  # needs Triton
    kernel = compiled(90, vertices, vertices, axis_weight="uniform", axis_grad=True, large_batch=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def row_of(vertices: int) -> dict[str, Any]:
    """A size."""
    needed = operations(vertices, vertices, gradient=True)
    return {"vertices": vertices, "needed": needed._asdict(), "counted": counted(disassembled(vertices), vertices)}


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, count, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results, JSON")
    arguments = parser.parse_args(argv)
    command = ["python -m bench.instructions", *(sys.argv[1:] if argv is None else argv)]
    result = {**machine(command, torch.device("cpu")), "rows": [row_of(vertices) for vertices in SIZES]}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
