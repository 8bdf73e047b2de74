"""`TrainingGuard`: which steps it takes, what it goes back to, what it tells, and what a kill leaves."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from tests.helpers import INF, NAN, generator, one_process
from triton_mgiou.cli import main
from triton_mgiou.training import (
    AlphaSchedule,
    GradientMonitor,
    NonFiniteError,
    TrainingGuard,
    TrainingStoppedError,
    find_nonfinite,
)
from triton_mgiou.training.finite import named_tensors


def make(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return model, optimizer(model.parameters(), lr=0.01, **options)


def batch(index):
    return torch.randn(16, 3, generator=generator(index))


def loss_of(model, images):
    return model(images).square().mean()


def backward(model, optimizer, images, scaler=None):
    optimizer.zero_grad()
    loss = loss_of(model, images)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def state_of(model, optimizer):
    """Every number of both, copied."""
    states = [s for _, s in sorted(optimizer.state_dict()["state"].items())]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    values |= {f"{i}.{name}": value.clone() for i, state in enumerate(states) for name, value in state.items()}
    return values


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "guard"


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_good_steps_are_those_of_plain_pytorch(optimizer, folder):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    plain, guarded = make(optimizer, **options), make(optimizer, **options)
    guard = TrainingGuard(*guarded, max_norm=0.05, checkpoint_dir=folder)
    for index in range(6):
        backward(*plain, batch(index))
        norm = nn.utils.clip_grad_norm_(plain[0].parameters(), 0.05)
        plain[1].step()
        assert guard.step(backward(*guarded, batch(index))) is True
        assert guard.grad_norm == pytest.approx(norm.item())
        assert_same_state(state_of(*guarded), state_of(*plain))
    assert guard.grad_norm > 0.05, "clipping had something to do"
    assert (guard.steps, guard.skipped) == (6, 0)


def test_a_bad_batch_leaves_no_trace(folder):
    plain, guarded = make(), make()
    guard = TrainingGuard(*guarded, max_norm=INF, checkpoint_dir=folder)
    for index in range(6):
        if index in (2, 4):
            bad = batch(index)
            bad[3, 1] = NAN
            loss = backward(*guarded, bad)
            assert find_nonfinite(guarded[0].state_dict()), "the forward pass poisons BatchNorm"
            with pytest.warns(RuntimeWarning, match=f"step {index + 1} skipped: the loss is nan"):
                assert guard.step(loss) is False
            assert all(parameter.grad is None for parameter in guarded[0].parameters())
        else:
            backward(*plain, batch(index))
            plain[1].step()
            assert guard.step(backward(*guarded, batch(index))) is True
        # num_batches_tracked and the running statistics too
        assert_same_state(state_of(*guarded), state_of(*plain))
    assert (guard.steps, guard.skipped) == (6, 2)


def test_bad_gradients_of_a_finite_loss(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    loss = backward(model, optimizer, batch(0))
    before = state_of(model, optimizer)
    before.update(
        {name: value for name, value in make()[0].state_dict().items() if "running" in name or "num_b" in name}
    )
    model[3].bias.grad[1] = -INF
    with pytest.warns(RuntimeWarning, match=r"step 1 skipped: gradient of 3.bias: 0 NaN and 1 Inf .* first at \[1\]"):
        assert not guard.step(loss)
    assert_same_state(state_of(model, optimizer), before)


def test_gradients_whose_squares_overflow_are_clipped(folder):
    model, optimizer = make(torch.optim.SGD)
    guard = TrainingGuard(model, optimizer, max_norm=2.0, checkpoint_dir=folder)
    backward(model, optimizer, batch(0))
    for parameter in model.parameters():
        parameter.grad.mul_(1e30)
    direction = [parameter.grad.double() for parameter in model.parameters()]
    norm = torch.stack([each.norm() for each in direction]).norm()
    before = [parameter.detach().double() for parameter in model.parameters()]
    assert guard.step()
    assert guard.grad_norm == INF
    for parameter, old, each in zip(model.parameters(), before, direction, strict=True):
        torch.testing.assert_close(parameter.double(), old - 0.01 * 2.0 * each / norm, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "max_norm"),
    [
        (torch.float16, 1000.0, 10.0),
        (torch.float16, 1000.0, 1000.0),  # the norm of 20000 elements of this size overflows too
        (torch.float16, 1000.0, 2e5),  # above the norm, and above what float16 holds
        (torch.bfloat16, 1e38, 1000.0),
        (torch.float32, 1e25, 1e20),
        (torch.float64, 1e200, 1e199),
    ],
)
def test_the_norm_after_clipping_where_squares_overflow(dtype, size, max_norm, folder):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(20000, dtype=dtype))
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters()), max_norm=max_norm, checkpoint_dir=folder)
    model.weight.grad = torch.full((20000,), size, dtype=dtype)
    model.weight.grad[0] = -size
    assert guard.step()
    expected = min(size, max_norm / 20000**0.5)
    assert model.weight.grad[0] < 0
    torch.testing.assert_close(
        model.weight.grad.abs().double() / expected, torch.ones(20000).double(), atol=0, rtol=1e-2
    )


def test_patience_ends_a_run_and_tells_the_story(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=3, checkpoint_dir=folder)
    losses = []
    for index in range(4):
        loss = backward(model, optimizer, batch(index))
        losses.append(loss.item())
        verified = state_of(model, optimizer)
        guard.step(loss)
    for index in range(2):
        with pytest.warns(RuntimeWarning, match=f"step {index + 5} skipped"):
            guard.step(backward(model, optimizer, batch(0) * NAN))
    loss = backward(model, optimizer, batch(0) * NAN)
    with pytest.raises(TrainingStoppedError) as caught:
        guard.step(loss)
    story = str(caught.value)
    assert story.startswith("stopped after step 7, 3 in a row had NaN or Inf; the last good one was 4\n")
    rows = [line.split() for line in story.splitlines()[2:9]]
    assert [row[0] for row in rows] == list("1234567")
    assert [row[3] for row in rows] == ["taken"] * 4 + ["skipped"] * 3
    assert [float(row[1]) for row in rows[:4]] == pytest.approx(losses, rel=1e-5)
    assert [row[1] for row in rows[4:]] == ["nan"] * 3
    assert "1.running_mean: 8 NaN" in story
    assert story.splitlines()[-2] == f"the state that failed, with its gradients: {folder / 'failed.pt'}"
    assert story.splitlines()[-1] == f"the state before step 4, restored: {folder / 'last-good.pt'}"

    assert_same_state(state_of(model, optimizer), verified)
    good = torch.load(folder / "last-good.pt", weights_only=True)
    assert sorted(good) == ["model", "optimizer", "scaler", "step"]
    assert good["step"] == 4
    resumed = make()
    resumed[0].load_state_dict(good["model"])
    resumed[1].load_state_dict(good["optimizer"])
    assert_same_state(state_of(*resumed), verified)
    failed = torch.load(folder / "failed.pt", weights_only=True)
    assert failed["step"] == 7
    names = {report.name for report in find_nonfinite(failed)}
    assert {"model.1.running_mean", "gradients.0.weight"} <= names

    assert [main(["diagnose", str(folder / name)]) for name in ("last-good.pt", "failed.pt")] == [0, 1]

    assert guard.step(backward(model, optimizer, batch(4))), "whoever catches the error can go on"


def test_a_good_step_starts_the_count_anew(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=2, checkpoint_dir=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(8):
            assert guard.step(backward(model, optimizer, batch(index) * (NAN if index % 2 else 1))) is (index % 2 == 0)
    assert guard.skipped == 4


def test_a_step_with_finite_gradients_that_breaks_the_weights(folder):
    """The weights overflow in the step; the last good state is the one before it, not the one after."""
    model, optimizer = make(torch.optim.SGD)
    guard = TrainingGuard(model, optimizer, max_norm=INF, patience=1, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    loss = backward(model, optimizer, batch(1))
    verified = state_of(model, optimizer)
    model[0].weight.grad.mul_(1e4)
    optimizer.param_groups[0]["lr"] = 1e38
    assert guard.step(loss)
    assert find_nonfinite(model.state_dict())
    with pytest.raises(TrainingStoppedError, match=r"\n0.weight: .*\n(.*\n)*the step before made them"):
        guard.step(backward(model, optimizer, batch(2)))
    assert_same_state(state_of(model, optimizer), verified)


class Factored(torch.optim.SGD):
    """As Shampoo and SOAP: the state of a parameter has several tensors of one kind, which grow here by 1 a step."""

    def __init__(self, parameters, lr, wrap):
        super().__init__(parameters, lr)
        self.wrap = wrap

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["factors"] = self.wrap(torch.zeros(2), torch.zeros(3))
            for _, factor in named_tensors(state["factors"]):
                factor.add_(1)
        super().step()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda *both: list(both), "1"),
        (lambda *both: both, "1"),
        (lambda left, right: {"left": left, "right": right}, "right"),
        (lambda left, right: {"pairs": [(left, right)]}, "pairs.0.1"),
    ],
    ids=["list", "tuple", "dict", "nested"],
)
def test_tensors_in_containers_of_the_optimizer_state_are_seen_and_put_back(wrap, name, folder):
    model, optimizer = make(Factored, wrap=wrap)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    for index in range(3):
        guard.step(backward(model, optimizer, batch(index)))
    dict(named_tensors(optimizer.state[model[0].weight]))[f"factors.{name}"][2] = INF
    with pytest.raises(TrainingStoppedError, match=rf"\noptimizer.state.0.factors.{name}: 0 NaN and 1 Inf in shape"):
        guard.step(backward(model, optimizer, batch(3)))
    saved = torch.load(folder / "last-good.pt", weights_only=True)
    for state in (optimizer.state_dict()["state"], saved["optimizer"]["state"]):
        assert len(state) == 6
        for each in state.values():
            left, right = (tensor for _, tensor in named_tensors(each))
            assert (left.tolist(), right.tolist()) == ([2.0] * 2, [2.0] * 3), "from before the third step"
    assert guard.step(backward(model, optimizer, batch(4)))


def test_poisoned_optimizer_state_and_buffers_are_seen(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = INF
    with pytest.warns(RuntimeWarning, match=r"step 2 skipped: optimizer.state.0.exp_avg_sq: 0 NaN and 1 Inf"):
        assert not guard.step(backward(model, optimizer, batch(1)))
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = 0.0
    loss = backward(model, optimizer, batch(1))
    model[1].running_var[5] = NAN
    with pytest.warns(RuntimeWarning, match=r"step 3 skipped: 1.running_var: 1 NaN and 0 Inf .* first at \[5\]"):
        assert not guard.step(loss)
    assert guard.step(backward(model, optimizer, batch(2)))


def test_a_schedule_in_the_model_goes_on_where_a_step_is_skipped(folder):
    """As in the heads of mmdetection, which hold their losses: the loop steps it between two steps."""
    model, optimizer = make()
    model.loss = nn.ModuleDict({"alpha": AlphaSchedule(4)})
    model.forward = nn.Sequential(*list(model)[:4]).forward
    guard = TrainingGuard(model, optimizer, patience=2, checkpoint_dir=folder)
    for epoch in range(4):
        assert model.loss.alpha.step_count == epoch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not guard.step(backward(model, optimizer, batch(0) * NAN))
        assert guard.step(backward(model, optimizer, batch(epoch)))
        model.loss.alpha.step()
    assert model.loss.alpha.step_count == 4
    guard.patience = 1
    with pytest.raises(TrainingStoppedError):
        guard.step(backward(model, optimizer, batch(0) * NAN))
    assert model.loss.alpha.step_count == 3, "that of the state that is restored"


def test_buffers_that_are_infinite_on_purpose(folder):
    model, optimizer = make()
    model.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    assert guard.step(backward(model, optimizer, batch(0)))


def test_buffers_that_are_replaced(folder):
    """Some modules assign a new tensor to a buffer in each forward pass."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, images):
            self.mean = 0.9 * self.mean + 0.1 * images.mean(0)
            return images - self.mean

    model = nn.Sequential(Mean(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    mean = model[0].mean.clone()
    with pytest.warns(RuntimeWarning, match="step 2 skipped"):
        guard.step(backward(model, optimizer, batch(1) * NAN))
    assert torch.equal(model[0].mean, mean)
    torch.testing.assert_close(mean, 0.1 * batch(0).mean(0))


class Cache(nn.Module):
    """A buffer that the forward pass makes in the way that `change(old, images)` says, as multi-scale heads do."""

    def __init__(self, first, change):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        if first != "absent":
            self.register_buffer("cache", first)
        self.change = change

    def forward(self, images):
        self.change(self, images)
        return self.linear(images)


def resize(module, images):
    module.cache = images.detach().sum(1)[: 4 if images.isfinite().all() else 7]


def cast(module, images):
    module.cache = images.detach()[0].to(torch.float32 if images.isfinite().all() else torch.float64)


def unset(module, images):
    module.cache = images.detach()[0].clone() if images.isfinite().all() else None


def set_when_bad(module, images):
    module.cache = None if images.isfinite().all() else images.detach()[0]


def in_inference_mode(module, images):
    with torch.inference_mode():
        module.cache = images.detach().sum(0)


def expand(module, images):
    module.cache = images.detach().sum().expand(5)


def empty(module, images):
    module.cache = images.detach()[: 0 if images.isfinite().all() else 2]


def delete(module, images):
    if not images.isfinite().all() and hasattr(module, "cache"):
        del module.cache


def appear(module, images):
    if not images.isfinite().all() and not hasattr(module, "cache"):
        module.register_buffer("cache", images.detach().sum(0))


BUFFERS = {
    "other size": (torch.zeros(0), resize),
    "other dtype": (torch.zeros(3), cast),
    "set to None": (torch.zeros(3), unset),
    "was None": (None, set_when_bad),
    "of inference mode": (torch.zeros(3), in_inference_mode),
    "expanded": (torch.zeros(5), expand),
    "empty": (torch.zeros(0), empty),
    "deleted": (torch.zeros(3), delete),
    "appears": ("absent", appear),
    "sparse": (torch.zeros(3).to_sparse(), lambda m, images: setattr(m, "cache", images.detach()[0].to_sparse())),
    "float8": (torch.zeros(3).to(torch.float8_e4m3fn), lambda m, x: setattr(m, "cache", x[0].to(torch.float8_e4m3fn))),
}


@pytest.mark.parametrize(("first", "change"), BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_change_are_what_they_were_after_a_bad_step(first, change, folder):
    torch.manual_seed(0)
    model = Cache(first, change)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = TrainingGuard(model, optimizer, patience=2, checkpoint_dir=folder)
    for index in range(3):
        loss = backward(model, optimizer, batch(index))
        good = state_of(model, optimizer)
        assert guard.step(loss)
    after = state_of(model, optimizer)
    with pytest.warns(RuntimeWarning, match="step 4 skipped: the loss is nan"):
        guard.step(backward(model, optimizer, batch(3) * NAN))

    def same(actual, expected):
        kinds = [{name: (value.dtype, value.shape) for name, value in each.items()} for each in (actual, expected)]
        assert kinds[0] == kinds[1]
        assert all(torch.equal(dense(value), dense(expected[name])) for name, value in actual.items())

    same(state_of(model, optimizer), after)
    loss = backward(model, optimizer, batch(3) * NAN)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    same(state_of(model, optimizer), good)
    saved = torch.load(folder / "last-good.pt", weights_only=True)
    same(saved["model"], model.state_dict())
    assert guard.step(backward(model, optimizer, batch(4)))


def dense(tensor):
    return tensor.to_dense().float()


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_sparse_buffer_that_is_larger_than_memory(dtype, layout, folder):
    """As the edges of a large graph are."""
    edges = torch.sparse_coo_tensor([[3, 10**6], [5, 7]], torch.ones(2, dtype=dtype), (2**20, 2**20))
    model, optimizer = make()
    model.register_buffer("edges", edges.coalesce().to_sparse(layout=layout))
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    assert guard.step(backward(model, optimizer, batch(0)))
    kept = model.edges
    model.edges = (edges * NAN).coalesce().to_sparse(layout=layout)
    with pytest.warns(RuntimeWarning, match="step 2 skipped: edges: 2 NaN and 0 Inf"):
        assert not guard.step(backward(model, optimizer, batch(1)))
    assert model.edges.layout == layout
    assert torch.equal(model.edges.values(), kept.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["nested", "no parts", "meta"])
def test_buffers_without_a_norm(kind, folder):
    """PyTorch has no norm of these; a nested one is looked into all the same."""

    def remember(module, images):
        rows = images.detach()
        parts = [] if kind == "no parts" else [rows[0], rows[1, :2]]
        module.cache = rows.to("meta") if kind == "meta" else torch.nested.nested_tensor(parts)

    model = Cache(None, remember)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    for index in range(3):
        assert guard.step(backward(model, optimizer, batch(index)))
    loss = backward(model, optimizer, batch(3))
    if kind == "nested":
        model.cache = torch.nested.nested_tensor([torch.full((2,), NAN), torch.ones(1)])
        with pytest.warns(RuntimeWarning, match="step 4 skipped: cache: 2 NaN and 0 Inf"):
            assert not guard.step(loss)
        torch.testing.assert_close(model.cache.unbind()[1], batch(2)[1, :2])
    else:
        assert guard.step(loss)


def test_a_mask_that_comes_later(folder):
    """It is -Inf on purpose: the step in which it comes is good, and so are those after it, whatever its size."""

    def mask(module, _):
        if guard.steps > 1:
            module.cache = torch.full((guard.steps, guard.steps), -INF).triu(1)

    model = Cache(None, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    assert [guard.step(backward(model, optimizer, batch(index))) for index in range(5)] == [True] * 5
    assert model.cache.shape == (4, 4)


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=sparse)

    def forward(self, indices):
        return self.table(indices)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_sparse_gradients_are_those_of_dense_ones(scaled, max_norm, folder):
    """The same word several times in a batch makes a gradient that is stored in parts."""
    models = []
    for sparse in (False, True):
        torch.manual_seed(0)
        models.append(Words(sparse))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    scalers = [scaler_of(1024.0) if scaled else None for _ in models]
    guards = [
        TrainingGuard(*each, max_norm, checkpoint_dir=folder) for each in zip(models, optimizers, scalers, strict=True)
    ]
    for index in range(4):
        words = torch.randint(0, 6, (16,), generator=generator(index))
        for guard, scaler in zip(guards, scalers, strict=True):
            loss = guard.model(words).square().mean()
            guard.optimizer.zero_grad()
            (loss if scaler is None else scaler.scale(loss)).backward()
            assert guard.step(loss)
        assert guards[0].grad_norm == pytest.approx(guards[1].grad_norm)
        torch.testing.assert_close(models[0].table.weight, models[1].table.weight)
    models[1](words).square().mean().backward()
    models[1].table.weight.grad._values()[1, 2] = NAN
    with pytest.warns(RuntimeWarning, match="gradient of table.weight: 4 NaN|gradient of table.weight: 1 NaN"):
        assert not guards[1].step()


def test_optimizers_of_sparse_gradients(folder):
    model = Words(True)
    guard = TrainingGuard(model, torch.optim.SparseAdam(model.parameters()), max_norm=1.0, checkpoint_dir=folder)
    before = model.table.weight.detach().clone()
    model(torch.tensor([3, 3, 7])).square().sum().backward()
    assert guard.step()
    assert (model.table.weight != before).any(dim=1).nonzero().flatten().tolist() == [3, 7]
    refuses = TrainingGuard(model, torch.optim.AdamW(model.parameters()), checkpoint_dir=folder)
    model(torch.tensor([3])).square().sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        refuses.step()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_all_kinds_of_optimizers_come_back(scaled, options, folder):
    model, optimizer = make(**options)
    scaler = scaler_of(1024.0) if scaled else None
    guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    for index in range(3):
        loss = backward(model, optimizer, batch(index), scaler)
        good = state_of(model, optimizer)
        guard.step(loss)
    loss = backward(model, optimizer, batch(3) * NAN, scaler)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    assert_same_state(state_of(model, optimizer), good)
    assert guard.step(backward(model, optimizer, batch(3), scaler))


class Counting(torch.optim.SGD):
    """Keeps numbers among its state: one of its own, and one of each parameter."""

    def step(self, closure=None):
        super().step(closure)
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["size"] = float(parameter.detach().norm())


def test_numbers_among_an_optimizers_state_come_back(folder):
    model, optimizer = make(Counting, momentum=0.9)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    for index in range(3):
        loss = backward(model, optimizer, batch(index))
        good = copy.deepcopy(optimizer.state_dict()["state"])
        guard.step(loss)
    assert (good["calls"], optimizer.state["calls"]) == (2, 3)
    loss = backward(model, optimizer, batch(3) * NAN)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    saved = torch.load(folder / "last-good.pt", weights_only=True)["optimizer"]["state"]
    for state in (optimizer.state_dict()["state"], saved):
        assert state.keys() == good.keys()
        assert state["calls"] == 2
        for index in range(len(good) - 1):
            assert state[index]["size"] == good[index]["size"]
            assert torch.equal(state[index]["momentum_buffer"], good[index]["momentum_buffer"])


def test_parameters_of_another_type_are_what_they_were(folder):
    """As where a model is made float64 between two steps."""
    model, optimizer = make(torch.optim.SGD)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    loss = backward(model, optimizer, batch(0))
    good = state_of(model, optimizer)
    guard.step(loss)
    model.double()
    loss = backward(model, optimizer, batch(1).double() * NAN)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    assert {value.dtype for name, value in model.state_dict().items() if "num_b" not in name} == {torch.float32}
    assert_same_state(state_of(model, optimizer), good)


def test_groups_and_modules_that_come_later(folder):
    """A new head, trained from the second step on; a rescue to before it leaves its weights and takes its state."""
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    loss = backward(model, optimizer, batch(0))
    good = state_of(model, optimizer)
    assert guard.step(loss)
    model.add_module("head", nn.Linear(2, 2))
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.5})
    head = {f"head.{name}": value.clone() for name, value in model.head.state_dict().items()}
    loss = backward(model, optimizer, batch(1) * NAN)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    assert_same_state(state_of(model, optimizer), good | head)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    loss = backward(model, optimizer, batch(1))
    assert guard.step(loss)
    assert not torch.equal(model.head.weight, head["head.weight"])
    optimizer.add_param_group({"params": nn.Linear(1, 1).parameters()})
    with pytest.raises(ValueError, match="got 2 of another module"):
        guard.step(backward(model, optimizer, batch(2)))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_group_that_has_gone(gone, folder):
    """A rescue gives each of the others its own hyperparameters and state, and brings none of what has gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    rates = [0.03, 0.02, 0.01]
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(model, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    good = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    guard.step(backward(model, optimizer, batch(1)))  # what is kept is from before this step
    for parameter in optimizer.param_groups.pop(gone)["params"]:
        parameter.requires_grad_(False).grad = None
        del optimizer.state[parameter], good[parameter]
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    loss = backward(model, optimizer, batch(2) * NAN)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)
    assert [group["lr"] for group in optimizer.param_groups] == rates[:gone] + rates[gone + 1 :]
    assert optimizer.state.keys() == good.keys()
    for parameter, state in good.items():
        assert_same_state(optimizer.state[parameter], state)
    assert guard.step(backward(model, optimizer, batch(3)))
    assert len(optimizer.state_dict()["state"]) == 4


def test_a_group_of_another_module_in_the_place_of_one(folder):
    """It has as many parameters as the one that has gone."""
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    other, _ = make()
    backward(other, optimizer, batch(1))
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(ValueError, match="got 6 of another module"):
        guard.step()


class ModelEMA:
    """The shape of Ultralytics': a copy in `ema`, and how often it was updated."""

    def __init__(self, model, decay=0.5, **to):
        self.ema = copy.deepcopy(model).to(**to)
        self.updates = 0
        self.decay = decay

    def update(self, model):
        self.updates += 1
        with torch.no_grad():
            for ours, theirs in zip(self.ema.state_dict().values(), model.state_dict().values(), strict=True):
                if ours.is_floating_point():
                    ours.mul_(self.decay).add_(theirs.to(ours), alpha=1 - self.decay)


class PlainCopy(ModelEMA):
    """Gives the guard the module only."""


EMAS = {
    "ModelEMA": (ModelEMA, {}),
    "in float64": (ModelEMA, {"dtype": torch.float64}),
    "in float16": (ModelEMA, {"dtype": torch.float16}),
    "a plain copy": (PlainCopy, {}),
    "AveragedModel": (torch.optim.swa_utils.AveragedModel, {"use_buffers": True}),
    "AveragedModel, EMA": (
        torch.optim.swa_utils.AveragedModel,
        {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)},
    ),
    "wrapped": (lambda model: nn.DataParallel(ModelEMA(model).ema), {}),
}


