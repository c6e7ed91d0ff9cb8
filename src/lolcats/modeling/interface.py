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

from lolcats.attention.path import choose_paged_path
from lolcats.attention.subset import HeadSubset, side_by_side
from lolcats.errors import LolcatsError
from lolcats.modeling.cache import AttendingLayer, SplitCacheLayer, of_kept_layer, pending
from lolcats.modeling.call import Call, Padding, current
from lolcats.modeling.families import HARMLESS
from lolcats.modeling.heads import KeptHeads, Trial
from lolcats.modeling.layer import AttentionCall, KeptAttention, LinearizedAttention, attached
from lolcats.modeling.masks import MaskRequest, check_apart, mask_function, request_of
from lolcats.modeling.probe import scale_and_cap
from lolcats.modeling.rotary import as_attended, turning_of

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
    if isinstance(layer, KeptAttention):
        call = attention_mask.call if isinstance(attention_mask, MaskRequest) else current() or Call()
        own = of_kept_layer(call.cache, layer.layer)
        if own is not None and own.attends:
            return _own_attention(own, query, key, value, attention_mask, kwargs), None
    if isinstance(layer, KeptAttention) or layer.mode == "teacher":
        check_apart(attention_mask)
        return softmax_attention(module, query, key, value, attention_mask, **kwargs)
    request, kept = request_of(attention_mask), layer.kept
    if layer.mode == "transfer":
        with torch.no_grad():
            target, weights = softmax_attention(module, query, key, value, attention_mask, **kwargs)
        if layer.observer is not None:
            seen, (q, k, v) = target, (query, key, value)
            if kept is not None:
                seen, (q, k, v) = kept.of_outputs(target), kept.part(kept.linearized, query, key, value)
            layer.observer(layer, _observed(module, q, k, v, seen, request, kwargs))
        return target, weights
    if layer.trial is not None:
        return _trial(layer, layer.trial, module, query, key, value, attention_mask, kwargs), None
    if kept is None:
        return _linearized(layer, module, query, key, value, request, kwargs), None
    cache = pending(_call(request).cache, layer.geometry.layer)
    own = cache.kept if isinstance(cache, SplitCacheLayer) else None
    if isinstance(own, AttendingLayer) and own.attends:
        y = _side_by_side(layer, own, module, query, key, value, attention_mask, request, kwargs)
        if y is not None:
            return y, None
    q, k, v = kept.part(kept.kept, query, key, value)
    if own is not None:
        k, v = own.update(k, v)
    if isinstance(own, AttendingLayer) and own.attends:
        soft = _own_attention(own, q, k, v, attention_mask, kwargs)
    else:
        soft = _kept_attention(module, q, k, v, attention_mask, request, kwargs)
    if not kept.linearized:  # on this rank
        if cache is not None:
            cache.pending = False
        return soft, None
    q, k, v = kept.part(kept.linearized, query, key, value)
    return kept.joined(soft, _linearized(layer, module, q, k, v, request, kwargs)), None


def _call(request: MaskRequest | None) -> Call:
    return request.call if request else current() or Call()


def _padding(request: MaskRequest | None, device: torch.device) -> Padding:
    found = request.padding if request else Padding()
    if found.mask is not None and found.mask.device != device:  # this layer is on another GPU
        found = found._replace(mask=found.mask.to(device))
    return found


def _observed(
    module: Any, q: Tensor, k: Tensor, v: Tensor, target: Tensor, request: MaskRequest | None, kwargs: dict[str, Any]
) -> AttentionCall:
    """What stage 1 learns from: detached, with queries and keys as the layer takes them."""
    scale, softcap = scale_and_cap(q.shape[-1], kwargs)
    rotation, call = request.rotation if request else None, _call(request)
    turning = turning_of(module, q, k, rotation, call)
    if turning is None:
        q, k = as_attended(module, q, k, rotation, call.backend)
    padding = _padding(request, q.device).mask
    return AttentionCall(
        q.detach(), k.detach(), v.detach(), target, scale, softcap, padding, call.documents, turning
    )  # fmt: skip


