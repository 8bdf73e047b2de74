"""The page "When training goes wrong": each symptom breaks a small training, and its tool finds out why."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import nn

from bench.convergence.losses import reported
from tests.helpers import CLAMP_STOPS_NAN, generator, random_boxes, rectangle_corners
from tests.test_documents import table
from triton_mgiou import mgiou_loss
from triton_mgiou.cli import main
from triton_mgiou.training import GradientMonitor, NonFiniteError, TrainingGuard, TrainingStoppedError, debug

PAGE = "triton_mgiou/training/README.md"
BATCH = 64


def make_model(last=None):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    return nn.Sequential(*layers, last or nn.Identity(), nn.Unflatten(1, (4, 2)))


def make_data():
    """Boxes (x, y, w, h, angle) and their corners, within 0..1 for the most part."""
    boxes = random_boxes(512, generator(0)) * torch.tensor([0.5, 0.5, 0.3, 0.3, 1.0])
    return boxes.float(), (0.5 + 0.4 * rectangle_corners(boxes)).float()


def train(model, data, *, epochs=15, optimizer=None, batch_size=BATCH, loss_of=mgiou_loss, step=None, after_epoch=None):
    """Return the mean loss of each epoch; `step(loss)` is what happens after backward."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    means = []
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(data[0]), generator=generator(epoch)).split(batch_size):
            loss = loss_of(model(data[0][batch]), data[1][batch])
            optimizer.zero_grad()
            loss.backward()
            if step is None:
                optimizer.step()
            else:
                step(loss)
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        if after_epoch is not None:
            after_epoch()
    return means


def hits(model, data):
    """The share of polygons that are near their target, in the place of a detector's mAP."""
    with torch.no_grad():
        return (mgiou_loss(model(data[0]), data[1], reduction="none") < 0.2).double().mean().item()


@pytest.fixture
def diagnose(tmp_path, capsys):
    """Write what a training left, run the command on it, and return its status and output."""

    def run(name, content):
        path = tmp_path / name
        if name.endswith(".csv"):
            rows = zip(range(1, len(content["train/loss"]) + 1), *content.values(), strict=True)
            lines = [",".join(map(str, row)) for row in rows]
            path.write_text("\n".join([",".join(f"{key:>23}" for key in ("epoch", *content)), *lines]))
        else:
            torch.save(content, path)
        status = main(["diagnose", str(path)])
        return status, capsys.readouterr().out

    return run


def nan_in_the_data(_):
    boxes, targets = make_data()
    order = torch.randperm(512, generator=generator(0))
    bad = targets.clone()
    bad[order[BATCH + 9], 2, 0] = float("nan")  # sample 9 of the second batch
    losses = train(make_model(), (boxes, bad), epochs=2)
    assert math.isnan(losses[1])
    with debug():
        train(make_model(), (boxes, targets), epochs=1)
        with pytest.raises(NonFiniteError) as caught:
            train(make_model(), (boxes, bad), epochs=1)
    return str(caught.value)


def overflow_in_float16(_):
    """Corners are the exponential of what the network says, as sizes often are; float16 ends at exp(11.09)."""
    boxes, targets = make_data()
    model = make_model(nn.Sigmoid())
    with torch.no_grad():
        model[4].bias += 2

    def loss_in(dtype):
        return mgiou_loss((12.5 * model(boxes)).to(dtype).exp(), targets)

    with debug():
        for dtype in (torch.bfloat16, torch.float32):
            loss_in(dtype).backward()
        with pytest.raises(NonFiniteError) as caught:
            loss_in(torch.float16)
    assert not torch.isfinite(loss_in(torch.float16))
    assert 32752 < caught.value.report.finite[1] <= 65504, "the finite rest shows how near the limit it is"
    return str(caught.value)


