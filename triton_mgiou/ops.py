"""The kernels as differentiable operators of PyTorch's.

A call goes to the kernel directly, through `_Loss`. What PyTorch traces (`torch.compile`, `torch.export`, fake
tensors) needs its dispatcher, and goes through an operator that is the launch; its derivative is `_Loss` again.

Another kernel needs a function such as `polygon_loss`, and its launch as a function of a flat list of arguments, from
`pred` and `target` to whether each gets a gradient, of which `_define_loss` makes an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from triton_mgiou.arguments import PLAIN
from triton_mgiou.launch import BoxCall, Call, PolygonCall
from triton_mgiou.options import Options, Reduction
from triton_mgiou.reference.polygons import compute_dtype, refuse_forward_mode

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_modes = torch._C._len_torch_dispatch_stack
_is_in_transform = torch._C._are_functorch_transforms_active
_without_ended_transform = torch._C._functorch.unwrap_if_dead  # of a tensor that a transform of torch.func left behind
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def polygon_loss(pred: Tensor, target: Tensor, call: PolygonCall) -> Tensor:
    """The loss of polygons, B at least 1."""
    if not needs_dispatcher(pred, target):
        return direct(pred, target, call)
    options = call.options
    weight, rule, divisor = call.reduction
    convexity_weight, changing_convexity_weight = _constant_or_tensor(options.convexity_weight)
    boundary_weight, changing_boundary_weight = _constant_or_tensor(options.boundary_weight)
    loss: Tensor = torch.ops.triton_mgiou.loss(
        pred,
        target,
        call.pred_real,
        call.target_real,
        weight,
        rule,
        options.axis_weight,
        options.axis_grad,
        convexity_weight,
        boundary_weight,
        changing_convexity_weight,
        changing_boundary_weight,
        False,
        False,
    )[0]
    return loss if divisor is None else loss / divisor


def box_loss(pred: Tensor, target: Tensor, call: BoxCall) -> Tensor:
    """The loss of boxes, B at least 1."""
    if not needs_dispatcher(pred, target):
        return direct(pred, target, call)
    options = call.options
    weight, rule, divisor = call.reduction
    boundary_weight, changing_boundary_weight = _constant_or_tensor(options.boundary_weight)
    loss: Tensor = torch.ops.triton_mgiou.box_loss(
        pred,
        target,
        weight,
        rule,
        call.fmt,
        call.angle,
        call.clockwise,
        options.axis_weight,
        options.axis_grad,
        boundary_weight,
        changing_boundary_weight,
        False,
        False,
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


def needs_dispatcher(pred: Tensor, target: Tensor) -> bool:
    """Whether the call needs PyTorch's dispatcher: it is traced, or a side is negated only when it is read.

    A mode, such as that of `make_fx`, sees the operators, but not a launch.
    """
    if torch.compiler.is_compiling() or type(pred) not in PLAIN or type(target) not in PLAIN or _modes():
        return True
    return pred.is_neg() or target.is_neg()


def direct(pred: Tensor, target: Tensor, call: Call) -> Tensor:
    """The loss of a call that does not need the dispatcher, with its derivative."""
    pred, target = _without_ended_transform(pred), _without_ended_transform(target)
    if not torch.is_grad_enabled() or not (pred.requires_grad or target.requires_grad):
        return call.launch(pred, target, False)[0]
    usual = not target.requires_grad and pred.dtype == compute_dtype(pred.dtype, target.dtype)
    loss: Tensor = (_apply_usual if usual else _apply)(pred, target, call)
    return loss


class _Loss(torch.autograd.Function):
    """The kernel computes the gradient with the value; backward multiplies it by what comes from above."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, call: Call | _TracedCall) -> Tensor:
        pred_needs, target_needs, _ = ctx.needs_input_grad
        loss, pred_grad, target_grad = call.loss_and_gradients(pred, target, pred_needs, target_needs)
        ctx.save_for_backward(pred_grad, target_grad)
        ctx.dtypes = pred.dtype, target.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        check_backward(upstream)
        (pred_grad, target_grad), (pred_dtype, target_dtype) = ctx.saved_tensors, ctx.dtypes
        in_place = not _keeps_graph() and type(upstream) is Tensor  # then nobody sees what was saved again
        return (
            None if pred_grad is None else _scaled(pred_grad, pred_dtype, upstream, in_place),
            None if target_grad is None else _scaled(target_grad, target_dtype, upstream, in_place),
            None,
        )


class _UsualLoss(torch.autograd.Function):
    """`_Loss` where `pred` alone gets a gradient, and in the type that is computed in: less Python in each step."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, call: Call) -> Tensor:
        loss, grad = call.launch(pred, target, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        check_backward(upstream)
        (grad,) = ctx.saved_tensors
        if upstream.dim() == 0 and not _keeps_graph():
            return grad.mul_(upstream), None, None
        return _scaled(grad, grad.dtype, upstream, False), None, None


# `Function.apply` but for what it does for transforms of torch.func: none is active where the kernels run.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Loss).apply
_apply_usual: Callable[..., Any] = super(torch.autograd.Function, _UsualLoss).apply


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


def _scaled(grad: Tensor, dtype: torch.dtype, upstream: Tensor, in_place: bool) -> Tensor:
    """`grad` times the upstream gradient, a scalar or (B,), in the input's dtype: one launch."""
    if upstream.dim() == 1:
        upstream = upstream.view(-1, *[1] * (grad.dim() - 1))
    if grad.dtype != dtype:
        return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(upstream) if in_place else grad * upstream


