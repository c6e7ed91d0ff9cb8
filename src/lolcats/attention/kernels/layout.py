"""Which tokens form a sequence, and how the work is split. Nothing here depends on the contents of a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lolcats.attention.spec import AttentionSpec

Rows = tuple[tuple[int, int, int], ...]  # of each sequence: batch index, first token, length
RESIDENT = 2  # programs that run on a multiprocessor at the same time


@dataclass(frozen=True)
class Tiling:
    """How a problem is split.

    tile: tokens processed at a time, 64 being a warp group's share of a matrix product; span: tokens between stored
    states, a multiple of ``tile``; walk: tiles per program; segment: states computed in sequence. walk and segment are
    chosen automatically if None. see: multiply what maps see by W inside where that fits (:data:`Phi`). turn: if a call
    says how RoPE turned q and k, turn them back on chip for maps before RoPE; otherwise :mod:`.unrotate` does so first.
    launches: (kernel, warps, stages) instead of what :func:`choose_launch` says, which names the kernels.
    """

    tile: int = 64
    span: int = 64
    walk: int | None = None
    segment: int | None = None
    see: bool = True
    turn: bool = True
    launches: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Sequences and how they are split, as tables that the kernels read.

    sequences: (N, 6) int32: ``Rows``, the first entry among the states, the first walk and the one after the last;
    walks: (W, 3) int32, one program per query head: sequence, first tile, tile after the last; key_walks: the
    same for each kv head; segments: (M, 3) int32, the same in steps of ``span`` tokens for each key map; ranges:
    (N + 1,) int32, first segment of each sequence; start: (N,) int32 zeros; entries: number of states; split: whether
    any sequence has several segments; complete: whether every token of the (batch, tokens) grid belongs to a sequence.
    """

    rows: Rows
    sequences: Tensor
    walks: Tensor
    key_walks: Tensor
    segments: Tensor
    ranges: Tensor
    start: Tensor
    entries: int
    split: bool
    complete: bool


def dense_rows(batch: int, tokens: int, lengths: Sequence[int] | None = None) -> Rows:
    """One sequence per batch row, from its first token on."""
    return tuple((b, 0, tokens if lengths is None else int(lengths[b])) for b in range(batch))


def packed_rows(cu_seqlens: Sequence[int]) -> Rows:
    """Sequences packed into a single batch row, delimited by cumulative lengths."""
    return tuple((0, a, b - a) for a, b in itertools.pairwise(cu_seqlens))


