"""How a plan launches its kernel: by Triton's private launcher where that is known, by `kernel[grid]` elsewhere."""

import itertools
import math

import pytest
import torch

from tests.conftest import INTERPRETED
from tests.helpers import assert_same, generator, random_boxes, rectangle_corners

triton = pytest.importorskip("triton")

from triton_mgiou import box_mgiou, box_mgiou_loss, launch, mgiou_loss, pairs  # noqa: E402
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


def different_plans(plan_of, **values):
    """The plans of the first values of all arguments, and of each other value in its place."""
    first = {name: options[0] for name, options in values.items()}
    changed = [first | {name: other} for name, options in values.items() for other in options[1:]]
    plans = [plan_of(**each) for each in (first, *changed)]
    assert plan_of(**first) is plans[0]
    return len({id(plan) for plan in plans}) == len(plans)


FLAGS = {"axis_weight": ["uniform", "length", "soft"], "axis_grad": [True, False], "boundary_weight": [0.0, 0.25]}
WEIGHTS = [None, torch.ones(2), torch.ones(2, dtype=torch.float64)]
LENGTHS = [None, torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32), torch.ones(2, 4).bool()]


def of_types(shapes):
    return [shapes, shapes.double(), shapes.half(), shapes.bfloat16()]


def test_whatever_the_kernel_of_polygons_is_compiled_for_has_its_own_plan():
    """A launcher that is kept would take pointers to other types for those that it was made for."""

    def plan_of(pred, target, pred_real, target_real, weight, rule, gradient, **options):
        call = launch.PolygonCall(pred_real, target_real, Reduction(weight, rule, None), Options(**options))
        return launch.prepare_polygons(pred, target, call, gradient, 0)[0]

    pred = torch.zeros(2, 4, 2)
    sides = {"pred": [*of_types(pred), torch.zeros(2, 3, 2)], "target": [*of_types(pred), torch.zeros(2, 5, 2)]}
    real = {"pred_real": LENGTHS, "target_real": LENGTHS, "weight": WEIGHTS, "rule": ["mean", "none"]}
    flags = FLAGS | {"convexity_weight": [0.0, 0.1], "gradient": [True, False]}
    assert different_plans(plan_of, **sides, **real, **flags)


def test_whatever_the_kernel_of_boxes_is_compiled_for_has_its_own_plan():
    def plan_of(pred, target, weight, rule, gradient, fmt, angle, clockwise, **options):
        call = launch.BoxCall(fmt, angle, clockwise, Reduction(weight, rule, None), Options(**options))
        return launch.prepare_boxes(pred, target, call, gradient, 0)[0]

    sides = {"pred": of_types(torch.zeros(2, 4)), "target": of_types(torch.zeros(2, 4))}
    formats = {"fmt": ["cxcywh", "xyxy"], "angle": ["radians", "degrees"], "clockwise": [True, False]}
    call = {"weight": WEIGHTS, "rule": ["mean", "none"], "gradient": [True, False]}
    assert different_plans(plan_of, **sides, **formats, **call, **FLAGS)


