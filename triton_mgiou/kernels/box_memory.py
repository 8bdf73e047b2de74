"""Load and store the numbers of boxes, one box a lane: tiles are (LANES,).

Boxes of packed numbers that fill vectors of four are loaded and stored as such: tiles of (LANES, 4), which a lane takes
apart. Other packed boxes are stored by way of (LANES, 8), where neighbouring threads have neighbouring numbers: the
compiler exchanges them. Loads need no such way, since all numbers of a box come into the cache with the first.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.box_types import CORNERS3D


@triton.jit
def addresses_of(source, first, batch, V: tl.constexpr):
    """Where the numbers of LANES boxes from number `first` on are; of the last box where there are none any more."""
    stride = V.NUMBERS if V.PACKED else source.stride_b
    lanes = tl.minimum(tl.arange(0, V.LANES), (batch - first).to(tl.int32) - 1)
    boxes = source.ptr + first * stride + lanes * stride
    addresses = ()
    if V.PACKED and V.NUMBERS % 4 == 0:
        for vector in tl.static_range(V.NUMBERS // 4):
            addresses = addresses + (boxes[:, None] + (4 * vector + tl.arange(0, 4)[None, :]),)
    else:
        for number in tl.static_range(V.NUMBERS):
            addresses = addresses + (boxes + _offset(number, source, V),)
    return addresses


@triton.jit
def load(addresses, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of boxes, by fours where there are fewer addresses than numbers."""
    numbers = ()
    for place in tl.static_range(len(addresses)):
        loaded = tl.load(addresses[place]).to(COMPUTE)
        numbers = numbers + (_apart(loaded) if len(addresses) < V.NUMBERS else (loaded,))
    return numbers


@triton.jit
def store(ptr, first, left, numbers, FULL: tl.constexpr, V: tl.constexpr):
    """The reverse of `load`, packed. FULL: at least LANES are left."""
    ptr += first * V.NUMBERS
    if V.NUMBERS % 4 == 0:
        lanes = tl.arange(0, V.LANES)
        for vector in tl.static_range(V.NUMBERS // 4):
            four = _four(numbers, 4 * vector, 1)
            if FULL:
                tl.store(ptr + _vector(lanes, vector, V), four)
            else:
                tl.store(ptr + _vector(lanes, vector, V), four, mask=(lanes < left)[:, None])
    else:
        # Eight boxes a row, so that a thread's addresses differ by constants. Columns that a box does not fill store
        # its last number once more, which takes less than a mask. The hint makes neighbours in a row those in a warp:
        # addresses that follow each other are what Triton looks for. It does not hold for those columns, but no thread
        # stores more than a number at a time, since no more are aligned.
        ROWS: tl.constexpr = V.LANES // 8
        first_lane = 8 * tl.arange(0, ROWS)[:, None]
        lane, number = tl.arange(0, 64)[None, :] // 8, tl.minimum(tl.arange(0, 64)[None, :] % 8, V.NUMBERS - 1)
        places = tl.max_contiguous(V.NUMBERS * first_lane + (V.NUMBERS * lane + number), (1, 4))
        rows = tl.reshape(_eight(numbers), (ROWS, 64))
        if FULL:
            tl.store(ptr + places, rows)
        else:
            tl.store(ptr + places, rows, mask=lane < left - first_lane)


@triton.jit
def _vector(lanes, vector: tl.constexpr, V: tl.constexpr):
    """The places of four numbers of a lane, (LANES, 4)."""
    return (lanes * V.NUMBERS)[:, None] + (4 * vector + tl.arange(0, 4)[None, :])


@triton.jit
def _offset(number: tl.constexpr, source, V: tl.constexpr):
    """Where a number of a box is in memory, from its first on."""
    if V.PACKED:
        return number
    elif V.FORMAT == CORNERS3D:
        return number // 3 * source.stride_n + number % 3 * source.stride_c
    else:
        return number * source.stride_n


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
    """Five to eight numbers as columns of (LANES, 8); the last one fills what is left."""
    filled = numbers
    for _ in tl.static_range(8 - len(numbers)):
        filled = filled + (numbers[len(numbers) - 1],)
    return tl.reshape(tl.join(_four(filled, 0, 2), _four(filled, 1, 2)), (numbers[0].shape[0], 8))
