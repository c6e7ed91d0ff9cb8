"""The seam to transformers: one attention function, one mask function, one cache layer, one hook.

Hugging Face decoders call ``ALL_ATTENTION_FUNCTIONS[implementation](module, q, k, v, mask, ...)`` after their own
projections, norms and RoPE, with masks from ``ALL_MASK_ATTENTION_FUNCTIONS[implementation]``. We register both under
``lolcats``; no model file is copied or subclassed by hand.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lolcats.attention import AttentionState, Documents
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import AttentionCall, KeptAttention, LinearizedAttention
from lolcats.modeling.rotary import as_attended

IMPLEMENTATION = "lolcats"
_packed: ContextVar[Documents | None] = ContextVar("documents of the decoder call that is running", default=None)
NOT_APART = (
    "This model's family does not separate documents that are packed into one row (position_ids that restart). "
    "Give each document its own row."
)


class MaskRequest:
    """The mask that the family asked for, kept until a layer needs it.

    Linearized layers read ``padding``; kept softmax layers and the teacher build the family's own mask, once.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._built: dict[str, Any] = {}
        self._causal = False
        mask, length = arguments.get("attention_mask"), arguments["q_length"]
        self.padding: Tensor | None = None
        self.counts: list[int] | None = None  # real tokens per row, on the host: read once, not by every layer
        if mask is not None:
            end = int(arguments["kv_length"]) + int(arguments.get("kv_offset", 0))
            new = mask[:, end - length : end].bool()
            counts = new.sum(1).tolist()
            if min(counts) < length:
                self.padding, self.counts = new, counts
        self.documents = _packed.get()
        if self.documents is not None:
            self._check_documents(self.documents)

    def verify(self) -> None:
        """Raise unless the mask is causal, apart from padding and a window: anything else would be ignored here.

        Bidirectional blocks of image tokens, prefixes and the like are known only during the call.
        """
        if self.documents is not None or self.arguments.get("allow_is_causal_skip", True) or self._causal:
            return  # documents of a packed row are separated
        mask = self.build("sdpa")
        if mask is None:
            return
        length, total = mask.shape[-2:]
        causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
        keys = self.arguments.get("attention_mask")
        expected = causal if keys is None else causal & keys[:, None, None, -total:].bool()
        queries = True if self.padding is None else self.padding[:, None, :, None]
        wrong = mask & ~causal if self.arguments.get("local_size") else mask ^ expected
        if (wrong & queries).any():
            raise LolcatsError(
                "This call needs attention that is not causal (bidirectional image tokens, a prefix), which a "
                "linearized layer cannot compute."
            )
        self._causal = True

    def build(self, implementation: str) -> Any:
        """The mask that ``implementation`` (``sdpa``, ``eager``, ...) would have been given."""
        if implementation not in self._built:
            self._built[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._built[implementation]

    def _check_documents(self, documents: Documents) -> None:
        """Raise LolcatsError unless the family's own mask separates the first two documents of a packed row."""
        row, first = next((row, lengths[0]) for row, lengths in enumerate(documents.lengths) if len(lengths) > 1)
        place = [torch.tensor(x, device=documents.device) for x in (row, 0, first, first - 1)]
        if bool(self.arguments["mask_function"](*place)):
            raise LolcatsError(NOT_APART)

    def __getitem__(self, index: Any) -> SlicedMask:
        return SlicedMask(self, index)


class SlicedMask(MaskRequest):
    """The mask for some queries: Gemma 4 drops the others before its last layers, which share keys and stay softmax."""

    def __init__(self, whole: MaskRequest, index: Any) -> None:
        super().__init__({**whole.arguments, "allow_is_causal_skip": False})
        self.index = index

    def build(self, implementation: str) -> Any:
        return super().build(implementation)[self.index]

    def verify(self) -> None:
        raise LolcatsError("This model drops queries before a linearized layer, whose state needs all of them.")


def mask_function(**arguments: Any) -> MaskRequest:
    return MaskRequest(arguments)


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention: q (B, H, T, D), k and v (B, G, T, D) -> (B, T, H, D), weights or None."""
    layer = getattr(module, "lolcats", None)
    if layer is None:
        raise LolcatsError(
            f"{type(module).__name__} was not called when this model was converted (cross-attention to images?): only "
            "the text decoder of a model is linearized."
        )
    if isinstance(layer, KeptAttention) or layer.mode == "teacher":
        return softmax_attention(module, query, key, value, attention_mask, **kwargs)
    assert isinstance(layer, LinearizedAttention)
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    padding, documents = _padding(attention_mask), _documents_of(attention_mask)
    if padding is not None and padding.device != query.device:  # this layer is on another GPU
        padding = padding.to(query.device)
    if layer.mode == "transfer":
        with torch.no_grad():
            target, weights = softmax_attention(module, query, key, value, attention_mask, **kwargs)
        if layer.observer is not None:
            q, k, v = (x.detach() for x in (*as_attended(module, query, key), value))
            layer.observer(layer, AttentionCall(q, k, v, target, scale, softcap, padding, documents))
        return target, weights
    cache: LinearizedCacheLayer | None = getattr(key, "lolcats_cache", None)
    dtype, (query, key) = query.dtype, as_attended(module, query, key)
    if cache is None:
        y = layer(query, key, value, scale, softcap, padding, documents)
    else:
        state, counts = cache.take(layer, key, value), getattr(attention_mask, "counts", None)
        y, cache.state = layer.advance(state, query, key, value, scale, softcap, padding, counts)
    return y.transpose(1, 2).to(dtype).contiguous(), None


def softmax_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The base model's own attention, with the base model's own mask."""
    implementation, mask = module.lolcats.base_implementation, attention_mask
    if isinstance(mask, MaskRequest):
        if key.shape[2] != mask.arguments["kv_length"]:
            raise LolcatsError(
                f"{type(module).__name__} attends to keys other than those of the tokens (compressed ones, for "
                "example), which works only with its own attention implementation: this model cannot be converted."
            )
        mask = mask.build(implementation)
    if isinstance(mask, Tensor) and mask.device != query.device:
        mask = mask.to(query.device)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, value, mask, **kwargs)


