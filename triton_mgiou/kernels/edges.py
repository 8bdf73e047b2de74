"""From edge to edge of a polygon, and sums over its edges.

Edges come from vertices that are loaded again, so that the code's size depends neither on the vertex counts nor on the
batch; with UNROLLED they come from the slots.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import minus
from triton_mgiou.kernels.axis import UNIFORM, axis_weight, edge_axis, interval_of
from triton_mgiou.kernels.slots import add, add_scaled, highest, over_axes, put, total, zeros
from triton_mgiou.kernels.types import Edge, EdgeSums, Ends, Gradient, Handed, Measuring, Point, Step
from triton_mgiou.kernels.vertices import (
    FULL,
    MASK,
    addresses_of,
    flags_of,
    is_real,
    load_last,
    load_scaled,
    next_addresses,
    next_flags,
)


@triton.jit
def over_edges(
    ADD: tl.constexpr, sums, source, vertices, lanes, scale, context, REAL: tl.constexpr, VARIANT: tl.constexpr
):
    """`sums` after ADD(sums, edge, context, VARIANT) of every edge, VARIANT.AXES of them at a time."""
    if VARIANT.UNROLLED:
        for k in tl.static_range(len(vertices.xs)):
            sums = ADD(sums, _edge_of_slots(vertices, k, lanes.inside, scale), context, VARIANT)
    else:
        step = _start(source, vertices, lanes.axis, scale, REAL)
        for first in range(0, source.size, VARIANT.AXES):
            edge, step = _next_edge(step, source, vertices, first + lanes.axis, lanes.inside, scale, REAL, VARIANT.AXES)
            sums = ADD(sums, edge, context, VARIANT)
    return sums


@triton.jit
def _start(source, vertices, first, scale, REAL: tl.constexpr):
    """The first step.

    Addresses that a loop carries save Triton's compiler a walk through the whole kernel for each of them.
    """
    last = load_last(source, vertices, scale)
    before = addresses_of(source, tl.where(first == 0, vertices.last, first - 1))
    return Step(last, vertices.last, addresses_of(source, first), before, flags_of(source, first, REAL))


@triton.jit
def _next_edge(step, source, vertices, k, inside, scale, REAL: tl.constexpr, AXES: tl.constexpr):
    """The edges that end at vertices number k, and the next step."""
    real = is_real(source, step.flags, k, vertices.count, inside, REAL)
    end = load_scaled(source, step.addresses, real, scale)
    last = step.last
    last_index = step.last_index
    if AXES == 1:
        start, start_index = last, last_index
        last = Point(tl.where(real, end.x, last.x), tl.where(real, end.y, last.y))
        last_index = tl.where(real, k, last_index)
    else:
        start_index = tl.where(k == 0, vertices.last, k - 1)
        start_addresses = step.before
        if REAL == MASK:
            before = ()
            for slot in tl.static_range(len(vertices.places)):
                before = before + (tl.where(vertices.places[slot] < k, vertices.places[slot], -1),)
            nearest = highest(before)
            start_index = tl.where(nearest < 0, vertices.last, nearest)
            start_addresses = addresses_of(source, start_index)
        start = load_scaled(source, start_addresses, real, scale)
    addresses = next_addresses(source, step.addresses, AXES)
    before = next_addresses(source, step.addresses, AXES - 1)
    flags = next_flags(source, step.flags, AXES, REAL)
    return Edge(end, k, start, start_index, real), Step(last, last_index, addresses, before, flags)


@triton.jit
def _edge_of_slots(vertices, k: tl.constexpr, inside, scale):
    """The edge that ends at vertex k, where a lane has them all."""
    SLOTS: tl.constexpr = len(vertices.xs)
    start = _in_slot(vertices, k + SLOTS - 1, scale)
    return Edge(_in_slot(vertices, k, scale), k, start, (k + SLOTS - 1) % SLOTS, inside | True)


@triton.jit
def measure(source, vertices, shape, lanes, scale, rule, REAL: tl.constexpr, VARIANT: tl.constexpr):
    """`EdgeSums` of one side, whose vertices are in `shape` too: projections are relative to its origin.

    The edges are dealt out to all lanes of a polygon. With a mask, where it is not known which vertex is before
    another, they come by axes, and each is added by the lane that it would be dealt to: the same bits.
    """
    none = tl.zeros_like(rule.floor) + tl.zeros(lanes.lane.shape, rule.floor.dtype)
    sums = EdgeSums(none, none, none, none, none, none, none)
    if REAL == MASK:
        context = Measuring(shape.origin, rule, lanes.lane)
        sums = over_edges(_measure_edge, sums, source, vertices, lanes, scale, context, REAL, VARIANT)
    elif VARIANT.AXES == 1:
        last = load_last(source, vertices, scale)
        for slot in tl.static_range(len(vertices.xs)):
            edge, start, end = _edge_to_slot(source, vertices, shape, lanes.lane, slot, last, scale, REAL)
            sums = _add_edge(sums, edge_axis(edge, rule.floor), start, end, rule, VARIANT)
    else:
        last = load_last(source, vertices, scale)
        index = lanes.lane * VARIANT.AXES + lanes.axis
        addresses = addresses_of(source, index)
        before = addresses_of(source, index - 1)
        for _ in range(0, source.size, VARIANT.AXES * VARIANT.LANES):
            real = index < vertices.count
            end = load_scaled(source, addresses, real, scale)
            start = _neighbour(source, before, index > 0, real, last, scale)
            axis = edge_axis(Edge(end, index, start, index, real), rule.floor)
            sums = _add_edge(sums, axis, _minus(start, shape.origin), _minus(end, shape.origin), rule, VARIANT)
            index += VARIANT.AXES * VARIANT.LANES
            addresses = next_addresses(source, addresses, VARIANT.AXES * VARIANT.LANES)
            before = next_addresses(source, before, VARIANT.AXES * VARIANT.LANES)
    return EdgeSums(
        over_axes(total((sums.length,))),
        over_axes(total((sums.axes,))),
        over_axes(total((sums.weight,))),
        over_axes(total((sums.squares,))),
        over_axes(total((sums.starts,))),
        over_axes(total((sums.lows,))),
        over_axes(total((sums.highs,))),
    )


@triton.jit
def _edge_to_slot(source, vertices, shape, lane, slot: tl.constexpr, last, scale, REAL: tl.constexpr):
    """The edge that ends at the vertex of a slot, and its ends relative to the origin of `shape`."""
    SLOTS: tl.constexpr = len(vertices.xs)
    LANES: tl.constexpr = lane.shape[2]
    index = slot * LANES + lane
    if LANES == 1 and REAL == FULL:
        before: tl.constexpr = (slot + SLOTS - 1) % SLOTS
        start = _in_slot(vertices, before, scale)
        start_placed = Point(shape.xs[before], shape.ys[before])
    else:
        start = _neighbour(source, addresses_of(source, index - 1), index > 0, vertices.real[slot], last, scale)
        start_placed = _minus(start, shape.origin)
    edge = Edge(_in_slot(vertices, slot, scale), index, start, index, vertices.real[slot])
    return edge, start_placed, Point(shape.xs[slot], shape.ys[slot])


@triton.jit
def _minus(point, origin):
    return Point(point.x - origin.x, point.y - origin.y)


@triton.jit
def _in_slot(vertices, number: tl.constexpr, scale):
    """Vertex `number`, counted around, of a lane that has all of a polygon: scaled but not moved."""
    SLOT: tl.constexpr = number % len(vertices.xs)
    return Point(vertices.xs[SLOT] * scale, vertices.ys[SLOT] * scale)


@triton.jit
def _neighbour(source, addresses, is_there, real, other, scale):
    """Vertices at `addresses` where they are, the `other` one elsewhere.

    No address is that of the other: the compiler would not see that those of neighbouring lanes are neighbours.
    """
    vertex = load_scaled(source, addresses, real & is_there, scale)
    return Point(tl.where(is_there, vertex.x, other.x), tl.where(is_there, vertex.y, other.y))


@triton.jit
def gradient_of_area(source, vertices, lanes, scale, REAL: tl.constexpr, VARIANT: tl.constexpr):
    """Derivatives of twice the area, to be summed over axes: for each vertex the turned diagonal of its neighbours.

    Computed where it is needed, since to keep it would take registers all along, and dealt out as edges are. With a
    mask the neighbours are not known, and edges hand them over: the same bits.
    """
    SLOTS: tl.constexpr = len(vertices.xs)
    AT_ONCE: tl.constexpr = VARIANT.AXES if VARIANT.AXES < SLOTS else SLOTS  # powers of two
    xs = ()
    ys = ()
    if REAL == MASK:
        none = tl.zeros_like(scale)
        handed = Handed(zeros(vertices.xs), zeros(vertices.ys), Point(none, none))
        handed = over_edges(_hand_neighbours, handed, source, vertices, lanes, scale, lanes.lane, REAL, VARIANT)
        for slot in tl.static_range(SLOTS):
            is_last = slot * VARIANT.LANES + lanes.lane == vertices.last
            derivative = handed_to(handed, slot, is_last, VARIANT.AXES)
            xs = xs + (tl.where(lanes.axis == slot % AT_ONCE, over_axes(derivative.x), 0.0),)
            ys = ys + (tl.where(lanes.axis == slot % AT_ONCE, over_axes(derivative.y), 0.0),)
    else:
        for turn in tl.static_range(SLOTS // AT_ONCE):
            diagonal = _diagonal(source, vertices, lanes, scale, turn, REAL, VARIANT)
            for number in tl.static_range(AT_ONCE):
                xs = xs + (tl.where(lanes.axis == number, diagonal.y, 0.0),)
                ys = ys + (tl.where(lanes.axis == number, minus(diagonal.x), 0.0),)
    return Gradient(xs, ys)


@triton.jit
def _diagonal(source, vertices, lanes, scale, turn: tl.constexpr, REAL: tl.constexpr, VARIANT: tl.constexpr):
    """From the vertex before a lane's number `turn` to the one behind it."""
    if VARIANT.AXES * VARIANT.LANES == 1 and REAL == FULL:
        start = _in_slot(vertices, turn + len(vertices.xs) - 1, scale)
        end = _in_slot(vertices, turn + 1, scale)
    else:
        index = (turn * VARIANT.AXES + lanes.axis) * VARIANT.LANES + lanes.lane
        real = index < vertices.count
        last = load_last(source, vertices, scale)
        start = _neighbour(source, addresses_of(source, index - 1), index > 0, real, last, scale)
        first = load_scaled(source, addresses_of(source, 0), vertices.count > 0, scale)
        end = _neighbour(source, addresses_of(source, index + 1), index < vertices.last, real, first, scale)
    return Point(end.x - start.x, end.y - start.y)


