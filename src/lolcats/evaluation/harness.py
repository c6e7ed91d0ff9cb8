"""Run lm-eval's tasks and metrics on a model in memory."""

from __future__ import annotations

import difflib
import functools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError, first_line
from lolcats.evaluation.scores import Score, mean_score

Spec = str | dict[str, Any]
"""What lm-eval's TaskManager loads: a registered name, or a task or group as a dict."""


def load_tasks(specs: Sequence[Spec], others: Iterable[str] = ()) -> list[Any]:
    """Load lm-eval's Task and Group objects with their data. They can be used for several models in turn.

    ``others``: names to suggest for a misspelled task besides lm-eval's own.

    Raises:
        LolcatsError: lm-eval is not installed, has no such task, or cannot load its data.
    """
    manager = task_manager()
    tasks: list[Any] = []
    for spec in specs:
        if isinstance(spec, str) and spec not in manager.task_index:
            near = difflib.get_close_matches(spec, [*others, *manager.all_tasks], n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise LolcatsError(f"--tasks: lm-eval has no task {spec!r}.{hint}")
        try:
            tasks += _load(manager, spec)
        except (OSError, ValueError, RuntimeError) as error:  # errors of datasets and the hub derive from these
            name = spec if isinstance(spec, str) else spec.get("group", spec.get("task"))
            raise LolcatsError(
                f"Cannot load the data of task {name} ({first_line(error)}). Without access to the hub, give local "
                "Parquet files with --data-dir (in a sweep: --set evaluate.data_dir=)."
            ) from error
    return tasks


class Harness:
    """Tasks whose requests are built, tokenized and batched once, for any number of models.

    Args:
        tasks: from :func:`load_tasks`.
        limits: maximum number of items by task name; "" applies to tasks that are not named (default: all items). A
            group's limit is shared evenly by its tasks.
        batch_size: rows of 1,024 tokens per batch; of shorter rows, as many as hold the same number of tokens.
        seed: for few-shot examples.
    """

    def __init__(
        self, tasks: Sequence[Any], tokenizer: Any, limits: Mapping[str, int], batch_size: int, seed: int
    ) -> None:  # fmt: skip
        self.tasks, self.tokenizer, self.batch_size, self.seed = list(tasks), tokenizer, batch_size, seed
        self.loaded = task_manager().load(self.tasks)
        self.chosen = _chosen(self.tasks, limits)
        self.known: dict[Any, Any] = {}
        self.built = False

    def __call__(self, model: PreTrainedModel) -> list[Score]:
        """Scores for every metric of every task; a group with aggregation gives one score per metric."""
        from lm_eval import evaluate
        from lm_eval.api.group import Group

        from lolcats.evaluation.bridge import Bridge

        self._seed()
        with _plain_forward(model), _templates_compiled_once(), _quiet():
            self._build()
            bridge = Bridge(model, self.tokenizer, self.batch_size, self.known)
            results = evaluate(bridge, self.loaded, samples=self.chosen, bootstrap_iters=0, log_samples=True)
        scores: list[Score] = []
        for task in self.tasks:
            if not isinstance(task, Group):
                scores += _task_scores(results, task.task_name)
            elif task.has_aggregation:
                scores += _group_scores(results, task)
            else:
                scores += [s for child in task.get_all_tasks() for s in _task_scores(results, child.task_name)]
        return scores

    def _build(self) -> None:
        """Build the tasks' requests once, and make later calls to build them reuse these."""
        if self.built:
            return
        for name, task in self.loaded["tasks"].items():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.seed)
            task.build_all_requests(samples=self.chosen[name])
            task.build_all_requests = functools.partial(_unanswered, task.instances)
        self.built = True

    def _seed(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)


def _chosen(tasks: Sequence[Any], limits: Mapping[str, int]) -> dict[str, list[int]]:
    """Indices of the documents to ask in each task: the first ones, up to its limit."""
    from lm_eval.api.group import Group

    chosen: dict[str, list[int]] = {}
    for entry in tasks:
        members = entry.get_all_tasks() if isinstance(entry, Group) else [entry]
        name = entry.name if isinstance(entry, Group) else entry.task_name
        shared = limits.get(name)
        for task in members:
            own = limits.get(task.task_name, limits.get("") if shared is None else -(-shared // len(members)))
            count = len(task.eval_docs)
            chosen[task.task_name] = list(range(count if own is None else min(own, count)))
    return chosen


def _unanswered(instances: Sequence[Any], **_: Any) -> None:
    """Clear the answers of an earlier model from the requests."""
    for instance in instances:
        instance.resps, instance.filtered_resps = [], {}


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Cache compiled templates: lm-eval spends most of its time compiling them for every field of every document."""
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(maxsize=1024)(env.from_string)
    try:
        yield
    finally:
        del env.from_string


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars, one for each of the 57 subjects of MMLU."""
    import lm_eval.api.task as module

    shown = module.tqdm
    module.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        module.tqdm = shown


@functools.cache
def task_manager() -> Any:
    """lm-eval's index of its tasks, which takes several seconds to build."""
    try:
        import lm_eval.tasks
    except ImportError:
        raise LolcatsError("These tasks need lm-eval: pip install 'lolcats[eval]'.") from None
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval.tasks.TaskManager()


@contextmanager
def _plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the cache where only logits are needed; ``generate`` turns it on itself."""
    before, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = before


def _load(manager: Any, spec: Spec) -> list[Any]:
    """Load a group or tasks. Metrics of a group are set after loading, as lm-eval would pass them on to its tasks."""
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
        else:  # not a mean over items
            yield Score(task, name, value, None, higher_is_better=higher)


def _group_scores(results: dict[str, Any], group: Any) -> Iterator[Score]:
    names = [task.task_name for task in group.get_all_tasks()]
    for wanted in group.aggregate_metric_list:
        for filtered in wanted.filter_list or ["none"]:
            strata = tuple(_items(results, name, wanted.metric, filtered) for name in names)
            if not all(strata):
                raise LolcatsError(
                    f"Group {group.name}: {wanted.metric} is not a mean over items; pass the group's tasks to --tasks "
                    "instead."
                )
            if wanted.weight_by_size:
                strata = (tuple(x for stratum in strata for x in stratum),)
            yield mean_score(group.name, _metric_name(wanted.metric, filtered), strata)


def _metric_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _items(results: dict[str, Any], task: str, metric: str, filtered: str) -> tuple[float, ...]:
    """A metric's values in document order; empty if they are not numbers."""
    samples = [s for s in results["samples"][task] if s["filter"] == filtered and metric in s]
    values = [s[metric] for s in sorted(samples, key=lambda s: s["doc_id"])]
    return tuple(map(float, values)) if all(isinstance(v, (int, float)) for v in values) else ()
