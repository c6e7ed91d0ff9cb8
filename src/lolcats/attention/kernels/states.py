"""States: Σ φ(x_n) u_nᵀ (S) and Σ φ(x_n) (z) over all tokens before (or after) each step of a sequence.

A step is SPAN tokens. In the forward pass x = k and u = v, and the state of a step holds all keys before it. In the
backward pass x = q and u = dO, and it holds what all queries after the step contribute to the gradients of S and z.
Long sequences are cut into segments that run in parallel: ``state_kernel`` first computes each segment's total
(STORE off), ``scan_kernel`` adds these up, and ``state_kernel`` then walks each segment from its correct start.

For gradients of the maps, features are centered (CENTER): φ − 1/f, since both halves sum to 1. Features of an untrained
map are nearly equal. Their common part cancels in the gradient of the map, but the rounding of φ and S to bf16 does
not. Nothing is lost with S' and z' of centered features, Σ u and Σ 1: S = S' + Σ u / f, z = z' + Σ 1 / f.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.device import (
    features,
    head_pointer,
    key_positions,
    load_matrix,
    load_parts,
    load_rows,
    load_tile,
    load_weight,
    row_offset,
    store_matrix,
    walk_bounds,
    window_start,
)
from lolcats.attention.kernels.turn import load_half_parts, table_pointer, turned_back


def pack(S: Tensor, z: Tensor, width: int, center: bool) -> Tensor:
    """Pack a state as the kernels hold it, (N, M, 2f · (D + 1)) fp32: both halves of Sᵀ, then z; if centered, then Σ u
    and Σ 1. ``width``: f."""
    halves, z = S.float().unflatten(2, (2, width)).mT, z.float()
    if not center:
        return torch.cat([halves.flatten(2), z], 2).contiguous()
    z = z.unflatten(2, (2, width))
    parts = halves - halves.mean(4, True), z - z.mean(3, True), halves[:, :, 0].sum(3), z[:, :, 0].sum(2, True)
    return torch.cat([x.flatten(2) for x in parts], 2).contiguous()


def unpack(totals: Tensor, width: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """S (N, M, 2f, D) and z (N, M, 2f) from packed states that are not centered."""
    S, z = totals.split([2 * width * value_dim, 2 * width], 2)
    return S.unflatten(2, (2, value_dim, width)).mT.flatten(2, 3), z.contiguous()


@triton.jit
def state_kernel(
    x, x_strides, u, u_strides, f, f_strides, weight, inverse, delta, table, table_stride, starts, totals, states,
    sums, segments, sequences, positions, heads, x_group, tokens,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr,
    SINKS: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr, STORE: tl.constexpr, HAS_STARTS: tl.constexpr,
    CENTER: tl.constexpr, HAS_TOTALS: tl.constexpr, PHI: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One segment, map and slice of the value dim.

    starts, totals: (segments, maps, 2 · WIDTH · (VALUE_DIM + 1)) fp32, the state before and after the segment.
    states: (entries, maps, 2, VALUE_DIM, WIDTH) and sums: (entries, maps, 2 · WIDTH) fp32: S and z of each step.
    CENTER: VALUE_DIM + 1 more numbers in each, Σ u and Σ 1, with rows weighted as in S.
    x_group: maps that share a head of x and u. HEADS: heads of x, u, f and ``weight`` that contribute to one map's
    states.
    BACKWARD: rows enter S weighted by ``inverse`` (1 / denominator), and z by that times ``delta``.
    table: only if PHI is ``turned``.

    z is also a product with φ, which avoids a sum across warps. Row 0 of the left factor holds the weights of the rows,
    row 1 the remainder that its precision loses.
    """
    segment, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, begin, end, batch, first, length, entry, position = walk_bounds(segments, sequences, positions, segment)
    x = head_pointer(x, x_strides, batch, head * HEADS // x_group, first)
    u = head_pointer(u, u_strides, batch, head * HEADS // x_group, first)
    f = head_pointer(f, f_strides, batch, head * HEADS, first)
    inverse += row_offset(batch, head * HEADS, first, heads, tokens)
    delta += row_offset(batch, head * HEADS, first, heads, tokens)
    row, d, j, two = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F), tl.arange(0, 16)[:, None]
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    last = window_start(position + length - 1, WINDOW, SIZE)  # keys from here on are still in a window at the end
    if PHI == "seen":
        w = load_parts(weight, head * HEADS, d, j, DIM, WIDTH, x.dtype.element_ty)
    elif PHI == "turned":
        p = tl.arange(0, BLOCK_P)
        table = table_pointer(table, table_stride, batch, first, DIM)
        w = load_half_parts(weight, head * HEADS, p, j, DIM, WIDTH, x.dtype.element_ty)
    else:
        w = load_weight(weight, head * HEADS, d, j, DIM, WIDTH) if PHI == "inside" else 0
    index = segment * tl.num_programs(1) + head
    S_up, z_up = load_total(starts, index, 0, j, vd, two, WIDTH, VALUE_DIM, HAS_STARTS, CENTER)
    S_down, z_down = load_total(starts, index, 1, j, vd, two, WIDTH, VALUE_DIM, HAS_STARTS, CENTER)
    rows_u, rows = load_rest(starts, index, vd, WIDTH, VALUE_DIM, HAS_STARTS and CENTER)
    real = (j < WIDTH)[None, :]
    PER_STEP: tl.constexpr = SPAN // C
    for i in range(begin * PER_STEP * HEADS, end * PER_STEP * HEADS):  # the heads of a tile, then the next tile
        tile = (begin + end) * PER_STEP - 1 - i // HEADS if BACKWARD else i // HEADS
        if STORE:
            if i % (PER_STEP * HEADS) == 0:
                entries = (entry + tile // PER_STEP) * tl.num_programs(1) + head
                store_state(states, sums, entries, 0, S_up, z_up, j, vd, piece, WIDTH, VALUE_DIM, CENTER)
                store_state(states, sums, entries, 1, S_down, z_down, j, vd, piece, WIDTH, VALUE_DIM, CENTER)
                if CENTER:
                    rest = sums + entries.to(tl.int64) * (2 * WIDTH + VALUE_DIM + 1) + 2 * WIDTH
                    store_rest(rest, rows_u, rows, vd, piece, VALUE_DIM)
        at = tile * C
        t = at + row
        h = tl.cast(i % HEADS, tl.int64)
        if PHI == "turned":
            x_tile = turned_back(x + h * x_strides[1], x_strides[2], table, at, length, row, p, DIM)
        else:
            x_tile = load_tile(x + h * x_strides[1], x_strides[2], at, length, row, d, DIM)
        u_tile = tl.trans(load_tile(u + h * u_strides[1], u_strides[2], at, length, row, vd, VALUE_DIM).to(LOW))
        if PHI == "inside" and HEADS > 1:
            w = load_weight(weight, head * HEADS + i % HEADS, d, j, DIM, WIDTH)
        if BACKWARD:
            row_S, row_z = load_rows(inverse + h * tokens, t, length), load_rows(delta + h * tokens, t, length)
        else:
            key = key_positions(t, length, position, SINKS)
            row_S = ((key >= 0) & (key < last)).to(tl.float32)
            row_z = row_S
        up, down = features(
            x_tile, w, f + h * f_strides[1], f_strides[2], at, length, row, row_S, j, WIDTH, PHI, PRECISION
        )
        if CENTER:
            up, down = center(up, row_S, real, WIDTH), center(down, row_S, real, WIDTH)
            rows_u += tl.sum(u_tile.to(tl.float32) * row_S[None, :], 1)
            rows += tl.sum(row_S, 0)
        up, down = up.to(LOW), down.to(LOW)
        S_up = tl.dot(u_tile, up, S_up, input_precision=PRECISION)
        S_down = tl.dot(u_tile, down, S_down, input_precision=PRECISION)
        high = row_z.to(LOW).to(tl.float32)
        weights = tl.where(two == 0, high[None, :], tl.where(two == 1, (row_z - high)[None, :], 0.0)).to(LOW)
        z_up = tl.dot(weights, up, z_up, input_precision=PRECISION)
        z_down = tl.dot(weights, down, z_down, input_precision=PRECISION)
    if HAS_TOTALS:
        store_total(totals, index, 0, S_up, z_up, j, vd, piece, WIDTH, VALUE_DIM, CENTER)
        store_total(totals, index, 1, S_down, z_down, j, vd, piece, WIDTH, VALUE_DIM, CENTER)
        if CENTER:
            rest = totals + index.to(tl.int64) * total_size(WIDTH, VALUE_DIM, True) + 2 * WIDTH * (VALUE_DIM + 1)
            store_rest(rest, rows_u, rows, vd, piece, VALUE_DIM)


@triton.constexpr_function
def total_size(width, value_dim, center):
    """Number of values in a state that is passed between segments."""
    return 2 * width * (value_dim + 1) + (value_dim + 1 if center else 0)


@triton.jit
def center(features, weight, real, WIDTH: tl.constexpr):
    """Features, already times the row's ``weight``, minus their mean over the WIDTH real columns."""
    return tl.where(real, features - weight[:, None] * (1.0 / WIDTH), 0.0)


@triton.jit
def store_state(
    states, sums, index, half, S, z, j, vd, piece, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    """Half (0: softmax(y), 1: softmax(−y)) of an entry: Sᵀ (value slice, f), and z by the first slice."""
    index = index.to(tl.int64)
    store_matrix(states + (index * 2 + half) * WIDTH * VALUE_DIM, vd, j, VALUE_DIM, WIDTH, S)
    sums += index * (2 * WIDTH + VALUE_DIM + 1 if CENTER else 2 * WIDTH) + half * WIDTH
    tl.store(sums + j, tl.sum(z, 0), mask=(j < WIDTH) & (piece == 0))


@triton.jit
def store_rest(base, rows_u, rows, vd, piece, VALUE_DIM: tl.constexpr):
    """Σ u (a slice of the value dim) and, by the first slice, Σ 1."""
    tl.store(base + vd, rows_u, mask=vd < VALUE_DIM)
    tl.store(base + VALUE_DIM, rows, mask=piece == 0)


@triton.jit
def load_rest(totals, index, vd, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, PRESENT: tl.constexpr):
    """What ``store_rest`` wrote for entry ``index`` of totals; zeros if not PRESENT."""
    if not PRESENT:
        return tl.zeros((vd.shape[0],), tl.float32), 0.0
    else:
        base = totals + index.to(tl.int64) * total_size(WIDTH, VALUE_DIM, True) + 2 * WIDTH * (VALUE_DIM + 1)
        return tl.load(base + vd, mask=vd < VALUE_DIM, other=0.0), tl.load(base + VALUE_DIM)


@triton.jit
def load_state(states, index, half, j, vd, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Half of Sᵀ, (value slice, f), of an entry."""
    base = states + (index.to(tl.int64) * 2 + half) * WIDTH * VALUE_DIM
    return load_matrix(base, vd, j, VALUE_DIM, WIDTH)


@triton.jit
def load_sum(sums, index, half, j, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Half of z, (f,), of an entry, which ends with REST other numbers."""
    return tl.load(sums + index.to(tl.int64) * (2 * WIDTH + REST) + half * WIDTH + j, mask=j < WIDTH, other=0.0)


@triton.jit
def load_total(
    totals, index, half, j, vd, two, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_STARTS: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """Half of Sᵀ (value slice, f) and z (in row 0 of 16) of entry ``index``; zeros without HAS_STARTS."""
    if not HAS_STARTS:
        return (
            tl.zeros((vd.shape[0], j.shape[0]), tl.float32),
            tl.zeros((two.shape[0], j.shape[0]), tl.float32),
        )
    else:
        base = totals + index.to(tl.int64) * total_size(WIDTH, VALUE_DIM, CENTER)
        z = base + 2 * WIDTH * VALUE_DIM + half * WIDTH + j[None, :]
        z = tl.load(z + two * 0, mask=(two == 0) & (j < WIDTH)[None, :], other=0.0)
        return load_matrix(base + half * WIDTH * VALUE_DIM, vd, j, VALUE_DIM, WIDTH), z


@triton.jit
def store_total(
    totals, index, half, S, z, j, vd, piece, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    """The inverse of ``load_total``; z is written by the first value slice."""
    base = totals + index.to(tl.int64) * total_size(WIDTH, VALUE_DIM, CENTER)
    store_matrix(base + half * WIDTH * VALUE_DIM, vd, j, VALUE_DIM, WIDTH, S)
    tl.store(base + 2 * WIDTH * VALUE_DIM + half * WIDTH + j, tl.sum(z, 0), mask=(j < WIDTH) & (piece == 0))


@triton.jit
def scan_kernel(totals, initial, ranges, size, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each segment's total by the sum of all segments before it (REVERSE: after it) in its sequence.

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