@triton.jit
def _hand_neighbours(handed, edge, lane, VARIANT: tl.constexpr):
    """`handed` with what one more edge tells its ends of their neighbours: the turned diagonal, to the bit."""
    ends = ends_in_slots(edge, lane, len(handed.xs), VARIANT.LANES)
    to_start = Point(tl.where(edge.real, edge.end.y, 0.0), tl.where(edge.real, minus(edge.end.x), 0.0))
    to_end = Point(tl.where(edge.real, minus(edge.start.y), 0.0), tl.where(edge.real, edge.start.x, 0.0))
    return hand_over(handed, edge, ends, to_start, to_end, VARIANT.AXES)


@triton.jit
def _measure_edge(sums, edge, measuring, VARIANT: tl.constexpr):
    turn = edge.end_index // VARIANT.AXES % VARIANT.LANES
    edge = Edge(edge.end, edge.end_index, edge.start, edge.start_index, edge.real & (turn == measuring.lane))
    origin = measuring.origin
    start, end = _minus(edge.start, origin), _minus(edge.end, origin)
    return _add_edge(sums, edge_axis(edge, measuring.rule.floor), start, end, measuring.rule, VARIANT)


@triton.jit
def _add_edge(sums, axis, start, end, rule, VARIANT: tl.constexpr):
    """`sums` with one more edge, whose ends are relative to one origin for all."""
    at_start, ends = interval_of(axis, start, end)
    length = axis.length
    if VARIANT.AXIS_WEIGHT == UNIFORM:
        length = tl.abs(axis.x) + tl.abs(axis.y)
    return EdgeSums(
        sums.length + length,
        sums.axes + axis.is_axis.to(axis.length.dtype),
        sums.weight + axis_weight(axis.length, axis.is_axis, rule.per_unit, VARIANT.AXIS_WEIGHT).value,
        tl.fma(axis.edge.x, axis.edge.x, tl.fma(axis.edge.y, axis.edge.y, sums.squares)),
        sums.starts + at_start,
        sums.lows + ends.low,
        sums.highs + ends.high,
    )


