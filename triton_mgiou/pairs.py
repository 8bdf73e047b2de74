"""The matrix of all pairs by the kernels: its launches, and their operators.

Value and gradient are launches of their own: the gradient is made from the upstream matrix, so that nothing of the
matrix's size is kept but itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from triton_mgiou import launch
from triton_mgiou.arguments import plain_name
from triton_mgiou.box_formats import KERNEL_FORMATS
from triton_mgiou.launch import COMPUTE, INTERPRETED, Plan
from triton_mgiou.ops import check_backward, define, needs_dispatcher
from triton_mgiou.options import AXIS_WEIGHTS, OVERS
from triton_mgiou.reference.polygons import compute_dtype
from triton_mgiou.tuning import layouts

MOST_BATCHES = 65532  # of one launch: CUDA's second and third dimensions have 65535, and parts stay aligned
MOST_SHAPES = 2**31 - 2**20  # of a set: 32 bits count them, and those that a program would take behind the last one


class BoxPairs(NamedTuple):
    """A call of the matrix of boxes, without both sets."""

    fmt: str
    angle: str
    clockwise: bool
    over: str
    axis_weight: str


class PolygonPairs(NamedTuple):
    """The same of polygons, with the rest of what belongs to the sets."""

    lengths1: Tensor | None
    lengths2: Tensor | None
    mask1: Tensor | None
    mask2: Tensor | None
    over: str
    axis_weight: str


class PairKey(NamedTuple):
    """All that decides which variant of a kernel of boxes runs."""

    device: int
    first_dtype: torch.dtype
    second_dtype: torch.dtype
    call: BoxPairs
    first_masked: bool
    second_masked: bool
    first_packed: bool
    second_packed: bool
    gradient: bool
    vectors: bool  # rows of the matrix start at multiples of four numbers; not of the gradient
    many: bool  # whether the gradient is that to many boxes


def box_matrix(boxes1: Tensor, boxes2: Tensor, mask1: Tensor | None, mask2: Tensor | None, call: BoxPairs) -> Tensor:
    """The matrix (P, T) of boxes (P, n) and (T, n), or of batches of them; no size is 0."""
    if needs_dispatcher(boxes1, boxes2):
        matrix: Tensor = torch.ops.triton_mgiou.box_matrix(boxes1, boxes2, mask1, mask2, *call)
        return matrix
    if (boxes1.requires_grad or boxes2.requires_grad) and torch.is_grad_enabled():
        matrix = _Matrix.apply(boxes1, boxes2, mask1, mask2, call, _values, _gradient)  # type: ignore[no-untyped-call]
        return matrix
    return _values(boxes1, boxes2, mask1, mask2, call)


class _Matrix(torch.autograd.Function):
    """The value by one launch, the gradient to each side by one."""

    @staticmethod
    def forward(
        ctx: Any,
        boxes1: Tensor,
        boxes2: Tensor,
        mask1: Tensor | None,
        mask2: Tensor | None,
        call: BoxPairs,
        values: Callable[..., Tensor],
        gradient: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2, mask1, mask2)
        ctx.call, ctx.gradient = call, gradient
        return values(boxes1, boxes2, mask1, mask2, call)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        check_backward(upstream)
        upstream = upstream.resolve_neg()  # the kernel reads memory
        boxes1, boxes2, mask1, mask2 = ctx.saved_tensors
        grad1 = grad2 = None
        if ctx.needs_input_grad[0]:
            grad1 = ctx.gradient(boxes1, boxes2, mask1, mask2, upstream, ctx.call)
        if ctx.needs_input_grad[1]:
            grad2 = ctx.gradient(boxes2, boxes1, mask2, mask1, upstream.transpose(-2, -1), ctx.call)
        return grad1, grad2, None, None, None, None, None


class Launch(NamedTuple):
    """One launch of a plan: the matrix's size, (B, P, T), and the kernel's arguments before the compile-time ones."""

    size: tuple[int, int, int]
    arguments: tuple[Any, ...]


def _values(boxes1: Tensor, boxes2: Tensor, mask1: Tensor | None, mask2: Tensor | None, call: BoxPairs) -> Tensor:
    plan, launches, matrix = prepare_values(boxes1, boxes2, mask1, mask2, call)
    launch_all(plan, launches)
    return matrix


def prepare_values(
    boxes1: Tensor, boxes2: Tensor, mask1: Tensor | None, mask2: Tensor | None, call: BoxPairs
) -> tuple[Plan, list[Launch], Tensor]:
    """The variant to launch, its launches, and the matrix that they write."""
    batch, rows, columns = size = _size(boxes1, boxes2, 1)
    plan = _plan(boxes1, boxes2, mask1, mask2, call, size, gradient=False)
    matrix = plan.scalar.new_empty((*boxes1.shape[:-1], columns))
    launches = []
    for part in _parts(batch):
        bytes1, bytes2 = _as_bytes(mask1, part), _as_bytes(mask2, part)
        arguments = (
            _part(boxes1, part), _part(boxes2, part), bytes1, bytes2, _part(matrix, part),
            *_strides(boxes1, 3), *_strides(boxes2, 3), *_strides(bytes1, 2), *_strides(bytes2, 2), rows, columns,
        )  # fmt: skip
        launches.append(Launch(_part_of(size, part), arguments))
    return plan, launches, matrix


def _gradient(own: Tensor, *others: Any) -> Tensor:
    """The gradient to `own`, in its type, of what `prepare_gradient` takes."""
    plan, launches, grad = prepare_gradient(own, *others)
    launch_all(plan, launches)
    return grad.to(own.dtype)


def prepare_gradient(
    own: Tensor,
    other: Tensor,
    own_mask: Tensor | None,
    other_mask: Tensor | None,
    upstream: Tensor,
    call: BoxPairs,
) -> tuple[Plan, list[Launch], Tensor]:
    """The variant to launch, its launches, and the gradient to `own` that they write, in the type that is computed in.

    The upstream matrix (own, other) may have any strides.
    """
    batch, rows, columns = size = _size(own, other, 1)
    plan = _plan(own, other, own_mask, other_mask, call, size, gradient=True)
    grad = torch.empty_like(own, dtype=plan.dtype, memory_format=torch.contiguous_format)
    largest = torch.finfo(plan.dtype).max / (1 << (columns - 1).bit_length())
    launches = []
    for part in _parts(batch):
        own_bytes, other_bytes = _as_bytes(own_mask, part), _as_bytes(other_mask, part)
        arguments = (
            _part(own, part), _part(other, part), own_bytes, other_bytes, _part(upstream, part), _part(grad, part),
            *_strides(own, 3), *_strides(other, 3), *_strides(own_bytes, 2), *_strides(other_bytes, 2),
            *_strides(upstream, 3), rows, columns, largest,
        )  # fmt: skip
        launches.append(Launch(_part_of(size, part), arguments))
    return plan, launches, grad


def polygon_matrix(polygons1: Tensor, polygons2: Tensor, call: PolygonPairs) -> Tensor:
    """The matrix (P, T) of polygons (P, N, 2) and (T, M, 2), or of batches, without a gradient; no size is 0."""
    if needs_dispatcher(polygons1, polygons2):
        matrix: Tensor = torch.ops.triton_mgiou.polygon_matrix(polygons1, polygons2, *call)
        return matrix
    return _polygon_values(polygons1, polygons2, call)


def _polygon_values(polygons1: Tensor, polygons2: Tensor, call: PolygonPairs) -> Tensor:
    plan, launches, matrix = prepare_polygons(polygons1, polygons2, call)
    launch_all(plan, launches)
    return matrix


def prepare_polygons(polygons1: Tensor, polygons2: Tensor, call: PolygonPairs) -> tuple[Plan, list[Launch], Tensor]:
    """The variant to launch, its launches, and the matrix that they write."""
    batch, rows, columns = size = _size(polygons1, polygons2, 2)
    size1, size2 = polygons1.shape[-2], polygons2.shape[-2]
    sets = (call.lengths1, call.lengths2, call.mask1, call.mask2)
    kinds = tuple(None if each is None else each.dtype for each in sets)
    corners = 4 if size1 == size2 == 4 and call.lengths1 is call.lengths2 is None else 0
    options = (call.over, call.axis_weight, corners)
    fields = (polygons1.get_device(), polygons1.dtype, polygons2.dtype, *kinds, *options)
    plan = launch.known_plan(fields)
    if plan is None:
        from triton_mgiou.kernels.polygon_pairs import polygon_pairs_kernel  # noqa: PLC0415 - who needs losses only

        dtype = compute_dtype(polygons1.dtype, polygons2.dtype)
        constants = (COMPUTE[dtype], OVERS.index(call.over), AXIS_WEIGHTS.index(call.axis_weight), corners)
        names = plain_name(call.over), plain_name(call.axis_weight)
        case = f"pairs of polygons {' '.join(map(str, (*fields[1:3], *kinds, *names, corners)))}"
        candidates = layouts.polygon_pair_candidates(corners, INTERPRETED)
        plan = launch.keep_plan(
            fields,
            Plan(polygon_pairs_kernel, constants, case, candidates, dtype, polygons1.get_device()),
        )
    matrix = plan.scalar.new_empty((*polygons1.shape[:-2], columns))
    launches = []
    for part in _parts(batch):
        lengths = [_part(each, part) for each in sets[:2]]
        masks = [_as_bytes(each, part) for each in sets[2:]]
        arguments = (
            _part(polygons1, part), _part(polygons2, part), *lengths, *masks, _part(matrix, part),
            *_strides(polygons1, 4), *_strides(polygons2, 4),
            *_strides(lengths[0], 2), *_strides(lengths[1], 2), *_strides(masks[0], 2), *_strides(masks[1], 2),
            size1, size2, rows, columns,
        )  # fmt: skip
        launches.append(Launch(_part_of(size, part), arguments))
    return plan, launches, matrix


def launch_all(plan: Plan, launches: list[Launch]) -> None:
    """Launch on the device of the plan."""
    device = plan.scalar.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch_all(plan, launches)
    for size, arguments in launches:
        plan.launch(size, 0 if device < 0 else driver.active.get_current_stream(device), arguments)
    return None


def _size(first: Tensor, second: Tensor, dimensions: int) -> tuple[int, int, int]:
    """The size of the matrix, (B, P, T); `dimensions` are those of one shape."""
    *batch, rows = first.shape[:-dimensions]
    columns = second.shape[-1 - dimensions]
    if rows > MOST_SHAPES or columns > MOST_SHAPES:  # Triton would take the lower bits of these numbers
        raise ValueError(f"each set must have at most {MOST_SHAPES} shapes for the kernels, got {rows} and {columns}")
    return batch[0] if batch else 1, rows, columns


def _parts(batch: int) -> list[slice | None]:
    """The launches that a batch takes: None for the whole one."""
    if batch <= MOST_BATCHES:
        return [None]
    return [slice(start, start + MOST_BATCHES) for start in range(0, batch, MOST_BATCHES)]


def _part_of(size: tuple[int, int, int], part: slice | None) -> tuple[int, int, int]:
    return size if part is None else (len(range(size[0])[part]), size[1], size[2])


def _part(tensor: Tensor | None, part: slice | None) -> Any:
    return tensor if tensor is None or part is None else tensor[part]


def _as_bytes(mask: Tensor | None, part: slice | None) -> Tensor | None:
    return None if mask is None else _part(mask, part).view(torch.uint8)


def _strides(values: Tensor | None, count: int) -> tuple[int, ...]:
    """0 over the batch where there is none."""
    if values is None:
        return (0,) * count
    strides = values.stride()
    return strides if len(strides) == count else (0, *strides)


def _is_packed(boxes: Tensor) -> bool:
    """Whether the boxes of each sample follow each other, and 32 bits count their numbers."""
    rows, numbers = boxes.shape[-2:]
    return boxes.stride(-1) == 1 and (boxes.stride(-2) == numbers or rows == 1) and rows * numbers < 2**31


def _plan(
    first: Tensor,
    second: Tensor,
    first_mask: Tensor | None,
    second_mask: Tensor | None,
    call: BoxPairs,
    size: tuple[int, int, int],
    gradient: bool,
) -> Plan:
    fields = (
        first.get_device(),
        first.dtype,
        second.dtype,
        call,
        first_mask is not None,
        second_mask is not None,
        _is_packed(first),
        _is_packed(second),
        gradient,
        not gradient and size[2] % 4 == 0,
        gradient and layouts.are_many(size[0] * size[1]),
    )
    plan = launch.known_plan(fields)
    return launch.keep_plan(fields, pair_plan(PairKey(*fields))) if plan is None else plan


def pair_plan(key: PairKey) -> Plan:
    """The variant of a kernel, not yet compiled."""
    dtype = compute_dtype(key.first_dtype, key.second_dtype)
    constants = {
        "COMPUTE": COMPUTE[dtype],
        "FORMAT": KERNEL_FORMATS.index(key.call.fmt),
        "DEGREES": key.call.angle == "degrees",
        "CLOCKWISE": key.call.clockwise,
        "OVER": OVERS.index(key.call.over),
        "AXIS_WEIGHT": AXIS_WEIGHTS.index(key.call.axis_weight),
        "PACKED1": key.first_packed,
        "PACKED2": key.second_packed,
    }
    if not key.gradient:
        constants["VECTORS"] = key.vectors
    candidates = (
        layouts.pair_gradient_candidates(key.many, INTERPRETED)
        if key.gradient
        else layouts.pair_candidates(key.vectors, INTERPRETED)
    )
    masks = f"masks {key.first_masked:d}{key.second_masked:d}"
    flags = (f"{key.first_dtype} {key.second_dtype} {masks}", *(f"{name}={value}" for name, value in constants.items()))
    kind = f"gradient of pairs to {layouts.how_many(key.many)}" if key.gradient else "pairs of"
    case = f"{kind} boxes {plain_name(key.call.fmt)}, {' '.join(flags)}"
    if key.gradient:
        from triton_mgiou.kernels.pairs_gradient import box_pairs_gradient_kernel as kernel  # noqa: PLC0415 - as above
    else:
        from triton_mgiou.kernels.pairs import box_pairs_kernel as kernel  # noqa: PLC0415
    return Plan(kernel, tuple(constants.values()), case, candidates, dtype, key.device)


def _box_launch(
    boxes1: Tensor,
    boxes2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    fmt: str,
    angle: str,
    clockwise: bool,
    over: str,
    axis_weight: str,
) -> Tensor:
    return _values(boxes1, boxes2, mask1, mask2, BoxPairs(fmt, angle, clockwise, over, axis_weight))


def _box_gradient_launch(
    own: Tensor,
    other: Tensor,
    own_mask: Tensor | None,
    other_mask: Tensor | None,
    upstream: Tensor,
    fmt: str,
    angle: str,
    clockwise: bool,
    over: str,
    axis_weight: str,
) -> Tensor:
    call = BoxPairs(fmt, angle, clockwise, over, axis_weight)
    return _gradient(own, other, own_mask, other_mask, upstream, call)


def _polygon_launch(
    polygons1: Tensor,
    polygons2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    mask1: Tensor | None,
    mask2: Tensor | None,
    over: str,
    axis_weight: str,
) -> Tensor:
    return _polygon_values(polygons1, polygons2, PolygonPairs(lengths1, lengths2, mask1, mask2, over, axis_weight))


def _box_matrix_like(first: Tensor, second: Tensor, *_: Any) -> Tensor:
    return first.new_empty((*first.shape[:-1], second.shape[-2]), dtype=compute_dtype(first.dtype, second.dtype))


def _polygon_matrix_like(first: Tensor, second: Tensor, *_: Any) -> Tensor:
    return first.new_empty((*first.shape[:-2], second.shape[-3]), dtype=compute_dtype(first.dtype, second.dtype))


def _gradient_like(own: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(own, memory_format=torch.contiguous_format)


def _differentiable_boxes(plain: Callable[..., Tensor], *inputs: Any) -> Tensor:
    def values(*given: Any) -> Tensor:
        return plain(*given[:-1], *given[-1])

    def gradient(*given: Any) -> Tensor:
        found: Tensor = torch.ops.triton_mgiou.box_matrix_gradient(*given[:-1], *given[-1])
        return found

    matrix: Tensor = _Matrix.apply(*inputs[:4], BoxPairs(*inputs[4:]), values, gradient)  # type: ignore[no-untyped-call]
    return matrix


define("box_matrix", _box_launch, _box_matrix_like, _differentiable_boxes)
define("box_matrix_gradient", _box_gradient_launch, _gradient_like)
define("polygon_matrix", _polygon_launch, _polygon_matrix_like)
