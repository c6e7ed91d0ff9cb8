"""Which tokens belong together, and how the work is cut up. Nothing here depends on the contents of a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lolcats.attention.spec import AttentionSpec

Rows = tuple[tuple[int, int, int], ...]  # of each sequence: batch index, first token, length
SHORTEST_SEGMENT = 4  # blocks: below, computing the states costs more than the parallelism gains


@dataclass(frozen=True)
class Layout:
    """Sequences, cut into segments of whole blocks, as tables the kernels read.

    sequences: (N, 3) int32 of ``Rows``; segments: (M, 3) int32: sequence, first block, block after the last;
    ranges: (N + 1,) int32, first segment of each sequence; split: whether any sequence has several segments;
    complete: whether every token of the (batch, tokens) grid belongs to a sequence.
    """

    rows: Rows
    sequences: Tensor
    segments: Tensor
    ranges: Tensor
    split: bool
    complete: bool


def dense_rows(batch: int, tokens: int, lengths: Sequence[int] | None = None) -> Rows:
    """One sequence a batch row, from its first token on."""
    return tuple((b, 0, tokens if lengths is None else int(lengths[b])) for b in range(batch))


def packed_rows(cu_seqlens: Sequence[int]) -> Rows:
    """Sequences one behind the other in a single batch row, between cumulative lengths."""
    return tuple((0, a, b - a) for a, b in itertools.pairwise(cu_seqlens))


@lru_cache(maxsize=64)
def make_layout(
    rows: Rows, grid: tuple[int, int], chunk: int, programs: int, device: torch.device, segment: int | None = None
) -> Layout:
    """``programs``: how many programs run for each segment; ``segment``: blocks of each, chosen here if None."""
    blocks = [-(-length // chunk) for _, _, length in rows]
    size = segment or segment_blocks(blocks, programs, processors(device))
    segments, ranges = [], [0]
    for sequence, count in enumerate(blocks):
        segments += [(sequence, begin, min(begin + size, count)) for begin in range(0, count, size)]
        ranges.append(len(segments))

    def table(entries: object) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32).to(device)

    complete = sum(length for _, _, length in rows) == grid[0] * grid[1]
    tables = table(rows).view(-1, 3), table(segments).view(-1, 3), table(ranges)
    return Layout(rows, *tables, split=max(blocks, default=0) > size, complete=complete)


def segment_blocks(blocks: Sequence[int], programs: int, processors: int) -> int:
    """Blocks per segment that keep all processors busy for the shortest time."""
    longest = max(blocks, default=1) or 1

    def cost(size: int) -> float:
        waves = -(-sum(-(-count // size) for count in blocks) * programs // processors)
        return waves * (size + (1 if size < longest else 0))  # a segment's state costs about one more block

    sizes = {max(-(-longest // parts), min(SHORTEST_SEGMENT, longest)) for parts in range(1, 65)}
    return min(sorted(sizes, reverse=True), key=cost)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in Triton's interpreter, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class Blocks:
    """Block sizes and launch settings of one problem: compile-time constants."""

    dim: int
    value: int
    feature: int
    sinks: int
    pieces: int
    num_warps: int


def choose_blocks(dim: int, value_dim: int, width: int, wide_dtype: bool, spec: AttentionSpec) -> Blocks:
    """S (2 · width × value slice, fp32) and the tiles beside it must fit in a processor's registers."""
    feature = max(16, power_of_two(width))
    room = 8192 if wide_dtype or spec.chunk > 64 or dim > 128 else 16384
    value = min(max(16, power_of_two(value_dim)), max(16, room // (2 * feature)))
    return Blocks(
        dim=max(16, power_of_two(dim)), value=value, feature=feature, sinks=16, pieces=-(-value_dim // value),
        num_warps=8 if spec.chunk >= 64 else 4,
    )  # fmt: skip


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
