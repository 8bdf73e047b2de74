"""Types, layouts and devices that are taken, and every message for what is not."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction

import pytest
import torch
from torch.distributed.tensor import Replicate, distribute_tensor

from tests.conftest import INTERPRETED
from tests.helpers import BOTH, assert_close, assert_same, convex, generator, numpy64, one_process, star, uniform
from triton_mgiou import (
    BoxMGIoULoss,
    MGIoULoss,
    PolygonLoss,
    box_mgiou,
    box_mgiou_loss,
    mean_positives,
    mgiou_loss,
    polygon_mgiou,
)

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sample_pair():
    rng = generator(71)
    return star(4, 5, rng).float(), convex(4, 6, rng).float()


PRED, TARGET = torch.zeros(4, 5, 2), torch.zeros(4, 6, 2)
BOXES = torch.rand(4, 5, generator=generator(72))
WRONG = {
    # name: (changed arguments, error, what the message begins with, what it says besides)
    "pred is a list": ({"pred": [[[0.0, 0.0]]]}, TypeError, "pred", ["torch.Tensor", "list"]),
    "target is None": ({"target": None}, TypeError, "target", ["torch.Tensor", "NoneType"]),
    "pred of rank 2": ({"pred": torch.zeros(4, 2)}, ValueError, "pred", ["(B, N, 2)", "(4, 2)"]),
    "target of rank 4": ({"target": torch.zeros(4, 6, 2, 1)}, ValueError, "target", ["(B, M, 2)", "(4, 6, 2, 1)"]),
    "pred in space": ({"pred": torch.zeros(4, 5, 3)}, ValueError, "pred", ["(B, N, 2)", "(4, 5, 3)"]),
    "target in space": ({"target": torch.zeros(4, 6, 3)}, ValueError, "target", ["(B, M, 2)", "(4, 6, 3)"]),
    "pred without vertices": ({"pred": torch.zeros(4, 0, 2)}, ValueError, "pred", ["N >= 1", "(4, 0, 2)"]),
    "target without vertices": ({"target": torch.zeros(4, 0, 2)}, ValueError, "target", ["M >= 1", "(4, 0, 2)"]),
    "batch sizes differ": ({"target": torch.zeros(3, 6, 2)}, ValueError, "target", ["batch size 4", "3"]),
    "a batch of one is not stretched": ({"target": torch.zeros(1, 6, 2)}, ValueError, "target", ["batch size 4", "1"]),
    "pred of integers": ({"pred": PRED.int()}, TypeError, "pred", ["floating", "float32", "torch.int32"]),
    "target of integers": ({"target": TARGET.long()}, TypeError, "target", ["floating", "torch.int64"]),
    "pred of bools": ({"pred": PRED.bool()}, TypeError, "pred", ["floating", "torch.bool"]),
    "pred complex": ({"pred": PRED.to(torch.complex64)}, TypeError, "pred", ["floating", "torch.complex64"]),
    "target elsewhere": ({"target": TARGET.to("meta")}, ValueError, "target", ["DEVICE", "meta"]),
    "lengths elsewhere": (
        {"pred_lengths": torch.ones(4, dtype=torch.long, device="meta")},
        ValueError,
        "pred_lengths",
        ["DEVICE", "meta"],
    ),
    "mask elsewhere": (
        {"target_mask": torch.ones(4, 6, dtype=torch.bool, device="meta")},
        ValueError,
        "target_mask",
        ["DEVICE", "meta"],
    ),
    "weight elsewhere": ({"weight": torch.ones(4, device="meta")}, ValueError, "weight", ["DEVICE", "meta"]),
    "avg_factor elsewhere": ({"avg_factor": torch.ones(1, device="meta")}, ValueError, "avg_factor", ["meta"]),
    "weight is a list": ({"weight": [1.0] * 4}, TypeError, "weight", ["torch.Tensor", "list"]),
    "weight complex": ({"weight": torch.ones(4, dtype=torch.complex64)}, TypeError, "weight", ["real", "complex64"]),
    "weight too long": ({"weight": torch.ones(5)}, ValueError, "weight", ["(4,)", "(4, k)", "(5,)"]),
    "weight of one": ({"weight": torch.ones(1)}, ValueError, "weight", ["(4,)", "(4, k)", "(1,)"]),
    "weight a scalar": ({"weight": torch.tensor(1.0)}, ValueError, "weight", ["(4,)", "(4, k)", "()"]),
    "weight of another batch": ({"weight": torch.ones(5, 2)}, ValueError, "weight", ["(4, k)", "(5, 2)"]),
    "weight without columns": ({"weight": torch.ones(4, 0)}, ValueError, "weight", ["(4, k)", "(4, 0)"]),
    "weight of rank 3": ({"weight": torch.ones(4, 2, 2)}, ValueError, "weight", ["(4, k)", "(4, 2, 2)"]),
    "avg_factor with sum": ({"avg_factor": 2.0, "reduction": "sum"}, ValueError, "avg_factor", ['"mean"', '"sum"']),
    "avg_factor a string": ({"avg_factor": "2"}, TypeError, "avg_factor", ["number", "str"]),
    "avg_factor a bool": ({"avg_factor": True}, TypeError, "avg_factor", ["number", "bool"]),
    "avg_factor a fraction": ({"avg_factor": Fraction(1, 3)}, TypeError, "avg_factor", ["number", "Fraction"]),
    "a term's a fraction": ({"boundary_weight": Fraction(1)}, TypeError, "boundary_weight", ["number", "Fraction"]),
    "avg_factor of 101 bits": ({"avg_factor": 2**99}, ValueError, "avg_factor", ["64 bits", "101"]),
    "a term's of 65 bits": ({"boundary_weight": 2**63}, ValueError, "boundary_weight", ["64 bits", "65"]),
    "avg_factor negative": ({"avg_factor": -1.5}, ValueError, "avg_factor", ["0 or above", "-1.5"]),
    "avg_factor complex": ({"avg_factor": torch.tensor(1j)}, TypeError, "avg_factor", ["real", "complex64"]),
    "avg_factor NaN": ({"avg_factor": float("nan")}, ValueError, "avg_factor", ["finite", "nan"]),
    "avg_factor Inf": ({"avg_factor": float("inf")}, ValueError, "avg_factor", ["finite", "inf"]),
    "avg_factor of two": ({"avg_factor": torch.ones(2)}, ValueError, "avg_factor", ["one element", "(2,)"]),
    "reduction unknown": ({"reduction": "avg"}, ValueError, "reduction", ["'mean'", "'sum'", "'none'", "'avg'"]),
    "reduction None": ({"reduction": None}, ValueError, "reduction", ["'mean'", "'sum'", "'none'", "None"]),
    "axis_weight unknown": (
        {"axis_weight": "area"},
        ValueError,
        "axis_weight",
        ["'uniform'", "'length'", "'soft'", "'area'"],
    ),
    "axis_grad a number": ({"axis_grad": 1}, TypeError, "axis_grad", ["bool", "int"]),
    "axis_grad a string": ({"axis_grad": "no"}, TypeError, "axis_grad", ["bool", "str"]),
    "convexity_weight negative": ({"convexity_weight": -0.5}, ValueError, "convexity_weight", ["0 or above", "-0.5"]),
    "convexity_weight NaN": ({"convexity_weight": float("nan")}, ValueError, "convexity_weight", ["finite", "nan"]),
    "convexity_weight Inf": ({"convexity_weight": float("inf")}, ValueError, "convexity_weight", ["finite", "inf"]),
    "convexity_weight a string": ({"convexity_weight": "1"}, TypeError, "convexity_weight", ["number", "str"]),
    "convexity_weight None": ({"convexity_weight": None}, TypeError, "convexity_weight", ["number", "NoneType"]),
    "convexity_weight beyond float32": ({"convexity_weight": 1e39}, ValueError, "convexity_weight", ["1e+30", "1e+39"]),
    "boundary_weight negative": ({"boundary_weight": -0.5}, ValueError, "boundary_weight", ["0 or above", "-0.5"]),
    "boundary_weight NaN": ({"boundary_weight": float("nan")}, ValueError, "boundary_weight", ["finite", "nan"]),
    "boundary_weight a string": ({"boundary_weight": "1"}, TypeError, "boundary_weight", ["number", "str"]),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend", ["'auto'", "'eager'", "'triton'", "'cuda'"]),
}
for _side, _size in (("pred", 5), ("target", 6)):
    _lengths, _mask = f"{_side}_lengths", f"{_side}_mask"
    WRONG |= {
        f"{_lengths} is a list": ({_lengths: [5] * 4}, TypeError, _lengths, ["torch.Tensor", "list"]),
        f"{_lengths} floating": ({_lengths: torch.ones(4)}, TypeError, _lengths, ["integer", "torch.float32"]),
        f"{_lengths} of bools": ({_lengths: torch.ones(4).bool()}, TypeError, _lengths, ["integer", "torch.bool"]),
        f"{_lengths} complex": (
            {_lengths: torch.ones(4, dtype=torch.complex64)},
            TypeError,
            _lengths,
            ["integer", "torch.complex64"],
        ),
        f"{_lengths} too long": ({_lengths: torch.ones(5).int()}, ValueError, _lengths, ["(4,)", "(5,)"]),
        f"{_lengths} a scalar": ({_lengths: torch.tensor(3)}, ValueError, _lengths, ["(4,)", "()"]),
        f"{_lengths} of rank 2": ({_lengths: torch.ones(4, 1).int()}, ValueError, _lengths, ["(4,)", "(4, 1)"]),
        f"{_mask} is a list": ({_mask: [[True]]}, TypeError, _mask, ["torch.Tensor", "list"]),
        f"{_mask} of integers": ({_mask: torch.ones(4, _size).int()}, TypeError, _mask, ["torch.bool", "torch.int32"]),
        f"{_mask} floating": ({_mask: torch.ones(4, _size)}, TypeError, _mask, ["torch.bool", "torch.float32"]),
        f"{_mask} too wide": (
            {_mask: torch.ones(4, 7).bool()},
            ValueError,
            _mask,
            [f"(4, {_size})", "(4, 7)"],
        ),
        f"{_mask} of rank 1": ({_mask: torch.ones(4).bool()}, ValueError, _mask, [f"(4, {_size})", "(4,)"]),
        f"{_mask} of another batch": (
            {_mask: torch.ones(3, _size).bool()},
            ValueError,
            _mask,
            [f"(4, {_size})", f"(3, {_size})"],
        ),
        f"{_side} lengths and mask": (
            {_lengths: torch.ones(4).int(), _mask: torch.ones(4, _size).bool()},
            ValueError,
            f"{_lengths} and {_mask}",
            ["at most one", "both"],
        ),
    }


@pytest.mark.parametrize("name", WRONG)
def test_messages(backend, name):
    changed, error, begin, parts = WRONG[name]
    arguments = {"pred": PRED, "target": TARGET, "backend": backend.name}
    arguments |= changed
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            arguments[key] = value.to(backend.device)
    device = str(arguments["pred"].device) if isinstance(arguments["pred"], torch.Tensor) else ""
    with pytest.raises(error) as caught:
        mgiou_loss(arguments.pop("pred"), arguments.pop("target"), **arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{begin} "), message
    for part in parts:
        assert (device if part == "DEVICE" else part) in message, message


def distributed_tensor(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Replicate()])


OTHER_KINDS = {
    # name: (the same numbers as such a tensor, what the message says)
    "DTensor": (distributed_tensor, ["DTensor", "to_local()"]),
    "nested": (lambda t, _: torch.nested.nested_tensor([t]), ["nested"]),
    "jagged": (lambda t, _: torch.nested.nested_tensor([t], layout=torch.jagged), ["nested"]),
    "sparse": (lambda t, _: t.to_sparse(), ["torch.sparse_coo", "to_dense()"]),
    "quantized": (lambda t, _: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), ["quantized", "dequantize()"]),
    "masked": (lambda t, _: torch.masked.masked_tensor(t, t > 0.5), ["MaskedTensor"]),
    "float8": (lambda t, _: t.to(torch.float8_e4m3fn), ["torch.float8_e4m3fn"]),
}


@pytest.mark.filterwarnings("ignore")  # prototypes, and the end of quantization in PyTorch itself
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tensors_of_other_kinds_are_refused_by_name(kind):
    make, parts = OTHER_KINDS[kind]
    pred, target = sample_pair()
    weight, area, visible = torch.rand(4), torch.rand(4), torch.ones(4, 5)
    calls = {
        "pred": lambda other: mgiou_loss(other(pred), target),
        "target": lambda other: mgiou_loss(pred, other(target)),
        "weight": lambda other: mgiou_loss(pred, target, weight=other(weight)),
        "avg_factor": lambda other: mgiou_loss(pred, target, avg_factor=other(torch.tensor([3.0]))),
        "pred_lengths": lambda other: mgiou_loss(pred, target, pred_lengths=other(weight)),
        "target_mask": lambda other: mgiou_loss(pred, target, target_mask=other(torch.rand(4, 6))),
        "pred_kpts": lambda other: PolygonLoss()(other(pred), pred, visible, area),
        "area": lambda other: PolygonLoss()(pred, pred, visible, other(area)),
        "kpt_mask": lambda other: PolygonLoss()(pred, pred, other(visible), area),
        "num_positives": lambda other: mean_positives(other(torch.tensor([3.0]))),
        "pred with boxes": lambda other: box_mgiou_loss(other(BOXES), BOXES),
        "target with boxes": lambda other: box_mgiou_loss(BOXES, other(BOXES)),
        "weight of boxes": lambda other: BoxMGIoULoss()(BOXES, BOXES, other(weight)),
        "boxes1": lambda other: box_mgiou(other(BOXES), BOXES),
        "mask2": lambda other: box_mgiou(BOXES, BOXES, mask2=other(weight)),
        "polygons2": lambda other: polygon_mgiou(pred, other(target)),
        "lengths1": lambda other: polygon_mgiou(pred, target, lengths1=other(weight)),
    }
    calls["weight of the module"] = lambda other: MGIoULoss()(pred, target, other(weight))
    with one_process() if kind == "DTensor" else nullcontext() as mesh:
        for name, call in calls.items():
            with pytest.raises(TypeError) as caught:
                call(lambda tensor: make(tensor, mesh))
            message = str(caught.value)
            assert message.startswith(f"{name.split()[0]} must "), message
            assert all(part in message for part in parts), message


class Subclass(torch.Tensor):
    """Like torchvision's `tv_tensors`: what PyTorch computes with it is a plain tensor."""

    @classmethod
    def __torch_function__(cls, function, _types, arguments=(), keywords=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "other", [lambda t: t.as_subclass(Subclass), torch.nn.Parameter], ids=["tv_tensor", "Parameter"]
)
def test_subclasses_that_only_add_something_are_taken(backend, other):
    pred, target = (vertices.to(backend.device) for vertices in sample_pair())
    weight = torch.rand(4, generator=generator(75)).to(backend.device)
    expected = backend.value_and_gradient(pred, target, weight=weight)
    for sides in ((other(pred), target), (pred, other(target))):
        loss = backend.loss(*sides, weight=weight)
        assert_close(loss, expected[0], atol=1e-7)
    leaf = pred.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        backend.loss(leaf * other(torch.ones_like(pred)), other(target), weight=weight), leaf
    )
    assert_close(gradient, expected[1], atol=1e-7)