def test_whatever_the_kernels_of_pairs_are_compiled_for_has_its_own_plan():
    def values_plan(first, second, mask1, mask2, *call):
        return pairs.prepare_values(first, second, mask1, mask2, pairs.BoxPairs(*call))[0]

    def gradient_plan(first, second, mask1, mask2, *call):
        upstream = torch.ones(first.shape[0], second.shape[0])
        return pairs.prepare_gradient(first, second, mask1, mask2, upstream, pairs.BoxPairs(*call))[0]

    def polygons_plan(first, second, lengths1, lengths2, mask1, mask2, over, axis_weight):
        call = pairs.PolygonPairs(lengths1, lengths2, mask1, mask2, over, axis_weight)
        return pairs.prepare_polygons(first, second, call)[0]

    mask = torch.ones(2, dtype=torch.bool)
    masks = {"mask1": [None, mask], "mask2": [None, mask]}
    over = {"over": ["mean", "min", "depth"], "axis_weight": ["uniform", "length", "soft"]}
    kind = {"fmt": ["cxcywh", "xyxy"], "angle": ["radians", "degrees"], "clockwise": [True, False]}
    apart = torch.zeros(2, 8)[:, ::2]  # numbers that do not follow each other
    sides = {"first": [*of_types(torch.zeros(2, 4)), apart], "second": [*of_types(torch.zeros(2, 4)), apart]}
    columns = {"second": [*sides["second"], torch.zeros(4, 4)]}  # rows of four numbers may be stored at once
    assert different_plans(lambda **each: values_plan(*each.values()), **sides | columns | masks | kind | over)
    assert different_plans(lambda **each: gradient_plan(*each.values()), **sides, **masks, **kind, **over)
    lengths = {"lengths1": LENGTHS[:3], "lengths2": LENGTHS[:3]}
    sides = {"first": of_types(torch.zeros(2, 4, 2)), "second": of_types(torch.zeros(2, 4, 2))}
    assert different_plans(polygons_plan, **sides, **lengths, **masks, **over)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("unlike", "packed"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(9)[1:].view(2, 4), True),
        (torch.zeros(6, 4)[::2], False),
        (torch.zeros(3, 8)[:, ::2], False),
        (torch.zeros(4, 3, 4)[:, :, 0].T, False),
    ],
    ids=["plain", "not aligned", "boxes apart", "numbers apart", "numbers far apart"],
)
def test_boxes_of_pairs_are_loaded_as_they_lie(side, unlike, packed):
    sides = [torch.zeros(3, 4), torch.zeros(3, 4)]
    sides[side] = unlike
    call = pairs.BoxPairs("cxcywh", "radians", True, "mean", "uniform")
    for plan, *_ in (
        pairs.prepare_values(*sides, None, None, call),
        pairs.prepare_gradient(*sides, None, None, torch.ones(len(sides[0]), len(sides[1])), call),
    ):
        assert f"PACKED{side + 1}={packed} " in plan.case + " "
        assert f"PACKED{2 - side}=True " in plan.case + " "


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("unlike", "packed"),
    [
        (torch.zeros(2, 4), True),
        (torch.zeros(12)[4:].view(2, 4), True),
        (torch.zeros(9)[1:].view(2, 4), False),  # begins in the middle of a word of four numbers
        (torch.zeros(2, 8)[:, ::2], False),
    ],
    ids=["plain", "aligned", "not aligned", "apart"],
)
def test_boxes_are_loaded_as_words_only_where_both_sides_are_aligned(side, unlike, packed):
    sides = [torch.zeros(2, 4), torch.zeros(2, 4)]
    sides[side] = unlike
    call = launch.BoxCall("cxcywh", "radians", True, Reduction(None, "mean", None), Options("uniform"))
    plan, *_ = launch.prepare_boxes(*sides, call, True, 0)
    assert f"PACKED={packed}" in plan.case


@pytest.mark.parametrize("odd", [None, 0, 1])
def test_two_vertices_are_one_load_only_where_rows_of_both_sides_are_even(odd):
    """Rows of a larger tensor of an odd number of vertices begin in the middle of a load of two."""
    sides = [torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)]
    if odd is not None:
        sides[odd] = torch.zeros(2, 5, 2)[:, :4]
    call = launch.PolygonCall(None, None, Reduction(None, "mean", None), Options())
    plan, *_ = launch.prepare_polygons(*sides, call, True, 0)
    assert f"EVEN={odd is None}" in plan.case


ROWS = torch.zeros(2, 4, 2)


@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        (ROWS, ROWS, "TARGET_REAL=3 ADJACENT=True EVEN=True"),
        (torch.zeros(2, 6, 2)[:, :4], ROWS, "TARGET_REAL=0 ADJACENT=True EVEN=True"),  # rows apart: not packed
        (ROWS, torch.zeros(2, 6, 2)[:, :4], "TARGET_REAL=0 ADJACENT=True EVEN=True"),
        (torch.zeros(2, 4, 2)[:, :3], ROWS, "TARGET_REAL=0 ADJACENT=True EVEN=False"),  # its gradient has odd rows
        (ROWS, torch.zeros(2, 4, 2)[:, :3], "TARGET_REAL=0 ADJACENT=True EVEN=True"),
        (torch.zeros(2, 8, 2)[:, ::2], ROWS, "TARGET_REAL=0 ADJACENT=False EVEN=False"),
        (ROWS, torch.zeros(2, 8, 2)[:, ::2], "TARGET_REAL=0 ADJACENT=False EVEN=False"),
    ],
)
def test_polygons_are_loaded_as_they_lie(pred, target, expected):
    call = launch.PolygonCall(None, None, Reduction(None, "mean", None), Options())
    plan, *_ = launch.prepare_polygons(pred, target, call, True, 0)
    assert expected in plan.case


