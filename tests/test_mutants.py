"""What `tests.mutants` changes, and that it changes nothing else."""

from __future__ import annotations

import pytest

from tests import mutants

SOURCE = '''"""A text with 1 + 1."""


def clip(value: int | None, low=0, high=9):
    if value is not None and value < low:
        return -value + 1
    return min(value, high)
'''
EXPECTED = {
    "1 -> 2",
    "0 -> 1",
    "9 -> 18",
    "is not -> is",
    "and -> or",
    "< -> <=",
    "low -> high",
    "high -> low",
    "- -> ",
    "+ -> -",
}


def test_another_programs_file_is_not_continued(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"rows": []}')
    with pytest.raises(SystemExit):
        mutants.main(["--out", str(path), "--count", "1"])
    assert f"argument --out: expected a new file or one of this program's, got {path}" in capsys.readouterr().err
    assert path.read_text() == '{"rows": []}'


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "clip.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.usefixtures("tree")
def test_one_place_of_the_code_changes_and_no_type_or_text():
    found = mutants.mutants_of("clip.py")
    assert {f"{mutant.before} -> {mutant.after}" for mutant in found} == EXPECTED
    for mutant in found:
        before, after = (text.splitlines() for text in (SOURCE, mutants.apply(SOURCE.encode(), mutant).decode()))
        (line,) = (i for i, (old, new) in enumerate(zip(before, after, strict=True), 1) if old != new)
        assert line == mutant.line > 3


def test_a_failing_test_kills_and_a_passing_one_does_not(tree):
    (tree / "test_clip.py").write_text("from clip import clip\n\ndef test():\n    assert clip(-3) == 4\n")
    command = (False, ["test_clip.py"])
    assert mutants.killed_by(command, tree) is None
    (tree / "clip.py").write_text(SOURCE.replace("+ 1", "- 1"))
    assert mutants.killed_by(command, tree).startswith("FAILED test_clip.py::test")
    with pytest.raises(RuntimeError, match="ran no test"):
        mutants.killed_by((False, ["test_that_is_not_there.py"]), tree)
    (tree / "conftest.py").write_text("from clip import nothing\n")
    assert mutants.killed_by(command, tree).startswith("status 4")