class KeyPoints(Subclass):
    """`tv_tensors` have attributes of their own, too, which the compiler does not know."""

    @property
    def shape(self):
        with torch._C.DisableTorchFunctionSubclass():
            return super().shape


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["loss", "keypoints", "matrix", "corners", "boxes"])
def test_subclasses_in_compiled_code(backend, name):
    """The operators too get plain tensors: PyTorch 2.13 refuses the first call of one that gets another."""
    rng = generator(76)
    pred, target = star(4, 5, rng).float(), convex(4, 5, rng).float()
    mask, weight, area = torch.rand(4, 5, generator=rng) > 0.3, torch.rand(4, generator=rng), torch.ones(4)
    options = {"backend": backend.name}
    polygon_loss = PolygonLoss("hybrid", alpha=0.5, return_parts=False, **options)
    corners = [side[:, :4].flatten(1) for side in (pred, target)]
    function, sides = {
        "loss": (lambda p, t, m, w: mgiou_loss(p, t, target_mask=m, weight=w, **options), (pred, target, mask)),
        "keypoints": (lambda p, t, m, w: polygon_loss(p, t, m, area.to(p.device), weight=w), (pred, target, mask)),
        "matrix": (lambda p, t, m, _: polygon_mgiou(p, t, mask2=m, **options), (pred, target, mask[:, 0])),
        "corners": (lambda p, t, _, w: box_mgiou_loss(p, t, fmt="xyxyxyxy", weight=w, **options), (*corners, mask)),
        "boxes": (lambda p, t, m, _: box_mgiou(p, t, mask1=m, **options), (BOXES, BOXES.flip(0), mask[:, 0])),
    }[name]
    given = [each.contiguous().to(backend.device) for each in (*sides, weight)]
    # The kernels have no gradient of a matrix of polygons. For that of L2 the compiler saves the inputs themselves, and
    # PyTorch refuses that of a class, as it does for its own losses in float16.
    leaf = given[0].clone().requires_grad_(name not in {"matrix", "keypoints"})
    classes = (KeyPoints, KeyPoints, Subclass, Subclass)
    compiler = "inductor" if backend.name == "triton" else "eager"  # which generates no code
    got = torch.compile(function, fullgraph=True, backend=compiler)(
        *(each.as_subclass(kind) for each, kind in zip((leaf, *given[1:]), classes, strict=True))
    )
    want = function(leaf, *given[1:])
    assert type(got) is torch.Tensor
    assert_close(got.detach(), want.detach(), atol=1e-6)
    if leaf.requires_grad:
        gradients = (torch.autograd.grad(each.sum(), leaf)[0] for each in (got, want))
        assert_close(*gradients, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mgiou_loss", MGIoULoss()),
        ("box_mgiou_loss", lambda p, _: box_mgiou_loss(p[:, 0].repeat(1, 2), p[:, 1].repeat(1, 2), fmt="xyxy")),
        ("box_mgiou", lambda p, _: box_mgiou(p[:, 0].repeat(1, 2), p[:, 1].repeat(1, 2), fmt="cxcywh")),
        *((function.__name__, function) for function in (mgiou_loss, polygon_mgiou)),
    ],
)
def test_jit_trace_is_refused_by_name(name, function):
    with pytest.raises(RuntimeError, match=rf"torch\.jit\.trace cannot record {name}; .*torch\.compile"):
        torch.jit.trace(function, sample_pair())


