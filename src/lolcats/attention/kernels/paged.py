"""Softmax attention of one new token a row to keys that lie in blocks, for kept heads while the engine decodes.

A program takes one row, one key/value head with the GROUP query heads that share it, and one of several parts of the
row's blocks, so that few long rows keep a GPU busy as well. The parts are joined by a second kernel. The part with the
last block attends to the new key, too, and writes it into its place. Numbers of tokens are read on the device, so one
launch, and one CUDA graph, serves rows of any length. The layer's other heads may be computed elsewhere, as in
:mod:`.decode`.

Shapes: B rows, H query heads, G key/value heads, D head dim, W blocks of the longest row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.decode import attend, capped, head_place
from lolcats.attention.kernels.device import log2_scale
from lolcats.attention.kernels.launcher import multiprocessors, precision
from lolcats.attention.kernels.layout import power_of_two
from lolcats.attention.state import KeyValues
from lolcats.attention.subset import HeadSubset

LOWEST = tl.constexpr(-1e30)  # of a part without keys; −inf − −inf would be NaN
PROGRAMS = 8  # for each multiprocessor: two rounds of the four that run at once, so that other kernels can run beside
MOST_PARTS = 64
JOINED = 32  # channels that a program joins


@triton.jit
def paged_kernel(
    q, q_strides, k, k_strides, v, v_strides, places, keys, values, tables, width, positions, peaks, totals, sums,
    scale, cap, window, PLACED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q: (B, H, D) and k, v: (B, G, D), with strides; keys, values: (all tokens of blocks, G, D); tables: (B, W) int32;
    positions: (B,) of the new tokens; peaks, totals: (B, H, parts), sums: (B, H, parts, D), fp32. window: 0 for all
    keys. PLACED: q, k and v have more heads; head g of the others is their head ``places[g]``."""
    row, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    n = tl.load(positions + row).to(tl.int32)
    start = tl.where(window > 0, tl.maximum(n - window + 1, 0), 0)
    first, blocks = start // SIZE, n // SIZE + 1
    begin, end = first + part * (blocks - first) // parts, first + (part + 1) * (blocks - first) // parts
    head = head_place(places, kv, kv >= 0, PLACED)
    heads, d, token = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, SIZE)
    real = (heads < GROUP)[:, None] & (d < DIM)[None, :]
    q += row.to(tl.int64) * q_strides[0] + head * GROUP * q_strides[1]
    q_tile = tl.load(q + heads[:, None] * q_strides[1] + d[None, :], mask=real, other=0.0)
    peak, total = tl.full((BLOCK_H,), LOWEST, tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    soft = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for block in range(begin, end):
        number = tl.load(tables + row * width + block).to(tl.int64)
        at = block * SIZE + token
        peak, total, soft = attend(
            q_tile, keys, values, (number * SIZE + token) * kv_heads + kv, (at >= start) & (at < n), d, peak, total,
            soft, scale, cap, DIM, DIM, CAPPED, PRECISION,
        )  # fmt: skip
    last = (begin < end) & (end == blocks)
    new_k = tl.load(k + row.to(tl.int64) * k_strides[0] + head * k_strides[1] + d, mask=d < DIM, other=0.0)
    new_v = tl.load(v + row.to(tl.int64) * v_strides[0] + head * v_strides[1] + d, mask=d < DIM, other=0.0)
    logits = tl.sum(q_tile.to(tl.float32) * new_k.to(tl.float32)[None, :], 1)
    logits = tl.where(last, capped(logits, scale, cap, CAPPED) * log2_scale(scale, CAPPED), -float("inf"))
    highest = tl.maximum(peak, logits)
    e, smaller = tl.exp2(logits - highest), tl.exp2(peak - highest)
    total = total * smaller + e
    soft = soft * smaller[:, None] + e[:, None] * new_v.to(tl.float32)[None, :]
    number = tl.load(tables + row * width + n // SIZE).to(tl.int64)
    place = ((number * SIZE + n % SIZE) * kv_heads + kv) * DIM + d
    tl.store(keys + place, new_k.to(keys.dtype.element_ty), mask=(d < DIM) & last)
    tl.store(values + place, new_v.to(values.dtype.element_ty), mask=(d < DIM) & last)
    unit = ((row * kv_heads + kv) * GROUP + heads) * parts + part
    tl.store(peaks + unit, highest, mask=heads < GROUP)
    tl.store(totals + unit, total, mask=heads < GROUP)
    tl.store(sums + unit[:, None] * DIM + d[None, :], soft, mask=real)


@triton.jit
def join_kernel(
    peaks, totals, sums, o, o_stride, places, parts, PLACED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Outputs (B, H, D) from the parts of :func:`paged_kernel`; a program joins some channels of a row's query head."""
    row, h, part = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_P)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    unit, kv = row * tl.num_programs(1) + h, h // GROUP
    peak = tl.load(peaks + unit * parts + part, mask=part < parts, other=-float("inf"))
    total = tl.load(totals + unit * parts + part, mask=part < parts, other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    place = (unit * parts + part)[:, None] * DIM + d[None, :]
    soft = tl.load(sums + place, mask=(part < parts)[:, None] & (d < DIM)[None, :], other=0.0)
    y = tl.sum(soft * weight[:, None], 0) / tl.sum(total * weight, 0)
    o += row.to(tl.int64) * o_stride + (head_place(places, kv, kv >= 0, PLACED) * GROUP + h % GROUP) * DIM
    tl.store(o + d, y.to(o.dtype.element_ty), mask=d < DIM)


def paged_decode(
    q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, tables: Tensor, positions: Tensor, size: int, scale: float,
    softcap: float | None = None, window: int = 0, subset: HeadSubset | None = None, parts: int = 0,
) -> Tensor:  # fmt: skip
    """See :func:`lolcats.attention.paged.paged_attention`. ``parts``: 0 for what suits the GPU."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows, dim, kv_heads, group = len(q), q.shape[3], memory.k.shape[1], q.shape[1] // k.shape[1]
    heads, placed = kv_heads * group, subset is not None
    parts = parts or choose_parts(rows * kv_heads, tables.shape[1], q.device)
    peaks, totals = (q.new_empty(rows, heads, parts, dtype=torch.float32) for _ in range(2))
    sums = q.new_empty(rows, heads, parts, dim, dtype=torch.float32)
    o = q.new_empty(rows, heads, dim) if subset is None else subset.out
    places, block_d = o if subset is None else subset.heads, max(16, power_of_two(dim))
    paged_kernel[rows, kv_heads, parts](
        q, q.stride()[:2], k, k.stride()[:2], v, v.stride()[:2], places, *memory, tables, tables.stride(0), positions,
        peaks, totals, sums, scale, softcap or 0.0, window, PLACED=placed, GROUP=group, DIM=dim, SIZE=size,
        CAPPED=softcap is not None, PRECISION=precision(), BLOCK_H=max(16, power_of_two(group)), BLOCK_D=block_d,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    join_kernel[rows, heads, -(-dim // JOINED)](
        peaks, totals, sums, o, o.stride(0), places, parts, PLACED=placed, GROUP=group, DIM=dim,
        BLOCK_P=power_of_two(parts), BLOCK_D=JOINED, num_warps=4,
    )  # fmt: skip
    return o[:, :, None]


def choose_parts(units: int, blocks: int, device: torch.device) -> int:
    """Parts of each row, so that there are as many programs as a GPU runs in whole rounds; no more than blocks."""
    return max(1, min(MOST_PARTS, PROGRAMS * multiprocessors(device) // units, blocks))
