"""`TrainingGuard`: which steps it takes, what it goes back to, what it tells, and what a kill leaves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from tests.helpers import generator
from triton_mgiou.cli import main
from triton_mgiou.training import (
    GradientMonitor,
    NonFiniteError,
    TrainingGuard,
    TrainingStoppedError,
    find_nonfinite,
)

NAN, INF = math.nan, math.inf


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
    return tmp_path / "guard"


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


def test_patience_ends_a_run_and_tells_the_story(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=3, checkpoint_dir=folder)
    for index in range(4):
        loss = backward(model, optimizer, batch(index))
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


def test_before_the_first_good_step(folder):
    model, optimizer = make()
    first = state_of(model, optimizer)
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    with pytest.raises(
        TrainingStoppedError, match="stopped after step 1, 1 in a row had NaN or Inf; there was no good one"
    ):
        guard.step(backward(model, optimizer, batch(0) * NAN))
    assert_same_state(state_of(model, optimizer), first)


def test_a_full_disk_does_not_swallow_the_story(folder):
    model, optimizer = make()
    guard = TrainingGuard(model, optimizer, patience=1, checkpoint_dir=folder)
    (folder / "failed.pt.tmp").mkdir()
    with pytest.raises(TrainingStoppedError, match=r"with its gradients: not written, .*Is a directory") as caught:
        guard.step(backward(model, optimizer, batch(0) * NAN))
    assert str(caught.value).endswith(f"restored: {folder / 'last-good.pt'}")
    assert sorted(path.name for path in folder.iterdir()) == ["failed.pt.tmp", "last-good.pt"]


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
        ((model, optimizer, None, 1, 0), ValueError, "patience must be an integer of 1 or above, got 0"),
        ((model[0], optimizer), ValueError, "optimizer must have parameters of model only, .* got 4 of another"),
    ]:
        with pytest.raises(error, match=message):
            TrainingGuard(*arguments, checkpoint_dir=folder)
    guard = TrainingGuard(model, optimizer, checkpoint_dir=folder)
    with pytest.raises(RuntimeError, match=r"no parameter .* has a gradient: expected step\(\) after"):
        guard.step()
    with pytest.raises(TypeError, match=r"loss must be a torch.Tensor, got float"):
        guard.step(0.5)
    with pytest.raises(ValueError, match=r"loss must have one element, got shape \(2,\)"):
        guard.step(torch.zeros(2))


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
unfinished = Path(str(path) + ".tmp")
cut = 0
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
    while path.stat().st_ino == before or not unfinished.exists():
        time.sleep(0.0002)
    time.sleep(0.001 * kill)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    cut += unfinished.exists()
    unfinished.unlink(missing_ok=True)
    state = torch.load(path, weights_only=True)
    assert state["step"] > 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert all(parameter.eq(state["step"]).all() for parameter in model.parameters())
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