def test_options_are_keywords():
    with pytest.raises(TypeError):
        mgiou_loss(PRED, TARGET, torch.ones(4))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels on a CPU")
def test_kernels_that_cannot_run_say_so():
    with pytest.raises(RuntimeError, match="triton"):
        mgiou_loss(PRED, TARGET, backend="triton")


def test_auto_always_finds_a_backend():
    pred, target = sample_pair()
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        expected = mgiou_loss(pred.to(device), target.to(device), backend="eager")
        assert_close(mgiou_loss(pred.to(device), target.to(device)), expected, atol=1e-6)
        assert_close(mgiou_loss(pred.to(device), target.to(device), backend="auto"), expected, atol=1e-6)


@pytest.mark.parametrize("target_dtype", FLOATING)
@pytest.mark.parametrize("pred_dtype", FLOATING)
def test_dtypes(backend, pred_dtype, target_dtype):
    """Computed as if the inputs had been converted first; the gradient is that, rounded to its input's type."""
    rng = generator(72)
    pred, target = sample_pair()
    pred, target = (pred * 300 + 400).to(pred_dtype), (target * 300 + 400).to(target_dtype)
    wide = torch.float64 if torch.float64 in (pred_dtype, target_dtype) else torch.float32
    upstream = uniform((4,), -2, 2, rng).to(wide)
    options = {"reduction": "none", "convexity_weight": 0.5}
    expected = backend.value_and_gradient(pred.to(wide), target.to(wide), upstream, BOTH, **options)
    value, to_pred, to_target = backend.value_and_gradient(pred, target, upstream, BOTH, **options)
    assert_same(value, expected[0])
    assert value.dtype == wide
    assert_same(to_pred, expected[1].to(pred_dtype), "gradient of pred")
    assert_same(to_target, expected[2].to(target_dtype), "gradient of target")
    weight = uniform((4,), 0, 1, rng)  # rounded to the type of the loss, not to that of one side
    for reduction in ("sum", "mean"):
        reduced, to_pred = backend.value_and_gradient(
            pred, target, **options | {"weight": weight, "reduction": reduction}
        )
        assert reduced.dtype == wide
        assert to_pred.dtype == pred_dtype
        total = numpy64(value) @ numpy64(weight) / (4 if reduction == "mean" else 1)
        assert_close(reduced, total, atol=0, rtol=1e-14 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ["pred", "target", "weight"])
