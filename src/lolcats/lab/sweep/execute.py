"""Run a sweep: load the base model and the data once for all rows, and write a line of results.jsonl per result.

OUT/results.jsonl         one line per result; results in it are not run again, from whichever sweep or machine they are
OUT/table.md              the table of the sweep (SWEEP.md for each of several sweeps)
OUT/NAME-seedN-HASH/      the run directory of each row, continued where it stopped
OUT/locks/                rows that are running, so that several processes of the same command share the rows
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from lolcats.compared import STUDENT, TEACHER, WINDOW_SINKS
from lolcats.data.inputs import Inputs
from lolcats.errors import Interrupted, LolcatsError
from lolcats.files import append_line, check_directory, locked, read_json_lines, write_text
from lolcats.lab.sweep.measure import Measurement, short_hash
from lolcats.lab.sweep.plan import Row, Sweep, plan
from lolcats.lab.sweep.row import LOCKS, Setup, release, row_result, run_key, source, untrained_key, untrained_result
from lolcats.lab.sweep.table import CONTROL, ROW, UNTRAINED, render
from lolcats.version import __version__

RESULTS, TABLE = "results.jsonl", "table.md"
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A result to produce. ``keys`` identify it; ``row`` is the row to train for it, if any."""

    keys: dict[str, Any]
    name: str
    run: Callable[[], Result]
    row: Row | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.row.config.seed}" if self.row else self.name

    @property
    def settings(self) -> list[str]:
        return self.row.settings if self.row else []

    def is_result(self, result: Result) -> bool:
        return all(result.get(key) == value for key, value in self.keys.items())

    def same_run(self, result: Result) -> bool:
        """Whether ``result`` is of the same run, under another name or as another row's control."""
        same = all(result.get(key) == self.keys[key] for key in ("row", "evaluation"))
        return same and self.row is not None and result.get("kind") in (ROW, CONTROL)


def run_sweep(
    sweep: Sweep, out: Path, command: str, say: Callable[[str], None], deadline: float | None = None,
    trust: bool = False,
) -> list[Result]:  # fmt: skip
    """Run one sweep with :func:`run_sweeps` and return its results; rows include the results of their controls."""
    run_sweeps([sweep], out, command, say, deadline, trust)
    setup = _setup(sweep, Shared(out, say, trust), "")
    return _of_sweep(_results(out), list(_jobs(setup, plan(sweep))))


def run_sweeps(
    sweeps: Sequence[Sweep], out: Path, command: str, say: Callable[[str], None], deadline: float | None = None,
    trust: bool = False,
) -> list[Path]:  # fmt: skip
    """Run everything that is not yet in OUT/results.jsonl. Each sweep's table is written again after each row.

    Args:
        deadline: time limit in seconds; rows not expected to finish in time are not started.
        trust: run Python code that comes with base models.

    Returns:
        Paths of the tables.

    Raises:
        LolcatsError: if paths are missing, before any training; if rows failed, after all others are done.
    """
    started = monotonic()
    for sweep in sweeps:
        _check_paths(sweep, plan(sweep))
    check_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    shared, failed, tables = Shared(out, say, trust), list[str](), list[Path]()
    for sweep in sweeps:
        setup = _setup(sweep, shared, command)
        table = out / (TABLE if len(sweeps) == 1 else f"{sweep.name}.md")
        jobs = list(_jobs(setup, plan(sweep)))
        done = sum(any(map(job.is_result, _results(out))) for job in jobs)
        say(f"{sweep.title or sweep.name}: {done} of {len(jobs)} results are in {out / RESULTS}.")
        for job in jobs:
            left = None if deadline is None else deadline - (monotonic() - started)
            if _run_job(setup, job, left, failed):
                _write_table(setup, jobs, table)
        if _write_table(setup, jobs, table):
            tables.append(table)
        missing = len(jobs) - len(_of_sweep(_results(out), jobs))
        if missing > 0:
            say(f"Missing results: {missing}. Run the same command again to continue.")
    if failed:
        raise LolcatsError(f"{len(failed)} rows failed ({'; '.join(failed)}). The results of the others are in {out}.")
    return tables


@dataclass
class Shared:
    """Shared by the sweeps of one command: inputs by base model, and measurements by a hash of what they depend on."""

    out: Path
    say: Callable[[str], None]
    trust: bool = False
    inputs: dict[str, Inputs] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)


def _setup(sweep: Sweep, shared: Shared, command: str) -> Setup:
    rows = plan(sweep)
    config = rows[0].config
    if sweep.base.model not in shared.inputs:
        shared.inputs[sweep.base.model] = Inputs(sweep.base.model, keep=True, trust=shared.trust)
    inputs = shared.inputs[sweep.base.model]
    own = [asdict(config.attention), asdict(config.data), config.dtype, config.device]
    key = short_hash([sweep.base.model, asdict(sweep.evaluate), *own])
    if key not in shared.measurements:
        shared.measurements[key] = Measurement(sweep.evaluate, inputs, config, shared.say)
    setup = Setup(sweep, inputs, shared.measurements[key], shared.out, _provenance(command), shared.say)
    setup.evaluation = _evaluation(setup, rows)
    return setup


def _evaluation(setup: Setup, rows: list[Row]) -> str:
    """The key of what this sweep measures; where an earlier version measured its rows, the key that this had."""
    key, former = setup.measurement.key, setup.measurement.former_key
    alike = {run_key(setup, row) for row in rows if row.config.data == rows[0].config.data}
    found = {result.get("evaluation") for result in _results(setup.out) if result.get("row") in alike}
    if former not in found or key in found:
        return key
    setup.say(
        f"{setup.out / RESULTS} comes from an earlier version, which did not record row length, texts and benchmark "
        "files: they are assumed to be unchanged."
    )
    return former


