"""Launches of the kernels: the variant that a call needs, its arguments, its outputs and scratch memory.

The first part is for any kernel, the second for that of polygons, the third for that of boxes, the fourth for that of
keypoints. Another kernel brings what the second part has:

- a call, a `NamedTuple` of what is asked for besides both sides, with `launch` and `loss_and_gradients`;
- a key, a `NamedTuple` of all that decides which variant runs and nothing else, and a function that makes its `Plan`;
- in `tuning/layouts.py` its layouts: what the user's cache may choose from.

`ops.py` makes a differentiable operator of the call.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from triton_mgiou.arguments import plain_name
from triton_mgiou.box_formats import FORMATS, KERNEL_FORMATS
from triton_mgiou.options import AXIS_WEIGHTS, Options, Reduction
from triton_mgiou.reference.polygons import compute_dtype
from triton_mgiou.tuning import layouts, store

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides it for each kernel when that is imported
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}
_COUNTERS = 1024  # zeroed at a time: one for each stream and one for each captured launch

# Triton's private launcher, `CompiledKernel.run`, takes these and then the kernel's arguments (in 3.6; in 3.8 and 3.9).
_LAUNCHER_PARAMETERS = (
    ("gridX", "gridY", "gridZ", "stream", "function", "args"),
    (
        *("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata"),
        *("launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"),
    ),
)


class Plan:
    """One variant of a kernel, and how to launch it.

    Args:
        kernel: The jitted function.
        flags: Its compile-time arguments before those of the layout.
        case: What the user's cache calls it; its layout comes from there, or is the default.
        candidates: The layouts that it may have, the default first.
        dtype: The type of the outputs.
        device: Their device's index, -1 for the CPU.
    """

    def __init__(
        self,
        kernel: Any,
        flags: tuple[Any, ...],
        case: str,
        candidates: Sequence[layouts.AnyLayout],
        dtype: torch.dtype,
        device: int,
    ) -> None:
        self.kernel = kernel
        self.flags = flags
        self.case = case
        self.candidates = candidates
        self.dtype = dtype
        self.layout = store.chosen_layout(case, candidates, device)
        self.constants = (*flags, *self.layout.sizes().values())
        self.scalar = torch.empty((), dtype=dtype, device=device_of(device))  # an allocation like it is the fastest
        self.scalar.untyped_storage().resize_(0)  # keeps no memory, which might be of a pool that takes it back
        self.compiled: Any = None  # after the first launch
        self._launcher: tuple[Any, tuple[Any, ...]] | None = None

    def launch(self, size: Any, stream: int, arguments: tuple[Any, ...]) -> None:
        """Launch on the current device. Only the first time Triton looks for the compiled code, or makes it."""
        grid = self.layout.grid(size)
        launcher = self._launcher
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if launcher is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's hooks
            compiled = self.kernel[grid](*arguments, *self.constants, **self.layout.options())
            if self.compiled is None and not INTERPRETED:
                self.compiled = compiled
                self._launcher = private_launcher(compiled)
        else:
            run, between = launcher
            run(*grid, stream, *between, *arguments, *self.constants)


def private_launcher(compiled: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Find the launcher of a compiled kernel without Triton's bookkeeping, and its arguments right after the stream.

    None where Triton's launcher doesn't look as it is known to: `kernel[grid](...)` then has to be used.
    """
    try:
        run = compiled.run
        if tuple(inspect.signature(run).parameters) in _LAUNCHER_PARAMETERS:
            return run, (compiled.function, compiled.packed_metadata, None, None, None)
    except (AttributeError, TypeError, ValueError):  # no such attribute, not callable, no signature
        pass
    return None


_plans: dict[Any, Plan] = {}


def known_plan(key: Any) -> Plan | None:
    """The plan that was kept for a key, or for its fields."""
    return _plans.get(key)


def keep_plan(key: Any, plan: Plan) -> Plan:
    """Keep a plan for the next call."""
    _plans[key] = plan
    return plan


def forget_plans() -> None:
    """Look every layout up again at its next use. What was compiled stays."""
    _plans.clear()


