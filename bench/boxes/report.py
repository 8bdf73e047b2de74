"""Tables of what `bench.boxes.speed` and `bench.boxes.descent` found: for the terminal, and for a document."""

from __future__ import annotations

import statistics
from typing import Any

from bench import report

SHOWN = {  # of the losses of a task, the package's own defaults in bold
    "plane": ("ProbIoU", "KLD", "GWD", "KFIoU", "L1", "paper", "uniform, boundary 0.25"),
    "upright": ("GIoU", "DIoU", "CIoU", "paper", "uniform, boundary 0.25"),
    "space": ("ProbIoU", "KLD", "GWD", "KFIoU", "L1", "paper", "uniform, root of volume 0.25"),
}
DEFAULTS = {"plane": "uniform, boundary 0.25", "upright": "uniform, boundary 0.25", "space": "paper"}
STEP_TITLES = ("loop us", "/ smooth", "graph us", "/ smooth", "ProbIoU /", "compiled /", "memory B")


def table(results: dict[str, Any]) -> str:
    """The times as plain text."""
    lines = ["".join(f"{title:>11}" for title in ("B", *STEP_TITLES))]
    lines += ["".join(f"{cell:>11}" for cell in row) for row in step_rows(results)]
    lines += [
        f"{row['fmt']:>11} x {row['batch']}: value and gradient {row['launch_us']:.1f} us "
        f"({row['gb_per_s']:.0f} GB/s), value {row['value_us']:.1f} us"
        for row in results["launches"]
    ]
    if results["first_call_s"] is not None:
        lines.append(f"first call, empty caches: {results['first_call_s']:.2f} s")
    return "\n".join([*lines, *(f"left out: {reason}" for reason in results["left_out"])])


def markdown(results: dict[str, Any]) -> str:
    """The same in tables, with a sentence about what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = "B | loop | / smooth L1 | graph | / smooth L1 | ProbIoU / loop | compiled ProbIoU / loop | memory, bytes"
    launches = (
        [f"{row['batch']} {row['fmt']}", report.number(row["launch_us"]), report.number(row["value_us"])]
        for row in results["launches"]
    )
    parts = [
        f"{results['device']}, {versions}, commit {results['commit']}; microseconds.",
        report.table(head, step_rows(results)),
        report.table("one launch | value and gradient | value", launches),
    ]
    if results["first_call_s"] is not None:
        parts.append(f"The first call of a process with empty caches takes {results['first_call_s']:.2f} s.")
    if results["left_out"]:
        parts.append(f"Not measured: {'; '.join(results['left_out'])}.")
    return "\n\n".join(parts)


def descent(results: dict[str, Any]) -> str:
    """Mean IoU at the end of steps that fall to 0, from starts that overlap the target and from those that do not."""
    rows = [row for row in results["rows"] if row["steps"] == "falling"]
    ratios = dict.fromkeys(row["ratio"] for row in rows)

    def mean(task: str, name: str, start: str, among: Any = ratios) -> str:
        wanted = [row for row in rows if (row["task"], row["loss_name"], row["start"]) == (task, name, start)]
        return f"{statistics.mean(row['iou'] for row in wanted if row['ratio'] in among):.3f}"

    lines = [
        [
            task,
            f"**{name}**" if name == DEFAULTS[task] else name,
            *(mean(task, name, start) for start in ("near", "one box")),
            *(mean(task, name, "apart", (ratio,)) for ratio in ratios),
        ]
        for task, names in SHOWN.items()
        for name in names
    ]
    apart = " | ".join(f"apart, 1 : {ratio:g}" for ratio in ratios)
    return report.table(f"boxes | loss | near | one box | {apart}", lines)


def step_rows(results: dict[str, Any]) -> list[list[str]]:
    """Our step at each batch size, and its ratios to the peers'; "-" for what was not measured."""
    by_batch: dict[int, dict[str, dict[str, Any]]] = {}
    for row in results["steps"]:
        by_batch.setdefault(row["batch"], {})[row["peer"]] = row
    rows = []
    for batch, found in by_batch.items():
        own = found.get("kernel", found.get("reference"))
        if own is None:
            continue
        loop, graph, memory = own["loop_us"], own.get("graph_us"), own.get("memory_bytes")
        smooth_l1, probiou, compiled = (found.get(name, {}) for name in ("smooth L1", "ProbIoU", "ProbIoU, compiled"))
        cells = (
            loop,
            own.get("loop_to_smooth_l1"),
            graph,
            _ratio(graph, smooth_l1.get("graph_us")),
            _ratio(probiou.get("loop_us"), loop),
            _ratio(compiled.get("loop_us"), loop),
        )
        numbers = [report.number(cell) for cell in cells]
        rows.append([str(batch), *numbers, "-" if memory is None else str(memory)])
    return rows


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second
