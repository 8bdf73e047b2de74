"""Write one table in Markdown and the figures from the JSON of `bench.speed`.

    python -m bench.report bench/results/h200.json bench/results/h200_others.json bench/results/h200_compiled.json

The files are written beside the first one, under its name: h200.md, h200_batch.png and so on. Several files have to
come from the same machine and versions, but that one may lack a package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.roofline import bound_us, operations

Row = dict[str, Any]

SAME = ("device", "python")  # of all files of a report
GROWTH_VERTICES = 8  # the N of the figures and exponents over B, and the least N of the exponents over N
BUSY = 64  # exponents over B start at the largest B over this: below it, a GPU does not notice the batch
STYLES: dict[str, dict[str, Any]] = {
    "kernel": {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.4},
    "kernel, defaults": {"color": "black", "linestyle": "-", "marker": "*"},
    "reference": {"color": "0.35", "linestyle": "-", "marker": "s"},
    "compiled": {"color": "0.35", "linestyle": "", "marker": "X", "markersize": 8},
    "compiled dynamic": {"color": "0.35", "linestyle": "--", "marker": "x"},
    "angle-sorted": {"color": "0.55", "linestyle": "-.", "marker": "^"},
    "mgiou MGIoU2DPlus": {"color": "0.55", "linestyle": "--", "marker": "v"},
    "mgiou MGIoU2D": {"color": "0.55", "linestyle": ":", "marker": "<"},
    "smooth L1": {"color": "black", "linestyle": ":", "marker": "+", "markersize": 9},
    "L1": {"color": "black", "linestyle": "--", "marker": "."},
    "torchvision GIoU": {"color": "0.7", "linestyle": "-", "marker": "D"},
    "mmcv rotated IoU": {"color": "0.7", "linestyle": "--", "marker": "d"},
}


def main(argv: list[str] | None = None) -> None:
    """Read the results, write the table and the figures, and say which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench.speed")
    files = parser.parse_args(argv).results
    try:
        result = merged([json.loads(file.read_text(encoding="utf-8")) for file in files])
    except (OSError, ValueError) as error:
        sys.exit(f"bench.report: {error}")
    except (KeyError, TypeError, IndexError):
        sys.exit("bench.report: expected results of bench.speed, got those of another program")
    table = files[0].with_suffix(".md")
    table.write_text(markdown(result), encoding="utf-8")
    written = [table, *figures(result, files[0].with_suffix(""))]
    sys.stdout.write("".join(f"written: {path}\n" for path in written))


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several parts of a measurement; of a peer that two of them hold at a size, the first counts."""
    first, *others = results
    versions = dict(first["versions"])
    for other in others:
        for name in SAME:
            if other[name] != first[name]:
                raise ValueError(f"expected results of one machine, got {name} {first[name]!r} and {other[name]!r}")
        for name, version in other["versions"].items():
            if versions.setdefault(name, version) != version:
                raise ValueError(f"expected results of one version of {name}, got {versions[name]} and {version}")
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        for row in result["rows"]:
            rows.setdefault(_size_of(row), row)
    left_out: list[Row] = []
    for result in results:
        left_out += [row for row in result["left_out"] if row not in left_out and _size_of(row) not in rows]
    return {
        **first,
        "versions": versions,
        "runs": [{name: result[name] for name in ("command", "commit", "date")} for result in results],
        "rates": next((result["rates"] for result in results if result["rates"]), {}),
        "launches": {name: count for each in reversed(results) for name, count in each.get("launches", {}).items()},
        "missing": {
            name: why for name, why in first["missing"].items() if all(name in other["missing"] for other in others)
        },
        "left_out": left_out,
        "rows": list(rows.values()),
    }


def _size_of(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["vertices"], row.get("dtype"), row["peer"]


def markdown(result: dict[str, Any]) -> str:
    """The whole report but for the figures."""
    rows = result["rows"]
    parts = [f"# Speed on {result['device']}", machine_text(result)]
    if result["rates"]:
        parts.append(f"## In short\n\n{SHORT_TEXT}\n\n{training_table(rows)}\n\n{large_table(rows, result['rates'])}")
    parts.append(f"## Times and memory\n\n{TIMES_TEXT}\n\n{times_table(rows)}")
    if result["rates"]:
        parts.append(f"## Roofline\n\n{rates_text(result['rates'])}\n\n{roofline_table(rows, result['rates'])}")
    parts.append(f"## Growth\n\n{GROWTH_TEXT}\n\n{growth_table(rows)}")
    if result["launches"]:
        parts.append(f"## Launches\n\n{launches_text(result['launches'])}")
    parts.append(f"## Not here\n\n{absent_text(result)}")
    return "\n\n".join(parts) + "\n"


SHORT_TEXT = """Forward and backward in float32, microseconds in a loop and in a row of ten in a CUDA graph; then large
batches on the GPU: the kernel's one launch, the share of the roofline that it reaches with the gradient, steps, and
the memory that they allocate at most. "compiled" is the reference under `torch.compile(dynamic=True)`."""

TIMES_TEXT = """Microseconds. A step is forward and backward of a mean loss. "Loop" is wall time in a loop, host
included; "x" is its ratio to the first peer of the size, taken in turns with it. "GPU" is one replay of a CUDA graph
of the step behind a flush of the L2 cache, "graph" the same in a row of ten. MiB is what a step allocates at most.
The errors are those of the mean loss and of derivatives in a random direction, against the definition in float64."""

GROWTH_TEXT = """Exponents a of time ~ B^a and time ~ N^a, fitted by least squares in the logarithms, on the GPU time
of a step where there is one, else on the loop's: over B from the largest B / 64 on at N = 8, over N from 8 on at the B
with the most sizes."""


def machine_text(result: dict[str, Any]) -> str:
    """Machine, versions and commands."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['device']}, {result['cpus']} CPU cores, {result['threads']} threads; "
        f"Python {result['python']}, {versions}."
    ]
    lines += [f"`{run['command']}` at {run['commit'] or 'no commit'}, {run['date']}." for run in result["runs"]]
    return "\n\n".join(lines)


