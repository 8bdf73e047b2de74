"""The adapter in the real Ultralytics: criteria, trainings at toy size, resume, checkpoints without us, validators."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import OBBModel, PoseModel
from ultralytics.utils import DEFAULT_CFG, YAML
from ultralytics.utils.loss import KeypointLoss, RotatedBboxLoss
from ultralytics.utils.metrics import probiou

from tests.oracle import loss as oracle_loss
from triton_mgiou import PAPER, PolygonLoss, box_mgiou_loss, mgiou_loss
from triton_mgiou.integrations import ultralytics as adapter
from triton_mgiou.integrations.ultralytics import (
    MGIoUOBBTrainer,
    MGIoUPoseTrainer,
    PolygonOBBValidator,
    PolygonPoseValidator,
)
from triton_mgiou.training import AlphaSchedule

HEADS = ("yolov8n", "yolo11n", "yolo26n")
TRAINERS = {"pose": MGIoUPoseTrainer, "obb": MGIoUOBBTrainer}
ROOT = Path(__file__).parents[2]


class MGIoUMode(MGIoUPoseTrainer):
    mode = "mgiou"


class Gain(MGIoUOBBTrainer):
    gain = 0.5
    options = {"axis_weight": "length", "boundary_weight": 0.25}  # noqa: RUF012


class AllIn(MGIoUPoseTrainer):
    mode = "hybrid"
    alpha = 0.25
    options = {"boundary_weight": 0.5}  # noqa: RUF012


def settings(data, task, folder, head="yolo11n", **more):
    return {
        "model": f"{head}-{task}.yaml",
        "data": str(data[task]),
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
        "imgsz": 64,
        "batch": 3,
        "epochs": 1,
        "workers": 0,
        "device": "cpu",
        "plots": False,
        **more,
    }


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread gains nothing on images this small, and stalls where its core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(task, head, trainer_class=None, objects=(2, 1, 0)):
    """A model with our criterion, its parts, and a batch with these numbers of objects in its images."""
    torch.manual_seed(0)
    hyp = get_cfg(overrides={"epochs": 10})
    if task == "pose":
        model = PoseModel(f"{head}-pose.yaml", nc=2, data_kpt_shape=(4, 3), verbose=False)
    else:
        model = OBBModel(f"{head}-obb.yaml", nc=2, verbose=False)
    model.args = hyp
    trainer_class = trainer_class or TRAINERS[task]
    trainer = trainer_class.__new__(trainer_class)
    trainer.model, trainer.ema, trainer.args, trainer.epochs, trainer.epoch = model, None, hyp, 10, 3
    trainer.data = {}
    adapter.set_losses(trainer)
    count = sum(objects)
    turn = torch.rand(count, generator=torch.Generator().manual_seed(1)) - 0.5
    boxes = torch.rand(count, 4, generator=torch.Generator().manual_seed(2)) * 0.2 + 0.3
    batch = {
        "img": torch.rand(len(objects), 3, 128, 128),
        "batch_idx": torch.tensor([float(image) for image, n in enumerate(objects) for _ in range(n)]),
        "cls": torch.arange(count).remainder(2).float().unsqueeze(1),
        "bboxes": boxes if task == "pose" else torch.cat((boxes, turn[:, None]), 1),
    }
    if task == "pose":
        corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) / 2
        keypoints = boxes[:, None, :2] + corners * boxes[:, None, 2:]
        batch["keypoints"] = torch.cat((keypoints, torch.full((count, 4, 1), 2.0)), 2)
        if count:
            batch["keypoints"][0, 3] = 0  # not visible
    both = (getattr(model.criterion, "one2many", None), getattr(model.criterion, "one2one", None))
    return model, trainer, [part for part in both if part] or [model.criterion], batch


def corners_of(boxes):
    """Corners of (cx, cy, w, h, radians), in order."""
    x, y, w, h, turn = boxes.double().unbind(-1)
    u, v = torch.stack((turn.cos(), turn.sin()), -1), torch.stack((-turn.sin(), turn.cos()), -1)
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    centre = torch.stack((x, y), -1)
    return torch.stack([centre + (a * w[..., None] * u + b * h[..., None] * v) / 2 for a, b in signs], -2)


# ---- criteria


@pytest.mark.parametrize("head", HEADS)
def test_pose_criterion(head):
    """The pose part is the gain times the loss of what Ultralytics hands over, and every sample has a gradient."""
    model, trainer, parts, batch = make("pose", head, AllIn)
    seen = []
    trainer.polygon_loss.register_forward_hook(lambda _, given, value: seen.append((given, value)))
    loss, items = model.loss(batch)
    loss.sum().backward()
    assert loss.sum().isfinite()
    assert len(seen) == len(parts)
    pred, target, mask, area = (each.detach() for each in seen[-1][0])
    options = {"pred_mask": mask, "target_mask": mask, "boundary_weight": 0.5}
    shape = mgiou_loss(pred[..., :2], target[..., :2], reduction="none", **options)
    away = (pred[..., :2] - target[..., :2]).square().sum(-1)
    hidden = ~mask
    assert hidden.any()
    assert hidden.sum(1).max() == 1
    sigmas = 0.25
    l2 = (1 - torch.exp(-away / (8 * sigmas**2 * area))).masked_fill(hidden, 0).sum(1) / mask.sum(1)
    expected = (0.25 * l2 + 0.75 * shape).mean()
    torch.testing.assert_close(seen[-1][1].detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(items["pose_loss"], 12 * expected, rtol=1e-5, atol=1e-6)
    branch = model.model[-1].cv4 if len(parts) == 1 else model.model[-1].one2one_cv4
    gradients = [p.grad for p in branch.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_l2_is_ultralytics_own_loss():
    """Mode "l2" with their tolerances is their loss of keypoints."""
    rng = torch.Generator().manual_seed(3)
    target = torch.rand(20, 4, 3, generator=rng) * 6
    pred, area = target + torch.randn(20, 4, 3, generator=rng), torch.full((20, 1), 30.0)
    mask = torch.rand(20, 4, generator=rng) < 0.7
    own = KeypointLoss(torch.full((4,), 0.25))(pred, target, mask, area)
    torch.testing.assert_close(PolygonLoss("l2", return_parts=False)(pred, target, mask, area), own)


def with_vertices(data, folder, count, **more):
    """The quadrangles again, with their last vertex repeated so that there are `count`."""
    described = YAML.load(data["pose"])
    for split in ("train", "val"):
        shutil.copytree(Path(described["path"]) / "images" / split, folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        for path in (Path(described["path"]) / "labels" / split).glob("*.txt"):
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            text = "\n".join(" ".join(line + line[-3:] * (count - 4)) for line in lines)
            (folder / "labels" / split / path.name).write_text(text, encoding="utf-8")
    YAML.save(folder / "data.yaml", {**described, "path": str(folder), "kpt_shape": [count, 3], **more})
    return {"pose": folder / "data.yaml"}


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("given", [None, [0.01 * (k + 1) for k in range(17)]])
def test_seventeen_vertices_are_no_joints_of_a_person(data, tmp_path, head, given):
    """Of 17 keypoints with visibilities Ultralytics takes the tolerances and weights that COCO has for a person."""
    described = with_vertices(data, tmp_path / "data", 17, **({} if given is None else {"kpt_oks_sigmas": given}))
    expected = torch.tensor(given or [1 / 17] * 17)
    trainer = MGIoUPoseTrainer(overrides=settings(described, "pose", tmp_path, head))
    seen = []
    trainer.add_callback("on_train_epoch_end", lambda t: seen.append(t.model.criterion))
    trainer.train()
    torch.testing.assert_close(trainer.polygon_loss.loss.sigmas, expected)
    assert trainer.validator.sigma == pytest.approx(expected.numpy())
    if head == "yolo26n":
        for part in (seen[0].one2many, seen[0].one2one):
            torch.testing.assert_close(part.assigner.sigmas, expected)
            assert part.target_weights.eq(1).all()
    later = []
    model = YOLO(trainer.last)
    model.add_callback("on_val_end", lambda validator: later.append(validator.sigma))
    model.val(validator=PolygonPoseValidator, data=str(described["pose"]), imgsz=64, device="cpu", plots=False)
    assert later[0] == pytest.approx(expected.numpy())


def test_the_tolerances_of_the_data_are_taken_where_ultralytics_does_not_know_them():
    """As 8.4.0 does not."""
    model, trainer, _, _ = make("pose", "yolo11n")
    assert trainer.polygon_loss.loss.sigmas.tolist() == [0.25] * 4
    trainer.data, trainer.polygon_loss = {"kpt_oks_sigmas": [0.1, 0.2, 0.3, 0.4]}, None
    trainer.set_loss(model.init_criterion())
    torch.testing.assert_close(trainer.polygon_loss.loss.sigmas, torch.tensor([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize("head", HEADS)
def test_obb_criterion(head):
    """The box part is the oracle's loss of the corners by the roots of the scores, the others are Ultralytics' own."""
    model, _, parts, batch = make("obb", head, Gain)
    seen = []

    def note(own, given):
        roots = given[4] ** 0.5
        seen.append((given, RotatedBboxLoss.forward(own, *given[:4], roots, max(roots.sum(), 1), *given[6:])))

    for part in parts:
        part.bbox_loss.register_forward_pre_hook(note)
    loss, items = model.loss(batch)
    loss.sum().backward()
    assert len(seen) == len(parts)
    (_, pred, _, target, scores, _, positive, *_), (_, distribution) = seen[-1]
    values = oracle_loss(
        *(corners_of(boxes[positive].detach()) for boxes in (pred, target)),
        axis_weight="length",
        boundary_weight=0.25,
        reduction="none",
    )
    weight = scores[positive].sum(-1).double() ** 0.5
    assert len(set(weight.tolist())) > 1
    expected = 7.5 * Gain.gain * (torch.as_tensor(values) * weight).sum() / max(weight.sum(), 1)
    torch.testing.assert_close(items["box_loss"].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(items[parts[0].loss_names[2]], 1.5 * distribution.detach())
    gradients = [p.grad for p in model.model[-1].parameters() if p.requires_grad]
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("scores", "weight"), [((0.04,), 0.2), ((0.64, 0.0), 0.8), ((0.16, 0.2), 0.6)])
def test_a_box_that_is_alone_weighs_as_the_root_of_its_score(scores, weight):
    """The sum over its classes; that of the weights, over which they are taken, is at least 1, as Ultralytics' is."""
    target = torch.tensor([[[50.0, 40, 12, 4, 0.3]]])
    pred = target + torch.tensor([0.0, 0, 12, 4, 0])  # twice as long and as wide: an MGIoU of 1/2, a loss of 1/4
    one = torch.ones(1, 1, dtype=torch.bool)
    rest = (torch.tensor([64.0, 64]), torch.full((1, 1), 8.0))
    loss = adapter.MGIoUBoxLoss(16, dict(PAPER), 3.0)
    given = torch.tensor([[scores]])
    value, _ = loss(torch.zeros(1, 1, 64), pred, torch.zeros(1, 2), target, given, given.sum(), one, *rest)
    assert value.item() == pytest.approx(3 * weight * 0.25, rel=1e-5)


