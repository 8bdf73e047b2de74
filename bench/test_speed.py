"""The same peers and sizes as `bench.speed` under pytest-benchmark, which compares two commits.

python -m pytest bench --benchmark-only
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import measure
from bench.peers import Peer, find_peers, polygons
from bench.speed import checked, chosen_peers, groups_of, steps_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEERS, MISSING = find_peers(DEVICE)


def cases() -> Iterator[Any]:
    """Every peer at every size; one that is missing or refuses a size is a skip with the reason."""
    seen = set()
    for group in groups_of(DEVICE).values():
        for batch, vertices in group.sizes:
            for peer in chosen_peers(PEERS, group, batch, vertices):
                dtype = str(group.dtype).removeprefix("torch.")
                case = f"{peer.name}-{batch}x{vertices}-{dtype}".replace(" ", "_")
                if case not in seen and peer.refuses(batch, vertices) is None:
                    yield pytest.param(peer, batch, vertices, group.dtype, id=case)
                seen.add(case)
    for name, reason in MISSING.items():
        yield pytest.param(None, 0, 0, None, id=name.replace(" ", "_"), marks=pytest.mark.skip(f"{name}: {reason}"))


@pytest.mark.benchmark(max_time=0.3)  # seconds, or five rounds
@pytest.mark.parametrize("part", ["step", "forward"])
@pytest.mark.parametrize(("peer", "batch", "vertices", "dtype"), list(cases()))
def test_wall_time(benchmark: Any, peer: Peer, batch: int, vertices: int, dtype: torch.dtype, part: str) -> None:
    """Forward and backward, and forward alone, each waited for."""
    value_error, gradient_error, reason = checked(peer, batch, vertices, dtype, DEVICE)
    if reason is not None:
        pytest.skip(f"{peer.name} at {batch} x {vertices}: {reason}")
    steps = steps_of(peer, *polygons(batch, vertices, dtype, DEVICE))
    if part not in steps:
        pytest.skip(f"{peer.name} is measured in training only")
    benchmark.group = f"{part} {batch} x {vertices}, {dtype}"
    benchmark.extra_info |= {"value_error": value_error, "gradient_error": gradient_error}

    def step() -> None:
        steps[part]()
        measure.synchronize(DEVICE)

    step()
    benchmark(step)
