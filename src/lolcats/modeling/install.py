"""Put the modules of a conversion into a model, and route its attention to them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, from_dict
from lolcats.modeling.call import end
from lolcats.modeling.heads import KeptHeads
from lolcats.modeling.hook import prepare_decoder_call
from lolcats.modeling.interface import IMPLEMENTATION
from lolcats.modeling.layer import Geometry, KeptAttention, LinearizedAttention, attached, layer_spec
from lolcats.modeling.probe import text_config
from lolcats.modeling.rotary import carry_rotation


def install(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Add the modules that ``record`` (saved as ``config.lolcats``) lists to the model, and route its attention."""
    attention = from_dict(AttentionConfig, record["attention"])
    config = text_config(model)
    base_implementation = _base_implementation(model)
    for entry in record["layers"]:
        module = model.get_submodule(entry["name"])
        geometry = Geometry(**{f.name: entry[f.name] for f in dataclasses.fields(Geometry)})
        if entry["kind"] == "softmax":
            module.lolcats = KeptAttention(base_implementation, geometry.layer)
            continue
        spec = layer_spec(attention, entry["kind"])
        kept = KeptHeads(geometry, tuple(entry["softmax_heads"])) if entry.get("softmax_heads") else None
        of_maps = geometry if kept is None else kept.of_linearized
        layer = LinearizedAttention(of_maps, attention, spec, base_implementation, kept)
        if kept is not None:
            for each in layer.modules():  # ranks hold as many heads each, but not as many linearized ones
                each.__dict__["is_uneven"] = True
        device = next(module.parameters()).device
        module.lolcats = layer if device.type == "meta" else layer.to(device)  # in a skeleton, only they are real
        if spec.unrotated:
            module.register_forward_pre_hook(carry_rotation, with_kwargs=True)
    config._attn_implementation_internal = IMPLEMENTATION  # not of a vision or audio part
    for part in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        other: Any = part.config
        if other._attn_implementation == IMPLEMENTATION and other.get_text_config(decoder=True) is not config:
            other._attn_implementation_internal = part.get_correct_attn_implementation(None)
    for part in decoders(model):
        # A plain list, which torch does not register; read in every call. PEFT may replace what is attached to them.
        part.lolcats_attentions = [m for m in part.modules() if isinstance(attached(m), LinearizedAttention)]
        part.register_forward_pre_hook(prepare_decoder_call, with_kwargs=True)
        part.register_forward_hook(end, always_call=True)


def _base_implementation(model: Any) -> str:
    """The attention implementation of the base model; the family's default if the configuration names ours, because it
    comes from a linearized model or was asked for ours."""
    implementation: str = text_config(model)._attn_implementation
    return model.get_correct_attn_implementation(None) if implementation == IMPLEMENTATION else implementation


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers under the language-model head."""
    return model.base_model


def inputs_of(ids: Tensor, positions: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a forward pass over whole rows (B, T), without a cache.

    positions: (B, T) position ids; without them the argument is left out, since some families do not take it.
    """
    return {"input_ids": ids, "use_cache": False} | ({} if positions is None else {"position_ids": positions})


def decoders(model: PreTrainedModel) -> list[Any]:
    """Models inside ``model`` that hold its layers, outermost first; the head may call any of them (as in OPT)."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return [m for m in parts if any(isinstance(x, KeptAttention | LinearizedAttention) for x in m.modules())] or [model]
