"""What only a GPU can show of the kernels."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from tests.helpers import assert_close, assert_gradient_close, assert_same, convex, generator, star
from triton_mgiou import PAPER, mgiou_loss, warmup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"),
]


def polygons(batch, size, seed=0, device="cuda"):
    rng = generator(seed)
    return star(batch, size, rng).float().to(device), convex(batch, size, rng).float().to(device)


def value_and_gradient(pred, target, **options):
    pred = pred.detach().requires_grad_()
    loss = mgiou_loss(pred, target, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), pred)


def test_auto_is_the_kernel(monkeypatch):
    from triton_mgiou.launch import PolygonCall  # noqa: PLC0415

    pred, target = polygons(8, 4)
    expected = value_and_gradient(pred, target, backend="triton")
    launches = []
    original = PolygonCall.launch
    monkeypatch.setattr(PolygonCall, "launch", lambda *arguments: launches.append(1) or original(*arguments))
    actual = value_and_gradient(pred, target)
    assert launches == [1]
    for got, want in zip(actual, expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize(
    ("batch", "size"), [(512, 4), (512, 8), (100_000, 8), (40_000, 16), (1_000, 64), (5_000, 64), (300, 128)]
)
def test_the_same_bits_on_every_run(batch, size):
    pred, target = polygons(batch, size)
    expected = value_and_gradient(pred, target, backend="triton")
    for _ in range(100):
        for got, want in zip(value_and_gradient(pred, target, backend="triton"), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("options", [PAPER, {}], ids=["paper", "defaults"])
@pytest.mark.parametrize(
    ("batch", "size"),
    [
        *((40_000, 4), (40_000, 8), (40_000, 16), (33_000, 32), (33_000, 64), (300, 512)),  # large batches
        *((5000, 4), (5000, 8), (3000, 16), (3000, 32), (1500, 64), (500, 128), (100, 256), (50, 512)),
    ],
)
def test_every_layout_against_float64(batch, size, options):
    """Near-ties that rounding decides the other way move a gradient: in few samples, as in PyTorch's float32."""
    rng = generator(size)
    pred, target = convex(batch, size, rng).float().cuda(), convex(batch, size, rng).float().cuda()
    exact = value_and_gradient(pred.double(), target.double(), backend="eager", reduction="none", **options)
    median, wrong = {}, {}
    for backend in ("triton", "eager"):
        value, gradient = value_and_gradient(pred, target, backend=backend, reduction="none", **options)
        assert_close(value, exact[0], atol=1e-6)
        error = (gradient - exact[1]).flatten(1).norm(dim=1) / exact[1].flatten(1).norm(dim=1)
        median[backend] = error.median().item()
        wrong[backend] = (error > 1e-4).double().mean().item()
    assert median["triton"] <= 1.5 * median["eager"] + 1e-6
    assert wrong["triton"] <= 1.5 * wrong["eager"] + 1e-3


def test_streams_do_not_disturb_each_other():
    inputs = [polygons(60_000, 8, seed) for seed in range(4)]
    expected = [value_and_gradient(*each, backend="triton") for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[] for _ in inputs]
    for _ in range(20):
        for stream, each, result in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(value_and_gradient(*each, backend="triton"))
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        for got in result:
            assert_same(got[0], want[0])
            assert_same(got[1], want[1])


def test_graphs_replay_at_the_same_time_on_two_streams():
    inputs = [polygons(60_000, 8, seed) for seed in range(2)]
    expected = [value_and_gradient(*each, backend="triton") for each in inputs]
    graphs, outputs = [], []
    for pred, target in inputs:
        leaf = pred.detach().requires_grad_()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            loss = mgiou_loss(leaf, target, backend="triton")
            outputs.append((loss, *torch.autograd.grad(loss, leaf)))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for output in outputs:
            for tensor in output:
                tensor.detach().fill_(torch.nan)
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for output, want in zip(outputs, expected, strict=True):
            assert_same(output[0].detach(), want[0])
            assert_same(output[1], want[1])


def test_more_than_2_to_the_31_elements():
    batch, size = 2**26 + 1000, 16
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tail = 40_000  # large enough for the layout of a large batch
    few, target = polygons(tail, size)
    pred = few.half()[:1].expand(batch, size, 2).contiguous()
    pred[-tail:] = few.half()
    assert pred.numel() > 2**31
    target_row = target[:1].expand(batch, size, 2)  # stride 0 over the batch
    value, gradient = value_and_gradient(pred, target_row, backend="triton", reduction="none")
    expected = value_and_gradient(pred[-tail:], target_row[-tail:], backend="triton", reduction="none")
    assert_same(value[-tail:], expected[0])
    assert_same(gradient[-tail:], expected[1])
    assert (value[:-tail] == value[0]).all()
    assert (gradient[:-tail] == gradient[0]).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    expected = value_and_gradient(*polygons(1000, 8), backend="triton")
    for _ in range(2):
        assert torch.cuda.current_device() == 0
        actual = value_and_gradient(*polygons(1000, 8, device="cuda:1"), backend="triton")
        assert all(tensor.device.index == 1 for tensor in actual)
        assert_same(actual[0].to(0), expected[0])
        assert_same(actual[1].to(0), expected[1])