@triton.jit
def ends_in_slots(edge, lane, SLOTS: tl.constexpr, LANES: tl.constexpr):
    """Which slots hold the ends of an edge."""
    at_start = ()
    at_end = ()
    for slot in tl.static_range(SLOTS):
        index = slot * LANES + lane
        at_end = at_end + ((index == edge.end_index) & edge.real,)
        at_start = at_start + ((index == edge.start_index) & edge.real,)
    return Ends(at_start, at_end)


@triton.jit
def hand_over(handed, edge, ends, to_start, to_end, AXES: tl.constexpr):
    """Add edges' derivatives to their ends.

    One by one, each vertex is stored once: what is for an edge's end waits for the next edge's start.
    """
    if AXES == 1:
        xs = put(handed.xs, handed.pending.x + to_start.x, ends.start)
        ys = put(handed.ys, handed.pending.y + to_start.y, ends.start)
        x = tl.where(edge.real, to_end.x, handed.pending.x)
        y = tl.where(edge.real, to_end.y, handed.pending.y)
        return Handed(xs, ys, Point(x, y))
    else:
        xs = add(handed.xs, put(put(zeros(handed.xs), to_start.x, ends.start), to_end.x, ends.end))
        ys = add(handed.ys, put(put(zeros(handed.ys), to_start.y, ends.start), to_end.y, ends.end))
        return Handed(xs, ys, handed.pending)


@triton.jit
def hand_opposite(handed, edge, ends, to_end, AXES: tl.constexpr):
    """The same where an edge's start has the opposite of what its end has."""
    if AXES == 1:
        return hand_over(handed, edge, ends, Point(minus(to_end.x), minus(to_end.y)), to_end, AXES)
    else:
        signs = ()
        for slot in tl.static_range(len(handed.xs)):
            sign = tl.where(ends.end[slot], 1.0, tl.where(ends.start[slot], -1.0, 0.0))
            signs = signs + (sign.to(to_end.x.dtype),)
        xs = add_scaled(handed.xs, to_end.x, signs)
        return Handed(xs, add_scaled(handed.ys, to_end.y, signs), handed.pending)


@triton.jit
def handed_to(handed, slot: tl.constexpr, is_last, AXES: tl.constexpr):
    """What was handed to the vertices of a slot; nothing starts at the end of the last edge any more."""
    if AXES == 1:
        x = handed.xs[slot] + tl.where(is_last, handed.pending.x, 0.0)
        y = handed.ys[slot] + tl.where(is_last, handed.pending.y, 0.0)
        return Point(x, y)
    else:
        return Point(handed.xs[slot], handed.ys[slot])
