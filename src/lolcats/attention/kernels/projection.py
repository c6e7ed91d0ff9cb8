"""x·W for kernels that cannot hold W, and its gradient with respect to x.

For bf16 and fp16 x, W is split into its rounding to x's dtype and the remainder, and x is multiplied by both. This
keeps at least 16 bits of W, as trained maps need: |x·W| is 10 and more, and φ is an exponential of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.device import head_pointer, load_matrix, load_tile, store_tile
from lolcats.attention.kernels.turn import add_turned, table_pointer, turned_back

if TYPE_CHECKING:
    from lolcats.attention.kernels.launcher import Launcher

CHUNK = tl.constexpr(64)  # channels of the head dim whose weights are in registers


NO_ROTATION: tuple[Any, ...] = (None, None)


def project(
    launcher: Launcher, name: str, x: Tensor, weight: Tensor, rotation: tuple[Any, ...] = NO_ROTATION
) -> Tensor:  # fmt: skip
    """x·W (B, M, T, f) fp32 for x (B, G, T, D), called ``name``, and W (M, D, f) fp32; M is a multiple of G.

    rotation: ``Call.rotation``, by which x is turned back if there is one.
    """
    batch, heads, tokens, _ = x.shape
    maps, _, width = weight.shape
    y = x.new_empty(batch, tokens, maps, width, dtype=torch.float32).transpose(1, 2)
    args = *launcher.strided(name, x), weight, *launcher.strided(f"{name}·W", y), maps // heads, tokens
    grid = triton.cdiv(tokens, launcher.tiling.tile), maps, batch
    launcher.run(projection_kernel, "projection", grid, (*args, *rotation), name, TURN=rotation[0] is not None)
    return y


def project_back(launcher: Launcher, name: str, dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, in its dtype, from that of x·W."""
    batch, heads, tokens, dim = x.shape
    dx = x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    args = *launcher.strided(f"sum of d{name}·W", dy), weight, *launcher.strided(f"d{name}", dx), tokens
    grid = triton.cdiv(tokens, launcher.tiling.tile), heads, batch
    launcher.run(
        back_kernel, "projection", grid, (*args, *NO_ROTATION), name, GROUP=weight.shape[0] // heads, TURN=False
    )
    return dx


def add_project_back(
    launcher: Launcher, name: str, dy: Tensor, weight: Tensor, dx: Tensor, rotation: tuple[Any, ...]
) -> None:  # fmt: skip
    """Add to ``dx``, the gradient of x (B, G, T, D), that of u·W, where u is x turned back by ``rotation``."""
    batch, heads, tokens, _ = dx.shape
    args = *launcher.strided(f"sum of d{name}·W", dy), weight, *launcher.strided(f"sum of d{name}", dx), tokens
    grid = triton.cdiv(tokens, launcher.tiling.tile), heads, batch
    launcher.run(
        back_kernel, "projection", grid, (*args, *rotation), name, GROUP=weight.shape[0] // heads, TURN=True
    )  # fmt: skip


@triton.jit
def projection_kernel(
    x, x_strides, weight, y, y_strides, group, tokens, table, table_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BLOCK_F: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One tile of one map's tokens. TURN: of x turned back by ``table``."""
    at, head, batch = tl.program_id(0) * C, tl.program_id(1), tl.program_id(2)
    x = head_pointer(x, x_strides, batch, head // group, batch * 0)
    y = head_pointer(y, y_strides, batch, head, batch * 0)
    weight += head.to(tl.int64) * DIM * WIDTH
    row, j = tl.arange(0, C), tl.arange(0, BLOCK_F)
    total = tl.zeros((C, BLOCK_F), tl.float32)
    if TURN:
        HALF: tl.constexpr = DIM // 2
        table = table_pointer(table, table_stride, batch, batch * 0, DIM)
        for chunk in tl.static_range(0, HALF, CHUNK):
            p = chunk + tl.arange(0, CHUNK)
            u_a, u_b = turned_back(x, x_strides[2], table, at, tokens, row, p, DIM)
            total = add_product(u_a, load_matrix(weight, p, j, HALF, WIDTH), total, LOW, PRECISION)
            total = add_product(u_b, load_matrix(weight + HALF * WIDTH, p, j, HALF, WIDTH), total, LOW, PRECISION)
    else:
        for chunk in tl.static_range(0, DIM, CHUNK):
            d = chunk + tl.arange(0, CHUNK)
            x_tile = load_tile(x, x_strides[2], at, tokens, row, d, DIM)
            total = add_product(x_tile, load_matrix(weight, d, j, DIM, WIDTH), total, LOW, PRECISION)
    store_tile(y, y_strides[2], at, tokens, row, j, WIDTH, total)


@triton.jit
def back_kernel(
    dy, dy_strides, weight, dx, dx_strides, tokens, table, table_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BLOCK_F: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One tile of one head's tokens, from the GROUP maps that see them. TURN: they see x turned back by ``table``,
    and dx has a gradient already, to which theirs is added."""
    at, head, batch = tl.program_id(0) * C, tl.program_id(1), tl.program_id(2)
    dy = head_pointer(dy, dy_strides, batch, head * GROUP, batch * 0)
    dx = head_pointer(dx, dx_strides, batch, head, batch * 0)
    weight += head.to(tl.int64) * GROUP * DIM * WIDTH
    row, j = tl.arange(0, C), tl.arange(0, BLOCK_F)
    if TURN:
        HALF: tl.constexpr = DIM // 2
        table = table_pointer(table, table_stride, batch, batch * 0, DIM)
        for chunk in tl.static_range(0, HALF, CHUNK):
            p = chunk + tl.arange(0, CHUNK)
            d_a, d_b = tl.zeros((C, CHUNK), tl.float32), tl.zeros((C, CHUNK), tl.float32)
            for m in range(GROUP):
                dy_tile = load_tile(dy + tl.cast(m, tl.int64) * dy_strides[1], dy_strides[2], at, tokens, row, j, WIDTH)
                w = weight + m * DIM * WIDTH
                d_a = add_product(dy_tile, tl.trans(load_matrix(w, p, j, HALF, WIDTH)), d_a, LOW, PRECISION)
                w += HALF * WIDTH
                d_b = add_product(dy_tile, tl.trans(load_matrix(w, p, j, HALF, WIDTH)), d_b, LOW, PRECISION)
            add_turned(dx, dx_strides[2], table, at, tokens, row, p, d_a, d_b, DIM)
    else:
        for chunk in tl.static_range(0, DIM, CHUNK):
            d = chunk + tl.arange(0, CHUNK)
            total = tl.zeros((C, CHUNK), tl.float32)
            for m in range(GROUP):
                dy_tile = load_tile(dy + tl.cast(m, tl.int64) * dy_strides[1], dy_strides[2], at, tokens, row, j, WIDTH)
                w = load_matrix(weight + m * DIM * WIDTH, d, j, DIM, WIDTH)
                total = add_product(dy_tile, tl.trans(w), total, LOW, PRECISION)
            store_tile(dx, dx_strides[2], at, tokens, row, d, DIM, total)


@triton.jit
def add_product(x, w, total, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """total + x·w in fp32, for fp32 ``w``. x is rounded to LOW, unless it is fp16, which would lose bits in bf16."""
    if tl.float32 == LOW:
        return tl.dot(x, w, total, input_precision=PRECISION)
    else:
        if x.dtype == tl.float32:
            x = x.to(LOW)
        high = w.to(x.dtype)
        low = (w - high.to(tl.float32)).to(x.dtype)
        return tl.dot(x, high, tl.dot(x, low, total))
