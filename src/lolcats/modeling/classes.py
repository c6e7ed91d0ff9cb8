"""The linearized subclass of each base family, created when first needed: no model code per family."""

from __future__ import annotations

import copyreg
import functools
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from lolcats.errors import LolcatsError
from lolcats.files import give_usual_mode
from lolcats.modeling import others  # noqa: F401  PEFT and liger-kernel take our models for their base family
from lolcats.modeling.arguments import Arguments
from lolcats.modeling.checkpoint import load_adapter, verify_loading
from lolcats.modeling.code import CODE, came_with_model, copy_code, reference_to
from lolcats.modeling.install import install
from lolcats.modeling.interface import IMPLEMENTATION
from lolcats.modeling.layer import attached, linearized_layers
from lolcats.modeling.layer_types import as_the_base_has_them, for_a_model, saved_layer_types, show_engines
from lolcats.modeling.parallel import add_plan, is_split, settle
from lolcats.modeling.record import MODEL_TYPE, REMOTE_TYPE, SEAL, sealed

REMOTE_CODE = "modeling_lolcats.py"
AUTO_MAP = {
    "AutoConfig": "modeling_lolcats.LolcatsConfig",
    "AutoModelForCausalLM": "modeling_lolcats.LolcatsForCausalLM",
}

TASKS = (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification)
"""What else a linearized model can be loaded as, if its family has a class for it."""

ASSISTED = (
    "assisted decoding discards tokens, which cannot be removed from a linear-attention state. Use greedy decoding, "
    "sampling or beam search."
)
LOADED_STRICTLY = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
"""What transformers' loading report lists, and of an adapter is always empty."""
IMPOSSIBLE = {
    "assistant_model": ASSISTED,
    "prompt_lookup_num_tokens": ASSISTED,
    "assistant_early_exit": ASSISTED,
    "cache_implementation": "a linearized model has a state of fixed size and cannot use another cache. Leave it out.",
}
"""Arguments of ``generate`` that a linearized model does not support, and why."""
NOT_VLLM = (
    "vLLM's Transformers backend would compute softmax attention instead of this model's linearized attention. Serve "
    "it with lolcats' own plugin: pip install lolcats[vllm], leave out --model-impl, and let VLLM_PLUGINS, if it is "
    "set, name lolcats. If vLLM has no decoder of this family, use lolcats serve."
)


