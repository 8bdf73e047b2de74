"""Train Ultralytics detectors with its own losses and with ours, and write tables and a figure of what came out.

    python -m bench.detectors                              on all GPUs; goes on where it was stopped
    python -m bench.detectors --seconds 500                the same, and ends before that
    python -m bench.detectors --toy --out /tmp/detectors   a minute on two CPU cores, to see that it runs
    python -m bench.detectors --report                     only tables and figure, of what is there

Each finished training is a file of its own in --out at once, and is not done again. The most important ones come first
(see plan.py), so that the bench can be stopped at any time, by a signal too. A training that fails leaves its traceback
in a file NAME.failed.txt, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import triton_mgiou
from bench.arguments import need_packages, not_negative, positive
from bench.detectors import plan, report
from bench.detectors.plan import Job, Size
from bench.detectors.scenes import BOXES, Scenes, make
from bench.detectors.workers import CONTEXT, Crew, Tell, Worker
from bench.machine import machine

NEEDED = ("ultralytics", "torchvision", "shapely", "sklearn", "skimage", "cv2", "matplotlib")
VERSIONS = ("torch", "triton", "torchvision", "ultralytics", "shapely", "numpy", "scikit-learn", "scikit-image")
OWN = Path("bench/results/detectors")
PAGES = (Path("bench/detectors/README.md"), Path("bench/convergence/README.md"))
EACH = 6  # trainings at a time on a GPU: one alone waits for its own launches most of the time
EPOCH = {"cuda": 6.0, "cpu": 2.0}  # seconds, where nothing is known yet
START = {"cuda": 20.0, "cpu": 3.0}  # of a training before its first epoch and after its last
SPEED = {"cuda": 90.0, "cpu": 20.0}  # the step times
SPARE = 1.15  # of what a training is expected to take
LAST = 10.0  # for tables and figure
CHUNK = 60  # images that one process draws
EVERY = 15.0  # seconds between two lines on how it gets on


class Setup(NamedTuple):
    """What every training has to know."""

    size: Size
    scenes: Path  # where they lie
    out: Path
    toy: bool
    device: str  # "cuda" or "cpu"
    about: dict[str, Any]  # machine, versions and command, for each file


def main() -> int:
    """Run what is not in the folder yet."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the results, continued if it exists (default: {OWN})")
    parser.add_argument("--toy", action="store_true", help="a few images, an epoch or two: to see that it runs")
    parser.add_argument(
        "--processes", type=positive, help=f"trainings at a time (default: {EACH} a GPU, or one a core)"
    )
    parser.add_argument("--seconds", type=not_negative, default=math.inf, help="start no training that would end later")
    parser.add_argument("--only", default="", help="only trainings whose file's name has this in it")
    parser.add_argument("--report", action="store_true", help="train nothing, write tables and figure of what is there")
    args = parser.parse_args()
    if args.toy and not args.out:
        parser.error("--toy needs --out, so that its results do not lie among the real ones")
    need_packages(parser, "bench.detectors", NEEDED[-1 if args.report else 0 :])
    out, size = args.out or OWN, plan.TOY if args.toy else plan.FULL
    if args.report and not out.is_dir():
        parser.error(f"--report: there is no folder {out}")
    jobs = [job for job in plan.jobs(size) if args.only in job.name]
    if not jobs:
        parser.error(f"--only: no training's file has {args.only!r} in its name, as {plan.jobs(size)[-1].name} has")
    if not args.report and (others := of_the_other_size(out, args.toy)):
        parser.error(f"{out} has results {'without' if args.toy else 'of'} --toy, such as {others[0]}: another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {out}: {error.strerror}")
    failed = False if args.report else not train_missing(jobs, size, out, args, begin)
    report.write(out, PAGES if out == OWN else ())
    say(f"written: {out}")
    return int(failed)


def of_the_other_size(out: Path, toy: bool) -> list[str]:
    """The results in a folder that are not of this size, and would be taken for it."""
    paths = (out / f"{job.name}.json" for job in plan.jobs(plan.FULL))
    commands = {path.name: json.loads(path.read_text(encoding="utf-8"))["command"] for path in paths if path.exists()}
    return [name for name, command in commands.items() if ("--toy" in command.split()) != toy]