def _launch(
    prepare: Callable[..., Any], pred: Tensor, target: Tensor, call: Call, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient to `pred` if asked for: one launch, on the device of `pred`."""
    device = pred.get_device()  # -1 for the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(prepare, pred, target, call, gradient)
    stream = 0 if device < 0 else driver.active.get_current_stream(device)
    plan, arguments, loss, grad = prepare(pred, target, call, gradient, stream)
    plan.launch(pred.shape[0], stream, arguments)
    return loss, grad


def _outputs(
    plan: Plan, pred: Tensor, batch: int, per_sample: bool, gradient: bool, device: int, stream: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Room for the loss and the gradient to `pred`, and what sums up the samples' losses."""
    if batch > layouts.MAX_SAMPLES:
        raise ValueError(f"pred must have at most {layouts.MAX_SAMPLES} samples for the kernels, got {batch}")
    grad = torch.empty_like(pred, dtype=plan.dtype, memory_format=torch.contiguous_format) if gradient else None
    if per_sample:
        return plan.scalar.new_empty(batch), grad, None, None
    partial, counter = reduction_scratch(device, stream, plan.dtype)
    return torch.empty_like(plan.scalar), grad, partial, counter


def _divisor(rule: str, divisor: float | None, batch: int) -> float:
    """By what the kernel divides the sum."""
    return float(batch if rule == "mean" else 1.0 if divisor is None else divisor)


def device_of(index: int) -> torch.device:
    """The device that `Tensor.get_device` calls so."""
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)


class _Scratch(NamedTuple):
    partial: Tensor  # one sum for each program
    counter: Tensor  # one int32: 0, and 0 again after each launch


_scratch: dict[tuple[int, int, torch.dtype], _Scratch] = {}
_zeros: dict[int, Iterator[Tensor]] = {}  # counters not in use, by device


def reduction_scratch(device: int, stream: int, dtype: torch.dtype) -> _Scratch:
    """Room for partial sums, and a zero counter, that no other launch uses at the same time.

    A stream runs one kernel after the other, so its launches share theirs. A captured launch may be replayed on
    any stream, so it keeps its own.

    What launches share has to last, and the first of them may run in a memory pool that takes back whatever is not an
    output: `torch.compile(mode="reduce-overhead")` has one where it warms up. A thread has its pools for itself, so
    another allocates.
    """
    if device < 0:
        return _Scratch(_partial(device, dtype), torch.zeros(1, dtype=torch.int32, device="cpu"))
    if torch.cuda.is_current_stream_capturing():
        return _Scratch(_partial(device, dtype), _counter(device))
    key = device, stream, dtype
    scratch = _scratch.get(key)
    if scratch is None:
        with ThreadPoolExecutor(1) as another:
            scratch = _scratch[key] = another.submit(_lasting_scratch, device, dtype).result()
    return scratch


def _lasting_scratch(device: int, dtype: torch.dtype) -> _Scratch:
    scratch = _Scratch(_partial(device, dtype), _counter(device))
    torch.cuda.current_stream(device).synchronize()  # once: any stream may use it
    return scratch


