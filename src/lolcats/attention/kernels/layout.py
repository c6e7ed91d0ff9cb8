"""Which tokens form a sequence, and how the work is split. Nothing here depends on the contents of a tensor."""

from __future__ import annotations

import dataclasses
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
SPLIT_WALK = 1.25  # what a walk through part of a sequence costs, the sums before it included; a whole sequence: 1


@dataclass(frozen=True)
class Walk:
    """How the forward pass carries S and z on chip, see :mod:`.walk`.

    tile: tokens of a tile; heads: query heads of a program, a power of two (fewer if they do not share a key map);
    keys: keys of a block, a divisor of ``tile``; stretch: tiles per program; parts: in how many parts the sums of a
    stretch's keys are computed; value: maximum number of columns of the value dim per program; resident: programs that
    run on a multiprocessor at the same time. stretch and parts are chosen automatically if None.
    """

    tile: int = 64
    heads: int = 1
    keys: int = 64
    stretch: int | None = None
    parts: int | None = None
    value: int = 128
    num_warps: int = 8
    num_stages: int = 1
    resident: int = 1


@dataclass(frozen=True)
class Tiling:
    """How a problem is split.

    tile: tokens processed at a time, 64 being a warp group's share of a matrix product; span: tokens between stored
    states, a multiple of ``tile``; walk: tiles per program; segment: states computed in sequence. walk and segment are
    chosen automatically if None. carry: how the forward pass carries states where it can (:func:`fitting_walk`); None:
    it reads stored ones. launches: (kernel, warps, stages) instead of what :func:`choose_launch` says; kernels as it
    names them.
    """

    tile: int = 64
    span: int = 64
    walk: int | None = None
    segment: int | None = None
    carry: Walk | None = None
    launches: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Sequences and how they are split, as tables that the kernels read.

    sequences: (N, 6) int32: ``Rows``, the first entry among the states, the first walk and the one after the last;
    walks: (W, 3) int32, one program per query head: sequence, first tile, tile after the last; key_walks: the
    same for each kv head; segments: (M, 3) int32, the same in steps of ``span`` tokens for each key map; ranges:
    (N + 1,) int32, first segment of each sequence; start: (N,) int32 zeros; entries: number of states; split: whether
    any sequence has several segments; complete: whether every token of the (batch, tokens) grid belongs to a sequence.
    stretches: None, or how the forward pass walks.
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
    stretches: Stretches | None


@dataclass(frozen=True)
class Stretches:
    """What the programs of :mod:`.walk` walk through.

    tiles: (K, 3) int32 as ``Layout.walks``; keys: (K · parts, 3) int32 as ``Layout.segments``, the keys that the next
    stretch's state holds besides this one's; ranges: (N + 1,) int32, first row of ``keys`` of each sequence; split:
    whether any sequence has several stretches.
    """

    tiles: Tensor
    keys: Tensor
    ranges: Tensor
    parts: int
    split: bool


def dense_rows(batch: int, tokens: int, lengths: Sequence[int] | None = None) -> Rows:
    """One sequence per batch row, from its first token on."""
    return tuple((b, 0, tokens if lengths is None else int(lengths[b])) for b in range(batch))


def packed_rows(cu_seqlens: Sequence[int]) -> Rows:
    """Sequences packed into a single batch row, delimited by cumulative lengths."""
    return tuple((0, a, b - a) for a, b in itertools.pairwise(cu_seqlens))


