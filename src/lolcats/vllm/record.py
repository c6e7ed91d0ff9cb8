"""What an export says of its layers, the state that they need, and what cannot be served on vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from lolcats.config import AttentionConfig, from_dict
from lolcats.errors import LolcatsError
from lolcats.modeling.heads import KeptHeads
from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec
from lolcats.vllm.pool import Layout

SUMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The dtype of the sums S: ``--additional-config '{"lolcats": {"state_dtype": "bfloat16"}}'``."""


@dataclass(frozen=True)
class Linearized:
    """One linearized layer. name: of its attention module in the export."""

    name: str
    kind: str
    geometry: Geometry
    config: AttentionConfig
    kept: KeptHeads | None = None

    @property
    def unrotated(self) -> bool:
        return layer_spec(self.config, self.kind).unrotated

    def build(self) -> LinearizedAttention:
        of_maps = self.geometry if self.kept is None else self.kept.of_linearized
        return LinearizedAttention(of_maps, self.config, layer_spec(self.config, self.kind), "vllm", self.kept)


def linearized_layers(vllm_config: Any) -> list[Linearized]:
    record = vllm_config.model_config.hf_config.lolcats
    config = from_dict(AttentionConfig, record["attention"])
    entries = [entry for entry in record["layers"] if entry["kind"] != "softmax"]
    names = [field.name for field in fields(Geometry)]
    result = []
    for entry in entries:
        geometry = Geometry(**{name: entry[name] for name in names})
        kept = KeptHeads(geometry, tuple(entry["softmax_heads"])) if entry.get("softmax_heads") else None
        result.append(Linearized(entry["name"], entry["kind"], geometry, config, kept))
    return result


def state_layouts(vllm_config: Any) -> dict[int, Layout]:
    """Where the parts of one sequence's state lie in its page, for each linearized layer, on this rank.

    All pages are as long as the largest state needs, since vLLM has one size for them.

    Raises:
        LolcatsError: the ranks cannot share the heads.
    """
    ranks, dtype = vllm_config.parallel_config.tensor_parallel_size, vllm_config.model_config.dtype
    sums = SUMS[settings(vllm_config)["state_dtype"]]
    layouts = {}
    for linearized in linearized_layers(vllm_config):
        geometry = linearized.geometry
        with torch.device("meta"):
            layer = linearized.build()
            if ranks > 1:
                layer.split_heads(ranks)
            channels = layer.spec.channels(geometry.head_dim), geometry.value_dim
            k, v = (torch.empty(1, layer.geometry.kv_heads // ranks, 0, size, dtype=dtype) for size in channels)
            layouts[geometry.layer] = Layout.of(layer.empty_state(k, v, sums))
    longest = max(layout.nbytes for layout in layouts.values())
    return {layer: replace(layout, least=longest) for layer, layout in layouts.items()}


def settings(vllm_config: Any) -> dict[str, str]:
    """What ``--additional-config`` says under ``lolcats``.

    Raises:
        LolcatsError: an unknown setting or value.
    """
    extra = vllm_config.additional_config
    mine = extra.get("lolcats", {}) if isinstance(extra, dict) else {}
    result = {"state_dtype": "float32", **mine}
    if set(result) != {"state_dtype"} or result["state_dtype"] not in SUMS:
        raise LolcatsError(f"--additional-config: expected lolcats.state_dtype to be one of {', '.join(SUMS)}.")
    return result


def check_settings(vllm_config: Any) -> None:
    """Refuse what this package does not do, before anything is loaded.

    Raises:
        LolcatsError: with what to do instead.
    """
    record, cache = vllm_config.model_config.hf_config.lolcats, vllm_config.cache_config
    reasons = {
        "This is an adapter, which needs its base model; vLLM loads merged models: lolcats export DIR --merge --out "
        "MERGED.": record.get("form") == "adapter",
        "Some heads of this model are softmax attention (attention.softmax_heads), and ranks cannot share the heads of "
        "such a layer: leave out --tensor-parallel-size, or choose whole layers (lolcats select --unit layer).": (
            vllm_config.parallel_config.tensor_parallel_size > 1
            and any(entry.get("softmax_heads") for entry in record["layers"])
        ),
        "No layer of this model is linearized: serve its base model.": not linearized_layers(vllm_config),
        "Linearized models do not support --pipeline-parallel-size on vLLM: use --tensor-parallel-size.": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "Speculative decoding discards tokens, which cannot be removed from a linear-attention state: leave out "
        "--speculative-config.": vllm_config.speculative_config is not None,
        "--mamba-cache-dtype and --mamba-ssm-cache-dtype have no effect on a linearized model. For states in bfloat16: "
        '--additional-config \'{"lolcats": {"state_dtype": "bfloat16"}}\'': (
            {cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype} - {"auto", "float32"} != set()
        ),
    }
    settings(vllm_config)
    for reason, applies in reasons.items():
        if applies:
            raise LolcatsError(reason)


def check_states(model: nn.Module) -> None:
    """Refuse vLLM's model of a family that mixes attention with layers that have a state of another kind.

    Raises:
        LolcatsError: it has such layers.
    """
    others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, MambaBase)})
    if others:
        raise LolcatsError(
            f"vLLM's model of this family has other layers with a state ({', '.join(others)}), and the plugin does not "
            "keep both kinds: this model cannot be served there. Use lolcats serve."
        )


def check_attention(
    attentions: Mapping[str, Attention], layers: list[Linearized], vllm_config: Any
) -> dict[str, Linearized]:  # fmt: skip
    """The linearized layer for each module of vLLM's attention that it replaces.

    Raises:
        LolcatsError: vLLM computes something else there than what was linearized.
    """
    ranks, placed, left = vllm_config.parallel_config.tensor_parallel_size, {}, {x.geometry.layer: x for x in layers}
    linear = dict(left)
    for name, attention in attentions.items():
        index = extract_layer_index(attention.layer_name)
        layer = linear.get(index)
        if layer is None:
            continue
        difference = _difference(attention, layer.geometry, ranks, layer.kept is not None)
        if left.pop(index, None) is None:
            difference = "is a second attention in its layer"
        if difference:
            raise LolcatsError(f"vLLM's {name} {difference}: this model cannot be served there. Use lolcats serve.")
        placed[name] = layer
    if left:
        raise LolcatsError(
            f"vLLM's model of this family has no plain attention in layer {min(left)}, which is linearized: this model "
            "cannot be served there. Use lolcats serve."
        )
    return placed


def _difference(attention: Attention, geometry: Geometry, ranks: int, heads: bool) -> str:
    """What vLLM computes otherwise than what was linearized; empty if nothing."""
    here = (
        attention.num_heads * ranks, attention.num_kv_heads * ranks, attention.head_size, attention.head_size_v
    )  # fmt: skip
    saved = (geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.value_dim)
    if here != saved:
        return f"has heads of another shape, {here} instead of {saved}"
    reasons = {
        "is not a decoder's attention": attention.attn_type != AttentionType.DECODER,
        "has learned sinks": attention.has_sink,
        "adds a position bias": getattr(attention.impl, "alibi_slopes", None) is not None,
        "shares another layer's keys": attention.kv_sharing_target_layer_name is not None,
        "is attention of another kind, some of whose heads are kept": heads and type(attention) is not Attention,
    }
    return next((text for text, applies in reasons.items() if applies), "")
