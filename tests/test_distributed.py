"""Two processes give the gradients of one process on the whole batch, and the demo does the same in both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import INTERPRETED, Backend
from tests.helpers import assert_close, convex, generator, uniform
from triton_mgiou import MGIoULoss, PolygonLoss, demo, mean_positives, mgiou_loss
from triton_mgiou.cli import main
from triton_mgiou.training import AlphaSchedule

BATCH, FEATURES, VERTICES = 8, 5, 6
TIMEOUT = 120  # seconds
SHARES = (slice(0, 3), slice(3, BATCH))


def problem(device):
    rng = generator(7)
    layer = torch.nn.Linear(FEATURES, 2 * VERTICES)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=rng))
        layer.bias.copy_(convex(1, VERTICES, rng).flatten())
    features, target = uniform((BATCH, FEATURES), 0, 1, rng).float(), convex(BATCH, VERTICES, rng).float()
    return layer.to(device), features.to(device), target.to(device)


def shared(layer):
    """The layer as this process trains it, this process's part of the batch, and the number of processes."""
    if dist.is_initialized():
        return DistributedDataParallel(layer), SHARES[dist.get_rank()], dist.get_world_size()
    return layer, slice(None), 1


def samples(backend):
    """The mean over all samples; their number is known to every process."""
    layer, features, target = problem(backend.device)
    model, mine, processes = shared(layer)
    polygons = model(features[mine]).unflatten(-1, (VERTICES, 2))
    backend.loss(polygons, target[mine], avg_factor=BATCH / processes, convexity_weight=0.5).backward()
    return layer


def positives(backend, chosen=(1, 3, 4, 6, 7)):
    """The mean over the positives, of which the first process has one and the other four."""
    layer, features, target = problem(backend.device)
    model, mine, _ = shared(layer)
    positive = torch.isin(torch.arange(BATCH, device=backend.device), torch.tensor(chosen, device=backend.device))[mine]
    polygons = model(features[mine]).unflatten(-1, (VERTICES, 2))[positive]
    loss = MGIoULoss(axis_weight="length", backend=backend.name)
    loss(polygons, target[mine][positive], avg_factor=mean_positives(positive.sum())).backward()
    return layer


def one_positive(backend):
    """The second process has none."""
    return positives(backend, chosen=(1,))


def half_a_positive(backend):
    """A sum of weights below 1 counts as 1."""
    layer, features, target = problem(backend.device)
    model, mine, _ = shared(layer)
    weight = torch.tensor([0, 0.25, 0, 0, 0.125, 0.125, 0, 0], device=backend.device)[mine]
    polygons = model(features[mine]).unflatten(-1, (VERTICES, 2))
    loss = MGIoULoss(backend=backend.name)
    loss(polygons, target[mine], weight, avg_factor=mean_positives(weight.sum())).backward()
    return layer


def keypoints(backend):
    """`PolygonLoss` in all its parts; the first process has no positive at all."""
    layer, features, target = problem(backend.device)
    model, mine, _ = shared(layer)
    rng = generator(8)
    mask = (uniform((BATCH, VERTICES), 0, 1, rng) < 0.8).to(backend.device)
    mask[SHARES[0]] = False
    area = uniform((BATCH, 1), 0.5, 4, rng).to(backend.device)
    polygons = model(features[mine]).unflatten(-1, (VERTICES, 2))
    loss = PolygonLoss("hybrid", alpha=AlphaSchedule(4), backend=backend.name).to(backend.device)
    factor = mean_positives(mask[mine].any(1).sum())
    loss(polygons, target[mine], mask[mine], area[mine], avg_factor=factor)[0].backward()
    return layer


