"""Which layout a call gets: the search space, the cache on disk, what processes and ranks make of a warm-up."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers import INF, NAN, Name, assert_close, assert_gradient_close, convex, generator, star, uniform

pytest.importorskip("triton")

from triton_mgiou import PAPER, launch, mgiou_loss, pairs, warmup
from triton_mgiou.options import Options, Reduction
from triton_mgiou.tuning import layouts, measure, store
from triton_mgiou.tuning.layouts import Layout
from triton_mgiou.tuning.store import Entry, TuningCache

FORK = multiprocessing.get_context("fork")  # a spawned process would import PyTorch for seconds
CANDIDATES = layouts.candidates(8, 8, False, 0, False)
DEFAULT, *OTHERS = CANDIDATES
ENTRY = Entry(OTHERS[0]._asdict(), 5.0, 6.5)
CHIP = "Fake GPU sm90"
warmup_module = importlib.import_module("triton_mgiou.tuning.warmup")  # the package's attribute is the function


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_MGIOU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "chip_name", lambda _: CHIP)
    monkeypatch.setattr(launch, "_plans", {})
    store.tuning_cache.cache_clear()
    yield tmp_path / "cache"
    store.tuning_cache.cache_clear()


def stored():
    return TuningCache(CHIP, "3.6.0")


def never():
    raise AssertionError("asked to measure")


def processes(target, arguments):
    """Run `target` in a process for each of `arguments`; all must end well and soon."""
    children = [FORK.Process(target=target, args=each) for each in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * len(children)


def warned(recorded):
    return [str(warning.message) for warning in recorded if warning.category is RuntimeWarning]


# The search space.


@pytest.mark.parametrize(
    ("vertices", "least"),
    [
        (3, 32768),
        (4, 32768),
        (5, 8192),
        (8, 8192),
        (9, 8192),
        (16, 8192),
        (17, 3584),
        (32, 3584),
        (33, 2048),
        (300, 256),
    ],
)
@pytest.mark.parametrize("is_other", [False, True])
def test_a_batch_is_large_from_a_size_on(vertices, least, is_other):
    sizes = (vertices, 3) if is_other else (vertices, vertices)
    for pred, target in (sizes, sizes[::-1]):
        assert not layouts.is_large(least - 1, pred, target)
        assert layouts.is_large(least, pred, target)
    buckets = [layouts.bucket(size) for size in sizes]
    assert layouts.batches(*buckets, large_batch=True) == f">= {least}"
    assert layouts.batches(*buckets, large_batch=False) == f"< {least}"


@pytest.mark.parametrize(("terms", "is_double"), [(0, False), (1, False), (2, False), (1, True)])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("target", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("pred", [4, 8, 16, 32, 64, 128])
def test_every_candidate_has_a_place_for_every_vertex(pred, target, large, terms, is_double):
    found = layouts.candidates(pred, target, large, terms, is_double)
    assert found[0] == layouts.layout(pred, target, large, terms, is_double)
    assert len(set(found)) == len(found) <= 10  # a few seconds each
    for layout in found:
        assert layout.lanes * layout.pred_slots >= pred
        assert layout.lanes * layout.target_slots >= target
        assert layout.polygons * layout.axes * layout.lanes % (32 * layout.num_warps) == 0
        assert max(pred, target) % layout.axes == 0
        assert all(size & (size - 1) == 0 for size in layout[:5])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_papers_loss_of_many_vertices_has_one_layout(size):
    """That of small batches is the faster one in all (run 10 of h200_layouts.json); with a term it is not."""
    small, large = (layouts.layout(size, size, is_large, 0, False) for is_large in (False, True))
    assert small == large
    assert layouts.layout(size, size, False, 1, False) != layouts.layout(size, size, True, 1, False)


def test_the_search_covers_training():
    for size in (4, 8, 16, 32, 64):
        for large in (False, True):
            assert len(layouts.candidates(size, size, large, 1, False)) > 3


@pytest.fixture
def kernels(backend):
    if not backend.is_slow:
        pytest.skip("is about the kernels in the interpreter; test_gpu tunes on a GPU")


LOSSES = [
    PAPER,
    {"axis_weight": "length", "axis_grad": False, "convexity_weight": 0.0, "boundary_weight": 0.25},
    {"axis_weight": "soft", "axis_grad": True, "convexity_weight": 0.5, "boundary_weight": 0.5},
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("real", ["all", "full", "lengths", "masks"])
@pytest.mark.parametrize("axes", [1, 2, 4, 8])
def test_every_way_to_spread_vertices_and_axes_is_right(backend, axes, real, monkeypatch):
    rng = generator(axes)
    pred, target = star(3, 8 if real == "full" else 7, rng).requires_grad_(), convex(3, 8, rng)
    pred_mask, target_mask = (torch.rand(3, each.shape[1], generator=rng) < 0.7 for each in (pred, target))
    given = {
        "lengths": {"pred_lengths": torch.tensor([7, 3, 0]), "target_lengths": torch.tensor([8, 5, 4])},
        "masks": {"pred_mask": pred_mask, "target_mask": target_mask},
    }.get(real, {})
    for options in LOSSES:
        expected = mgiou_loss(pred, target, backend="eager", **given, **options)
        (gradient,) = torch.autograd.grad(expected, pred)
        for lanes in (1, 2, 4):
            layout = Layout(2, axes, lanes, 8 // lanes, 8 // lanes, 1, 168)
            monkeypatch.setattr(layouts, "interpreter_layout", lambda *_, layout=layout: layout)
            launch.forget_plans()
            value, actual = backend.value_and_gradient(pred, target, **given, **options)
            assert_close(value, expected.detach(), atol=1e-12)
            assert_gradient_close(actual, gradient, rtol=1e-9)


def prepared(**options):
    """A plan, its arguments and outputs, for three polygons and the gradient."""
    rng = generator(0)
    pred, target = star(3, 4, rng).float(), convex(3, 3, rng).float()
    call = launch.PolygonCall(None, None, Reduction(None, "sum", 3.0), Options(**options))
    plan, arguments, loss, gradient = launch.prepare_polygons(pred, target, call, True, 0)
    return plan, arguments, [loss, gradient]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("us_right", "wins"), [(8.0, True), (9.9, False)])
def test_the_fastest_layout_that_is_right_and_worth_it(us_right, wins):
    default = Layout(4, 2, 2, 2, 2, 1, 168)
    right = Layout(2, 1, 1, 4, 4, 1, 168)
    drops_vertices = Layout(4, 1, 1, 2, 4, 1, 168)
    plan, arguments, outputs = prepared()
    plan.candidates = [default, drops_vertices, right]
    times = iter([10.0, 1.0, us_right])
    entry = measure.fastest(plan, 3, arguments, outputs, lambda _: next(times) * 1e-3)
    assert list(times) == []
    assert entry.layout == (right if wins else default)._asdict()
    assert entry.us == pytest.approx(us_right if wins else 10.0)
    assert entry.default_us == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("loss", "wrong", "is_same"),
    [
        (2.0, 0, True),
        (2.0 * (1 + 8e-5), 0, True),
        (2.0 * (1 + 2e-4), 0, False),
        (NAN, 0, False),
        (2.0, 10, True),  # of 1000 samples: near ties
        (2.0, 11, False),
    ],
)
@pytest.mark.parametrize("bad", [2e-4, NAN])
def test_what_a_layout_gives_is_the_same_but_for_rounding_and_near_ties(loss, wrong, is_same, bad):
    scales = torch.logspace(-15, 15, 1000)[:, None, None]  # of the samples: each is compared with itself
    expected = scales * uniform((1000, 4, 2), 1, 2, generator(0)).float()
    found = expected * (1 + 5e-5)
    found[:wrong] = expected[:wrong] * (1 + bad)
    assert measure._same_result([torch.tensor(loss), found], [torch.tensor(2.0), expected]) == is_same


@pytest.fixture
def measured(monkeypatch):
    """The plans that were measured, and on how many samples; the second candidate wins."""
    calls = []

    def fastest(plan, batch, arguments, outputs):
        calls.append((plan.case, batch, len(arguments[0]), [len(output.shape) for output in outputs]))
        return Entry(plan.candidates[1]._asdict(), 4.0, 5.0)

    monkeypatch.setattr(measure, "fastest", fastest)
    return calls


@pytest.fixture
def tunable(monkeypatch):
    """The interpreter with several layouts to choose from."""
    candidates = [Layout(polygons, 1, 1, 4, 4, 1, 255) for polygons in (64, 128)]
    plan = launch.Plan

    def with_candidates(*arguments):
        return plan(*arguments[:3], candidates, *arguments[4:])

    monkeypatch.setattr(launch, "Plan", with_candidates)
    return candidates


@pytest.mark.usefixtures("kernels")
def test_a_warm_up_fills_the_cache(measured, tunable, folder):
    results = warmup((3,), (2,), device="cpu", options={"target_lengths": True})
    assert [(each.gradient, each.source, each.us, each.gain) for each in results] == [
        (True, "tuned", 4.0, 0.25),
        (False, "tuned", 4.0, 0.25),
    ]
    assert [(batch, rows, shapes) for _, batch, rows, shapes in measured] == [(512, 512, [0, 3]), (512, 512, [0])]
    (path,) = folder.glob("*.json")
    keys = list(json.loads(path.read_text())["configurations"][store.source_hash()])
    assert sorted(keys) == sorted(case for case, *_ in measured)
    assert all("TARGET_REAL=1" in key and "PRED_REAL=0" in key for key in keys)
    store.tuning_cache.cache_clear()  # as another process
    launch.forget_plans()
    mgiou_loss(torch.rand(3, 4, 2), torch.rand(3, 3, 2), target_lengths=torch.tensor([3, 2, 1]), backend="triton")
    (plan,) = launch._plans.values()
    assert plan.layout == tunable[1]
    again = warmup((3,), (2,), device="cpu", options={"target_lengths": True})
    assert [each.source for each in again] == ["cache", "cache"]
    assert len(measured) == 2


@pytest.mark.usefixtures("kernels", "tunable")
def test_nothing_is_measured_unless_asked(measured, folder):
    (result, _) = warmup((3,), (2,), device="cpu", tune=False)
    assert (result.source, result.us) == ("default", None)
    mgiou_loss(torch.rand(3, 4, 2), torch.rand(3, 3, 2), backend="triton")
    assert measured == []
    assert not folder.exists()


class Compiled:
    """In the place of a compiled kernel."""

    def __init__(self, n_spills=0, error=None):
        self.n_spills = n_spills
        self.error = error

    def _init_handles(self):
        if self.error is not None:
            raise self.error


class Kernel:
    """In the place of a kernel that some layouts are too much for."""

    def __init__(self, **by_warps):
        self.by_warps = by_warps

    def warmup(self, *_, grid, num_warps, **__):
        assert grid == (1,)
        found = self.by_warps[f"warps_{num_warps}"]
        if isinstance(found, Exception):
            raise found
        return found


def test_layouts_that_do_not_compile_or_spill_are_left_out(monkeypatch):
    monkeypatch.setattr(measure, "INTERPRETED", False)
    kernel = Kernel(
        warps_1=Compiled(),
        warps_2=RuntimeError("PassManager::run failed"),
        warps_4=Compiled(n_spills=8),
        warps_8=Compiled(error=RuntimeError("out of resources")),
    )
    layouts = [DEFAULT._replace(num_warps=warps) for warps in (1, 2, 4, 8)]
    plan = launch.Plan(kernel, (), "case", layouts, torch.float32, -1)
    assert measure._that_fit(plan, (), layouts) == layouts[:1]
    plan.candidates = [DEFAULT, *layouts[1:]]
    assert measure.fastest(plan, 5, (), []) == Entry(DEFAULT._asdict(), None, None)


# The file.


def test_an_entry_comes_back(folder):
    assert stored().get("key") is None
    assert stored().get_or_make("key", lambda: ENTRY) == (True, ENTRY)
    assert stored().get("key") == ENTRY
    assert stored().get_or_make("key", never) == (False, ENTRY)
    (path,) = folder.glob("*.json")
    assert path.name == "fake-gpu-sm90-triton-3.6.0.json"
    content = json.loads(path.read_text())
    assert (content["chip"], content["triton"]) == (CHIP, "3.6.0")
    assert content["configurations"][store.source_hash()]["key"] == ENTRY.layout | {
        "us": 5.0,
        "default_us": 6.5,
    }
    assert not list(folder.glob("*.new"))


def test_chips_and_versions_of_triton_have_their_own_files(folder):
    stored().get_or_make("key", lambda: ENTRY)
    for chip, version in ((CHIP, "3.7.0"), ("Fake GPU sm100", "3.6.0")):
        other = TuningCache(chip, version)
        assert other.get("key") is None
        other.get_or_make("key", lambda: ENTRY)
    assert len(list(folder.glob("*.json"))) == 3


def test_other_kernels_keep_their_entries(monkeypatch):
    stored().get_or_make("key", lambda: ENTRY)
    with monkeypatch.context() as patch:
        patch.setattr(store, "source_hash", lambda: "other")
        assert stored().get("key") is None
        stored().get_or_make("key", lambda: Entry(DEFAULT._asdict(), None, None))
        assert stored().get("key") == Entry(DEFAULT._asdict(), None, None)
    assert stored().get("key") == ENTRY


def test_the_hash_is_of_the_kernels(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    (package / "tuning").mkdir()
    files = ("options.py", "tuning/layouts.py", "kernels/polygons.py")
    for file in files:
        (package / file).write_text(file)
    monkeypatch.setattr(store, "__file__", str(package / "tuning" / "store.py"))
    hashes = []
    for file in files:
        (package / file).write_text("c")
        store.source_hash.cache_clear()
        hashes.append(store.source_hash())
    store.source_hash.cache_clear()
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRITON_MGIOU_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/home/me"}, "/x/triton_mgiou"),
        ({"TRITON_MGIOU_CACHE_DIR": "~/a", "HOME": "/home/me"}, "/home/me/a"),  # of a file that no shell has read
        ({"XDG_CACHE_HOME": "~/x", "HOME": "/home/me"}, "/home/me/x/triton_mgiou"),
        ({"HOME": "/home/me"}, "/home/me/.cache/triton_mgiou"),
    ],
)
def test_directory(variables, expected, monkeypatch):
    for name in ("TRITON_MGIOU_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert store.directory() == Path(expected)


GOOD = {"format": store.FORMAT, "chip": CHIP, "triton": "3.6.0", "configurations": {}}
BAD_FIELDS = [
    ({"polygons": 16}, "KeyError: 'us'"),
    *(
        (ENTRY.layout | {"us": 1.0, "default_us": 1.0, "lanes": lanes}, f"lanes must be an integer .*, got {lanes}")
        for lanes in (2.5, -2, 0)
    ),
    (ENTRY.layout | {"us": "fast", "default_us": 1.0}, "'fast'"),
    *(
        (ENTRY.layout | {"us": time, "default_us": 1.0}, f"a time must be above 0 and finite, got {time}")
        for time in (0.0, -1.0, NAN, INF)
    ),
    (ENTRY.layout | {"us": 1.0, "default_us": 10**400}, "OverflowError"),
    ([1, 2], "TypeError"),
]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"not JSON", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (json.dumps(GOOD).encode()[:-20], "JSONDecodeError"),
        (b"[]", "AttributeError"),
        (b"{}", "expected {'format': .*, got {'format': None"),
        *(
            (json.dumps(GOOD | {name: other}).encode(), f"expected {{'format': .*, got {{.*'{other}'")
            for name, other in {"format": "another", "chip": "Another GPU", "triton": "2.0.0"}.items()
        ),
        (json.dumps(GOOD | {"configurations": []}).encode(), "AttributeError"),
        (b"[" * 100_000, "RecursionError"),
        *(
            (json.dumps(GOOD | {"configurations": {store.source_hash(): {"key": bad}}}).encode(), reason)
            for bad, reason in BAD_FIELDS
        ),
    ],
)
def test_a_damaged_file_is_named_set_aside_and_built_anew(content, reason, folder):
    folder.mkdir()
    path = folder / "fake-gpu-sm90-triton-3.6.0.json"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        damaged = stored()
        assert damaged.get("key") is None
        assert damaged.get_or_make("key", lambda: ENTRY) == (True, ENTRY)
    (message,) = warned(recorded)
    aside = path.with_suffix(".damaged")
    assert message.startswith(f"{path} is not a tuning cache (")
    assert re.search(rf"\(.*{reason}.*\): it is kept as {re.escape(str(aside))}", message)
    assert aside.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored().get("key") == ENTRY


def test_a_file_damaged_while_in_use_is_built_anew_too(folder):
    used = stored()
    used.get_or_make("first", lambda: ENTRY)
    (path,) = folder.glob("*.json")
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is not a tuning cache"):
        used.get_or_make("second", lambda: ENTRY)
    assert stored().get("first") == stored().get("second") == ENTRY


def test_a_damaged_file_is_described_as_such(folder):
    folder.mkdir()
    for number, content in enumerate((b"[" * 100_000, b"{}", b"\xff")):
        (folder / f"{number}.json").write_bytes(content)
    assert [line.split(":")[1] for line in store.describe()[1:]] == [" unreadable"] * 3


def test_a_folder_of_the_cache_that_is_none_is_said(folder):
    assert store.describe() == [f"tuning cache: {folder}, empty"], "it is made by the first warm-up"
    in_the_way(folder)
    (line,) = store.describe()
    assert line.startswith("tuning cache: none: ")
    assert str(folder) in line


def test_what_the_cache_has_is_described(folder, monkeypatch):
    for names, source in ((("a", "b"), "one"), (("c",), "two"), (("d",), "three")):
        monkeypatch.setattr(store, "source_hash", lambda source=source: source)
        for name in names:
            stored().get_or_make(name, lambda: ENTRY)
    fields = ", ".join(f"{name} {value}" for name, value in (ENTRY.layout | {"us": 5.0, "default_us": 6.5}).items())
    head = [f"tuning cache: {folder}", f"  fake-gpu-sm90-triton-3.6.0.json: {CHIP}, Triton 3.6.0"]
    for source, names, others in (("one", "ab", 2), ("two", "c", 3), ("none", "", 4)):
        monkeypatch.setattr(store, "source_hash", lambda source=source: source)
        ours = [f"    {name}: {fields}" for name in names]
        assert store.describe() == [*head, *ours, f"    and {others} for other versions of the kernels"]
    (path,) = folder.glob("*.json")
    path.unlink()
    assert store.describe() == [f"tuning cache: {folder}, empty"]
    stored().get_or_make("e", lambda: ENTRY)
    assert store.describe() == [*head, f"    e: {fields}"]


def test_an_entry_that_is_replaced(folder):
    """As by that of the first rank; where that one has none, it is dropped in memory only."""
    used, other = stored(), Entry(DEFAULT._asdict(), 1.5, None)
    used.put("key", None)
    assert not folder.exists()
    used.put("key", ENTRY)
    assert stored().entries() == used.entries() == {"key": ENTRY}
    (path,) = folder.glob("*.json")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    used.put("key", ENTRY._replace(layout=dict(ENTRY.layout)))  # nothing new
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    used.put("key", other)
    assert stored().entries() == used.entries() == {"key": other}
    used.put("key", None)
    assert used.entries() == {}
    assert stored().entries() == {"key": other}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def in_the_way(folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")


def no_lock(folder):
    stored().get_or_make("old", lambda: ENTRY)
    (path,) = folder.glob("*.json")
    Path(f"{path}.lock").unlink(missing_ok=True)
    Path(f"{path}.lock").mkdir()  # also in the way of root, whom no permission stops


def no_replacement(folder):
    stored().get_or_make("old", lambda: ENTRY)
    (path,) = folder.glob("*.json")
    path.with_suffix(".new").mkdir()


def no_file(folder):
    (folder / "fake-gpu-sm90-triton-3.6.0.json").mkdir(parents=True)


def no_place_aside(folder):
    no_file(folder)
    (path,) = folder.iterdir()
    path.rename(path.with_suffix(".damaged"))
    path.write_text("{")


def damaged_without_a_lock(folder):
    no_lock(folder)
    (path,) = folder.glob("*.json")
    path.write_text("{")


@pytest.mark.parametrize(
    "obstacle", [in_the_way, no_lock, no_replacement, no_file, no_place_aside, damaged_without_a_lock]
)
def test_where_nothing_can_be_written_memory_does_with_one_warning(obstacle, folder):
    obstacle(folder)
    before = contents(folder.parent)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        readable = stored()
        for key in ("a", "b"):
            assert readable.get_or_make(key, lambda: ENTRY) == (True, ENTRY)
            assert readable.get_or_make(key, never) == (False, ENTRY)
        readable.put("c", ENTRY)
        assert readable.get("c") == ENTRY
    (message,) = warned(recorded)
    assert message.startswith(f"{folder / 'fake-gpu-sm90-triton-3.6.0.json'} cannot be used")
    assert readable.get("old") == (ENTRY if obstacle in (no_lock, no_replacement) else None)
    assert contents(folder.parent) == before


def test_no_home_directory(monkeypatch):
    monkeypatch.delenv("TRITON_MGIOU_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="^The tuning cache cannot .* home directory.*TRITON_MGIOU_CACHE_DIR"):
        homeless = stored()
    assert homeless.get_or_make("key", lambda: ENTRY) == (True, ENTRY)
    assert "none: " in store.describe()[0]


# Processes.


def test_eight_processes_measure_once_and_agree(folder, tmp_path):
    barrier = FORK.Barrier(8)

    def process(number):
        mine = stored()  # before any of the others writes
        barrier.wait(30)

        def make():
            with (tmp_path / "measured").open("a") as log:
                log.write(f"{number}\n")
            time.sleep(0.3)
            return Entry(OTHERS[number % len(OTHERS)]._asdict(), 1.0 + number, 100.0)

        _, entry = mine.get_or_make("key", make)
        (tmp_path / f"result-{number}").write_text(str(entry))

    processes(process, [(number,) for number in range(8)])
    assert len((tmp_path / "measured").read_text().splitlines()) == 1
    assert len({path.read_text() for path in tmp_path.glob("result-*")}) == 1
    assert stored().get("key").default_us == 100.0
    assert not list(folder.glob("*.damaged"))


def test_processes_do_not_lose_each_others_entries():
    def process(number):
        for step in range(5):
            stored().get_or_make(f"{number} {step}", lambda: ENTRY)

    processes(process, [(number,) for number in range(4)])
    assert len(stored().entries()) == 20


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_a_writer_that_is_killed_leaves_the_file_and_the_lock(moment, folder, monkeypatch):
    stored().get_or_make("old", lambda: ENTRY)
    (path,) = folder.glob("*.json")
    before = path.read_bytes()
    half_way = FORK.Event()

    def hang():
        half_way.set()
        time.sleep(60)

    def half_a_file(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        hang()

    def process():
        monkeypatch.setattr(os, "fsync", half_a_file)
        stored().get_or_make("new", lambda: ENTRY if moment == "writing" else hang())

    child = FORK.Process(target=process)
    child.start()
    assert half_way.wait(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert path.with_suffix(".new").exists() == (moment == "writing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored().get("new") is None
        assert stored().get_or_make("new", lambda: ENTRY) == (True, ENTRY)
        assert stored().entries() == {"old": ENTRY, "new": ENTRY}
    assert not path.with_suffix(".new").exists()


# What a call gets.


def choose(case):
    return store.chosen_layout(case, CANDIDATES, 0)


def remember(entry):
    tuning_cache = store.tuning_cache(CHIP)
    tuning_cache.put("case", entry)
    store.tuning_cache.cache_clear()


def test_the_cache_comes_before_the_default(folder):
    assert choose("case") == DEFAULT
    assert not folder.exists()
    remember(ENTRY)
    assert choose("case") == OTHERS[0]
    assert choose("another case") == DEFAULT


def test_there_is_no_cache_for_the_cpu(monkeypatch):
    remember(ENTRY)
    monkeypatch.undo()
    assert store.chosen_layout("case", CANDIDATES, -1) == DEFAULT


def test_names_of_an_enumeration_have_the_same_entries():
    """Whichever comes first decides what both are called, since the plan is the same."""
    float32, box = torch.float32, ("cxcywhr", "degrees", "uniform", "min")

    def cases(fmt, angle, axis_weight, over):
        launch.forget_plans()
        key = launch.BoxKey(-1, float32, float32, fmt, angle, True, None, True, axis_weight, False, True, True, True)
        call = pairs.BoxPairs(fmt, angle, True, over, axis_weight)
        keys = [pairs.PairKey(-1, float32, float32, call, False, False, True, True, *last) for last in LAST]
        shapes = torch.zeros(3, 4, 2)
        plan, *_ = pairs.prepare_polygons(shapes, shapes, pairs.PolygonPairs(None, None, None, None, over, axis_weight))
        return [launch.box_plan(key).case, *(pairs.pair_plan(key).case for key in keys), plan.case]

    assert cases(*map(Name, box)) == cases(*box)
    launch.forget_plans()


LAST = (False, True, False), (True, False, True)  # value and gradient


def test_a_layout_that_is_no_candidate_is_not_used():
    """It might be too small for the polygons, and give a wrong loss in silence."""
    remember(Entry(Layout(32, 1, 1, 4, 4, 1, 168)._asdict(), 1.0, 2.0))
    with pytest.warns(RuntimeWarning, match="expected one of .*, got {'polygons': 32"):
        assert choose("case") == DEFAULT


# Ranks.


def rank_processes(tmp_path, prepare, tune):
    """What a warm-up gives on two ranks, each with a cache of its own, as on two nodes."""
    master = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def process(rank):
        os.environ["TRITON_MGIOU_CACHE_DIR"] = str(tmp_path / f"node-{rank}")
        client = torch.distributed.TCPStore("127.0.0.1", master.port, is_master=False)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=client)
        variants = [Variant(size) for size in (4, 8)]
        measured = []

        def fastest(plan, *_):
            measured.append(plan.case)
            return Entry(plan.candidates[1]._asdict(), 5.0, 6.0)

        measure.fastest = fastest
        prepare(rank)
        results = [warmup_module._tune(variant, tune)[1] for variant in variants]
        used = [store.chosen_layout(v.plan.case, v.plan.candidates, 0)._asdict() for v in variants]
        result = {
            "measured": measured,
            "used": used,
            "configurations": [each.configuration for each in results],
            "sources": [each.source for each in results],
        }
        (tmp_path / f"result-{rank}").write_text(json.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    processes(process, [(0,), (1,)])
    return [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)]


class Variant(warmup_module._Variant):
    """A variant whose kernel is never launched."""

    def __new__(cls, size):
        types = (torch.float32, torch.float32)
        return super().__new__(cls, types, (size, size), 512, True, torch.device("cpu"), {})

    @property
    def plan(self):
        size = self.size[0]
        return launch.Plan(None, (), f"size {size}", layouts.candidates(size, size, False, 0, False), torch.float32, -1)

    def prepare(self):
        return warmup_module._Prepared(self.plan, self.batch, (), [torch.zeros(())])


def test_two_ranks_measure_once_and_agree(tmp_path):
    first, second = rank_processes(tmp_path, lambda _: None, tune=True)
    assert first["measured"] == ["size 4", "size 8"]
    assert second["measured"] == []
    expected = [layouts.candidates(size, size, False, 0, False)[1]._asdict() for size in (4, 8)]
    assert first["used"] == second["used"] == first["configurations"] == second["configurations"] == expected
    assert (first["sources"], second["sources"]) == (["tuned"] * 2, ["rank"] * 2)
    for node in ("node-0", "node-1"):  # and so do their next runs
        (path,) = (tmp_path / node).glob("*.json")
        entries = json.loads(path.read_text())["configurations"][store.source_hash()]
        assert {name: fields["polygons"] for name, fields in entries.items()} == {
            f"size {size}": layout["polygons"] for size, layout in zip((4, 8), expected, strict=True)
        }


@pytest.mark.parametrize("node", [0, 1])
def test_two_ranks_with_different_files_take_the_first_ones(tmp_path, node):
    def prepare(rank):
        if rank == node:
            entry = Entry(layouts.candidates(4, 4, False, 0, False)[2]._asdict(), 5.0, 6.0)
            store.tuning_cache(CHIP).put("size 4", entry)

    first, second = rank_processes(tmp_path, prepare, tune=False)
    assert first["used"] == second["used"]
    assert first["measured"] == second["measured"] == []
    assert first["sources"] == (["cache", "default"] if node == 0 else ["default", "default"])


def test_a_rank_that_fails_to_measure_does_not_hold_up_the_others(tmp_path):
    def prepare(rank):
        def fail(*_):
            raise MemoryError("no room to measure")

        measure.fastest = fail
        tune = warmup_module._tune

        def tune_and_tell(*arguments):
            try:
                tune(*arguments)
            except MemoryError as error:
                (tmp_path / f"error-{rank}").write_text(str(error))
            return None, store_result

        warmup_module._tune = tune_and_tell

    store_result = warmup_module.WarmupResult(4, 4, "", "", True, {}, None, None, "")
    rank_processes(tmp_path, prepare, tune=True)
    assert [(tmp_path / f"error-{rank}").read_text() for rank in range(2)] == ["no room to measure"] * 2
