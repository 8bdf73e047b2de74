"""With what a training run has around the loss: autocast, torch.compile, CUDA graphs, optimizers, no Triton."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import INTERPRETED
from tests.helpers import (
    BOTH,
    INF,
    NAN,
    assert_close,
    assert_does_not_wait,
    assert_gradient_close,
    assert_same,
    convex,
    generator,
    run_python,
    star,
    uniform,
)
from triton_mgiou import PAPER, MGIoULoss, PolygonLoss
from triton_mgiou.training import AlphaSchedule, debug


def sample(batch, device, seed=101):
    rng = generator(seed)
    return {
        "pred": star(batch, 6, rng).float().to(device),
        "target": convex(batch, 5, rng).float().to(device),
        "pred_lengths": torch.randint(0, 7, (batch,), generator=rng).to(device),
        "target_mask": (uniform((batch, 5), 0, 1, rng) < 0.8).to(device),
        "weight": uniform((batch, 2), 0, 1, rng).float().to(device),
    }


@pytest.mark.parametrize(("axis_weight", "reduction"), [("uniform", "mean"), ("length", "sum"), ("soft", "none")])
def test_autocast_changes_no_bit(backend, axis_weight, reduction):
    given = sample(6, backend.device)
    options = {"axis_weight": axis_weight, "reduction": reduction, "convexity_weight": 0.5}
    expected = backend.value_and_gradient(**given, wrt=BOTH, **options)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(backend.device, dtype=dtype):
            actual = backend.value_and_gradient(**given, wrt=BOTH, **options)
        for got, want in zip(actual, expected, strict=True):
            assert_same(got, want)


def test_a_network_under_autocast(backend):
    """The head's output is bfloat16; the loss takes it as it is and gives float32."""
    layer = torch.nn.Linear(4, 12, device=backend.device)
    features = uniform((6, 4), -1, 1, generator(102)).float().to(backend.device)
    target = sample(6, backend.device)["target"]
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        pred = layer(features).view(6, 6, 2)
        loss = backend.loss(pred, target)
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert_same(loss.detach(), backend.loss(pred.detach().float(), target))
    loss.backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().amax() > 0


