"""The fused MGIoU kernel of polygons: value, reduction and gradient to `pred` in one launch.

With p and g the intervals of the projections of P and G on axis k, and h_k the length of their joint hull:

    d_k = 1 - GIoU1D_k = (|top| + |bottom|) / h_k,   top = max_p - max_g,  bottom = min_p - min_g
    loss = sum_k w_k d_k / (2 sum_k w_k) + convexity_weight * convexity + boundary_weight * boundary

    d d_k / d max_p =  (sign(top)    - d_k [max_p > max_g]) / h_k       [.] is 1/2 and sign is 0 at equality
    d d_k / d min_p =  (sign(bottom) + d_k [min_p < min_g]) / h_k
    d d_k / d max_g = -(sign(top)    + d_k [max_g > max_p]) / h_k
    d d_k / d min_g = -(sign(bottom) - d_k [min_g < min_p]) / h_k

An extreme hands its derivative, times the axis, to the vertices that attain it, in equal shares. The axis
a = (e_y, -e_x) of edge e collects the derivative times those vertices and hands it on to the edge's two ends
(sections 2 to 4 of reference/DEFINITION.md, as all sections that the kernels cite).

A program takes POLYGONS samples at a time. LANES x AXES lanes work on one sample: each keeps SLOTS vertices of P
and of G in registers, vertex index = slot * LANES + lane, as tuples of (POLYGONS, AXES, LANES) tiles, and AXES axes
are taken at a time. What is the same for all axes is computed by the lanes of all of them, at no cost.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import saturate
from triton_mgiou.kernels.axis import LENGTH, SOFT, UNIFORM, WIDEST, axis_rule
from triton_mgiou.kernels.axis_sums import gradient_of, pred_axis, target_axis
from triton_mgiou.kernels.boundary import area, boundary_term, put_in_order
from triton_mgiou.kernels.edges import gradient_of_area, measure, over_edges
from triton_mgiou.kernels.reduction import reduce_programs
from triton_mgiou.kernels.slots import dealt_out, highest_over_axes, over_axes, zeros
from triton_mgiou.kernels.types import (
    AxisRule,
    AxisSums,
    Factors,
    Gradient,
    Handed,
    Lanes,
    Mean,
    Point,
    PredSums,
    Sample,
    Side,
    Variant,
)
from triton_mgiou.kernels.vertices import (
    FULL,
    frame,
    load_vertices,
    place,
    place_at_last,
    row_start,
    slot_addresses,
    source_of,
    store,
)
from triton_mgiou.options import RESOLUTION, TIE, TINY

TINY_32 = tl.constexpr(TINY[32])
TINY_64 = tl.constexpr(TINY[64])
RESOLUTION_32 = tl.constexpr(RESOLUTION[32])
RESOLUTION_64 = tl.constexpr(RESOLUTION[64])
TIE_32 = tl.constexpr(TIE[32])
TIE_64 = tl.constexpr(TIE[64])


@triton.jit
def _samples(block, axis, POLYGONS: tl.constexpr):
    """Number the samples of a block, (POLYGONS, AXES, 1)."""
    return block * POLYGONS + tl.arange(0, POLYGONS)[:, None, None] + axis * 0


@triton.jit
def _rows(samples, batch, REAL: tl.constexpr):
    """The samples to load."""
    if REAL == FULL:  # the last polygon once more, instead of none
        samples = tl.minimum(samples, batch - 1)
    return samples.to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "pred_stride_b",
        "pred_stride_n",
        "target_stride_b",
        "target_stride_n",
        "pred_real_stride_b",
        "pred_real_stride_n",
        "target_real_stride_b",
        "target_real_stride_n",
        "weight_stride",
        "batch",
        "pred_size",
        "target_size",
    ],
    do_not_specialize_on_alignment=["pred_real_ptr", "target_real_ptr", "weight_ptr", "counter_ptr"],
)
def mgiou_kernel(
    pred_ptr,
    target_ptr,
    pred_real_ptr,  # lengths (B,) or mask (B, N) as uint8
    target_real_ptr,
    weight_ptr,  # (B,)
    loss_ptr,  # (B,), or one element if REDUCE
    grad_ptr,  # (B, N, 2), contiguous, in COMPUTE
    partial_ptr,  # (number of programs,)
    counter_ptr,  # one int32, 0 before and after
    pred_stride_b: "i64",  # strides of pred and target count vertices, not numbers
    pred_stride_n: "i32",
    target_stride_b: "i64",
    target_stride_n: "i32",
    pred_real_stride_b: "i64",
    pred_real_stride_n: "i32",
    target_real_stride_b: "i64",
    target_real_stride_n: "i32",
    weight_stride: "i64",
    batch: "i32",
    pred_size: "i32",
    target_size: "i32",
    divisor: "fp64",
    convexity_weight: "fp64",
    boundary_weight: "fp64",
    COMPUTE: tl.constexpr,
    GRAD: tl.constexpr,
    REDUCE: tl.constexpr,
    AXIS_WEIGHT: tl.constexpr,
    AXIS_GRAD: tl.constexpr,
    CONVEXITY: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PRED_REAL: tl.constexpr,
    TARGET_REAL: tl.constexpr,
    ADJACENT: tl.constexpr,
    EVEN: tl.constexpr,  # strides over the batch, where they are not constants
    POLYGONS: tl.constexpr,
    AXES: tl.constexpr,
    LANES: tl.constexpr,
    PRED_SLOTS: tl.constexpr,
    TARGET_SLOTS: tl.constexpr,
):
    """Per-sample loss, or its weighted sum over `divisor`, and the gradient of that to `pred`."""
    TINY: tl.constexpr = TINY_64 if COMPUTE == tl.float64 else TINY_32
    RESOLUTION: tl.constexpr = RESOLUTION_64 if COMPUTE == tl.float64 else RESOLUTION_32
    # Where a factor of the single axis must be known before all axes are seen.
    MEASURE: tl.constexpr = CONVEXITY or BOUNDARY or AXIS_WEIGHT == LENGTH
    # Quadrangles: faster by a third. With more terms it would take longer than 5 s to compile.
    UNROLLED: tl.constexpr = (
        PRED_REAL == FULL
        and AXES * LANES == 1
        and PRED_SLOTS == 4
        and AXIS_WEIGHT != SOFT
        and not (CONVEXITY and BOUNDARY)
    )
    # Addresses that the loop carries save Triton's compiler a walk through the whole kernel for each of them. Where a
    # thread has several lanes, the registers that they take make the boundary term slower.
    CARRIED: tl.constexpr = AXES > 1 or LANES == 1 or not BOUNDARY
    TIE: tl.constexpr = TIE_64 if COMPUTE == tl.float64 else TIE_32
    VARIANT: tl.constexpr = Variant(TINY, GRAD, AXIS_WEIGHT, AXIS_GRAD, CONVEXITY, BOUNDARY, AXES, LANES, UNROLLED)

    axis = tl.arange(0, AXES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    divide_by = tl.full((1, 1, 1), divisor, COMPUTE)
    reduced = tl.zeros((POLYGONS, AXES, 1), COMPUTE)
    pred_side = Side(
        pred_ptr,
        PRED_SLOTS * LANES if PRED_REAL == FULL else pred_stride_b,
        1 if ADJACENT else pred_stride_n,
        pred_size,
        pred_ptr if pred_real_ptr is None else pred_real_ptr,
        pred_real_stride_b,
        pred_real_stride_n,
    )
    target_side = Side(
        target_ptr,
        TARGET_SLOTS * LANES if TARGET_REAL == FULL else target_stride_b,
        1 if ADJACENT else target_stride_n,
        target_size,
        target_ptr if target_real_ptr is None else target_real_ptr,
        target_real_stride_b,
        target_real_stride_n,
    )
    rows = _rows(_samples(tl.program_id(0), axis, POLYGONS), batch, PRED_REAL)
    pred_at = slot_addresses(source_of(pred_side, rows, EVEN), lane, PRED_SLOTS, PRED_REAL)
    target_at = slot_addresses(source_of(target_side, rows, EVEN), lane, TARGET_SLOTS, TARGET_REAL)
    for block in range(tl.program_id(0), tl.cdiv(batch, POLYGONS), tl.num_programs(0)):
        samples = _samples(block, axis, POLYGONS)
        lanes = Lanes(axis, lane, samples < batch)
        rows = _rows(samples, batch, PRED_REAL)
        grad_rows = row_start(rows, PRED_SLOTS * LANES if PRED_REAL == FULL else pred_size, EVEN)
        pred_source = source_of(pred_side, rows, EVEN)
        target_source = source_of(target_side, rows, EVEN)
        if not CARRIED:
            pred_at = slot_addresses(pred_source, lane, PRED_SLOTS, PRED_REAL)
            target_at = slot_addresses(target_source, lane, TARGET_SLOTS, TARGET_REAL)
        pred = load_vertices(pred_source, pred_at, lanes, PRED_REAL, COMPUTE)
        target = load_vertices(target_source, target_at, lanes, TARGET_REAL, COMPUTE)
        present = (pred.count > 0) & (target.count > 0)
        joint = frame(pred, target, PRED_REAL)
        scale = joint.scale
        pred_placed = place(pred, joint.low, scale)
        target_placed = place(target, joint.low, scale)
        pred_shape = pred_placed
        target_shape = target_placed
        if CONVEXITY or BOUNDARY:
            pred_shape = place_at_last(pred_source, pred, scale)
        if BOUNDARY:
            target_shape = place_at_last(target_source, target, scale)

        rule = axis_rule(joint.extent, TINY, AXIS_WEIGHT)
        pred_rule = rule
        target_rule = rule
        none = tl.zeros_like(rule.floor)
        convexity_factor = none
        direction = none
        target_direction = none
        if MEASURE:
            pred_measured = measure(pred_source, pred, pred_shape, lanes, scale, rule, PRED_REAL, VARIANT)
            target_measured = measure(target_source, target, target_shape, lanes, scale, rule, TARGET_REAL, VARIANT)
            pred_weight = pred_measured.weight
            target_weight = target_measured.weight
            if AXIS_WEIGHT == LENGTH:
                pred_rule = AxisRule(rule.floor, 1.0 / tl.where(pred_measured.length > 0, pred_measured.length, 1.0))
                target_rule = AxisRule(
                    rule.floor, 1.0 / tl.where(target_measured.length > 0, target_measured.length, 1.0)
                )
                pred_weight = tl.where(pred_measured.length > 0, 1.0, 0.0)
                target_weight = tl.where(target_measured.length > 0, 1.0, 0.0)
            # All sums below are divided by twice the weights at the end; the convexity term must not be.
            convexity_factor = 2.0 * (pred_weight + target_weight) / tl.maximum(pred_measured.axes, 1.0)
            convexity_factor *= tl.full((1, 1, 1), convexity_weight, COMPUTE)
        if BOUNDARY:
            pred_area = area(pred_measured)
            target_area = area(target_measured)
            direction = pred_area.direction
            target_direction = target_area.direction

        widest = tl.full((1, 1, 1), TIE, COMPUTE)
        pred_slack = tl.minimum(joint.pred_extent * WIDEST, widest)
        target_slack = tl.minimum(joint.target_extent * WIDEST, widest)
        pred_line = tl.maximum(2.0 * pred_slack * joint.pred_extent, TINY)
        rounding = 2.0 * tl.minimum(joint.extent * WIDEST, widest)
        line = rounding * joint.extent
        if AXIS_WEIGHT != UNIFORM:
            line = tl.where(tl.maximum(joint.pred_extent, joint.target_extent) > rounding, line, -1.0)
        sample = Sample(
            pred_placed, target_placed, pred_shape, target_shape, pred_rule, target_rule, pred.count, lane, pred_slack,
            target_slack, pred_line, convexity_factor, direction, target_direction,
        )  # fmt: skip
        no_slots = zeros(pred_placed.xs)
        no_mean = Mean(none, none, none)
        handed = Handed(no_slots, no_slots, Point(none, none))
        sums = PredSums(no_mean, none, none, Gradient(no_slots, no_slots), handed, handed, handed)
        sums = over_edges(pred_axis, sums, pred_source, pred, lanes, scale, sample, PRED_REAL, VARIANT)
        axes = AxisSums(Mean(none, none, sums.mean.widest), sums.gradient, none)
        axes = over_edges(target_axis, axes, target_source, target, lanes, scale, sample, TARGET_REAL, VARIANT)
        pred_distance, pred_weight = over_axes(sums.mean.distance), over_axes(sums.mean.weight)
        convexity = over_axes(sums.convexity)
        target_distance, target_weight = over_axes(axes.mean.distance), over_axes(axes.mean.weight)
        mixed = over_axes(sums.mixed)
        present &= ~(highest_over_axes(axes.mean.widest) <= line)  # where one is NaN it stays

        weights = pred_weight + target_weight
        weights = tl.where(weights > 0, weights, 1.0)
        loss = 0.5 * (pred_distance + target_distance + convexity) / weights + joint.poison
        by_mixed = none
        by_area = none
        if BOUNDARY:
            target_area = put_in_order(
                target_area, over_axes(axes.reach), target_measured.length, joint, target_source, target, lanes,
                TARGET_REAL, RESOLUTION, VARIANT,
            )  # fmt: skip
            boundary = boundary_term(mixed, pred_area, target_area, TINY, RESOLUTION)
            factor = tl.full((1, 1, 1), boundary_weight, COMPUTE)
            loss += factor * boundary.value
            factor *= direction * 2.0 * weights  # the others are divided by the weights below
            by_mixed = boundary.mixed_slope * factor
            by_area = boundary.area_slope * factor
        loss = tl.where(present, loss, 0.0)
        factor = 0.5 / (weights * divide_by)
        if weight_ptr is not None:
            sample_weight = tl.load(weight_ptr + rows * weight_stride, mask=lanes.inside, other=0).to(COMPUTE)
            loss *= sample_weight
            factor *= sample_weight
        first = lanes.inside & (axis == 0)
        if REDUCE:
            reduced += tl.where(first, loss, 0.0)
        else:
            tl.store(loss_ptr + rows, loss, mask=first)
        if GRAD:
            mean = none
            if AXIS_GRAD and AXIS_WEIGHT != UNIFORM:
                mean = pred_distance if AXIS_WEIGHT == LENGTH else (pred_distance + target_distance) / weights
            factors = Factors(mean, by_mixed, by_area)
            area_gradient = Gradient(no_slots, no_slots)
            if BOUNDARY:
                area_gradient = gradient_of_area(pred_source, pred, lanes, scale, PRED_REAL, VARIANT)
            gradient = gradient_of(pred, lane, axes.gradient, sums, area_gradient, factors, VARIANT)
            AT_ONCE: tl.constexpr = AXES if AXES < PRED_SLOTS else PRED_SLOTS  # each axis stores a slot
            for slot in tl.static_range(0, PRED_SLOTS, AT_ONCE):
                index = (slot + axis) * LANES + lane
                kept = dealt_out(pred.real, slot, axis, AT_ONCE) & present
                x = dealt_out(gradient.xs, slot, axis, AT_ONCE)
                y = dealt_out(gradient.ys, slot, axis, AT_ONCE)
                x = tl.where(kept, saturate(x * factor * scale), 0.0)
                y = tl.where(kept, saturate(y * factor * scale), 0.0)
                stored = lanes.inside & (axis < AT_ONCE)
                if PRED_REAL != FULL:
                    stored &= index < pred_size
                store(grad_ptr, grad_rows + index, x, y, stored)
        if CARRIED:
            rows = _rows(_samples(block + tl.num_programs(0), axis, POLYGONS), batch, PRED_REAL)
            pred_at = slot_addresses(source_of(pred_side, rows, EVEN), lane, PRED_SLOTS, PRED_REAL)
            target_at = slot_addresses(source_of(target_side, rows, EVEN), lane, TARGET_SLOTS, TARGET_REAL)

    if REDUCE:
        reduce_programs(loss_ptr, partial_ptr, counter_ptr, reduced, divisor, COMPUTE)
