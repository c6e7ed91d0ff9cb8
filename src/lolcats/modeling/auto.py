"""Register ``model_type: lolcats`` with transformers' AutoConfig. Imported as soon as AutoConfig is, so kept light.

A saved config.json holds the base family's own fields, ``base_model_type``, and a ``lolcats`` section. Reading it
creates the family's subclasses (:mod:`lolcats.modeling.classes`), so AutoModelForCausalLM finds them.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lolcats.modeling.record import MODEL_TYPE, SEAL, check_record, sealed

__all__ = ["MODEL_TYPE", "SEAL", "LolcatsConfig", "TrustedConfig", "check_record", "sealed"]


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

    @classmethod
    def with_code(cls, path: Any, **kwargs: Any) -> Any:
        """Like ``from_pretrained``, with the classes in the base model's own code if the model needs it. This runs the
        code: call it only if the user allowed that."""
        from lolcats.modeling.classes import linearized_class
        from lolcats.modeling.code import HUB, needs_code, own_model_class

        config, unused = cls.get_config_dict(path, **kwargs)
        if not needs_code(config):
            return super().from_pretrained(path, **kwargs)
        check_record(config.get("lolcats"))
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        own = own_model_class(path, config, kwargs.get("base") or "", **hub)
        config = {name: value for name, value in config.items() if name != "model_type"}
        return linearized_class(own).config_class.from_dict(config, **unused)


class TrustedConfig(LolcatsConfig):
    """What the file beside a linearized model gives transformers, which runs it only with ``trust_remote_code=True``.

    So it may also run the code of the base model.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Like transformers' own. ``base``: where the base model of an adapter is now, if it has moved."""
        return cls.with_code(pretrained_model_name_or_path, **kwargs)


AutoConfig.register(MODEL_TYPE, LolcatsConfig, exist_ok=True)
