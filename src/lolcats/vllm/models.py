"""Linearized models for vLLM: its own decoder of the family, whose attention is replaced in the linearized layers.

``LolcatsLlamaForCausalLM`` and its like are subclasses of vLLM's ``LlamaForCausalLM``, made when vLLM asks this module
for them. No family has code here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec

from lolcats.modeling.classes import base_class
from lolcats.modeling.layer import LinearizedAttention
from lolcats.modeling.layer_types import for_a_model
from lolcats.tensors import compare_keys
from lolcats.vllm.families import check_family
from lolcats.vllm.heads import SplitAttention
from lolcats.vllm.layer import StateAttention
from lolcats.vllm.logits import check_logits
from lolcats.vllm.plugin import PREFIX
from lolcats.vllm.record import (
    Linearized,
    check_attention,
    check_settings,
    check_states,
    linearized_layers,
    state_layouts,
)
from lolcats.vllm.rotary import find_rotations

OURS = ".lolcats."
"""In the names of feature maps and gates, after that of the attention module in the exported model."""


class LinearizedModel:
    """Mixin placed before vLLM's class of the base family."""

    has_inner_state = True
    is_hybrid = True
    supports_lora = False  # LoRA is merged into an export

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        check_family(type(self).__name__.removeprefix(PREFIX))
        check_settings(vllm_config)
        super().__init__(vllm_config=_as_of_the_family(vllm_config), prefix=prefix, **kwargs)  # type: ignore[call-arg]
        check_states(self)  # type: ignore[arg-type]
        self.linearized = install(self, vllm_config)  # type: ignore[arg-type]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load an export: feature maps and gates here, everything else as vLLM loads the base model."""
        ours = dict[str, Tensor]()
        loaded: set[str] | None = super().load_weights(_others(weights, ours))  # type: ignore[misc]
        load_feature_maps(self.linearized, ours)
        mine = {name for name, _ in self.named_parameters() if OURS in name}  # type: ignore[attr-defined]
        return None if loaded is None else loaded | mine

    # What vLLM asks the class of a model whose layers have states

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return ((next(iter(state_layouts(vllm_config).values())).nbytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())


@functools.cache
def _made(name: str) -> type:
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (LinearizedModel, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ModelRegistry.models:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _base_config(vllm_config: Any) -> Any:
    """The configuration that the family's own model reads: its class and its layer types."""
    config = copy.copy(for_a_model(vllm_config.model_config.hf_config))
    config.__class__ = base_class(type(config))
    vars(config).pop("lolcats")
    return config


def _as_of_the_family(vllm_config: Any) -> Any:
    config = _base_config(vllm_config)
    result = copy.copy(vllm_config)
    result.model_config = copy.copy(vllm_config.model_config)
    result.model_config.hf_config = result.model_config.hf_text_config = config
    return result


def install(model: nn.Module, vllm_config: Any) -> dict[str, StateAttention]:
    """Replace vLLM's attention in the linearized layers. Returns the new ones by their modules' names in the export.

    Raises:
        LolcatsError: a layer's attention in vLLM is not the one that was linearized.
    """
    layers, layouts = linearized_layers(vllm_config), state_layouts(vllm_config)
    known = vllm_config.compilation_config.static_forward_context
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    placed = check_attention(attentions, layers, vllm_config)
    check_logits(attentions, placed, _base_config(vllm_config), vllm_config.model_config.trust_remote_code)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in placed}
    turned = {name: owners[name] for name, layer in placed.items() if layer.unrotated}
    rotations = find_rotations(turned, layers[0].geometry.head_dim, vllm_config) if turned else {}
    result = {}
    for name, layer in placed.items():
        attention, layout = attentions[name], layouts[layer.geometry.layer]
        ours = StateAttention(attention, _of_this_rank(layer, vllm_config), layout, rotations.get(name))
        whole = ours if layer.kept is None else SplitAttention(layer.kept, attention, ours, vllm_config.cache_config)
        setattr(owners[name], name.rpartition(".")[2], whole)
        known[attention.layer_name] = ours
        result[layer.name] = ours
    return result


def _of_this_rank(linearized: Linearized, vllm_config: Any) -> LinearizedAttention:
    """Feature maps and gates of this rank's heads, still without values."""
    layer, ranks = linearized.build(), vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        layer.split_heads(ranks)
        for module in layer.modules():
            for name, whole in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(whole[: len(whole) // ranks].clone()))
    return layer.float().requires_grad_(False)


def _others(weights: Iterable[tuple[str, Tensor]], ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if OURS in name:
            ours[name] = tensor
        else:
            yield name, tensor


def load_feature_maps(layers: dict[str, StateAttention], weights: dict[str, Tensor]) -> None:
    """Copy this rank's heads from the export.

    Raises:
        LolcatsError: a tensor is missing, or one belongs to no layer.
    """
    targets = {
        f"{name}{OURS}{parameter}": (layer, target)
        for name, layer in layers.items()
        for parameter, target in layer.lolcats.named_parameters()
    }
    compare_keys(set(targets), set(weights), Path("the export"))
    for name, (layer, target) in targets.items():
        rank = get_tensor_model_parallel_rank() if layer.lolcats.ranks > 1 else 0
        target.copy_(weights[name].narrow(0, rank * len(target), len(target)))
    for layer in layers.values():
        layer.refresh()