@pytest.mark.parametrize("task", TRAINERS)
@pytest.mark.parametrize("head", HEADS[1:])
def test_float16(task, head):
    """Under autocast to float16 the loss is about the float32 one, and no gradient at the loss is NaN or Inf."""
    model, _, parts, batch = make(task, head)
    loss, expected = model.loss(batch)
    seen = []
    part, place = (parts[0].keypoint_loss, 0) if task == "pose" else (parts[0].bbox_loss, 1)
    part.register_forward_pre_hook(lambda _, given: given[place].register_hook(seen.append) and None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=torch.float16):
        loss, items = model.loss(batch)
    scaler.scale(loss.sum()).backward()
    name = "pose_loss" if task == "pose" else "box_loss"
    torch.testing.assert_close(items[name].float(), expected[name], rtol=0.02, atol=0.02)
    assert seen
    assert all(gradient.isfinite().all() for gradient in seen)
    assert any(gradient.any() for gradient in seen)


@pytest.mark.parametrize("task", TRAINERS)
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_without_objects(task, head):
    model, _, _, batch = make(task, head, objects=(0, 0))
    loss, _ = model.loss(batch)
    loss.sum().backward()
    assert loss.sum().isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_shift_costs_what_it_costs_with_probiou():
    """Near the target and along a side: what the gain of boxes is chosen by."""
    target = torch.tensor([[50.0, 40, 30, 12, 0.3]], dtype=torch.float64)
    along = torch.tensor([[math.cos(0.3), math.sin(0.3)]], dtype=torch.float64)
    pred = torch.cat((target[:, :2] + 0.01 * along, target[:, 2:]), 1)
    ours = box_mgiou_loss(pred, target, **MGIoUOBBTrainer.options)
    torch.testing.assert_close(6**0.5 * ours, 1 - probiou(pred, target, eps=1e-12).squeeze(), rtol=1e-3, atol=0)
    assert MGIoUOBBTrainer.gain == pytest.approx(6**0.5, abs=0.1)


def test_a_step_does_not_compute_probiou(monkeypatch):
    model, _, _, batch = make("obb", "yolo11n")
    _, expected = model.loss(batch)
    stock = model.init_criterion()

    def refused(*_, **__):
        raise AssertionError("ProbIoU was computed")

    monkeypatch.setattr("ultralytics.utils.loss.probiou", refused)
    monkeypatch.setattr("ultralytics.utils.tal.probiou", refused)
    _, found = model.loss(batch)
    assert found == expected
    model.criterion = stock
    with pytest.raises(AssertionError, match="ProbIoU was computed"):
        model.loss(batch)