def _run_job(setup: Setup, job: Job, left: float | None, failed: list[str]) -> bool:
    """Run a job, unless its result exists, another process runs it, or the remaining time (``left``) is too short.

    Returns whether there is a new result. The titles of failed jobs are added to ``failed``.
    """
    path = setup.out / RESULTS
    with locked(setup.out / LOCKS / "-".join(job.keys[key] for key in ("row", "evaluation")), wait=False) as ours:
        results = _results(setup.out)
        if not ours or any(map(job.is_result, results)):
            return False
        for result in filter(job.same_run, results):
            append_line(path, json.dumps({**result, **job.keys, "settings": job.settings}))
            return True
        expected = expected_seconds(job.row, results) if job.row else 0.0
        if left is not None and expected > left:
            setup.say(f"Deadline: {job.title} needs about {expected:.0f} s, only {max(0.0, left):.0f} s are left.")
            return False
        setup.say(f"\n{job.title}")
        try:
            result = job.run()
        except Interrupted:
            raise
        except (LolcatsError, torch.OutOfMemoryError) as error:  # a diverging row must not stop the others
            setup.say(f"{job.name} failed: {error}")
            failed.append(job.title)
            release()
            return False
        append_line(path, json.dumps({**job.keys, **result, **setup.provenance}))
        return True


def expected_seconds(row: Row, results: list[Result]) -> float:
    """Expected time of a row from earlier results: time per token of each stage, plus the time for everything else."""
    known = [r for r in results if r.get("kind") in (ROW, CONTROL) and r.get("hardware") == hardware()]
    if not known:
        return 0.0
    expected, rates = 0.0, dict[str, float]()
    for stage in ("finetune", "transfer"):
        times = [r["seconds"][stage] / r["tokens"][stage] for r in known if r["tokens"][stage]]
        rates[stage] = statistics.median(times) if times else rates.get("finetune", 0.0)
        expected += rates[stage] * (row.tokens(stage) or 0)
    return expected + statistics.median(r["seconds"]["all"] - _training(r) for r in known)


def _training(result: Result) -> float:
    """Seconds that a row spent on its own training."""
    stages = ("finetune",) if result["transfer_of"] else ("transfer", "finetune")
    return sum(result["seconds"].get(stage, 0.0) for stage in stages)


def _jobs(setup: Setup, rows: list[Row]) -> Iterator[Job]:
    """Jobs for the untrained models, then for each row, after those of its controls that no earlier row has."""
    evaluation, first = setup.evaluation, rows[0]
    for system in (TEACHER, WINDOW_SINKS):
        name, key = system.in_sweeps, untrained_key(setup, first, system)
        keys = {"kind": UNTRAINED, "row": key, "name": name, "evaluation": evaluation}
        yield Job(keys, name, partial(untrained_result, setup, first, system))
    seen: set[str] = set()
    for row in rows:
        for name, own in row.controls.items():
            key = run_key(setup, own)
            if name in row.config.controls and key not in seen:
                seen.add(key)
                keys = {"kind": CONTROL, "row": key, "evaluation": evaluation}
                yield Job(keys, own.name, partial(row_result, setup, own), own)
        keys = {"kind": ROW, "row": run_key(setup, row), "evaluation": evaluation, "sweep": setup.sweep.name,
                "name": row.name}  # fmt: skip
        yield Job(keys, row.name, partial(row_result, setup, row), row)


def _results(out: Path) -> list[Result]:
    return read_json_lines(out / RESULTS)


def _of_sweep(results: list[Result], jobs: list[Job]) -> list[Result]:
    """The results of ``jobs`` in their order; rows include the results of their controls."""
    found = [next((r for r in results if job.is_result(r)), None) for job in jobs]
    return with_controls([result for result in found if result is not None], results)


def with_controls(rows: list[Result], results: list[Result]) -> list[Result]:
    """Add to each of ``rows`` the results of its controls, which were trained as separate runs in ``results``."""
    trained = [r for r in results if r.get("kind") in (ROW, CONTROL)]
    students = {(r["row"], r["evaluation"]): r["systems"][STUDENT.in_sweeps] for r in trained}

    def joined(row: Result) -> Result:
        keys = row.get("controls", {}) if row["kind"] == ROW else {}
        own = {name: students.get((key, row["evaluation"])) for name, key in keys.items()}
        return {**row, "systems": {**row["systems"], **{name: found for name, found in own.items() if found}}}

    return [joined(row) for row in rows]


def _write_table(setup: Setup, jobs: list[Job], path: Path) -> bool:
    """Write a sweep's table from the results so far. Returns False if there are none."""
    wanted = _of_sweep(_results(setup.out), jobs)
    if wanted:
        write_text(path, render(setup.sweep.title, wanted, setup.provenance["command"]))
    return bool(wanted)


def _check_paths(sweep: Sweep, rows: list[Row]) -> None:
    if not sweep.base.model:
        raise LolcatsError("The sweep has no base model: use lolcats sweep FILE MODEL or --set base.model=MODEL.")
    for row in rows:
        if not source(sweep, row):
            how = f"--set base.sources.{row.data}=DATA" if row.data else "--data DATA"
            raise LolcatsError(f"Row {row.name!r} has no data: give {how}.")


def _provenance(command: str) -> Result:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip(), "date": str(date.today()), "hardware": hardware(), "command": command,
        "versions": {"lolcats": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def hardware() -> str:
    """The GPU, or the CPU and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
