"""Forward kernel: outputs of hybrid and linear attention, tile by tile, from the states before each step."""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.device import (
    features,
    head_pointer,
    input_pointers,
    key_positions,
    linear_mask,
    load_parts,
    load_sinks,
    load_tile,
    load_weight,
    log2_scale,
    lost_bits,
    row_offset,
    sinks_mask,
    softmax_logits,
    store_tile,
    walk_bounds,
    window_mask,
    window_start,
)
from lolcats.attention.kernels.states import load_state, load_sum
from lolcats.attention.kernels.turn import load_half_parts, table_pointer, turned_back


@triton.jit
def output_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, o_strides, lost, fq, fq_strides, fk, fk_strides, weight_q, weight_k,
    gamma, sink_k, sink_k_strides, sink_v, sink_v_strides, table, table_stride, inverse, peaks, tops, states, sums,
    walks, sequences, positions, heads, group, map_group, tokens, scale, cap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, LINEAR: tl.constexpr,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, PHI: tl.constexpr,
    KEY_PHI: tl.constexpr, SAVE: tl.constexpr, LOST: tl.constexpr, PEAKS: tl.constexpr, NEAR: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_SINKS: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    """One walk over the tiles of a query head, for one slice of the value dim.

    SAVE: store 1 / denominator (``inverse``). LOST: store ``lost_bits`` of the outputs, in the same layout. PEAKS:
    store the shift c_n, in base 2 and including γ, and the key it comes from: −1 − i for sink i, else its token; the
    lowest if there are several.

    TILES: number of tiles that a window reaches. NEAR: some keys older than the window may not yet be in the state of a
    step; otherwise that code is compiled away. PHI, KEY_PHI: how it gets φ(q), and φ(k) of such keys (never ``seen`` or
    ``turned``). table: only if PHI is ``turned``.
    """
    walk, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, begin, end, batch, first, length, entry, position = walk_bounds(walks, sequences, positions, walk)
    kv_head, map_head = head // group, head // map_group
    maps = heads // map_group
    q, k, v, fq, fk = input_pointers(
        q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head, map_head
    )  # fmt: skip
    o = head_pointer(o, o_strides, batch, head, first)
    if LOST:
        lost = head_pointer(lost, o_strides, batch, head, first)
    rows = row_offset(batch, head, first, heads, tokens)
    inverse, peaks, tops = inverse + rows, peaks + rows, tops + rows
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    both = tl.arange(0, 2 * C)  # tokens of a pair of tiles
    one = tl.full((C,), 1.0, tl.float32)
    log_gamma = tl.log2(tl.load(gamma + head))
    if PHI == "turned":
        p = tl.arange(0, BLOCK_P)
        table = table_pointer(table, table_stride, batch, first, DIM)
    wq = load_weight(weight_q, head, d, j, DIM, WIDTH) if PHI == "inside" and LINEAR else 0
    wk = load_weight(weight_k, map_head, d, j, DIM, WIDTH) if KEY_PHI == "inside" and NEAR else 0
    if SOFTMAX and SINKS > 0:
        sink = tl.arange(0, BLOCK_SINKS)
        ks = load_sinks(sink_k, sink_k_strides, sequence, batch, first, length, kv_head, sink, d, DIM, SINKS, CONTEXT)
        vs = load_sinks(
            sink_v, sink_v_strides, sequence, batch, first, length, kv_head, sink, vd, VALUE_DIM, SINKS, CONTEXT
        )
    for tile in range(begin, end):
        at = tile * C
        t = at + row
        n = position + t
        q_tile = load_tile(q, q_strides[2], at, length, row, d, DIM)
        numerator = tl.zeros((C, BLOCK_V), tl.float32)
        denominator = tl.zeros((C,), tl.float32)
        highest = tl.full((C,), -float("inf"), tl.float32)
        if LINEAR:
            step = tl.maximum(window_start(position + at, WINDOW, SIZE) - position, 0) // SPAN
            index = (entry + step) * maps + map_head
        if SOFTMAX:
            factor = log2_scale(scale, CAPPED)
            for older in tl.static_range((TILES + 1) // 2):  # pairs of tiles; the first holds the query's own
                begins = at - C - 2 * C * older
                k_tile = load_tile(k, k_strides[2], begins, length, both, d, DIM)
                v_tile = load_tile(v, v_strides[2], begins, length, both, vd, VALUE_DIM)
                keys = key_positions(begins + both, length, position, SINKS)
                mask = window_mask(n[:, None], keys[None, :], WINDOW, SIZE)
                soft = softmax_logits(q_tile, k_tile, mask, scale, cap, CAPPED, PRECISION)
                peak = tl.max(soft, 1)
                if older == 0:
                    if SINKS > 0:
                        seen = sinks_mask(n[:, None], sink[None, :], SINKS)
                        far = softmax_logits(q_tile, ks, seen, scale, cap, CAPPED, PRECISION)
                        peak = tl.maximum(peak, tl.max(far, 1))
                    if PEAKS:
                        top = tl.min(tl.where(soft == peak[:, None], (begins + both)[None, :], length), 1)
                        if SINKS > 0:
                            top = tl.minimum(top, tl.min(tl.where(far == peak[:, None], -1 - sink[None, :], length), 1))
                    if LINEAR:  # loaded early, to overlap with the exponentials
                        S_up = load_state(states, index, 0, j, vd, WIDTH, VALUE_DIM)
                        S_down = load_state(states, index, 1, j, vd, WIDTH, VALUE_DIM)
                        z_up, z_down = load_sum(sums, index, 0, j, WIDTH, 0), load_sum(sums, index, 1, j, WIDTH, 0)
                else:
                    peak = tl.maximum(peak, highest)
                    if PEAKS:
                        lower = tl.min(tl.where(soft == peak[:, None], (begins + both)[None, :], length), 1)
                        top = tl.where(peak > highest, lower, tl.where((lower < length) & (top >= 0), lower, top))
                    smaller = tl.exp2((highest - peak) * factor)  # rescale the sums so far to the new maximum
                    denominator *= smaller
                    numerator *= smaller[:, None]
                highest = peak
                shift = peak * factor - log_gamma  # γ·exp(s − max)
                soft = tl.exp2(soft * factor - shift[:, None])
                denominator += tl.sum(soft, 1)
                if SINKS > 0 and older == 0:
                    far = tl.exp2(far * factor - shift[:, None])
                    denominator += tl.sum(far, 1)
                    numerator = tl.dot(far.to(vs.dtype), vs, numerator, input_precision=PRECISION)
                numerator = tl.dot(soft.to(v_tile.dtype), v_tile, numerator, input_precision=PRECISION)
            if PEAKS:
                tl.store(tops + t, top, mask=(t < length) & (piece == 0))
                tl.store(peaks + t, shift, mask=(t < length) & (piece == 0))
        elif LINEAR:
            S_up = load_state(states, index, 0, j, vd, WIDTH, VALUE_DIM)
            S_down = load_state(states, index, 1, j, vd, WIDTH, VALUE_DIM)
            z_up, z_down = load_sum(sums, index, 0, j, WIDTH, 0), load_sum(sums, index, 1, j, WIDTH, 0)
        if LINEAR:
            if PHI == "seen":  # W is loaded again for each tile: kept, it would leave no room for a second program
                parts = load_parts(weight_q, head, d, j, DIM, WIDTH, fq.dtype.element_ty)
                x_tile = load_tile(fq, fq_strides[2], at, length, row, d, DIM)
                up, down = features(x_tile, parts, fq, fq_strides[2], at, length, row, one, j, WIDTH, PHI, PRECISION)
            elif PHI == "turned":
                parts = load_half_parts(weight_q, head, p, j, DIM, WIDTH, fq.dtype.element_ty)
                halves = turned_back(fq, fq_strides[2], table, at, length, row, p, DIM)
                up, down = features(halves, parts, fq, fq_strides[2], at, length, row, one, j, WIDTH, PHI, PRECISION)
            else:
                up, down = features(q_tile, wq, fq, fq_strides[2], at, length, row, one, j, WIDTH, PHI, PRECISION)
            denominator += tl.sum(up * z_up[None, :], 1)
            denominator += tl.sum(down * z_down[None, :], 1)
            up, down = up.to(LOW), down.to(LOW)
            numerator = tl.dot(up, tl.trans(S_up), numerator, input_precision=PRECISION)
            numerator = tl.dot(down, tl.trans(S_down), numerator, input_precision=PRECISION)
            if NEAR:
                near_end = tl.cdiv(window_start(position + at + C - 1, WINDOW, SIZE) - position, C)
                for near_tile in range(step * (SPAN // C), near_end):
                    s = near_tile * C
                    near_keys = key_positions(s + row, length, position, SINKS)
                    k_near = load_tile(k, k_strides[2], s, length, row, d, DIM)
                    v_near = load_tile(v, v_strides[2], s, length, row, vd, VALUE_DIM).to(LOW)
                    k_up, k_down = features(
                        k_near, wk, fk, fk_strides[2], s, length, row, one, j, WIDTH, KEY_PHI, PRECISION
                    )  # fmt: skip
                    a = tl.dot(up, tl.trans(k_up.to(LOW)), input_precision=PRECISION)
                    a = tl.dot(down, tl.trans(k_down.to(LOW)), a, input_precision=PRECISION)
                    a = tl.where(linear_mask(n[:, None], near_keys[None, :], WINDOW, SIZE), a, 0.0)
                    denominator += tl.sum(a, 1)
                    numerator = tl.dot(a.to(LOW), v_near, numerator, input_precision=PRECISION)
        reciprocal = tl.where(denominator == 0, 1.0, 1 / denominator)
        y = numerator * reciprocal[:, None]
        store_tile(o, o_strides[2], at, length, row, vd, VALUE_DIM, y)
        if LOST:
            store_tile(lost, o_strides[2], at, length, row, vd, VALUE_DIM, lost_bits(y))
        if SAVE:
            tl.store(inverse + t, reciprocal, mask=(t < length) & (piece == 0))