def _padding(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, MaskRequest):
        mask.verify()
        return mask.padding
    raise LolcatsError(
        "A linearized model takes a 2-D attention mask (batch, tokens) with 0 for padding; "
        f"custom masks are not supported (got shape {tuple(mask.shape)})."
    )


def _documents_of(mask: Any) -> Documents | None:
    """The documents of the call that asked for the mask, which with gradient checkpointing has already ended."""
    if isinstance(mask, MaskRequest):
        return mask.documents
    if _packed.get() is not None:  # the family asks for no mask
        raise LolcatsError(NOT_APART)
    return None


class LinearizedCacheLayer(CacheLayerMixin):
    """A cache layer of fixed size: holds an :class:`AttentionState` instead of all keys and values.

    ``update`` returns the new keys and values as they are; the keys carry a reference to this layer, through which the
    attention function finds and updates the state.
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
        key_states = key_states.view_as(key_states)
        key_states.lolcats_cache = self  # type: ignore[attr-defined]
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

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.20
        return -1

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


def prepare_decoder_call(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the decoder: put our layers into any cache that is still empty.

    forward, generate, pipeline and lm-eval all come through here, so none of them can end up with a growing cache.
    """
    config = decoder.config.get_text_config(decoder=True)
    implementation = config._attn_implementation
    if implementation != IMPLEMENTATION:
        raise LolcatsError(
            f"The attention implementation of this linearized model was changed to {implementation!r}, "
            "which would silently run softmax attention. Use lolcats.override(model, mode='teacher') for that."
        )
    linearized = decoder.lolcats_layers
    layers = {layer.geometry.layer: layer for layer in linearized if layer.mode == "student"}
    kind: Any = type(decoder)
    names = _parameters(kind)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    changes: dict[str, Any] = {}
    documents = _documents(call) if any(layer.mode != "teacher" for layer in linearized) else None
    _packed.set(documents)
    if documents is not None:
        _check_packed(call, {layer.base_implementation for layer in linearized})
        call["use_cache"] = changes["use_cache"] = False
    if not layers:
        return ((), {**call, **changes}) if changes else None
    changes |= _positions(call, names)
    cache, use_cache = call.get("past_key_values"), call.get("use_cache")
    wants_cache = (getattr(config, "use_cache", False) if use_cache is None else use_cache) and not (
        decoder.training and torch.is_grad_enabled()
    )
    if cache is None and wants_cache:
        cache = changes["past_key_values"] = DynamicCache(config=config)
    if cache is not None:
        install_cache(cache, layers)
    return (), {**call, **changes}


@functools.cache
def _parameters(decoder: Any) -> list[str]:
    """Names of the arguments of a decoder class's forward."""
    return list(inspect.signature(decoder.forward).parameters)[1:]


def _positions(call: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """Positions counted from each row's first real token, if the caller passed a padding mask but no positions.

    Softmax with RoPE only sees differences of positions; feature maps see the positions themselves.
    """
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    ids = call.get("inputs_embeds") if ids is None else ids
    if call.get("position_ids") is not None or "position_ids" not in names or ids is None:
        return {}
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.all():
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}


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
        raise LolcatsError("This cache holds keys of another model: pass an empty cache, or none.")
    template = cache.layer_class_to_replicate
    while len(cache.layers) <= max(layers):
        cache.layers.append(template())  # type: ignore[misc]
    for index in layers:
        states = getattr(cache.layers[index], "number_of_states", 0)  # of convolutions or recurrences beside attention
        cache.layers[index] = MixedCacheLayer(states) if states else LinearizedCacheLayer()


def _documents(call: dict[str, Any]) -> Documents | None:
    """The packed documents, if any: as in transformers, positions that do not increase by one mark another document."""
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    ids = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2 or ids is None:
        return None
    if _length(call.get("past_key_values")) > 0:
        return None
    numbers = find_packed_sequence_indices(positions.expand(ids.shape[0], -1))
    if numbers is None:
        return None
    if mask is None:
        return Documents.of(numbers)
    if not isinstance(mask, Tensor):  # made by the outer model, whose call was already checked
        return _packed.get()
    if mask.ndim == 2 and mask.shape == numbers.shape:
        real = mask[:, 1:].bool() & mask[:, :-1].bool()
        if ((numbers[:, 1:] != numbers[:, :-1]) & real).any():
            raise LolcatsError("Packed rows (position_ids that restart) do not support an attention_mask.")
    return None


def _check_packed(call: dict[str, Any], implementations: set[str]) -> None:
    """Raise LolcatsError for what packed documents cannot be combined with, here or in transformers' own masks."""
    if call.get("past_key_values") is not None or call.get("use_cache"):
        raise LolcatsError(
            "Packed rows (position_ids that restart) do not support a cache: a state belongs to one sequence. Pass "
            "use_cache=False, or give each document its own row."
        )
    if flash := [name for name in implementations if "flash" in name]:
        raise LolcatsError(
            f"Packed rows need the base model's sdpa or eager attention; this one was loaded with {flash[0]}."
        )


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


register()
