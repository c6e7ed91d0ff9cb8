"""Sizes of a model, its feature maps and its LoRA, counted on the meta device from the configuration.

Shapes: H query heads, G key/value heads, D head dim, F features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lolcats.attention.path import fits_kernels
from lolcats.config import Config, read_yaml
from lolcats.errors import LolcatsError, first_line
from lolcats.evaluation.memory import cache_bytes
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import LinearizedAttention, decoder_layers, linearized_layers
from lolcats.stages.finetune.stage import add_lora
from lolcats.weights.base import NEEDS_CODE, Base, is_gguf
from lolcats.weights.base import read_config as config_of

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what families call their number of experts
CONFIG = "config.json"
CHOSEN = ("num_experts_per_tok", "top_k_experts")


@dataclass(frozen=True)
class Size:
    """Numbers of parameters and channels; those of the largest layer where layers differ."""

    family: str
    layers: int
    linearized: int
    hidden: int
    heads: int
    kv_heads: int
    """Heads that are linearized."""
    queries: int
    keys: int
    """All query and key/value heads of a layer, with those that stay softmax attention beside linearized ones."""
    parted: int
    """Layers that have both kinds of heads."""
    head_dim: int
    features: int
    mlp: int
    """MLP channels per token that backward needs: gate and up together."""
    vocabulary: int
    layer: int
    """Parameters of one decoder layer."""
    decoder: int
    """Parameters of all decoder layers."""
    active: int
    """Parameters of the decoder layers that are used for one token: all except experts that are not chosen."""
    embedding: int
    head: int
    """Parameters of the output layer; 0 if it is tied to the embedding."""
    maps: int
    """Parameters of feature maps and gates in all layers; 0 without linear attention, which has no stage 1."""
    lora: int
    unrotated: int
    """Channels per token and layer that feature maps before RoPE add: the unrotated q and k."""
    kernels: bool
    """Whether the Triton kernels support the model's attention in bf16."""
    state: int = 0
    """Bytes of one sequence's state, whatever its length, in bf16 with sums in fp32."""
    token: int = 0
    """Bytes that each token adds: its keys and values in kept heads and layers, in bf16."""
    window: int = 0
    """Bytes of the keys and values in kept layers that slide a window, once it is full, in bf16."""
    places: tuple[int, ...] = ()
    """The layers that are linearized."""
    teacher_token: int = 0
    teacher_window: int = 0
    """The same of the teacher."""

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return self.decoder + self.embedding + self.head


def geometries() -> dict[str, dict[str, int]]:
    """Configurations in geometries.yaml by name."""
    text = resources.files("lolcats.plan").joinpath("geometries.yaml").read_text()
    return dict(read_yaml(text, "geometries.yaml"))


