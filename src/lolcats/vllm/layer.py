"""The layer that takes the place of vLLM's attention in each linearized layer of vLLM's own model.

Shapes: H query heads and G key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lolcats.attention import Mixer
from lolcats.attention.path import choose_decode_path
from lolcats.modeling.layer import LinearizedAttention
from lolcats.vllm.attend import attend
from lolcats.vllm.backend import StateMetadata
from lolcats.vllm.plugin import BACKEND
from lolcats.vllm.pool import Layout, Pool
from lolcats.vllm.rotary import Rotation


class StateAttention(nn.Module, MambaBase):
    """Linearized attention with states in vLLM's memory. It is called as vLLM's ``Attention`` is.

    Args:
        attention: the layer of vLLM that it replaces, which knows scale and cap of the logits.
        layer: feature maps and gate, of this rank's heads.
        layout: of one sequence's state.
        rotation: RoPE to undo, if feature maps see queries and keys before it.
    """

    def __init__(
        self, attention: Attention, layer: LinearizedAttention, layout: Layout, rotation: Rotation | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.lolcats, self.layout, self.layer_name = layer, layout, attention.layer_name
        self.rotation = rotation
        ranks = layer.ranks
        self.heads, self.kv_heads = layer.geometry.heads // ranks, layer.geometry.kv_heads // ranks
        self.head_dim, self.value_dim = attention.head_size, attention.head_size_v
        self.scale: float = attention.impl.scale
        self.softcap: float | None = getattr(attention.impl, "logits_soft_cap", None) or None
        self.impl = Computation()
        self.pool: Pool | None = None
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(tokens, H · D) and twice (tokens, G · D) -> (tokens, H · D).

        vLLM's own operator for attention: compiled graphs are cut there, and it looks this layer up by name.
        """
        out = torch.empty(query.shape[0], self.heads, self.value_dim, dtype=query.dtype, device=query.device)
        query, key = query.view(-1, self.heads, self.head_dim), key.view(-1, self.kv_heads, self.head_dim)
        if self.rotation is not None and self.rotation.observed is not None:
            self.rotation.observed += [query, key]
            return out.zero_().view(-1, self.heads * self.value_dim)
        torch.ops.vllm.unified_attention_with_output(
            query, key, value.view(-1, self.kv_heads, self.value_dim), out, _encode_layer_name(self.layer_name)
        )
        return out.view(-1, self.heads * self.value_dim)

    @cached_property
    def mixer(self) -> Mixer:
        """Made from the loaded weights; see :meth:`refresh`."""
        return self.lolcats.mixer(self.scale, self.softcap)

    @torch.inference_mode()  # γ may have been computed in it
    def refresh(self) -> None:
        """Take over weights that were loaded again: γ in place, where recorded graphs read it."""
        if "mixer" in vars(self):
            self.mixer.gamma.copy_(self.lolcats.gamma)

    def decodes_in_place(self, dtype: torch.dtype) -> bool:
        """Whether a step of one token for each sequence is the decode kernel's, for queries in ``dtype``: it waits for
        nothing and writes states where they lie."""
        channels = self.lolcats.spec.channels(self.head_dim)
        with torch.no_grad():
            query = torch.empty(0, self.heads, 1, channels, dtype=dtype, device=self.lolcats.gate.device)
            return choose_decode_path(query, self.mixer) == "kernels"

    # What vLLM asks a layer with a state

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.layout.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.pool = Pool(self.layout, self.kv_cache[0])
        if self.rotation is not None:  # vLLM has loaded all weights, and has not said that it is ready
            self.rotation.check(kv_cache.device)


class Computation:
    """What vLLM's operator calls: one step of one layer."""

    def forward(
        self, layer: StateAttention, query: Tensor, key: Tensor, value: Tensor, kv_cache: Any,
        attn_metadata: StateMetadata | None, output: Tensor, output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """query (tokens, H, D), key and value (tokens, G, D) -> ``output`` (tokens, H, D), written in place."""
        if attn_metadata is None or layer.pool is None:  # vLLM measures memory
            return output.zero_()
        if layer.rotation is not None:
            query, key = attn_metadata.before_rope(layer.rotation, query, key)
        attend(layer.pool, layer.lolcats, layer.mixer, attn_metadata.batch, query, key, value, output)
        return output