def test_one_kernel_for_each_bucket():
    from triton_mgiou import launch  # noqa: PLC0415

    launch.forget_plans()
    for size in range(3, 65):
        pred, target = polygons(70, size)
        for batch in (1, 2, 3, 16, 17, 31, 32, 33, 64, 70):
            value_and_gradient(pred[:batch], target[:batch], backend="triton")
    pred, target = polygons(5000, 8)
    for batch in range(1, 5001, 7):
        value_and_gradient(pred[:batch], target[:batch], backend="triton")
    compiled = {id(plan.compiled) for plan in launch._plans.values()}
    assert len(compiled) == 14  # 3 and 4; then, up to each power of two, odd, even, full


def test_memory_is_the_gradient_and_a_few_bytes_a_sample():
    pred, target = polygons(1, 8)
    batch = 2**20
    pred = pred.expand(batch, 8, 2).contiguous().requires_grad_()
    target = target.expand(batch, 8, 2).contiguous()

    def value():
        mgiou_loss(pred.detach(), target, backend="triton")

    def step():
        torch.autograd.grad(mgiou_loss(pred, target, backend="triton"), pred)

    for call, most in ((value, 8 * batch), (step, pred.numel() * 4 + 8 * batch), (value, 8 * batch)):
        call()  # compiles, and allocates what is kept for the next call
        torch.cuda.synchronize()
        before = settled_memory()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= most, f"{call.__name__} takes {peak} bytes at its peak, {most} are allowed"
        left = settled_memory() - before
        assert left == 0, f"{call.__name__} leaves {left} bytes behind; a gradient has {pred.numel() * 4}"


def settled_memory():
    """Bytes in use, once the threads of a backward pass have let go of theirs: they do so after it returns."""
    least, unchanged = torch.cuda.memory_allocated(), 0
    while unchanged < 20:
        time.sleep(0.01)
        now = torch.cuda.memory_allocated()
        least, unchanged = min(least, now), 0 if now < least else unchanged + 1
    return now


def test_accuracy_does_not_depend_on_what_the_compiler_fuses(monkeypatch):
    from triton_mgiou import launch  # noqa: PLC0415
    from triton_mgiou.tuning import layouts  # noqa: PLC0415

    options = layouts.Layout.options
    monkeypatch.setattr(layouts.Layout, "options", lambda self: options(self) | {"enable_fp_fusion": True})
    monkeypatch.setattr(launch, "_plans", {})
    rng = generator(3)
    pred, target = convex(500, 6, rng).float().cuda(), convex(500, 5, rng).float().cuda()
    for axis_weight in ("uniform", "length", "soft"):
        given = {"axis_weight": axis_weight, "axis_grad": True, "convexity_weight": 1.0, "boundary_weight": 1.0}
        given["reduction"] = "none"
        value, gradient = value_and_gradient(pred, target, backend="triton", **given)
        exact = value_and_gradient(pred.double(), target.double(), backend="eager", **given)
        assert_close(value, exact[0], atol=1e-6)
        assert_gradient_close(gradient, exact[1], rtol=1e-4)
        zero = value_and_gradient(target, target, backend="triton", **given)
        assert not zero[0].any()
        assert not zero[1].any()


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """An empty cache of layouts, and few of them to measure."""
    from triton_mgiou import launch  # noqa: PLC0415
    from triton_mgiou.tuning import layouts, measure, store  # noqa: PLC0415

    monkeypatch.setenv("TRITON_MGIOU_CACHE_DIR", str(tmp_path))
    few = {(4, large): (layouts.SearchSpace((2, 4), (1,), (1,), (1,), (168,)),) for large in (False, True)}
    monkeypatch.setattr(layouts, "SEARCH", few)
    store.tuning_cache.cache_clear()
    launch.forget_plans()
    yield measure
    store.tuning_cache.cache_clear()
    launch.forget_plans()


def fail(*_):
    raise AssertionError("measured")