class LinearizedModel:
    """Mixin placed before the family's class: builds the extra modules, loads strictly, saves under our model type."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = for_a_model(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        record = self._within(config.lolcats)
        if not any(map(attached, self.modules())):  # type: ignore[attr-defined]  # else a part of it is one of ours
            install(self, record)  # type: ignore[arg-type]
        add_plan(self, record)  # type: ignore[arg-type]

    def _within(self, record: dict[str, Any]) -> dict[str, Any]:
        """``record``, with the names of layers as this model has them."""
        return record

    @classmethod
    def _verify(cls, info: dict[str, Any], path: Any, any_head: bool) -> None:
        verify_loading(info, path)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Like transformers' own, for merged models and adapters; errors name a missing or extra tensor.

        ``base=``: where the base model of an adapter is now, if it has moved. ``ignore_mismatched_sizes`` only applies
        to the head of a classifier: a decoder whose tensors have other shapes is an error. An argument that does not
        apply to an adapter is an error, too.
        """
        path = pretrained_model_name_or_path
        config, base = kwargs.get("config"), str(kwargs.pop("base", None) or "")
        if config is not None and config.lolcats.get("form") == "adapter":
            if issubclass(cls, OtherTask):
                raise LolcatsError(
                    f"{path} is an adapter; only merged models can be loaded as {cls.__name__}. Merge it first: "
                    f"lolcats export {path} --merge --out MERGED."
                )
            if kwargs.get("tp_plan") or kwargs.get("distributed_config"):
                raise LolcatsError(
                    f"{path} is an adapter; only merged models support tensor parallelism. Merge it first: "
                    f"lolcats export {path} --merge --out MERGED."
                )
            model = load_adapter(path, config, convert_as, Arguments.of(path, config, base, args, kwargs))
            if (other := (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")) is not None:
                model.load_adapter(other)  # a PEFT adapter that was trained on this one
            return (model, {name: [] for name in LOADED_STRICTLY}) if output_loading_info else model
        if base:
            raise LolcatsError(f"{path} is a merged model, which needs no base model: leave out base={base}.")
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise LolcatsError(f"{path}: a weight file is damaged or truncated ({error}).") from None
        cls._verify(info, path, ignore_mismatched_sizes)
        for layer in linearized_layers(settle(model)):
            layer.freeze_unused()  # transformers makes every loaded parameter trainable
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Like transformers' own, in safetensors, plus the file that ``trust_remote_code`` imports."""
        if is_split(self):  # type: ignore[arg-type]
            raise LolcatsError("This rank holds only some of the model's heads: load the whole model to save it.")
        config = self.config  # type: ignore[attr-defined]
        config.auto_map = dict(AUTO_MAP)
        config.lolcats = sealed({k: v for k, v in config.lolcats.items() if k != "base"})  # merged: needs no base
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        give_usual_mode(*Path(save_directory).glob("model*.safetensors"))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Like transformers' own; options that a fixed-size state does not support are refused before it begins."""
        config = kwargs.get("generation_config")
        given = kwargs if config is None else {**vars(config), **kwargs}
        for name, reason in IMPOSSIBLE.items():
            if given.get(name) is not None:
                raise LolcatsError(f"generate({name}=...): {reason}")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if attn_implementation != IMPLEMENTATION:
            raise LolcatsError(
                "The attention implementation of a linearized model cannot be set: it would silently become softmax."
            )

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Asked by vLLM's Transformers backend, and by nothing else."""
        raise LolcatsError(NOT_VLLM)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == IMPLEMENTATION:
            return IMPLEMENTATION
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)  # type: ignore[misc]


class OtherTask(LinearizedModel):
    """Mixin for a family's class without a language-model head, or with another head (``AutoModel``, classification).

    It loads what a linearized language model saved, decoder strictly: only the heads may differ.
    """

    def _within(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.base_model is not self:  # type: ignore[attr-defined]
            return record
        prefix = f"{self.base_model_prefix}."  # type: ignore[attr-defined]
        return {**record, "layers": [{**x, "name": x["name"].removeprefix(prefix)} for x in record["layers"]]}

    @classmethod
    def _verify(cls, info: dict[str, Any], path: Any, any_head: bool) -> None:
        prefix = f"{cls.base_model_prefix}."  # type: ignore[attr-defined]
        headless = modeling_auto.MODEL_MAPPING.get(cls.config_class, None) is cls  # type: ignore[attr-defined]
        missing = [x for x in map(str, info.get("missing_keys") or ()) if headless or x.startswith(prefix)]
        unexpected = [x for x in map(str, info.get("unexpected_keys") or ()) if x.startswith(prefix)]
        wrong = [x for x in info.get("mismatched_keys") or () if headless or not any_head or x[0].startswith(prefix)]
        found = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": wrong}
        verify_loading({**info, **found}, path)


class LinearizedConfig:
    """Mixin placed before the family's configuration class."""

    own_model: type | None = None
    """The base model's class if it came with the base model."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = super().from_dict(as_the_base_has_them(config_dict), **kwargs)  # type: ignore[misc]
        show_engines(result[0] if isinstance(result, tuple) else result)
        return result

    def to_dict(self) -> dict[str, Any]:
        return as_the_base_has_them(super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return super().to_diff_dict() | saved_layer_types(self)  # type: ignore[misc,no-any-return]

    @property
    def _attn_implementation(self) -> Any:
        return self._attn_implementation_internal  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        if value == "vllm":
            raise LolcatsError(NOT_VLLM)
        super(LinearizedConfig, type(self))._attn_implementation.fset(self, value)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Like transformers' own, plus the files that ``auto_map`` needs, if the configuration has one.

        All that saves a model or configuration comes through here, before anything is uploaded to the hub.
        """
        folder = Path(json_file_path).parent
        if self.own_model is not None:
            self.auto_map: Any = dict(AUTO_MAP)
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
        auto_map: Any = getattr(self, "auto_map", None) or {}
        if auto_map.get("AutoConfig") == AUTO_MAP["AutoConfig"]:
            shim = resources.files("lolcats.modeling").joinpath("remote.py").read_text()
            (folder / REMOTE_CODE).write_text(shim)
        if self.own_model is not None and "base" not in self.lolcats:  # type: ignore[attr-defined]
            copy_code(self.own_model, folder)


class Made(type):
    """The type of the classes made here. pickle cannot import them by name, so it stores from what to make them."""


def _reduced(cls: Any) -> Any:
    made: Any = vars(cls).get("_made_by")
    return cls.__qualname__ if made is None else made  # a class that someone derived from one of ours has its name


copyreg.pickle(Made, _reduced)  # type: ignore[arg-type]


@functools.cache
def linearized_class(base: Any) -> Any:
    """The linearized subclass of a Hugging Face model class, with its own config class."""
    config_class = _config_class_for(base)
    name = f"Lolcats{base.__name__}"
    fp32 = [*(base._keep_in_fp32_modules_strict or []), "lolcats"]
    members = {"config_class": config_class, "_keep_in_fp32_modules_strict": fp32}
    model_class = Made(name, (LinearizedModel, base), members | _common(base, linearized_class))
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    _register_tasks(base, model_class)
    _keep_conversions(base, name)
    _list(base, name)
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{MODEL_TYPE}:{name}"] = name
    _publish(model_class)
    return model_class


@functools.cache
def other_task_class(base: Any) -> Any:
    """The same for a family's class without a language-model head, or with another one."""
    fp32 = [*(base._keep_in_fp32_modules_strict or []), "lolcats"]
    members = {"config_class": _config_class_for(base), "_keep_in_fp32_modules_strict": fp32}
    model_class = Made(f"Lolcats{base.__name__}", (OtherTask, base), members | _common(base, other_task_class))
    _keep_conversions(base, model_class.__name__)
    _list(base, model_class.__name__)
    return model_class


def _register_tasks(base: Any, model_class: Any) -> None:
    """Let transformers' other auto classes find ``model_class``, or one that has the head they are for."""
    autos: list[Any] = [x for x in vars(modeling_auto).values() if isinstance(x, type)]
    for auto in (x for x in autos if getattr(x, "_model_mapping", None) is not None):
        known = auto._model_mapping.get(base.config_class, None)
        if known is base:
            auto.register(model_class.config_class, model_class, exist_ok=True)
        elif auto in TASKS and getattr(known, "config_class", None) is base.config_class:
            auto.register(model_class.config_class, other_task_class(known), exist_ok=True)


@functools.cache
def linearized_config_class(base: Any, own_model: Any = None) -> Any:
    """The linearized subclass of a Hugging Face configuration class. ``own_model``: see :class:`LinearizedConfig`."""
    kind = {"model_type": MODEL_TYPE if own_model is None else REMOTE_TYPE, "own_model": own_model}
    members = kind | _common(base, linearized_config_class, *filter(None, [own_model]))
    return Made(f"Lolcats{base.__name__}", (LinearizedConfig, base), members)


def _config_class_for(base: Any) -> Any:
    own = came_with_model(base) or came_with_model(base.config_class)
    return linearized_config_class(base.config_class, *([base] if own else []))


def _common(base: Any, function: Any, *more: Any) -> dict[str, Any]:
    """Members of every class made here. What transformers decides by the module of a class is as for ``base``.

    For custom code, it would rename layer types and not initialize buffers that are in no file. It reads the module's
    text to see whether there is a choice of how to compute experts. It would also save the file of our class as the
    model's own code, if it took the class to be that (_auto_class).
    """
    questions = ("is_custom_code", "_can_set_experts_implementation")
    answers = {question: getattr(base, question) for question in questions if hasattr(base, question)}
    return {"__module__": __name__, "_made_by": (function, (base, *more)), "_auto_class": None, **answers}


def _list(base: Any, name: str) -> None:
    """List the class ``name`` wherever transformers lists the name of ``base``.

    Trainer (which must shift labels), pipelines, model cards and ``transformers serve`` look for class names there.
    The keys are model types; ours is none, so that the auto classes, which go by configuration, do not see the entry.
    """
    tables: dict[str, Any] = {k: v for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")}
    for table in tables.values():
        names = {n for entry in table.values() for n in (entry if isinstance(entry, tuple) else (entry,))}
        if base.__name__ in names:
            table[f"{MODEL_TYPE}:{name}"] = name


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


def base_class(cls: type) -> Any:
    """The family's own class of a linearized one."""
    ours = (LinearizedModel, LinearizedConfig)
    return next(base for base in cls.__mro__ if not issubclass(base, ours) and base not in ours)


def classes_for(base_model_type: str) -> tuple[Any, type[PreTrainedModel]]:
    """Config and model class for a family by its Hugging Face model type, e.g. ``llama``."""
    if not isinstance(base_model_type, str) or base_model_type not in CONFIG_MAPPING:
        raise LolcatsError(
            f"transformers does not know model type {base_model_type!r}, which this model was linearized from. Upgrade "
            "transformers or, if the base model comes with its own code, allow that code: --trust-remote-code, or "
            "lolcats.load(DIR, trust=True) in Python."
        )
    model_class = linearized_class(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_model_type]])
    return model_class.config_class, model_class


def become_linearized(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Change the class of a loaded model and its config in place; the weights stay where they are."""
    config = model.config
    model.name_or_path = ""  # nowhere on disk: PEFT would write the base model into adapters trained on top of it
    base_type = config.model_type
    base: Any = type(model)
    cls = linearized_class(base)
    model.__class__ = cls
    config.__class__ = cls.config_class
    config.lolcats = json.loads(json.dumps(record))
    if cls.config_class.own_model is not None:
        config.lolcats[CODE] = reference_to(base)
    config.base_model_type = base_type
    config.architectures = [cls.__name__]
    if model.generation_config is not None:
        model.generation_config.cache_implementation = None  # Gemma 2's asks for its own cache
    add_plan(model, record)


def convert_as(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Linearize ``model`` exactly as a saved ``config.lolcats`` record says."""
    become_linearized(model, {k: v for k, v in record.items() if k not in ("form", "base", "parts", SEAL)})
    install(model, record)
    return model
