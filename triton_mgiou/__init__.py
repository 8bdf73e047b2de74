"""MGIoU: an IoU-like loss for convex shapes, as cheap as L1."""

from triton_mgiou.first_use import warmup
from triton_mgiou.functional import mgiou_loss
from triton_mgiou.modules import MGIoULoss

__version__ = "0.1.0"
__all__ = ["MGIoULoss", "mgiou_loss", "warmup"]
