"""Two processes with DistributedDataParallel give the gradients of one process on the whole batch."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_close, convex, generator
from torch.nn.parallel import DistributedDataParallel

from triton_mgiou import mgiou_loss

FEATURES, VERTICES, BATCH = 5, 6, 8


def problem(device):
    rng = generator(7)
    layer = torch.nn.Linear(FEATURES, 2 * VERTICES)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=rng))
        layer.bias.copy_(convex(1, VERTICES, rng).flatten())
    features = torch.rand(BATCH, FEATURES, generator=rng)
    return layer.to(device), features.to(device), convex(BATCH, VERTICES, rng).float().to(device)


def loss_of(layer, features, target, backend):
    return mgiou_loss(layer(features).unflatten(-1, (VERTICES, 2)), target, convexity_weight=0.5, backend=backend)


def worker(rank, folder, device, backend):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        layer, features, target = problem(device)
        half = slice(0, 3) if rank == 0 else slice(3, BATCH)  # an uneven split: 3 and 5
        # DDP averages over the ranks, so each divides its sum by its share of the global batch.
        model = DistributedDataParallel(layer)
        polygons = model(features[half]).unflatten(-1, (VERTICES, 2))
        mgiou_loss(polygons, target[half], avg_factor=BATCH / 2, convexity_weight=0.5, backend=backend).backward()
        if rank == 0:
            torch.save([parameter.grad.cpu() for parameter in layer.parameters()], folder / "gradients.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_and_one_give_the_same_gradient(backend, tmp_path):
    mp.spawn(worker, args=(tmp_path, backend.device, backend.name), nprocs=2)
    layer, features, target = problem(backend.device)
    loss_of(layer, features, target, backend.name).backward()
    for got, parameter in zip(torch.load(tmp_path / "gradients.pt"), layer.parameters(), strict=True):
        assert_close(got, parameter.grad, atol=1e-6)
