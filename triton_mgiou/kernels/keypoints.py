"""The fused kernel of `PolygonLoss`'s L2 term: value, reduction and gradient to `pred` in one launch.

A tile has VERTICES vertices of SAMPLES samples. `reference/keypoints.py` has the formula.
"""

import math

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus, one_minus_exp
from triton_mgiou.kernels.reduction import reduce_programs
from triton_mgiou.options import FAR, MIN_AREA

LEAST_AREA = tl.constexpr(MIN_AREA)
FARTHEST = tl.constexpr(FAR)
ROOT_OF_TWO = tl.constexpr(math.sqrt(2))


@triton.jit
def _visible(ptr, inside, stride, first, size, VERTICES: tl.constexpr):
    """Which of the vertices from `first` on there are and count, (SAMPLES, VERTICES)."""
    vertices = first + tl.arange(0, VERTICES)[None, :]
    return tl.load(ptr + vertices * stride, mask=inside & (vertices < size), other=0) != 0


@triton.jit
def _half_difference(pred, target, visible):
    """Half of one coordinate's difference, which does not overflow; 0 where no vertex is, NaN of Inf."""
    difference = tl.load(pred, mask=visible, other=0.0) * 0.5 - tl.load(target, mask=visible, other=0.0) * 0.5
    return difference + difference * 0.0


@triton.jit
def _near(scaled):
    """The same, but no square of it overflows, nor is its exponential more than 0 then; NaN stays."""
    return tl.where(tl.abs(scaled) > FARTHEST, FARTHEST, scaled)


@triton.jit(
    do_not_specialize=[
        "pred_stride_b",
        "pred_stride_n",
        "pred_stride_c",
        "target_stride_b",
        "target_stride_n",
        "target_stride_c",
        "visible_stride_b",
        "visible_stride_n",
        "area_stride",
        "sigmas_stride",
        "weight_stride",
        "batch",
        "size",
    ],
    do_not_specialize_on_alignment=[
        "pred_ptr",
        "target_ptr",
        "visible_ptr",
        "area_ptr",
        "sigmas_ptr",
        "weight_ptr",
        "counter_ptr",
    ],
)
def l2_kernel(
    pred_ptr,
    target_ptr,
    visible_ptr,  # (B, N), bytes
    area_ptr,  # (B,)
    sigmas_ptr,  # (N,); None for one of all
    weight_ptr,  # (B,)
    loss_ptr,  # (B,), or one element if REDUCE
    grad_ptr,  # as pred, contiguous, in COMPUTE
    partial_ptr,  # (number of programs,)
    counter_ptr,  # one int32, 0 before and after
    pred_stride_b: "i64",
    pred_stride_n: "i64",
    pred_stride_c: "i64",
    target_stride_b: "i64",
    target_stride_n: "i64",
    target_stride_c: "i64",
    visible_stride_b: "i64",
    visible_stride_n: "i64",
    area_stride: "i64",
    sigmas_stride: "i64",
    weight_stride: "i64",
    batch: "i32",
    size: "i32",
    divisor: "fp64",
    sigma: "fp64",
    COMPUTE: tl.constexpr,
    GRAD: tl.constexpr,
    REDUCE: tl.constexpr,
    SAMPLES: tl.constexpr,
    VERTICES: tl.constexpr,
):
    """Per-sample term, or its weighted sum over `divisor`, and the gradient of that to `pred`."""
    reduced = tl.zeros((SAMPLES,), COMPUTE)
    per_divisor = 1.0 / tl.full((SAMPLES,), divisor, COMPUTE)
    samples = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    for _ in range(tl.program_id(0), tl.cdiv(batch, SAMPLES), tl.num_programs(0)):
        there = samples < batch
        rows, inside = samples[:, None], there[:, None]
        visible_row = visible_ptr + rows * visible_stride_b
        count = tl.zeros((SAMPLES,), tl.int32)
        for first in range(0, size, VERTICES):
            visible = _visible(visible_row, inside, visible_stride_n, first, size, VERTICES)
            count += tl.sum(visible.to(tl.int32), axis=1)
        area = tl.load(area_ptr + samples * area_stride, mask=there, other=1.0)
        least = tl.full((SAMPLES,), LEAST_AREA, COMPUTE)
        side = tl.sqrt(tl.maximum(area, least, propagate_nan=tl.PropagateNan.ALL))
        counted = tl.maximum(count, 1).to(COMPUTE)
        factor = per_divisor / counted
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + samples * weight_stride, mask=there, other=0.0).to(COMPUTE)
            factor *= weight

        loss = tl.zeros((SAMPLES,), COMPUTE)
        for first in range(0, size, VERTICES):
            visible = _visible(visible_row, inside, visible_stride_n, first, size, VERTICES)
            vertices = first + tl.arange(0, VERTICES)[None, :]
            if sigmas_ptr is None:
                tolerance = tl.full((1, VERTICES), sigma, COMPUTE)
            else:
                tolerance = tl.load(sigmas_ptr + vertices * sigmas_stride, mask=vertices < size, other=1.0).to(COMPUTE)
            reach = tolerance * tl.full((1, VERTICES), ROOT_OF_TWO, COMPUTE)
            pred = pred_ptr + rows * pred_stride_b + vertices * pred_stride_n
            target = target_ptr + rows * target_stride_b + vertices * target_stride_n
            x = _half_difference(pred, target, visible)
            y = _half_difference(pred + pred_stride_c, target + target_stride_c, visible)
            x = _near(x / side[:, None] / reach)
            y = _near(y / side[:, None] / reach)
            squared = tl.fma(x, x, y * y)
            loss += tl.sum(tl.where(visible, one_minus_exp(squared), 0.0), axis=1)
            if GRAD:
                slope = tl.exp(minus(squared)) * factor[:, None]  # of half the difference, the derivative is twice that
                grad = grad_ptr + (rows * size + vertices) * 2
                stored = inside & (vertices < size)
                tl.store(grad, tl.where(visible, x * slope / reach / side[:, None], 0.0), mask=stored)
                tl.store(grad + 1, tl.where(visible, y * slope / reach / side[:, None], 0.0), mask=stored)
        loss /= counted
        if weight_ptr is not None:
            loss *= weight
        if REDUCE:
            reduced += loss
        else:
            tl.store(loss_ptr + samples, loss, mask=there)
        samples += tl.num_programs(0).to(tl.int64) * SAMPLES

    if REDUCE:
        reduce_programs(loss_ptr, partial_ptr, counter_ptr, reduced, divisor, COMPUTE)
