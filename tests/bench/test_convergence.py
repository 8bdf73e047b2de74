"""The losses that bench/convergence compares are what they claim to be."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench.convergence import amp, losses, report, run
from tests.helpers import CLAMP_STOPS_NAN, assert_close, assert_gradient_close, assert_zero, convex, generator
from triton_mgiou import PAPER, mgiou_loss

SUSPECTS = ["reported, no nan_to_num", "reported, no clamp", "reported, not sorted by angle"]


@pytest.fixture
def short(monkeypatch):
    """Trainings of a second."""
    for name, value in {"EPOCHS": 2, "STEPS": 60, "TARGETS": 3, "CURVE_POINTS": 2}.items():
        monkeypatch.setattr(run, name, value)


def padded(polygons, size):
    lengths = torch.full((len(polygons),), polygons.shape[1])
    nan = torch.full((len(polygons), size - polygons.shape[1], 2), torch.nan, dtype=polygons.dtype)
    return torch.cat((polygons, nan), dim=1), lengths


@pytest.mark.parametrize("name", ["reported", *SUSPECTS])
def test_the_reported_loss_is_mgiou_where_the_polygons_are_convex(name):
    """Its hard mask finds the padding, and neither clamp nor nan_to_num changes anything."""
    rng = generator(301)
    pred, (target, lengths) = convex(6, 7, rng).requires_grad_(), padded(convex(6, 5, rng), 9)
    values = [
        losses.LOSSES[name](pred, target, lengths, 0.5),
        mgiou_loss(pred, target, target_lengths=lengths, reduction="none", **PAPER),
    ]
    assert_close(values[0], values[1], atol=1e-8)
    gradients = [torch.autograd.grad(value.sum(), pred)[0] for value in values]
    assert_gradient_close(*gradients, rtol=1e-6)


def test_a_mean_over_the_padding_gives_a_perfect_prediction_a_loss():
    target, lengths = padded(convex(6, 6, generator(302)), 9)
    pred = target[:, :6]
    assert_close(losses.LOSSES["reported"](pred, target, lengths, 0.0), [0.0] * 6, atol=1e-7)
    # 3 of 15 axes are padding; their GIoU counts as 0, or, with a sigmoid of 0, as half as much
    assert_close(losses.LOSSES["reported, conditional mask"](pred, target, lengths, 0.0), [3 / 15 / 2] * 6, atol=1e-6)
    soft = losses.LOSSES["reported, soft mask"](pred, target, lengths, 0.0)
    assert_close(soft, [1.5 / 13.5 / 2] * 6, atol=1e-3)


def test_the_factor():
    rng = generator(303)
    pred, (target, lengths) = convex(6, 7, rng), padded(convex(6, 5, rng), 9)
    plain, eightfold = (losses.LOSSES[name](pred, target, lengths, 0.0) for name in ("reported", "reported, times 8"))
    assert_close(eightfold, 8 * plain, atol=1e-12)


@pytest.mark.parametrize("name", ["L1 to resampled vertices", "L2 to resampled vertices"])
def test_resampled_vertices(name):
    """A 2 x 1 rectangle with 6 points: its corners and the middles of its long sides, from any start, either way."""
    target, lengths = padded(torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]]]).double(), 7)
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 1.0], [1.0, 1.0], [0.0, 1.0]]]).double()
    loss = losses.LOSSES[name]
    for shift in range(6):
        for pred in (points.roll(shift, 1), points.flip(1).roll(shift, 1)):
            assert_zero(loss(pred, target, lengths, 0.0), "value")
    assert_close(loss(points + 0.25, target, lengths, 0.0), [0.25 if name.startswith("L1") else 0.0625], atol=1e-12)


def test_the_mix_goes_from_one_loss_to_the_other():
    rng = generator(304)
    given = convex(6, 7, rng), *padded(convex(6, 5, rng), 9)
    mix, l1, end = (
        losses.LOSSES[n] for n in ("L1, then length, no axis_grad", "L1 to resampled vertices", "length, no axis_grad")
    )
    assert_close(mix(*given, 0.0), l1(*given, 0.0), atol=0)
    assert_close(mix(*given, 1.0), end(*given, 1.0), atol=0)
    assert_close(mix(*given, 0.25), 0.75 * l1(*given, 0.0) + 0.25 * end(*given, 0.0), atol=1e-12)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("task", "start"), [("digits", "scattered"), ("vertices", "random")])
def test_seeds_that_train_together_are_as_if_alone(task, start):
    name = "length, no axis_grad, boundary 0.25"
    together = run.run((task, start, name, [0, 1]))
    (alone,) = run.run((task, start, name, [1]))
    assert [row["seed"] for row in together] == [0, 1]
    assert together[0]["loss"] != together[1]["loss"]
    for key in ("loss", "gradient_norm", "loss_curve"):
        assert together[1][key] == pytest.approx(alone[key], rel=2e-3), key
    assert together[1]["hull_iou"] == pytest.approx(alone["hull_iou"], abs=5e-3)
    assert len(alone["ap50_curve"]) == 2


def test_judge():
    """The square itself, a bow-tie of its corners, and the square moved by half its side."""
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    polygons = [square, square[[0, 2, 1, 3]], square + torch.tensor([0.5, 0.0])]
    targets = torch.cat((square, torch.full((2, 2), math.nan))).expand(3, 6, 2)
    result = run.judge(torch.stack(polygons), targets, torch.tensor([4, 4, 4]))
    assert result["polygon_iou"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert result["hull_iou"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert result["self_crossing"] == pytest.approx(1 / 3)
    assert (result["ap50"], result["ap75"], result["ap90"]) == pytest.approx((2 / 3, 1 / 3, 1 / 3))


def test_the_watch_counts_vertices_without_a_gradient():
    watch = run.Watch()
    gradient = torch.zeros(2, 4, 2)
    gradient[0, 1, 0], gradient[1, 2] = 3.0, torch.tensor([0.0, -4.0])
    for _ in range(30):
        watch.step(torch.tensor([1.0, 2.0]), gradient)
    summary = watch.summary()
    assert summary["zero_gradients"] == [0.75] * 3
    assert summary["gradient_norm"] == [3.5] * 3
    assert summary["loss"] == [1.5] * 3


@pytest.mark.usefixtures("short")
def test_the_results_are_written_and_shown(tmp_path):
    rows = run.run(("vertices", "tiny", "reported", [0, 1]))
    run.write(tmp_path / "results.json", {"what": "a test", "rows": rows})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"what": "a test", "rows": rows}
    (line,) = (line for line in report.table(rows).splitlines() if line.startswith("reported"))
    assert f"{(rows[0]['polygon_iou'] + rows[1]['polygon_iou']) / 2:.3f}" in line
    report.draw(tmp_path / "figure.png", rows)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "dtype", "finite", "bad"),
    [
        ("reported", torch.float16, 1, not CLAMP_STOPS_NAN),
        ("reported, no nan_to_num", torch.float16, 0, not CLAMP_STOPS_NAN),
        ("reported, epsilon 1e-4", torch.float16, 1, 0),
        ("reported, in float32", torch.float16, 1, 0),
        ("reported", torch.bfloat16, 1, 0),
        (amp.OURS, torch.float16, 1, 0),
    ],
)
def test_no_step_is_taken_where_gradients_are_bad(name, dtype, finite, bad):
    """In float16 a repeated vertex makes 0 / 0 of the guarded quotients; `nan_to_num` hides it from the value only.

    From PyTorch 2.14 on the clamp stops the gradient of a NaN.
    """
    row = amp.train(name, dtype, steps=6)
    assert (row["finite_values"], row["bad_gradients"]) == (finite, bad)
    assert row["weights_changed"] == (not bad)
    if dtype == torch.float16:
        assert row["skipped"] in ([6] if bad else [0, 1])  # the scale may start one step too high
        assert row["scale"] == 2.0 ** (16 - row["skipped"])
    if finite:
        assert row["loss"][1] == pytest.approx(row["loss"][0], abs=0.02) if bad else row["loss"][1] < row["loss"][0]
