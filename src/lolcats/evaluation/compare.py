"""Compare the perplexity of a model, its teacher, the untrained baselines, the controls, and one branch at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolcats.config import Config
from lolcats.data.rows import load_data, load_rows
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.systems import available, systems
from lolcats.run import RECORD
from lolcats.weights.base import Quantize


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

    The rows are all of ``source``, or only its held-out test rows if the run was trained on the rest.
    """
    record = Path(model) / RECORD
    if record.is_file():
        trained_on = json.loads(record.read_text())["data"]["source"]
        if trained_on == source or Path(trained_on).resolve() == Path(source).resolve():
            data = load_data(source, tokenizer, config.data, config.seed)
            return data.test, data.positions.get("test")
    return load_rows(source, tokenizer, config.data)
