"""What a layer remembers of the tokens that it has seen: a state of fixed size, made of parts.

The ring holds the last W = ``spec.span`` keys and values: position p lies in slot p mod W. The sinks are the first
keys. A key moves from the ring into the sums S and z when the window of an arriving token no longer reaches it, just
before its slot is overwritten. :mod:`.advance` moves a state forward.

Shapes: B batch, H query heads, G key/value heads, D head dim, F features, W ring slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lolcats.attention.rounding import stochastic
from lolcats.attention.spec import AttentionSpec


class Seen(NamedTuple):
    """How many tokens each row has seen.

    rows: (B,) int64, on the device.
    known: the same on the host, one number if all rows are equal, else one per row; None if the host does not know.
    """

    rows: Tensor
    known: int | tuple[int, ...] | None

    @property
    def same(self) -> int | None:
        """The number, if the host knows that it is the same in every row."""
        return self.known if isinstance(self.known, int) else None

    @property
    def each(self) -> tuple[int, ...] | None:
        """The number of each row, if the host knows them."""
        return (self.known,) * len(self.rows) if isinstance(self.known, int) else self.known

    def plus(self, added: int | Tensor, known: Sequence[int] | None = None) -> Seen:
        """After ``added`` (B,) tokens more; ``known``: the same number for each row on the host, if a tensor."""
        rows = self.rows + added
        if isinstance(added, int):
            if isinstance(self.known, int):
                return Seen(rows, self.known + added)
            known = [added] * len(self.rows)
        each = self.each
        return Seen(rows, None if each is None or known is None else tuple(map(sum, zip(each, known, strict=True))))


class KeyValues(NamedTuple):
    """Some tokens' keys and values. k, v: (B, G, slots, D)."""

    k: Tensor
    v: Tensor


class Sums(NamedTuple):
    """The linear term over the keys older than the window.

    S: (B, H or G, F, D) fp32, or bf16 and rounded stochastically by a step (see :mod:`.rounding`); z: (B, H or G, F)
    fp32. F = 0 if the kind has no linear term.
    """

    S: Tensor
    z: Tensor


PARTS = {"ring": ("ring_k", "ring_v"), "sinks": ("sink_k", "sink_v"), "sums": ("S", "z")}
"""Names of the tensors of each part, as saved states have them."""