@pytest.mark.parametrize(("make_ema", "options"), EMAS.values(), ids=EMAS)
def test_an_average_of_the_weights_is_rescued_too(make_ema, options, folder):
    model, optimizer = make(torch.optim.SGD)
    ema = make_ema(model, **options)
    module = getattr(ema, "ema", ema)
    update = ema.update_parameters if hasattr(ema, "update_parameters") else getattr(ema, "update", lambda _: None)
    given = module if isinstance(ema, PlainCopy) else ema
    guard = TrainingGuard(model, optimizer, max_norm=None, patience=2, checkpoint_dir=folder, extra_modules=[given])
    for index in range(3):
        guard.step(backward(model, optimizer, batch(index)))
        update(model)
    good = {name: value.clone() for name, value in module.state_dict().items()}
    loss = backward(model, optimizer, batch(3))
    model[0].weight.grad.mul_(1e4)
    optimizer.param_groups[0]["lr"] = 1e38  # a good step that breaks the weights
    assert guard.step(loss)
    update(model)
    if not isinstance(ema, nn.DataParallel):
        assert find_nonfinite(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not guard.step(backward(model, optimizer, batch(4)))
        update(model)
        loss = backward(model, optimizer, batch(5))
        with pytest.raises(TrainingStoppedError):
            guard.step(loss)
    assert not find_nonfinite(model.state_dict())
    assert_same_state(module.state_dict(), good)
    if given is ema and isinstance(ema, ModelEMA):
        assert ema.updates == 3
    (saved,) = torch.load(folder / "last-good.pt", weights_only=True)["extra_modules"]
    assert_same_state({name.removeprefix("module."): v for name, v in saved.items()}, {
        name.removeprefix("module."): v for name, v in good.items()
    })  # fmt: skip


def test_an_average_that_is_poisoned_alone_is_mended_and_the_step_taken(folder):
    """The average takes BatchNorm's statistics between a bad forward pass and the guard's step."""
    model, optimizer = make()
    ema = ModelEMA(model)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder, extra_modules=ema)
    for index in range(2):
        guard.step(backward(model, optimizer, batch(index)))
        good = {name: value.clone() for name, value in ema.ema.state_dict().items()}
        ema.update(model)
    ema.ema[1].running_mean.fill_(NAN)
    with pytest.warns(RuntimeWarning) as caught:
        assert guard.step(backward(model, optimizer, batch(2)))
    (warning,) = caught
    assert str(warning.message).startswith("step 3: extra_modules[0] is put back: 1.running_mean: 8 NaN")
    assert warning.filename == __file__, "the place of the call"
    assert_same_state(ema.ema.state_dict(), good)
    assert (guard.skipped, ema.updates) == (0, 1)


