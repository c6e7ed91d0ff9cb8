"""Runs a sweep: one base model and one reading of the data for all rows, a line of results.jsonl for each.

OUT/results.jsonl         one row a result; rows that are in it are not run again
OUT/table.md              the same as a table
OUT/NAME-seedN-HASH/      each row's run directory, continued where it stopped
"""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lolcats
from lolcats.config import to_dict
from lolcats.errors import Interrupted, LolcatsError
from lolcats.evaluation.systems import CONTROL_NAMES, STUDENT, TEACHER
from lolcats.files import append_line, read_lines, write_text
from lolcats.inputs import Inputs
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import override
from lolcats.pipeline import Session, device_and_dtype, finish, run_controls, run_finetune, run_transfer, start
from lolcats.run import Run
from lolcats.sweep.measure import Measurement, short_hash, source_identity
from lolcats.sweep.plan import Row, Sweep, plan
from lolcats.sweep.table import HELD_OUT, LINEAR_OFF, WINDOW_SINKS, render
from lolcats.training.controls import control

RESULTS, TABLE = "results.jsonl", "table.md"


@dataclass
class Setup:
    """What all rows of a sweep share."""

    sweep: Sweep
    inputs: Inputs
    measurement: Measurement
    out: Path
    provenance: dict[str, Any]
    say: Callable[[str], None]


