"""The kernel as an operator of PyTorch's: registration, saved tensors, second derivatives, who else may call it."""

import importlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    assert_close,
    assert_gradient_close,
    assert_same,
    convex,
    generator,
    random_boxes,
    rectangle_corners,
    run_python,
    star,
)
from triton_mgiou import PAPER, box_mgiou, box_mgiou_loss, mgiou_loss, polygon_mgiou
from triton_mgiou.options import Options

DEFAULTS = Options()._asdict()
LOSSES_AND_MATRICES = [mgiou_loss, box_mgiou_loss, box_mgiou, polygon_mgiou]


@pytest.fixture
def kernels(backend):
    if backend.name != "triton":
        pytest.skip("is about the kernels")
    importlib.import_module("triton_mgiou.ops")  # registers the operator
    return backend


def polygons(backend, dtype=torch.float32):
    rng = generator(5)
    return star(6, 5, rng).to(backend.device, dtype), convex(6, 7, rng).to(backend.device, dtype)


@pytest.mark.parametrize("rule", ["sum", "none"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_opcheck(kernels, rule, dtypes):
    pred, target = (t.to(dtype) for t, dtype in zip(polygons(kernels), dtypes, strict=True))
    lengths = torch.full((6,), 4, device=kernels.device)
    mask = torch.ones(6, 7, dtype=torch.bool, device=kernels.device)
    weight = torch.rand(6, device=kernels.device)
    for side in (pred, target):
        side.requires_grad_()
    changing = torch.tensor(0.5, dtype=torch.float64)
    arguments = (pred, target, lengths, mask, weight, rule, "length", True, 0.0, 0.25, changing, None, True, True)
    torch.library.opcheck(torch.ops.triton_mgiou.loss.default, arguments)


@pytest.mark.parametrize("changing", [False, True])
def test_the_operator_is_the_direct_path(kernels, changing):
    pred, target = (t.requires_grad_() for t in polygons(kernels))
    weights = {"convexity_weight": 0.5, "boundary_weight": 0.25}
    direct = mgiou_loss(pred, target, reduction="sum", backend="triton", **PAPER | weights)
    numbers = tuple(weights.values())
    tensors = tuple(torch.tensor(number, dtype=torch.float64) for number in numbers)
    numbers = (0.0, 0.0, *tensors) if changing else (*numbers, None, None)
    options = (None, None, None, "sum", "uniform", True, *numbers)
    operator = torch.ops.triton_mgiou.loss(pred, target, *options, True, True)[0]
    assert_same(direct.detach(), operator.detach())
    for got, want in zip(
        torch.autograd.grad(operator, (pred, target)), torch.autograd.grad(direct, (pred, target)), strict=True
    ):
        assert_same(got, want)


def test_backward_twice_and_checkpoint(kernels):
    pred, target = polygons(kernels)
    pred.requires_grad_()
    loss = mgiou_loss(pred, target, backend="triton")
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    assert_same(torch.autograd.grad(loss, pred)[0], first)
    again = checkpoint(lambda p: mgiou_loss(p, target, backend="triton"), pred, use_reentrant=False)
    assert_same(torch.autograd.grad(again, pred)[0], first)


def test_backward_is_one_operation_and_in_place_where_nobody_comes_again(kernels):
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, _types, arguments=(), keywords=None):
            names.append(operation.overloadpacket.__name__)
            return operation(*arguments, **keywords or {})

    pred, target = polygons(kernels)
    loss = mgiou_loss(pred.requires_grad_(), target, backend="triton")
    upstream = torch.ones((), device=kernels.device)
    for retain_graph, expected in ((True, "mul"), (False, "mul_")):
        names = []
        with Operations():
            torch.autograd.grad(loss, pred, upstream, retain_graph=retain_graph)
        assert [name for name in names if name not in ("detach", "alias")] == [expected]


def test_double_backward_is_refused(kernels):
    pred, target = polygons(kernels)
    loss = mgiou_loss(pred.requires_grad_(), target, backend="triton")
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph=True.*backend=\"eager\""):
        torch.autograd.grad(loss, pred, create_graph=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_double_backward_is_refused_in_compiled_code(kernels):
    pred, target = polygons(kernels)
    compiled = torch.compile(lambda p: mgiou_loss(p, target, backend="triton"), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(compiled(pred.requires_grad_()), pred, create_graph=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss], ids=lambda each: each.__name__)
def test_compiled_code_is_the_launch_and_one_operation(kernels, function):
    """The kernel takes the mean; what comes from above is multiplied into the gradient."""
    graphs = []

    def operations(graph, _):
        names = [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        graphs.append(names)
        return make_boxed_func(graph.forward)

    sides = [side.to(kernels.device) for side in random_boxes(12, generator(9)).float().split(6)]
    if function is mgiou_loss:
        sides = [rectangle_corners(side) for side in sides]
    sides[0].requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=operations))
    compiled(*sides, backend="triton").backward()
    (gradient,) = torch.autograd.grad(function(*sides, backend="triton"), sides[0])
    assert_same(sides[0].grad, gradient)
    operator = {mgiou_loss: "triton_mgiou::_loss", box_mgiou_loss: "triton_mgiou::_box_loss"}[function]
    assert graphs == [[operator], ["aten::mul.Tensor"]]


