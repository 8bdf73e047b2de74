"""The most that a GPU can do: bytes a second of a copy, and operations a second of kernels that do one kind only.

A thread keeps 8 numbers in a ring and replaces all of them in every step, each from its neighbours: 8 operations are
in flight at a time, and the compiler can drop none.
"""

# Triton compiles these functions, not Python.
# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.measure import FLUSH_BYTES, gpu_us

THREADS = 128
PROGRAMS = 2**14
STEPS = 1024
OPERATIONS = {"multiply_add": 8, "min_max": 8, "compare_select": 16, "half_of_each": 8}  # of a thread in a step


@triton.jit
def _multiply_add(a, b, c, d, e, f, g, h, s, t):
    return (
        tl.fma(a, s, t), tl.fma(b, s, t), tl.fma(c, s, t), tl.fma(d, s, t),
        tl.fma(e, s, t), tl.fma(f, s, t), tl.fma(g, s, t), tl.fma(h, s, t),
    )  # fmt: skip


@triton.jit
def _min_max(a, b, c, d, e, f, g, h, s, t):  # noqa: ARG001
    return (
        tl.minimum(a, b), tl.maximum(b, d), tl.minimum(c, f), tl.maximum(d, e),
        tl.minimum(e, h), tl.maximum(f, a), tl.minimum(g, c), tl.maximum(h, g),
    )  # fmt: skip


@triton.jit
def _compare_select(a, b, c, d, e, f, g, h, s, t):
    return (
        tl.where(a <= b, c, s), tl.where(b <= d, e, t), tl.where(c <= f, a, s), tl.where(d <= e, h, t),
        tl.where(e <= h, g, s), tl.where(f <= a, b, t), tl.where(g <= c, d, s), tl.where(h <= g, f, t),
    )  # fmt: skip


@triton.jit
def _half_of_each(a, b, c, d, e, f, g, h, s, t):
    return (
        tl.minimum(a, b), tl.maximum(b, d), tl.minimum(c, a), tl.maximum(d, c),
        tl.fma(e, s, t), tl.fma(f, s, t), tl.fma(g, s, t), tl.fma(h, s, t),
    )  # fmt: skip


@triton.jit
def _ring(out_ptr, steps, STEP: tl.constexpr, THREADS: tl.constexpr):
    index = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    s = index.to(tl.float32) * 1e-6
    t = s + 0.5
    a, b, c, d = s + 1.0, s + 7.0, s + 5.0, s + 2.0
    e, f, g, h = s + 4.0, s + 0.0, s + 6.0, s + 3.0
    for _ in range(steps // 8):
        for _ in tl.static_range(8):
            a, b, c, d, e, f, g, h = STEP(a, b, c, d, e, f, g, h, s, t)
    tl.store(out_ptr + index, a + b + c + d + e + f + g + h)


_KINDS = {
    "multiply_add": _multiply_add,
    "min_max": _min_max,
    "compare_select": _compare_select,
    "half_of_each": _half_of_each,
}


def measure_rates() -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of each of `OPERATIONS`."""
    source = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    rates = {"copy_bytes": 2 * FLUSH_BYTES / (gpu_us(lambda: copy.copy_(source)) * 1e-6)}
    out = torch.empty(PROGRAMS * THREADS, device="cuda")
    for name, step in _KINDS.items():
        time = gpu_us(lambda step=step: _ring[(PROGRAMS,)](out, STEPS, step, THREADS, num_warps=THREADS // 32))
        rates[name] = OPERATIONS[name] * STEPS * PROGRAMS * THREADS / (time * 1e-6)
    return rates


@triton.jit
def trivial(ptr):
    """The least that a kernel can be: what its launch costs is Triton's own share."""
    tl.store(ptr, 1.0)
