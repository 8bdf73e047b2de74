"""`python -m triton_mgiou diagnose`: checkpoints and tables, fine, broken and malicious."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from tests.helpers import INF, NAN, run_python
from triton_mgiou.cli import main
from triton_mgiou.training import checkpoints, curves, find_nonfinite
from triton_mgiou.training import diagnose as module
from triton_mgiou.training.tables import Column


@pytest.fixture
def diagnose(capsys):
    """Run the command on a path and return its status and the lines on stdout and on stderr."""

    def run(path):
        status = main(["diagnose", str(path)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


CHECKPOINTS = {
    "": lambda model, _: model.state_dict(),
    "model.": lambda model, _: {"model": model.state_dict(), "epoch": 7, "best": None},
    "ema.0.model.": lambda model, optimizer: {"ema": [{"model": model.state_dict()}], "optim": optimizer.state_dict()},
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("prefix", "make"), CHECKPOINTS.items(), ids=["plain", "in model", "nested"])
def test_checkpoints(prefix, make, new, tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    model, optimizer = trained()
    torch.save(make(model, optimizer), path, _use_new_zipfile_serialization=new)
    status, out, err = diagnose(path)
    assert (status, err) == (0, [])
    (line,) = out
    assert line.endswith("problems: 0")

    with torch.no_grad():
        model[0].weight[2, 1] = NAN
        model[1].running_var[3] = -INF
    torch.save(make(model, optimizer), path, _use_new_zipfile_serialization=new)
    status, out, err = diagnose(path)
    assert (status, err) == (1, [])
    assert out[0].endswith("problems: 2")
    assert out[1].startswith(f"  {prefix}0.weight: 1 NaN and 0 Inf in shape (4, 3), float32; first at [2, 1]; of the")
    assert out[2].startswith(f"  {prefix}1.running_var: 0 NaN and 1 Inf in shape (4,), float32; first at [3]; of the")


def test_optimizer_state(tmp_path, diagnose):
    model, optimizer = trained()
    optimizer.state[model[0].bias]["exp_avg_sq"][1] = INF
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pth")
    status, out, _ = diagnose(tmp_path / "c.pth")
    assert status == 1
    assert [line.split(":")[0].strip() for line in out[1:]] == ["optimizer.state.1.exp_avg_sq"]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_whole_optimizer(new, tmp_path, diagnose):
    """Its state has parameters as keys, whose text has many lines."""
    model, optimizer = trained()
    optimizer.state[model[0].weight]["exp_avg_sq"][1] = INF
    torch.save(optimizer, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
    status, out, _ = diagnose(tmp_path / "c.pth")
    assert status == 1
    assert out[1].startswith("  state.0.exp_avg_sq: 0 NaN and 3 Inf in shape (4, 3), float32; first at [1, 0],")
    assert len(out) == 3
    assert out[2].startswith("  not run, only looked into: torch.optim.adam.Adam")


def test_the_number_of_tensors_and_numbers(tmp_path, diagnose):
    torch.save({"a": torch.zeros(3, 5), "b": [torch.tensor(1), "text"]}, tmp_path / "c.pt")
    assert diagnose(tmp_path / "c.pt")[1] == [f"{tmp_path / 'c.pt'}: tensors: 2, numbers: 16, problems: 0"]


def test_the_number_of_numbers_in_safetensors(tmp_path, diagnose):
    """Of more and of less than a byte each."""
    path = tmp_path / "m.safetensors"
    head, places = {}, 0
    for name, shape, size in (
        ("F4", [2, 4], 4),
        ("BOOL", [3], 3),
        ("I64", [2, 5], 80),
        ("U16", [], 2),
        ("F32", [4], 16),
    ):
        head[name] = {"dtype": name, "shape": shape, "data_offsets": [places, places + size]}
        places += size
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(places))
    assert diagnose(path)[1] == [f"{path}: tensors: 5, numbers: {8 + 3 + 10 + 1 + 4}, problems: 0"]
    path.write_bytes(path.read_bytes().replace(b"[2, 5]", b"[3, 5]"))
    assert "damaged" in diagnose(path)[2][0]


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 4", "pickle", "pickle 0", "numpy", "DCP"])
def test_code_in_a_file_does_not_run(kind, tmp_path, diagnose):
    """The tensors beside it are read; the file is as bad as it should be, as loading it shows."""
    path, marker = tmp_path / "weights.pt", tmp_path / "marker"
    content = {"model": torch.tensor([1.0, NAN]), "more": Malicious(str(marker))}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=0 if kind == "pickle 0" else 4))
    elif kind == "numpy":
        content["more"] = np.array([Malicious(str(marker)), np.array([NAN])], dtype=object)
        torch.save(content, path)
    elif kind == "DCP":
        torch.distributed.checkpoint.save({"w": content["model"]}, checkpoint_id=path, no_dist=True)
        plan = pickle.loads((path / ".metadata").read_bytes())
        plan.planner_data = content["more"]
        (path / ".metadata").write_bytes(pickle.dumps(plan))
    else:
        options = {"pickle_protocol": 4} if kind == "protocol 4" else {}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy", **options)
    status, out, err = diagnose(path)
    assert not marker.exists()
    if kind != "pickle 0":
        assert (status, err) == (1, [])
        assert " 1 NaN and 0 Inf in shape (2,)" in out[1]
    if kind in {"zip", "legacy", "protocol 4", "pickle", "numpy"}:
        assert f"{os.mkdir.__module__}.mkdir" in out[-1], "the note names what was not run"
    if kind == "DCP":
        pickle.loads((path / ".metadata").read_bytes())
    elif kind.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_harmless_foreign_classes(tmp_path, diagnose):
    path = tmp_path / "last.pt"
    content = {
        "model": torch.ones(3), "path": tmp_path, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5),
        "list": [np.int64(3), np.zeros(4, dtype=">f4"), np.array(["a", "b"]), slice(1, 2), {1, 2}, 3 + 4j],
    }  # fmt: skip
    torch.save(content, path)
    status, out, err = diagnose(path)
    assert (status, err) == (0, [])
    assert out[0].startswith(f"{path}: tensors: ")
    content["list"][1] = np.array([[1.0, NAN]], dtype=">f4")
    content["args"] = argparse.Namespace(inner={"deep": [torch.tensor(INF)]})
    torch.save(content, path)
    status, out, _ = diagnose(path)
    assert status == 1
    assert [line.split(",")[0] for line in out[1:3]] == [
        "  args.inner.deep.0: 0 NaN and 1 Inf in shape ()", "  list.1: 1 NaN and 0 Inf in shape (1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("array", "nan", "inf"),
    [
        (np.array([[1.0, NAN], [INF, 2.0]]), 1, 1),
        (np.float32([NAN, -INF, INF]), 1, 2),
        (np.array([NAN], dtype=">f8"), 1, 0),
        (np.array([1, NAN], dtype=np.longdouble), 1, 0),
        (np.array([complex(NAN, 1), 2]), 1, 0),
        (np.array([1.0, NAN, 3.0], dtype=np.float16)[::-2], 0, 0),
        (np.array([1.0, NAN, 3.0])[::-1], 1, 0),
        (np.broadcast_to(np.array(NAN), (3,)), 3, 0),
        (np.array(INF), 0, 1),
        (np.arange(3), 0, 0),
        (np.array(["nan"]), 0, 0),
        (np.zeros(0), 0, 0),
    ],
)
def test_find_nonfinite_sees_arrays(array, nan, inf):
    for nested, name in ((array, "array"), ({"state": [array]}, "state.0")):
        found = [(report.name, report.nan, report.inf, report.shape) for report in find_nonfinite(nested)]
        assert found == ([(name, nan, inf, array.shape)] if nan or inf else [])


def test_find_nonfinite_looks_into_arrays_of_objects_and_fields():
    objects = np.array([torch.tensor(NAN), {"a": np.array([INF])}], dtype=object)
    fields = np.array([(1.0, 2), (NAN, 3)], dtype=[("x", "f4"), ("n", "i4")])
    assert [report.name for report in find_nonfinite([objects, fields])] == ["0.0", "0.1.a", "1.x"]


def test_find_nonfinite_in_a_sparse_tensor_that_is_larger_than_memory():
    places, values = torch.tensor([[3, 10**9], [5, 7]]), torch.tensor([1.0, INF])
    tensor = torch.sparse_coo_tensor(places, values, (2 * 10**9, 10**6), check_invariants=True)
    (report,) = find_nonfinite({"w": tensor})
    assert (report.shape, report.inf, report.first) == ((2 * 10**9, 10**6), 1, ((10**9, 7),))
    assert find_nonfinite(torch.sparse_coo_tensor(places, values.clamp(max=1), tensor.shape)) == []


def wrong_indices():
    """Sparse tensors of one fault each, which PyTorch saves and loads."""
    ends, places, far = [0, 1, 2], [0, 1], 10**13
    numbers, blocks = torch.tensor([1.0, NAN]), torch.full((2, 2, 2), NAN)
    options = {"check_invariants": False}
    for coordinates in ([[far, 0], [0, 0]], [[0, 0], [0, -far]]):
        yield torch.sparse_coo_tensor(coordinates, numbers, (2, 2), **options)
    for given in (
        ([0, far, 2], places),
        ([1, 1, 2], places),
        ([0, 1, far], places),
        ([0, 2], places),
        (ends, [0, far]),
    ):
        yield torch.sparse_csr_tensor(*map(torch.tensor, given), numbers, (2, 2), **options)
    for given in ((ends, [0, -far]), (ends, [0]), (ends, [0] * 9), ([0, 0, 1, 2], places)):
        yield torch.sparse_csc_tensor(*map(torch.tensor, given), numbers, (2, 2), **options)
    for given in ((ends, [0, 2]), ([0, 2, 1], places)):
        yield torch.sparse_bsr_tensor(*map(torch.tensor, given), blocks, (4, 4), **options)
        yield torch.sparse_bsc_tensor(*map(torch.tensor, given), blocks, (4, 4), **options)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_sparse_tensors_with_indices_outside_their_shape(tmp_path):
    """PyTorch would read and write wherever the file says. In a process of its own, which that may end."""
    tensors = list(wrong_indices())
    for number, tensor in enumerate(tensors):
        torch.save({"w": tensor}, tmp_path / f"{number}.pt")
    torch.save({"w": tensors[0]}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with open(tmp_path / "bare.pt", "wb") as file:
        pickle.dump({"w": tensors[0]}, file)
    code = """
