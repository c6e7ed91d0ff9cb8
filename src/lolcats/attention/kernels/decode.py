"""Decode kernel: one token for every row of a batch in one launch, updating the states in place.

A program takes one row and one key/value head with the query heads that share it. If rows and heads are too few to
keep a GPU busy and every query head has a key map of its own, several programs (SPLITS) share these query heads. It

1. moves the keys that leave the window into S and z: a whole chunk every SIZE tokens (terraced), or one key per token
   (sliding, and the linear kind, which has no window);
2. attends to sinks and window by softmax, with the new key in place of the oldest;
3. adds the linear readout φ(q)ᵀ S, φ(q)ᵀ z;
4. writes the new key and value into ring and sinks. The last program of a row to get here counts the token. Where
   several programs read a window, it also is the one that writes, once all have read what is overwritten.

With terraced windows, most tokens only read S; it is written when a chunk leaves. Programs of a key/value head run side
by side, so that its maps' weights stay in the caches; states and windows are read once and bypass the first-level
cache.

The layer's other key/value heads may be computed elsewhere: q, k, v and the outputs are then those of the whole layer,
and a table says which of its heads the state is of.

Shapes: B rows, H query heads, G key/value heads, M key maps (H or G), D head dim, f half of the features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.device import (
    EPS,
    LOG2E,
    divides,
    hedgehog,
    load_weight,
    log2_scale,
    softmax_logits,
    window_start,
)
from lolcats.attention.kernels.launcher import multiprocessors, precision
from lolcats.attention.kernels.layout import power_of_two
from lolcats.attention.mixer import Mixer
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import SlotState
from lolcats.attention.subset import HeadSubset

COUNT = tl.constexpr(0xFFFFFFFF)  # bits of ``seen`` that count tokens; those above count programs of a running launch
ARRIVED = tl.constexpr(1 << 32)
RESIDENT = 4  # programs that a multiprocessor runs at once


@triton.jit
def decode_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, o_stride, places, ring_k, ring_v, sink_k, sink_v, S, z, strides, slots,
    seen, weight_q, weight_k, gamma, scale, cap,
    SLOTTED: tl.constexpr, SPLITS: tl.constexpr, PLACED: tl.constexpr, BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr, MAPS: tl.constexpr, DIM: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr,
    SOFTMAX: tl.constexpr, LINEAR: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr,
    SINKS: tl.constexpr, CAPPED: tl.constexpr, ROUNDED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_SINKS: tl.constexpr,
):  # fmt: skip
    """q: (B, H, D) and k, v: (B, G, D), with strides; o: (B, H, D); the state's tensors, with strides between rows.

    SLOTTED: row b's state is row ``slots[b]`` of the tensors, where a sequence that begins (0 tokens) may find
    anything, and ``seen`` stays as it is. A row with −1 tokens is padding: only its output is written, as 0.
    PLACED: q, k, v and o have more heads than the state, and its head g is their head ``places[g]``. GROUP, MAPS: query
    heads of a program, and their key maps (1 or GROUP). KEY_DIM: channels of queries and keys; softmax sees the first
    D, feature maps the last D. SPAN: slots of the ring. ROUNDED: S is bf16.
    """
    row, own, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kv, kv_heads = own // SPLITS, programs // SPLITS
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    n = (tl.load(seen + row) & COUNT).to(tl.int32)
    head = head_place(places, kv, kv >= 0, PLACED)
    first = head * (GROUP * SPLITS) + own % SPLITS * GROUP
    slot = tl.load(slots + row).to(tl.int64) if SLOTTED else row.to(tl.int64)
    ring_k, ring_v = ring_k + slot * strides[0] + kv * (SPAN * KEY_DIM), ring_v + slot * strides[1] + kv * (SPAN * DIM)
    sink_k += slot * strides[2] + kv * (SINKS * KEY_DIM)
    sink_v += slot * strides[3] + kv * (SINKS * DIM)
    sums_of = own * (MAPS * 2 * WIDTH)
    S, z = S + slot * strides[4] + sums_of * DIM, z + slot * strides[5] + sums_of
    o += row.to(tl.int64) * o_stride + first * DIM
    q += row.to(tl.int64) * q_strides[0] + first * q_strides[1]
    k_row, v_row = k + row.to(tl.int64) * k_strides[0], v + row.to(tl.int64) * v_strides[0]
    k, v = k_row + head * k_strides[1], v_row + head * v_strides[1]
    heads = tl.arange(0, BLOCK_H)
    place, real = heads[:, None] * DIM + d[None, :], (heads < GROUP)[:, None] & (d < DIM)[None, :]
    if SLOTTED:
        if n < 0:
            tl.store(o + place, tl.zeros((BLOCK_H, BLOCK_D), o.dtype.element_ty), mask=real)
            return
        if (n == 0) & LINEAR:
            clear_sums(S, z, d, j, MAPS, DIM, WIDTH)
            tl.debug_barrier()
    new_k = tl.load(k + d, mask=d < DIM, other=0.0)
    new_v = tl.load(v + d, mask=d < DIM, other=0.0)
    if LINEAR:
        if WINDOW == "terraced":
            if (n % SIZE == 0) & (n >= 2 * SIZE):
                fold_chunk(
                    ring_k, ring_v, S, z, weight_k, own, n, d, j, MAPS, DIM, KEY_DIM, WIDTH, SIZE, SPAN, SINKS,
                    ROUNDED, LOW, PRECISION, BLOCK_K, BLOCK_V,
                )  # fmt: skip
                tl.debug_barrier()  # S and z are read again by other threads
    q_tile = tl.load(q + heads[:, None] * q_strides[1] + d[None, :], mask=real, other=0.0)
    numerator, denominator = tl.zeros((BLOCK_H, BLOCK_D), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    if SOFTMAX:
        logits = tl.sum(q_tile.to(tl.float32) * new_k.to(tl.float32)[None, :], 1)
        peak = capped(logits, scale, cap, CAPPED) * log2_scale(scale, CAPPED)
        total, soft = tl.full((BLOCK_H,), 1.0, tl.float32), numerator + new_v.to(tl.float32)[None, :]
        if SINKS > 0:
            sink = tl.arange(0, BLOCK_SINKS)
            earlier = (sink < SINKS) & (sink < n)
            peak, total, soft = attend(
                q_tile, sink_k, sink_v, sink, earlier, d, peak, total, soft, scale, cap, DIM, KEY_DIM, CAPPED,
                PRECISION,
            )  # fmt: skip
        start = tl.maximum(window_start(n, WINDOW, SIZE), SINKS)
        for at in range(0, SPAN, BLOCK_W):
            key = at + tl.arange(0, BLOCK_W)
            position = n - (n % SPAN - key + SPAN) % SPAN
            stored = (key < SPAN) & (position >= start) & (position < n)
            peak, total, soft = attend(
                q_tile, ring_k, ring_v, key, stored, d, peak, total, soft, scale, cap, DIM, KEY_DIM, CAPPED, PRECISION
            )
        weight = tl.load(gamma + own * GROUP + heads, mask=heads < GROUP, other=0.0)
        numerator, denominator = soft * weight[:, None], total * weight
    if LINEAR:
        q += KEY_DIM - DIM
        leaves, old_k, old_v = leaving_key(
            ring_k, ring_v, k + (KEY_DIM - DIM), new_v, n, d, DIM, KEY_DIM, WINDOW, SIZE, SPAN, SINKS
        )
        if MAPS < GROUP and tl.bfloat16 == LOW:
            numerator, denominator = read_shared(
                q, q_strides[1], S, z, weight_q, weight_k, numerator, denominator, own, old_k, old_v, leaves, n, heads,
                d, j, GROUP, DIM, WIDTH, WINDOW, ROUNDED, BLOCK_H, BLOCK_F,
            )  # fmt: skip
        else:
            numerator, denominator = read_own(
                q, q_strides[1], S, z, weight_q, weight_k, numerator, denominator, own, old_k, old_v, leaves, n, heads,
                d, j, GROUP, MAPS, DIM, WIDTH, WINDOW, ROUNDED,
            )  # fmt: skip
    y = numerator / tl.where(denominator == 0, 1.0, denominator)[:, None]
    tl.store(o + place, y.to(o.dtype.element_ty), mask=real)
    tl.debug_barrier()  # every thread has read the slot that is overwritten now
    if SPLITS == 1:
        if SPAN > 0:
            store_key(ring_k + n % SPAN * KEY_DIM, k, new_k, d, d < DIM, DIM, KEY_DIM)
            tl.store(ring_v + n % SPAN * DIM + d, new_v, mask=d < DIM)
        if SINKS > 0:
            store_key(sink_k + n * KEY_DIM, k, new_k, d, (d < DIM) & (n < SINKS), DIM, KEY_DIM)
            tl.store(sink_v + n * DIM + d, new_v, mask=(d < DIM) & (n < SINKS))
    if SLOTTED and SPLITS == 1:
        pass  # nothing is counted
    elif tl.atomic_add(seen + row, ARRIVED) >> 32 == programs - 1:
        if SPLITS > 1:  # now the other programs have read it, too
            store_row(
                k_row, k_strides[1], v_row, v_strides[1], places, ring_k - kv * (SPAN * KEY_DIM),
                ring_v - kv * (SPAN * DIM), sink_k - kv * (SINKS * KEY_DIM), sink_v - kv * (SINKS * DIM), n, kv_heads,
                d, PLACED, DIM, KEY_DIM, SPAN, SINKS, BLOCK_G,
            )  # fmt: skip
        tl.store(seen + row, (n if SLOTTED else n + 1).to(tl.int64))


@triton.jit
def clear_sums(S, z, d, j, MAPS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store zeros in a program's sums."""
    zeros, mask = tl.zeros((j.shape[0], d.shape[0]), S.dtype.element_ty), (j < WIDTH)[:, None] & (d < DIM)[None, :]
    for half in range(2 * MAPS):
        tl.store(S + half * (WIDTH * DIM) + j[:, None] * DIM + d[None, :], zeros, mask=mask)
        tl.store(z + half * WIDTH + j, tl.zeros((j.shape[0],), tl.float32), mask=j < WIDTH)


