"""Find NaN and Inf: in one tensor, in a model or checkpoint, and in what goes through the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triton_mgiou import debugging
from triton_mgiou.arguments import check_bool

SHOWN = 3  # indices in a message
DENSE = 2**28  # elements; a larger sparse tensor is not made dense
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
NO_NAN = (getattr(torch, "float4_e2m1fn_x2", None),)  # formats that are finite by construction


@dataclass(frozen=True)
class NonFinite:
    """A tensor that holds NaN or Inf, and what is in it.

    Attributes:
        name: What the tensor is called.
        shape: Its shape.
        dtype: Its dtype.
        nan: How many elements are NaN.
        inf: How many are Inf or -Inf.
        first: The indices of the first of them, at most three.
        finite: Minimum, maximum and mean of the finite elements (of their magnitudes if complex); None if there
            is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nan: int
    inf: int
    first: tuple[tuple[int, ...], ...]
    finite: tuple[float, float, float] | None

    def __str__(self) -> str:
        rest = "no other element is finite"
        if self.finite is not None:
            rest = "of the finite rest: min {:.6g}, max {:.6g}, mean {:.6g}".format(*self.finite)
        places = ", ".join(str(list(index)) for index in self.first)
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}: {self.nan} NaN and {self.inf} Inf in shape {self.shape}, {kind}; first at {places}; {rest}"
        )


class NonFiniteError(ArithmeticError):
    """A tensor holds NaN or Inf. The text says which one, where, and what is in it.

    Attributes:
        report: The same as a `NonFinite`.
        where: The place that was given to `check_finite`.
    """

    def __init__(self, report: NonFinite, where: str) -> None:
        super().__init__(report, where)
        self.report = report
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.report}"


def check_finite(tensor: Tensor, name: str, where: str, *, mask: Tensor | None = None) -> None:
    """Raise an error if a tensor holds NaN or Inf.

    It always checks, and so waits for the device. `if debug_enabled(): check_finite(...)` costs nothing in a run
    without `TRITON_MGIOU_DEBUG=1`.

    Args:
        tensor: Any shape and dtype; integers are always finite.
        name: What to call the tensor in the message.
        where: The place in the program, for the message.
        mask: Only elements where it is True count, the others may hold anything; bool, broadcastable to `tensor`.

    Raises:
        NonFiniteError: There is NaN or Inf. It tells name, place, shape, how many, the first indices, and minimum,
            maximum and mean of the finite rest.
        TypeError: `tensor` is no tensor, or `mask` is no bool tensor.
        ValueError: `mask` has a shape that is not broadcastable to that of `tensor`, or a sparse tensor has indices
            outside its shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask is not None:
        try:
            mask = mask.expand(tensor.shape)
        except RuntimeError:
            shapes = f"{tuple(tensor.shape)}, got {tuple(mask.shape)}"
            raise ValueError(f"mask must be broadcastable to the tensor's shape {shapes}") from None
    report = describe(tensor, name, mask)
    if report is not None:
        raise NonFiniteError(report, where)


def find_nonfinite(model_or_state_dict: object) -> list[NonFinite]:
    """Find the tensors that hold NaN or Inf.

    Args:
        model_or_state_dict: A module (parameters, their gradients as "NAME.grad", and buffers), a `state_dict`, or
            any nesting of dicts, lists, tuples, modules, tensors and numpy arrays, such as a whole checkpoint. What
            is none of these, single numbers among it, is passed over.

    Returns:
        One entry for each such tensor, in order; the name is the path to it, joined by dots. -Inf on purpose, as in an
        attention mask, is among them. Of a tensor that is spread over processes (DTensor) it is this process's part.

    Raises:
        TypeError: The argument is none of the above.
        ValueError: A sparse tensor has indices outside its shape.
    """
    if not isinstance(model_or_state_dict, (nn.Module, Mapping, list, tuple, Tensor, np.ndarray)):
        kind = type(model_or_state_dict).__name__
        raise TypeError(f"model_or_state_dict must be a module, dict, list, tuple, tensor or array, got {kind}")
    reports = (describe(tensor, name) for name, tensor in named_tensors(model_or_state_dict))
    return [report for report in reports if report is not None]


def named_tensors(nested: object) -> Iterator[tuple[str, Tensor]]:
    """All tensors, and arrays as tensors, of a nesting of modules and containers, each once, with the path to each."""
    seen: dict[int, object] = {}  # holds them, so that no id is given to another
    waiting: list[tuple[str, object]] = [("", nested)]
    while waiting:  # no recursion: a file can nest as deeply as it likes, and in circles
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            yield path or "tensor", value
            continue
        if isinstance(value, np.ndarray) and value.dtype.names is None and value.dtype.kind != "O":
            yield path or "array", as_tensor(value)
            continue
        children: list[tuple[object, object]] = []
        if isinstance(value, nn.Module):
            children += value.named_parameters()
            children += [(f"{name}.grad", p.grad) for name, p in value.named_parameters() if p.grad is not None]
            children += value.named_buffers()
        elif isinstance(value, Mapping):
            children += named_values(value)
        elif isinstance(value, (list, tuple)):
            children += enumerate(value)
        elif isinstance(value, np.ndarray):  # of objects, or with fields
            children += (
                enumerate(value.flat) if value.dtype.names is None else [(n, value[n]) for n in value.dtype.names]
            )
        if children and id(value) not in seen:
            seen[id(value)] = value
            waiting += [(f"{path}.{name}" if path else str(name), child) for name, child in reversed(children)]


def named_values(mapping: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Values with the names of their keys; of a tensor, as in an optimizer's state, whose text is long, its number."""
    return [(str(i if isinstance(key, Tensor) else key), value) for i, (key, value) in enumerate(mapping.items())]


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; one that is not of numbers, or has no NaN and no Inf by its type, as an empty one."""
    if array.dtype.kind not in "fc":
        return torch.empty(array.shape if array.dtype.kind in "biu" else 0, dtype=torch.uint8, device="meta")
    size = min(array.dtype.itemsize, 8 if array.dtype.kind == "f" else 16)  # PyTorch has no long double
    return torch.from_numpy(np.array(array, dtype=f"{array.dtype.kind}{size}", order="C"))


def _sparse_places(tensor: Tensor, of_values: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((*tensor.indices()[:, number].tolist(), *rest) for number, *rest in of_values)


def _has_right_indices(tensor: Tensor) -> bool:
    """Whether a sparse tensor's indices lie in its shape. PyTorch loads others without a word, and writes there."""
    if tensor.layout == torch.sparse_coo:
        sizes = tensor.shape[: tensor.sparse_dim()]
        return all(_are_below(row, size) for row, size in zip(tensor._indices(), sizes, strict=True))
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    starts, places = (
        (tensor.crow_indices(), tensor.col_indices()) if by_row else (tensor.ccol_indices(), tensor.row_indices())
    )
    values, batch = tensor.values(), starts.dim() - 1
    is_blocked = tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
    height, width = values.shape[batch + 1 : batch + 3] if is_blocked else (1, 1)
    rows, columns = tensor.shape[batch] // height, tensor.shape[batch + 1] // width
    rows, columns = (rows, columns) if by_row else (columns, rows)
    have_right_shapes = starts.shape == (*tensor.shape[:batch], rows + 1) and places.shape == values.shape[: batch + 1]
    return (
        have_right_shapes
        and _are_below(places, columns)
        and bool((starts[..., 0] == 0).all() and (starts[..., -1] == places.shape[-1]).all())
        and bool((starts.diff() >= 0).all())
    )


