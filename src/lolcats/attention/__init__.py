"""The maths of hybrid attention: specification, reference, fast paths and fixed-size state. Independent of models."""

from lolcats.attention.advance import extend, step
from lolcats.attention.chunked import chunked_attention
from lolcats.attention.dispatch import attention
from lolcats.attention.documents import Documents
from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.mixer import Mixer
from lolcats.attention.path import choose_path, use_backend
from lolcats.attention.reference import attention_weights, parallel_attention, recurrent_attention
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import AttentionState, SlotState
from lolcats.attention.supra import HeadNorm

__all__ = [
    "AttentionSpec", "AttentionState", "Documents", "FeatureMap", "HeadNorm", "Mixer", "SlotState", "attention",
    "attention_weights", "choose_path", "chunked_attention", "extend", "parallel_attention", "recurrent_attention",
    "step", "use_backend",
]  # fmt: skip