def step_of_the_demo(backend, images=61):
    """The gradient of its only batch is still there afterwards. Of 61 images the shares are 31 and 30."""
    part = demo.Digits(*(tensor[:images] for tensor in demo.load_data()[0]))
    loss = MGIoULoss(backend=backend.name)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        network, losses = demo.train(part, loss, epochs=1, seed=0, batch_size=64, device=torch.device(backend.device))
    network.loss = torch.nn.Parameter(torch.zeros(()))  # to be compared as the gradients are
    network.loss.grad = torch.tensor(losses).sum()
    return network


def step_of_the_demo_with_one_image(backend):
    """The second process has none."""
    return step_of_the_demo(backend, images=1)


CASES = (
    samples,
    positives,
    one_positive,
    half_a_positive,
    keypoints,
    step_of_the_demo,
    step_of_the_demo_with_one_image,
)


def gradients(case, backend):
    return {name: parameter.grad.cpu() for name, parameter in case(backend).named_parameters()}


def worker(rank, folder, backend):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not resolve
    torch.set_num_threads(1)
    if backend.device == "cuda":
        torch.cuda.set_device(rank)
        backend = Backend(backend.name, f"cuda:{rank}")
    dist.init_process_group(
        "gloo" if backend.device == "cpu" else "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        # By here nothing refers to a DistributedDataParallel model or its output any more: destroyed after the process
        # group, they can wait for a thread of gloo's that waits for the interpreter.
        torch.save({case.__name__: gradients(case, backend) for case in CASES}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def of_two_processes(backend, folder):
    """What both processes computed, by rank."""
    if backend.device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    context = mp.spawn(worker, args=(folder, backend), nprocs=2, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_and_one_give_the_same_gradient(backend, tmp_path):
    """All cases in one test, so that the two processes start once, wherever pytest-xdist runs it."""
    results = of_two_processes(backend, tmp_path)
    for case in CASES:
        expected = gradients(case, backend)
        assert all(gradient.any() for gradient in expected.values())
        for rank, result in enumerate(results):
            actual = result[case.__name__]
            assert actual.keys() == expected.keys()
            for name, gradient in actual.items():
                assert_close(gradient, expected[name], atol=1e-6, what=f"{case.__name__}, {name} of rank {rank}")


@pytest.mark.parametrize(
    ("chosen", "weight"), [([2, 5], None), ([1], None), ([1, 4, 5], [0.25, 0.125, 0.125])], ids=str
)
def test_the_positives_of_one_process_are_its_own(chosen, weight):
    """The mean that the cases above compare with is that of the positives, not of the batch."""
    backend = Backend("eager", "cpu")
    layer, features, target = problem("cpu")
    polygons = layer(features).unflatten(-1, (VERTICES, 2))
    if weight is None:
        mgiou_loss(polygons[chosen], target[chosen]).backward()
        actual = positives(backend, chosen)
    else:
        each = mgiou_loss(polygons[chosen], target[chosen], reduction="none")
        (each * torch.tensor(weight)).sum().backward()
        actual = half_a_positive(backend)
    for parameter, expected in zip(actual.parameters(), layer.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad, atol=1e-6)


def run_python(*arguments):
    """Run it to its end, or end it with all the processes that it started."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, stderr
    return stdout, stderr


@pytest.mark.skipif(INTERPRETED, reason="the other run has it")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def test_the_demo_in_two_processes(device, tmp_path):
    arguments = ["demo", "--device", device, "--epochs", "1", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "triton_mgiou"]
    stdout, stderr = run_python(*launcher, *arguments, str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))

    assert (one["options"].pop("processes"), two["options"].pop("processes")) == (1, 2)
    assert two["options"] == one["options"]
    assert two["device"] == ("cpu" if device == "cpu" else "cuda:0")
    for name in ("loss_first", "loss_last"):
        assert two[name] == pytest.approx(one[name], rel=0.01)
    assert two["polygon_iou"] == pytest.approx(one["polygon_iou"], abs=0.005)

    assert "2 processes" in stdout
    assert stdout.count("written: ") == stdout.count("test polygon IoU") == 1  # the first process alone
    assert stderr.count("training:   0%") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["demo.png", "result.json"]