def training_table(rows: Iterable[Row]) -> str:
    """Steps at the sizes of training, in a loop and in a CUDA graph."""
    loop = ("kernel", "smooth L1", "L1", "reference")
    graph = ("kernel", "smooth L1", "L1")
    found, sizes = _group(rows, "training")
    return table(
        "B x N | loop: kernel | smooth L1 | L1 | reference | graph: kernel | smooth L1 | L1",
        (
            [
                f"{batch} x {vertices}",
                *(number(_get(found, (batch, vertices, peer), "wall_us", "step")) for peer in loop),
                *(number(_get(found, (batch, vertices, peer), "graph_us")) for peer in graph),
            ]
            for batch, vertices in sizes
        ),
    )


def large_table(rows: Sequence[Row], rates: dict[str, float]) -> str:
    """Large batches on the GPU."""
    peers = ("kernel", "compiled dynamic", "reference")
    found, sizes = _group(rows, "large")
    launched = [row for row in roofline_rows(found.values(), rates) if row["gradient"]]
    shares = {(row["batch"], row["vertices"]): row["fraction"] for row in launched}
    launches = "launch: value | value and gradient | of the bound"
    return table(
        f"B x N | {launches} | step: kernel | compiled | reference | MiB: kernel | compiled | reference",
        (
            [
                f"{batch} x {vertices}",
                number(_get(found, (batch, vertices, "kernel"), "launch_us", "value")),
                number(_get(found, (batch, vertices, "kernel"), "launch_us", "value and gradient")),
                percent(shares.get((batch, vertices))),
                *(number(_get(found, (batch, vertices, peer), "gpu_us", "step")) for peer in peers),
                *(mebibytes(_get(found, (batch, vertices, peer), "memory_bytes")) for peer in peers),
            ]
            for batch, vertices in sizes
        ),
    )


