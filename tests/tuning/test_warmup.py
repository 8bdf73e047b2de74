"""`warmup` and `info`, from Python and from the command line."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch

import triton_mgiou
from tests.conftest import INTERPRETED
from tests.helpers import Name, run_python
from triton_mgiou import PolygonLoss
from triton_mgiou.backends import triton_version
from triton_mgiou.cli import main, table
from triton_mgiou.tuning import layouts, store
from triton_mgiou.tuning.warmup import WarmupResult

warmup_module = importlib.import_module("triton_mgiou.tuning.warmup")  # the package's attribute is the function

RESULT = WarmupResult(
    pred_vertices=8,
    target_vertices=16,
    batch="< 8192",
    dtype="float32",
    gradient=True,
    configuration={
        "polygons": 2, "axes": 4, "lanes": 4, "pred_slots": 2, "target_slots": 4, "num_warps": 1, "registers": 168,
    },
    us=8.0,
    gain=0.25,
    source="tuned",
)  # fmt: skip
REST = {  # of the command line's arguments, by default
    "tune": True, "boxes": [], "box_options": {}, "pairs": [], "pair_sizes": [(8400, 100)], "pair_options": {},
    "keypoints": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_MGIOU_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interpreted(*arguments):
    """`python -m triton_mgiou` with the kernels in the interpreter."""
    if triton_version() < (3, 8):
        pytest.skip("the interpreter of Triton before 3.8 is refused")
    return run_python("-W", "ignore", "-m", "triton_mgiou", *arguments, environment={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"vertices": (4, 0)}, ValueError, "vertices must hold integers of 1 or above, got 0"),
        ({"vertices": ((4, 8, 16),)}, TypeError, "vertices must hold integers of 1 or above, got tuple"),
        ({"vertices": ((4, 0),)}, ValueError, "vertices must hold integers of 1 or above, got 0"),
        ({"vertices": (4.0,)}, TypeError, "vertices must hold integers of 1 or above, got float"),
        ({"batch_sizes": (-1,)}, ValueError, "batch_sizes must hold integers of 1 or above, got -1"),
        ({"batch_sizes": ((1, 2),)}, TypeError, "batch_sizes must hold integers of 1 or above, got tuple"),
        ({"dtypes": ("float32",)}, TypeError, "dtypes must hold float16, bfloat16, float32 or float64, got str"),
        (
            {"dtypes": (torch.int32,)},
            ValueError,
            "dtypes must hold float16, bfloat16, float32 or float64, got torch.int32",
        ),
        ({"dtypes": (torch.float8_e5m2,)}, ValueError, "dtypes must hold float16, .* got torch.float8_e5m2"),
        ({"options": {"colour": 1}}, ValueError, r"options must hold options of mgiou_loss \(.*\), got 'colour'"),
        ({"options": {"weight": torch.ones(1)}}, TypeError, r"options\['weight'\] must be a dtype or a bool, got Ten"),
        ({"options": {"backend": "eager"}}, ValueError, "got 'backend'"),
        ({"pairs": ("corners3d",)}, ValueError, "pairs must be one of .*'polygons', got 'corners3d'"),
        ({"pair_sizes": ((4, 0),)}, ValueError, "pair_sizes must hold integers of 1 or above, got 0"),
        ({"pair_options": {"weight": True}}, ValueError, "pair_options must hold options of box_mgiou and poly"),
        ({"pair_options": {"mask1": 1}}, TypeError, r"pair_options\['mask1'\] must be a dtype or a bool, got int"),
        ({"vertices": 4}, TypeError, "vertices must be an iterable, such as a list, got int"),
        ({"dtypes": torch.float16}, TypeError, "dtypes must be an iterable, such as a list, got dtype"),
        ({"boxes": "xyxy"}, TypeError, "boxes must be an iterable, such as a list, got str"),
        ({"pair_sizes": 100}, TypeError, "pair_sizes must be an iterable, such as a list, got int"),
        ({"options": "soft"}, TypeError, "options must be a mapping, such as a dict, got str"),
        ({"vertices": (True,)}, TypeError, "vertices must hold integers of 1 or above, got bool"),
        ({"device": "cpu"}, RuntimeError, "warmup cannot run: the tensors are on cpu.*; expected a GPU"),
        ({"device": "cuda:99"}, RuntimeError, r"PyTorch finds \d+ NVIDIA GPUs, and the device is cuda:99"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, words):
    if os.environ.get("TRITON_INTERPRET") == "1" and "device" in arguments:
        pytest.skip("the interpreter runs everywhere")
    with pytest.raises(error, match=words):
        triton_mgiou.warmup(**{"vertices": (4,), "batch_sizes": (4,), "device": "cpu"} | arguments)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"options": {"axis_weight": "area"}}, ValueError, "axis_weight must be one of 'uniform'.*, got 'area'"),
        ({"options": {"boundary_weight": "1"}}, TypeError, "boundary_weight must be a number, got str"),
        ({"options": {"pred_mask": torch.int32}}, TypeError, "pred_mask must be torch.bool, got torch.int32"),
        ({"boxes": ["xyxy"], "box_options": {"angle": "degrees"}}, ValueError, "fmt='xyxy' has no angle"),
        ({"pairs": ["cxcywhr"], "pair_options": {"over": "max"}}, ValueError, "over must be one of .*, got 'max'"),
        ({"pairs": ["polygons"], "pair_options": {"over": "max"}}, ValueError, "over must be one of .*, got 'max'"),
        ({"pairs": ["xyxy"], "pair_options": {"mask1": torch.float32}}, TypeError, "mask1 must be torch.bool"),
    ],
    ids=str,
)
def test_triton_cpu_wrong_values_of_options_are_named_before_anything_is_compiled(arguments, error, words, monkeypatch):
    monkeypatch.setattr(warmup_module, "_tune", None)
    with pytest.raises(error, match=words):
        triton_mgiou.warmup(**{"vertices": (4,), "batch_sizes": (2,), "device": "cpu"} | arguments)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (torch.uint8, 255), (torch.int16, 300), (True, 300)])
def test_lengths_of_few_bits_beside_many_vertices(dtype, largest):
    types, options = (torch.float32, torch.float32), {"pred_lengths": dtype, "target_lengths": dtype}
    variant = warmup_module._Variant(types, (300, 100), 2, True, torch.device("cpu"), options)
    pred, target, given = variant.inputs()
    assert (given["pred_lengths"].tolist(), given["target_lengths"].tolist()) == ([largest] * 2, [100] * 2)
    triton_mgiou.mgiou_loss(pred, target, backend="eager", **given)


@pytest.mark.parametrize("size", [(3, 4), (8, 16), (64, 33)])
def test_what_is_measured_are_convex_polygons_once_around(size):
    """A target with dents takes a kernel's slow way, which no layout should be chosen by."""
    variant = warmup_module._Variant((torch.float32,) * 2, size, 256, True, torch.device("cpu"), {})
    for polygons, vertices in zip(variant.inputs()[:2], size, strict=True):
        assert polygons.shape == (256, vertices, 2)
        x, y = (polygons.roll(-1, 1) - polygons).double().unbind(2)
        following_x, following_y = x.roll(-1, 1), y.roll(-1, 1)
        turns = torch.atan2(x * following_y - y * following_x, x * following_x + y * following_y)
        assert (turns > 0).all()
        torch.testing.assert_close(turns.sum(1), torch.full((256,), 2 * math.pi, dtype=torch.float64))
    pairs = warmup_module._PairVariant((torch.float32,) * 2, "polygons", (3, 5), False, torch.device("cpu"), {})
    assert [len(shapes) for shapes in pairs.inputs()[:2]] == [3, 5]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("fmt", "sizes"), [("cxcywhr", (2, 3)), ("cxcywh", (2, 3)), ("cxcyczlwhr", (3, 4, 5))])