def test_masks_of_an_average_are_left_alone(folder):
    model, optimizer = make()
    model.register_buffer("mask", torch.full((2, 2), -INF))
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder, extra_modules=ModelEMA(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.step(backward(model, optimizer, batch(0)))


def test_a_loss_with_weights_of_its_own(folder):
    model, _ = make()
    weights = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
    optimizer = torch.optim.Adam([*model.parameters(), *weights], lr=0.1)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder, extra_modules=[weights])
    (loss_of(model, batch(0)) * weights[0]).backward()
    assert guard.step()
    assert weights[0] != 1
    optimizer.zero_grad()
    (loss_of(model, batch(0)) * weights[0] * NAN).backward()
    with pytest.raises(TrainingStoppedError, match=r"gradient of 0\.weight: 24 NaN"):
        guard.step()
    assert weights[0] == 1


def test_before_the_first_good_step(folder):
    model, optimizer = make()
    first = state_of(model, optimizer)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    with pytest.raises(
        TrainingStoppedError, match="stopped after step 1, 1 in a row had NaN or Inf; there was no good one"
    ):
        guard.step(backward(model, optimizer, batch(0) * NAN))
    assert_same_state(state_of(model, optimizer), first)


@pytest.mark.parametrize("count", [10, 12])
def test_the_story_names_ten_tensors(count, folder):
    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(count)])
    guard = TrainingGuard(model, torch.optim.SGD(model.parameters()), patience=1, checkpoint_dir=folder)
    for parameter in model:
        parameter.grad = torch.tensor([NAN])
    with pytest.raises(TrainingStoppedError) as caught:
        guard.step()
    story = str(caught.value)
    assert story.count("\ngradient of ") == 10
    assert ("\nand 2 more\n" in story, " more\n" in story) == (count == 12, count == 12)


