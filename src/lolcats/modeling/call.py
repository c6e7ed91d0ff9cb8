"""What one call of the decoder knows, for every layer: built in the decoder's hook, carried by the masks it asks for.

transformers passes its layers a mask and nothing else of ours, so between the hook and the mask function the call
lies in a context variable, which the hook sets and clears again. Layers read it from the mask. That is also what they
find when gradient checkpointing runs them again in backward, after the call has ended.

torch runs no hook after an interruption (Ctrl-C), so the variable may hold a call that is over. It keeps neither model
nor cache alive, counts for no other model, and is dropped when the next call begins.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_torchdynamo_exporting

from lolcats.attention import Documents
from lolcats.attention.path import backend
from lolcats.attention.turning import Turning
from lolcats.errors import LolcatsError


class Padding(NamedTuple):
    """mask: (B, T) bool, False for padding, or None if there is none; counts: real tokens per row, on the host."""

    mask: Tensor | None = None
    counts: list[int] | None = None


KINDS = 4
"""Most tables of cosines that a call keeps what turns back for: families have one or two."""


@dataclass(eq=False)
class Call:
    """One call of a decoder.

    decoder: the module that is called, by a weak reference; None outside of any call.
    config: the configuration of its layers.
    documents: the sequences packed into each row, if rows hold several.
    apart: whether each row is known to hold one sequence, since the caller gave no positions.
    backend: the attention backend asked for when the call began.
    outer: the call that runs around this one, if a model inside another is hooked as well.
    """

    decoder: weakref.ref[Any] | None = None
    config: Any = None
    documents: Documents | None = None
    apart: bool = False
    backend: str = field(default_factory=backend)
    outer: Call | None = None
    _cache: weakref.ref[Any] | None = None
    _paddings: dict[Any, tuple[Tensor, Padding]] = field(default_factory=dict)
    _turnings: dict[Any, tuple[Tensor, Tensor, Turning]] = field(default_factory=dict)

    @property
    def cache(self) -> Any:
        """The ``DynamicCache`` of this call, whose layers hold the linearized layers' states; who called keeps it."""
        return None if self._cache is None else self._cache()

    @cache.setter
    def cache(self, value: Any) -> None:
        self._cache = None if value is None else weakref.ref(value)

    def padding(self, mask: Tensor | None, start: int, stop: int) -> Padding:
        """The padding of the new tokens, columns ``start`` to ``stop`` of the attention mask (B, all tokens). Read once
        for all layers, since it makes the host wait for the device."""
        if mask is None:
            return Padding()
        if exporting():
            return Padding(mask[:, start:stop].bool())
        key = id(mask), start, stop
        if key not in self._paddings:
            new = mask[:, start:stop].bool()
            counts = new.sum(1).tolist()
            found = Padding(new, counts) if min(counts) < stop - start else Padding()
            self._paddings[key] = mask, found  # with the mask, whose id stays taken
        return self._paddings[key][1]

    def turning(self, cos: Tensor, sin: Tensor, q: Tensor) -> Turning:
        """What turns queries like ``q`` back by these cosines and sines, made once for all layers that get them."""
        key = id(cos), id(sin), q.device, q.dtype
        if key not in self._turnings:
            if len(self._turnings) == KINDS:  # copies for each layer: with its hooks, accelerate makes them
                del self._turnings[next(iter(self._turnings))]
            self._turnings[key] = cos, sin, Turning.of(cos.to(q.device), sin.to(q.device), q.dtype)
        return self._turnings[key][2]


def exporting() -> bool:
    """Whether ``torch.export`` follows this call: what tensors hold is then not known.

    Dynamo takes ``is_exporting()`` for true in torch.compile as well (before torch 2.14), which may read tensors.
    """
    return is_torchdynamo_exporting() and not torch.compiler.is_dynamo_compiling()


def require(condition: Tensor, message: str) -> None:
    """Raise LolcatsError unless all of ``condition`` (bool) is true; an exported program checks it when it runs."""
    if exporting():
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise LolcatsError(message)


_current: ContextVar[Call | None] = ContextVar("call of a decoder", default=None)


def current() -> Call | None:
    """The call that is running, if any."""
    return _current.get()


def begin(call: Call) -> None:
    _current.set(call)


def around(decoder: Any) -> Call | None:
    """The call of a model that holds ``decoder``, if one is running; what an interruption left is none."""
    call = _current.get()
    while call is not None:
        outside = None if call.decoder is None else call.decoder()
        if outside is not None and outside is not decoder and any(part is decoder for part in outside.modules()):
            return call
        call = call.outer
    return None


def end(decoder: nn.Module, *_: Any) -> None:
    """Forward hook of the decoder, also after an error: its call is over."""
    call = _current.get()
    if call is not None and call.decoder is not None and call.decoder() is decoder:
        _current.set(call.outer)
