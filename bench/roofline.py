"""The least time that the loss can take: what has to be moved and computed, over what the machine can do.

Operations are counted from the algorithm (the kernel's docstring), not from its code, for one polygon of n vertices
against one of m, with v = n + m vertices and as many axes:

| step | add, multiply, multiply-add | min, max, compare, select |
|---|---|---|
| scale and move the vertices; their bounding box | 2 v | 4 (v - 1) |
| edges, their squared lengths, which are axes | 4 v | 2 v |
| projections, their extremes | 2 v v | 2 v (v - 2) |
| GIoU1D of an axis and its weighted sum | 8 v | 2 v |
| gradient: derivatives to the four ends of the intervals | 10 v | 4 v |
| which vertices are at an end: P's on all axes, G's on P's | | 2 n (n + 2 m) |
| how many are, and the share of each | 4 n (n + 2 m) | |
| shares times axes, to the vertices of P | 2 n v | |
| shares times vertices, to the axes of P and their ends | 2 n v + 4 n | |
| gradients times the scale | 2 n | |

An instruction of either kind takes an issue slot, those of the right column a slot of a unit of half the width too.
Both, and the memory, can be busy at the same time, so the largest of the three times is the bound.
"""

from __future__ import annotations

from typing import NamedTuple


class Operations(NamedTuple):
    """Instructions of one thread for one polygon."""

    arithmetic: int  # add, multiply, multiply-add
    selection: int  # min, max, compare, select


def operations(n: int, m: int, gradient: bool) -> Operations:
    """The sums of the table above."""
    v = n + m
    arithmetic = 2 * v + 4 * v + 2 * v * v + 8 * v
    selection = 4 * (v - 1) + 2 * v + 2 * v * (v - 2) + 2 * v
    if gradient:
        pairs = n * (n + 2 * m)
        arithmetic += 10 * v + 4 * pairs + 2 * n * v + (2 * n * v + 4 * n) + 2 * n
        selection += 4 * v + 2 * pairs
    return Operations(arithmetic, selection)


def moved_bytes(n: int, m: int, gradient: bool, element_bytes: int) -> int:
    """Bytes of one polygon: its vertices and the target's are read once, its gradient is written in float32."""
    return 2 * (n + m) * element_bytes + (2 * n * 4 if gradient else 0)


def bound_us(
    batch: int, n: int, m: int, gradient: bool, element_bytes: int, rates: dict[str, float]
) -> dict[str, float]:
    """Microseconds that a batch needs at least for each of the three; the largest is the bound.

    Args:
        batch: B.
        n: Vertices of a prediction.
        m: Vertices of a target.
        gradient: Whether the gradient to the prediction is computed too.
        element_bytes: Of one coordinate.
        rates: Per second: "copy_bytes", "multiply_add" and "min_max", see `bench.rates`.
    """
    arithmetic, selection = operations(n, m, gradient)
    seconds = {
        "memory": moved_bytes(n, m, gradient, element_bytes) / rates["copy_bytes"],
        "issue": (arithmetic + selection) / rates["multiply_add"],
        "min, max, compare": selection / rates["min_max"],
    }
    return {name: batch * each * 1e6 for name, each in seconds.items()}