def test_a_full_disk_does_not_swallow_the_story(folder, monkeypatch):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    save = torch.save

    def is_full(state, file):
        save(state, file)
        if "gradients" in state:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", is_full)
    with pytest.raises(TrainingStoppedError, match=r"with its gradients: not written, .*No space left") as caught:
        guard.step(backward(model, optimizer, batch(0) * NAN))
    assert str(caught.value).endswith(f"restored: {folder / 'last-good.pt'}")
    assert [path.name for path in folder.iterdir()] == ["last-good.pt"], "and nothing unfinished fills it up"


def guard_of(value, folder):
    """A guard whose model is one weight of this value."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return TrainingGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), patience=1, checkpoint_dir=folder)


def stop(guard):
    guard.optimizer.zero_grad()
    loss = guard.model.weight.sum()
    loss.backward()
    with pytest.raises(TrainingStoppedError) as caught:
        guard.step(loss * NAN)
    return str(caught.value)


def weights_in(folder):
    """The weight in each file."""
    return {path.name: torch.load(path)["model"]["weight"].item() for path in folder.iterdir()}


def test_runs_one_after_the_other_lose_nothing_and_the_newest_has_the_name(folder):
    for value in (1.0, 2.0, 3.0):  # each as a process that was restarted
        guard = guard_of(value, folder)
        assert guard.save() == guard.save() == folder / "last-good.pt"
        assert stop(guard).endswith(f"restored: {folder / 'last-good.pt'}")
    good = {"last-good.pt": 3.0, "last-good-2.pt": 1.0, "last-good-3.pt": 2.0}
    assert weights_in(folder) == good | {"failed.pt": 3.0, "failed-2.pt": 1.0, "failed-3.pt": 2.0}


def test_guards_side_by_side_have_a_file_each(folder):
    guards = [guard_of(value, folder) for value in (1.0, 2.0, 3.0)]
    for _ in range(3):
        paths = [guard.save() for guard in guards]
    assert [path.name for path in paths] == ["last-good-2.pt", "last-good-3.pt", "last-good.pt"]
    assert weights_in(folder) == {"last-good-2.pt": 1.0, "last-good-3.pt": 2.0, "last-good.pt": 3.0}
    assert stop(guards[0]).endswith(f"restored: {paths[0]}")
    assert stop(guards[1]).splitlines()[-2].endswith(f"with its gradients: {folder / 'failed.pt'}")
    good = {path.name: value for path, value in zip(paths, (1.0, 2.0, 3.0), strict=True)}
    assert weights_in(folder) == good | {"failed-2.pt": 1.0, "failed.pt": 2.0}


def test_files_are_written_where_the_guard_was_made_whatever_becomes_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guard = guard_of(1.0, "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    (tmp_path / "runs").rmdir()
    assert stop(guard).endswith(f"restored: {tmp_path / 'runs' / 'last-good.pt'}")
    assert weights_in(tmp_path / "runs") == {"last-good.pt": 1.0, "failed.pt": 1.0}


@pytest.mark.parametrize("links", [True, False])
def test_files_that_no_guard_wrote_stay_too(links, folder, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    if not links:  # as in many file systems that are mounted from elsewhere
        monkeypatch.setattr(os, "link", refuse)
    guard = guard_of(1.0, folder)
    for name in ("last-good.pt", "last-good-2.pt", "last-good-4.pt"):
        (folder / name).write_text(name)
    assert guard.save() == guard.save() == folder / "last-good.pt"
    (folder / "last-good.pt").unlink()
    (folder / "last-good.pt").write_text("later")
    assert guard.save() == folder / "last-good.pt"
    expected = {"2": "last-good-2.pt", "3": "last-good.pt", "4": "last-good-4.pt", "5": "later"}
    assert {number: (folder / f"last-good-{number}.pt").read_text() for number in expected} == expected
    assert len(list(folder.iterdir())) == 5
    assert torch.load(folder / "last-good.pt")["model"]["weight"] == 1


def test_saving_in_between(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0)))
    loss = backward(model, optimizer, batch(1))
    verified = state_of(model, optimizer)
    guard.step(loss)
    resumed = make()
    good = torch.load(guard.save(), weights_only=True)
    resumed[0].load_state_dict(good["model"])
    resumed[1].load_state_dict(good["optimizer"])
    assert_same_state(state_of(*resumed), verified)
    assert good["step"] == 2


def test_a_file_is_read_safely_though_a_schedule_sets_numbers_of_numpy(folder):
    """As the warm-up of Ultralytics does by `np.interp`."""
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    for group in optimizer.param_groups:
        group["lr"] = np.interp(1, [0, 4], [0.0, 0.2])
        group["betas"] = (np.float64(0.5), 0.75)
    guard.step(backward(model, optimizer, batch(0)))
    with pytest.raises(TrainingStoppedError):
        guard.step(backward(model, optimizer, batch(0) * NAN))
    for name in ("last-good.pt", "failed.pt"):
        (group,) = torch.load(folder / name, weights_only=True)["optimizer"]["param_groups"]
        assert (group["lr"], group["betas"]) == (0.05, (0.5, 0.75))
    assert optimizer.param_groups[0]["lr"] == 0.05


class Inner(nn.Module):
    """A wrapper that `state_dict` leaves out, as that of checkpointed activations."""

    def __init__(self, module):
        super().__init__()
        self.inner = module
        self._register_state_dict_hook(self._without_inner)

    @staticmethod
    def _without_inner(_module, state, prefix, _metadata):
        for key in [key for key in state if key.startswith(prefix + "inner.")]:
            state[prefix + key.removeprefix(prefix + "inner.")] = state.pop(key)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [Inner, checkpoint_wrapper])
def test_a_file_has_the_names_of_the_state_dict_and_the_good_values(wrap, folder):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(3, 8)), nn.BatchNorm1d(8), wrap(nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    backward(model, optimizer, batch(0))
    good = {name: value.clone() for name, value in model.state_dict().items()}
    assert guard.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(NAN)
    plain = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    plain.load_state_dict(torch.load(guard.save(), weights_only=True)["model"])
    assert plain.state_dict().keys() == good.keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, good[name]), name


def test_what_a_state_dict_leaves_out_is_not_in_a_file(folder):
    """As a frozen backbone that its model does not save."""
    model, optimizer = make()

    def leave_out(_module, state, *_):
        del state["0.weight"]

    model._register_state_dict_hook(leave_out)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    saved = torch.load(guard.save(), weights_only=True)["model"]
    assert saved.keys() == model.state_dict().keys()
    assert "0.weight" not in saved


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


def test_with_a_scaler_good_steps_are_those_of_plain_pytorch(folder):
    plain, guarded = make(), make()
    plain_scaler, guard_scaler = scaler_of(1024.0), scaler_of(1024.0)
    guard = TrainingGuard(*guarded, guard_scaler, max_norm=0.05, checkpoint_dir=folder)
    for index in range(4):
        backward(*plain, batch(index), plain_scaler)
        plain_scaler.unscale_(plain[1])
        norm = nn.utils.clip_grad_norm_(plain[0].parameters(), 0.05)
        plain_scaler.step(plain[1])
        plain_scaler.update()
        assert guard.step(backward(*guarded, batch(index), guard_scaler))
        assert guard.grad_norm == pytest.approx(norm.item())
        assert_same_state(state_of(*guarded), state_of(*plain))
        assert guard_scaler.state_dict() == plain_scaler.state_dict()


def test_gradients_that_are_unscaled_already(folder):
    """To look at them first, as for a monitor; once for each step."""
    plain, looked_at = make(), make()
    scalers = scaler_of(1024.0), scaler_of(1024.0)
    guards = [
        TrainingGuard(*each, scaler, checkpoint_dir=folder)
        for each, scaler in zip((plain, looked_at), scalers, strict=True)
    ]
    for index in range(6):
        images = batch(index) * (1.0 if index != 3 else INF)
        losses = [backward(*each, images, scaler) for each, scaler in zip((plain, looked_at), scalers, strict=True)]
        scalers[1].unscale_(looked_at[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            taken = [guard.step(loss) for guard, loss in zip(guards, losses, strict=True)]
        assert taken == [index != 3] * 2
        assert_same_state(state_of(*looked_at), state_of(*plain))
        assert scalers[1].state_dict() == scalers[0].state_dict()


def test_a_scaler_may_look_for_its_scale(folder):
    """Ten overflows in a row are the scaler's business; with the scale at 1 they no longer are."""
    model, optimizer = make()
    scaler = scaler_of(2.0**10)
    guard = TrainingGuard(model, optimizer, scaler, patience=2, checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0), scaler))

    def overflow():
        loss = backward(model, optimizer, batch(1), scaler)
        model[0].weight.grad[0, 0] = INF
        return loss

    for count in range(10):
        assert scaler.get_scale() == 2.0 ** (10 - count)
        with pytest.warns(RuntimeWarning, match="skipped, to lower the scale: gradient of 0.weight"):
            assert not guard.step(overflow())
    assert scaler.get_scale() == 1
    with pytest.warns(RuntimeWarning, match="step 12 skipped: gradient of 0.weight"):
        assert not guard.step(overflow())
    loss = overflow()
    with pytest.raises(TrainingStoppedError, match="the last good one was 1\n"):
        guard.step(loss)
    assert scaler.get_scale() == 2.0**10, "restored with the rest"
    assert guard.step(backward(model, optimizer, batch(2), scaler))


