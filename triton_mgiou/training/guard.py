"""`TrainingGuard`: no step with NaN or Inf, a way back, and an error that lists what happened."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from triton_mgiou.arguments import check_integer, check_one_number
from triton_mgiou.training.finite import NonFiniteError, find_nonfinite, named_tensors
from triton_mgiou.training.snapshot import (
    ModuleSnapshot,
    OptimizerSnapshot,
    OwnFile,
    Place,
    check_plain,
    checkable,
    gradients_in,
    parameters_in,
    parameters_of,
    places,
    plain_numbers,
)

LAST_GOOD, FAILED = "last-good.pt", "failed.pt"
TOLD = 10  # steps in the error, and tensors of each kind
LOWEST_SCALE = 1.0  # where a GradScaler's usual search has long ended; below it float16 gradients round to 0
SKIPS_IN_A_ROW = 20  # from PyTorch's first scale, 65536, these go below any gradient that is finite

REMEDY = (
    "a gradient that is NaN stays so at any scale. Compute the loss in float32: put it into `with torch.autocast("
    "device_type, enabled=False):` and give it `predictions.float()`; or train in bfloat16, which needs no scaler. "
    "Then start with a new GradScaler. nan_to_num on the loss hides the NaN of the value and keeps that of the gradient"
)


class TrainingStoppedError(RuntimeError):
    """Too many steps in a row held NaN or Inf. The text tells what happened; the last good state is restored."""


class _Step(NamedTuple):
    number: int
    loss: float
    norm: float
    outcome: str


class _Extra:
    """A further module, or the module in `ema` of an object that counts its updates."""

    def __init__(self, given: Any, name: str) -> None:
        module = given if isinstance(given, nn.Module) else getattr(given, "ema", None)
        if not isinstance(module, nn.Module):
            kind = type(given).__name__
            raise TypeError(f"{name} must be a torch.nn.Module or an object with one in ema, got {kind}")
        self.name = name
        self.module = _unwrapped(module)
        self.snapshot = ModuleSnapshot()
        self._owner = given
        self._updates: Any = None

    def take(self, now: dict[str, Place]) -> None:
        self.snapshot.take(now)
        self._updates = getattr(self._owner, "updates", None)

    def put_back(self, now: Mapping[str, Place]) -> None:
        self.snapshot.put_back(now, parameters=True)
        if self._updates is not None:
            self._owner.updates = self._updates


class TrainingGuard:
    """Takes the optimizer's steps, but none with NaN or Inf.

    `guard.step(loss)` stands after `backward()`, in the place of unscaling, clipping, `optimizer.step()` and the
    scaler's `step` and `update`:

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if guard.step(loss):
            scheduler.step()

    A step is good if its gradients, the loss, and weights, buffers and optimizer state before it are finite: the
    weights have then proved themselves in a forward and a backward pass. This state, from before the step, is what
    the guard keeps as the last good one, because a step can have finite gradients and still make weights that overflow
    in the next forward pass. A bad step is skipped: the gradients are dropped and the buffers (which the forward pass
    has changed already, such as BatchNorm's running statistics) are put back to the last good ones, with what the loop
    itself may have set in them since, but for the count of an `AlphaSchedule`. After `patience` bad steps in a row the
    guard restores the last good state, writes two checkpoints and raises.

    **GradScaler.** Gradients that overflow while loss, weights, buffers and optimizer state are finite are skipped to
    lower the scale, and do not count as bad while the scale is above 1 and fewer than 20 such steps stand in a row:
    that is how the scaler finds its scale (7 to 10 skips at the start of a run, and a single one now and then). At a
    scale of 1 and below, or from the 20th in a row on, the scaler no longer searches: **every step is skipped while
    the loss stays finite and flat**. The guard then warns with the share of the samples whose gradient is bad (if
    `watch` was called), the first parameter and the remedy, and counts these steps as bad. It also warns when a scaler
    comes with a scale below 1, or falls there: small gradients round to 0 in float16.

    **Further modules**, such as the moving average of the weights (EMA), get NaN from the model after a step that
    broke it. Those in `extra_modules` are kept with the model and put back with it. One that is not finite by itself
    is put back at once, and the step counts as if nothing had happened.

    Modules may get, lose, replace and resize buffers at any time, and groups of parameters may be added to the
    optimizer, or taken from it together with their state. Sparse gradients are taken as they are (coalesced), if the
    optimizer takes them.

    Under DistributedDataParallel, or wherever torch.distributed is initialised, all processes skip and raise together,
    and rank 0 writes. Each must call `step` equally often; `extra_modules` may differ, as an EMA on rank 0 does.
    Sharded parameters (FSDP, DTensor) and optimizers (ZeroRedundancyOptimizer) are not supported.

    Several optimizers of one model need a guard each. A GradScaler cannot serve two of them behind one backward pass:
    the first guard updates the scale, by which the second would then unscale its gradients.

    Cost: one wait for the device a step (a GradScaler adds three of its own), two reductions over gradients and state,
    one small all-reduce between processes, and one more copy of weights, buffers and optimizer state in memory.
    Buffers that are not finite when the guard is made, or that come later in a step that is good otherwise, such as
    masks of -Inf, are not checked.

    Args:
        model: The module that is trained.
        optimizer: Its optimizer; all its parameters must belong to `model` or `extra_modules`.
        scaler: The `torch.amp.GradScaler` that scaled the loss, if there is one. The guard calls `unscale_`,
            unless you have done so, to look at the gradients first.
        max_norm: Gradients are scaled down to this global L2 norm, above 0; None or `math.inf` leave them as they are.
        patience: How many bad steps in a row end the training, 1 or above.
        checkpoint_dir: Folder for the checkpoints, made if it does not exist. `last-good.pt` and `failed.pt` are the
            newest guard's, as a restarted run expects. What an earlier run or another guard has written there stays,
            as `last-good-2.pt`, `last-good-3.pt` and so on, so give guards that work side by side a folder each.
        extra_modules: Modules to watch and restore with the model: PyTorch's `AveragedModel`, a copy of the model, a
            loss with weights of its own, or an object with a module in `ema`, as Ultralytics' `ModelEMA`.

    Attributes:
        steps: How many times `step` was called.
        skipped: How many of these steps were not taken.
        search_skips: How many of the skipped steps were the scaler's usual search before the first step that was taken.
        scaler_skips: How many of the skipped steps were the scaler's, after that search.
        grad_norm: The gradients' global L2 norm in the last step, before clipping.

    Raises:
        NonFiniteError: A parameter is not finite to begin with.
        OSError: The folder cannot be made.
        TypeError: An argument has the wrong type, or a parameter is sharded.
        ValueError: `max_norm` or `patience` is out of range, the optimizer has parameters of another module, or a
            module is lazy and has not been run yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = 10.0,
        patience: int = 3,
        checkpoint_dir: str | os.PathLike[str] = "guard",
        extra_modules: Iterable[Any] = (),
    ) -> None:
        _check_arguments(model, optimizer, scaler, max_norm, patience, checkpoint_dir)
        self._group = None
        inner = getattr(model, "_orig_mod", model)  # what `torch.compile` has compiled
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            self._group = inner.process_group
        self.model = _unwrapped(model)
        self.optimizer = optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.max_norm = math.inf if max_norm is None else float(max_norm)
        self.patience = int(patience)
        self.checkpoint_dir = Path(checkpoint_dir).absolute()  # the process may go to another folder
        self._last_good, self._failed = (OwnFile(self.checkpoint_dir / name) for name in (LAST_GOOD, FAILED))
        self.steps = 0
        self.skipped = 0
        self.search_skips = 0
        self.scaler_skips = 0
        self.grad_norm = math.nan
        self._bad_in_a_row = 0
        self._overflows_in_a_row = 0
        self._was_taken = False
        self._low_scale_told = False
        self._history: deque[_Step] = deque(maxlen=TOLD)
        self._bad_rows: list[tuple[Tensor, int]] = []  # of watched predictions: how many, of how many

        self._model_snapshot = ModuleSnapshot()
        self._optimizer_snapshot = OptimizerSnapshot()
        if isinstance(extra_modules, nn.Module) or not isinstance(extra_modules, Iterable):
            extra_modules = (extra_modules,)
        self._extras = [_Extra(extra, f"extra_modules[{index}]") for index, extra in enumerate(extra_modules)]
        check_plain(self.model, "model")
        for extra in self._extras:
            check_plain(extra.module, extra.name)
        now = places(self.model)
        extras = [places(extra.module) for extra in self._extras]
        for owner, found in (("model", now), *zip((extra.name for extra in self._extras), extras, strict=True)):
            _check_places(found, owner)
        self._trained: list[nn.Parameter] = []
        self._check_owners(now, extras)
        if self._writes():
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self._keep(now, extras)

    def watch(self, predictions: Tensor) -> None:
        """Have messages tell how many of these predictions got a gradient with NaN or Inf.

        Call it before the loss, in each step, on what the loss gets; more than once for several heads. It costs one
        reduction over the gradient in the backward pass, and no wait.

        Args:
            predictions: One row a sample: shape (samples, ...).

        Raises:
            TypeError: `predictions` is no tensor.
            ValueError: It has no rows.
        """
        if not isinstance(predictions, Tensor):
            raise TypeError(f"predictions must be a torch.Tensor, got {type(predictions).__name__}")
        if not predictions.ndim:
            raise ValueError("predictions must have one row a sample, got a scalar")

        def count(gradient: Tensor) -> None:
            rows = gradient.shape[0]
            is_bad = ~torch.isfinite(gradient.reshape(rows, math.prod(gradient.shape[1:])))
            self._bad_rows.append((is_bad.any(dim=1).sum(), rows))

        if predictions.requires_grad:
            predictions.register_hook(count)  # type: ignore[no-untyped-call]

    def step(self, loss: Tensor | None = None) -> bool:
        """Take the optimizer's step if everything is finite, else skip it.

        Args:
            loss: The loss whose `backward()` made the gradients, one element, not scaled; it is checked too, and
                shown in the error.

        Returns:
            Whether the step was taken. If not, the gradients are gone.

        Raises:
            TrainingStoppedError: This was the last bad step that `patience` allows. The last good state is restored.
                `checkpoint_dir` has it as `last-good.pt`, and the state that failed as `failed.pt`, each a dict of
                "model", "optimizer", "scaler", "step" and, if there are any, "extra_modules"; the latter has
                "gradients" too.
            RuntimeError: No parameter has a gradient.
            TypeError: `loss` is no tensor of a real number.
            ValueError: `loss` has more than one element, or the optimizer has got parameters of another module.
        """
        if loss is not None:
            check_one_number("loss", loss)
        trained = [parameter for parameter in parameters_of(self.optimizer) if parameter.grad is not None]
        if not trained:
            raise RuntimeError("no parameter of the optimizer has a gradient: expected step() after loss.backward()")
        now = places(self.model)
        extras = [places(extra.module) for extra in self._extras]
        self._check_owners(now, extras)
        self.steps += 1
        if self.scaler is not None:
            _unscale(self.scaler, self.optimizer)
        gradients = _values(trained)
        norm = get_total_norm(gradients)
        state = _largest([*self._learned(now).values(), *self._model_snapshot.buffers(now).values()])
        value = norm.new_zeros(()) if loss is None else loss.detach()
        further = [
            _largest([*parameters_in(found).values(), *extra.snapshot.buffers(found).values()])
            for extra, found in zip(self._extras, extras, strict=True)
        ]
        numbers, are_fine = self._read(value, norm, state, *further)
        loss_value, self.grad_norm, _, *further_numbers = numbers
        loss_fine, norm_fine, state_fine = are_fine[:3]
        gradients_fine, largest = norm_fine, math.nan
        if not norm_fine:  # the squares may overflow where no gradient does
            (largest,), (gradients_fine,) = self._read(get_total_norm(gradients, math.inf))
        overflow = self.scaler is not None and loss_fine and state_fine and not gradients_fine
        scale = math.nan if self.scaler is None or not overflow else self.scaler.get_scale()
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        is_search = overflow and scale > LOWEST_SCALE and self._overflows_in_a_row < SKIPS_IN_A_ROW
        outcome = "skipped, to lower the scale" if is_search else "skipped"
        if loss_fine and gradients_fine and state_fine:
            outcome = "taken"
        self._history.append(_Step(self.steps, math.nan if loss is None else loss_value, self.grad_norm, outcome))

        for index, number in enumerate(further_numbers):
            if not math.isfinite(number):  # in this process; others may have no such module
                self._mend(self._extras[index], extras[index])
                extras[index] = places(self._extras[index].module)
        if outcome == "taken":
            self._bad_in_a_row = 0
            self._bad_rows.clear()
            self._was_taken = True
            self._keep(now, extras)
            self._clip(gradients, norm, largest)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return True
        found_bad = self._skip(loss, now, extras, overflow=overflow, is_search=is_search, scale=scale)
        warnings.warn(f"step {self.steps} {outcome}: {found_bad}", RuntimeWarning, stacklevel=2)
        return False

    def _skip(
        self,
        loss: Tensor | None,
        now: Mapping[str, Place],
        extras: list[dict[str, Place]],
        *,
        overflow: bool,
        is_search: bool,
        scale: float,
    ) -> str:
        """Count a step that is not taken, and drop it, or stop the training; returns what was not finite."""
        self.skipped += 1
        at_start = is_search and not self._was_taken
        self.search_skips += at_start
        self.scaler_skips += overflow and not at_start
        self._bad_in_a_row += not is_search
        found, hint = self._find(loss, now)
        speaks_up = overflow and not is_search
        if speaks_up:
            hint = self._no_search(scale)
        self._bad_rows.clear()
        if self._bad_in_a_row == self.patience:
            self._stop(now, extras, found, hint)
        self._model_snapshot.put_back(now, parameters=False)
        self._drop_gradients()
        return f"{found[0]}; {hint}" if speaks_up else found[0]

    def save(self) -> Path:
        """Write the last good state to `last-good.pt`, at once or not at all.

        A process that is killed on the way leaves the file that was there before. The file holds "model", "optimizer"
        and "scaler" for their `load_state_dict`, the same of "extra_modules" as a list if there are any, and "step";
        `torch.load` reads it with `weights_only=True`.
        The guard replaces what it has written itself, and nothing else: see `checkpoint_dir`.

        Returns:
            The file. Only rank 0 writes it.
        """
        return self._last_good.save(self._checkpoint()) if self._writes() else self._last_good.path

    def _checkpoint(self) -> dict[str, Any]:
        """The last good state as a file has it."""
        extras = [extra.snapshot.state_dict(extra.module) for extra in self._extras]
        return {
            "model": self._model_snapshot.state_dict(self.model),
            "optimizer": plain_numbers(self._optimizer_snapshot.state_dict()),
            "scaler": self._kept_scaler,
            "step": self._kept_step,
            **({"extra_modules": extras} if extras else {}),
        }

    def _failed_state(self, now: Mapping[str, Place]) -> dict[str, Any]:
        """The state as it is, with the gradients."""
        extras = [extra.module.state_dict() for extra in self._extras]
        return {
            "model": self.model.state_dict(),
            "optimizer": plain_numbers(self.optimizer.state_dict()),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "step": self.steps,
            "gradients": gradients_in(now),
            **({"extra_modules": extras} if extras else {}),
        }

    def _stop(self, now: Mapping[str, Place], extras: list[dict[str, Place]], found: list[str], hint: str) -> NoReturn:
        """Write the state as it is, go back to the last good one, write that, and raise what lists the last steps."""
        outcomes = [self._try_to_write(lambda: self._failed_state(now), self._failed)]
        self._drop_gradients()
        self._model_snapshot.put_back(now, parameters=True)
        for extra, places_now in zip(self._extras, extras, strict=True):
            extra.put_back(places_now)
        self._optimizer_snapshot.put_back(self.optimizer)
        if self.scaler is not None:
            self.scaler.load_state_dict(self._kept_scaler)
        outcomes.append(self._try_to_write(self._checkpoint, self._last_good))
        self._bad_in_a_row = self._overflows_in_a_row = 0  # for whoever catches the error and goes on
        if _is_distributed():  # a launcher may end all processes as soon as one of them has raised
            distributed.barrier(group=self._group)
        good = f"the last good one was {self._kept_step}" if self._kept_step else "there was no good one"
        lines = [
            f"stopped after step {self.steps}, {self.patience} in a row had NaN or Inf; {good}",
            f"{'step':>8}{'loss':>14}{'gradient norm':>16}",
            *(f"{each.number:>8}{each.loss:>14.6g}{each.norm:>16.6g}  {each.outcome}" for each in self._history),
            *found[:TOLD],
            *([f"and {len(found) - TOLD} more"] if len(found) > TOLD else []),
            hint,
            f"the state that failed, with its gradients: {outcomes[0]}",
            f"the state before step {self._kept_step or 1}, restored: {outcomes[1]}",
        ]
        raise TrainingStoppedError("\n".join(lines))

    def _try_to_write(self, state: Callable[[], dict[str, Any]], file: OwnFile) -> str:
        try:
            return str(file.save(state()) if self._writes() else file.path)
        except Exception as error:  # a full disk, or what cannot be pickled: the error matters more
            return f"not written, {error}"

    def _find(self, loss: Tensor | None, now: Mapping[str, Place]) -> tuple[list[str], str]:
        """What is not finite, by name, and where to look first."""
        learned, forward = _reports(self._learned(now)), _reports(self._model_snapshot.buffers(now))
        if loss is not None and not torch.isfinite(loss).all():
            forward.insert(0, f"the loss is {loss.item()}")
        gradients = _reports({f"gradient of {name}": gradient for name, gradient in gradients_in(now).items()})
        for extra in self._extras:
            found = gradients_in(places(extra.module)).items()
            gradients += _reports({f"gradient of {extra.name}.{name}": gradient for name, gradient in found})
        if learned:
            hint = "the step before made them: try a lower learning rate or a warm-up"
        elif forward:
            hint = (
                "the forward pass made it, from bad data or by overflow: TRITON_MGIOU_DEBUG=1 shows what the loss gets"
            )
        elif gradients:
            hint = "the backward pass made it: torch.autograd.set_detect_anomaly(True) names the operation"
        else:
            return ["everything is finite in this process"], "another process has the NaN or Inf, and names it"
        return [*learned, *forward, *gradients], hint

    def _no_search(self, scale: float) -> str:
        """Why skipping steps does not help any more."""
        bad, rows = sum(int(count) for count, _ in self._bad_rows), sum(rows for _, rows in self._bad_rows)
        samples = f"{bad} of {rows} watched samples have a bad gradient; " if rows else ""
        if scale == 0:
            return f"{samples}the GradScaler's scale is 0, from where no scaler comes back; {REMEDY}"
        return (
            f"{samples}the GradScaler has skipped {self._overflows_in_a_row} steps in a row, its scale is {scale:.3g}: "
            f"that is no search for a scale any more, and no step is taken while the loss stays finite; {REMEDY}"
        )

    def _read(self, *values: Tensor) -> tuple[list[float], list[bool]]:
        """The values of this process, and which of the first three are finite in all. Waits for the device once."""
        numbers = torch.stack([value.to(values[0].device).reshape(()) for value in values])
        are_finite = torch.isfinite(numbers[:3]).int()
        if _is_distributed():
            distributed.all_reduce(are_finite, distributed.ReduceOp.MIN, group=self._group)
        read = torch.cat((numbers, are_finite)).tolist()
        return read[: len(values)], [flag == 1 for flag in read[len(values) :]]

    def _check_owners(self, now: Mapping[str, Place], extras: list[dict[str, Place]]) -> None:
        """Refuse parameters of other modules, which could not be restored."""
        trained = parameters_of(self.optimizer)
        if len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained)):
            return
        known = {id(place.tensor) for found in (now, *extras) for place in found.values()}
        strange = sum(id(parameter) not in known for parameter in trained)
        if strange:
            raise ValueError(
                f"optimizer must have parameters of model only, or of extra_modules, got {strange} of another module"
            )
        self._trained = trained

    def _learned(self, now: Mapping[str, Place]) -> dict[str, Tensor]:
        """What the optimizer changes."""
        learned = parameters_in(now)
        indices = {id(parameter): index for index, parameter in enumerate(parameters_of(self.optimizer))}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items() if isinstance(state, Mapping) else ():
                if key == "step":  # a counter, often on another device
                    continue
                name = f"optimizer.state.{indices.get(id(parameter), 'other')}.{key}"
                if isinstance(value, Tensor):
                    learned[name] = value
                elif isinstance(value, (Mapping, list, tuple)):  # as the factors of Shampoo and SOAP
                    learned |= {f"{name}.{inner}": tensor for inner, tensor in named_tensors(value)}
        return learned

    def _keep(self, now: dict[str, Place], extras: list[dict[str, Place]]) -> None:
        """Copy the state."""
        self._model_snapshot.take(now)
        for extra, found in zip(self._extras, extras, strict=True):
            extra.take(found)
        self._optimizer_snapshot.take(self.optimizer)
        self._kept_scaler = {} if self.scaler is None else self.scaler.state_dict()
        self._kept_step = self.steps
        if self.scaler is None:
            return
        is_low = self._kept_scaler["scale"] < LOWEST_SCALE
        if is_low and not self._low_scale_told:
            warnings.warn(
                f"step {self.steps}: the GradScaler's scale is {self._kept_scaler['scale']:.3g}, below what its search "
                f"reaches: small gradients round to 0 in float16; {REMEDY}",
                RuntimeWarning,
                stacklevel=3,
            )
        self._low_scale_told = is_low

    def _mend(self, extra: _Extra, now: Mapping[str, Place]) -> None:
        """Put a further module back that is not finite."""
        found, *_ = _reports({**parameters_in(now), **extra.snapshot.buffers(now)})
        extra.put_back(now)
        warnings.warn(f"step {self.steps}: {extra.name} is put back: {found}", RuntimeWarning, stacklevel=3)

    def _clip(self, gradients: list[Tensor], norm: Tensor, largest: float) -> None:
        """What `clip_grads_with_norm_` does, for sparse gradients too."""
        if self.max_norm == math.inf:
            return
        most = 1.0
        if not math.isfinite(self.grad_norm):
            torch._foreach_div_(gradients, largest)  # then the norm is finite, in float16 too
            norm, most = get_total_norm(gradients), largest
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=most)
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            by_device.setdefault(gradient.device, []).append(gradient)
        for device, group in by_device.items():
            torch._foreach_mul_(group, factor.to(device))

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()

    def _writes(self) -> bool:
        return not _is_distributed() or distributed.get_rank(self._group) == 0


