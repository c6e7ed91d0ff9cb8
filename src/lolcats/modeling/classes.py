"""The linearized subclass of each base family, made when first needed: no model code per family."""

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
from lolcats.modeling.auto import MODEL_TYPE, sealed
from lolcats.modeling.convert import install
from lolcats.modeling.interface import IMPLEMENTATION

REMOTE_CODE = "modeling_lolcats.py"
AUTO_MAP = {
    "AutoConfig": "modeling_lolcats.LolcatsConfig",
    "AutoModelForCausalLM": "modeling_lolcats.LolcatsForCausalLM",
}

ASSISTED = (
    "assisted decoding takes tokens back, which cannot be taken out of a linear-attention state. Use greedy decoding, "
    "sampling or beam search."
)
IMPOSSIBLE = {
    "assistant_model": ASSISTED,
    "prompt_lookup_num_tokens": ASSISTED,
    "assistant_early_exit": ASSISTED,
    "cache_implementation": "a linearized model has a state of fixed size and cannot use another cache. Leave it out.",
}
"""Arguments of ``generate`` that need what a linearized model does not have."""


class LinearizedModel:
    """Mixin put before the family's class: builds the extra modules, loads strictly, saves under our model type."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, config.lolcats)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers' own, for merged models and adapters; a missing or extra tensor is an error that names it."""
        from lolcats.modeling.checkpoint import load_adapter, verify_loading

        config = kwargs.get("config")
        if config is not None and config.lolcats.get("form") == "adapter":
            trust = bool(kwargs.get("trust_remote_code"))
            return load_adapter(path, config, kwargs.get("dtype", "auto"), kwargs.get("device_map"), trust)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise LolcatsError(f"{path}: a weight file is damaged or truncated ({error}).") from None
        verify_loading(info, path)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, in safetensors, plus the file that ``trust_remote_code`` imports."""
        config = self.config  # type: ignore[attr-defined]
        config.auto_map = dict(AUTO_MAP)
        config.lolcats = sealed({k: v for k, v in config.lolcats.items() if k != "base"})  # merged: stands alone
        super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]
        shim = resources.files("lolcats.modeling").joinpath("remote.py").read_text()
        (Path(directory) / REMOTE_CODE).write_text(shim)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; what a state of fixed size cannot do is refused before it begins."""
        config = kwargs.get("generation_config")
        given = kwargs if config is None else {**vars(config), **kwargs}
        for name, reason in IMPOSSIBLE.items():
            if given.get(name) is not None:
                raise LolcatsError(f"generate({name}=...): {reason}")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> None:
        if implementation != IMPLEMENTATION:
            raise LolcatsError(
                "The attention of a linearized model cannot be set: it would silently become softmax attention."
            )

    def get_correct_attn_implementation(self, requested: str | None, *args: Any, **kwargs: Any) -> str:
        if requested == IMPLEMENTATION:
            return IMPLEMENTATION
        return super().get_correct_attn_implementation(requested, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def linearized_class(base: Any) -> Any:
    """The linearized subclass of a Hugging Face model class, with its own config class."""
    base_config = base.config_class
    # As custom code, transformers would rename layer types and leave buffers that are in no file uninitialized.
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
    """``transformers serve`` looks a model's class up by name in what it knows as ``transformers``.

    That need not be the module of that name, since transformers' import runs twice.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for module in (sys.modules["transformers"], getattr(server, "transformers", None)):
        if module is not None:
            setattr(module, cls.__name__, cls)


def _keep_conversions(base: Any, name: str) -> None:
    """Weights in files are arranged otherwise than in memory in some families (experts one by one, say), which
    transformers looks up by class or model type: the class ``name`` is to be found as its base is."""
    known = get_checkpoint_conversion_mapping(base.__name__)
    known = known or get_checkpoint_conversion_mapping(base.config_class.model_type)
    if known is not None:
        register_checkpoint_conversion_mapping(name, known, overwrite=True)


def classes_for(base_model_type: str) -> tuple[Any, type[PreTrainedModel]]:
    """Config and model class for a family by its Hugging Face model type, e.g. ``llama``."""
    if not isinstance(base_model_type, str) or base_model_type not in CONFIG_MAPPING:
        raise LolcatsError(f"This model was linearized from model type {base_model_type!r}, unknown to transformers.")
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
        model.generation_config.cache_implementation = None  # Gemma 2's asks for a cache of its own
