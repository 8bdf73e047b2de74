"""Times, memory and launches of a step, and what the machine can do at most."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Step = Callable[[], object]

REPETITION_S = 0.01  # how long one repetition of a wall time runs at least
GPU_S = 0.1  # how long the repetitions of a GPU time run in all, if there are more than three
GRAPH_STEPS = 10
FLUSH_BYTES = 2**30  # far above any L2 cache, and long enough to hide the host's part of a launch


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; on a CPU every call has ended when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_us(steps: dict[str, Step], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each step in a loop, as a training loop sees it; one number for each round.

    The steps take turns, so that a drift of the machine reaches all of them: ratios within a round are the ones to
    trust. Every other round goes backwards, and a turn begins with a repetition that does not count: after a slow step
    the next one is slower too. One number is the median of three repetitions of as many steps as take 10 ms.
    """
    counts = {}
    for name, step in steps.items():
        _loop_us(step, 1, device)
        counts[name] = max(1, min(100, round(REPETITION_S * 1e6 / _loop_us(step, 3, device))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    turns = list(steps.items())
    for _ in range(rounds):
        for name, step in turns:
            repetitions = 4 if counts[name] > 1 else 1
            counted = [_loop_us(step, counts[name], device) for _ in range(repetitions)][-3:]
            times[name].append(statistics.median(counted))
        turns.reverse()
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """How many times as long as the other a step takes, of two lists of `wall_us`: the median over the rounds."""
    return statistics.median(us / to for us, to in zip(times, base, strict=True))


def _loop_us(step: Step, count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count * 1e6


def gpu_us(step: Step) -> float:
    """Median microseconds between two CUDA events around a step, behind a flush of the L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def once() -> float:
        flush.zero_()
        return _event_us(step)

    return _median_us(once)


def graph_us(step: Step) -> float:
    """`gpu_us` of one replay of a CUDA graph of the step: without the host's part, however many launches it has."""
    return gpu_us(_captured(step, 1))


def graph_row_us(step: Step) -> float:
    """Median microseconds of a step in a CUDA graph of ten of them, with a warm L2 cache."""
    row = _captured(step, GRAPH_STEPS)
    return _median_us(lambda: _event_us(row)) / GRAPH_STEPS


def _captured(step: Step, count: int) -> Step:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # nodes of autograd on another stream that nobody needs, but that a leaf would use again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            step()
    return graph.replay


def _median_us(once: Callable[[], float]) -> float:
    """Median of up to 20 measurements after a warm-up, fewer of what takes long."""
    once()
    repetitions = max(3, min(20, round(GPU_S * 1e6 / once())))
    return statistics.median(once() for _ in range(repetitions))


def _event_us(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end) * 1e3)


def peak_bytes(step: Step) -> int:
    """Bytes of GPU memory that one step allocates at most beyond what stood before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(step: Step) -> int:
    """How many kernels, copies and fills one step puts on the GPU."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    return len(events)
