"""A layer some of whose heads stay softmax attention: to vLLM these are two layers, one with keys, one with a state.

Shapes: N tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from lolcats.modeling.heads import KeptHeads
from lolcats.vllm.layer import StateAttention


class SplitAttention(nn.Module):
    """It is called as vLLM's ``Attention`` is.

    Args:
        kept: which heads stay softmax attention.
        attention: the layer of vLLM that computed all heads.
        linear: the others' attention.
    """

    soft_queries: Tensor
    soft_keys: Tensor
    linear_queries: Tensor
    linear_keys: Tensor
    places: Tensor

    def __init__(self, kept: KeptHeads, attention: Attention, linear: StateAttention, cache_config: Any) -> None:
        super().__init__()
        self.linear, self.sizes = linear, (attention.head_size, attention.head_size, attention.head_size_v)
        count = len(kept.kept)
        self.soft = Attention(
            count * kept.group, attention.head_size, attention.impl.scale, num_kv_heads=count,
            cache_config=cache_config, logits_soft_cap=linear.softcap, head_size_v=attention.head_size_v,
            per_layer_sliding_window=attention.sliding_window, prefix=f"{attention.layer_name}.soft",
        )  # fmt: skip
        for name, keys in {"soft": kept.kept, "linear": kept.linearized}.items():
            self.register_buffer(f"{name}_queries", torch.tensor(kept.queries(keys)), persistent=False)
            self.register_buffer(f"{name}_keys", torch.tensor(keys), persistent=False)
        self.register_buffer("places", torch.cat([self.soft_queries, self.linear_queries]).argsort(), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, H · D) and twice (N, G · D) -> (N, H · D)."""
        parts = [x.unflatten(-1, (-1, size)) for x, size in zip((query, key, value), self.sizes, strict=True)]

        def of(queries: Tensor, keys: Tensor) -> list[Tensor]:
            return [x.index_select(1, i).flatten(1) for x, i in zip(parts, (queries, keys, keys), strict=True)]

        linear = self.linear(*of(self.linear_queries, self.linear_keys))
        if self.linear.rotation is not None and self.linear.rotation.observed is not None:  # only a check
            return query.new_zeros(len(query), len(self.places) * self.sizes[2])
        soft = self.soft(*of(self.soft_queries, self.soft_keys))
        both = torch.cat([soft, linear], 1).unflatten(-1, (-1, self.sizes[2]))
        return both.index_select(1, self.places).flatten(1)
