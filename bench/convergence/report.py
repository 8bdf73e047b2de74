"""Table and figure of the results of `bench.convergence.run`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.convergence.losses import OURS

Rows = list[dict[str, Any]]
SHOWN = {
    "reported": "tab:red",
    "MGIoU as published": "tab:orange",
    "length, no axis_grad, convexity 0.25": "tab:purple",
    OURS: "tab:green",
    "L1 to resampled vertices": "tab:blue",
}


def groups(rows: Rows) -> dict[tuple[str, str, str], Rows]:
    """The rows of one loss on one task from one start, all seeds."""
    found: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        found.setdefault((row["task"], row["start"], row["loss_name"]), []).append(row)
    return found


def table(rows: Rows) -> str:
    """Means over the seeds, with the spread (largest - smallest) of the polygon IoU."""
    head = [
        "loss",
        "start",
        "third",
        "end",
        "poly IoU",
        "spread",
        "hull",
        "AP50",
        "AP75",
        "AP90",
        "zero",
        "|grad|",
        "cross",
    ]
    lines = []
    before = None
    for (task, start, name), same in groups(rows).items():
        if (task, start) != before:
            lines += ["", f"{task}, start: {start}", f"{head[0]:<52}" + "".join(f"{title:>9}" for title in head[1:])]
            before = task, start
        ious = [row["polygon_iou"] for row in same]
        cells = [
            *(statistics.mean(row["loss"][at] for row in same) for at in range(3)),
            statistics.mean(ious),
            max(ious) - min(ious),
            *(statistics.mean(row[key] for row in same) for key in ("hull_iou", "ap50", "ap75", "ap90")),
            statistics.mean(row["zero_gradients"][2] for row in same),
            statistics.mean(row["gradient_norm"][2] for row in same),
            statistics.mean(row["self_crossing"] for row in same),
        ]
        lines.append(f"{name:<52}" + "".join(f"{cell:>9.3f}" for cell in cells))
    return "\n".join(lines)


def draw(path: Path, rows: Rows) -> None:
    """Training loss above, test AP50 below, for each start; every seed is a line."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow, and not needed for the table

    panels = [("digits", "scattered"), ("digits", "circle"), ("vertices", "random"), ("vertices", "tiny")]
    figure = Figure(figsize=(4 * len(panels), 6.5), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row")
    for column, (task, start) in enumerate(panels):
        above, below = axes[:, column]
        above.set(title=f"{task}, start: {start}", yscale="log")
        for name, color in SHOWN.items():
            for row in groups(rows).get((task, start, name), []):
                label = name if row["seed"] == 0 else None
                for where, curve in ((above, row["loss_curve"]), (below, row["ap50_curve"])):
                    share = [(k + 1) / len(curve) for k in range(len(curve))]
                    where.plot(share, curve, color=color, alpha=0.7, linewidth=1.2, label=label)
        below.set(xlabel="share of the training", ylim=(-0.03, 1.03))
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("AP50, vertices in their order")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), frameon=False)
    figure.savefig(path, dpi=80)
