"""What the command lines of the programs here have in common. It imports no PyTorch, whose import one of them times."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any


def out_file(text: str) -> Path:
    """A file of results, as `type` of an argument. Its folder is made at once: the results may take hours.

    Raises:
        argparse.ArgumentTypeError: It is a folder, or its folder cannot be made.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder of {text}: {error.strerror}") from None
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, expected a file")
    return path


def earlier_results(parser: argparse.ArgumentParser, path: Path, is_own: Callable[[Any], bool]) -> Any:
    """What a file of results that is to be continued holds; None where there is no file.

    Ends the program with status 2 if the file is another one: `is_own` is false, or finds not what it looks for.
    """
    if not path.exists():
        return None
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if is_own(content):
            return content
    parser.error(f"argument --out: expected a new file or one of this program's, got {path}")


def earlier_rows(
    parser: argparse.ArgumentParser, path: Path, names: Sequence[str], known: Collection[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """The rows of a file of results that is to be continued; none where there is no file.

    What its rows have under `names` is among the `known`, and each has a seed, or it is another program's file.
    """

    def is_own(content: Any) -> bool:
        return all(tuple(row[name] for name in names) in known and "seed" in row for row in content["rows"])

    content = earlier_results(parser, path, is_own)
    return [] if content is None else list(content["rows"])


def positive(text: str) -> int:
    """A number of things, as `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: It is no integer of 1 or above.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or above, got {text!r}")
    return int(text)


def not_negative(text: str) -> float:
    """An amount, such as seconds, which may be without a limit ("inf"), as `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: It is no number of 0 or above.
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:  # nor is NaN, with which every comparison fails
        raise argparse.ArgumentTypeError(f"expected a number of 0 or above, got {text!r}")
    return number


def need_packages(parser: argparse.ArgumentParser, program: str, names: Iterable[str]) -> None:
    """End the program with status 2 if a package cannot be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        install = 'pip install "triton-mgiou[bench,ultralytics]"'
        parser.exit(2, f"{program} cannot import {', '.join(missing)}; all it needs: {install}\n")


def need_gpu(parser: argparse.ArgumentParser, program: str) -> None:
    """End the program with status 2 where there is no GPU."""
    import torch  # noqa: PLC0415 - see above

    if not torch.cuda.is_available():
        parser.exit(2, f"{program} needs a GPU, and PyTorch finds none\n")