def _linearized(
    layer: LinearizedAttention, module: Any, q: Tensor, k: Tensor, v: Tensor, request: MaskRequest | None,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Outputs (B, T, H, D) of the linearized heads, and their state moved forward if there is a cache."""
    call, (padding, counts) = _call(request), _padding(request, q.device)
    scale, softcap = scale_and_cap(q.shape[-1], kwargs)
    dtype, rotation = q.dtype, request.rotation if request else None
    cache = pending(call.cache, layer.geometry.layer)
    turning = turning_of(module, q, k, rotation, call) if cache is None else None
    if turning is None:
        q, k = as_attended(module, q, k, rotation, call.backend)
    if cache is None:
        y = layer(q, k, v, scale, softcap, padding, call.documents, call.backend, turning)
    else:
        y, cache.state = layer.advance(
            cache.take(layer, k, v), q, k, v, scale, softcap, padding, counts, call.backend
        )  # fmt: skip
    return y.transpose(1, 2).to(dtype).contiguous()


def _side_by_side(
    layer: LinearizedAttention, own: AttendingLayer, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    request: MaskRequest | None, kwargs: dict[str, Any],
) -> Tensor | None:  # fmt: skip
    """Outputs (B, 1, H, D) of one new token a row, with kept and linearized heads each computed by a kernel; None if
    one of them has to be computed otherwise."""
    call, padding = _call(request), _padding(request, q.device).mask
    cache = pending(call.cache, layer.geometry.layer)
    if cache is None or not layer.kept.linearized or choose_paged_path(q) != "kernels":
        return None
    all_q, all_k = as_attended(module, q, k, request.rotation if request else None, call.backend)
    if not layer.steps_in_place(cache.state, all_q, padding, call.backend):
        return None
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[3])
    kept, linearized = layer.kept.subsets(out)

    def attend() -> None:
        _own_attention(own, q, k, v, mask, kwargs, kept)

    def step() -> None:
        scale, softcap = scale_and_cap(q.shape[-1], kwargs)
        state = cache.take(layer, k, v)
        cache.state = layer.advance(state, all_q, all_k, v, scale, softcap, backend=call.backend, subset=linearized)[1]

    side_by_side(q.device, step, attend)
    return out[:, None]


def _kept_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, request: MaskRequest | None, kwargs: dict[str, Any]
) -> Tensor:
    """Softmax attention of kept heads, (B, T, heads, D). Documents packed into rows are computed in rows of their own:
    SDPA's fast kernels take no mask that keeps them apart."""
    documents = _call(request).documents
    local = request is not None and request.arguments.get("local_size")
    if documents is None or local or module.lolcats.base_implementation != "sdpa":
        return softmax_attention(module, q, k, v, mask, **kwargs)[0]

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(module, q, k, v, None, **kwargs)[0].transpose(1, 2)

    return documents.apart(causal, q, k, v).transpose(1, 2)


def _trial(
    layer: LinearizedAttention, trial: Trial, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Outputs (B, T, H, D) of whole rows of which some heads are softmax attention, on trial."""
    heads = KeptHeads(layer.geometry, trial.heads)
    if not heads.linearized:
        return softmax_attention(module, q, k, v, mask, **kwargs)[0]
    y = _linearized(layer, module, q, k, v, request_of(mask), kwargs)
    if trial.shares is not None:
        return trial.mixed(softmax_attention(module, q, k, v, mask, **kwargs)[0], y)
    if not heads.kept:
        return y
    soft, _ = softmax_attention(module, *heads.part(heads.kept, q, k, v), mask, **kwargs)
    return heads.joined(soft, heads.of_outputs(y))


def _own_attention(
    own: AttendingLayer, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any],
    subset: HeadSubset | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention to kept keys by the layer of the cache that holds them, (B, T, heads, D).

    Raises:
        RuntimeError: it does not know this family's attention.
    """
    window = mask.arguments.get("local_size") if isinstance(mask, MaskRequest) else None
    unknown = [name for name, x in kwargs.items() if x is not None and name not in HARMLESS]
    if window != (kwargs.get("sliding_window") if window else None):
        unknown.append("local attention other than a sliding window")
    if unknown:
        raise RuntimeError(f"Attention to keys in blocks does not support {', '.join(unknown)}.")
    return own.attend(query, key, value, *scale_and_cap(query.shape[-1], kwargs), window, subset)


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
