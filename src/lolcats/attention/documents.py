"""Rows that pack several documents, each of which is a sequence of its own.

Shapes: B batch, H heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Lengths of the documents in each of the B rows of a batch, on the host. The lengths of each row sum to T."""

    lengths: tuple[tuple[int, ...], ...]
    device: torch.device

    @classmethod
    def of(cls, numbers: Tensor) -> Documents:
        """From document numbers (B, T), which change where another document begins."""
        counts = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in numbers.cpu()]
        return cls(tuple(map(tuple, counts)), numbers.device)

    @cached_property
    def cumulative(self) -> list[int]:
        """[0, ..., B · T]: where documents begin and end once all rows are concatenated."""
        return [0, *accumulate(length for row in self.lengths for length in row)]

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Documents grouped by similar length, so that padding at most doubles the work.

        Each group has the (N, L) places of its tokens in B · T, where a document's last token is repeated as padding,
        and a mask (N · L,), False for padding.
        """
        by_size: dict[int, list[tuple[int, int]]] = {}
        for begin, end in pairwise(self.cumulative):
            by_size.setdefault((end - begin - 1).bit_length(), []).append((begin, end))
        groups = []
        for spans in by_size.values():
            first, stop = torch.tensor(spans, device=self.device).split(1, 1)
            places = first + torch.arange(max(end - begin for begin, end in spans), device=self.device)
            groups.append((places.minimum(stop - 1), (places < stop).flatten()))
        return groups

    @cached_property
    def order(self) -> Tensor:
        """(B · T,): for each token of the batch, its index among the unpadded tokens of all groups."""
        placed = torch.cat([places.flatten()[real] for places, real in self.groups])
        return torch.empty_like(placed).scatter_(0, placed, torch.arange(len(placed), device=self.device))

    def apart(self, attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply ``attend`` to (B, heads, T, D) tensors with each document in a row of its own; returns (B, H, T, D).

        ``attend`` must be causal: documents are padded by repeating their last token, and those outputs are dropped.
        """
        batch, length = tensors[0].shape[0], tensors[0].shape[2]
        flat, parts = [x.transpose(1, 2).flatten(0, 1) for x in tensors], []
        for places, real in self.groups:
            index = places.flatten()
            rows = [x.index_select(0, index).unflatten(0, places.shape).transpose(1, 2) for x in flat]
            y = attend(*rows).transpose(1, 2).flatten(0, 1)
            parts.append(y if real.all() else y[real])
        return torch.cat(parts).index_select(0, self.order).unflatten(0, (batch, length)).transpose(1, 2)

    def laid_out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(B, heads, T, D) -> (1, heads, B · T, D): all rows concatenated."""
        return [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in tensors]
