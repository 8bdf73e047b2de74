"""Tables (Markdown) and the figure of the trainings in a folder."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.detectors import plan
from bench.detectors.scenes import BOXES

FIGURE = "curves.png"
COLUMNS = ("AP50", "AP75", "AP90", "AP50-95", "hull AP50", "IoU", "crossing", "angle error")
CURVES = {"reported": "tab:red", "OKS": "tab:blue", "mgiou": "tab:green", "hybrid": "tab:purple"}

# What is to be reached: task, metric, our loss, Ultralytics' own or another of ours, by how much at least. "" for the
# other: the metric itself. None for how much: nothing, but the difference is asked for, as hulls of outlines that are
# not convex must lose. Where losses are close, the trainings that were judged by more images count
TARGETS: tuple[tuple[str, str, str, str, float | None], ...] = (
    ("hulls", "AP75", "mgiou", "OKS", 0.10),
    ("hulls", "AP50", "mgiou", "", 0.98),
    ("tops", "AP75", "mgiou", "OKS", 0.0),
    ("tops", "AP50", "mgiou", "", 0.98),
    ("corners", "AP75", "hybrid", "OKS", 0.0),
    ("corners", "AP75", "hybrid", "mgiou", 0.0),
    ("corners", "AP90", "hybrid", "OKS", 0.0),
    ("corners", "AP90", "hybrid", "mgiou", 0.0),
    ("boxes", "AP75", plan.OURS, plan.THEIRS, 0.0),
    ("boxes", "AP90", plan.OURS, plan.THEIRS, 0.0),
    ("boxes", "AP50-95", plan.OURS, plan.THEIRS, 0.0),
    ("squares", "AP90", plan.OURS, plan.THEIRS, 0.0),
    ("long", "AP75", plan.OURS, plan.THEIRS, 0.0),
    ("long", "AP90", plan.OURS, plan.THEIRS, 0.0),
    ("long", "AP50-95", plan.OURS, plan.THEIRS, 0.0),
    ("outlines", "AP50", "mgiou", "OKS", None),
    ("outlines", "AP50", "hybrid", "OKS", None),
    ("outlines", "AP75", "mgiou", "OKS", None),
    ("outlines", "AP75", "hybrid", "OKS", None),
)
STORY = ("loss", "hull AP50", "AP50", "crossing", "mAP50(P)")

Rows = list[dict[str, Any]]


def read(folder: Path) -> Rows:
    """All finished trainings, in the order of the plan."""
    order = {name: place for place, name in enumerate(job.name for job in plan.jobs(plan.FULL) if job != plan.SPEED)}
    files = sorted((path for path in folder.glob("*.json") if path.stem in order), key=lambda path: order[path.stem])
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def line(row: dict[str, Any]) -> str:
    """A training in a line."""
    job, last = row["job"], row["judged"][-1]
    numbers = "  ".join(f"{name} {last[name]:.3f}" for name in ("AP50", "AP75", "AP90"))
    name = f"{job['part']}: {job['task']}, {job['loss']}, seed {job['seed']}"
    return f"{name:<58} {numbers}  {row['seconds']:.0f} s"


def sections(folder: Path) -> dict[str, str]:
    """The parts of the page by name; empty where there is no result."""
    rows, speed = read(folder), folder / f"{plan.SPEED.name}.json"
    times = json.loads(speed.read_text(encoding="utf-8"))["rows"] if speed.exists() else []
    place = "/".join(("..", "results", "detectors", FIGURE))
    figure = f"![Loss, box loss, loss scale and AP over the epochs]({place})"
    crops = folder / "crops.json"
    studied = json.loads(crops.read_text(encoding="utf-8"))["rows"] if crops.exists() else []
    return {
        "reports": reports(rows),
        "story": story(rows),
        "crops of boxes": crop_tables([row for row in studied if row["task"] in BOXES]),
        "crops of polygons": crop_tables([row for row in studied if row["task"] not in BOXES]),
        "figure": figure if watched(rows) else "",
        "tables": tables(rows),
        "choices": choices(rows),
        "targets": targets(rows),
        "speed": speeds(times),
        "missing": missing(folder),
    }


def write(folder: Path, pages: Sequence[Path]) -> None:
    """Write the figure, and the tables into the pages; where there are none, into a page in the folder."""
    for page in pages:
        fill(page, folder)
    if not pages:
        text = "\n\n".join(part for name, part in sections(folder).items() if part and name != "figure")
        (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    if watched(rows := read(folder)):
        draw(folder / FIGURE, rows)


def fill(page: Path, folder: Path) -> None:
    """Put the tables between their marks in a page, those for which it has some."""
    text = page.read_text(encoding="utf-8")
    for name, table in sections(folder).items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}{table or 'Not run.'}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def missing(folder: Path) -> str:
    """What was not run, or failed."""
    left: dict[str, list[str]] = {}
    for job in plan.jobs(plan.FULL):
        if not (folder / f"{job.name}.json").exists():
            epochs = f", {job.epochs} epochs" if job.part == "reports" else ""
            left.setdefault(f"{job.task}, {job.loss}{epochs}", []).append(str(job.seed))
    rest = "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in left.items())
    failures = [
        f"{path.name.removesuffix('.failed.txt')}: {path.read_text(encoding='utf-8').strip().splitlines()[-1]}"
        for path in sorted(folder.glob("*.failed.txt"))
    ]
    parts = [f"Not run: {rest}." if left else "Every training of the plan is there."]
    if failures:
        parts += ["", "Failed:", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(parts)


def reports(rows: Rows) -> str:
    """The ablation of the two reports."""
    head = (
        "loss",
        "loss, first to last epoch",
        "box loss",
        "loss scale at the end",
        "steps",
        "skipped",
        "bad gradients after 20 steps",
    )
    lines = []
    for row in (each for each in rows if each["job"]["part"] == "reports"):
        curves = row["curves"]
        bad = f"{100 * row['bad_gradients']:.0f} %" if "bad_gradients" in row else ""
        lines.append(
            (
                row["job"]["loss"],
                f"{curves['loss'][0]:.3g} to {curves['loss'][-1]:.3g}",
                f"{curves['box_loss'][0]:.3g} to {curves['box_loss'][-1]:.3g}",
                f"{curves['scale'][-1]:.3g}",
                row["steps"],
                row["skipped"],
                bad,
            )
        )
    return markdown("### Two epochs each, under AMP (float16) where nothing else is said", head, lines)


def story(rows: Rows) -> str:
    """What becomes of polygons, their hulls and Ultralytics' own metric, by loss; means over the seeds."""
    lines = []
    for task in ("corners", "hulls"):
        same = [row for row in rows if row["job"]["task"] == task and row["job"]["part"] in {"table", "rest"}]
        for loss in ("reported", "paper", "mgiou", "hybrid", "OKS"):
            group = [row for row in same if row["job"]["loss"] == loss]
            if group:
                curve = [statistics.mean(row["curves"]["loss"][end] for row in group) for end in (0, -1)]
                numbers = [mean_of(group, key) for key in STORY[1:]]
                lines.append((task, loss, len(group), f"{curve[0]:.3g} to {curve[1]:.3g}", *numbers))
    head = ("task", "loss", "seeds", "loss, first to last epoch", *STORY[1:])
    return markdown("### Hulls, polygons, and Ultralytics' own metric of keypoints", head, lines)


