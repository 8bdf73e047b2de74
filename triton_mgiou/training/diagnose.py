"""`python -m triton_mgiou diagnose PATH`: what is wrong with a checkpoint or with a table of results."""

from __future__ import annotations

import csv
import importlib
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_mgiou.training.finite import describe, named_tensors

TABLES = (".csv", ".tsv", ".txt")
LARGE = 2**28  # bytes; from here on a progress bar shows

EPOCH = re.compile(r"epochs?|steps?|iter(ation)?s?")
LOWER_IS_BETTER = re.compile(r"loss|error")
HIGHER_IS_BETTER = re.compile(r"(?<![a-z])(m?ap(?![a-z])|precision|recall|f1|acc|fitness)|iou")
MISSING = ("", "-", "none", "null", "n/a")

LAST_SHARE, LAST_LEAST = 0.3, 5  # plateau and oscillation are looked for in the last 30 % of the rows, at least 5
PLATEAU_GAIN = 0.01  # their best value beats the best one before them by less than 1 %
OSCILLATION_TURNS = 0.6  # the curve turns in 60 % of these rows,
OSCILLATION_STEP = 0.1  # and goes 10 % of its mean magnitude from row to row


class DiagnoseError(Exception):
    """The file cannot be read; the text is for the user."""


class Column(NamedTuple):
    """A column of numbers."""

    name: str
    epochs: list[float]  # of the cells that are not empty
    values: list[float]
    empty: list[bool]  # for each row


def diagnose(path: Path) -> bool:
    """Print what is wrong with a file.

    Args:
        path: A table (`.csv`, `.tsv` or `.txt`), else a checkpoint of `torch.save`, which is loaded without running
            any code from it.

    Returns:
        Whether nothing is wrong: no NaN, no Inf, and in a table no plateau and no oscillation either.

    Raises:
        DiagnoseError: The file cannot be read, is damaged, or would have to run code to be loaded.
    """
    try:
        if path.suffix.lower() in TABLES:
            columns = read_table(path)
            problems = [problem for column in columns for problem in check_column(column)]
            summary = f"rows: {len(columns[0].empty)}, columns of numbers: {len(columns)}"
        else:
            tensors = read_checkpoint(path)
            problems = [str(report) for name, tensor in progress(tensors) if (report := describe(tensor, name))]
            summary = f"tensors: {len(tensors)}, numbers: {sum(tensor.numel() for _, tensor in tensors)}"
    except OSError as error:
        raise DiagnoseError(f"cannot read {path}: {error.strerror or error}") from None
    lines = [f"{path}: {summary}, problems: {len(problems)}", *(f"  {problem}" for problem in problems)]
    sys.stdout.write("\n".join(lines) + "\n")
    return not problems


def read_checkpoint(path: Path) -> list[tuple[str, Tensor]]:
    """All tensors of a checkpoint. Those of today's format stay on the disk until they are used."""
    with open(path, "rb"):
        pass  # the error of the system, should there be one, says more than what torch.load makes of it
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise DiagnoseError(f"{path} was not written by torch.save: its records are compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except DiagnoseError:
        raise
    except Exception as error:  # damaged files raise whatever they come across
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            known = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))  # PyTorch's first line is bad advice here
            reason = known[1] if known else f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
            raise DiagnoseError(f"{path} is no checkpoint of torch.save, or a damaged one: {reason.strip()}") from None
        raise DiagnoseError(
            f"{path} was not loaded: it holds whole Python objects ({forbidden[1]}), and to load these means to run "
            "code that the file chooses. From a source that you trust, load it yourself:\n"
            f"  python -c 'import torch; from triton_mgiou.training import find_nonfinite; "
            f'print(*find_nonfinite(torch.load("{path}", weights_only=False)), sep="\\n")\'\n'
            "Checkpoints of state_dict() have no such objects."
        ) from None
    tensors = list(named_tensors(content))
    if not tensors:
        raise DiagnoseError(f"{path} holds no tensor")
    for name, tensor in tensors:  # one number can be stored as any shape, with strides of 0
        if tensor.layout == torch.strided and tensor.nbytes > max(tensor.untyped_storage().nbytes(), LARGE):
            raise DiagnoseError(f"{path} is damaged: {name} claims {tensor.nbytes} bytes, more than there are")
    return tensors