def _check_arguments(
    model: Any, optimizer: Any, scaler: Any, max_norm: float | None, patience: int, checkpoint_dir: Any
) -> None:
    """Refuse arguments of a wrong type or out of range."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer must take a step without a closure, got LBFGS")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if max_norm is not None and (not isinstance(max_norm, Real) or isinstance(max_norm, bool)):
        raise TypeError(f"max_norm must be a number or None, got {type(max_norm).__name__}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, or None for gradients as they are, got {max_norm}")
    if hasattr(optimizer, "consolidate_state_dict"):
        raise TypeError(f"optimizer must have its whole state in each process, got {type(optimizer).__name__}")
    check_integer("patience", patience)
    if patience < 1:
        raise ValueError(f"patience must be 1 or above, got {patience}")
    if not isinstance(checkpoint_dir, (str, os.PathLike)):
        raise TypeError(f"checkpoint_dir must be a str or os.PathLike, got {type(checkpoint_dir).__name__}")


def _unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = module.module
        return inner
    return module


def _check_places(found: Mapping[str, Place], owner: str) -> None:
    for name, place in found.items():
        if isinstance(place.tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{owner} must have been run once: {name}, of a lazy module, has no shape yet")
    for report in find_nonfinite(parameters_in(found)):
        raise NonFiniteError(report, f"TrainingGuard, before the first step, {owner}")


def _values(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Their gradients; of sparse ones the values, which share the memory of the gradient."""
    values = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.sparse_coo:
            parameter.grad = gradient.coalesce()  # elements that are stored twice count as their sum
            gradient = parameter.grad._values()
        if gradient is not None and gradient.numel():
            values.append(gradient)
    return values


@torch.no_grad()
def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude; not finite if an element is not."""
    return get_total_norm([each for tensor in tensors if (each := checkable(tensor)) is not None], math.inf)


def _reports(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(map(str, find_nonfinite(tensors)))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
