"""The two controls of a run: LoRA without linear attention, with the run's data, steps, seed and LoRA settings.

``window_lora`` has the run's window and sinks but no linear term: it shows what linear attention adds.
``teacher_lora`` keeps softmax attention: it shows what adapting to the data gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from lolcats.compared import CONTROLS
from lolcats.config import Config
from lolcats.data.rows import Data
from lolcats.modeling.checkpoint import LORA, merged_lora, save_adapter_config, save_lora
from lolcats.modeling.parts import CONTROLS as CONTROLS_FOLDER
from lolcats.modeling.parts import check_parts, find_parts
from lolcats.modeling.record import read_record
from lolcats.stages.finetune.stage import finetune
from lolcats.stages.result import StageResult
from lolcats.weights.base import Base


def control_directory(run: Path, name: str) -> Path:
    return run / CONTROLS_FOLDER / name


def control_config(config: Config, name: str) -> Config:
    """The settings that control ``name`` of a run is trained with."""
    settings = replace(config.finetune, feature_map_learning_rate=0.0)
    if name == "teacher_lora" and settings.loss == "kl":  # it would be its own teacher, and learn nothing
        settings = replace(settings, loss="cross_entropy")
    return replace(config, finetune=settings)


def train_control(
    model: PreTrainedModel, name: str, data: Data, config: Config, base: Base, run: Path
) -> StageResult:  # fmt: skip
    """Train control ``name`` on a converted model without LoRA; the model is unchanged afterwards.

    ``controls/NAME`` in the directory ``run`` becomes an adapter that loads like any other, with its metrics.jsonl.
    """
    directory = control_directory(run, name)
    directory.mkdir(parents=True, exist_ok=True)
    with CONTROLS[name].on(model):
        wrapped, result = finetune(model, data, control_config(config, name), directory)
    save_lora(wrapped, base, directory / LORA)
    wrapped.unload()
    kind = CONTROLS[name].change.get("kind", "softmax")
    save_adapter_config(model, base, directory, kind, find_parts(directory))
    return result


@contextmanager
def control(model: PreTrainedModel, name: str, run: Path) -> Iterator[PreTrainedModel]:
    """For the block's duration, turn ``model``, the run's converted base model without LoRA, into a trained control."""
    directory = control_directory(run, name)
    check_parts(directory, read_record(directory).get("parts"))
    with CONTROLS[name].on(model), merged_lora(model, directory / LORA) as merged:
        yield merged
