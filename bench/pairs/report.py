"""Tables of what `bench.pairs` found, for a document."""

from __future__ import annotations

from typing import Any

from bench import report
from triton_mgiou.options import OVERS


def markdown(results: dict[str, Any]) -> str:
    """The times of the matrices, and how long the peers take beside them; what was left out is not shown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    found = {
        section: {size: row for size, row in results.get(section, {}).items() if "left out" not in row}
        for section in ("boxes", "boxes with gradient to both", "quadrangles", "in a loop", "keeping apart")
    }
    boxes = [
        [size, *(report.number(row[f"us, {over}"]) for over in OVERS), report.number(row.get("us, expanded loss"))]
        for size, row in found["boxes"].items()
    ]
    head = [f'over="{over}"' for over in OVERS]
    lines = [f"{machine['device']}, {versions}, commit {machine['commit']}; microseconds."]
    lines += ["", report.table(" | ".join(["rotated boxes, P x T", *head, "loss of expanded sets"]), boxes), ""]
    lines += [
        f"- {what}, {size}: {report.number(row['us'])}."
        for section, what in (
            ("boxes with gradient to both", "Value and gradient to both sets of boxes"),
            ("quadrangles", "Quadrangles"),
        )
        for size, row in found[section].items()
    ]
    lines += [
        f"- In a loop, the host included, {size}: {report.number(row['us, box_mgiou'])}; Ultralytics' `batch_probiou` "
        f"takes {1 / row['to batch_probiou']:.0f} times as long."
        for size, row in found["in a loop"].items()
    ]
    lines += [
        f"- Keeping {count} boxes apart, value and gradient: {report.number(row['us, ours'])}; the nested vmap of "
        f"`mgiou` takes {row[peer] / row['us, ours']:.0f} times as long."
        for count, row in found["keeping apart"].items()
        for peer in ["us, mgiou's vmap"]
        if peer in row
    ]
    return "\n".join(lines)
