"""Forward kernels: sums over segments, their running totals, and the outputs.

A sequence is cut into segments of whole blocks, enough of them to fill the GPU. ``sum_kernel`` computes what each
segment adds to the state, ``scan_kernel`` turns that into the state at the start of each segment, and
``output_kernel`` walks over the blocks of a segment with S and z in registers. The first two also serve the backward
pass, where the state runs from the end of the sequence to its beginning.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.blocks import (
    features,
    head_pointer,
    input_pointers,
    load_rows,
    load_sinks,
    load_tile,
    load_weight,
    matrix,
    remembered,
    row_offset,
    segment_bounds,
    sinks_mask,
    softmax_logits,
    store_tile,
    window_mask,
)


@triton.jit
def sum_kernel(
    x, x_strides, u, u_strides, f, f_strides, weight, inverse, shift, states, segments, sequences, positions,
    heads, x_group, u_group, tokens, dim, value_dim, width,
    STEP: tl.constexpr, SINKS: tl.constexpr, BACKWARD: tl.constexpr, FUSED: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Σ φ(x_n) u_nᵀ (S) and Σ φ(x_n) (z) over each segment, shifted by STEP blocks.

    Forward: x = k, u = v, one program per segment, map and value slice. Backward: x = q, u = dO, rows of S weighted by
    ``inverse`` (1 / denominator) and rows of z by ``shift``.
    """
    segment, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, begin, end, batch, first, length, position = segment_bounds(segments, sequences, positions, segment)
    x = head_pointer(x, x_strides, batch, head // x_group, first)
    u = head_pointer(u, u_strides, batch, head // u_group, first)
    f = head_pointer(f, f_strides, batch, head, first)
    inverse += row_offset(batch, head, first, heads, tokens)
    shift += row_offset(batch, head, first, heads, tokens)
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    w = load_weight(weight, head, d, j, dim, width).to(x.dtype.element_ty) if FUSED else 0
    S_up, S_down, z_up, z_down = load_state(states, segment, j, vd, width, value_dim, False, BLOCK_F, BLOCK_V)
    blocks = tl.cdiv(length, C)
    unused = begin == 0 if BACKWARD else end == blocks  # nothing comes after the last segment
    for block in range(tl.maximum(begin + STEP, 0), tl.where(unused, 0, tl.minimum(end + STEP, blocks))):
        t = block * C + row
        x_tile = load_tile(x, x_strides[2], t, length, d, dim)
        u_tile = load_tile(u, u_strides[2], t, length, vd, value_dim).to(LOW)
        up, down = features(x_tile, w, f, f_strides[2], t, length, j, width, FUSED, PRECISION)
        if BACKWARD:
            row_S, row_z = load_rows(inverse, t, length), load_rows(shift, t, length)
        else:
            row_S = remembered(t, length, position, SINKS).to(tl.float32)
            row_z = row_S
        z_up += tl.sum(up * row_z[:, None], 0)
        z_down += tl.sum(down * row_z[:, None], 0)
        up, down = (up * row_S[:, None]).to(LOW), (down * row_S[:, None]).to(LOW)
        S_up, S_down = add_to_state(S_up, S_down, up, down, u_tile, PRECISION)
    store_state(states, segment * tl.num_programs(1) + head, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece)


@triton.jit
def load_state(
    states, index, j, vd, width, value_dim, HAS_STATES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """S and z (two halves each) of entry ``index``: (2 · width, value_dim) floats and 2 · width more; or zeros."""
    if not HAS_STATES:
        S, z = tl.zeros((BLOCK_F, BLOCK_V), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
        return S, S, z, z
    else:
        base = states + index.to(tl.int64) * (2 * width * (value_dim + 1))
        offsets, exists = matrix(j, vd, width, value_dim)
        S_up = tl.load(base + offsets, mask=exists, other=0.0)
        S_down = tl.load(base + width * value_dim + offsets, mask=exists, other=0.0)
        z = base + 2 * width * value_dim
        z_up = tl.load(z + j, mask=j < width, other=0.0)
        z_down = tl.load(z + width + j, mask=j < width, other=0.0)
        return S_up, S_down, z_up, z_down


@triton.jit
def add_to_state(S_up, S_down, up, down, u, PRECISION: tl.constexpr):
    """S + φᵀ u, both halves: up, down (C, f) and u (C, value slice) in the precision of the product."""
    S_up = tl.dot(tl.trans(up), u, S_up, input_precision=PRECISION)
    return S_up, tl.dot(tl.trans(down), u, S_down, input_precision=PRECISION)


@triton.jit
def store_state(states, index, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece):
    """The inverse of ``load_state``; z is written by the first value slice."""
    base = states + index.to(tl.int64) * (2 * width * (value_dim + 1))
    offsets, exists = matrix(j, vd, width, value_dim)
    tl.store(base + offsets, S_up, mask=exists)
    tl.store(base + width * value_dim + offsets, S_down, mask=exists)
    z = base + 2 * width * value_dim
    tl.store(z + j, z_up, mask=(j < width) & (piece == 0))
    tl.store(z + width + j, z_down, mask=(j < width) & (piece == 0))


@triton.jit
def scan_kernel(states, initial, ranges, size, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each segment's sum by the sum of all segments before it (REVERSE: behind it) in its sequence.

    states: (segments, maps, size); ranges: (sequences + 1,) first segment of each sequence; initial: (sequences, maps,
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
        entry = states + (segment * heads + head).to(tl.int64) * size + column
        added = tl.load(entry, mask=column < size, other=0.0)
        tl.store(entry, total, mask=column < size)
        total += added


@triton.jit
def output_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, o_strides, fq, fq_strides, fk, fk_strides, weight_q, weight_k, gamma,
    sink_k, sink_v, inverse, states, final, segments, sequences, positions,
    heads, group, map_group, tokens, dim, value_dim, width, scale, cap,
    SOFTMAX: tl.constexpr, LINEAR: tl.constexpr, SLIDING: tl.constexpr, LAG: tl.constexpr, SINKS: tl.constexpr,
    CAPPED: tl.constexpr, FUSED: tl.constexpr, SAVE: tl.constexpr, FINAL: tl.constexpr, HAS_STATES: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_SINKS: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, query head and slice of the value dim: numerator and denominator, block by block.

    LAG: how many blocks the state stays behind the queries, 2 with a window and 1 (``linear``) without.
    """
    segment, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, begin, end, batch, first, length, position = segment_bounds(segments, sequences, positions, segment)
    kv_head, map_head = head // group, head // map_group
    kv_heads, maps = heads // group, heads // map_group
    q, k, v, fq, fk = input_pointers(
        q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head, map_head
    )  # fmt: skip
    o = head_pointer(o, o_strides, batch, head, first)
    inverse += row_offset(batch, head, first, heads, tokens)
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    causal = row[:, None] >= row[None, :]
    log_gamma = tl.log2(tl.load(gamma + head))
    if FUSED and LINEAR:
        wq = load_weight(weight_q, head, d, j, dim, width).to(q.dtype.element_ty)
        wk = load_weight(weight_k, map_head, d, j, dim, width).to(k.dtype.element_ty)
    else:
        wq = 0
        wk = 0
    if SOFTMAX and SINKS > 0:
        sink = tl.arange(0, BLOCK_SINKS)
        ks = load_sinks(sink_k, sequence, kv_head, kv_heads, sink, d, dim, SINKS)
        vs = load_sinks(sink_v, sequence, kv_head, kv_heads, sink, vd, value_dim, SINKS)
    if LINEAR:
        index = segment * maps + map_head
        S_up, S_down, z_up, z_down = load_state(
            states, index, j, vd, width, value_dim, HAS_STATES, BLOCK_F, BLOCK_V
        )  # fmt: skip
    for block in range(begin, end):
        t = block * C + row
        q_tile = load_tile(q, q_strides[2], t, length, d, dim)
        k_own = load_tile(k, k_strides[2], t, length, d, dim)
        v_own = load_tile(v, v_strides[2], t, length, vd, value_dim)
        own_ok = remembered(t, length, position, SINKS)
        if LAG == 2:
            k_previous = load_tile(k, k_strides[2], t - C, length, d, dim)
            v_previous = load_tile(v, v_strides[2], t - C, length, vd, value_dim)
            previous_ok = remembered(t - C, length, position, SINKS)
        numerator = tl.zeros((C, BLOCK_V), tl.float32)
        denominator = tl.zeros((C,), tl.float32)
        if SOFTMAX:
            own_mask, old_mask = window_mask(causal, own_ok, previous_ok, SLIDING)
            _, own = softmax_logits(q_tile, k_own, own_mask, scale, cap, CAPPED, PRECISION)
            _, old = softmax_logits(q_tile, k_previous, old_mask, scale, cap, CAPPED, PRECISION)
            peak = tl.maximum(tl.max(own, 1), tl.max(old, 1))
            if SINKS > 0:
                seen = sinks_mask(t, position, sink, SINKS)
                _, far = softmax_logits(q_tile, ks, seen, scale, cap, CAPPED, PRECISION)
                peak = tl.maximum(peak, tl.max(far, 1))
            peak -= log_gamma  # γ·exp(s − max)
            own = tl.exp2(own - peak[:, None])
            old = tl.exp2(old - peak[:, None])
            denominator += tl.sum(own, 1) + tl.sum(old, 1)
            if SINKS > 0:
                far = tl.exp2(far - peak[:, None])
                denominator += tl.sum(far, 1)
                numerator = tl.dot(far.to(vs.dtype), vs, numerator, input_precision=PRECISION)
            numerator = tl.dot(own.to(v_own.dtype), v_own, numerator, input_precision=PRECISION)
            numerator = tl.dot(old.to(v_own.dtype), v_previous, numerator, input_precision=PRECISION)
        if LINEAR:
            q_up, q_down = features(q_tile, wq, fq, fq_strides[2], t, length, j, width, FUSED, PRECISION)
            denominator += tl.sum(q_up * z_up[None, :], 1) + tl.sum(q_down * z_down[None, :], 1)
            q_up_low, q_down_low = q_up.to(LOW), q_down.to(LOW)
            numerator = tl.dot(q_up_low, S_up.to(LOW), numerator, input_precision=PRECISION)
            numerator = tl.dot(q_down_low, S_down.to(LOW), numerator, input_precision=PRECISION)
            if LAG == 2:
                k_up, k_down = features(k_previous, wk, fk, fk_strides[2], t - C, length, j, width, FUSED, PRECISION)
                k_ok, u = previous_ok, v_previous.to(LOW)
            else:
                k_up, k_down = features(k_own, wk, fk, fk_strides[2], t, length, j, width, FUSED, PRECISION)
                k_ok, u = own_ok, v_own.to(LOW)
            k_up = tl.where(k_ok[:, None], k_up, 0.0)
            k_down = tl.where(k_ok[:, None], k_down, 0.0)
            k_up_low, k_down_low = k_up.to(LOW), k_down.to(LOW)
            if SLIDING or LAG == 1:
                near = tl.dot(q_up_low, tl.trans(k_up_low), input_precision=PRECISION)
                near = tl.dot(q_down_low, tl.trans(k_down_low), near, input_precision=PRECISION)
                near = tl.where(causal, near, 0.0)
                denominator += tl.sum(near, 1)
                numerator = tl.dot(near.to(LOW), u, numerator, input_precision=PRECISION)
            if FINAL:
                if (block + 1) * C >= length:
                    # What the window of the last query no longer reaches: nothing more if terraced.
                    if SLIDING or LAG == 1:
                        leaves = (row <= length - 1 - block * C)[:, None]
                        k_up, k_down = tl.where(leaves, k_up, 0.0), tl.where(leaves, k_down, 0.0)
                    else:
                        k_up, k_down = k_up * 0, k_down * 0
                    k_up_low, k_down_low = k_up.to(LOW), k_down.to(LOW)
            z_up += tl.sum(k_up, 0)
            z_down += tl.sum(k_down, 0)
            S_up, S_down = add_to_state(S_up, S_down, k_up_low, k_down_low, u, PRECISION)
        reciprocal = tl.where(denominator == 0, 1.0, 1 / denominator)
        store_tile(o, o_strides[2], t, length, vd, value_dim, numerator * reciprocal[:, None])
        if SAVE:
            tl.store(inverse + t, reciprocal, mask=(t < length) & (piece == 0))
    if FINAL and LINEAR:
        if end * C >= length:
            # Query heads that share a map hold the same state: the first of them writes it.
            if head % map_group == 0:
                store_state(
                    final, sequence * maps + map_head, S_up, S_down, z_up, z_down, j, vd, width, value_dim, piece
                )
