"""`TrainingGuard`: no step with NaN or Inf, a way back, and the story of what happened."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from triton_mgiou.training.finite import NonFiniteError, find_nonfinite

LAST_GOOD, FAILED = "last-good.pt", "failed.pt"
TOLD = 10  # steps in the story, and tensors of each kind


class TrainingStoppedError(RuntimeError):
    """Too many steps in a row held NaN or Inf. The text tells what happened; the last good state is restored."""


class _Step(NamedTuple):
    number: int
    loss: float
    norm: float
    outcome: str


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
    has changed already, such as BatchNorm's running statistics) are put back to the last good ones. After `patience`
    bad steps in a row the guard restores the last good state, writes two checkpoints and raises.

    With a GradScaler, gradients that overflow while loss, weights, buffers and optimizer state are finite and the
    scale is above 1 are skipped, but not counted: that is how the scaler finds its scale.

    Under DistributedDataParallel, or wherever torch.distributed is initialised, all processes skip and raise together,
    and rank 0 writes. Each must call `step` equally often. Sharded parameters (FSDP) are not supported.

    Cost: one wait for the device a step (a GradScaler adds three of its own), two reductions over gradients and state,
    one small all-reduce between processes, and one more copy of weights, buffers and optimizer state in memory.
    Buffers that are not finite when the guard is made, such as masks of -Inf, are not checked.

    Args:
        model: The module that is trained.
        optimizer: Its optimizer; all its parameters must belong to `model`.
        scaler: The `torch.amp.GradScaler` that scaled the loss, if there is one. The guard calls `unscale_`.
        max_norm: Gradients are scaled down to this global L2 norm; above 0, `math.inf` to leave them as they are.
        patience: How many bad steps in a row end the training, 1 or above.
        checkpoint_dir: Folder for the checkpoints, made if it does not exist.

    Attributes:
        steps: How many times `step` was called.
        skipped: How many of these steps were bad.
        grad_norm: The gradients' global L2 norm in the last step, before clipping.

    Raises:
        NonFiniteError: A parameter is not finite to begin with.
        TypeError: An argument has the wrong type.
        ValueError: `max_norm` or `patience` is out of range, or the optimizer has parameters that `model` has not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float = 10.0,
        patience: int = 3,
        checkpoint_dir: str | os.PathLike[str] = "guard",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be an integer of 1 or above, got {patience!r}")
        self._group = None
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._group = model.process_group
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.max_norm = max_norm
        self.patience = patience
        self.checkpoint_dir = Path(checkpoint_dir)
        self.steps = 0
        self.skipped = 0
        self.grad_norm = math.nan
        self._bad_in_a_row = 0
        self._history: deque[_Step] = deque(maxlen=TOLD)

        # Walking through the modules in every step would take longer than the checks.
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffer_places = [
            (f"{prefix}.{key}" if prefix else key, module, key)
            for prefix, module in model.named_modules(remove_duplicate=False)
            for key, _ in module.named_buffers(recurse=False)
        ]
        known = {id(parameter) for parameter in self._parameters.values()}
        strange = sum(id(parameter) not in known for parameter in self._trained())
        if strange:
            raise ValueError(f"optimizer must have parameters of model only, got {strange} of another module")
        for report in find_nonfinite(self._parameters):
            raise NonFiniteError(report, "TrainingGuard, before the first step")
        self._constants = {report.name for report in find_nonfinite(self._buffers())}
        if self._writes():
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self._copies: list[Tensor] = []
        self._keep()

    def step(self, loss: Tensor | None = None) -> bool:
        """Take the optimizer's step if everything is finite, else skip it.

        Args:
            loss: The loss whose `backward()` made the gradients, one element, not scaled; it is checked too, and
                told in the story.

        Returns:
            Whether the step was taken. If not, the gradients are gone.

        Raises:
            TrainingStoppedError: This was the last bad step that `patience` allows. The last good state is restored.
                `checkpoint_dir` has it as `last-good.pt`, and the state that failed, with the gradients, as
                `failed.pt`, each a dict of "model", "optimizer", "scaler", "step" and "gradients".
            RuntimeError: No parameter has a gradient.
            TypeError: `loss` is no tensor.
            ValueError: `loss` has more than one element.
        """
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a torch.Tensor, got {type(loss).__name__}")
        if loss is not None and loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        trained = [parameter for parameter in self._trained() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        if not gradients:
            raise RuntimeError("no parameter of the optimizer has a gradient: expected step() after loss.backward()")
        self.steps += 1
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = get_total_norm(gradients)
        state = get_total_norm([*self._learned().values(), *self._statistics().values()], math.inf)
        value = norm.new_zeros(()) if loss is None else loss.detach()
        (loss_value, self.grad_norm, _), (loss_fine, norm_fine, state_fine) = self._read(value, norm, state)
        gradients_fine, largest = norm_fine, math.nan
        if not norm_fine:  # the squares may overflow where no gradient does
            (largest,), (gradients_fine,) = self._read(get_total_norm(gradients, math.inf))
        outcome = "taken"
        if not (loss_fine and gradients_fine and state_fine):
            is_search = self.scaler is not None and loss_fine and state_fine and self.scaler.get_scale() > 1
            outcome = "skipped, to lower the scale" if is_search else "skipped"
        self._history.append(_Step(self.steps, math.nan if loss is None else loss_value, self.grad_norm, outcome))

        if outcome == "taken":
            self._bad_in_a_row = 0
            self._keep()
            if self.max_norm < math.inf:
                if not norm_fine:
                    torch._foreach_mul_(gradients, self.max_norm / largest)
                    norm = get_total_norm(gradients)
                clip_grads_with_norm_(trained, self.max_norm, norm)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return True
        self.skipped += 1
        self._bad_in_a_row += outcome == "skipped"
        found, hint = self._find(loss)
        if self._bad_in_a_row == self.patience:
            self._stop(found, hint)
        self._copy_back(self._buffers())
        self._drop_gradients()
        warnings.warn(f"step {self.steps} {outcome}: {found[0]}", RuntimeWarning, stacklevel=2)
        return False

    def save(self) -> Path:
        """Write the last good state to `last-good.pt`, at once or not at all.

        A process that is killed on the way leaves the file that was there before. The file holds "model", "optimizer"
        and "scaler" for their `load_state_dict`, and "step"; `torch.load` reads it with `weights_only=True`.

        Returns:
            The file. Only rank 0 writes it.
        """
        path = self.checkpoint_dir / LAST_GOOD
        if self._writes():
            save_atomically(self._checkpoint(), path)
        return path

    def _checkpoint(self) -> dict[str, Any]:
        """The last good state as a file has it."""
        tensors, optimizer = self._kept()
        model = {name: tensors.get(name, value) for name, value in self.model.state_dict().items()}
        return {"model": model, "optimizer": optimizer, "scaler": self._kept_scaler, "step": self._kept_step}

    def _stop(self, found: list[str], hint: str) -> NoReturn:
        """Write the state as it is, go back to the last good one, write that, and tell the story."""
        failed = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "step": self.steps,
            "gradients": self._gradients(),
        }
        outcomes = [self._try_to_write(failed, FAILED)]
        self._drop_gradients()
        _, optimizer = self._kept()
        self._copy_back({**self._parameters, **self._buffers()})
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))  # which would go on with the copies themselves
        if self.scaler is not None:
            self.scaler.load_state_dict(self._kept_scaler)
        outcomes.append(self._try_to_write(self._checkpoint(), LAST_GOOD))
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

    def _try_to_write(self, state: dict[str, Any], name: str) -> str:
        path = self.checkpoint_dir / name
        try:
            if self._writes():
                save_atomically(state, path)
        except (OSError, RuntimeError) as error:  # the story matters more
            return f"not written, {error}"
        return str(path)

    def _find(self, loss: Tensor | None) -> tuple[list[str], str]:
        """What is not finite, by name, and where to look first."""
        learned, forward = _reports(self._learned()), _reports(self._statistics())
        if loss is not None and not torch.isfinite(loss).all():
            forward.insert(0, f"the loss is {loss.item()}")
        gradients = _reports({f"gradient of {name}": gradient for name, gradient in self._gradients().items()})
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

    def _read(self, *values: Tensor) -> tuple[list[float], list[bool]]:
        """The values of this process, and which of them are finite in all processes. Waits for the device once."""
        numbers = torch.stack([value.to(values[0].device).reshape(()) for value in values])
        are_finite = torch.isfinite(numbers).int()
        if _is_distributed():
            distributed.all_reduce(are_finite, distributed.ReduceOp.MIN, group=self._group)
        read = torch.cat((numbers, are_finite)).tolist()
        return read[: len(values)], [flag == 1 for flag in read[len(values) :]]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _buffers(self) -> dict[str, Tensor]:
        return {name: getattr(module, key) for name, module, key in self._buffer_places}

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def _learned(self) -> dict[str, Tensor]:
        """What the optimizer changes."""
        learned: dict[str, Tensor] = dict(self._parameters)
        for index, state in enumerate(self.optimizer.state.values()):
            for key, value in state.items():  # "step" is a counter, often on another device
                if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                    learned[f"optimizer.state.{index}.{key}"] = value
        return learned

    def _statistics(self) -> dict[str, Tensor]:
        """What the forward pass changes."""
        buffers = self._buffers().items()
        return {name: b for name, b in buffers if b.is_floating_point() and name not in self._constants}

    def _keep(self) -> None:
        """Copy the state; into the copies that there are, if they have the same shapes."""
        optimizer = self.optimizer.state_dict()
        states = optimizer.pop("state")
        self._state_places = [(i, k) for i, state in states.items() for k, v in state.items() if isinstance(v, Tensor)]
        self._kept_optimizer = copy.deepcopy(optimizer)
        self._kept_states = {
            index: {key: copy.deepcopy(value) for key, value in state.items() if not isinstance(value, Tensor)}
            for index, state in states.items()
        }
        self._kept_scaler = {} if self.scaler is None else self.scaler.state_dict()
        self._kept_step = self.steps
        tensors = [*self._parameters.values(), *self._buffers().values()]
        tensors = [t.detach() for t in (*tensors, *(states[index][key] for index, key in self._state_places))]
        if _layout(tensors) != _layout(self._copies):
            self._copies = [tensor.clone() for tensor in tensors]
            return
        pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for copied, tensor in zip(self._copies, tensors, strict=True):
            copies, originals = pairs.setdefault(tensor.device, ([], []))
            copies.append(copied)
            originals.append(tensor)
        for copies, originals in pairs.values():
            torch._foreach_copy_(copies, originals)

    def _kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The copies of parameters and buffers by name, and the optimizer's `state_dict`."""
        copies = iter(self._copies)
        names = (*self._parameters, *(name for name, _, _ in self._buffer_places))
        tensors = {name: next(copies) for name in names}
        states = {index: dict(state) for index, state in self._kept_states.items()}
        for index, key in self._state_places:
            states[index][key] = next(copies)
        return tensors, {**self._kept_optimizer, "state": states}

    @torch.no_grad()
    def _copy_back(self, tensors: Mapping[str, Tensor]) -> None:
        kept, _ = self._kept()
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()

    def _writes(self) -> bool:
        return not _is_distributed() or distributed.get_rank(self._group) == 0


def save_atomically(state: object, path: Path) -> None:
    """`torch.save` to a file that has, at any moment, the old content or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    if os.name == "posix":  # the new name has to reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _layout(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _reports(tensors: dict[str, Tensor]) -> list[str]:
    return list(map(str, find_nonfinite(tensors)))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
