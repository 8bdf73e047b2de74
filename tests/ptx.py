"""PTX of the kernels of losses and matrices in many variants, to compare before and after a change.

    python -m tests.ptx before
    python -m tests.ptx after
    diff -rq before after

The same text is the same machine code. No GPU is needed. Beside the PTX, `resources.txt` has the machine instructions,
registers and bytes of local memory of each variant.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from bench.arguments import positive
from tests.boxes.helpers import SPACE
from tests.boxes.test_kernels import compiled as compiled_boxes
from tests.pairs.test_kernels import box_kernel as compiled_box_pairs
from tests.pairs.test_kernels import polygon_kernel as compiled_polygon_pairs
from tests.polygons.test_kernels import compiled as compiled_polygons
from tests.polygons.test_kernels import compiled_keypoints
from triton_mgiou.box_formats import KERNEL_FORMATS, PAIR_FORMATS
from triton_mgiou.options import OVERS

SIZES = {"4": (4, 4), "8": (8, 8), "16": (16, 16), "32": (32, 32), "64": (64, 64), "5x11": (5, 11)}
DEFAULT: dict[str, Any] = {"axis_weight": "length", "axis_grad": False, "boundary": True}
PAPER: dict[str, Any] = {"axis_weight": "uniform", "axis_grad": True}
TERMS: dict[str, Any] = {"axis_weight": "length", "axis_grad": True, "convexity": True, "boundary": True}
LENGTHS: dict[str, Any] = {"pred_real": torch.int64, "target_real": torch.int64}
MASKS: dict[str, Any] = {"pred_real": torch.bool, "target_real": torch.bool}
UNEVEN: dict[str, Any] = {"packed": False, "even": False}  # an odd vertex count, or rows of a larger tensor

Build = Callable[[], Any]


def polygon_variants() -> dict[str, Build]:
    """What compiles each variant of the kernel of polygons, by its name."""
    found: dict[str, Build] = {}

    def add(name: str, sizes: str, options: dict[str, Any], *capabilities: int) -> None:
        for capability in capabilities or (90,):
            found[f"{sizes}-{name}-sm{capability}"] = partial(compiled_polygons, capability, *SIZES[sizes], **options)

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


def box_variants() -> dict[str, Build]:
    """The same of the kernel of boxes."""
    found: dict[str, Build] = {}

    def add(name: str, fmt: str, options: dict[str, Any], *capabilities: int) -> None:
        for capability in capabilities or (90,):
            found[f"{fmt}-{name}-sm{capability}"] = partial(compiled_boxes, fmt, capability, **options)

    for fmt in KERNEL_FORMATS:
        add("default", fmt, {}, 80, 90)
        add("value", fmt, {"gradient": False}, 80, 90)
        add("each-weighted-strided", fmt, {"per_sample": True, "weight": torch.float32, "packed": False})
        add("float64", fmt, {"pred_dtype": torch.float64})
        add("half", fmt, {"pred_dtype": torch.float16, "target_dtype": torch.bfloat16})
        add("fixed", fmt, {"axis_grad": False})
        if fmt not in SPACE:
            for axis_weight in ("length", "soft"):
                add(axis_weight, fmt, {"axis_weight": axis_weight, "boundary": False})
                add(f"{axis_weight}-fixed-boundary", fmt, {"axis_weight": axis_weight, "axis_grad": False})
    for name, options in (("degrees", {"angle": "degrees"}), ("counter-clockwise", {"clockwise": False})):
        add(name, "cxcywhr", options)
        add(f"{name}-float64", "cxcywhr", {**options, "pred_dtype": torch.float64})
    add("degrees", "cxcyczlwhr", {"angle": "degrees"})
    return found


def pair_variants() -> dict[str, Build]:
    """The same of the kernels of matrices. "large" is a T that is a multiple of 4, and a gradient to many boxes."""
    found: dict[str, Build] = {}

    def add(name: str, options: dict[str, Any], *capabilities: int) -> None:
        for capability in capabilities or (90,):
            found[f"pairs-{name}-sm{capability}"] = partial(compiled_box_pairs, capability, **options)

    for kind, gradient in (("value", False), ("gradient", True)):
        for over in OVERS:
            for size, large in (("small", False), ("large", True)):
                add(f"cxcywhr-{over}-{size}-{kind}", {"over": over, "large": large, "gradient": gradient}, 80, 90)
        for fmt in PAIR_FORMATS[1:]:
            add(f"{fmt}-{kind}", {"fmt": fmt, "gradient": gradient})
        others: dict[str, dict[str, Any]] = {
            "masks": {"masks": True},
            "strided": {"packed": False},
            "soft": {"axis_weight": "soft"},
            "float64": {"dtype": torch.float64, "large": False},
        }
        for name, options in others.items():
            add(f"cxcywhr-{name}-{kind}", {**options, "gradient": gradient})
    for over in OVERS:
        for corners in (0, 4):
            name = f"pairs-polygons-{over}-{corners}-sm90"
            found[name] = partial(compiled_polygon_pairs, 90, over=over, corners=corners)
    return found


def keypoint_variants() -> dict[str, Build]:
    """The same of the kernel of keypoints."""
    found: dict[str, Build] = {}
    for size, capability in itertools.product((4, 64), (80, 90)):
        found[f"keypoints-{size}-sm{capability}"] = partial(compiled_keypoints, capability, size)
        name = f"keypoints-{size}-sigmas-weighted-sm{capability}"
        found[name] = partial(compiled_keypoints, capability, size, sigmas=True, weighted=True)
    found["keypoints-4-float64-sm90"] = partial(compiled_keypoints, 90, 4, torch.float64)
    return found


def variants() -> dict[str, Build]:
    """All of them."""
    return polygon_variants() | box_variants() | pair_variants() | keypoint_variants()


def without_names(ptx: str) -> str:
    """PTX without comments, debug information and names of symbols."""
    code = re.sub(r"//.*", "", ptx).split(".section")[0]
    lines = (line.strip() for line in code.splitlines())
    lines = (line for line in lines if line and not line.startswith((".loc", ".file", "$L__tmp", "$L__func")))
    symbols: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return symbols.setdefault(match[0], f"symbol_{len(symbols)}")

    names = r"\$L_\w+|\b[A-Za-z]\w*_param_\d+|\b[a-z]\w*_kernel\w*|\bglobal_smem\w*"
    return re.sub(names, number, "\n".join(lines)) + "\n"


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Machine instructions, those that do nothing left out; registers of a thread, and bytes of its local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([knobs.nvidia.nvdisasm.path, "-c"], [knobs.nvidia.cuobjdump.path, "--dump-resource-usage"])
        )
    found = re.search(r"REG:(\d+).*STACK:(\d+).*LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"expected registers, stack and local memory, got {usage!r}")
    registers, stack, local = map(int, found.groups())
    count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s*NOP)", code, re.MULTILINE))
    return count, registers, stack + local


def write(job: tuple[str, Path]) -> str:
    """Compile a variant and write its PTX; what it takes, in a line."""
    name, folder = job
    kernel = variants()[name]()
    (folder / f"{name}.ptx").write_text(without_names(kernel.asm["ptx"]))
    count, registers, local = resources(kernel.asm["cubin"])
    return f"{count:6} {registers:4} {local:5}  {name}\n"


def main(argv: list[str] | None = None) -> None:
    """Write every variant's PTX and what it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--only", default="", help="regular expression of the names of variants to compile")
    parser.add_argument("--processes", type=positive, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    try:
        names = [name for name in variants() if re.search(arguments.only, name)]
    except re.error as error:
        parser.error(f"argument --only: expected a regular expression, got {arguments.only!r}: {error}")
    if not names:
        parser.error(
            f"argument --only: no variant's name has {arguments.only!r} in it, as {next(iter(variants()))} has"
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.processes) as pool:
        lines = list(pool.map(write, [(name, arguments.folder) for name in names]))
    (arguments.folder / "resources.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
