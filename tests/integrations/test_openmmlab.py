"""The adapter of mmengine's registries, with the real mmengine, built from a config as mmdetection's assigners do."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, Registry
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment

from tests.helpers import assert_close, generator
from tests.pairs.helpers import random_boxes
from triton_mgiou import box_mgiou, box_mgiou_loss

CONFIG = """
custom_imports = dict(imports=["triton_mgiou.integrations.openmmlab"], allow_failed_imports=False)
loss_bbox = dict(type="BoxMGIoULoss", fmt="cxcywhr", loss_weight=2.0, reduction="mean")
loss_polygon = dict(type="MGIoULoss", loss_weight=0.5)
match_cost = dict(type="MGIoUCost", fmt="cxcywhr", weight=3.0)
iou_calculator = dict(type="MGIoUOverlaps2D", fmt="cxcywhr")
"""


class RotatedBoxes:
    """As mmdetection's `BaseBoxes`: a tensor and operations on it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)


class LiDARBoxes(RotatedBoxes):
    """As mmdetection3d's: the tensor has the centre of the bottom."""

    YAW_AXIS = 2

    @property
    def bottom_center(self):
        return self.tensor[:, :3]


class CameraBoxes(LiDARBoxes):
    YAW_AXIS = 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    sys.modules.pop("triton_mgiou.integrations.openmmlab", None)
    for registry, names in ((MODELS, ("MGIoULoss", "BoxMGIoULoss")), (TASK_UTILS, ("MGIoUCost", "MGIoUOverlaps2D"))):
        for name in names:
            registry.module_dict.pop(name, None)
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return Config.fromfile(path)


@pytest.fixture
def sets():
    rng = generator(0)
    return random_boxes(7, "cxcywhr", rng).float(), random_boxes(4, "cxcywhr", rng).float()


def test_losses_are_built_from_a_config(config, sets):
    loss = MODELS.build(config.loss_bbox)
    pred, target = sets[0][:4].requires_grad_(), sets[1]
    value = loss(pred, target, avg_factor=2.0)
    assert_close(value, 2 * box_mgiou_loss(pred, target, reduction="sum") / 2, atol=1e-6)
    assert torch.autograd.grad(value, pred)[0].abs().sum() > 0
    assert MODELS.build(config.loss_polygon).loss_weight == 0.5


def test_the_cost_is_minus_the_matrix(config, sets):
    cost = TASK_UTILS.build(config.match_cost)
    predictions = InstanceData(bboxes=sets[0], scores=torch.rand(7, 3))
    for boxes in (sets[1], RotatedBoxes(sets[1])):
        truth = InstanceData(bboxes=boxes, labels=torch.zeros(4))
        found = cost(predictions, truth, img_meta={"img_shape": (640, 640)}, extra=1)
        assert_close(found, -3 * box_mgiou(*sets), atol=0)


def test_a_prediction_with_nan_is_matched_last(config, sets):
    pred, gt = sets[1].clone(), sets[0][:4].clone()
    pred[2, 1] = float("nan")
    found = TASK_UTILS.build(config.match_cost)(InstanceData(bboxes=pred), InstanceData(bboxes=gt[:3]))
    assert_close(found[2], torch.full((3,), 3.0), atol=0)
    rows, _ = linear_sum_assignment(found)
    assert 2 not in rows


@pytest.mark.parametrize("aligned", [False, True])
def test_overlaps_below_zero_are_zero(aligned, config):
    """Unit squares: the same, half beside it (1/3 along x), and apart along both axes, 2/11 - 1 on each."""
    overlaps = TASK_UTILS.build({**config.iou_calculator, "fmt": "xyxy"})
    square = torch.tensor([[0.0, 0, 1, 1]])
    others = torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 1.5, 1], [10.0, 10, 11, 11]])
    found = overlaps(square.expand(3, 4) if aligned else square, others, is_aligned=aligned)
    assert_close(found.flatten(), [1.0, (1 / 3 + 1) / 2, 0.0], atol=1e-6)


def test_a_cost_without_weight_is_zero(config, sets):
    """As a config says that tries a head without it."""
    cost = TASK_UTILS.build({**config.match_cost, "weight": 0})
    assert_close(cost(*(InstanceData(bboxes=side) for side in sets)), torch.zeros(7, len(sets[1])), atol=0)


def test_a_matching_finds_who_moved_where(config, sets):
    truth = sets[0]
    order = torch.randperm(7, generator=generator(1))
    predictions = truth[order] + 0.02
    found = TASK_UTILS.build(config.match_cost)(InstanceData(bboxes=predictions), InstanceData(bboxes=truth))
    rows, columns = linear_sum_assignment(found)
    assert torch.equal(torch.from_numpy(columns), order[torch.from_numpy(rows)])


