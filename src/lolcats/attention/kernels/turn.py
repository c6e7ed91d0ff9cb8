"""RoPE undone on chip: a tile of q or k as two halves, channels i and i + D/2 of each head, turned back or forward.

u before RoPE became x_a = c·u_a − s·u_b, x_b = c·u_b + s·u_a. The halves are tiles of their own, so no channel changes
its place in registers: u·W = u_a·W_a + u_b·W_b. The table (:class:`lolcats.attention.turning.Turning`) holds c and s
divided by c² + s². Device functions only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.device import load_matrix, load_tile, parts_of, store_tile


@triton.jit
def table_pointer(table, table_stride, batch, first, DIM: tl.constexpr):
    """Where the tokens of one sequence begin in a contiguous (batch or 1, token, DIM) table."""
    return table + batch.to(tl.int64) * table_stride + first.to(tl.int64) * DIM


@triton.jit
def turned_back(x, stride, table, at, length, row, p, DIM: tl.constexpr):
    """Both halves of a tile before RoPE, in the dtype of x; zeros outside. p: columns of a half."""
    x_a, x_b = load_halves(x, stride, at, length, row, p, DIM)
    c, s = load_halves(table, DIM, at, length, row, p, DIM)
    return turn(x_a, x_b, c, s).to(x_a.dtype), turn(x_b, x_a, c, -s).to(x_a.dtype)


@triton.jit
def add_turned(x, stride, table, at, length, row, p, d_a, d_b, DIM: tl.constexpr):
    """Add to a gradient that of both halves before RoPE, turned forward."""
    HALF: tl.constexpr = DIM // 2
    c, s = load_halves(table, DIM, at, length, row, p, DIM)
    x_a, x_b = load_halves(x, stride, at, length, row, p, DIM)
    store_tile(x, stride, at, length, row, p, HALF, x_a.to(tl.float32) + turn(d_a, d_b, c, -s))
    store_tile(x + HALF, stride, at, length, row, p, HALF, x_b.to(tl.float32) + turn(d_b, d_a, c, s))


@triton.jit
def turn(a, b, c, s):
    """c·a + s·b in fp32."""
    return c.to(tl.float32) * a.to(tl.float32) + s.to(tl.float32) * b.to(tl.float32)


@triton.jit
def load_halves(x, stride, at, length, row, p, DIM: tl.constexpr):
    HALF: tl.constexpr = DIM // 2
    return load_tile(x, stride, at, length, row, p, HALF), load_tile(x + HALF, stride, at, length, row, p, HALF)


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
