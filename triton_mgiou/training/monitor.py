"""`GradientMonitor`: how large the gradients are, group by group, and what the steps make of them."""

from __future__ import annotations

import csv
import math
import os
import warnings
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from triton_mgiou.arguments import check_integer, check_is_number
from triton_mgiou.training.snapshot import check_plain

WARM_UP = 10  # records before an average is trusted
TOLD = 3  # groups in a warning
MEASURES = ("grad_norm", "zero_share", "update_ratio")
LOST_UPDATE = 1e-7  # of the weights: below float32's rounding
DEAD_SHARE = 0.99  # of zeros
STILL = 20  # records in a row in which no parameter changes
WEAK = 0.1  # of the strongest group's gradient: what a group behind a layer of zeros begins far below
FADED = 1e-3  # of the group's highest average: where a run has converged, gradients are far below, and leap there


class GradientMonitor:
    """Follows the gradients of a model, and warns when they vanish or explode.

    Call `record()` once a step, after `backward()`: before clipping to see the gradients as they are, and with a
    GradScaler after `unscale_`; beside a `TrainingGuard`, after a step that it took. For each group of parameters it
    takes

    - `grad_norm`: the L2 norm of the gradient,
    - `zero_share`: the share of its elements that are 0, in 0..1; a parameter without a gradient counts as zeros,
    - `update_ratio`: the norm of the change of the weights since the last record over the norm of the weights then;
      about 1e-3 a step is common,

    and an exponential average of each (`decay`, corrected for its start; what is not finite does not enter). After 10
    records it warns, once for as long as it lasts, of

    - exploding: the norm is not finite (from the first record on), or above `exploding` times the lowest average that
      it had; or a step changes the weights by more than `max_update` on average;
    - vanishing: the average norm is at most `vanishing` times that of the strongest group; or the average share of
      zeros is above 0.99; or the average update ratio is below 1e-7, where float32 rounds the updates away;
    - standing still: **no parameter of the model has changed for 20 records**. No step of the optimizer reaches the
      weights then: a GradScaler that skips every step is the usual cause, and the loss is finite and flat.

    Weights that start at 0, as those of an offset head, or near it grow to their size without a warning: for
    `max_update` the change is set against the norm that PyTorch's usual initialisation would have, where that is
    larger than the weights'; and the lowest average of a group counts as 10 % of the strongest group's at the least.
    Gradients that are nearly 0 where a run has converged may leap: it counts as 0.1 % of its highest average, too.

    Cost: one wait for the device a record, a few launches for each group, and a copy of the weights.

    Args:
        model: The module to follow. Parameters that do not require a gradient are left out, and those of a lazy module
            until it has been run.
        depth: How many components of a parameter's name make its group: with 1, "backbone.stem.conv.weight" is in
            "backbone", with 2 in "backbone.stem". What `torch.compile` and data parallelism put before it is left out.
        decay: Of the exponential averages, in 0..1 (1 excluded): 0.98 looks back about 50 records.
        exploding: See above, above 1.
        vanishing: See above, in 0..1 (1 excluded).
        max_update: See above, above 0.
        writer: A TensorBoard `SummaryWriter`, or anything with its `add_scalar(tag, value, step)`; gets each measure
            as "MEASURE/GROUP".

    Raises:
        TypeError: An argument has the wrong type, `writer` has no `add_scalar`, or a parameter is sharded.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        depth: int = 1,
        decay: float = 0.98,
        exploding: float = 100.0,
        vanishing: float = 1e-5,
        max_update: float = 0.1,
        writer: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer must have add_scalar(tag, value, step), got {type(writer).__name__}")
        check_integer("depth", depth)
        numbers = {"decay": decay, "exploding": exploding, "vanishing": vanishing, "max_update": max_update}
        for name, value in numbers.items():
            check_is_number(name, value)
        for name, value, is_right, range_ in (
            ("depth", depth, depth >= 1, "1 or above"),
            ("decay", decay, 0 <= decay < 1, "in 0..1, 1 excluded"),
            ("exploding", exploding, exploding > 1, "above 1"),
            ("vanishing", vanishing, 0 <= vanishing < 1, "in 0..1, 1 excluded"),
            ("max_update", max_update, max_update > 0, "above 0"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {range_}, got {value}")
        self.decay = decay
        self.exploding = exploding
        self.vanishing = vanishing
        self.max_update = max_update
        self.writer = writer
        self.records = 0
        self._still = 0  # records in a row without a change
        groups: dict[str, list[nn.Parameter]] = {}
        check_plain(model, "model")
        for name, parameter in _unwrapped(model).named_parameters():
            own = name.replace("_orig_mod.", "")  # without what is in it where a part is compiled
            groups.setdefault(".".join(own.split(".")[:-1][:depth]) or own, []).append(parameter)
        self._groups = [_Group(name, parameters, decay) for name, parameters in groups.items()]
        self._history = array("d")  # step, group, the three measures, their averages

    @torch.no_grad()
    def record(self, step: int | None = None) -> None:
        """Measure the gradients that are there and the change of the weights since the last record.

        Args:
            step: Its number for the table, TensorBoard and warnings; by default records are counted from 1.

        Raises:
            TypeError: `step` is not an integer.
        """
        if step is not None:
            check_integer("step", step)
        self.records += 1
        step = self.records if step is None else step
        groups = [group for group in self._groups if any(p.numel() for p in group.trained())]
        if not groups:
            return
        measured = [group.measure() for group in groups]
        numbers = torch.stack([each.to(measured[0].device) for each in measured]).tolist()
        self._still = self._still + 1 if all(changed == 0 for *_, changed in numbers) else 0
        least = WEAK * _strongest(groups)
        for group, (*values, _) in zip(groups, numbers, strict=True):
            group.add(values, least)
            self._history.extend((step, self._groups.index(group), *group.last[:3], *group.averages[:3]))
            if self.writer is not None:
                for measure, value in zip(MEASURES, group.last[:3], strict=True):
                    if not math.isnan(value) or measure == "grad_norm":
                        self.writer.add_scalar(f"{measure}/{group.name}", value, step)
        strongest = _strongest(groups)
        news = []
        if self._still == STILL:
            news.append(
                f"no parameter has changed for {STILL} records: no step of the optimizer reaches the weights; with a "
                "GradScaler, print scaler.get_scale(): it falls where every step is skipped"
            )
        for group in groups:
            before, group.verdict = group.verdict, self._judge(group, strongest)
            if group.verdict.partition(":")[0] not in {"", before.partition(":")[0]}:
                news.append(f"{group.name}: {group.verdict}")
        if news:
            more = f"; and {len(news) - TOLD} more, see summary()" if len(news) > TOLD else ""
            warnings.warn(f"step {step}: {'; '.join(news[:TOLD])}{more}", RuntimeWarning, stacklevel=3)

    def _judge(self, group: _Group, strongest: float) -> str:
        norm, average, update, growth = group.last[0], group.averages[0], group.averages[2], group.averages[3]
        if not math.isfinite(norm):
            return f"exploding: gradient norm {norm}"
        if self.records < WARM_UP:
            return ""
        if norm > self.exploding * group.lowest > 0:
            return f"exploding: gradient norm {norm:.3g}, its average was {group.lowest:.3g}"
        if growth > self.max_update:
            return f"exploding: a step changes the weights by {growth:.1%} on average"
        if average <= self.vanishing * strongest:
            return f"vanishing: gradient norm {average:.3g} on average, the strongest group has {strongest:.3g}"
        if group.averages[1] > DEAD_SHARE:
            return f"vanishing: {group.averages[1]:.2%} of the gradient are 0 on average"
        if update < LOST_UPDATE:
            return f"vanishing: a step changes the weights by {update:.1e} of their norm on average"
        return ""

    def summary(self) -> str:
        """The last norm and the averages of each group as a table, with what is wrong with it."""
        head = ("group", "parameters", "grad_norm", "average", "zero_share", "update_ratio", "")
        rows = [
            (
                group.name,
                str(sum(parameter.numel() for parameter in group.parameters if not is_lazy(parameter))),
                *(f"{value:.3g}" for value in (group.last[0], *group.averages[:3])),
                group.verdict,
            )
            for group in self._groups
        ]
        width = max(len(row[0]) for row in (head, *rows))
        lines = [f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells, _ in (head, *rows)]
        return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, (head, *rows), strict=True))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all records, one line for each step and group; a ratio that is not known yet is an empty cell.

        Args:
            path: The file, overwritten if it exists.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("step", "group", *MEASURES, *(f"{measure}_average" for measure in MEASURES)))
            for start in range(0, len(self._history), 8):
                step, group, norm, *values = self._history[start : start + 8]
                cells = ["" if math.isnan(value) else value for value in values]
                table.writerow((int(step), self._groups[int(group)].name, norm, *cells))


class _Group:
    """Parameters that are looked at together."""

    def __init__(self, name: str, parameters: list[nn.Parameter], decay: float) -> None:
        self.name = name
        self.parameters = parameters
        self.last = [math.nan] * 4  # the measures, and the change over the usual norm
        self.averages = [math.nan] * 4
        self.lowest = math.inf  # average norm, after the warm-up
        self._highest = 0.0  # the same
        self.verdict = ""
        self._decay = decay
        self._sums = [0.0] * 4
        self._weights = [0.0] * 4
        self._count = 0
        self._before: Tensor | None = None  # the weights of these parameters, by their ids
        self._measured: list[int] = []

    def trained(self) -> list[nn.Parameter]:
        """The parameters that require a gradient, without those of lazy modules that have not been run yet."""
        return [parameter for parameter in self.parameters if parameter.requires_grad and not is_lazy(parameter)]

    def measure(self) -> Tensor:
        """The measures, the change over the usual norm, and whether there is a change, on the device, shape (5,)."""
        parameters = self.trained()
        gradient = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        weights = _flat(parameters)
        ratio = growth = changed = gradient.new_full((), math.nan)
        before, self._measured = self._measured, [id(parameter) for parameter in parameters]
        if self._before is not None and before == self._measured and self._before.shape == weights.shape:
            norm = self._before.norm()
            change = (weights - self._before).norm()
            ratio = torch.where(norm > 0, change / norm, ratio)
            growth = change / norm.clamp(min=_usual_norm(parameters))
            changed = (weights != self._before).any().to(gradient.dtype)
        self._before = weights
        zeros = (gradient == 0).sum() / gradient.numel()
        return torch.stack((gradient.norm(), zeros.to(gradient.dtype), ratio, growth, changed))

    def add(self, values: list[float], least: float) -> None:
        """Take the measures of a record into the averages; the lowest is `least` or above."""
        self.last = values
        self._count += 1
        if self._count > WARM_UP:
            self._highest = max(self._highest, self.averages[0])
            self.lowest = min(self.lowest, max(self.averages[0], least, FADED * self._highest))  # before this record
        for index, value in enumerate(values):
            if math.isfinite(value):
                self._sums[index] += (1 - self._decay) * (value - self._sums[index])
                self._weights[index] += (1 - self._decay) * (1 - self._weights[index])
                self.averages[index] = self._sums[index] / self._weights[index]


def _strongest(groups: list[_Group]) -> float:
    """The highest average norm; 0 where there is none yet."""
    return max((group.averages[0] for group in groups if group.averages[0] > 0), default=0.0)  # not NaN


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module in the wrappers of data parallelism and `torch.compile`, which stand in either order."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _usual_norm(parameters: list[nn.Parameter]) -> float:
    """The norm of weights that are uniform within 1 / sqrt(fan-in), and of biases in 0.1."""
    squares = (
        parameter.numel() / (3 * math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.01 * parameter.numel()
        for parameter in parameters
        if parameter.numel()
    )
    return math.sqrt(sum(squares))


def _flat(tensors: list[Any]) -> Tensor:
    """One real vector of all elements, in float32 or above: a new one, even of a single tensor."""
    device = tensors[0].device
    parts: Iterator[Tensor] = (t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in tensors)
    parts = (torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts)
    flat = [part.reshape(-1).to(device, torch.promote_types(part.dtype, torch.float32)) for part in parts]
    return torch.cat(flat)
