"""Write the tables and sentences of the documents that hold measured numbers, from the files in bench/results.

    python -m bench.documents

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a document is replaced by the block of that name;
bench/results/h200.md is written as a whole. A test holds that this changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench import report
from bench.boxes import report as boxes_report
from bench.convergence.losses import OURS
from bench.pairs import report as pairs_report
from triton_mgiou.tuning.layouts import is_large

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- begin ([\w ]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)

Row = dict[str, Any]


@cache
def results(name: str) -> Any:
    """The content of a file in bench/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def speed() -> Any:
    """The speed on an H200, of all its files."""
    return report.merged([results(name) for name in ("h200", "h200_others", "h200_compiled")])


def speed_row() -> str:
    """The README's one row: microseconds of one run, and a ratio within another that has the package."""
    at = {row["peer"]: row for row in _training_rows() if (row["batch"], row["vertices"]) == (4096, 8)}
    loop = ("kernel, defaults", "kernel", "smooth L1", "L1")
    graph = ("kernel, defaults", "kernel", "smooth L1")
    cells = [report.number(at[peer]["wall_us"]["step"]) for peer in loop]
    cells += [report.number(at[peer]["graph_us"]) for peer in graph]
    cells.append(f"{at['mgiou MGIoU2DPlus']['wall_ratio']['step']:.0f}")
    names = "default | paper's | smooth L1 | L1"
    graphs = names.removesuffix(" | L1")
    head = f"in a loop: {names} | in a CUDA graph: {graphs} | `mgiou` 0.1.0 in a loop: times the paper's"
    return report.table(head, [cells])


def speed_training() -> str:
    """Steps at the sizes of training."""
    return report.training_table(speed()["rows"])


def speed_large() -> str:
    """Large batches."""
    return report.large_table(speed()["rows"], speed()["rates"])


def speed_instructions() -> str:
    """What a polygon takes in large batches, by kind of instruction, and the share of the GPU's slots that it fills."""
    found, batch = results("instructions"), 2**20
    rates = speed()["rates"]
    launched = {
        row["vertices"]: row
        for row in report.roofline_rows(speed()["rows"], rates)
        if row["batch"] == batch and row["gradient"] and row["dtype"] == "float32"
    }
    lines = []
    for row in found["rows"]:
        measured = launched[row["vertices"]]
        counts = *row["counted"].values(), sum(row["counted"].values())
        least = batch * counts[-1] / rates["multiply_add"] * 1e6
        share = least / measured["measured_us"]
        lines.append(
            [
                str(row["vertices"]),
                " + ".join(map(str, row["needed"].values())),
                *(f"{count:.0f}" for count in counts),
                *map(report.number, (least, measured["measured_us"])),
                *map(report.percent, (share, share * 0.7 / measured["fraction"])),
            ]
        )
    kinds = " | ".join(found["rows"][0]["counted"])
    head = f"N | needed | {kinds} | in all | all slots full, us | launch, us | slots filled | at 70 % of the bound"
    return report.table(head, lines)


def speed_default() -> str:
    """The default loss beside the paper's."""
    steps = {(row["batch"], row["vertices"], row["peer"]): row.get("graph_us") for row in _float32(speed()["rows"])}
    sizes = [(512, 4), (4096, 4), (4096, 8), (16384, 8), (65536, 16), (65536, 32), (2**20, 4), (2**20, 8)]
    peers = ("kernel", "kernel, defaults")
    rows = ([f"{b} x {n}", *(report.number(steps[b, n, peer]) for peer in peers)] for b, n in sizes)
    return report.table("B x N | paper | default", rows)


