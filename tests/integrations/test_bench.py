"""bench/detectors at toy size, with the real Ultralytics: how it judges, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import OBBModel, PoseModel
from ultralytics.utils.metrics import probiou

from bench.detectors import crops, losses, plan, training
from bench.detectors.scenes import make
from tests.boxes import oracle
from triton_mgiou import PAPER
from triton_mgiou.integrations.ultralytics import set_losses

ROOT = Path(__file__).parents[2]
SQUARE = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]])


def judge(*images):
    """A summary of images: predictions, their scores, targets."""
    found = training.JudgeKeypoints.__new__(training.JudgeKeypoints)
    found.images = [tuple(np.array(each) for each in image) for image in images]
    return found.summary()


def test_what_is_judged():
    """A perfect polygon, one that crosses itself, one too unsure to be shown, and a missed target."""
    crossing = SQUARE[[0, 1, 3, 2]]
    result = judge(
        ([SQUARE, crossing + 50, SQUARE + 200], [0.9, 0.8, 0.1], [SQUARE, SQUARE + 50]),
        (np.zeros((0, 4, 2)), [], [SQUARE]),
    )
    assert result["AP75"] == pytest.approx(34 / 101, abs=1e-4)  # one of three targets, ranked first
    assert result["AP50"] == pytest.approx(67 / 101, abs=1e-4)  # a bow-tie covers one half
    assert result["hull AP50"] == pytest.approx(67 / 101, abs=1e-4)
    assert result["crossing"] == pytest.approx(0.5)
    assert result["IoU"] == pytest.approx(0.75)
    assert result["angle error"] == pytest.approx(0)


def test_variants_of_the_loss_of_boxes_differ_by_what_they_say():
    """A shift by (3, 1) of a box of 12 x 5 turned by 90 degrees: 1 along its 12, 3 along its 5."""
    target = torch.tensor([[50.0, 40, 12, 5, math.pi / 2]])
    pred = target + torch.tensor([3.0, 1, 0, 0, 0])
    scores, positive = torch.tensor([[[0.25], [1.0]]]), torch.ones(1, 2, dtype=torch.bool)
    targets = target[None].expand(1, 2, 5)
    rest = (
        torch.zeros(2, 2),
        targets,
        scores,
        scores.sum(),
        positive,
        torch.tensor([64.0, 64]),
        torch.full((2, 1), 8.0),
    )

    def loss(**options):
        """Of the first box, which has a score of .25; the second one is right."""
        made = training.BoxVariant(16, dict(PAPER), 2.0, **options)
        value = made(torch.zeros(1, 2, 64), torch.stack((pred, target), 1), *rest)[0].item()
        return value * (1.5 / 0.5 if "root" in options else 1.25 / 0.25)

    (plain,) = oracle.per_sample_loss(pred, target, "cxcywhr", **PAPER)
    assert loss() == pytest.approx(2 * plain, rel=1e-5)
    assert loss(root=True) == pytest.approx(2 * plain, rel=1e-5)
    assert loss(centre=0.5) == pytest.approx(2 * (plain + 0.5 * (1 / 12 + 3 / 5)), rel=1e-5)
    assert loss(saturating=True) == pytest.approx(1 - math.exp(-2 * plain), rel=1e-5)
    assert loss(quadratic=True) == pytest.approx(rooted(2 / 13, 6 / 8), rel=1e-5)


def rooted(*distances):
    """The root of the mean of squared GIoU1D losses, twice what is a loss, with the millionth in it."""
    return math.sqrt(np.square(distances).mean() + 1e-6) - 1e-3


def test_the_quadratic_loss_of_boxes_is_over_the_directions_of_both():
    target = torch.tensor([[50.0, 40, 12, 5, 0.3]])
    wider, turned = target.clone(), target.clone()
    wider[0, 2] = 18
    turned[0, 4] += math.pi / 4
    assert 2 * losses.quadratic(wider, target).item() == pytest.approx(rooted(1 - 12 / 18, 0), rel=1e-4)
    width = 17 / math.sqrt(2)  # of each on the directions of the other
    assert 2 * losses.quadratic(turned, target).item() == pytest.approx(rooted(1 - 12 / width, 1 - 5 / width), rel=1e-4)
    assert losses.quadratic(target, target).item() == pytest.approx(0, abs=1e-6)


def criterion_of(model, trainer_class):
    """The criterion of a model, with what a trainer of this class puts into it."""
    model.args, model.criterion = get_cfg(), None
    trainer = trainer_class.__new__(trainer_class)
    trainer.model, trainer.ema, trainer.data, trainer.args = model, None, {}, model.args
    trainer.epoch, trainer.epochs = 0, 1
    set_losses(trainer)
    return model.criterion


def test_the_assigner_takes_what_the_name_of_a_loss_of_boxes_says():
    """A box of 12 x 5 that is shifted along its 12: a function of its MGIoU m, or ProbIoU."""
    functions = {
        "squared": lambda m: max(m, 0) ** 2,
        "power 1.5": lambda m: max(m, 0) ** 1.5,
        "Jaccard": lambda m: max(m, 0) / (2 - max(m, 0)),
        "shifted": lambda m: ((1 + m) / 2) ** 4,
        "exponential 3": lambda m: math.exp(-3 * (1 - m) / 2),
        "exponential 4": lambda m: math.exp(-4 * (1 - m) / 2),
        "floor .7": lambda m: max(m, 0.7) ** 2,
        "floor": lambda m: max(m, 0.5) ** 2 + min(m - 0.5, 0) / 1024,
    }
    target = torch.tensor([[50.0, 40, 12, 5, math.pi / 2]])
    shifts = torch.zeros(4, 5)
    shifts[:, 1], shifts[3, 0] = torch.tensor([3.0, 9, 30, 30]), 20
    mgious = [(9 / 15 + 1) / 2, (3 / 21 + 1) / 2, (-18 / 42 + 1) / 2, (-18 / 42 - 15 / 25) / 2]
    preds, targets = target + shifts, target.expand(4, 5)
    model = OBBModel("yolo11n-obb.yaml", nc=1, verbose=False)
    for name in (name for name, options in plan.BOX_LOSSES.items() if options is not None):
        criterion = criterion_of(model, training._boxes(plan.Job("tried", "boxes", name, 0, 1)))
        found = criterion.assigner.iou_calculation(targets, preds)
        if "ProbIoU assigns" in name:
            assert torch.equal(found, probiou(targets, preds).squeeze(1))
        else:
            own = (function for words, function in functions.items() if f"{words} assigns" in name)
            function = next(own, lambda m: max(m, 0))
            assert found.tolist() == pytest.approx([function(m) for m in mgious], rel=1e-5, abs=1e-6)


def test_the_assigner_of_yolo26_takes_what_the_name_of_a_loss_says():
    """A polygon of 12 x 5 read from another vertex is the same; shifted by 3 along its 12 it has a MGIoU of .8."""
    target = torch.tensor([[4.0, 5], [16, 5], [16, 10], [4, 10]])
    polygons = torch.stack((target.roll(1, 0), target + torch.tensor([3.0, 0])))[None]
    indices = (torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    boxes = torch.tensor([[[4.0, 5, 16, 10]]])
    seen = torch.cat((target, torch.ones(4, 1)), 1)[None, None]
    model = PoseModel("yolo26n-pose.yaml", nc=1, data_kpt_shape=[4, 3], verbose=False)
    distances = (polygons[0] - target).square().sum(2) / (12 * 5 * 0.53)
    oks = (-distances / (2 * 0.25) ** 2 / 2).exp().mean(1).tolist()  # a sigma of one over the number of vertices
    names = {
        "YOLO26, mgiou": [1, 0.8],
        "YOLO26, mgiou, squared assigns": [1, 0.64],
        "YOLO26, mgiou, OKS assigns": oks,
    }
    for name, expected in names.items():
        both = criterion_of(model, training._keypoints(plan.Job("speed", "hulls", name, 0, 1)))
        for criterion in (both.one2many, both.one2one):
            found = criterion.assigner.pair_overlaps(
                indices, boxes, boxes.expand(1, 2, 4), pd_kpts=polygons, gt_kpts=seen
            )
            assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_float32_decode_rounds_no_place():
    """A centre 1/1024 beside a grid point at 39.5, which float16 knows by thirty-seconds only."""
    anchor = torch.tensor([[39.5, 39.5]]).half()
    model = OBBModel("yolo11n-obb.yaml", nc=1, verbose=False)
    job = plan.Job("tried", "boxes", "mgiou, squared assigns, float32 decode", 0, 1)
    criterion = criterion_of(model, training._boxes(job))
    criterion.use_dfl = False
    box = criterion.bbox_decode(anchor, torch.tensor([[[2, 2, 2 + 1 / 512, 2]]]).half(), torch.zeros(1, 1, 1))
    assert box.tolist() == [[[39.5 + 1 / 1024, 39.5, 4 + 1 / 512, 4, 0]]]
    model = PoseModel("yolo11n-pose.yaml", nc=1, data_kpt_shape=[4, 3], verbose=False)
    job = plan.Job("speed", "corners", "hybrid, float32 decode", 0, 1)
    criterion = criterion_of(model, training._keypoints(job))
    polygon = criterion.kpts_decode(anchor, torch.tensor([0.25 + 1 / 2048, 0.25, 1]).half().expand(1, 1, 4, 3))
    assert polygon.tolist() == [[[[39.5 + 1 / 1024, 39.5, 1]] * 4]]
    assert box.dtype == polygon.dtype == torch.float32


def test_crops_that_are_on_file_are_in_the_plan():
    rows = json.loads((ROOT / crops.OUT).read_text(encoding="utf-8"))["rows"]
    assert {(row["task"], row["loss"], row["seed"]) for row in rows} <= set(crops.PLAN)


def test_rows_of_crops_that_do_not_exist_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        crops.main(["--out", str(tmp_path / "crops.json"), "--only", "squares-ProbIoU"])
    assert "no row's name has 'squares-ProbIoU' in it, as 'squares, ProbIoU + angle, 0' has" in capsys.readouterr().err


@pytest.mark.parametrize(("turn", "error"), [(10, 10), (50, 40), (90, 0), (-15, 15)])
def test_the_error_of_an_angle_does_not_care_for_quarter_turns(turn, error):
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    middle = SQUARE - 5
    pred = np.stack((cos * middle[:, 0] - sin * middle[:, 1], sin * middle[:, 0] + cos * middle[:, 1]), 1)
    found = training.angle_errors(pred[None], middle[None], np.array([[0.7]]))
    assert found == pytest.approx([error], abs=1e-6)


def test_skipped_steps():
    assert training.skipped_steps([(65536.0, 32768.0), (32768.0, 32768.0), (32768.0, 16384.0), (16384.0, 32768.0)]) == [
        0,
        2,
    ]
    assert training.skipped_steps([(1e-45, 0.0), (0.0, 0.0)]) == [0, 1]
    assert training.skipped_steps([(1.0, 1.0)]) == []


class Knows:
    """Finds in crops what is there, moved to the right and turned."""

    def __init__(self, task, count, right=0.0, turn=0.0):
        _, polygons, boxes = crops.make(task, count, 1)
        move = torch.tensor([right, 0.0, 0, 0, math.radians(turn)])
        self.found = (boxes + move) / torch.tensor([4.0, 4, 4, 4, 1]) if task == "squares" else polygons / 4 + right / 4

    def __call__(self, _):
        return self.found, None


def test_how_crops_are_judged():
    right = crops.judge(Knows("squares", 20), "squares", 20)
    assert (right["IoU"], right["IoU > .90"]) == pytest.approx((1, 1), abs=1e-5)
    assert (right["centre error"], right["size error"], right["angle error"]) == pytest.approx((0, 0, 0), abs=1e-4)
    moved = crops.judge(Knows("squares", 20, right=2.0), "squares", 20)
    boxes = crops.make("squares", 20, 1)[2]
    assert moved["centre error"] == pytest.approx(float((2 / boxes[:, 2]).median()), abs=1e-5)
    for turn in (80.0, 100.0, -10.0):
        assert crops.judge(Knows("squares", 20, turn=turn), "squares", 20)["angle error"] == pytest.approx(10, abs=0.01)
    cut = crops.judge(Knows("corners", 60, right=3.0), "corners", 60)
    assert cut["IoU"] < 0.9
    assert 0 < cut["2 visible"] <= 3 * math.sqrt(2) / 14 + 1e-3


@pytest.mark.parametrize(("task", "name"), [("squares", "mgiou x 2.5 + angle"), ("corners", "mgiou, none below 3")])
def test_a_network_learns_from_crops(task, name):
    begin, end = (crops.train(task, name, 0, steps=steps, images=200)["IoU"] for steps in (1, 40))
    assert end > begin + 0.05


def test_close_trainings_are_judged_by_more_images(tmp_path):
    drawn = tuple(make("long", range(count), 96, split) for split, count in enumerate((2, 5)))
    size = plan.TOY._replace(test_images=3, close_test_images=5)
    for part, images in (("table", 3), ("close", 5)):
        job = plan.Job(part, "long", plan.OURS, 18, 1)
        trainer = training.make_trainer(job, size, drawn, "cpu", tmp_path)
        assert len(trainer.get_dataloader("", mode="val").dataset) == images
        assert len(trainer.get_dataloader("", mode="train").dataset) == 2


def test_toy_size_and_going_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.detectors",
        "--toy",
        "--out",
        tmp_path,
        "--processes",
        "1",
        "--only",
        "boxes",
    ]
    names = {job.name for job in plan.jobs(plan.TOY) if "boxes" in job.name}
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{len(names)} trainings, 0 done before" in first.stdout
    files = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert set(files) == names
    for name in names:
        row = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert row["steps"] == 3
        assert all(np.isfinite(values).all() for values in row["curves"].values())
        assert {"AP50", "AP75", "AP90", "mAP50(B)"} <= set(row["judged"][-1])
    gone = sorted(names)[0]
    (tmp_path / "tables.md").unlink()
    subprocess.run([*command, "--report"], cwd=ROOT, check=True)
    assert (tmp_path / "tables.md").exists()
    (tmp_path / f"{gone}.json").unlink()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{len(names)} trainings, {len(names) - 1} done before" in second.stdout
    again = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {name for name in names if again[name] != files[name]} == {gone}
    assert "### boxes" in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_a_signal_leaves_no_scenes_behind(tmp_path):
    """At full size they are gigabytes."""
    command = [sys.executable, "-m", "bench.detectors", "--toy", "--out", tmp_path / "out", "--only", "hulls"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert "0 done before" in process.stdout.readline()
        assert list(tmp_path.glob("detectors-*"))
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("detectors-*"))


def test_step_times_alone(tmp_path):
    """As in a run that goes on where nothing else is left."""
    options = ["--toy", "--out", tmp_path, "--processes", "1", "--only", "speed"]
    subprocess.run([sys.executable, "-m", "bench.detectors", *options], cwd=ROOT, check=True)
    rows = json.loads((tmp_path / f"{plan.SPEED.name}.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["task"], row["loss"]) for row in rows} == {
        (task, loss) for task, losses in plan.SPEED_LOSSES.items() for loss in losses
    }
    assert all(row["ms"] >= row["fastest"] > 0 for row in rows)
    assert "### Milliseconds" in (tmp_path / "tables.md").read_text(encoding="utf-8")