def _group(rows: Iterable[Row], name: str) -> tuple[dict[tuple[Any, ...], Row], list[tuple[int, int]]]:
    """The rows in float32, by size and peer, and the sizes of a group, as the kernel was measured at them."""
    found = {(row["batch"], row["vertices"], row["peer"]): row for row in rows if row["dtype"] == "float32"}
    return found, [key[:2] for key, row in found.items() if (row["group"], row["peer"]) == (name, "kernel")]


def _get(found: dict[tuple[Any, ...], Row], key: tuple[Any, ...], *path: str) -> Any:
    """The value at `path` of a row, or None if it was not measured."""
    value: Any = found.get(key)
    for name in path:
        value = None if value is None else value.get(name)
    return value


def times_table(rows: Iterable[Row]) -> str:
    """Every row, by type and size."""
    times = "loop: forward | loop: step | x | GPU: forward | GPU: step | graph: step"
    head = f"B x N | dtype | loss | {times} | MiB | error: value | error: gradient"
    ordered = sorted(rows, key=lambda row: (row["dtype"] != "float32", row["vertices"], row["batch"]))
    return table(
        head,
        (
            [
                f"{row['batch']} x {row['vertices']}",
                row["dtype"],
                f"{row['peer']} ({row['quantity']})" if row["quantity"] != "MGIoU loss" else row["peer"],
                number(row["wall_us"].get("forward")),
                number(row["wall_us"]["step"]),
                f"{row['wall_ratio']['step']:.2f}",
                number(row.get("gpu_us", {}).get("forward")),
                number(row.get("gpu_us", {}).get("step")),
                number(row.get("graph_us")),
                mebibytes(row.get("memory_bytes")),
                f"{row['value_error']:.0e}",
                f"{row['gradient_error']:.0e}",
            ]
            for row in ordered
        ),
    )


def roofline_rows(rows: Iterable[Row], rates: dict[str, float]) -> list[Row]:
    """For each size of the kernel: the bounds of its launch, without and with the gradient, and the share reached."""
    found = []
    for row in rows:
        for name, measured in row.get("launch_us", {}).items():
            if measured is None:
                continue
            gradient = name == "value and gradient"
            n = row["vertices"]
            bounds = bound_us(row["batch"], n, n, gradient, 2 if row["dtype"] == "bfloat16" else 4, rates)
            limit = max(bounds, key=bounds.__getitem__)
            found.append(
                {
                    **{name: row[name] for name in ("batch", "vertices", "dtype")},
                    "gradient": gradient,
                    "measured_us": measured,
                    "bounds_us": bounds,
                    "limit": limit,
                    "fraction": bounds[limit] / measured,
                }
            )
    return sorted(found, key=lambda row: (row["dtype"] != "float32", row["gradient"], row["vertices"], row["batch"]))


def roofline_table(rows: Iterable[Row], rates: dict[str, float]) -> str:
    """The kernel's launch against its bounds."""
    found = roofline_rows(rows, rates)
    names = list(found[0]["bounds_us"]) if found else []
    head = ["B x N", "dtype", "launch", "GPU", *(f"bound: {name}" for name in names), "reached"]
    return table(
        " | ".join(head),
        (
            [
                f"{row['batch']} x {row['vertices']}",
                row["dtype"],
                "value and gradient" if row["gradient"] else "value",
                number(row["measured_us"]),
                *(number(row["bounds_us"][name]) for name in names),
                percent(row["fraction"]),
            ]
            for row in found
        ),
    )


def rates_text(rates: dict[str, float]) -> str:
    """The rates and counts that the bounds come from."""
    arithmetic, selection = operations(8, 8, gradient=True)
    tera = {name: f"{rate / 1e12:.1f}" for name, rate in rates.items()}
    return (
        "The one launch of the kernel, in microseconds behind a flush of the L2 cache, against the least time for the "
        f"bytes and the operations that `bench/roofline.py` counts: {arithmetic} of arithmetic and {selection} of "
        "min, max, compare and select for a pair with N = 8, value and gradient. Measured in the same run: "
        f"{tera['copy_bytes']} TB/s in a copy; in units of 10^12 a second {tera['multiply_add']} multiply-add, "
        f"{tera['min_max']} min or max, {tera['compare_select']} compare or select, {tera['half_of_each']} where "
        "multiply-add and min or max take turns."
    )


