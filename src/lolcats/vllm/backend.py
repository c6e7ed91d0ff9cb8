"""What vLLM calls an attention backend: from its description of a step to ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from lolcats.vllm.batch import PADDING, Batch
from lolcats.vllm.plugin import BACKEND
from lolcats.vllm.rotary import Rotation


class StateBackend(LinearAttentionBackend):
    """Names the builder."""

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type[StateBuilder]:
        return StateBuilder


@dataclass
class StateMetadata(LinearAttentionMetadata):
    batch: Batch
    turns: dict[Rotation, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines of the step's tokens, worked out by the first layer that needs them."""

    def before_rope(self, rotation: Rotation, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (N, H, D) and k (N, G, D) of the step's tokens, with their values before RoPE appended: (..., 2D)."""
        if rotation not in self.turns:
            self.turns[rotation] = rotation.cos_sin(self.batch.positions, q.dtype)
        cos, sin = self.turns[rotation]
        return rotation.beside(q[: len(cos)], k[: len(cos)], cos, sin)


class StateBuilder(LinearAttentionMetadataBuilder):
    """Called once per step for all layers.

    The kernels read a step of one token for each sequence only from ``seen`` and ``slots``, which a CUDA graph finds
    in the same memory at each replay.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.recorded = self.get_cudagraph_support(vllm_config, kv_cache_spec) != AttentionCGSupport.NEVER
        rows = vllm_config.scheduler_config.max_num_seqs
        self.seen = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """What vLLM may record: steps of one token for each sequence, if the decode kernel computes every layer."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        able = all(
            layer.decodes_in_place(vllm_config.model_config.dtype)
            for layer in layers
            if hasattr(layer, "decodes_in_place")
        )
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if able else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        known = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = [end - begin for begin, end in pairwise(starts)]
        count = sum(lengths)
        if self.recorded and lengths[:count] == [1] * count:
            return StateMetadata(**vars(known), batch=self.decoding(known, count))
        ends = common_attn_metadata.seq_lens_cpu_upper_bound  # exact without speculative decoding
        ends = (known.seq_lens if ends is None else ends)[: len(lengths)].tolist()
        seen = [end - length for end, length in zip(ends, lengths, strict=True)]
        batch = Batch.of(lengths, seen, known.state_indices_tensor[: len(lengths)].long())
        return StateMetadata(**vars(known), batch=batch)

    def decoding(self, known: LinearAttentionMetadata, count: int) -> Batch:
        """One new token for each of the first ``count`` rows; the others are padding to a size that was recorded."""
        rows = len(known.seq_lens)
        seen, slots = self.seen[:rows], self.slots[:rows]
        seen.copy_(known.seq_lens - 1)
        slots.copy_(known.state_indices_tensor)
        seen[count:].fill_(PADDING)
        slots[count:].fill_(NULL_BLOCK_ID)
        return Batch.decoding(seen, slots)