@lru_cache(maxsize=512)  # an evaluation repeats some hundred shapes
def make_layout(
    rows: Rows, grid: tuple[int, int], tiling: Tiling, heads: int, kv_heads: int, maps: int, device: torch.device
) -> Layout:
    """``heads``, ``kv_heads``, ``maps``: programs that run for each walk, key walk and segment."""
    tiles = [-(-length // tiling.tile) for _, _, length in rows]
    steps = [-(-length // tiling.span) for _, _, length in rows]
    slots = RESIDENT * processors(device)
    walk = tiling.walk or per_program(tiles, heads, slots, split_cost=1)
    key_walk = tiling.walk or per_program(tiles, kv_heads, slots, split_cost=1)
    segment = tiling.segment or per_program(steps, maps, slots, split_cost=2)  # totals first, then states
    segments = _cut(steps, segment)
    entries, ranges = _offsets(steps, 1), _offsets(steps, segment)
    spans = zip(entries, itertools.pairwise(_offsets(tiles, walk)), strict=False)

    def table(entries: object) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32).to(device)

    sequences = [(*row, entry, *span) for row, (entry, span) in zip(rows, spans, strict=True)]
    return Layout(
        rows, table(sequences).view(-1, 6), table(_cut(tiles, walk)).view(-1, 3),
        table(_cut(tiles, key_walk)).view(-1, 3), table(segments).view(-1, 3), table(ranges), table([0] * len(rows)),
        entries[-1], split=max(steps, default=0) > segment,
        complete=sum(length for _, _, length in rows) == grid[0] * grid[1],
    )  # fmt: skip


def _offsets(counts: Sequence[int], size: int) -> list[int]:
    """Index of each sequence's first piece of at most ``size``, and the number of all pieces."""
    return [0, *itertools.accumulate(-(-count // size) for count in counts)]


def _cut(counts: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Cut each sequence into pieces of at most ``size``: (sequence, begin, end)."""
    return [(s, begin, min(begin + size, n)) for s, n in enumerate(counts) for begin in range(0, n, size)]


def per_program(counts: Sequence[int], heads: int, slots: int, split_cost: int) -> int:
    """Tiles or steps per program with which all programs finish soonest; the largest such number.

    counts: tiles or steps of each sequence; split_cost: cost factor of programs that do not take a whole sequence.
    """
    longest = max(counts, default=1) or 1

    def cost(size: int) -> float:
        waves = -(-sum(-(-count // size) for count in counts) * heads // slots)
        return waves * (size + 1) * (split_cost if size < longest else 1)  # starting a program costs about one more

    return min(sorted({-(-longest // parts) for parts in range(1, 257)}, reverse=True), key=cost)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in Triton's interpreter, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class BlockSizes:
    """Block sizes of one problem, compile-time constants: of the head dim, half of it, half the features, and the
    sinks."""

    dim: int
    half: int
    feature: int
    sinks: int


def choose_blocks(dim: int, width: int, itemsize: int) -> BlockSizes:
    least = least_block(itemsize)
    dims, half, feature = (max(least, power_of_two(n)) for n in (dim, -(-dim // 2), width))
    return BlockSizes(dims, half, feature, sinks=16)


def least_block(itemsize: int) -> int:
    """The smallest safe block: in half precision, products of tiles with 32 or fewer columns are wrong (LOG.md)."""
    return 64 if itemsize == 2 else 16


@dataclass(frozen=True)
class Launch:
    """How one kernel runs: columns of the value dim per program, programs needed for all of them, warps, stages."""

    value: int
    pieces: int
    num_warps: int
    num_stages: int


Phi = Literal["inside", "seen", "turned", "projected", "given"]
"""How the kernels get φ(x): ``inside``, from x and the map's weights W; ``projected``, from x·W in fp32, if softmax
sees another x or W is large; ``given``, computed beforehand by any map. ``seen``: from an x of its own and W in two
parts; the forward pass does this instead of ``projected`` where W fits. ``turned``: the same from q or k, turned back
on chip."""

SHARED = 200 * 1024  # bytes of shared memory that the tiles of a program may take
WEIGHTS = {2: 32 * 1024, 4: 16 * 1024}  # by itemsize: maximum bytes of a map's weights in it


def fits_inside(dim: int, width: int, itemsize: int) -> bool:
    """Whether the kernels have room for the (dim, width) weights of a head's map."""
    return power_of_two(dim) * power_of_two(width) * itemsize <= WEIGHTS[itemsize]


def fits_twice(dim: int, width: int, itemsize: int) -> bool:
    """Whether the forward kernels have room for both parts of such weights."""
    return fits_inside(dim, width, itemsize) and 2 * power_of_two(dim) * power_of_two(width) * 2 <= WEIGHTS[2]


def choose_tiling(itemsize: int) -> Tiling:
    return Tiling(64, 64) if itemsize == 2 else Tiling(32, 64)


@lru_cache(maxsize=64)
def choose_launch(kernel: str, value_dim: int, blocks: BlockSizes, tile: int, itemsize: int, inside: bool) -> Launch:
    """The widest slice of the value dim whose fp32 sums fit in registers and whose operands fit in shared memory.

    kernel: ``state``, ``seen_state`` (of keys, from what their map sees), ``query_state`` (of queries, if their heads
    share a key map), ``output``, ``query``, ``key`` or ``weight``. inside: whether a map's weights are among the
    operands.
    """
    sums = kernel in ("state", "seen_state", "query_state")
    num_warps = 8 if blocks.dim > 128 else 4
    back = 1 if itemsize == 2 else 2  # the same for both kernels, which share slices
    keys = {"output": 2, "query": back, "key": back}.get(kernel, 0) * tile
    least = least_block(itemsize)
    if itemsize == 4:
        itemsize = 6  # fp32 operands are split into parts
    fixed = (tile + keys) * blocks.dim + (blocks.dim * blocks.feature if inside else 0)
    column = tile + keys + 2 * blocks.feature
    registers = 2048 * num_warps // (blocks.feature if sums else tile)
    value = max(least, power_of_two(value_dim))
    while value > least and (value > registers or (fixed + column * value) * itemsize > SHARED):
        value //= 2
    num_stages = 2 if sums and kernel != "seen_state" and itemsize == 2 and blocks.dim * blocks.feature <= 8192 else 1
    return Launch(value, -(-value_dim // value), num_warps, num_stages)


def window_tiles(spec: AttentionSpec, tile: int) -> int:
    """Maximum number of tiles that a query's window reaches, its own included."""
    size = spec.window_size
    reach = size - 1 if spec.window == "sliding" else 2 * size - math.gcd(size, tile)  # of the first query of a tile
    return 1 + -(-reach // tile)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