def crop_tables(rows: Rows) -> str:
    """What single objects in crops were taught, a table for each task; means over the seeds."""
    texts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        same = [row for row in rows if row["task"] == task]
        keys = [key for key in same[0] if key not in {"task", "loss", "seed"}]
        lines = []
        for loss in dict.fromkeys(row["loss"] for row in same):
            group = [row for row in same if row["loss"] == loss]
            means = (statistics.mean(row[key] for row in group) if key in group[0] else None for key in keys)
            lines.append((loss, len(group), *("" if mean is None else f"{mean:.3f}" for mean in means)))
        texts.append(markdown(f"### {task}", ("loss", "seeds", *keys), lines))
    return "\n\n".join(texts)


def tables(rows: Rows) -> str:
    """What the detectors find, a table for each task; means over the seeds, their number where it is not one."""
    texts = []
    groups: dict[str, Rows] = {}
    for row in (each for each in rows if each["job"]["part"] not in {"reports", "choice"}):
        more = f", judged by {plan.FULL.close_test_images} images" if row["job"]["part"] == "close" else ""
        groups.setdefault(row["job"]["task"] + more, []).append(row)
    for title, same in groups.items():
        own = [key for key in same[0]["judged"][-1] if key.startswith("mAP")]
        shown = [key for key in COLUMNS if any(key in row["judged"][-1] for row in same)]
        lines = []
        for loss in dict.fromkeys(row["job"]["loss"] for row in same):
            group = [row for row in same if row["job"]["loss"] == loss]
            numbers = [mean_of(group, key) for key in [*own, *shown]]
            after = max(row["skipped_after_20"] for row in group)
            lines.append((loss, len(group), *numbers, after))
        head = ("loss", "seeds", *own, *shown, "skipped after 20 steps")
        texts.append(markdown(f"### {title}", head, lines))
    return "\n\n".join(texts)


def targets(rows: Rows) -> str:
    """Differences, paired by seed, with their standard error."""
    lines = []
    for task, metric, ours, other, least in TARGETS:
        parts = {"close"} if task in plan.CLOSE else {"table", "rest", "tried"}
        same = [row for row in rows if row["job"]["task"] == task and row["job"]["part"] in parts]
        differences = differences_of(same, metric, ours, other)
        if not differences:
            continue
        mean = statistics.mean(differences)
        told = ["", ""]  # of a single seed nothing can be said
        if len(differences) > 1:
            error = standard_error(differences)
            told = [f"{error:.4f}", "" if least is None else "yes" if mean >= least - error else "no"]
        wanted = "" if least is None else f"{least:+.2f}"
        what = f"{task}: {ours} to {other}" if other else f"{task}: {ours}"
        lines.append((what, metric, f"{mean:+.4f}", told[0], len(differences), wanted, told[1]))
    head = ("what", "metric", "difference", "standard error", "seeds", "at least", "reached")
    return markdown("### What was to be reached", head, lines)


