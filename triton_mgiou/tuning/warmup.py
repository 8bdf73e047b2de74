"""`warmup`: compile and tune what training will need, before the first step."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from triton_mgiou.arguments import FLOATING, INTEGERS, check_bool, check_choice, plain_name
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.box_formats import FORMATS, KERNEL_FORMATS, PAIR_FORMATS
from triton_mgiou.functional import box_mgiou, box_mgiou_loss, mgiou_loss, polygon_mgiou
from triton_mgiou.modules import PolygonLoss
from triton_mgiou.options import Options, Reduction
from triton_mgiou.reduction import kernel_reduction
from triton_mgiou.reference.polygons import compute_dtype
from triton_mgiou.tuning import layouts, store
from triton_mgiou.tuning.store import Entry

if TYPE_CHECKING:
    from triton_mgiou.launch import Plan

LEAST_BATCH = 512  # to measure with
_POLYGONS = {"xyxyxyxy": 4, "polygons": 5}  # pairs of polygons, and vertices to measure with

_OPTIONS = [name for name in inspect.signature(mgiou_loss).parameters if name not in ("pred", "target", "backend")]
_BOX_OPTIONS = [
    name for name in inspect.signature(box_mgiou_loss).parameters if name not in ("pred", "target", "fmt", "backend")
]
_PAIR_OPTIONS = [
    name
    for name in {**inspect.signature(box_mgiou).parameters, **inspect.signature(polygon_mgiou).parameters}
    if name not in ("boxes1", "boxes2", "polygons1", "polygons2", "fmt", "backend")
]
TENSORS = {
    "pred_lengths": torch.int64,
    "target_lengths": torch.int64,
    "pred_mask": torch.bool,
    "target_mask": torch.bool,
    "weight": torch.float32,
    "lengths1": torch.int64,
    "lengths2": torch.int64,
    "mask1": torch.bool,
    "mask2": torch.bool,
}


class WarmupResult(NamedTuple):
    """One compiled variant of a kernel."""

    pred_vertices: int  # the largest count that uses it, of keypoints from 64 on any; 0 for boxes and pairs
    target_vertices: int
    batch: str  # the sizes that use it
    dtype: str
    gradient: bool
    configuration: dict[str, int]
    us: float | None  # on the GPU; None where it was not measured
    gain: float | None  # over the default configuration: 0.1 where that takes 1.1 times as long
    source: str  # "tuned", "cache" for an earlier run's file, "rank" for another rank's, or "default"
    fmt: str | None = None  # of boxes; "pairs of FMT" for a matrix, "keypoints" for the L2 term of `PolygonLoss`


def warmup(
    vertices: Iterable[int | tuple[int, int]] = (4, 8, 16),
    batch_sizes: Iterable[int] = (512, 65536),
    dtypes: Iterable[torch.dtype | tuple[torch.dtype, torch.dtype]] = (torch.float32,),
    device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
    tune: bool = True,
    boxes: Iterable[str] = (),
    box_options: Mapping[str, Any] | None = None,
    pairs: Iterable[str] = (),
    pair_sizes: Iterable[int | tuple[int, int]] = ((8400, 100),),
    pair_options: Mapping[str, Any] | None = None,
    keypoints: bool = False,
) -> list[WarmupResult]:
    """Compile the kernels that training will use, and tune them, so that no step has to wait for either.

    A variant serves all vertex counts up to the power of two N above those given, and all small or all large batches:
    large from 131072 / N on, of 8 vertices from 8192, of 32 from 3584. What is tuned goes to the cache in a file; what
    is compiled to Triton's own. Under `torch.distributed` call it on every rank, before the first step: one tunes, and
    all take the same configurations.

    Args:
        vertices: Vertex counts N, or pairs (N, M) where `target` has another count M.
        batch_sizes: Batch sizes to compile for and to measure with.
        dtypes: Input types, or pairs where `target` has another type.
        device: An NVIDIA GPU; the current one by default.
        options: Options of `mgiou_loss` as training will use them. For a tensor, its dtype, or True for the usual
            one: `{"axis_weight": "length", "target_lengths": True}`. The gradient is that to `pred`.
        tune: Measure and keep the fastest configuration of each variant; if False, compile only.
        boxes: Formats of `box_mgiou_loss` to do the same for, such as "cxcywhr"; not "xyxyxyxy", which is polygons
            of four vertices. All batch sizes share a variant. `vertices=()` leaves polygons out.
        box_options: The options of `box_mgiou_loss` as training will use them, as `options`.
        pairs: Formats of `box_mgiou` to do the same for, "polygons" for `polygon_mgiou` of any vertex counts, and
            "xyxyxyxy" for both functions with four vertices and no lengths. With the gradient to both sets, but for
            polygons. All P and T share a few variants, all of which are compiled: T a multiple of 4 or not, and a
            gradient to fewer than 4096 boxes or to more.
        pair_sizes: Sizes (P, T) of matrices to measure with, or P alone where T is as large.
        pair_options: The options of `box_mgiou` and `polygon_mgiou` as training will use them, as `options`.
        keypoints: Whether training takes the L2 term of `PolygonLoss`: compile that too, for the same vertices and
            types. It has one layout. The loss's MGIoU is that of `{"pred_mask": True, "target_mask": True}`.

    Returns:
        One result for each variant: with gradient and without, each vertex count or format, batch size and type.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong value.
        RuntimeError: The kernels cannot run on the device.
    """
    check_bool("tune", tune)
    check_bool("keypoints", keypoints)
    device = _device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    positive = Integral, "integers of 1 or above", lambda number: number >= 1
    sizes = [_integers(_checked("vertices", _pair(each), *positive)) for each in _each("vertices", vertices)]
    batches = [*_integers(_checked("batch_sizes", tuple(_each("batch_sizes", batch_sizes)), *positive))]
    floating = torch.dtype, "float16, bfloat16, float32 or float64", lambda dtype: dtype in FLOATING
    types = [_checked("dtypes", _pair(each), *floating) for each in _each("dtypes", dtypes)]
    given = _options("options", options, "mgiou_loss", _OPTIONS)
    box_given = _options("box_options", box_options, "box_mgiou_loss", _BOX_OPTIONS)
    formats = [_format("boxes", fmt, KERNEL_FORMATS) for fmt in _each("boxes", boxes)]
    pair_given = _options("pair_options", pair_options, "box_mgiou and polygon_mgiou", _PAIR_OPTIONS)
    pair_formats = [_format("pairs", fmt, (*PAIR_FORMATS, *_POLYGONS)) for fmt in _each("pairs", pairs)]
    matrices = [_integers(_checked("pair_sizes", _pair(each), *positive)) for each in _each("pair_sizes", pair_sizes)]
    reason = kernels_unavailable(device)
    if reason is not None:
        raise RuntimeError(f"warmup cannot run: {reason}; expected a GPU that can")
    from tqdm import tqdm  # noqa: PLC0415 - not with the package

    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

    variants: list[_AnyVariant] = [
        _Variant(dtype, size, batch, gradient, device, given)
        for dtype, size, batch, gradient in itertools.product(types, sizes, batches, (True, False))
    ]
    variants += [
        _BoxVariant(dtype, fmt, batch, gradient, device, box_given)
        for dtype, fmt, batch, gradient in itertools.product(types, formats, batches, (True, False))
    ]
    if keypoints:
        variants += [
            _KeypointVariant((compute_dtype(*dtype),), max(size), gradient, device, given)
            for dtype, size, gradient in itertools.product(types, sizes, (True, False))
        ]
    for dtype, fmt, size in itertools.product(types, pair_formats, matrices):
        pair = _PairVariant(dtype, fmt, size, False, device, pair_given)
        variants += [pair] if fmt in _POLYGONS else [pair, *(pair.gradient_to(side) for side in (0, 1))]
    for variant in variants:
        variant.check()
    results: dict[str, WarmupResult] = {}
    launch.forget_plans()  # their layouts may have been looked up before they were tuned
    for variant in tqdm(variants, desc="warm-up", unit="variant", disable=None):
        case, result = _tune(variant, measuring=tune)
        results.setdefault(case, result)
        for each in variant.kinds():
            each.training_step()
    return list(results.values())


class _Prepared(NamedTuple):
    """A launch: the variant of a kernel, the size that its grid is of, its arguments, and what it writes."""

    plan: Plan
    size: Any
    arguments: tuple[Any, ...]
    outputs: list[Tensor]


class _Variant(NamedTuple):
    """A variant of the kernel of polygons."""

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

    def describe(self) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        batch = max(self.batch, LEAST_BATCH)
        buckets = [layouts.bucket(n) for n in self.size]
        words = layouts.batches(buckets[0], buckets[1], layouts.is_large(batch, buckets[0], buckets[1]))
        return {"pred_vertices": buckets[0], "target_vertices": buckets[1], "batch": words, "fmt": None}

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Some convex polygons, and the options with their tensors."""
        pred, target = (
            _polygons(self.batch, n, self.device, seed).to(dtype)
            for seed, (n, dtype) in enumerate(zip(self.size, self.dtype, strict=True))
        )
        options = dict(self.options)
        for name, usual in TENSORS.items():
            kind = options.pop(name, False)
            if kind is not False:
                vertices = self.size[name.startswith("target")]
                shape = (self.batch, vertices) if name.endswith("mask") else (self.batch,)
                dtype = usual if kind is True else kind
                value = vertices if name.endswith("lengths") else 1
                if dtype in INTEGERS:
                    value = min(value, torch.iinfo(dtype).max)  # 8 bits may count fewer than there are
                options[name] = torch.full(shape, value, dtype=dtype, device=self.device)
        return pred, target, options

    def check(self) -> None:
        """Refuse options that the loss refuses, before anything is compiled for them."""
        pred, target, options = self._replace(batch=1, size=(3, 3)).inputs()
        mgiou_loss(pred, target, backend="eager", **options)

    def training_step(self) -> None:
        """Compute the loss, and its gradient if asked for."""
        pred, target, options = self.inputs()
        with torch.enable_grad():
            loss = mgiou_loss(pred.requires_grad_(self.gradient), target, backend="triton", **options)
            if self.gradient:
                loss.sum().backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> _Prepared:
        """A launch on this input, or on `LEAST_BATCH` of it."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        batch = max(self.batch, LEAST_BATCH)
        pred, target, given = self._replace(batch=batch).inputs()
        real = [given.pop(f"{side}_lengths", given.pop(f"{side}_mask", None)) for side in ("pred", "target")]
        weight, reduction, avg_factor = (given.pop(name, None) for name in ("weight", "reduction", "avg_factor"))
        inside = kernel_reduction(pred, target, weight, reduction or "mean", avg_factor)
        call = launch.PolygonCall(real[0], real[1], inside or Reduction(), Options(**given))
        plan, arguments, loss, grad = launch.prepare_polygons(pred, target, call, self.gradient, stream=0)
        return _Prepared(plan, batch, arguments, [loss] if grad is None else [loss, grad])


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

    def describe(self) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        return {"pred_vertices": 0, "target_vertices": 0, "batch": "any", "fmt": self.fmt}

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Some boxes, and the options with their tensors."""
        pred, target = (
            _boxes(self.batch, self.fmt, dtype, self.packed, self.device, seed) for seed, dtype in enumerate(self.dtype)
        )
        options = dict(self.options)
        kind = options.pop("weight", False)
        if kind is not False:
            dtype = torch.float32 if kind is True else kind
            options["weight"] = torch.ones(self.batch, dtype=dtype, device=self.device)
        return pred, target, options

    def check(self) -> None:
        """Refuse options that the loss refuses, before anything is compiled for them."""
        pred, target, options = self._replace(batch=1).inputs()
        box_mgiou_loss(pred, target, fmt=self.fmt, backend="eager", **options)

    def training_step(self) -> None:
        """Compute the loss, and its gradient if asked for."""
        pred, target, options = self.inputs()
        with torch.enable_grad():
            loss = box_mgiou_loss(pred.requires_grad_(self.gradient), target, fmt=self.fmt, backend="triton", **options)
            if self.gradient:
                loss.sum().backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> _Prepared:
        """A launch on this input, or on `LEAST_BATCH` of it."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        batch = max(self.batch, LEAST_BATCH)
        pred, target, given = self._replace(batch=batch).inputs()
        convention = given.pop("angle", "radians"), given.pop("clockwise", True)
        weight, reduction, avg_factor = (given.pop(name, None) for name in ("weight", "reduction", "avg_factor"))
        inside = kernel_reduction(pred, target, weight, reduction or "mean", avg_factor)
        options = FORMATS[self.fmt].defaults._replace(**{k: v for k, v in given.items() if v is not None})
        call = launch.BoxCall(self.fmt, *convention, inside or Reduction(), options)
        plan, arguments, loss, grad = launch.prepare_boxes(pred, target, call, self.gradient, stream=0)
        return _Prepared(plan, batch, arguments, [loss] if grad is None else [loss, grad])


class _PairVariant(NamedTuple):
    """The same for all pairs of boxes of one format, or of polygons."""

    dtype: tuple[torch.dtype, ...]
    fmt: str
    size: tuple[int, ...]
    gradient: bool  # the gradient to the first set, without the value
    device: torch.device
    options: Mapping[str, Any]
    packed: tuple[bool, bool] = (True, True)
    side: int = 0  # the set of the call that is the first one here

    def gradient_to(self, side: int) -> _PairVariant:
        """The variant of the gradient to one side, which is the first set of its launch."""
        if side == 0:
            return self._replace(gradient=True)
        swapped = {"mask1": "mask2", "mask2": "mask1"}
        options = {swapped.get(name, name): value for name, value in self.options.items()}
        return self._replace(gradient=True, dtype=self.dtype[::-1], size=self.size[::-1], options=options, side=1)

    def kinds(self) -> Iterator[_PairVariant]:
        """Itself, and those for other sizes and for boxes that do not follow each other, which are other kernels."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        if self.fmt in _POLYGONS or launch.INTERPRETED:  # the interpreter compiles nothing, and takes long
            yield self
            return
        if self.gradient:
            sizes = [(rows, 4) for rows in (layouts.MANY_BOXES - 1, layouts.MANY_BOXES)]
        else:
            sizes = [(4, columns) for columns in (4, 5)]
        for size, first, second in itertools.product(sizes, (True, False), (True, False)):
            yield self._replace(size=size, packed=(first, second))

    def describe(self) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        words = "all"
        if self.gradient:
            words = f"boxes{self.side + 1}, {'PT'[self.side]} {layouts.how_many(layouts.are_many(self.size[0]))}"
        elif self.fmt not in _POLYGONS:
            words = f"T {'' if self.size[1] % 4 == 0 else 'not '}a multiple of 4"
        return {"pred_vertices": 0, "target_vertices": 0, "batch": words, "fmt": f"pairs of {self.fmt}"}

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Two sets, without a batch, and the options with their tensors."""
        sets = []
        for seed, (count, dtype, packed) in enumerate(zip(self.size, self.dtype, self.packed, strict=True)):
            if self.fmt in _POLYGONS:
                shapes = _polygons(count, _POLYGONS[self.fmt], self.device, seed).to(dtype)
            else:
                shapes = _boxes(count, self.fmt, dtype, packed, self.device, seed)
            sets.append(shapes)
        options = dict(self.options)
        for name in ("lengths1", "lengths2", "mask1", "mask2"):
            kind = options.pop(name, False)
            if kind is not False and not (name.startswith("lengths") and self.fmt != "polygons"):
                dtype = TENSORS[name] if kind is True else kind
                value = _POLYGONS["polygons"] if name.startswith("lengths") else 1
                options[name] = torch.full((self.size[name.endswith("2")],), value, dtype=dtype, device=self.device)
        return sets[0], sets[1], options

    def check(self) -> None:
        """Refuse options that the matrix refuses, but for those of boxes where it is that of polygons."""
        first, second, options = self._replace(size=(1, 1)).inputs()
        if self.fmt in _POLYGONS:
            kept = {name: value for name, value in options.items() if name not in ("angle", "clockwise")}
            polygon_mgiou(first, second, backend="eager", **kept)
        else:
            box_mgiou(first, second, fmt=self.fmt, backend="eager", **options)

    def training_step(self) -> None:
        """Compute the matrix, or the gradient to the first set."""
        from triton_mgiou import pairs  # noqa: PLC0415 - needs Triton

        plan, launches, _ = self._prepare()
        pairs.launch_all(plan, launches)

    def prepare(self) -> _Prepared:
        """A launch on this input."""
        plan, launches, output = self._prepare()
        ((size, arguments),) = launches
        # Gradients are compared as those behind a loss are, which here is the upstream matrix: no launch changes it.
        return _Prepared(plan, size, arguments, [arguments[4], output] if self.gradient else [output])

    def _prepare(self) -> tuple[Plan, list[Any], Tensor]:
        from triton_mgiou import pairs  # noqa: PLC0415 - needs Triton

        first, second, given = self.inputs()
        first, second = first.unsqueeze(0), second.unsqueeze(0)
        mask1, mask2, lengths1, lengths2 = (
            given[name].unsqueeze(0) if name in given else None for name in ("mask1", "mask2", "lengths1", "lengths2")
        )
        over, axis_weight = given.get("over", "mean"), given.get("axis_weight", "uniform")
        if self.fmt in _POLYGONS:
            polygons = pairs.PolygonPairs(lengths1, lengths2, mask1, mask2, over, axis_weight)
            return pairs.prepare_polygons(first, second, polygons)
        convention = given.get("angle", "radians"), given.get("clockwise", True)
        call = pairs.BoxPairs(self.fmt, *convention, over, axis_weight)
        if not self.gradient:
            return pairs.prepare_values(first, second, mask1, mask2, call)
        generator = torch.Generator(self.device).manual_seed(2)
        dtype = compute_dtype(*self.dtype)
        upstream = torch.rand(1, *self.size, device=self.device, generator=generator, dtype=dtype)
        return pairs.prepare_gradient(first, second, mask1, mask2, upstream, call)


class _KeypointVariant(NamedTuple):
    """The same for the L2 term of `PolygonLoss`, which has one layout: there is nothing to measure."""

    dtype: tuple[torch.dtype]
    size: int
    gradient: bool
    device: torch.device
    options: Mapping[str, Any]
    sigmas: float | None = None

    def kinds(self) -> Iterator[_KeypointVariant]:
        """Without tolerances and with them, which are two kernels."""
        yield self
        yield self._replace(sigmas=1.0)

    def describe(self) -> dict[str, Any]:
        """The first fields of the result, and the last."""
        vertices = layouts.keypoints_of_tile(self.size)
        return {"pred_vertices": vertices, "target_vertices": vertices, "batch": "any", "fmt": "keypoints"}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A polygon, its target, which of their vertices are visible, and an area."""
        pred, target = (_polygons(1, self.size, self.device, seed).to(self.dtype[0]) for seed in (0, 1))
        ones = torch.ones_like(pred[..., 0])
        return pred, target, ones > 0, ones[:, 0]

    def check(self) -> None:
        """Refuse options that the loss of polygons refuses: this takes the same."""
        _Variant(self.dtype * 2, (3, 3), 1, self.gradient, self.device, self.options).check()

    def training_step(self) -> None:
        """Compute the term, and its gradient if asked for."""
        pred, target, visible, area = self.inputs()
        weight = area if self.options.get("weight", False) else None
        kept = {"sigmas": self.sigmas, "reduction": self.options.get("reduction", "mean"), "return_parts": False}
        loss = PolygonLoss("l2", backend="triton", **kept).to(self.device)
        with torch.enable_grad():
            value = loss(pred.requires_grad_(self.gradient), target, visible, area, weight=weight)
            if self.gradient:
                value.sum().backward()

    def prepare(self) -> _Prepared:
        """A launch on this input."""
        from triton_mgiou import launch  # noqa: PLC0415 - needs Triton

        pred, target, visible, area = self.inputs()
        call = launch.KeypointCall(visible, area, 1.0, Reduction(rule=self.options.get("reduction", "mean")))
        plan, arguments, loss, _ = launch.prepare_keypoints(pred, target, call, self.gradient, stream=0)
        return _Prepared(plan, 1, arguments, [loss])


