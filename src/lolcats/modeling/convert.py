"""Turn a loaded Hugging Face decoder into a linearized one, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lolcats.attention import AttentionSpec
from lolcats.config import AttentionConfig, Config, from_dict, to_dict
from lolcats.errors import LolcatsError
from lolcats.modeling.auto import SEAL
from lolcats.modeling.interface import IMPLEMENTATION, prepare_decoder_call
from lolcats.modeling.layer import Geometry, KeptAttention, LinearizedAttention

PROBE = "lolcats_probe"


@dataclasses.dataclass
class ProbedLayer:
    """One attention module as a real call showed it."""

    name: str
    module: nn.Module
    geometry: Geometry
    sliding_window: int | None
    obstacle: str | None
    """Why this layer cannot be linearized; None if it can."""


def convert(model: PreTrainedModel, config: Config | AttentionConfig | None = None) -> PreTrainedModel:
    """Replace the softmax attention of ``model`` by the one ``config`` describes; returns the same object.

    The model keeps its weights and becomes an instance of a subclass of its own class whose ``model_type`` is
    ``lolcats``. New parameters (feature maps and gates, fp32) hang on each attention module as ``lolcats``.

    Raises:
        LolcatsError: no decoder, no call of the attention interface, or a layer that cannot be linearized.
    """
    attention = config.attention if isinstance(config, Config) else config or AttentionConfig()
    if hasattr(model.config, "lolcats"):
        raise LolcatsError("This model is linearized already.")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise LolcatsError(f"{type(model).__name__} is no decoder-only language model; only those can be linearized.")
    layers = probe(model)
    kinds = layer_kinds(attention, layers)
    for layer in layers:
        if kinds[layer.geometry.layer] != "softmax" and layer.obstacle:
            raise LolcatsError(f"Layer {layer.geometry.layer} of {type(model).__name__} {layer.obstacle}.")
    record = {
        "attention": to_dict(attention),
        "layers": [
            {"name": layer.name, "kind": kinds[layer.geometry.layer], **dataclasses.asdict(layer.geometry)}
            for layer in layers
        ],
    }
    return convert_as(model, record)


def convert_as(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Linearize ``model`` exactly as a saved ``config.lolcats`` record says."""
    from lolcats.modeling.classes import become_linearized

    become_linearized(model, {k: v for k, v in record.items() if k not in ("form", "base", SEAL)})
    install(model, record)
    return model


def install(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Hang the modules that ``record`` (saved as ``config.lolcats``) lists on the model, and route its attention."""
    attention = from_dict(AttentionConfig, record["attention"])
    base_implementation = model.config._attn_implementation
    for entry in record["layers"]:
        module = model.get_submodule(entry["name"])
        geometry = Geometry(**{f.name: entry[f.name] for f in dataclasses.fields(Geometry)})
        if entry["kind"] == "softmax":
            module.lolcats = KeptAttention(base_implementation)
            continue
        spec = AttentionSpec(entry["kind"], attention.window, attention.window_size, attention.sinks)
        layer = LinearizedAttention(geometry, attention, spec, base_implementation)
        device = next(module.parameters()).device
        module.lolcats = layer if device.type == "meta" else layer.to(device)  # of a skeleton, they alone are real
    model.config._attn_implementation = IMPLEMENTATION
    decoder(model).register_forward_pre_hook(prepare_decoder_call, with_kwargs=True)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers under the language-model head."""
    return model.base_model


def layer_kinds(config: AttentionConfig, layers: list[ProbedLayer]) -> dict[int, str]:
    """Kind of every layer. Layers that slide already stay as they are, unless every layer does (Mistral 7B v0.1)."""
    chosen: dict[int, str] = {}
    indices = [layer.geometry.layer for layer in layers]
    for text, kind in config.layers.items():
        first, _, last = text.partition("-")
        try:
            wanted = range(int(first), int(last or first) + 1)
        except ValueError:
            raise LolcatsError(f"attention.layers: {text!r} is no layer index or range such as 7 or 0-3.") from None
        if missing := [i for i in wanted if i not in indices]:
            raise LolcatsError(f"attention.layers: the model has no attention layer {missing[0]} (it has {indices}).")
        chosen.update(dict.fromkeys(wanted, kind))
    mixed = any(layer.sliding_window is None for layer in layers)
    default = dict.fromkeys(indices, config.kind)
    default.update({x.geometry.layer: "softmax" for x in layers if mixed and x.sliding_window is not None})
    return {**default, **chosen}


@torch.no_grad()
def probe(model: PreTrainedModel) -> list[ProbedLayer]:
    """Run two tokens through the model and record every call of the attention interface, in order of layers.

    H, G and D are read from the tensors: families name (or omit) the attributes differently.
    """
    calls: list[tuple[nn.Module, Geometry, dict[str, Any]]] = []

    def record(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        geometry = Geometry(getattr(module, "layer_idx", len(calls)), q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        calls.append((module, geometry, kwargs))
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        return out, None

    AttentionInterface.register(PROBE, record)
    AttentionMaskInterface.register(PROBE, lambda **_: None)
    implementation, training = model.config._attn_implementation, model.training
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    failure: Exception | None = None
    try:
        model.eval()
        model.config._attn_implementation = PROBE
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # a family that computes attention itself may stumble over the unknown name in any way
        failure = error
    finally:
        model.config._attn_implementation = implementation
        model.train(training)
    if failure or not calls:
        raise LolcatsError(
            f"{type(model).__name__} does not call transformers' attention interface, so its attention cannot be "
            "swapped. Families such as Llama, Mistral, Qwen and Gemma do."
            + (f" (A call with another implementation failed: {failure})" if failure else "")
        ) from failure
    names = {module: name for name, module in model.named_modules()}
    return [
        ProbedLayer(names[module], module, geometry, kwargs.get("sliding_window"), _obstacle(module, geometry, kwargs))
        for module, geometry, kwargs in calls
    ]


def _obstacle(module: nn.Module, geometry: Geometry, kwargs: dict[str, Any]) -> str | None:
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        return "attends in both directions (an encoder): linear attention here is causal"
    if kwargs.get("s_aux") is not None:
        return "has learned sink logits of its own (s_aux), which the hybrid attention does not model"
    if kwargs.get("position_bias") is not None:
        return "adds a position bias to its attention logits, which the hybrid attention does not model"
    if geometry.head_dim != geometry.value_dim:
        return f"has queries and values of different size ({geometry.head_dim} and {geometry.value_dim})"
    return None