def choices(rows: Rows) -> str:
    """What was tried to choose by, as differences to Ultralytics' own loss on the same seeds, with standard errors."""
    metrics = ("AP50", "AP75", "AP90", "AP50-95", "IoU")
    lines = []
    for task in plan.CLOSE:
        same = [row for row in rows if row["job"]["task"] == task and row["job"]["part"] in {"close", "choice"}]
        tried = [row for row in same if row["job"]["part"] == "choice"]
        for loss in dict.fromkeys(row["job"]["loss"] for row in tried if row["job"]["loss"] != plan.THEIRS):
            seeds = {row["job"]["seed"] for row in tried if row["job"]["loss"] == loss}
            group = [row for row in same if row["job"]["seed"] in seeds]
            found = [differences_of(group, metric, loss, plan.THEIRS) for metric in metrics]
            if len(found[0]) > 1:
                cells = (f"{statistics.mean(each):+.4f} ({standard_error(each):.4f})" for each in found)
                lines.append((task, loss, len(found[0]), *cells))
    return markdown(f"### Differences to {plan.THEIRS}", ("task", "loss", "seeds", *metrics), lines)


def differences_of(rows: Rows, metric: str, ours: str, other: str) -> list[float]:
    """A metric of one loss less that of another, for each seed that both have; the metric itself without another."""
    ours_by_seed, other_by_seed = (
        {row["job"]["seed"]: row["judged"][-1].get(metric, 0.0) for row in rows if row["job"]["loss"] == loss}
        for loss in (ours, other)
    )
    if not other:
        other_by_seed = dict.fromkeys(ours_by_seed, 0.0)
    return [ours_by_seed[seed] - other_by_seed[seed] for seed in sorted(ours_by_seed.keys() & other_by_seed.keys())]


def standard_error(values: list[float]) -> float:
    """Of their mean."""
    error: float = statistics.stdev(values) / len(values) ** 0.5
    return error


def speeds(rows: Rows) -> str:
    """Step times."""
    head = ("task", "batch", "loss", "ms a step", "to Ultralytics' own")
    lines = [(row["task"], row["batch"], row["loss"], f"{row['ms']:.2f}", f"{row['to_own']:.3f}") for row in rows]
    return markdown("### Milliseconds", head, lines)


def mean_of(rows: Rows, key: str) -> str:
    """The mean over the rows that have a number."""
    values = [row["judged"][-1][key] for row in rows if key in row["judged"][-1]]
    return f"{statistics.mean(values):.3f}" if values else ""


def markdown(title: str, head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """A table below a heading; nothing without lines."""
    if not lines:
        return ""
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join([title, "", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def watched(rows: Rows) -> dict[str, dict[str, Any]]:
    """The trainings that were judged on the way, by their loss."""
    return {row["job"]["loss"]: row for row in rows if row["job"]["watch"] and row["job"]["loss"] in CURVES}


def draw(path: Path, rows: Rows) -> None:
    """Loss, box loss, loss scale and AP over the epochs, of the reported loss and of others on the same task."""
    shown = watched(rows)
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(14, 3.6), layout="constrained")
    panels: dict[str, Callable[[dict[str, Any]], tuple[list[float], list[float]]]] = {
        "loss of the keypoints / its first epoch's": lambda row: relative(row["curves"]["loss"]),
        "box loss": lambda row: over_epochs(row["curves"]["box_loss"]),
        "loss scale of AMP": lambda row: over_epochs(row["curves"]["scale"]),
        "AP50 by the polygons": lambda row: column(row["judged"], "epoch", "AP50"),
    }
    for axes, (title, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for loss, colour in CURVES.items():
            if loss in shown:
                axes.plot(*points(shown[loss]), color=colour, marker=".", label=loss)
        axes.set(title=title, xlabel="epoch")
        if "scale" in title:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if shown:
        axes.legend()
    figure.savefig(path, dpi=100)


def over_epochs(values: list[float]) -> tuple[list[float], list[float]]:
    """Epochs from 1 on, and the values."""
    return [float(epoch) for epoch in range(1, len(values) + 1)], values


def relative(values: list[float]) -> tuple[list[float], list[float]]:
    """Epochs from 1 on, and the values over the first one."""
    return over_epochs([value / values[0] for value in values])


def column(rows: Rows, first: str, second: str) -> tuple[list[float], list[float]]:
    """Two numbers of each row."""
    return [row[first] for row in rows], [row[second] for row in rows]