def growth_table(rows: Sequence[Row]) -> str:
    """Fitted exponents of each peer."""
    found = []
    for peer in peers_of(rows):
        cells = []
        for name, chosen in (("batch", over_batch(rows, peer)), ("vertices", over_vertices(rows, peer))):
            least = max((row["batch"] for row in chosen), default=0) / BUSY if name == "batch" else GROWTH_VERTICES
            points = [(row[name], time_of(row)) for row in chosen if row[name] >= least]
            cells.append("-" if len(points) < 3 else f"{exponent(points):.2f} ({points[0][0]} to {points[-1][0]})")
        if cells != ["-", "-"]:
            found.append([peer, *cells])
    return table("loss | over B | over N", found)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The a of y ~ x^a that fits best in the logarithms."""
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def launches_text(launches: dict[str, Any]) -> str:
    """Launches of a step, one line for each peer."""
    counts = {name: count for name, count in launches.items() if name not in ("batch", "vertices")}
    lines = [f"- {name}: {count}" for name, count in counts.items()]
    return "\n".join(
        [f"Kernels, copies and fills of one step at {launches['batch']} x {launches['vertices']}:\n", *lines]
    )


def absent_text(result: dict[str, Any]) -> str:
    """Each peer that is missing or was left out, and why."""
    lines = [f"- {name}: {why}" for name, why in result["missing"].items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["left_out"]:
        size = f"{row['batch']} x {row['vertices']}" + (" in bfloat16" if row.get("dtype") == "bfloat16" else "")
        reasons.setdefault((row["peer"], row["reason"]), []).append(size)
    lines += [f"- {peer} at {', '.join(sizes)}: {reason}" for (peer, reason), sizes in reasons.items()]
    return "\n".join(lines) or "Every peer ran at every size."


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    rule = "|".join(["---"] * (head.count("|") + 1))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float | None) -> str:
    """Three digits at least, none of them invented."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB."""
    return number(None if value is None else value / 2**20)


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{100 * value:.0f} %"


def peers_of(rows: Iterable[Row]) -> list[str]:
    """Names of the peers, in the order of the figures' legends."""
    names = {row["peer"] for row in rows}
    return [name for name in STYLES if name in names]


def over_batch(rows: Iterable[Row], peer: str) -> list[Row]:
    """A peer's rows at N = 8, by B."""
    chosen = [r for r in rows if (r["peer"], r["vertices"], r["dtype"]) == (peer, GROWTH_VERTICES, "float32")]
    return sorted(chosen, key=lambda row: row["batch"])


def over_vertices(rows: Sequence[Row], peer: str) -> list[Row]:
    """A peer's rows at the B that was measured for most N, by N."""
    batches = [row["batch"] for row in rows if row["dtype"] == "float32"]
    batch = max(batches, key=lambda each: len({r["vertices"] for r in rows if r["batch"] == each}), default=0)
    chosen = [row for row in rows if (row["peer"], row["batch"], row["dtype"]) == (peer, batch, "float32")]
    return sorted(chosen, key=lambda row: row["vertices"])


def time_of(row: Row) -> float:
    """Microseconds of a step: on the GPU if measured, else in the loop."""
    return float(row.get("gpu_us", {}).get("step") or row["wall_us"]["step"])


