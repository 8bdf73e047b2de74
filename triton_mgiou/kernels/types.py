"""What the functions of the kernels hand to each other.

A tile is a tensor of shape (POLYGONS, AXES, LANES), or one that broadcasts to it: (POLYGONS, AXES, 1) is the same for
all lanes. Slots are a tuple of tiles, one for each vertex that a lane keeps in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

Slots = tuple[tl.tensor, ...]


class Variant(NamedTuple):
    """What is decided at compile time. Handed on as a `tl.constexpr`, since a tuple of its own makes tensors of it."""

    TINY: float
    GRAD: bool
    AXIS_WEIGHT: int
    AXIS_GRAD: bool
    CONVEXITY: bool
    BOUNDARY: bool
    AXES: int
    LANES: int
    UNROLLED: bool  # whether edges come from the slots, and no loop


class Point(NamedTuple):
    """A point, a vector or a gradient."""

    x: tl.tensor
    y: tl.tensor


class Interval(NamedTuple):
    """The ends of an interval, or derivatives to them."""

    low: tl.tensor
    high: tl.tensor


class Side(NamedTuple):
    """One side in memory. Strides of vertices count vertices, not numbers."""

    vertices_ptr: tl.tensor
    stride_b: tl.tensor  # over the batch
    stride: tl.tensor
    size: tl.tensor
    real_ptr: tl.tensor  # lengths, or a mask; anything where there is none
    real_stride_b: tl.tensor
    real_stride: tl.tensor


class Source(NamedTuple):
    """Where the vertices of one side of some samples are in memory. Offsets count vertices too."""

    vertices_ptr: tl.tensor
    first: tl.tensor  # (POLYGONS, AXES, 1), the offset of vertex 0
    stride: tl.tensor
    size: tl.tensor
    real_ptr: tl.tensor  # lengths, or a mask; anything where there is none
    real_first: tl.tensor
    real_stride: tl.tensor


class Addresses(NamedTuple):
    """Where a lane's vertices of one side are."""

    vertices: Slots
    flags: Slots  # their elements of the mask; anything where there is none


class Vertices(NamedTuple):
    """The vertices of one side as they were loaded."""

    xs: Slots
    ys: Slots
    real: Slots
    places: Slots  # the index of each real vertex, or -1
    count: tl.tensor  # of real vertices
    last: tl.tensor  # the index of the last one


class Frame(NamedTuple):
    """What a sample is scaled and moved by (section 6)."""

    scale: tl.tensor  # a power of two; NaN where a vertex is NaN or Inf
    low: Point  # the lower corner of the joint bounding box, scaled
    extent: tl.tensor  # its longer side, scaled
    pred_extent: tl.tensor  # the same of P's own bounding box
    target_extent: tl.tensor
    target_around: tl.tensor  # the perimeter of the target's bounding box, scaled
    poison: tl.tensor  # 0, or NaN where a vertex is NaN or Inf


class Placed(NamedTuple):
    """Vertices in units of the sample's scale, relative to an origin."""

    xs: Slots
    ys: Slots
    pads: Slots  # 0, or NaN where no real vertex is: added to projections, which `min`, `max` and `==` then pass over
    origin: Point


class Lanes(NamedTuple):
    """Which part of the work is whose."""

    axis: tl.tensor  # (1, AXES, 1), the number among the axes taken at a time
    lane: tl.tensor  # (1, 1, LANES)
    inside: tl.tensor  # (POLYGONS, AXES, 1), False behind the batch


class Step(NamedTuple):
    """A step from edge to edge: what it takes over from the one before."""

    last: Point  # the last real vertex so far
    last_index: tl.tensor
    addresses: tl.tensor  # where the next vertices are
    before: tl.tensor  # where those before them are, where every vertex is real
    flags: tl.tensor  # where their part of the mask is


class Edge(NamedTuple):
    """An edge by its two ends, in units of the sample's scale."""

    end: Point
    end_index: tl.tensor
    start: Point
    start_index: tl.tensor
    real: tl.tensor


class Ends(NamedTuple):
    """Which slots hold the two ends of an edge."""

    start: Slots
    end: Slots


class AxisRule(NamedTuple):
    """Which edges are axes, and in what unit their lengths are measured (section 3)."""

    floor: tl.tensor  # the squared length of an axis is above this
    per_unit: tl.tensor  # 1 / the unit


class Axis(NamedTuple):
    """The normal of an edge, as long as the edge."""

    x: tl.tensor
    y: tl.tensor
    edge: Point
    length: tl.tensor  # 0 if it is no axis
    is_axis: tl.tensor


