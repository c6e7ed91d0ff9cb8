"""The benchmarks that need a GPU, one after another on the GPUs of a machine, until a deadline.

    MODEL=... DATA=... python benchmarks/jobs.py --out OUT --minutes 27 [--only REGEX] [--gpus 2] [--file jobs.yaml]

A job (see jobs.yaml) is some bash: how many GPUs it takes, for how many seconds at most, and the jobs it comes after.
Jobs begin in the order of the file as soon as their GPUs are free; a job that takes several waits for them, and no
later job takes them meanwhile. What could not end before the deadline is not begun, nor what comes after a failed job.
A job that runs longer than it may is ended, and so are all when this script is ended. Every job has a log,
OUT/NAME.log, and finds OUT as $OUT and the seconds it may take as $LEFT.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quality_runs import STATUS, say

from lolcats.config import from_dict, read_yaml
from lolcats.errors import LolcatsError

JOBS = Path(__file__).with_suffix(".yaml")
GRACE = 10.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Job:
    """``run`` is bash. to_the_end: it needs these seconds and may go on until the deadline. after: names of jobs that
    must have succeeded. not_beside: names of jobs that must have ended, however they did. Both count only jobs among
    those asked for."""

    run: str = ""
    seconds: float = 600.0
    to_the_end: bool = False
    gpus: int = 1
    after: list[str] = field(default_factory=list)
    not_beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Jobs:
    jobs: dict[str, Job] = field(default_factory=dict)


@dataclass
class Begun:
    """asked: when it was asked to end, if it was."""

    process: subprocess.Popen[bytes]
    gpus: list[str]
    began: float
    end: float
    asked: float | None = None

    def stop(self) -> None:
        """Ask all its processes to end, and end them if they did not within ``GRACE``."""
        late = self.asked is not None and time.time() > self.asked + GRACE
        if self.asked is None or late:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL if late else signal.SIGTERM)
        self.asked = self.asked or time.time()

    @property
    def ended(self) -> bool:
        """Whether no process of it is left."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Machine:
    """Runs jobs on the GPUs of these names and knows what became of each."""

    def __init__(self, jobs: dict[str, Job], gpus: list[str], out: Path, end: float) -> None:
        self.waiting, self.gpus, self.free, self.out, self.end = dict(jobs), gpus, list(gpus), out, end
        self.running: dict[str, Begun] = {}
        self.became: dict[str, str] = {}
        """A line for each job that ended or was not begun."""
        self.succeeded: set[str] = set()
        out.mkdir(parents=True, exist_ok=True)
        if missing := {name: job for name, job in jobs.items() if job.gpus > len(gpus)}:
            self.leave_out(missing, f"not begun: it takes more than {len(gpus)} GPUs")

    def run(self) -> None:
        """Until nothing runs and nothing more can begin."""
        said = time.time()
        try:
            while self.begin() or self.running:
                self.collect()
                if time.time() > said + STATUS:
                    said = time.time()
                    say({self.log(name): begun.process for name, begun in self.running.items()})
                time.sleep(0.2)
        finally:
            self.leave_out(dict(self.waiting), "not begun")
            while self.running:
                for begun in self.running.values():
                    begun.stop()
                time.sleep(0.2)
                self.collect()

    def begin(self) -> bool:
        """Begin what can; whether a job began or was left out."""
        before, reserved = len(self.waiting), False
        for name, job in list(self.waiting.items()):
            gone = [other for other in job.after if other in self.became and other not in self.succeeded]
            if gone:
                self.leave_out({name: job}, f"not begun: it comes after {gone[0]}")
            elif time.time() + job.seconds > self.end:
                self.leave_out({name: job}, "not begun: no time left")
            elif any(other in self.waiting or other in self.running for other in (*job.after, *job.not_beside)):
                continue
            elif job.gpus <= (0 if reserved else len(self.free)):
                self.start(name, self.waiting.pop(name))
            else:
                reserved = True
        return len(self.waiting) < before

    def start(self, name: str, job: Job) -> None:
        mine, self.free = self.free[: job.gpus], self.free[job.gpus :]
        now = time.time()
        end = self.end if job.to_the_end else now + job.seconds
        places = {"OUT": str(self.out), "LEFT": f"{end - now:.0f}", "CUDA_VISIBLE_DEVICES": ",".join(mine)}
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", job.run], env={**os.environ, **places},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.running[name] = Begun(process, mine, now, end)
        print(f"{name} began" + (f" on GPU {', '.join(mine)}" if mine else ""), flush=True)

    def collect(self) -> None:
        """Free the GPUs of jobs that ended; end those that run too long."""
        for name, begun in list(self.running.items()):
            now = time.time()
            if now > begun.end or begun.process.poll() is not None:  # what it started ends with it
                begun.stop()
            if not begun.ended:
                continue
            del self.running[name]
            self.free = [gpu for gpu in self.gpus if gpu in self.free or gpu in begun.gpus]
            code = begun.process.returncode
            how = "ended by its limit" if now > begun.end else "done" if code == 0 else f"failed with {code}"
            self.became[name] = f"{how} after {now - begun.began:.0f} s"
            if code == 0:
                self.succeeded.add(name)
            print(f"{name}: {self.became[name]}", flush=True)

    def leave_out(self, jobs: dict[str, Job], why: str) -> None:
        for name in jobs:
            del self.waiting[name]
            self.became[name] = why
            print(f"{name}: {why}", flush=True)

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"


def read_jobs(path: Path, only: str = "") -> dict[str, Job]:
    """The jobs whose names match ``only``, and of what they come after only what matches, too."""
    jobs = from_dict(Jobs, read_yaml(path.read_text(), str(path))).jobs
    for name, job in jobs.items():
        if unknown := [other for other in (*job.after, *job.not_beside) if other not in jobs]:
            raise LolcatsError(f"{path}: {name} waits for {unknown[0]}, which is not there.")
    return {name: job for name, job in jobs.items() if re.search(only, name)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=JOBS, help="of jobs (default: jobs.yaml)")
    parser.add_argument("--only", default="", help="regular expression of the jobs to run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument("--gpus", type=int, help="how many GPUs to use (default: all)")
    arguments = parser.parse_args(argv)
    count = torch.cuda.device_count() if arguments.gpus is None else arguments.gpus
    known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = (known or [str(number) for number in range(count)])[:count]
    end = time.time() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine = Machine(read_jobs(arguments.file, arguments.only), gpus, arguments.out.resolve(), end)
    try:
        machine.run()
    finally:
        (machine.out / "jobs.txt").write_text("".join(f"{name}: {how}\n" for name, how in machine.became.items()))


if __name__ == "__main__":
    main()
