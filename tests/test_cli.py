"""The command line: what it understands, and what it says to what it does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import triton_mgiou
from tests.helpers import run_python
from triton_mgiou import demo
from triton_mgiou.cli import main


def status_of(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code


@pytest.fixture
def demo_calls(monkeypatch):
    """The demo's arguments, without the demo."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda **arguments: calls.append(arguments))
    return calls


def test_version(capsys):
    assert status_of(["--version"]) == 0
    assert capsys.readouterr().out == f"{triton_mgiou.__version__}\n"


def test_runs_as_a_module():
    done = run_python("-m", "triton_mgiou", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{triton_mgiou.__version__}\n", "")


def test_help_names_the_commands(capsys):
    assert status_of(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: triton-mgiou ")
    assert "demo" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["triton-mgiou: error:", "command"]),
        (["paint"], ["triton-mgiou: error:", "command", "'paint'", "demo"]),
        (["demo", "--colour", "red"], ["triton-mgiou: error:", "--colour red"]),
        (["demo", "--epochs", "0"], ["argument --epochs: expected an integer of 1 or above, got '0'"]),
        (["demo", "--epochs", "2.5"], ["argument --epochs: expected an integer of 1 or above, got '2.5'"]),
        (["demo", "--batch-size", "-3"], ["argument --batch-size: expected an integer of 1 or above, got '-3'"]),
        (["demo", "--seed", "-1"], ["argument --seed: expected an integer of 0 or above, got '-1'"]),
        (["demo", "--seed", "x"], ["argument --seed: expected an integer of 0 or above, got 'x'"]),
        (["demo", "--seed", str(2**63)], ["argument --seed: expected an integer of 0 to 2^63 - 1, got"]),
    ],
)
def test_wrong_arguments(arguments, words, demo_calls, capsys):
    assert status_of(arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert [word for word in words if word not in error] == []
    assert captured.out == ""
    assert demo_calls == []


def test_defaults_of_the_demo(demo_calls):
    assert main(["demo"]) == 0
    assert demo_calls == [{"epochs": 30, "seed": 0, "device": "auto", "batch_size": 64, "out": Path("demo_out")}]


def test_arguments_reach_the_demo(demo_calls):
    arguments = ["--epochs", "3", "--seed", "7", "--device", "cpu", "--batch-size", "5", "--out", "somewhere/else"]
    assert main(["demo", *arguments]) == 0
    expected = {"epochs": 3, "seed": 7, "device": "cpu", "batch_size": 5, "out": Path("somewhere/else")}
    assert demo_calls == [expected]


def test_arguments_of_the_process(demo_calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["triton-mgiou", "demo", "--seed", "4"])
    assert main() == 0
    assert demo_calls[0]["seed"] == 4


def test_a_demo_that_cannot_run_is_one_line(monkeypatch, capsys):
    def fail(**_):
        raise demo.DemoError("no paper left")

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "triton-mgiou demo: no paper left\n")


