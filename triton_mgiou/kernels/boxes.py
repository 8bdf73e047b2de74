"""The fused kernel of boxes: value, reduction and gradient to `pred` in one launch (section 10).

A lane works on one box at a time, all in registers. Where a block is full of plain boxes, as `is_plain` says, what
guards the others is not run: half the instructions, and the same bits.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import saturate
from triton_mgiou.kernels.axis import UNIFORM
from triton_mgiou.kernels.box_corners import corners_row
from triton_mgiou.kernels.box_memory import addresses_of, load, store
from triton_mgiou.kernels.box_row import box_row, is_plain
from triton_mgiou.kernels.box_types import (
    CORNERS3D,
    CXCYCZLWHR,
    NO_LENGTH_32,
    NO_LENGTH_64,
    PLAIN_DIVISOR,
    PLAIN_NUMBER,
    RESOLUTION_32,
    RESOLUTION_64,
    TIE_32,
    TIE_64,
    TINY_32,
    TINY_64,
    XYXY,
    BoxSource,
    BoxVariant,
)
from triton_mgiou.kernels.reduction import reduce_programs


@triton.jit
def _block(
    grad_ptr, pred, target, weight, first, left, boundary_weight, per_divisor, PLAIN: tl.constexpr, V: tl.constexpr
):
    """A block's losses, 0 behind the batch; stores the gradient to the numbers of `pred`. PLAIN: the block is full."""
    pair = corners_row(pred, target, V) if V.FORMAT == CORNERS3D else box_row(pred, target, boundary_weight, PLAIN, V)
    loss = pair.loss
    factor = pair.factor * per_divisor
    if weight is not None:
        loss *= weight
        factor *= weight
    if not PLAIN:
        loss = tl.where(tl.arange(0, V.LANES) < left, loss, 0.0)
    if V.GRAD:
        COORDINATES: tl.constexpr = 3 if V.FORMAT == CXCYCZLWHR else 2
        half = 0.5 * factor
        gradient = ()
        for number in tl.static_range(V.NUMBERS):
            if V.FORMAT == XYXY or (V.FORMAT != CORNERS3D and number // COORDINATES == 1):
                derivative = pair.gradient[number] * half
            else:
                derivative = pair.gradient[number] * factor
            if not PLAIN and not (V.HAS_ANGLE and number == V.NUMBERS - 1):
                derivative *= pair.scale
            if not PLAIN or weight is not None:
                derivative = saturate(derivative)
            gradient = gradient + (derivative,)
        store(grad_ptr, first, left, gradient, PLAIN, V)
    return loss


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
        LANES=LANES,
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
    first = tl.program_id(0).to(tl.int64) * LANES
    # Addresses that the loop carries save Triton's compiler a walk through the whole kernel for each of them.
    pred_at = addresses_of(pred_source, first, batch, V)
    target_at = addresses_of(target_source, first, batch, V)
    for _ in range(tl.program_id(0), tl.cdiv(batch, LANES), tl.num_programs(0)):
        left = (batch - first).to(tl.int32)
        pred = load(pred_at, V, COMPUTE)
        target = load(target_at, V, COMPUTE)
        lanes = first + tl.arange(0, LANES)
        inside = lanes < batch
        weight = None
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + lanes * weight_stride, mask=inside, other=0.0).to(COMPUTE)
        plain = may_be_plain & (left >= LANES)
        if FORMAT != CORNERS3D and AXIS_WEIGHT == UNIFORM:
            plain = plain & (tl.min(is_plain(pred, target, V).to(tl.int32)) > 0)
        if FORMAT != CORNERS3D and AXIS_WEIGHT == UNIFORM and plain:
            loss = _block(grad_ptr, pred, target, weight, first, left, boundary_weight, per_divisor, True, V)
        else:
            loss = _block(grad_ptr, pred, target, weight, first, left, boundary_weight, per_divisor, False, V)
        if REDUCE:
            reduced += loss
        else:
            tl.store(loss_ptr + lanes, loss, mask=inside)
        first += tl.num_programs(0).to(tl.int64) * LANES
        pred_at = addresses_of(pred_source, first, batch, V)
        target_at = addresses_of(target_source, first, batch, V)

    if REDUCE:
        reduce_programs(loss_ptr, partial_ptr, counter_ptr, reduced, divisor, COMPUTE)