def speed_summary() -> str:
    """Ratios at the sizes of training, each taken in turns in one run."""

    def by_size(peer: str, rows: Iterable[Row]) -> dict[tuple[int, int], Row]:
        return {(row["batch"], row["vertices"]): row for row in rows if row["peer"] == peer}

    at_training = _training_rows()
    kernel, smooth, plain, reference = (
        by_size(peer, at_training) for peer in ("kernel", "smooth L1", "L1", "reference")
    )
    compiled = by_size("compiled dynamic", _float32(speed()["rows"]))
    loops = [_span([1 / row["wall_ratio"]["step"] for row in other.values()]) for other in (smooth, plain)]
    graphs = {size: kernel[size]["graph_us"] / smooth[size]["graph_us"] for size in kernel}
    below, above = ([f"{b} x {n}" for (b, n), r in graphs.items() if (r > 1) == slow] for slow in (False, True))
    slower = _span([row["wall_ratio"]["step"] for row in reference.values()], 0)
    at = _span([compiled[size]["wall_ratio"]["step"] for size in kernel], 1)
    large = _span([row["wall_ratio"]["step"] for size, row in compiled.items() if size not in kernel], 0)
    quicker, slower_graphs = ([ratio for ratio in graphs.values() if (ratio > 1) == slow] for slow in (False, True))
    found = speed()
    newest, *older = dict.fromkeys(run["commit"] for run in found["runs"])
    at_commits = f"commit {newest}" + (f"; what was not measured there is of {' and '.join(older)}" if older else "")
    lines = [
        f"- {found['device']}, torch {found['versions']['torch']}, Triton {found['versions']['triton']}, {at_commits}.",
        f"- In a loop the host is the bottleneck: a step takes {loops[0]} times as long as one with `smooth_l1_loss`",
        f"  on the same tensors, and {loops[1]} times one with `l1_loss`.",
        f"- Replayed as a CUDA graph it takes {_span(quicker)} times as long as `smooth_l1_loss`",
        f"  at {', '.join(below)}" + (f", and {_span(slower_graphs)} times at {', '.join(above)}." if above else "."),
        f"- The reference takes {slower} times as long as the kernel, `torch.compile` of it {at} times,",
        f"  and {large} times in the large batches below.",
    ]
    return "\n".join(lines)


def speed_layouts() -> str:
    """Small batches of many vertices before and with the layouts of today."""
    found = results("h200_layouts")["comparisons"]
    rows = (row for name in ("80015b9", "62ca9c4") for row in found[name]["rows"])  # the later ones replace the earlier
    sizes = ((row, row["vertices"]) for row in rows)
    return _before_and_after(row for row, n in sizes if n >= 16 and not is_large(row["batch"], n, n))


def speed_newly_large() -> str:
    """Batches that have not always had the layouts of large ones, before and with them."""
    return _before_and_after(results("h200_layouts")["comparisons"]["4ab1039"]["rows"])


def _before_and_after(rows: Iterable[dict[str, Any]]) -> str:
    losses = {
        "PAPER, with gradient": "paper",
        "defaults, with gradient": "default",
        "defaults, value only": "value alone",
        "defaults, lengths on both sides, with gradient": "with lengths",
        "defaults, masks on both sides, with gradient": "with masks",
        "axis_grad=True, convexity_weight=0.1, boundary_weight=0.25, with gradient": "both terms",
        "defaults, float64, with gradient": "float64",
    }
    at: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        if "superseded" not in row:
            cell = f"{row['us before']:.1f} → {row['us after']:.1f}"
            at.setdefault((row["vertices"], row["batch"]), {})[losses[row["loss"]]] = cell
    names = [name for name in losses.values() if any(name in cells for cells in at.values())]
    lines = [[f"{b} x {n}", *(at[n, b].get(name, "") for name in names)] for n, b in sorted(at)]
    return report.table(" | ".join(["B x N", *names]), lines)


def startup_first() -> str:
    """The first call."""
    first = results("h200_startup")["first"]["result"]
    names = {
        "empty caches": "empty caches",
        "Triton's cache": "Triton's cache on disk",
        "after a warm-up": "after a warm-up",
        "trivial kernel, empty cache": "a trivial Triton kernel, empty cache",
        "trivial kernel, Triton's cache": "a trivial Triton kernel, Triton's cache",
    }
    rows = [[text, f"{first[name]['first call']:.2f}"] for name, text in names.items()]
    return report.table("the first call in a fresh process | seconds", rows)


def startup_host() -> str:
    """The host's part of a call."""
    measured = results("h200_startup")["host"]["result"]["us"]
    rows = [[re.sub(r"\S*_\w+", r"`\g<0>`", name), f"{us:.1f}"] for name, us in measured.items()]
    return report.table("the host's part of a warm call, 512 x 8 | microseconds", rows)