def read_config(model: str, trust: bool = False) -> Any:
    """The configuration from a hub id, a directory, a ``config.json``, or the name of a known geometry.

    Here and below, ``trust``: run Python code that comes with the model.
    """
    if model in geometries():
        return LlamaConfig(**geometries()[model], vocab_size=128256, max_position_embeddings=8192)
    path = Path(model).expanduser()
    if path.is_file() and is_gguf(path):
        return config_of(Base(str(path.absolute()), "gguf", ""))
    place = path.parent if path.name == CONFIG and path.is_file() else path  # where code of its own would lie
    try:
        return AutoConfig.from_pretrained(place if path.exists() else model, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise LolcatsError(NEEDS_CODE.format(model)) from None
        known = ", ".join(geometries())
        raise LolcatsError(
            f"Cannot load a configuration from {model!r} ({first_line(error)}). Give a hub id, a model directory, a "
            f"config.json, or one of {known}."
        ) from None


def size_of(model_config: Any, config: Config, trust: bool = False) -> Size:
    """Count everything by building the model, its feature maps and LoRA on the meta device."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                model_config, dtype=torch.bfloat16, trust_remote_code=trust
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise LolcatsError(NEEDS_CODE.format(model_config.name_or_path or "This model")) from None
        name, reason = model_config.model_type, first_line(error)
        raise LolcatsError(f"transformers cannot build this {name} model: {reason}.") from None
    share, family = chosen_share(model_config), model_config.model_type
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    with torch.device("meta"):
        convert(model, config)
    layers = decoder_layers(model)
    counts = [_parameters(layer) for layer in layers]
    found = linearized_layers(model)
    if not found:
        raise LolcatsError("Nothing to plan: attention.kind and attention.layers leave every layer unchanged.")
    largest = max(found, key=lambda layer: layer.geometry.heads * layer.geometry.head_dim)
    whole = largest.geometry if largest.kept is None else largest.kept.geometry
    active = sum(_active(layer, share) for layer in layers)
    maps = sum(p.numel() for layer in found for p in layer.parameters()) if config.attention.has_linear else 0
    memory = {"state": cache_bytes(model, 0)[1]} | _growing(model)
    with torch.device("meta"):
        wrapped = add_lora(model, config.finetune)
    return Size(
        family=family, layers=len(layers), linearized=len(found), hidden=embedding.shape[1],
        heads=largest.geometry.heads, kv_heads=largest.geometry.kv_heads, queries=whole.heads, keys=whole.kv_heads,
        parted=sum(layer.kept is not None for layer in found), head_dim=largest.geometry.head_dim,
        features=largest.phi_k.num_features, mlp=max(_mlp_channels(layer, model_config) for layer in layers),
        vocabulary=embedding.shape[0], layer=max(counts), decoder=sum(counts),
        active=active, embedding=embedding.numel(),
        head=0 if head is None or head is embedding else head.numel(), maps=maps,
        lora=sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name),
        unrotated=_unrotated_channels(largest),
        places=tuple(layer.geometry.layer for layer in found),
        kernels=all(fits_kernels(layer.geometry.head_dim, torch.bfloat16, layer.spec) for layer in found),
        **memory,
    )  # fmt: skip


def chosen_share(config: Any) -> float:
    """Share of the experts that each token is routed to; 1 for dense models."""
    text = config.get_text_config()
    total = next((n for name in EXPERTS if (n := getattr(text, name, None))), None)
    chosen = next((n for name in CHOSEN if (n := getattr(text, name, None))), None)
    return chosen / total if total and chosen else 1.0


def _growing(model: Any) -> dict[str, int]:
    """Bytes of a sequence that each token adds, and those that stop growing with a window."""
    many = 1 << 30  # more than any window
    (_, state), *longer = (cache_bytes(model, tokens) for tokens in (0, many, many + 1))
    (teacher, student), (teacher_token, token) = longer[0], (b - a for a, b in zip(*longer, strict=True))
    return {
        "token": token, "window": student - state - many * token,
        "teacher_token": teacher_token, "teacher_window": teacher - many * teacher_token,
    }  # fmt: skip


def _base_parameters(layer: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in layer.named_parameters() if "lolcats." not in name)


def _parameters(layer: nn.Module) -> int:
    return sum(p.numel() for _, p in _base_parameters(layer))


def _active(layer: nn.Module, share: float) -> int:
    return round(sum(p.numel() * (share if "experts." in name else 1) for name, p in _base_parameters(layer)))


def _unrotated_channels(layer: LinearizedAttention) -> int:
    if not layer.spec.unrotated:
        return 0
    return (layer.geometry.heads + layer.geometry.kv_heads) * layer.geometry.head_dim


def _mlp_channels(layer: nn.Module, config: Any) -> int:
    """Channels inside the MLP of a layer: outputs of all weights outside attention, except hidden states."""
    text = config.get_text_config()
    attention = [m for m in layer.modules() if isinstance(getattr(m, "lolcats", None), nn.Module)]
    inside = {p for module in attention for p in module.parameters()}
    outside = [(name, p) for name, p in layer.named_parameters() if p not in inside and p.ndim > 1]
    dense = sum(p.shape[0] for name, p in outside if "experts." not in name and p.shape[0] != text.hidden_size)
    if not any("experts." in name for name, _ in outside):
        return dense
    chosen = next((n for name in CHOSEN if (n := getattr(text, name, None))), 1)
    return dense + 2 * chosen * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