def figures(result: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what the results hold: each figure that shows something, as PNG, readable without colours."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow, and not needed for the table

    rows = result["rows"]
    on_gpu = any("gpu_us" in row for row in rows)
    written = []

    def save(figure: Figure, name: str) -> None:
        if not any(axes.has_data() for axes in figure.axes):
            return
        versions = result["versions"]
        note = f"{result['device']}; " + ", ".join(f"{each} {versions[each]}" for each in versions)
        note += "".join(f"\n{run['date']}, {run['commit']}: {run['command']}" for run in result["runs"])
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color="0.3")
        written.append(stem.with_name(f"{stem.name}_{name}.png"))
        figure.savefig(written[-1], dpi=110)

    def lines(axes: Any, select: Callable[[str], list[Row]], x: str, y: Callable[[Row], float | None]) -> None:
        for peer in peers_of(rows):
            points = [(row[x], y(row)) for row in select(peer) if y(row) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=peer, **STYLES[peer])
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sorted({row[x] for peer in peers_of(rows) for row in select(peer)}), minor=False)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.xaxis.set_minor_locator(_no_ticks())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(color="0.9")

    def compare(name: str, select: Callable[[str], list[Row]], x: str, x_label: str, title: str) -> None:
        figure = Figure(figsize=(13 if on_gpu else 9, 5), layout="constrained")
        loop = figure.add_subplot(1, 2 if on_gpu else 1, 1)
        lines(loop, select, x, lambda row: row["wall_us"]["step"])
        loop.set(
            title=f"{title}: in a loop, host included", xlabel=x_label, ylabel="forward and backward, microseconds"
        )
        if on_gpu:
            gpu = figure.add_subplot(1, 2, 2, sharey=loop)
            lines(gpu, select, x, lambda row: row.get("gpu_us", {}).get("step"))
            gpu.set(title=f"{title}: on the GPU, as a CUDA graph", xlabel=x_label)
        figure.legend(*loop.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        save(figure, name)

    compare("batch", lambda peer: over_batch(rows, peer), "batch", "B, pairs of polygons", f"N = {GROWTH_VERTICES}")
    batches = {row["batch"] for peer in peers_of(rows) for row in over_vertices(rows, peer)}
    title = f"B = {next(iter(batches), None)}"
    compare("vertices", lambda peer: over_vertices(rows, peer), "vertices", "N, vertices of each polygon", title)
    if on_gpu:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        lines(
            axes, lambda peer: over_batch(rows, peer), "batch", lambda row: (row["memory_bytes"] or 0) / 2**20 or None
        )
        label = "peak of a step beyond its input, MiB"
        axes.set(title=f"Memory, N = {GROWTH_VERTICES}", xlabel="B, pairs of polygons", ylabel=label)
        axes.legend(fontsize=8)
        save(figure, "memory")
    if result["rates"]:
        draw_roofline(roofline_rows(rows, result["rates"]), save)
    return written


def draw_roofline(rows: Sequence[Row], save: Callable[[Any, str], None]) -> None:
    """The share of the bound that the kernel reaches at the sizes that fill a GPU."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow, and not needed for the table

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    chosen = [row for row in rows if row["dtype"] == "float32" and row["batch"] * row["vertices"] >= 2**18]
    sizes = sorted({(row["vertices"], row["batch"]) for row in chosen})
    for shift, gradient, color, hatch in ((-0.2, False, "0.75", ""), (0.2, True, "0.35", "//")):
        bars = [row for row in chosen if row["gradient"] == gradient]
        places = [sizes.index((row["vertices"], row["batch"])) + shift for row in bars]
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "black"}
        look["label"] = "value and gradient" if gradient else "value"
        drawn = axes.bar(places, [100 * row["fraction"] for row in bars], 0.38, **look)
        axes.bar_label(drawn, [row["limit"].split(",")[0] for row in bars], rotation=90, padding=3, fontsize=6)
    axes.set_xticks(range(len(sizes)), [f"{short(batch)} x {n}" for n, batch in sizes], rotation=45, fontsize=8)
    axes.set(ylim=(0, 110), xlabel="B x N", ylabel="% of the bound reached, by what bounds it")
    axes.set_title("Roofline of the kernel's launch: least time by bytes and operations over measured time")
    axes.legend(fontsize=8)
    save(figure, "roofline")


def short(value: float) -> str:
    """1024 as 1K, 2^20 as 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:.0f}{name}"
    return f"{value:.0f}"


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator  # noqa: PLC0415 - as above

    return NullLocator()


if __name__ == "__main__":
    main()