def test_with_a_scaler_a_bad_loss_counts(folder):
    model, optimizer = make()
    scaler = scaler_of(2.0**10)
    guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    with pytest.raises(TrainingStoppedError):
        guard.step(backward(model, optimizer, batch(0) * NAN, scaler))


def test_real_overflow_in_float16(folder):
    """The gradient of a float16 layer overflows by itself at a high scale; training goes on at a lower one."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = scaler_of(2.0**24)
    guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    taken = []
    for index in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(batch(index)).float() - 1).square().mean()
        scaler.scale(loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken.append(guard.step(loss))
    skips = taken.index(True)
    assert 1 <= skips < 15
    assert taken[-1]
    assert scaler.get_scale() == 2.0 ** (24 - taken.count(False))


def overflow(model, optimizer, scaler):
    loss = backward(model, optimizer, batch(1), scaler)
    model[0].weight.grad[0, 0] = INF
    return loss


@pytest.mark.parametrize("good", [0, 1])
def test_a_scaler_that_skips_for_ever_is_no_search(good, folder):
    """From a high scale the twentieth skip in a row speaks up, and counts; `patience` ends the run."""
    model, optimizer = make()
    scaler = scaler_of(2.0**30)
    guard = TrainingGuard(model, optimizer, scaler, patience=2, checkpoint_dir=folder)
    for _ in range(good):
        assert guard.step(backward(model, optimizer, batch(0), scaler))
    for count in range(1, 20):
        with pytest.warns(RuntimeWarning, match=f"step {good + count} skipped, to lower the scale") as caught:
            guard.step(overflow(model, optimizer, scaler))
        assert "no search" not in str(caught[0].message)
    words = f"step {good + 20} skipped: gradient of 0.weight: 0 NaN and 1 Inf"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        guard.step(overflow(model, optimizer, scaler))
    assert caught[0].filename == __file__, "the place of the call"
    assert "the GradScaler has skipped 20 steps in a row, its scale is 2.05e+03" in str(caught[0].message)
    assert "no search for a scale any more" in str(caught[0].message)
    assert "Compute the loss in float32" in str(caught[0].message)
    assert (guard.search_skips, guard.scaler_skips, guard.skipped) == ((0, 20, 20) if good else (19, 1, 20))
    loss = overflow(model, optimizer, scaler)
    with pytest.raises(TrainingStoppedError, match="has skipped 21 steps in a row"):
        guard.step(loss)
    assert guard.step(backward(model, optimizer, batch(2), scaler)), "whoever catches the error can go on"


def test_the_search_is_counted_apart(folder):
    """Growth makes the scaler overflow again now and then, which nobody needs to hear of twice."""
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(40):
            too_high = scaler.get_scale() > 1000
            loss = overflow(model, optimizer, scaler) if too_high else backward(model, optimizer, batch(index), scaler)
            taken.append(guard.step(loss))
    assert taken[:8] == [False] * 7 + [True]
    assert guard.search_skips == 7
    assert guard.scaler_skips == taken[8:].count(False) > 3
    assert guard.skipped == taken.count(False)


def test_how_many_samples_have_a_bad_gradient(folder):
    """The root of 0 has a finite value and an infinite slope: NaN times 0 in the gradient of two samples a head.

    In one of them the gradient to one of two numbers is bad.
    """
    model, optimizer = make()
    scaler = scaler_of(1.0)
    guard = TrainingGuard(model, optimizer, scaler, checkpoint_dir=folder)
    factors = torch.ones(16, 2)
    factors[3] = factors[11, 0] = 0
    for _ in range(2):  # the counts start anew in each step
        optimizer.zero_grad()
        heads = [model(batch(index)) for index in range(2)]
        for predictions in heads:
            guard.watch(predictions)
        loss = sum((predictions * factors).square().sqrt().mean() for predictions in heads)
        scaler.scale(loss).backward()
        scaler.update(1.0)
        with pytest.warns(RuntimeWarning, match="; 4 of 32 watched samples have a bad gradient; the GradScaler has "):
            assert not guard.step(loss)
        assert torch.isfinite(loss)
    with torch.no_grad():
        guard.watch(model(batch(0)))
    for wrong, error in ((torch.tensor(1.0), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="predictions must"):
            guard.watch(wrong)


def test_a_dead_scaler_is_told_of_at_once(folder):
    """1e-10 is where the scale of the reported runs ended; a checkpoint brings it back."""
    model, optimizer = make()
    words = "step 0: the GradScaler's scale is 1e-10, below what its search reaches"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        TrainingGuard(model, optimizer, scaler_of(1e-10), checkpoint_dir=folder)
    assert caught[0].filename == __file__, "the place of the call"
    scaler = scaler_of(0.0)
    with pytest.warns(RuntimeWarning, match="scale is 0"):
        guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    loss = backward(model, optimizer, batch(0), scaler)
    with pytest.raises(TrainingStoppedError, match="the GradScaler's scale is 0, from where no scaler comes back"):
        guard.step(loss)


def test_a_scale_that_falls_below_one_in_good_steps(folder):
    model, optimizer = make()
    scaler = scaler_of(4.0)
    guard = TrainingGuard(model, optimizer, scaler, checkpoint_dir=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.step(backward(model, optimizer, batch(0), scaler))
        scaler.update(0.25)
        with pytest.warns(RuntimeWarning, match="step 2: the GradScaler's scale is 0.25, below") as caught:
            guard.step(backward(model, optimizer, batch(1), scaler))
        assert caught[0].filename == __file__, "the place of the call"
        guard.step(backward(model, optimizer, batch(2), scaler))


def test_a_disabled_scaler_is_none(folder):
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = TrainingGuard(model, optimizer, scaler, patience=1, checkpoint_dir=folder)
    assert guard.step(backward(model, optimizer, batch(0), scaler))
    loss = overflow(model, optimizer, scaler)
    with pytest.raises(TrainingStoppedError):
        guard.step(loss)


def test_corrupt_weights_are_refused(folder):
    model, optimizer = make()
    with torch.no_grad():
        model[3].weight[1, 2] = NAN
    message = r"TrainingGuard, before the first step, model: 3.weight: 1 NaN and 0 Inf .* first at \[1, 2\]"
    with pytest.raises(NonFiniteError, match=message):
        TrainingGuard(model, optimizer, checkpoint_dir=folder)


def test_wrong_arguments(folder):
    model, optimizer = make()
    for arguments, error, message in [
        ((optimizer, optimizer), TypeError, "model must be a torch.nn.Module, got AdamW"),
        ((model, model), TypeError, "optimizer must be a torch.optim.Optimizer, got Sequential"),
        ((model, optimizer, 1024), TypeError, "scaler must be a torch.amp.GradScaler or None, got int"),
        ((model, optimizer, None, 0), ValueError, "max_norm must be above 0, or None .*, got 0"),
        ((model, optimizer, None, NAN), ValueError, "max_norm must be above 0, or None .*, got nan"),
        ((model, optimizer, None, "1"), TypeError, "max_norm must be a number or None, got str"),
        ((model, torch.optim.LBFGS(model.parameters())), TypeError, "without a closure, got LBFGS"),
        ((model, optimizer, None, 1, 3, None), TypeError, "checkpoint_dir must be a str or os.PathLike, got NoneType"),
        ((model, optimizer, None, 1, 3, folder, [3]), TypeError, r"extra_modules\[0\] must be a torch.nn.Module or"),
        ((nn.LazyLinear(2), optimizer), ValueError, "model must have been run once: weight, of a lazy module,"),
        ((model, optimizer, None, 1, 0), ValueError, "patience must be 1 or above, got 0"),
        ((model, optimizer, None, 1, True), TypeError, "patience must be an integer, got bool"),
        ((model, optimizer, None, 1, 1.5), TypeError, "patience must be an integer, got float"),
        ((model[0], optimizer), ValueError, "optimizer must have parameters of model only, .* got 4 of another"),
        ((model, torch.optim.SGD([nn.Parameter(torch.ones(1))])), ValueError, "model only, .* got 1 of another"),
    ]:
        with pytest.raises(error, match=message):
            TrainingGuard(*arguments)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    with pytest.raises(RuntimeError, match=r"no parameter .* has a gradient: expected step\(\) after"):
        guard.step()
    with pytest.raises(TypeError, match=r"loss must be a torch.Tensor, got float"):
        guard.step(0.5)
    with pytest.raises(ValueError, match=r"loss must have one element, got shape \(2,\)"):
        guard.step(torch.zeros(2))
    backward(model, optimizer, batch(0))
    with pytest.raises(TypeError, match=r"loss must hold real numbers .*, got torch.complex64"):
        guard.step(torch.zeros((), dtype=torch.complex64))
    assert guard.steps == 0


def test_integers_of_numpy_are_integers(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=np.int64(2), checkpoint_dir=folder)
    guard.step(backward(model, optimizer, batch(0) * NAN))
    with pytest.raises(TrainingStoppedError, match="2 in a row"):
        guard.step(backward(model, optimizer, batch(0) * NAN))


@pytest.fixture
def alone():
    with one_process():
        yield


@pytest.mark.usefixtures("alone")
def test_an_optimizer_that_is_spread_over_processes_is_refused(folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415 - needs the process group

    model, _ = make()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="whole state in each process, got ZeroRedundancyOptimizer"):
        TrainingGuard(model, optimizer, checkpoint_dir=folder)


def fsdp(module):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (fsdp, "got sharded ones in a FullyShardedDataParallel"),
        (lambda module: nn.Sequential(fsdp(module)), "got sharded ones in a FullyShardedDataParallel"),
        (lambda module: fully_shard(module, mesh=distributed.init_device_mesh("cpu", (1,))), "sharded, as 0.weight"),
    ],
)
def test_sharded_parameters_are_refused(shard, words, folder):
    """Each process would see and clip another part; the gradients' norm would be another in each."""
    model = shard(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"model must have plain tensors, .*{words}"):
        TrainingGuard(model, optimizer, checkpoint_dir=folder)
    with pytest.raises(TypeError, match=f"model must have plain tensors, .*{words}"):
        GradientMonitor(model)
    plain, its_optimizer = make()
    with pytest.raises(TypeError, match=rf"extra_modules\[0\] must have plain tensors, .*{words}"):
        TrainingGuard(plain, its_optimizer, checkpoint_dir=folder, extra_modules=[model])