def test_tensors_that_negate_when_read_are_read_so(backend, name):
    """Memory has the opposite, as of the imaginary part of a conjugate, but packed: what is not would be copied."""
    given = {"pred": sample_pair()[0], "target": sample_pair()[1], "weight": torch.tensor([0.5, 2.0, 0.0, 1.0])}
    expected = backend.value_and_gradient(**given, wrt=BOTH, reduction="sum")
    given[name] = torch._neg_view(-given[name])
    assert given[name].is_neg()
    for actual, same in zip(backend.value_and_gradient(**given, wrt=BOTH, reduction="sum"), expected, strict=True):
        assert_same(actual, same)


def test_a_float16_gradient_may_overflow_to_inf_but_not_to_nan(backend):
    """Boxes of 2^-14: the gradient is near 2^14 / 10, and 65,504 is exceeded by an upstream gradient of 2^10."""
    pred, target = (vertices * 2.0**-14 for vertices in sample_pair())
    upstream = torch.full((4,), 2.0**10)
    pred, target = pred.half(), target.half()
    _, expected = backend.value_and_gradient(pred.float(), target.float(), upstream, reduction="none")
    _, actual = backend.value_and_gradient(pred, target, upstream, reduction="none")
    assert torch.isinf(actual).any()
    assert_same(actual, expected.half())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integer_type(backend, dtype):
    pred, target = sample_pair()
    lengths = {"pred_lengths": torch.tensor([5, 0, 3, 4]), "target_lengths": torch.tensor([6, 1, 3, 5])}
    expected = backend.value_and_gradient(pred, target, reduction="none", **lengths)
    lengths = {name: values.to(dtype) for name, values in lengths.items()}
    actual = backend.value_and_gradient(pred, target, reduction="none", **lengths)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], "gradient")