def run_sweep(
    sweep: Sweep, out: Path, command: str, say: Callable[[str], None], deadline: float | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Run what is not yet in OUT/results.jsonl, and write OUT/table.md after each row; all results.

    Args:
        deadline: seconds after which no new row is begun.

    Raises:
        LolcatsError: missing paths, before anything is trained; rows that failed, after all others are done.
    """
    started, rows = time.monotonic(), plan(sweep)
    _check_paths(sweep, rows)
    inputs = Inputs(sweep.base.model, keep=True, trust=rows[0].config.trust_remote_code)
    out.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        sweep, inputs, Measurement(sweep.evaluate, inputs, rows[0].config, say), out, _provenance(command), say
    )
    results = [json.loads(line) for line in read_lines(out / RESULTS)]
    jobs = [(_reference_key(setup, rows[0]), "the untrained models", partial(_references, setup, rows[0]))]
    jobs += [(_keys(setup, row), f"{row.name}, seed {row.config.seed}", partial(_result, setup, row)) for row in rows]
    left = [job for job in jobs if not any(_is(result, job[0]) for result in results)]
    failed: list[str] = []
    say(f"{len(jobs) - len(left)} of {len(jobs)} results are in {out / RESULTS}.")
    for number, (keys, name, job) in enumerate(left):
        if deadline is not None and time.monotonic() - started > deadline:
            say(f"Deadline: {len(left) - number} rows are left; the same command continues.")
            break
        say(f"\n[{number + 1}/{len(left)}] {name}")
        try:
            result = {**keys, **job(), **setup.provenance}
        except Interrupted:
            raise
        except (LolcatsError, torch.OutOfMemoryError) as error:  # a diverging row must not stop the others
            say(f"{name} failed: {error}")
            failed.append(name)
            _release()
            continue
        append_line(out / RESULTS, json.dumps(result))
        results.append(result)
        write_text(out / TABLE, render(sweep.title, results, command))
    if failed:
        raise LolcatsError(f"{len(failed)} rows failed, the others are in {out / TABLE}: {'; '.join(failed)}.")
    return results


def _is(result: dict[str, Any], keys: dict[str, Any]) -> bool:
    return all(result.get(name) == value for name, value in keys.items())


def _keys(setup: Setup, row: Row) -> dict[str, Any]:
    """What tells a result: the run (base, data, configuration), and what was measured of it."""
    config = {k: v for k, v in to_dict(row.config).items() if k not in ("controls", "device", "report_to")}
    data = source_identity(_source(setup.sweep, row))
    run = short_hash([setup.inputs.base.fingerprint, data, config])
    return {"row": run, "name": row.name, "controls": row.config.controls, "evaluation": setup.measurement.key}


def _reference_key(setup: Setup, row: Row) -> dict[str, Any]:
    own = short_hash([setup.inputs.base.fingerprint, to_dict(row.config.attention), row.config.dtype])
    return {"row": own, "name": "", "evaluation": setup.measurement.key}


def _references(setup: Setup, row: Row) -> dict[str, Any]:
    """Teacher and untrained window with sinks, which no row's training changes, on files and tasks."""
    device, dtype = device_and_dtype(row.config)
    started, model = time.time(), convert(setup.inputs.model(dtype, device), row.config)
    sinks = row.config.attention.sinks or 4
    found = {}
    for name, change in ((TEACHER, {"mode": "teacher"}), (WINDOW_SINKS, {"kind": "window", "sinks": sinks})):
        with override(model, **change):  # type: ignore[arg-type]
            found[name] = setup.measurement.everything(model)
    return {"systems": found, "seconds": {"evaluation": round(time.time() - started, 1)}}


def _result(setup: Setup, row: Row) -> dict[str, Any]:
    """Train and measure one row in its own directory."""
    source = _source(setup.sweep, row)
    directory = setup.out / f"{row.slug}-seed{row.config.seed}-{_keys(setup, row)['row']}"
    session = start(setup.inputs, source, directory, row.config, setup.say)
    run = session.run
    run_transfer(session)
    run_controls(session)
    for baseline, name in CONTROL_NAMES.items():
        if run.stage_done(name):
            with control(session.model, name, directory):
                _measure(setup, session, baseline)
    run_finetune(session)
    _measure(setup, session, STUDENT)
    if row.config.attention.kind == "hybrid":
        with override(session.model, kind="window"):
            _measure(setup, session, LINEAR_OFF, tasks=False)
    finish(session, merge=False, pictures=False)
    result = _summary(setup, row, run)
    del session
    _release()
    return result


def _release() -> None:
    """Free the memory of a finished row."""
    gc.collect()  # the trainers hold their model in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(setup: Setup, session: Session, system: str, tasks: bool = True) -> None:
    """Kept in the run's record: a sweep killed while it measures does not begin again."""
    measure = setup.measurement.everything if tasks else setup.measurement.perplexities
    started = time.time()

    def timed() -> dict[str, Any]:
        return {"found": measure(session.model), "seconds": round(time.time() - started, 1)}

    session.run.measure(_entry(setup, system), timed)


def _entry(setup: Setup, system: str) -> str:
    return f"sweep {setup.measurement.key} {system}"


def _summary(setup: Setup, row: Row, run: Run) -> dict[str, Any]:
    results, stages, length = run.results, run.record["stages"], row.config.data.sequence_length
    held_out = {TEACHER: "ppl_teacher", WINDOW_SINKS: "ppl_window_sinks", STUDENT: "ppl_student"}
    held_out |= {LINEAR_OFF: "ppl_linear_off"} | {name: f"ppl_{own}" for name, own in CONTROL_NAMES.items()}
    systems: dict[str, Any] = {}
    for name, key in held_out.items():
        if key in results and not (name == LINEAR_OFF and row.config.attention.kind != "hybrid"):
            more = results.get(_entry(setup, name), {"found": {}})["found"]
            systems[name] = {HELD_OUT: {"value": results[key], "stderr": None}, **more}
    tokens = {
        stage: stages[stage].get("steps", 0) * getattr(row.config, stage).batch_size * length
        for stage in ("transfer", "finetune")
    }
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    measured = [value["seconds"] for name, value in results.items() if name.startswith(_entry(setup, ""))]
    errors = results.get("layer_errors_after", []) if tokens["transfer"] else []
    return {
        "seed": row.config.seed, "settings": row.settings, "directory": run.directory.name, "data": row.data,
        "systems": systems, "tokens": tokens, "seconds": {**seconds, "evaluation": round(sum(measured), 1)},
        "layer_error": sum(errors) / len(errors) if errors else None,
    }  # fmt: skip


def _source(sweep: Sweep, row: Row) -> str:
    return sweep.base.sources[row.data] if row.data else sweep.base.data


def _check_paths(sweep: Sweep, rows: list[Row]) -> None:
    if not sweep.base.model:
        raise LolcatsError("The sweep has no base model: lolcats sweep FILE MODEL, or --set base.model=MODEL.")
    for row in rows:
        if not _source(sweep, row):
            how = f"--set base.sources.{row.data}=DATA" if row.data else "--data DATA"
            raise LolcatsError(f"Row {row.name!r} has no data: give {how}.")


def _provenance(command: str) -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(describe, cwd=Path(lolcats.__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip(), "date": str(date.today()), "hardware": hardware(), "command": command,
        "versions": {"lolcats": lolcats.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def hardware() -> str:
    """The GPU, or the processor and the threads that torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