def test_nothing_is_compiled_or_measured_after_a_warm_up(tuner, monkeypatch):
    from triton_mgiou.kernels.polygons import mgiou_kernel  # noqa: PLC0415
    from triton_mgiou.tuning import store  # noqa: PLC0415

    results = warmup((4,), (512, 40_000))
    variants = [("< 32768", True), ("< 32768", False), (">= 32768", True), (">= 32768", False)]
    assert [(each.batch, each.gradient, each.source) for each in results] == [(*each, "tuned") for each in variants]
    assert all(each.us > 0 and each.gain >= 0 for each in results)
    monkeypatch.setattr(tuner, "fastest", fail)
    store.tuning_cache.cache_clear()  # as another process
    assert [each.source for each in warmup((4,), (512, 40_000))] == ["cache"] * 4

    kernels = mgiou_kernel.device_caches[torch.cuda.current_device()][0]
    compiled = len(kernels)
    rng = generator(1)
    pools = {size: polygons(50_000, size) for size in (3, 4)}
    for _ in range(200):
        size, batch = int(torch.randint(3, 5, (), generator=rng)), int(50_000 ** float(torch.rand((), generator=rng)))
        pred, target = (pool[:batch] for pool in pools[size])
        mgiou_loss(pred, target)
        value, gradient = value_and_gradient(pred, target)
    assert len(kernels) == compiled
    exact_value, exact_gradient = value_and_gradient(pred.double(), target.double(), backend="eager")
    assert_close(value, exact_value, atol=1e-6)
    assert_close(gradient.norm(), exact_gradient.norm(), atol=0.0, rtol=1e-3)


@pytest.mark.usefixtures("tuner")
def test_a_layout_is_looked_up_while_a_graph_is_captured():
    from triton_mgiou import launch  # noqa: PLC0415

    pred, target = polygons(600, 4)
    value = mgiou_loss(pred, target)  # compiles
    launch.forget_plans()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mgiou_loss(pred, target)
    graph.replay()
    assert_same(captured, value)


@pytest.mark.usefixtures("tuner")
def test_another_thread_may_use_the_gpu_while_a_layout_is_measured():
    """As the thread of a DataLoader that pins memory: it must not fail, nor make the measurement fail."""
    stop, pinned, failures = threading.Event(), [], []

    def pin():
        try:
            while not stop.is_set():
                pinned.append(torch.empty(1 << (12 + len(pinned) % 12)).pin_memory().numel())
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        (result, *_) = warmup((4,), (512,))
    finally:
        stop.set()
        thread.join(60)
    assert result.source == "tuned"
    assert failures == []
    assert len(pinned) > 10


def test_a_layout_that_spills_or_does_not_compile_is_left_out(tuner):
    from triton_mgiou import launch  # noqa: PLC0415
    from triton_mgiou.options import Options, Reduction  # noqa: PLC0415

    pred, target = polygons(600, 16)
    call = launch.PolygonCall(None, None, Reduction(None, "mean", None), Options())
    plan, arguments, loss, gradient = launch.prepare_polygons(pred, target, call, True, 0)
    good = plan.layout
    plan.candidates = [
        good,
        good._replace(polygons=32, registers=32),
        good._replace(polygons=3),
    ]  # spills; no power of 2
    assert tuner._that_fit(plan, arguments, plan.candidates) == [good]
    assert tuner.fastest(plan, 600, arguments, [loss, gradient]).layout == good._asdict()


@pytest.mark.parametrize("known", [True, False])
def test_the_private_launcher_and_the_fallback_give_the_same_bits(known, monkeypatch):
    from triton_mgiou import launch  # noqa: PLC0415

    pred, target = polygons(3000, 8)
    expected = value_and_gradient(pred, target, backend="triton")
    if not known:
        monkeypatch.setattr(launch, "private_launcher", lambda _: None)
    launch.forget_plans()
    for _ in range(3):
        for got, want in zip(value_and_gradient(pred, target, backend="triton"), expected, strict=True):
            assert_same(got, want)
    assert all((plan._launcher is not None) == known for plan in launch._plans.values())
    launch.forget_plans()


SANITIZED = """
import torch
from triton_mgiou import PAPER, mgiou_loss
for n, m, batch in ((4, 4, 100), (7, 12, 33), (16, 3, 40_000), (70, 64, 9)):
    pred = torch.rand(batch, n, 2, device="cuda", requires_grad=True)
    target = torch.rand(batch, m, 2, device="cuda")
    lengths = torch.randint(0, n + 1, (batch,), device="cuda")
    mask = torch.rand(batch, m, device="cuda") < 0.7
    real = {"pred_lengths": lengths, "target_mask": mask}
    both_terms = {"axis_weight": "soft", "convexity_weight": 1.0, "boundary_weight": 1.0}
    for options in ({}, PAPER, PAPER | real | both_terms):
        mgiou_loss(pred, target, backend="triton", **options).backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.getcwd()}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout
