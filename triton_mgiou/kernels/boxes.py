"""The fused kernel of boxes: value, reduction and gradient to `pred` in one launch (section 10).

A lane works on ROWS boxes, all in registers. Where a whole program's boxes are plain ones, as `is_plain` says, what
guards the others is not run: half the instructions, and the same bits.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, saturate
from triton_mgiou.kernels.axis import UNIFORM
from triton_mgiou.kernels.box_angles import directions
from triton_mgiou.kernels.box_corners import corners_row
from triton_mgiou.kernels.box_memory import load, load_whole, one_row, store, store_whole
from triton_mgiou.kernels.box_row import PLAIN_DIVISOR, PLAIN_NUMBER, box_row, is_plain
from triton_mgiou.kernels.box_types import (
    CORNERS3D,
    NO_LENGTH_32,
    NO_LENGTH_64,
    RESOLUTION_32,
    RESOLUTION_64,
    TIE_32,
    TIE_64,
    TINY_32,
    TINY_64,
    BoxSource,
    BoxVariant,
    Direction,
)
from triton_mgiou.kernels.reduction import reduce_programs


@triton.jit
def _rows(
    pred, target, weight_ptr, weight_stride, loss_ptr, lanes, batch, boundary_weight, per_divisor,
    PLAIN: tl.constexpr, REDUCE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A lane's boxes: the sum of their losses, which are stored instead if not REDUCE, and their gradients."""
    is_odd = ()
    rest = ()
    if V.HAS_ANGLE:
        angles = ()
        for row in tl.static_range(V.ROWS):
            own_angle, other_angle = pred[(row + 1) * V.NUMBERS - 1], target[(row + 1) * V.NUMBERS - 1]
            if not V.CLOCKWISE:
                own_angle, other_angle = minus(own_angle), minus(other_angle)
            angles = angles + (own_angle, other_angle)
        is_odd, rest = directions(angles, PLAIN, V.DEGREES)
    total = tl.zeros_like(per_divisor)
    gradient = ()
    for row in tl.static_range(V.ROWS):
        own, other = one_row(pred, row, V), one_row(target, row, V)
        if V.FORMAT == CORNERS3D:
            pair = corners_row(own, other, V)
        elif V.HAS_ANGLE:
            own_direction = Direction(is_odd[2 * row], rest[2 * row])
            other_direction = Direction(is_odd[2 * row + 1], rest[2 * row + 1])
            pair = box_row(own, other, own_direction, other_direction, boundary_weight, PLAIN, V)
        else:
            pair = box_row(own, other, None, None, boundary_weight, PLAIN, V)
        rows = lanes * V.ROWS + row
        inside = rows < batch
        loss = pair.loss
        factor = pair.factor * per_divisor
        if weight_ptr is not None:
            sample_weight = tl.load(weight_ptr + rows * weight_stride, mask=inside, other=0).to(loss.dtype)
            loss *= sample_weight
            factor *= sample_weight
        if not REDUCE:
            tl.store(loss_ptr + rows, loss, mask=inside)
        elif PLAIN:  # what is behind the batch is not
            total += loss
        else:
            total += tl.where(inside, loss, 0.0)
        if V.GRAD:
            for number in tl.static_range(V.NUMBERS):
                derivative = pair.gradient[number] * factor
                if not PLAIN and not (V.HAS_ANGLE and number == V.NUMBERS - 1):
                    derivative *= pair.scale
                if not PLAIN or weight_ptr is not None:
                    derivative = saturate(derivative)
                gradient = gradient + (derivative,)
    return total, gradient


@triton.jit(
    do_not_specialize=[
        "pred_stride_b",
        "pred_stride_n",
        "pred_stride_c",
        "target_stride_b",
        "target_stride_n",
        "target_stride_c",
        "weight_stride",
        "batch",
    ],
    do_not_specialize_on_alignment=["weight_ptr", "counter_ptr"],
)
def box_kernel(
    pred_ptr,
    target_ptr,
    weight_ptr,  # (B,)
    loss_ptr,  # (B,), or one element if REDUCE
    grad_ptr,  # as pred, contiguous, in COMPUTE
    partial_ptr,  # (number of programs,)
    counter_ptr,  # one int32, 0 before and after
    pred_stride_b: "i64",
    pred_stride_n: "i64",
    pred_stride_c: "i64",  # of the coordinates of corners
    target_stride_b: "i64",
    target_stride_n: "i64",
    target_stride_c: "i64",
    weight_stride: "i64",
    batch: "i32",
    divisor: "fp64",
    boundary_weight: "fp64",
    COMPUTE: tl.constexpr,
    GRAD: tl.constexpr,
    REDUCE: tl.constexpr,
    FORMAT: tl.constexpr,
    DEGREES: tl.constexpr,
    CLOCKWISE: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    AXIS_GRAD: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PACKED: tl.constexpr,  # rows of both sides follow each other
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per-sample loss, or its weighted sum over `divisor`, and the gradient of that to `pred`."""
    NUMBERS: tl.constexpr = (5, 4, 4, 7, 24)[FORMAT]
    V: tl.constexpr = BoxVariant(
        TINY=TINY_64 if COMPUTE == tl.float64 else TINY_32,
        NO_LENGTH=NO_LENGTH_64 if COMPUTE == tl.float64 else NO_LENGTH_32,
        RESOLUTION=RESOLUTION_64 if COMPUTE == tl.float64 else RESOLUTION_32,
        TIE=TIE_64 if COMPUTE == tl.float64 else TIE_32,
        GRAD=GRAD,
        FORMAT=FORMAT,
        HAS_ANGLE=(True, False, False, True, False)[FORMAT],
        NUMBERS=NUMBERS,
        ROWS=ROWS,
        VECTORS=0 if ROWS * NUMBERS % 4 else ROWS * NUMBERS // 4,
        PACKED=PACKED,
        DEGREES=DEGREES,
        CLOCKWISE=CLOCKWISE,
        AXIS_WEIGHT=AXIS_WEIGHT,
        AXIS_GRAD=AXIS_GRAD,
        BOUNDARY=BOUNDARY,
    )
    pred_source = BoxSource(pred_ptr, pred_stride_b, pred_stride_n, pred_stride_c)
    target_source = BoxSource(target_ptr, target_stride_b, target_stride_n, target_stride_c)
    per_divisor = 1.0 / tl.full((LANES,), divisor, COMPUTE)
    reduced = tl.zeros((LANES,), COMPUTE)
    may_be_plain = (divisor > PLAIN_DIVISOR) & (boundary_weight < PLAIN_NUMBER)
    for block in range(tl.program_id(0), tl.cdiv(batch, LANES * ROWS), tl.num_programs(0)):
        lanes = (block * LANES + tl.arange(0, LANES)).to(tl.int64)
        whole = block < batch // (LANES * ROWS)
        if PACKED and V.VECTORS > 0 and NUMBERS % 4 != 0 and whole:
            pred = load_whole(pred_source, lanes, V, COMPUTE)
            target = load_whole(target_source, lanes, V, COMPUTE)
        else:
            pred = load(pred_source, lanes, batch, V, COMPUTE)
            target = load(target_source, lanes, batch, V, COMPUTE)
        plain = may_be_plain
        if FORMAT != CORNERS3D and AXIS_WEIGHT == UNIFORM:
            all_plain = is_plain(one_row(pred, 0, V), one_row(target, 0, V), V)
            for row in tl.static_range(1, ROWS):
                all_plain = all_plain & is_plain(one_row(pred, row, V), one_row(target, row, V), V)
            plain = may_be_plain & (tl.min(all_plain.to(tl.int32)) > 0)
        if FORMAT != CORNERS3D and AXIS_WEIGHT == UNIFORM and plain:
            total, gradient = _rows(
                pred, target, weight_ptr, weight_stride, loss_ptr, lanes, batch, boundary_weight, per_divisor,
                True, REDUCE, V,
            )  # fmt: skip
        else:
            total, gradient = _rows(
                pred, target, weight_ptr, weight_stride, loss_ptr, lanes, batch, boundary_weight, per_divisor,
                False, REDUCE, V,
            )  # fmt: skip
        reduced += total
        if GRAD:
            if V.VECTORS > 0 and NUMBERS % 4 != 0 and whole:
                store_whole(grad_ptr, lanes, gradient, V)
            else:
                store(grad_ptr, lanes, gradient, batch, V)

    if REDUCE:
        reduce_programs(loss_ptr, partial_ptr, counter_ptr, reduced, divisor, COMPUTE)
