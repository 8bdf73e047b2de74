"""Two trees in turns: each process takes the package of its own root, and the ratio is this one's over the other's."""

from __future__ import annotations

import json

import pytest
import torch

from bench import against

SLOW = """
import time

PAPER = {}


def mgiou_loss(pred, target):
    time.sleep(0.1)
    return (pred - target).sum()
"""


@pytest.fixture
def slow_tree(tmp_path):
    package = tmp_path / "other" / "triton_mgiou"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SLOW)
    return package.parent


def test_the_faster_tree_has_the_smaller_ratio(slow_tree, tmp_path, capsys):
    out = tmp_path / "against.json"
    arguments = [str(slow_tree), "--sizes", "2x3", "--rounds", "3", "--out", str(out)]
    assert against.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["loss"], row["batch"], row["vertices"]) for row in rows] == [("defaults", 2, 3), ("paper", 2, 3)]
    for row in rows:
        assert 1e5 <= row["other_us"] < 3e5
        assert row["ratio"] < 0.5
        assert row["ratio"] == pytest.approx(row["this_us"] / row["other_us"], rel=0.5)
    assert capsys.readouterr().out.count("\n") == 2


def test_the_ratio_is_the_median_over_rounds_that_alternate(tmp_path, monkeypatch):
    asked = []

    class Known:
        def __init__(self, root, cache, graphs):  # noqa: ARG002
            self.times = iter([1.0] * 100) if root == tmp_path else iter([1.0, 1.05, 1.03, 9.0, 1.0, 1.03] * 2)

        def send(self, *order):
            asked.append((self, order))

        def answer(self):
            return next(self.times)

        def ask(self, *order):
            self.send(*order)
            return self.answer()

        def close(self):
            pass

    (tmp_path / "triton_mgiou").mkdir()
    monkeypatch.setattr(against, "Tree", Known)
    monkeypatch.setattr(against, "LOSSES", ("defaults",))
    arguments = [str(tmp_path), "--sizes", "512x4", "--rounds", "5"]
    assert [against.main([*arguments, "--limit", limit]) for limit in ("1.02", "1.04")] == [1, 0]
    steps = round(against.REPETITION_S * 1e6)  # of a microsecond each
    turns = [tree is asked[0][0] for tree, order in asked[2:12] if order == ("defaults", 512, 4, steps)]
    assert turns == [False, True, True, False, False, True, True, False, False, True]


def test_each_row_is_written_as_soon_as_it_is_measured(slow_tree, tmp_path, monkeypatch):
    out = tmp_path / "against.json"
    monkeypatch.setattr(against, "compare", lambda *arguments: {"ratio": 1.0} if arguments[2] == "defaults" else 1 / 0)
    monkeypatch.setattr(against, "line", str)
    with pytest.raises(ZeroDivisionError):
        against.main([str(slow_tree), "--sizes", "2x3", "--out", str(out)])
    assert json.loads(out.read_text())["rows"] == [{"ratio": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--rounds", "1"], "--rounds: expected at least 2, got 1"),
        pytest.param(
            ["--graphs"],
            "--graphs needs a GPU, and PyTorch finds none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(slow_tree, capsys, arguments, error):
    with pytest.raises(SystemExit):
        against.main([str(slow_tree), *arguments])
    assert error in capsys.readouterr().err


def test_a_folder_without_the_package(tmp_path, capsys):
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])
    assert f"expected the root of a checkout, got {tmp_path}" in capsys.readouterr().err
