"""Train and measure one row of a sweep in its own directory. Rows with an equal stage 1 train it only once."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from transformers import PreTrainedModel

from lolcats.compared import (
    CONTROLS,
    LINEAR_OFF,
    STUDENT,
    TEACHER,
    TRANSFERRED,
    WINDOW_SINKS,
    WINDOWS,
    Compared,
    baseline_sinks,
)
from lolcats.config import Config, identity_of
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import cache_bytes
from lolcats.files import locked, read_json_lines, write_text
from lolcats.lab.sweep.measure import PERPLEXITIES, Measured, Measurement, short_hash, source_identity
from lolcats.lab.sweep.plan import Row, Sweep
from lolcats.lab.sweep.table import HELD_OUT
from lolcats.modeling.checkpoint import FEATURE_MAPS, load_feature_maps
from lolcats.modeling.convert import convert
from lolcats.pipeline import Job, device_and_dtype, keep_longest, measure, run_finetune, run_transfer, start
from lolcats.run import RECORD, Run

LOCKS = "locks"
STAGE_1 = "stage-1.safetensors"
"""In a run directory: a copy of the feature maps that stage 1 left, where stage 2 trains them on."""
BYTES_AT = (8192, 32768)
MEASURED_IN_4_BITS = "student in 4 bits"  # earlier versions measured such rows with their LoRA merged into the base
WINDOW_FOR_SOFTMAX = "window"  # earlier versions measured the teacher where the first row is of kind softmax
LATER: dict[tuple[str, str], list[Any]] = {
    ("attention", "feature_inputs"): ["rotated"], ("attention", "softmax_heads"): [{}],
    ("attention", "softmax_budget"): [0.0],
    ("finetune", "sharding"): ["auto", "always", "never"],
    ("data", "loss"): ["all"], ("finetune", "loss"): ["cross_entropy"], ("finetune", "kl_weight"): [0.5],
    ("finetune", "kl_temperature"): [1.0], ("finetune", "protect_kept"): [False],
    ("finetune", "compile"): [False], ("transfer", "cuda_graph"): [True, False, "auto"],
    ("finetune", "cuda_graph"): [True, False, "auto"],
}  # fmt: skip
"""Settings newer than committed results; keys leave them out at these values, which change nothing."""
OF_TRANSFER = ("layer_errors_before", "layer_errors_after", TRANSFERRED.result)


@dataclass
class Setup:
    """Shared by all rows of a sweep."""

    sweep: Sweep
    inputs: Inputs
    measurement: Measurement
    out: Path
    provenance: dict[str, Any]
    say: Callable[[str], None]
    evaluation: str = ""
    """The key of what is measured, in results and in the records of runs."""
    untrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Perplexities of untrained models, by a description of their attention."""
    identities: dict[str, str] = field(default_factory=dict)
    """Content identities of data sources, by source."""


def run_key(setup: Setup, row: Row) -> str:
    """A hash that identifies a run by base model, data and configuration."""
    config = _without(row.config, "controls", "device", "report_to")
    in_4_bits = row.config.finetune.quantize_base != "none" and row.tokens("finetune") != 0
    measured = [MEASURED_IN_4_BITS] if in_4_bits else []
    data = source(setup.sweep, row)
    if data not in setup.identities:
        setup.identities[data] = source_identity(data)
    return short_hash([setup.inputs.base.fingerprint, setup.identities[data], config, *measured])


def _without(config: Config, *names: str) -> dict[str, Any]:
    """A configuration without the named settings, and without settings in LATER at values that change nothing."""
    found = {name: value for name, value in identity_of(config).items() if name not in names}
    for (section, name), harmless in LATER.items():
        if found.get(section, {}).get(name) in harmless:
            del found[section][name]
    return found


def source(sweep: Sweep, row: Row) -> str:
    return sweep.base.sources[row.data] if row.data else sweep.base.data


def untrained_key(setup: Setup, row: Row, system: Compared) -> str:
    """A hash that identifies the teacher, or the untrained window with sinks of a row, without its kept heads."""
    own = row.config.attention
    window: list[Any] = []
    if system is WINDOW_SINKS:
        marked = [WINDOW_FOR_SOFTMAX] if own.kind == "softmax" else []
        window = [own.window, own.window_size, baseline_sinks(own), own.layers, *marked]
    return short_hash([setup.inputs.base.fingerprint, system.in_sweeps, window, row.config.dtype])


