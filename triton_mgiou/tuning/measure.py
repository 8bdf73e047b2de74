"""Which layout a case gets: the user's cache, or what stands in `tuning`; Triton's autotuner only if asked."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor

from triton_mgiou.kernels.polygons import mgiou_kernel
from triton_mgiou.tuning import layouts
from triton_mgiou.tuning.layouts import Case, Layout
from triton_mgiou.tuning.store import Entry, TuningCache, source_hash

ENVIRONMENT = "TRITON_MGIOU_AUTOTUNE"
SAMPLES = 512  # to measure with, at least
REPETITIONS = 20  # in a graph
SMALLEST_GAIN = 0.02  # below it is noise, and another layout would only change the last bits of a result
AGREEMENT = 1e-4  # relative, of a sample's gradient; and of the loss
NEAR_TIES = 0.01  # share of samples whose gradient rounding may decide the other way
WAIT_SECONDS = 300.0  # for another rank's decision

Launch = Callable[[int], None]  # on at least so many samples


class Decision(NamedTuple):
    """What a case got, and from where: "tuned", "cache", "default", or "rank" for another rank's decision."""

    case: Case
    layout: Layout
    entry: Entry | None
    source: str


class _Request(NamedTuple):
    tune: bool
    decisions: list[Decision]


_request: ContextVar[_Request | None] = ContextVar("request", default=None)
_measuring: ContextVar[bool] = ContextVar("measuring", default=False)
_agreed: dict[tuple[str, Case], Decision] = {}


@contextmanager
def requested(tune: bool) -> Iterator[list[Decision]]:
    """Tune, or do not, whatever the environment says; the decisions made meanwhile."""
    decisions: list[Decision] = []
    token = _request.set(_Request(tune, decisions))
    try:
        yield decisions
    finally:
        _request.reset(token)


def choose(case: Case, default: Layout, device: torch.device, launch: Launch) -> Layout:
    """The layout for a case, decided once in a process.

    Args:
        case: What is compiled.
        default: The layout without measurement.
        device: Of the tensors.
        launch: Launches the kernel once with the layout without measurement; what it gets is what is measured.

    Returns:
        The layout: another rank's, the cache's, one that was measured if that was asked for, or the default.
    """
    if _measuring.get():
        return default
    chip, request = chip_name(device), _request.get()
    if chip is None:
        decision = Decision(case, default, None, "default")
    else:
        tune = (os.environ.get(ENVIRONMENT) == "1" if request is None else request.tune) and not _capturing()
        decision = _agree(chip, case, lambda: _decide(chip, case, default, launch, tune))
    if request is not None:
        request.decisions.append(decision)
    return decision.layout


def chip_name(device: torch.device) -> str | None:
    """Name and compute capability, None for what is no GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm{properties.major}{properties.minor}"


@cache
def tuning_cache(chip: str) -> TuningCache:
    """The cache of a chip, read once in a process."""
    return TuningCache(chip, triton.__version__)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _decide(chip: str, case: Case, default: Layout, launch: Launch, tune: bool) -> Decision:
    stored = tuning_cache(chip)
    entry, source = stored.get(str(case)), "cache"
    if entry is None and tune and len(layouts.candidates(case)) > 1:

        def make() -> Entry:
            nonlocal source
            source = "tuned"
            return measure(*record(launch), layouts.candidates(case))

        entry = stored.get_or_make(str(case), make)
    if entry is None:
        return Decision(case, default, None, "default")
    if entry.layout not in layouts.candidates(case):
        warnings.warn(
            f"{stored.path} has a layout for {case} that this version does not know; the default has to do: "
            f"expected one of {layouts.candidates(case)}, got {entry.layout}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Decision(case, default, None, "default")
    return Decision(case, entry.layout, entry, source)


def _agree(chip: str, case: Case, decide: Callable[[], Decision]) -> Decision:
    """What `decide` gives on the first rank that asks; all other ranks take that."""
    store = _store()
    if store is None:
        return decide()
    if (chip, case) in _agreed:
        return _agreed[chip, case]
    key = f"triton_mgiou {source_hash()} {chip} {case}"
    try:
        first = store.add(f"{key} asked", 1) == 1
    except RuntimeError:  # no store: it only stands for one, as in a simulation of many ranks
        return decide()
    if first:
        try:
            decision = decide()
        except BaseException:
            store.set(key, "null")
            raise
        store.set(key, json.dumps([decision.layout, decision.entry and decision.entry[1:]]))
    else:
        decision = _decision_of_another_rank(store, key, case, decide)
    _agreed[chip, case] = decision
    return decision


def _decision_of_another_rank(store: Any, key: str, case: Case, decide: Callable[[], Decision]) -> Decision:
    until = time.monotonic() + WAIT_SECONDS
    while not store.check([key]):  # `wait` would keep the store from this process's other threads
        if time.monotonic() > until:
            warnings.warn(
                f"no rank decided on a layout for {case} within {WAIT_SECONDS:.0f} s; this rank does",
                RuntimeWarning,
                stacklevel=2,
            )
            return decide()
        time.sleep(0.02)
    text = json.loads(store.get(key))
    if text is None:  # that rank failed, and says so itself
        return decide()
    sizes, times = text
    layout = Layout(*sizes)
    return Decision(case, layout, times and Entry(layout, *times), "rank")


def _store() -> Any | None:
    """What the ranks of a job have in common, None for a single process."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()


