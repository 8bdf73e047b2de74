"""`AlphaSchedule`: how the weight of the L2 part of `PolygonLoss` changes over a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from triton_mgiou.arguments import check_choice, check_integer, check_number

KINDS = ("cosine", "linear", "step")


class AlphaSchedule(nn.Module):
    """A number that goes from `start` to `end` in `total_steps` calls of `step` and stays there.

    With t, the share of the steps that is done:

        cosine   end + (start - end) (1 + cos(pi t)) / 2
        linear   start + (end - start) t
        step     start while t < 1/2, then end

    The count of the steps is a buffer: it is saved in `state_dict` and follows `to(device)`, and a change neither
    waits for a GPU nor makes `torch.compile` recompile.

    Args:
        total_steps: Calls of `step` from `start` to `end`: the epochs of a run if `step` is called once an epoch.
        kind: "cosine", "linear" or "step".
        start: The first value, in 0..1.
        end: The last value, in 0..1.

    Raises:
        TypeError: `total_steps` is not an integer, or `start` or `end` not a number.
        ValueError: An argument has a value that is not named above.
    """

    step_count: Tensor

    def __init__(self, total_steps: int, kind: str = "cosine", start: float = 0.9, end: float = 0.2) -> None:
        super().__init__()
        check_integer("total_steps", total_steps)
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or above, got {total_steps}")
        if total_steps >= 2**63:
            raise ValueError(f"total_steps must be below 2^63, got {total_steps}")
        check_choice("kind", kind, KINDS)
        for name, value in (("start", start), ("end", end)):
            check_number(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        self.total_steps = int(total_steps)
        self.kind = kind
        self.start = float(start)  # one of numpy's is an array to the compiler, which would make the value float64
        self.end = float(end)
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """Go one step on. Call it once an epoch or once an iteration, whichever `total_steps` counts."""
        self.step_count += 1

    def set(self, step: int) -> None:
        """Go to a step, for a run that is resumed from a checkpoint without the loss.

        Args:
            step: How many steps are done, 0 or above; `total_steps` and more is the end.

        Raises:
            TypeError: `step` is not an integer.
            ValueError: `step` is below 0.
        """
        check_integer("step", step)
        if step < 0:
            raise ValueError(f"step must be 0 or above, got {step}")
        self.step_count.fill_(min(int(step), self.total_steps))

    def forward(self) -> Tensor:
        """Return the present value, a float32 scalar."""
        done = (self.step_count.to(torch.float32) / self.total_steps).clamp(max=1)
        if self.kind == "cosine":
            left = (1 + torch.cos(math.pi * done)) / 2
        elif self.kind == "linear":
            left = 1 - done
        else:
            left = (done < 0.5).to(done.dtype)
        return self.end + (self.start - self.end) * left

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"total_steps={self.total_steps}, kind={self.kind!r}, start={self.start}, end={self.end}"