def _partial(device: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(layouts.MAX_PROGRAMS, dtype=dtype, device=device_of(device))


def _counter(device: int) -> Tensor:
    """A zero that was not used before. Zeroing one while a graph is captured would be a node of the graph."""
    counter = next(_zeros.get(device, iter(())), None)
    if counter is None:
        zeros = torch.zeros(_COUNTERS, dtype=torch.int32, device=device).unbind()
        counter = zeros[0]
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()  # once: any stream may use them
            _zeros[device] = iter(zeros[1:])
    return counter


# Polygons


class PolygonCall(NamedTuple):
    """A call of the kernel of polygons, without both sides."""

    pred_real: Tensor | None  # lengths or a mask, or None where every vertex is real
    target_real: Tensor | None
    reduction: Reduction
    options: Options

    def launch(self, pred: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss, and its gradient to `pred` in the loss's type if asked for: one launch."""
        return _launch(prepare_polygons, pred, target, self, gradient)

    def loss_and_gradients(
        self, pred: Tensor, target: Tensor, pred_grad: bool, target_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, and its gradient to each side that asks for one, in the loss's type."""
        loss, gradient = self.launch(pred, target, pred_grad)
        return loss, gradient, self.swapped().launch(target, pred, True)[1] if target_grad else None

    def swapped(self) -> PolygonCall:
        """The call for the gradient to `target`: MGIoU is symmetric, and `target` is a constant of the other terms."""
        options = self.options._replace(convexity_weight=0.0, boundary_weight=0.0)
        return self._replace(pred_real=self.target_real, target_real=self.pred_real, options=options)


class PolygonKey(NamedTuple):
    """All that decides which variant of the kernel runs."""

    device: int
    pred_dtype: torch.dtype
    target_dtype: torch.dtype
    pred_size: int
    target_size: int
    pred_real: torch.dtype | None
    target_real: torch.dtype | None
    weight: torch.dtype | None
    per_sample: bool
    axis_weight: str
    axis_grad: bool
    convexity: bool
    boundary: bool
    gradient: bool
    adjacent: bool  # each vertex follows the one before it
    packed: bool  # each polygon follows the one before it
    even: bool  # strides over the batch and `pred_size`
    batch: int  # whether it is large; the batch size itself in the interpreter


def prepare_polygons(
    pred: Tensor, target: Tensor, call: PolygonCall, gradient: bool, stream: int
) -> tuple[Plan, tuple[Any, ...], Tensor, Tensor | None]:
    """The variant to launch, its arguments, and its outputs: the loss, and the gradient to `pred` if asked for."""
    device = pred.get_device()
    pred_real, target_real, (weight, rule, divisor), options = call
    axis_weight, axis_grad, convexity_weight, boundary_weight = options
    batch, pred_size, _ = pred.shape
    target_size = target.shape[1]
    pred, pred_stride_b, pred_stride_n = _as_words(pred, pred_size)
    target, target_stride_b, target_stride_n = _as_words(target, target_size)
    fields = (
        device,
        pred.dtype,
        target.dtype,
        pred_size,
        target_size,
        None if pred_real is None else pred_real.dtype,
        None if target_real is None else target_real.dtype,
        None if weight is None else weight.dtype,
        rule == "none",
        axis_weight,
        axis_grad,
        convexity_weight > 0,
        boundary_weight > 0,
        gradient,
        pred_stride_n == target_stride_n == 1,
        pred_stride_b == pred_size and target_stride_b == target_size,
        (pred_stride_b | target_stride_b | pred_size) & 1 == 0,
        batch if INTERPRETED else layouts.is_large(batch, pred_size, target_size),
    )
    plan = _plans.get(fields)  # finds a key, and is faster to make
    if plan is None:
        key = PolygonKey(*fields)
        plan = _plans[key] = polygon_plan(key)
    loss, grad, partial, counter = _outputs(plan, pred, batch, rule == "none", gradient, device, stream)
    pred_real, pred_real_stride_b, pred_real_stride_n = _as_bytes(pred_real)
    target_real, target_real_stride_b, target_real_stride_n = _as_bytes(target_real)
    arguments = (
        pred, target, pred_real, target_real, weight, loss, grad, partial, counter,
        pred_stride_b, pred_stride_n, target_stride_b, target_stride_n,
        pred_real_stride_b, pred_real_stride_n, target_real_stride_b, target_real_stride_n,
        0 if weight is None else weight.stride(0),
        batch, pred_size, target_size,
        _divisor(rule, divisor, batch), float(convexity_weight), float(boundary_weight),
    )  # fmt: skip
    return plan, arguments, loss, grad


def polygon_plan(key: PolygonKey) -> Plan:
    """The variant of the kernel, not yet compiled."""
    from triton_mgiou.kernels.polygons import mgiou_kernel  # noqa: PLC0415 - who needs boxes only does not wait for it

    buckets = layouts.bucket(key.pred_size), layouts.bucket(key.target_size)
    # With sizes that differ, one side would have more lanes than vertices.
    full = (
        key.packed
        and key.adjacent
        and key.pred_real is key.target_real is None
        and key.pred_size == key.target_size == buckets[0]
    )
    dtype = compute_dtype(key.pred_dtype, key.target_dtype)
    constants = {
        "COMPUTE": COMPUTE[dtype],
        "GRAD": key.gradient,
        "REDUCE": not key.per_sample,
        "AXIS_WEIGHT": AXIS_WEIGHTS.index(key.axis_weight),
        "AXIS_GRAD": key.axis_grad,
        "CONVEXITY": key.convexity,
        "BOUNDARY": key.boundary,
        "PRED_REAL": _real_code(key.pred_real, full),
        "TARGET_REAL": _real_code(key.target_real, full),
        "ADJACENT": key.adjacent,
        "EVEN": key.adjacent and key.even,
    }
    large = layouts.is_large(key.batch, *buckets) if INTERPRETED else bool(key.batch)
    flags = " ".join(
        (f"{key.pred_dtype} {key.target_dtype}", *(f"{name}={value}" for name, value in constants.items()))
    )
    terms = key.convexity + key.boundary
    candidates = layouts.candidates(*buckets, large, terms, dtype == torch.float64)
    if INTERPRETED:
        candidates = [layouts.interpreter_layout(*buckets, key.batch)]
    case = f"vertices {buckets[0]} {buckets[1]}, batch {layouts.batches(*buckets, large)}, {flags}"
    return Plan(mgiou_kernel, tuple(constants.values()), case, candidates, dtype, key.device)


@cache
def _real_code(dtype: torch.dtype | None, full: bool) -> int:
    """The kernel's code for what says which vertices are real."""
    from triton_mgiou.kernels import vertices  # noqa: PLC0415 - as the kernel itself

    name = "FULL" if full else "ALL" if dtype is None else "MASK" if dtype == torch.bool else "LENGTHS"
    code: int = getattr(vertices, name).value
    return code


def _as_bytes(real: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Lengths, or a mask as bytes, in a copy if its rows reach further than 32 bits tell; and their strides."""
    if real is None:
        return None, 0, 0
    if real.dtype != torch.bool:
        return real, real.stride(0), 0
    if real.stride(1) * real.shape[1] >= 2**31:
        real = real.contiguous()
    return real.view(torch.uint8), real.stride(0), real.stride(1)


def _as_words(polygons: Tensor, size: int) -> tuple[Tensor, int, int]:
    """The same, or a copy where they cannot be loaded as aligned words of two; their strides, in vertices."""
    stride_b, stride_n, stride_c = polygons.stride()
    if stride_c == 1 and not (stride_b | stride_n) & 1 and stride_n * size < 2**31 and polygons.data_ptr() % 16 == 0:
        return polygons, stride_b >> 1, stride_n >> 1
    copy = torch.empty_like(polygons, memory_format=torch.contiguous_format).copy_(polygons)
    return copy, size, 1


# Boxes


class BoxCall(NamedTuple):
    """A call of the kernel of boxes, without both sides."""

    fmt: str
    angle: str
    clockwise: bool
    reduction: Reduction
    options: Options

    def launch(self, pred: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss, and its gradient to `pred` in the loss's type if asked for: one launch."""
        return _launch(prepare_boxes, pred, target, self, gradient)

    def loss_and_gradients(
        self, pred: Tensor, target: Tensor, pred_grad: bool, target_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, and its gradient to each side that asks for one, in the loss's type."""
        loss, gradient = self.launch(pred, target, pred_grad)
        return loss, gradient, self.swapped().launch(target, pred, True)[1] if target_grad else None

    def swapped(self) -> BoxCall:
        """The call for the gradient to `target`: MGIoU is symmetric, and `target` is a constant of the other term."""
        return self._replace(options=self.options._replace(boundary_weight=0.0))


class BoxKey(NamedTuple):
    """All that decides which variant of the kernel runs."""

    device: int
    pred_dtype: torch.dtype
    target_dtype: torch.dtype
    fmt: str
    angle: str
    clockwise: bool
    weight: torch.dtype | None
    per_sample: bool
    axis_weight: str
    axis_grad: bool
    boundary: bool
    gradient: bool
    packed: bool  # boxes follow each other, and the first is aligned


def prepare_boxes(
    pred: Tensor, target: Tensor, call: BoxCall, gradient: bool, stream: int
) -> tuple[Plan, tuple[Any, ...], Tensor, Tensor | None]:
    """The variant to launch, its arguments, and its outputs: the loss, and the gradient to `pred` if asked for."""
    device = pred.get_device()
    fmt, angle, clockwise, (weight, rule, divisor), options = call
    batch = pred.shape[0]
    fields = (
        device,
        pred.dtype,
        target.dtype,
        fmt,
        angle,
        clockwise,
        None if weight is None else weight.dtype,
        rule == "none",
        options.axis_weight,
        options.axis_grad,
        options.boundary_weight > 0,
        gradient,
        pred.is_contiguous() and target.is_contiguous() and (pred.data_ptr() | target.data_ptr()) % 16 == 0,
    )
    plan = _plans.get(fields)  # finds a key, and is faster to make
    if plan is None:
        key = BoxKey(*fields)
        plan = _plans[key] = box_plan(key)
    loss, grad, partial, counter = _outputs(plan, pred, batch, rule == "none", gradient, device, stream)
    arguments = (
        pred, target, weight, loss, grad, partial, counter,
        *_three_strides(pred), *_three_strides(target),
        0 if weight is None else weight.stride(0),
        batch, _divisor(rule, divisor, batch), float(options.boundary_weight),
    )  # fmt: skip
    return plan, arguments, loss, grad


def _multiprocessors(device: int) -> int:
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def _three_strides(boxes: Tensor) -> tuple[int, ...]:
    return boxes.stride() if boxes.dim() == 3 else (*boxes.stride(), 0)


def box_plan(key: BoxKey) -> Plan:
    """The variant of the kernel, not yet compiled."""
    from triton_mgiou.kernels.boxes import box_kernel  # noqa: PLC0415 - who needs polygons only does not wait for it

    dtype = compute_dtype(key.pred_dtype, key.target_dtype)
    constants = {
        "COMPUTE": COMPUTE[dtype],
        "GRAD": key.gradient,
        "REDUCE": not key.per_sample,
        "FORMAT": KERNEL_FORMATS.index(key.fmt),
        "DEGREES": key.angle == "degrees",
        "CLOCKWISE": key.clockwise,
        "AXIS_WEIGHT": AXIS_WEIGHTS.index(key.axis_weight),
        "AXIS_GRAD": key.axis_grad,
        "BOUNDARY": key.boundary,
        "PACKED": key.packed,
    }
    numbers = math.prod(FORMATS[key.fmt].shape)
    candidates = layouts.box_candidates(numbers, dtype == torch.float64, _multiprocessors(key.device))
    if INTERPRETED:
        candidates = [layouts.BOX_INTERPRETER_LAYOUT]
    flags = (f"{key.pred_dtype} {key.target_dtype}", *(f"{name}={value}" for name, value in constants.items()))
    case = f"boxes {plain_name(key.fmt)}, {' '.join(flags)}"
    return Plan(box_kernel, tuple(constants.values()), case, candidates, dtype, key.device)


# Keypoints


class KeypointCall(NamedTuple):
    """A call of the kernel of `PolygonLoss`'s L2 term, without both sides."""

    visible: Tensor  # (B, N), bool
    area: Tensor  # (B,), in the term's type
    sigmas: Tensor | float  # (N,), float32, or one for all
    reduction: Reduction

    def launch(self, pred: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The term, and its gradient to `pred` in the term's type if asked for: one launch."""
        return _launch(prepare_keypoints, pred, target, self, gradient)

    def loss_and_gradients(
        self, pred: Tensor, target: Tensor, pred_grad: bool, target_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The term, and its gradient to each side that asks for one, in the term's type: it knows their difference."""
        loss, gradient = self.launch(pred, target, pred_grad or target_grad)
        opposite = -gradient if target_grad and gradient is not None else None
        return loss, gradient if pred_grad else None, opposite


class KeypointKey(NamedTuple):
    """All that decides which variant of the kernel runs."""

    device: int
    dtype: torch.dtype
    sigmas: bool  # one of each vertex
    weight: torch.dtype | None
    per_sample: bool
    gradient: bool
    vertices: int  # of a tile


def prepare_keypoints(
    pred: Tensor, target: Tensor, call: KeypointCall, gradient: bool, stream: int
) -> tuple[Plan, tuple[Any, ...], Tensor, Tensor | None]:
    """The variant to launch, its arguments, and its outputs: the term, and the gradient to `pred` if asked for."""
    device = pred.get_device()
    visible, area, sigmas, (weight, rule, divisor) = call
    batch, size, _ = pred.shape
    tolerances = sigmas if isinstance(sigmas, Tensor) else None
    fields = (
        device,
        pred.dtype,
        tolerances is not None,
        None if weight is None else weight.dtype,
        rule == "none",
        gradient,
        layouts.keypoints_of_tile(size),
    )
    plan = _plans.get(fields)  # finds a key, and is faster to make
    if plan is None:
        key = KeypointKey(*fields)
        plan = _plans[key] = keypoint_plan(key)
    loss, grad, partial, counter = _outputs(plan, pred, batch, rule == "none", gradient, device, stream)
    arguments = (
        pred, target, visible.view(torch.uint8), area, tolerances, weight, loss, grad, partial, counter,
        *pred.stride(), *target.stride(), *visible.stride(), area.stride(0),
        0 if tolerances is None or tolerances.numel() == 1 else tolerances.stride(0),
        0 if weight is None else weight.stride(0),
        batch, size, _divisor(rule, divisor, batch), 0.0 if tolerances is not None else float(sigmas),
    )  # fmt: skip
    return plan, arguments, loss, grad


def keypoint_plan(key: KeypointKey) -> Plan:
    """The variant of the kernel, not yet compiled."""
    from triton_mgiou.kernels.keypoints import l2_kernel  # noqa: PLC0415 - who needs no keypoints does not wait for it

    constants = {"COMPUTE": COMPUTE[key.dtype], "GRAD": key.gradient, "REDUCE": not key.per_sample}
    case = f"keypoints {key.vertices}, {' '.join(f'{name}={value}' for name, value in constants.items())}"
    layout = layouts.keypoint_layout(key.vertices, INTERPRETED)
    return Plan(l2_kernel, tuple(constants.values()), case, [layout], key.dtype, key.device)


Call = PolygonCall | BoxCall | KeypointCall
