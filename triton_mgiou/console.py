"""How the commands print."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


class OutputError(Exception):
    """Stdout takes no text; the message says why."""


def open_closed_streams() -> None:
    """Give stdout and stderr a place where nothing is kept, if they are closed, as a service's may be."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it stays open


def print_out(text: str) -> None:
    """Print a text to stdout, with what stands for the letters that its encoding lacks, as that of a Windows console.

    Stdout may be any object with `write` and `flush`, such as one that keeps a log. Where the reader has left, as
    `head` does, nothing is said about it: the exit status stays the command's own.

    Raises:
        OutputError: The text cannot be written, as to a full disk.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        with suppress(AttributeError, OSError):  # of an object without a file
            file = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), file)  # for what Python flushes at its end
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"cannot write to stdout: {error.strerror}") from None
