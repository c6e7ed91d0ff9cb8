"""A thin bridge to lm-eval: its task definitions, its Hugging Face class over a model in memory, its metrics."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.scores import Score, mean_score

Spec = str | dict[str, Any]
"""What lm-eval's TaskManager loads: a registered name, or a task or group as a dict."""


def load_tasks(specs: Sequence[Spec]) -> list[Any]:
    """lm-eval's Task and Group objects with their data. They can be used for several models, one after another.

    Raises:
        LolcatsError: lm-eval is not installed, has no such task, or its data cannot be had.
    """
    manager = task_manager()
    tasks: list[Any] = []
    for spec in specs:
        if isinstance(spec, str) and spec not in manager.task_index:
            near = difflib.get_close_matches(spec, manager.all_tasks, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise LolcatsError(f"--tasks: lm-eval has no task {spec!r}.{hint}")
        try:
            tasks += _load(manager, spec)
        except (OSError, ValueError, RuntimeError) as error:  # errors of datasets and the hub derive from these
            name = spec if isinstance(spec, str) else spec.get("group", spec.get("task"))
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LolcatsError(
                f"Cannot load the data of task {name} ({reason}). On a machine without the hub, --data-dir takes "
                "local Parquet files."
            ) from error
    return tasks


def run(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[Any], limit: int | None, batch_size: int,
        seed: int) -> list[Score]:  # fmt: skip
    """Every metric of every task; a group that aggregates gives one score. ``limit`` items of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.group import Group
    from lm_eval.models.huggingface import HFLM

    with _plain_forward(model):
        bridge = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
                      softmax_dtype="float32")  # fmt: skip
        results = simple_evaluate(
            model=bridge, tasks=list(tasks), task_manager=task_manager(), limit=limit, bootstrap_iters=0,
            log_samples=True,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    scores: list[Score] = []
    for task in tasks:
        if not isinstance(task, Group):
            scores += _task_scores(results, task.task_name)
        elif task.has_aggregation:
            scores += _group_scores(results, task)
        else:
            scores += [score for child in task.get_all_tasks() for score in _task_scores(results, child.task_name)]
    return scores


@functools.cache
def task_manager() -> Any:
    """lm-eval's index of its tasks (several seconds to build)."""
    try:
        import lm_eval.tasks
    except ImportError:
        raise LolcatsError("These tasks need lm-eval: pip install 'lolcats[eval]'.") from None
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval.tasks.TaskManager()


@contextmanager
def _plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """No cache where only logits are wanted; ``generate`` asks for one itself."""
    before, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = before


def _load(manager: Any, spec: Spec) -> list[Any]:
    """One group, or tasks. lm-eval hands the metrics of a group given as a dict on to its tasks: they are set after."""
    from lm_eval.config.group import AggMetricConfig

    metrics: list[dict[str, Any]] = []
    if isinstance(spec, dict):
        metrics = spec.get("aggregate_metric_list", [])
        spec = {k: v for k, v in spec.items() if k != "aggregate_metric_list"}
    loaded = manager.load([spec])
    groups = loaded.get("groups") or {}
    if not groups:
        return list(loaded["tasks"].values())
    group = next(iter(groups.values()))
    if metrics:
        group.aggregate_metric_list = [AggMetricConfig(**metric) for metric in metrics]
    return [group]


def _task_scores(results: dict[str, Any], task: str) -> Iterator[Score]:
    for key, value in results["results"][task].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        name = _metric_name(metric, filtered)
        higher = bool(results["higher_is_better"][task].get(metric, True))
        items = _items(results, task, metric, filtered)
        score = mean_score(task, name, (items,), higher) if items else None
        if score is not None and abs(score.value - value) < 1e-6:
            yield score
        else:  # no mean over items
            yield Score(task, name, value, None, higher_is_better=higher)


def _group_scores(results: dict[str, Any], group: Any) -> Iterator[Score]:
    names = [task.task_name for task in group.get_all_tasks()]
    for wanted in group.aggregate_metric_list:
        for filtered in wanted.filter_list or ["none"]:
            strata = tuple(_items(results, name, wanted.metric, filtered) for name in names)
            if not all(strata):
                raise LolcatsError(
                    f"Group {group.name}: {wanted.metric} is no mean over items; name its tasks instead."
                )
            if wanted.weight_by_size:
                strata = (tuple(x for stratum in strata for x in stratum),)
            yield mean_score(group.name, _metric_name(wanted.metric, filtered), strata)


def _metric_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _items(results: dict[str, Any], task: str, metric: str, filtered: str) -> tuple[float, ...]:
    """A metric's values by document; empty where they are no numbers."""
    samples = [s for s in results["samples"][task] if s["filter"] == filtered and metric in s]
    values = [s[metric] for s in sorted(samples, key=lambda s: s["doc_id"])]
    return tuple(map(float, values)) if all(isinstance(v, (int, float)) for v in values) else ()
