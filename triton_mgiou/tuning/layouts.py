"""Size buckets, how the kernels lay out each of them, and which other layouts are worth measuring.

A layout of any kernel is a `NamedTuple` of integers with the methods of `Layout`.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

SLOTS = 4  # vertices a lane keeps in registers: more are faster per polygon but slow to compile
MAX_PROGRAMS = 4096  # of one launch; each leaves one partial sum
MAX_SAMPLES = 2**31 - 4096  # of one launch: the kernels count them in 32 bits, up to the end of the last program's
LARGE = {8: 8192, 32: 3584}  # polygons that fill a GPU, so that each takes its axes one by one; others 2**17 vertices
MAX_WARPS = 8


class Layout(NamedTuple):
    """How the kernel of polygons works on a batch: compile-time sizes, warps, and the most registers of a thread."""

    polygons: int
    axes: int
    lanes: int
    pred_slots: int
    target_slots: int
    num_warps: int
    registers: int

    def grid(self, batch: int) -> tuple[int, int, int]:
        """The grid of a launch."""
        return min(-(-batch // self.polygons), MAX_PROGRAMS), 1, 1

    def sizes(self) -> dict[str, int]:
        """The kernel's last compile-time arguments."""
        return {name.upper(): size for name, size in zip(self._fields, self[:5], strict=False)}

    def options(self) -> dict[str, Any]:
        """Compiler options.

        The source says which operations are fused, so that a result's bits do not depend on how a variant compiles.
        """
        return {"num_warps": self.num_warps, "maxnreg": self.registers, "enable_fp_fusion": False}


class SearchSpace(NamedTuple):
    """Layouts to measure: the product of these."""

    slots: tuple[int, ...]  # vertices a lane
    axes: tuple[int, ...]  # at a time
    elements: tuple[int, ...]  # of a tile, a thread
    warps: tuple[int, ...]  # a program
    registers: tuple[int, ...]  # a thread, at most


# By the larger vertex bucket, and whether the batch is large. A configuration takes 1 to 6 s to compile, more with
# more slots, so what measured far slower on an H200 is left out (bench/results/h200_layouts.json): several warps for
# most, several axes at a time in large batches, and few slots there. The number of stages is not here either: it
# pipelines only loads that feed a matrix product, and changes nothing.
# Where a batch is small, 128 registers make room for more programs at a time than 168, and 168 than 255.
SEARCH = {
    (4, False): (SearchSpace((4,), (1, 4), (1,), (1, 2), (168,)),),
    (4, True): (SearchSpace((4,), (1,), (1,), (1, 4), (80, 96, 128)),),
    (8, False): (SearchSpace((4, 8), (2, 4, 8), (1,), (1,), (168,)), SearchSpace((4,), (2, 4), (1,), (1,), (128,))),
    (8, True): (SearchSpace((4,), (1,), (1, 2), (1,), (128, 168)), SearchSpace((4,), (1,), (2,), (4,), (128,))),
    (16, False): (SearchSpace((8,), (4, 8), (1,), (1,), (168, 255)), SearchSpace((4,), (2, 4), (1,), (1,), (128,))),
    (16, True): (SearchSpace((4,), (1,), (2, 4), (1,), (168, 255)), SearchSpace((8,), (1,), (2,), (1,), (255,))),
    (32, False): (SearchSpace((8,), (4, 8), (1,), (1,), (168, 255)), SearchSpace((4,), (2, 4), (1,), (1,), (128,))),
    (32, True): (SearchSpace((4, 8), (1,), (1, 2), (1,), (168, 255)),),
    (64, False): (SearchSpace((8,), (4,), (1,), (1,), (168, 255)), SearchSpace((4,), (2, 4), (1, 2), (1,), (168, 255))),
    (64, True): (SearchSpace((4, 8), (1,), (1, 2), (1,), (168, 255)),),
    (128, False): (SearchSpace((8,), (4,), (2,), (1,), (255,)), SearchSpace((4,), (2, 4), (1, 2), (1, 4), (255,))),
}


