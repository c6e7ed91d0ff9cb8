"""Register ``model_type: lolcats`` with transformers' AutoConfig. Imported by ``import lolcats``, so kept light.

A saved config.json holds the base family's own fields, ``base_model_type``, and a ``lolcats`` section. Reading it
creates the family's subclasses (:mod:`lolcats.modeling.classes`), so AutoModelForCausalLM finds them.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lolcats.modeling.record import MODEL_TYPE, SEAL, check_record, sealed

__all__ = ["MODEL_TYPE", "SEAL", "LolcatsConfig", "check_record", "sealed"]


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


AutoConfig.register(MODEL_TYPE, LolcatsConfig, exist_ok=True)