def tuning_gains() -> str:
    """The gain of tuning over the shipped layouts."""
    rows = results("h200_startup")["tuning"]["result"]["rows"]
    gains = {(row["vertices"], row["batch"], row["gradient"]): row["gain"] or 0.0 for row in rows}
    sizes = dict.fromkeys((vertices, batch) for vertices, batch, _ in gains)
    cells = ([f"{b} x {n}", *(f"{gains[n, b, gradient]:.1%}" for gradient in (False, True))] for n, b in sizes)
    return report.table("B x N | value | value and gradient", cells)


def startup_training() -> str:
    """What steps of any size still compile."""
    found = results("h200_startup")["training"]["result"]
    counts = [f"{found[name] or 'none'} {name}" for name in ("compiled", "tuned")]
    return f"Of {found['steps']:,} steps of random B and N after a warm-up, {' and '.join(counts)} anything."


def heads() -> str:
    """Whole steps of a small head, eager and compiled."""
    found = results("h200_heads")
    names = list(found["rows"][0]["us"])
    lines = [
        [f"{row['batch']}, {row['mode']}", *(f"{row['us'][name]:.0f} ({row['ratio'][name]:.2f})" for name in names)]
        for row in found["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = f"{found['device']}, {versions}, commit {found['commit']}; microseconds, and the ratio to smooth L1."
    return f"{head}\n\n{report.table(' | '.join(['B', *names]), lines)}"


def boxes_row() -> str:
    """The README's one row of boxes."""
    found = results("h200_boxes")
    launches = {row["fmt"]: row["launch_us"] for row in found["launches"] if row["batch"] == 2**20}
    loops = {row["peer"]: row["loop_us"] for row in found["steps"] if row["batch"] == 4096}
    formats = ("cxcywhr", "xyxy", "cxcyczlwhr", "corners3d")
    peers = {"kernel": "4096 cxcywhr in a loop", "smooth L1": "smooth L1", "ProbIoU": "ProbIoU"}
    peers["ProbIoU, compiled"] = "compiled"
    head = " | ".join([f"1048576 {formats[0]}", *formats[1:], *peers.values()])
    cells = [launches[fmt] for fmt in formats] + [loops[peer] for peer in peers]
    return report.table(head, [[report.number(cell) for cell in cells]])


def boxes_speed() -> str:
    """Boxes: steps, launches and the first call."""
    return boxes_report.markdown(results("h200_boxes"))


def boxes_descent() -> str:
    """Which loss brings free boxes to their targets."""
    return boxes_report.descent(results("boxes_descent"))


def pairs_speed() -> str:
    """The matrix of all pairs."""
    return pairs_report.markdown(results("h200_pairs"))


def amp_rows() -> str:
    """The reported loss under mixed precision."""
    rows = results("convergence_amp")["rows"]

    def cells(row: Row) -> list[str]:
        loss = ["NaN" if value is None else f"{value:.3f}" for value in row["loss"]]
        shares = [f"{row[name]:.0%}" for name in ("finite_values", "bad_gradients")]
        scale = f"2^{math.log2(row['scale']):.0f}" if row["dtype"] == "float16" else "-"
        return [_name(row["loss_name"]), row["dtype"], *shares, f"{row['skipped']} of {row['steps']}", scale, *loss]

    head = "loss | autocast | finite values | bad gradients | steps skipped | last scale | loss, start | loss, end"
    return report.table(head, map(cells, rows))


def convergence_digits() -> str:
    """Every loss from a start without an order."""
    rows = []
    for name in _losses():
        runs = convergence_runs("digits", "scattered", name)
        first, last, zero = (
            statistics.mean(run[key][at] for run in runs)
            for key, at in (("loss", 0), ("loss", 2), ("zero_gradients", 2))
        )
        hull, crossing = (statistics.mean(run[key] for run in runs) for key in ("hull_iou", "self_crossing"))
        means = [f"{first:.3f}", f"{last:.3f}", f"{zero:.0%}", f"{crossing:.0%}", f"{hull:.3f}"]
        judged = [with_worst(runs, key, digits) for key, digits in (("polygon_iou", 3), ("ap50", 2), ("ap90", 2))]
        rows.append([_name(name), *means, *judged])
    head = "loss | loss, start | loss, end | vertices without gradient | crosses itself | hull IoU | polygon IoU"
    return report.table(f"{head} | AP50 | AP90", rows)


def convergence_starts() -> str:
    """Polygon IoU from other starts."""
    places = [("digits", "circle")] + [("vertices", start) for start in ("circle", "random", "tiny", "whole image")]
    rows = (
        [_name(name), *(with_worst(convergence_runs(*place, name), "polygon_iou", 3) for place in places)]
        for name in _losses()
    )
    return report.table("loss | digits, circle | free, circle | free, random | free, tiny | free, whole image", rows)


def _losses() -> list[str]:
    return list(dict.fromkeys(row["loss_name"] for row in results("convergence")["rows"]))


def convergence_unrelated() -> str:
    """The loss between unrelated objects."""
    rows = (
        [f"{low:.0%} to {high:.0%}", f"{each['loss']:.2f}"]
        for each in results("convergence")["unrelated_objects"]
        for low, high in [each["sides"]]
    )
    return report.table("sides of the objects, in the image's side | mean loss", rows)


def demo_runs() -> str:
    """The demo in one process and in two."""
    rows = [["one process, seeds 0 to 4", *_demo_cells(results("demo_cpu")["runs"])]]
    settings = results("demo_distributed_cpu")["settings"]
    rows += [[f"{each['name']}, seeds 0 to 2", *_demo_cells(each["runs"])] for each in settings]
    return report.table("demo on a CPU | polygon IoU | AP50 | AP75 | AP90", rows)


def _demo_cells(runs: Sequence[Row]) -> list[str]:
    return [with_worst(runs, key, 3) if key in runs[0] else "-" for key in ("polygon_iou", "ap50", "ap75", "ap90")]


def convergence_runs(task: str, start: str, name: str) -> list[Row]:
    """All seeds of one loss."""
    wanted = (task, start, name)
    return [row for row in results("convergence")["rows"] if (row["task"], row["start"], row["loss_name"]) == wanted]


def with_worst(runs: Sequence[Row], key: str, digits: int) -> str:
    """The mean over the seeds, in brackets the worst."""
    values = [run[key] for run in runs]
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f})"


