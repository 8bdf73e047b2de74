"""The processes of bench/detectors: crashes, kills, the end of the time, and jobs that want a device for themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.detectors.workers import Crew

ROOT = Path(__file__).parents[2]
LONG = 600.0


def prepare():
    """Leaves word that it was called, and may fail: the jobs tell why."""
    os.environ["PREPARED"] = "yes"
    raise ImportError("nothing of the kind")


def act(job, tell):
    """What a job's words say; returns the device, and when it was done."""
    begin, pid = time.monotonic(), os.getpid()
    for word in job.split():
        if word == "raise":
            raise ValueError("no such loss")
        if word == "die":
            os.kill(pid, signal.SIGKILL)
        if word.startswith("sleep"):
            time.sleep(float(word.removeprefix("sleep")))
        if word == "tell":
            tell((1, 0.5))
        if word.startswith("once:"):
            mark = Path(word.removeprefix("once:"))
            if not mark.exists():
                mark.touch()
                os.kill(pid, signal.SIGKILL)
    assert os.environ.get("PREPARED") == "yes"
    return {"device": os.environ.get("CUDA_VISIBLE_DEVICES"), "begin": begin, "end": time.monotonic(), "pid": pid}


def run(jobs, devices, *, seconds=lambda _: 0.0, last=LONG, alone="alone"):
    """All that was heard, by job, and what was left."""
    heard = {}
    with Crew(devices, act, prepare) as crew:
        left = crew.run(
            jobs,
            end=time.monotonic() + last,
            seconds=seconds,
            alone=lambda job: job.startswith(alone),
            heard=lambda _, job, kind, content: heard.setdefault(job, []).append((kind, content)),
            pause=0.2,
        )
    return heard, left


def kinds(heard, job):
    return [kind for kind, _ in heard[job]]


def test_crashes_and_kills_cost_their_own_job_alone(tmp_path):
    """Each job after one of them is done, by a process of its own; a kill is tried once more, an exception is not."""
    again = f"once:{tmp_path / 'mark'}"
    heard, left = run(["raise", "die", again, "tell first", "second", "third"], ["0"])
    assert not left
    assert kinds(heard, "raise") == ["failed"]
    assert "ValueError: no such loss" in heard["raise"][0][1]
    assert kinds(heard, "die") == ["died", "died"]
    assert "-9" in heard["die"][0][1]
    assert kinds(heard, again) == ["died", "done"]
    assert heard["tell first"] == [("told", (1, 0.5)), heard["tell first"][1]]
    done = [heard[job][-1][1] for job in ("tell first", "second", "third")]
    assert len({each["pid"] for each in done}) == 1


def test_every_device_gets_jobs_and_one_that_wants_to_be_alone_is():
    jobs = ["alone sleep1", *(f"sleep0.4 {k}" for k in range(6))]
    heard, left = run(jobs, ["3", "3", "5", "5"])
    assert not left
    done = {job: heard[job][-1][1] for job in jobs}
    assert {each["device"] for each in done.values()} == {"3", "5"}
    single = done.pop("alone sleep1")
    beside = [each for each in done.values() if each["device"] == single["device"]]
    assert all(each["begin"] >= single["end"] for each in beside)
    assert any(each["begin"] < single["end"] for each in done.values())


def test_nothing_is_begun_that_cannot_end_and_nothing_goes_on_after_the_end():
    expected = {"long": 50.0, "short": 0.0, "sleep60": 0.0}
    begin = time.monotonic()
    heard, left = run(list(expected), ["0"], seconds=expected.__getitem__, last=8.0)
    assert time.monotonic() - begin < 20
    assert left == ["sleep60", "long"]
    assert kinds(heard, "short") == ["done"]
    assert "long" not in heard


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent(tmp_path, sign):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from bench.detectors.workers import Crew
            from tests.bench.test_detectors_workers import act, prepare, run
            if __name__ == "__main__":
                crew = Crew(["0", "1"], act, prepare)
                for worker in crew.workers:
                    worker.give("tell sleep60")
                for worker in crew.workers:
                    worker.hear()  # so it has begun
                    print(worker.process.pid, flush=True)
                worker.hear()
        """),
        encoding="utf-8",
    )
    command, environment = [sys.executable, script], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        children = [int(parent.stdout.readline()) for _ in range(2)]
        os.kill(parent.pid, sign)
    for _ in range(100):
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(alive)
