"""Measure what a run has made so far. Each result is measured once and kept in run.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from lolcats.compared import (
    BRANCHES,
    CONTROLS,
    STUDENT,
    TEACHER,
    TRANSFERRED,
    WINDOW,
    WINDOW_SINKS,
    Compared,
    baseline_sinks,
)
from lolcats.data.prompts import Prompt
from lolcats.errors import LolcatsError
from lolcats.evaluation.attention_maps import FILE, measure_attention
from lolcats.evaluation.layers import measure_layers
from lolcats.evaluation.memory import cache_bytes
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.recall import make_prompts, scores_of, sight
from lolcats.evaluation.recall import measure as measure_recall
from lolcats.inference.generate import generate
from lolcats.modeling.layer import linearized_layers
from lolcats.pipeline.job import Job
from lolcats.pipeline.rows import positions_of
from lolcats.report.table import IN_4_BITS, STUDENT_IN_4_BITS
from lolcats.run import SAMPLE_PROMPT, SAMPLE_WINDOWS, STATE_TOKENS
from lolcats.stages.distributed import is_sharded
from lolcats.stages.finetune.controls import control
from lolcats.stages.transfer.stage import layer_errors

LENGTHS = (1024, 8192, 65536)
LOOKED_AT = 8  # validation rows to measure each head's attention on
RECALL, LONGEST = "needles", 4096  # the kind of prompts, and how long they are at most
ANSWERS = {"cuda": 200, "cpu": 20}
SPARE = 16  # tokens by which the answers of shorter prompts may be longer
BESIDE = (TEACHER, WINDOW_SINKS, STUDENT)  # whose recall and bytes stand beside their perplexity


def measure(job: Job) -> None:
    """Measure everything that the run's directory holds the parts for, and that no earlier attempt measured."""
    run = job.run
    if job.models.in_4_bits:
        run.measure(IN_4_BITS, lambda: True)
    measure_untrained(job)
    if run.stage_done("transfer"):
        measure_transfer(job)
    for name in filter(run.stage_done, CONTROLS):
        run.measure(CONTROLS[name].result, partial(_control, job, name))
    if run.stage_done("finetune"):
        measure_student(job)


def judge(job: Job) -> None:
    """Say so if the run has made something worse than its window and sinks with nothing trained."""
    from lolcats.report.advice import verdict

    if text := verdict(job.run):
        job.say(text)


def measure_untrained(job: Job) -> None:
    """The teacher and the untrained windows; before stage 1, also the errors of untrained layers."""
    run, model = job.run, job.models.converted
    _perplexities(job, model, TEACHER)
    if not job.lean:
        run.measure("sample_teacher", lambda: _sample(job, model(), TEACHER))
    _perplexities(job, model, WINDOW)
    run.measure("baseline_sinks", lambda: baseline_sinks(job.config.attention))
    _perplexities(job, model, WINDOW_SINKS)
    if not run.stage_done("transfer"):
        _layer_errors(job, "before")


def measure_transfer(job: Job) -> None:
    """The model with feature maps and without LoRA; also its heads, unless stage 2 changes the feature maps."""
    _perplexities(job, job.models.converted, TRANSFERRED)
    _layer_errors(job, "after")
    if job.config.finetune.feature_map_learning_rate == 0:
        measure_heads(job, job.models.converted, "teacher")


def measure_student(job: Job) -> None:
    """The trained model, complete and with one branch off, its gates, and, unless stage 2 left the maps unchanged, its
    heads."""
    run, model = job.run, job.models.student
    if job.models.student_in_4_bits and not job.models.in_4_bits:
        run.measure(STUDENT_IN_4_BITS, lambda: True)
    _perplexities(job, model, STUDENT, *(BRANCHES if job.learns else ()))
    run.measure("gamma", lambda: [layer.over_heads(layer.gamma.tolist()) for layer in linearized_layers(model())])
    if not job.lean:
        run.measure("sample_student", lambda: _sample(job, model(), STUDENT))
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


def _control(job: Job, name: str) -> float:
    with control(job.models.converted(), name, job.run.directory) as model:
        return _perplexity(job, model, CONTROLS[name].in_words)


def _perplexities(job: Job, model: Callable[[], PreTrainedModel], *compared: Compared) -> None:
    """Held-out perplexities of what ``model`` becomes."""

    def measured(each: Compared) -> float:
        with each.on(model()):
            return _perplexity(job, model(), each.in_words)

    for each in compared:
        job.run.measure(each.result, partial(measured, each))
        if (
            each in BESIDE and not job.lean and "cache_bytes" not in job.run.results
        ):  # else an older version finished it
            _beside(job, model, each)


def _beside(job: Job, model: Callable[[], PreTrainedModel], compared: Compared) -> None:
    """Bytes of state, and recall if the run's rows are long enough for it."""
    job.run.measure(f"bytes_{compared.key}", partial(_bytes, model, compared))
    if prompts := recall_prompts(job):
        job.run.measure(f"recall_{compared.key}", partial(_recall, job, model, compared, prompts))


def _perplexity(job: Job, model: PreTrainedModel, words: str) -> float:
    value = perplexity(model, job.data.test, job.batch, job.data.positions.get("test"))
    job.say(f"  perplexity, {words}: {value:.2f}")
    return value


def _bytes(model: Callable[[], PreTrainedModel], compared: Compared) -> int:
    with compared.on(model()):
        return cache_bytes(model(), STATE_TOKENS)[0 if compared is TEACHER else 1]


def recall_prompts(job: Job) -> list[Prompt]:
    """Few prompts as long as the run's rows, over the text of its test rows; none if that is too short for them, or if
    every layer sees everything."""
    tokenizer, length = job.inputs.tokenizer, min(job.config.data.sequence_length, LONGEST)
    special = set(tokenizer.all_special_ids)
    haystack = [token for token in job.data.test.flatten().tolist() if token not in special]
    if sight(job.config.attention) is None or not tokenizer.is_fast or not haystack:
        return []
    answers = ANSWERS.get(job.models.device.type, ANSWERS["cpu"])
    try:
        prompts = make_prompts(RECALL, tokenizer, haystack, length, answers, job.config.seed)
        most = positions_of(job.inputs.base, job.inputs.trust) or math.inf
        if (over := max(len(prompt.ids) + len(prompt.continuation) for prompt in prompts) - most) > 0:
            prompts = make_prompts(RECALL, tokenizer, haystack, length - int(over) - SPARE, answers, job.config.seed)
        return prompts
    except LolcatsError:  # too few tokens for the question
        return []


def _recall(
    job: Job, model: Callable[[], PreTrainedModel], compared: Compared, prompts: list[Prompt]
) -> dict[str, Any] | None:  # fmt: skip
    """Task, and value, standard error and number of answers of each metric; None for a model in pieces."""
    if is_sharded(model()):
        return None
    with compared.on(model()):
        found = measure_recall(model(), job.inputs.tokenizer, prompts, job.batch, sight(job.config.attention))
    scores = scores_of(f"{RECALL}@{len(prompts[0].ids)}", found, True)
    return {score.metric: {"value": score.value, "stderr": score.stderr, "answers": score.count, "task": score.task}
            for score in scores}  # fmt: skip


def _sample(job: Job, model: PreTrainedModel, compared: Compared) -> str:
    with compared.on(model):
        tokens = SAMPLE_WINDOWS * job.config.attention.window_size
        return generate(model, job.inputs.tokenizer, SAMPLE_PROMPT, tokens)
