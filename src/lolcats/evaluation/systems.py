"""The models that an evaluation compares: teacher, baselines and student, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import is_linearized, load
from lolcats.modeling.classes import convert_as
from lolcats.modeling.layer import linearized_layers, override
from lolcats.stages.finetune.controls import CONTROLS, control, control_directory
from lolcats.weights.base import Base, find_base, load_model

TEACHER, STUDENT = "teacher", "student"
UNTRAINED = {
    "window": "the base model with only the window, untrained",
    "window+sinks": "the base model with window and sinks, untrained",
}
CONTROL_NAMES = {name.replace("_", "+"): name for name in CONTROLS}
ABLATIONS: dict[str, dict[str, Any]] = {"linear-off": {"kind": "window"}, "window-off": {"kind": "remote"}}
"""Overrides that switch off one branch of a trained model, which leaves only the other."""
BASELINES = (*UNTRAINED, *CONTROL_NAMES, *ABLATIONS)


def check_baselines(model: str, baselines: Sequence[str]) -> None:
    """Raise LolcatsError unless each baseline is in BASELINES or a linearized model, and fits ``model``."""
    for baseline in baselines:
        if baseline not in BASELINES and not is_linearized(baseline):
            raise LolcatsError(f"--baseline {baseline}: neither a linearized model nor one of {', '.join(BASELINES)}.")
        if not is_linearized(model):
            raise LolcatsError(f"{model} is not a linearized model: a baseline has nothing to compare with.")
        if baseline in UNTRAINED and _base(model) is None:
            raise LolcatsError(f"{model} does not know its base model, needed for {baseline}: give the run directory.")
        if baseline in CONTROL_NAMES and baseline not in controls(model):
            raise LolcatsError(f"{model} has no control {baseline}. Train it with lolcats finetune DIR --controls.")


def controls(model: str) -> list[str]:
    """Names of the trained controls in a run directory, as baselines."""
    return [name for name, own in CONTROL_NAMES.items() if is_linearized(control_directory(Path(model), own))]


def available(model: str) -> list[str]:
    """All named baselines that ``model`` can be compared with."""
    if not is_linearized(model):
        return []
    return [*(UNTRAINED if _base(model) else ()), *controls(model), *ABLATIONS]


def systems(
    model: str, baselines: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, PreTrainedModel]]:  # fmt: skip
    """Yield (name, model) in turn; each model is valid only until the next one is requested.

    An adapter yields teacher and student; the teacher is the converted base model in teacher mode, without LoRA. A
    merged model does not record its base model, so it yields no teacher. A base model yields only itself.
    """
    if not is_linearized(model):
        yield Path(model).name, load_model(find_base(model), dtype, device)
        return
    if base := _base(model):
        yield from _of_base(model, load_model(base, dtype, device), baselines)
    for other in baselines:
        if other not in BASELINES:
            yield other, load(other, dtype, device)
    student = load(model, dtype, device)
    yield STUDENT, student
    for name, change in ABLATIONS.items() if linearized_layers(student) else ():
        if name in baselines:
            with override(student, **change):
                yield name, student


def _of_base(
    model: str, base_model: PreTrainedModel, baselines: Sequence[str]
) -> Iterator[tuple[str, PreTrainedModel]]:  # fmt: skip
    """Models that need only the base model: teacher, untrained windows, controls."""
    converted = convert_as(base_model, AutoConfig.from_pretrained(model).lolcats)
    with override(converted, mode="teacher"):
        yield TEACHER, converted
    for name in UNTRAINED:
        if name in baselines:
            with override(converted, kind="window", sinks=_sinks(converted) if name == "window+sinks" else 0):
                yield name, converted
    for name in CONTROL_NAMES:
        if name in baselines:
            with control(converted, CONTROL_NAMES[name], Path(model)) as trained:
                yield name, trained


def _base(model: str) -> Base | None:
    record: dict[str, Any] = AutoConfig.from_pretrained(model).lolcats
    return Base(**record["base"]) if "base" in record else None


def _sinks(model: PreTrainedModel) -> int:
    """The model's number of sinks, or 4 if it was trained without sinks."""
    attention = model.config.lolcats["attention"]
    return int(attention["sinks"] or min(4, attention["window_size"]))
