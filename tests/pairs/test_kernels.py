"""The kernels of pairs as compiled for the GPUs that they are meant for, on a machine that has none."""

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tests.polygons.test_kernels import local_memory  # noqa: E402
from triton_mgiou import launch, pairs  # noqa: E402
from triton_mgiou.backends import triton_version  # noqa: E402
from triton_mgiou.kernels.polygon_pairs import polygon_pairs_kernel  # noqa: E402
from triton_mgiou.options import OVERS  # noqa: E402
from triton_mgiou.tuning import layouts  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter replaces the kernels")

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16"}


def compiled(kernel, capability, constants, layout, pointers, masks):
    names = kernel.arg_names
    constants = constants | layout.sizes()
    written = {name: text for name, text in kernel.fn.__annotations__.items() if isinstance(text, str)}
    kinds = {name: pointers for name in names if name.endswith("_ptr")} | written
    for name in names:
        if name.endswith("_ptr") and ("mask" in name or "lengths" in name):
            kinds[name] = "*u8" if "mask" in name else "*i64"
            if not masks:
                constants[name] = None
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = [name for name in ("matrix_ptr", "grad_ptr") if name in names]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=layout.options())


def box_kernel(capability, *, fmt="cxcywhr", over="mean", axis_weight="uniform", dtype=torch.float32, gradient=False,
               masks=False, packed=True, large=True):  # fmt: skip
    call = pairs.BoxPairs(fmt, "radians", True, over, axis_weight)
    key = pairs.PairKey(-1, dtype, dtype, call, masks, masks, packed, packed, gradient, large and not gradient, large)
    plan = pairs.pair_plan(key)
    names = plan.kernel.arg_names
    constants = dict(zip(names[names.index("COMPUTE") :], plan.flags, strict=False))
    return compiled(plan.kernel, capability, constants, plan.layout, POINTERS[dtype], masks)


def polygon_kernel(capability, *, over, corners):
    (layout, *_) = layouts.polygon_pair_candidates(corners, False)
    constants = {
        "COMPUTE": triton.language.float32,
        "OVER": OVERS.index(over),
        "AXIS_WEIGHT": 0,
        "CORNERS": corners,
    }
    return compiled(polygon_pairs_kernel, capability, constants, layout, "*fp32", True)


@pytest.mark.skipif(triton_version() < (3, 6), reason="the assembler of Triton 3.4 takes 8 bytes of stack")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_rotated_boxes_do_not_spill(capability, gradient, tmp_path):
    for large in (False, True):
        kernel = box_kernel(capability, gradient=gradient, large=large)
        assert local_memory(kernel, tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize(
    "options",
    [
        {"over": "min"},
        {"over": "depth", "masks": True},
        {"fmt": "xyxy", "axis_weight": "soft"},
        {"fmt": "cxcywh", "axis_weight": "length", "packed": False},
        {"fmt": "cxcyczlwhr", "dtype": torch.float16},
        {"dtype": torch.float64, "large": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", [False, True])
def test_other_variants_compile(options, gradient):
    assert "cubin" in box_kernel(90, gradient=gradient, **options).asm


@pytest.mark.parametrize("corners", [0, 4])
@pytest.mark.parametrize("over", OVERS)
def test_kernels_of_polygons_do_not_spill(over, corners, tmp_path):
    kernel = polygon_kernel(90, over=over, corners=corners)
    assert local_memory(kernel, tmp_path / "kernel.cubin") == 0
