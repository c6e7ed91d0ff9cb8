"""Measure what a run has made so far. Each result is measured once and kept in run.json."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from lolcats.evaluation.attention_maps import FILE, measure_attention
from lolcats.evaluation.layers import measure_layers
from lolcats.evaluation.memory import cache_bytes
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.systems import ABLATIONS
from lolcats.inference.generate import generate
from lolcats.modeling.layer import linearized_layers, override
from lolcats.pipeline.job import Job
from lolcats.run import SAMPLE_PROMPT, SAMPLE_WINDOWS
from lolcats.stages.finetune.controls import CONTROLS, control
from lolcats.stages.transfer.stage import layer_errors

LENGTHS = (1024, 8192, 65536)
LOOKED_AT = 8  # validation rows to measure each head's attention on


def measure(job: Job) -> None:
    """Measure everything that the run's directory holds the parts for, and that no earlier attempt measured."""
    run = job.run
    measure_untrained(job)
    if run.stage_done("transfer"):
        measure_transfer(job)
    for name in filter(run.stage_done, CONTROLS):
        run.measure(f"ppl_{name}", partial(_control, job, name))
    if run.stage_done("finetune"):
        measure_student(job)


def measure_untrained(job: Job) -> None:
    """The teacher and the untrained windows; before stage 1, also the errors of untrained layers."""
    run, model, config = job.run, job.models.converted, job.config.attention
    sinks = config.sinks or min(4, config.window_size)
    run.measure("ppl_teacher", lambda: _perplexity(job, model(), "teacher", mode="teacher"))
    if not job.lean:
        run.measure("sample_teacher", lambda: _sample(job, model(), mode="teacher"))
    run.measure("ppl_window", lambda: _perplexity(job, model(), "window only", kind="window", sinks=0))
    run.measure("baseline_sinks", lambda: sinks)
    run.measure("ppl_window_sinks", lambda: _perplexity(job, model(), "window + sinks", kind="window", sinks=sinks))
    if not run.stage_done("transfer"):
        _layer_errors(job, "before")


def measure_transfer(job: Job) -> None:
    """The model with feature maps and without LoRA; also its heads, unless stage 2 changes the feature maps."""
    model = job.models.converted
    job.run.measure("ppl_transfer", lambda: _perplexity(job, model(), "after transfer"))
    _layer_errors(job, "after")
    if job.config.finetune.feature_map_learning_rate == 0:
        measure_heads(job, model, "teacher")


def measure_student(job: Job) -> None:
    """The trained model, complete and with one branch off, its gates, and, unless stage 2 left the maps unchanged, its
    heads."""
    run, model = job.run, job.models.student
    run.measure("ppl_student", lambda: _perplexity(job, model(), "after LoRA"))
    for name, change in ABLATIONS.items() if job.kinds != {"softmax"} else ():
        key = f"ppl_{name.replace('-', '_')}"
        run.measure(key, partial(_branch_off, job, name.replace("-", " "), change))
    run.measure("gamma", lambda: [layer.gamma.tolist() for layer in linearized_layers(model())])
    if not job.lean:
        run.measure("sample_student", lambda: _sample(job, model()))
        run.measure("cache_bytes", lambda: {str(n): cache_bytes(model(), n) for n in LENGTHS})
    measure_heads(job, model, "student")


def measure_heads(job: Job, model: Callable[[], PreTrainedModel], of: str) -> None:
    """Each head's attention unless measured; ``of``: whose queries and keys these are, teacher or student."""
    run, rows = job.run, job.data.validation
    if job.kinds == {"softmax"}:
        return
    run.measure("layers", lambda: measure_layers(model(), zip(*job.validation(LOOKED_AT), strict=False), of))
    if not job.lean:
        run.measure("attention", lambda: measure_attention(model(), rows[0], run.directory / FILE, of))


def _layer_errors(job: Job, when: str) -> None:
    if job.learns:
        job.run.measure(f"layer_errors_{when}", lambda: layer_errors(job.models.converted(), *job.validation()))


def _branch_off(job: Job, label: str, change: dict[str, Any]) -> float:
    return _perplexity(job, job.models.student(), label, **change)


def _control(job: Job, name: str) -> float:
    model = job.models.converted()
    with control(model, name, job.run.directory):
        return _perplexity(job, model, name.replace("_", " + "))


def _perplexity(job: Job, model: PreTrainedModel, label: str, mode: Any = None, **spec: Any) -> float:
    """On the test rows, with the mode or fields of the spec changed for the moment."""
    with override(model, mode=mode, **spec) if mode or spec else nullcontext():
        value = perplexity(model, job.data.test, job.batch, job.data.positions.get("test"))
    job.say(f"  perplexity, {label}: {value:.2f}")
    return value


def _sample(job: Job, model: PreTrainedModel, mode: Any = None) -> str:
    with override(model, mode=mode) if mode else nullcontext():
        tokens = SAMPLE_WINDOWS * job.config.attention.window_size
        return generate(model, job.inputs.tokenizer, SAMPLE_PROMPT, tokens)