def bucket(vertices: int) -> int:
    """The power of two, 4 or above, that a vertex count is compiled as."""
    return 1 << (vertices - 1 | 3).bit_length()


def is_large(batch: int, pred_size: int, target_size: int) -> bool:
    """Whether a batch has the layout of a large one."""
    return batch >= least_large(bucket(max(pred_size, target_size)))


def least_large(vertices: int) -> int:
    """The smallest batch that has the layout of a large one, for a bucket."""
    return LARGE.get(vertices) or max(2**17 // vertices, 1)


@cache
def layout(pred_bucket: int, target_bucket: int, large_batch: bool, terms: int, is_double: bool) -> Layout:
    """The layout for a pair of vertex buckets where nothing was measured.

    Triton gives a thread as many polygons, axes or lanes of a polygon as the tile has elements for it. Small batches
    spread over the GPU: one element a thread, and several axes at a time; with many vertices, eight axes of lanes that
    have eight vertices each. In large batches a thread has more elements, and so more independent instructions. The
    limit on registers lets 12 warps run at once on a multiprocessor, 16 at 128 registers and 8 at 255; without one the
    compiler spills to reach 16. `terms` counts those of the loss besides MGIoU: both of them, and float64, need more
    registers, and in small batches few vertices a lane, but for the sizes where many measured faster. Without a term
    the layout of small batches is the faster one in all batches of 64 vertices and more.
    """
    larger = max(pred_bucket, target_bucket)
    large_batch = large_batch and (terms > 0 or is_double or larger < 64)
    if not large_batch and not is_double and 16 <= larger <= 256 and not (larger == 64 and terms == 2):
        axes, registers = (4, 168) if larger == 16 and terms < 2 else (8, 255)  # all of 4096 polygons of 16 at once
        elements = 1 if larger < 64 else 2
        warps = max(1, larger // (32 * elements))
        return _layout(pred_bucket, target_bucket, 2 * SLOTS, axes, elements, warps, registers)
    lanes = larger // SLOTS
    axes = 1 if large_batch or lanes == 1 or lanes > 64 else 4
    elements = 2 if lanes == 16 else max(1, min(4, lanes // 32))
    if large_batch and 1 < lanes <= 32:
        elements = 4 if lanes == 4 and not terms else 2
    warps = max(1, min(MAX_WARPS, axes * lanes // (32 * elements)))
    registers = 168
    if large_batch and lanes == 1:
        warps, registers = 4, 128
    elif lanes == 2 and not large_batch and terms < 2 and not is_double:
        registers = 128
    elif lanes == 16 or lanes > 64 or (large_batch and lanes > (4 if terms == 1 else 2)):
        registers = 255
    return _layout(pred_bucket, target_bucket, SLOTS, axes, elements, warps, registers)


def batches(pred_bucket: int, target_bucket: int, large_batch: bool) -> str:
    """The batch sizes that a layout is for, in words."""
    return f"{'>=' if large_batch else '<'} {least_large(max(pred_bucket, target_bucket))}"


def candidates(pred_bucket: int, target_bucket: int, large_batch: bool, terms: int, is_double: bool) -> list[Layout]:
    """The layouts to measure, the one to use without measurement first; that alone where the table has no row."""
    default = layout(pred_bucket, target_bucket, large_batch, terms, is_double)
    found = [
        _layout(pred_bucket, target_bucket, slots, axes, elements, warps, registers)
        for space in SEARCH.get((max(pred_bucket, target_bucket), large_batch), ())
        for slots, axes, elements, warps, registers in itertools.product(*space)
    ]
    return list(dict.fromkeys([default, *found]))


def interpreter_layout(pred_bucket: int, target_bucket: int, batch: int) -> Layout:
    """A layout for Triton's interpreter, whose time goes with the number of operations: one large program."""
    larger = max(pred_bucket, target_bucket)
    axes, lanes = (1, 1) if larger == 4 else (larger // 4, larger // 2)
    polygons = min(128, 1 << (batch - 1).bit_length())
    return Layout(polygons, axes, lanes, *_slots(pred_bucket, target_bucket, lanes), 1, 255)


def _layout(
    pred_bucket: int, target_bucket: int, slots: int, axes: int, elements: int, warps: int, registers: int
) -> Layout:
    lanes = max(pred_bucket, target_bucket) // slots
    polygons = max(1, 32 * warps * elements // (axes * lanes))
    return Layout(polygons, axes, lanes, *_slots(pred_bucket, target_bucket, lanes), warps, registers)


def _slots(pred_bucket: int, target_bucket: int, lanes: int) -> tuple[int, int]:
    return max(1, pred_bucket // lanes), max(1, target_bucket // lanes)


# Boxes


class BoxLayout(NamedTuple):
    """How the kernel of boxes works on a batch: a program's lanes, of a box each, its warps, registers of a thread.

    And the most programs of a launch: as many as the GPU runs at once, since more would start when the first ones end.
    Each goes on with other boxes.
    """

    lanes: int
    num_warps: int
    registers: int
    programs: int

    def grid(self, batch: int) -> tuple[int, int, int]:
        """The grid of a launch."""
        return min(-(-batch // self.lanes), self.programs), 1, 1

    def sizes(self) -> dict[str, int]:
        """The kernel's last compile-time arguments."""
        return {"LANES": self.lanes}

    def options(self) -> dict[str, Any]:
        """Compiler options, as those of `Layout`."""
        return {"num_warps": self.num_warps, "maxnreg": self.registers, "enable_fp_fusion": False}


def box_candidates(numbers: int, is_double: bool, multiprocessors: int) -> list[AnyLayout]:
    """The layouts to measure for boxes of so many numbers, the one to use without measurement first.

    One for all batch sizes: a program goes on with other boxes. More registers than a training step needs not to spill
    would let fewer warps run at once.
    """
    if numbers == 24:
        default = _box_layout(1, 255 if is_double else 168, multiprocessors)
    else:
        default = _box_layout(2, 168 if is_double else 64, multiprocessors)
    most = default.registers, 128
    others = [_box_layout(warps, registers, multiprocessors) for warps in (1, 2, 4) for registers in most]
    return list(dict.fromkeys([default, *others]))


def _box_layout(warps: int, registers: int, multiprocessors: int) -> BoxLayout:
    """A multiprocessor has four parts, each with 16384 registers for warps of 32 threads, given out by eights."""
    at_once = 4 * (16384 // (32 * -(-registers // 8) * 8)) // warps
    return BoxLayout(32 * warps, warps, registers, min(multiprocessors * at_once, MAX_PROGRAMS))


# For Triton's interpreter, whose time goes with the programs.
BOX_INTERPRETER_LAYOUT = BoxLayout(128, 1, 255, MAX_PROGRAMS)


# Keypoints


class KeypointLayout(NamedTuple):
    """How the kernel of keypoints works on a batch: samples of a tile, and vertices of each at a time."""

    samples: int
    vertices: int
    num_warps: int

    def grid(self, batch: int) -> tuple[int, int, int]:
        """The grid of a launch."""
        return min(-(-batch // self.samples), MAX_PROGRAMS), 1, 1

    def sizes(self) -> dict[str, int]:
        """The kernel's last compile-time arguments."""
        return {"SAMPLES": self.samples, "VERTICES": self.vertices}

    def options(self) -> dict[str, Any]:
        """Compiler options, as those of `Layout`."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def keypoints_of_tile(size: int) -> int:
    """How many of a sample's vertices a tile has; another goes on with the rest."""
    return min(bucket(size), 64)


def keypoint_layout(vertices: int, interpreted: bool) -> KeypointLayout:
    """The layout for such a tile: few numbers are loaded, and small batches spread over the GPU."""
    return KeypointLayout(64, vertices, 1) if interpreted else KeypointLayout(max(1, 128 // vertices), vertices, 4)


# Pairs

ENOUGH_PROGRAMS = 2048  # of a warp fill a GPU once; with more of them each takes several tiles
MOST_TILES = 24  # of a program, that the last ones to start do not keep the others waiting
MANY_BOXES = 4096  # from here on a program of the gradient takes several
MOST_PROGRAMS = 65535  # in the second dimension of a grid


class PairLayout(NamedTuple):
    """How a kernel of pairs works on a matrix: its tiles, warps of a program, and registers of a thread.

    A program goes down its columns, as many tiles as this class says.
    """

    rows: int
    columns: int
    num_warps: int
    registers: int

    def grid(self, size: Any) -> tuple[int, int, int]:
        """The grid of a launch for a matrix (B, P, T)."""
        batch, rows, columns = size
        across, tiles = -(-columns // self.columns), -(-rows // self.rows)
        each = min(-(-across * tiles * batch // ENOUGH_PROGRAMS), MOST_TILES)
        return across, min(-(-tiles // each), MOST_PROGRAMS), batch

    def sizes(self) -> dict[str, int]:
        """The kernel's last compile-time arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}

    def options(self) -> dict[str, Any]:
        """Compiler options, as those of `Layout`."""
        return {"num_warps": self.num_warps, "maxnreg": self.registers, "enable_fp_fusion": False}


class PolygonPairLayout(PairLayout):
    """The same where a program goes along its rows."""

    def grid(self, size: Any) -> tuple[int, int, int]:
        """The grid of a launch for a matrix (B, P, T)."""
        batch, rows, columns = size
        along, tiles = -(-rows // self.rows), -(-columns // self.columns)
        each = max(1, along * tiles * batch // ENOUGH_PROGRAMS)
        return along, min(-(-tiles // each), MOST_PROGRAMS), batch


class PairGradientLayout(PairLayout):
    """The same where a program takes whole rows."""

    def grid(self, size: Any) -> tuple[int, int, int]:
        """The grid of a launch for a matrix (B, P, T)."""
        batch, rows, _ = size
        return -(-rows // self.rows), batch, 1


AnyLayout = Layout | BoxLayout | KeypointLayout | PairLayout


def are_many(boxes: int) -> bool:
    """Whether a gradient to so many boxes has the layout of many."""
    return boxes >= MANY_BOXES


def how_many(many: bool) -> str:
    """The numbers of boxes that a layout of the gradient is for, in words."""
    return f"{'>=' if many else '<'} {MANY_BOXES}"


def pair_candidates(vectors: bool, interpreted: bool) -> list[AnyLayout]:
    """The layouts to measure for the matrix of boxes, the one to use without measurement first.

    A lane has four columns, or eight in tiles of 256 pairs: fewer instructions a pair, and fewer programs at once (14
    on a multiprocessor for 18). Small tiles leave little of them empty behind the last column, and `vectors` store 64
    bytes of a row at once even so; numbers one by one need 8 lanes for whole sectors of 32 bytes.
    """
    if interpreted:
        return [PairLayout(64, 64, 1, 255)]
    default = PairLayout(8, 16, 1, 112) if vectors else PairLayout(4, 32, 1, 112)
    fours = [PairLayout(*tile, 1, registers) for tile in ((8, 16), (4, 32), (1, 128)) for registers in (112, 128)]
    eights = [PairLayout(*tile, 1, registers) for tile in ((8, 32), (4, 64), (1, 256)) for registers in (144, 168)]
    return list(dict.fromkeys([default, *fours, *eights]))


def pair_gradient_candidates(many_boxes: bool, interpreted: bool) -> list[AnyLayout]:
    """The same for its gradient to one side."""
    if interpreted:
        return [PairGradientLayout(64, 64, 1, 255)]
    few, many = PairGradientLayout(1, 128, 4, 128), PairGradientLayout(4, 128, 4, 255)
    if many_boxes:
        return [many, few, PairGradientLayout(2, 128, 4, 168)]
    return [few, many, PairGradientLayout(1, 256, 8, 128)]


def polygon_pair_candidates(corners: int, interpreted: bool) -> list[AnyLayout]:
    """The same for the matrix of polygons, with `corners` each in registers or with vertices read again and again."""
    if interpreted:
        return [PolygonPairLayout(64, 64, 1, 255)]
    registers = 255 if corners else 168
    return [PolygonPairLayout(*tile, 4, registers) for tile in ((16, 16), (32, 8), (64, 8), (16, 32))]
