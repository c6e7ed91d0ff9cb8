"""What a family does with its attention, read from one real call, since families name (or omit) attributes as they
like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from lolcats.errors import LolcatsError, first_line
from lolcats.modeling.families import HARMLESS, OBSTACLES, SPARSE
from lolcats.modeling.layer import Geometry

PROBE = "lolcats_probe"


@dataclass
class ProbedLayer:
    """One attention module, as a real call shows it."""

    name: str
    module: nn.Module
    geometry: Geometry
    sliding_window: int | None
    """Maximum number of keys that its mask lets a query see, if limited (a sliding window, or chunks)."""
    obstacle: str | None
    """Why this layer cannot be linearized; None if it can."""
    keepable: bool
    """Whether it can stay as it is in a converted model."""
    scale: float
    """Of the logits: queries come without it."""
    softcap: float | None


class _Mask:
    """Stands for the family's mask. A family that computes with it does more than the attention function can see."""

    def __init__(self, **arguments: Any) -> None:
        index = torch.arange(2, device="cpu")
        seen = [[bool(arguments["mask_function"](0, 0, q, k)) for k in index] for q in index]
        self.causal = seen == [[True, False], [True, True]]
        self.window: int | None = arguments.get("local_size")

    def __getitem__(self, _: Any) -> _Mask:
        return self

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise LolcatsError("computes with its attention mask itself")

    __add__ = __radd__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __invert__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return cls._refuse(None)  # type: ignore[arg-type]


class _Cache(DynamicCache):
    """Marks the keys of each layer, so that the attention function knows their layer; keeps none."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        key_states = key_states.view_as(key_states)
        key_states.lolcats_layer = layer_idx  # type: ignore[attr-defined]
        return key_states, value_states


@dataclass
class _Call:
    module: nn.Module
    geometry: Geometry
    layer: int | None
    """Index under which the call's keys went into the cache."""
    added: int
    """Number of keys beyond those of the tokens."""
    mask: Any
    keywords: dict[str, Any]


@torch.no_grad()
def probe(model: PreTrainedModel) -> list[ProbedLayer]:
    """Run two tokens through the model and record every call of the attention interface, in order of layers.

    Raises:
        LolcatsError: if the model does not leave its attention to transformers' attention interface.
    """
    calls: list[_Call] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
               **keywords: Any) -> tuple[Tensor, None]:  # fmt: skip
        layer = getattr(key, "lolcats_layer", None)
        index = getattr(module, "layer_idx", None) if layer is None else layer
        heads, channels = (query.shape[1], key.shape[1]), (query.shape[3], value.shape[3])
        geometry = Geometry(len(calls) if index is None else index, *heads, *channels)
        calls.append(_Call(module, geometry, layer, key.shape[2] - query.shape[2], attention_mask, keywords))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    failure: Exception | None = None
    AttentionInterface.register(PROBE, record)
    AttentionMaskInterface.register(PROBE, _Mask)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    cache = _Cache(config=text_config(model))
    with _implementation(model, PROBE):
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        except Exception as error:  # a family that computes attention itself may fail in any way
            failure = error
    if failure or not calls:
        raise LolcatsError(_unfollowed(model, failure)) from failure
    names = {module: name for name, module in model.named_modules()}
    modules, keys = Counter(call.module for call in calls), Counter(call.layer for call in calls)
    return [
        ProbedLayer(
            names[call.module], call.module, call.geometry, call.keywords.get("sliding_window") or _window(call.mask),
            _obstacle(call, modules[call.module] > 1, keys[call.layer] > 1), _keepable(call),
            *scale_and_cap(call.geometry.head_dim, call.keywords),
        )
        for call in calls
    ]  # fmt: skip


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    config: Any = text_config(model)
    before, training = config._attn_implementation_internal, model.training
    config._attn_implementation_internal = name
    try:
        yield model.eval()
    finally:
        config._attn_implementation_internal = before
        model.train(training)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration whose attention implementation the decoder's layers read: that of the text part, if any."""
    return model.config.get_text_config(decoder=True)


def scale_and_cap(head_dim: int, keywords: Mapping[str, Any]) -> tuple[float, float | None]:
    """Scale and softcap of the logits in a call of the attention interface."""
    scale = keywords.get("scaling")
    return head_dim**-0.5 if scale is None else scale, keywords.get("softcap")


def _window(mask: Any) -> int | None:
    return mask.window if isinstance(mask, _Mask) else None


def _unfollowed(model: PreTrainedModel, failure: Exception | None) -> str:
    name = type(model).__name__
    if isinstance(failure, LolcatsError):
        return (
            f"{name} {failure} (attention code of its own, or sparse, biased or block-wise attention) instead of "
            "leaving attention to transformers' attention interface, so it cannot be swapped."
        )
    if failure is not None:
        reason = first_line(failure)
        return f"{name} cannot be followed by its attention interface and cache, so it cannot be linearized ({reason})."
    return (
        f"{name} does not call transformers' attention interface, so its attention cannot be swapped. "
        "Families such as Llama, Mistral, Qwen and Gemma do."
    )


def _unknown(call: _Call) -> str | None:
    """A keyword of the call that may change what its attention computes."""
    return next((name for name, value in call.keywords.items() if value is not None and name not in HARMLESS), None)


def _keepable(call: _Call) -> bool:
    return not call.added and _unknown(call) in (None, *OBSTACLES)


def _obstacle(call: _Call, repeated: bool, shared: bool) -> str | None:
    geometry, unknown = call.geometry, _unknown(call)
    if call.added:
        return "attends to keys of its own besides those of the tokens (compressed or learned ones)"
    if unknown in SPARSE:
        return f"attends to keys that an indexer picks ({unknown}: sparse attention)"
    if unknown is not None:
        return OBSTACLES.get(unknown, f"passes {unknown!r} to its attention, a keyword that lolcats does not know")
    if getattr(call.module, "is_causal", True) is False or call.keywords.get("is_causal") is False:
        return "attends in both directions (an encoder): linear attention here is causal"
    if geometry.head_dim != geometry.value_dim:
        return f"has queries and values of different size ({geometry.head_dim} and {geometry.value_dim})"
    if repeated:
        return "computes attention more than once with the same module (loops, shared layers, differential attention)"
    if call.layer is None:
        return "attends to keys that do not come from transformers' cache as they are"
    if shared:
        return "shares its keys and values with other layers"
    if not isinstance(call.mask, _Mask):
        return "makes its attention mask without transformers' mask functions"
    return None if call.mask.causal else "has a mask that is not causal"