@dataclass(frozen=True)
class AttentionState:
    """The state as a value: moving it forward makes a new one and leaves this one as it is."""

    seen: Seen
    ring: KeyValues
    sinks: KeyValues
    sums: Sums

    @classmethod
    def empty(
        cls, k: Tensor, v: Tensor, maps: int, features: int, spec: AttentionSpec, dtype: torch.dtype = torch.float32
    ) -> Self:
        """State before the first token, for keys and values like ``k``, ``v`` (B, G, *, D).

        maps: H or G. features: F. dtype: dtype of S.
        """
        batch, device, features = k.shape[0], k.device, features if spec.has_linear else 0

        def slots(count: int) -> KeyValues:
            return KeyValues(*(x.new_zeros(*x.shape[:2], count, x.shape[3]) for x in (k, v)))

        S = torch.zeros(batch, maps, features, v.shape[3], dtype=dtype, device=device)
        z = torch.zeros(batch, maps, features, dtype=torch.float32, device=device)  # not torch's default
        sums = Sums(S, z)
        seen = Seen(torch.zeros(batch, dtype=torch.long, device=device), 0)
        return cls(seen, slots(spec.span), slots(spec.softmax_sinks), sums)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; each has B rows."""
        parts = {name: x for part, names in PARTS.items() for name, x in zip(names, getattr(self, part), strict=True)}
        return {"seen": self.seen.rows, **parts}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], known: int | tuple[int, ...] | None) -> Self:
        """The state with these :meth:`tensors`; ``known``: see :class:`Seen`."""
        parts = {part: [tensors[name] for name in names] for part, names in PARTS.items()}
        kinds: dict[str, Any] = {"ring": KeyValues, "sinks": KeyValues, "sums": Sums}
        return cls(Seen(tensors["seen"], known), **{part: kinds[part](*parts[part]) for part in PARTS})

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``change`` to every tensor, to reorder, repeat or move rows."""
        return self.of_tensors({name: change(x) for name, x in self.tensors().items()}, self.seen.same)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors().values())

    def ring_positions(self) -> Tensor:
        """(B, W) position of the key in each slot; negative if the slot is empty."""
        seen, count = self.seen.rows, self.ring.k.shape[2]
        last, slots = seen[:, None] - 1, torch.arange(count, device=seen.device)
        return last - (last - slots) % count if count else slots.expand(len(seen), 0)

    def added(self, rows: Tensor, S: Tensor, z: Tensor) -> Self:
        """With S (R, H or G, F, D) and z (R, H or G, F) added to the sums of ``rows`` (R,)."""
        if self.sums.S.dtype == torch.float32:
            sums = Sums(self.sums.S.index_add(0, rows, S), self.sums.z.index_add(0, rows, z))
        else:
            sums = Sums(self.sums.S.index_copy(0, rows, self._rounded(rows, S)), self.sums.z.index_add(0, rows, z))
        return type(self)(self.seen, self.ring, self.sinks, sums)

    def stored(self, k: Tensor, v: Tensor, slot: Tensor, sink: Tensor | None) -> Self:
        """With one more token: its key and value (B, G, 1, D) in a ring ``slot`` (B, 1, 1, 1), and in the ``sink``
        (B, 1, sinks, 1) that it is, if any."""
        ring, sinks = self.ring, self.sinks
        if ring.k.shape[2]:
            ring = KeyValues(ring.k.scatter(2, slot.expand_as(k), k), ring.v.scatter(2, slot.expand_as(v), v))
        if sink is not None:
            sinks = KeyValues(torch.where(sink, k, sinks.k), torch.where(sink, v, sinks.v))
        return type(self)(self.seen.plus(1), ring, sinks, self.sums)

    def _rounded(self, rows: Tensor, S: Tensor) -> Tensor:
        return stochastic(self.sums.S[rows].float() + S, self.seen.rows[rows])


@dataclass(frozen=True)
class SlotState(AttentionState):
    """Slots for the states of many sequences, one a row, allocated once. A step writes into them; no gradients.

    The numbers of tokens differ between rows. If the host knows them, it says so for one step (:meth:`at`).
    """

    @classmethod
    def of(cls, state: AttentionState) -> Self:
        """Slots on the memory of ``state``."""
        return cls.of_tensors(state.tensors(), None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self.of_tensors({name: change(x) for name, x in self.tensors().items()}, None)

    def at(self, known: tuple[int, ...] | None) -> Self:
        """The same slots for the next step, with the numbers of tokens that the host knows."""
        if known is self.seen.known:
            return self
        return type(self)(Seen(self.seen.rows, known), self.ring, self.sinks, self.sums)

    def row(self, slot: int, count: int) -> AttentionState:
        """A copy of one slot, which has seen ``count`` tokens."""
        copies = {name: x[slot : slot + 1].clone() for name, x in self.tensors().items()}
        return AttentionState.of_tensors(copies, count)

    def added(self, rows: Tensor, S: Tensor, z: Tensor) -> Self:
        if self.sums.S.dtype == torch.float32:
            self.sums.S.index_add_(0, rows, S)
        else:
            self.sums.S[rows] = self._rounded(rows, S)
        self.sums.z.index_add_(0, rows, z)
        return self

    def stored(self, k: Tensor, v: Tensor, slot: Tensor, sink: Tensor | None) -> Self:
        if sink is not None:
            for x, y in zip(self.sinks, (k, v), strict=True):
                x.copy_(torch.where(sink, y, x))
        if self.ring.k.shape[2]:
            for x, y in zip(self.ring, (k, v), strict=True):
                x.scatter_(2, slot.expand_as(y), y)
        self.seen.rows.add_(1)
        return self.at(None)
