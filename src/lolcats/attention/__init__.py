"""The maths of hybrid attention: specification, reference, chunked path, fixed-size state. Knows nothing of models."""

from lolcats.attention.chunked import chunked_attention
from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.reference import attention_weights, parallel_attention, recurrent_attention
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import AttentionState, extend, step

__all__ = [
    "AttentionSpec", "AttentionState", "FeatureMap", "attention_weights", "chunked_attention", "extend",
    "parallel_attention", "recurrent_attention", "step",
]  # fmt: skip
