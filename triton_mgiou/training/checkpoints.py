"""Reads the tensors of a checkpoint without running any code of it, and says what is wrong with them."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_mgiou.training.finite import as_tensor, describe, named_values
from triton_mgiou.training.inert import LEGACY, Array, StandIn, Unpickler, load_bytes, pickle_module

READ = "checkpoints of torch.save, safetensors files and folders of torch.distributed.checkpoint"

LARGE = 2**28  # bytes; from here on a progress bar shows
TOLD = 3  # foreign classes in a note
LOWEST_SCALE = 1.0  # as in `TrainingGuard`
PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MASK = re.compile(r"mask", re.IGNORECASE)
LOGGED = re.compile(r"(^|\.)log_scalars\.")  # what MMEngine's message hub has logged, such as the norm of a gradient
# The best value so far, Inf to begin with; and Lightning's of the files that it keeps, where it writes Inf for NaN
BOOKKEEPING = re.compile(r"(^|[._])(best|kth|min|max|score)[^.]*$|(^|\.)best_k_models\.")
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None), "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "BOOL": torch.bool, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64,
}  # fmt: skip


class CheckpointError(Exception):
    """The file cannot be read; the message goes on after its path."""


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint by their paths, the scales of GradScalers in it, and what is worth knowing."""

    tensors: dict[str, Tensor]
    scales: dict[str, float]
    notes: list[str]


def is_checkpoint(path: Path) -> bool:
    """Whether the file is no text, judged by its name and its first bytes."""
    if path.is_dir() or path.suffix.lower() in {".safetensors", ".distcp", ".metadata"} or path.name == ".metadata":
        return True
    with open(path, "rb") as file:
        start = file.read(512)
    if path.suffix.lower() in {".csv", ".tsv", ".txt", ".json", ".jsonl", ".log"}:
        return False
    if start.startswith((b"PK", *PICKLE)) or b"\0" in start or path.suffix.lower() in {".pt", ".pth", ".ckpt", ".bin"}:
        return True
    try:
        start[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def read(path: Path) -> Checkpoint:
    """Read a checkpoint. Tensors of today's format stay on the disk until they are used.

    Unknown classes become inert stand-ins, which keep what the file says of them: no code of the file is run.

    Raises:
        CheckpointError: It is none, or damaged.
    """
    if path.is_dir() or path.suffix == ".distcp" or path.name == ".metadata":
        found = _read_folder(path)
    elif path.suffix.lower() == ".safetensors":
        found = Checkpoint(_read_safetensors(path), {}, [])
    else:
        found = _flatten(*_load(path))
    if not found.tensors and not found.scales:  # Transformers and Accelerate have a file for the GradScaler alone
        raise CheckpointError("holds no tensor")
    for name, tensor in found.tensors.items():  # one number can be stored as any shape, with strides of 0
        size = _bytes(tensor)
        if size > LARGE and size > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"is damaged: {name} claims {size} bytes, more than there are")
    return found


def check(found: Checkpoint) -> list[str]:
    """Say what is wrong with a checkpoint.

    Faults are NaN and Inf in a tensor, and the scale of a GradScaler below 1 or Inf: its search ends far above 1, below
    it has skipped nearly every step, and at Inf it does. No faults are -Inf in a mask, by its name; anchors that a
    valid_mask beside them leaves out, as in RT-DETR; a single number called best, kth, min, max or score that is Inf,
    as the best value so far is to begin with, or that Lightning keeps in best_k_models; and what was logged, such as
    the norm of a gradient, which is Inf where a GradScaler searches.
    """
    problems = []
    for name, tensor in _progress(found.tensors):
        report = describe(tensor, name)
        if report is None:
            continue
        values = tensor.detach()
        is_mask = MASK.search(name) and not report.nan and not bool((values == math.inf).any())
        is_first_best = BOOKKEEPING.search(name) and not report.nan and values.numel() == 1
        if not (is_mask or is_first_best or LOGGED.search(name) or _is_left_out(name, found.tensors)):
            problems.append(str(report))
    problems += [
        f"{name}: the scale of this GradScaler is {scale:.3g}, so nearly every step was skipped: the gradient has NaN "
        'or Inf though the loss may be finite; see triton_mgiou/training/README.md, "When training goes wrong"'
        for name, scale in found.scales.items()
        if not LOWEST_SCALE <= scale < math.inf
    ]
    return problems


