"""An unpickler that runs no code: it builds tensors, arrays and containers, and inert stand-ins for all else."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONSTANTS = (torch.dtype, torch.layout, torch.qscheme)
LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")  # the number that files of torch.save before 1.6 begin with


class StandIn:
    """Keeps what an object of an unknown class was made from; calling, filling and setting it does nothing else."""

    def __new__(cls, *args: Any, **options: Any) -> StandIn:  # noqa: D102
        stand_in = super().__new__(cls)
        stand_in.__dict__["parts"] = [*args, *options.values()]
        return stand_in

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["parts"].append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["parts"].append({key: value})

    def add(self, value: Any) -> None:
        """Keep what a set gets."""
        self.__dict__["parts"].append(value)

    def extend(self, values: Any) -> None:
        """Keep what a list gets."""
        self.__dict__["parts"].extend(values)

    def __call__(self, *args: Any) -> StandIn:  # noqa: D102
        return StandIn(self, *args)

    def __repr__(self) -> str:
        return type(self).__name__


class Unpickler(pickle.Unpickler):
    """Finds only what builds tensors, arrays and plain containers; for all else it makes stand-ins."""

    def __init__(self, *args: Any, foreign: list[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._foreign = foreign

    @cached_property
    def _builders(self) -> dict[str, Any]:
        """This file's own, as it can set attributes of what it gets. Most of what torch.load reads needs none."""
        return _builders()

    def find_class(self, module: str, name: str) -> Any:
        """The builder of that name, or a stand-in."""
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes":
            return self._load_from_bytes
        if full in self._builders:
            return self._builders[full]
        if module == "torch" and isinstance(value := getattr(torch, name, None), CONSTANTS):
            return value
        self._foreign.append(full)
        return type(name, (StandIn,), {})

    def _load_from_bytes(self, content: bytes) -> Any:
        return load_bytes(content, self._foreign)


def load_bytes(content: bytes, foreign: list[str]) -> Any:
    """Load what torch.save wrote, with stand-ins; nothing else that torch.load reads, as TorchScript and tar files."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            is_program = any(name.endswith("constants.pkl") for name in archive.namelist())
    else:
        is_program = LEGACY not in content[:64]
    if is_program:
        raise pickle.UnpicklingError("no tensors of torch.save in a record")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=pickle_module(foreign))


def pickle_module(foreign: list[str]) -> Any:
    """Make what torch.load takes for the module pickle; it subclasses the unpickler."""

    class Inert(Unpickler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, foreign=foreign, **options)

    def load(file: Any, **options: Any) -> Any:
        return Inert(file, **options).load()

    return SimpleNamespace(Unpickler=Inert, load=load, __name__="stand-ins")


class _Dtype:
    """A dtype of numpy, if it is one of numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code
        self.order: Any = "="
        self.part: Any = None  # of a field that is an array itself: dtype and shape
        self.fields: Any = None  # of a structured array: dtype and offset
        self.size: Any = 0

    def __setstate__(self, state: Any) -> None:
        _, self.order, self.part, _, self.fields, self.size, *_ = state

    def numpy(self) -> np.dtype[Any] | None:
        """The dtype itself; fields that are no numbers are left out."""
        if self.part:
            kind = self.part[0].numpy()
            return None if kind is None else np.dtype((kind, self.part[1]))
        if self.fields:
            kinds = {name: (kind.numpy(), offset) for name, (kind, offset, *_) in self.fields.items()}
            kept = {name: (kind, offset) for name, (kind, offset) in kinds.items() if kind is not None}
            formats, offsets = ([each[index] for each in kept.values()] for index in (0, 1))
            return np.dtype({"names": list(kept), "formats": formats, "offsets": offsets, "itemsize": self.size})
        is_number = re.fullmatch(r"[?bBhHiIlLqQefdgFDG]|[biufc]\d{1,2}", self.code)
        return np.dtype(self.code).newbyteorder(self.order) if is_number else None


class Array:
    """An array of numpy: `value` is it, or a list of what it holds."""

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _array(content, dtype, shape, "F" if is_fortran else "C")


def _array(content: Any, dtype: Any, shape: Any = (), order: Any = "C") -> Any:
    kind = dtype.numpy() if isinstance(dtype, _Dtype) else None
    if kind is None or not isinstance(content, (bytes, bytearray, str)):
        return content
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _make_array(*args: Any) -> Array:
    array = Array()
    array.value = _array(*args)
    return array


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """A number, which is no tensor, as one of Python is none."""
    value = _array(content, dtype)
    return value.item() if isinstance(value, np.ndarray) else value


def _from_type(function: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    """What a subclass of Tensor holds: its tensor, or its parts."""
    built = function(*args) if not isinstance(function, type) else None
    return built if isinstance(built, Tensor) else StandIn(kind, args, state)


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as an object of its own, so that a file can set no attribute of the function."""

    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class _Bytes:
    """For `torch.UntypedStorage`, of which torch.load asks for nothing but the dtype; nothing can be set."""

    __slots__ = ()
    dtype = torch.uint8


def _builders() -> dict[str, Any]:
    rebuild = (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_sparse_tensor",
        "_rebuild_parameter_with_state", "_rebuild_qtensor", "_rebuild_nested_tensor", "_rebuild_sparse_csr_tensor",
        "_rebuild_meta_tensor_no_storage",
    )  # fmt: skip
    found: dict[str, Any] = {
        f"torch._utils.{name}": _wrapped(getattr(torch._utils, name)) for name in rebuild if hasattr(torch._utils, name)
    }
    found["torch._tensor._rebuild_from_type_v2"] = _wrapped(_from_type)
    found["torch.serialization._get_layout"] = _wrapped(torch.serialization._get_layout)
    found["torch.storage.UntypedStorage"] = _Bytes()
    found["torch.Size"] = found["builtins.tuple"] = lambda values=(): tuple(values)
    found["torch.device"] = lambda *_: "device"
    found["_codecs.encode"] = lambda text, encoding="latin1": text.encode("latin1") if encoding == "latin1" else text
    for module in ("collections", "builtins", "__builtin__"):
        for name, kind in (
            ("OrderedDict", dict),
            ("dict", dict),
            ("list", list),
            ("set", set),
            ("frozenset", frozenset),
        ):
            found[f"{module}.{name}"] = type(name, (kind,), {})
        found[f"{module}.bytes"] = found[f"{module}.bytearray"] = lambda content=b"", *_: content
        found[f"{module}.complex"] = found[f"{module}.slice"] = lambda *args: args
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray._reconstruct"] = lambda *_: Array()
        found[f"{core}.multiarray.scalar"] = _wrapped(_scalar)
        found[f"{core}.numeric._frombuffer"] = _wrapped(_make_array)
    found["numpy.ndarray"] = Array
    found["numpy.dtype"] = _Dtype
    return found
