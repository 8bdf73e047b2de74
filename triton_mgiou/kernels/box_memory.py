"""Load and store the numbers of boxes.

Where the numbers of a lane's boxes fill vectors of four, they are loaded and stored as such: tiles of (LANES, 4), which
a lane takes apart. Other tiles are (LANES,).
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.box_types import CORNERS3D


@triton.jit
def _offsets(places, source, V: tl.constexpr):
    """Where numbers are in memory, by their places among all numbers of the batch."""
    if V.PACKED:
        return places
    rows = places // V.NUMBERS
    number = places % V.NUMBERS
    if V.FORMAT == CORNERS3D:
        return rows * source.stride_b + (number // 3) * source.stride_n + (number % 3) * source.stride_c
    else:
        return rows * source.stride_b + number * source.stride_n


@triton.jit
def load(source, first, batch, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of a lane's boxes, one box after the other; 0 behind the batch."""
    numbers = ()
    end = tl.full((1,), V.NUMBERS, tl.int64) * batch
    for vector in tl.static_range(V.VECTORS):
        places = first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]
        four = tl.load(source.ptr + _offsets(places, source, V), mask=places < end, other=0.0).to(COMPUTE)
        even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
        number_0, number_2 = tl.split(even)
        number_1, number_3 = tl.split(odd)
        numbers = numbers + (number_0, number_1, number_2, number_3)
    for number in tl.static_range(4 * V.VECTORS, V.ROWS * V.NUMBERS):
        places = first + number
        offsets = _offsets(places, source, V)
        numbers = numbers + (tl.load(source.ptr + offsets, mask=places < end, other=0.0).to(COMPUTE),)
    return numbers


@triton.jit
def load_whole(source, first, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The same where all are in the batch and packed, so that four numbers are one access."""
    numbers = ()
    for vector in tl.static_range(V.VECTORS):
        four = tl.load(source.ptr + first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]).to(COMPUTE)
        even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
        number_0, number_2 = tl.split(even)
        number_1, number_3 = tl.split(odd)
        numbers = numbers + (number_0, number_1, number_2, number_3)
    return numbers


@triton.jit
def store(ptr, first, numbers, batch, whole, V: tl.constexpr):
    """The reverse, packed."""
    end = tl.full((1,), V.NUMBERS, tl.int64) * batch
    for vector in tl.static_range(V.VECTORS):
        even = tl.join(numbers[4 * vector], numbers[4 * vector + 2])
        odd = tl.join(numbers[4 * vector + 1], numbers[4 * vector + 3])
        four = tl.reshape(tl.join(even, odd), (first.shape[0], 4))
        places = first[:, None] + 4 * vector + tl.arange(0, 4)[None, :]
        if V.NUMBERS % 4 != 0 and whole:
            tl.store(ptr + places, four)
        else:
            tl.store(ptr + places, four, mask=places < end)
    for number in tl.static_range(4 * V.VECTORS, V.ROWS * V.NUMBERS):
        tl.store(ptr + first + number, numbers[number], mask=first + number < end)


@triton.jit
def one_row(numbers, row: tl.constexpr, V: tl.constexpr):
    """The numbers of one of a lane's boxes."""
    new = ()
    for number in tl.static_range(V.NUMBERS):
        new = new + (numbers[row * V.NUMBERS + number],)
    return new
