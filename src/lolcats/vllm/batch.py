"""What all layers need to know of one step's batch, worked out once: which rows compute together, and where they lie.

vLLM puts the new tokens of all requests into one row of tokens: one for a request that decodes, some or all of its
prompt for one that prefills. All decoding rows are one step. Prefilling rows of similar length are padded to one batch,
which at most doubles the work.

Shapes: B rows, T new tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from lolcats.attention.state import Seen

PADDING = -1
"""The tokens that a row of the decode kernel has seen if it is none: see :func:`lolcats.attention.step`."""


@dataclass(frozen=True)
class Rows:
    """Requests that compute together.

    slots: (B,) where their states lie. seen: tokens before this step. fresh: slots of decoding rows that begin.
    lengths: new tokens of each row. tokens: (B, T) their places in the step's tokens; a row's last one is repeated as
    padding, where ``mask`` (B, T) is False (None: no padding). tokens None: the step's tokens in order, one for each.
    """

    slots: Tensor
    seen: Seen
    lengths: tuple[int, ...]
    tokens: Tensor | None
    mask: Tensor | None = None
    fresh: Tensor | None = None

    @property
    def begin(self) -> bool:
        """Whether none of them has seen a token."""
        return self.seen.same == 0

    def take(self, x: Tensor) -> Tensor:
        """(tokens, heads, D) -> (B, heads, T, D)"""
        x = x[: len(self.slots), None] if self.tokens is None else x[self.tokens]
        return x.transpose(1, 2)

    def put(self, y: Tensor, out: Tensor) -> None:
        """(B, heads, T, D) into ``out`` (tokens, heads, D)."""
        y = y.transpose(1, 2)
        if self.tokens is None:
            out[: len(y)] = y[:, 0]
        elif self.mask is None:
            out[self.tokens] = y.to(out.dtype)
        else:
            out[self.tokens[self.mask]] = y[self.mask].to(out.dtype)


@dataclass(frozen=True)
class Batch:
    """places: (tokens,) of each token in its own sequence; None if each row has one new token."""

    decodes: Rows | None
    prefills: tuple[Rows, ...]
    places: Tensor | None = None

    @classmethod
    def decoding(cls, seen: Tensor, slots: Tensor) -> Self:
        """One new token for every row: only tensors on the device, (B,) each, and what is computed from them waits for
        nothing. A row that has seen ``PADDING`` tokens is padding."""
        return cls(Rows(slots, Seen(seen, None), (1,) * len(slots), None), ())

    @classmethod
    def of(cls, lengths: Sequence[int], seen: Sequence[int], slots: Tensor) -> Self:
        """For requests with so many new tokens, after so many, with states in ``slots``; all in the order of tokens."""
        starts, decodes, prefills = [0, *accumulate(lengths)], list[int](), dict[tuple[int, bool], list[int]]()
        for row, length in enumerate(lengths):
            if length == 1:
                decodes.append(row)
            elif length:
                prefills.setdefault(((length - 1).bit_length(), seen[row] == 0), []).append(row)

        def rows(of: list[int]) -> Rows:
            return _rows([lengths[i] for i in of], [seen[i] for i in of], slots[of], [starts[i] for i in of])

        groups = rows(decodes) if decodes else None, tuple(map(rows, prefills.values()))
        return cls(*groups, _places(torch.tensor(lengths), torch.tensor(seen)).to(slots.device))

    @property
    def positions(self) -> Tensor:
        """(tokens,) of each token in its own sequence; 0 for padding."""
        if self.places is not None:
            return self.places
        assert self.decodes is not None
        return self.decodes.seen.rows.clamp_min(0)


def _places(lengths: Tensor, seen: Tensor) -> Tensor:
    first = seen - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + first.repeat_interleave(lengths)


def _rows(lengths: list[int], seen: list[int], slots: Tensor, starts: list[int]) -> Rows:
    device, longest = slots.device, max(lengths)
    counts = torch.tensor(lengths, device=device)[:, None]
    place, mask = torch.arange(longest, device=device), None
    if min(lengths) < longest:
        mask = place < counts
    tokens = torch.tensor(starts, device=device)[:, None] + torch.minimum(place, counts - 1)
    known: int | tuple[int, ...] = seen[0] if len(set(seen)) == 1 else tuple(seen)
    begin = [i for i, count in enumerate(seen) if not count] if longest == 1 else []
    seen_rows = Seen(torch.tensor(seen, device=device), known)
    return Rows(slots, seen_rows, tuple(lengths), tokens, mask, slots[begin] if begin else None)