def transposed(tensor):
    """The same values, stored with the first two dimensions the other way round."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def planar(tensor):
    """The same values, stored with all x before all y."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def strided(tensor):
    """The same values, every second one of a larger tensor in each dimension."""
    larger = tensor.new_full([2 * size for size in tensor.shape], 77 if tensor.dtype != torch.bool else 1)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def offset(tensor):
    """The same values, in the middle of a larger storage that starts at an odd element."""
    larger = tensor.new_full((tensor.numel() + 5,), 77 if tensor.dtype != torch.bool else 1)
    view = larger[3 : 3 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("layout", [planar, strided, offset, transposed])
def test_layouts_of_the_vertices(backend, layout):
    pred, target = (vertices.to(backend.device) for vertices in sample_pair())
    options = {"reduction": "none", "convexity_weight": 0.5}
    expected = backend.value_and_gradient(pred, target, wrt=BOTH, **options)
    for sides in [(layout(pred), target), (pred, layout(target)), (layout(pred), layout(target))]:
        leaves = [side.detach() for side in sides]
        assert torch.equal(leaves[0], pred)
        assert torch.equal(leaves[1], target)
        actual = backend.value_and_gradient(*leaves, wrt=BOTH, **options)
        for got, want in zip(actual, expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("layout", [strided, offset])
def test_layouts_of_lengths_masks_and_weights(backend, layout):
    rng = generator(73)
    pred, target = sample_pair()
    choices = [
        {"pred_lengths": torch.tensor([5, 2, 3, 4]), "weight": uniform((4,), 0, 1, rng).float()},
        {"target_mask": uniform((4, 6), 0, 1, rng) < 0.6, "weight": uniform((4, 3), 0, 1, rng).float()},
    ]
    for options in choices:
        expected = backend.value_and_gradient(pred, target, **options)
        options = {name: layout(values.to(backend.device)) for name, values in options.items()}  # noqa: PLW2901
        actual = backend.value_and_gradient(pred, target, **options)
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1], "gradient")
    mask = uniform((4, 6), 0, 1, rng) < 0.6
    expected = backend.value_and_gradient(pred, target, target_mask=mask)
    actual = backend.value_and_gradient(pred, target, target_mask=transposed(mask.to(backend.device)))
    assert_same(actual[1], expected[1], "gradient")


