"""The kernel of boxes as compiled for the GPUs that it is meant for, on a machine that has none."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tests.boxes.helpers import CLOSED, SPACE  # noqa: E402
from tests.polygons.test_kernels import local_memory  # noqa: E402
from triton_mgiou import launch  # noqa: E402
from triton_mgiou.kernels.boxes import box_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter replaces the kernels")

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
ANNOTATED = {name: text for name, text in box_kernel.fn.__annotations__.items() if isinstance(text, str)}


def compiled(fmt, capability=90, **options):
    """The kernel that a call with these options on a GPU of this capability would run."""
    given = {
        "device": -1, "pred_dtype": torch.float32, "target_dtype": torch.float32, "angle": "radians",
        "clockwise": True, "weight": None, "per_sample": False, "axis_weight": "uniform", "axis_grad": True,
        "boundary": fmt not in SPACE, "gradient": True, "packed": True,
    } | options  # fmt: skip
    plan = launch.box_plan(launch.BoxKey(fmt=fmt, **given))
    stored = "*" + NAMES[plan.dtype]
    pointers = {
        "pred_ptr": "*" + NAMES[given["pred_dtype"]],
        "target_ptr": "*" + NAMES[given["target_dtype"]],
        "weight_ptr": None if given["weight"] is None else stored,
        "loss_ptr": stored,
        "grad_ptr": stored if given["gradient"] else None,
        "partial_ptr": None if given["per_sample"] else stored,
        "counter_ptr": None if given["per_sample"] else "*i32",
    }
    names = box_kernel.arg_names
    constants = dict(zip(names[-len(plan.constants) :], plan.constants, strict=True))
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    signature = {name: "constexpr" if name in constants else (pointers | ANNOTATED)[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers if name not in constants}
    source = ASTSource(box_kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=plan.layout.options())


def vectors(kernel, kind):
    """How many accesses of four numbers the code has, and how many of one."""
    code = kernel.asm["ptx"]
    return len(re.findall(rf"{kind}\.global\S*\.v4", code)), len(re.findall(rf"{kind}\.global(?!\S*\.v)", code))


@pytest.mark.parametrize("fmt", [*CLOSED, "corners3d"])
def test_a_training_step_does_not_spill(fmt, tmp_path):
    assert local_memory(compiled(fmt), tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize(("fmt", "number", "ways"), [("xyxy", 1, 2), ("corners3d", 6, 1)])
def test_boxes_that_fill_vectors_are_loaded_and_stored_as_such(fmt, number, ways):
    """`ways`: blocks of plain boxes are stored apart from others."""
    kernel = compiled(fmt)
    assert vectors(kernel, "ld")[0] == 2 * number
    assert vectors(kernel, "st")[0] == ways * number
    assert vectors(compiled(fmt, packed=False), "ld")[0] == 0


@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr"])
def test_neighbouring_threads_store_neighbouring_numbers(fmt):
    """A warp writes four whole boxes at a time, not one number of 32 each."""
    code = compiled(fmt).asm["ttgir"]
    (layout,) = set(re.findall(r"tt\.store .*: tensor<8x64x!tt\.ptr<f32>, (#\w+)>", code))
    assert f"{layout} = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = [1, 32]," in code


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("cxcywhr", {"axis_weight": "soft", "angle": "degrees", "clockwise": False, "weight": torch.float32}),
        ("cxcywhr", {"axis_weight": "length", "axis_grad": False, "per_sample": True}),
        ("cxcywhr", {"pred_dtype": torch.float64}),
        ("xyxy", {"pred_dtype": torch.float16, "target_dtype": torch.bfloat16, "gradient": False}),
        ("corners3d", {"axis_grad": False, "packed": False}),
    ],
    ids=str,
)
def test_compiles_every_flag(fmt, options):
    assert compiled(fmt, 80, **options).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiler_fuses_nothing_by_itself(dtype):
    """What it fuses depends on the code around it, so that strides would give different bits."""
    code = compiled("cxcywhr", pred_dtype=dtype, axis_weight="soft").asm["ptx"]
    assert len(re.findall(r"\bfma\.rn\.f", code)) > 50
    assert not re.findall(r"\b(?:add|sub|mul)\.f\S*", code)


def test_numbers_do_not_specialise_the_kernel():
    """Triton would compile anew for an integer that is 1 or a multiple of 16."""
    numbers = [p for p in box_kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert all(p.do_not_specialize or p.annotation_type == "fp64" for p in numbers)