def train_missing(jobs: list[Job], size: Size, out: Path, args: argparse.Namespace, begin: float) -> bool:
    """Do what is not in the folder yet; return whether nothing of it failed."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "OMP_NUM_THREADS": "1"}  # of all processes
    importlib.import_module("ultralytics")  # makes its folder of settings, once and not in all processes together
    left = [job for job in jobs if not (out / f"{job.name}.json").exists()]
    if not left:
        say(f"{len(jobs)} trainings, all done before")
        return True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the scenes are cleaned up
    devices = find_devices()
    cores = os.cpu_count() or 1
    processes = args.processes or (cores if devices == ["cpu"] else min(EACH * len(devices), cores))
    with tempfile.TemporaryDirectory(prefix="detectors-") as folder:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        setup = Setup(size, Path(folder), out, args.toy, kind, facts(args.toy, kind))
        progress = Progress(setup, jobs, left, processes, begin, begin + args.seconds - LAST)
        progress.begin(devices)
        crew_of = [devices[k % len(devices)] for k in range(processes)]
        with Crew(crew_of, partial(work, setup=setup), partial(prepare, kind)) as crew:
            # Its processes import what they need while the scenes are drawn.
            draw(plan.tasks(left, size), size, setup.scenes)
            progress.say("scenes drawn")
            progress.missed = crew.run(
                left, end=progress.end, seconds=progress.seconds, alone=plan.SPEED.__eq__, heard=progress.heard
            )
        return progress.finish()


def find_devices() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` has to be for each GPU, or "cpu"."""
    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given or [str(k) for k in range(count)])[:count] or ["cpu"]


def draw(tasks: Mapping[str, int], size: Size, folder: Path) -> None:
    """Draw the scenes of all tasks into files, as many to judge by as each needs."""
    with ProcessPoolExecutor(os.cpu_count() or 1, CONTEXT) as pool:
        parts = {
            (task, split): [
                pool.submit(make, task, range(first, min(first + CHUNK, count)), size.side, split)
                for first in range(0, count, CHUNK)
            ]
            for task, test_images in sorted(tasks.items())
            for split, count in enumerate((size.images, test_images))
        }
        try:
            for (task, split), drawn in parts.items():
                scenes = [part.result() for part in drawn]
                for name in Scenes._fields:
                    np.save(place(folder, task, split, name), np.concatenate([getattr(each, name) for each in scenes]))
        finally:
            pool.shutdown(cancel_futures=True)  # what is left to draw where the bench is stopped


def load(task: str, folder: Path) -> tuple[Scenes, Scenes]:
    """The scenes to train on and to judge by; all processes share their memory."""
    first, second = (
        Scenes(*(np.load(place(folder, task, split, name), mmap_mode="c") for name in Scenes._fields))
        for split in (0, 1)
    )
    return first, second


def place(folder: Path, task: str, split: int, name: str) -> Path:
    """The file of a part of the scenes."""
    return folder / f"{task}-{split}-{name}.npy"


def prepare(kind: str) -> None:
    """Import what a training needs, and wake the GPU."""
    importlib.import_module("bench.detectors.speed")
    torch.zeros(1, device=kind)


def work(job: Job, tell: Tell, *, setup: Setup) -> dict[str, Any]:
    """Train, or time the steps, in a process of its own, and write the file."""
    from bench.detectors.speed import measure  # noqa: PLC0415 - Ultralytics reads the environment of the process
    from bench.detectors.training import train  # noqa: PLC0415

    torch.set_num_threads(1)
    device = "0" if setup.device == "cuda" else "cpu"
    if job == plan.SPEED:
        scenes = {task: load(task, setup.scenes) for task in plan.SPEED_LOSSES}
        batches, rounds, steps = ((4,), 1, 1) if setup.toy else ((64, 1024), 40, 2)
        found = {"rows": measure(scenes, setup.size, device, batches, rounds=rounds, steps=steps)}
    else:
        found = train(job, setup.size, load(job.task, setup.scenes), device, tell)
    write(setup.out / f"{job.name}.json", {**found, **setup.about})
    (setup.out / f"{job.name}.failed.txt").unlink(missing_ok=True)
    return found


