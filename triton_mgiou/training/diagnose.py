"""`python -m triton_mgiou diagnose PATH`: what is wrong with a checkpoint or with a table of a run."""

from __future__ import annotations

from pathlib import Path

from triton_mgiou.console import print_out
from triton_mgiou.training import checkpoints, curves, tables

READ = f"{tables.READ}, and {checkpoints.READ}"

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class DiagnoseError(Exception):
    """The file cannot be read; the text is for the user."""


def diagnose(path: Path) -> bool:
    """Print what is wrong with a file.

    A table is judged as `curves.judge` says, a checkpoint as `checkpoints.check`. Which of them a file is, is seen in
    its content. No code of a checkpoint is run.

    Args:
        path: A table, a checkpoint, or the folder of a distributed checkpoint.

    Returns:
        Whether nothing is wrong.

    Raises:
        DiagnoseError: The file is none of these, is damaged, or says nothing about a training.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError("it is a pipe or a device, and a file is read several times")
        if path.is_file() and _starts_with(path, LFS_POINTER):
            raise OSError("it is a pointer of Git LFS, and `git lfs pull` brings the file")
        if checkpoints.is_checkpoint(path):
            found = checkpoints.read(path)
            problems = checkpoints.check(found)
            numbers = sum(map(checkpoints.count, found.tensors.values()))
            summary = f"tensors: {len(found.tensors)}, numbers: {numbers}"
            notes = found.notes
        else:
            table = tables.read_table(path)
            problems, notes = curves.judge(table)
            summary = f"rows: {table.rows}, columns of numbers: {len(table.columns)}"
            notes = [*table.notes, *notes]
    except OSError as error:
        raise DiagnoseError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    except (checkpoints.CheckpointError, tables.TableError, curves.NothingToJudgeError) as error:
        raise DiagnoseError(f"{path} {error}; diagnose reads {READ}") from None
    except Exception as error:  # a script that calls this wants a status, whatever the file holds
        raise DiagnoseError(f"cannot read {path}: {type(error).__name__} {error}") from None
    lines = [f"{path}: {summary}, problems: {len(problems)}", *(f"  {line}" for line in (*problems, *notes))]
    print_out("\n".join(lines))
    return not problems


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start
