"""MGIoU: an IoU-like loss for convex shapes, as cheap as L1."""

from triton_mgiou.distributed import mean_positives
from triton_mgiou.functional import PAPER, box_mgiou, mgiou_loss, polygon_mgiou
from triton_mgiou.modules import MGIoULoss, PolygonLoss
from triton_mgiou.tuning.warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "PAPER",
    "MGIoULoss",
    "PolygonLoss",
    "box_mgiou",
    "mean_positives",
    "mgiou_loss",
    "polygon_mgiou",
    "warmup",
]
