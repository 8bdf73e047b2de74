"""Train Ultralytics detectors with its own losses and with ours, and write tables and a figure of what came out.

    python -m bench.detectors                              on a GPU; goes on where it was stopped
    python -m bench.detectors --toy --out /tmp/detectors   a minute on two CPU cores, to see that it runs

Each finished training is a file of its own in --out, and is not done again. The most important ones come first (see
plan.py), so that the bench can be stopped at any time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.detectors import plan, report
from bench.detectors.scenes import Scenes, make

SECONDS = {"cuda": 6.0, "cpu": 2.0}  # an epoch, while others train: what the first estimate is made of
START = 20.0  # a training, before its first epoch and after its last
CHUNK = 60  # images that one process draws
VERSIONS = ("torch", "triton", "ultralytics", "shapely", "numpy", "scikit-learn", "scikit-image", "triton-mgiou")
OWN = Path("bench/results/detectors")


def main() -> int:
    """Run what is not in the folder yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the results, continued if it exists (default: {OWN})")
    parser.add_argument("--toy", action="store_true", help="a few images, an epoch or two: to see that it runs")
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one for each core, at most 14)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no training that would end later")
    parser.add_argument("--only", default="", help="only trainings whose file's name has this in it")
    parser.add_argument("--report", action="store_true", help="train nothing, write tables and figure of what is there")
    args = parser.parse_args()
    if args.toy and not args.out:
        parser.error("--toy needs --out, so that its results do not lie among the real ones")
    out = args.out or OWN
    out.mkdir(parents=True, exist_ok=True)
    failed = 0 if args.report else train_missing(out, args)
    report.write(out)
    if out == OWN:
        report.fill(Path(__file__).with_name("README.md"), out)
    say(f"written: {out}")
    return 1 if failed else 0


def train_missing(out: Path, args: argparse.Namespace) -> int:
    """Time the steps and do the trainings that are not in the folder yet; return how many failed."""
    end = time.perf_counter() + args.seconds
    importlib.import_module("ultralytics")  # makes its folder of settings, once and not in all processes together
    size = plan.TOY if args.toy else plan.FULL
    jobs = [job for job in plan.jobs(size) if args.only in job.name]
    left = [job for job in jobs if not (out / f"{job.name}.json").exists()]
    speed_left = not args.only and not (out / "speed.json").exists()
    processes = args.processes or min(os.cpu_count() or 1, 14)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    guess = sum(START + SECONDS[device] * job.epochs for job in left) / processes / (10 if args.toy else 1)
    say(f"{len(jobs)} trainings, {len(jobs) - len(left)} done before, {processes} at a time on {hardware()}:")
    say(f"about {guess / 60:.0f} min, told anew after each training")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        gpus = context.Queue()
        for k in range(processes):
            gpus.put(k % max(1, torch.cuda.device_count()))
        with ProcessPoolExecutor(processes, context, start, (gpus,)) as pool:
            draw(pool, {job.task for job in left} | set(report.SPEED_TASKS if speed_left else ()), size, Path(folder))
            if speed_left:
                rows = pool.submit(measure_speed, size, Path(folder), args.toy).result()
                write(out / "speed.json", {**facts(args.toy), "rows": rows})
            return train_all(pool, left, size, Path(folder), out, processes, end, facts(args.toy))


def draw(pool: ProcessPoolExecutor, tasks: Iterable[str], size: plan.Size, folder: Path) -> None:
    """Draw the scenes of all tasks into files."""
    parts = {
        (task, split): [
            pool.submit(make, task, range(first, min(first + CHUNK, count)), size.side, split)
            for first in range(0, count, CHUNK)
        ]
        for task in sorted(tasks)
        for split, count in enumerate((size.images, size.test_images))
    }
    for (task, split), drawn in tqdm(parts.items(), desc="scenes"):
        arrays = [np.concatenate(each) for each in zip(*(part.result() for part in drawn), strict=True)]
        np.savez(folder / f"{task}-{split}.npz", **Scenes(*arrays)._asdict())


def load(task: str, folder: Path) -> tuple[Scenes, Scenes]:
    """The scenes to train on and to judge by."""
    first, second = (Scenes(**np.load(folder / f"{task}-{split}.npz")) for split in (0, 1))
    return first, second


def start(gpus: Any) -> None:
    """Make a process ready: one thread, one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus.get())
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def run(job: plan.Job, size: plan.Size, folder: Path) -> dict[str, Any]:
    """Train, in a process of its own."""
    from bench.detectors.training import train  # noqa: PLC0415 - Ultralytics reads the environment that `start` sets

    try:
        return train(job, size, load(job.task, folder), "0" if torch.cuda.is_available() else "cpu")
    except Exception:
        return {"error": traceback.format_exc()}


def measure_speed(size: plan.Size, folder: Path, toy: bool) -> list[dict[str, Any]]:
    """Time the steps, in a process of its own."""
    from bench.detectors.speed import measure  # noqa: PLC0415

    scenes = {task: load(task, folder) for task in report.SPEED_TASKS}
    device = "0" if torch.cuda.is_available() else "cpu"
    return measure(scenes, size, device, (4,) if toy else (64, 256), rounds=1 if toy else 4, steps=1 if toy else 5)


def train_all(
    pool: ProcessPoolExecutor,
    jobs: list[plan.Job],
    size: plan.Size,
    folder: Path,
    out: Path,
    processes: int,
    end: float,
    head: dict[str, Any],
) -> int:
    """Hand out the trainings, write what they find, and return how many failed."""
    waiting, running, failed, slowest = list(jobs), dict[Future[Any], plan.Job](), 0, 0.0
    with tqdm(total=len(jobs), desc="trainings") as progress:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                if slowest and time.perf_counter() + slowest * job.epochs > end:
                    continue
                running[pool.submit(run, job, size, folder)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, found = running.pop(future), future.result()
                progress.update()
                if "error" in found:
                    failed += 1
                    progress.write(f"{job.name} failed\n{found['error']}")
                    continue
                write(out / f"{job.name}.json", {**found, **head})
                slowest = max(slowest, found["seconds"] / job.epochs) if job.epochs > 2 else slowest
                left = sum(found["seconds"] / job.epochs * each.epochs for each in waiting) / processes
                progress.write(f"{report.line(found)}   about {left / 60:.1f} min left")
    return failed


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace the file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def facts(toy: bool) -> dict[str, Any]:
    """What a result must say about where it comes from."""
    installed = {each.name.lower(): each.version for each in metadata.distributions()}
    versions = {name: installed.get(name, "not installed") for name in VERSIONS}
    return {
        "command": "python -m bench.detectors" + (" --toy" if toy else ""),
        "machine": hardware(),
        "versions": {"python": platform.python_version(), **versions},
    }


def hardware() -> str:
    """The GPU, or the CPU."""
    gpu = f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, " if torch.cuda.is_available() else "no GPU, "
    return f"{gpu}{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
