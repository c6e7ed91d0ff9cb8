"""Turn a loaded Hugging Face decoder into a linearized one, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, Config, from_dict, to_dict
from lolcats.errors import LolcatsError
from lolcats.modeling.auto import SEAL
from lolcats.modeling.interface import IMPLEMENTATION, note_rotation, prepare_decoder_call
from lolcats.modeling.layer import (
    AttentionCall,
    Geometry,
    KeptAttention,
    LinearizedAttention,
    layer_spec,
    linearized_layers,
    override,
)
from lolcats.modeling.probe import ProbedLayer, probe, text_config

NO_ROTATION = (
    "does not rotate its queries and keys by RoPE as transformers' families do, so that feature maps cannot see them "
    "unrotated: use attention.feature_inputs=rotated"
)
SAME = 0.05  # by which, in 16 bits, q and k without RoPE may differ between positions


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
    if model.device.type != "meta" and any(layer.spec.unrotated for layer in linearized_layers(model)):
        _check_unrotated(model)
    return model


def convert_as(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Linearize ``model`` exactly as a saved ``config.lolcats`` record says."""
    from lolcats.modeling.classes import become_linearized

    become_linearized(model, {k: v for k, v in record.items() if k not in ("form", "base", SEAL)})
    install(model, record)
    return model


def install(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Hang the modules that ``record`` (saved as ``config.lolcats``) lists on the model, and route its attention."""
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
        module.lolcats = layer if device.type == "meta" else layer.to(device)  # of a skeleton, they alone are real
        if spec.unrotated:
            if not getattr(module, "use_rope", True):
                raise _no_rotation(model, geometry.layer)
            module.register_forward_pre_hook(note_rotation, with_kwargs=True)
    config._attn_implementation_internal = IMPLEMENTATION  # not of a vision or audio part
    for part in decoders(model):
        # A list, so not in the model's own lists: looked at in every call.
        part.lolcats_layers = linearized_layers(part)
        part.register_forward_pre_hook(prepare_decoder_call, with_kwargs=True)


@torch.no_grad()
def _check_unrotated(model: PreTrainedModel) -> None:
    """LolcatsError unless q and k without RoPE are found, and are the same wherever a sequence begins."""
    found: list[list[Tensor]] = []

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        found[-1].append(torch.cat([call.q[..., call.q.shape[-1] // 2 :], call.k[..., call.k.shape[-1] // 2 :]], 1))

    layers, training = linearized_layers(model), model.training
    ids = torch.arange(1, 5, device=model.device)[None]
    try:
        with override(model, mode="transfer", observer=observe):
            for start in (0, 7):
                found.append([])
                positions = torch.arange(start, start + 4, device=model.device)[None]
                decoder(model.eval())(input_ids=ids, position_ids=positions, use_cache=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise LolcatsError(f"{_base_name(model)} {NO_ROTATION}.") from error
    finally:
        model.train(training)
    for layer, *pair in zip(layers, *found, strict=True):
        first, second = (x.float() for x in pair)
        if (first - second).norm() > SAME * first.norm():
            raise _no_rotation(model, layer.geometry.layer)


def _no_rotation(model: PreTrainedModel, layer: int) -> LolcatsError:
    return LolcatsError(f"Layer {layer} of {_base_name(model)} {NO_ROTATION}.")


def _base_name(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix("Lolcats")


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers under the language-model head."""
    return model.base_model


def decoders(model: PreTrainedModel) -> list[Any]:
    """Models inside ``model`` that hold its layers, outermost first; the head may call any (OPT's the inner one)."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return [m for m in parts if any(isinstance(x, KeptAttention | LinearizedAttention) for x in m.modules())] or [model]


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
