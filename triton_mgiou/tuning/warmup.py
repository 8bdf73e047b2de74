"""What to do before the first step: compile and tune what it will need, and see what runs where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import operator
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_mgiou
from triton_mgiou.functional import kernels_unavailable, mgiou_loss
from triton_mgiou.tuning import layouts, store

_OPTIONS = [name for name in inspect.signature(mgiou_loss).parameters if name not in ("pred", "target", "backend")]
_TENSORS = {
    "pred_lengths": torch.int64,
    "target_lengths": torch.int64,
    "pred_mask": torch.bool,
    "target_mask": torch.bool,
    "weight": torch.float32,
}


class WarmupResult(NamedTuple):
    """One compiled variant of the kernel."""

    pred_vertices: int  # the largest count that uses it
    target_vertices: int
    batch: str
    dtype: str
    gradient: bool
    configuration: dict[str, int]
    us: float | None  # on the GPU; None where it was not measured
    gain: float | None  # over the default configuration: 0.1 where that takes 1.1 times as long
    source: str  # "tuned", "cache" for an earlier run's file, "rank" for another rank's, or "default"


def warmup(
    vertices: Iterable[int | tuple[int, int]] = (4, 8, 16),
    batch_sizes: Iterable[int] = (512, 65536),
    dtypes: Iterable[torch.dtype | tuple[torch.dtype, torch.dtype]] = (torch.float32,),
    device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
    tune: bool = True,
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

    Returns:
        One result for each variant: with gradient and without, each vertex count, batch size and type.

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
    _check_options(given)
    reason = kernels_unavailable(device)
    if reason is not None:
        raise RuntimeError(f"warmup cannot run: {reason}; expected a GPU that can")
    from tqdm import tqdm  # noqa: PLC0415 - not with the package

    from triton_mgiou import ops  # noqa: PLC0415 - needs Triton
    from triton_mgiou.tuning import measure  # noqa: PLC0415 - needs Triton

    variants = list(itertools.product(types, sizes, batches, (True, False)))
    results: dict[Any, WarmupResult] = {}
    ops.forget_plans()  # what was planned before may have been chosen without tuning
    with tqdm(variants, desc="warm-up", unit="variant", disable=None) as progress:
        for dtype, size, batch, gradient in progress:
            with measure.requested(tune) as decisions:
                _training_step(size, dtype, batch, gradient, device, given)
            for decision in decisions:
                results.setdefault(decision.case, _result(decision, dtype, gradient))
            with measure.requested(tune=False):  # rows that are odd, even, and full are different kernels
                counts = [range(max(3, n - 2), n + 1) for n in map(layouts.bucket, size)]
                for other in itertools.product(*counts):
                    _training_step(other, dtype, batch, gradient, device, given)
    return list(results.values())


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


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"options must hold options of mgiou_loss ({', '.join(_OPTIONS)}), got {name!r}")
        if name in _TENSORS and not isinstance(value, bool | torch.dtype):
            raise TypeError(f"options[{name!r}] must be a dtype or a bool, got {type(value).__name__}")


def _training_step(
    size: tuple[int, ...],
    dtype: tuple[torch.dtype, ...],
    batch: int,
    gradient: bool,
    device: torch.device,
    options: Mapping[str, Any],
) -> None:
    """The loss of some star-shaped polygons, and its gradient if asked for."""
    pred, target = (
        _polygons(batch, n, device, seed).to(each) for seed, (n, each) in enumerate(zip(size, dtype, strict=True))
    )
    given = dict(options)
    for name, usual in _TENSORS.items():
        kind = given.pop(name, False)
        if kind is not False:
            vertices = size[name.startswith("target")]
            shape = (batch, vertices) if name.endswith("mask") else (batch,)
            value = vertices if name.endswith("lengths") else 1
            given[name] = torch.full(shape, value, dtype=usual if kind is True else kind, device=device)
    with torch.enable_grad():
        loss = mgiou_loss(pred.requires_grad_(gradient), target, backend="triton", **given)
        if gradient:
            loss.sum().backward()  # type: ignore[no-untyped-call]


def _polygons(batch: int, vertices: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    angle = torch.arange(vertices, device=device) * (2 * math.pi / vertices)
    radius = 0.5 + 0.5 * torch.rand(batch, vertices, 1, device=device, generator=generator)
    centre = torch.rand(batch, 1, 2, device=device, generator=generator)
    return centre + radius * torch.stack((angle.cos(), angle.sin()), dim=-1)


def _result(decision: Any, dtype: tuple[torch.dtype, ...], gradient: bool) -> WarmupResult:
    case, entry = decision.case, decision.entry
    measured = entry is not None and entry.us is not None
    return WarmupResult(
        case.pred_bucket,
        case.target_bucket,
        case.batch,
        " ".join(dict.fromkeys(str(each).removeprefix("torch.") for each in dtype)),
        gradient,
        decision.layout._asdict(),
        entry.us if measured else None,
        entry.default_us / entry.us - 1 if measured else None,
        decision.source,
    )


def table(results: list[WarmupResult]) -> str:
    """The results for people, a line each."""
    head = (
        "vertices",
        "batch",
        "dtype",
        "gradient",
        "polygons x axes x lanes x slots, warps, registers",
        "us",
        "gain",
        "from",
    )
    rows = [head]
    for r in results:
        c = r.configuration
        slots = "/".join(dict.fromkeys(str(c[side]) for side in ("pred_slots", "target_slots")))
        rows.append(
            (
                "/".join(dict.fromkeys((str(r.pred_vertices), str(r.target_vertices)))),
                r.batch,
                r.dtype,
                "yes" if r.gradient else "no",
                f"{c['polygons']} x {c['axes']} x {c['lanes']} x {slots}, {c['num_warps']}, {c['registers']}",
                "-" if r.us is None else f"{r.us:.1f}",
                "-" if r.gain is None else f"{r.gain:.1%}",
                r.source,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def info() -> str:
    """Versions, devices with the backend that "auto" takes there and why, and the tuning cache, a line each."""
    lines = [
        f"triton-mgiou: {triton_mgiou.__version__}",
        f"python: {platform.python_version()}, {platform.platform()}",
        f"torch: {torch.__version__}, CUDA: {torch.version.cuda or 'none in this PyTorch'}",
        f"triton: {importlib.metadata.version('triton') if importlib.util.find_spec('triton') else 'not installed'}",
    ]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        reason = kernels_unavailable(device)
        name = ""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            name = f" ({properties.name}, compute capability {properties.major}.{properties.minor}, {memory})"
        takes = "triton: the kernels can run there" if reason is None else f"eager: {reason}"
        lines.append(f'{device}{name}: backend "auto" takes {takes}')
    return "\n".join(lines + store.describe())
