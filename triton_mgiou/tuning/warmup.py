"""`warmup`: compile and tune what training will need, before the first step."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from triton_mgiou.arguments import check_choice
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.box_formats import FORMATS, KERNEL_FORMATS
from triton_mgiou.functional import box_mgiou_loss, mgiou_loss
from triton_mgiou.options import Options, Reduction
from triton_mgiou.reduction import kernel_reduction
from triton_mgiou.tuning import layouts, store
from triton_mgiou.tuning.store import Entry

if TYPE_CHECKING:
    from triton_mgiou.launch import Plan

LEAST_BATCH = 512  # to measure with

_OPTIONS = [name for name in inspect.signature(mgiou_loss).parameters if name not in ("pred", "target", "backend")]
_BOX_OPTIONS = [
    name for name in inspect.signature(box_mgiou_loss).parameters if name not in ("pred", "target", "fmt", "backend")
]
_TENSORS = {
    "pred_lengths": torch.int64,
    "target_lengths": torch.int64,
    "pred_mask": torch.bool,
    "target_mask": torch.bool,
    "weight": torch.float32,
}


class WarmupResult(NamedTuple):
    """One compiled variant of the kernel."""

    pred_vertices: int  # the largest count that uses it; 0 for boxes
    target_vertices: int
    batch: str
    dtype: str
    gradient: bool
    configuration: dict[str, int]
    us: float | None  # on the GPU; None where it was not measured
    gain: float | None  # over the default configuration: 0.1 where that takes 1.1 times as long
    source: str  # "tuned", "cache" for an earlier run's file, "rank" for another rank's, or "default"
    fmt: str | None = None  # of boxes


def warmup(
    vertices: Iterable[int | tuple[int, int]] = (4, 8, 16),
    batch_sizes: Iterable[int] = (512, 65536),
    dtypes: Iterable[torch.dtype | tuple[torch.dtype, torch.dtype]] = (torch.float32,),
    device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
    tune: bool = True,
    boxes: Iterable[str] = (),
    box_options: Mapping[str, Any] | None = None,
) -> list[WarmupResult]:
    """Compile the kernels that training will use, and tune them, so that no step has to wait for either.

    A variant serves all vertex counts up to the power of two N above those given, and all batch sizes on the same
    side of 131072 / N. What is tuned goes to the cache in a file; what is compiled to Triton's own. Under
    `torch.distributed` call it on every rank, before the first step: one tunes, and all take the same configurations.

    Args:
        vertices: Vertex counts N, or pairs (N, M) where `target` has another count M.
        batch_sizes: Batch sizes to compile for and to measure with.
        dtypes: Input types, or pairs where `target` has another type.
        device: An NVIDIA GPU; the current one by default.
        options: Options of `mgiou_loss` as training will use them. For a tensor, its dtype, or True for the usual
            one: `{"axis_weight": "length", "target_lengths": True}`. The gradient is that to `pred`.
        tune: Measure and keep the fastest configuration of each variant; if False, compile only.
        boxes: Formats of `box_mgiou_loss` to do the same for, such as "cxcywhr"; not "xyxyxyxy", which is polygons
            of four vertices. Batch sizes on the same side of 131072 share a variant. `vertices=()` leaves polygons out.
        box_options: The options of `box_mgiou_loss` as training will use them, as `options`.

    Returns:
        One result for each variant: with gradient and without, each vertex count or format, batch size and type.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong value.
        RuntimeError: The kernels cannot run on the device.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    positive = int, "integers of 1 or above", lambda number: number >= 1
    sizes = [_checked("vertices", _pair(each), *positive) for each in vertices]
    batches = [_checked("batch_sizes", (each,), *positive)[0] for each in batch_sizes]
    floating = torch.dtype, "floating dtypes", operator.attrgetter("is_floating_point")
    types = [_checked("dtypes", _pair(each), *floating) for each in dtypes]
    given = {} if options is None else dict(options)
    _check_options("options", given, "mgiou_loss", _OPTIONS)
    box_given = {} if box_options is None else dict(box_options)
    _check_options("box_options", box_given, "box_mgiou_loss", _BOX_OPTIONS)
    formats = list(boxes)
    for fmt in formats:
        check_choice("boxes", fmt, KERNEL_FORMATS)
    reason = kernels_unavailable(device)
    if reason is not None:
        raise RuntimeError(f"warmup cannot run: {reason}; expected a GPU that can")
    from tqdm import tqdm  # noqa: PLC0415 - not with the package

    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

    variants: list[_Variant | _BoxVariant] = [
        _Variant(dtype, size, batch, gradient, device, given)
        for dtype, size, batch, gradient in itertools.product(types, sizes, batches, (True, False))
    ]
    variants += [
        _BoxVariant(dtype, fmt, batch, gradient, device, box_given)
        for dtype, fmt, batch, gradient in itertools.product(types, formats, batches, (True, False))
    ]
    results: dict[str, WarmupResult] = {}
    launch.forget_plans()  # their layouts may have been looked up before they were tuned
    for variant in tqdm(variants, desc="warm-up", unit="variant", disable=None):
        case, result = _tune(variant, measuring=tune)
        results.setdefault(case, result)
        for each in variant.kinds():
            each.training_step()
    return list(results.values())


