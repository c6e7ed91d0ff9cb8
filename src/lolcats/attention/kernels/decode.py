"""Decode kernel: one token of every row of a batch, and its state moved on in place, in one launch.

A program takes one row and one key/value head with the GROUP query heads that share it. It

1. moves the keys that leave the window into S and z: a chunk at once every SIZE tokens (terraced), one key a token
   (sliding, and the linear kind, which has no window);
2. attends to sinks and window by softmax, the arriving key in the place of the oldest;
3. adds the linear readout φ(q)ᵀ S, φ(q)ᵀ z;
4. writes the arriving key and value into ring and sinks. The last program of a row to get here counts its token.

Terraced, S is only read on most tokens and written when a chunk leaves. Programs of a key/value head run side by side,
so that its maps' weights stay in the caches; states and windows, read once, pass the first-level cache by.

Shapes: B rows, H query heads, G key/value heads, M key maps (H or G), D head dim, f half of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.blocks import (
    EPS,
    LOG2E,
    divides,
    hedgehog,
    load_weight,
    log2_scale,
    softmax_logits,
    window_start,
)
from lolcats.attention.kernels.function import precision
from lolcats.attention.kernels.layout import power_of_two
from lolcats.attention.spec import AttentionSpec

COUNT = tl.constexpr(0xFFFFFFFF)  # bits of ``seen`` that count tokens; above them a running launch counts its programs
ARRIVED = tl.constexpr(1 << 32)


@triton.jit
def decode_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, ring_k, ring_v, sink_k, sink_v, S, z, seen, weight_q, weight_k, gamma,
    scale, cap,
    GROUP: tl.constexpr, MAPS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr,
    LINEAR: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, SINKS: tl.constexpr,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_SINKS: tl.constexpr,
):  # fmt: skip
    """q: (B, H, D), k, v: (B, G, D) by their strides; o: (B, H, D) and the state's tensors, contiguous.

    MAPS: key maps of a key/value head, 1 or GROUP. SPAN: slots of the ring. ROUNDED: S is bf16.
    """
    row, kv, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    n = (tl.load(seen + row) & COUNT).to(tl.int32)
    unit = row.to(tl.int64) * kv_heads + kv
    ring_k, ring_v = ring_k + unit * (SPAN * DIM), ring_v + unit * (SPAN * DIM)
    sink_k, sink_v = sink_k + unit * (SINKS * DIM), sink_v + unit * (SINKS * DIM)
    S, z = S + unit * (MAPS * 2 * WIDTH * DIM), z + unit * (MAPS * 2 * WIDTH)
    o += unit * (GROUP * DIM)
    q += row.to(tl.int64) * q_strides[0] + kv * GROUP * q_strides[1]
    new_k = tl.load(k + row.to(tl.int64) * k_strides[0] + kv * k_strides[1] + d, mask=d < DIM, other=0.0)
    new_v = tl.load(v + row.to(tl.int64) * v_strides[0] + kv * v_strides[1] + d, mask=d < DIM, other=0.0)
    if LINEAR:
        if WINDOW == "terraced":
            if (n % SIZE == 0) & (n >= 2 * SIZE):
                fold_chunk(
                    ring_k, ring_v, S, z, weight_k, kv, n, d, j, MAPS, DIM, WIDTH, SIZE, SPAN, SINKS, ROUNDED, LOW,
                    PRECISION, BLOCK_K, BLOCK_V,
                )  # fmt: skip
                tl.debug_barrier()  # S and z are read again by other threads
    heads = tl.arange(0, BLOCK_H)
    peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    soft = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    if SOFTMAX:
        real = (heads < GROUP)[:, None] & (d < DIM)[None, :]
        q_tile = tl.load(q + heads[:, None] * q_strides[1] + d[None, :], mask=real, other=0.0)
        if SINKS > 0:
            sink = tl.arange(0, BLOCK_SINKS)
            peak, total, soft = attend(
                q_tile, sink_k, sink_v, new_k, new_v, sink, (sink < SINKS) & (sink < n), (sink < SINKS) & (sink == n),
                d, peak, total, soft, scale, cap, DIM, CAPPED, PRECISION,
            )  # fmt: skip
        start = tl.maximum(window_start(n, WINDOW, SIZE), SINKS)
        for at in range(0, SPAN, BLOCK_K):
            slot = at + tl.arange(0, BLOCK_K)
            position = n - (n % SPAN - slot + SPAN) % SPAN
            visible = (slot < SPAN) & (position >= start)
            peak, total, soft = attend(
                q_tile, ring_k, ring_v, new_k, new_v, slot, visible & (position < n), visible & (position == n), d,
                peak, total, soft, scale, cap, DIM, CAPPED, PRECISION,
            )  # fmt: skip
    numerator = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    denominator = tl.zeros((BLOCK_H,), tl.float32)
    if SOFTMAX:
        weight = tl.load(gamma + kv * GROUP + heads, mask=heads < GROUP, other=0.0)
        numerator, denominator = soft * weight[:, None], total * weight
    if LINEAR:
        leaves, old_k, old_v = leaving_key(ring_k, ring_v, new_k, new_v, n, d, DIM, WINDOW, SIZE, SPAN, SINKS)
        y = tl.zeros((BLOCK_H, BLOCK_F), tl.float32)
        for h in range(GROUP):
            x = tl.load(q + h * q_strides[1] + d, mask=d < DIM, other=0.0).to(tl.float32)
            projected = tl.sum(x[:, None] * load_weight(weight_q, kv * GROUP + h, d, j, DIM, WIDTH), 0)
            y = tl.where((heads == h)[:, None], projected[None, :], y)
        up, down = hedgehog(y, tl.full((BLOCK_H,), 1.0, tl.float32), j, WIDTH)
        for m in range(MAPS):
            readers = (heads // (GROUP // MAPS) == m) & (heads < GROUP)
            if WINDOW != "terraced":
                key_up, key_down = hedgehog_vector(
                    old_k, load_weight(weight_k, kv * MAPS + m, d, j, DIM, WIDTH), leaves, j, WIDTH
                )  # fmt: skip
            for half in tl.static_range(2):
                S_half, z_half = S + (2 * m + half) * (WIDTH * DIM), z + (2 * m + half) * WIDTH
                sums = load_state(S_half, j, d, WIDTH, DIM)
                total_z = tl.load(z_half + j, mask=j < WIDTH, other=0.0)
                if WINDOW != "terraced":
                    phi_k = key_up if half == 0 else key_down
                    index = ((kv * MAPS + m) * 2 + half) * (WIDTH * DIM)
                    sums = store_sum(
                        S_half, sums, phi_k[:, None] * old_v[None, :], index, n, leaves, j, d, WIDTH, DIM, ROUNDED
                    )  # fmt: skip
                    total_z += phi_k
                    tl.store(z_half + j, total_z, mask=j < WIDTH)
                phi_q = up if half == 0 else down
                denominator += tl.where(readers, tl.sum(phi_q * total_z[None, :], 1), 0.0)
                for reader in range(GROUP // MAPS):
                    here = heads == m * (GROUP // MAPS) + reader
                    row_phi = tl.sum(tl.where(here[:, None], phi_q, 0.0), 0)
                    added = tl.sum(row_phi[:, None] * sums, 0)
                    numerator += tl.where(here[:, None], added[None, :], 0.0)
    y = numerator / tl.where(denominator == 0, 1.0, denominator)[:, None]
    place, mask = o + heads[:, None] * DIM + d[None, :], (heads < GROUP)[:, None] & (d < DIM)[None, :]
    tl.store(place, y.to(o.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # every thread has read the slot that is overwritten now
    if SPAN > 0:
        tl.store(ring_k + n % SPAN * DIM + d, new_k, mask=d < DIM)
        tl.store(ring_v + n % SPAN * DIM + d, new_v, mask=d < DIM)
    if SINKS > 0:
        tl.store(sink_k + n * DIM + d, new_k, mask=(d < DIM) & (n < SINKS))
        tl.store(sink_v + n * DIM + d, new_v, mask=(d < DIM) & (n < SINKS))
    if tl.atomic_add(seen + row, ARRIVED) >> 32 == kv_heads - 1:
        tl.store(seen + row, (n + 1).to(tl.int64))


@triton.jit
def fold_chunk(
    ring_k, ring_v, S, z, weight_k, kv, n, d, j, MAPS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, SPAN: tl.constexpr, SINKS: tl.constexpr, ROUNDED: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Move the keys at positions n − 2 SIZE to n − SIZE, which lie side by side in the ring, into S and z.

    By slices of the value dim, so that what is rarely done does not take the registers of what is done always.
    """
    for m in range(MAPS):
        w = load_weight(weight_k, kv * MAPS + m, d, j, DIM, WIDTH).to(LOW)
        for half in tl.static_range(2):
            S_half, z_half = S + (2 * m + half) * (WIDTH * DIM), z + (2 * m + half) * WIDTH
            for piece in range(0, DIM, BLOCK_V):
                vd = piece + tl.arange(0, BLOCK_V)
                added = tl.zeros((j.shape[0], BLOCK_V), tl.float32)
                sums = tl.zeros((j.shape[0],), tl.float32)
                for at in range(0, SIZE, BLOCK_K):
                    key = at + tl.arange(0, BLOCK_K)
                    leaving = (key < SIZE) & (n - 2 * SIZE + key >= SINKS)
                    slot = (n % SPAN + key)[:, None] * DIM
                    keys = tl.load(ring_k + slot + d[None, :], mask=leaving[:, None] & (d < DIM)[None, :], other=0.0)
                    values = tl.load(
                        ring_v + slot + vd[None, :], mask=leaving[:, None] & (vd < DIM)[None, :], other=0.0
                    )
                    y = tl.dot(keys.to(LOW), w, input_precision=PRECISION)
                    up, down = hedgehog(y, leaving.to(tl.float32), j, WIDTH)
                    phi = (up if half == 0 else down).to(LOW)
                    added = tl.dot(tl.trans(phi), values.to(LOW), added, input_precision=PRECISION)
                    sums += tl.sum(phi.to(tl.float32), 0)
                before, index = load_state(S_half, j, vd, WIDTH, DIM), ((kv * MAPS + m) * 2 + half) * (WIDTH * DIM)
                store_sum(S_half, before, added, index, n, True, j, vd, WIDTH, DIM, ROUNDED)
                here = (j < WIDTH) & (piece == 0)
                tl.store(z_half + j, tl.load(z_half + j, mask=here, other=0.0) + sums, mask=here)