def assert_compiled_is_the_same(function, compiled, given):
    results = []
    for call in (function, compiled):
        leaves = {name: given[name].detach().clone().requires_grad_() for name in BOTH}
        value = call(**{**given, **leaves})
        results.append((value.detach(), *torch.autograd.grad(value.sum(), list(leaves.values()))))
    (value, *gradients), (got, *got_gradients) = results
    assert got.dtype == value.dtype
    assert_close(got, value, atol=1e-6)
    for actual, expected in zip(got_gradients, gradients, strict=True):
        assert actual.dtype == expected.dtype
        assert_gradient_close(actual, expected, rtol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_a_batch_size_that_changes(backend):
    options = {"axis_weight": "length", "axis_grad": False, "convexity_weight": 0.5, "reduction": "none"}

    def function(**given):
        return backend.loss(**given, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seed, batch in enumerate([4, 7, 3, 16]):
        assert_compiled_is_the_same(function, compiled, sample(batch, backend.device, seed))
    assert 1 <= counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_the_module(backend):
    """With a weight without a positive entry in between, which must neither break the graph nor compile anew."""
    loss = MGIoULoss(loss_weight=2.0, axis_weight="length", backend=backend.name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed, batch in enumerate([4, 7, 3]):
        given = sample(batch, backend.device, seed) | {"avg_factor": 3.0}
        assert_compiled_is_the_same(loss, compiled, given)
        given["weight"].zero_()
        assert_compiled_is_the_same(loss, compiled, given)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_every_size_dynamic_from_the_start(backend):
    """Then the numbers among the arguments, defaults too, are symbols."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(backend.loss, fullgraph=True, dynamic=True, backend=counter)
    for seed, batch in enumerate([4, 7, 3]):
        assert_compiled_is_the_same(backend.loss, compiled, sample(batch, backend.device, seed))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["avg_factor", "convexity_weight"])
@pytest.mark.parametrize("numbers", [[4.0, 7.5, 3.0, 9.0], [4, 7, 3, 9]], ids=["float", "int"])
def test_compile_with_a_number_that_changes(backend, name, numbers):
    """The number of positive samples of each step, and the weight of a term on a schedule."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(backend.loss, fullgraph=True, backend=counter)
    given = sample(5, backend.device)
    for number in numbers:
        value = compiled(given["pred"], given["target"], **{name: number})
        assert_close(value, backend.loss(given["pred"], given["target"], **{name: number}), atol=1e-6)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none", "avg_factor"])
def test_compile_with_a_batch_that_a_mask_selects(backend, reduction):
    """The positives of a batch: of how many there are the compiler knows nothing, and there may be none."""

    def function(is_positive, **given):
        given = {name: each[is_positive] for name, each in given.items() if name != "avg_factor"}
        if reduction == "avg_factor":
            return backend.loss(**given, avg_factor=is_positive.sum())
        return backend.loss(**given, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in [3, 0, 1, 6]:
            given = sample(6, backend.device) | {"is_positive": torch.arange(6, device=backend.device) < count}
            assert_compiled_is_the_same(function, compiled, given)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("divisor", [-1.0, NAN, INF, 0.0])
def test_an_empty_batch_is_0_beside_any_divisor_though_the_compiler_does_not_know_it(backend, divisor):
    def function(pred, target, is_positive, divisor):
        return backend.loss(pred[is_positive], target[is_positive], avg_factor=divisor)

    given = sample(4, backend.device)
    pred, target, divisor = (
        given["pred"].requires_grad_(),
        given["target"],
        torch.tensor(divisor, device=backend.device),
    )
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count, expected in ((0, 0.0), (3, INF if divisor == 0 else NAN), (0, 0.0)):
            is_positive = torch.arange(4, device=backend.device) < count
            for each in (function, compiled):
                loss = each(pred, target, is_positive, divisor)
                (gradient,) = torch.autograd.grad(loss, pred)
                torch.testing.assert_close(loss.item(), expected, equal_nan=True)
                assert gradient[count:].eq(0).all()
                assert gradient.shape == pred.shape


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("least", [0, 1, 0.5])
def test_compile_with_a_divisor_that_is_read_in_the_graph(backend, least):
    """The compiler knows nothing of it, but for the least one. With none, a sum of 0 is 0 and another Inf."""

    def function(is_positive, **given):
        count = is_positive.sum().item()
        return backend.loss(**given, avg_factor=max(count, least) if least else count)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = sample(6, backend.device)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for count in [3, 6, 0] if least else [3, 6]:
            is_positive = torch.arange(6, device=backend.device) < count
            assert_compiled_is_the_same(function, compiled, given | {"is_positive": is_positive})
        if not least:
            none = torch.zeros(6, dtype=torch.bool, device=backend.device)
            assert compiled(none, **given) == torch.inf
            assert compiled(none, **given | {"weight": torch.zeros(6, device=backend.device)}) == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_float16_and_without_a_graph(backend):
    def function(pred, target):
        return backend.loss(pred.half(), target.half(), reduction="none")

    given = sample(6, backend.device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(given["pred"], given["target"]), function(given["pred"], given["target"]), atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(INTERPRETED, reason="the other run has it")
def test_compile_to_code(backend):
    """The whole way through the default compiler, loss and gradient with every term, twice with another batch size."""
    options = {"axis_weight": "soft", "convexity_weight": 0.5, "boundary_weight": 0.25}

    def function(**given):
        return backend.loss(**given, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for seed, batch in enumerate([4, 9]):
        assert_compiled_is_the_same(function, compiled, sample(batch, backend.device, seed))


@pytest.mark.parametrize("axis_weight", ["uniform", "length", "soft"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_value_of_a_tensor_is_looked_at(backend, reduction, axis_weight):
    """A fake tensor has no values: whatever would wait for the GPU raises here."""
    given = sample(6, backend.device)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        fake = {name: t.requires_grad_() if name in BOTH else t for name, t in fake.items()}
        options = {"reduction": reduction, "axis_weight": axis_weight, "convexity_weight": 0.5}
        if reduction == "mean":
            options["avg_factor"] = mode.from_tensor(torch.tensor(3.0, device=backend.device))
        value = backend.loss(**fake, **options)
        assert value.shape == ((6,) if reduction == "none" else ())
        value.sum().backward()
        for side in BOTH:
            assert fake[side].grad.shape == given[side].shape
        module = MGIoULoss(reduction, backend=backend.name, axis_weight=axis_weight)
        module(fake["pred"], fake["target"], fake["weight"], target_mask=fake["target_mask"]).sum().backward()


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default",
    [
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.float16),
        lambda: torch.device("meta"),  # as torch.set_default_device
    ],
    ids=["float64", "float16", "meta"],
)
def test_defaults_of_pytorch_change_nothing(backend, default):
    """The loss's type and device are those of its input, whatever new tensors have."""
    given = sample(6, backend.device)
    pred, target = given["pred"], given["target"]
    keypoints = (pred, pred.flip(0), given["weight"][:, :1].expand(6, 6) > 0.3, given["weight"][:, 0])
    losses = [PolygonLoss(mode, alpha=AlphaSchedule(4), backend=backend.name) for mode in ("l2", "hybrid")]
    factors = [2, 0, torch.tensor(3, device=backend.device), torch.tensor(2.0, dtype=torch.float64)]
    modules = [loss.to(backend.device) for loss in losses]

    def results():
        leaf = pred.clone().requires_grad_()
        yield from (backend.loss(**given | {"pred": leaf}, reduction=each) for each in ("none", "sum", "mean"))
        yield from (backend.loss(leaf, target, avg_factor=each, **PAPER) for each in factors)
        yield from (module(leaf, *keypoints[1:], avg_factor=factors[2])[0] for module in modules)
        yield backend.loss(leaf[:0], target[:0])
        with debug():
            loss = backend.loss(**given | {"pred": leaf}, boundary_weight=0.5)
        yield loss
        yield torch.autograd.grad(loss, leaf)[0]

    expected = [each.detach() for each in results()]
    with default():
        actual = [each.detach() for each in results()]
    for got, want in zip(actual, expected, strict=True):
        assert got.device == want.device
        assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("axis_weight", ["uniform", "length", "soft"])
def test_nothing_waits_for_the_gpu(backend, axis_weight):
    if backend.device != "cuda":
        pytest.skip("needs a GPU")
    given = sample(64, "cuda")
    given["pred"].requires_grad_()
    factor = torch.tensor(3.0, device="cuda")
    module = MGIoULoss(axis_weight=axis_weight, convexity_weight=0.5, backend=backend.name)

    def step():
        loss = module(**given, avg_factor=factor) + backend.loss(**given, axis_weight=axis_weight)
        loss.backward()

    assert_does_not_wait(step)


@pytest.mark.gpu
def test_a_cuda_graph_replays_value_and_gradient(backend):
    if backend.device != "cuda":
        pytest.skip("needs a GPU")
    first, second = sample(64, "cuda", 1), sample(64, "cuda", 2)
    given = {name: tensor.clone() for name, tensor in first.items()}
    given["pred"].requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(backend.loss(**given), given["pred"])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = backend.loss(**given)
        (gradient,) = torch.autograd.grad(value, given["pred"])
    for values in (second, first):
        with torch.no_grad():
            for name, tensor in values.items():
                given[name].copy_(tensor)
        graph.replay()
        want = backend.value_and_gradient(**values)
        assert_same(value.detach(), want[0])
        assert_same(gradient, want[1], "gradient")


def test_a_grad_scaler_skips_a_step_that_overflowed(backend):
    """A gradient through float16 that is past 65,504 has to arrive as an Inf, or the optimizer takes a false step."""
    device = backend.device
    given = sample(4, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    for size, taken in [(2.0**-12, False), (2.0**6, True)]:
        parameter = torch.nn.Parameter(given["pred"] * size)
        before = parameter.detach().clone()
        optimizer = torch.optim.SGD([parameter], lr=1e-3)
        scaler.scale(backend.loss(parameter.half(), (given["target"] * size).half())).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (parameter.detach() != before).any().item() is taken


@pytest.mark.parametrize("axis_grad", [True, False])
def test_polygons_learn_their_targets(backend, axis_grad):
    rng = generator(103)
    pred = star(4, 6, rng).float().to(backend.device).requires_grad_()
    target = convex(4, 6, rng).float().to(backend.device)
    optimizer = torch.optim.Adam([pred], lr=0.05)
    losses = []
    steps, part = (15, 0.8) if backend.is_slow else (60, 1 / 3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = backend.loss(pred, target, axis_grad=axis_grad)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.2
    assert losses[-1] < losses[0] * part


def test_it_works_where_there_is_no_triton():
    """In a process of its own, in which Triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
import triton_mgiou
pred = torch.rand(3, 5, 2, requires_grad=True)
loss = triton_mgiou.mgiou_loss(pred, torch.rand(3, 4, 2))
loss.backward()
assert pred.grad.abs().sum() > 0
try:
    triton_mgiou.mgiou_loss(pred, torch.rand(3, 4, 2), backend="triton")
except RuntimeError as error:
    assert "triton" in str(error).lower()
else:
    raise AssertionError("no error")
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_star_import_gives_what_the_package_offers_and_says_what_it_is():
    """All that its user may call, no module and no helper, and each with a documentation of its own."""
    import triton_mgiou  # noqa: PLC0415

    names: dict[str, object] = {}
    exec("from triton_mgiou import *", names)
    del names["__builtins__"]
    public = {name for name in vars(triton_mgiou) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(triton_mgiou, name), ModuleType)}
    assert set(names) == public - modules
    for name, value in names.items():
        if callable(value):
            assert value.__name__ == name
            assert inspect.getdoc(value) not in (None, inspect.getdoc(torch.nn.Module))
            assert all(word in (value.__doc__ or "") for word in inspect.signature(value).parameters), name