class Weight(NamedTuple):
    """The weight w_k of an axis (section 3)."""

    value: tl.tensor
    slope: tl.tensor  # its derivative to the edge's length


class Comparison(NamedTuple):
    """Both polygons on an axis."""

    on_pred: Slots  # projections
    on_target: Slots
    pred: Interval
    target: Interval
    distance: tl.tensor  # 1 - GIoU1D
    per_hull: tl.tensor  # 1 / the length of the joint hull
    hull: tl.tensor  # that length


class Measuring(NamedTuple):
    """What `EdgeSums` depend on besides the edge."""

    origin: Point
    rule: AxisRule
    lane: tl.tensor  # (1, 1, LANES)


class EdgeSums(NamedTuple):
    """Sums over the edges of one side that need no projection of other vertices."""

    length: tl.tensor  # of |x| + |y| under UNIFORM, which needs no lengths
    axes: tl.tensor  # their number
    weight: tl.tensor
    squares: tl.tensor  # of the lengths
    starts: tl.tensor  # projections of edges' starts on the edges' normals: twice the signed area
    lows: tl.tensor  # the same of the lower of each edge's two ends
    highs: tl.tensor


class Area(NamedTuple):
    """The area of a polygon in the order of its vertices."""

    doubled: tl.tensor
    direction: tl.tensor  # its sign; 0 without an area
    squares: tl.tensor  # sum of the squared lengths of the edges


class Mean(NamedTuple):
    """The two sums of the mean over axes, and whether they see more than a line."""

    distance: tl.tensor  # of w_k (1 - GIoU1D_k)
    weight: tl.tensor  # of w_k
    widest: tl.tensor  # the largest h_k


class Gradient(NamedTuple):
    """Derivatives to the vertices of P."""

    xs: Slots
    ys: Slots


class AxisSums(NamedTuple):
    """Sums over axes."""

    mean: Mean
    gradient: Gradient  # through the projections of P
    reach: tl.tensor  # how far G reaches along its edges' outward normals: twice the mixed area with its hull


class Handed(NamedTuple):
    """Derivatives that edges hand to their ends."""

    xs: Slots
    ys: Slots
    pending: Point  # taken edge by edge: what the last edge's end waits for until the next edge's start


class PredSums(NamedTuple):
    """Sums over the axes of P."""

    mean: Mean
    convexity: tl.tensor
    mixed: tl.tensor  # twice the mixed area
    gradient: Gradient
    by_edge: Handed  # derivatives of the distances and of the convexity term
    by_weight: Handed  # of the axes' weights
    by_mixed: Handed  # of twice the mixed area


class Sample(NamedTuple):
    """What all axes of a sample share."""

    pred: Placed
    target: Placed
    pred_shape: Placed  # relative to one of its own vertices, for the terms of section 7
    target_shape: Placed
    pred_rule: AxisRule
    target_rule: AxisRule
    pred_count: tl.tensor
    lane: tl.tensor
    pred_slack: tl.tensor  # times |a_x| + |a_y| of an axis: by how much rounding tells equal projections of P apart
    target_slack: tl.tensor
    pred_line: tl.tensor  # the longest interval of P on an axis that counts as a point in the convexity term
    convexity_factor: tl.tensor
    direction: tl.tensor  # the sign of P's area
    target_direction: tl.tensor


class Convexity(NamedTuple):
    """The convexity term of one edge."""

    value: tl.tensor
    projections: Slots
    ends: Interval  # of P
    edge_ends: Interval
    sides: Slots  # derivatives to the distances of the vertices from the edge
    width_slope: tl.tensor  # derivative to the length of P's interval, negated


class ConvexityGradient(NamedTuple):
    """Derivatives of the convexity term of one edge."""

    shares: Slots  # to the projections
    to_start: tl.tensor  # to the projection of the edge's start, from which distances are measured, negated


class Reach(NamedTuple):
    """How far a polygon reaches along a direction, and where: the mean over ties."""

    length: tl.tensor
    at: Point


class BoundaryTerm(NamedTuple):
    """The boundary term of a sample and its derivatives."""

    value: tl.tensor
    mixed_slope: tl.tensor  # to twice the mixed area
    area_slope: tl.tensor  # to twice the area of P


class Factors(NamedTuple):
    """What the derivatives that were handed over are multiplied by, in units of those of the distances."""

    mean: tl.tensor  # by weight, negated: what the weights' mean takes from each distance
    by_mixed: tl.tensor
    by_area: tl.tensor
