"""The maths of hybrid attention: specification, reference, fast paths and fixed-size state. Independent of models."""

from lolcats.attention.chunked import chunked_attention
from lolcats.attention.dispatch import attention, use_backend, uses_kernels
from lolcats.attention.documents import Documents
from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.norm import HeadNorm
from lolcats.attention.reference import attention_weights, parallel_attention, recurrent_attention
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import AttentionState, extend, step

__all__ = [
    "AttentionSpec", "AttentionState", "Documents", "FeatureMap", "HeadNorm", "attention", "attention_weights",
    "chunked_attention", "extend", "parallel_attention", "recurrent_attention", "step", "use_backend", "uses_kernels",
]  # fmt: skip
