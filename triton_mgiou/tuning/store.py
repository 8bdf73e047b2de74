"""Tuned layouts on disk: one readable file for each chip and version of Triton, shared by processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triton_mgiou.tuning.layouts import AnyLayout

FORMAT = "triton-mgiou tuning 1"
LOCK_SECONDS = 300.0  # longer than tuning takes; a process that dies releases its lock at once


class Entry(NamedTuple):
    """The fields of a layout, what it takes, and what the default layout takes, in microseconds."""

    layout: dict[str, int]
    us: float | None  # None where nothing was measured: no other layout fits
    default_us: float | None


def chosen_layout(case: str, candidates: Sequence[AnyLayout], device: int) -> AnyLayout:
    """The layout that the user's cache has for a case, or the first candidate.

    Args:
        case: What the cache calls it.
        candidates: The layouts that are known to be right, the default first.
        device: The GPU's index; -1 for the CPU, which has no cache.
    """
    chip = chip_name(device)
    entry = None if chip is None else tuning_cache(chip).get(case)
    if chip is None or entry is None:
        return candidates[0]
    for layout in candidates:
        if layout._asdict() == entry.layout:
            return layout
    warnings.warn(
        f"{tuning_cache(chip).path} has a layout for {case} that this version does not know, the default is used: "
        f"expected one of {candidates}, got {entry.layout}",
        RuntimeWarning,
        stacklevel=2,
    )
    return candidates[0]


def chip_name(device: int) -> str | None:
    """Name and compute capability of a GPU, None for the CPU."""
    if device < 0:
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm{properties.major}{properties.minor}"


@cache
def tuning_cache(chip: str) -> TuningCache:
    """The cache of a chip, read once in a process."""
    import triton  # noqa: PLC0415 - not everywhere, and slow

    return TuningCache(chip, triton.__version__)


def directory() -> Path:
    """`TRITON_MGIOU_CACHE_DIR`, or a folder below the user's cache directory.

    Raises:
        OSError: The user has no home directory.
    """
    given = os.environ.get("TRITON_MGIOU_CACHE_DIR")
    variable, below = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    try:
        if given:
            return Path(given).expanduser()  # no shell has seen the tilde of a file of settings
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "triton_mgiou"
        return Path.home() / below / "triton_mgiou"
    except RuntimeError as error:
        raise OSError(f"{error} Set TRITON_MGIOU_CACHE_DIR.") from None


@cache
def source_hash() -> str:
    """The hash of the kernels, their constants and what a layout means: entries are only for the same."""
    package = Path(__file__).parents[1]
    sources = [package / "options.py", package / "tuning" / "layouts.py", *sorted((package / "kernels").glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


class TuningCache:
    """The entries of one chip and one version of Triton, in a file, or in memory where the file cannot be used.

    The file is replaced as a whole, so that a reader needs no lock.
    """

    def __init__(self, chip: str, triton_version: str) -> None:
        self.header = {"format": FORMAT, "chip": chip, "triton": triton_version}
        self.path: Path | None = None
        self._entries: dict[str, Entry] = {}
        self._warned = False
        name = re.sub(r"[^a-z0-9.+]+", "-", f"{chip} triton {triton_version}".lower())
        try:
            self.path = directory() / f"{name}.json"
            self._read(self.path)
        except _DamagedError:
            with self._locked() as locked:
                if locked:
                    self._read_or_set_aside()
        except OSError as error:
            self._warn(error)

    def get(self, key: str) -> Entry | None:
        """The entry, from memory: the file was read once."""
        return self._entries.get(key)

    def get_or_make(self, key: str, make: Callable[[], Entry]) -> tuple[bool, Entry]:
        """Whether the entry was made, and the entry: of all processes that ask, one makes it."""
        with self._locked() as locked:
            content = self._read_or_set_aside() if locked else None
            made = key not in self._entries
            if made:
                self._entries[key] = make()
                if content is not None:
                    self._write(content)
            return made, self._entries[key]

    def put(self, key: str, entry: Entry | None) -> None:
        """Replace an entry in memory and in the file; with None, in memory only."""
        if entry == self._entries.get(key):
            return
        if entry is None:
            del self._entries[key]
            return
        with self._locked() as locked:
            content = self._read_or_set_aside() if locked else None
            self._entries[key] = entry
            if content is not None:
                self._write(content)

    def entries(self) -> dict[str, Entry]:
        """All entries for the kernels as they are."""
        return dict(self._entries)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Lock the file for this process; False where that fails, and entries then stay in memory."""
        from filelock import FileLock, Timeout  # noqa: PLC0415 - rarely needed

        lock = None
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS)
                lock.acquire()
        except (OSError, NotImplementedError, Timeout) as error:  # Timeout is an OSError only in some versions
            self._warn(error)
            lock = None
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _read_or_set_aside(self) -> dict[str, Any] | None:
        """What the file holds, None if it cannot be read. One that is not ours is renamed. Only under the lock."""
        assert self.path is not None
        try:
            return self._read(self.path)
        except OSError as error:
            self._warn(error)
            return None
        except _DamagedError as error:
            aside, reason = self.path.with_suffix(".damaged"), error
        try:
            self.path.replace(aside)
        except OSError as error:
            self._warn(error)
            return None
        text = f"{self.path} is not a tuning cache ({reason}): it is kept as {aside}, and a new one takes its place"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return {}

    def _read(self, path: Path) -> dict[str, Any]:
        """What the file holds; its entries that are for these kernels join those in memory."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            given = {name: content.get(name) for name in self.header}
            if given != self.header:
                raise ValueError(f"expected {self.header}, got {given}")
            ours = content["configurations"].get(source_hash(), {})
            self._entries = {key: _entry(fields) for key, fields in ours.items()} | self._entries
        except FileNotFoundError:
            return {}
        except OSError:
            raise
        except Exception as error:  # what damage leads to
            raise _DamagedError(f"{type(error).__name__}: {error}") from error
        return content

    def _write(self, content: dict[str, Any]) -> None:
        """Replace the file at once. A process that dies on the way leaves the file as it was."""
        assert self.path is not None
        ours = {
            key: entry.layout | {"us": entry.us, "default_us": entry.default_us}
            for key, entry in sorted(self._entries.items())
        }
        configurations = content.get("configurations", {}) | {source_hash(): ours}
        text = json.dumps(self.header | {"configurations": configurations}, indent=1)
        new = self.path.with_suffix(".new")  # the same name every time: a leftover is overwritten
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            place = "The tuning cache" if self.path is None else str(self.path)
            warnings.warn(
                f"{place} cannot be used, so tuned layouts last only for this process: {error}",
                RuntimeWarning,
                stacklevel=3,
            )


def describe() -> list[str]:
    """The cache's folder and the files in it, a line each."""
    try:
        folder = directory()
        files = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        files = []
    except OSError as error:
        return [f"tuning cache: none: {error}"]
    lines = [f"tuning cache: {folder}{'' if files else ', empty'}"]
    for path in files:
        lines += _describe(path)
    return lines


def _describe(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hashes = content["configurations"]
        ours = hashes.get(source_hash(), {})
        others = sum(map(len, hashes.values())) - len(ours)
        lines = [f"  {path.name}: {content['chip']}, Triton {content['triton']}"]
        lines += [f"    {key}: {', '.join(f'{n} {v}' for n, v in fields.items())}" for key, fields in ours.items()]
    except Exception as error:  # what damage leads to
        return [f"  {path.name}: unreadable: {type(error).__name__}: {error}"]
    return [*lines, f"    and {others} for other versions of the kernels"] if others else lines


class _DamagedError(Exception):
    """The file is not what this module writes."""


def _entry(fields: dict[str, Any]) -> Entry:
    sizes = dict(fields)
    times = [None if time is None else float(time) for time in (sizes.pop("us"), sizes.pop("default_us"))]
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of 1 or above, got {value!r}")
    for time in times:
        if time is not None and not 0 < time < math.inf:
            raise ValueError(f"a time must be above 0 and finite, got {time}")
    return Entry(sizes, *times)