_AnyVariant = _Variant | _BoxVariant | _KeypointVariant | _PairVariant


def _tune(variant: _AnyVariant, measuring: bool) -> tuple[str, WarmupResult]:
    """Find the layout of a variant, which the next launch will look up; what it is for, and the result."""
    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton
    from triton_mgiou.tuning import measure  # noqa: PLC0415 - needs Triton

    plan, size, arguments, outputs = variant.prepare()
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
            made, found = cache.get_or_make(plan.case, lambda: measure.fastest(plan, size, arguments, outputs))
            return "tuned" if made else "cache", found

        source, entry = _from_first_rank(find)
        cache.put(plan.case, entry)
        launch.forget_plans()
    layout = store.chosen_layout(plan.case, plan.candidates, outputs[0].get_device())
    us, default_us = (None, None) if entry is None else entry[1:]
    return plan.case, WarmupResult(
        **variant.describe(),
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


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except TypeError:
        raise TypeError(f"device must be a torch device or its name, got {type(device).__name__}") from None
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be a torch device or its name, got {device!r}: {reason}") from None


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) and len(value) == 2 else (value, value)


def _checked(
    name: str, values: tuple[Any, ...], kind: type, what: str, valid: Callable[[Any], bool]
) -> tuple[Any, ...]:
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must hold {what}, got {type(value).__name__}")
        if not valid(value):
            raise ValueError(f"{name} must hold {what}, got {value}")
    return values