@pytest.mark.parametrize("function", LOSSES_AND_MATRICES, ids=lambda each: each.__name__)
def test_a_mode_that_records_operators_sees_the_kernel(kernels, function):
    """`make_fx` traces with plain tensors; a launch that it does not see would leave a number of no meaning."""
    rng = generator(10)
    recorded, other = ([side.to(kernels.device) for side in random_boxes(12, rng).float().split(6)] for _ in range(2))
    if function in (mgiou_loss, polygon_mgiou):
        recorded, other = ([rectangle_corners(side) for side in sides] for sides in (recorded, other))

    def value_and_gradient(pred, target):
        pred = pred.detach().requires_grad_(function is not polygon_mgiou)
        value = function(pred, target, backend="triton")
        return value, torch.autograd.grad(value.sum(), pred)[0] if pred.requires_grad else pred

    value_and_gradient(*recorded)  # so that no launch is the first
    graph = make_fx(value_and_gradient)(*recorded)
    for got, want in zip(graph(*other), value_and_gradient(*other), strict=True):
        assert_same(got, want)


class Function(torch.nn.Module):
    """A function as a module, which is what can be exported."""

    def __init__(self, function, backend="triton"):
        super().__init__()
        self.function = function
        self.backend = backend

    def forward(self, *arguments):
        return self.function(*arguments, backend=self.backend)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss, box_mgiou], ids=lambda each: each.__name__)
def test_an_exported_program_has_the_gradient(kernels, function, with_gradient):
    """Also where none was wanted when it was exported."""
    rng = generator(8)
    sides = polygons(kernels) if function is mgiou_loss else [random_boxes(6, rng).float() for _ in range(2)]
    sides = [side.to(kernels.device).requires_grad_() for side in sides]
    with torch.set_grad_enabled(with_gradient):
        program = torch.export.export(Function(function), tuple(sides)).module()
    expected = function(*sides, backend="triton").sum()
    actual = program(*sides).sum()
    assert_close(actual, expected, atol=1e-6)
    for got, want in zip(torch.autograd.grad(actual, sides), torch.autograd.grad(expected, sides), strict=True):
        assert_close(got, want, atol=1e-6)


