"""Gradients to both sets: against differences of the oracle, for any upstream, in blocks, under transforms."""

import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    AXIS_WEIGHTS,
    INF,
    assert_close,
    assert_finite,
    assert_gradient_close,
    assert_same,
    assert_zero,
    convex,
    generator,
)
from tests.pairs import oracle
from tests.pairs.helpers import FORMATS, OVER, PLANE, needs_kernel, random_boxes, uniform
from triton_mgiou import box_mgiou, polygon_mgiou
from triton_mgiou.reference import pairs

IN_KERNEL = ("cxcywhr", "cxcywh", "xyxy", "cxcyczlwhr")


def gradients(backend, first, second, upstream, **options):
    needs_kernel(backend, "polygons" if first.dim() > 2 and first.shape[-1] == 2 else options.get("fmt"), gradient=True)
    leaves = [each.detach().clone().to(backend.device).requires_grad_() for each in (first, second)]
    function = polygon_mgiou if first.dim() > 2 and first.shape[-1] == 2 else box_mgiou
    value = function(*leaves, backend=backend.name, **options)
    return [grad.cpu() for grad in torch.autograd.grad(value, leaves, upstream.to(backend.device))]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", IN_KERNEL)
def test_boxes_match_differences_of_the_oracle(backend, fmt, over):
    rng = generator(1)
    first, second = random_boxes(3, fmt, rng), random_boxes(4, fmt, rng)
    upstream = uniform((3, 4), -1, 1, rng)
    actual = gradients(backend, first, second, upstream, fmt=fmt, over=over)
    for side in (0, 1):
        expected = oracle.gradient(
            oracle.box_matrix, first.numpy(), second.numpy(), upstream.numpy(), side=side, fmt=fmt, over=over
        )
        assert_gradient_close(actual[side], expected, rtol=1e-6)
        single = gradients(backend, first.float(), second.float(), upstream.float(), fmt=fmt, over=over)[side]
        assert_gradient_close(single, actual[side], rtol=3e-5)


@pytest.mark.parametrize("axis_weight", AXIS_WEIGHTS)
@pytest.mark.parametrize("fmt", PLANE)
def test_axis_weights_have_their_gradient(backend, fmt, axis_weight):
    """The extent is a constant of the weights: float64 by PyTorch, which differences would take for a variable."""
    rng = generator(2)
    first, second = random_boxes(3, fmt, rng), random_boxes(19, fmt, rng)
    upstream = uniform((3, 19), -1, 1, rng)
    leaves = [each.clone().requires_grad_() for each in (first, second)]
    value = box_mgiou(*leaves, fmt=fmt, axis_weight=axis_weight, backend="eager")
    expected = torch.autograd.grad(value, leaves, upstream)
    actual = gradients(backend, first, second, upstream, fmt=fmt, axis_weight=axis_weight)
    for side in (0, 1):
        assert_gradient_close(actual[side], expected[side], rtol=1e-12)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", FORMATS)