class _Variant(NamedTuple):
    """What one variant of the kernel is for."""

    dtype: tuple[torch.dtype, ...]
    size: tuple[int, ...]
    batch: int
    gradient: bool
    device: torch.device
    options: Mapping[str, Any]

    def kinds(self) -> Iterator[_Variant]:
        """Itself, and those for odd, even, and full rows, which are different kernels."""
        yield self
        for size in itertools.product(*(range(max(3, n - 2), n + 1) for n in map(layouts.bucket, self.size))):
            yield self._replace(size=size)

    def describe(self, batch: int) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        buckets = [layouts.bucket(n) for n in self.size]
        words = layouts.batches(buckets[0], buckets[1], layouts.is_large(batch, buckets[0], buckets[1]))
        return {"pred_vertices": buckets[0], "target_vertices": buckets[1], "batch": words, "fmt": None}

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Some star-shaped polygons, and the options with their tensors."""
        pred, target = (
            _polygons(self.batch, n, self.device, seed).to(dtype)
            for seed, (n, dtype) in enumerate(zip(self.size, self.dtype, strict=True))
        )
        options = dict(self.options)
        for name, usual in _TENSORS.items():
            kind = options.pop(name, False)
            if kind is not False:
                vertices = self.size[name.startswith("target")]
                shape = (self.batch, vertices) if name.endswith("mask") else (self.batch,)
                value = vertices if name.endswith("lengths") else 1
                dtype = usual if kind is True else kind
                options[name] = torch.full(shape, value, dtype=dtype, device=self.device)
        return pred, target, options

    def training_step(self) -> None:
        """Compute the loss, and its gradient if asked for."""
        pred, target, options = self.inputs()
        with torch.enable_grad():
            loss = mgiou_loss(pred.requires_grad_(self.gradient), target, backend="triton", **options)
            if self.gradient:
                loss.sum().backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> tuple[Plan, tuple[Any, ...], list[Tensor]]:
        """What a launch on this input is: plan, arguments and outputs."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        pred, target, given = self.inputs()
        real = [given.pop(f"{side}_lengths", given.pop(f"{side}_mask", None)) for side in ("pred", "target")]
        weight, reduction, avg_factor = (given.pop(name, None) for name in ("weight", "reduction", "avg_factor"))
        inside = kernel_reduction(pred, target, weight, reduction or "mean", avg_factor)
        call = launch.PolygonCall(real[0], real[1], inside or Reduction(None, True, None), Options(**given))
        plan, arguments, loss, grad = launch.prepare_polygons(pred, target, call, self.gradient, stream=0)
        return plan, arguments, [loss] if grad is None else [loss, grad]