@pytest.mark.parametrize("head", HEADS)
def test_the_angle_loss_is_computed_where_it_counts(head, monkeypatch):
    model, _, parts, batch = make("obb", head)
    stock = model.init_criterion()
    assert model.args.angle == 1
    seen, names = [], parts[0].loss_names
    for part in parts:
        part.bbox_loss.register_forward_pre_hook(lambda _, given: seen.append(given))
    _, items = model.loss(batch)
    _, pred, _, target, scores, total, positive, *_ = seen[-1]
    own = getattr(stock, "one2one", stock).calculate_angle_loss
    expected = own(pred, target, positive, scores[positive].sum(-1), total)
    torch.testing.assert_close(items[names[3]], expected.detach())
    assert expected > 0

    def refused(*_):
        raise AssertionError("the angle loss was computed")

    monkeypatch.setattr(type(parts[0]), "calculate_angle_loss", refused)
    with pytest.raises(AssertionError, match="the angle loss was computed"):
        model.loss(batch)
    model.args.angle = 0.0
    _, without = model.loss(batch)
    assert without[names[3]] == 0
    assert without[names[0]] == items[names[0]]


@pytest.mark.parametrize(("given", "expected"), [({}, 0.0), ({"angle": 0.5}, 0.5)])
def test_the_angle_loss_is_off_unless_it_is_asked_for(data, tmp_path, given, expected):
    assert MGIoUOBBTrainer(overrides=settings(data, "obb", tmp_path, **given)).args.angle == expected
    config = vars(DEFAULT_CFG) | settings(data, "obb", tmp_path) | {"angle": 2.0} | given
    assert MGIoUOBBTrainer(config).args.angle == given.get("angle", 2.0)


