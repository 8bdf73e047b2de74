"""PTX of the kernel in many variants, to compare before and after a change: the same text is the same machine code.

    python -m tests.polygons.ptx before
    python -m tests.polygons.ptx after
    diff -rq before after

No GPU is needed. Beside the PTX, `instructions.txt` has for each variant the number of machine instructions, the
registers of a thread and the bytes that it spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from tests.polygons.test_kernels import compiled

SIZES = {"4": (4, 4), "8": (8, 8), "16": (16, 16), "32": (32, 32), "64": (64, 64), "5x11": (5, 11)}
DEFAULT: dict[str, Any] = {"axis_weight": "length", "axis_grad": False, "boundary": True}
PAPER: dict[str, Any] = {"axis_weight": "uniform", "axis_grad": True}
TERMS: dict[str, Any] = {"axis_weight": "length", "axis_grad": True, "convexity": True, "boundary": True}
LENGTHS: dict[str, Any] = {"pred_real": torch.int64, "target_real": torch.int64}
MASKS: dict[str, Any] = {"pred_real": torch.bool, "target_real": torch.bool}
UNEVEN: dict[str, Any] = {"packed": False, "even": False}  # an odd vertex count, or rows of a larger tensor


def variants() -> dict[str, tuple[int, tuple[int, int], dict[str, Any]]]:
    """Compute capability, sizes and options of each variant, by its name."""
    found: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {}

    def add(name: str, sizes: str, options: dict[str, Any], *capabilities: int) -> None:
        for capability in capabilities or (90,):
            found[f"{sizes}-{name}-sm{capability}"] = capability, SIZES[sizes], options

    for size in SIZES:
        rows = UNEVEN if size == "5x11" else {}
        add("default", size, DEFAULT | rows, 80, 90)
        add("paper", size, PAPER | rows, 80, 90)
        add("terms", size, TERMS | rows)
    for size in ("4", "8", "16", "32", "64"):
        add("default-large", size, DEFAULT | {"large_batch": True})
        add("default-lengths", size, DEFAULT | LENGTHS)
    for size in ("4", "8"):
        add("paper-large", size, PAPER | {"large_batch": True})
        add("default-masks", size, DEFAULT | MASKS)
        add("default-value", size, DEFAULT | {"need_grad": False})
        add("soft", size, {"axis_weight": "soft", "axis_grad": True}, 80, 90)
        add("soft-fixed", size, {"axis_weight": "soft", "axis_grad": False})
        add("length-moving", size, {"axis_weight": "length", "axis_grad": True})
        add("uniform-fixed", size, {"axis_weight": "uniform", "axis_grad": False})
        add("convexity", size, PAPER | {"convexity": True})
        add("convexity-fixed", size, DEFAULT | {"convexity": True, "boundary": False})
        add("terms-masks", size, TERMS | MASKS)
        add("paper-lengths-large", size, PAPER | LENGTHS | UNEVEN | {"large_batch": True})
        add("default-float64", size, DEFAULT | {"dtype": torch.float64})
        add("default-bfloat16", size, DEFAULT | {"dtype": torch.bfloat16})
        add("default-each-weighted", size, DEFAULT | {"per_sample": True, "weight": True})
        add("paper-weighted-strided", size, PAPER | UNEVEN | {"weight": True, "adjacent": False})
    return found


def without_names(ptx: str) -> str:
    """PTX without comments, debug information and names of symbols."""
    code = re.sub(r"//.*", "", ptx).split(".section")[0]
    lines = (line.strip() for line in code.splitlines())
    lines = (line for line in lines if line and not line.startswith((".loc", ".file", "$L__tmp", "$L__func")))
    symbols: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return symbols.setdefault(match[0], f"symbol_{len(symbols)}")

    names = r"\$L_\w+|\b[A-Za-z]\w*_param_\d+|\bmgiou_kernel\w*|\bglobal_smem\w*"
    return re.sub(names, number, "\n".join(lines)) + "\n"


def resources(cubin: bytes) -> tuple[int, int, int]:
    """The number of machine instructions, those that do nothing left out, registers, and bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code, re.MULTILINE)), registers, stack + local


def write(job: tuple[str, Path]) -> tuple[str, tuple[int, int, int]]:
    """Compile a variant, write its PTX, and count what it takes."""
    name, folder = job
    capability, sizes, options = variants()[name]
    kernel = compiled(capability, *sizes, **options)  # type: ignore[no-untyped-call]
    (folder / f"{name}.ptx").write_text(without_names(kernel.asm["ptx"]))
    return name, resources(kernel.asm["cubin"])


def main() -> None:
    """Write every variant's PTX, and their counts of instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--only", default="", help="regular expression of the names of variants to compile")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in variants() if re.search(arguments.only, name)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        counts = list(pool.map(write, [(name, arguments.folder) for name in names]))
    text = "".join(f"{count:6} {registers:4} {spilled:4} {name}\n" for name, (count, registers, spilled) in counts)
    (arguments.folder / "instructions.txt").write_text(text)


if __name__ == "__main__":
    main()
