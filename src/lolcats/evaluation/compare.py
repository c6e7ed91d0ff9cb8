"""Perplexity on the same rows of a model, its teacher, the untrained baselines, the controls, and with a branch off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolcats.config import Config
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.systems import available, systems
from lolcats.training.data import load_data, load_rows


def compare(
    model: str, rows: Tensor, device: torch.device, dtype: torch.dtype, batch_size: int = 4,
    positions: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Perplexity by name on rows (N, L), with position ids that keep documents apart or None.

    Teacher and baselines are measured where ``model`` is an adapter: it knows its base.
    """
    compared = systems(model, available(model), device, dtype)
    return {name: perplexity(loaded, rows, batch_size, positions) for name, loaded in compared}


def evaluation_rows(model: str, source: str, tokenizer: Any, config: Config) -> tuple[Tensor, Tensor | None]:
    """Rows (N, L) to evaluate on: all of ``source``, or its held-out test rows where the run trained on the rest; and
    their position ids where these keep documents apart."""
    record = Path(model) / "run.json"
    if record.is_file():
        trained_on = json.loads(record.read_text())["data"]["source"]
        if trained_on == source or Path(trained_on).resolve() == Path(source).resolve():
            data = load_data(source, tokenizer, config.data, config.seed)
            return data.test, data.positions.get("test")
    return load_rows(source, tokenizer, config.data)
