"""The decoder's hook: forward, generate, pipeline and lm-eval all come through here."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, masking_utils
from transformers.masking_utils import find_packed_sequence_indices

from lolcats.attention import Documents
from lolcats.errors import LolcatsError
from lolcats.modeling.cache import install_cache
from lolcats.modeling.call import Call, around, begin, current, exporting, require
from lolcats.modeling.interface import IMPLEMENTATION
from lolcats.modeling.layer import attached


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
    linearized: list[Any] = [attached(module) for module in decoder.lolcats_attentions]
    layers = {layer.geometry.layer: layer for layer in linearized if layer.mode == "student"}
    kind: Any = type(decoder)
    names = _parameters(kind)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    changes: dict[str, Any] = {}
    outer = around(decoder)
    documents = _documents(call, outer)
    apart = call.get("position_ids") is None
    own = Call(weakref.ref(decoder), config, documents, apart=apart, outer=outer)
    begin(own)
    if documents is not None:  # in teacher mode, too: with a cache, transformers' masks do not separate documents
        _check_packed(call, {layer.base_implementation for layer in linearized if layer.mode != "teacher"})
        call["use_cache"] = changes["use_cache"] = False
    if not layers:
        own.cache = call.get("past_key_values")
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
        own.cache = cache
    return (), {**call, **changes}


_preprocessed = masking_utils._preprocess_mask_arguments
_PLACE = list(inspect.signature(_preprocessed).parameters).index("position_ids") - 1


@functools.wraps(_preprocessed)
def _without_own_positions(config: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers' masks work out first, also which document of a packed row each token belongs to. Positions
    that our decoder has made itself are not looked at for that: it would make the host wait for the GPU in every call,
    and a CUDA graph, which cannot wait, would have masks for packed rows."""
    call = current()
    if call is not None and call.apart and call.config is config.get_text_config(decoder=True) and not exporting():
        args = tuple(None if place == _PLACE else x for place, x in enumerate(args))
        kwargs |= {"position_ids": None} if "position_ids" in kwargs else {}
    return _preprocessed(config, *args, **kwargs)


masking_utils._preprocess_mask_arguments = _without_own_positions


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
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (not exporting() and mask.all()):
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}


def _documents(call: dict[str, Any], outer: Call | None) -> Documents | None:
    """The packed documents, if any: as in transformers, positions that do not increase by one mark another document."""
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    ids = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2 or ids is None:
        return None
    if _length(call.get("past_key_values")) > 0:
        return None
    if exporting():
        _check_one_document(positions, mask)
        return None
    numbers = find_packed_sequence_indices(positions.expand(ids.shape[0], -1))
    if numbers is None:
        return None
    if mask is None:
        return Documents.of(numbers)
    if not isinstance(mask, Tensor):  # made by the outer model, whose call was already checked
        return None if outer is None else outer.documents
    if mask.ndim == 2 and mask.shape == numbers.shape:
        real = mask[:, 1:].bool() & mask[:, :-1].bool()
        if ((numbers[:, 1:] != numbers[:, :-1]) & real).any():
            raise LolcatsError("Packed rows (position_ids that restart) do not support an attention_mask.")
    return None


def _check_one_document(positions: Tensor, mask: Any) -> None:
    """Let an exported program check that its rows hold one document each: where others begin, it cannot know."""
    follows = positions[:, 1:] - positions[:, :-1] == 1
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, 1:].bool() & mask[:, :-1].bool()
        follows = follows | ~real[:, -follows.shape[1] :]
    if mask is None or isinstance(mask, Tensor):  # else made by the outer model, whose call was already checked
        require(follows, "An exported program does not take packed rows (position_ids that restart).")


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
