"""`check_finite`, `find_nonfinite`, and the loss that checks itself."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import INF, NAN, convex, generator, one_process
from triton_mgiou import MGIoULoss, PolygonLoss, box_mgiou, box_mgiou_loss, debugging, mgiou_loss, polygon_mgiou
from triton_mgiou.training import NonFinite, NonFiniteError, check_finite, debug, debug_enabled, find_nonfinite


def pair():
    pred, target = convex(3, 4, generator(1)).float(), convex(3, 5, generator(2)).float()
    return pred.requires_grad_(), target


class Operations(TorchDispatchMode):
    """Everything that PyTorch is asked to compute, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_error_tells_everything():
    values = torch.arange(24.0).reshape(2, 3, 4)
    values[0, 2, 1] = NAN
    values[1, 0, 0], values[1, 0, 3], values[1, 2, 3] = INF, -INF, NAN
    with pytest.raises(NonFiniteError) as caught:
        check_finite(values, "scores", "head, level 2")
    rest = values.numpy()[np.isfinite(values.numpy())]
    assert caught.value.where == "head, level 2"
    assert caught.value.report == NonFinite(
        name="scores",
        shape=(2, 3, 4),
        dtype=torch.float32,
        nan=2,
        inf=2,
        first=((0, 2, 1), (1, 0, 0), (1, 0, 3)),
        finite=(rest.min(), rest.max(), pytest.approx(rest.mean())),
    )
    assert str(caught.value) == (
        "head, level 2: scores: 2 NaN and 2 Inf in shape (2, 3, 4), float32; first at [0, 2, 1], [1, 0, 0], [1, 0, 3]; "
        f"of the finite rest: min 0, max 22, mean {rest.mean():.6g}"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "it crosses processes"


def test_an_error_where_nothing_is_finite():
    with pytest.raises(NonFiniteError, match=r"^here: x: 1 NaN and 1 Inf in .* no other element is finite$"):
        check_finite(torch.tensor([INF, NAN]), "x", "here")
    with pytest.raises(NonFiniteError, match=r"x: 1 NaN and 0 Inf in shape \(\), float32; first at \[\]; no other"):
        check_finite(torch.tensor(NAN), "x", "here")


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2],
    ids=str,
)
def test_every_floating_dtype(dtype):
    fine = torch.tensor([1.0, -2.0, 4.0]).to(dtype)
    check_finite(fine, "x", "here")
    (report,) = find_nonfinite([torch.tensor([1.0, NAN, 4.0, INF]).to(dtype)])
    assert (report.name, report.nan, report.inf, report.first) == ("0", 1, 1, ((1,), (3,)))
    assert report.finite == (1.0, 4.0, 2.5)


def test_the_largest_finite_numbers_are_finite():
    for dtype in (torch.float16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        check_finite(torch.full((1000,), largest, dtype=dtype), "x", "here")
    (report,) = find_nonfinite([torch.tensor([torch.finfo(torch.float32).max] * 3 + [NAN])])
    assert report.finite[2] == pytest.approx(torch.finfo(torch.float32).max)


def test_what_has_no_nan_is_fine():
    for tensor in (torch.zeros(0), torch.tensor([1, 2]), torch.tensor([True]), torch.empty(3, device="meta")):
        check_finite(tensor, "x", "here")
    check_finite(torch.eye(3).to_sparse(), "x", "here")
    with pytest.raises(NonFiniteError, match=r"1 NaN .* first at \[1, 1\]"):
        check_finite(torch.diag(torch.tensor([1.0, NAN])).to_sparse(), "x", "here")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_nested_tensor_without_parts_is_fine():
    assert find_nonfinite({"cache": torch.nested.nested_tensor([])}) == []


def test_a_mask_says_what_counts():
    values = torch.tensor([[[1.0, 2.0], [NAN, INF]], [[3.0, 4.0], [5.0, NAN]]])
    mask = torch.tensor([[True, False], [True, True]]).unsqueeze(2)
    with pytest.raises(NonFiniteError) as caught:
        check_finite(values, "x", "here", mask=mask)
    report = caught.value.report
    assert (report.nan, report.inf, report.first, report.finite) == (1, 0, ((1, 1, 1),), (1.0, 5.0, 3.0))
    check_finite(values, "x", "here", mask=torch.tensor([[True, False], [True, False]]).unsqueeze(2))


def test_wrong_arguments_of_check_finite():
    with pytest.raises(TypeError, match=r"tensor must be a torch.Tensor, got list"):
        check_finite([1.0], "x", "here")
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        check_finite(torch.zeros(2), "x", "here", mask=torch.ones(2))
    for shape in ((3,), (2, 2)):
        with pytest.raises(ValueError, match=r"mask must be broadcastable to the tensor's shape \(2,\), got \("):
            check_finite(torch.zeros(2), "x", "here", mask=torch.ones(shape, dtype=torch.bool))


def test_find_nonfinite_in_a_module():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    assert find_nonfinite(model) == []
    with torch.no_grad():
        model[0].weight[1, 0] = NAN
        model[1].running_var[2] = INF
    model[2].bias.grad = torch.tensor([NAN])
    found = {report.name: (report.nan, report.inf) for report in find_nonfinite(model)}
    assert found == {"0.weight": (1, 0), "1.running_var": (0, 1), "2.bias.grad": (1, 0)}
    in_state = {report.name for report in find_nonfinite(model.state_dict())}
    assert in_state == {"0.weight", "1.running_var"}


def test_what_has_no_values_yet_is_passed_over():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1), nn.LazyBatchNorm1d())
    with torch.no_grad():
        model[1].bias.fill_(NAN)
    assert [report.name for report in find_nonfinite(model)] == ["1.bias"]


