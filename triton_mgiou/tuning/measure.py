"""The fastest layout of a kernel, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from triton_mgiou.launch import INTERPRETED, Plan
from triton_mgiou.tuning.layouts import AnyLayout
from triton_mgiou.tuning.store import Entry

REPETITIONS = 20  # in a graph
SMALLEST_GAIN = 0.02  # below it is noise, and another layout would only change the last bits of a result
AGREEMENT = 1e-4  # relative, of a sample's gradient; and of the loss
NEAR_TIES = 0.01  # share of samples whose gradient rounding may decide the other way


def graph_ms(function: Callable[[], object]) -> float:
    """Milliseconds of the GPU alone: launched one by one, small batches would only show how slow the host is.

    `triton.testing.do_bench_cudagraph` captures in a mode that makes CUDA calls of other threads fail meanwhile, such
    as those of a DataLoader that pins memory.
    """
    function()  # loads the kernel, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPETITIONS):
            function()
    return float(triton.testing.do_bench(graph.replay, return_mode="median")) / REPETITIONS


def fastest(
    plan: Plan,
    size: Any,
    arguments: tuple[Any, ...],
    outputs: list[Tensor],
    milliseconds: Callable[[Callable[[], object]], float] = graph_ms,
) -> Entry:
    """Measure a plan's candidates.

    Args:
        plan: The variant of a kernel.
        size: The batch size of the arguments, or the size (B, P, T) of a matrix: what a layout's grid is of.
        arguments: The kernel's arguments before the compile-time ones.
        outputs: Those among them that it writes: the loss or matrix, and the gradient if there is one.
        milliseconds: The time that a function takes.

    Returns:
        The fastest layout that compiles, holds all it needs in registers and gives what the default gives; the default
        if none is faster.
    """
    default, *others = plan.candidates

    def run(layout: AnyLayout) -> list[Tensor]:
        plan.kernel[layout.grid(size)](*arguments, *plan.flags, **_settings(layout))
        return outputs

    def results(layout: AnyLayout) -> list[Tensor]:
        return [output.clone() for output in run(layout)]

    layouts = [default, *_that_fit(plan, arguments, others)]
    if len(layouts) == 1:
        return Entry(default._asdict(), None, None)
    us = {layout: milliseconds(lambda layout=layout: run(layout)) * 1e3 for layout in layouts}  # type: ignore[misc]
    expected = results(default)
    for layout in sorted(us, key=us.__getitem__):
        if us[layout] > us[default] * (1 - SMALLEST_GAIN):
            break
        if _same_result(results(layout), expected):
            return Entry(layout._asdict(), us[layout], us[default])
    return Entry(default._asdict(), us[default], us[default])


def _settings(layout: AnyLayout) -> dict[str, Any]:
    return layout.sizes() | layout.options()


def _that_fit(plan: Plan, arguments: tuple[Any, ...], layouts: list[AnyLayout]) -> list[AnyLayout]:
    """The layouts that compile and do not spill. Triton compiles in threads where it can (from 3.5 on)."""
    return layouts if INTERPRETED else list(_compiled_that_fit(plan, arguments, layouts))


def _compiled_that_fit(plan: Plan, arguments: tuple[Any, ...], layouts: list[AnyLayout]) -> Iterator[AnyLayout]:
    mode = getattr(triton, "AsyncCompileMode", None)
    compiled = {}
    with ThreadPoolExecutor() as pool, mode(pool, ignore_errors=True) if mode else nullcontext():
        for layout in layouts:
            with suppress(Exception):  # what a compiler may raise has no common class
                compiled[layout] = plan.kernel.warmup(*arguments, *plan.flags, grid=(1,), **_settings(layout))
    for layout, found in compiled.items():
        with suppress(Exception):  # as above: it did not compile, or needs more than the GPU has
            kernel = found.result() if hasattr(found, "result") else found
            kernel._init_handles()
            if kernel.n_spills == 0:
                yield layout


def _same_result(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether loss and gradient are the same but for rounding."""
    if not torch.allclose(actual[0], expected[0], rtol=AGREEMENT, atol=1e-6, equal_nan=True):
        return False
    for got, want in zip(actual[1:], expected[1:], strict=True):
        wrong = ~((got - want).flatten(1).norm(dim=1) <= AGREEMENT * want.flatten(1).norm(dim=1))
        if wrong.double().mean() > NEAR_TIES:
            return False
    return True
