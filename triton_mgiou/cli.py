"""The command line: `triton-mgiou` or `python -m triton_mgiou`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import triton_mgiou
from triton_mgiou import demo
from triton_mgiou.arguments import FLOATING
from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.console import OutputError, open_closed_streams, print_out
from triton_mgiou.training import diagnose
from triton_mgiou.tuning import store
from triton_mgiou.tuning.warmup import TENSORS, WarmupResult


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments behind the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 if the command cannot run here or with these values, with the reason in one line on
        stderr. `diagnose` returns 1 if something is wrong with the file, and 2 if it cannot be read or the result not
        be printed.

    Raises:
        SystemExit: Status 2 for arguments that cannot be read, 0 after `--help` and `--version`.
    """
    open_closed_streams()
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (demo.DemoError, diagnose.DiagnoseError, OutputError) as error:
        sys.stderr.write(f"triton-mgiou {args.command}: {error}\n")
        return 2 if args.command == "diagnose" else 1


def _run(args: argparse.Namespace) -> int:
    if args.command == "diagnose":
        return 0 if diagnose.diagnose(args.path) else 1
    if args.command == "warmup":
        return _warmup(args)
    if args.command == "info":
        print_out(info())
    else:
        demo.run(epochs=args.epochs, seed=args.seed, device=args.device, batch_size=args.batch_size, out=args.out)
    return 0


def _warmup(args: argparse.Namespace) -> int:
    try:
        results = triton_mgiou.warmup(
            args.vertices,
            args.batch,
            args.dtype,
            args.device,
            args.options,
            tune=not args.no_tune,
            boxes=args.boxes,
            box_options=args.box_options,
            pairs=args.pairs,
            pair_sizes=args.pair_sizes,
            pair_options=args.pair_options,
            keypoints=args.keypoints,
        )
        print_out(table(results))
        if args.json is not None:
            text = json.dumps([result._asdict() for result in results], indent=1)
            args.json.write_text(f"{text}\n", encoding="utf-8")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"triton-mgiou warmup: {error}\n")
        return 1
    return 0


def table(results: list[WarmupResult]) -> str:
    """The results for people, a line each."""
    head = (
        "vertices",
        "batch",
        "dtype",
        "gradient",
        "polygons x axes x lanes x slots, warps, registers",
        "us",
        "gain",
        "from",
    )
    rows = [head]
    for r in results:
        c = r.configuration
        if r.fmt is None:
            slots = "/".join(dict.fromkeys(str(c[side]) for side in ("pred_slots", "target_slots")))
            tile = f"{c['polygons']} x {c['axes']} x {c['lanes']} x {slots}"
        elif "lanes" in c:
            tile = f"{c['lanes']} boxes"
        elif "samples" in c:
            tile = f"{c['samples']} x {c['vertices']} keypoints"
        else:
            tile = f"{c['rows']} x {c['columns']} pairs"
        rows.append(
            (
                r.fmt or "/".join(dict.fromkeys((str(r.pred_vertices), str(r.target_vertices)))),
                r.batch,
                r.dtype,
                "yes" if r.gradient else "no",
                f"{tile}, {c['num_warps']}, {c.get('registers', '-')}",
                "-" if r.us is None else f"{r.us:.1f}",
                "-" if r.gain is None else f"{r.gain:.1%}",
                r.source,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def info() -> str:
    """Versions, devices with the backend that "auto" takes there and why, and the tuning cache, a line each."""
    lines = [
        f"triton-mgiou: {triton_mgiou.__version__}",
        f"python: {platform.python_version()}, {platform.platform()}",
        f"torch: {torch.__version__}, CUDA: {torch.version.cuda or 'none in this PyTorch'}",
        f"triton: {_triton_version()}",
    ]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        reason = kernels_unavailable(device)
        if reason is None and device.type != "cuda":
            reason = 'Triton interprets the kernels there, for backend "triton" only'
        name = ""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            name = f" ({properties.name}, compute capability {properties.major}.{properties.minor}, {memory})"
        takes = "triton: the kernels can run there" if reason is None else f"eager: {reason}"
        lines.append(f'{device}{name}: backend "auto" takes {takes}')
    return "\n".join(lines + store.describe())


def _triton_version() -> str:
    """By the module, as its distribution has other names on Windows and with PyTorch for ROCm."""
    try:
        import triton  # noqa: PLC0415 - not everywhere, and slow
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triton-mgiou", description=triton_mgiou.__doc__)
    parser.add_argument("--version", action="version", version=triton_mgiou.__version__)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    _add_diagnose(commands)
    _add_warmup(commands)
    commands.add_parser("info", help="versions, devices, backend and tuning cache", description=info.__doc__)
    return parser


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="train on real images and show the result",
        description="Train a small network to outline handwritten digits; write demo.png and result.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--epochs", type=_integer_from(1), default=30, help="passes over the training images")
    command.add_argument("--seed", type=_integer_from(0), default=0, help="seed of weights and order of images")
    command.add_argument("--device", default="auto", help="torch device; auto takes cuda where there is one")
    command.add_argument("--batch-size", type=_integer_from(1), default=64, help="images per step")
    command.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="folder for the files")


