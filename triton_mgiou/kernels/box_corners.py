"""The loss and the gradient of one pair of eight corners.

They have no closed form: their projections are compared as those of polygons are. The axes are the edges at vertex 0.
"""

import triton
import triton.language as tl

from triton_mgiou.kernels.arithmetic import inverse, inverse_power_of_two, minus
from triton_mgiou.kernels.axis import SHORTEST, WIDEST, distance, rounded, shares, slopes
from triton_mgiou.kernels.box_types import Row
from triton_mgiou.kernels.slots import add_scaled, dot, highest, lowest, zeros
from triton_mgiou.kernels.types import Interval


@triton.jit
def _numbers_of(corners, place: tl.constexpr):
    numbers = ()
    for corner in tl.static_range(8):
        numbers = numbers + (corners[3 * corner + place],)
    return numbers


@triton.jit
def _bounds(numbers):
    """The least and the largest; NaN if one is."""
    low = numbers[0]
    high = low
    for corner in tl.static_range(1, 8):
        low = tl.minimum(low, numbers[corner], propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, numbers[corner], propagate_nan=tl.PropagateNan.ALL)
    return Interval(low, high)


@triton.jit
def _placed(numbers, scale, low):
    new = ()
    for corner in tl.static_range(8):
        new = new + (tl.fma(numbers[corner], scale, minus(low)),)
    return new


@triton.jit
def _project(x, y, z, corners):
    projections = ()
    for corner in tl.static_range(8):
        in_plane = tl.fma(y, corners[1][corner], z * corners[2][corner])
        projections = projections + (tl.fma(x, corners[0][corner], in_plane),)
    return projections


@triton.jit
def _put(numbers, value, at: tl.constexpr):
    """`numbers` with a value added to one of them."""
    new = ()
    for corner in tl.static_range(8):
        new = new + (numbers[corner] + value if corner == at else numbers[corner],)
    return new


@triton.jit
def _corners_axis(
    state, corners, END: tl.constexpr, p, g, floor, p_slack, g_slack, scale, OWN: tl.constexpr, V: tl.constexpr
):
    """Add the edge from vertex 0 to vertex END of P, if OWN, or of G."""
    total, weights, gradient = state
    x = tl.fma(corners[3 * END], scale, minus(corners[0] * scale))
    y = tl.fma(corners[3 * END + 1], scale, minus(corners[1] * scale))
    z = tl.fma(corners[3 * END + 2], scale, minus(corners[2] * scale))
    weight = (tl.fma(x, x, tl.fma(y, y, z * z)) > floor).to(scale.dtype)
    on_p, on_g = _project(x, y, z, p), _project(x, y, z, g)
    p_ends, g_ends = Interval(lowest(on_p), highest(on_p)), Interval(lowest(on_g), highest(on_g))
    apart, per_hull, _ = distance(p_ends, g_ends, V.TINY)
    if V.GRAD:
        to_p, to_g = slopes(p_ends, g_ends, apart, weight * per_hull)
        size = tl.abs(x) + tl.abs(y) + tl.abs(z)
        p_shares = shares(on_p, rounded(p_ends, p_slack * size), to_p)
        grad_x, grad_y, grad_z = gradient
        grad_x = add_scaled(grad_x, x, p_shares)
        grad_y = add_scaled(grad_y, y, p_shares)
        grad_z = add_scaled(grad_z, z, p_shares)
        if OWN and V.AXIS_GRAD:
            both = p_shares + shares(on_g, rounded(g_ends, g_slack * size), to_g)
            along_x, along_y, along_z = dot(both, p[0] + g[0]), dot(both, p[1] + g[1]), dot(both, p[2] + g[2])
            grad_x = _put(_put(grad_x, along_x, END), minus(along_x), 0)
            grad_y = _put(_put(grad_y, along_y, END), minus(along_y), 0)
            grad_z = _put(_put(grad_z, along_z, END), minus(along_z), 0)
        gradient = (grad_x, grad_y, grad_z)
    return tl.fma(weight, apart, total), weights + weight, gradient


@triton.jit
def corners_row(pred, target, V: tl.constexpr):
    """One pair of eight corners each. The axes are the edges at vertex 0, as long as they are."""
    largest = tl.zeros_like(pred[0])
    p_ends = ()
    g_ends = ()
    for place in tl.static_range(3):
        p_ends = p_ends + (_bounds(_numbers_of(pred, place)),)
        g_ends = g_ends + (_bounds(_numbers_of(target, place)),)
        for ends in tl.static_range(2):
            largest = tl.maximum(largest, tl.abs(p_ends[place][ends]), propagate_nan=tl.PropagateNan.ALL)
            largest = tl.maximum(largest, tl.abs(g_ends[place][ends]), propagate_nan=tl.PropagateNan.ALL)
    poison = largest * 0.0
    scale = inverse_power_of_two(largest) + poison
    p = ()
    g = ()
    extent = tl.zeros_like(scale)
    p_extent, g_extent = extent, extent
    for place in tl.static_range(3):
        p_low, p_high = p_ends[place]
        g_low, g_high = g_ends[place]
        low = tl.minimum(p_low, g_low) * scale
        extent = tl.maximum(extent, tl.maximum(p_high, g_high) * scale - low)
        p_extent = tl.maximum(p_extent, p_high * scale - p_low * scale)
        g_extent = tl.maximum(g_extent, g_high * scale - g_low * scale)
        p = p + (_placed(_numbers_of(pred, place), scale, low),)
        g = g + (_placed(_numbers_of(target, place), scale, low),)
    widest = tl.full(extent.shape, V.TIE, extent.dtype)
    p_slack, g_slack = tl.minimum(p_extent * WIDEST, widest), tl.minimum(g_extent * WIDEST, widest)
    floor = extent * tl.full(extent.shape, SHORTEST, extent.dtype)
    floor = tl.maximum(tl.full(extent.shape, V.TINY, extent.dtype), floor * floor)

    gradient = (zeros(p[0]), zeros(p[1]), zeros(p[2]))
    state = (tl.zeros_like(scale), tl.zeros_like(scale), gradient)
    for number in tl.static_range(3):
        state = _corners_axis(state, pred, (1, 3, 4)[number], p, g, floor, p_slack, g_slack, scale, True, V)
    for number in tl.static_range(3):
        state = _corners_axis(state, target, (1, 3, 4)[number], p, g, floor, p_slack, g_slack, scale, False, V)
    total, weights, gradient = state
    weights = tl.where(weights > 0, weights, 1.0)
    derivatives = ()
    if V.GRAD:
        for corner in tl.static_range(8):
            derivatives = derivatives + (gradient[0][corner], gradient[1][corner], gradient[2][corner])
    factor = 0.5 * inverse(weights) + poison
    return Row(total * factor, factor, scale, derivatives)
