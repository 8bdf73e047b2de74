"""Measure whole steps of training of a small head, eager and compiled, with this loss and with the cheapest ones.

    python -m bench.heads --out heads.json                                              # 3 minutes on a GPU

A step is zero_grad, forward, loss, backward and AdamW. "compiled" is `torch.compile(fullgraph=True)` of forward and
loss, "CUDA graphs" the same with `mode="reduce-overhead"`. The losses take turns in one process. Compiled, a step's
loss must first be the eager one's. The file is written after each size and mode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bench import measure
from bench.arguments import out_file, positive
from bench.machine import machine
from bench.peers import BLOCK, polygons
from triton_mgiou import PAPER, mgiou_loss

Loss = Callable[[Tensor, Tensor], Tensor]

VERTICES = 4
WIDTH = 256
FEATURES = 64
ROUNDS = 21
WARM_UP = 5  # compiles, warms up, records, and replays
LOSSES: dict[str, Loss] = {
    "smooth L1": F.smooth_l1_loss,  # the first is what the ratios are to
    "default": mgiou_loss,
    "paper's": lambda pred, target: mgiou_loss(pred, target, **PAPER),
    "L1": F.l1_loss,
}
MODES: Mapping[str, Mapping[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}


def main(argv: list[str] | None = None) -> None:
    """Measure, print each row, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="the JSON to write")
    parser.add_argument(
        "--batch", type=whole_blocks, nargs="+", default=[512, 4096],
        help=f"batch sizes, multiples of {BLOCK} (default: 512 4096)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = [name for name in MODES if device.type == "cuda" or name != "CUDA graphs"]
    command = ["python -m bench.heads", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**machine(command, device), "vertices": VERTICES, "rows": []}
    for batch in arguments.batch:
        for mode in modes:
            row = {"batch": batch, "mode": mode, **measured(batch, mode, device)}
            result["rows"].append(row)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(f"{row}\n")


def whole_blocks(text: str) -> int:
    """A batch size that `polygons` can make, as `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if positive(text) % BLOCK:
        raise argparse.ArgumentTypeError(f"expected a multiple of {BLOCK}, got {text!r}")
    return int(text)


def measured(batch: int, mode: str, device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median microseconds of a step with each loss, and the median over the rounds of its ratio to the first."""
    torch.compiler.reset()
    steps: dict[str, measure.Step] = {}
    for name, loss in LOSSES.items():
        step = steps[name] = step_of(loss, batch, mode, device)
        expected = step_of(loss, batch, "eager", device)()
        torch.testing.assert_close(step().clone(), expected, rtol=1e-4, atol=1e-6)
        for _ in range(WARM_UP):
            step()
    times = measure.wall_us(steps, device, rounds)
    first = times[next(iter(LOSSES))]
    return {
        "us": {name: round(statistics.median(each), 1) for name, each in times.items()},
        "ratio": {name: round(measure.median_ratio(each, first), 3) for name, each in times.items()},
    }


def step_of(loss: Loss, batch: int, mode: str, device: torch.device) -> Callable[[], Tensor]:
    """A step with its own head; all heads start alike. Returns the loss before the step."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2 * VERTICES)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), fused=device.type == "cuda")
    features = torch.rand(batch, FEATURES).to(device)
    target = polygons(batch, VERTICES, torch.float32, device)[1]

    def forward() -> Tensor:
        return loss(head(features).view(-1, VERTICES, 2), target)

    options = MODES[mode]
    if options is not None:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, **options)

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        value = forward()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step


if __name__ == "__main__":
    main()
