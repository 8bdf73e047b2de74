"""Whether losses and matrices look for NaN and Inf in what comes and goes, see `triton_mgiou.training.debug`."""

from __future__ import annotations

import os


def from_environment(value: str) -> bool:
    """Read the value of `TRITON_MGIOU_DEBUG`."""
    if value not in {"", "0", "1"}:
        raise ValueError(f"TRITON_MGIOU_DEBUG must be 0 or 1, got {value!r}")
    return value == "1"


on = from_environment(os.environ.get("TRITON_MGIOU_DEBUG", ""))
