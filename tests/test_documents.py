"""The documents: their code runs, their numbers are those of the results, and what they point to exists."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from bench import documents
from bench.convergence import losses
from triton_mgiou import PAPER, MGIoULoss, mgiou_loss

ROOT = Path(__file__).parents[1]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in documents.documents()}
README = DOCUMENTS["README.md"]
DEFINITION = "triton_mgiou/reference/DEFINITION.md"


def section(document, title):
    """The text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENTS[document], re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r} in {document}"
    return found[1]


def table(document, title):
    """The rows of the section's table, without its head."""
    lines = [line for line in section(document, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(language):
    """Every block of a language in the documents."""
    pattern = rf"^```{language}\n(.*?)^```$"
    found = {name: re.findall(pattern, text, re.MULTILINE | re.DOTALL) for name, text in DOCUMENTS.items()}
    return [pytest.param(code, id=f"{name}-{k}") for name, codes in found.items() for k, code in enumerate(codes)]


@pytest.mark.parametrize("code", blocks("python"))
def test_code(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert " in code
    exec(compile(code, "document", "exec"), {})


@pytest.mark.parametrize("code", blocks("(?:ba)?sh"))
def test_commands_exist(code):
    """Every command parses, and every program of ours that it runs is there."""
    subprocess.run(["bash", "-n", "-c", code], check=True)
    for module in re.findall(r"python3? -m ([\w.]+)", code):
        assert importlib.util.find_spec(module), module


def test_every_program_of_results_is_listed():
    """As CONTRIBUTING.md says."""
    listed = set(re.findall(r"python -m (bench[\w.]*)", "".join(DOCUMENTS.values())))
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "bench").rglob("*.py")}
    programs = [path for path, text in sources.items() if '"--out"' in text and '"__main__"' in text]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in programs}
    assert "bench.speed" in names
    assert {name.removesuffix(".__main__") for name in names} <= listed


def test_numbers_are_those_of_the_results():
    stale = [str(path.relative_to(ROOT)) for path, text in documents.rendered().items() if path.read_text() != text]
    assert stale == [], "run: python -m bench.documents"


def test_the_results_are_those_of_the_present_defaults():
    defaults = {name: inspect.signature(mgiou_loss).parameters[name].default for name in PAPER}
    demos = [documents.results("demo_cpu"), *documents.results("demo_distributed_cpu")["settings"]]
    assert [each["loss_options"] for each in demos] == [defaults] * 3, "the defaults are others now: measure again"
    assert PAPER | losses.LOSSES[losses.OURS].keywords == defaults, "another loss is to be in bold"


def test_every_block_of_numbers_has_a_place():
    marked = [name for text in DOCUMENTS.values() for _, name, _ in documents.MARKED.findall(text)]
    assert sorted(marked) == sorted(documents.BLOCKS)
    begun = [name for text in DOCUMENTS.values() for name in re.findall("^<!-- begin (.*) -->$", text, re.MULTILINE)]
    assert sorted(begun) == sorted(marked), "an end is missing"


def anchors(text):
    """GitHub's names of the headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"(?<!\[)`[^`\n]+`(?!\])", "", DOCUMENTS[name])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


SOURCES = [
    *documents.documents(),
    *(p for top in ("triton_mgiou", "bench", "tests") for p in (ROOT / top).rglob("*.py")),
]
FILE = re.compile(r"(?<!--out )(?<![\w/.<{*~-])((?:[\w.]+/)+[\w.-]+\.(?:md|py|json|png)|(?<!\")[\w-]+\.md)\b")


def test_every_file_that_is_named_exists():
    """In documents, docstrings and comments; a path is one from the root, from its own folder or the package's.

    The changelog may name what is gone, and a test what it makes up.
    """
    missing = []
    for source in (each for each in SOURCES if ROOT / "tests" not in each.parents):
        for name in FILE.findall(source.read_text(encoding="utf-8")):
            places = (ROOT, source.parent, ROOT / "triton_mgiou", ROOT / "bench", ROOT / "bench" / "results")
            if source.name != "CHANGELOG.md" and not any((place / name).exists() for place in places):
                missing.append(f"{source.relative_to(ROOT)}: {name}")
    assert missing == []


def test_every_section_that_is_cited_exists():
    numbers = re.findall(r"^## (\d+)\. ", DOCUMENTS[DEFINITION], re.MULTILINE)
    assert numbers == [str(k + 1) for k in range(len(numbers))]
    cited = {
        (str(source.relative_to(ROOT)), number)
        for source in SOURCES
        for listed in re.findall(
            r"\b[Ss]ections? (\d+(?:(?:, | and | or | to )\d+)*)", source.read_text(encoding="utf-8")
        )
        for number in re.findall(r"\d+", listed)
    }
    assert len(cited) > 10
    assert [each for each in sorted(cited) if each[1] not in numbers] == []


def test_the_first_screen_has_two_commands():
    """`.ci/run` takes them from there."""
    first = README.partition("\n## ")[0]
    commands = re.findall(r"^```bash\n(.*?)^```$", first, re.MULTILINE | re.DOTALL)
    assert len(commands) == README.count("```bash") == first.count("```") / 2 == 2
    for command, extra, run in zip(commands, ("demo", "test"), ("triton_mgiou demo", "pytest -n 2"), strict=True):
        assert command.count("\n") == 1, "one line each"
        environment, install, last = command.strip().split(" && ")
        assert environment == "python3 -m venv .venv"
        assert install == f'.venv/bin/pip install torch==2.13.0 -e ".[{extra}]"'
        assert last == f".venv/bin/python -m {run}"
    assert len(README.splitlines()) <= 140


def test_the_oldest_versions_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python, torch = (re.search(rf'{name}[ ="]*>=([\d.]+)', project)[1] for name in ("requires-python", "torch"))
    assert re.search(r"Python (\S+) and torch (\S+) or later", README).groups() == (python, torch)


def test_the_extra_for_windows():
    """A marker only: no machine with Windows ever ran it."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'"triton>=([\d.]+); platform_system == \'Linux\'"', project)[1]
    assert f"windows = [\"triton-windows>={least}; platform_system == 'Windows'\"]" in project
    assert "on Windows, untested: the\nextra `windows`" in README


def test_arguments():
    rows = {name.strip("`"): default.strip("`") for name, default, _ in table("README.md", "Arguments")}
    parameters = inspect.signature(mgiou_loss).parameters.values()
    assert list(rows.items()) == [(p.name, "required" if p.default is p.empty else repr(p.default)) for p in parameters]
    given = inspect.signature(MGIoULoss).parameters
    signature = f'MGIoULoss(reduction="{given["reduction"].default}", loss_weight={given["loss_weight"].default}'
    assert signature in section("README.md", "Arguments")
    assert tuple(rows)[-5:] == MGIoULoss.OPTIONS
