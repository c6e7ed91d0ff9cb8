"""Which heads of a layer stay softmax attention, and how its tensors are parted and put together again.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from lolcats.attention.subset import HeadSubset
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import Geometry


@dataclass(frozen=True)
class KeptHeads:
    """Key/value heads of one layer, each with the query heads that use it. kept: their indices, ascending."""

    geometry: Geometry
    """Of the whole layer."""
    kept: tuple[int, ...]

    @cached_property
    def linearized(self) -> tuple[int, ...]:
        """The other key/value heads."""
        return tuple(head for head in range(self.geometry.kv_heads) if head not in self.kept)

    @property
    def of_linearized(self) -> Geometry:
        """The shapes of what is linearized."""
        count = len(self.linearized)
        return replace(self.geometry, heads=self.group * count, kv_heads=count)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.geometry.heads // self.geometry.kv_heads

    def queries(self, kv_heads: Sequence[int]) -> list[int]:
        """The query heads of ``kv_heads``, in their order."""
        return [head * self.group + i for head in kv_heads for i in range(self.group)]

    def on_rank(self, rank: int, ranks: int) -> KeptHeads:
        """Of one of ``ranks`` that each hold as many heads, side by side."""
        count = self.geometry.kv_heads // ranks
        local = replace(self.geometry, heads=self.geometry.heads // ranks, kv_heads=count)
        return KeptHeads(local, tuple(head - rank * count for head in self.kept if head // count == rank))

    def part(self, kv_heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D) and k, v (B, G, T, D) of only these key/value heads."""
        return take(q, 1, self.queries(kv_heads)), take(k, 1, kv_heads), take(v, 1, kv_heads)

    def subsets(self, out: Tensor) -> tuple[HeadSubset, HeadSubset]:
        """The kept and the linearized heads, whose outputs go into ``out`` (B, H, D)."""
        return HeadSubset(_index(self.kept, out), out), HeadSubset(_index(self.linearized, out), out)

    def of_outputs(self, y: Tensor) -> Tensor:
        """The outputs (B, T, heads, D) of the linearized query heads, from those of all heads."""
        return take(y, 2, self.queries(self.linearized))

    def joined(self, kept: Tensor, linearized: Tensor) -> Tensor:
        """(B, T, H, D) from the outputs (B, T, heads, D) of the kept and of the linearized query heads."""
        order = [*self.queries(self.kept), *self.queries(self.linearized)]
        places = sorted(range(len(order)), key=order.__getitem__)
        joined = torch.cat([kept, linearized.to(kept.dtype)], 2)
        return joined.index_select(2, _index(tuple(places), kept))


@dataclass(frozen=True)
class Trial:
    """What a selection of heads tries in a layer that linearizes all of them.

    heads: key/value heads that are softmax attention. shares: None, or (G,) the share of softmax attention in the
    output of each key/value head, which gets a gradient; ``heads`` are then not used.
    """

    heads: tuple[int, ...] = ()
    shares: Tensor | None = None

    def mixed(self, soft: Tensor, linearized: Tensor) -> Tensor:
        """(B, T, H, D): both outputs in their shares."""
        assert self.shares is not None
        each = self.shares.repeat_interleave(soft.shape[2] // len(self.shares)).to(soft.dtype)
        return torch.lerp(linearized.to(soft.dtype), soft, each[:, None])


def take(x: Tensor, dim: int, heads: Sequence[int]) -> Tensor:
    """The ``heads`` of dimension ``dim``: a view if they lie side by side, else a copy."""
    first, count = heads[0], len(heads)
    if list(heads) == list(range(first, first + count)):
        return x.narrow(dim, first, count)
    return x.index_select(dim, _index(tuple(heads), x))


def _index(values: tuple[int, ...], like: Tensor) -> Tensor:
    """The values on the device of ``like``. On a GPU they stay there: a CUDA graph cannot copy them from the host."""
    if like.is_cuda and type(like) is Tensor:
        return _stored_index(values, like.device)
    return torch.tensor(values, device=like.device)


@cache
def _stored_index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd can save it
        return torch.tensor(values, device=device)


def kept_heads(chosen: Mapping[str, Sequence[int]], geometries: Mapping[int, Geometry]) -> dict[int, tuple[int, ...]]:
    """The kept key/value heads of each layer that has any, from ``attention.softmax_heads``.

    Raises:
        LolcatsError: for a layer or head that the model does not have.
    """
    found: dict[int, tuple[int, ...]] = {}
    for text, heads in chosen.items():
        if not text.isdigit() or int(text) not in geometries:
            raise LolcatsError(
                f"attention.softmax_heads: the model has no attention layer {text} (it has {list(geometries)})."
            )
        count = geometries[int(text)].kv_heads
        if wrong := [head for head in heads if not 0 <= head < count]:
            raise LolcatsError(
                f"attention.softmax_heads: layer {text} has no key/value head {wrong[0]} (it has {count}, numbered "
                "from 0)."
            )
        if heads:
            found[int(text)] = tuple(sorted(set(heads)))
    return found