def test_a_mask_whose_columns_lie_far_apart(backend):
    """Its last column starts 2^31 bytes after the first."""
    pred, target = sample_pair()
    mask = uniform((4, 5), 0, 1, generator(74)) < 0.6
    far = torch.empty(2**31 + 4, dtype=torch.bool, device=backend.device).as_strided((4, 5), (1, 2**29))
    far.copy_(mask)
    expected = backend.value_and_gradient(pred, target, pred_mask=mask)
    actual = backend.value_and_gradient(pred, target, pred_mask=far)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], "gradient")


def test_expanded_inputs(backend):
    """A stride of 0 over the batch, over the vertices, and over both; for lengths, masks and weights, too."""
    device = backend.device
    pred, target = (vertices.to(device) for vertices in sample_pair())
    one = {"pred": pred[:1].expand(4, -1, -1), "target": target[:1].expand(4, -1, -1)}
    point = {"pred": pred[:, :1].expand(-1, 5, -1), "target": target[:, :1].expand(-1, 6, -1)}
    diagonal = {"pred": pred[..., :1].expand(-1, -1, 2), "target": target[..., :1].expand(-1, -1, 2)}
    for expanded in (one, point, diagonal):
        for sides in [("pred",), ("target",)]:
            tensors = {"pred": pred, "target": target} | {side: expanded[side] for side in sides}
            full = {name: tensor.contiguous() for name, tensor in tensors.items()}
            want = backend.value_and_gradient(**full, wrt=BOTH, reduction="none")
            got = backend.value_and_gradient(**tensors, wrt=BOTH, reduction="none")
            for name, g, w in zip(("value", *BOTH), got, want, strict=True):
                assert_same(g, w, name)
    lengths, mask = torch.tensor(3, device=device), torch.tensor([[True, False, True, True, True, True]], device=device)
    options = {"pred_lengths": lengths.expand(4), "target_mask": mask.expand(4, 6)}
    options["weight"] = torch.tensor(2.0, device=device).expand(4, 3)
    want = backend.value_and_gradient(pred, target, **{name: v.contiguous() for name, v in options.items()})
    got = backend.value_and_gradient(pred, target, **options)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1], "gradient")


