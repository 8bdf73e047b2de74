"""Copies of modules and of an optimizer's state, the way back to them, and files that are whole or not there."""

from __future__ import annotations

import copy
import itertools
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from triton_mgiou.training.finite import COMPRESSED, find_nonfinite, values_of_nested
from triton_mgiou.training.schedules import AlphaSchedule


class Place(NamedTuple):
    """A place where a module holds a parameter or a buffer, and what is there: None for a buffer that is not set."""

    module: nn.Module
    key: str
    is_buffer: bool
    tensor: Tensor | None


def places(module: nn.Module) -> dict[str, Place]:
    """All parameters and buffers of a module as they are now, by name; a third of the time of PyTorch's iterators."""
    found: dict[str, Place] = {}
    waiting = [("", module)]
    while waiting:
        prefix, module = waiting.pop()
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[prefix + key] = Place(module, key, False, parameter)
        for key, buffer in module._buffers.items():
            found[prefix + key] = Place(module, key, True, buffer)
        children = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
        waiting += reversed(children)
    return found


def check_plain(module: nn.Module, name: str) -> None:
    """Refuse parameters and buffers that are spread over processes, of which each process would see another part."""
    for each in module.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(each).__mro__):  # whose import is slow
            raise TypeError(f"{name} must have plain tensors, got sharded ones in a {type(each).__name__}")
    for key, place in places(module).items():
        if hasattr(place.tensor, "device_mesh"):
            raise TypeError(f"{name} must have plain tensors, got {type(place.tensor).__name__}, sharded, as {key}")


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Its parameters, in the order of the indices in its `state_dict`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameters_in(found: Mapping[str, Place]) -> dict[str, Tensor]:
    """The parameters among them."""
    return {name: p.tensor for name, p in found.items() if not p.is_buffer and p.tensor is not None}


def gradients_in(found: Mapping[str, Place]) -> dict[str, Tensor]:
    """The gradients of the parameters among them."""
    return {name: tensor.grad for name, tensor in parameters_in(found).items() if tensor.grad is not None}


class ModuleSnapshot:
    """The parameters and buffers of a module as they were when `take` was last called."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.copies: dict[str, Tensor | None] = {}
        self._constants: set[str] = set()

    def take(self, now: dict[str, Place]) -> None:
        """Copy what `places` found. Buffers that have come since, and are not finite, are so on purpose."""
        tensors = {name: place.tensor for name, place in now.items()}
        new = {name: tensors[name] for name, place in now.items() if place.is_buffer and self.copies.get(name) is None}
        self._constants.update(report.name for report in find_nonfinite(new))
        self.copies = copies_of(tensors, self.copies)
        self.places = now

    def buffers(self, now: Mapping[str, Place]) -> dict[str, Tensor]:
        """The buffers to check: a new one may be a mask of -Inf; if it is not, then the loss shows it."""
        return {
            name: place.tensor
            for name, place in now.items()
            if place.is_buffer
            and place.tensor is not None
            and name not in self._constants
            and self.copies.get(name) is not None
        }

    @torch.no_grad()
    def put_back(self, now: Mapping[str, Place], *, parameters: bool) -> None:
        """Make buffers, and with `parameters` these too, what they were.

        A tensor of the same shape and type is written to, any other is replaced. Buffers that have come since stay if
        they are finite, and go if they are not. The count of an `AlphaSchedule` is the loop's, which steps it between
        two steps of the optimizer: it is put back with the parameters only.
        """
        for name, copied in self.copies.items():
            place = now.get(name, self.places[name]._replace(tensor=None))
            if parameters or (place.is_buffer and not isinstance(place.module, AlphaSchedule)):
                _put(place, copied)
        for name, place in now.items():
            if place.is_buffer and name not in self.copies and place.tensor is not None:
                comparable = checkable(place.tensor)
                if comparable is not None and not bool(torch.isfinite(comparable).all()):
                    del place.module._buffers[place.key]

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return what `module.state_dict()` would have given then.

        A tensor may have another name there than in `places`: checkpointed activations leave out their wrapper.
        """
        now = {name: place.tensor for name, place in places(module).items() if place.tensor is not None}
        names = {id(tensor): name for name, tensor in now.items()}
        state = {
            key: self.copies.get(names.get(id(value), key), value)
            for key, value in module.state_dict(keep_vars=True).items()
        }
        for name, place in self.places.items():
            if name not in now and place.key not in place.module._non_persistent_buffers_set:
                state[name] = self.copies[name]
        return {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in state.items()
            if value is not None
        }


