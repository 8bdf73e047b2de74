"""`warmup` of the matrix of all pairs, and the layouts that it chooses from."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_mgiou
from tests.conftest import INTERPRETED
from tests.helpers import generator
from triton_mgiou import box_mgiou, launch, pairs, polygon_mgiou, warmup
from triton_mgiou.cli import main
from triton_mgiou.tuning import layouts
from triton_mgiou.tuning.warmup import _PairVariant

FLOATS = (torch.float32, torch.float32)


@pytest.fixture
def made(monkeypatch):
    """Keys of the variants that were asked for the first time."""
    keys = []
    monkeypatch.setattr(pairs, "pair_plan", lambda key, make=pairs.pair_plan: keys.append(key) or make(key))
    launch.forget_plans()
    yield keys
    launch.forget_plans()


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
def test_triton_cpu_what_is_warmed_up_is_what_training_takes(made):
    options = {"angle": "degrees", "clockwise": False, "over": "depth", "mask2": True}
    results = warmup((), device="cpu", pairs=("cxcywhr", "xyxyxyxy"), pair_sizes=((3, 8),), pair_options=options)
    assert [(each.fmt.removeprefix("pairs of "), each.gradient) for each in results] == [
        ("cxcywhr", False),
        ("cxcywhr", True),
        ("cxcywhr", True),
        ("xyxyxyxy", False),
    ]
    known, plans = len(made), len(launch._plans)
    first, second = torch.rand(5, 5, requires_grad=True), torch.rand(4, 5, requires_grad=True)
    mask = torch.ones(4, dtype=torch.bool)
    box_mgiou(first, second, backend="triton", **options | {"mask2": mask}).sum().backward()
    given = {"over": "depth", "mask2": mask, "backend": "triton"}
    polygon_mgiou(torch.rand(3, 4, 2), torch.rand(4, 4, 2), **given)
    box_mgiou(torch.rand(3, 8), torch.rand(4, 8), fmt="xyxyxyxy", **given)
    assert (len(made), len(launch._plans)) == (known, plans)


def random_set(count, rng):
    """Boxes that follow each other, or are columns or every second row of a larger tensor."""
    kind = int(torch.randint(3, (), generator=rng))
    return torch.empty(1, 2 * count, 6)[:, :count, :5] if kind else torch.empty(1, 2 * count, 5)[:, ::2][:, :count]


def test_no_size_needs_another_kernel_after_a_warm_up(made, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    variant = _PairVariant(FLOATS, "cxcywhr", (100, 20), False, torch.device("cpu"), {"mask1": True})
    for each in (variant, variant.gradient_to(0), variant.gradient_to(1)):
        for kind in each.kinds():
            kind.prepare()
    known = len(made)
    call = pairs.BoxPairs("cxcywhr", "radians", True, "mean", "uniform")
    rng = generator(0)
    for _ in range(200):
        rows, columns = (int(10_000 ** float(torch.rand((), generator=rng))) for _ in range(2))
        first, second = random_set(rows, rng), random_set(columns, rng)
        mask = torch.empty(1, rows, dtype=torch.bool)
        pairs.prepare_values(first, second, mask, None, call)
        upstream = torch.empty(1).expand(1, rows, columns)
        pairs.prepare_gradient(first, second, mask, None, upstream, call)
        pairs.prepare_gradient(second, first, None, mask, upstream.transpose(1, 2), call)
    assert len(made) == known


CANDIDATES = {
    "boxes, any T": layouts.pair_candidates(False, False),
    "boxes, T a multiple of 4": layouts.pair_candidates(True, False),
    "few boxes": layouts.pair_gradient_candidates(False, False),
    "many boxes": layouts.pair_gradient_candidates(True, False),
    "polygons": layouts.polygon_pair_candidates(0, False),
    "quadrangles": layouts.polygon_pair_candidates(4, False),
    "interpreter": layouts.pair_candidates(True, True),
}
SIZES = [(1, 1, 1), (2, 7, 2**30), (1, 2**30, 8), (1, 8400, 100), (3, 4967, 8400), (65532, 9, 33), (1, 256, 65536)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CANDIDATES)
def test_every_layout_reaches_every_pair(name, size):
    """Each program has work, and tiles behind the programs are those of a program that goes on."""
    batch, rows, columns = size
    for layout in CANDIDATES[name]:
        down, across = -(-rows // layout.rows), -(-columns // layout.columns)
        grid = layout.grid(size)
        assert grid[0] < 2**31
        assert max(grid[1:]) <= 65535
        if isinstance(layout, layouts.PairGradientLayout):
            assert grid == (down, batch, 1)
        else:
            first, second = (down, across) if isinstance(layout, layouts.PolygonPairLayout) else (across, down)
            assert (grid[0], grid[2]) == (first, batch)
            assert 1 <= grid[1] <= second


def test_arguments_reach_the_warm_up(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(triton_mgiou, "warmup", lambda *_, **named: calls.append(named) or [])
    arguments = ["--pairs", "cxcywhr", "polygons", "--pair-sizes", "300:20", "64", "--pair-options", '{"mask1": true}']
    assert main(["warmup", "--vertices", *arguments]) == 0
    given = {"pairs": ["cxcywhr", "polygons"], "pair_sizes": [(300, 20), 64], "pair_options": {"mask1": True}}
    want = {"tune": True, "boxes": []} | given
    assert {name: calls[0][name] for name in want} == want
    capsys.readouterr()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
def test_nothing_is_compiled_or_measured_after_a_warm_up(tmp_path, monkeypatch):
    from triton_mgiou.kernels.pairs import box_pairs_kernel  # noqa: PLC0415
    from triton_mgiou.kernels.pairs_gradient import box_pairs_gradient_kernel  # noqa: PLC0415
    from triton_mgiou.tuning import store  # noqa: PLC0415

    monkeypatch.setenv("TRITON_MGIOU_CACHE_DIR", str(tmp_path))
    store.tuning_cache.cache_clear()
    results = warmup((), pairs=("cxcywhr",), pair_sizes=((2100, 40),))
    assert {each.source for each in results} == {"tuned"}
    store.tuning_cache.cache_clear()  # as another process
    assert {each.source for each in warmup((), pairs=("cxcywhr",), pair_sizes=((2100, 40),))} == {"cache"}
    device = torch.cuda.current_device()
    kernels = [each.device_caches[device][0] for each in (box_pairs_kernel, box_pairs_gradient_kernel)]
    before = [len(each) for each in kernels]
    rng = generator(1)
    for _ in range(100):
        rows, columns = (int(9000 ** float(torch.rand((), generator=rng))) for _ in range(2))
        first, second = (torch.rand(n, 5, device="cuda").requires_grad_() for n in (rows, columns))
        box_mgiou(first, second).sum().backward()
    assert [len(each) for each in kernels] == before
    store.tuning_cache.cache_clear()
    launch.forget_plans()