def _name(name: str) -> str:
    """The package's defaults are in bold."""
    return f"**{name}**" if name == OURS else name


def _float32(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["dtype"] == "float32"]


def _training_rows() -> list[Row]:
    return [row for row in _float32(speed()["rows"]) if row["group"] == "training"]


def _span(values: Sequence[float], digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


BLOCKS: dict[str, Callable[[], str]] = {
    "speed row": speed_row,
    "speed summary": speed_summary,
    "speed training": speed_training,
    "speed large": speed_large,
    "speed instructions": speed_instructions,
    "speed default": speed_default,
    "speed layouts": speed_layouts,
    "speed newly large": speed_newly_large,
    "startup first": startup_first,
    "startup host": startup_host,
    "startup training": startup_training,
    "tuning gains": tuning_gains,
    "heads": heads,
    "boxes row": boxes_row,
    "boxes speed": boxes_speed,
    "boxes descent": boxes_descent,
    "pairs speed": pairs_speed,
    "amp": amp_rows,
    "convergence digits": convergence_digits,
    "convergence starts": convergence_starts,
    "convergence unrelated": convergence_unrelated,
    "demo": demo_runs,
}


def documents() -> list[Path]:
    """The documents of the repository that are written by hand."""
    folders = ("bench", "triton_mgiou")
    return sorted([*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("[A-Z]*.md"))])


def rendered() -> dict[Path, str]:
    """Each document as it should be, its blocks filled in."""
    texts = {path: path.read_text(encoding="utf-8") for path in documents()}
    filled = {
        path: MARKED.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", texts[path]) for path in texts
    }
    return {**filled, RESULTS / "h200.md": report.markdown(speed())}


def main(argv: list[str] | None = None) -> None:
    """Write what has changed and say which."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    for path, text in rendered().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"written: {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
