"""Size buckets, and how the kernel lays out each of them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

SLOTS = 4  # vertices a lane keeps in registers: more are faster per polygon but slow to compile
MAX_PROGRAMS = 4096  # of one launch; each leaves one partial sum
LARGE_BATCH = 32768  # from here on there are enough polygons to fill a GPU with fewer lanes on each


class Layout(NamedTuple):
    """Compile-time sizes of the kernel; see `kernels/mgiou.py`."""

    polygons: int
    lanes: int
    pred_slots: int
    target_slots: int
    num_warps: int

    def options(self) -> dict[str, Any]:
        """Compiler options. The limit on registers lets 12 warps run at once, and 8 where it is a thread a polygon.

        Without one the compiler spills to reach 16. Fused multiply-adds are faster and not needed.
        """
        thread_a_polygon = self.lanes == 4 and self.polygons == 32
        registers = 255 if thread_a_polygon else 168
        return {"num_warps": self.num_warps, "maxnreg": registers, "enable_fp_fusion": True}


def bucket(vertices: int) -> int:
    """The power of two, 4 or above, that a vertex count is compiled as."""
    return max(4, 1 << (vertices - 1).bit_length())


@cache
def layout(pred_bucket: int, target_bucket: int, large_batch: bool) -> Layout:
    """The layout for a pair of vertex buckets.

    A program is one warp, so that small batches spread over the GPU. Triton gives a thread as many polygons, or
    as many lanes of one polygon, as the tile has elements for it.
    """
    lanes = max(pred_bucket, target_bucket) // SLOTS
    polygons = max(1, 32 // lanes)
    if large_batch and 1 < lanes <= 16:
        polygons *= 4 if lanes == 4 else 2
    return Layout(
        polygons, lanes, max(1, pred_bucket // lanes), max(1, target_bucket // lanes), min(8, max(1, lanes // 32))
    )


def interpreter_layout(pred_bucket: int, target_bucket: int, batch: int) -> Layout:
    """A layout for Triton's interpreter, whose time goes with the number of operations: one large program."""
    lanes = max(pred_bucket, target_bucket) // 2 if max(pred_bucket, target_bucket) > 4 else 1
    polygons = min(128, 1 << (batch - 1).bit_length())
    return Layout(polygons, lanes, max(1, pred_bucket // lanes), max(1, target_bucket // lanes), 1)
