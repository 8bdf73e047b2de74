"""Size buckets, how the kernel lays out each of them, and which other layouts are worth measuring."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

SLOTS = 4  # vertices a lane keeps in registers: more are faster per polygon but slow to compile
MAX_PROGRAMS = 4096  # of one launch; each leaves one partial sum
LARGE_BATCH = 32768  # from here on there are enough polygons to fill a GPU with fewer lanes on each
MAX_WARPS = 8


class Layout(NamedTuple):
    """Compile-time sizes of the kernel (see `kernels/mgiou.py`), warps, and the limit on registers of a thread."""

    polygons: int
    lanes: int
    pred_slots: int
    target_slots: int
    num_warps: int
    registers: int

    def options(self) -> dict[str, Any]:
        """Compiler options. Fused multiply-adds are faster and not needed."""
        return {"num_warps": self.num_warps, "maxnreg": self.registers, "enable_fp_fusion": True}


class Case(NamedTuple):
    """What one choice of a layout is for."""

    pred_bucket: int
    target_bucket: int
    large_batch: bool
    flags: str  # types and compile-time flags of the kernel, as text

    def __str__(self) -> str:
        batch = f"{'>=' if self.large_batch else '<'} {LARGE_BATCH}"
        return f"vertices {self.pred_bucket} {self.target_bucket}, batch {batch}, {self.flags}"


class Space(NamedTuple):
    """Layouts to measure: the product of these."""

    slots: tuple[int, ...]  # vertices a lane
    elements: tuple[int, ...]  # of a tile, a thread
    warps: tuple[int, ...]  # a program
    registers: tuple[int, ...]  # a thread, at most


# By the larger vertex bucket, and whether the batch is large. A configuration takes 1.5 to 6 s to compile, more with
# more slots, so what measured far slower on an H200 is left out (bench/results/h200_layouts.json): several warps for
# most, and few slots in large batches. The number of stages is not here either: it pipelines only loads that feed a
# matrix product, and changes nothing.
SEARCH = {
    (4, False): Space((4,), (1,), (1, 2), (168, 255)),
    (4, True): Space((4,), (1, 2), (1, 4), (128, 168)),
    (8, False): Space((2, 4, 8), (1, 2), (1,), (168,)),
    (8, True): Space((4, 8), (1, 2), (1,), (128, 168)),
    (16, False): Space((2, 4, 8), (1, 2), (1,), (168,)),
    (16, True): Space((4, 8), (2, 4), (1,), (168, 255)),
    (32, False): Space((2, 4, 8), (1, 2), (1,), (168,)),
    (32, True): Space((4, 8), (2, 4), (1,), (168, 255)),
    (64, False): Space((2, 4), (1, 2), (1,), (168,)),
    (64, True): Space((4,), (1, 2, 4), (1,), (168, 255)),
}


def bucket(vertices: int) -> int:
    """The power of two, 4 or above, that a vertex count is compiled as."""
    return max(4, 1 << (vertices - 1).bit_length())


@cache
def layout(pred_bucket: int, target_bucket: int, large_batch: bool) -> Layout:
    """The layout for a pair of vertex buckets where nothing was measured.

    A program is one warp, so that small batches spread over the GPU. Triton gives a thread as many polygons, or
    as many lanes of one polygon, as the tile has elements for it. The limit on registers lets 12 warps run at once,
    and 8 where it is a thread a polygon; without one the compiler spills to reach 16.
    """
    lanes = max(pred_bucket, target_bucket) // SLOTS
    elements = 1
    if large_batch and 1 < lanes <= 16:
        elements = 4 if lanes == 4 else 2
    warps = min(MAX_WARPS, max(1, lanes // 32))
    return _layout(pred_bucket, target_bucket, SLOTS, elements, warps, 255 if lanes == elements == 4 else 168)


def candidates(case: Case) -> list[Layout]:
    """The layouts to measure for a case, that without measurement first. Where the table has no row it is alone."""
    larger = max(case.pred_bucket, case.target_bucket)
    default = layout(case.pred_bucket, case.target_bucket, case.large_batch)
    space = SEARCH.get((larger, case.large_batch), Space((), (), (), ()))
    found = [
        _layout(case.pred_bucket, case.target_bucket, slots, elements, warps, registers)
        for slots in space.slots
        for elements in space.elements
        for warps in space.warps
        for registers in space.registers
    ]
    return list(dict.fromkeys([default, *found]))


def interpreter_layout(pred_bucket: int, target_bucket: int, batch: int) -> Layout:
    """A layout for Triton's interpreter, whose time goes with the number of operations: one large program."""
    lanes = max(pred_bucket, target_bucket) // 2 if max(pred_bucket, target_bucket) > 4 else 1
    polygons = min(128, 1 << (batch - 1).bit_length())
    return Layout(polygons, lanes, max(1, pred_bucket // lanes), max(1, target_bucket // lanes), 1, 255)


def _layout(pred_bucket: int, target_bucket: int, slots: int, elements: int, warps: int, registers: int) -> Layout:
    lanes = max(pred_bucket, target_bucket) // slots
    polygons = max(1, 32 * warps * elements // lanes)
    return Layout(polygons, lanes, max(1, pred_bucket // lanes), max(1, target_bucket // lanes), warps, registers)
