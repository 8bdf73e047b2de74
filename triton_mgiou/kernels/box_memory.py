"""Load and store the numbers of boxes, one box a lane: tiles are (LANES,).

Boxes of packed numbers that fill vectors of four are loaded and stored as such: tiles of (LANES, 4), which a lane takes
apart. Other packed boxes are stored by way of (LANES, 8), where neighbouring threads have neighbouring numbers: the
compiler exchanges them. Loads need no such way, since all numbers of a box come into the cache with the first.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.box_types import CORNERS3D


@triton.jit
def load(source, first, left, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of LANES boxes from number `first` on, of which `left` are left; 0 behind them."""
    ptr = source.ptr + first * source.stride_b
    lanes = tl.arange(0, V.LANES)
    inside = lanes < left
    numbers = ()
    if V.PACKED and V.NUMBERS % 4 == 0:
        for vector in tl.static_range(V.NUMBERS // 4):
            four = tl.load(ptr + _vector(lanes, vector, V), mask=inside[:, None], other=0.0)
            numbers = numbers + _apart(four.to(COMPUTE))
    else:
        for number in tl.static_range(V.NUMBERS):
            offsets = _offsets(lanes, number, source, V)
            numbers = numbers + (tl.load(ptr + offsets, mask=inside, other=0.0).to(COMPUTE),)
    return numbers


@triton.jit
def store(ptr, first, left, numbers, V: tl.constexpr):
    """The reverse of `load`, packed."""
    ptr += first * V.NUMBERS
    if V.NUMBERS % 4 == 0:
        lanes = tl.arange(0, V.LANES)
        for vector in tl.static_range(V.NUMBERS // 4):
            tl.store(ptr + _vector(lanes, vector, V), _four(numbers, 4 * vector, 1), mask=(lanes < left)[:, None])
    else:
        # Eight boxes a row, so that a thread's addresses differ by constants. The hint makes its neighbours in a row
        # those in its warp: addresses that follow each other are what Triton looks for.
        ROWS: tl.constexpr = V.LANES // 8
        first_lane = 8 * tl.arange(0, ROWS)[:, None]
        lane, number = tl.arange(0, 64)[None, :] // 8, tl.arange(0, 64)[None, :] % 8
        places = tl.max_contiguous(V.NUMBERS * first_lane + (V.NUMBERS * lane + number), (1, 8))
        inside = (lane < left - first_lane) & (number < V.NUMBERS)
        tl.store(ptr + places, tl.reshape(_eight(numbers), (ROWS, 64)), mask=inside)


@triton.jit
def _vector(lanes, vector: tl.constexpr, V: tl.constexpr):
    """The places of four numbers of a lane, (LANES, 4)."""
    return (lanes * V.NUMBERS)[:, None] + (4 * vector + tl.arange(0, 4)[None, :])


@triton.jit
def _offsets(lanes, number: tl.constexpr, source, V: tl.constexpr):
    """Where a number of each box is in memory, from the first box on."""
    if V.PACKED:
        return lanes * V.NUMBERS + number
    elif V.FORMAT == CORNERS3D:
        return lanes * source.stride_b + number // 3 * source.stride_n + number % 3 * source.stride_c
    else:
        return lanes * source.stride_b + number * source.stride_n


@triton.jit
def _apart(four):
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    number_0, number_2 = tl.split(even)
    number_1, number_3 = tl.split(odd)
    return number_0, number_1, number_2, number_3


@triton.jit
def _four(numbers, first: tl.constexpr, STEP: tl.constexpr):
    """Every STEP-th number from the first on, as columns of (LANES, 4)."""
    even = tl.join(numbers[first], numbers[first + 2 * STEP])
    odd = tl.join(numbers[first + STEP], numbers[first + 3 * STEP])
    return tl.reshape(tl.join(even, odd), (even.shape[0], 4))


@triton.jit
def _eight(numbers):
    """Five to eight numbers as columns of (LANES, 8); what is in the last ones is not stored."""
    filled = numbers
    for _ in tl.static_range(8 - len(numbers)):
        filled = filled + (numbers[0],)
    return tl.reshape(tl.join(_four(filled, 0, 2), _four(filled, 1, 2)), (numbers[0].shape[0], 8))