@pytest.mark.parametrize("head", HEADS)
def test_the_assigner_of_obb_takes_the_square_of_mgiou_from_a_quarter_on(head):
    """By hand, for a box of 20 x 12 turned by .3: MGIoU is the mean of the GIoU1D along its sides."""
    box = torch.tensor([50.0, 40, 20, 12, 0.3])
    along, across = box.new_tensor([math.cos(0.3), math.sin(0.3)]), box.new_tensor([-math.sin(0.3), math.cos(0.3)])

    def changed(length=0.0, width=0.0, right=0.0, up=0.0):
        return box + torch.cat((right * along + up * across, box.new_tensor([length, width, 0])))

    cases = [
        (changed(), 1),
        (changed(right=5), (15 / 25 + 1) / 2),
        (changed(up=3), (1 + 9 / 15) / 2),
        (changed(length=20), (20 / 40 + 1) / 2),
        (changed(length=20, width=12), (20 / 40 + 12 / 24) / 2),
        (changed(right=16), (4 / 36 + 1) / 2),
        (changed(right=20), (0 + 1) / 2),
        (changed(right=30, up=6), (-10 / 50 + 6 / 18) / 2),
        (changed(right=30, up=18), (-10 / 50 - 6 / 30) / 2),
        (changed(right=300, up=300), (-280 / 320 - 288 / 312) / 2),
    ]
    preds, mgious = zip(*cases, strict=True)
    expected = [mgiou**2 if mgiou > 0.5 else 0.25 - (0.5 - mgiou) / 1024 for mgiou in mgious]
    _, _, parts, _ = make("obb", head)
    for part in parts:
        overlap = part.assigner.iou_calculation(box.expand(len(preds), -1), torch.stack(preds))
        torch.testing.assert_close(overlap, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_place_in_two_targets_belongs_to_the_one_that_its_prediction_overlaps_more(order):
    """Both by less than 1/2: (16 / 80 + 6 / 8) / 2 of the one and (8 / 80 + 6 / 16) / 2 of the other."""
    _, _, (part,), _ = make("obb", "yolo11n")
    targets = torch.tensor([[40.0, 40, 16, 8, 0], [40, 40, 8, 16, 0]])[list(order)]
    preds = torch.tensor([[40.0, 40, 80, 6, 0]]).repeat(12, 1)
    preds[1:, 0] += 200  # out of both targets
    scores, labels, mask = torch.full((1, 12, 2), 0.5), torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    _, boxes, _, positive, _ = part.assigner(scores, preds[None], preds[:, :2], labels, targets[None], mask)
    assert positive[0].tolist() == [True] + 11 * [False]
    assert boxes[0, 0].tolist() == [40, 40, 16, 8, 0]


def test_the_angle_of_a_square_counts_in_the_assigner():
    """On each of the four axes one square's interval lies inside the other's, which is sqrt(2) times as long."""
    _, _, (part,), _ = make("obb", "yolo11n")
    square = torch.tensor([[50.0, 40, 20, 20, 0.3]])
    turned = square + torch.tensor([0, 0, 0, 0, torch.pi / 4])
    torch.testing.assert_close(part.assigner.iou_calculation(square, turned), torch.tensor([0.5]), atol=1e-5, rtol=0)
    assert probiou(square, turned).item() > 0.95


def test_the_assigner_of_yolo26_takes_mgiou_where_the_first_vertex_is_arbitrary():
    """A perfect polygon that starts elsewhere overlaps by 1; with fewer than three vertices the box decides."""
    model, trainer, parts, batch = make("pose", "yolo26n", MGIoUMode)
    target = torch.cat((batch["keypoints"][1:2], batch["keypoints"][1:2]))[None] * 100  # (1, 2, 4, 3)
    target[0, 1, :2, 2] = 0
    target[0, 0, 1, 2] = 1  # hidden, which is there all the same
    boxes = torch.tensor([[[10.0, 10, 40, 40], [10, 10, 40, 40]]])
    pred = target[..., :2].roll(1, 2)
    zero = torch.zeros(2, dtype=torch.long)
    indices = (zero, torch.arange(2), torch.arange(2))
    for part in parts:
        overlap = part.assigner.pair_overlaps(indices, boxes, boxes, pd_kpts=pred, gt_kpts=target)
        torch.testing.assert_close(overlap, torch.ones(2), atol=1e-5, rtol=0)
        pred_far = pred + 1000
        far = part.assigner.pair_overlaps(indices, boxes, boxes, pd_kpts=pred_far, gt_kpts=target)
        torch.testing.assert_close(far, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
        three = target.clone()
        three[0, 0, 0, 2] = 0
        far = part.assigner.pair_overlaps(indices, boxes, boxes, pd_kpts=pred_far, gt_kpts=three)
        torch.testing.assert_close(far, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    loss, _ = model.loss(batch)
    assert loss.sum().isfinite()
    assert trainer.polygon_loss is parts[0].keypoint_loss is parts[1].keypoint_loss


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (KeypointLoss, "forward"),
        (adapter.tal.RotatedTaskAlignedAssigner, "iou_calculation"),
        (adapter.tal.TaskAlignedAssigner, "pair_overlaps"),
        (adapter.PoseTrainer, "resume_training"),
        (adapter.OBBTrainer, "get_model"),
        (adapter.OBBTrainer, "run_callbacks"),
    ],
)
def test_a_changed_signature_names_both_versions(monkeypatch, owner, name):
    function = getattr(owner, name)
    known = adapter.CALLS.pop(function)

    def changed(self, pred, target):
        raise AssertionError(self, pred, target)

    monkeypatch.setitem(adapter.CALLS, changed, known)
    try:
        with pytest.raises(RuntimeError, match=r"ultralytics 8\.4\.\d+ has .*changed\(self, pred, target\).*8\.4\.190"):
            MGIoUPoseTrainer(overrides={"model": "yolo11n-pose.yaml"})
    finally:
        adapter.CALLS[function] = known


def test_a_loss_of_boxes_that_calls_no_probiou_names_both_versions(monkeypatch):
    code = RotatedBboxLoss.forward.__code__
    others = tuple("other_iou" if name == "probiou" else name for name in code.co_names)
    monkeypatch.setattr(RotatedBboxLoss.forward, "__code__", code.replace(co_names=others))
    found = r"ultralytics 8\.4\.\d+ has a RotatedBboxLoss\.forward that does not call probiou.*8\.4\.190"
    with pytest.raises(RuntimeError, match=found):
        MGIoUOBBTrainer(overrides={"model": "yolo11n-obb.yaml"})


def test_a_renamed_part_of_a_criterion_names_both_versions():
    """It must not be set beside what Ultralytics calls, and nothing said."""
    model, trainer, (part,), _ = make("pose", "yolo11n")
    part.kpt_loss = part.__dict__.pop("keypoint_loss")
    with pytest.raises(RuntimeError, match=r"ultralytics 8\.4\.\d+ has a v8PoseLoss without keypoint_loss.*8\.4\.190"):
        adapter.set_losses(trainer)
    assert not hasattr(model.criterion, "keypoint_loss")


def test_a_training_of_boxes_that_is_resumed_keeps_its_angle_loss_without_a_word(data, tmp_path, monkeypatch):
    """Nothing was asked for, so nothing is ignored."""

    def stop(_):
        raise InterruptedTrainingError

    trainer = MGIoUOBBTrainer(overrides=settings(data, "obb", tmp_path, epochs=3, angle=0.5, val=False))
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(InterruptedTrainingError):
        trainer.train()
    said = []
    monkeypatch.setattr(adapter.LOGGER, "warning", said.append)
    resumed = MGIoUOBBTrainer(overrides={"resume": str(trainer.last), "model": str(trainer.last)})
    assert resumed.args.angle == 0.5
    assert not [text for text in said if "angle" in text]


# ---- trainings


@pytest.mark.parametrize(("head", "task"), list(itertools.product(HEADS, TRAINERS)))
def test_train(data, tmp_path, head, task):
    """An epoch with validation: finite losses, those of the average by our loss, metrics by polygons choose best.pt."""
    chosen = settings(data, task, tmp_path, head)
    model, seen = YOLO(chosen.pop("model")), []
    model.add_callback("on_train_epoch_end", lambda t: seen.append((t.model.criterion, t.ema.ema.criterion)))
    model.train(trainer=TRAINERS[task], **chosen)
    trainer = model.trainer
    assert all(np.isfinite(value) for value in trainer.metrics.values())
    assert {"metrics/mAP50(G)", "metrics/mAP50-95(G)", "metrics/mAP50-95(B)"} <= set(trainer.metrics)
    for criterion in seen[0]:
        part = getattr(criterion, "one2one", criterion)
        if task == "pose":
            assert part.keypoint_loss is trainer.polygon_loss
        else:
            assert isinstance(part.bbox_loss, adapter.MGIoUBoxLoss)
    assert trainer.best.exists()
    assert model(np.zeros((64, 64, 3), dtype=np.uint8), verbose=False)


@pytest.mark.parametrize("task", TRAINERS)
def test_train_compiled(data, tmp_path, task, monkeypatch):
    """Ultralytics computes the loss outside of what it compiles; the compiler's own part would take long."""
    compiled = []

    def attempt_compile(model, *, mode, **_):
        compiled.append(torch.compile(model, backend="eager") if mode else model)
        return compiled[-1]

    monkeypatch.setattr("ultralytics.engine.trainer.attempt_compile", attempt_compile)
    trainer = TRAINERS[task](overrides=settings(data, task, tmp_path, compile=True))
    seen = []
    trainer.add_callback("on_train_epoch_end", lambda t: seen.append(t.model.criterion))
    trainer.train()
    assert compiled[0] is trainer.model
    assert isinstance(compiled[0], torch._dynamo.OptimizedModule)
    (criterion,) = seen
    assert (criterion.keypoint_loss is trainer.polygon_loss) if task == "pose" else criterion.bbox_loss.gain == 2.5


@pytest.mark.parametrize("task", TRAINERS)
def test_train_with_one_class_several_sizes_and_plots(data, tmp_path, task):
    more = {"single_cls": True, "multi_scale": 0.5, "plots": True, "epochs": 2, "close_mosaic": 1}
    trainer = TRAINERS[task](overrides=settings(data, task, tmp_path, **more))
    trainer.train()
    assert all(np.isfinite(value) for value in trainer.metrics.values())
    assert trainer.validator.metrics.nt_per_class.tolist() == [6]
    for name in ("train_batch0.jpg", "val_batch0_labels.jpg", "val_batch0_pred.jpg", "PolygonPR_curve.png"):
        assert (trainer.save_dir / name).stat().st_size > 0


@pytest.mark.parametrize("task", TRAINERS)
def test_the_loss_is_ours_whatever_callbacks_a_user_replaces(data, tmp_path, task):
    chosen = settings(data, task, tmp_path, epochs=2)
    model, seen = YOLO(chosen.pop("model")), []

    def replace(trainer):
        if trainer.epoch == 0:
            trainer.set_callback("on_train_epoch_start", lambda _: None)
        else:
            trainer.callbacks = dict.fromkeys(trainer.callbacks, ())

    def note(trainer):
        criterion = trainer.model.criterion
        seen.append(criterion.keypoint_loss if task == "pose" else criterion.bbox_loss)

    model.add_callback("on_train_start", lambda trainer: trainer.set_callback("on_train_epoch_start", replace))
    model.add_callback("on_train_batch_end", note)
    model.train(trainer=TRAINERS[task], **chosen)
    expected = type(model.trainer.polygon_loss) if task == "pose" else adapter.MGIoUBoxLoss
    assert [type(loss) for loss in seen] == 4 * [expected]  # two epochs of two batches


def test_what_the_first_versions_set_beside_the_validator_is_set(data, tmp_path, monkeypatch):
    """Theirs is where 8.4.0 names the losses; without them all but the first are missing in results.csv."""
    stock = adapter.PoseTrainer.get_validator

    def older(trainer):
        trainer.loss_names = ("box_loss", "pose_loss")
        return stock(trainer)

    monkeypatch.setattr(adapter.PoseTrainer, "get_validator", older)
    trainer = MGIoUPoseTrainer(overrides=settings(data, "pose", tmp_path))
    trainer.test_loader = None
    assert isinstance(trainer.get_validator(), PolygonPoseValidator)
    assert trainer.loss_names == ("box_loss", "pose_loss")


@pytest.mark.parametrize(("by_time", "steps"), [(None, 4), (0.01, 10)])
def test_the_length_of_a_schedule_is_changed_in_trainings_by_time_only(by_time, steps):
    class OwnSchedule(MGIoUPoseTrainer):
        def make_loss(self, sigmas):
            return PolygonLoss("hybrid", alpha=AlphaSchedule(4), sigmas=sigmas, return_parts=False)

    _, trainer, (criterion,), _ = make("pose", "yolo11n", OwnSchedule)
    trainer.args.time = by_time
    trainer.set_loss(criterion)
    schedule = trainer.polygon_loss.alpha
    assert (schedule.total_steps, schedule.step_count.item()) == (steps, 3)


# ---- what is refused


SET_BY_THE_ADAPTER = {
    "reduction": "sum",
    "loss_weight": 2.0,
    "weight": None,
    "avg_factor": 2.0,
    "fmt": "cxcywhr",
    "angle": "degrees",
    "clockwise": False,
    "mode": "l2",
    "alpha": 0.5,
    "return_parts": True,
}
WRONG = [
    ("pose", {"mode": "Hybrid"}, ValueError, "Wrong: mode must be one of 'mgiou', 'l2', 'hybrid', got 'Hybrid'"),
    ("pose", {"alpha": -1}, ValueError, r"Wrong: alpha must be in 0\.\.1, got -1"),
    ("pose", {"alpha": "0.5"}, TypeError, "Wrong: alpha must be a number .*got str"),
    ("pose", {"mode": "mgiou", "alpha": 2}, ValueError, r"Wrong: alpha must be in 0\.\.1, got 2"),
    ("pose", {"sigmas": 0}, ValueError, r"Wrong: sigmas must be finite numbers above 0, got \[0\.0\]"),
    ("pose", {"sigmas": "x"}, TypeError, "Wrong: sigmas must be numbers above 0, got 'x'"),
    ("pose", {"sigmas": [[1], [1, 2]]}, TypeError, "Wrong: sigmas must be numbers above 0, got .*1, 2"),
    ("pose", {"sigmas": [1, 2]}, ValueError, "Wrong: sigmas must be one or 4 numbers, .*got 2"),
    ("pose", {"schedule": {"kind": "cos"}}, ValueError, "Wrong: schedule: kind must be one of .*got 'cos'"),
    ("pose", {"schedule": {"total_steps": 3}}, TypeError, "Wrong: schedule must be among kind, .*got total_steps"),
    ("pose", {"mode": "l2", "schedule": {"start": 2}}, ValueError, "Wrong: schedule: start must be in .*got 2"),
    ("pose", {"schedule": None}, TypeError, "Wrong: schedule must be a mapping, got NoneType"),
    ("obb", {"gain": -1.0}, ValueError, r"Wrong: gain must be 0 or above, got -1\.0"),
    ("obb", {"gain": math.nan}, ValueError, "Wrong: gain must be finite, got nan"),
    ("obb", {"gain": 1e40}, ValueError, r"Wrong: gain must be at most 1e\+30, got 1e\+40"),
    ("obb", {"gain": None}, TypeError, "Wrong: gain must be a number, got NoneType"),
    ("obb", {"gain": "2"}, TypeError, "Wrong: gain must be a number, got str"),
    ("obb", {"gain": True}, TypeError, "Wrong: gain must be a number, got bool"),
    ("obb", {"options": {"convexity_weight": 1.0}}, ValueError, "Wrong: options: convexity_weight must be 0.*got 1.0"),
    *(
        (task, {"options": {name: value}}, TypeError, f"Wrong: options must be among axis_weight, .*got {name}")
        for task in TRAINERS
        for name, value in SET_BY_THE_ADAPTER.items()
    ),
    *(
        (task, {"options": options}, error, message)
        for task in TRAINERS
        for options, error, message in (
            (None, TypeError, "Wrong: options must be a mapping, got NoneType"),
            ({"axis_weight": "lenght"}, ValueError, "Wrong: options: axis_weight must be one of .*got 'lenght'"),
            ({"axis_grad": 1}, TypeError, "Wrong: options: axis_grad must be a bool, got int"),
            ({"boundary_weight": -1}, ValueError, "Wrong: options: boundary_weight must be 0 or above, got -1"),
            ({"backend": "cuda"}, ValueError, "Wrong: options: backend must be one of .*got 'cuda'"),
        )
    ),
    *(
        ("pose", {name: "mgiou"}, TypeError, f"Wrong: attributes must be among mode, alpha, .*got {name}")
        for name in ("mdoe", "moed", "aplha", "shedule", "schedlue", "sigams", "optoins", "opions", "Mode", "ALPHA")
    ),
    *(
        ("obb", {name: 1.0}, TypeError, f"Wrong: attributes must be among options, gain, got {name}")
        for name in ("gian", "optinos", "Gain", "GAIN", "Options")
    ),
    *(
        (task, {name: 0.5}, TypeError, f"Wrong: options of the loss belong into options, such as .*got {name}")
        for task in TRAINERS
        for name in ("boundary_weight", "bounday_weight", "axis_wieght", "axsi_grad", "convexity_wight")
    ),
]


@pytest.mark.parametrize(("task", "attributes", "error", "message"), WRONG)
def test_wrong_attributes_are_told_before_the_training(data, tmp_path, task, attributes, error, message):
    trainer_class = type("Wrong", (TRAINERS[task],), attributes)
    with pytest.raises(error, match=message):
        trainer_class(overrides=settings(data, task, tmp_path))


class Mixin:
    mdoe = "what it is to a mixin behind the trainer"


@pytest.mark.parametrize("task", TRAINERS)
def test_what_a_subclass_adds_is_its_own(data, tmp_path, task):
    """Values under names that are like an option's, methods and properties under any, and what its methods read."""
    own = dict.fromkeys(
        ("model_name", "model", "node", "demo", "scheduler", "sigma", "option", "again", "alpha2", "gains")
    )
    own |= {"mdoe": id, "optoins": property(type), "gian": staticmethod(max), "_mdoe": 3}
    own |= {"MODE": "its own", "GAIN": 3, "boundary_weight": 0.1, "axis_weights": 0.2, "freeze_backbone": True}
    trainer_class = type("Own", (TRAINERS[task], Mixin), own)
    trainer = trainer_class(overrides=settings(data, task, tmp_path))
    assert (trainer.boundary_weight, trainer.gian(1, 2), trainer.optoins) == (0.1, 2, trainer_class)


@pytest.mark.parametrize("task", TRAINERS)
def test_a_property_may_read_an_option_of_the_loss(data, tmp_path, task):
    own = {"boundary_weight": 0.1, "options": property(lambda trainer: {"boundary_weight": trainer.boundary_weight})}
    assert type("Own", (TRAINERS[task],), own)(overrides=settings(data, task, tmp_path)).options == {
        "boundary_weight": 0.1
    }


def test_a_constant_may_give_an_option(data, tmp_path):
    own = {"GAIN": 2.0, "gain": 2.0}
    assert type("Own", (MGIoUOBBTrainer,), own)(overrides=settings(data, "obb", tmp_path)).gain == 2.0


@pytest.mark.parametrize("task", TRAINERS)
def test_a_misspelt_attribute_is_found_in_the_class_between(data, tmp_path, task):
    between = type("Between", (TRAINERS[task],), {"optoins": {}})
    with pytest.raises(TypeError, match=r"Wrong: attributes must be among .*, got optoins"):
        type("Wrong", (between,), {"options": {}})(overrides=settings(data, task, tmp_path))


@pytest.mark.parametrize("task", TRAINERS)
def test_without_shapely_no_training_begins(data, tmp_path, monkeypatch, task):
    monkeypatch.setitem(sys.modules, "shapely", None)
    trainer = TRAINERS[task](overrides=settings(data, task, tmp_path))
    batches = []
    trainer.add_callback("on_train_batch_start", batches.append)
    with pytest.raises(ImportError, match="polygon metrics need shapely"):
        trainer.train()
    assert batches == []


OTHERS = ("yolo26n", "yolo11n-seg", "yolo11n-cls")


@pytest.mark.parametrize(
    ("task", "name"),
    [*itertools.product(TRAINERS, OTHERS), ("pose", "yolo26n-obb"), ("obb", "yolo11n-pose")],
)
def test_a_model_of_another_task_is_named(data, tmp_path, task, name):
    chosen = settings(data, task, tmp_path)
    model = YOLO(f"{name}.yaml")
    head = type(model.model.model[-1]).__name__
    message = f"(?i){TRAINERS[task].__name__} must have a model with the head {task}, got one with {head}"
    with pytest.raises(ValueError, match=message):
        TRAINERS[task](overrides=dict(chosen, model=f"{name}.yaml")).train()
    del chosen["model"]
    with pytest.raises(ValueError, match=message):
        model.train(trainer=TRAINERS[task], **chosen)
    validator = PolygonPoseValidator if task == "pose" else PolygonOBBValidator
    with pytest.raises(ValueError, match=f"{validator.__name__} must have .* task '{task}', got one of '{model.task}'"):
        model.val(validator=validator, data=chosen["data"])


@pytest.mark.parametrize("count", [1, 2])
def test_objects_without_a_polygon_are_refused(data, tmp_path, count):
    described = YAML.load(data["pose"])
    YAML.save(tmp_path / "few.yaml", {**described, "kpt_shape": [count, 3]})
    with pytest.raises(ValueError, match=f"kpt_shape must have 3 or more keypoints.*got {count}"):
        MGIoUPoseTrainer(overrides={**settings(data, "pose", tmp_path), "data": str(tmp_path / "few.yaml")})


def test_triangles_are_taken(data, tmp_path):
    YAML.save(tmp_path / "three.yaml", {**YAML.load(data["pose"]), "kpt_shape": [3, 2]})
    trainer = MGIoUPoseTrainer(overrides={**settings(data, "pose", tmp_path), "data": str(tmp_path / "three.yaml")})
    assert trainer.data["kpt_shape"] == [3, 2]


@pytest.mark.parametrize(
    "sigmas", [0.2, torch.tensor([0.1, 0.2, 0.3, 0.4]), np.full((4, 1), 0.2), (0.1, 0.2, 0.3, 0.4)]
)
def test_sigmas_of_any_form_are_taken(data, tmp_path, sigmas):
    trainer_class = type("Tolerant", (MGIoUPoseTrainer,), {"sigmas": sigmas})
    trainer = trainer_class(overrides=settings(data, "pose", tmp_path))
    expected = torch.as_tensor(sigmas, dtype=torch.float32).reshape(-1).tolist()
    assert trainer.make_loss(torch.ones(4)).loss.sigmas.tolist() == expected


# ---- trainings that are interrupted


class InterruptedTrainingError(Exception):
    pass


@pytest.mark.parametrize("head", ["yolo11n", "yolo26n"])
def test_resume(data, tmp_path, head):
    """An interrupted training goes on with our loss, and its schedule where it was."""
    alphas, updates = [], []

    def note(trainer):
        (schedule,) = (m for m in trainer.polygon_loss.modules() if isinstance(m, AlphaSchedule))
        alphas.append(schedule().item())
        updates.append(getattr(trainer.model.criterion, "updates", None))  # of the weights of YOLO26's two heads

    def stop(trainer):
        if trainer.epoch == 1:
            raise InterruptedTrainingError

    trainer = MGIoUPoseTrainer(overrides=settings(data, "pose", tmp_path, head, epochs=4, val=False))
    trainer.add_callback("on_train_epoch_end", note)
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(InterruptedTrainingError):
        trainer.train()
    model = YOLO(trainer.last)
    model.add_callback("on_train_epoch_end", note)
    model.train(resume=True, trainer=MGIoUPoseTrainer)
    expected = AlphaSchedule(4)
    for alpha in alphas:
        assert alpha == pytest.approx(expected().item(), abs=1e-6)
        expected.step()
    assert len(alphas) == 4
    assert updates == ([1, 2, 3, 4] if head == "yolo26n" else [None] * 4)


@pytest.mark.parametrize("task", TRAINERS)
def test_the_scaler_starts_low_and_resumes_where_it_was(data, tmp_path, task, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu"))  # starts at 65536
    scales = []

    def note(trainer):
        scales.append(trainer.scaler.get_scale())

    def stop(_):
        raise InterruptedTrainingError

    trainer = TRAINERS[task](overrides=settings(data, task, tmp_path, epochs=2, val=False))
    trainer.add_callback("on_train_start", note)
    trainer.add_callback("on_train_epoch_end", lambda trainer: trainer.scaler.update(2.0))
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(InterruptedTrainingError):
        trainer.train()
    model = YOLO(trainer.last)
    model.add_callback("on_train_start", note)
    model.train(resume=True, trainer=TRAINERS[task])
    assert scales == [16.0, 2.0]


ELSEWHERE = """
    import sys
    sys.modules["triton_mgiou"] = None  # an import of it raises
    from bench.detectors.nms import provide_nms
    provide_nms()
    from importlib.util import find_spec
    import numpy as np
    from ultralytics import YOLO
    has_onnx = all(map(find_spec, ("onnx", "onnxruntime", "onnxslim")))
    for path in sys.argv[1:]:
        model = YOLO(path)
        (result,) = model(np.zeros((64, 64, 3), dtype=np.uint8), verbose=False, conf=0.0001, imgsz=64)
        exported = YOLO(model.export(format="onnx" if has_onnx else "torchscript", imgsz=64), task=model.task)
        (again,) = exported(np.zeros((64, 64, 3), dtype=np.uint8), verbose=False, conf=0.0001, imgsz=64)
        found = (result.obb if result.obb is not None else result.boxes).data
        assert len(found) and len(again)
        model.save("copy.pt")
        YOLO("copy.pt")
    print("plain")
"""


def interrupted(data, tmp_path, checkpoint):
    """What is there after a training from a checkpoint that was interrupted: its own, and one of the model in hand."""

    def stop(_):
        raise InterruptedTrainingError

    chosen = settings(data, "pose", tmp_path / "interrupted", epochs=2)
    del chosen["model"]
    model = YOLO(checkpoint)
    model.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(InterruptedTrainingError):
        model.train(trainer=MGIoUPoseTrainer, **chosen)
    model.save(tmp_path / "saved.pt")
    return [model.trainer.last, tmp_path / "saved.pt"]


def test_checkpoints_load_predict_and_export_where_this_package_is_not_installed(data, tmp_path):
    paths = []
    for task, head in (("pose", "yolo26n"), ("obb", "yolo11n")):
        trainer = TRAINERS[task](overrides=settings(data, task, tmp_path / task, head))
        trainer.train()
        paths += [trainer.last, trainer.best]
    paths += interrupted(data, tmp_path, paths[0])
    script = tmp_path / "elsewhere.py"
    script.write_text(textwrap.dedent(ELSEWHERE), encoding="utf-8")
    command = [sys.executable, script, *paths]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "YOLO_OFFLINE": "true", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        check=False,
    )
    assert done.stdout.endswith("plain\n"), done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("head", "task"), list(itertools.product(HEADS, TRAINERS)))
