"""The demo: its data, how it judges polygons, and one run with the settings that it has by default."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits

from tests.conftest import INTERPRETED
from triton_mgiou import PAPER, demo, mgiou_loss
from triton_mgiou.cli import main

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
RIGHT = np.array([1.0, 0.0])
BOW_TIE = SQUARE[[0, 1, 3, 2]]  # two lobes of a quarter each
PENTAGON = np.array([[math.cos(k * math.tau / 5), math.sin(k * math.tau / 5)] for k in range(5)])
PENTAGRAM = PENTAGON[[0, 2, 4, 1, 3]]


@pytest.fixture(scope="module")
def data():
    return demo.load_data()


def cross(first, second):
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def hull_by_monotone_chain(points):
    """The vertices of the convex hull of integer points, counter-clockwise, without points inside an edge."""
    points = sorted({tuple(map(int, point)) for point in points})
    halves = []
    for sequence in (points, points[::-1]):
        half = []
        for x, y in sequence:
            while len(half) >= 2:
                (ax, ay), (bx, by) = half[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                half.pop()
            half.append((x, y))
        halves += half[:-1]
    return halves


def test_split(data):
    train, test = data
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    of_test = torch.arange(1797) % 5 == 0
    assert torch.equal(test.images, images[of_test])
    assert torch.equal(train.images, images[~of_test])
    assert (len(train.images), len(test.images)) == (1437, 360)


def test_shapes_and_padding(data):
    for part, most in zip(data, (12, 11), strict=True):
        samples = len(part.images)
        assert part.images.shape == (samples, 1, 8, 8)
        assert part.targets.shape == (samples, 12, 2)
        assert part.lengths.shape == (samples,)
        assert [tensor.dtype for tensor in part] == [torch.float32, torch.float32, torch.int64]
        assert (part.images.min(), part.images.max()) == (0, 1)
        real = torch.arange(12) < part.lengths.unsqueeze(1)
        assert torch.equal(part.targets.isnan(), ~real.unsqueeze(-1).expand(-1, -1, 2))
        assert part.targets[real].min() == 0
        assert part.targets[real].max() == 1
        assert (part.lengths.min(), part.lengths.max()) == (4, most)


def test_targets_are_convex_and_in_order(data):
    for part in data:
        for target, length in zip(part.targets, part.lengths, strict=True):
            vertices = target[:length].double().numpy()
            edges = np.roll(vertices, -1, axis=0) - vertices
            turns = cross(edges, np.roll(edges, -1, axis=0))
            assert (turns > 0).all() or (turns < 0).all()
            directions = np.arctan2(edges[:, 1], edges[:, 0])
            turned = np.diff(directions, append=directions[0])
            turned = (turned + math.pi) % math.tau - math.pi
            assert abs(turned.sum()) == pytest.approx(math.tau)  # around once


def test_hulls_are_those_of_the_strokes():
    for image in load_digits().images:
        corners = [
            (column + right, row + below)
            for row in range(8)
            for column in range(8)
            if image[row, column] >= 4
            for right in (0, 1)
            for below in (0, 1)
        ]
        hull = demo.stroke_hull(image) * 8
        assert sorted(map(tuple, hull)) == sorted(hull_by_monotone_chain(corners))


def test_hull_of_an_l():
    image = np.zeros((8, 8))
    image[2, 1] = image[3, 1] = image[3, 2] = 4
    image[0, 0] = 3.9  # too faint
    expected = {(1, 2), (2, 2), (3, 3), (3, 4), (1, 4)}
    assert {tuple(vertex) for vertex in demo.stroke_hull(image) * 8} == expected


@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        pytest.param(SQUARE, SQUARE, 1, id="same"),
        pytest.param(SQUARE[[2, 1, 0, 3]], SQUARE, 1, id="same-other-way-round"),
        pytest.param(SQUARE[[0, 0, 1, 2, 2, 3]], SQUARE, 1, id="same-repeated-vertices"),
        pytest.param(SQUARE + RIGHT / 2, SQUARE, 1 / 3, id="half-shifted"),
        pytest.param(SQUARE * [1, 0.5], SQUARE, 1 / 2, id="half-inside"),
        pytest.param(SQUARE * 0.5 + 0.25, SQUARE, 1 / 4, id="wholly-inside"),
        pytest.param(SQUARE + 0.5, SQUARE, 1 / 7, id="shifted-both-ways"),
        pytest.param(SQUARE + RIGHT, SQUARE, 0, id="touching"),
        pytest.param(SQUARE + 3, SQUARE, 0, id="disjoint"),
        pytest.param(BOW_TIE, SQUARE, 1 / 2, id="bow-tie"),
        pytest.param(BOW_TIE, BOW_TIE, 1, id="bow-tie-itself"),
        pytest.param(BOW_TIE * [0.5, 1], SQUARE, 1 / 4, id="half-bow-tie"),
        pytest.param(PENTAGRAM, PENTAGON, (7 * math.sqrt(5) - 15) / 2, id="pentagram-without-its-middle"),
        pytest.param(np.concatenate([SQUARE, SQUARE]), SQUARE, 0, id="around-twice"),
        pytest.param(np.concatenate([SQUARE, SQUARE * 0.5]), SQUARE, 3 / 4, id="a-loop-inside"),
        pytest.param(np.zeros((12, 2)), SQUARE, 0, id="point"),
        pytest.param(SQUARE[[0, 2, 0, 2]], SQUARE, 0, id="segment"),
        pytest.param(SQUARE[[0, 2, 0]], SQUARE[[1, 3, 1]], 0, id="no-area-at-all"),
        pytest.param([[0, 0], [1, 0], [1, math.nan]], SQUARE, 0, id="nan"),
        pytest.param([[0, 0], [1, 0], [1, math.inf]], SQUARE, 0, id="inf"),
    ],
)
def test_polygon_iou(pred, target, expected):
    assert demo.polygon_iou(pred, target) == pytest.approx(expected, abs=1e-12)
    assert demo.polygon_iou(target, pred) == pytest.approx(expected, abs=1e-12)


def winding_parity(points, polygon):
    """Whether the outline runs an odd number of times around each point: the angles that it is seen under, added."""
    start = polygon - points[:, None]
    end = np.roll(start, -1, axis=1)
    turned = np.arctan2(cross(start, end), (start * end).sum(-1)).sum(1)
    return np.round(turned / math.tau).astype(int) % 2 == 1


def test_polygon_iou_of_polygons_that_cross_themselves():
    rng = np.random.default_rng(0)
    grid = (np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).reshape(-1, 2) + 0.5) / 256
    for size in (5, 8, 12, 16):
        pred, target = rng.random((size, 2)), SQUARE * 0.6 + 0.2
        in_pred, in_target = winding_parity(grid, pred), winding_parity(grid, target)
        expected = (in_pred & in_target).sum() / (in_pred | in_target).sum()
        assert 0.1 < expected < 0.9
        assert demo.polygon_iou(pred, target) == pytest.approx(expected, abs=0.003)


def test_average_precision():
    ious = np.array([0.3, 0.5, 0.7499, 0.75, 0.9, 0.95])
    assert demo.average_precision(ious, 0.50) == 5 / 6
    assert demo.average_precision(ious, 0.75) == 3 / 6
    assert demo.average_precision(ious, 0.90) == 2 / 6
    assert demo.average_precision(ious, 0.96) == 0


def test_loss_at():
    losses = [float(step) for step in range(100)]
    assert demo.loss_at(losses, 0) == 0.5
    assert demo.loss_at(losses, 1 / 3) == 33.5
    assert demo.loss_at(losses, 1) == 98.5
    assert demo.loss_at([3.0], 1 / 3) == 3.0


def test_network_starts_from_a_circle_in_order(data):
    torch.manual_seed(0)
    polygons = demo.make_network()(data[1].images).detach()
    assert polygons.shape == (360, 12, 2)
    angle = torch.arange(12) * (math.tau / 12)
    circle = 0.5 + 0.5 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    assert (polygons - circle).abs().max() < 0.15


def test_same_seed_same_network(data):
    part = demo.Digits(*(tensor[:200] for tensor in data[0]))
    loss = demo.MGIoULoss()
    settings = {"epochs": 1, "batch_size": 64, "device": torch.device("cpu")}
    first, again, other = (demo.train(part, loss, seed=seed, **settings)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == 4  # the last batch is the smaller rest


def test_auto_takes_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert demo.pick_device("auto") == torch.device(expected)


def test_a_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    monkeypatch.setenv("LOCAL_RANK", "99")
    assert demo.pick_device("auto") == torch.device("cpu")  # not one for each
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 100)
    for name in ("auto", "cuda"):
        with pytest.raises(demo.DemoError, match=r"^device 'cuda:99' is not available: "):
            demo.pick_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "toaster"])
def test_device_that_is_not_there(name, tmp_path, capsys):
    assert main(["demo", "--device", name, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"triton-mgiou demo: device {name!r} is not available: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("")
    assert main(["demo", "--out", str(path)]) == 1
    assert capsys.readouterr().err == f"triton-mgiou demo: cannot write to {path}: File exists\n"


@pytest.mark.parametrize("name", ["demo.png", "result.json"])
def test_a_file_that_cannot_be_written(name, tmp_path, capsys):
    """As where the disk is full; here a folder has its name."""
    (tmp_path / name).mkdir()
    assert main(["demo", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"triton-mgiou demo: cannot write to {tmp_path / name}: Is a directory"


def test_a_device_without_a_module_in_this_pytorch(capsys):
    assert main(["demo", "--device", "privateuseone"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("triton-mgiou demo: device 'privateuseone' is not available: ")


def test_missing_libraries(tmp_path):
    code = """
