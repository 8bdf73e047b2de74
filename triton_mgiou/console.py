"""How the commands print."""

from __future__ import annotations

import os
import sys


def print_out(text: str) -> None:
    """Print a text to stdout, with what stands for the letters that its encoding lacks, as that of a Windows console.

    Where the reader has left, as `head` does, nothing is said about it: the exit status stays the command's own.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