def test_overlaps_are_those_of_an_assigner(config, sets):
    overlaps = TASK_UTILS.build(config.iou_calculator)
    first, second = sets
    second = second.clone()
    second[1, 0] = float("nan")
    matrix = overlaps(first, RotatedBoxes(second))
    assert_close(matrix, box_mgiou(first, second).nan_to_num(nan=0).clamp(min=0), atol=0)
    assert ((matrix >= 0) & (matrix <= 1)).all()
    aligned = overlaps(first[:4], second, mode="giou", is_aligned=True)
    assert_close(aligned, matrix[:4].diagonal(), atol=0)
    assert overlaps(first, second[:0]).shape == (7, 0)
    assert overlaps(first[:0], second[:0], is_aligned=True).shape == (0,)
    with pytest.raises(ValueError, match=r"mode must be .* got 'iof'"):
        overlaps(first, second, mode="iof")
    with pytest.raises(ValueError, match=r"bboxes2 must be as many as bboxes1 .* got shapes \(4, 5\) and \(7, 5\)"):
        overlaps(first, second, is_aligned=True)


@pytest.mark.parametrize("is_aligned", [False, True])
def test_wrong_boxes_are_told_by_the_names_of_the_protocol(config, sets, is_aligned):
    overlaps, cost = TASK_UTILS.build(config.iou_calculator), TASK_UTILS.build(config.match_cost)
    for wrong, error, message in (
        (sets[0].tolist(), TypeError, "must be a torch.Tensor, got list"),
        (sets[0].int(), TypeError, "must be floating .*, got torch.int32"),
        (sets[0][:, :4], ValueError, r"must have shape \(B, 5\) for fmt='cxcywhr' .*, got \(7, 4\)"),
        (sets[0][0, 0], ValueError, r"must have shape \(B, 5\) for fmt='cxcywhr' .*, got \(\)"),
    ):
        with pytest.raises(error, match=f"^bboxes1 {message}"):
            overlaps(wrong, sets[0], is_aligned=is_aligned)
        with pytest.raises(error, match=f"^bboxes2 {message}"):
            overlaps(sets[0], wrong, is_aligned=is_aligned)
        with pytest.raises(error, match=f"^pred_instances.bboxes {message}"):
            cost(SimpleNamespace(bboxes=wrong), InstanceData(bboxes=sets[1]))
        with pytest.raises(error, match=f"^gt_instances.bboxes {message}"):
            cost(InstanceData(bboxes=sets[1]), SimpleNamespace(bboxes=wrong))
    elsewhere = sets[0].to("meta")
    with pytest.raises(ValueError, match=r"^bboxes2 must be on bboxes1's device cpu, got meta"):
        overlaps(sets[0], elsewhere, is_aligned=is_aligned)
    with pytest.raises(
        ValueError, match=r"^gt_instances\.bboxes must be on pred_instances\.bboxes's device cpu, got meta"
    ):
        cost(InstanceData(bboxes=sets[0]), InstanceData(bboxes=elsewhere))


def test_boxes_in_space_by_their_bottom(config):
    """Mmdetection3d's boxes and the tensors of its assigners: half a height lower than the gravity centre."""
    rng = generator(3)
    gravity = random_boxes(7, "cxcyczlwhr", rng).float(), random_boxes(4, "cxcyczlwhr", rng).float()
    bottom = [boxes.clone() for boxes in gravity]
    for boxes in bottom:
        boxes[:, 2] -= boxes[:, 5] / 2
    want = box_mgiou(*gravity, fmt="cxcyczlwhr").clamp(min=0)
    spatial = dict(config.iou_calculator, fmt="cxcyczlwhr")
    plain, by_bottom = TASK_UTILS.build(spatial), TASK_UTILS.build(dict(spatial, bottom_center=True))
    assert_close(plain(*gravity), want, atol=0)
    assert (plain(*bottom) - want).abs().max() > 0.01
    assert_close(plain(*map(LiDARBoxes, bottom)), want, atol=1e-5)
    assert_close(by_bottom(*bottom), want, atol=1e-5)
    assert_close(by_bottom(LiDARBoxes(bottom[0]), bottom[1]), want, atol=1e-5)
    assert_close(by_bottom(bottom[0][:4], bottom[1], is_aligned=True), want[:4].diagonal(), atol=1e-5)
    half = [boxes.half() for boxes in bottom]
    assert torch.equal(by_bottom(*half), by_bottom(*(boxes.float() for boxes in half)))
    assert by_bottom(*(boxes.double() for boxes in bottom)).dtype == torch.float64
    cost = TASK_UTILS.build(dict(config.match_cost, fmt="cxcyczlwhr"))
    costs = cost(SimpleNamespace(bboxes=LiDARBoxes(bottom[0])), InstanceData(bboxes=gravity[1]))
    assert_close(costs, -3 * box_mgiou(*gravity, fmt="cxcyczlwhr"), atol=1e-5)
    with pytest.raises(ValueError, match=r"bboxes2 must turn about z, .* got CameraBoxes"):
        plain(bottom[0], CameraBoxes(bottom[1]))
    with pytest.raises(ValueError, match=r"bottom_center must be False unless fmt='cxcyczlwhr', .* fmt='cxcywhr'"):
        TASK_UTILS.build(dict(config.iou_calculator, bottom_center=True))
    with pytest.raises(TypeError, match="bottom_center must be a bool, got int"):
        TASK_UTILS.build(dict(spatial, bottom_center=1))