def layouts_of(shape, rng):
    """Tensors of this shape in many layouts of memory."""
    wide = [2 * n + 1 for n in shape]
    yield torch.rand(shape, generator=rng)
    yield torch.rand(wide, generator=rng)[tuple(slice(1, None, 2) for _ in shape)]
    yield torch.rand(shape[0], *wide[1:-1], shape[-1], generator=rng)[:, : shape[1]]
    yield torch.rand(shape[0] + 1, *shape[1:], generator=rng)[1:]
    yield torch.rand(shape[::-1], generator=rng).permute(*range(len(shape))[::-1])
    yield torch.rand(shape[1:], generator=rng).expand(shape)
    yield torch.rand(math.prod(shape) + 1, generator=rng)[1:].view(shape)  # not aligned
    yield torch.rand([2 * n for n in shape], generator=rng)[tuple(slice(None, None, 2) for _ in shape)]
    yield torch.rand(shape[0], math.prod(shape[1:]) + 1, generator=rng)[:, :-1].unflatten(1, shape[1:])
    if len(shape) == 3:
        yield torch.rand(shape[0], 2 * shape[1], shape[2] + 1, generator=rng)[:, : shape[1], : shape[2]]
        yield torch.rand(shape[0], 2 * shape[1], shape[2], generator=rng)[:, ::2]