def untrained_result(setup: Setup, row: Row, system: Compared) -> dict[str, Any]:
    """Measure the teacher, or the untrained window with sinks and without kept heads, on files and tasks."""
    device, dtype = device_and_dtype(row.config)
    plain = replace(row.config.attention, kind="window", softmax_heads={}, softmax_budget=0.0)
    started, model = monotonic(), convert(setup.inputs.model(dtype, device), plain)
    with system.on(model):
        found = setup.measurement.everything(model)
    del model
    release()
    return {"systems": {system.in_sweeps: found}, "seconds": {"evaluation": round(monotonic() - started, 1)}}


def row_result(setup: Setup, row: Row) -> dict[str, Any]:
    """Train and measure one row in its own directory."""
    started = monotonic()
    directory = setup.out / f"{row.slug}-seed{row.config.seed}-{run_key(setup, row)}"
    job = start(setup.inputs, source(setup.sweep, row), directory, row.config, setup.say, lean=True)
    if not job.in_turn:
        measure(job)
        job = keep_longest(job)
    _measure_untrained(setup, job)
    with locked(setup.out / LOCKS / f"transfer-{_transfer_key(job.run)}"):
        train_or_take_transfer(job, setup.out)
        measure(job)
    _measure_untrained(setup, job)
    run_finetune(job)
    model = job.models.student()
    _measure(setup, job.run, model, STUDENT)
    if row.config.attention.kind == "hybrid":
        with LINEAR_OFF.on(model):
            _measure(setup, job.run, model, LINEAR_OFF, tasks=False)
    measure(job)
    result = _summary(setup, row, job.run)
    result["bytes"] = {str(tokens): cache_bytes(model, tokens) for tokens in BYTES_AT}  # (teacher, student)
    del job, model
    release()
    result["seconds"]["all"] = round(monotonic() - started, 1)
    return result


def release() -> None:
    """Free the memory of a finished row."""
    gc.collect()  # the trainers hold their model in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_or_take_transfer(job: Job, out: Path) -> None:
    """Stage 1 unless done, with a copy of its feature maps for other runs if stage 2 is to train them on."""
    done = job.run.stage_done("transfer")
    take_transfer(job, out)
    run_transfer(job)
    if not done and job.config.finetune.feature_map_learning_rate > 0:
        part = job.run.directory / f"{STAGE_1}.part"
        shutil.copy(job.run.directory / FEATURE_MAPS, part)
        part.replace(job.run.directory / STAGE_1)


def take_transfer(job: Job, out: Path) -> None:
    """Copy stage 1 from another run in ``out`` that trained the same, if this run has not trained it yet."""
    run = job.run
    if run.stage_done("transfer") or job.config.transfer.max_steps == 0 or job.in_turn:
        return
    done = (other for other in _runs(out) if other.stage_done("transfer") and _same_transfer(other, run))
    other = next((other for other in done if _maps_of_transfer(other).is_file()), None)
    if other is None:
        return
    job.say(f"Taking stage 1 from {other.directory.name}")
    shutil.copy(_maps_of_transfer(other), run.directory / FEATURE_MAPS)
    entries = [
        entry for entry in read_json_lines(other.directory / "metrics.jsonl") if entry.get("stage") == "transfer"
    ]
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    run.record["results"] |= {name: other.results[name] for name in OF_TRANSFER if name in other.results}
    run.finish_stage("transfer", {"from": other.directory.name, **other.record["stages"]["transfer"]})
    load_feature_maps(job.models.converted(), run.directory / FEATURE_MAPS)


def _transfer_key(run: Run) -> str:
    """A hash of everything that the feature maps of a run depend on."""
    config = _without(run.config, "finetune", "controls", "device", "report_to")
    return short_hash([run.base.fingerprint, run.record["data"]["fingerprint"], config])


def _runs(out: Path) -> Iterator[Run]:
    """The runs in ``out`` whose record can be read."""
    for record in sorted(out.glob(f"*/{RECORD}")):
        with suppress(LolcatsError):
            yield Run.open(record.parent)


def _same_transfer(other: Run, run: Run) -> bool:
    try:
        key = _transfer_key(other)
    except LolcatsError:  # it has a setting that was removed
        return False
    return key == _transfer_key(run)


def _maps_of_transfer(run: Run) -> Path:
    """Where a run's feature maps are as stage 1 left them; earlier versions kept none that stage 2 trained on."""
    return run.directory / (FEATURE_MAPS if run.config.finetune.feature_map_learning_rate == 0 else STAGE_1)


