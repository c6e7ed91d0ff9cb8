"""The files that belong to an adapter. config.json lists them with checksums, so a copy that lost one is noticed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, get_args

from lolcats.config import Control
from lolcats.errors import LolcatsError
from lolcats.files import hash_file, write_text
from lolcats.modeling.record import sealed

CONFIG, RUN = "config.json", "run.json"
FEATURE_MAPS = "feature_maps.safetensors"
LORA = "lora"
LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONTROLS = "controls"
OF_LORA = (f"{LORA}/{LORA_CONFIG}", f"{LORA}/{LORA_WEIGHTS}")


def find_parts(directory: Path) -> dict[str, str]:
    """The parts that lie in ``directory``, with their checksums."""
    return {name: hash_file(directory / name) for name in (FEATURE_MAPS, *OF_LORA) if (directory / name).is_file()}


def listed_parts(directory: Path) -> dict[str, str] | None:
    """The parts that config.json lists; None if it is missing or damaged, or if an older version wrote it."""
    try:
        parts = json.loads((directory / CONFIG).read_text())["lolcats"]["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return parts if isinstance(parts, dict) else None


def list_parts(directory: Path) -> None:
    """List in config.json what now lies in ``directory``. What is listed already stays listed, even if it is lost."""
    config = json.loads((directory / CONFIG).read_text())
    parts = {**config["lolcats"].get("parts", {}), **find_parts(directory)}
    config["lolcats"] = sealed({**config["lolcats"], "parts": parts})
    write_text(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_parts(directory: Path, parts: Any) -> None:
    """Raise LolcatsError unless ``directory`` holds exactly the ``parts`` of its model.

    ``parts``: as config.json lists them; None for an adapter without a list, which an older version wrote. There
    run.json says whether LoRA was trained.
    """
    if parts is None:
        _check_unlisted(directory)
        return
    if not isinstance(parts, dict):
        raise LolcatsError(f"{directory / CONFIG} is damaged: lolcats.parts is not a list of files.")
    for name, checksum in parts.items():
        if not (directory / name).is_file():
            raise _incomplete(directory, name, f"{CONFIG} lists it as a part of the model")
        if hash_file(directory / name) != checksum:
            raise LolcatsError(
                f"{directory / name} is damaged or truncated, or of another model: its checksum does not match the one "
                f"in {CONFIG}."
            )
    if surplus := [name for name in (FEATURE_MAPS, *OF_LORA) if name not in parts and (directory / name).exists()]:
        raise LolcatsError(
            f"{directory / surplus[0]} is not a part of this model: {CONFIG} does not list it. If a run was stopped "
            "here, repeat its command; otherwise remove the file."
        )


def lost_controls(directory: Path) -> str:
    """Which controls of a run are not in ``directory``, although run.json says that they were trained; empty if none.

    A model is complete without its controls, so this is an error only where one is asked for.
    """
    if not (directory / RUN).is_file():
        return ""
    lost = [
        name for name, stage in _stages(directory).items()
        if name in get_args(Control) and "steps" in stage and not (directory / CONTROLS / name / CONFIG).is_file()
    ]  # fmt: skip
    if not lost:
        return ""
    places = " and ".join(str(directory / CONTROLS / name) for name in lost)
    verb, pronoun = ("is", "it was") if len(lost) == 1 else ("are", "they were")
    return (
        f"{places} {verb} missing or incomplete, but {RUN} says that {pronoun} trained. To compare with the controls "
        "of this run, copy the whole directory again."
    )


def _stages(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / RUN).read_text())["stages"])
    except (ValueError, KeyError, TypeError) as error:
        raise LolcatsError(f"{directory / RUN} is damaged ({error}).") from None


def _check_unlisted(directory: Path) -> None:
    missing = [name for name in OF_LORA if not (directory / name).is_file()]
    if not missing:
        return
    if (directory / RUN).is_file():
        stage = _stages(directory).get("finetune")
        if stage is not None and not stage.get("skipped"):
            raise _incomplete(directory, missing[0], f"{RUN} says that LoRA was trained")
    elif not (directory / LORA).exists():
        warnings.warn(
            f"{directory} has no {LORA} folder, and an older version wrote it without a list of its files: if LoRA was "
            "trained, this copy is incomplete.",
            stacklevel=2,
        )


def _incomplete(directory: Path, name: str, reason: str) -> LolcatsError:
    return LolcatsError(f"{directory} is incomplete: {name} is missing, but {reason}. Copy the whole directory again.")
