"""The command lines of `bench`: what ends a program at once, and with which words."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import against, documents, heads, report, startup
from bench.arguments import earlier_rows, not_negative, out_file, positive
from bench.boxes import graphs
from bench.boxes import speed as boxes_speed
from bench.convergence import amp, run
from bench.detectors import crops
from bench.detectors import run as detectors
from bench.documents import RESULTS
from bench.pairs import __main__ as pairs
from tests import mutants
from tests.helpers import run_python


def test_the_folder_of_results_is_made_before_anything_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "amp.json"
    monkeypatch.setattr(amp, "CASES", [])
    monkeypatch.setattr(
        amp, "tqdm", lambda cases, **_: list(cases) if path.parent.is_dir() else pytest.fail("no folder")
    )
    amp.main(["--out", str(path)])
    assert path.is_file()


NO_RESULTS = ["", "nope", "[1]", "{}", '{"rows": 3}', '{"rows": [1]}', '{"rows": [{"task": "digits"}]}']
OTHER_RESULTS = sorted(path for path in RESULTS.glob("*.json") if path.stem != "h200_startup")


@pytest.mark.parametrize(
    ("program", "text"),
    [
        *itertools.product([run, crops, startup], NO_RESULTS),
        *(pytest.param(startup, path.read_text(), id=path.stem) for path in OTHER_RESULTS),
    ],
)
def test_another_programs_file_is_not_continued(program, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crops, "need_packages", lambda *_: None)
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        program.main(["--out", str(path)])
    assert ended.value.code == 2
    assert f"argument --out: expected a new file or one of this program's, got {path}" in capsys.readouterr().err
    assert path.read_text() == text


def test_rows_of_an_earlier_run_are_kept(tmp_path):
    path, row = tmp_path / "runs.json", {"task": "digits", "seed": 0}
    parser = argparse.ArgumentParser()
    assert earlier_rows(parser, path, ["task"], [("digits",)]) == []
    path.write_text(json.dumps({"rows": [row]}))
    assert earlier_rows(parser, path, ["task"], [("digits",)]) == [row]
    with pytest.raises(SystemExit):  # as of a loss that is gone
        earlier_rows(parser, path, ["task"], [("letters",)])


@pytest.mark.parametrize(("program", "name"), [(run, "convergence.json"), (crops, "detectors/crops.json")])
def test_the_results_of_a_program_are_continued(program, name, tmp_path, monkeypatch):
    """Of both there is nothing left to train."""
    path = tmp_path / "results.json"
    path.write_text((RESULTS / name).read_text())
    monkeypatch.setattr(crops, "need_packages", lambda *_: None)
    monkeypatch.setattr(run, "unrelated", lambda *_: 0.0)
    program.main(["--out", str(path)])
    assert json.loads(path.read_text())["rows"] == json.loads((RESULTS / name).read_text())["rows"]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("README.md", 2)])
def test_the_documents_are_not_written_for_a_question(argument, status, monkeypatch, capsys):
    monkeypatch.setattr(documents, "rendered", lambda: pytest.fail("written"))
    with pytest.raises(SystemExit) as ended:
        documents.main([argument])
    assert ended.value.code == status
    capsys.readouterr()


def test_files_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder, expected a file"):
        out_file(str(tmp_path))
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"cannot make the folder of .*x.json: (Not a dir|File exists)"
    ):
        out_file(str(tmp_path / "file" / "x.json"))


def test_crops_say_what_cannot_be_imported(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec("bench")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ultralytics" else there)
    with pytest.raises(SystemExit) as ended:
        crops.main(["--out", str(tmp_path / "crops.json")])
    assert ended.value.code == 2
    assert "bench.detectors.crops cannot import ultralytics; all it needs: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_numbers_of_things_are_1_or_above(text):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"expected an integer of 1 or above, got '{text}'"):
        positive(text)
    assert positive("12") == 12


@pytest.mark.parametrize("text", ["-1", "nan", "-inf", "x", ""])
def test_amounts_are_0_or_above(text):
    """No ratio is above a limit of NaN, and no time is left before it."""
    with pytest.raises(argparse.ArgumentTypeError, match=rf"expected a number of 0 or above, got '{text}'"):
        not_negative(text)
    assert [not_negative(text) for text in ("0", "1.02", "inf")] == [0.0, 1.02, float("inf")]


@pytest.mark.parametrize(
    ("program", "arguments", "error"),
    [
        (against, [".", "--limit", "nan"], "--limit: expected a number of 0 or above, got 'nan'"),
        (pairs, ["--seconds", "nan"], "--seconds: expected a number of 0 or above, got 'nan'"),
        (pairs, ["--rounds", "0"], "--rounds: expected an integer of 1 or above, got '0'"),
        (boxes_speed, ["--out", "a.json", "--seconds", "nan"], "--seconds: expected a number of 0 or above, got 'nan'"),
        (detectors, ["--seconds", "nan"], "--seconds: expected a number of 0 or above, got 'nan'"),
        (heads, ["--out", "a.json", "--batch", "33"], "--batch: expected a multiple of 32, got '33'"),
        (heads, ["--out", "a.json", "--batch", "0"], "--batch: expected an integer of 1 or above, got '0'"),
        (mutants, ["--out", "."], "--out: . is a folder, expected a file"),
        (mutants, ["--out", "a.json", "--count", "0"], "--count: expected an integer of 1 or above, got '0'"),
        (mutants, ["--out", "a.json", "--jobs", "0"], "--jobs: expected an integer of 1 or above, got '0'"),
    ],
)
def test_numbers_that_are_none_are_refused(program, arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert f"error: argument {error}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["512", "4x", "axb", "0x4", "4x4x4"])
def test_sizes_that_are_none_are_refused(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        against.main([str(tmp_path), "--sizes", size])
    assert ended.value.code == 2
    assert "argument --sizes: expected an integer of 1 or above" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h200_pairs", "h200_boxes", "convergence_amp", "instructions"])
def test_a_report_of_another_programs_results_is_refused(name, tmp_path):
    path = tmp_path / "results.json"
    path.write_text((RESULTS / f"{name}.json").read_text())
    with pytest.raises(SystemExit, match=r"bench\.report: expected results of bench\.speed"):
        report.main([str(path)])
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_call_is_the_median_of_processes_in_turns(monkeypatch):
    """Each process takes as many seconds as there were processes before it."""
    count = iter(range(100))
    called = []

    def run(command, env, **_):
        called.append((command[-1], env["TRITON_CACHE_DIR"].split("/")[-2]))
        return SimpleNamespace(returncode=0, stdout=json.dumps({"first call": next(count)}))

    monkeypatch.setattr(startup.subprocess, "run", run)
    measured = startup.first()
    assert called[:5] == [
        ("loss", "bytecode"), ("trivial", "bytecode"), ("loss", "loss"), ("trivial", "trivial"), ("512", "warm"),
    ]  # fmt: skip
    assert called[5:] == [("loss", "loss"), ("loss", "warm"), ("trivial", "trivial")] * 7
    assert {name: times["first call"] for name, times in measured.items() if "total" not in times} == {
        "empty caches": 2, "trivial kernel, empty cache": 3,
        "Triton's cache": 14, "after a warm-up": 15, "trivial kernel, Triton's cache": 16,
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [startup, graphs])
def test_programs_for_a_gpu_say_so(program, tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path / "a.json")] if program is startup else ["smooth L1", "512"]
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{program.__name__} needs a GPU, and PyTorch finds none\n"


def test_the_arguments_import_no_pytorch():
    """One program times that import."""
    done = run_python("-c", "import sys, bench.startup; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