import sys
from triton_mgiou.cli import main
for path in sys.argv[1:]:
    print(main(["diagnose", path]), flush=True)
"""
    paths = [*(f"{number}.pt" for number in range(len(tensors))), "legacy.pt", "bare.pt"]
    done = run_python("-c", code, *(str(tmp_path / path) for path in paths))
    assert done.stdout.split() == ["2"] * len(paths), done.stderr
    assert done.stderr.count("w must have indices in its shape") == len(paths)


def test_places_in_a_compressed_tensor_whose_rows_are_in_no_order():
    """As those of SciPy may be; PyTorch takes it."""
    ends, places = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    tensor = torch.sparse_csr_tensor(ends, places, torch.tensor([NAN, 1.0, INF]), (2, 3), check_invariants=False)
    (report,) = find_nonfinite({"w": tensor})
    assert (report.nan, report.inf, report.first) == (1, 1, ((0, 2), (1, 1)))


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize(
    ("layout", "first"),
    [
        (torch.sparse_csr, (10**6, 7)),
        (torch.sparse_csc, (7, 10**6)),
        (torch.sparse_bsr, (2 * 10**6, 15)),
        (torch.sparse_bsc, (14, 2 * 10**6 + 1)),
    ],
)
def test_find_nonfinite_in_a_compressed_tensor_that_is_larger_than_memory(layout, first):
    """As the edges of a large graph are."""
    rows = torch.arange(2**20 + 1)
    ends, places = (rows > 3).long() + (rows > 10**6), torch.tensor([5, 7])  # one number in row 3, one in row 10^6
    values, size = torch.tensor([1.0, INF]), 2**20
    if layout in (torch.sparse_bsr, torch.sparse_bsc):
        values, size = torch.tensor([[[1.0, 1], [1, 1]], [[1, INF], [1, 1]]]), 2**21
    for given, found in ((values, [(1, (first,))]), (values.clamp(max=1), [])):
        tensor = torch.sparse_compressed_tensor(ends, places, given, (size, size), layout=layout)
        assert [(report.inf, report.first) for report in find_nonfinite({"w": tensor})] == found


class Custom(nn.Module):
    """A module of a class that this process has when it saves, and a reader would not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))
        self.hidden = {"anchors": torch.tensor([1.0, INF])}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_whole_module(new, tmp_path, diagnose):
    path = tmp_path / "best.pt"
    model = Custom()
    with torch.no_grad():
        model.inner[0].bias[2] = NAN
    torch.save({"model": model.half(), "epoch": 3}, path, _use_new_zipfile_serialization=new)
    status, out, err = diagnose(path)
    assert (status, err) == (1, [])
    assert out[1].startswith("  model.inner.0.bias: 1 NaN and 0 Inf in shape (4,), float16; first at [2]")
    assert out[2].startswith("  model.hidden.anchors: 0 NaN and 1 Inf in shape (2,)")
    assert f"{__name__}.Custom" in out[3]
    assert out[0].startswith(f"{path}: tensors: 9, numbers: {12 + 4 + 4 * 4 + 1 + 2 + 2},")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncated_checkpoints(new, tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    model, _ = trained()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for size in [0, 1, 10, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        status, out, err = diagnose(path)
        assert (status, out, len(err)) == (2, [], 1), size
        assert err[0].startswith("triton-mgiou diagnose: ")
        assert str(path) in err[0]


def test_files_that_are_no_checkpoint(tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    status, _, err = diagnose(path)
    assert (status, err) == (2, [f"triton-mgiou diagnose: cannot read {path}: No such file or directory"])
    status, _, err = diagnose(tmp_path)
    assert (status, len(err)) == (2, 1)
    assert f"{tmp_path} is a folder without the .metadata of torch.distributed.checkpoint" in err[0]
    path.write_text("no pickle at all")
    assert diagnose(path)[0] == 2
    torch.save({"epoch": 3, "lr": [0.1]}, path)
    status, _, err = diagnose(path)
    assert (status, len(err)) == (2, 1)
    assert err[0].startswith(f"triton-mgiou diagnose: {path} holds no tensor; diagnose reads CSV ")


def test_files_that_claim_more_than_they_hold(tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(1).expand(10**12)}, path)
    status, _, err = diagnose(path)
    assert status == 2
    assert "w claims 4000000000000 bytes, more than there are" in err[0]
    torch.save({"w": torch.tensor(NAN).expand(1000)}, path)
    status, out, _ = diagnose(path)
    assert (status, out[1].split(" NaN")[0]) == (1, "  w: 1000")

    torch.save({"w": torch.ones(10)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    status, _, err = diagnose(tmp_path / "bomb.pt")
    assert status == 2
    assert "its records are compressed" in err[0]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_damaged_files_raise_nothing_else(new, tmp_path):
    """Bytes changed at random places, and one file in three cut off."""
    model, optimizer = trained()
    path, damaged = tmp_path / "weights.pt", tmp_path / "damaged.pt"
    content = [model.state_dict(), optimizer.state_dict(), torch.zeros(3000)]
    torch.save(content, path, _use_new_zipfile_serialization=new)
    whole, chance = path.read_bytes(), random.Random(0)
    outcomes = []
    for index in range(150):
        content = bytearray(whole[: chance.randrange(len(whole)) if index % 3 == 0 else None])
        for _ in range(chance.choice((1, 5, 50)) if content else 0):
            content[chance.randrange(len(content))] = chance.randrange(256)
        damaged.write_bytes(content)
        try:
            outcomes.append(module.diagnose(damaged))
        except module.DiagnoseError:
            outcomes.append(None)
    assert outcomes.count(None) > 50
    assert outcomes.count(True) > 10, "bytes that nothing depends on, or other finite numbers"


@pytest.mark.parametrize("kind", ["table", "JSON", "safetensors", "plan", "shard", "modules"])
def test_damage_in_other_formats_raises_nothing_else(kind, tmp_path):
    model, optimizer = trained()
    names = {"table": "a.csv", "JSON": "a.json", "safetensors": "a.safetensors", "modules": "a.pt"}
    path = tmp_path / names.get(kind, "folder")
    if kind == "table":
        write(path, {"epoch": range(40), "train/loss": falling(40), "mAP": rising(40)})
    elif kind == "JSON":
        path.write_text("\n".join(json.dumps({"iter": i, "loss": v}) for i, v in enumerate(falling(40))))
    elif kind == "safetensors":
        head = json.dumps({"w": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(48))
    elif kind == "modules":
        torch.save({"model": model, "optimizer": optimizer.state_dict()}, path)
    else:
        torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=path, no_dist=True)
    damaged = path
    if path.is_dir():
        damaged = path / (".metadata" if kind == "plan" else "__0_0.distcp")
    whole, chance = damaged.read_bytes(), random.Random(1)
    outcomes = []
    for index in range(80):
        content = bytearray(whole[: chance.randrange(len(whole)) if index % 3 == 0 else None])
        for _ in range(chance.choice((1, 5, 50)) if content else 0):
            content[chance.randrange(len(content))] = chance.randrange(256)
        damaged.write_bytes(content)
        try:
            outcomes.append(module.diagnose(path))
        except module.DiagnoseError:
            outcomes.append(None)
    assert outcomes.count(None) > 10


def test_a_large_file_has_a_progress_bar(tmp_path, diagnose, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save([torch.zeros(1000), torch.zeros(3000)], path)
    assert diagnose(path)[2] == []
    monkeypatch.setattr(checkpoints, "LARGE", 16000)
    status, _, err = diagnose(path)
    assert status == 0
    assert "100%" in err[-1]
    assert "16.0k/16.0k" in err[-1]


# Tables

ULTRALYTICS = """\
                  epoch,         train/box_loss,   metrics/mAP50(B),       val/box_loss,             lr/pg0
                      1,                 2.8131,             0.0521,             2.9012,           0.000333
                      2,                 2.2011,             0.2113,             2.4400,           0.000660
                      3,                    nan,             0.3007,                inf,           0.000980
                      4,                    nan,                  0,                nan,           0.000980
"""


def write(path, columns, delimiter=","):
    rows = zip(*columns.values(), strict=True)
    lines = [delimiter.join(columns), *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_results_of_ultralytics(tmp_path, diagnose):
    path = tmp_path / "results.csv"
    path.write_text(ULTRALYTICS)
    status, out, err = diagnose(path)
    assert (status, err) == (1, [])
    assert out == [
        f"{path}: rows: 4, columns of numbers: 4, problems: 2",
        "  train/box_loss: 2 NaN and 0 Inf, the first at epoch 3",
        "  val/box_loss: 1 NaN and 1 Inf, the first at epoch 3",
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "  "])
def test_plain_tables(delimiter, tmp_path, diagnose):
    columns = {"name": ["run"] * 4, "loss": [1.0, 0.5, NAN, 0.4], "step": [10, 20, 30, 40]}
    status, out, _ = diagnose(write(tmp_path / "log.txt", columns, delimiter))
    assert status == 1
    assert out[1:] == ["  loss: 1 NaN and 0 Inf, the first at epoch 30"]


def test_a_table_without_a_head(tmp_path, diagnose):
    path = tmp_path / "log.txt"
    path.write_text("1.0 3\n0.5 2\n0.4 inf\n")
    assert diagnose(path)[1][1:] == ["  column 2: 0 NaN and 1 Inf, the first at epoch 3"]


def falling(rows):
    return [2 * 0.97**i + 0.2 for i in range(rows)]


def rising(rows):
    return [0.7 * (1 - 0.95**i) for i in range(rows)]


def test_a_healthy_run(tmp_path, diagnose):
    rows = 60
    loss = [value * (1 + 0.03 * (-1) ** i) for i, value in enumerate(falling(rows))]  # noise of 3 %
    columns = {
        "epoch": range(1, rows + 1),
        "time": [17.0] * rows,
        "train/box_loss": loss,
        "metrics/mAP50(B)": rising(rows),
        "metrics/precision(B)": [0.1, 0.2, *([1.0] * (rows - 2))],  # cannot get any better
        "lr/pg0": [0.01] * rows,
    }
    status, out, err = diagnose(write(tmp_path / "results.csv", columns))
    assert (status, out[1:], err) == (0, [], [])


@pytest.mark.parametrize(("gain", "notes"), [(0.99, 1), (1.01, 0)])
def test_when_a_run_has_converged(gain, notes, tmp_path, diagnose):
    """The last 5 of 10 rows do not beat the best row before by 1 %."""
    losses = [5.0, 4.0, 3.0, 2.5, 2.0, 2.1, 2.1, 2.0 - 0.02 * gain, 2.05, 2.1]
    status, out, _ = diagnose(write(tmp_path / "log.csv", {"loss": losses}))
    assert (status, len(out) - 1) == (0, notes)
    assert notes == 0 or out[1].startswith("  loss: converged: ")


@pytest.mark.parametrize(("end", "status"), [(0.87, 0), (0.83, 1)])
def test_the_threshold_of_a_fall(end, status, tmp_path, diagnose):
    values = [*rising(50), *[rising(50)[-1] * end] * 20]
    assert diagnose(write(tmp_path / "log.csv", {"mAP": values}))[0] == status


@pytest.mark.parametrize(("rise", "word"), [(1.28, None), (1.32, "fell from its best"), (3.2, "collapsed")])
def test_the_thresholds_of_a_loss_that_rises(rise, word, tmp_path, diagnose):
    values = [*(1 - 0.01 * i for i in range(40)), *[0.61] * 5, *[0.61 * rise] * 20]
    status, out, _ = diagnose(write(tmp_path / "log.csv", {"loss": values}))
    assert status == (word is not None)
    assert word is None or out[1].startswith(f"  loss: {word}: {0.61 * rise:.4g} at the end, after 0.61 at epoch 4")


@pytest.mark.parametrize(("rows", "status"), [(29, 0), (30, 1)])
def test_how_long_a_metric_may_be_zero_while_losses_fall(rows, status, tmp_path, diagnose):
    columns = {"loss": [0.9**i for i in range(rows)], "mAP": [0.0009] * (rows - 1) + [0.0]}
    assert diagnose(write(tmp_path / "log.csv", columns))[0] == status


@pytest.mark.parametrize(
    ("clock", "last", "status"), [("epoch", 29, 0), ("epoch", 30, 1), ("Epoch", 60, 1), ("step", 6000, 0)]
)
def test_how_many_epochs_a_metric_may_be_zero_where_few_are_validated(clock, last, status, tmp_path, diagnose):
    """Six validations, in Lightning's way: the epoch stands in both kinds of rows, which have different columns."""
    lines = [f"{clock},loss,mAP"]
    for part in range(6):
        lines += [f"{last * part // 5},{0.8**part:.4f},", f"{last * part // 5},,0.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    found, out, _ = diagnose(tmp_path / "metrics.csv")
    assert found == status
    assert out[1:] == ["  mAP: never learnt: 0 in all 6 rows"] * status


def test_oscillation(tmp_path, diagnose):
    losses = falling(20) + [0.5 + (0.3 if i % 2 else 0) - 0.012 * i for i in range(20)]
    status, out, _ = diagnose(write(tmp_path / "results.csv", {"loss": losses}))
    last = losses[-12:]
    step = sum(abs(b - a) for a, b in pairwise(last)) / 11
    mean = sum(last) / 12
    assert status == 0, "its mean is as low as ever"
    assert [line for line in out[1:] if "oscillation" in line] == [
        f"  loss: oscillation: in the last 12 rows it turns in 100% of them and goes {step:.4g} from row to row, "
        f"{step / mean:.0%} of its mean {mean:.4g}"
    ]


def test_empty_cells(tmp_path, diagnose):
    """Some columns have a value every third row; one that ends for good is NaN as pandas writes it."""
    sparse = [value if i % 3 == 0 else "" for i, value in enumerate(falling(12))]
    ends = [*falling(9), "", "", ""]
    status, out, _ = diagnose(write(tmp_path / "log.csv", {"val_loss": sparse, "loss": ends}))
    assert status == 1
    assert out[1:] == ["  loss: empty in the last 3 rows, after epoch 9 (some libraries write NaN so)"]


@pytest.mark.parametrize(("end", "status"), [(3, 0), (4, 1)])
def test_cells_are_empty_at_the_end_for_longer_than_before(end, status, tmp_path, diagnose):
    columns = {"loss": falling(15 + end), "val_loss": [*falling(6), *[""] * 3, *falling(12)[6:], *[""] * end]}
    code, out, _ = diagnose(write(tmp_path / "log.csv", columns))
    assert code == status
    assert status == 0 or out[1].startswith("  val_loss: empty in the last 4 rows, after epoch 15")


@pytest.mark.parametrize(("last", "status"), [(1.0, 0), (NAN, 1)])
def test_a_column_of_another_kind_that_is_not_finite_until_the_end(last, status, tmp_path, diagnose):
    columns = {"loss": falling(20), "ratio": [*[1.0] * 15, *[NAN] * 4, last]}
    code, out, _ = diagnose(write(tmp_path / "log.csv", columns))
    assert code == status
    assert status == 0 or out[1:] == ["  ratio: 5 NaN and 0 Inf, the first at epoch 16"]


@pytest.mark.parametrize(("rows", "status"), [(4, 0), (5, 1)])
def test_how_many_numbers_a_metric_must_have(rows, status, tmp_path, diagnose):
    columns = {"loss": falling(rows), "mAP": [0.5, 0.6, 0.7, 0.0, 0.0][-rows:]}
    assert diagnose(write(tmp_path / "log.csv", columns))[0] == status


def test_a_metric_that_is_not_finite_after_it_had_a_number(tmp_path, diagnose):
    """And one of another kind that never had one, as what is not defined for the data."""
    columns = {"loss": falling(20), "mAP": [*rising(15), *[NAN] * 5], "ratio": [NAN] * 20}
    status, out, _ = diagnose(write(tmp_path / "log.csv", columns))
    assert (status, out[1:]) == (1, ["  mAP: 5 NaN and 0 Inf, the first at epoch 16"])


def test_a_table_like_yolov5s_without_sizes_of_images(tmp_path, diagnose):
    path = tmp_path / "results.txt"
    path.write_text("".join(f"{i}/9 7.37G {' '.join(['0.5'] * 12)}\n" for i in range(10)))
    status, _, (line,) = diagnose(path)
    assert status == 2
    assert "is no results.txt of YOLOv5: it has no column of image sizes" in line


def test_bytes_that_are_no_text_are_no_table(tmp_path, diagnose):
    path = tmp_path / "weights.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\xff" * 600)
    status, _, (line,) = diagnose(path)
    assert status == 2
    assert f"{path} is no checkpoint, or a damaged one: " in line


def test_names_that_two_tensors_have(tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.tensor([NAN])}, path)
    status, out, _ = diagnose(path)
    assert status == 1
    assert out[1].startswith("  a.b (2): 1 NaN")


class Kept(list):
    """A list of another class, which a checkpoint names."""


def test_tensors_in_lists_of_a_class_of_their_own(tmp_path, diagnose):
    path = tmp_path / "weights.pt"
    torch.save({"one": Kept([torch.tensor([NAN])]), "two": Kept([torch.ones(1), torch.tensor([INF])])}, path)
    status, out, _ = diagnose(path)
    assert status == 1
    assert [line.split(":")[0].strip() for line in out[1:3]] == ["one", "two (2)"]
    assert "not run, only looked into: tests.training.test_diagnose.Kept" in out[3]


def test_a_shard_is_judged_by_what_it_holds(tmp_path, diagnose):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = torch.distributed.checkpoint.FileSystemWriter(tmp_path, single_file_per_rank=False)
        content = {"good": torch.ones(2), "bad": torch.tensor([NAN])}
        torch.distributed.checkpoint.save(content, storage_writer=writer, no_dist=True)
    shards = sorted(tmp_path.glob("*.distcp"))
    assert sorted(diagnose(shard)[0] for shard in shards) == [0, 1]


def test_the_noise_of_a_curve_is_its_standard_deviation():
    values = (3 + 0.02 * np.random.default_rng(0).standard_normal(20000)).tolist()
    rows = list(range(len(values)))
    assert curves.curve_of(Column("loss", rows, rows, values), lower=True).noise == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"epoch,loss\n", "has a head and no rows"),
        (b"epoch,loss\n1,0.5\n2\n3\n4,0.1\n", "is damaged: row 2 has 1 cells instead of 2"),
        (b"epoch,loss\n1,0.5\n2,0.x\n3,0.1\n", "is damaged: '0.x' in the column 'loss' is no number"),
        (b"name\nrun\n", "has no column of numbers"),
        (b"a,b\n1,2\n", "has neither a loss nor a metric by name"),
        (b"\x80\x02\x00\xff", "is no table: it is not UTF-8 text"),
    ],
)
def test_tables_that_cannot_be_read(text, words, tmp_path, diagnose):
    path = tmp_path / "log.csv"
    path.write_bytes(text)
    status, out, (line,) = diagnose(path)
    assert (status, out) == (2, [])
    assert line.startswith(f"triton-mgiou diagnose: {path} {words}; diagnose reads CSV ")


@pytest.mark.parametrize("end", ["2,0.", "2,1e-", "2,-", "2", "2,0.4,0.3", '2,"0.'])
def test_a_last_row_that_was_cut_off(end, tmp_path, diagnose):
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate(falling(20))) + end)
    assert diagnose(path)[0] == 0


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["diagnose"])
    assert caught.value.code == 2
    assert "PATH" in capsys.readouterr().err


def test_the_command_as_a_process(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.tensor([1.0, NAN])}, path)
    command = [sys.executable, "-m", "triton_mgiou", "diagnose", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    (report,) = find_nonfinite({"w": torch.tensor([1.0, NAN])})
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"{path}: tensors: 1, numbers: 2, problems: 1\n  {report}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path, capsys):
    pipe = tmp_path / "results.csv"
    os.mkfifo(pipe)
    assert main(["diagnose", str(pipe)]) == 2
    assert "a pipe or a device" in capsys.readouterr().err
    assert main(["diagnose", os.devnull]) == 2
    assert "a pipe or a device" in capsys.readouterr().err


def test_names_that_the_output_cannot_write(tmp_path, monkeypatch):
    """As with PYTHONIOENCODING=ascii, and in a console of Windows."""
    path = tmp_path / "größe.pt"
    torch.save({"gewicht_ü": torch.tensor([NAN])}, path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["diagnose", str(path)]) == 1
    out.flush()
    assert b"gr\\xf6\\xdfe.pt: tensors: 1" in out.buffer.getvalue()
    assert b"  gewicht_\\xfc: 1 NaN" in out.buffer.getvalue()
