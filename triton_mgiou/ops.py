"""What makes an operator of the kernel: buffers, launch, autograd, and registration for torch.compile."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from triton_mgiou.kernels.polygons import mgiou_kernel
from triton_mgiou.reference.polygons import compute_dtype
from triton_mgiou.tuning import layouts, measure

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # decided when the kernel was imported
_AXIS_WEIGHTS = {"uniform": 0, "length": 1, "soft": 2}
_ALL, _LENGTHS, _MASK, _FULL = range(4)
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}
_PLAIN = (Tensor, torch.nn.Parameter)  # anything else, such as a fake tensor, needs PyTorch's dispatcher
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_COUNTERS = 1024  # zeroed at a time: one for each stream and one for each captured launch


class _Plan(NamedTuple):
    """What a call of the kernel needs to know of its arguments' types and sizes, and nothing of the batch."""

    layout: layouts.Layout
    flags: tuple[Any, ...]
    dtype: torch.dtype
    scalar: Tensor  # on the device, to allocate like
    compiled: list[Any]  # the compiled kernel after the first launch, which then needs no look-up of Triton's


class _Scratch(NamedTuple):
    partial: Tensor  # one sum for each program
    counter: Tensor  # one int32: 0, and 0 again after each launch


_plans: dict[tuple[Any, ...], _Plan] = {}
_scratch: dict[tuple[int, int, torch.dtype], _Scratch] = {}
_zeros: dict[int, Iterator[Tensor]] = {}  # counters not in use, by device


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None if they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels need an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels need an NVIDIA GPU"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"PyTorch finds {torch.cuda.device_count()} NVIDIA GPUs, and the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


class _Call(NamedTuple):
    """What a call asks for, besides the polygons."""

    pred_real: Tensor | None
    target_real: Tensor | None
    weight: Tensor | None
    reduction: str
    avg_factor: float | None
    axis_weight: str
    axis_grad: bool
    convexity_weight: float
    boundary_weight: float


def fused_loss(
    pred: Tensor,
    target: Tensor,
    pred_real: Tensor | None,
    target_real: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | None,
    axis_weight: str,
    axis_grad: bool,
    convexity_weight: float,
    boundary_weight: float,
) -> Tensor:
    """The reduced loss by the fused kernel. B is at least 1; what says which vertices are real is lengths or bool."""
    if torch.is_grad_enabled():
        pred_grad, target_grad = pred.requires_grad, target.requires_grad
    else:
        pred_grad = target_grad = False
    plain = type(pred) in _PLAIN and type(target) in _PLAIN
    if torch.compiler.is_compiling() or not plain:
        # Numbers that may change from step to step go in as tensors, or stay outside, lest they specialise the graph.
        factors = [
            torch.full((), factor, dtype=torch.float64, device="cpu") for factor in (convexity_weight, boundary_weight)
        ]
        rule = "none" if reduction == "none" else "sum"
        options = (pred_real, target_real, weight, rule, axis_weight, axis_grad, *factors)
        total: Tensor = _operator(pred, target, *options, pred_grad, target_grad)[0]
        return total / (pred.shape[0] if avg_factor is None else avg_factor) if reduction == "mean" else total
    call = _Call(
        pred_real, target_real, weight, reduction, avg_factor, axis_weight, axis_grad, convexity_weight, boundary_weight
    )
    if pred_grad or target_grad:
        loss: Tensor = _FusedLoss.apply(pred, target, call)  # type: ignore[no-untyped-call]
        return loss
    return _launch(pred, target, call, False)[0]


