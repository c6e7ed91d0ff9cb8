"""The linearized subclass of each base family, created when first needed: no model code per family."""

from __future__ import annotations

import functools
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import load_adapter, verify_loading
from lolcats.modeling.install import install
from lolcats.modeling.interface import IMPLEMENTATION
from lolcats.modeling.parallel import add_plan, is_split, settle
from lolcats.modeling.record import MODEL_TYPE, SEAL, sealed

REMOTE_CODE = "modeling_lolcats.py"
AUTO_MAP = {
    "AutoConfig": "modeling_lolcats.LolcatsConfig",
    "AutoModelForCausalLM": "modeling_lolcats.LolcatsForCausalLM",
}

ASSISTED = (
    "assisted decoding discards tokens, which cannot be removed from a linear-attention state. Use greedy decoding, "
    "sampling or beam search."
)
IMPOSSIBLE = {
    "assistant_model": ASSISTED,
    "prompt_lookup_num_tokens": ASSISTED,
    "assistant_early_exit": ASSISTED,
    "cache_implementation": "a linearized model has a state of fixed size and cannot use another cache. Leave it out.",
}
"""Arguments of ``generate`` that a linearized model does not support, and why."""


class LinearizedModel:
    """Mixin placed before the family's class: builds the extra modules, loads strictly, saves under our model type."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, config.lolcats)  # type: ignore[arg-type]
        add_plan(self, config.lolcats)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Like transformers' own, for merged models and adapters; errors name a missing or extra tensor."""
        config = kwargs.get("config")
        if config is not None and config.lolcats.get("form") == "adapter":
            if kwargs.get("tp_plan") or kwargs.get("distributed_config"):
                raise LolcatsError(
                    f"{path} is an adapter; only merged models support tensor parallelism. Merge it first: "
                    f"lolcats export {path} --merge --out MERGED."
                )
            trust = bool(kwargs.get("trust_remote_code"))
            return load_adapter(path, config, kwargs.get("dtype", "auto"), kwargs.get("device_map"), trust, convert_as)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise LolcatsError(f"{path}: a weight file is damaged or truncated ({error}).") from None
        verify_loading(info, path)
        settle(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        """Like transformers' own, in safetensors, plus the file that ``trust_remote_code`` imports."""
        if is_split(self):  # type: ignore[arg-type]
            raise LolcatsError("This rank holds only some of the model's heads: load the whole model to save it.")
        config = self.config  # type: ignore[attr-defined]
        config.auto_map = dict(AUTO_MAP)
        config.lolcats = sealed({k: v for k, v in config.lolcats.items() if k != "base"})  # merged: needs no base
        super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]
        shim = resources.files("lolcats.modeling").joinpath("remote.py").read_text()
        (Path(directory) / REMOTE_CODE).write_text(shim)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Like transformers' own; options that a fixed-size state does not support are refused before it begins."""
        config = kwargs.get("generation_config")
        given = kwargs if config is None else {**vars(config), **kwargs}
        for name, reason in IMPOSSIBLE.items():
            if given.get(name) is not None:
                raise LolcatsError(f"generate({name}=...): {reason}")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> None:
        if implementation != IMPLEMENTATION:
            raise LolcatsError(
                "The attention implementation of a linearized model cannot be set: it would silently become softmax."
            )

    def get_correct_attn_implementation(self, requested: str | None, *args: Any, **kwargs: Any) -> str:
        if requested == IMPLEMENTATION:
            return IMPLEMENTATION
        return super().get_correct_attn_implementation(requested, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def linearized_class(base: Any) -> Any:
    """The linearized subclass of a Hugging Face model class, with its own config class."""
    base_config = base.config_class
    # For custom code, transformers would rename layer types and not initialize buffers that are in no file.
    common = {"__module__": __name__, "is_custom_code": base.is_custom_code}
    name, config_name = f"Lolcats{base.__name__}", f"Lolcats{base_config.__name__}"
    config_class = type(config_name, (base_config,), {**common, "model_type": MODEL_TYPE})
    fp32 = [*(base._keep_in_fp32_modules_strict or []), "lolcats"]
    members = {**common, "config_class": config_class, "_keep_in_fp32_modules_strict": fp32}
    model_class = type(name, (LinearizedModel, base), members)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    _keep_conversions(base, name)
    _publish(model_class)
    return model_class


def _publish(cls: Any) -> None:
    """Let ``transformers serve`` find the class, which it looks up by name in its ``transformers`` module.

    That may not be the module in ``sys.modules``, since transformers is imported twice.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for module in (sys.modules["transformers"], getattr(server, "transformers", None)):
        if module is not None:
            setattr(module, cls.__name__, cls)


def _keep_conversions(base: Any, name: str) -> None:
    """Register the weight conversions of ``base`` for the class ``name``.

    Some families arrange weights differently in files than in memory (experts one by one, for example). transformers
    looks these conversions up by class or model type.
    """
    known = get_checkpoint_conversion_mapping(base.__name__)
    known = known or get_checkpoint_conversion_mapping(base.config_class.model_type)
    if known is not None:
        register_checkpoint_conversion_mapping(name, known, overwrite=True)


def classes_for(base_model_type: str) -> tuple[Any, type[PreTrainedModel]]:
    """Config and model class for a family by its Hugging Face model type, e.g. ``llama``."""
    if not isinstance(base_model_type, str) or base_model_type not in CONFIG_MAPPING:
        raise LolcatsError(
            f"This model was linearized from model type {base_model_type!r}, unknown to transformers. If code that "
            "comes with its base model defines it, allow that code: --trust-remote-code, with an adapter."
        )
    model_class = linearized_class(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_model_type]])
    return model_class.config_class, model_class


def become_linearized(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Change the class of a loaded model and its config in place; the weights stay where they are."""
    config = model.config
    base_type = config.model_type
    base: Any = type(model)
    cls = linearized_class(base)
    model.__class__ = cls
    config.__class__ = cls.config_class
    config.lolcats = json.loads(json.dumps(record))
    config.base_model_type = base_type
    config.architectures = [cls.__name__]
    if model.generation_config is not None:
        model.generation_config.cache_implementation = None  # Gemma 2's asks for its own cache
    add_plan(model, record)


def convert_as(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Linearize ``model`` exactly as a saved ``config.lolcats`` record says."""
    become_linearized(model, {k: v for k, v in record.items() if k not in ("form", "base", SEAL)})
    install(model, record)
    return model