def _measure_untrained(setup: Setup, job: Job) -> None:
    """Perplexities of the row's untrained window, with and without sinks, once the whole model is in memory; measured
    once per sweep."""
    if not job.in_turn and job.config.attention.kind in ("hybrid", "linear"):
        for system in WINDOWS:
            job.run.measure(_name(setup, system, PERPLEXITIES), partial(_untrained, setup, job, system))


def _untrained(setup: Setup, job: Job, system: Compared) -> dict[str, Any]:
    attention = job.config.attention
    changes, layers = system.changes(attention), sorted(attention.layers.items())
    heads = sorted(attention.softmax_heads.items())
    weights = [job.config.dtype, job.config.device, job.models.in_4_bits]
    key = repr([attention.window, attention.window_size, changes, layers, heads, *weights])
    if key in setup.untrained:
        return {**setup.untrained[key], "seconds": 0.0}
    model = job.models.converted()
    with system.on(model):
        setup.untrained[key] = _timed(setup.measurement.perplexities, model)
    return setup.untrained[key]


def _measure(setup: Setup, run: Run, model: PreTrainedModel, system: Compared, tasks: bool = True) -> None:
    """Measure part by part and save each in the run's record, so that a killed sweep continues with the next part."""
    for part, function in setup.measurement.parts().items():
        if tasks or part == PERPLEXITIES:
            run.measure(_name(setup, system, part), partial(_timed, function, model))


def _timed(measure: Callable[[Any], Measured], model: Any) -> dict[str, Any]:
    started = monotonic()
    return {"found": measure(model), "seconds": round(monotonic() - started, 1)}


def _prefix(setup: Setup) -> str:
    """Prefix of the names of this sweep's measurements in a run's record."""
    return f"sweep {setup.evaluation} "


def _name(setup: Setup, system: Compared, part: str) -> str:
    return f"{_prefix(setup)}{system.in_sweeps}: {part}"


def _found(setup: Setup, results: dict[str, Any], system: Compared) -> Measured:
    prefix = _name(setup, system, "")
    parts = [result["found"] for name, result in results.items() if name.startswith(prefix)]
    return {metric: entry for part in parts for metric, entry in part.items()}


def _summary(setup: Setup, row: Row, run: Run) -> dict[str, Any]:
    results, stages, length = run.results, run.record["stages"], row.config.data.sequence_length
    systems: dict[str, Any] = {}
    attention = run.config.attention
    keeps = bool(attention.softmax_heads or attention.softmax_budget)
    windows = () if attention.kind == "softmax" and {layer["kind"] for layer in run.layers} == {"softmax"} else WINDOWS
    for system in (TEACHER, *windows, STUDENT, *([LINEAR_OFF] if attention.kind == "hybrid" else [])):
        if system.result in results:
            name = system.with_heads if keeps and system in WINDOWS else system.in_sweeps
            held_out = {"value": results[system.result], "stderr": None}
            systems[name] = {HELD_OUT: held_out, **_found(setup, results, system)}
    tokens = {
        stage: stages[stage].get("steps", 0) * getattr(row.config, stage).batch_size * length
        for stage in ("transfer", "finetune")
    }
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    measured = [value["seconds"] for name, value in results.items() if name.startswith(_prefix(setup))]
    errors = results.get("layer_errors_after", []) if tokens["transfer"] else []
    return {
        "seed": row.config.seed, "settings": row.settings, "directory": run.directory.name, "data": row.data,
        "systems": systems, "tokens": tokens, "seconds": {**seconds, "evaluation": round(sum(measured), 1)},
        "transfer_of": stages["transfer"].get("from", ""),
        "layer_error": sum(errors) / len(errors) if errors else None,
        "layer_errors": {when: results.get(f"layer_errors_{when}", []) for when in ("before", "after")},
        "layers": _rounded(results.get("layers", {})),
        "gamma": [_mean(heads) for heads in results.get("gamma", [])],
        "controls": {CONTROLS[name].in_sweeps: run_key(setup, own) for name, own in row.controls.items()},
    }  # fmt: skip


def _mean(values: list[Any]) -> float:
    known = [value for value in values if value is not None]
    return float(sum(known) / len(known))


def _rounded(value: Any) -> Any:
    """Round floats in nested lists and mappings to five digits: a line of results has thousands of them."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
