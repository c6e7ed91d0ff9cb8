"""Measurements of each model in a sweep: perplexity on files, and tasks of ``lolcats evaluate``. Data is read once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import Config, DataConfig
from lolcats.data.inputs import Inputs
from lolcats.data.mixture import is_mixture, read_mixture
from lolcats.data.rows import load_rows
from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import row_losses
from lolcats.evaluation.recall import sight
from lolcats.evaluation.scores import Score
from lolcats.evaluation.suite import LONG, RECALL, Options, Task, prepare, sources
from lolcats.files import hash_file
from lolcats.lab.sweep.plan import Evaluate
from lolcats.pipeline import device_and_dtype

PERPLEXITIES = "perplexities"
RECALL_COUNTS = "every answer"  # results of an earlier version, which counted first answers, are measured again
Measured = dict[str, dict[str, Any]]
"""Value, standard error and items by metric. Items are in the same order for every model: the losses of rows for a
perplexity, the items of an nll, and a string of 0s and 1s for a score with such results. ``strata``: the sizes of the
strata, if there are several; ``clusters``: the cluster of each item, if items are not independent (see
:mod:`lolcats.evaluation.scores`)."""


NOT_OF_FILES = ("validation_rows", "test_rows", "streaming", "loss", "keep_longest_effective")
"""Settings of ``data`` that do not change the rows of a perplexity file."""


class Measurement:
    """Everything in the sweep's ``evaluate`` section that can be measured here; reports what is left out.

    ``key`` identifies all that the numbers depend on besides the model, files by their content. ``former_key`` is what
    earlier versions had instead: it says nothing of the rows' settings, the long text and the benchmarks' files.
    """

    def __init__(self, wanted: Evaluate, inputs: Inputs, config: Config, say: Callable[[str], None]) -> None:
        self.wanted, self.batch_size = wanted, wanted.batch_size
        files = {name: path for name, path in wanted.perplexity.items() if path}
        for name in wanted.perplexity.keys() - files.keys():
            say(f"No perplexity on {name}: to measure it, use --set evaluate.perplexity.{name}=FILE.")
        self.rows = {name: _first(load_rows(path, inputs.tokenizer, config.data), wanted.rows)
                     for name, path in files.items()}  # fmt: skip
        names = [name for name in wanted.tasks if _possible(name, wanted, say)]
        device, dtype = device_and_dtype(config)
        data_dir, limit = Path(wanted.data_dir) if wanted.data_dir else None, wanted.limit or None
        options = Options(
            data_dir, wanted.text, tuple(wanted.lengths), limit, wanted.batch_size, limits=wanted.limits,
            seen=sight(config.attention),
            teacher=partial(inputs.model, dtype, device) if wanted.kl else None,
        )  # fmt: skip
        if LONG & set(names) and not wanted.lengths:
            raise LolcatsError("evaluate.lengths: recall and positions need lengths, e.g. [1024, 4096].")
        self.tasks: dict[str, Task] = prepare(names, options, inputs.tokenizer) if names else {}
        known = {**asdict(wanted), "perplexity": {n: source_identity(p) for n, p in files.items()}, "tasks": names}
        if RECALL.keys() & set(names):
            known["recall"] = [RECALL_COUNTS, repr(options.seen)]
        left_out = {"data_dir", "text", "batch_size"} | (set() if wanted.kl else {"kl"})
        known = {k: v for k, v in known.items() if k not in left_out}
        self.former_key = short_hash(known)
        rows = {k: v for k, v in asdict(config.data).items() if k not in NOT_OF_FILES}
        read = {name: [source_identity(source) for source in sources(name, options)] for name in names}
        told = {"rows": rows if files else {}, "sources": read, "teacher": config.dtype if wanted.kl else ""}
        self.key = short_hash([known, told])

    def perplexities(self, model: PreTrainedModel) -> Measured:
        found: Measured = {}
        for name, (rows, positions) in self.rows.items():
            losses, counts = row_losses(model, rows, self.batch_size, positions)
            mean = (losses * counts).sum() / counts.sum()
            items = [round(loss, 5) for loss in losses.tolist()]
            spread = (losses.std() / len(losses) ** 0.5).item() if len(losses) > 1 else None
            value = mean.exp().item()
            found[name] = {"value": value, "stderr": None if spread is None else value * spread, "items": items}
        return found

    def parts(self) -> dict[str, Callable[[PreTrainedModel], Measured]]:
        """The perplexities and each task as separate functions."""
        return {PERPLEXITIES: self.perplexities, **{name: partial(self._task, name) for name in self.tasks}}

    def everything(self, model: PreTrainedModel) -> Measured:
        return {name: entry for part in self.parts().values() for name, entry in part(model).items()}

    def _task(self, name: str, model: PreTrainedModel) -> Measured:
        return {f"{score.task} {score.metric}": _entry(score) for score in self.tasks[name](model)}


def _entry(score: Score) -> dict[str, Any]:
    items = [item for stratum in score.items for item in stratum]
    entry = {"value": score.value if math.isfinite(score.value) else None, "stderr": score.stderr}
    groups: dict[str, list[int]] = {"strata": [len(s) for s in score.items]} if len(score.items) > 1 else {}
    groups |= {"clusters": list(score.clusters)} if score.clusters else {}
    if items and set(items) <= {0.0, 1.0}:
        return {**entry, "items": "".join(str(int(item)) for item in items), **groups}
    return {**entry, "items": [round(x, 5) for x in items], **groups} if score.metric.startswith("nll") else entry


def _first(rows: tuple[Tensor, Tensor | None], count: int) -> tuple[Tensor, Tensor | None]:
    """The first ``count`` rows and their positions (0 = all)."""
    ids, positions = rows
    return ids[: count or None], None if positions is None else positions[: count or None]


def source_identity(source: str) -> str:
    """Identify data by content: the hash of a file (for a mixture, also of its sources), or a hub data set's name."""
    path = Path(source).expanduser()
    if is_mixture(source) and path.is_file():
        parts = [source_identity(share.source) for share in read_mixture(source, DataConfig())]
        return short_hash([hash_file(path), *parts])
    return hash_file(path) if path.is_file() else source


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _possible(name: str, wanted: Evaluate, say: Callable[[str], None]) -> bool:
    reason = ""
    if name in LONG and not (wanted.text or wanted.data_dir):
        reason = "it needs evaluate.text or evaluate.data_dir"
    elif name not in LONG and importlib.util.find_spec("lm_eval") is None:
        reason = "it needs lm-eval (pip install 'lolcats[eval]')"
    if reason:
        say(f"Skipping task {name}: {reason}.")
    return not reason