class OptimizerSnapshot:
    """The state of an optimizer as it was when `take` was last called."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._packed: dict[str, Any] = {}
        self._others: dict[Any, Any] = {}
        self._copies: dict[Any, Tensor | None] = {}

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy state and hyperparameters."""
        packed = optimizer.state_dict()
        states = packed.pop("state")
        self._packed = copy.deepcopy(packed)
        self._parameters = parameters_of(optimizer)
        tensors: dict[Any, Tensor | None] = {}
        self._others = {}
        for index, state in states.items():
            if not isinstance(state, Mapping):  # some optimizers keep a number of their own there
                self._others[index] = copy.deepcopy(state)
                continue
            self._others[index] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[index, key] = value
                else:
                    self._others[index][key] = copy.deepcopy(value)
        self._copies = copies_of(tensors, self._copies)

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Make state and hyperparameters of the parameters that it has now what they were.

        Groups are known by their parameters, so that any may have gone. What has come since stays, without state.
        """
        kept = self.state_dict()
        present = {id(parameter) for parameter in parameters_of(optimizer)}
        group_of = {id(self._parameters[k]): group for group in kept["param_groups"] for k in group["params"]}
        for group in optimizer.param_groups:
            before: dict[str, Any] = next((group_of[id(p)] for p in group["params"] if id(p) in group_of), {})
            group.update({key: copy.deepcopy(value) for key, value in before.items() if key != "params"})
        optimizer.state.clear()
        for index, state in kept["state"].items():
            owner = self._parameters[index] if isinstance(index, int) else index
            if not isinstance(owner, Tensor) or id(owner) in present:
                optimizer.state[owner] = copy.deepcopy(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what `optimizer.state_dict()` would have given then, with the copies themselves."""
        states = {index: dict(others) if isinstance(others, dict) else others for index, others in self._others.items()}
        for (index, key), copied in self._copies.items():
            states[index][key] = copied
        return {"state": states, **self._packed}


def plain_numbers(state: Any) -> Any:
    """The same nesting with Python's numbers in the place of numpy's, which `torch.load` refuses to read safely."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        return {key: plain_numbers(value) for key, value in state.items()}
    return type(state)(map(plain_numbers, state)) if type(state) in (list, tuple) else state


@torch.no_grad()
def copies_of(tensors: Mapping[Any, Tensor | None], before: Mapping[Any, Tensor | None]) -> dict[Any, Tensor | None]:
    """Copies of tensors, in the memory of earlier copies of the same name where these fit."""
    copies: dict[Any, Tensor | None] = {}
    pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            copies[name] = None
            continue
        old = before.get(name)
        if old is None or tensor.layout != torch.strided or not _fits(old, tensor):
            copies[name] = tensor.clone()
            continue
        copies[name] = old
        targets, sources = pairs.setdefault(tensor.device, ([], []))
        targets.append(old)
        sources.append(tensor)
    for targets, sources in pairs.values():
        torch._foreach_copy_(targets, sources)
    return copies


def checkable(tensor: Tensor | None) -> Tensor | None:
    """The numbers of a tensor in a form that has norms; None if there are none, or if they are integers."""
    if tensor is None or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.is_nested:
        tensor = values_of_nested(tensor)
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout in COMPRESSED:
        tensor = tensor.values().detach()  # a view of it, otherwise, of which PyTorch makes no other
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if not tensor.numel():
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.element_size() == 1 else tensor  # float8 has few operations


class OwnFile:
    """A file that its owner replaces again and again; what others have written under its name stays.

    The name is that of the newest owner. What was there before keeps a number: `last-good.pt` becomes
    `last-good-2.pt`, the next one `last-good-3.pt`. If its owner is still at work, it goes on under that number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: tuple[int, ...] | None = None

    def save(self, state: object) -> Path:
        """`torch.save` to the file, which has, at any moment, the old content or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)  # what was made for it may be gone
        unfinished = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(unfinished, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            written = _identity(unfinished)
            path = self._place()
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._written = written
        if os.name == "posix":  # the new name has to reach the disk as well
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return path

    def _place(self) -> Path:
        """Where the owner's last one is, else the name, from which another's is put aside."""
        if self._written is not None:
            numbered = self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}")
            for path in (self.path, *numbered):
                if path.exists() and _identity(path) == self._written:
                    return path
        if self.path.exists():
            self._put_aside()
        return self.path

    def _put_aside(self) -> None:
        for number in itertools.count(2):
            aside = self.path.with_stem(f"{self.path.stem}-{number}")
            if aside.exists():
                continue
            try:
                os.link(self.path, aside)  # so that a kill cannot leave the name without a file
            except FileExistsError:  # another process was faster
                continue
            except OSError:  # there are no links in this file system
                os.rename(self.path, aside)
            return


def _identity(path: Path) -> tuple[int, ...]:
    """What a file keeps under another name, and no other one has."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _put(place: Place, copied: Tensor | None) -> None:
    current = place.tensor
    if current is not None and copied is not None and _fits(copied, current):
        try:
            current.copy_(copied)
            return
        except RuntimeError:  # a tensor of inference mode, or an expanded one, cannot be written to
            pass
    if place.is_buffer:
        place.module._buffers[place.key] = None if copied is None else copied.clone()
    elif current is not None and copied is not None:
        current.data = copied.clone()


def _fits(one: Tensor, other: Tensor) -> bool:
    kinds_fit = one.dtype is other.dtype and one.layout is other.layout and not (one.is_nested or other.is_nested)
    return kinds_fit and one.shape == other.shape and one.device == other.device
