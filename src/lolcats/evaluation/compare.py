"""Compare the perplexity of a model, its teacher, the untrained baselines, the controls, and one branch at a time."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolcats.config import Config, DataConfig
from lolcats.data.inputs import has_tokenizer
from lolcats.data.rows import Corpus, PackedRows, held_out_rows, load_rows, split, tokenize_source
from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.systems import available, systems
from lolcats.run import RECORD, Run
from lolcats.weights.base import Quantize, saved_tokenizer

COUNTS = ("documents", "duplicate_records", "empty_records", "train_rows", "validation_rows", "test_rows")


def compare(
    model: str, rows: Tensor, device: torch.device, dtype: torch.dtype, batch_size: int = 4,
    positions: Tensor | None = None, base: str = "", trust: bool = False, quantize: Quantize = "none",
) -> dict[str, float]:  # fmt: skip
    """Perplexity by model name on rows (N, L), with ``positions`` (N, L) if documents are kept apart.

    Teacher and baselines are measured only if ``model`` is an adapter, which knows its base model. ``base``: where
    that is now, if it has moved. ``quantize``: of all models.
    """
    compared = systems(model, available(model, quantize), device, dtype, base, trust, quantize)
    return {name: perplexity(loaded, rows, batch_size, positions) for name, loaded in compared}


def evaluation_rows(model: str, source: str, tokenizer: Any, config: Config) -> tuple[Tensor, Tensor | None]:
    """Rows (N, L) to evaluate on, and their position ids if these keep documents apart (else None).

    The rows are all of ``source``, or only its test documents if ``model`` is a run that was trained on the rest. Which
    these are is decided by the run's own settings and seed; ``config`` only says how they are packed.

    Raises:
        LolcatsError: the run was trained on ``source``, which has changed since, or the rows are too long for it.
    """
    run = _trained_on(model, source, config.data)
    if run is None:
        return load_rows(source, tokenizer, config.data)
    if has_tokenizer(run.directory):  # the run went on with this one if another is read today
        tokenizer = saved_tokenizer(run.directory, config.trust_remote_code)
    documents = tokenize_source(source, tokenizer, run.config.data)
    _check_unchanged(run, source, documents)
    rows, positions = held_out_rows(documents, run.config.data, run.config.seed, config.data.sequence_length)
    return rows, positions if config.data.reset_at_documents else None


def _trained_on(model: str, source: str, config: DataConfig) -> Run | None:
    """The run in the directory ``model`` if it was trained on ``source``; another part of a hub data set is not it."""
    if not (Path(model) / RECORD).is_file():
        return None
    run = Run.open(Path(model))
    known, own = run.record["data"]["source"], run.config.data
    known_path, path = (Path(name).expanduser().resolve() for name in (known, source))
    if known != source and known_path != path:
        return None
    other_part = not path.is_file() and (own.split, own.subset) != (config.split, config.subset)
    return None if other_part else run


def _check_unchanged(run: Run, source: str, documents: Corpus) -> None:
    """Raise LolcatsError if ``documents`` are not those that the run has split."""
    known = run.record["data"]
    try:
        data = split(documents, run.config.data, run.config.seed)
        same = data.fingerprint == known["fingerprint"]
        if isinstance(data.train, PackedRows) and run.record["versions"]["transformers"] != version("transformers"):
            same = same or all(  # the fingerprint of a large source also holds the version that has read it
                data.summary[name] == known.get(name) for name in COUNTS
            )
    except LolcatsError:  # too small now
        same = False
    if not same:
        raise LolcatsError(
            f"{source} has changed since {run.directory} was trained on it (it was {known['fingerprint']}): its test "
            "documents can no longer be told apart from its training documents. Restore it, or evaluate on other data."
        )
