"""What the two reports saw, reproduced on a CPU, and the parts of bench/detectors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.detectors import plan, report, run, scenes
from bench.detectors.losses import FewVisible, Reported, Watched
from tests.helpers import CLAMP_STOPS_NAN, convex, generator
from tests.oracle import loss as oracle_loss
from triton_mgiou import PolygonLoss

ROOT = Path(__file__).parents[2]
SAMPLES = 64
OURS = PolygonLoss("mgiou")


def batch(seed=0):
    """Predictions near targets of four vertices, one of them not visible, in grid cells, as a pose head has them."""
    rng = generator(seed)
    target = 20 * convex(SAMPLES, 4, rng).float()
    pred = (target + torch.randn(target.shape, generator=rng)).requires_grad_()
    mask = torch.ones(SAMPLES, 4, dtype=torch.bool)
    mask[:, 3] = False
    return pred, target, mask, torch.full((SAMPLES, 1), 400.0)


def train_step(loss, dtype, scale=1.0):
    """The value, and for each sample whether its gradient is finite, under autocast to `dtype` (None: none)."""
    pred, target, mask, area = batch()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        value = loss(pred, target, mask, area)
        value = value[0] if isinstance(value, tuple) else value
    (scale * value).backward()
    return value.item(), pred.grad.flatten(1).isfinite().all(1)


def test_the_reported_loss_hides_its_nan_under_float16():
    """The value looks well, and no sample has a usable gradient: GradScaler would skip this step and every other."""
    value, finite = train_step(Reported(), torch.float16)
    assert 0 < value < 1
    assert finite.all() if CLAMP_STOPS_NAN else not finite.any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_reported_loss_has_a_gradient_in_other_types(dtype):
    value, finite = train_step(Reported(), dtype)
    assert 0 < value < 1
    assert finite.all()


@pytest.mark.parametrize("options", [{"mask": "conditional"}, {"mask": "soft"}, {"clamp": False}, {"sort": False}])
def test_no_other_mask_and_no_missing_clamp_cures_it(options):
    finite = train_step(Reported(**options), torch.float16)[1]
    assert finite.all() if CLAMP_STOPS_NAN else not finite.any()


def test_without_nan_to_num_the_loss_is_nan_at_once():
    """This was the first report; the "fix" made it the second."""
    value, finite = train_step(Reported(nan_to_num=False), torch.float16)
    assert value != value  # noqa: PLR0124
    assert finite.all() if CLAMP_STOPS_NAN else not finite.any()


def test_an_epsilon_that_float16_has_or_float32_projections_cure_it():
    assert train_step(Reported(epsilon=1e-3), torch.float16)[1].all()
    assert train_step(Reported(full_precision=True), torch.float16)[1].all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_ours_has_a_gradient_under_every_autocast(dtype):
    value, finite = train_step(OURS, dtype, scale=2.0**16)
    assert 0 < value < 1
    assert finite.all()


def test_the_reported_loss_in_a_pose_head_takes_hidden_vertices_for_padding():
    """It equals the loss of the visible vertices alone, wherever the hidden one is."""
    pred, target, mask, area = batch()
    expected = Reported()(pred, target, mask, area)
    moved = Reported()(pred, target.roll(1, 1), mask.roll(1, 1), area)
    torch.testing.assert_close(moved, expected)
    hidden = target.clone()
    hidden[:, 3] = torch.nan
    torch.testing.assert_close(Reported()(pred, hidden, mask, area), expected)


def test_watched_counts_the_samples_with_a_bad_gradient():
    class Spoilt(torch.nn.Module):
        def forward(self, pred, *_):
            return (pred[:16] * torch.inf).sum() + pred.sum()

    watched = Watched(Spoilt())
    for seed in range(2):
        watched(*batch(seed)).backward()
    assert [share.item() for share in watched.bad] == [0.25, 0.25]
    with torch.no_grad():
        watched(*batch())
    assert len(watched.bad) == 2


def test_few_visible_vertices_get_the_other_loss():
    pred, target, mask, area = batch()
    mask[:16, 1:] = False  # one left
    mask[16:32, 2:] = False  # two
    few, many = PolygonLoss("l2", return_parts=False), PolygonLoss("mgiou", return_parts=False)
    given = (pred, target, mask, area)
    expected = (few(*(each[:32] for each in given)) + many(*(each[32:] for each in given))) / 2
    torch.testing.assert_close(FewVisible(many, few)(pred, target, mask, area), expected)


def test_few_visible_vertices_are_compared_as_what_they_are():
    """Two as a segment, by the oracle; one as a point, whose loss and gradient are 0: what the crops showed to do."""
    pred, target, mask, area = batch()
    mask[:, 2:] = False
    loss = PolygonLoss("mgiou", reduction="none", return_parts=False)
    options = {"axis_weight": "length", "boundary_weight": 0.25, "reduction": "none"}
    expected = oracle_loss(pred.detach()[:, :2], target[:, :2], **options)
    torch.testing.assert_close(loss(pred, target, mask, area).double(), torch.as_tensor(expected), atol=1e-5, rtol=1e-5)
    mask[:, 1] = False
    value = loss(pred, target, mask, area).sum()
    value.backward()
    assert value == 0
    assert not pred.grad.any()


# ---- plan and report


def test_the_plan_is_in_the_order_of_importance():
    jobs = plan.jobs(plan.FULL)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    parts = [job.part for job in jobs]
    assert parts == sorted(parts, key=["speed", "reports", "table", "close", "rest", "tried", "choice"].index)
    first = [job for job in jobs if job.part == "table"]
    assert [job.seed for job in first] == sorted(job.seed for job in first)
    for task, _, *losses, least in report.TARGETS:
        part = "rest" if least is None else "close" if task in plan.CLOSE else "table"
        for loss in filter(None, losses):
            seeds = {job.seed for job in jobs if (job.task, job.loss, job.part) == (task, loss, part)}
            assert seeds == ({0} if least is None else set(range(18, 30) if task in {"boxes", "long"} else range(3)))
    assert {job.name for job in plan.jobs(plan.TOY)} <= set(names)
    assert plan.tasks(jobs, plan.FULL) == dict.fromkeys(scenes.KEYPOINTS, 300) | dict.fromkeys(scenes.BOXES, 1500) | {
        "squares": 300
    }


def finished(job, **judged):
    return {
        "job": job._asdict(),
        "seconds": 1.0,
        "steps": 10,
        "skipped": 7,
        "skipped_after_20": 0,
        "bad_gradients": 0.25,
        "curves": {"loss": [2.0, 1.0], "box_loss": [4.0, 3.0], "scale": [65536.0, 512.0]},
        "judged": [{"epoch": 2, "AP50": 0.9, "AP75": 0.5, "AP90": 0.1, **judged}],
    }


def test_differences_are_paired_by_seed(tmp_path):
    """+.1, +.2 and +.3 on seeds of their own: .2, with a standard error of .1 / sqrt(3)."""
    for job in plan.jobs(plan.FULL):
        if job.part == "table" and job.task == "hulls":
            better = 0.1 * (job.seed + 1) if job.loss == "mgiou" else 0.0
            row = finished(job, AP75=0.1 * (3 - job.seed) + better)
            (tmp_path / f"{job.name}.json").write_text(json.dumps(row), encoding="utf-8")
    report.write(tmp_path, ())
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("| hulls: mgiou to OKS"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["AP75", "+0.2000", f"{0.1 / 3**0.5:.4f}", "3", "+0.10", "yes"]
    assert "| hulls: mgiou | AP50 | +0.9000 | 0.0000 | 3 | +0.98 | no |" in text
    assert not (tmp_path / "curves.png").exists()
    job = next(job for job in plan.jobs(plan.FULL) if job.watch)
    (tmp_path / f"{job.name}.json").write_text(json.dumps(finished(job)), encoding="utf-8")
    report.write(tmp_path, ())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_close_losses_are_compared_by_the_trainings_that_were_judged_by_more_images(tmp_path):
    for job in plan.jobs(plan.FULL):
        if job.task == "long" and job.loss in {"ProbIoU + angle", plan.OURS} and job.seed in {0, 18, 19}:
            ours = job.loss == plan.OURS
            value = 0.5 + 0.1 * (ours if job.part == "close" else -ours)
            (tmp_path / f"{job.name}.json").write_text(json.dumps(finished(job, AP75=value)), encoding="utf-8")
    found = report.sections(tmp_path)
    assert f"| long: {plan.OURS} to ProbIoU + angle | AP75 | +0.1000 | 0.0000 | 2 | +0.00 | yes |" in found["targets"]
    assert not found["choices"]
    more, few = found["tables"].split("### long\n")
    assert more.startswith("### long, judged by 1500 images\n")
    assert f"| {plan.OURS} | 2 | 0.900 | 0.600 |" in more
    assert "| ProbIoU + angle | 1 | 0.900 | 0.500 |" in few


def test_choices_are_compared_on_their_own_seeds(tmp_path):
    """+.1 and +.3 on two seeds: .2, with a standard error of .1; one more seed of ProbIoU has no part in it."""
    for job in plan.jobs(plan.FULL):
        if job.part in {"choice", "close"} and job.task == "boxes" and job.seed in {12, 17, 18}:
            value = {12: 0.2, 17: 0.4, 18: 0.9}[job.seed]
            if job.loss == "mgiou, floor assigns":
                value += {12: 0.1, 17: 0.3}[job.seed]
            if job.loss in {"ProbIoU + angle", "mgiou, floor assigns"}:
                row = finished(job, AP75=value, **{"AP50-95": 0.5, "IoU": 0.5})
                (tmp_path / f"{job.name}.json").write_text(json.dumps(row), encoding="utf-8")
    (line,) = report.sections(tmp_path)["choices"].splitlines()[4:]
    assert line.startswith(
        "| boxes | mgiou, floor assigns | 2 | +0.0000 (0.0000) | +0.2000 (0.1000) | +0.0000 (0.0000) |"
    )


def test_the_reports_table(tmp_path):
    job = next(job for job in plan.jobs(plan.FULL) if job.loss == "reported, no clamp")
    (tmp_path / f"{job.name}.json").write_text(json.dumps(finished(job)), encoding="utf-8")
    report.write(tmp_path, ())
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| reported, no clamp | 2 to 1 | 4 to 3 | 512 | 10 | 7 | 25 % |" in text


def test_the_page_gets_the_tables_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    marks = "".join(
        f"{name}: <!-- begin: {name} -->\nold\n<!-- end: {name} -->.\n" for name in report.sections(tmp_path)
    )
    page.write_text(marks, encoding="utf-8")
    rows = [{"task": "boxes", "batch": 64, "loss": "mgiou", "ms": 12.345, "fastest": 12.0, "to_own": 0.9}]
    (tmp_path / f"{plan.SPEED.name}.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    report.fill(page, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("\nNot run.\n") == len(report.sections(tmp_path)) - 2
    assert "steps" not in text.split("begin: missing")[1]
    assert "speed: <!-- begin: speed -->\n### Milliseconds" in text
    assert "| boxes | 64 | mgiou | 12.35 | 0.900 |\n<!-- end: speed -->.\n" in text
    report.fill(page, tmp_path)
    assert page.read_text(encoding="utf-8") == text


def test_the_story_is_told_by_hulls_polygons_and_vertices(tmp_path):
    for loss, numbers in {"paper": (0.9, 0.0, 1.0), "mgiou": (0.9, 0.8, 0.0)}.items():
        job = next(job for job in plan.jobs(plan.FULL) if (job.task, job.loss, job.seed) == ("hulls", loss, 0))
        hull, whole, crossing = numbers
        judged = {"hull AP50": hull, "AP50": whole, "crossing": crossing, "mAP50(P)": 0.25}
        (tmp_path / f"{job.name}.json").write_text(json.dumps(finished(job, **judged)), encoding="utf-8")
    text = report.sections(tmp_path)["story"]
    assert "| hulls | paper | 1 | 2 to 1 | 0.900 | 0.000 | 1.000 | 0.250 |" in text
    assert "| hulls | mgiou | 1 | 2 to 1 | 0.900 | 0.800 | 0.000 | 0.250 |" in text


def test_crops_are_averaged_over_their_seeds(tmp_path):
    rows = [{"task": "squares", "loss": "mgiou", "seed": seed, "IoU": 0.5 + 0.2 * seed} for seed in (0, 1)]
    (tmp_path / "crops.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    found = report.sections(tmp_path)
    assert "| mgiou | 2 | 0.600 |" in found["crops of boxes"]
    assert not found["crops of polygons"]


def test_what_was_not_run_is_said(tmp_path):
    jobs = [job for job in plan.jobs(plan.FULL) if job.task != "outlines"]
    for job in jobs:
        (tmp_path / f"{job.name}.json").write_text("{}", encoding="utf-8")
    (tmp_path / "rest-outlines-OKS-seed_0.failed.txt").write_text("Traceback\nValueError: so\n", encoding="utf-8")
    text = report.missing(tmp_path)
    assert "outlines, mgiou (seed 0)" in text
    assert "hulls" not in text
    assert "- rest-outlines-OKS-seed_0: ValueError: so" in text


def test_a_page_does_not_say_not_run_where_nothing_is_missing(tmp_path):
    for job in plan.jobs(plan.FULL):
        (tmp_path / f"{job.name}.json").write_text("{}", encoding="utf-8")
    assert (text := report.missing(tmp_path))
    assert "not run" not in text.lower()


def test_every_result_is_a_training_of_the_plan():
    """Else the report leaves it out; those called "again" are there to be cited."""
    jobs = {job.name: job for job in plan.jobs(plan.FULL)}
    files = [path for path in (ROOT / run.OWN).glob("*-seed_*.json") if not path.stem.startswith("again-")]
    assert files
    for path in files:
        job = json.loads(path.read_text(encoding="utf-8")).get("job", plan.SPEED._asdict())
        assert job == jobs[path.stem]._asdict()


# ---- how long it takes


def progress(tmp_path):
    setup = run.Setup(plan.FULL, tmp_path, tmp_path, False, "cuda", {"device": "H200"})
    jobs = plan.jobs(plan.FULL)
    chosen = {kind: next(job for job in jobs if job.task == kind) for kind in ("hulls", "boxes")}
    return run.Progress(setup, jobs, jobs, 12, 0.0, 1000.0), chosen


def test_a_training_is_expected_to_take_what_epochs_took(tmp_path):
    """Those of its own kind, where there were any, but for the first of each training, which loads and compiles."""
    found, jobs = progress(tmp_path)
    hulls, boxes = jobs["hulls"], jobs["boxes"]
    before = found.seconds(hulls)
    for epoch, seconds in ((1, 100.0), (2, 2.0), (3, 3.0), (4, 30.0)):
        found.heard(None, hulls, "told", (epoch, seconds))
    assert found.seconds(hulls) < before
    assert found.seconds(hulls) == pytest.approx(run.SPARE * (run.START["cuda"] + 3 * hulls.epochs))
    assert found.seconds(boxes) == pytest.approx(run.SPARE * (run.START["cuda"] + 3 * boxes.epochs))
    found.heard(None, boxes, "told", (2, 5.0))
    assert found.seconds(boxes) == pytest.approx(run.SPARE * (run.START["cuda"] + 5 * boxes.epochs))


def test_a_failure_keeps_its_traceback_until_it_is_made_good(tmp_path, capsys):
    found, jobs = progress(tmp_path)
    name = jobs["hulls"].name
    found.heard(SimpleNamespace(device="1"), jobs["hulls"], "failed", "Traceback\nValueError: so")
    assert (tmp_path / f"{name}.failed.txt").read_text(encoding="utf-8").endswith("ValueError: so\n")
    assert not found.finish()
    assert f"{name} failed on device 1: ValueError: so" in capsys.readouterr().out
    (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")  # by another try
    assert found.finish()


def test_what_cannot_be_imported_is_said_at_once(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shapely" else find(name))
    monkeypatch.setattr(sys, "argv", ["bench.detectors", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert "cannot import" in (text := capsys.readouterr().err)
    assert "shapely" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "squared assigns"], "--only: no training's file has 'squared assigns' in its name, as choice-"),
        (["--processes", "-1"], "--processes: expected an integer of 1 or above, got '-1'"),
        (["--report"], "--report: there is no folder"),
        (["--toy"], "has results without --toy, such as table-hulls-OKS-seed_0.json: another --out"),
        ([], "has results of --toy, such as table-hulls-mgiou-seed_0.json: another --out"),
    ],
)
def test_what_would_do_nothing_or_mix_results_is_refused(tmp_path, monkeypatch, capsys, options, message):
    """A run said that all was done, also where a name was misspelt or the results were those of the toy size."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in run.NEEDED else find(name))
    out = tmp_path / "out"
    if "--report" not in options:
        out.mkdir()
        for name, command in (("OKS", ""), ("mgiou", " --toy")):
            row = {"command": f"python -m bench.detectors{command}"}
            (out / f"table-hulls-{name}-seed_0.json").write_text(json.dumps(row), encoding="utf-8")
    monkeypatch.setattr(run, "train_missing", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(sys, "argv", ["bench.detectors", "--out", str(out), *options])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_is_named(name, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in run.NEEDED else find(name))
    (tmp_path / "file").write_text("")
    out = tmp_path / name
    monkeypatch.setattr(sys, "argv", ["bench.detectors", "--toy", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert f"argument --out: cannot make the folder {out}: " in capsys.readouterr().err


def test_the_gpus_that_may_be_used(monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.find_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run.find_devices() == ["3", "5"]
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    assert run.find_devices() == ["cpu"]


@pytest.mark.parametrize("page", run.PAGES, ids=lambda page: page.parent.name)
def test_pages_hold_the_results_that_are_there(page, tmp_path):
    before = (ROOT / page).read_text(encoding="utf-8")
    copy = tmp_path / "page.md"
    copy.write_text(before, encoding="utf-8")
    report.fill(copy, ROOT / run.OWN)
    assert copy.read_text(encoding="utf-8") == before


def test_the_remains_of_another_package_do_not_stop_the_bench(tmp_path, monkeypatch):
    """A folder of metadata without a name, as an interrupted pip leaves it."""
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    versions = run.facts(toy=True, kind="cpu")["versions"]
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"triton-mgiou", *run.VERSIONS}
