"""What goes around a training run."""

from triton_mgiou.training.schedules import AlphaSchedule

__all__ = ["AlphaSchedule"]
