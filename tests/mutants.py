"""How much of the code the tests watch: change one operator, constant or name at a time, and see whether they notice.

    python -m tests.mutants --count 60 --out mutants.json

A mutant is killed when a test fails, or when the tests do not end. Each runs in a copy of the tree against the files
that cover it, and what survives them against the whole suite. Which mutants are drawn depends on the seed and on the
code. The result is written after each, and a second call goes on where the first one stopped. A survivor is
equivalent, or out of reach of a machine without a GPU, or a gap: its `verdict` in the file is for a person to fill in.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import earlier_results, out_file, positive

ROOT = Path(__file__).parent.parent
TIMEOUT = 3600  # seconds, more than the whole suite takes; a mutant that loops for ever is killed, too
NO_TESTS = (4, 5)  # statuses of pytest for a file or a selection that is not there
NO_IMPORT = "ImportError while loading conftest"  # also a status of 4, but of a mutant that cannot even be imported
SHAPES = {"pair": "pairs", "box": "boxes"}  # folders of tests, by the first that is in their sources' names
LOSS = ("value", "gradient", "boundary", "defaults", "degenerate", "properties", "l2")

Command = tuple[bool, list[str]]  # whether the kernels run in Triton's interpreter, and arguments of pytest


class Group(NamedTuple):
    """Sources that the same tests cover, those that are the fastest to notice first.

    What is about boxes or pairs by its name is covered by their folder instead.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    interpreted: tuple[str, ...] = ()  # with the kernels in the interpreter; these run before the others

    def commands(self, path: str) -> list[Command]:
        """What to run for a mutant of `path`."""
        folders = tuple(f"tests/{folder}" for name, folder in SHAPES.items() if name in Path(path).stem)[:1]
        commands: list[Command] = [(False, _existing(folders or self.tests))]
        if self.interpreted:
            commands.insert(0, (True, [*_existing(folders or self.interpreted), "-k", "triton-cpu"]))
        return commands


def _existing(patterns: tuple[str, ...]) -> list[str]:
    found = [str(file.relative_to(ROOT)) for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no tests match {patterns}")
    return found


def polygons(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/polygons/test_{name}.py" for name in names)


GROUPS = {
    "kernels": Group(("triton_mgiou/kernels/*.py",), ("tests/test_compiled.py", *polygons("kernels")), polygons(*LOSS)),
    "reference": Group(("triton_mgiou/reference/*.py",), polygons(*LOSS, "integration")),
    "arguments": Group(
        tuple(f"triton_mgiou/{name}.py" for name in ("functional", "arguments", "reduction", "backends")),
        polygons("arguments", *LOSS, "integration", "module"),
    ),
    "launch": Group(
        ("triton_mgiou/ops.py", "triton_mgiou/launch.py"),
        ("tests/test_launch.py", "tests/tuning", *polygons("arguments", "integration", "kernels")),
        ("tests/test_launch.py", "tests/tuning", *polygons("operator", *LOSS, "integration", "arguments")),
    ),
    "modules": Group(("triton_mgiou/modules.py",), polygons("module", "polygon_loss", "defaults")),
    "guard": Group(("triton_mgiou/training/guard.py",), ("tests/training/test_guard.py",)),
    "diagnose": Group(("triton_mgiou/training/[!_g]*.py",), ("tests/training/test_[!g]*.py",)),  # without the guard
}
EVERYTHING: list[Command] = [(False, ["-n", "2"]), (True, ["-n", "2", "-k", "triton-cpu"])]

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
# What is easily taken for the other, as whole words of a name: `pred_lengths` for `target_lengths`.
PAIRS = "pred/target p/g own/other low/high min/max minimum/maximum amin/amax first/last start/end x/y top/bottom"
PAIRS += " left/right start/following any/all floor/ceil sin/cos sum/mean masks/lengths mask/lengths size/batch n/m"
WORDS = {a: b for pair in PAIRS.split() for a, b in (pair.split("/"), pair.split("/")[::-1])}


class Mutant(NamedTuple):
    """Replace `before`, which stands at this place, by `after`."""

    path: str
    line: int
    column: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column} {self.before} -> {self.after}"


def mutants_of(path: str) -> list[Mutant]:
    """Every mutant of a file that is valid Python, in the order of the code."""
    source = (ROOT / path).read_bytes()
    tree = ast.parse(source)
    starts = [0, *itertools.accumulate(len(text) for text in source.splitlines(keepends=True))]
    known = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    found = []
    for node in code_of(tree):
        for start, end, after in changes(node, source, span, known):
            line = source.count(b"\n", 0, start) + 1
            before = source[start:end].decode()
            mutant = Mutant(path, line, start - starts[line - 1], before, after)
            try:
                changed = ast.parse(apply(source, mutant))
            except SyntaxError:
                continue
            if ast.dump(changed) != ast.dump(tree):
                found.append(mutant)
    return sorted(set(found), key=lambda mutant: mutant[1:])


def code_of(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but types, imports and texts, which do nothing when the code runs."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr):
                yield child
                yield from code_of(child)


def changes(node: ast.AST, source: bytes, span: Any, known: set[str]) -> Iterator[tuple[int, int, str]]:
    """What a node may be changed to: the bytes from start to end, and what to put there."""
    if isinstance(node, ast.BinOp):
        yield from _operator(source, span(node.left)[1], span(node.right)[0], node.op)
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values[:-1], node.values[1:], strict=True):
            yield from _operator(source, span(left)[1], span(right)[0], node.op)
    elif isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands[:-1], operands[1:], node.ops, strict=True):
            yield from _operator(source, span(left)[1], span(right)[0], operator)
    elif isinstance(node, ast.UnaryOp):
        yield span(node)[0], span(node.operand)[0], ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield *span(node), repr(not value if isinstance(value, bool) else value + 1 if value in (0, 1) else 2 * value)
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        end = span(node)[1]
        if not isinstance(node.ctx, ast.Store):
            yield from ((end - len(name.encode()), end, other) for other in _other_names(name) if other in known)
    elif isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        start = span(node.value)[0] - len("min=")
        yield start, start + 3, WORDS[node.arg]