@pytest.mark.parametrize("command", ["info", "diagnose", "demo"])
def test_letters_that_the_console_lacks(command, tmp_path):
    """As those of a folder's name in a console of Windows."""
    name = "\N{GREEK SMALL LETTER OMEGA}"
    table = tmp_path / f"{name}.csv"
    table.write_text("epoch,train/loss\n0,1.0\n1,0.5\n", encoding="utf-8")
    rest = {"info": [], "diagnose": [str(table)], "demo": ["--epochs", "1", "--out", str(tmp_path / name)]}[command]
    environment = {"PYTHONIOENCODING": "ascii", "TRITON_MGIOU_CACHE_DIR": str(tmp_path / name)}
    done = run_python("-m", "triton_mgiou", command, *rest, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u03c9" in done.stdout


class Log:
    """What scripts put in the place of stdout to keep a copy: it can write and flush, and no more."""

    def __init__(self, error=None):
        self.text, self.error = "", error

    def write(self, text):
        if self.error is not None:
            raise self.error
        self.text += text

    def flush(self):
        pass


def test_stdout_may_be_any_object_that_writes(tmp_path, monkeypatch, capsys):
    table = tmp_path / "results.csv"
    table.write_text("epoch,train/loss\n0,1.0\n1,nan\n", encoding="utf-8")
    log = Log()
    monkeypatch.setattr(sys, "stdout", log)
    assert main(["diagnose", str(table)]) == 1
    assert log.text.splitlines()[1:] == ["  train/loss: 1 NaN and 0 Inf, the first at epoch 1"]
    monkeypatch.setattr(sys, "stdout", Log(OSError(28, "no space")))
    assert main(["diagnose", str(table)]) == 2
    assert capsys.readouterr().err == "triton-mgiou diagnose: cannot write to stdout: no space\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """As `head`; the exit status stays that of the command."""
    table = tmp_path / "results.csv"
    table.write_text("epoch,train/loss\n0,1.0\n1,nan\n", encoding="utf-8")
    code = """
import os, subprocess, sys
reading, writing = os.pipe()
os.close(reading)
done = subprocess.run([sys.executable, "-m", "triton_mgiou", *sys.argv[1:]], stdout=writing, stderr=subprocess.PIPE)
print(done.returncode, done.stderr)
"""
    assert run_python("-c", code, "info").stdout == "0 b''\n"
    assert run_python("-c", code, "diagnose", str(table)).stdout == "1 b''\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell closes streams so")
@pytest.mark.parametrize("command", ["info", "diagnose", "demo"])
def test_closed_streams_are_no_error(command, tmp_path):
    """As a service may have them; the exit status is what a script reads."""
    table, bad = tmp_path / "results.csv", tmp_path / "bad.csv"
    table.write_text("epoch,train/loss\n0,1.0\n1,0.5\n", encoding="utf-8")
    bad.write_text("epoch,train/loss\n0,1.0\n1,nan\n", encoding="utf-8")
    cases = {
        "info": [([], 0)],
        "diagnose": [([str(table)], 0), ([str(bad)], 1), ([str(tmp_path / "none.csv")], 2)],
        "demo": [(["--epochs", "1", "--batch-size", "500", "--out", str(tmp_path / "out")], 0)],
    }[command]
    code = """
import os, subprocess, sys
command = [sys.executable, "-m", "triton_mgiou", *sys.argv[1:]]
print(subprocess.call(command, preexec_fn=lambda: os.closerange(1, 3)))
"""
    for rest, status in cases:
        assert run_python("-c", code, command, *rest).stdout == f"{status}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(("command", "status"), [("info", 1), ("diagnose", 2)])
def test_a_full_disk_is_no_verdict(command, status, tmp_path):
    table = tmp_path / "results.csv"
    table.write_text("epoch,train/loss\n0,1.0\n1,0.5\n", encoding="utf-8")
    code = """
import subprocess, sys
with open("/dev/full", "w") as full:
    done = subprocess.run([sys.executable, "-m", "triton_mgiou", *sys.argv[1:]], stdout=full, stderr=subprocess.PIPE)
print(done.returncode, done.stderr.decode(), end="")
"""
    done = run_python("-c", code, command, *([str(table)] if command == "diagnose" else []))
    assert done.stdout == f"{status} triton-mgiou {command}: cannot write to stdout: No space left on device\n"


def test_imports_stay_light():
    """Neither Triton nor the compiler, which take as long as PyTorch itself, no command, no library of the extras.

    PyTorch itself loads tqdm.
    """
    code = """
import sys, torch
before = set(sys.modules)
import triton_mgiou
print(*set(sys.modules) - before)
import triton_mgiou.cli
print(*set(sys.modules) - before)
"""
    done = run_python("-c", code)
    assert done.stderr == ""
    package, command = (set(line.split()) for line in done.stdout.splitlines())
    assert "triton_mgiou.functional" in package
    assert package & {"triton", "torch._dynamo", "torch._inductor", "triton_mgiou.cli", "triton_mgiou.demo"} == set()
    assert command & {"triton", "matplotlib", "shapely", "sklearn"} == set()
