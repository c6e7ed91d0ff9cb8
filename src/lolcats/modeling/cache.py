"""transformers' cache with states of fixed size in place of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from lolcats.attention import AttentionState
from lolcats.attention.subset import HeadSubset
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import LinearizedAttention


class LinearizedCacheLayer(CacheLayerMixin):
    """A cache layer of fixed size: holds an :class:`AttentionState` instead of all keys and values.

    ``update`` returns the new keys and values as they are. The attention function finds this layer in the call's cache
    and moves the state forward by them.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        self.state: AttentionState | None = None
        self.length = 0  # positions seen, padding included: what transformers counts
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.pending:
            raise RuntimeError("The keys of the last call never reached the attention function: unsupported family.")
        self.is_initialized = self.pending = True
        self.length += key_states.shape[2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]  # for callers: none are kept
        return key_states, value_states

    def take(self, layer: LinearizedAttention, k: Tensor, v: Tensor) -> AttentionState:
        """The state before the keys that were just passed to ``update``."""
        self.pending = False
        return layer.empty_state(k, v) if self.state is None else self.state

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + count, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def reset(self) -> None:
        self.state, self.length, self.pending, self.is_initialized = None, 0, False, False

    def _map(self, change: Any) -> None:
        self.state = None if self.state is None else self.state.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, *_: Any) -> None:
        raise LolcatsError(
            "Tokens cannot be removed from a linear-attention state, so assisted and contrastive decoding do not work "
            "with a linearized model. Use greedy decoding, sampling or beam search."
        )

    def offload(self) -> None:
        """Nothing to gain: the state does not grow."""

    def prefetch(self) -> None:
        """See ``offload``."""


class AttendingLayer(CacheLayerMixin):
    """A cache layer of kept keys that can attend to them itself, in place of the base model's attention."""

    attends = False
    """Whether it does so in this call; ``update`` then gives back the new keys and values as they are."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None,
        subset: HeadSubset | None = None,
    ) -> Tensor:  # fmt: skip
        """Outputs (B, T, H, D) for new tokens, whose keys and values are stored on the way.

        subset: the heads that are kept, if q, k and v have more; only for the kernels.
        """
        raise NotImplementedError


class SplitCacheLayer(LinearizedCacheLayer):
    """The same for a layer some of whose heads stay softmax attention: beside the state of the others, it holds all
    keys and values of those heads."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: CacheLayerMixin = DynamicLayer()

    def reset(self) -> None:
        super().reset()
        self.kept = DynamicLayer()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.kept.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept.batch_repeat_interleave(repeats)  # type: ignore[attr-defined]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.kept.batch_select_indices(indices)  # type: ignore[attr-defined]


class MixedCacheLayer(LinearizedCacheLayer, LinearAttentionAndFullAttentionLayer):
    """The same for a layer with attention and a convolution or recurrence side by side (Falcon-H1, Zamba 2)."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LinearizedCacheLayer.__init__(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        LinearizedCacheLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        LinearizedCacheLayer.reorder_cache(self, beam_idx)


def install_cache(cache: Any, layers: dict[int, LinearizedAttention]) -> None:
    """Put our layers into an empty ``DynamicCache`` in place; one that already has them is left unchanged."""
    if not isinstance(cache, DynamicCache):
        raise LolcatsError(
            f"A linearized model keeps a state of fixed size and cannot use a {type(cache).__name__}: "
            "do not set cache_implementation or pass such a cache."
        )
    have = [i for i in layers if i < len(cache.layers) and isinstance(cache.layers[i], LinearizedCacheLayer)]
    if len(have) == len(layers):
        return
    if cache.get_seq_length() > 0:
        raise LolcatsError(
            "This cache already holds keys, of another model or of a trained prefix, and a linearized model has no use "
            "for them: pass an empty cache, or none. PEFT's prefix tuning does not work for this reason: use LoRA or "
            "prompt tuning."
        )
    template = cache.layer_class_to_replicate
    while len(cache.layers) <= max(layers):
        cache.layers.append(template())  # type: ignore[misc]
    for index in layers:
        states = getattr(cache.layers[index], "number_of_states", 0)  # of convolutions or recurrences beside attention
        cache.layers[index] = _cache_layer(layers[index], states)


def _cache_layer(layer: LinearizedAttention, states: int) -> LinearizedCacheLayer:
    if layer.kept is None:
        return MixedCacheLayer(states) if states else LinearizedCacheLayer()
    if states:
        raise LolcatsError(
            f"attention.softmax_heads: layer {layer.geometry.layer} has a recurrence or convolution beside its "
            "attention, so it cannot keep single heads. Keep the whole layer: attention.layers."
        )
    return SplitCacheLayer()


def sliding_windows(config: Any) -> dict[int, int]:
    """By layer of the base model, how many of the last keys it attends to, where these are not all."""
    layers = enumerate(DynamicCache(config=config).layers)
    return {i: layer.sliding_window for i, layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}


def pending(cache: Any, index: int) -> LinearizedCacheLayer | None:
    """Our layer ``index`` of the cache, if its keys were updated in this call."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return layer if isinstance(layer, LinearizedCacheLayer) and layer.pending else None


def of_kept_layer(cache: Any, index: int | None) -> AttendingLayer | None:
    """Layer ``index`` of the cache, if it can attend itself."""
    layer = cache.layers[index] if index is not None and cache is not None and index < len(cache.layers) else None
    return layer if isinstance(layer, AttendingLayer) else None