def _operator(source: bytes, start: int, end: int, operator: ast.AST) -> Iterator[tuple[int, int, str]]:
    before, after = OPERATORS.get(type(operator), ("", ""))
    at = source.find(before.encode(), start, end)
    if before and at >= 0:
        yield at, at + len(before), after


def _other_names(name: str) -> Iterator[str]:
    words = name.split("_")
    for place, word in enumerate(words):
        if word in WORDS:
            yield "_".join([*words[:place], WORDS[word], *words[place + 1 :]])


def apply(source: bytes, mutant: Mutant) -> bytes:
    """Return the source with the change made."""
    lines = source.splitlines(keepends=True)
    start = sum(map(len, lines[: mutant.line - 1])) + mutant.column
    before = mutant.before.encode()
    assert source[start : start + len(before)] == before, f"the code is another than when this was drawn: {mutant}"
    return source[:start] + mutant.after.encode() + source[start + len(before) :]


def draw(seed: int, count: int, groups: list[str]) -> list[tuple[str, Mutant]]:
    """As many from each group, the rest from the first ones."""
    drawn = []
    for place, name in enumerate(groups):
        paths = sorted({str(p.relative_to(ROOT)) for each in GROUPS[name].sources for p in ROOT.glob(each)})
        mutants = [mutant for path in paths for mutant in mutants_of(path)]
        share = count // len(groups) + (place < count % len(groups))
        chosen = random.Random(f"{seed} {name}").sample(mutants, min(share, len(mutants)))
        drawn += [(name, mutant) for mutant in chosen]
    return drawn


def copy_of_the_tree(folder: Path) -> Path:
    """What git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def killed_by(command: Command, tree: Path) -> str | None:
    """The first test that fails, "timeout", or None where all pass."""
    interpreted, arguments = command
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "01"[interpreted], "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            pytest, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode in NO_TESTS and NO_IMPORT not in done.stderr:
        raise RuntimeError(f"{' '.join(pytest)} ran no test:\n{done.stdout}{done.stderr}")
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"status {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"


def first_failure(commands: list[Command], tree: Path) -> str | None:
    """What the first of the commands that fails is killed by."""
    return next((found for command in commands if (found := killed_by(command, tree))), None)


def judge(group: str, mutant: Mutant) -> dict[str, Any]:
    """Run the tests that cover a mutant, and the whole suite if they do not notice it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_of_the_tree(Path(folder))
        file = tree / mutant.path
        file.write_bytes(apply(file.read_bytes(), mutant))
        covering = GROUPS[group].commands(mutant.path)
        by_covering = first_failure(covering, tree)
        by_anything = by_covering or first_failure(EVERYTHING, tree)
    return {
        "mutant": str(mutant),
        "group": group,
        "killed_by": by_anything,
        "by_a_file_that_does_not_cover_it": by_anything is not None and by_covering is None,
        "seconds": round(time.monotonic() - start, 1),
        "verdict": None,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Count, and replace the file in one step."""
    rows = result["mutants"]
    killed = sum(row["killed_by"] is not None for row in rows)
    result |= {"judged": len(rows), "killed": killed, "survivors": len(rows) - killed}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Draw, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=positive, default=60)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of which code")
    parser.add_argument("--jobs", type=positive, default=1, help="mutants at a time")
    parser.add_argument("--out", type=out_file, required=True, help="JSON, written after each mutant")
    given = parser.parse_args(argv)
    drawn = draw(given.seed, given.count, given.groups)
    sample = [str(mutant) for _, mutant in drawn]
    result: dict[str, Any] = {"seed": given.seed, "sample": sample, "mutants": []}
    earlier = earlier_results(parser, given.out, lambda content: {"sample", "mutants"} <= content.keys())
    if earlier is not None:
        result = earlier
        if result["sample"] != sample:
            sys.exit(f"{given.out} holds another sample: the seed, the count, the groups or the code have changed")
    done = {row["mutant"] for row in result["mutants"]}
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda each: judge(*each), [each for each in drawn if str(each[1]) not in done]):
            result["mutants"].append(row)
            write(given.out, result)
            sys.stdout.write(f"{row['seconds']:7.1f} s  {row['mutant']}  {row['killed_by'] or 'SURVIVES'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{result['killed']} of {result['judged']} killed\n")


if __name__ == "__main__":
    main()