def _each(name: str, values: object) -> list[Any]:
    """What an argument lists; a string lists letters."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable, such as a list, got {type(values).__name__}")
    return list(values)


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    """Integers of Python's, of which numpy's are none."""
    return tuple(map(int, values))


def _format(argument: str, fmt: Any, choices: tuple[str, ...]) -> str:
    check_choice(argument, fmt, choices)
    return plain_name(fmt)


def _options(argument: str, given: Mapping[str, Any] | None, function: str, names: list[str]) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument} must be a mapping, such as a dict, got {type(given).__name__}")
    options = dict(given or {})
    for name, value in options.items():
        if name not in names:
            raise ValueError(f"{argument} must hold options of {function} ({', '.join(names)}), got {name!r}")
        if name in TENSORS and not isinstance(value, bool | torch.dtype):
            raise TypeError(f"{argument}[{name!r}] must be a dtype or a bool, got {type(value).__name__}")
    return options


# What is measured takes the way through a kernel that most training takes: targets are convex, boxes have sizes.


def _polygons(batch: int, vertices: int, device: torch.device, seed: int) -> Tensor:
    """Convex polygons in order, on circles."""
    generator = torch.Generator(device).manual_seed(seed)
    steps = 0.5 + torch.rand(batch, vertices, device=device, generator=generator)
    angle = (steps.cumsum(1) * (2 * math.pi / steps.sum(1, keepdim=True))).unsqueeze(2)
    radius = 0.5 + 0.5 * torch.rand(batch, 1, 1, device=device, generator=generator)
    centre = torch.rand(batch, 1, 2, device=device, generator=generator)
    return centre + radius * torch.cat((angle.cos(), angle.sin()), dim=2)


def _boxes(batch: int, fmt: str, dtype: torch.dtype, packed: bool, device: torch.device, seed: int) -> Tensor:
    """Boxes, with a number between any two if they are not packed. Corners of "xyxy" are 1 apart at least."""
    generator = torch.Generator(device).manual_seed(seed)
    *rest, numbers = FORMATS[fmt].shape
    wide = numbers if packed else numbers + 1
    boxes = torch.rand(batch, *rest, wide, device=device, generator=generator) + torch.arange(wide, device=device)
    return boxes.to(dtype)[..., :numbers]
