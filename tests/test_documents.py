"""The README: its code runs, its commands are the two that it promises, its tables say what the code does."""

from __future__ import annotations

import inspect
import json
import math
import re
import statistics
from pathlib import Path

import mgiou
import pytest
import torch

from bench import report
from tests.helpers import assert_same, assert_zero, box, convex, generator, random_boxes, rectangle_corners
from triton_mgiou import PAPER, MGIoULoss, mgiou_loss, modules
from triton_mgiou.training import AlphaSchedule, schedules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("\n## ")[0]
CODE = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BOTH = ("pred", "target")
NAN, INF = math.nan, math.inf


def section(title):
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def table(title):
    """The rows of the section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


DEFAULTS = {name: inspect.signature(mgiou_loss).parameters[name].default for name in PAPER}


def value_and_gradients(pred, target, **options):
    pred, target = (vertices.clone().requires_grad_() for vertices in (pred, target))
    loss = mgiou_loss(pred, target, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (pred, target))


def test_the_code_is_found():
    assert len(CODE) == README.count("```python") == 4


@pytest.mark.parametrize("code", CODE, ids=["plain PyTorch", "mmdetection", "keypoints", "training"])
def test_code(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert " in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_first_screen_has_two_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```$", FIRST_SCREEN, re.MULTILINE | re.DOTALL)
    assert len(blocks) == README.count("```bash") == FIRST_SCREEN.count("```") / 2 == 2
    assert len(FIRST_SCREEN.splitlines()) < 25
    for block, extra, command in zip(blocks, ("demo", "test"), ("triton_mgiou demo", "pytest -n 2"), strict=True):
        assert block.count("\n") == 1, "one line each"
        environment, install, run = block.strip().split(" && ")
        assert environment == "python3 -m venv .venv"
        assert install == f'.venv/bin/pip install torch==2.13.0 -e ".[{extra}]"'
        assert run == f".venv/bin/python -m {command}"


def test_arguments():
    rows = {name.strip("`"): default.strip("`") for name, default, _ in table("Arguments")}
    parameters = inspect.signature(mgiou_loss).parameters.values()
    assert rows == {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}
    assert list(rows) == [p.name for p in parameters]


def test_options_of_the_module():
    given = inspect.signature(MGIoULoss).parameters
    assert f'`MGIoULoss(reduction="{given["reduction"].default}", loss_weight={given["loss_weight"].default}' in README
    assert tuple(name.strip("`") for name, *_ in table("Arguments")[-5:]) == MGIoULoss.OPTIONS
    assert "takes the last five as options" in section("Arguments").replace("\n", " ")


def test_axis_weights_of_the_table():
    """The unit square against itself, half a unit further and with a corner cut off: a short edge under each rule."""
    (meaning,) = (row[2] for row in table("Arguments") if row[0] == "`axis_weight`")
    threshold, scale = (
        float(re.search(pattern, meaning)[1]) for pattern in (r"than (\S+) of", r"length / \((\S+) ext")
    )
    target = box(0.0, 0.0, 1.0, 1.0, dtype=torch.float64)
    shift = torch.tensor([0.5, 0.0], dtype=torch.float64)

    def loss_with_cut(size, axis_weight):
        cut = torch.tensor([[[size, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, size]]], dtype=torch.float64)
        return mgiou_loss(cut + shift, target, **PAPER | {"axis_weight": axis_weight}).item()

    # The extent is 1.5. (1 - GIoU1D) / 2 is 1/3 on half of the eight sides' normals, 0 on the others, 1/5 on the cut's.
    whole = 1 / 6
    edge = 1.5 / math.sqrt(2)
    assert loss_with_cut(0.99 * threshold * edge, "uniform") == pytest.approx(whole, abs=2e-6)
    assert loss_with_cut(1.01 * threshold * edge, "uniform") == pytest.approx((8 * whole + 0.2) / 9, abs=2e-6)
    size = 0.01
    length = size * math.sqrt(2)
    diagonal = ((0.5 + size) + 0.5) / (2 * 2.5)
    sides = [1 - size, 1.0, 1.0, 1 - size]
    for axis_weight, weigh in [
        ("soft", lambda edges: [-math.expm1(-edge / (scale * 1.5)) for edge in edges]),
        ("length", lambda edges: [edge / sum(edges) for edge in edges]),
    ]:
        *own, short = weigh([*sides, length])
        across = own[1] + own[3]  # the two sides whose normals are in x
        other = weigh([1.0] * 4)
        want = ((across + 2 * other[0]) / 3 + short * diagonal) / (sum(own) + short + sum(other))
        assert loss_with_cut(size, axis_weight) == pytest.approx(want, abs=1e-12)


def test_options_of_polygon_loss():
    kinds = inspect.signature(AlphaSchedule).parameters
    shown = ", ".join(name if p.default is p.empty else f"{name}={p.default!r}" for name, p in kinds.items())
    text = section("PolygonLoss: heads that predict keypoints")
    assert f"`AlphaSchedule({shown})`".replace("'", '"') in text
    assert all(f'"{mode}"' in text for mode in modules.MODES)
    assert all(kind in text for kind in schedules.KINDS)
    assert f"An area below {modules.MIN_AREA:.0e} counts as {modules.MIN_AREA:.0e}".replace("e-06", "e-6") in text


def test_distributed_demo_numbers():
    results = json.loads((ROOT / "bench" / "results" / "demo_distributed_cpu.json").read_text(encoding="utf-8"))
    means = []
    for setting in results["settings"]:
        assert setting["loss_options"] == DEFAULTS, "the defaults are others now: measure again"
        assert [run["seed"] for run in setting["runs"]] == [0, 1, 2]
        means.append(statistics.mean(run["polygon_iou"] for run in setting["runs"]))
    assert f"{means[0]:.4f} in one process, {means[1]:.4f} in two" in section("Distributed training").replace("\n", " ")


def test_the_eager_backend_has_a_second_derivative():
    rng = generator(1)
    pred, target = convex(2, 4, rng).requires_grad_(), convex(2, 5, rng)
    (gradient,) = torch.autograd.grad(mgiou_loss(pred, target, backend="eager"), pred, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), pred)
    assert torch.isfinite(second).all()
    assert second.any()


OURS = "**length, no axis_grad, boundary 0.25**"
WHY = "Why the loss fell while mAP stayed 0"


def results(name):
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def with_worst(values, digits=3):
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f})"


def convergence_rows(task, start, name):
    rows = [
        row
        for row in results("convergence")["rows"]
        if (row["task"], row["start"], row["loss_name"]) == (task, start, name)
    ]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2, 3, 4], f"{task}, {start}, {name}"
    return rows


def test_convergence_numbers():
    rows = [line for line in table(WHY) if line[0] != "loss" and not line[0].startswith("---")]
    width = len(rows[0])
    trained, starts = ([row for row in rows if len(row) == n] for n in (width, 6))
    for rows in (trained, starts):
        assert [row[0] for row in rows if row[0].startswith("**")] == [OURS], "the defaults"
        rows[:] = [[row[0].strip("*"), *row[1:]] for row in rows]
    for name, *cells in trained:
        runs = convergence_rows("digits", "scattered", name)
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("hull_iou", "self_crossing")}
        first, last, zero = (
            statistics.mean(run[key][at] for run in runs)
            for key, at in (("loss", 0), ("loss", 2), ("zero_gradients", 2))
        )
        assert cells == [
            f"{first:.3f}",
            f"{last:.3f}",
            f"{zero:.0%}",
            f"{mean['hull_iou']:.3f}",
            with_worst([run["polygon_iou"] for run in runs]),
            f"{mean['self_crossing']:.0%}",
            with_worst([run["ap50"] for run in runs], 2),
            with_worst([run["ap90"] for run in runs], 2),
        ], name
    for name, *cells in starts:
        places = [("digits", "circle")] + [("vertices", at) for at in ("circle", "random", "tiny", "whole image")]
        ious = [[run["polygon_iou"] for run in convergence_rows(*place, name)] for place in places]
        assert cells == [with_worst(each) for each in ious], name
    suspects = {name for name, *_ in trained if name.startswith("reported")}
    assert suspects == {run["loss_name"] for run in results("convergence")["rows"] if "reported" in run["loss_name"]}
    assert len(trained) > len(starts) > 3

    seeds = range(5)
    reported, no_nan_to_num, no_clamp, published = (
        convergence_rows("digits", "scattered", name)
        for name in ("reported", "reported, no nan_to_num", "reported, no clamp", "MGIoU as published")
    )
    for other in (no_nan_to_num, no_clamp):
        for seed in seeds:
            assert other[seed] == reported[seed] | {"loss_name": other[seed]["loss_name"]}, "they change no digit"
    assert all(run["zero_gradients"] == [0, 0, 0] for run in reported + published), "no vertex is without a gradient"
    with_path = convergence_rows("digits", "scattered", "boundary 0.25")
    assert sum(run["ap50"] < 0.5 for run in with_path) == 1, "one of the five networks"
    unrelated = {tuple(each["sides"]): each["loss"] for each in results("convergence")["unrelated_objects"]}
    ours = convergence_rows("digits", "scattered", OURS.strip("*"))
    ends = [statistics.mean(run["ap50"] for run in runs) for runs in (published, ours)]
    text = section("The loss").replace("\n", " ")
    assert f"end at AP50 {ends[0]:.2f} with the paper's loss, and at {ends[1]:.2f} with this one" in text
    text = section(WHY).replace("\n", " ")
    assert f"{unrelated[0.05, 0.2]:.2f} is the mean loss between two unrelated objects of 5 to 20 %" in text
    assert f"and {unrelated[0.02, 0.1]:.2f} for 2 to 10 %" in text


def test_demo_numbers():
    demo_runs = results("demo_cpu")["runs"]
    assert [run["seed"] for run in demo_runs] == [0, 1, 2, 3, 4]
    assert results("demo_cpu")["loss_options"] == DEFAULTS, "the defaults are others now: measure again"
    iou, ap50, ap75, ap90 = (
        with_worst([run[key] for run in demo_runs]) for key in ("polygon_iou", "ap50", "ap75", "ap90")
    )
    text = section(WHY).replace("\n", " ")
    assert f"polygon IoU {iou}, AP50 {ap50}, AP75 {ap75} and AP90 {ap90}" in text
    assert {"machine", "versions", "date"} <= set(results("demo_cpu"))
    assert "demo --seed" in results("demo_cpu")["command"]


def test_differences_from_the_package():
    rng = generator(8)
    pred, target = random_boxes(6, rng).float(), random_boxes(6, rng).float()
    corners = rectangle_corners(pred), rectangle_corners(target)
    each = mgiou_loss(*corners, reduction="none", **PAPER)
    for reduction, ours in [("none", each), ("sum", each.sum()), ("mean", each.mean())]:
        torch.testing.assert_close(mgiou_loss(*corners, reduction=reduction, **PAPER), ours)
        torch.testing.assert_close(mgiou.MGIoU2D("corner", reduction=reduction)(*corners), ours / 6)
        torch.testing.assert_close(mgiou.MGIoU2DPlus(reduction=reduction)(*corners), ours)

    other_way = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    torch.testing.assert_close(mgiou.MGIoU2D(reduction="none")(pred * other_way, target * other_way), each / 6)

    repeated = corners[0][:, [0, 1, 2, 2]]
    assert mgiou.MGIoU2DPlus(reduction="none")(repeated, corners[1]).isnan().all()
    assert mgiou.MGIoU2D("corner", reduction="none")(corners[0][:, :1].expand(6, 4, 2), corners[1]).isnan().all()
    assert mgiou.MGIoU2D("corner")(torch.zeros(0, 4, 2), torch.zeros(0, 4, 2)).isnan()
    pixels = [(500 * each).half() for each in corners]
    assert mgiou.MGIoU2D("corner", reduction="none")(*pixels).isnan().any()
    assert torch.isfinite(mgiou_loss(*pixels))

    dent = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [1.0, 1.0], [0.0, 4.0]]])
    theirs = mgiou.MGIoU2DPlus._convexity_loss
    torch.testing.assert_close(theirs(3 * dent), 9 * theirs(dent))
    assert not torch.allclose(theirs(dent.roll(2, 1)), theirs(dent))
    for same in (3 * dent, dent.roll(2, 1)):
        torch.testing.assert_close(
            mgiou_loss(same, same, **PAPER | {"convexity_weight": 1.0}),
            mgiou_loss(dent, dent, **PAPER | {"convexity_weight": 1.0}),
        )


def repeated_vertex():
    pred, target = convex(3, 4, generator(2)).float(), convex(3, 5, generator(3)).float()
    again = torch.cat((pred, pred[:, -1:]), dim=1)
    torch.testing.assert_close(mgiou_loss(again, target), mgiou_loss(pred, target))


def one_point():
    square, point = box(0, 0, 2, 2), torch.tensor([[[0.5, 1.25]]])
    for pred, target, term in [(square, point, 0.0), (point, square, 1.0)]:
        loss, *gradients = value_and_gradients(pred, target)
        assert loss == 0.5 + DEFAULTS["boundary_weight"] * term
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def two_points():
    for each in value_and_gradients(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]])):
        assert_zero(each)


def no_vertex():
    for side in BOTH:
        lengths = {f"{side}_lengths": torch.tensor([0])}
        for each in value_and_gradients(box(0, 0, 2, 2), box(1, 0, 2, 2), **lengths):
            assert_zero(each)


def no_area():
    square, line = box(0, 0, 2, 2), torch.tensor([[[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]]])
    for pred, target, term in [(square, line, 0.0), (line, 2 * line, 0.0), (line, square, 1.0)]:
        plain, with_term = (value_and_gradients(pred, target, boundary_weight=weight) for weight in (0.0, 1.0))
        torch.testing.assert_close(with_term[0], plain[0] + term)
        assert_same(with_term[1], plain[1])


def equal_projections():
    line = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]]])
    for each in value_and_gradients(line, 2 * line[:, 1:]):
        assert_zero(each)


def any_finite():
    for scale in (3e38, 1e-38, 1e-44):
        pred, target = (vertices * scale for vertices in (box(0.5, 0.5, 1, 1), box(0, 0, 1, 1)))
        loss, *gradients = value_and_gradients(pred, target, convexity_weight=1.0)
        assert 0 < loss < 1
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def nan_in_a_vertex():
    pred, target = convex(3, 4, generator(4)).float(), convex(3, 5, generator(5)).float()
    clean = value_and_gradients(pred, target, reduction="none")
    for bad in (NAN, INF):
        pred[1, 2, 0] = bad
        for got, want in zip(value_and_gradients(pred, target, reduction="none"), clean, strict=True):
            assert got[1].isnan().all()
            assert_same(got[[0, 2]], want[[0, 2]])
    assert mgiou_loss(pred, target).isnan()


def nan_in_the_padding():
    pred, target = convex(3, 4, generator(6)).float(), convex(3, 5, generator(7)).float()
    want = value_and_gradients(pred, target)
    padded = torch.cat((pred, torch.tensor([NAN, INF]).expand(3, 2, 2)), dim=1)
    got = value_and_gradients(padded, target, pred_lengths=torch.full((3,), 4))
    assert_same(got[0], want[0])
    torch.testing.assert_close(got[1][:, :4], want[1])
    assert_zero(got[1][:, 4:])


def empty_batch():
    loss, gradient, _ = value_and_gradients(torch.zeros(0, 4, 2), torch.zeros(0, 5, 2))
    assert loss == 0
    assert gradient.shape == (0, 4, 2)


DEGENERATE = {
    "an edge of length zero (a repeated vertex)": repeated_vertex,
    "one polygon is a single point": one_point,
    "both are single points": two_points,
    "no real vertex on a side (a length of 0)": no_vertex,
    "a target without an area": no_area,
    "all projections equal on an axis": equal_projections,
    "any finite float32, up to 3e38 or subnormal": any_finite,
    "NaN or Inf in a real vertex": nan_in_a_vertex,
    "NaN or Inf in the padding": nan_in_the_padding,
    "an empty batch": empty_batch,
}


def test_every_degenerate_case_has_a_check():
    assert [case for case, _ in table("Degenerate input")] == list(DEGENERATE)


@pytest.mark.parametrize("check", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_cases(check):
    check()


def speed():
    return report.merged([results(name) for name in ("h200", "h200_others")])


def test_speed_is_that_of_the_results():
    folder = ROOT / "bench/results"
    result = speed()
    assert (folder / "h200.md").read_text() == report.markdown(result)
    for wanted in (report.training_table(result["rows"]), report.large_table(result["rows"], result["rates"])):
        assert wanted.count("\n") > 5
        assert f"\n\n{wanted}\n\n" in section("Speed")
    links = re.findall(r"\(bench/results/(h200[^)]+)\)", section("Speed"))
    assert len(links) == 5
    assert all((folder / link).stat().st_size > 10_000 for link in links)


def test_what_is_said_of_the_speed():
    def training(peer):
        rows = [row for row in results("h200")["rows"] if (row["peer"], row["group"]) == (peer, "training")]
        assert len(rows) > 5
        return {(row["batch"], row["vertices"]): row for row in rows}

    def between(ratios, digits):
        return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}"

    kernel, smooth, plain, reference = (training(peer) for peer in ("kernel", "smooth L1", "L1", "reference"))
    loops = [[1 / row["wall_ratio"]["step"] for row in other.values()] for other in (smooth, plain)]
    graphs = {size: kernel[size]["graph_us"] / smooth[size]["graph_us"] for size in kernel}
    largest = graphs.pop((65536, 8))
    slower = [row["wall_ratio"]["step"] for row in reference.values()]
    compiled = [row for row in results("h200_others")["rows"] if row["peer"] == "compiled dynamic"]
    sizes = {(row["batch"], row["vertices"]): row["wall_ratio"]["step"] for row in compiled}
    at_training, large = [sizes.pop(size) for size in kernel], list(sizes.values())
    text = section("Speed").replace("\n", " ")
    assert (
        f"takes {between(loops[0], 2)} times as long as one with `smooth_l1_loss` on the same tensors, "
        f"and {between(loops[1], 2)} times one with `l1_loss`"
    ) in text
    assert f"{between(graphs.values(), 2)} times as long as `smooth_l1_loss`" in text
    assert f"and {largest:.2f} times at 65536 x 8" in text
    assert (
        f"{between(slower, 0)} times as long as the kernel, `torch.compile` of it {between(at_training, 1)} times, "
        f"and in the large batches below {between(large, 0)} times"
    ) in text


def test_the_times_of_the_first_use_are_the_results():
    measured = results("h200_first_use")
    first, (slow, quick) = measured["first"]["result"], (measured[part] for part in ("host", "host on another machine"))
    processes = (
        "empty caches", "Triton's cache", "after a warm-up",
        "trivial kernel, empty cache", "trivial kernel, Triton's cache",
    )  # fmt: skip
    calls = ("value", "value and gradient", "value, gradient, backward", "kernel[grid](...)", "smooth_l1_loss")
    rows = [row[1:] for row in table("First use and tuning") if set("".join(row[1:])) - set("-us")]
    assert rows == [
        *([f"{first[name]['first call']:.2f}"] for name in processes),
        *([f"{host['result']['us'][name]:.1f}" for host in (slow, quick)] for name in calls),
    ]


def test_what_is_said_of_the_tuning():
    measured, text = results("h200_tuning"), section("First use and tuning").replace("\n", " ")
    steps = measured["training"]["result"]
    assert (steps["compiled"], steps["tuned"]) == (0, 0)
    assert f"In {steps['steps']:,} steps of random B and N" in text
    rows = measured["tuning"]["result"]["rows"]
    gains = [row["gain"] for row in rows if row["gain"] > 0]
    seconds = [row["seconds"]["with the first call"] for row in rows]
    assert max(seconds) < 20
    assert (
        f"gained {min(gains):.1%} to {max(gains):.0%} in {len(gains)} of {len(rows)} variants "
        f"and nothing in the others; each took {min(seconds):.0f} to {max(seconds):.0f} s"
    ) in text


def test_what_the_default_loss_costs_is_the_results():
    rows = [row for row in speed()["rows"] if row["dtype"] == "float32"]
    step = {(f"{row['batch']} x {row['vertices']}", row["peer"]): row.get("graph_us") for row in rows}
    shown = table("Speed")[-8:]
    assert shown[0][0] == "512 x 4"
    for size, *costs in shown:
        assert costs == [report.number(step[size, peer]) for peer in ("kernel", "kernel, defaults")]
