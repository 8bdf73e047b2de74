"""Where, with what and how numbers came about: what each file of results says of itself."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "mgiou", "torchvision", "mmcv")


def machine(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The command without the machine's paths, the commit, the processor, the versions and the day."""
    words = [Path(each).name if each.startswith("/") else each for each in command]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    distributions = metadata.packages_distributions()  # Triton's is not called so on Windows and with ROCm
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(words),
        "commit": commit or None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(distributions[name][0]) for name in PACKAGES if distributions.get(name)},
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [each.partition(":")[2].strip() for each in lines if each.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
