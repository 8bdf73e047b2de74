"""The sum of all programs' sums, by the program that comes last: no float atomics, so same input, same bits."""

import triton
import triton.language as tl

FEW = tl.constexpr(128)  # partial sums that the last program adds at a time
MANY = tl.constexpr(1024)


@triton.jit
def _total(ptr, count, AT_ONCE: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum of `count` numbers, always in the same order."""
    index = tl.arange(0, AT_ONCE)
    sums = tl.zeros((AT_ONCE,), COMPUTE)
    for first in range(0, count, AT_ONCE):
        sums += tl.load(ptr + index, mask=index < count - first, other=0.0, cache_modifier=".cg")
        ptr += AT_ONCE
    return tl.sum(sums)


@triton.jit
def reduce_programs(loss_ptr, partial_ptr, counter_ptr, values, divisor, COMPUTE: tl.constexpr):
    """Store the sum of every program's `values` over `divisor`.

    `partial_ptr` has room for a number of each program; the counter, an int32, is 0 before and after.
    """
    programs = tl.num_programs(0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(values))
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
        if programs <= FEW:  # less to issue for one warp
            result = _total(partial_ptr, programs, FEW, COMPUTE)
        else:
            result = _total(partial_ptr, programs, MANY, COMPUTE)
        tl.store(loss_ptr, result / tl.full((), divisor, COMPUTE))
        tl.store(counter_ptr, 0)