def test_gradcheck(fmt, over):
    rng = generator(3)
    boxes = [random_boxes(n, fmt, rng) for n in (2, 3)]
    if fmt == "corners3d":  # the corners of a box tie; free ones do not
        boxes = [each + uniform(each.shape, -0.05, 0.05, rng) for each in boxes]
    boxes = [each.requires_grad_() for each in boxes]
    assert torch.autograd.gradcheck(lambda *pair: box_mgiou(*pair, fmt=fmt, over=over), boxes, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("angle", ["radians", "degrees"])
@pytest.mark.parametrize("clockwise", [True, False])
def test_angles_have_their_gradient(backend, angle, clockwise):
    rng = generator(4)
    first, second = random_boxes(3, "cxcywhr", rng), random_boxes(4, "cxcywhr", rng)
    if angle == "degrees":
        first[:, 4], second[:, 4] = (each[:, 4].rad2deg() for each in (first, second))
    options = {"angle": angle, "clockwise": clockwise}
    upstream = uniform((3, 4), -1, 1, rng)
    actual = gradients(backend, first, second, upstream, **options)
    for side in (0, 1):
        expected = oracle.gradient(
            oracle.box_matrix, first.numpy(), second.numpy(), upstream.numpy(), side=side, **options
        )
        assert_gradient_close(actual[side], expected, rtol=1e-6)


@pytest.mark.parametrize("over", OVER)
def test_polygons_match_differences_of_the_oracle(backend, over):
    rng = generator(5)
    first, second = convex(3, 4, rng), convex(4, 6, rng)
    upstream = uniform((3, 4), -1, 1, rng)
    actual = gradients(backend, first, second, upstream, over=over)
    for side in (0, 1):
        expected = oracle.gradient(
            oracle.polygon_matrix, first.numpy(), second.numpy(), upstream.numpy(), side=side, over=over
        )
        assert_gradient_close(actual[side], expected, rtol=1e-5)


def upstreams(rng):
    values = uniform((5, 70), -1, 1, rng).float()
    few = torch.zeros(5, 70)
    few[[0, 3], [69, 2]] = values[[0, 3], [69, 2]]
    yield "few entries", few
    yield "zeros", torch.zeros(5, 70)
    yield "one number, expanded", torch.tensor(0.5).expand(5, 70)
    yield "rows, expanded", values[:, :1].expand(5, 70)
    yield "transposed", values.T.contiguous().T
    yield "every second", values.repeat_interleave(2, 1)[:, ::2]


def test_any_upstream(backend):
    rng = generator(6)
    first, second = random_boxes(5, "cxcywhr", rng).float(), random_boxes(70, "cxcywhr", rng).float()
    eager = replace(backend, name="eager")
    for name, upstream in upstreams(rng):
        actual = gradients(backend, first, second, upstream)
        expected = gradients(eager, first.double(), second.double(), upstream.double().contiguous())
        for side in (0, 1):
            assert_gradient_close(actual[side], expected[side], rtol=1e-4, what=name)


def test_zero_upstream_is_no_gradient_even_beside_overflow(backend):
    boxes = torch.tensor([[0, 0, 1e-44, 1e-44, 0], [1e38, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    for grad in gradients(backend, boxes, boxes, torch.zeros(3, 3)):
        assert_zero(grad)


@pytest.mark.parametrize("over", OVER)
def test_a_gradient_saturates_with_what_comes_from_above(backend, over):
    """Boxes so small that derivatives overflow, but not times a small factor. Of many pairs none may give NaN."""
    rng = generator(15)
    tiny = torch.tensor([1e-39, 1e-39, 1e-39, 1e-39, 1.0])
    first, second = (random_boxes(n, "cxcywhr", rng).float() * tiny for n in (3, 4))
    eager = replace(backend, name="eager")
    few = torch.tensor([[1e-6]])
    exact = gradients(eager, first[:1].double(), second[:1].double(), few.double(), over=over)
    for actual, want in zip(gradients(backend, first[:1], second[:1], few, over=over), exact, strict=True):
        assert_gradient_close(actual[:, :4], want[:, :4], rtol=1e-4)
    large = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).expand(3, 4) * 2.0**16
    for grad in gradients(backend, first, second, large, over=over):
        assert_finite(grad)
        assert grad.abs().max() > 1e37


@pytest.mark.parametrize("sizes", [(1, 70), (70, 1), (2, 33)], ids=str)
@pytest.mark.parametrize("memory", [2**28, 2**14])
def test_gradients_that_saturate_add_up_to_no_inf(backend, sizes, memory, monkeypatch):
    """Those of one box to many equal ones, each as large as the type has, at once and in blocks."""
    monkeypatch.setattr(pairs, "MEMORY", memory)
    box = torch.tensor([[0, 0, 1e-39, 1e-39, 0]])
    first, second = box.expand(sizes[0], 5), (box + torch.tensor([3e-40, 0, 0, 0, 0])).expand(sizes[1], 5)
    for grad in gradients(backend, first, second, torch.full(sizes, 2.0**16)):
        assert_finite(grad)
        assert grad[:, 0].abs().min() > 1e38


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("fmt", IN_KERNEL)
def test_inf_from_above_is_seen(backend, fmt, over):
    """A GradScaler looks for it. The gradients of other boxes stay as they are."""
    rng = generator(16)
    first, second = random_boxes(3, fmt, rng).float(), random_boxes(4, fmt, rng).float()
    upstream = torch.ones(3, 4)
    plain = gradients(backend, first, second, upstream, fmt=fmt, over=over)
    upstream[1, 2] = INF
    for grad, want, place in zip(
        gradients(backend, first, second, upstream, fmt=fmt, over=over), plain, (1, 2), strict=True
    ):
        assert not grad[place].isfinite().all()
        rest = torch.arange(len(grad)) != place
        assert_same(grad[rest], want[rest])


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("turn", [0.0, 30.0, 45.0, 135.0])
def test_boxes_across_each_other_do_not_turn(backend, turn, over):
    """To the right and to the left is the same there, so the derivative to each angle is 0."""
    across = torch.tensor([[3.0, 1.0, 4.0, 2.0, turn], [3.0, 1.0, 7.0, 0.5, turn - 90.0]])
    for grad in gradients(backend, across, across.flip(0), torch.eye(2), over=over, angle="degrees"):
        assert_zero(grad[:, 4])


def test_one_side_alone(backend):
    rng = generator(7)
    first, second = random_boxes(3, "cxcywhr", rng), random_boxes(4, "cxcywhr", rng)
    both = gradients(backend, first, second, torch.ones(3, 4, dtype=torch.float64))
    for side in (0, 1):
        pair = [first.clone().to(backend.device), second.clone().to(backend.device)]
        pair[side].requires_grad_()
        (alone,) = torch.autograd.grad(box_mgiou(*pair, backend=backend.name).sum(), pair[side])
        assert_same(alone.cpu(), both[side])


def test_a_set_with_itself(backend):
    """Both gradients arrive at the one leaf."""
    rng = generator(8)
    boxes = random_boxes(5, "cxcywhr", rng)
    upstream = uniform((5, 5), -1, 1, rng)
    leaf = boxes.clone().to(backend.device).requires_grad_()
    (grad,) = torch.autograd.grad(box_mgiou(leaf, leaf, backend=backend.name), leaf, upstream.to(backend.device))
    first, second = gradients(backend, boxes, boxes, upstream)
    assert_close(grad, first + second, atol=1e-14)


def test_equal_boxes_have_no_gradient(backend):
    boxes = random_boxes(20, "cxcywhr", generator(9), 20).float()
    for over in OVER:
        for grad in gradients(backend, boxes, boxes, torch.eye(20), over=over):
            assert_zero(grad, over)


def test_half_types_get_their_gradient_in_kind(backend):
    rng = generator(10)
    first, second = random_boxes(3, "cxcywhr", rng).half(), random_boxes(4, "cxcywhr", rng).bfloat16()
    grads = gradients(backend, first, second, torch.ones(3, 4))
    full = gradients(backend, first.float(), second.float(), torch.ones(3, 4))
    for grad, exact, dtype in zip(grads, full, (torch.float16, torch.bfloat16), strict=True):
        assert grad.dtype == dtype
        assert_close(grad, exact.to(dtype), atol=0)


def test_the_same_input_gives_the_same_bits(backend):
    rng = generator(11)
    first, second = random_boxes(40, "cxcywhr", rng).float(), random_boxes(300, "cxcywhr", rng).float()
    upstream = uniform((40, 300), -1, 1, rng).float()
    runs = [gradients(backend, first, second, upstream) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert_same(a, b)


class LiveBytes(TorchDispatchMode):
    """The most bytes of storage that were alive at a time of what operators made."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_change_nothing_and_keep_to_their_memory(fmt, monkeypatch):
    rng = generator(12)
    batch = [random_boxes(2 * n, fmt, rng).unflatten(0, (2, n)) for n in (50, 60)]
    upstream = uniform((2, 50, 60), -1, 1, rng)
    backend = type("Eager", (), {"device": "cpu", "name": "eager"})
    whole = box_mgiou(*batch, fmt=fmt)
    whole_grads = gradients(backend, *batch, upstream, fmt=fmt)
    for memory in (2**22, 2**20):
        monkeypatch.setattr(pairs, "MEMORY", memory)
        with LiveBytes() as live:
            value = box_mgiou(*batch, fmt=fmt)
            grads = gradients(backend, *batch, upstream, fmt=fmt)
        assert live.peak <= memory + 4 * value.nbytes
        assert live.peak >= memory / 8, "the estimate wastes what it may take"
        assert_same(value, whole)
        for grad, expected in zip(grads, whole_grads, strict=True):
            assert_close(grad, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(3, 3), (20, 5), (5, 20), (30, 30)], ids=str)
def test_blocks_of_polygons_keep_to_their_memory(sizes, monkeypatch):
    rng = generator(19)
    polygons = [convex(n, size, rng) for n, size in zip((20, 25), sizes, strict=True)]
    upstream = uniform((20, 25), -1, 1, rng)

    def gradients_of(first, second):
        leaves = [each.clone().requires_grad_() for each in (first, second)]
        return torch.autograd.grad(polygon_mgiou(*leaves), leaves, upstream)

    whole = gradients_of(*polygons)
    pair = 8 * sum(sizes) ** 2  # bytes of all projections
    for memory in (1000 * pair, 2000 * pair):
        monkeypatch.setattr(pairs, "MEMORY", memory)
        with LiveBytes() as live:
            grads = gradients_of(*polygons)
        assert memory / 8 <= live.peak <= memory + 4 * upstream.nbytes
        for grad, expected in zip(grads, whole, strict=True):
            assert_close(grad, expected, atol=1e-12, rtol=1e-12)


def test_forward_mode_needs_no_blocks(monkeypatch):
    """However many pairs there are: blocks know no tangent."""
    rng = generator(22)
    first, second, tangent = (random_boxes(8, "cxcywhr", rng) for _ in range(3))
    step = 1e-6
    slope = (box_mgiou(first + step * tangent, second) - box_mgiou(first - step * tangent, second)) / (2 * step)
    monkeypatch.setattr(pairs, "MEMORY", 2**12)
    with forward_ad.dual_level():
        value = box_mgiou(forward_ad.make_dual(first, tangent), second, backend="eager")
        assert_close(forward_ad.unpack_dual(value).tangent, slope, atol=1e-7)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (3, 1, 7), (5, 6, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 4, 10, 12, 13, 1000])
def test_blocks_have_each_pair_once_and_no_more_than_asked(sizes, most):
    seen = torch.zeros(sizes)
    places = list(pairs._places(seen.shape, most))
    for place in places:
        assert 1 <= seen[place].numel() <= most
        seen[place] += 1
    assert (seen == 1).all()
    assert len(places) <= 2 * math.ceil(seen.numel() / most), "far smaller than they may be"


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_need_no_blocks(monkeypatch):
    """However many pairs there are: blocks know no transform, and a compiler would unroll them."""
    rng = generator(23)
    first, second = random_boxes(8, "cxcywhr", rng).reshape(2, 4, 5), random_boxes(5, "cxcywhr", rng)
    expected = box_mgiou(first, second.expand(2, 5, 5))
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(box_mgiou(leaf, second.expand(2, 5, 5)).sum(), leaf)
    monkeypatch.setattr(pairs, "MEMORY", 2**12)
    function = partial(box_mgiou, backend="eager")
    assert_close(torch.vmap(function, in_dims=(0, None))(first, second), expected, atol=1e-14)
    of_each = torch.vmap(torch.func.grad(lambda boxes: function(boxes, second).sum()))(first)
    assert_close(of_each, gradient, atol=1e-14)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(leaf, second.expand(2, 5, 5)).sum(), leaf)
    assert_close(actual, gradient, atol=1e-14)


def test_one_pair_is_no_block(monkeypatch):
    """However little memory there is: it has a second derivative."""
    monkeypatch.setattr(pairs, "MEMORY", 1)
    first, second = (random_boxes(1, "cxcywhr", generator(seed)).requires_grad_() for seed in (20, 21))
    assert torch.autograd.gradgradcheck(partial(box_mgiou, backend="eager"), (first, second))


@pytest.mark.parametrize("over", OVER)
def test_what_needs_no_blocks_has_a_second_derivative(over):
    """Of boxes far from any tie."""
    first, second = (random_boxes(2, "cxcywhr", generator(seed)) for seed in (20, 21))
    first[:, :2] += 0.3
    second.requires_grad_()
    first.requires_grad_()
    assert torch.autograd.gradgradcheck(partial(box_mgiou, over=over, backend="eager"), (first, second))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_under_a_checkpoint(fmt, use_reentrant, monkeypatch):
    rng = generator(18)
    first, second = (random_boxes(n, fmt, rng).requires_grad_() for n in (5, 6))
    upstream = uniform((5, 6), -1, 1, rng)
    expected = torch.autograd.grad(box_mgiou(first, second, fmt=fmt), (first, second), upstream)
    monkeypatch.setattr(pairs, "MEMORY", 2**12)
    value = checkpoint(partial(box_mgiou, fmt=fmt), first, second, use_reentrant=use_reentrant)
    value.backward(upstream)
    for leaf, want in zip((first, second), expected, strict=True):
        assert_close(leaf.grad, want, atol=1e-12, rtol=1e-12)


def test_blocks_refuse_a_second_derivative_and_a_batch_of_gradients(monkeypatch):
    monkeypatch.setattr(pairs, "MEMORY", 2**12)
    boxes = random_boxes(8, "cxcywhr", generator(13)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative.*MEMORY"):
        torch.autograd.grad(box_mgiou(boxes, boxes, over="depth").sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch of gradients.*is_grads_batched=False.*MEMORY"):
        torch.autograd.grad(box_mgiou(boxes, boxes), boxes, torch.ones(2, 8, 8), is_grads_batched=True)


def test_transforms_of_the_eager_matrix():
    rng = generator(14)
    first, second = random_boxes(12, "cxcywhr", rng).reshape(3, 4, 5), random_boxes(6, "cxcywhr", rng)
    mapped = torch.vmap(box_mgiou, in_dims=(0, None))(first, second)
    for b in range(3):
        assert_same(mapped[b], box_mgiou(first[b], second))
    columns = torch.vmap(lambda box: box_mgiou(first[0], box.unsqueeze(0)).squeeze(1), out_dims=1)(second)
    assert_same(columns, box_mgiou(first[0], second))
    per_sample = torch.vmap(torch.func.grad(lambda a: box_mgiou(a, second).sum()))(first)
    leaf = first.clone().requires_grad_()
    for b in range(3):
        (grad,) = torch.autograd.grad(box_mgiou(leaf[b], second).sum(), leaf)
        assert_close(per_sample[b], grad[b], atol=1e-14)
    forward = torch.func.jacfwd(lambda boxes: box_mgiou(boxes, second))(first[0])
    assert_close(forward, torch.func.jacrev(lambda boxes: box_mgiou(boxes, second))(first[0]), atol=1e-14)
    polygons = [convex(n, 4, rng) for n in (6, 5)]
    mapped = torch.vmap(polygon_mgiou, in_dims=(0, None))(polygons[0].reshape(2, 3, 4, 2), polygons[1])
    assert_same(mapped.reshape(6, 5), polygon_mgiou(*polygons))
    assert np.isfinite(mapped.numpy()).all()