LOAD = """
import sys
import torch
import {module}
for path in sys.argv[1:]:
    sides, expected = torch.load(path + ".pt")
    torch.testing.assert_close(torch.export.load(path + ".pt2").module()(*sides), expected, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.filterwarnings("ignore::UserWarning:torch.export")
def test_another_process_loads_exported_programs(backend, tmp_path):
    """By the import that the page on the first use names."""
    rng = generator(8)
    paths = []
    for function in LOSSES_AND_MATRICES if backend.name == "triton" else [mgiou_loss]:
        has_vertices = function in (mgiou_loss, polygon_mgiou)
        sides = polygons(backend) if has_vertices else [random_boxes(6, rng).float() for _ in range(2)]
        sides = tuple(side.to(backend.device) for side in sides)
        path = str(tmp_path / function.__name__)
        torch.export.save(torch.export.export(Function(function, backend.name), sides), path + ".pt2")
        torch.save((sides, function(*sides, backend="eager")), path + ".pt")
        paths.append(path)
    module = "triton_mgiou.pairs" if backend.name == "triton" else "triton_mgiou"
    done = run_python("-c", LOAD.format(module=module), *paths)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("function", [mgiou_loss, polygon_mgiou], ids=lambda each: each.__name__)
def test_an_exported_program_takes_any_number_of_vertices(backend, function):
    """Segments too, whose parts of N - 1 vertices would be of one."""
    if function is polygon_mgiou and backend.name == "eager" and torch.__version__ < (2, 13):
        pytest.skip("PyTorch 2.11 cannot merge dimensions before one whose size it does not know")

    def given(n, m):
        return [convex(6, size, generator(size)).float().to(backend.device) for size in (n, m)]

    exported = Function(function, backend.name)
    n, m = torch.export.Dim("n"), torch.export.Dim("m")
    shapes = {"arguments": ({1: n}, {1: m})}
    program = torch.export.export(exported, tuple(given(5, 7)), dynamic_shapes=shapes).module()
    for sizes in ((5, 7), (9, 3), (2, 4), (4, 2), (2, 2)):
        assert_close(program(*given(*sizes)), exported(*given(*sizes)), atol=1e-6)


FORWARD = r'backend="triton" cannot run: forward-mode .*expected .*"eager"'
BATCHED = r'backend="triton" cannot run: a batch of gradients .*expected .*"eager"'


@pytest.mark.parametrize("name", ["pred", "target", "weight", "avg_factor"])
def test_a_tangent_is_refused_and_not_dropped(kernels, name):
    pred, target = polygons(kernels)
    given = {"weight": torch.ones(6, device=kernels.device), "avg_factor": torch.tensor(6.0, device=kernels.device)}
    given |= {"pred": pred, "target": target}
    with forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(RuntimeError, match=FORWARD):
            mgiou_loss(**given, backend="triton")


@pytest.mark.parametrize("function", LOSSES_AND_MATRICES, ids=lambda each: each.__name__)
def test_a_tangent_is_refused_by_an_exported_program(backend, function):
    """Which goes to the operators directly; that of boxes in PyTorch has none, and has the tangent."""
    sides = [side.to(backend.device) for side in random_boxes(12, generator(11)).float().split(6)]
    if function in (mgiou_loss, polygon_mgiou):
        sides = [rectangle_corners(side) for side in sides]
    program = torch.export.export(Function(function, backend.name), tuple(sides)).module()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(sides[0], torch.ones_like(sides[0])), sides[1]
        if backend.name == "triton" or function in (mgiou_loss, polygon_mgiou):
            with pytest.raises(RuntimeError, match=r"^triton_mgiou::.* forward-mode .* expected the function itself"):
                program(*dual)
        else:
            got, want = (forward_ad.unpack_dual(each).tangent for each in (program(*dual), function(*dual)))
            assert_close(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vectorize": True, "strategy": "forward-mode"}, FORWARD),
        ({"vectorize": True}, BATCHED),
        ({"create_graph": True}, "second derivative"),
        ({}, None),
    ],
    ids=str,
)
def test_jacobian(kernels, keywords, message):
    """Of the losses of single samples: the gradient of each, or a refusal."""
    pred, target = polygons(kernels)

    def each(vertices):
        return mgiou_loss(vertices, target, reduction="none", backend="triton")

    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.functional.jacobian(each, pred, **keywords)
        return
    jacobian = torch.autograd.functional.jacobian(each, pred)
    gradient = kernels.value_and_gradient(pred, target, reduction="sum", **DEFAULTS)[1]
    for row in range(len(pred)):
        assert_close(jacobian[row, row], gradient[row], atol=0.0)
        assert not jacobian[row, torch.arange(len(pred)) != row].any()


def test_no_gradient_is_computed_where_none_is_asked_for(kernels, monkeypatch):
    from triton_mgiou.launch import PolygonCall  # noqa: PLC0415

    asked = []
    original = PolygonCall.launch
    monkeypatch.setattr(PolygonCall, "launch", lambda *a: asked.append(a[-1]) or original(*a))
    pred, target = polygons(kernels)
    mgiou_loss(pred, target, backend="triton")
    pred.requires_grad_()
    with torch.no_grad():
        mgiou_loss(pred, target, backend="triton")
    mgiou_loss(pred, target, backend="triton")
    mgiou_loss(pred.detach(), target.requires_grad_(), backend="triton")
    assert asked == [False, False, True, False, True]


def test_a_vertex_that_is_not_aligned_is_copied(kernels):
    """Slices that start in the middle of a word, and coordinates that are not adjacent."""
    pred, target = polygons(kernels)
    expected = kernels.value_and_gradient(pred, target)
    wide = torch.full((6, 5, 5), torch.nan, device=kernels.device)
    wide[..., 1:3] = pred
    planar = pred.transpose(1, 2).contiguous().transpose(1, 2)
    vertex_first = pred.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (wide[..., 1:3], planar, vertex_first):
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        loss = kernels.loss(leaf, target)
        assert_same(loss.detach(), expected[0])
        assert_same(torch.autograd.grad(loss, leaf)[0], expected[1])


@pytest.mark.parametrize(("size", "target_size"), [(4, 16), (16, 4), (4, 64), (8, 4)])
def test_full_rows_of_different_sizes(kernels, size, target_size):
    rng = generator(size + target_size)
    pred, target = star(3, size, rng), convex(3, target_size, rng)
    expected = mgiou_loss(pred.requires_grad_(), target, backend="eager", reduction="none", **PAPER)
    (gradient,) = torch.autograd.grad(expected.sum(), pred)
    value, actual = kernels.value_and_gradient(pred, target, torch.ones(3), reduction="none")
    assert_close(value, expected.detach(), atol=1e-12)
    assert_gradient_close(actual, gradient, rtol=1e-9)


def test_a_tensor_that_a_transform_left_behind_is_the_tensor(kernels):
    """Its value, which the code after `torch.func.grad` gets to see wrapped."""
    pred, target = polygons(kernels)
    left = []
    torch.func.grad(lambda wrapped: (left.append(wrapped), wrapped.sum())[1])(pred)
    expected = kernels.value_and_gradient(target, pred)
    leaf = target.clone().requires_grad_()
    loss = kernels.loss(leaf, left[0])
    assert_same(loss.detach(), expected[0])
    assert_same(torch.autograd.grad(loss, leaf)[0], expected[1])


@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss])
@pytest.mark.parametrize("avg_factor", [None, 5.0])
def test_a_mode_of_the_dispatcher_changes_no_reduction(backend, function, avg_factor):
    """Beside one the call goes through the operator: the number that divides the sum, and the weights of the terms."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    boxes = random_boxes(6, generator(17)).float().to(backend.device)
    shapes = boxes if function is box_mgiou_loss else rectangle_corners(boxes)
    options = {"boundary_weight": 0.3, "backend": backend.name}
    if function is mgiou_loss:
        options["convexity_weight"] = 0.2
        shapes[:, 1] = (shapes.mean(1) + shapes[:, 3]) / 2  # a dent
    each = function(shapes[:3], shapes[3:], reduction="none", **options)
    with Nothing():
        value = function(shapes[:3], shapes[3:], avg_factor=avg_factor, **options)
    assert_close(value, each.sum() / (avg_factor or 3), atol=1e-6)
