"""MGIoU: an IoU-like loss for convex shapes, as cheap as L1."""

from triton_mgiou.distributed import mean_positives
from triton_mgiou.functional import box_mgiou, box_mgiou_loss, mgiou_loss, polygon_mgiou
from triton_mgiou.modules import BoxMGIoULoss, MGIoULoss, PolygonLoss
from triton_mgiou.options import PAPER
from triton_mgiou.tuning.warmup import warmup

__version__ = "0.2.0.dev0"
__all__ = [
    "PAPER",
    "BoxMGIoULoss",
    "MGIoULoss",
    "PolygonLoss",
    "box_mgiou",
    "box_mgiou_loss",
    "mean_positives",
    "mgiou_loss",
    "polygon_mgiou",
    "warmup",
]