def test_train_on_a_gpu_with_amp(data, tmp_path, head, task):
    """No step is skipped; with a gradient of NaN all 40 would be."""
    more = {"device": "0", "epochs": 20, "amp": "fp16", "nbs": 3, "val": False}  # nbs: a step of the optimizer a batch
    trainer = TRAINERS[task](overrides=settings(data, task, tmp_path, head, **more))
    scales = []
    trainer.add_callback("on_train_batch_end", lambda t: scales.append(t.scaler.get_scale()))
    trainer.train()
    assert trainer.amp
    assert scales == [adapter.START_SCALE] * 40
    assert all(np.isfinite(value) for value in trainer.metrics.values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("task", TRAINERS)
def test_train_on_two_gpus(data, tmp_path, task):
    model = YOLO(f"yolo11n-{task}.yaml")
    chosen = settings(data, task, tmp_path, device="0,1", batch=4)
    model.train(trainer=TRAINERS[task], **{key: value for key, value in chosen.items() if key != "model"})
    assert (tmp_path / "run" / "weights" / "best.pt").exists()
    head, row = (tmp_path / "run" / "results.csv").read_text(encoding="utf-8").splitlines()
    found = dict(zip(head.split(","), map(float, row.split(",")), strict=True))
    assert all(map(np.isfinite, found.values()))
    assert "metrics/mAP50-95(G)" in found


# ---- validators


def predictions(**tensors):
    return {"cls": torch.zeros(len(next(iter(tensors.values())))), **tensors}


def test_polygons_are_matched_whatever_their_first_vertex(tmp_path):
    """The same polygons rolled: right for the polygon metric at .95, wrong for Ultralytics' own at .5."""
    validator = PolygonPoseValidator(args={"task": "pose", "save_dir": str(tmp_path)}, save_dir=tmp_path)
    validator.sigma = np.full(4, 0.25)
    square = torch.tensor([[10.0, 10], [40, 10], [40, 40], [10, 40]])
    targets = torch.stack((square, square + 50, square + 100))
    keypoints = torch.cat((targets, torch.full((3, 4, 1), 2.0)), 2)
    boxes = torch.cat((targets.amin(1), targets.amax(1)), 1)
    pred = torch.cat((targets, torch.ones(3, 4, 1)), 2)
    pred[1] = pred[1].roll(1, 0)
    pred[2] = pred[2][[0, 1, 3, 2]]  # crosses itself, covers half
    given = {"bboxes": boxes, "conf": torch.tensor([0.9, 0.8, 0.7])}
    found = validator._process_batch(
        predictions(keypoints=pred, **given), predictions(keypoints=keypoints, bboxes=boxes)
    )
    assert found["tp"].all()
    assert found["tp_g"][:2].all()
    assert not found["tp_g"][2, 1:].any()
    assert found["tp_p"].all(1).tolist() == [True, False, False]


def test_vertices_that_are_not_there_are_left_out(tmp_path):
    """A triangle in a head of four vertices; a target of two vertices matches nothing."""
    validator = PolygonPoseValidator(args={"task": "pose"}, save_dir=tmp_path)
    validator.sigma = np.full(4, 0.25)
    triangle = torch.tensor([[10.0, 10, 2], [40, 10, 2], [40, 40, 2], [0, 90, 0]])
    segment = torch.tensor([[10.0, 10, 2], [40, 10, 2], [0, 0, 0], [0, 0, 0]])
    pred = triangle.clone()
    pred[:, 2] = torch.tensor([0.9, 0.8, 0.7, 0.1])
    pred[3, :2] = torch.tensor([0.0, 1000])  # on no line through two others, which would have no area with them
    boxes = torch.tensor([[10.0, 10, 40, 40], [10, 10, 40, 10]])
    found = validator._process_batch(
        predictions(keypoints=pred[None], bboxes=boxes[:1], conf=torch.ones(1)),
        predictions(keypoints=torch.stack((triangle, segment)), bboxes=boxes),
    )
    assert found["tp_g"].all()


def test_the_angle_of_a_square_counts(tmp_path):
    """Turned by 45 degrees ProbIoU calls a square right at .95; the corners' IoU is 1 / sqrt(2)."""
    validator = PolygonOBBValidator(args={"task": "obb"}, save_dir=tmp_path)
    target = torch.tensor([[50.0, 50, 30, 30, 0.2]])
    found = validator._process_batch(
        predictions(bboxes=target + torch.tensor([0, 0, 0, 0, torch.pi / 4]), conf=torch.ones(1)),
        predictions(bboxes=target),
    )
    assert found["tp"].all()
    assert found["tp_g"][0].tolist() == [limit < 0.5**0.5 for limit in np.arange(0.5, 1, 0.05)]


@pytest.mark.parametrize("validator_class", [PolygonPoseValidator, PolygonOBBValidator])
def test_without_predictions_or_targets(validator_class, tmp_path):
    task = "pose" if validator_class is PolygonPoseValidator else "obb"
    validator = validator_class(args={"task": task}, save_dir=tmp_path)
    validator.sigma = np.full(4, 0.25)

    def some(count):
        width = 4 if task == "pose" else 5
        return predictions(keypoints=torch.ones(count, 4, 3), bboxes=torch.ones(count, width), conf=torch.ones(count))

    for preds, targets in ((0, 2), (3, 0), (0, 0)):
        assert validator._process_batch(some(preds), some(targets))["tp_g"].shape == (preds, 10)


def test_each_image_is_judged_by_its_polygons():
    """Of two predictions for three targets one is right; the next validation begins anew."""
    metrics = adapter.PolygonPoseMetrics({0: "a"})
    right, wrong = np.ones((2, 10), dtype=bool), np.zeros((2, 10), dtype=bool)
    half = right.copy()
    half[1] = False
    shared = {"conf": np.array([0.9, 0.8]), "pred_cls": np.zeros(2), "target_cls": np.zeros(3), "im_name": "a.png"}
    metrics.update_stats({"tp": right, "tp_p": wrong, "tp_g": half, "target_img": np.zeros(1), **shared})
    found = metrics.polygon.image_metrics["a.png"]
    assert (found["precision"], found["recall"]) == pytest.approx((1 / 2, 1 / 3))
    assert (found["tp"], found["fp"], found["fn"]) == (1, 1, 2)
    metrics.clear_image_metrics()
    assert metrics.polygon.image_metrics == metrics.box.image_metrics == metrics.pose.image_metrics == {}


@pytest.mark.parametrize(("task", "validator_class"), [("pose", PolygonPoseValidator), ("obb", PolygonOBBValidator)])
def test_what_other_processes_found_in_images_is_gathered(monkeypatch, tmp_path, task, validator_class):
    validator = validator_class(args={"task": task, "plots": False}, save_dir=tmp_path)
    gathered = []
    monkeypatch.setattr(validator, "_gather_image_metrics", gathered.append)
    validator.gather_stats()
    assert gathered[-1] is validator.metrics.polygon


def test_fitness_is_that_of_the_polygons():
    metrics = adapter.PolygonPoseMetrics({0: "a"})
    right = np.ones((2, 10), dtype=bool)
    half = right.copy()
    half[:, 5:] = False
    shared = {"conf": np.array([0.9, 0.8]), "pred_cls": np.zeros(2), "target_cls": np.zeros(2), "im_name": "a.png"}
    metrics.update_stats({"tp": ~right, "tp_p": ~right, "tp_g": half, "target_img": np.zeros(1), **shared})
    metrics.process()
    results = metrics.results_dict
    assert results["metrics/mAP50(G)"] == pytest.approx(0.995, abs=1e-3)
    assert results["metrics/mAP50-95(G)"] == pytest.approx(0.5 * 0.995, abs=1e-3)
    assert results["metrics/mAP50(B)"] == results["metrics/mAP50(P)"] == 0
    assert results["fitness"] == metrics.polygon.fitness() > 0.4
    assert len(metrics.keys) == len(metrics.mean_results()) == len(metrics.class_result(0)) == 12
    assert len(metrics.curves) == len(metrics.curves_results)
    (row,) = metrics.summary()
    assert row["Polygon-mAP50"] == pytest.approx(results["metrics/mAP50(G)"], abs=1e-5)
    assert row["Polygon-mAP50-95"] == pytest.approx(results["metrics/mAP50-95(G)"], abs=1e-5)
    assert row["Polygon-R"] == pytest.approx(results["metrics/recall(G)"], abs=1e-5)
    assert row["Pose-R"] == row["mAP50"] == 0


@pytest.mark.parametrize("relative", [False, True])
def test_plots_show_the_polygons(monkeypatch, tmp_path, relative):
    """As masks of a quarter, which cover what a polygon covers: a triangle; none of an image that is not shown."""
    drawn = {}
    monkeypatch.setattr(adapter, "plot_images", lambda **given: drawn.update(given))
    keypoints = torch.tensor([[[80.0, 80, 2], [240, 80, 2], [240, 240, 2], [0, 0, 0]]]).repeat(2, 1, 1)
    labels = {
        "cls": torch.zeros(2, 1),
        "bboxes": torch.full((2, 4), 0.5),
        "keypoints": keypoints,
        "batch_idx": torch.tensor([0.0, 16.0]),
    }
    owner = SimpleNamespace(data={"names": {0: "a"}}, on_plot=None)
    images, paths = torch.zeros(17, 3, 320, 320), ["x"] * 17
    if relative:
        labels["keypoints"][..., :2] /= 320
        batch = {**labels, "img": images, "im_file": paths}
        adapter._plot_targets(batch, tmp_path / "a.jpg", owner)
        assert batch["keypoints"].max() == 2
    else:
        adapter._plot_polygons(labels, images, paths, tmp_path / "a.jpg", owner)
    assert drawn["labels"]["masks"].shape == (1, 80, 80)
    assert drawn["labels"]["masks"][0].sum() == pytest.approx(40 * 40 / 2, rel=0.1)
    assert drawn["labels"]["masks"][0, 25, 55] == 1
    assert drawn["labels"]["masks"][0, 55, 25] == 0
    assert "keypoints" not in drawn["labels"]


@pytest.mark.parametrize(("side", "covered"), [(1, 1), (1e10, 80 * 80), (math.nan, 0), (math.inf, 0)])
def test_predictions_of_any_size_are_drawn(monkeypatch, tmp_path, side, covered):
    """Pixels are not taken for parts of the image, however few they are; what is not finite has no mask."""
    drawn, filled = {}, []
    fill = adapter.cv2.fillPoly
    monkeypatch.setattr(adapter, "plot_images", lambda **given: drawn.update(given))
    monkeypatch.setattr(
        adapter.cv2, "fillPoly", lambda mask, given, value: filled.append(given) or fill(mask, given, value)
    )
    validator = PolygonPoseValidator(args={"task": "pose"}, save_dir=tmp_path)
    validator.data = {"names": {0: "a"}}
    square = torch.tensor([[[0.0, 0, 1], [side, 0, 1], [side, side, 1], [0, side, 1]]])
    found = predictions(keypoints=square, bboxes=torch.tensor([[0.0, 0, 1, 1]]), conf=torch.ones(1))
    validator.plot_predictions({"img": torch.zeros(1, 3, 320, 320), "im_file": ["x"]}, [found], 0)
    assert drawn["labels"]["masks"].shape == (1, 80, 80)
    assert drawn["labels"]["masks"].sum() == covered
    assert all(np.abs(polygon).max() <= 1e6 for (polygon,) in filled)  # beyond, OpenCV takes half a minute


def test_validate_by_yolo(data, tmp_path):
    """`YOLO.val(validator=...)` with a model that was made without us."""
    metrics = YOLO("yolo11n-pose.yaml").val(
        validator=PolygonPoseValidator,
        **{key: value for key, value in settings(data, "pose", tmp_path).items() if key not in {"model", "epochs"}},
    )
    assert metrics.results_dict["metrics/mAP50(G)"] == 0