def _is_left_out(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether only those of RT-DETR's anchors are not finite that the mask beside them leaves out."""
    anchors, mask = tensors[name], tensors.get(re.sub("anchors$", "valid_mask", name))
    if mask is None or mask.dtype != torch.bool or mask.shape != (*anchors.shape[:-1], 1):
        return False
    return bool((torch.isfinite(anchors) | ~mask).all())


def count(tensor: Tensor) -> int:
    """How many numbers it has."""
    return sum(part.numel() for part in tensor.unbind()) if tensor.is_nested else tensor.numel()


def _progress(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a progress bar if there is much to read."""
    sizes = {name: _bytes(tensor) for name, tensor in tensors.items()}
    total = sum(sizes.values())
    if total < LARGE:
        yield from tensors.items()
        return
    from tqdm import tqdm  # noqa: PLC0415 - rarely needed

    with tqdm(total=total, desc="reading", unit="B", unit_scale=True) as bar:
        for name, tensor in tensors.items():
            yield name, tensor
            bar.update(sizes[name])


def _bytes(tensor: Tensor) -> int:
    """The size of a plain tensor; 0 for others, which have none."""
    return 0 if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided else tensor.nbytes


# Files of torch.save


def _load(path: Path) -> tuple[Any, list[str]]:
    """The content of a file of torch.save, and the foreign classes in it."""
    if not path.stat().st_size:
        raise CheckpointError("is empty")
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), []
        except Exception as error:  # what it refuses, and damage
            reason = str(error)
        foreign: list[str] = []
        try:
            if is_zip or _is_legacy(path):
                stand_ins = pickle_module(foreign)
                return torch.load(
                    path, map_location="cpu", weights_only=False, mmap=is_zip, pickle_module=stand_ins
                ), foreign
            with open(path, "rb") as file:
                if file.read(2) in PICKLE:
                    file.seek(0)
                    content = Unpickler(file, foreign=foreign, encoding="latin1").load()  # arrays of Python 2
                    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]  # as torch.load
                    return content, foreign
        except Exception as error:  # a damaged file raises whatever it comes across
            reason = f"{type(error).__name__} {error}"
    known = re.search(r"WeightsUnpickler error:\s*(.*)", reason)  # PyTorch's first line is bad advice here
    first = re.split(r"\n|\. ", (known[1] if known else reason).strip())[0]
    raise CheckpointError(f"is no checkpoint, or a damaged one: {first}")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:
        raise CheckpointError(f"is a damaged zip file: {type(error).__name__} {error}") from None
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError("is a TorchScript program, which is code")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError("was not written by torch.save: its records are compressed")
    if not any(record.filename.endswith("data.pkl") for record in records):
        raise CheckpointError("is a zip file, but none of torch.save")


def _is_legacy(path: Path) -> bool:
    with open(path, "rb") as file:
        return LEGACY in file.read(64) and not tarfile.is_tarfile(path)


def _flatten(content: Any, foreign: list[str]) -> Checkpoint:
    """The tensors and scales in a nesting of containers, modules and stand-ins."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    seen: dict[int, Any] = {}  # holds them, as an id may be given again
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:  # no recursion: a file can nest as deeply as it likes, and in circles
        path, value = waiting.pop()
        value = value.value if isinstance(value, Array) else value
        if isinstance(value, Tensor):
            tensors[_free(path or "tensor", tensors)] = value.detach()
            continue
        if isinstance(value, np.ndarray) and value.dtype.names is None:
            tensors[_free(path or "array", tensors)] = as_tensor(value)
            continue
        if isinstance(value, Mapping):
            scale = _scale(value)
            if scale is not None:
                scales[f"{path}.scale" if path else "scale"] = scale
        children = _children(value)
        if children and id(value) not in seen:
            seen[id(value)] = value
            waiting += [(f"{path}.{name}" if path and name else path + name, each) for name, each in reversed(children)]
    notes = []
    if names := list(dict.fromkeys(foreign)):
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        notes.append(f"not run, only looked into: {', '.join(names[:TOLD])}{more}")
    return Checkpoint(tensors, scales, notes)


def _children(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, with names."""
    if isinstance(value, Mapping):
        if {"_parameters", "_buffers", "_modules"} <= value.keys():  # a module's
            inner = [value[name] for name in ("_parameters", "_buffers", "_modules")]
            others = {name: each for name, each in value.items() if not str(name).startswith("_")}
            return [item for each in (*inner, others) for item in _children(each)]
        return named_values(value)
    if isinstance(value, np.ndarray):  # a structured one
        return [(name, value[name]) for name in value.dtype.names or ()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(str(index), each) for index, each in enumerate(value)]
    if isinstance(value, StandIn):
        return [("", part) for part in value.__dict__["parts"]]
    return []


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _scale(state: Mapping[Any, Any]) -> float | None:
    """The scale in the `state_dict` of a GradScaler, in a pickled one, or in the scaler of Apex."""
    for name, beside in (("scale", "growth_factor"), ("_init_scale", "_growth_factor"), ("loss_scale", "unskipped")):
        value = state.get(name)
        value = value.value if isinstance(value, Array) else value
        value = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.size == 1 else value
        if beside in state and isinstance(value, (int, float, Tensor)):
            return float(value)
    return None


# Other formats


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        content = np.memmap(file, np.uint8, mode="c") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        (size,) = struct.unpack("<Q", content[:8].tobytes())
        if size > len(content) - 8:
            raise CheckpointError("is damaged: its head lies beyond the end")
        head: dict[str, Any] = json.loads(content[8 : 8 + size].tobytes())
        entries = {name: entry for name, entry in head.items() if name != "__metadata__"}
        tensors = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            shape, dtype = entry["shape"], SAFETENSORS.get(entry["dtype"])
            stored = content[8 + size + start : 8 + size + end]
            if not 0 <= start <= end or len(stored) != end - start:
                raise CheckpointError(f"is damaged: {name} lies beyond the end")
            numbers = torch.from_numpy(stored)
            if dtype is None:  # of less than a byte: such formats have neither NaN nor Inf
                tensors[name] = torch.empty(shape, dtype=torch.uint8, device="meta")
                continue
            aligned = numbers if numbers.storage_offset() % dtype.itemsize == 0 else numbers.clone()
            tensors[name] = aligned.view(dtype).reshape(shape)
    except CheckpointError:
        raise
    except Exception as error:  # what damage leads to
        raise CheckpointError(f"is no safetensors file, or a damaged one: {type(error).__name__} {error}") from None
    return tensors


def _read_folder(path: Path) -> Checkpoint:
    """A checkpoint of torch.distributed.checkpoint: the plan in `.metadata`, the tensors in shards beside it."""
    folder = path if path.is_dir() else path.parent
    plan = folder / ".metadata"
    if not plan.is_file():
        kind = "folder" if path.is_dir() else "shard"
        raise CheckpointError(f"is a {kind} without the .metadata of torch.distributed.checkpoint")
    foreign: list[str] = []
    found = Checkpoint({}, {}, [])
    numbers: dict[str, dict[str, float]] = {}  # what a plan takes apart to its single numbers
    try:
        with open(plan, "rb") as file:
            content = Unpickler(file, foreign=foreign).load()
        stored = _state(content)["storage_data"]
        for index, place in stored.items():
            name, info = str(_state(index)["fqn"]), _state(place)
            offset, length = int(info["offset"]), int(info["length"])
            shard = folder / Path(str(info["relative_path"])).name
            if path.suffix == ".distcp" and shard != path:
                continue
            with open(shard, "rb") as file:
                file.seek(offset)
                record = file.read(length)
            if len(record) != length:
                raise CheckpointError(f"is damaged: {shard.name} ends before {name}")
            if not record.startswith((b"PK", *PICKLE)):
                raise CheckpointError(f"has a shard that is compressed, of safetensors, or damaged: {shard.name}")
            loaded, classes = _load_record(record)
            if isinstance(loaded, (int, float)):
                owner, _, key = name.rpartition(".")
                numbers.setdefault(owner, {})[key] = loaded
            part = _flatten(loaded, classes)
            for inner, tensor in part.tensors.items():
                found.tensors[_free(name if inner == "tensor" else f"{name}.{inner}", found.tensors)] = tensor
            found.scales.update({f"{name}.{inner}": scale for inner, scale in part.scales.items()})
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # what damage leads to
        raise CheckpointError(
            f"is no checkpoint of torch.distributed.checkpoint, or a damaged one: {type(error).__name__} {error}"
        ) from None
    found.scales.update(
        {f"{name}.scale": scale for name, state in numbers.items() if (scale := _scale(state)) is not None}
    )
    return found


def _load_record(record: bytes) -> tuple[Any, list[str]]:
    foreign: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if record.startswith(b"PK"):
            return load_bytes(record, foreign), foreign
        return Unpickler(io.BytesIO(record), foreign=foreign).load(), foreign


def _state(stand_in: Any) -> dict[str, Any]:
    """The attributes of an object that a stand-in stands for."""
    return next(part for part in stand_in.__dict__["parts"] if isinstance(part, dict))