class _BoxVariant(NamedTuple):
    """The same for boxes of one format."""

    dtype: tuple[torch.dtype, ...]
    fmt: str
    batch: int
    gradient: bool
    device: torch.device
    options: Mapping[str, Any]
    packed: bool = True

    def kinds(self) -> Iterator[_BoxVariant]:
        """Itself, and the one for boxes that do not follow each other, which is another kernel."""
        yield self
        yield self._replace(packed=False)

    def describe(self, batch: int) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        words = layouts.box_batches(batch >= layouts.LARGE_BOXES)
        return {"pred_vertices": 0, "target_vertices": 0, "batch": words, "fmt": self.fmt}

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Some boxes, and the options with their tensors."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = FORMATS[self.fmt].shape
        wide = (*shape[:-1], shape[-1] + (0 if self.packed else 1))
        pred, target = (
            torch.rand(self.batch, *wide, device=self.device, generator=generator).to(dtype)[..., : shape[-1]]
            for dtype in self.dtype
        )
        options = dict(self.options)
        kind = options.pop("weight", False)
        if kind is not False:
            dtype = torch.float32 if kind is True else kind
            options["weight"] = torch.ones(self.batch, dtype=dtype, device=self.device)
        return pred, target, options

    def training_step(self) -> None:
        """Compute the loss, and its gradient if asked for."""
        pred, target, options = self.inputs()
        with torch.enable_grad():
            loss = box_mgiou_loss(pred.requires_grad_(self.gradient), target, fmt=self.fmt, backend="triton", **options)
            if self.gradient:
                loss.sum().backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> tuple[Plan, tuple[Any, ...], list[Tensor]]:
        """What a launch on this input is: plan, arguments and outputs."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        pred, target, given = self.inputs()
        convention = given.pop("angle", "radians"), given.pop("clockwise", True)
        weight, reduction, avg_factor = (given.pop(name, None) for name in ("weight", "reduction", "avg_factor"))
        inside = kernel_reduction(pred, target, weight, reduction or "mean", avg_factor)
        options = FORMATS[self.fmt].defaults._replace(**{k: v for k, v in given.items() if v is not None})
        call = launch.BoxCall(self.fmt, *convention, inside or Reduction(None, True, None), options)
        plan, arguments, loss, grad = launch.prepare_boxes(pred, target, call, self.gradient, stream=0)
        return plan, arguments, [loss] if grad is None else [loss, grad]


def _tune(variant: _Variant | _BoxVariant, measuring: bool) -> tuple[str, WarmupResult]:
    """Find the layout of a variant, which the next launch will look up; what it is for, and the result."""
    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton
    from triton_mgiou.tuning import measure  # noqa: PLC0415 - needs Triton

    batch = max(variant.batch, LEAST_BATCH)
    plan, arguments, outputs = variant._replace(batch=batch).prepare()
    chip = store.chip_name(outputs[0].get_device())
    source: str = "default"
    entry: Entry | None = None
    if chip is not None:
        cache = store.tuning_cache(chip)

        def find() -> tuple[str, Entry | None]:
            found = cache.get(plan.case)
            if found is not None:
                return "cache", found
            if not measuring or len(plan.candidates) == 1:
                return "default", None
            made, found = cache.get_or_make(plan.case, lambda: measure.fastest(plan, batch, arguments, outputs))
            return "tuned" if made else "cache", found

        source, entry = _from_first_rank(find)
        cache.put(plan.case, entry)
        launch.forget_plans()
    layout = store.chosen_layout(plan.case, plan.candidates, outputs[0].get_device())
    us, default_us = (None, None) if entry is None else entry[1:]
    return plan.case, WarmupResult(
        **variant.describe(batch),
        dtype=" ".join(dict.fromkeys(str(each).removeprefix("torch.") for each in variant.dtype)),
        gradient=variant.gradient,
        configuration=layout._asdict(),
        us=us,
        gain=None if us is None or default_us is None else default_us / us - 1,
        source=source,
    )


def _from_first_rank(find: Callable[[], tuple[str, Entry | None]]) -> tuple[str, Entry | None]:
    """What `find` gives in the first process of a job, in all of them: one broadcast."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return find()
    answer: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            answer[0] = find()
        except Exception as error:  # the other ranks wait for an answer
            answer[1] = error
    distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    source, entry = answer[0]
    return source if distributed.get_rank() == 0 or source == "default" else "rank", entry


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) and len(value) == 2 else (value, value)


def _checked(
    name: str, values: tuple[Any, ...], kind: type, what: str, valid: Callable[[Any], bool]
) -> tuple[Any, ...]:
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"{name} must hold {what}, got {type(value).__name__}")
        if not valid(value):
            raise ValueError(f"{name} must hold {what}, got {value}")
    return values


def _check_options(argument: str, options: Mapping[str, Any], function: str, names: list[str]) -> None:
    for name, value in options.items():
        if name not in names:
            raise ValueError(f"{argument} must hold options of {function} ({', '.join(names)}), got {name!r}")
        if name in _TENSORS and not isinstance(value, bool | torch.dtype):
            raise TypeError(f"{argument}[{name!r}] must be a dtype or a bool, got {type(value).__name__}")


def _polygons(batch: int, vertices: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    angle = torch.arange(vertices, device=device) * (2 * math.pi / vertices)
    radius = 0.5 + 0.5 * torch.rand(batch, vertices, 1, device=device, generator=generator)
    centre = torch.rand(batch, 1, 2, device=device, generator=generator)
    return centre + radius * torch.stack((angle.cos(), angle.sin()), dim=-1)