@triton.jit
def head_place(places, kv, real, PLACED: tl.constexpr):
    """Where key/value heads of the state are among those of the layer."""
    return tl.load(places + kv, mask=real, other=0).to(tl.int32) if PLACED else kv


@triton.jit
def store_row(
    k, k_stride, v, v_stride, places, ring_k, ring_v, sink_k, sink_v, n, kv_heads, d, PLACED: tl.constexpr,
    DIM: tl.constexpr, KEY_DIM: tl.constexpr, SPAN: tl.constexpr, SINKS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the new keys and values of all key/value heads of a row into its ring and sinks."""
    kv = tl.arange(0, BLOCK_G)
    head, real = head_place(places, kv, kv < kv_heads, PLACED)[:, None], (kv < kv_heads)[:, None] & (d < DIM)[None, :]
    kv = kv[:, None]
    values = tl.load(v + head * v_stride + d[None, :], mask=real, other=0.0)
    if SPAN > 0:
        tl.store(ring_v + (kv * SPAN + n % SPAN) * DIM + d[None, :], values, mask=real)
    if SINKS > 0:
        tl.store(sink_v + (kv * SINKS + n) * DIM + d[None, :], values, mask=real & (n < SINKS))
    for half in tl.static_range(KEY_DIM // DIM):
        channel = half * DIM + d[None, :]
        keys = tl.load(k + head * k_stride + channel, mask=real, other=0.0)
        if SPAN > 0:
            tl.store(ring_k + (kv * SPAN + n % SPAN) * KEY_DIM + channel, keys, mask=real)
        if SINKS > 0:
            tl.store(sink_k + (kv * SINKS + n) * KEY_DIM + channel, keys, mask=real & (n < SINKS))


@triton.jit
def fold_chunk(
    ring_k, ring_v, S, z, weight_k, kv, n, d, j, MAPS: tl.constexpr, DIM: tl.constexpr, KEY_DIM: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, SINKS: tl.constexpr, ROUNDED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Move the keys at positions n − 2 SIZE to n − SIZE, which lie side by side in the ring, into S and z.

    Works on slices of the value dim, so that this rare step takes no registers from the common path.
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
                    slot = (n % SPAN + key)[:, None]
                    keys = tl.load(
                        ring_k + slot * KEY_DIM + (KEY_DIM - DIM) + d[None, :],
                        mask=leaving[:, None] & (d < DIM)[None, :], other=0.0,
                    )  # fmt: skip
                    values = tl.load(
                        ring_v + slot * DIM + vd[None, :], mask=leaving[:, None] & (vd < DIM)[None, :], other=0.0
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
def read_own(
    q, q_stride, S, z, weight_q, weight_k, numerator, denominator, kv, old_k, old_v, leaves, n, heads, d, j,
    GROUP: tl.constexpr, MAPS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Add φ(q)ᵀ S and φ(q)ᵀ z, one query head after the other, in fp32."""
    READERS: tl.constexpr = GROUP // MAPS
    for m in range(MAPS):
        key_up, key_down = leaving_features(old_k, weight_k, kv * MAPS + m, leaves, d, j, DIM, WIDTH, WINDOW)
        if READERS == 1:
            up, down = query_features(q, q_stride, weight_q, kv * GROUP, m, d, j, DIM, WIDTH)
        for half in tl.static_range(2):
            key_phi = key_up if half == 0 else key_down
            sums, total = load_half(
                S, z, key_phi, old_v, kv * MAPS, m, half, n, leaves, d, j, DIM, WIDTH, WINDOW, ROUNDED
            )  # fmt: skip
            for reader in range(READERS):
                h = m * READERS + reader
                if READERS > 1:
                    up, down = query_features(q, q_stride, weight_q, kv * GROUP, h, d, j, DIM, WIDTH)
                phi = up if half == 0 else down
                numerator += tl.where((heads == h)[:, None], tl.sum(phi[:, None] * sums, 0)[None, :], 0.0)
                denominator += tl.where(heads == h, tl.sum(phi * total, 0), 0.0)
    return numerator, denominator


@triton.jit
def read_shared(
    q, q_stride, S, z, weight_q, weight_k, numerator, denominator, kv, old_k, old_v, leaves, n, heads, d, j,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The same for query heads that share a key map, as bf16 products: φ and, if it is fp32, S are split in two."""
    y = tl.zeros((BLOCK_H, BLOCK_F), tl.float32)
    for h in range(GROUP):
        x = tl.load(q + h * q_stride + d, mask=d < DIM, other=0.0).to(tl.float32)
        projected = tl.sum(x[:, None] * load_weight(weight_q, kv * GROUP + h, d, j, DIM, WIDTH), 0)
        y = tl.where((heads == h)[:, None], projected[None, :], y)
    up, down = hedgehog(y, tl.full((BLOCK_H,), 1.0, tl.float32), j, WIDTH)
    key_up, key_down = leaving_features(old_k, weight_k, kv, leaves, d, j, DIM, WIDTH, WINDOW)
    for half in tl.static_range(2):
        key_phi, phi = key_up if half == 0 else key_down, up if half == 0 else down
        sums, total = load_half(S, z, key_phi, old_v, kv, 0, half, n, leaves, d, j, DIM, WIDTH, WINDOW, ROUNDED)
        denominator += tl.sum(phi * total[None, :], 1)
        phi_high, sums_high = phi.to(tl.bfloat16), sums.to(tl.bfloat16)
        numerator = tl.dot(phi_high, sums_high, numerator)
        numerator = tl.dot((phi - phi_high.to(tl.float32)).to(tl.bfloat16), sums_high, numerator)
        if not ROUNDED:
            numerator = tl.dot(phi_high, (sums - sums_high.to(tl.float32)).to(tl.bfloat16), numerator)
    return numerator, denominator


@triton.jit
def query_features(q, q_stride, weight_q, first_head, h, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Both halves of φ for query head h of a key/value head."""
    x = tl.load(q + h * q_stride + d, mask=d < DIM, other=0.0).to(tl.float32)
    return hedgehog_vector(x, load_weight(weight_q, first_head + h, d, j, DIM, WIDTH), True, j, WIDTH)


@triton.jit
def leaving_features(
    old_k, weight_k, key_map, leaves, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Both halves of φ for the key that leaves; not used with terraced windows, where whole chunks leave."""
    if WINDOW == "terraced":
        return j, j
    else:
        return hedgehog_vector(old_k, load_weight(weight_k, key_map, d, j, DIM, WIDTH), leaves, j, WIDTH)


@triton.jit
def load_half(
    S, z, key_phi, old_v, first_map, m, half, n, leaves, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Half of a map's S (f, D) and z (f,), with the leaving key added."""
    S, z = S + (2 * m + half) * (WIDTH * DIM), z + (2 * m + half) * WIDTH + j
    sums, total = load_state(S, j, d, WIDTH, DIM), tl.load(z, mask=j < WIDTH, other=0.0)
    if WINDOW != "terraced":
        index = ((first_map + m) * 2 + half) * (WIDTH * DIM)
        added = key_phi[:, None] * old_v[None, :]
        sums, total = store_sum(S, sums, added, index, n, leaves, j, d, WIDTH, DIM, ROUNDED), total + key_phi
        tl.store(z, total, mask=j < WIDTH)
    return sums, total


@triton.jit
def leaving_key(
    ring_k, ring_v, arriving_k, new_v, n, d, DIM: tl.constexpr, KEY_DIM: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, SPAN: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Whether a key moves into S now, and that key as feature maps see it: the one in the new key's slot (sliding), or
    the new key itself (linear)."""
    if WINDOW == "sliding":
        leaves = n - SIZE >= SINKS
        slot, mask = n % SPAN, (d < DIM) & leaves
        old_k = tl.load(ring_k + slot * KEY_DIM + (KEY_DIM - DIM) + d, mask=mask, other=0.0)
        old_v = tl.load(ring_v + slot * DIM + d, mask=mask, other=0.0)
        return leaves, old_k.to(tl.float32), old_v.to(tl.float32)
    else:
        return n >= 0, tl.load(arriving_k + d, mask=d < DIM, other=0.0).to(tl.float32), new_v.to(tl.float32)


@triton.jit
def store_key(place, k, new_k, d, mask, DIM: tl.constexpr, KEY_DIM: tl.constexpr):
    """Write the new key into a slot; its first D channels are already loaded as ``new_k``."""
    tl.store(place + d, new_k, mask=mask)
    if KEY_DIM > DIM:
        tl.store(place + DIM + d, tl.load(k + DIM + d, mask=d < DIM, other=0.0), mask=mask)


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
    """Add ``added`` to half of a map's S; store it if ``wanted``, and return it as a later load would.

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
    """``lolcats.attention.rounding.stochastic``, as fp32 values that bf16 holds exactly."""
    h = index.to(tl.uint32) * 0x9E3779B1 + n.to(tl.uint32) * 0x85EBCA77
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    h = (h ^ (h >> 12)) * 0x297A2D39
    h = h ^ (h >> 15)
    bits = x.to(tl.uint32, bitcast=True) + (h & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def hedgehog_vector(x, w, wanted, j, WIDTH: tl.constexpr):
    """Both halves of φ, each (f,) fp32, for one vector x (D,) fp32 and weight (D, f); 0 if not ``wanted``."""
    y = tl.sum(x[:, None] * w, 0)
    real = j < WIDTH
    up = tl.where(real, tl.exp2((y - tl.max(tl.where(real, y, -float("inf")), 0)) * LOG2E), 0.0)
    down = tl.where(real, tl.exp2((tl.min(tl.where(real, y, float("inf")), 0) - y) * LOG2E), 0.0)
    up, down = tl.maximum(up / tl.sum(up, 0), EPS), tl.maximum(down / tl.sum(down, 0), EPS)
    return tl.where(real & wanted, up, 0.0), tl.where(real & wanted, down, 0.0)


@triton.jit
def attend(
    q_tile, keys, values, slot, stored, d, peak, total, soft, scale, cap, DIM: tl.constexpr, KEY_DIM: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Extend a running softmax by the keys ``stored`` in some slots.

    Returns for each query the highest logit in base 2, Σ exp(s − highest), and Σ exp(s − highest) v.
    """
    slot, mask = slot[:, None], stored[:, None] & (d < DIM)[None, :]
    k_tile = tl.load(keys + slot * KEY_DIM + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    v_tile = tl.load(values + slot * DIM + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    logits = softmax_logits(q_tile, k_tile, stored[None, :], scale, cap, CAPPED, PRECISION)
    logits *= log2_scale(scale, CAPPED)
    highest = tl.maximum(peak, tl.max(logits, 1))
    e, smaller = tl.exp2(logits - highest[:, None]), tl.exp2(peak - highest)
    soft = tl.dot(e.to(v_tile.dtype), v_tile, soft * smaller[:, None], input_precision=PRECISION)
    return highest, total * smaller + tl.sum(e, 1), soft


@triton.jit
def capped(logits, scale, cap, CAPPED: tl.constexpr):
    """Cap q·k as ``softmax_logits`` does."""
    return cap * (2 * tl.sigmoid(2 * logits * scale / cap) - 1) if CAPPED else logits


def decode(
    state: SlotState, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, subset: HeadSubset | None = None,
    slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Outputs (B, H, 1, D) for one new token per row, bf16 for bf16 inputs, else fp32; updates ``state`` in place.

    Args:
        state: with tensors that are contiguous, apart from the stride between rows.
        q: (B, H, 1, D); k, v: (B, G, 1, D); q and k (..., 2D) if feature maps and softmax see different ones.
        mixer: its maps must be Hedgehog; they are unused if the kind has no linear term.
        subset: the heads that state and mixer are of, if q, k and v have more; returns ``subset.out``.
        slots: (B,) the row of the state's tensors for each row of q, if there are more; see :func:`step`.
    """
    spec, gamma, softcap = mixer.spec, mixer.gamma, mixer.softcap
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, key_dim = q.shape
    dim = spec.rotated(q).shape[3]
    group, kv_heads, linear = heads // k.shape[1], k.shape[1] if subset is None else len(subset.heads), spec.has_linear
    maps_of: Any = mixer.phi_q, mixer.phi_k
    weights = [phi.weight.detach() for phi in maps_of] if linear else [gamma, gamma]
    width = weights[0].shape[2] if linear else 16
    maps = state.sums.S.shape[1] // kv_heads if linear else group
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    o = q.new_empty(batch, heads, dim, dtype=dtype) if subset is None else subset.out
    wide, shared = q.dtype == torch.float32, maps < group
    splits = 1 if shared else choose_splits(batch * kv_heads, group, q.device)
    memory, seen = (*state.ring, *state.sinks, *state.sums), state.seen.rows
    strides = tuple(x.stride(0) for x in memory)
    decode_kernel[(batch, kv_heads * splits)](
        q, q.stride()[:2], k, k.stride()[:2], v, v.stride()[:2], o, o.stride(0), o if subset is None else subset.heads,
        *memory, strides, seen if slots is None else slots, seen, *weights, gamma, mixer.scale, float(softcap or 0),
        SLOTTED=slots is not None, SPLITS=splits, PLACED=subset is not None, BLOCK_G=power_of_two(kv_heads),
        GROUP=group // splits, MAPS=maps if shared else group // splits, DIM=dim, KEY_DIM=key_dim, WIDTH=width,
        SOFTMAX=spec.has_softmax, LINEAR=linear, WINDOW="none" if spec.kind == "linear" else spec.window,
        SIZE=spec.window_size, SPAN=spec.span, SINKS=spec.softmax_sinks, CAPPED=softcap is not None,
        ROUNDED=state.sums.S.dtype == torch.bfloat16, LOW=tl.float32 if wide else tl.bfloat16,
        PRECISION=precision(), BLOCK_H=max(16, power_of_two(group // splits)),
        **choose_blocks(dim, width, spec, shared, wide),
    )  # fmt: skip
    return o[:, :, None]


def choose_splits(units: int, group: int, device: torch.device) -> int:
    """Programs that share the query heads of one row and key/value head, of which there are ``units``: as many as can
    run at the same time."""
    room = RESIDENT * multiprocessors(device) // units
    return max(count for count in range(1, group + 1) if group % count == 0 and count <= max(1, room))


@lru_cache(maxsize=64)
def choose_blocks(dim: int, width: int, spec: AttentionSpec, shared: bool, wide: bool) -> dict[str, int]:
    """Block sizes and launch options, tuned at D = 128 and f = 64 (benchmarks/LOG.md).

    With 128 registers per thread, four programs of four warps share a multiprocessor and their waits overlap.
    """
    block_d, block_f = max(16, power_of_two(dim)), max(16, power_of_two(width))
    window = max(16, min(64 if shared else 32, power_of_two(spec.span)))
    chosen = {
        "BLOCK_D": block_d, "BLOCK_F": block_f, "BLOCK_K": max(16, min(32, power_of_two(spec.window_size))),
        "BLOCK_V": min(block_d, 32), "BLOCK_W": window, "BLOCK_SINKS": 16,
        "num_warps": 8 if block_d * block_f > 8192 else 4, "num_stages": 1,
    }  # fmt: skip
    if spec.window == "terraced" and chosen["num_warps"] == 4 and not wide and torch.version.hip is None:
        chosen["maxnreg"] = 128
    return chosen
