"""Turn a loaded Hugging Face decoder into a linearized one, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, Config, from_dict, to_dict
from lolcats.errors import LolcatsError
from lolcats.modeling.auto import SEAL
from lolcats.modeling.interface import IMPLEMENTATION, prepare_decoder_call
from lolcats.modeling.layer import Geometry, KeptAttention, LinearizedAttention, layer_spec, linearized_layers
from lolcats.modeling.probe import ProbedLayer, probe, text_config
from lolcats.modeling.rotary import check_rotates, check_rotation, keep_rotation


def convert(model: PreTrainedModel, config: Config | AttentionConfig | None = None) -> PreTrainedModel:
    """Replace the softmax attention of ``model`` with the one that ``config`` describes; returns the same object.

    The model keeps its weights and becomes an instance of a subclass of its own class whose ``model_type`` is
    ``lolcats``. New parameters (feature maps and gates, fp32) are added to each attention module as ``lolcats``.

    Raises:
        LolcatsError: if the model is not a decoder, does not call the attention interface, or has a layer that cannot
            be linearized.
    """
    attention = config.attention if isinstance(config, Config) else config or AttentionConfig()
    if hasattr(model.config, "lolcats"):
        raise LolcatsError("This model is already linearized.")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise LolcatsError(f"{type(model).__name__} is not a decoder-only language model, so it cannot be linearized.")
    layers = probe(model)
    kinds = layer_kinds(attention, layers)
    for layer in layers:
        if layer.obstacle and (kinds[layer.geometry.layer] != "softmax" or not layer.keepable):
            raise LolcatsError(f"Layer {layer.geometry.layer} of {type(model).__name__} {layer.obstacle}.")
    record = {
        "attention": to_dict(attention),
        "layers": [
            {"name": layer.name, "kind": kinds[layer.geometry.layer], **dataclasses.asdict(layer.geometry)}
            for layer in layers
        ],
    }
    convert_as(model, record)
    if any(layer.spec.unrotated for layer in linearized_layers(model)):
        check_rotates(model)
        if model.device.type != "meta":
            check_rotation(model)
    return model


def convert_as(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Linearize ``model`` exactly as a saved ``config.lolcats`` record says."""
    from lolcats.modeling.classes import become_linearized

    become_linearized(model, {k: v for k, v in record.items() if k not in ("form", "base", SEAL)})
    install(model, record)
    return model


def install(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Add the modules that ``record`` (saved as ``config.lolcats``) lists to the model, and route its attention."""
    attention = from_dict(AttentionConfig, record["attention"])
    config = text_config(model)
    base_implementation = config._attn_implementation
    for entry in record["layers"]:
        module = model.get_submodule(entry["name"])
        geometry = Geometry(**{f.name: entry[f.name] for f in dataclasses.fields(Geometry)})
        if entry["kind"] == "softmax":
            module.lolcats = KeptAttention(base_implementation)
            continue
        spec = layer_spec(attention, entry["kind"])
        layer = LinearizedAttention(geometry, attention, spec, base_implementation)
        device = next(module.parameters()).device
        module.lolcats = layer if device.type == "meta" else layer.to(device)  # in a skeleton, only they are real
        if spec.unrotated:
            module.register_forward_pre_hook(keep_rotation, with_kwargs=True)
    config._attn_implementation_internal = IMPLEMENTATION  # not of a vision or audio part
    for part in decoders(model):
        # A plain list, which torch does not register; read in every call.
        part.lolcats_layers = linearized_layers(part)
        part.register_forward_pre_hook(prepare_decoder_call, with_kwargs=True)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers under the language-model head."""
    return model.base_model


def decoders(model: PreTrainedModel) -> list[Any]:
    """Models inside ``model`` that hold its layers, outermost first; the head may call any of them (as in OPT)."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return [m for m in parts if any(isinstance(x, KeptAttention | LinearizedAttention) for x in m.modules())] or [model]


def layer_kinds(config: AttentionConfig, layers: list[ProbedLayer]) -> dict[int, str]:
    """Kind of every layer. Layers with a sliding window stay as they are, unless all have one (Mistral 7B v0.1)."""
    chosen: dict[int, str] = {}
    indices = [layer.geometry.layer for layer in layers]
    for text, kind in config.layers.items():
        first, _, last = text.partition("-")
        try:
            wanted = range(int(first), int(last or first) + 1)
        except ValueError:
            raise LolcatsError(f"attention.layers: {text!r} is not a layer index or range such as 7 or 0-3.") from None
        if missing := [i for i in wanted if i not in indices]:
            raise LolcatsError(f"attention.layers: the model has no attention layer {missing[0]} (it has {indices}).")
        chosen.update(dict.fromkeys(wanted, kind))
    mixed = any(layer.sliding_window is None for layer in layers)
    default = dict.fromkeys(indices, config.kind)
    default.update({x.geometry.layer: "softmax" for x in layers if mixed and x.sliding_window is not None})
    return {**default, **chosen}
