"""How a plan launches its kernel: by Triton's private launcher where that is known, by `kernel[grid]` elsewhere."""

import pytest
import torch

from tests.conftest import INTERPRETED
from tests.helpers import assert_same, generator, random_boxes, rectangle_corners

triton = pytest.importorskip("triton")

from triton_mgiou import box_mgiou, box_mgiou_loss, launch, mgiou_loss  # noqa: E402
from triton_mgiou.options import Options, Reduction  # noqa: E402
from triton_mgiou.tuning import layouts  # noqa: E402

LAYOUT = layouts.Layout(4, 1, 2, 2, 2, 1, 168)


class Compiled:
    """In the place of a compiled kernel, whose launcher has some parameters."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launched, parameters):
        names = ", ".join(parameters)
        record = "[gridX, gridY, gridZ, stream, function, *args]" if "gridX" in parameters else "[]"
        known = "kernel_metadata" in names
        between = "kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, " if known else ""
        record = record.replace("*args", f"{between}*args")
        self.run = eval(f"lambda {names}: launched.append({record})", {"launched": launched})


class Kernel:
    def __init__(self, parameters):
        self.by_grid, self.by_launcher = [], []
        self.compiled = Compiled(self.by_launcher, parameters)

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.by_grid.append((grid, arguments, options)) or self.compiled


def launched(parameters):
    kernel = Kernel(parameters)
    plan = launch.Plan(kernel, ("FLAG",), "case", [LAYOUT], torch.float32, -1)
    for stream in range(2):
        plan.launch(9, stream, ("argument",))
    return kernel


ARGUMENTS = ("argument", "FLAG", 4, 1, 2, 2, 2)
BY_GRID = ((3, 1, 1), ARGUMENTS, {"num_warps": 1, "maxnreg": 168, "enable_fp_fusion": False})
OLD = ("gridX", "gridY", "gridZ", "stream", "function", "*args")
NEW = (
    *("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata"),
    *("launch_metadata", "launch_enter_hook", "launch_exit_hook", "*args"),
)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("parameters", [OLD, NEW], ids=["3.6", "3.9"])
def test_a_known_launcher_is_used_from_the_second_launch_on(parameters):
    kernel = launched(parameters)
    assert kernel.by_grid == [BY_GRID]
    assert kernel.by_launcher == [[3, 1, 1, 1, "function", "metadata", None, None, None, *ARGUMENTS]]


@pytest.mark.parametrize("parameters", [("*args",), ("gridX", "gridY", "gridZ", "stream", "cluster", "*args"), NEW[1:]])
def test_an_unknown_launcher_is_not(parameters):
    kernel = launched(parameters)
    assert kernel.by_grid == [BY_GRID, BY_GRID]
    assert kernel.by_launcher == []


@pytest.mark.parametrize("attribute", ["run", "function", "packed_metadata"])
def test_a_compiled_kernel_without_an_attribute(attribute):
    class Other:
        function, packed_metadata, run = "function", "metadata", staticmethod(print)

    delattr(Other, attribute)
    assert launch.private_launcher(Other()) is None


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_are_called(hook, monkeypatch):
    """They are called by Triton's own launch, not by its private launcher."""
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda *_: None)
    kernel = launched(NEW)
    assert kernel.by_grid == [BY_GRID, BY_GRID]


@pytest.mark.skipif(INTERPRETED, reason="Triton has no launcher")
def test_tritons_launcher_is_one_that_is_known():
    """Of the version that is installed; if not, each launch takes a few microseconds more than it needs."""
    from triton.backends.nvidia.driver import CudaLauncher  # noqa: PLC0415

    class Installed:
        function, packed_metadata, run = "function", "metadata", CudaLauncher.__new__(CudaLauncher)

    assert launch.private_launcher(Installed())[0] is Installed.run


def test_a_plan_is_made_once_for_each_variant():
    pred = torch.zeros(2, 4, 2)
    call = launch.PolygonCall(None, None, Reduction(None, "mean", None), Options())
    first, *_ = launch.prepare_polygons(pred, pred, call, True, 0)
    second, *_ = launch.prepare_polygons(pred, pred, call, True, 0)
    value, *_ = launch.prepare_polygons(pred, pred, call, False, 0)
    assert first is second
    assert value is not first


@pytest.mark.parametrize("odd", [None, 0, 1])
def test_two_vertices_are_one_load_only_where_rows_of_both_sides_are_even(odd):
    """Rows of a larger tensor of an odd number of vertices begin in the middle of a load of two."""
    sides = [torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)]
    if odd is not None:
        sides[odd] = torch.zeros(2, 5, 2)[:, :4]
    call = launch.PolygonCall(None, None, Reduction(None, "mean", None), Options())
    plan, *_ = launch.prepare_polygons(*sides, call, True, 0)
    assert f"EVEN={odd is None}" in plan.case


def test_a_plan_keeps_no_memory_of_a_device():
    plan = launch.Plan(Kernel(NEW), ("FLAG",), "case", [LAYOUT], torch.float32, -1)
    assert plan.scalar.untyped_storage().nbytes() == 0
    assert torch.empty_like(plan.scalar).fill_(2.0).item() == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss, box_mgiou])
def test_compiled_to_cuda_graphs(function, monkeypatch):
    """The first launch of all is in the compiler's warm-up, after which it refuses what it finds left in its pool."""
    monkeypatch.setattr(launch, "_scratch", {})
    monkeypatch.setattr(launch, "_zeros", {})
    launch.forget_plans()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)
    rng = generator(0)
    for _ in range(4):  # a warm-up, a record, two replays
        for batch in (300, 500):
            boxes = random_boxes(2 * batch, rng).float()
            if function is mgiou_loss:
                boxes = rectangle_corners(boxes)
            first, second = boxes.to("cuda").split(batch)
            first.requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            value = compiled(first, second)
            (gradient,) = torch.autograd.grad(value.sum(), first)
            expected = function(first, second, backend="triton")
            assert_same(value.detach(), expected.detach())
            assert_same(gradient, torch.autograd.grad(expected.sum(), first)[0], "gradient")
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["cudagraph_recorded_non_static_inputs"] > 0
    assert counters["cudagraph_skips"] == 0


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
def test_triton_cpu_more_samples_than_a_kernel_counts_are_refused():
    """With a batch of 2^31 a launcher would hand -2^31 to the kernel, which does nothing then."""
    box, polygon = torch.zeros(1, 5).expand(2**31, 5), torch.zeros(1, 4, 2).expand(2**31, 4, 2)
    for loss, shapes in ((box_mgiou_loss, box), (mgiou_loss, polygon)):
        with pytest.raises(ValueError, match=r"pred must have at most 2147479552 samples.*got 2147483648"):
            loss(shapes, shapes, backend="triton")