def progress(tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a progress bar if there is much to read and tqdm is installed."""
    total = sum(tensor.nbytes for _, tensor in tensors)
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm if total >= LARGE else None
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is None:
        yield from tensors
        return
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def read_table(path: Path) -> list[Column]:
    """The columns of numbers of a table, with or without a head; the epochs are a column called so, or the rows."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DiagnoseError(f"{path} is no table: it is not UTF-8 text") from None
    if not lines:
        raise DiagnoseError(f"{path} is empty")
    delimiter = max((",", ";", "\t"), key=lines[0].count)
    rows = list(csv.reader(lines, delimiter=delimiter)) if delimiter in lines[0] else [line.split() for line in lines]
    rows = [[cell.strip() for cell in row] for row in rows]
    head = [f"column {i + 1}" for i in range(len(rows[0]))]
    if any(_number(cell) is None for cell in rows[0]):
        head = rows.pop(0)
    if not rows:
        raise DiagnoseError(f"{path} has a head and no rows")
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise DiagnoseError(f"{path} is damaged: row {number} has {len(row)} cells instead of {len(head)}")
    cells = {index: [_number(row[index]) for row in rows] for index in range(len(head))}
    cells = {index: numbers for index, numbers in cells.items() if any(number is not None for number in numbers)}
    for index, numbers in cells.items():
        for value, row in zip(numbers, rows, strict=True):
            if value is None and row[index].lower() not in MISSING:
                raise DiagnoseError(f"{path} is damaged: {row[index]!r} in the column {head[index]!r} is no number")
    if not cells:
        raise DiagnoseError(f"{path} has no column of numbers")

    epochs: list[float] = [float(i) for i in range(1, len(rows) + 1)]
    for index in cells:
        if EPOCH.fullmatch(head[index].lower()):
            epochs = [math.nan if number is None else number for number in cells.pop(index)]
            break
    columns = []
    for index, numbers in cells.items():
        there = [(epoch, number) for epoch, number in zip(epochs, numbers, strict=True) if number is not None]
        empty = [number is None for number in numbers]
        columns.append(Column(head[index], [e for e, _ in there], [n for _, n in there], empty))
    return columns


def check_column(column: Column) -> Iterator[str]:
    """What is wrong with a column, with the figures."""
    name, epochs, values, empty = column
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        nan = sum(math.isnan(values[index]) for index in bad)
        yield f"{name}: {nan} NaN and {len(bad) - nan} Inf, the first at epoch {epochs[bad[0]]:g}"
        return
    gaps = [len(gap) for gap in "".join(" x"[is_empty] for is_empty in empty).split(" ")]
    if gaps[-1] > max(gaps[:-1], default=0):
        yield f"{name}: empty in the last {gaps[-1]} rows, after epoch {epochs[-1]:g} (some libraries write NaN so)"

    lower, higher = LOWER_IS_BETTER.search(name.lower()), HIGHER_IS_BETTER.search(name.lower())
    if not (lower or higher) or len(values) < LAST_LEAST:
        return
    if min(values) == max(values):
        yield f"{name}: plateau: {values[0]:.4g} in all {len(values)} rows"
        return
    window = max(LAST_LEAST, math.ceil(LAST_SHARE * len(values)))
    if len(values) < 2 * window:
        return
    before, last = values[:-window], values[-window:]
    best = min if lower else max
    gain = best(last) - best(before) if best is max else best(before) - best(last)
    if gain < PLATEAU_GAIN * abs(best(before)) and not (higher and best(before) >= 1 - PLATEAU_GAIN):
        yield (
            f"{name}: plateau: the best of the last {window} rows is {best(last):.4g}, "
            f"after {best(before):.4g} at epoch {epochs[before.index(best(before))]:g}; {last[-1]:.4g} at the end"
        )
    steps = [after - value for value, after in pairwise(last)]
    turns = sum(a * b < 0 for a, b in pairwise(steps)) / (window - 2)
    step = sum(map(abs, steps)) / len(steps)
    mean = sum(map(abs, last)) / window
    if turns >= OSCILLATION_TURNS and step >= OSCILLATION_STEP * mean:
        yield (
            f"{name}: oscillation: in the last {window} rows it turns in {turns:.0%} of them and goes {step:.4g} from "
            f"row to row, {step / mean:.0%} of its mean {mean:.4g}"
        )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