_library: Any = torch.library.Library("triton_mgiou", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    name: str, launch: Callable[..., Any], fake: Callable[..., Any], differentiable: Callable[..., Any] | None = None
) -> None:
    """Make an operator of PyTorch's.

    Args:
        name: It is `torch.ops.triton_mgiou.NAME`.
        launch: What it does; its annotations are the operator's schema.
        fake: Gives outputs of the same shapes and types, and any values.
        differentiable: The same as `launch` where a derivative is wanted. Gets, before the arguments, the operator
            without one. None for an operator that has none, and says so.

    What the compiler makes code of is a second operator, `_NAME`, without a derivative: from it to the launch PyTorch's
    dispatcher calls nothing else in Python.

    A size that compiled code did not know may turn out to be 0: then nothing is launched, and the outputs are zeros.
    """

    def launch_unless_empty(*inputs: Any) -> Any:
        refuse_forward_mode(name)
        first, second, *_ = inputs
        return launch(*inputs) if first.numel() and second.numel() else tree_map(Tensor.zero_, fake(*inputs))

    for each in (name, f"_{name}"):
        schema = torch.library.infer_schema(launch, mutates_args=(), op_name=each)
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(each, launch_unless_empty, "CompositeExplicitAutograd")
        torch.library.register_fake(f"triton_mgiou::{each}", fake, lib=_library)
    plain = getattr(torch.ops.triton_mgiou, f"_{name}").default

    def with_derivative(*arguments: Any) -> Any:
        if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return plain(*arguments)
        if differentiable is None:
            raise RuntimeError(f"triton_mgiou::{name} has no derivative: expected no input that requires a gradient")
        return differentiable(plain, *arguments)

    _library.impl(name, with_derivative, "Autograd")


def _define_loss(name: str, launch: Callable[..., tuple[Tensor, Tensor, Tensor]], reduction: int) -> None:
    """Make an operator of a loss; `reduction` is the place of that argument.

    The last two arguments say whether the gradients to `pred` and `target` are outputs, which are empty otherwise.
    A caller asks for none: autograd does, where it needs one, so that traced code is the same with and without.
    """

    def fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        pred, target, *_, pred_grad, target_grad = inputs
        dtype = compute_dtype(pred.dtype, target.dtype)
        return (
            pred.new_empty(pred.shape[:1] if inputs[reduction] == "none" else (), dtype=dtype),
            pred.new_empty(pred.shape if pred_grad else (0,), dtype=dtype),
            pred.new_empty(target.shape if target_grad else (0,), dtype=dtype),
        )

    def differentiable(plain: Callable[..., Any], *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        pred, target, *options = inputs
        call = _TracedCall(plain, options)
        loss = _Loss.apply(pred, target, call)  # type: ignore[no-untyped-call]
        return _outputs(loss, call.pred_grad, call.target_grad)

    define(name, launch, fake, differentiable)


class _TracedCall:
    """In the place of a `PolygonCall` or `BoxCall`: goes to the operator without a derivative.

    Keeps a copy of each gradient that the caller asked for, beside those that autograd needs.
    """

    def __init__(self, operator: Callable[..., Any], options: Sequence[Any]) -> None:
        self.operator = operator
        self.options = options
        self.pred_grad: Tensor | None = None
        self.target_grad: Tensor | None = None

    def loss_and_gradients(
        self, pred: Tensor, target: Tensor, pred_needs: bool, target_needs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *options, pred_asked, target_asked = self.options
        loss, pred_grad, target_grad = self.operator(
            pred, target, *options, pred_needs or pred_asked, target_needs or target_asked
        )
        self.pred_grad = pred_grad.clone() if pred_asked else None
        self.target_grad = target_grad.clone() if target_asked else None
        return loss, pred_grad if pred_needs else None, target_grad if target_needs else None


def _outputs(loss: Tensor, pred_grad: Tensor | None, target_grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What an operator returns: a gradient that is not asked for is empty. No two share memory, not even empty ones."""
    return (
        loss,
        loss.new_empty(0) if pred_grad is None else pred_grad,
        loss.new_empty(0) if target_grad is None else target_grad,
    )


def _polygon_launch(
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
    if changing_convexity_weight is not None:
        convexity_weight = changing_convexity_weight.item()
    if changing_boundary_weight is not None:
        boundary_weight = changing_boundary_weight.item()
    options = Options(axis_weight, axis_grad, convexity_weight, boundary_weight)
    call = PolygonCall(pred_real, target_real, Reduction(weight, reduction, None), options)
    return _outputs(*call.loss_and_gradients(pred, target, pred_grad, target_grad))


def _box_launch(
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
    if changing_boundary_weight is not None:
        boundary_weight = changing_boundary_weight.item()
    options = Options(axis_weight, axis_grad, 0.0, boundary_weight)
    call = BoxCall(fmt, angle, clockwise, Reduction(weight, reduction, None), options)
    return _outputs(*call.loss_and_gradients(pred, target, pred_grad, target_grad))


_define_loss("loss", _polygon_launch, reduction=5)
_define_loss("box_loss", _box_launch, reduction=3)
