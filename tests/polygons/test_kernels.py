"""The kernels as compiled for the GPUs that they are meant for, on a machine that has none."""

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from triton_mgiou import launch  # noqa: E402
from triton_mgiou.backends import triton_version  # noqa: E402
from triton_mgiou.kernels.polygons import mgiou_kernel  # noqa: E402
from triton_mgiou.tuning import layouts  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter replaces the kernels")

ANNOTATED = {name: text for name, text in mgiou_kernel.fn.__annotations__.items() if isinstance(text, str)}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
REAL = {None: None, torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*u8"}
TRAINING = [4, 8, 16, 32, 64]
DEFAULT = {
    "dtype": torch.float32,
    "pred_real": None,
    "target_real": None,
    "weight": False,
    "per_sample": False,
    "axis_weight": "uniform",
    "axis_grad": True,
    "convexity": False,
    "boundary": False,
    "need_grad": True,
    "adjacent": True,
    "packed": True,
    "even": True,
    "large_batch": False,
}
DEFAULT_LOSS = {"axis_weight": "length", "axis_grad": False, "boundary": True}
BOTH_TERMS = {"axis_weight": "length", "convexity": True, "boundary": True}


def plan_of(pred_size, target_size, **options):
    """The variant that a call with these options has on a GPU without tuned layouts."""
    options = DEFAULT | options
    dtype, weight = options.pop("dtype"), torch.float32 if options.pop("weight") else None
    options |= {"batch": options.pop("large_batch"), "gradient": options.pop("need_grad")}
    key = launch.PolygonKey(-1, dtype, dtype, pred_size, target_size, weight=weight, **options)
    return launch.polygon_plan(key)


def compiled(capability, pred_size, target_size, **options):
    """The kernel that a call with these options on a GPU of this capability would run."""
    options = DEFAULT | options
    dtype = options["dtype"]
    plan = plan_of(pred_size, target_size, **options)
    stored = "*" + NAMES[plan.dtype]
    pointers = {
        "pred_ptr": "*" + NAMES[dtype],
        "target_ptr": "*" + NAMES[dtype],
        "pred_real_ptr": REAL[options["pred_real"]],
        "target_real_ptr": REAL[options["target_real"]],
        "weight_ptr": stored if options["weight"] else None,
        "loss_ptr": stored,
        "grad_ptr": stored if options["need_grad"] else None,
        "partial_ptr": None if options["per_sample"] else stored,
        "counter_ptr": None if options["per_sample"] else "*i32",
    }
    names = mgiou_kernel.arg_names
    constants = dict(zip(names[-len(plan.constants) :], plan.constants, strict=True))
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    signature = {name: "constexpr" if name in constants else (pointers | ANNOTATED)[name] for name in names}
    aligned = [name for name in pointers if name not in constants]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(mgiou_kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=plan.layout.options())


def compiled_keypoints(capability, size, dtype=torch.float32, sigmas=False, weighted=False):
    """The kernel of `PolygonLoss`'s L2 term that a training step on such a GPU would run."""
    vertices = layouts.keypoints_of_tile(size)
    key = launch.KeypointKey(-1, dtype, sigmas, dtype if weighted else None, False, True, vertices)
    plan = launch.keypoint_plan(key)
    number = "*" + NAMES[dtype]
    pointers = dict.fromkeys(("pred_ptr", "target_ptr", "area_ptr", "loss_ptr", "grad_ptr", "partial_ptr"), number)
    pointers |= {"visible_ptr": "*u8", "counter_ptr": "*i32"}
    pointers |= {"sigmas_ptr": "*fp32"} if sigmas else {}
    pointers |= {"weight_ptr": number} if weighted else {}
    names = plan.kernel.arg_names
    constants = dict(zip(names[-len(plan.constants) :], plan.constants, strict=True))
    annotated = {name: text for name, text in plan.kernel.fn.__annotations__.items() if isinstance(text, str)}
    constants |= {name: None for name in names if name not in constants | pointers | annotated}
    signature = {name: "constexpr" if name in constants else (pointers | annotated)[name] for name in names}
    source = ASTSource(plan.kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=plan.layout.options())


def local_memory(kernel, path):
    """Bytes of stack and local memory that a thread uses, as the compiled code declares them."""
    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", TRAINING)
def test_kernels_for_training_do_not_spill(size, capability, tmp_path):
    assert local_memory(compiled(capability, size, size), tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize("size", [4, 64])
def test_the_kernel_of_keypoints_does_not_spill(size, tmp_path):
    assert local_memory(compiled_keypoints(90, size), tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize("size", TRAINING)
def test_kernels_for_the_default_loss_do_not_spill(size, tmp_path):
    assert local_memory(compiled(90, size, size, **DEFAULT_LOSS), tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize("size", [4, 8, 32])  # with 16 and 64 they do, and are faster than layouts that do not
def test_kernels_for_the_default_loss_and_lengths_do_not_spill(size, tmp_path):
    options = DEFAULT_LOSS | {"target_real": torch.int64}
    two_numbers = 8 if size == 8 and triton_version() == (3, 4) else 0  # for a third more programs at once
    assert local_memory(compiled(90, size, size, **options), tmp_path / "kernel.cubin") == two_numbers


@pytest.mark.parametrize(
    ("size", "options"),
    [(size, BOTH_TERMS) for size in (8, 16, 64)] + [(size, {"dtype": torch.float64}) for size in (8, 16, 32, 64, 128)],
)
def test_what_the_usual_layout_has_too_few_registers_for_has_another(size, options, monkeypatch, tmp_path):
    usual = layouts.candidates(size, size, False, 1, False)[:1]
    spilled = local_memory(compiled(90, size, size, **options), tmp_path / "kernel.cubin")
    monkeypatch.setattr(layouts, "candidates", lambda *_: usual)
    of_usual = local_memory(compiled(90, size, size, **options), tmp_path / "usual.cubin")
    if (size, triton_version()) == (32, (3, 6)):  # there both keep two numbers in memory
        assert spilled == of_usual == 8
    else:
        assert spilled < of_usual


@pytest.mark.parametrize("size", [128, 256, 512, 2048])
def test_compiles_for_many_vertices(size):
    assert compiled(90, size, size).asm["cubin"]


@pytest.mark.parametrize("sizes", [(4, 64), (64, 4), (8, 16), (1, 512)])
def test_compiles_for_different_vertex_counts(sizes):
    assert compiled(90, *sizes).asm["cubin"]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_compiles_for_large_batches(size):
    assert compiled(90, size, size, large_batch=True).asm["cubin"]


@pytest.mark.parametrize(
    "options",
    [{"dtype": dtype} for dtype in NAMES]
    + [{"pred_real": p, "target_real": g} for p, g in [(torch.int64, torch.bool), (torch.bool, torch.int32)]]
    + [
        {"axis_weight": weight, "axis_grad": grad, "convexity": convexity, "boundary": boundary}
        for weight, grad, convexity, boundary in [  # any two values of two options meet; the first and the fourth
            ("uniform", True, False, False),  # are the paper's and the default
            ("uniform", False, True, True),
            ("length", True, True, False),
            ("length", False, False, True),
            ("soft", True, True, True),
            ("soft", False, False, False),
        ]
    ]
    + [{"per_sample": True, "weight": True}, {"need_grad": False}, {"adjacent": False}, {"weight": True}],
    ids=str,
)
def test_compiles_every_flag(options):
    assert compiled(80, 8, 8, **options).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiler_fuses_nothing_by_itself(dtype):
    """What it fuses depends on the code around it, so that masks and lengths would give different bits."""
    options = {"axis_weight": "soft", "convexity": True, "boundary": True, "pred_real": torch.bool}
    code = compiled(90, 8, 8, dtype=dtype, **options).asm["ptx"]
    assert len(re.findall(r"\bfma\.rn\.f", code)) > 100
    assert not re.findall(r"\b(?:add|sub|mul)\.f\S*", code)


def test_a_bucket_is_compiled_once():
    """Whatever B, and whatever N inside a bucket, the compile-time arguments are the same."""
    for large in (False, True):
        flags = [plan_of(n, n, large_batch=large, even=n % 2 == 0).constants for n in range(3, 65)]
        assert len(set(flags)) == 14  # 3 and 4; then, up to each power of two, odd rows, even rows, and full ones
    assert layouts.bucket(1) == layouts.bucket(4) == 4
    assert layouts.bucket(5) == layouts.bucket(8) == 8
    assert layouts.bucket(513) == 1024


def test_stages_are_not_worth_searching(monkeypatch):
    options = layouts.Layout.options
    code = set()
    for stages in (1, 3):
        monkeypatch.setattr(layouts.Layout, "options", lambda self, n=stages: options(self) | {"num_stages": n})
        code.add(compiled(90, 4, 4, even=False, pred_real=torch.int64).asm["ptx"])
    assert len(code) == 1


def test_numbers_do_not_specialise_the_kernel():
    """Triton would compile anew for an integer that is 1 or a multiple of 16."""
    numbers = [p for p in mgiou_kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert len(numbers) == 15
    assert all(p.do_not_specialize or p.annotation_type == "fp64" for p in numbers)
