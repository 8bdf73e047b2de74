"""The kernels as differentiable operators of PyTorch's.

A call goes to the kernel directly, through `_Loss`. What PyTorch traces (`torch.compile`, `torch.export`, fake
tensors) needs its dispatcher, and goes through an operator that is the launch. Both have the same backward.

Another kernel needs a function such as `polygon_loss`, and an operator such as `_polygon_operator`, given to
`_register`: the launch with a flat list of arguments, from `pred` and `target` to `pred_grad` and `target_grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_mgiou.launch import BoxCall, PolygonCall, loss_and_gradients
from triton_mgiou.options import Options, Reduction

_PLAIN = (Tensor, torch.nn.Parameter)  # anything else, such as a fake tensor, needs PyTorch's dispatcher
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_in_transform = torch._C._are_functorch_transforms_active
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def polygon_loss(pred: Tensor, target: Tensor, call: PolygonCall) -> Tensor:
    """The loss of polygons, B at least 1."""
    if not is_traced(pred, target):
        return _direct(pred, target, call)
    options = call.options
    weight, per_sample, divisor = call.reduction
    convexity_weight, changing_convexity_weight = _constant_or_tensor(options.convexity_weight)
    boundary_weight, changing_boundary_weight = _constant_or_tensor(options.boundary_weight)
    loss: Tensor = _polygon_operator(
        pred,
        target,
        call.pred_real,
        call.target_real,
        weight,
        "none" if per_sample else "sum",
        options.axis_weight,
        options.axis_grad,
        convexity_weight,
        boundary_weight,
        changing_convexity_weight,
        changing_boundary_weight,
        *_wants_gradient(pred, target),
    )[0]
    return loss if divisor is None else loss / divisor


def box_loss(pred: Tensor, target: Tensor, call: BoxCall) -> Tensor:
    """The loss of boxes, B at least 1."""
    if not is_traced(pred, target):
        return _direct(pred, target, call)
    options = call.options
    weight, per_sample, divisor = call.reduction
    boundary_weight, changing_boundary_weight = _constant_or_tensor(options.boundary_weight)
    loss: Tensor = _box_operator(
        pred,
        target,
        weight,
        "none" if per_sample else "sum",
        call.fmt,
        call.angle,
        call.clockwise,
        options.axis_weight,
        options.axis_grad,
        boundary_weight,
        changing_boundary_weight,
        *_wants_gradient(pred, target),
    )[0]
    return loss if divisor is None else loss / divisor


def _constant_or_tensor(weight: float) -> tuple[float, Tensor | None]:
    """The weight of a term as an operator takes it: a usual one as a constant of the graph, another as a tensor.

    Another may change from step to step, and as a constant each change would compile the graph again. But a tensor has
    to be made, and as it is on the CPU, the compiler lays no CUDA graph around the operator.
    """
    for usual in (0.0, Options().boundary_weight):
        if weight == usual:
            return usual, None
    return 0.0, torch.full((), weight, dtype=torch.float64, device="cpu")


def is_traced(pred: Tensor, target: Tensor) -> bool:
    """Whether PyTorch traces the call, and so needs an operator of its dispatcher."""
    return torch.compiler.is_compiling() or type(pred) not in _PLAIN or type(target) not in _PLAIN


def _wants_gradient(pred: Tensor, target: Tensor) -> tuple[bool, bool]:
    return (pred.requires_grad, target.requires_grad) if torch.is_grad_enabled() else (False, False)


def _direct(pred: Tensor, target: Tensor, call: PolygonCall | BoxCall) -> Tensor:
    if (pred.requires_grad or target.requires_grad) and torch.is_grad_enabled():
        loss: Tensor = _Loss.apply(pred, target, call)  # type: ignore[no-untyped-call]
        return loss
    return call.launch(pred, target, False)[0]


class _Loss(torch.autograd.Function):
    """The kernel computes the gradient with the value; backward multiplies it by what comes from above."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, call: PolygonCall | BoxCall) -> Tensor:
        loss, *grads = loss_and_gradients(pred, target, call, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes = pred.dtype, target.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, upstream, not _keeps_graph()), None)


