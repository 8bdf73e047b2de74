"""The bench of boxes: each loss that is compared has the value that its definition gives in another way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import shapely
import torch

from bench import documents
from bench.boxes import descent, gaussian, peers, report, speed
from tests.boxes.helpers import random_boxes
from tests.helpers import assert_close, assert_zero, generator

SPACES = pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr"])


def covariance(box, per_size):
    """The covariance matrix of one box, from its rotation matrix."""
    dimensions = len(box) // 2
    cos, sin = math.cos(box[-1]), math.sin(box[-1])
    turn = np.eye(dimensions)
    turn[:2, :2] = [[cos, -sin], [sin, cos]]
    return turn @ np.diag((per_size * np.array(box[dimensions:-1])) ** 2) @ turn.T


def pairs(fmt, batch=12):
    rng = generator(61)
    pred, target = random_boxes(fmt, batch, rng), random_boxes(fmt, batch, rng)
    return pred, target, list(zip(pred.tolist(), target.tolist(), strict=True))


def by_matrices(fmt, per_size, value):
    pred, target, rows = pairs(fmt)
    dimensions = pred.shape[1] // 2
    values = []
    for p, t in rows:
        offset = np.array(p[:dimensions]) - np.array(t[:dimensions])
        values.append(value(offset, covariance(p, per_size), covariance(t, per_size)))
    return pred, target, np.array(values)


@SPACES
def test_kullback_leibler(fmt):
    def value(offset, p, t):
        normal = torch.distributions.MultivariateNormal
        of_p = normal(torch.from_numpy(offset), torch.from_numpy(p))
        of_t = normal(torch.zeros(len(offset), dtype=torch.float64), torch.from_numpy(t))
        return torch.distributions.kl_divergence(of_p, of_t).item()

    pred, target, want = by_matrices(fmt, 0.5, value)
    assert_close(gaussian.kullback_leibler(pred, target), want, atol=1e-10)
    assert_close(gaussian.kld(pred, target), 1 - 1 / (1 + np.log(want + 1)), atol=1e-10)


@SPACES
def test_wasserstein(fmt):
    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(np.sqrt(values)) @ vectors.T

    def value(offset, p, t):
        return offset @ offset + np.trace(p + t - 2 * root(root(p) @ t @ root(p)))

    pred, target, want = by_matrices(fmt, 0.5, value)
    assert_close(gaussian.wasserstein(pred, target), want, atol=1e-10)
    assert_close(gaussian.gwd(pred, target), 1 - 1 / (1 + np.log(want + 1)), atol=1e-10)


@SPACES
def test_kalman_iou(fmt):
    def value(offset, p, t):
        gain = p @ np.linalg.inv(p + t)
        volumes = [2 ** len(offset) * math.sqrt(np.linalg.det(m)) for m in (p, t, p - gain @ p)]
        return volumes[2] / (volumes[0] + volumes[1] - volumes[2])

    pred, target, want = by_matrices(fmt, 0.5, value)
    assert_close(gaussian.kalman_iou(pred, target), want, atol=1e-10)
    assert_close(gaussian.kalman_iou(pred, pred), [1 / (2 ** (1 + pred.shape[1] // 2 / 2) - 1)] * 12, atol=1e-10)
    mahalanobis = by_matrices(fmt, 0.5, lambda offset, _p, t: offset @ np.linalg.inv(t) @ offset)[2]
    assert_close(gaussian.kfiou(pred, target), np.log(mahalanobis + 1) + np.exp(1 - want) - 1, atol=1e-10)


def test_bhattacharyya_by_integration():
    """-log of the integral of sqrt(p q), on a grid."""
    pred, target, rows = pairs("cxcywhr", 4)
    x, y = np.meshgrid(np.linspace(-4, 4, 801), np.linspace(-4, 4, 801))
    points = np.stack((x, y), axis=-1)
    values = []
    for pair in rows:
        densities = []
        for box in pair:
            matrix = covariance(box, 12**-0.5)
            off = points - np.array(box[:2])
            exponent = np.einsum("...i,ij,...j", off, np.linalg.inv(matrix), off)
            densities.append(np.exp(-exponent / 2) / (2 * np.pi * math.sqrt(np.linalg.det(matrix))))
        values.append(-math.log(np.sqrt(densities[0] * densities[1]).sum() * 0.01**2))
    assert_close(gaussian.bhattacharyya(pred, target), values, atol=1e-6)
    assert_close(gaussian.probiou(pred, target), np.sqrt(1 - np.exp(-np.array(values))), atol=1e-6)


def test_bhattacharyya_in_space():
    def value(offset, p, t):
        mean = (p + t) / 2
        spread = np.linalg.det(mean) / math.sqrt(np.linalg.det(p) * np.linalg.det(t))
        return offset @ np.linalg.inv(mean) @ offset / 8 + math.log(spread) / 2

    pred, target, want = by_matrices("cxcyczlwhr", 12**-0.5, value)
    assert_close(gaussian.bhattacharyya(pred, target), want, atol=1e-10)


def test_a_square_is_a_circle_to_the_gaussian_losses():
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.7]], dtype=torch.float64)
    for loss in (gaussian.probiou, gaussian.kld, gaussian.gwd, gaussian.kfiou):
        assert_close(loss(turned, square), loss(square, square), atol=1e-6)
    assert descent.package(turned, square) > 0.05


def test_upright_losses():
    """Two squares of side 2, one unit apart: inter 2, union 6, hull 3 x 2."""
    pred, target = torch.tensor([[1.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert_close(gaussian.upright(pred, target, "GIoU"), [1 - 1 / 3], atol=1e-7)
    assert_close(gaussian.upright(pred, target, "DIoU"), [1 - 1 / 3 + 1 / 13], atol=1e-7)
    assert_close(gaussian.upright(pred, target, "CIoU"), [1 - 1 / 3 + 1 / 13], atol=1e-7)
    wide = torch.tensor([[1.0, 0.0, 2.0, 1.0]])  # inter 1, union 5, hull 3 x 2
    v = 4 / math.pi**2 * (math.pi / 4 - math.atan(2)) ** 2
    assert_close(gaussian.upright(wide, target, "CIoU"), [1 - 1 / 5 + 1 / 13 + v * v / (1 - 1 / 5 + v)], atol=1e-6)


def test_l1():
    pred, target = torch.tensor([[3.0, 1.0, 2.0, 4.0, 0.5]]), torch.tensor([[0.0, 0.0, 2.0, 4.0, 0.25]])
    assert_close(gaussian.l1(pred, target), [(1 + 1 / 3 + 0 + 0 + 0.25) / 5], atol=1e-7)


def test_the_mixed_volume_is_the_derivative_of_the_volume_of_a_sum():
    """|P + e G| = |P| + 3 e V(P, P, G) + ...; the sum of upright prisms is one over the sum of their bases."""
    pred, target, rows = pairs("cxcyczlwhr", 6)
    step = 1e-5
    for (p, t), term in zip(rows, descent.volume_term(pred, target).tolist(), strict=True):
        bases = [descent.corners_of(torch.tensor([box], dtype=torch.float32))[0, :4, :2].double() for box in (p, t)]

        def volume(e, bases=bases, p=p, t=t):
            points = [(a + e * b).tolist() for a in bases[0] for b in bases[1]]
            return shapely.area(shapely.convex_hull(shapely.MultiPoint(points))) * (p[5] + e * t[5])

        mixed = (volume(step) - volume(0)) / (3 * step)
        p_volume, t_volume = math.prod(p[3:6]), math.prod(t[3:6])
        want = 1 - p_volume**2 * t_volume / mixed**3 * 2 * mixed * t_volume / (mixed**2 + t_volume**2)
        assert term == pytest.approx(want, abs=1e-3)
        assert 0 <= term <= 1
    assert_close(descent.volume_term(pred, pred), torch.zeros(6), atol=1e-12)


def test_iou_of_boxes():
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
    assert_close(descent.iou(square, square + torch.tensor([1.0, 0, 0, 0, 0])), [1 / 3], atol=1e-6)
    octagon = 8 * (math.sqrt(2) - 1)  # what a square of side 2 shares with itself turned by 45 degrees
    turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, math.pi / 4]])
    assert_close(descent.iou(square, turned), [octagon / (8 - octagon)], atol=1e-6)
    cube = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0]])
    assert_close(descent.iou(cube, cube + torch.tensor([1.0, 0, 1, 0, 0, 0, 0])), [2 / (16 - 2)], atol=1e-6)
    assert_close(descent.iou(square[:, :4], square[:, :4] + 4), [0.0], atol=0)


@pytest.mark.parametrize("task", descent.LOSSES)
def test_every_start_is_what_it_says(task):
    rng = generator(62)
    goal = descent.targets(task, 10.0, rng)
    near, apart = (descent.start_from(goal, start, rng) for start in ("near", "apart"))
    assert (descent.iou(near, goal) > 0).all()
    assert_zero(descent.iou(apart, goal), "overlap")
    dimensions = goal.shape[1] // 2
    sizes = goal[:, dimensions : 2 * dimensions]
    assert (sizes.amax(1) / sizes.amin(1) <= 10.001).all()


def test_a_run_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(descent, "PAIRS", 6)
    monkeypatch.setattr(descent, "STEPS", 2)
    monkeypatch.setattr(
        descent, "LOSSES", {task: dict(list(all_.items())[-1:]) for task, all_ in descent.LOSSES.items()}
    )
    out = tmp_path / "descent.json"
    monkeypatch.setattr("sys.argv", ["descent", "--out", str(out), "--seeds", "1"])
    descent.main()
    results = json.loads(out.read_text())
    rows = results["rows"]
    assert len(rows) == 2 * len(descent.RATIOS) * (3 + 3 + 3 + 2)
    assert all(0 <= row["iou"] <= 1 for row in rows if row["task"] != "corners")
    assert "space, start: one box, falling steps" in capsys.readouterr().out


def test_free_boxes_arrive():
    rng = generator(63)
    goal = descent.targets("plane", 3.0, rng)[:20]
    first = descent.start_from(goal, "near", rng)
    last = descent.descend(descent.PLANE["uniform, boundary 0.25"], first, goal, 2, decay=True)
    assert (descent.iou(last, goal) > 0.99).all()


def test_probiou_is_written_twice():
    pred, target, _ = pairs("cxcywhr", 30)
    assert_close(peers.probiou(pred, target), gaussian.probiou(pred, target).mean(), atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "corners, then polygons", "smooth L1", "ProbIoU"])
def test_what_is_timed_agrees_with_its_definition(name):
    device = torch.device("cpu")
    loss = peers.peers(device)[name]
    assert peers.disagreement(name, loss, "cxcywhr", 64, device) is None
    assert "disagrees" in peers.disagreement(name, lambda p, t: 1.001 * loss(p, t), "cxcywhr", 64, device)


def test_a_batch_is_as_large_as_was_asked_for():
    assert len(peers.pairs("xyxy", 96, torch.device("cpu"))[0]) == 96
    with pytest.raises(ValueError, match="batch must be a multiple of 32, got 33"):
        peers.pairs("xyxy", 33, torch.device("cpu"))


def test_a_run_of_the_speed_writes_what_it_has_time_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "SIZES", {"cpu": (32,)})
    monkeypatch.setattr(speed, "MILLION", {"cpu": 64})
    monkeypatch.setattr(speed, "ROUNDS", 1)
    kept = {"smooth L1": peers.peers(torch.device("cpu"))["smooth L1"], "ProbIoU": lambda p, t: (p - t).mean()}
    monkeypatch.setattr(speed, "peers", lambda device: kept)  # noqa: ARG005
    out = tmp_path / "boxes.json"
    speed.main(["--out", str(out)])
    found = json.loads(out.read_text())
    assert [(row["fmt"], row["batch"]) for row in found["launches"]] == [
        (fmt, batch) for fmt in speed.LAUNCHED for batch in (64, 96)
    ]
    assert [row["peer"] for row in found["steps"]] == ["smooth L1"]
    assert [text.partition(":")[0] for text in found["left_out"]] == ["ProbIoU at 32"], found["left_out"]
    assert "ProbIoU at 32: disagrees" in capsys.readouterr().out
    speed.main(["--out", str(out), "--seconds", "0"])
    found = json.loads(out.read_text())
    assert found["launches"] == found["steps"] == []
    assert len(found["left_out"]) == 2 * len(speed.LAUNCHED) + 1


def test_a_capture_that_fails_is_named_and_the_run_goes_on(tmp_path, monkeypatch):
    run = speed.Run(tmp_path / "boxes.json", 60.0, {})
    run.results["steps"] = [{"peer": peer, "batch": batch, "loop_us": 1.0} for peer in "AB" for batch in (8, 16)]
    said = {
        "A": ['{"batch": 8, "graph_us": 2.0}', '{"batch": 16, "error": "RuntimeError: capture"}'],
        "B": ['{"batch": 8, "graph_us": 3.0}', '{"batch": 16, "graph_us": 4.0}'],
    }
    monkeypatch.setattr(speed, "_lines_of", lambda arguments, _: (said[arguments[2]], None))
    speed.graphs(run)
    assert [row.get("graph_us") for row in run.results["steps"]] == [2.0, None, 3.0, 4.0]
    assert run.results["left_out"] == ["graphs of A at 16: RuntimeError: capture"]


def test_a_process_that_fails_says_why():
    lines, reason = speed._lines_of(["-c", "print(1); raise ValueError('no device')"], 60.0)
    assert (lines, reason) == (["1"], "ValueError: no device")
    assert speed._lines_of(["-c", "import time; print(2, flush=True); time.sleep(60)"], 3.0) == (["2"], "no time left")


def test_the_documents_take_the_results(tmp_path, monkeypatch):
    def row(peer, loop, graph):
        return {"peer": peer, "batch": 512, "loop_us": loop, "graph_us": graph, "memory_bytes": 11264}

    found = {
        "device": "A GPU",
        "versions": {"torch": "9.9"},
        "commit": "abcdef0",
        "launches": [{"fmt": "cxcywhr", "batch": 2**20, "launch_us": 18.25, "value_us": 9.5, "gb_per_s": 3450.0}],
        "steps": [
            {**row("kernel", 150.0, 5.0), "loop_to_smooth_l1": 1.1},
            row("smooth L1", 137.0, 10.0),
            row("ProbIoU", 3000.0, 90.0),
        ],
        "first_call_s": 1.75,
        "left_out": ["ProbIoU, compiled at 512: no compiler"],
    }
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    documents.results.cache_clear()
    (tmp_path / "h200_boxes.json").write_text(json.dumps(found))
    text = documents.boxes_speed()
    documents.results.cache_clear()
    assert "A GPU, torch 9.9, commit abcdef0" in text
    assert "| 512 | 150 | 1.10 | 5.00 | 0.50 | 20.0 | - | 11264 |" in text
    assert "| 1048576 cxcywhr | 18.2 | 9.50 |" in text
    assert "1.75 s" in text
    assert "no compiler" in text
    assert "left out: ProbIoU, compiled" in report.table(found)
    assert report.table(found).split("\n")[0].split().count("smooth") == 2  # what both ratios are to


def test_the_document_has_the_means_of_a_descent():
    rows = [
        {"task": task, "loss_name": name, "start": start, "steps": steps, "ratio": ratio, "iou": 1 / ratio / (1 + k)}
        for task, names in report.SHOWN.items()
        for name in names
        for start in descent.STARTS
        for k, steps in enumerate(("falling", "constant"))
        for ratio in (1.0, 2.0)
    ]
    text = report.descent({"rows": rows})
    assert "| space | **paper** | 0.750 | 0.750 | 1.000 | 0.500 |" in text