@pytest.mark.usefixtures("alone")
def test_the_process_group_of_a_model_that_is_compiled(folder, monkeypatch):
    """As of several models that are trained at once, each on some of the processes."""
    groups = []
    reduce = distributed.all_reduce
    monkeypatch.setattr(
        distributed, "all_reduce", lambda *given, group=None: (groups.append(group), reduce(*given, group=group))
    )
    model, optimizer = make()
    own = distributed.new_group([0])
    ddp = nn.parallel.DistributedDataParallel(model, process_group=own)
    guard = TrainingGuard(torch.compile(ddp, backend="eager"), optimizer, checkpoint_dir=folder)
    assert guard.step(backward(model, optimizer, batch(0)))
    assert groups == [own]


def run(code, *arguments, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=timeout
    )


KILLS = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # an optimizer would import it in each child
from triton_mgiou.training import TrainingGuard

torch.set_num_threads(1)
model = torch.nn.Linear(1000, 500)
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
guard = TrainingGuard(model, optimizer, checkpoint_dir=sys.argv[1])
path = guard.save()
folder = Path(sys.argv[1])
cut = 0
last = []

def unfinished():
    return list(folder.glob("last-good.pt.*.tmp"))

for kill in range(8):
    before = path.stat().st_ino
    child = os.fork()
    if child == 0:
        while True:  # every element of a file is the number of its step
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, guard.steps + 1)
            optimizer.zero_grad()
            model(torch.ones(1, 1000)).sum().backward()
            guard.step()
            guard.save()
    while path.stat().st_ino == before or not unfinished():
        time.sleep(0.0002)
    time.sleep(0.001 * kill)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    cut += len(unfinished())
    for each in unfinished():
        each.unlink()
    state = torch.load(path, weights_only=True)
    assert state["step"] > 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert all(parameter.eq(state["step"]).all() for parameter in model.parameters())
    last.append(state["step"])