def _are_below(indices: Tensor, size: int) -> bool:
    return bool(((indices >= 0) & (indices < size)).all())


def values_of_nested(tensor: Tensor) -> Tensor:
    """All values of a nested tensor in one vector."""
    none = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # there may be no parts
    return torch.cat([none, *(part.reshape(-1) for part in tensor.unbind())])


def describe(tensor: Tensor, name: str, mask: Tensor | None = None) -> NonFinite | None:
    """Describe NaN and Inf in a tensor where `mask` is True; None if there is none."""
    if nn.parameter.is_lazy(tensor):  # has no values yet
        return None
    tensor = tensor.detach()
    if hasattr(tensor, "device_mesh"):  # a DTensor
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    if tensor.is_quantized:
        tensor = tensor.dequantize()  # a scale can be NaN
    if tensor.is_nested:
        tensor = values_of_nested(tensor)
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype in NO_NAN:
        return None
    if tensor.layout in (torch.sparse_coo, *COMPRESSED) and not _has_right_indices(tensor):
        raise ValueError(f"{name} must have indices in its shape {tuple(tensor.shape)}, got others")
    if tensor.layout in COMPRESSED and mask is None:
        tensor = tensor.to_sparse()
    if tensor.layout == torch.sparse_coo and mask is None:
        tensor = tensor.coalesce()
        report = describe(tensor.values(), name)
        if report is None or tensor.numel() > DENSE:
            return report and replace(report, shape=tuple(tensor.shape), first=_sparse_places(tensor, report.first))
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has few operations
    is_bad = ~torch.isfinite(values)
    if mask is not None:
        is_bad &= mask
    if not is_bad.any():
        return None
    values, is_bad = values.cpu(), is_bad.cpu()
    bad = values[is_bad]
    is_rest = torch.isfinite(values) if mask is None else torch.isfinite(values) & mask.cpu()
    rest = values[is_rest]
    rest = (rest.abs() if rest.is_complex() else rest).double()
    nan = int(torch.isnan(bad).sum())
    return NonFinite(
        name=name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        nan=nan,
        inf=bad.numel() - nan,
        first=tuple(tuple(index) for index in is_bad.nonzero()[:SHOWN].tolist()),
        finite=(rest.min().item(), rest.max().item(), rest.mean().item()) if rest.numel() else None,
    )


_blocks: dict[object, bool] = {None: debugging.on}  # of `debug`, in all threads, which may end in any order


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check all losses and matrices in a `with` block, as `TRITON_MGIOU_DEBUG=1` does in the whole process.

    Checked are the real vertices or the boxes of both sides, weights, areas and an `avg_factor` in a tensor, the loss
    or matrix, and in the backward pass, which may run after the block, the upstream gradient and those of both sides.
    Padding, and what a mask leaves out, may hold anything. Angles in radians that look like degrees get a warning. The
    checks hold for all threads. Each waits for the device, so use none inside a captured CUDA graph; `torch.compile`
    breaks its graph there. Where no value can be read nothing is checked: under a `torch.func` transform, in
    `torch.export` and other tracing, of meta and fake tensors, and of a batch of gradients. A GradScaler lets gradients
    overflow on purpose until it has found its scale: expect Inf in a float16 gradient in its first steps.

    Args:
        enabled: False turns the checks off in the block.

    Yields:
        Nothing.

    Raises:
        TypeError: `enabled` is no bool.
    """
    check_bool("enabled", enabled)
    block = object()
    _blocks[block] = debugging.on = enabled
    try:
        yield
    finally:
        del _blocks[block]
        debugging.on = [*_blocks.values()][-1]


def debug_enabled() -> bool:
    """Whether losses and matrices are checked, see `debug`."""
    return debugging.on
