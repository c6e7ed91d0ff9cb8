"""Which rows each optimizer step of stage 1 trains on, drawn in advance: the same for every order and number of ranks.

A *visit* is one row in one epoch. Visits are numbered in the order in which training sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats.config import TransferConfig
from lolcats.ranks import Ranks

VALIDATION = -1  # used in place of a step number


@dataclass(frozen=True)
class Batch:
    """The rows that a rank processes at a time.

    rows: (N,) indices into the data; visits: their consecutive numbers (for validation rows: their indices).
    weight: share of these rows in the mean over their step (or over all validation rows).
    """

    rows: Tensor
    visits: range
    weight: float
    step: int = VALIDATION
    last: bool = False
    """Whether this is the rank's last batch of the step."""


@dataclass(frozen=True)
class Visits:
    """rows: (V,) the row of each visit; steps: the visits of each optimizer step."""

    rows: Tensor
    steps: list[range]
    steps_per_epoch: int

    @classmethod
    def draw(cls, count: int, config: TransferConfig, seed: int) -> Visits:
        """Draw rows as transformers' Trainer does with one process: a permutation of the ``count`` rows for each epoch,
        and a smaller last batch if the rows do not divide evenly."""
        per_epoch = math.ceil(count / config.batch_size)
        total = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
        epochs, steps = [], []
        for epoch in range(math.ceil(total / per_epoch)):
            start = epoch * count
            epochs.append(torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)))
            steps += [
                range(start + i, start + min(i + config.batch_size, count)) for i in range(0, count, config.batch_size)
            ]
        return cls(torch.cat(epochs)[: steps[total - 1].stop], steps[:total], per_epoch)

    def chunks(self, rows: int) -> list[range]:
        """Ranges of steps with at most ``rows`` visits each, or a single step that has more."""
        chunks, first = [], 0
        for step, visits in enumerate(self.steps):
            if step > first and visits.stop - self.steps[first].start > rows:
                chunks.append(range(first, step))
                first = step
        return [*chunks, range(first, len(self.steps))]

    def batches(self, steps: range, micro: int, ranks: Ranks) -> Iterator[Batch]:
        """This rank's batches of some steps, in order."""
        for step in steps:
            whole = self.steps[step]
            share = ranks.share(whole)
            parts = list(pieces(share, micro)) or [share]  # a rank without rows still takes part in the step
            for number, part in enumerate(parts):
                rows, last = self.rows[part.start : part.stop], number == len(parts) - 1
                yield Batch(rows, part, len(part) / len(whole), step, last)


def validation_batches(count: int, micro: int, ranks: Ranks) -> list[Batch]:
    """This rank's batches of ``count`` validation rows."""
    share = ranks.share(range(count))
    return [Batch(torch.arange(p.start, p.stop), p, len(p) / count) for p in pieces(share, micro)]


def batch_shapes(batches: Iterable[Batch]) -> set[int]:
    """The different numbers of rows that the batches have."""
    return {len(batch.visits) for batch in batches if batch.visits}


def pieces(whole: range, size: int) -> Iterator[range]:
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))