def assert_lies_at(memory, strides, expected):
    """Whether a kernel finds `expected` from where a tensor begins, by these strides; 0 over a batch that is not."""
    missing = len(strides) - expected.dim()
    assert not any(strides[:missing])
    places = memory.as_strided((memory.untyped_storage().nbytes() // memory.itemsize - memory.storage_offset(),), (1,))
    index = sum(
        torch.arange(n).view(-1, *[1] * (expected.dim() - 1 - k)) * stride
        for k, (n, stride) in enumerate(zip(expected.shape, strides[missing:], strict=True))
    )
    assert_same(places[index], expected)


def test_the_kernel_of_polygons_finds_every_number():
    rng = generator(0)
    counts = (9 * torch.rand(3, 4, generator=rng)).int()
    marks = torch.rand(3, 10, generator=rng) > 0.5
    reals = itertools.cycle(
        [(counts[:, 0], counts[:, 3]), (marks[:, :5], marks[:, 1::2][:, :4]), (marks[:, ::2], counts[0, :3])]
    )
    for first, second in itertools.product(layouts_of((3, 5, 2), rng), layouts_of((3, 4, 2), rng)):
        weight, given = torch.rand(3, 2, generator=rng)[:, 1], next(reals)
        call = launch.PolygonCall(*given, Reduction(weight, "mean", 7.0), Options())
        _, arguments, *_ = launch.prepare_polygons(first, second, call, True, 0)
        (*pointers, loss, grad, _, _), strides = arguments[:9], arguments[9:18]
        for k, (side, real) in enumerate(zip((first, second), given, strict=True)):
            assert pointers[k].data_ptr() % 16 == 0
            assert_lies_at(pointers[k], (2 * strides[2 * k], 2 * strides[2 * k + 1], 1), side)
            is_mask = real.dtype == torch.bool
            expected = real.to(torch.uint8) if is_mask else real
            assert_lies_at(pointers[2 + k], strides[4 + 2 * k : 6 + 2 * k][: real.dim()], expected)
        assert_lies_at(pointers[4], strides[8:], weight)
        assert loss.shape == ()
        assert grad.shape == first.shape
        assert grad.is_contiguous()
        assert arguments[18:21] == (3, 5, 4)


def test_what_reaches_further_than_32_bits_tell_is_copied(tmp_path):
    """Vertices and marks that lie far apart, in a file without contents."""

    def far_apart(shape, dtype):
        step = 2**30
        size = step * shape[1] * dtype.itemsize
        storage = torch.UntypedStorage.from_file(str(tmp_path / str(dtype)), shared=True, nbytes=size)
        flat = torch.empty(0, dtype=dtype).set_(storage)
        return flat.as_strided(shape, (2, step, 1)[: len(shape)])

    polygons, mask, near = far_apart((3, 4, 2), torch.float16), far_apart((3, 4), torch.bool), torch.zeros(3, 4, 2)
    for sides, reals in (((polygons, near), (mask, None)), ((near, polygons), (None, mask))):
        call = launch.PolygonCall(*reals, Reduction(None, "mean", None), Options())
        _, arguments, *_ = launch.prepare_polygons(*sides, call, True, 0)
        assert all(4 * stride < 2**31 for stride in arguments[9:17])


@pytest.mark.parametrize(("rule", "divisor", "expected"), [("mean", None, 3), ("sum", None, 1), ("sum", 0.5, 0.5)])
def test_the_kernels_divide_the_sum(rule, divisor, expected):
    polygons, boxes, reduction = torch.zeros(3, 4, 2), torch.zeros(3, 5), Reduction(None, rule, divisor)
    call = launch.PolygonCall(None, None, reduction, Options(convexity_weight=0.5, boundary_weight=2))
    assert launch.prepare_polygons(polygons, polygons, call, True, 0)[1][-3:] == (expected, 0.5, 2.0)
    call = launch.BoxCall("cxcywhr", "radians", True, reduction, Options(boundary_weight=2))
    assert launch.prepare_boxes(boxes, boxes, call, True, 0)[1][-3:] == (3, expected, 2.0)


@pytest.mark.parametrize(("fmt", "shape"), [("cxcywhr", (3, 5)), ("corners3d", (3, 8, 3))])
def test_the_kernel_of_boxes_finds_every_number(fmt, shape):
    rng = generator(1)
    for first, second in itertools.product(layouts_of(shape, rng), repeat=2):
        weight = next(layouts_of((3, 2), rng))[:, 1]
        options = Options("uniform", boundary_weight=0.0)
        call = launch.BoxCall(fmt, "radians", True, Reduction(weight, "none", None), options)
        _, arguments, loss, grad = launch.prepare_boxes(first, second, call, True, 0)
        strides = arguments[7:14]
        assert_lies_at(arguments[0], strides[: len(shape)], first)
        assert_lies_at(arguments[1], strides[3 : 3 + len(shape)], second)
        assert_lies_at(arguments[2], strides[6:], weight)
        assert loss.shape == (3,)
        assert grad.shape == shape
        assert grad.is_contiguous()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_kernels_of_pairs_find_every_number(batch):
    """Strides over the batch, which are 0 where there is none, shapes and numbers."""
    rng = generator(2)
    call = pairs.BoxPairs("cxcywh", "radians", True, "mean", "uniform")
    masks = [each > 0.5 for n in (3, 6) for each in [next(layouts_of((2, n), rng))]]
    mask1, mask2 = (each if batch else each[0] for each in masks)
    for first, second in zip(layouts_of((*batch, 3, 4), rng), layouts_of((*batch, 6, 4), rng), strict=True):
        _, [one], matrix = pairs.prepare_values(first, second, mask1, mask2, call)
        upstream = torch.rand(*batch, 6, 3, generator=rng).transpose(-1, -2)
        _, [other], grad = pairs.prepare_gradient(first, second, mask1, mask2, upstream, call)
        for launched in (one, other):
            assert launched.size == (*(batch or (1,)), 3, 6)
            strides = launched.arguments[5 + (launched is other) :]
            assert_lies_at(launched.arguments[0], strides[:3], first)
            assert_lies_at(launched.arguments[1], strides[3:6], second)
            assert_lies_at(launched.arguments[2], strides[6:8], mask1.to(torch.uint8))
            assert_lies_at(launched.arguments[3], strides[8:10], mask2.to(torch.uint8))
        assert_lies_at(other.arguments[4], other.arguments[16:19], upstream)
        assert one.arguments[-2:] == other.arguments[-3:-1] == (3, 6)
        assert matrix.shape == (*batch, 3, 6)
        assert grad.shape == first.shape
        assert matrix.is_contiguous()
        assert grad.is_contiguous()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_kernel_of_pairs_of_polygons_finds_every_number(batch):
    rng = generator(3)

    def sets(number):
        values = next(layouts_of((2, number, 2), rng))[..., 1]
        return values if batch else values[0]

    for k in range(2):
        shapes = [torch.rand(*batch, n, 2, size, generator=rng).transpose(-1, -2) for n, size in ((3, 5), (6, 4))]
        lengths = [(5 * sets(n)).int() for n in (3, 6)]
        masks = [sets(n) > 0.5 for n in (3, 6)] if k else [None, None]
        call = pairs.PolygonPairs(*lengths, *masks, "mean", "uniform")
        _, [launched], matrix = pairs.prepare_polygons(*shapes, call)
        strides = launched.arguments[7:]
        for side in range(2):
            assert_lies_at(launched.arguments[side], strides[4 * side : 4 * side + 4], shapes[side])
            assert_lies_at(launched.arguments[2 + side], strides[8 + 2 * side : 10 + 2 * side], lengths[side])
            if masks[side] is not None:
                expected = masks[side].to(torch.uint8)
                assert_lies_at(launched.arguments[4 + side], strides[12 + 2 * side : 14 + 2 * side], expected)
        assert launched.arguments[-4:] == (5, 4, 3, 6)
        assert matrix.shape == (*batch, 3, 6)


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