def record(launch: Launch) -> tuple[Any, tuple[Any, ...]]:
    """The kernel, and the arguments before its layout, as `launch` gives them."""
    calls: list[tuple[Any, ...]] = []

    def hook(*arguments: Any, **_: Any) -> None:
        if _measuring.get():  # not another thread's
            calls.append(arguments)

    mgiou_kernel.add_pre_run_hook(hook)
    token = _measuring.set(True)
    try:
        launch(SAMPLES)
    finally:
        _measuring.reset(token)
        mgiou_kernel.pre_run_hooks.remove(hook)
    (arguments,) = calls
    return mgiou_kernel, arguments[: mgiou_kernel.arg_names.index("POLYGONS")]


def graph_bench(function: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds of the GPU alone: launched one by one, small batches would only show how slow the host is.

    `triton.testing.do_bench_cudagraph` captures in a mode that makes CUDA calls of other threads fail meanwhile, such
    as those of a DataLoader that pins memory.
    """
    function()  # loads the kernel, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPETITIONS):
            function()
    times: list[float] = triton.testing.do_bench(graph.replay, quantiles=quantiles)
    return [each / REPETITIONS for each in times]


def measure(
    kernel: Any, arguments: tuple[Any, ...], choices: list[Layout], do_bench: Callable[..., Any] | None = None
) -> Entry:
    """Let Triton's autotuner choose a layout.

    Args:
        kernel: The jitted function.
        arguments: All before its layout.
        choices: The default first.
        do_bench: Called with a function and the quantiles wanted of its time, in milliseconds; `graph_bench` if None.

    Returns:
        The fastest layout that compiles, holds all it needs in registers and gives what the default gives; the default
        if none is faster.
    """
    batch = arguments[kernel.arg_names.index("batch")]
    places = [kernel.arg_names.index(name) for name in ("loss_ptr", "grad_ptr")]

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (min(-(-batch // sizes["POLYGONS"]), layouts.MAX_PROGRAMS),)

    def outputs(layout: Layout) -> list[Tensor]:
        kernel[grid](*arguments, **_config(layout).all_kwargs())
        return [arguments[place].clone() for place in places if arguments[place] is not None]

    default, *others = choices
    configs = {layout: _config(layout) for layout in (default, *_that_fit(kernel, arguments, others))}
    if len(configs) == 1:
        return Entry(default, None, None)
    tuner = triton.autotune(list(configs.values()), key=[], do_bench=do_bench or graph_bench)(kernel)
    tuner[grid](*arguments)
    us = {layout: tuner.configs_timings[config][0] * 1e3 for layout, config in configs.items()}
    expected = outputs(default)
    for layout in sorted(us, key=us.__getitem__):
        if us[layout] > us[default] * (1 - SMALLEST_GAIN):
            break
        if _same_result(outputs(layout), expected):
            return Entry(layout, us[layout], us[default])
    return Entry(default, us[default], us[default])


def _config(layout: Layout) -> Any:
    options = layout.options()
    known = {name: options.pop(name) for name in ("num_warps", "maxnreg")}
    return triton.Config(layout.sizes() | options, **known)


def _that_fit(kernel: Any, arguments: tuple[Any, ...], choices: list[Layout]) -> list[Layout]:
    """Those that compile and do not spill. Triton compiles in threads where it can (from 3.5 on)."""
    if triton.knobs.runtime.interpret:
        return choices
    mode = getattr(triton, "AsyncCompileMode", None)
    compiled = {}
    with ThreadPoolExecutor() as pool, mode(pool, ignore_errors=True) if mode else nullcontext():
        for layout in choices:
            with suppress(Exception):  # what a compiler may raise has no common class
                compiled[layout] = kernel.warmup(*arguments, grid=(1,), **_config(layout).all_kwargs())
    return [layout for layout in compiled if _fits(compiled[layout])]


def _fits(compiled: Any) -> bool:
    if hasattr(compiled, "result"):
        compiled = compiled.result(ignore_errors=True)
    try:
        compiled._init_handles()
    except Exception:  # as above: None, or more than the GPU has
        return False
    return bool(compiled.n_spills == 0)


def _same_result(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether loss and gradient are the same but for rounding."""
    if not torch.allclose(actual[0], expected[0], rtol=AGREEMENT, atol=1e-6, equal_nan=True):
        return False
    for got, want in zip(actual[1:], expected[1:], strict=True):
        wrong = ~((got - want).flatten(1).norm(dim=1) <= AGREEMENT * want.flatten(1).norm(dim=1))
        if wrong.double().mean() > NEAR_TIES:
            return False
    return True
