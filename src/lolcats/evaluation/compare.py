"""Perplexity of a model, of its teacher, and of itself with one branch switched off, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolcats.config import Config
from lolcats.evaluation.perplexity import perplexity
from lolcats.modeling.base import Base, find_base, load_model
from lolcats.modeling.checkpoint import is_linearized, load
from lolcats.modeling.layer import linearized_layers, override
from lolcats.training.data import load_data, load_rows

ABLATIONS: dict[str, dict[str, Any]] = {"linear_off": {"kind": "window"}, "window_off": {"kind": "remote"}}
"""What a trained model becomes when one branch is switched off: the other branch alone."""


def compare(
    model: str, rows: Tensor, device: torch.device, dtype: torch.dtype, batch_size: int = 4
) -> dict[str, float]:  # fmt: skip
    """Perplexity by name on rows (N, L). The teacher is measured where ``model`` is an adapter: it knows its base."""
    if not is_linearized(model):
        return {Path(model).name: perplexity(load_model(find_base(model), dtype, device), rows, batch_size)}
    student = load(model, dtype, device)
    results = {}
    if base := student.config.lolcats.get("base"):
        results["teacher"] = perplexity(load_model(Base(**base), dtype, device), rows, batch_size)
    results["student"] = perplexity(student, rows, batch_size)
    for name, change in ABLATIONS.items() if linearized_layers(student) else ():
        with override(student, **change):
            results[name.replace("_", " ")] = perplexity(student, rows, batch_size)
    return results


def evaluation_rows(model: str, source: str, tokenizer: Any, config: Config) -> Tensor:
    """Rows (N, L) to evaluate on: all of ``source``, or its held-out test rows where the run trained on the rest."""
    record = Path(model) / "run.json"
    if record.is_file():
        trained_on = json.loads(record.read_text())["data"]["source"]
        if trained_on == source or Path(trained_on).resolve() == Path(source).resolve():
            return load_data(source, tokenizer, config.data, config.seed).test
    return load_rows(source, tokenizer, config.data)