def test_a_child_registry_builds_them_too(config):
    """Mmdetection's registries are children of mmengine's."""
    child = Registry("task util", parent=TASK_UTILS, scope="a_detector", locations=[])
    assert type(child.build(config.match_cost)).__name__ == "MGIoUCost"


@pytest.mark.usefixtures("config")
def test_a_reloaded_module_registers_its_new_classes(sets):
    """As a notebook does, or an import after the module was dropped: both make the classes anew."""
    adapter = importlib.import_module("triton_mgiou.integrations.openmmlab")
    before = adapter.MGIoUCost
    assert importlib.reload(adapter).MGIoUCost is not before
    assert TASK_UTILS.get("MGIoUCost") is adapter.MGIoUCost
    del sys.modules[adapter.__name__]
    adapter = importlib.import_module(adapter.__name__)
    assert TASK_UTILS.get("MGIoUOverlaps2D") is adapter.MGIoUOverlaps2D
    cost = TASK_UTILS.build({"type": "MGIoUCost", "fmt": "cxcywhr"})
    assert_close(cost(InstanceData(bboxes=sets[0]), InstanceData(bboxes=sets[1])), -box_mgiou(*sets), atol=0)


@pytest.mark.usefixtures("config")
def test_registering_again_changes_nothing():
    adapter = importlib.import_module("triton_mgiou.integrations.openmmlab")
    adapter.register()
    assert TASK_UTILS.get("MGIoUCost") is adapter.MGIoUCost
    TASK_UTILS.module_dict["MGIoUCost"] = dict
    try:
        with pytest.raises(KeyError, match="MGIoUCost"):
            adapter.register()
    finally:
        TASK_UTILS.module_dict["MGIoUCost"] = adapter.MGIoUCost


def test_a_wrong_format_is_told_when_the_config_is_built(config):
    for each in (config.match_cost, config.iou_calculator):
        with pytest.raises(ValueError, match="fmt must be one of"):
            TASK_UTILS.build(dict(each, fmt="rbox"))
    with pytest.raises(TypeError, match="weight must be a number"):
        TASK_UTILS.build(dict(config.match_cost, weight="3"))
    with pytest.raises(ValueError, match="weight must be 0 or above, got -1"):
        TASK_UTILS.build(dict(config.match_cost, weight=-1.0))
    with pytest.raises(ValueError, match=r"weight must be at most 1e\+30, got 1e\+40"):
        TASK_UTILS.build(dict(config.match_cost, weight=1e40))
    for loss in (config.loss_bbox, config.loss_polygon):
        with pytest.raises(ValueError, match="boundary_weight must be 0 or above, got -1"):
            MODELS.build(dict(loss, boundary_weight=-1))
        with pytest.raises(TypeError, match=r"options must be among .*, got eps"):
            MODELS.build(dict(loss, eps=1e-6))


@pytest.mark.parametrize("columns", [None, 1, 4, 5])
def test_weights_as_heads_hand_them_over(config, sets, columns):
    """A weight of each box, or of each of its numbers, as bbox_weights are; a negative sample has 0."""
    loss = MODELS.build(config.loss_bbox)
    pred, target = sets[0][:4].requires_grad_(), sets[1]
    each = torch.tensor([1.0, 0, 0.5, 0])
    weight = each if columns is None else each[:, None].expand(4, columns)
    single = torch.stack([box_mgiou_loss(pred[k : k + 1], target[k : k + 1]) for k in range(4)])
    assert_close(loss(pred, target, weight, avg_factor=3), 2 * (single * each).sum() / 3, atol=1e-6)
    assert_close(loss(pred, target, weight, reduction_override="none"), 2 * single * each, atol=1e-6)
    assert_close(loss(pred, target, weight, reduction_override="sum"), 2 * (single * each).sum(), atol=1e-6)
    nothing = loss(pred, target, 0 * weight, avg_factor=0.0)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, pred)[0].any()


@pytest.mark.parametrize("avg_factor", [1.0, torch.tensor(0.0), None])
def test_an_image_without_boxes(config, avg_factor):
    pred = torch.zeros(0, 5, requires_grad=True)
    value = MODELS.build(config.loss_bbox)(pred, torch.zeros(0, 5), torch.zeros(0, 5), avg_factor=avg_factor)
    assert value == 0
    assert torch.autograd.grad(value, pred)[0].shape == (0, 5)
