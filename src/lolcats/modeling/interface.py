"""The seam to transformers: one attention function, one mask function; :mod:`.cache` and :mod:`.hook` are the rest.

Hugging Face decoders call ``ALL_ATTENTION_FUNCTIONS[implementation](module, q, k, v, mask, ...)`` after their own
projections, norms and RoPE, with masks from ``ALL_MASK_ATTENTION_FUNCTIONS[implementation]``. We register both under
``lolcats``; no model file is copied or subclassed by hand.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lolcats.errors import LolcatsError
from lolcats.modeling.cache import pending
from lolcats.modeling.call import Call, Padding, current
from lolcats.modeling.layer import AttentionCall, KeptAttention, attached
from lolcats.modeling.masks import MaskRequest, mask_function, request_of
from lolcats.modeling.rotary import as_attended

IMPLEMENTATION = "lolcats"


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention: q (B, H, T, D), k and v (B, G, T, D) -> (B, T, H, D), weights or None."""
    layer = attached(module)
    if layer is None:
        raise LolcatsError(
            f"{type(module).__name__} was not called when this model was converted (cross-attention to images?): only "
            "the text decoder of a model is linearized."
        )
    if isinstance(layer, KeptAttention) or layer.mode == "teacher":
        return softmax_attention(module, query, key, value, attention_mask, **kwargs)
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    request = request_of(attention_mask)
    call, (padding, counts) = (request.call, request.padding) if request else (current() or Call(), Padding())
    if padding is not None and padding.device != query.device:  # this layer is on another GPU
        padding = padding.to(query.device)
    rotation = request.rotation if request else None
    if layer.mode == "transfer":
        with torch.no_grad():
            target, weights = softmax_attention(module, query, key, value, attention_mask, **kwargs)
        if layer.observer is not None:
            q, k, v = (x.detach() for x in (*as_attended(module, query, key, rotation), value))
            layer.observer(layer, AttentionCall(q, k, v, target, scale, softcap, padding, call.documents))
        return target, weights
    dtype, (query, key) = query.dtype, as_attended(module, query, key, rotation)
    cache = pending(call.cache, layer.geometry.layer)
    if cache is None:
        y = layer(query, key, value, scale, softcap, padding, call.documents, call.backend)
    else:
        state = cache.take(layer, key, value)
        y, cache.state = layer.advance(state, query, key, value, scale, softcap, padding, counts, call.backend)
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


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


register()