import sys
from triton_mgiou.cli import main

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
for missing in ("matplotlib", "shapely", "sklearn"):
    sys.modules.pop(missing, None)
    print(main(["demo", "--out", sys.argv[1]]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["1"] * 3
    assert done.stderr.splitlines() == [
        f'triton-mgiou demo: the demo needs {name}; install it with: pip install "triton-mgiou[demo]"'
        for name in ("matplotlib", "shapely", "sklearn")
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "eager"),
        pytest.param(
            "cuda",
            "triton",
            marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")],
        ),
    ],
)
def test_demo(device, backend, tmp_path, capsys):
    """The whole demo as a user starts it; the same floors hold for the seeds 0 to 4."""
    out = tmp_path / "new" / "folder"
    threads = torch.get_num_threads()
    assert main(["demo", "--device", device, "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads

    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "result.json"]
    result = json.loads((out / "result.json").read_text())
    assert set(result) == {
        "polygon_iou",
        "ap50",
        "ap75",
        "ap90",
        "loss_first",
        "loss_last",
        "seconds",
        "device",
        "backend",
        "options",
    }
    assert result["polygon_iou"] >= 0.93
    assert result["ap50"] >= 0.99
    assert result["ap90"] >= 0.85
    assert result["ap50"] >= result["ap75"] >= result["ap90"]
    assert 0.10 < result["loss_first"] < 0.16
    assert 0 < result["loss_last"] < 0.025
    assert result["seconds"] > 0
    assert (result["device"], result["backend"]) == (device, backend)
    defaults = inspect.signature(mgiou_loss).parameters
    assert result["options"] == {
        **{name: defaults[name].default for name in PAPER},
        "epochs": 30,
        "seed": 0,
        "batch_size": 64,
        "learning_rate": 0.003,
        "vertices": 12,
        "train_images": 1437,
        "test_images": 360,
        "processes": 1,
    }

    captured = capsys.readouterr()
    rows = dict(line.strip().rsplit(None, 1) for line in captured.out.splitlines() if line.startswith("  train loss"))
    assert rows["train loss, start"] == f"{result['loss_first']:.4f}"
    assert rows["train loss, end"] == f"{result['loss_last']:.4f}"
    assert result["loss_last"] < float(rows["train loss, after a third"]) < result["loss_first"]
    for label, key in (("test polygon IoU", "polygon_iou"), ("test AP50", "ap50"), ("test AP90", "ap90")):
        assert f"  {label:<26}{result[key]:>8.4f}\n" in captured.out
    assert "training: 100%" in captured.err
    assert "loss=" in captured.err

    picture = imread(out / "demo.png")[..., :3]  # (height, width, colour), 1 is white
    left, right = np.split(picture, [picture.shape[1] * 17 // 27], axis=1)
    assert all(0.02 < (half < 0.9).any(axis=2).mean() < 0.5 for half in (left, right)), "images left, a curve right"
