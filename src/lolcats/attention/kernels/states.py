"""States: Σ φ(x_n) u_nᵀ (S) and Σ φ(x_n) (z) over everything before (or behind) each step of a sequence.

A step is SPAN tokens. In the forward pass x = k and u = v, and the state of a step holds all keys before it. In the
backward pass x = q and u = dO, and it holds what all queries behind the step contribute to the gradients of S and z.
Long sequences are cut into segments that run in parallel: ``state_kernel`` first computes each segment's total
(STORE off), ``scan_kernel`` adds these up, and ``state_kernel`` then walks each segment from its right start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.blocks import (
    features,
    head_pointer,
    key_positions,
    load_rows,
    load_tile,
    load_weight,
    matrix,
    row_offset,
    walk_bounds,
    window_start,
)


@triton.jit
def state_kernel(
    x, x_strides, u, u_strides, f, f_strides, weight, inverse, shift, starts, totals, states, sums, segments, sequences,
    positions, heads, x_group, u_group, tokens, dim, value_dim, width,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, BACKWARD: tl.constexpr, STORE: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_TOTALS: tl.constexpr, FUSED: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One segment, map and slice of the value dim.

    starts, totals: (segments, maps, 2 · width · (value_dim + 1)) fp32, the state before the segment and behind it.
    states: (entries, maps, 2, value_dim, width) and sums: (entries, maps, 2 · width) fp32: S and z of each step.
    BACKWARD: rows enter S weighted by ``inverse`` (1 / denominator) and z by ``shift``.
    """
    segment, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, begin, end, batch, first, length, entry, position = walk_bounds(segments, sequences, positions, segment)
    x = head_pointer(x, x_strides, batch, head // x_group, first)
    u = head_pointer(u, u_strides, batch, head // u_group, first)
    f = head_pointer(f, f_strides, batch, head, first)
    inverse += row_offset(batch, head, first, heads, tokens)
    shift += row_offset(batch, head, first, heads, tokens)
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    last = window_start(position + length - 1, WINDOW, SIZE)  # keys from here on are still in a window at the end
    w = load_weight(weight, head, d, j, dim, width).to(x.dtype.element_ty) if FUSED else 0
    S_up, S_down, z_up, z_down = load_total(
        starts, segment * tl.num_programs(1) + head, j, vd, width, value_dim, HAS_STARTS, BLOCK_F, BLOCK_V
    )  # fmt: skip
    TILES: tl.constexpr = SPAN // C
    for i in range(begin * TILES, end * TILES):
        tile = (begin + end) * TILES - 1 - i if BACKWARD else i
        if STORE:
            if i % TILES == 0:
                index = (entry + tile // TILES) * tl.num_programs(1) + head
                store_state(states, sums, index, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece)
        t = tile * C + row
        x_tile = load_tile(x, x_strides[2], t, length, d, dim)
        u_tile = load_tile(u, u_strides[2], t, length, vd, value_dim).to(LOW)
        up, down = features(x_tile, w, f, f_strides[2], t, length, j, width, FUSED, PRECISION)
        if BACKWARD:
            row_S, row_z = load_rows(inverse, t, length), load_rows(shift, t, length)
        else:
            key = key_positions(t, length, position, SINKS)
            row_S = ((key >= 0) & (key < last)).to(tl.float32)
            row_z = row_S
        z_up += tl.sum(up * row_z[:, None], 0)
        z_down += tl.sum(down * row_z[:, None], 0)
        u_tile = tl.trans(u_tile)
        S_up = tl.dot(u_tile, (up * row_S[:, None]).to(LOW), S_up, input_precision=PRECISION)
        S_down = tl.dot(u_tile, (down * row_S[:, None]).to(LOW), S_down, input_precision=PRECISION)
    if HAS_TOTALS:
        index = segment * tl.num_programs(1) + head
        store_total(totals, index, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece)


@triton.jit
def store_state(states, sums, index, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece):
    base = states + index.to(tl.int64) * (2 * width * value_dim)
    offsets, exists = matrix(vd, j, value_dim, width)
    tl.store(base + offsets, S_up.to(states.dtype.element_ty), mask=exists)
    tl.store(base + width * value_dim + offsets, S_down.to(states.dtype.element_ty), mask=exists)
    z = sums + index.to(tl.int64) * (2 * width)
    tl.store(z + j, z_up, mask=(j < width) & (piece == 0))
    tl.store(z + width + j, z_down, mask=(j < width) & (piece == 0))


@triton.jit
def load_state(states, index, half, j, vd, width, value_dim):
    """Half (0: softmax(y), 1: softmax(−y)) of Sᵀ, (value slice, f), of an entry."""
    offsets, exists = matrix(vd, j, value_dim, width)
    return tl.load(states + (index.to(tl.int64) * 2 + half) * width * value_dim + offsets, mask=exists, other=0.0)


@triton.jit
def load_sum(sums, index, half, j, width):
    """Half of z, (f,), of an entry."""
    return tl.load(sums + (index.to(tl.int64) * 2 + half) * width + j, mask=j < width, other=0.0)


@triton.jit
def load_total(
    totals, index, j, vd, width, value_dim, HAS_STARTS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Sᵀ (value slice, f) and z (f,), two halves each, of entry ``index``; or zeros."""
    if not HAS_STARTS:
        S, z = tl.zeros((BLOCK_V, BLOCK_F), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
        return S, S, z, z
    else:
        base = totals + index.to(tl.int64) * (2 * width * (value_dim + 1))
        offsets, exists = matrix(vd, j, value_dim, width)
        S_up = tl.load(base + offsets, mask=exists, other=0.0)
        S_down = tl.load(base + width * value_dim + offsets, mask=exists, other=0.0)
        z = base + 2 * width * value_dim
        z_up = tl.load(z + j, mask=j < width, other=0.0)
        z_down = tl.load(z + width + j, mask=j < width, other=0.0)
        return S_up, S_down, z_up, z_down


@triton.jit
def store_total(totals, index, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece):
    """The inverse of ``load_total``; z is written by the first value slice."""
    base = totals + index.to(tl.int64) * (2 * width * (value_dim + 1))
    offsets, exists = matrix(vd, j, value_dim, width)
    tl.store(base + offsets, S_up, mask=exists)
    tl.store(base + width * value_dim + offsets, S_down, mask=exists)
    z = base + 2 * width * value_dim
    tl.store(z + j, z_up, mask=(j < width) & (piece == 0))
    tl.store(z + width + j, z_down, mask=(j < width) & (piece == 0))


@triton.jit
def scan_kernel(totals, initial, ranges, size, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each segment's total by the sum of all segments before it (REVERSE: behind it) in its sequence.

    totals: (segments, maps, size); ranges: (sequences + 1,) first segment of each sequence; initial: (sequences, maps,
    size).
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(ranges + sequence), tl.load(ranges + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        total += tl.load(initial + (sequence * heads + head).to(tl.int64) * size + column, mask=column < size, other=0)
    for i in range(begin, end):
        segment = begin + end - 1 - i if REVERSE else i
        entry = totals + (segment * heads + head).to(tl.int64) * size + column
        added = tl.load(entry, mask=column < size, other=0.0)
        tl.store(entry, total, mask=column < size)
        total += added