@lru_cache(maxsize=512)  # an evaluation repeats some hundred shapes
def make_layout(
    rows: Rows, grid: tuple[int, int], tiling: Tiling, heads: int, kv_heads: int, maps: int, device: torch.device,
    walk: Walk | None = None, lag: int = 0,
) -> Layout:  # fmt: skip
    """``heads``, ``kv_heads``, ``maps``: programs that run for each walk, key walk and segment. walk, lag: of the
    forward pass, see :func:`walk_lag`."""
    tiles = [-(-length // tiling.tile) for _, _, length in rows]
    steps = [-(-length // tiling.span) for _, _, length in rows]
    slots = RESIDENT * processors(device)
    per_walk = tiling.walk or per_program(tiles, heads, slots, split_cost=1)
    key_walk = tiling.walk or per_program(tiles, kv_heads, slots, split_cost=1)
    segment = tiling.segment or per_program(steps, maps, slots, split_cost=2)  # totals first, then states
    segments = _cut(steps, segment)
    entries, ranges = _offsets(steps, 1), _offsets(steps, segment)
    spans = zip(entries, itertools.pairwise(_offsets(tiles, per_walk)), strict=False)

    def table(entries: object) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32).to(device)

    sequences = [(*row, entry, *span) for row, (entry, span) in zip(rows, spans, strict=True)]
    return Layout(
        rows, table(sequences).view(-1, 6), table(_cut(tiles, per_walk)).view(-1, 3),
        table(_cut(tiles, key_walk)).view(-1, 3), table(segments).view(-1, 3), table(ranges), table([0] * len(rows)),
        entries[-1], split=max(steps, default=0) > segment,
        complete=sum(length for _, _, length in rows) == grid[0] * grid[1],
        stretches=None if walk is None else make_stretches(rows, walk, lag, tiling.span, heads, maps, device),
    )  # fmt: skip


def make_stretches(
    rows: Rows, walk: Walk, lag: int, span: int, heads: int, maps: int, device: torch.device
) -> Stretches:  # fmt: skip
    """heads, maps: query heads and key maps; span: tokens of a step, in which keys are counted."""
    tiles = [-(-length // walk.tile) for _, _, length in rows]
    slots = processors(device)
    size = walk.stretch or per_program(tiles, heads // walk.heads, walk.resident * slots, split_cost=SPLIT_WALK)
    stretches = _cut(tiles, size)
    parts = walk.parts or max(1, min(RESIDENT * slots // max(1, len(stretches) * maps), size * walk.tile // span))

    def step(tile: int) -> int:
        """The first step that is not in the state before a tile."""
        return max(tile * walk.tile - lag, 0) // span

    keys = []
    for s, begin, end in stretches:
        low, high = step(begin), step(begin if end == tiles[s] else end)
        bounds = [low + (high - low) * part // parts for part in range(parts + 1)]
        keys += [(s, *pair) for pair in itertools.pairwise(bounds)]
    ranges = [first * parts for first in _offsets(tiles, size)]
    a, b, c = (torch.tensor(x, dtype=torch.int32).to(device) for x in (stretches, keys, ranges))
    return Stretches(a.view(-1, 3), b.view(-1, 3), c, parts, split=max(tiles, default=0) > size)


def _offsets(counts: Sequence[int], size: int) -> list[int]:
    """Index of each sequence's first piece of at most ``size``, and the number of all pieces."""
    return [0, *itertools.accumulate(-(-count // size) for count in counts)]


def _cut(counts: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Cut each sequence into pieces of at most ``size``: (sequence, begin, end)."""
    return [(s, begin, min(begin + size, n)) for s, n in enumerate(counts) for begin in range(0, n, size)]


def per_program(counts: Sequence[int], heads: int, slots: int, split_cost: float) -> int:
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
    """Block sizes of one problem, compile-time constants: of the head dim, half the features, and the sinks."""

    dim: int
    feature: int
    sinks: int


def choose_blocks(dim: int, width: int, itemsize: int) -> BlockSizes:
    least = least_block(itemsize)
    return BlockSizes(dim=max(least, power_of_two(dim)), feature=max(least, power_of_two(width)), sinks=16)


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


Phi = Literal["inside", "seen", "projected", "given"]
"""How the kernels get φ(x): ``inside``, from x and the map's weights W; ``projected``, from x·W in fp32, if softmax
sees another x or W is large; ``given``, computed beforehand by any map. ``seen``: from an x of its own and W in two
parts; a forward pass that carries states does this instead of ``projected``, if W fits."""

SHARED = 200 * 1024  # bytes of shared memory that the tiles of a program may take
WEIGHTS = {2: 32 * 1024, 4: 16 * 1024}  # by itemsize: maximum bytes of a map's weights in it


def fits_inside(dim: int, width: int, itemsize: int) -> bool:
    """Whether the kernels have room for the (dim, width) weights of a head's map."""
    return power_of_two(dim) * power_of_two(width) * itemsize <= WEIGHTS[itemsize]


BEST_WALKS: dict[bool, Walk | None] = {True: None, False: None}
"""The walk of 16-bit calls, by whether several query heads share a key map; None: stored states, until walks have been
measured (``python benchmarks/attention.py --variants``)."""


def choose_tiling(itemsize: int, dim: int, width: int, shared: bool) -> Tiling:
    """dim, width: of the heads and of half the features. Walks have been compiled for up to 128 and 64."""
    if itemsize != 2:
        return Tiling(32, 64)
    return Tiling(64, 64, carry=BEST_WALKS[shared] if dim <= 128 and width <= 64 else None)


@lru_cache(maxsize=64)
def choose_launch(kernel: str, value_dim: int, blocks: BlockSizes, tile: int, itemsize: int, inside: bool) -> Launch:
    """The widest slice of the value dim whose fp32 sums fit in registers and whose operands fit in shared memory.

    kernel: ``state``, ``query_state`` (of queries, if their heads share a key map), ``output``, ``query``, ``key`` or
    ``weight``. inside: whether a map's weights are among the operands.
    """
    sums = kernel in ("state", "query_state")
    num_warps = 8 if blocks.dim > 128 else 4
    back = 1 if itemsize == 2 else 2  # the same for both kernels, which share slices
    keys = {"state": 0, "query_state": 0, "weight": 0, "output": 2, "query": back, "key": back}[kernel] * tile
    least = least_block(itemsize)
    if itemsize == 4:
        itemsize = 6  # fp32 operands are split into parts
    fixed = (tile + keys) * blocks.dim + (blocks.dim * blocks.feature if inside else 0)
    column = tile + keys + 2 * blocks.feature
    registers = 2048 * num_warps // (blocks.feature if sums else tile)
    value = max(least, power_of_two(value_dim))
    while value > least and (value > registers or (fixed + column * value) * itemsize > SHARED):
        value //= 2
    num_stages = 2 if sums and itemsize == 2 and blocks.dim * blocks.feature <= 8192 else 1
    return Launch(value, -(-value_dim // value), num_warps, num_stages)


def walk_launch(walk: Walk, value_dim: int, itemsize: int) -> Launch:
    value = min(walk.value, max(least_block(itemsize), power_of_two(value_dim)))
    return Launch(value, -(-value_dim // value), walk.num_warps, walk.num_stages)


def fitting_walk(spec: AttentionSpec, tiling: Tiling, heads: int, maps: int) -> Walk | None:
    """The walk of the forward pass, with as many heads per program as share a key map; None if states are stored: what
    enters S must be the same from tile to tile, and in steps of ``span``."""
    walk = tiling.carry
    if walk is None or (lag := walk_lag(spec, walk)) is None or lag % tiling.span or walk.tile % tiling.span:
        return None
    return dataclasses.replace(walk, heads=math.gcd(walk.heads, heads // maps))


def walk_lag(spec: AttentionSpec, walk: Walk) -> int | None:
    """How many tokens before a tile the keys begin that are not yet in S, a multiple of ``walk.keys``; None if that
    differs from tile to tile. Positions of first tokens are multiples of a terraced window."""
    if not spec.has_linear or (spec.kind != "linear" and spec.window == "terraced" and walk.tile % spec.window_size):
        return None
    size = 0 if spec.kind == "linear" else spec.window_size if spec.window == "terraced" else spec.window_size - 1
    return -(-size // walk.keys) * walk.keys


def near_end(spec: AttentionSpec, walk: Walk) -> int:
    """Where the window of a tile's last query starts, in tokens from the tile's first. Keys before it are older than
    some query's window."""
    if spec.kind == "linear":
        return walk.tile
    return walk.tile - (2 * spec.window_size if spec.window == "terraced" else spec.window_size)


def window_tiles(spec: AttentionSpec, tile: int) -> int:
    """Maximum number of tiles that a query's window reaches, its own included."""
    size = spec.window_size
    reach = size - 1 if spec.window == "sliding" else 2 * size - math.gcd(size, tile)  # of the first query of a tile
    return 1 + -(-reach // tile)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