def corrupt_weights(diagnose):
    data, model = make_data(), make_model()
    train(model, data, epochs=1)
    optimizer = torch.optim.Adam(model.parameters())
    assert diagnose("last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})[0] == 0
    with torch.no_grad():
        model[0].weight[4, 1:4] = float("nan")
    assert mgiou_loss(model(data[0]), data[1]).isnan()
    status, output = diagnose("last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert status == 1
    return output


def learning_rate_too_high(diagnose):
    def run(lr):
        model = make_model()
        monitor = GradientMonitor(model)

        optimizer = torch.optim.Adam(model.parameters(), lr=lr)

        def step(_):
            monitor.record()
            optimizer.step()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = train(model, make_data(), optimizer=optimizer, step=step)
        return losses, "\n".join(str(each.message) for each in caught)

    losses, said = run(0.003)
    assert losses[-1] < 0.35
    assert said == ""
    losses, said = run(1.0)
    assert losses[-1] == pytest.approx(0.75, abs=0.01)
    flat = losses[1:]  # from where the shapes have flown apart
    status, output = diagnose("results.csv", {"train/loss": flat, "metrics/mAP50": [0.0] * len(flat)})
    assert status == 1
    assert "learning rate is far too high" in output
    return said


def targets_in_pixels(diagnose):
    boxes, targets = make_data()

    def run(scale):
        data, model, metric = (boxes, scale * targets), make_model(nn.Sigmoid()), []
        losses = train(model, data, after_epoch=lambda: metric.append(hits(model, data)))
        return diagnose("results.csv", {"train/loss": losses, "metrics/mAP50": metric})

    assert run(1)[0] == 0
    status, output = run(640)
    assert status == 1
    return output


def loss_jumps(diagnose):
    """Where a gradient does not shrink towards the minimum, steps that are too long go back and forth across it."""

    def run(lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (4, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        options = {"optimizer": optimizer, "batch_size": 512, "loss_of": nn.functional.smooth_l1_loss}
        return diagnose("results.csv", {"train/loss": train(model, make_data(), **options)})

    assert run(1.0)[0] == 0
    status, output = run(100.0)
    assert status == 1
    return output


def bad_batches(_):
    """One batch in eight holds an Inf; without the guard the first of them ends the run."""
    boxes, targets = make_data()
    bad = boxes.clone()
    bad[100, 3] = float("inf")
    assert math.isnan(train(make_model(), (bad, targets), epochs=2)[1])

    model = make_model()
    guard = TrainingGuard(model, torch.optim.Adam(model.parameters(), lr=0.01))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, (bad, targets), step=guard.step)
    assert (guard.steps, guard.skipped, len(caught)) == (120, 15, 15)
    with torch.no_grad():
        assert mgiou_loss(model(boxes), targets) < 0.3
    return "\n".join(str(each.message) for each in caught)


def amp_step(loss_of, model, batch, optimizer, scaler, watch):
    """A step as detectors take it: the network and the loss under autocast to float16, then GradScaler."""
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        predictions = model(batch[0])
        watch(predictions)
        loss = loss_of(predictions, batch[1])
    scaler.scale(loss).backward()
    return loss


NO_NAN_GRADIENT = "from PyTorch 2.14 on this loss has no NaN gradient"


def reported_loss(predictions, targets, **options):
    """Triangles padded to four vertices with the first one, as the reports pad."""
    lengths = torch.full((len(targets),), 3)
    return reported(predictions, targets, lengths, 0.0, sort=False, **options).mean()


def all_losses_flat(diagnose):
    """The two reports: a finite loss, a NaN gradient, and a GradScaler that skips every step.

    A box head beside the polygon head sees its gradients dropped with the others, so that its loss is flat too.
    """
    if CLAMP_STOPS_NAN:
        pytest.skip(NO_NAN_GRADIENT)
    boxes, targets = make_data()
    data = [(boxes[i : i + BATCH], targets[i : i + BATCH]) for i in range(0, 512, BATCH)]

    def run(loss_of):
        torch.manual_seed(0)
        polygon_head = make_model()
        model = nn.ModuleDict({"polygons": polygon_head, "boxes": nn.Linear(5, 4)})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu")
        columns = {"train/loss": [], "train/box_loss": [], "metrics/mAP50": []}
        taken = 0
        for _ in range(12):
            losses = []
            for images, corners in data:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.float16):
                    polygon_loss = loss_of(polygon_head(images), corners)
                    box_loss = (model["boxes"](images).float() - images[:, :4]).abs().mean()
                scaler.scale(polygon_loss + box_loss).backward()
                before = [parameter.clone() for parameter in model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                taken += any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                losses.append((polygon_loss.item(), box_loss.item()))
            for name, values in zip(columns, zip(*losses, strict=True), strict=False):
                columns[name].append(sum(values) / len(values))
            columns["metrics/mAP50"].append(hits(polygon_head, (boxes, targets)) if taken else 0.0)
        return columns, taken, scaler.get_scale()

    columns, taken, _ = run(lambda predictions, corners: mgiou_loss(predictions.float(), corners))
    assert taken > 80, "with our loss the search ends"
    assert diagnose("results.csv", columns)[0] == 0

    columns, taken, scale = run(reported_loss)
    assert taken == 0
    assert scale == 2.0 ** (16 - 12 * len(data))
    assert all(map(math.isfinite, columns["train/loss"]))
    assert len(set(columns["train/box_loss"])) == 1, "not a weight has moved"
    status, output = diagnose("results.csv", columns)
    assert status == 1
    return output


LINES = {
    "the loss is NaN from some step on": nan_in_the_data,
    "the loss is NaN or Inf, but only in float16": overflow_in_float16,
    "the loss is NaN in the first step after loading weights": corrupt_weights,
    "all losses are flat, the box loss too, mAP stays at 0": all_losses_flat,
    "the loss rises to 0.75 and stays there": learning_rate_too_high,
    "the loss stops far from 0, mAP stays at 0": targets_in_pixels,
    "the loss jumps up and down": loss_jumps,
    "single batches would end the run": bad_batches,
}


def test_every_line_is_reproduced():
    assert [row[0] for row in table(PAGE, "When training goes wrong")] == list(LINES)


@pytest.mark.parametrize("row", table(PAGE, "When training goes wrong"), ids=lambda row: row[0])
def test_the_tool_finds_the_cause(row, diagnose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = LINES[row[0]](diagnose)
    fragments = re.findall(r"`(.*?)`", row[2])
    assert fragments
    assert [fragment for fragment in fragments if fragment not in output] == []


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reported_loss_hides_a_nan_gradient_in_float16_only(dtype):
    """Zero-length axes have a hull of 1e-9, which is 0 in float16: 0 / 0. nan_to_num hides it in the value.

    From PyTorch 2.14 on `clamp` stops the NaN, but an epsilon that is added does not.
    """
    _, targets = make_data()
    pred = (targets + 0.05).requires_grad_()
    padded = torch.cat((targets[:, :3], targets[:, :1]), dim=1)

    def gradient(**options):
        pred.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = reported_loss(pred, padded, **options)
        loss.backward()
        return loss, ~pred.grad.isfinite().flatten(1).all(1)

    loss, is_bad = gradient()
    assert torch.isfinite(loss)
    assert bool(is_bad.all() if dtype == torch.float16 and not CLAMP_STOPS_NAN else not is_bad.any())
    length = torch.zeros(1, dtype=dtype, requires_grad=True)
    (length / (length + 1e-9)).backward()
    assert length.grad.isfinite() == (dtype != torch.float16)
    loss, _ = gradient(nan_to_num=False)
    assert torch.isfinite(loss) == (dtype != torch.float16), "without it, this was the first report"


@pytest.mark.skipif(CLAMP_STOPS_NAN, reason=NO_NAN_GRADIENT)
def test_the_guard_speaks_up_where_the_scaler_skips_every_step(tmp_path):
    boxes, targets = make_data()
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    guard = TrainingGuard(model, optimizer, scaler, checkpoint_dir=tmp_path)
    monitor = GradientMonitor(model)

    def train_on():
        for step in range(100):
            loss = amp_step(reported_loss, model, (boxes[:BATCH], targets[:BATCH]), optimizer, scaler, guard.watch)
            monitor.record(step + 1)
            guard.step(loss)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(TrainingStoppedError) as stopped:
            train_on()
    said = [str(each.message) for each in caught]
    assert guard.steps == 19, "from 65536 to 1 in 16 steps, then `patience`"
    assert guard.search_skips == 16
    assert guard.scaler_skips == 3
    loud = [message for message in said if "no search for a scale any more" in message]
    assert re.match(r"step 17 skipped: gradient of 0\.weight: \d+ NaN and 0 Inf", loud[0])
    assert "64 of 64 watched samples have a bad gradient" in loud[0]
    assert "Compute the loss in float32" in loud[0]
    assert "64 of 64 watched samples have a bad gradient" in str(stopped.value)