kept = [torch.load(folder / f"last-good-{number}.pt", weights_only=True)["step"] for number in range(2, 9)]
assert kept == last[:-1], "each child put aside what the one before had left"
print(cut)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = run(KILLS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "some kill came in the middle of a file"


PROCESSES = """
import os, sys, warnings
from datetime import timedelta
from pathlib import Path
import torch
import torch._dynamo  # an optimizer would import it in each child
from torch import distributed, nn
from triton_mgiou.training import TrainingGuard, TrainingStoppedError

torch.set_num_threads(1)
folder = Path(sys.argv[1])
children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(max(map(bool, statuses)))

distributed.init_process_group(
    "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
guard = TrainingGuard(ddp, optimizer, patience=2, checkpoint_dir=folder / f"guard{rank}")
log = []

def step(bad_rank=None, what=None):
    images = torch.randn(8, 3)
    if rank == bad_rank and what == "data":
        images[0, 0] = float("nan")
    optimizer.zero_grad()
    loss = ddp(images).square().mean()
    loss.backward()
    if rank == bad_rank and what == "loss":
        loss = loss * float("nan")
    if rank == bad_rank and what == "buffer":
        model[1].running_var[0] = float("inf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.append(guard.step(loss))
    return [str(each.message) for each in caught]

step()
for what in ("data", "loss", "buffer"):
    (message,) = step(1, what)
    log.append("everything is finite in this process" in message)
    step()
kept = [parameter.clone() for parameter in model.parameters()]
step(0, "data")
try:
    step(1, "loss")
except TrainingStoppedError as error:
    log.append(str(error).splitlines()[0])
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save({"log": log, "weights": weights, "buffers": dict(model.named_buffers())}, folder / f"{rank}.pt")
del ddp  # its destructor joins a thread of the group
distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_all_processes_skip_together(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    done = run(PROCESSES, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    story = "stopped after step 9, 2 in a row had NaN or Inf; the last good one was 7"
    # NaN in one process's data reaches the other's gradients; its loss and its buffers do not.
    assert first["log"] == [True, False, False, True, False, True, True, False, True, True, False, story]
    assert second["log"] == [True, False, False, True, False, False, True, False, False, True, False, story]
    assert torch.isfinite(first["weights"]).all()
    assert torch.equal(first["weights"], second["weights"])
    assert find_nonfinite([first, second]) == []
    assert sorted(path.name for path in tmp_path.glob("guard*/*")) == ["failed.pt", "last-good.pt"]
    good = torch.load(tmp_path / "guard0" / "last-good.pt", weights_only=True)
    assert next(iter(good["model"])) == "0.weight", "without DDP's prefix"


def synchronisations(function):
    """How often the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_one_wait_a_step(scaled, folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0) if scaled else None
    guard = TrainingGuard(model, optimizer, scaler, checkpoint_dir=folder)
    monitor = GradientMonitor(model)
    for index in range(3):
        loss = backward(model, optimizer, batch(index).cuda(), scaler)
        waits = synchronisations(lambda loss=loss: guard.step(loss))
    assert waits == (4 if scaled else 1), "a scaler waits in its step, and for both numbers of its state"
    assert synchronisations(monitor.record) == 1


@pytest.mark.parametrize("norm", [5.0, 15.0])
def test_the_usual_limit_of_the_norm_is_10(folder, norm):
    """As in Ultralytics."""
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    loss = norm * model.weight.sum()
    loss.backward()
    guard.step(loss)
    assert before - model.weight.item() == pytest.approx(min(norm, 10.0), rel=1e-5)
