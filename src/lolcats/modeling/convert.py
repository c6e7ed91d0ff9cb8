"""Turn a loaded Hugging Face decoder into a linearized one, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, Config, to_dict
from lolcats.errors import LolcatsError
from lolcats.modeling.classes import convert_as
from lolcats.modeling.heads import kept_heads
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.probe import ProbedLayer, probe
from lolcats.modeling.rotary import check_rotates, check_rotation


def convert(model: PreTrainedModel, config: Config | AttentionConfig | None = None) -> PreTrainedModel:
    """Replace the softmax attention of ``model`` with the one that ``config`` describes; returns the same object.

    The model keeps its weights and becomes an instance of a subclass of its own class whose ``model_type`` is
    ``lolcats``. New parameters (feature maps and gates, fp32) are added to each attention module as ``lolcats``.

    Raises:
        LolcatsError: if the model is not a decoder, does not call the attention interface, or has a layer that cannot
            be linearized.
    """
    attention = config.attention if isinstance(config, Config) else config or AttentionConfig()
    if hasattr(getattr(model, "config", None), "lolcats"):
        raise LolcatsError("This model is already linearized.")
    if hasattr(model, "get_base_model"):
        raise LolcatsError(
            f"{type(model).__name__} is PEFT's wrapper around a model. Convert the model before you wrap it: "
            "get_peft_model(lolcats.convert(model, config), lora). Adapters that are already trained can be merged "
            "first: lolcats.convert(wrapped.merge_and_unload(), config)."
        )
    if not isinstance(model, PreTrainedModel):
        raise LolcatsError(f"{type(model).__name__} is not a transformers model, so it cannot be linearized.")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise LolcatsError(f"{type(model).__name__} is not a decoder-only language model, so it cannot be linearized.")
    if attention.softmax_budget:
        raise LolcatsError(
            "convert() does not search for heads (attention.softmax_budget). Run lolcats select or "
            "lolcats.selection.select first, then set attention.softmax_heads."
        )
    layers = probe(model)
    kinds = layer_kinds(attention, layers)
    kept = kept_heads(attention.softmax_heads, {layer.geometry.layer: layer.geometry for layer in layers})
    for layer in layers:
        if len(kept.get(layer.geometry.layer, ())) == layer.geometry.kv_heads:
            kinds[layer.geometry.layer] = "softmax"
    for layer in layers:
        if layer.obstacle and (kinds[layer.geometry.layer] != "softmax" or not layer.keepable):
            raise LolcatsError(f"Layer {layer.geometry.layer} of {type(model).__name__} {layer.obstacle}.")
    record = {
        "attention": to_dict(attention),
        "layers": [_entry(layer, kinds[layer.geometry.layer], kept.get(layer.geometry.layer, ())) for layer in layers],
    }
    with undone_on_failure(model):
        convert_as(model, record)
        if any(layer.spec.unrotated for layer in linearized_layers(model)):
            check_rotates(model)
            if model.device.type != "meta":
                check_rotation(model)
    return model


@contextmanager
def undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """If the block fails, undo what it added to or set in the modules and configurations of ``model``, and their
    classes. Values of tensors are not kept."""
    parts: list[Any] = list(model.modules())
    parts += [part.config for part in parts if isinstance(part, PreTrainedModel)]
    parts += [model.config.get_text_config(decoder=True), model.generation_config]
    before = [(part, type(part), _members(part)) for part in parts if part is not None]
    try:
        yield
    except BaseException:
        for part, kind, members in before:
            part.__class__ = kind
            vars(part).clear()
            for name, value, entries in members:
                if entries is not None:  # in the same dictionary, which the handles of hooks refer to
                    value.clear()
                    value.update(entries)
                vars(part)[name] = value
        raise


def _members(part: Any) -> list[tuple[str, Any, dict[Any, Any] | None]]:
    """Name and value of each attribute, and what it contains if it is a dictionary."""
    return [(name, x, dict(x) if isinstance(x, dict) else None) for name, x in vars(part).items()]


def _entry(layer: ProbedLayer, kind: str, kept: tuple[int, ...]) -> dict[str, Any]:
    """A layer as config.json records it; ``softmax_heads``: the key/value heads that stay, if some but not all do."""
    entry = {"name": layer.name, "kind": kind, **dataclasses.asdict(layer.geometry)}
    return entry | {"softmax_heads": list(kept)} if kept and kind != "softmax" else entry


def named_layers(text: str) -> range:
    """The layers that a key of ``attention.layers`` names."""
    first, _, last = text.partition("-")
    try:
        named = range(int(first), int(last or first) + 1)
    except ValueError:
        raise LolcatsError(f"attention.layers: {text!r} is not a layer index or range such as 7 or 0-3.") from None
    if not named:
        raise LolcatsError(f"attention.layers: {text!r} names no layer: write the lower index first.")
    return named


def layer_kinds(config: AttentionConfig, layers: list[ProbedLayer]) -> dict[int, str]:
    """Kind of every layer. Layers with a sliding window stay as they are, unless all have one (Mistral 7B v0.1)."""
    chosen: dict[int, str] = {}
    indices = [layer.geometry.layer for layer in layers]
    for text, kind in config.layers.items():
        wanted = named_layers(text)
        if missing := [i for i in wanted if i not in indices]:
            raise LolcatsError(f"attention.layers: the model has no attention layer {missing[0]} (it has {indices}).")
        chosen.update(dict.fromkeys(wanted, kind))
    mixed = any(layer.sliding_window is None for layer in layers)
    default = dict.fromkeys(indices, config.kind)
    default.update({x.geometry.layer: "softmax" for x in layers if mixed and x.sliding_window is not None})
    return {**default, **chosen}