class _FusedLoss(torch.autograd.Function):
    """The kernel computes the gradient with the value; backward multiplies it by what comes from above."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, call: _Call) -> Tensor:
        loss, *grads = _loss_and_grads(pred, target, call, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes = pred.dtype, target.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'the "triton" backend of mgiou_loss has no second derivative: expected create_graph=False, '
                'got create_graph=True; use backend="eager" for double backward'
            )
        (pred_grad, target_grad), (pred_dtype, target_dtype) = ctx.saved_tensors, ctx.dtypes
        return _scaled(pred_grad, pred_dtype, upstream), _scaled(target_grad, target_dtype, upstream), None


def _scaled(grad: Tensor | None, dtype: torch.dtype, upstream: Tensor) -> Tensor | None:
    """`grad` times the upstream gradient, a scalar or (B,), in the input's dtype: one launch.

    In place where the graph is not kept, since nobody sees `grad` again.
    """
    if grad is None:
        return None
    if upstream.dim() == 1:
        upstream = upstream[:, None, None]
    if grad.dtype != dtype:
        return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
    return grad * upstream if _keeps_graph() else grad.mul_(upstream)


def _loss_and_grads(
    pred: Tensor, target: Tensor, call: _Call, pred_grad: bool, target_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss, grad = _launch(pred, target, call, pred_grad)
    if not target_grad:
        return loss, grad, None
    # MGIoU is symmetric (section 4); the target is no variable of the other terms.
    swapped = call._replace(
        pred_real=call.target_real, target_real=call.pred_real, convexity_weight=0.0, boundary_weight=0.0
    )
    return loss, grad, _launch(target, pred, swapped, True)[1]


def _launch(pred: Tensor, target: Tensor, call: _Call, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """One launch: the loss, and its gradient to `pred` in the loss's dtype if asked for."""
    device = pred.get_device()  # -1 for the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(pred, target, call, need_grad)
    pred_real, target_real, weight, reduction, avg_factor, axis_weight, axis_grad, convexity_weight, boundary_weight = (
        call
    )
    pred, pred_stride_b, pred_stride_n = _addressable(pred)
    target, target_stride_b, target_stride_n = _addressable(target)
    batch, pred_size, _ = pred.shape
    target_size = target.shape[1]
    key = (
        device,
        pred.dtype,
        target.dtype,
        pred_size,
        target_size,
        None if pred_real is None else pred_real.dtype,
        None if target_real is None else target_real.dtype,
        None if weight is None else weight.dtype,
        reduction == "none",
        axis_weight,
        axis_grad,
        convexity_weight > 0,
        boundary_weight > 0,
        need_grad,
        pred_stride_n == target_stride_n == 1,
        pred_stride_b == pred_size and target_stride_b == target_size,
        (pred_stride_b | target_stride_b | pred_size) & 1 == 0,
        batch if INTERPRETED else layouts.is_large(batch, pred_size, target_size),
    )
    plan = _plans.get(key)
    if plan is None:
        launch = functools.partial(_launch_samples, pred, target, call, need_grad)
        plan = _plans[key] = _plan(pred, target, *key[3:], launch)
    programs = min(-(-batch // plan.layout.polygons), layouts.MAX_PROGRAMS)
    stream = 0 if device < 0 else driver.active.get_current_stream(device)
    if reduction == "none":
        loss, partial, counter = plan.scalar.new_empty(batch), None, None
    else:
        loss, (partial, counter) = torch.empty_like(plan.scalar), _reduction_scratch(device, stream, plan.dtype)
    grad = None
    if need_grad:
        grad = torch.empty_like(pred, dtype=plan.dtype, memory_format=torch.contiguous_format)
    divisor = batch if avg_factor is None else avg_factor
    pred_real, pred_real_stride_b, pred_real_stride_n = _readable(pred_real)
    target_real, target_real_stride_b, target_real_stride_n = _readable(target_real)
    arguments = (
        pred, target, pred_real, target_real, weight, loss, grad, partial, counter,
        pred_stride_b, pred_stride_n, target_stride_b, target_stride_n,
        pred_real_stride_b, pred_real_stride_n, target_real_stride_b, target_real_stride_n,
        0 if weight is None else weight.stride(0),
        batch, pred_size, target_size,
        float(divisor) if reduction == "mean" else 1.0, float(convexity_weight), float(boundary_weight),
        *plan.flags,
    )  # fmt: skip
    if plan.compiled:
        _launch_compiled(plan.compiled[0], programs, stream, arguments)
    else:
        compiled = mgiou_kernel[(programs,)](*arguments, **plan.layout.options())
        if not INTERPRETED:
            plan.compiled.append(compiled)
    return loss, grad


def _launch_compiled(compiled: Any, programs: int, stream: int, arguments: tuple[Any, ...]) -> None:
    """`compiled[grid](...)` without its bookkeeping, which only a profiler's hooks need."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[programs, 1, 1](*arguments, stream=stream)
    else:
        compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _plan(
    pred: Tensor,
    target: Tensor,
    pred_size: int,
    target_size: int,
    pred_real: torch.dtype | None,
    target_real: torch.dtype | None,
    _weight: torch.dtype | None,
    per_sample: bool,
    axis_weight: str,
    axis_grad: bool,
    convexity: bool,
    boundary: bool,
    need_grad: bool,
    adjacent: bool,
    packed: bool,
    even: bool,
    batch: int,
    launch: measure.Launch,
) -> _Plan:
    buckets = layouts.bucket(pred_size), layouts.bucket(target_size)
    # With sizes that differ, one side would have more lanes than vertices.
    full = packed and adjacent and pred_real is target_real is None and pred_size == target_size == buckets[0]
    dtype = compute_dtype(pred, target)
    flags = (
        _COMPUTE[dtype],
        need_grad,
        not per_sample,
        _AXIS_WEIGHTS[axis_weight],
        axis_grad,
        convexity,
        boundary,
        _FULL if full else _real_mode(pred_real),
        _FULL if full else _real_mode(target_real),
        adjacent,
        adjacent and even,
    )
    if INTERPRETED:
        default = layouts.interpreter_layout(*buckets, batch)
        large_batch = layouts.is_large(batch, *buckets)
    else:
        large_batch = bool(batch)
        default = layouts.layout(*buckets, large_batch)
    first, end = (mgiou_kernel.arg_names.index(name) for name in ("COMPUTE", "POLYGONS"))
    kinds = (f"{name}={value}" for name, value in zip(mgiou_kernel.arg_names[first:end], flags, strict=True))
    case = layouts.Case(*buckets, large_batch, " ".join((f"{pred.dtype} {target.dtype}", *kinds)))
    layout = measure.choose(case, default, pred.device, launch)
    return _Plan(layout, (*flags, *layout.sizes().values()), dtype, pred.new_empty((), dtype=dtype), [])


def _launch_samples(pred: Tensor, target: Tensor, call: _Call, need_grad: bool, size: int) -> None:
    """Launch on these samples, repeated if they are fewer than `size`, with a plan that is then forgotten."""
    if len(pred) < size:
        rows = torch.arange(size, device=pred.device) % len(pred)
        pred, target = pred[rows], target[rows]
        pred_real, target_real, weight = (None if each is None else each[rows] for each in call[:3])
        call = call._replace(pred_real=pred_real, target_real=target_real, weight=weight)
    forget_plans()
    _launch(pred, target, call, need_grad)
    forget_plans()


def forget_plans() -> None:
    """Choose every layout anew at its next use. What was compiled stays."""
    _plans.clear()


def _real_mode(dtype: torch.dtype | None) -> int:
    if dtype is None:
        return _ALL
    return _MASK if dtype == torch.bool else _LENGTHS


def _readable(real: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Lengths, or a mask as bytes, in a copy if its rows reach further than 32 bits tell; and their strides."""
    if real is None:
        return None, 0, 0
    if real.dtype != torch.bool:
        return real, real.stride(0), 0
    if real.stride(1) * real.shape[1] >= 2**31:
        real = real.contiguous()
    return real.view(torch.uint8), real.stride(0), real.stride(1)


def _addressable(vertices: Tensor) -> tuple[Tensor, int, int]:
    """`vertices`, or a copy where they cannot be loaded as aligned words of two; their strides, in vertices."""
    stride_b, stride_n, stride_c = vertices.stride()
    aligned = stride_b % 2 == 0 and stride_n % 2 == 0 and vertices.data_ptr() % 16 == 0
    if stride_c == 1 and aligned and stride_n * vertices.shape[1] < 2**31:
        return vertices, stride_b // 2, stride_n // 2
    copy = torch.empty_like(vertices, memory_format=torch.contiguous_format).copy_(vertices)
    return copy, vertices.shape[1], 1


def _reduction_scratch(device: int, stream: int, dtype: torch.dtype) -> _Scratch:
    """Room for partial sums, and a zero counter, that no other launch uses at the same time.

    A stream runs one kernel after the other, so its launches share theirs. A captured launch may be replayed on
    any stream, so it keeps its own.
    """
    if device < 0:
        return _Scratch(torch.empty(layouts.MAX_PROGRAMS, dtype=dtype), torch.zeros(1, dtype=torch.int32))
    if torch.cuda.is_current_stream_capturing():
        return _Scratch(torch.empty(layouts.MAX_PROGRAMS, dtype=dtype, device=device), _counter(device))
    key = device, stream, dtype
    scratch = _scratch.get(key)
    if scratch is None:
        partial = torch.empty(layouts.MAX_PROGRAMS, dtype=dtype, device=device)
        scratch = _scratch[key] = _Scratch(partial, _counter(device))
    return scratch


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


@torch.library.custom_op("triton_mgiou::loss", mutates_args=())
def _operator(
    pred: Tensor,
    target: Tensor,
    pred_real: Tensor | None,
    target_real: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    axis_weight: str,
    axis_grad: bool,
    convexity_weight: Tensor,
    boundary_weight: Tensor,
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same through PyTorch's dispatcher: loss and gradients; a gradient that is not asked for is empty."""
    factors = convexity_weight.item(), boundary_weight.item()
    call = _Call(pred_real, target_real, weight, reduction, None, axis_weight, axis_grad, *factors)
    loss, *grads = _loss_and_grads(pred, target, call, pred_grad, target_grad)
    pred_out, target_out = (loss.new_empty(0) if grad is None else grad for grad in grads)
    return loss, pred_out, target_out


@_operator.register_fake
def _(pred: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(pred, target)
    reduction, (pred_grad, target_grad) = options[3], options[-2:]
    return (
        pred.new_empty(pred.shape[:1] if reduction == "none" else (), dtype=dtype),
        pred.new_empty(pred.shape if pred_grad else (0,), dtype=dtype),
        pred.new_empty(target.shape if target_grad else (0,), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, pred_grad, target_grad = output
    ctx.save_for_backward(pred_grad, target_grad)
    ctx.mark_non_differentiable(pred_grad, target_grad)
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.asked = inputs[-2:]


def _backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None]
    for side, (grad, dtype, asked) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, ctx.asked, strict=True)):
        if asked and upstream is not None:
            factor = upstream[:, None, None] if upstream.dim() == 1 else upstream
            grads[side] = (grad * factor).to(dtype)
    return (*grads, *[None] * 10)


_operator.register_autograd(_backward, setup_context=_save)
