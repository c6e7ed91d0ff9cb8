"""Adapters of base models whose type only the Python code that comes with them defines."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lolcats.errors import LolcatsError, first_line


def run_code_of_base(directory: str | Path, moved: str | Path = "") -> None:
    """Run the code of an adapter's base model, which tells transformers of its type, unless transformers knows it.
    ``moved``: where the base model is now, if not at its recorded place.

    Call it only if the user allowed that for this command.
    """
    config = json.loads((Path(directory) / "config.json").read_text())
    kind, base = config.get("base_model_type"), (config.get("lolcats") or {}).get("base")
    if kind in CONFIG_MAPPING or base is None:
        return
    place = str(moved or base["path"])
    try:
        known = AutoConfig.from_pretrained(place, trust_remote_code=True)
        model_class = get_class_from_dynamic_module(known.auto_map["AutoModelForCausalLM"], place)
        AutoConfig.register(kind, type(known), exist_ok=True)
        AutoModelForCausalLM.register(type(known), model_class, exist_ok=True)
    except Exception as error:  # the code may raise anything
        raise LolcatsError(f"The code of {place} cannot be used: {first_line(error)}.") from error
