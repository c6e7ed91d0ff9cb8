"""What vLLM calls an attention backend: from its description of a step to ours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)

from lolcats.vllm.batch import Batch
from lolcats.vllm.plugin import BACKEND


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
