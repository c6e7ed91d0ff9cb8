"""States of many sequences in vLLM's memory: a page of bytes for each, whose number vLLM calls a slot.

Shapes: N pages, B rows of a batch, H query heads, G key/value heads, D head dim, F features, W ring slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lolcats.attention import AttentionState, SlotState
from lolcats.attention.rounding import rounded
from lolcats.attention.state import PARTS, Seen

NAMES = tuple(name for names in PARTS.values() for name in names)
ALIGNMENT = 64  # bytes, of a page's length: kernels then know that every row of it is aligned


@dataclass(frozen=True)
class Layout:
    """Where each tensor of one sequence's state lies in its page; larger dtypes first, so that all are aligned. A page
    has ``least`` bytes or more."""

    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    least: int = 0

    @classmethod
    def of(cls, state: AttentionState) -> Self:
        """For states like ``state``, whose tensors may be on the meta device."""
        tensors = state.tensors()
        names = sorted(NAMES, key=lambda name: -tensors[name].element_size())
        return cls(tuple((name, tuple(tensors[name].shape[1:]), tensors[name].dtype) for name in names))

    @property
    def nbytes(self) -> int:
        used = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.shapes)
        return max(self.least, -(-used // ALIGNMENT) * ALIGNMENT)

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """The tensors (N, ...) in pages (N, nbytes or more) of bytes."""
        views, begin = {}, 0
        for name, shape, dtype in self.shapes:
            end = begin + math.prod(shape) * dtype.itemsize
            view = pages[:, begin:end].view(dtype) if end > begin else pages.new_empty(len(pages), 0, dtype=dtype)
            views[name], begin = view.view(len(pages), *shape), end
        return views


class Pool:
    """The states of one layer: its ``parts`` are (N, ...) views of vLLM's memory."""

    def __init__(self, layout: Layout, pages: Tensor) -> None:
        self.layout, self.pages = layout, pages
        self.parts: Mapping[str, Tensor] = layout.views(pages)

    def read(self, slots: Tensor, seen: Seen) -> AttentionState:
        """Copies of the states in ``slots`` (B,), whose rows have seen so many tokens; S in fp32."""
        copies = self._copies(slots)
        return AttentionState.of_tensors({**copies, "S": copies["S"].float(), "seen": seen.rows}, seen.known)

    def write(self, slots: Tensor, state: AttentionState) -> None:
        """Store the states of B rows in ``slots`` (B,). S in bf16 is rounded stochastically, as a step rounds it."""
        tensors = state.tensors()
        tensors["S"] = rounded(tensors["S"], self.parts["S"].dtype, state.seen.rows - 1)
        for name, part in self.parts.items():
            part[slots] = tensors[name].to(part.dtype)

    def clear(self, slots: Tensor) -> None:
        """Begin sequences in ``slots``. Memory that held something else may be NaN when read as a state."""
        for part in self.parts.values():
            part[slots] = 0

    def rows(self, slots: Tensor, seen: Seen) -> PoolRows:
        """Copies of the states in ``slots`` (B,) for a step, which writes what it changes here, too."""
        known = seen.each
        tensors = {**self._copies(slots), "seen": seen.rows.clone()}
        rows = PoolRows.of_tensors(tensors, known)
        return PoolRows(rows.seen, rows.ring, rows.sinks, rows.sums, self, slots)

    def whole(self, seen: Tensor) -> SlotState:
        """All states, for a kernel that moves some of them in place; ``seen`` (B,): tokens of each row of its batch."""
        return SlotState.of_tensors({**self.parts, "seen": seen}, None)

    def _copies(self, slots: Tensor) -> dict[str, Tensor]:
        return {name: part[slots] for name, part in self.parts.items()}


@dataclass(frozen=True)
class PoolRows(SlotState):
    """Rows of a :class:`Pool`, copied for one step. With a terraced window most steps change one key of each row's ring
    and no sums, so only what changes is written back."""

    pool: Pool | None = None
    slots: Tensor | None = None

    def added(self, rows: Tensor, S: Tensor, z: Tensor) -> Self:
        super().added(rows, S, z)
        assert self.pool is not None
        assert self.slots is not None
        for name, part in zip(PARTS["sums"], self.sums, strict=True):
            self.pool.parts[name][self.slots[rows]] = part[rows]
        return self

    def stored(self, k: Tensor, v: Tensor, slot: Tensor, sink: Tensor | None) -> Self:
        assert self.pool is not None
        assert self.slots is not None
        if self.ring.k.shape[2]:
            for name, x in zip(PARTS["ring"], (k, v), strict=True):
                self.pool.parts[name][self.slots, :, slot[:, 0, 0, 0]] = x[:, :, 0]
        after = super().stored(k, v, slot, sink)
        if sink is not None:
            for name, part in zip(PARTS["sinks"], self.sinks, strict=True):
                self.pool.parts[name][self.slots] = part
        return after
