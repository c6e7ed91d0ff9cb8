"""The models that an evaluation compares: teacher, baselines and student, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lolcats.compared import BASELINES, BRANCHES, CONTROLS, STUDENT, TEACHER, WINDOWS, Compared
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import load
from lolcats.modeling.classes import convert_as
from lolcats.modeling.code import may_run_code
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.parts import check_parts, lost_controls
from lolcats.modeling.record import is_linearized, read_record
from lolcats.stages.finetune.controls import control, control_directory
from lolcats.weights.base import Base, Quantize, find_again, find_base, load_model


def check_baselines(model: str, baselines: Sequence[str], quantize: Quantize = "none") -> None:
    """Raise LolcatsError unless each baseline is in BASELINES or a linearized model, and fits ``model``."""
    for baseline in baselines:
        if quantize != "none" and baseline in BASELINES and BASELINES[baseline].needs == "control":
            raise LolcatsError(
                f"--baseline {baseline}: LoRA of controls is merged, which weights in 4 bits do not allow. Leave out "
                "--quantize or this baseline."
            )
        if baseline not in BASELINES and not is_linearized(baseline):
            raise LolcatsError(f"--baseline {baseline}: neither a linearized model nor one of {', '.join(BASELINES)}.")
        if not is_linearized(model):
            raise LolcatsError(f"{model} is not a linearized model: a baseline has nothing to compare with.")
        if baseline not in BASELINES or baseline in available(model):
            continue
        if BASELINES[baseline].needs == "control":
            if lost := lost_controls(Path(model)):
                raise LolcatsError(lost)
            raise LolcatsError(f"{model} has no control {baseline}. Train it with lolcats finetune DIR --controls.")
        raise LolcatsError(f"{model} does not know its base model, needed for {baseline}: give the run directory.")


def available(model: str, quantize: Quantize = "none") -> list[str]:
    """All named baselines that ``model`` can be compared with; controls have their LoRA merged, so not in 4 bits."""
    if not is_linearized(model):
        return []
    untrained = WINDOWS if _base(model) else ()
    trained = {} if quantize != "none" else CONTROLS
    controls = [own for key, own in trained.items() if is_linearized(control_directory(Path(model), key))]
    return [own.name for own in (*untrained, *controls, *BRANCHES)]


def systems(
    model: str, baselines: Sequence[str], device: torch.device, dtype: torch.dtype, moved: str = "",
    trust: bool = False, quantize: Quantize = "none",
) -> Iterator[tuple[str, PreTrainedModel]]:  # fmt: skip
    """Yield (name, model) in turn; each model is valid only until the next one is requested.

    An adapter yields teacher and student; the teacher is the converted base model in teacher mode, without LoRA. A
    merged model does not record its base model, so it yields no teacher. A base model yields only itself.

    ``moved``: where the base model of an adapter is now, if it has moved. ``quantize``: of all models.
    """
    if moved and (not is_linearized(model) or _base(model) is None):
        raise LolcatsError(f"{model} is not an adapter: it needs no --base.")
    if not is_linearized(model):
        yield Path(model).name, load_model(find_base(model, trust), dtype, device, trust, quantize)
        return
    known, own_code = _base(model), may_run_code(model, trust)
    if known:
        base = find_again(known, model, moved, trust)
        yield from _of_base(model, load_model(base, dtype, device, own_code, quantize), baselines)
    for other in baselines:
        if other not in BASELINES:
            theirs = _base(other)
            same = known is not None and theirs is not None and theirs.fingerprint == known.fingerprint
            yield other, load(other, dtype, device, trust, moved if same else "", quantize)
    student = load(model, dtype, device, trust, moved, quantize)
    yield STUDENT.name, student
    for own in _asked(BRANCHES, baselines) if _has_branches(student) else ():
        with own.on(student):
            yield own.name, student


def _has_branches(model: PreTrainedModel) -> bool:
    """Whether there is linear attention beside the windows, so that either can be off."""
    return any(layer.spec.has_linear for layer in linearized_layers(model))


def _of_base(
    model: str, base_model: PreTrainedModel, baselines: Sequence[str]
) -> Iterator[tuple[str, PreTrainedModel]]:  # fmt: skip
    """Models that need only the base model: teacher, untrained windows, controls."""
    converted = convert_as(base_model, read_record(model))
    for own in (TEACHER, *_asked(WINDOWS, baselines)):
        with own.on(converted):
            yield own.name, converted
    for own in _asked(CONTROLS.values(), baselines):
        with control(converted, own.key, Path(model)) as trained:
            yield own.name, trained


def _asked(group: Iterable[Compared], baselines: Sequence[str]) -> list[Compared]:
    return [own for own in group if own.name in baselines]


def _base(model: str) -> Base | None:
    """The base model of an adapter; None for a merged model."""
    record = read_record(model)
    if "base" not in record:
        return None
    check_parts(Path(model), record.get("parts"))  # before a model is loaded
    return Base(**record["base"])