def test_what_is_measured_are_boxes_with_sizes(fmt, sizes, packed):
    """One box of a block without, and all of it takes twice the instructions."""
    variant = warmup_module._BoxVariant((torch.float32,) * 2, fmt, 4096, True, torch.device("cpu"), {}, packed)
    for boxes in variant.inputs()[:2]:
        assert (boxes[:, sizes] >= 1).all()
        assert boxes.is_contiguous() == packed


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_measured_are_boxes_whose_corners_are_apart(packed):
    variant = warmup_module._BoxVariant((torch.float32,) * 2, "xyxy", 4096, True, torch.device("cpu"), {}, packed)
    for boxes in variant.inputs()[:2]:
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert boxes.is_contiguous() == packed


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
def test_triton_cpu_arguments_as_tables_and_typed_configurations_have_them():
    """Integers of numpy, and names of an enumeration; options of boxes with an angle do not concern polygons."""
    (batch, size), options = np.unique([3, 2]), {"angle": "degrees"}
    given = {"vertices": (), "batch_sizes": [batch], "device": "cpu"}
    boxes = triton_mgiou.warmup(boxes=(Name.XYXY,), **given)
    pairs = triton_mgiou.warmup(pairs=[Name.POLYGONS], pair_sizes=[(size, size)], pair_options=options, **given)
    assert [each.fmt for each in (*boxes, *pairs)] == ["xyxy", "xyxy", "pairs of polygons"]


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
@pytest.mark.parametrize("options", [{}, {"weight": True, "reduction": "none"}])
@pytest.mark.parametrize("given", [None, [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_triton_cpu_keypoints_that_are_warmed_up_are_those_of_training(options, given, monkeypatch):
    launch, made = triton_mgiou.launch, []
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "keypoint_plan", lambda key, make=launch.keypoint_plan: made.append(key) or make(key))
    masks = {"pred_mask": True, "target_mask": True}
    results = triton_mgiou.warmup((5,), (2,), device="cpu", options=options | masks, keypoints=True)
    found = [(r.fmt, r.pred_vertices, r.batch, r.dtype, r.gradient) for r in results]
    assert found[2:] == [("keypoints", 8, "any", "float32", True), ("keypoints", 8, "any", "float32", False)]
    assert [" ".join(line.split()) for line in table(results).splitlines()[3:]] == [
        "keypoints any float32 yes 64 x 8 keypoints, 1, - - - default",
        "keypoints any float32 no 64 x 8 keypoints, 1, - - - default",
    ]
    known = len(made)
    loss = PolygonLoss("hybrid", alpha=0.5, sigmas=given, reduction=options.get("reduction", "mean"), backend="triton")
    pred, ones = torch.rand(3, 5, 2), torch.ones(3, 5)
    weight = ones[:, 0] if "weight" in options else None
    loss(pred.requires_grad_(), torch.rand(3, 5, 2), ones, ones[:, 0], weight=weight)[0].sum().backward()
    loss(pred.detach(), torch.rand(3, 5, 2), ones, ones[:, 0], weight=weight)
    assert len(made) == known > 0


def test_the_table_of_results():
    other = RESULT._replace(target_vertices=8, gradient=False, us=None, gain=None, source="default")
    lines = table([RESULT, other]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "vertices batch dtype gradient polygons x axes x lanes x slots, warps, registers us gain from",
        "8/16 < 8192 float32 yes 2 x 4 x 4 x 2/4, 1, 168 8.0 25.0% tuned",
        "8 < 8192 float32 no 2 x 4 x 4 x 2/4, 1, 168 - - default",
    ]
    assert len({line.index("float32") for line in lines[1:]} | {lines[0].index("dtype")}) == 1


def test_warm_up_from_the_command_line(tmp_path):
    file = tmp_path / "results.json"
    options = {"target_lengths": "int32", "weight": True, "axis_weight": "length", "reduction": "sum"}
    done = interpreted(
        "warmup", "--vertices", "3:2", "--batch", "2", "--dtype", "float16:float32", "--device", "cpu",
        "--no-tune", "--options", json.dumps(options), "--json", str(file),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["vertices", "4", "4"]
    results = json.loads(file.read_text())
    assert [set(each) for each in results] == [set(WarmupResult._fields)] * 2
    assert [each["gradient"] for each in results] == [True, False]
    assert {each["dtype"] for each in results} == {"float16 float32"}
    assert {each["source"] for each in results} == {"default"}
    assert {each["us"] for each in results} == {None}


def test_pairs_from_the_command_line(tmp_path):
    """The value with T of either kind, and the gradient to each side, of which one has the mask."""
    file = tmp_path / "results.json"
    done = interpreted(
        "warmup", "--vertices", "--pairs", "cxcywhr", "polygons", "--pair-sizes", "12:5", "8:4", "--device", "cpu",
        "--no-tune", "--pair-options", '{"over": "depth", "mask2": true, "lengths1": "int32"}', "--json", str(file),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 6
    assert "64 x 64 pairs" in done.stdout
    results = json.loads(file.read_text())
    assert [(each["fmt"], each["gradient"], each["batch"]) for each in results] == [
        ("pairs of cxcywhr", False, "T not a multiple of 4"),
        ("pairs of cxcywhr", True, "boxes1, P < 4096"),
        ("pairs of cxcywhr", True, "boxes2, T < 4096"),
        ("pairs of cxcywhr", False, "T a multiple of 4"),
        ("pairs of polygons", False, "all"),
    ]


@pytest.fixture
def warmup_calls(monkeypatch):
    """The arguments of `warmup`, without the warm-up."""
    calls = []
    monkeypatch.setattr(
        triton_mgiou, "warmup", lambda *arguments, **named: calls.append((arguments, named)) or [RESULT]
    )
    return calls


def test_defaults_of_the_command_line(warmup_calls, capsys):
    assert main(["warmup"]) == 0
    assert warmup_calls == [(([4, 8, 16], [512, 65536], [torch.float32], None, {}), REST)]
    assert capsys.readouterr().out == table([RESULT]) + "\n"


def test_arguments_reach_the_warm_up(warmup_calls):
    options = '{"axis_weight": "soft", "reduction": "sum", "weight": "float64", "convexity_weight": 0.5}'
    arguments = ["--vertices", "4", "12:16", "--batch", "7", "--dtype", "float16", "bfloat16:float32"]
    assert main(["warmup", *arguments, "--device", "cuda:1", "--options", options, "--no-tune"]) == 0
    given = {"axis_weight": "soft", "reduction": "sum", "weight": torch.float64, "convexity_weight": 0.5}
    types = [torch.float16, (torch.bfloat16, torch.float32)]
    assert warmup_calls == [(([4, (12, 16)], [7], types, "cuda:1", given), REST | {"tune": False})]


def test_only_what_stands_for_a_tensor_is_a_dtype(warmup_calls):
    assert main(["warmup", "--options", '{"axis_weight": "double", "target_lengths": "int"}']) == 0
    assert warmup_calls[0][0][-1] == {"axis_weight": "double", "target_lengths": torch.int32}


def test_the_help_says_the_defaults_in_words_that_the_command_line_takes(warmup_calls, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["warmup", "--help"])
    blocks = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)
    said = {each.split()[0]: each.partition("(default: ")[2].strip()[:-1] for each in blocks if "(default: " in each}
    assert said.pop("--device") == "the current GPU"
    assert set(said) == {"--vertices", "--batch", "--dtype", "--pair-sizes"}
    main(["warmup"])
    main(["warmup", *(word for name, values in said.items() for word in (name, *values.split()))])
    assert warmup_calls[0] == warmup_calls[1]


@pytest.mark.parametrize("name", ["options", "box_options", "pair_options"])
def test_unknown_options_are_told_for_what_is_left_out_too(name, capsys):
    assert main(["warmup", "--vertices", "--" + name.replace("_", "-"), '{"nonsense": 1}', "--device", "cpu"]) == 1
    assert f"{name} must hold options of " in capsys.readouterr().err


def test_tune_is_a_bool():
    with pytest.raises(TypeError, match="tune must be a bool, got str"):
        triton_mgiou.warmup(tune="no")


@pytest.mark.parametrize(
    ("device", "error"), [("nonsense", ValueError), ("", ValueError), ("cuda:-1", ValueError), (1.5, TypeError)]
)
def test_a_wrong_device_is_named(device, error):
    got = re.escape(repr(device)) if error is ValueError else "float"
    with pytest.raises(error, match=f"device must be a torch device or its name, got {got}"):
        triton_mgiou.warmup(device=device)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vertices", "0"], "argument --vertices: expected an integer of 1 or above, got '0'"),
        (["--vertices", "4:"], "argument --vertices: expected an integer of 1 or above, got ''"),
        (["--batch", "x"], "argument --batch: expected an integer of 1 or above, got 'x'"),
        (["--dtype", "int32"], "argument --dtype: expected float16, bfloat16, float32 or float64, got 'int32'"),
        (
            ["--dtype", "float8_e5m2"],
            "argument --dtype: expected float16, bfloat16, float32 or float64, got 'float8_e5m2'",
        ),
        (["--dtype", "load"], "argument --dtype: expected float16, bfloat16, float32 or float64, got 'load'"),
        (["--options", "{"], "argument --options: expected a JSON object, got '{'"),
        (["--options", "[]"], "argument --options: expected a JSON object, got '[]'"),
        (
            ["--options", '{"target_lengths": "int99"}'],
            "argument --options: expected a dtype or true for target_lengths, got 'int99'",
        ),
        (["--json", "."], "argument --json: expected a file in a folder that is there, got '.'"),
        (["--json", "nowhere/a.json"], "argument --json: expected a file in a folder that is there, got 'nowhere/a"),
    ],
)
def test_wrong_arguments_of_the_command_line(arguments, words, warmup_calls, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["warmup", *arguments])
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err
    assert warmup_calls == []


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, OSError])
def test_a_warm_up_that_cannot_run_is_one_line(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error("no GPU left")

    monkeypatch.setattr(triton_mgiou, "warmup", fail)
    assert main(["warmup"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "triton-mgiou warmup: no GPU left\n")


def test_info(folder, capsys):
    pytest.importorskip("triton")
    layout = layouts.layout(8, 8, False, 0, False)
    stored = store.TuningCache("Fake GPU sm90", "3.6.0")
    stored.get_or_make("vertices 8 8", lambda: store.Entry(layout._asdict(), 6.5, 7.0))
    (folder / "other.json").write_text("{")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"triton-mgiou: {triton_mgiou.__version__}\n" in out
    assert f"torch: {torch.__version__}" in out
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert 'cpu: backend "auto" takes eager: the tensors are on cpu, and the kernels need an NVIDIA GPU\n' in out
    assert f"tuning cache: {folder}\n" in out
    assert "fake-gpu-sm90-triton-3.6.0.json: Fake GPU sm90, Triton 3.6.0\n" in out
    assert (
        "vertices 8 8: polygons 4, axes 4, lanes 2, pred_slots 4, target_slots 4, num_warps 1, registers 128, us 6.5"
        in out
    )
    assert "other.json: unreadable: JSONDecodeError" in out


def test_info_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    from triton_mgiou import backends  # noqa: PLC0415

    monkeypatch.setattr(backends, "_reasons", {})
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "triton: not installed\n" in out
    assert 'cpu: backend "auto" takes eager: Triton is not installed\n' in out


def test_info_in_the_interpreter(monkeypatch, capsys):
    """There the kernels run on a CPU, but "auto" does not take them."""
    from triton_mgiou import backends  # noqa: PLC0415

    monkeypatch.setattr(backends, "_reasons", {torch.device("cpu"): None})
    assert not backends.takes_kernel("auto", torch.ones(1))
    assert main(["info"]) == 0
    assert 'cpu: backend "auto" takes eager: Triton interprets the kernels there' in capsys.readouterr().out


def test_info_with_a_triton_of_another_distribution(monkeypatch, capsys):
    """On Windows it is triton-windows, with PyTorch for ROCm pytorch-triton-rocm."""
    triton = pytest.importorskip("triton")

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    assert f"triton: {triton.__version__}\n" in capsys.readouterr().out


def test_info_of_an_empty_cache(folder, capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.endswith(f"tuning cache: {folder}, empty\n")
    assert not folder.exists()
