"""What vLLM calls an attention backend: from its description of a step to ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)

from lolcats.vllm.batch import Batch
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
        positions = self.batch.positions
        if rotation not in self.turns:
            self.turns[rotation] = rotation.cos_sin(positions, q.dtype)
        return rotation.beside(q[: len(positions)], k[: len(positions)], *self.turns[rotation])


class StateBuilder(LinearAttentionMetadataBuilder):
    """Called once per step for all layers."""

    _cudagraph_support = AttentionCGSupport.NEVER  # a step reads lengths on the host

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        known = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = [end - begin for begin, end in pairwise(starts)]
        ends = common_attn_metadata.seq_lens_cpu_upper_bound  # exact without speculative decoding
        ends = (known.seq_lens if ends is None else ends)[: len(lengths)].tolist()
        seen = [end - length for end, length in zip(ends, lengths, strict=True)]
        batch = Batch.of(lengths, seen, known.state_indices_tensor[: len(lengths)].long())
        return StateMetadata(**vars(known), batch=batch)