def test_this_process_part_of_a_tensor_that_is_spread():
    with one_process() as mesh:
        spread = distribute_tensor(torch.tensor([[1.0, 2.0], [INF, NAN]]), mesh, [Shard(0)])
        (report,) = find_nonfinite({"w": spread})
        assert find_nonfinite([distribute_tensor(torch.ones(2), mesh, [Replicate()])]) == []
    assert (report.name, report.nan, report.inf, report.first) == ("w", 1, 1, ((1, 0), (1, 1)))


def test_find_nonfinite_in_a_checkpoint():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"][0, 1] = INF
    circle = [torch.tensor(NAN)]
    circle.append(circle)
    checkpoint = {
        "epoch": 3,
        "model": model,
        "optimizer": optimizer.state_dict(),
        "ema": ({"w": torch.tensor([1.0, NAN])}, None),
        "circle": circle,
    }
    names = [report.name for report in find_nonfinite(checkpoint)]
    assert names == ["optimizer.state.0.exp_avg_sq", "ema.0.w", "circle.0"]


def test_a_tensor_that_is_a_key_is_named_by_its_number():
    """As parameters are in the state of an optimizer; their text has many lines."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.bias]["exp_avg"][1] = NAN
    assert [report.name for report in find_nonfinite(optimizer.state)] == ["1.exp_avg"]
    assert [report.name for report in find_nonfinite({(1, 2): {model.bias: optimizer.state}})] == ["(1, 2).0.1.exp_avg"]


def test_find_nonfinite_in_a_deep_nesting():
    nested = torch.tensor(NAN)
    for _ in range(5000):
        nested = [nested]
    (report,) = find_nonfinite(nested)
    assert report.name == ".".join(["0"] * 5000)
    with pytest.raises(TypeError, match="must be a module, dict, list, tuple, tensor or array, got str"):
        find_nonfinite("weights.pt")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["pred", "target"])
def test_bad_input_is_named(side, bad):
    tensors = dict(zip(("pred", "target"), pair(), strict=True))
    tensors[side].detach()[1, 2, 0] = bad
    assert not torch.isfinite(mgiou_loss(**tensors))
    with debug(), pytest.raises(NonFiniteError) as caught:
        mgiou_loss(**tensors)
    assert caught.value.where == "mgiou_loss, input"
    assert (caught.value.report.name, caught.value.report.first) == (side, ((1, 2, 0),))


@pytest.mark.parametrize("real", ["lengths", "mask"])
@pytest.mark.parametrize("side", ["pred", "target"])
def test_padding_may_hold_anything(side, real):
    tensors = dict(zip(("pred", "target"), pair(), strict=True))
    size = tensors[side].shape[1]
    tensors[side].detach()[1, size - 1] = torch.tensor([NAN, INF])
    lengths = torch.tensor([size, size - 1, size + 7], dtype=torch.int32)
    option = lengths if real == "lengths" else torch.arange(size) < lengths[:, None]
    with debug():
        loss = mgiou_loss(**tensors, **{f"{side}_{real}": option})
        loss.backward()
    assert torch.isfinite(tensors["pred"].grad).all()
    tensors[side].detach()[1, size - 2, 1] = NAN
    with debug(), pytest.raises(NonFiniteError) as caught:
        mgiou_loss(**tensors, **{f"{side}_{real}": option})
    report = caught.value.report
    assert (report.name, report.nan, report.inf, report.first) == (side, 1, 0, ((1, size - 2, 1),))


def test_bad_weights_are_named():
    pred, target = pair()
    weight = torch.tensor([1.0, NAN, 1.0])
    with debug(), pytest.raises(NonFiniteError, match=r"mgiou_loss, input: weight: 1 NaN"):
        mgiou_loss(pred, target, weight=weight)
    with debug(), pytest.raises(NonFiniteError, match=r"mgiou_loss, input: avg_factor: 1 NaN"):
        mgiou_loss(pred, target, avg_factor=torch.tensor(NAN))


def test_a_bad_output_is_named():
    pred, target = pair()
    weight = torch.full((3,), 3e38)
    with debug(), pytest.raises(NonFiniteError, match=r"mgiou_loss, output: loss: 0 NaN and 1 Inf"):
        mgiou_loss(pred + 100, target, weight=weight, reduction="sum")


def test_bad_gradients_are_named():
    pred, target = pair()
    with debug():
        loss = mgiou_loss(pred, target)
    message = "mgiou_loss, backward, from what uses the loss: gradient of the loss: 1 NaN"
    with pytest.raises(NonFiniteError, match=message):
        (loss * NAN).backward()

    pred = pred.detach().half().requires_grad_()
    with debug():
        loss = mgiou_loss(pred, target)
    message = r"mgiou_loss, backward, upstream gradient up to 1e\+07: gradient of pred: .* float16"
    with pytest.raises(NonFiniteError, match=message):
        (loss * 1e7).backward()


def test_only_the_gradient_of_the_loss_is_checked():
    pred, target = pair()
    with debug():
        loss = mgiou_loss(pred, target)
    (loss + (pred * torch.tensor(INF)).sum()).backward()
    assert not torch.isfinite(pred.grad).any()


def test_values_and_gradients_are_the_same(backend):
    """On every backend, with padding that holds NaN."""
    pred, target = pair()
    target[1, 3:] = NAN
    options = {"target_lengths": torch.tensor([5, 3, 4]), "convexity_weight": 1.0, "reduction": "none"}
    results = []
    for enabled in (False, True):
        with debug(enabled):
            results.append(backend.value_and_gradient(pred, target, wrt=("pred", "target"), **options))
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)
    with debug(), pytest.raises(NonFiniteError, match=r"mgiou_loss, input: target: .* first at \[1, 3, 0\]"):
        backend.value_and_gradient(pred, target, **{**options, "target_lengths": torch.tensor([5, 4, 4])})
    with debug(), pytest.raises(NonFiniteError, match="mgiou_loss, backward, from what uses the loss: gradient of the"):
        backend.value_and_gradient(pred, target, upstream=torch.tensor([1.0, INF, 1.0]), **options)


def test_debugging_keeps_the_messages_about_arguments():
    with debug():
        with pytest.raises(TypeError, match=r"pred must be a torch.Tensor, got int"):
            mgiou_loss(3, 4)
        with pytest.raises(ValueError, match=r"pred_lengths must have shape \(3,\), got \(2,\)"):
            mgiou_loss(*pair(), pred_lengths=torch.tensor([1, 2]))
        assert mgiou_loss(torch.zeros(0, 4, 2), torch.zeros(0, 4, 2)) == 0
    with pytest.raises(NonFiniteError), debug():
        mgiou_loss(torch.full((1, 3, 2), NAN), torch.zeros(1, 3, 2))


def test_debug_is_a_switch():
    assert not debug_enabled()
    with debug():
        assert debug_enabled()
        with pytest.raises(TypeError, match="enabled must be a bool, got str"), debug("off"):
            pass
        with debug(False):
            assert not debug_enabled()
            assert mgiou_loss(pair()[0] * NAN, pair()[1]).isnan()
        assert debug_enabled()
    assert not debug_enabled()


def test_blocks_of_several_threads_end_in_any_order():
    first, second, off = debug(), debug(), debug(False)
    for block in (first, second, off):
        block.__enter__()
    assert not debug_enabled()
    first.__exit__(None, None, None)
    assert not debug_enabled(), "the last one that has begun and not ended counts"
    off.__exit__(None, None, None)
    assert debug_enabled()
    second.__exit__(None, None, None)
    assert not debug_enabled()


def test_off_it_computes_nothing_more():
    """The loss reads no value on the host, and runs what it runs without the switch, operation by operation."""

    def operations():
        pred, target = pair()
        with Operations() as seen:
            mgiou_loss(pred, target, target_lengths=torch.tensor([5, 4, 3])).backward()
        return seen.names

    before = operations()
    assert "aten._local_scalar_dense.default" not in before
    with debug():
        assert "aten._local_scalar_dense.default" in operations()
    assert operations() == before


def test_compiled_losses_follow_the_switch():
    compiled = torch.compile(lambda p, t: 2 * mgiou_loss(p, t), backend="eager")
    pred, target = pair()
    bad = target.clone()
    bad[0, 0, 0] = NAN
    for _ in range(2):
        assert compiled(pred, bad).isnan()
        with debug():
            with pytest.raises(NonFiniteError, match="target: 1 NaN"):
                compiled(pred, bad)
            torch.testing.assert_close(compiled(pred, target), 2 * mgiou_loss(pred, target))


def test_transforms_pass():
    pred, target = pair()
    with debug():
        each = torch.func.vmap(lambda p, t: mgiou_loss(p[None], t[None]))(pred, target)
    torch.testing.assert_close(each, mgiou_loss(pred, target, reduction="none"))


FUNCTIONS = {
    "mgiou_loss": (mgiou_loss, (4, 2), (5, 2)),
    "box_mgiou_loss": (box_mgiou_loss, (5,), (5,)),
    "box_mgiou": (box_mgiou, (5,), (5,)),
    "polygon_mgiou": (polygon_mgiou, (4, 2), (5, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_no_values_passes(name):
    """Meta and fake tensors, tracing and export, and a batch of gradients."""
    function, *shapes = FUNCTIONS[name]
    first, second = (torch.rand(3, *shape, generator=generator(3)) for shape in shapes)

    class Module(nn.Module):
        def forward(self, first, second):
            return function(first, second)

    want = function(first, second)
    with debug():
        assert function(first.to("meta"), second.to("meta")).shape == want.shape
        with FakeTensorMode():
            assert function(torch.rand(3, *shapes[0]), torch.rand(3, *shapes[1])).shape == want.shape
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert function(first, second).shape == want.shape
        torch.testing.assert_close(make_fx(lambda each: function(each, second))(first)(first), want)
        for strict in (False, True):
            program = torch.export.export(Module(), (first, second), strict=strict)
            torch.testing.assert_close(program.module()(first, second), want)
        rows = torch.autograd.functional.jacobian(lambda each: function(each, second), first, vectorize=True)
    alone = torch.autograd.functional.jacobian(lambda each: function(each, second), first)
    torch.testing.assert_close(rows, alone)


@pytest.mark.parametrize("mode", ["l2", "hybrid"])
def test_the_l2_term_is_checked_too(mode):
    loss = PolygonLoss(mode, alpha=0.5)
    good = {
        "pred_kpts": torch.rand(3, 4, 2, requires_grad=True),
        "gt_kpts": torch.rand(3, 4, 2),
        "kpt_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "area": torch.rand(3, 1),
    }
    for name in ("pred_kpts", "gt_kpts", "area"):
        bad = good[name].detach().clone()
        bad[2] = NAN
        with debug():
            loss(**good | {name: bad})  # no vertex of the third is visible
        bad[0] = INF  # of which three of four vertices are visible
        with debug(), pytest.raises(NonFiniteError, match=f"PolygonLoss, input: {name}: 0 NaN and . Inf"):
            loss(**good | {name: bad})
    with debug():
        total, _ = loss(**good)
        with pytest.raises(NonFiniteError, match=r"PolygonLoss, backward, .*: gradient of the loss: 1 NaN"):
            (total * NAN).backward()


def test_the_module_is_checked_too():
    pred, target = pair()
    with debug(), pytest.raises(NonFiniteError, match="mgiou_loss, input: pred: 24 NaN"):
        MGIoULoss()(pred * NAN, target)


def test_the_environment_variable(monkeypatch):
    monkeypatch.setenv("TRITON_MGIOU_DEBUG", "1")
    code = """
import torch
from triton_mgiou import mgiou_loss
target = torch.rand(2, 4, 2)
target[1, 2, 0] = float("nan")
mgiou_loss(torch.rand(2, 4, 2), target)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "NonFiniteError: mgiou_loss, input: target: 1 NaN" in done.stderr


def test_values_of_the_environment_variable():
    assert [debugging.from_environment(value) for value in ("", "0", "1")] == [False, False, True]
    with pytest.raises(ValueError, match="TRITON_MGIOU_DEBUG must be 0 or 1, got 'yes'"):
        debugging.from_environment("yes")
