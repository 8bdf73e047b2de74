"""What makes an operator of the kernel: buffers, launch, autograd, and registration for torch.compile."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from triton_mgiou import tuning
from triton_mgiou.kernels.mgiou import mgiou_kernel
from triton_mgiou.reference import compute_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # decided when the kernel was imported
_AXIS_WEIGHTS = {"uniform": 0, "length": 1, "soft": 2}
_ALL, _LENGTHS, _MASK = 0, 1, 2
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Compiled kernels by what they were compiled for, to launch without Triton's own look-up, and the partial sums
# and the counter of each stream: a stream runs one kernel after the other, and the kernel leaves the counter at 0.
_compiled: dict[tuple[Any, ...], Any] = {}
_scratch: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None if they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels need an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


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
) -> Tensor:
    """The reduced loss by the fused kernel. B is at least 1; what says which vertices are real is lengths or bool."""
    options = (pred_real, target_real, weight, reduction, avg_factor, axis_weight, axis_grad, convexity_weight)
    if torch.is_grad_enabled():
        pred_grad, target_grad = pred.requires_grad, target.requires_grad
    else:
        pred_grad = target_grad = False
    if torch.compiler.is_compiling():
        loss: Tensor = _operator(pred, target, *options, pred_grad, target_grad)[0]
    elif pred_grad or target_grad:
        loss = _FusedLoss.apply(pred, target, options)  # type: ignore[no-untyped-call]
    else:
        loss = _launch(pred, target, *options, False)[0]
    return loss


class _FusedLoss(torch.autograd.Function):
    """The kernel computes the gradient with the value; backward multiplies it by what comes from above."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, options: tuple[Any, ...]) -> Tensor:
        loss, *grads = _loss_and_grads(pred, target, *options, *ctx.needs_input_grad[:2])
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
    """`grad` times the upstream gradient, a scalar or (B,), in the input's dtype: one launch."""
    if grad is None:
        return None
    if upstream.dim() == 1:
        upstream = upstream[:, None, None]
    if grad.dtype == dtype:
        return grad * upstream
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


def _loss_and_grads(
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
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    reduce = weight, reduction, avg_factor, axis_weight, axis_grad
    loss, grad = _launch(pred, target, pred_real, target_real, *reduce, convexity_weight, pred_grad)
    if not target_grad:
        return loss, grad, None
    # MGIoU is symmetric and the convexity term does not see the target (section 4).
    return loss, grad, _launch(target, pred, target_real, pred_real, *reduce, 0.0, True)[1]


def _launch(
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
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """One launch: the loss, and its gradient to `pred` in the loss's dtype if asked for."""
    device = pred.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(
                pred, target, pred_real, target_real, weight, reduction, avg_factor,
                axis_weight, axis_grad, convexity_weight, need_grad,
            )  # fmt: skip
    pred, target = _addressable(pred), _addressable(target)
    batch, pred_size, _ = pred.shape
    target_size = target.shape[1]
    dtype = compute_dtype(pred, target)
    reduced = reduction != "none"
    divisor = 1.0 if reduction != "mean" else float(batch if avg_factor is None else avg_factor)

    buckets = tuning.bucket(pred_size), tuning.bucket(target_size)
    if INTERPRETED:
        layout = tuning.interpreter_layout(*buckets, batch)
    else:
        layout = tuning.layout(*buckets, batch >= tuning.LARGE_BATCH)
    programs = min(-(-batch // layout.polygons), tuning.MAX_PROGRAMS)

    loss = torch.empty(() if reduced else (batch,), dtype=dtype, device=device)
    grad = torch.empty((batch, pred_size, 2), dtype=dtype, device=device) if need_grad else None
    partial, counter = _reduction_scratch(device, dtype) if reduced else (None, None)
    pred_mode, pred_real, pred_real_strides = _real(pred_real)
    target_mode, target_real, target_real_strides = _real(target_real)
    pred_stride_b, pred_stride_n, _ = pred.stride()
    target_stride_b, target_stride_n, _ = target.stride()
    flags = (
        _COMPUTE[dtype],
        need_grad,
        reduced,
        _AXIS_WEIGHTS[axis_weight],
        axis_grad,
        convexity_weight > 0,
        pred_mode,
        target_mode,
        pred_stride_n == 2 and target_stride_n == 2,
        *layout[:4],
    )
    arguments = (
        pred, target, pred_real, target_real, weight, loss, grad, partial, counter,
        pred_stride_b // 2, pred_stride_n // 2, target_stride_b // 2, target_stride_n // 2,
        *pred_real_strides, *target_real_strides, 0 if weight is None else weight.stride(0),
        batch, pred_size, target_size, divisor, float(convexity_weight),
        *flags,
    )  # fmt: skip
    key = (
        device.index,
        pred.dtype,
        target.dtype,
        None if pred_real is None else pred_real.dtype,
        None if target_real is None else target_real.dtype,
        None if weight is None else weight.dtype,
        flags,
    )
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = mgiou_kernel[(programs,)](*arguments, num_warps=layout.num_warps)
        if not INTERPRETED:
            _compiled[key] = compiled
    else:
        compiled[programs, 1, 1](*arguments)
    return loss, grad


def _addressable(vertices: Tensor) -> Tensor:
    """`vertices`, or a copy where a vertex cannot be loaded as one aligned word."""
    stride_b, stride_n, stride_c = vertices.stride()
    word = 2 * vertices.element_size()
    aligned = stride_b % 2 == 0 and stride_n % 2 == 0 and vertices.data_ptr() % word == 0
    if stride_c == 1 and aligned and stride_n * vertices.shape[1] < 2**31:
        return vertices
    return vertices.clone(memory_format=torch.contiguous_format)


def _real(real: Tensor | None) -> tuple[int, Tensor | None, tuple[int, int]]:
    """Mode, tensor and strides of what says which vertices are real."""
    if real is None:
        return _ALL, None, (0, 0)
    if real.dtype == torch.bool:
        return _MASK, real.view(torch.uint8), (real.stride(0), real.stride(1))
    return _LENGTHS, real, (real.stride(0), 0)


def _reduction_scratch(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for partial sums, and a zero counter, that no other launch uses at the same time."""
    if INTERPRETED or torch.cuda.is_current_stream_capturing():
        return _new_scratch(device, dtype)  # a graph may be replayed on any stream
    key = (device.index, torch.cuda.current_stream(device).cuda_stream, dtype)
    scratch = _scratch.get(key)
    if scratch is None:
        scratch = _scratch[key] = _new_scratch(device, dtype)
    return scratch


def _new_scratch(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(tuning.MAX_PROGRAMS, dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


@torch.library.custom_op("triton_mgiou::loss", mutates_args=())
def _operator(
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
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for torch.compile: loss and gradients; a gradient that is not asked for is empty."""
    options = (pred_real, target_real, weight, reduction, avg_factor, axis_weight, axis_grad, convexity_weight)
    loss, *grads = _loss_and_grads(pred, target, *options, pred_grad, target_grad)
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
