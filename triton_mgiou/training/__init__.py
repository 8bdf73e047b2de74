"""Tools around a training: NaN and Inf by name, a guard around each step, gradient norms, a schedule."""

from triton_mgiou.training.finite import (
    NonFinite,
    NonFiniteError,
    check_finite,
    debug,
    debug_enabled,
    find_nonfinite,
)
from triton_mgiou.training.guard import TrainingGuard, TrainingStoppedError
from triton_mgiou.training.monitor import GradientMonitor
from triton_mgiou.training.schedules import AlphaSchedule

__all__ = [
    "AlphaSchedule",
    "GradientMonitor",
    "NonFinite",
    "NonFiniteError",
    "TrainingGuard",
    "TrainingStoppedError",
    "check_finite",
    "debug",
    "debug_enabled",
    "find_nonfinite",
]
