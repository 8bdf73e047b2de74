"""The reported loss under automatic mixed precision: its value is finite, its gradient NaN, and no step is taken.

    python -m bench.convergence.amp --out bench/results/convergence_amp.json

The task is "digits" of `bench.convergence.run`, with the last layer as PyTorch makes it, on a CPU: 50 steps of AdamW
under `torch.autocast` and `GradScaler`, for the reported loss, each suspect turned off alone, and this package's loss.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.arguments import out_file
from bench.convergence.losses import LOSSES, OURS, Loss, reported
from bench.convergence.run import BATCH_SIZE, make_network
from bench.machine import machine
from triton_mgiou import demo

STEPS = 50
SEED = 0


def in_float32(pred: Tensor, target: Tensor, lengths: Tensor, progress: float) -> Tensor:
    """The reported loss outside of autocast."""
    with torch.autocast("cpu", enabled=False):
        return reported(pred.float(), target, lengths, progress)


TRIED: dict[str, Loss] = {
    **{name: loss for name, loss in LOSSES.items() if name.startswith("reported")},
    "reported, epsilon 1e-4": partial(reported, epsilon=1e-4),
    "reported, in float32": in_float32,
    **{name: LOSSES[name] for name in ("MGIoU as published", OURS)},
}
CASES = [(name, torch.float16) for name in TRIED]
CASES += [(name, dtype) for name in ("reported", OURS) for dtype in (torch.bfloat16, torch.float32)]


def train(name: str, dtype: torch.dtype, steps: int = STEPS) -> dict[str, Any]:
    """Train the demo's network; the row of the results."""
    loss, (data, _) = TRIED[name], demo.load_data()
    network = make_network("scattered", SEED)
    before = [weights.detach().clone() for weights in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), demo.LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    rng = torch.Generator().manual_seed(SEED)
    values: list[float] = []
    skipped = samples = finite = bad = 0
    for step in range(steps):
        batch = torch.randint(len(data.images), (BATCH_SIZE,), generator=rng)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            polygons = network(data.images[batch])
            losses = loss(polygons, data.targets[batch], data.lengths[batch], step / steps)
        (gradient,) = torch.autograd.grad(losses.float().sum(), polygons, retain_graph=True)
        samples += BATCH_SIZE
        finite += int(torch.isfinite(losses).sum())
        bad += int((~torch.isfinite(gradient).flatten(1).all(1)).sum())
        optimizer.zero_grad()
        scaled: Tensor = scaler.scale(losses.mean())
        torch.autograd.backward(scaled)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        values.append(losses.detach().float().mean().item())
    changed = any(not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    last = sum(values[-5:]) / len(values[-5:])
    return {
        "loss_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "finite_values": finite / samples,
        "bad_gradients": bad / samples,
        "loss": [None if math.isnan(value) else value for value in (values[0], last)],
        "skipped": skipped,
        "scale": scaler.get_scale(),
        "weights_changed": changed,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train every case and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results, JSON")
    out = parser.parse_args(argv).out
    torch.set_num_threads(1)
    rows = [train(name, dtype) for name, dtype in tqdm(CASES, desc="trainings")]
    command = ["python -m bench.convergence.amp --out", str(out)]
    what = "loss: of the first step, and the mean of the last five; shares are of the samples of all steps"
    about = {"what": what, **machine(command, torch.device("cpu"))}
    out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
