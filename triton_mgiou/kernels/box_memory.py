"""Load and store the numbers of boxes.

A lane has one box, or four. Where its numbers fill vectors of four, and all of them are in the batch, they are loaded
and stored as such: tiles of (LANES, 4), which a lane takes apart. Of four boxes that do not, a tile has one number of
each: few accesses, as each makes the compiler walk through the whole kernel. Other tiles are (LANES,).
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.box_types import CORNERS3D


@triton.jit
def load(source, lanes, batch, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers of a lane's boxes, one box after the other; 0 behind the batch."""
    numbers = ()
    if V.PACKED and V.NUMBERS % 4 == 0:  # a box fills vectors
        inside = (lanes < batch)[:, None]
        for vector in tl.static_range(V.VECTORS):
            four = tl.load(source.ptr + _vector(lanes, vector, V), mask=inside, other=0.0)
            numbers = numbers + _apart(four.to(COMPUTE))
    elif V.ROWS == 1:
        for number in tl.static_range(V.NUMBERS):
            offsets = _offsets(lanes, number, source, V)
            numbers = numbers + (tl.load(source.ptr + offsets, mask=lanes < batch, other=0.0).to(COMPUTE),)
    else:
        index = _four_boxes(lanes)
        columns = ()
        for number in tl.static_range(V.NUMBERS):
            offsets = _offsets(index, number, source, V)
            columns = columns + _apart(tl.load(source.ptr + offsets, mask=index < batch, other=0.0).to(COMPUTE))
        for row in tl.static_range(4):
            for number in tl.static_range(V.NUMBERS):
                numbers = numbers + (columns[4 * number + row],)
    return numbers


@triton.jit
def load_whole(source, lanes, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The same where all are in the batch and packed, so that four numbers are one access."""
    numbers = ()
    for vector in tl.static_range(V.VECTORS):
        numbers = numbers + _apart(tl.load(source.ptr + _vector(lanes, vector, V)).to(COMPUTE))
    return numbers


@triton.jit
def store(ptr, lanes, numbers, batch, V: tl.constexpr):
    """The reverse of `load`, packed."""
    if V.NUMBERS % 4 == 0:
        inside = (lanes < batch)[:, None]
        for vector in tl.static_range(V.VECTORS):
            tl.store(ptr + _vector(lanes, vector, V), _together(numbers, 4 * vector, 1), mask=inside)
    elif V.ROWS == 1:
        for number in tl.static_range(V.NUMBERS):
            tl.store(ptr + lanes * V.NUMBERS + number, numbers[number], mask=lanes < batch)
    else:
        index = _four_boxes(lanes)
        for number in tl.static_range(V.NUMBERS):
            tl.store(ptr + index * V.NUMBERS + number, _together(numbers, number, V.NUMBERS), mask=index < batch)


@triton.jit
def store_whole(ptr, lanes, numbers, V: tl.constexpr):
    """The reverse of `load_whole`."""
    for vector in tl.static_range(V.VECTORS):
        tl.store(ptr + _vector(lanes, vector, V), _together(numbers, 4 * vector, 1))


@triton.jit
def _vector(lanes, vector: tl.constexpr, V: tl.constexpr):
    """The places of four numbers of a lane, (LANES, 4)."""
    return (lanes * (V.ROWS * V.NUMBERS))[:, None] + 4 * vector + tl.arange(0, 4)[None, :]


@triton.jit
def _four_boxes(lanes):
    """The boxes of a lane, (LANES, 4)."""
    return (lanes * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _offsets(boxes, number: tl.constexpr, source, V: tl.constexpr):
    """Where a number of each box is in memory."""
    if V.PACKED:
        return boxes * V.NUMBERS + number
    elif V.FORMAT == CORNERS3D:
        return boxes * source.stride_b + number // 3 * source.stride_n + number % 3 * source.stride_c
    else:
        return boxes * source.stride_b + number * source.stride_n


@triton.jit
def _apart(four):
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    number_0, number_2 = tl.split(even)
    number_1, number_3 = tl.split(odd)
    return number_0, number_1, number_2, number_3


@triton.jit
def _together(numbers, first: tl.constexpr, STEP: tl.constexpr):
    even = tl.join(numbers[first], numbers[first + 2 * STEP])
    odd = tl.join(numbers[first + STEP], numbers[first + 3 * STEP])
    return tl.reshape(tl.join(even, odd), (even.shape[0], 4))


@triton.jit
def one_row(numbers, row: tl.constexpr, V: tl.constexpr):
    """The numbers of one of a lane's boxes."""
    new = ()
    for number in tl.static_range(V.NUMBERS):
        new = new + (numbers[row * V.NUMBERS + number],)
    return new