def _gradients(ctx: Any, upstream: Tensor, is_sole_owner: bool) -> tuple[Tensor | None, Tensor | None]:
    check_backward(upstream)
    (pred_grad, target_grad), (pred_dtype, target_dtype) = ctx.saved_tensors, ctx.dtypes
    return (
        None if pred_grad is None else _scaled(pred_grad, pred_dtype, upstream, is_sole_owner),
        None if target_grad is None else _scaled(target_grad, target_dtype, upstream, is_sole_owner),
    )


def check_backward(upstream: Tensor) -> None:
    """Refuse a backward pass that is to be differentiated again, or that is of many gradients at once."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'the "triton" backend has no second derivative: expected create_graph=False, '
            'got create_graph=True; use backend="eager" for double backward'
        )
    if _is_batched(upstream) or _is_in_transform():
        raise RuntimeError(
            'backend="triton" cannot run: a batch of gradients is asked for at once, and the kernels know only '
            'autograd; expected vectorize=False and is_grads_batched=False, or backend "eager"'
        )


def _scaled(grad: Tensor, dtype: torch.dtype, upstream: Tensor, is_sole_owner: bool) -> Tensor:
    """`grad` times the upstream gradient, a scalar or (B,), in the input's dtype: one launch.

    In place where nobody else sees `grad` again.
    """
    if upstream.dim() == 1:
        upstream = upstream.view(-1, *[1] * (grad.dim() - 1))
    if grad.dtype != dtype:
        return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(upstream) if is_sole_owner else grad * upstream


@torch.library.custom_op("triton_mgiou::loss", mutates_args=())
def _polygon_operator(
    pred: Tensor,
    target: Tensor,
    pred_real: Tensor | None,
    target_real: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    axis_weight: str,
    axis_grad: bool,
    convexity_weight: float,
    boundary_weight: float,
    changing_convexity_weight: Tensor | None,
    changing_boundary_weight: Tensor | None,
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch: loss and gradients; a gradient that is not asked for is empty."""
    if changing_convexity_weight is not None:
        convexity_weight = changing_convexity_weight.item()
    if changing_boundary_weight is not None:
        boundary_weight = changing_boundary_weight.item()
    options = Options(axis_weight, axis_grad, convexity_weight, boundary_weight)
    call = PolygonCall(pred_real, target_real, Reduction(weight, reduction == "none", None), options)
    loss, *grads = loss_and_gradients(pred, target, call, pred_grad, target_grad)
    pred_out, target_out = (loss.new_empty(0) if grad is None else grad for grad in grads)
    return loss, pred_out, target_out


@torch.library.custom_op("triton_mgiou::box_loss", mutates_args=())
def _box_operator(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    fmt: str,
    angle: str,
    clockwise: bool,
    axis_weight: str,
    axis_grad: bool,
    boundary_weight: float,
    changing_boundary_weight: Tensor | None,
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch: loss and gradients; a gradient that is not asked for is empty."""
    if changing_boundary_weight is not None:
        boundary_weight = changing_boundary_weight.item()
    options = Options(axis_weight, axis_grad, 0.0, boundary_weight)
    call = BoxCall(fmt, angle, clockwise, Reduction(weight, reduction == "none", None), options)
    loss, *grads = loss_and_gradients(pred, target, call, pred_grad, target_grad)
    pred_out, target_out = (loss.new_empty(0) if grad is None else grad for grad in grads)
    return loss, pred_out, target_out


def _register(operator: Any, reduction: int) -> None:
    """Tell PyTorch the shapes that an operator gives, and its backward; `reduction` is the place of that argument."""

    def shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        pred, target = inputs[:2]
        pred_grad, target_grad = inputs[-2:]
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        return (
            pred.new_empty(pred.shape[:1] if inputs[reduction] == "none" else (), dtype=dtype),
            pred.new_empty(pred.shape if pred_grad else (0,), dtype=dtype),
            pred.new_empty(target.shape if target_grad else (0,), dtype=dtype),
        )

    operator.register_fake(shapes)
    operator.register_autograd(_backward, setup_context=_save)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    grads, asked = output[1:], inputs[-2:]
    ctx.save_for_backward(*(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)))
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.arguments = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = (None, None) if upstream is None else _gradients(ctx, upstream, False)
    return (*gradients, *[None] * (ctx.arguments - 2))


_register(_polygon_operator, reduction=5)
_register(_box_operator, reduction=3)
