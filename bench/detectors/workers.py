"""Processes that do one job after another on a device, none of which can stop the rest.

A job that raises, and a process that dies, cost that job alone: the process is replaced. A job whose process died
without a word (killed, out of memory) is tried once more. Processes end with the one that started them, however it
ends.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from typing import Any

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]  # has to be picklable
Prepare = Callable[[], None]  # likewise

CONTEXT = get_context("spawn")


class Worker:
    """A process on a device, and the job that it has at present.

    Args:
        device: What `CUDA_VISIBLE_DEVICES` is in that process, or "cpu".
        work: What is done with a job; called with it and with a function that tells the crew how it gets on.
        prepare: Called before the first job.
    """

    def __init__(self, device: str, work: Work, prepare: Prepare) -> None:
        self.device = device
        self.work = work
        self.prepare = prepare
        self.job: Any = None
        self.begin()

    def begin(self) -> None:
        """Start the process, or another one where it ended."""
        self.connection, there = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(there, self.device, self.work, self.prepare), daemon=True)
        self.process.start()
        there.close()  # so that the end of the process is the end of the connection

    def give(self, job: Any) -> None:
        """Let it do a job."""
        self.job = job
        try:
            self.connection.send(job)
        except OSError:  # it died in a pause
            self.connection.close()
            self.begin()
            self.connection.send(job)

    def hear(self) -> tuple[str, Any]:
        """What it says: "told", "done" or "failed", and what; "died" and how."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            kind, content = "died", f"its process ended with code {self.process.exitcode}"
        if kind in {"failed", "died"}:
            self.connection.close()
            self.begin()
        return kind, content

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Crew:
    """Workers that share jobs.

    Args:
        devices: One for each worker, see `Worker`.
        work: See `Worker`.
        prepare: See `Worker`.
    """

    def __init__(self, devices: Sequence[str], work: Work, prepare: Prepare) -> None:
        self.workers = [Worker(device, work, prepare) for device in devices]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def run(
        self,
        jobs: Sequence[Any],
        *,
        end: float,
        seconds: Callable[[Any], float],
        alone: Callable[[Any], bool],
        heard: Callable[[Worker, Any, str, Any], None],
        pause: float = 1.0,
    ) -> list[Any]:
        """Do the jobs, the first ones first.

        Args:
            jobs: To do.
            end: By the clock of `time.monotonic`: no job is begun that would take longer, none goes on after it.
            seconds: How long a job is expected to take; asked for each job before it is begun.
            alone: Whether nothing else may run on the same device beside a job.
            heard: Called with the worker, its job (None in a pause), and what `Worker.hear` returned, or "pause"
                after each pause.
            pause: Seconds to wait for news.

        Returns:
            The jobs that were not begun, or not done by the end.
        """
        waiting, tried_again = list(jobs), list[Any]()
        while True:
            self._hand_out(waiting, end, seconds, alone)
            busy = {worker.connection: worker for worker in self.workers if worker.job is not None}
            left = end - time.monotonic()
            if not busy or left <= 0:
                return [worker.job for worker in busy.values()] + waiting
            for each in connection.wait(list(busy), min(pause, left)):
                worker = busy[each]  # type: ignore[index]
                job = worker.job
                kind, content = worker.hear()
                if kind != "told":
                    worker.job = None
                if kind == "died" and job not in tried_again:
                    tried_again.append(job)
                    waiting.append(job)
                    content += ", and it is tried once more"
                heard(worker, job, kind, content)
            heard(self.workers[0], None, "pause", None)

    def _hand_out(
        self, waiting: list[Any], end: float, seconds: Callable[[Any], float], alone: Callable[[Any], bool]
    ) -> None:
        for worker in self.workers:
            if worker.job is not None:
                continue
            beside = [each.job for each in self.workers if each.device == worker.device and each.job is not None]
            if any(map(alone, beside)):
                continue
            fits = (job for job in waiting if not (alone(job) and beside) and time.monotonic() + seconds(job) <= end)
            if (job := next(fits, None)) is not None:
                waiting.remove(job)
                worker.give(job)


def serve(there: connection.Connection[Any, Any], device: str, work: Work, prepare: Prepare) -> None:
    """Do jobs until there are no more, or until one raises: what it leaves of the device may be of no use."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with suppress(Exception):  # what is wrong will be seen, and told, with the first job
        prepare()
    while True:
        try:
            job = there.recv()
        except EOFError:
            return
        try:
            there.send(("done", work(job, lambda content: there.send(("told", content)))))
        except Exception:
            there.send(("failed", traceback.format_exc()))
            return


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