class Progress:
    """What is known of the trainings while they run: how long they take, what is done, what failed.

    Args:
        setup: What they share.
        jobs: All of them.
        left: Those that are still to be done.
        processes: How many run at a time.
        since: When the bench began, by `time.monotonic`.
        end: When it has to end.
    """

    def __init__(
        self, setup: Setup, jobs: list[Job], left: list[Job], processes: int, since: float, end: float
    ) -> None:
        self.setup, self.jobs, self.left, self.processes = setup, jobs, list(left), processes
        self.since, self.end = since, end
        self.epochs: dict[bool, list[float]] = {False: [], True: []}  # seconds of each, of keypoints and of boxes
        self.running: dict[Job, int] = {}  # and the epoch that they are in
        self.done, self.failed, self.missed = 0, list[str](), list[Job]()
        self.told = 0.0

    def begin(self, devices: list[str]) -> None:
        """Say what there is to do."""
        self.say(
            f"{len(self.jobs)} trainings, {len(self.jobs) - len(self.left)} done before, {self.processes} at a time on "
            f"{len(devices)} x {self.setup.about['device']}, {os.cpu_count()} cores: about {self.minutes():.0f} min"
        )

    def seconds(self, job: Job) -> float:
        """How long a training is expected to take; until an epoch was seen, a guess that is rather long."""
        kind = self.setup.device
        if job == plan.SPEED:
            return SPEED[kind]
        seen = self.epochs[job.task in BOXES] or self.epochs[job.task not in BOXES]
        return SPARE * (START[kind] + job.epochs * (median(seen[-2 * self.processes :]) if seen else self.guess()))

    def guess(self) -> float:
        """Seconds of an epoch, before any was seen."""
        return EPOCH[self.setup.device] / (10 if self.setup.toy else 1)

    def minutes(self) -> float:
        """How long all that is left is expected to take."""
        return sum(map(self.seconds, self.left)) / SPARE / self.processes / 60

    def heard(self, worker: Worker, job: Job | None, kind: str, content: Any) -> None:
        """Note what a worker said, and say what matters."""
        if job is None:
            self.pause()
        elif kind == "told":
            epoch, seconds = content
            self.running[job] = epoch
            if epoch > 1:  # the first one loads and compiles
                self.epochs[job.task in BOXES].append(seconds)
        elif kind == "done":
            self.left.remove(job)
            self.running.pop(job, None)
            self.done += 1
            line = "step times" if job == plan.SPEED else report.line(content)
            self.say(f"{line}  (device {worker.device}; about {self.minutes():.1f} min left)")
        else:
            self.running.pop(job, None)
            self.failed.append(job.name)
            (self.setup.out / f"{job.name}.failed.txt").write_text(f"{content}\n", encoding="utf-8")
            self.say(f"{job.name} failed on device {worker.device}: {content.strip().splitlines()[-1]}")

    def pause(self) -> None:
        """Say from time to time what is running."""
        now = time.monotonic()
        if now - self.told >= EVERY:
            running = ", ".join(f"{job.task} {job.loss} {job.seed}: {epoch}" for job, epoch in self.running.items())
            self.say(f"{self.done} done, about {self.minutes():.1f} min left; epochs of {running or 'none yet'}")

    def finish(self) -> bool:
        """Say what was not done; whether nothing failed in the end."""
        if self.missed:
            self.say(f"no time for {len(self.missed)}: {', '.join(job.name for job in self.missed)}")
        failed = [name for name in dict.fromkeys(self.failed) if not (self.setup.out / f"{name}.json").exists()]
        if failed:
            self.say(f"failed: {', '.join(failed)}")
        return not failed

    def say(self, text: str) -> None:
        """Print a line with the seconds since the beginning."""
        self.told = time.monotonic()
        say(f"[{self.told - self.since:5.0f} s] {text}")


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace the file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def facts(toy: bool, kind: str) -> dict[str, Any]:
    """What a result must say about where it comes from."""
    command = ["python -m bench.detectors", *(["--toy"] if toy else [])]
    versions = {name: installed_version(name) for name in VERSIONS}
    return {**machine(command, torch.device(kind)), "versions": {"triton-mgiou": triton_mgiou.__version__, **versions}}


def installed_version(name: str) -> str:
    """The version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