def test_the_gradient_of_an_expanded_prediction_is_the_sum(backend):
    pred, target = (vertices.to(backend.device) for vertices in sample_pair())
    leaf = pred[:1].clone().requires_grad_()
    backend.loss(leaf.expand(4, -1, -1), target, reduction="sum").backward()
    _, each = backend.value_and_gradient(pred[:1].expand(4, -1, -1), target, reduction="sum")
    assert_close(leaf.grad, each.sum(0, keepdim=True), atol=1e-7)


def test_the_gradient_reaches_a_flat_head(backend):
    """Vertices as a network gives them: columns of a wider output."""
    pred, target = (vertices.to(backend.device) for vertices in sample_pair())
    head = torch.full((4, 13), 9.0, device=backend.device)
    head[:, 2:12] = pred.reshape(4, 10)
    head.requires_grad_()
    backend.loss(head[:, 2:12].unflatten(1, (5, 2)), target).backward()
    _, expected = backend.value_and_gradient(pred, target)
    assert_same(head.grad[:, 2:12].reshape(4, 5, 2), expected)
    assert_same(head.grad[:, [0, 1, 12]], torch.zeros(4, 3, device=backend.device))


def test_inputs_are_left_alone(backend):
    rng = generator(74)
    pred, target = (vertices.to(backend.device) for vertices in sample_pair())
    options = {
        "pred_lengths": torch.tensor([9, -1, 3, 4]).to(backend.device),
        "target_mask": (uniform((4, 6), 0, 1, rng) < 0.6).to(backend.device),
        "weight": uniform((4, 2), 0, 1, rng).to(backend.device),
    }
    given = {"pred": pred.requires_grad_(), "target": target.requires_grad_(), **options}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    upstream = torch.full((4,), 2.0, device=backend.device)
    backend.loss(**given, convexity_weight=1.0, reduction="none").backward(upstream)
    for name, tensor in given.items():
        assert_same(tensor.detach(), before[name], name)
    assert (upstream == 2).all()


def test_the_same_input_gives_the_same_bits(backend):
    rng = generator(75)
    batch = backend.batch(300)
    pred, target = star(batch, 7, rng).float(), convex(batch, 6, rng).float()
    first = backend.value_and_gradient(pred, target, wrt=BOTH, convexity_weight=0.5)
    for _ in range(3):
        again = backend.value_and_gradient(pred, target, wrt=BOTH, convexity_weight=0.5)
        for got, want in zip(again, first, strict=True):
            assert_same(got, want)


def test_a_meta_tensor_gives_a_meta_tensor():
    pred, target = PRED.to("meta").requires_grad_(), TARGET.to("meta")
    value = mgiou_loss(pred, target, reduction="none", convexity_weight=1.0)
    assert (value.device.type, value.shape) == ("meta", (4,))
    value.sum().backward()
    assert pred.grad.shape == PRED.shape
