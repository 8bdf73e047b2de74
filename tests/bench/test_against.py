"""Two trees in turns: each process takes the package of its own root, and the ratio is this one's over the other's."""

from __future__ import annotations

import json

import pytest

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
    assert against.main([*arguments, "--limit", "0"]) == 1


def test_a_folder_without_the_package(tmp_path, capfd):
    with pytest.raises(SystemExit, match=r"the process of .* has ended"):
        against.main([str(tmp_path), "--sizes", "2x3", "--rounds", "3"])
    assert "triton_mgiou" in capfd.readouterr().err
