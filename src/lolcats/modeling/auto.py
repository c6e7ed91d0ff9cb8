"""Register ``model_type: lolcats`` with transformers' AutoConfig. Imported by ``import lolcats``, so kept light.

A saved config.json holds the base family's own fields, ``base_model_type``, and a ``lolcats`` section. Reading it
creates the family's subclasses (:mod:`lolcats.modeling.classes`), so AutoModelForCausalLM finds them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lolcats.errors import LolcatsError

MODEL_TYPE = "lolcats"
SEAL = "sha256"


class LolcatsConfig(PretrainedConfig):
    """Entry point for AutoConfig: ``from_dict`` returns an instance of the base family's linearized config class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from lolcats.modeling.classes import classes_for

        check_record(config_dict.get("lolcats"))
        config_dict = {k: v for k, v in config_dict.items() if k != "model_type"}
        config_class, _ = classes_for(config_dict.get("base_model_type", ""))
        return config_class.from_dict(config_dict, **kwargs)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with a checksum of its contents."""
    plain = {key: value for key, value in record.items() if key != SEAL}
    return {**plain, SEAL: hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def check_record(record: Any) -> None:
    """Raise LolcatsError unless ``record`` is an intact ``lolcats`` section of a config.json."""
    if not isinstance(record, dict) or not isinstance(record.get("layers"), list):
        raise LolcatsError("config.json is damaged: it has no lolcats section that says how the model was linearized.")
    if SEAL in record and sealed(record) != record:
        raise LolcatsError(
            f"The lolcats section of config.json is damaged: its checksum does not match. If you changed it on "
            f"purpose, remove lolcats.{SEAL} from it."
        )


AutoConfig.register(MODEL_TYPE, LolcatsConfig, exist_ok=True)