def _add_diagnose(commands: Any) -> None:
    command = commands.add_parser(
        "diagnose",
        help="say what is wrong with a checkpoint or with the table of a run",
        description="Look for NaN, Inf and a dead GradScaler in a checkpoint, and in the table of a run for NaN, Inf, "
        "and whether it never learnt, fell from its best or collapsed. Exit status: 0 if nothing is wrong (it has "
        f"converged, or still learns), 1 if something is, 2 if the file cannot be read. It reads {diagnose.READ}.",
    )
    command.add_argument("path", type=Path, metavar="PATH", help="the file, or a distributed checkpoint's folder")


def _add_warmup(commands: Any) -> None:
    command = commands.add_parser(
        "warmup",
        help="compile and tune the kernels before training",
        description="Compile the kernels that training will use, tune them, and keep the result for later processes.",
    )  # the defaults are in the words that the command line takes
    command.add_argument(
        "--vertices", type=_pair_of(_integer_from(1)), nargs="*", default=[4, 8, 16], metavar="N[:M]",
        help="vertex counts of polygons; N:M where the target has another count; none leaves polygons out "
        "(default: 4 8 16)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=_integer_from(1), nargs="+", default=[512, 65536], help="batch sizes (default: 512 65536)"
    )
    command.add_argument(
        "--dtype", type=_pair_of(_dtype), nargs="+", default=[torch.float32], metavar="T[:T]",
        help="input types, such as float16; T:T where the target has another type (default: float32)",
    )  # fmt: skip
    command.add_argument("--device", help="torch device (default: the current GPU)")
    command.add_argument(
        "--options", type=_options, default="{}", metavar="JSON",
        help='options of mgiou_loss; for a tensor its dtype or true: {"target_lengths": true}',
    )  # fmt: skip
    command.add_argument(
        "--boxes", nargs="+", default=[], metavar="FMT",
        help='formats of box_mgiou_loss; not "xyxyxyxy", which is polygons of four vertices',
    )  # fmt: skip
    command.add_argument(
        "--box-options", type=_options, default="{}", metavar="JSON", help="options of box_mgiou_loss, as --options"
    )
    command.add_argument("--pairs", nargs="+", default=[], metavar="FMT", help='formats of box_mgiou, or "polygons"')
    command.add_argument(
        "--pair-sizes", type=_pair_of(_integer_from(1)), nargs="+", default=[(8400, 100)], metavar="P[:T]",
        help="sizes of matrices to measure with; P alone where T is as large (default: 8400:100)",
    )  # fmt: skip
    command.add_argument(
        "--pair-options", type=_options, default="{}", metavar="JSON",
        help="options of box_mgiou and polygon_mgiou, as --options",
    )  # fmt: skip
    command.add_argument(
        "--keypoints", action="store_true", help="the L2 term of PolygonLoss too, for the same vertices and types"
    )
    command.add_argument("--no-tune", action="store_true", help="compile only")
    command.add_argument("--json", type=_new_file, metavar="FILE", help="write the results there too")


def _pair_of(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def pair(text: str) -> Any:
        first, colon, second = text.partition(":")
        return (parse(first), parse(second)) if colon else parse(text)

    return pair


def _dtype(text: str) -> Any:
    dtype: Any = getattr(torch, text, None)
    if dtype not in FLOATING:
        raise argparse.ArgumentTypeError(f"expected float16, bfloat16, float32 or float64, got {text!r}")
    return dtype


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    for name, value in options.items():
        if name in TENSORS and isinstance(value, str):
            options[name] = getattr(torch, value, None)
            if not isinstance(options[name], torch.dtype):
                raise argparse.ArgumentTypeError(f"expected a dtype or true for {name}, got {value!r}")
    return options


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {text!r}")
    return path


def _integer_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of {least} or above, got {text!r}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"expected an integer of {least} to 2^63 - 1, got {text!r}")
        return value

    return parse