@triton.jit
def leaving_key(
    ring_k, ring_v, new_k, new_v, n, d, DIM: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr,
    SPAN: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Whether one key leaves for S now (sliding: the one in the slot of the arriving, linear: itself), and which."""
    if WINDOW == "sliding":
        leaves = n - SIZE >= SINKS
        place, mask = n % SPAN * DIM + d, (d < DIM) & leaves
        old_k, old_v = tl.load(ring_k + place, mask=mask, other=0.0), tl.load(ring_v + place, mask=mask, other=0.0)
        return leaves, old_k.to(tl.float32), old_v.to(tl.float32)
    else:
        return n >= 0, new_k.to(tl.float32), new_v.to(tl.float32)


@triton.jit
def load_state(S, j, d, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Half of a map's S (f, D) in fp32, past the first-level cache."""
    place = S + j[:, None] * DIM + d[None, :]
    if divides(j.shape[0], WIDTH) and divides(d.shape[0], DIM):
        return tl.load(place, cache_modifier=".cg").to(tl.float32)
    else:
        mask = (j < WIDTH)[:, None] & (d < DIM)[None, :]
        return tl.load(place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def store_sum(
    S, before, added, index, n, wanted, j, d, WIDTH: tl.constexpr, DIM: tl.constexpr, ROUNDED: tl.constexpr
):  # fmt: skip
    """Half of a map's S with ``added``; stored if ``wanted``, and returned as a later load gives it.

    index: where this half begins among those of all maps of the row.
    """
    after, place = before + added, j[:, None] * DIM + d[None, :]
    if ROUNDED:
        after = tl.where(wanted, stochastic(after, index + place, n), before)
    mask = (j < WIDTH)[:, None] & (d < DIM)[None, :] & wanted
    tl.store(S + place, after.to(S.dtype.element_ty), mask=mask)
    return after


@triton.jit
def stochastic(x, index, n):
    """``lolcats.attention.rounding.stochastic``: fp32 that bf16 holds exactly."""
    h = index.to(tl.uint32) * 0x9E3779B1 + n.to(tl.uint32) * 0x85EBCA77
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    h = (h ^ (h >> 12)) * 0x297A2D39
    h = h ^ (h >> 15)
    bits = x.to(tl.uint32, bitcast=True) + (h & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def hedgehog_vector(x, w, wanted, j, WIDTH: tl.constexpr):
    """Both halves of φ of one vector x (D,) fp32 by a map's weight (D, f), each (f,) fp32; 0 if not ``wanted``."""
    y = tl.sum(x[:, None] * w, 0)
    real = j < WIDTH
    up = tl.where(real, tl.exp2((y - tl.max(tl.where(real, y, -float("inf")), 0)) * LOG2E), 0.0)
    down = tl.where(real, tl.exp2((tl.min(tl.where(real, y, float("inf")), 0) - y) * LOG2E), 0.0)
    up, down = tl.maximum(up / tl.sum(up, 0), EPS), tl.maximum(down / tl.sum(down, 0), EPS)
    return tl.where(real & wanted, up, 0.0), tl.where(real & wanted, down, 0.0)


@triton.jit
def attend(
    q_tile, keys, values, new_k, new_v, slot, stored, arriving, d, peak, total, soft, scale, cap, DIM: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over some slots more: the keys ``stored`` there, and the new one where it is ``arriving``.

    Of each query: the highest logit in base 2, Σ exp(s − highest), and that sum with the values.
    """
    place, mask = slot[:, None] * DIM + d[None, :], stored[:, None] & (d < DIM)[None, :]
    k_tile = tl.load(keys + place, mask=mask, other=0.0, cache_modifier=".cg")
    v_tile = tl.load(values + place, mask=mask, other=0.0, cache_modifier=".cg")
    k_tile = tl.where(arriving[:, None], new_k[None, :], k_tile)
    v_tile = tl.where(arriving[:, None], new_v[None, :], v_tile)
    visible = (stored | arriving)[None, :]
    logits = softmax_logits(q_tile, k_tile, visible, scale, cap, CAPPED, PRECISION) * log2_scale(scale, CAPPED)
    highest = tl.maximum(peak, tl.max(logits, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # no key yet
    e, smaller = tl.exp2(logits - shift[:, None]), tl.exp2(peak - shift)
    soft = tl.dot(e.to(v_tile.dtype), v_tile, soft * smaller[:, None], input_precision=PRECISION)
    return highest, total * smaller + tl.sum(e, 1), soft


def decode(
    state: Any, q: Tensor, k: Tensor, v: Tensor, phi_q: Any, phi_k: Any, gamma: Tensor, spec: AttentionSpec,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Outputs (B, H, 1, D) for one new token a row, bf16 for bf16 inputs and else fp32; moves ``state`` on in place.

    Args:
        state: an ``AttentionState`` that is ``in_place``, contiguous.
        q: (B, H, 1, D); k, v: (B, G, 1, D).
        phi_q, phi_k: hedgehog maps with H and H or G heads, where the kind has a linear term.
        gamma: (H,) fp32.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, dim = q.shape
    kv_heads, linear = k.shape[1], spec.has_linear
    weights = [phi.weight.detach() for phi in (phi_q, phi_k)] if linear else [gamma, gamma]
    width = weights[0].shape[2] if linear else 16
    group, maps = heads // kv_heads, state.S.shape[1] // kv_heads
    o = q.new_empty(batch, heads, dim, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32)
    block_d, block_f = max(16, power_of_two(dim)), max(16, power_of_two(width))
    decode_kernel[(batch, kv_heads)](
        q, q.stride()[:2], k, k.stride()[:2], v, v.stride()[:2], o, state.ring_k, state.ring_v, state.sink_k,
        state.sink_v, state.S, state.z, state.seen, *weights, gamma, scale, float(softcap or 0),
        GROUP=group, MAPS=maps if linear else group, DIM=dim, WIDTH=width, SOFTMAX=spec.has_softmax, LINEAR=linear,
        WINDOW="none" if spec.kind == "linear" else spec.window, SIZE=spec.window_size, SPAN=spec.span,
        SINKS=spec.softmax_sinks, CAPPED=softcap is not None, ROUNDED=state.S.dtype == torch.bfloat16,
        LOW=tl.float32 if q.dtype == torch.float32 else tl.bfloat16, PRECISION=precision(),
        BLOCK_H=max(16, power_of_two(group)), BLOCK_D=block_d, BLOCK_F=block_f,
        BLOCK_K=max(16, min(32, power_of_two(spec.window_size))), BLOCK_V=min(block_d, 32), BLOCK_SINKS=16,
        num_warps=8 if block_d * block_f > 8192 else 4, num_stages=1,
    )  # fmt: skip
    return o[:, :, None]
