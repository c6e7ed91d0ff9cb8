"""RoPE undone on chip: a tile of q or k as two halves, channels i and i + D/2 of each head, turned back or forward.

u before RoPE became x_a = c_a·u_a − s_a·u_b, x_b = c_b·u_b + s_b·u_a, as in :mod:`.unrotate`. The halves are tiles of
their own, so no channel changes its place in registers: u·W = u_a·W_a + u_b·W_b. Device functions only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.device import load_matrix, load_tile, parts_of, store_tile


@triton.jit
def table_pointers(cos, sin, table_stride, batch, first, DIM: tl.constexpr):
    """Where the tokens of one sequence begin in cos and sin, contiguous (batch or 1, token, DIM) tensors."""
    offset = batch.to(tl.int64) * table_stride + first.to(tl.int64) * DIM
    return cos + offset, sin + offset


@triton.jit
def turned_back(x, stride, cos, sin, at, length, row, p, DIM: tl.constexpr):
    """Both halves of a tile before RoPE, in the dtype of x. p: columns of a half."""
    HALF: tl.constexpr = DIM // 2
    x_a, x_b = load_halves(x, stride, at, length, row, p, DIM)
    a, b = x_a.to(tl.float32), x_b.to(tl.float32)
    c, s = rotation(cos, sin, at, length, row, p, DIM)
    u_a = c * a + s * b
    c, s = rotation(cos + HALF, sin + HALF, at, length, row, p, DIM)
    return u_a.to(x_a.dtype), (c * b - s * a).to(x_a.dtype)


@triton.jit
def add_turned(x, stride, cos, sin, at, length, row, p, d_a, d_b, DIM: tl.constexpr):
    """Add to a gradient that of both halves before RoPE, turned forward."""
    HALF: tl.constexpr = DIM // 2
    c_a, s_a = rotation(cos, sin, at, length, row, p, DIM)
    c_b, s_b = rotation(cos + HALF, sin + HALF, at, length, row, p, DIM)
    x_a, x_b = load_halves(x, stride, at, length, row, p, DIM)
    store_tile(x, stride, at, length, row, p, HALF, x_a.to(tl.float32) + c_a * d_a - s_b * d_b)
    store_tile(x + HALF, stride, at, length, row, p, HALF, x_b.to(tl.float32) + c_b * d_b + s_a * d_a)


@triton.jit
def load_halves(x, stride, at, length, row, p, DIM: tl.constexpr):
    HALF: tl.constexpr = DIM // 2
    return load_tile(x, stride, at, length, row, p, HALF), load_tile(x + HALF, stride, at, length, row, p, HALF)


@triton.jit
def rotation(cos, sin, at, length, row, p, DIM: tl.constexpr):
    """c / (c² + s²) and s / (c² + s²) of one half; zeros outside."""
    c = load_tile(cos, DIM, at, length, row, p, DIM // 2).to(tl.float32)
    s = load_tile(sin, DIM, at, length, row, p, DIM // 2).to(tl.float32)
    size = c * c + s * s
    scale = 1 / tl.where(size == 0, 1.0, size)
    return c * scale, s * scale


@triton.jit
def load_half_parts(weight, head, p, j, DIM: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """One head's W (D, f) as ``load_parts`` of both halves of its rows."""
    HALF: tl.constexpr = DIM // 2
    weight += head.to(tl.int64) * DIM * WIDTH
    w_a = load_matrix(weight, p, j, HALF, WIDTH)
    w_b = load_matrix(weight + HALF * WIDTH, p, j, HALF, WIDTH)
    return parts_of(w_a, DTYPE), parts_of(w_b, DTYPE)


@triton.jit
def store_half(base, j, p, DIM: tl.constexpr, WIDTH: tl.constexpr, x):
    """Columns of one half of a contiguous (WIDTH, DIM) matrix, which begins at ``base``."""
    mask = (j < WIDTH)[:, None] & (p < DIM // 2)[None, :]
    tl.store(base + j[:, None] * DIM + p[None, :], x, mask=mask)
