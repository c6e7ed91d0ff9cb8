"""The models that an evaluation compares: teacher, baseline, student, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.base import Base, find_base, load_model
from lolcats.modeling.checkpoint import is_linearized, load
from lolcats.modeling.convert import convert_as
from lolcats.modeling.layer import override

TEACHER, STUDENT = "teacher", "student"
BASELINES = {
    "window": "the base model with the window alone, nothing trained",
    "window+sinks": "the base model with window and sinks, nothing trained",
    "linear-off": "the student with its linear term switched off",
}


def check_baseline(model: str, baseline: str) -> None:
    """LolcatsError unless ``baseline`` is a name of BASELINES or a linearized model, and fits ``model``."""
    if not baseline:
        return
    if baseline not in BASELINES and not is_linearized(baseline):
        raise LolcatsError(f"--baseline {baseline}: neither a linearized model nor one of {', '.join(BASELINES)}.")
    if not is_linearized(model):
        raise LolcatsError(f"{model} is no linearized model: there is no gap for a baseline to measure.")
    if baseline.startswith("window") and _base(model) is None:
        raise LolcatsError(f"{model} does not know its base model, which {baseline} needs: give the run directory.")


def systems(
    model: str, baseline: str, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, PreTrainedModel]]:  # fmt: skip
    """(name, model) one after another; each is valid until the next is asked for.

    An adapter gives teacher and student; the teacher is the converted base model in teacher mode, without the adapter's
    LoRA. A merged model no longer knows its base and comes alone, and so does a base model.
    """
    if not is_linearized(model):
        yield Path(model).name, load_model(find_base(model), dtype, device)
        return
    if base := _base(model):
        untrained = convert_as(load_model(base, dtype, device), AutoConfig.from_pretrained(model).lolcats)
        with override(untrained, mode="teacher"):
            yield TEACHER, untrained
        if baseline.startswith("window"):
            with override(untrained, kind="window", sinks=_sinks(untrained) if baseline == "window+sinks" else 0):
                yield baseline, untrained
        del untrained
    if baseline and baseline not in BASELINES:
        yield baseline, load(baseline, dtype, device)
    student = load(model, dtype, device)
    yield STUDENT, student
    if baseline == "linear-off":
        with override(student, kind="window"):
            yield baseline, student


def _base(model: str) -> Base | None:
    record: dict[str, Any] = AutoConfig.from_pretrained(model).lolcats
    return Base(**record["base"]) if "base" in record else None


def _sinks(model: PreTrainedModel) -> int:
    """The model's own number of sinks, or 4 where it was trained without."""
    attention = model.config.lolcats["attention"]
    return int(attention["sinks"] or min(4, attention["window_size"]))
