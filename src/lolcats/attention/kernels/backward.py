"""Backward kernels. With a_ni the unnormalized weights, d_n = Σ_i a_ni and y_n = Σ_i a_ni v_i / d_n, the gradients are

    da_ni = (dy_n·v_i − δ_n) / d_n,   δ_n = dy_n·y_n,   dv_i = Σ_n a_ni dy_n / d_n.

``query_kernel`` reads the states S, z of the forward pass (dφ(q_n) = (S dy_n − δ_n z) / d_n, then dq); ``key_kernel``
reads the gradients dS = Σ φ(q_n) dy_nᵀ / d_n and dz = Σ φ(q_n) δ_n / d_n from later queries (dφ(k_i) = dS v_i − dz,
then dk, dv). The forward pass stores 1 / d_n, c_n and the key that c_n comes from.

The shift c_n = max s_ni changes the softmax part relative to the linear one, so it has a gradient: −r_n for the key
with the maximum, with r_n = Σ_{i∈soft} a_ni da_ni. Since Σ_i a_ni da_ni = 0 over all keys, r_n = −φ(q_n)·dφ(q_n), and
the gradient of γ is Σ_n r_n / γ: neither needs the softmax part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.attention.kernels.device import (
    features,
    head_pointer,
    hedgehog_backward,
    input_pointers,
    key_positions,
    linear_mask,
    load_rows,
    load_sinks,
    load_tile,
    load_weight,
    row_offset,
    sinks_mask,
    softmax_backward,
    softmax_logits,
    store_matrix,
    store_tile,
    walk_bounds,
    window_end,
    window_mask,
    window_start,
    with_lost_bits,
)
from lolcats.attention.kernels.states import load_state, load_sum
from lolcats.attention.kernels.turn import store_half, table_pointer, turned_back


@triton.jit
def delta_kernel(
    o, o_strides, lost, do, do_strides, delta, heads, tokens,
    VALUE_DIM: tl.constexpr, LOST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """δ_n = dy_n·y_n."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, row, vd = block * BLOCK_T, tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    o = head_pointer(o, o_strides, batch, head, batch * 0)
    if LOST:
        lost = head_pointer(lost, o_strides, batch, head, batch * 0)
    y = load_outputs(o, lost, o_strides[2], at, tokens, row, vd, VALUE_DIM, LOST)
    do = load_tile(head_pointer(do, do_strides, batch, head, batch * 0), do_strides[2], at, tokens, row, vd, VALUE_DIM)
    offset = row_offset(batch, head, batch * 0, heads, tokens)
    tl.store(delta + offset + at + row, tl.sum(y * do.to(tl.float32), 1), mask=at + row < tokens)


@triton.jit
def load_outputs(o, lost, stride, at, length, row, column, WIDTH: tl.constexpr, LOST: tl.constexpr):
    """A tile of y in fp32: δ is a difference of large numbers, so rounding y to bf16 would show."""
    y = load_tile(o, stride, at, length, row, column, WIDTH)
    if LOST:
        return with_lost_bits(y, load_tile(lost, stride, at, length, row, column, WIDTH))
    else:
        return y.to(tl.float32)


@triton.jit
def query_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, o_strides, lost, do, do_strides, fq, fq_strides, fk, fk_strides,
    weight_q, weight_k, sink_k, sink_k_strides, sink_v, sink_v_strides, inverse, delta, peaks, tops, states, sums, dq,
    dq_strides, df, df_strides, d_gamma, pulls, walks, sequences, positions, heads, group, map_group, tokens, scale,
    cap, pull_stride,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, LINEAR: tl.constexpr,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, PHI: tl.constexpr,
    INPUTS: tl.constexpr, DF: tl.constexpr, NEAR: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_SINKS: tl.constexpr, CONTEXT: tl.constexpr, WHOLE: tl.constexpr, LOST: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """Gradients on the query side (dq, φ_q and γ) from one slice of the value dim; linear in dy, so slices add up.

    WHOLE: the slice is the whole value dim, and δ_n is computed and stored here; otherwise ``delta_kernel`` has done
    so. LOST: there are ``lost_bits`` of o. CENTER: the states are of centered features.
    INPUTS: compute gradients of q, k, v, and store r_n (``pulls``) for ``key_kernel``. TILES: number of tiles that a
    window reaches. DF: also compute gradients of the maps. df: gradients of the features if PHI is given, else of x·W.
    """
    walk, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, begin, end, batch, first, length, entry, position = walk_bounds(walks, sequences, positions, walk)
    kv_head, map_head = head // group, head // map_group
    maps = heads // map_group
    program = (piece * tl.num_programs(0) + walk) * heads + head  # index of per-program outputs
    q, k, v, fq, fk = input_pointers(
        q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head, map_head
    )  # fmt: skip
    do, o = head_pointer(do, do_strides, batch, head, first), head_pointer(o, o_strides, batch, head, first)
    if LOST:
        lost = head_pointer(lost, o_strides, batch, head, first)
    dq = head_pointer(dq, dq_strides, batch, head, first) + piece.to(tl.int64) * dq_strides[3]
    df = head_pointer(df, df_strides, batch, head, first) + piece.to(tl.int64) * df_strides[3]
    rows = row_offset(batch, head, first, heads, tokens)
    inverse, delta, peaks, tops = inverse + rows, delta + rows, peaks + rows, tops + rows
    pulls += rows + piece.to(tl.int64) * pull_stride
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    first_piece, one = tl.where(piece == 0, 1.0, 0.0), tl.full((C,), 1.0, tl.float32)
    wq = load_weight(weight_q, head, d, j, DIM, WIDTH) if PHI == "inside" and LINEAR else 0
    wk = load_weight(weight_k, map_head, d, j, DIM, WIDTH) if PHI == "inside" and NEAR else 0
    if SOFTMAX and SINKS > 0 and INPUTS:
        sink = tl.arange(0, BLOCK_SINKS)
        ks = load_sinks(sink_k, sink_k_strides, sequence, batch, first, length, kv_head, sink, d, DIM, SINKS, CONTEXT)
        vs = load_sinks(
            sink_v, sink_v_strides, sequence, batch, first, length, kv_head, sink, vd, VALUE_DIM, SINKS, CONTEXT
        ).to(LOW)
    sum_pull = tl.zeros((C,), tl.float32)
    for tile in range(begin, end):
        at = tile * C
        t = at + row
        n = position + t
        q_tile = load_tile(q, q_strides[2], at, length, row, d, DIM)
        do_tile = load_tile(do, do_strides[2], at, length, row, vd, VALUE_DIM)
        if WHOLE:
            y = load_outputs(o, lost, o_strides[2], at, length, row, vd, VALUE_DIM, LOST)
            h = tl.sum(y * do_tile.to(tl.float32), 1)
            tl.store(delta + t, h, mask=t < length)
        else:
            h = load_rows(delta, t, length) * first_piece
        do_tile = do_tile.to(LOW)
        r = load_rows(inverse, t, length)
        h *= r
        pull = tl.zeros((C,), tl.float32)
        if INPUTS:
            grad_q = tl.zeros((C, BLOCK_D), tl.float32)
        if LINEAR:
            step = tl.maximum(window_start(position + at, WINDOW, SIZE) - position, 0) // SPAN
            index = (entry + step) * maps + map_head
            S_up = load_state(states, index, 0, j, vd, WIDTH, VALUE_DIM)
            S_down = load_state(states, index, 1, j, vd, WIDTH, VALUE_DIM)
            REST: tl.constexpr = VALUE_DIM + 1 if CENTER else 0
            z_up, z_down = load_sum(sums, index, 0, j, WIDTH, REST), load_sum(sums, index, 1, j, WIDTH, REST)
            d_up = tl.dot(do_tile, S_up, input_precision=PRECISION) * r[:, None] - h[:, None] * z_up[None, :]
            d_down = tl.dot(do_tile, S_down, input_precision=PRECISION) * r[:, None] - h[:, None] * z_down[None, :]
            if NEAR:
                near_end = tl.cdiv(window_start(position + at + C - 1, WINDOW, SIZE) - position, C)
                for near_tile in range(step * (SPAN // C), near_end):
                    near = near_tile * C
                    s = near + row
                    near_keys = key_positions(s, length, position, SINKS)
                    k_near = load_tile(k, k_strides[2], near, length, row, d, DIM)
                    v_near = load_tile(v, v_strides[2], near, length, row, vd, VALUE_DIM).to(LOW)
                    k_up, k_down = features(
                        k_near, wk, fk, fk_strides[2], near, length, row, one, j, WIDTH, PHI, PRECISION
                    )
                    da = tl.dot(do_tile, tl.trans(v_near), input_precision=PRECISION) * r[:, None] - h[:, None]
                    mask = linear_mask(n[:, None], near_keys[None, :], WINDOW, SIZE)
                    da = tl.where(mask, da, 0.0).to(LOW)
                    d_up = tl.dot(da, k_up.to(LOW), d_up, input_precision=PRECISION)
                    d_down = tl.dot(da, k_down.to(LOW), d_down, input_precision=PRECISION)
            up, down = features(q_tile, wq, fq, fq_strides[2], at, length, row, one, j, WIDTH, PHI, PRECISION)
            pull = -tl.sum(up * d_up, 1) - tl.sum(down * d_down, 1)
            if CENTER:  # what d_up and d_down lack is the same for all columns, and both halves of φ sum to 1
                rest = sums + index.to(tl.int64) * (2 * WIDTH + REST) + 2 * WIDTH
                rows_v = tl.load(rest + vd, mask=vd < VALUE_DIM, other=0.0)
                lacking = tl.sum(do_tile.to(tl.float32) * rows_v[None, :], 1) * r - h * tl.load(rest + VALUE_DIM)
                pull -= lacking * (2.0 / WIDTH)
            sum_pull += tl.where(t < length, pull, 0.0)
            if PHI != "given":
                dy = hedgehog_backward(up, down, d_up, d_down)
                if DF:
                    store_tile(df, df_strides[2], at, length, row, j, WIDTH, dy)
                if PHI == "inside" and INPUTS:
                    grad_q = tl.dot(dy.to(LOW), tl.trans(wq).to(LOW), grad_q, input_precision=PRECISION)
            elif DF:
                store_tile(df, df_strides[2], at, length, row, j, WIDTH, d_up)
                store_tile(df + WIDTH, df_strides[2], at, length, row, j, WIDTH, d_down)
        if INPUTS and SOFTMAX:
            tl.store(pulls + t, pull, mask=t < length)
            peak, top = load_rows(peaks, t, length)[:, None], load_rows(tops, t, length)[:, None]
            r, h, pull = r[:, None], h[:, None], pull[:, None]
            for back in range(TILES):  # keys of the same tile, then of those before
                near = at - back * C
                s = near + row
                k_tile = load_tile(k, k_strides[2], near, length, row, d, DIM)
                v_tile = load_tile(v, v_strides[2], near, length, row, vd, VALUE_DIM).to(LOW)
                keys = key_positions(s, length, position, SINKS)[None, :]
                mask = window_mask(n[:, None], keys, WINDOW, SIZE)
                logits = softmax_logits(q_tile, k_tile, mask, scale, cap, CAPPED, PRECISION)
                da = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
                _, ds = softmax_backward(logits, da, peak, r, h, pull, s[None, :] == top, scale, cap, CAPPED)
                grad_q = tl.dot(ds.to(LOW), k_tile.to(LOW), grad_q, input_precision=PRECISION)
            if SINKS > 0:
                logits = softmax_logits(
                    q_tile, ks, sinks_mask(n[:, None], sink[None, :], SINKS), scale, cap, CAPPED, PRECISION
                )
                da = tl.dot(do_tile, tl.trans(vs), input_precision=PRECISION)
                is_top = (-1 - sink)[None, :] == top
                _, ds = softmax_backward(logits, da, peak, r, h, pull, is_top, scale, cap, CAPPED)
                grad_q = tl.dot(ds.to(LOW), ks.to(LOW), grad_q, input_precision=PRECISION)
        if INPUTS:
            store_tile(dq, dq_strides[2], at, length, row, d, DIM, grad_q)
    tl.store(d_gamma + program, tl.sum(sum_pull, 0))


@triton.jit
def sink_kernel(
    q, q_strides, do, do_strides, sink_k, sink_k_strides, sink_v, sink_v_strides, inverse, delta, peaks, tops, pulls,
    d_sink_k, d_sink_v, walks, sequences, positions, heads, group, tokens, scale, cap, pull_stride,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_SINKS: tl.constexpr,
    CONTEXT: tl.constexpr,
):  # fmt: skip
    """Gradients of the sinks' keys and values from the queries of one walk, as d_sink_k (pieces, walks, H, SINKS, D)
    and d_sink_v (walks, H, SINKS, Dv)."""
    walk, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, begin, end, batch, first, length, _, position = walk_bounds(walks, sequences, positions, walk)
    kv_head = head // group
    q, do = head_pointer(q, q_strides, batch, head, first), head_pointer(do, do_strides, batch, head, first)
    rows = row_offset(batch, head, first, heads, tokens)
    inverse, delta, peaks, tops = inverse + rows, delta + rows, peaks + rows, tops + rows
    pulls += rows + piece.to(tl.int64) * pull_stride
    row, d, sink = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SINKS)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    first_piece = tl.where(piece == 0, 1.0, 0.0)
    ks = load_sinks(sink_k, sink_k_strides, sequence, batch, first, length, kv_head, sink, d, DIM, SINKS, CONTEXT)
    vs = load_sinks(
        sink_v, sink_v_strides, sequence, batch, first, length, kv_head, sink, vd, VALUE_DIM, SINKS, CONTEXT
    ).to(LOW)
    dks = tl.zeros((BLOCK_SINKS, BLOCK_D), tl.float32)
    dvs = tl.zeros((BLOCK_SINKS, BLOCK_V), tl.float32)
    for tile in range(begin, end):
        at = tile * C
        t = at + row
        q_tile = load_tile(q, q_strides[2], at, length, row, d, DIM)
        do_tile = load_tile(do, do_strides[2], at, length, row, vd, VALUE_DIM).to(LOW)
        r, pull = load_rows(inverse, t, length)[None, :], load_rows(pulls, t, length)[None, :]
        h = load_rows(delta, t, length)[None, :] * r * first_piece
        peak, is_top = load_rows(peaks, t, length)[None, :], load_rows(tops, t, length)[None, :] == (-1 - sink)[:, None]
        mask = sinks_mask((position + t)[None, :], sink[:, None], SINKS)
        logits = softmax_logits(ks, q_tile, mask, scale, cap, CAPPED, PRECISION)
        da = tl.dot(vs, tl.trans(do_tile), input_precision=PRECISION)
        a, ds = softmax_backward(logits, da, peak, r, h, pull, is_top, scale, cap, CAPPED)
        dks = tl.dot(ds.to(LOW), q_tile.to(LOW), dks, input_precision=PRECISION)
        dvs = tl.dot((a * r).to(LOW), do_tile, dvs, input_precision=PRECISION)
    program = (piece * tl.num_programs(0) + walk) * heads + head
    store_matrix(d_sink_k + program.to(tl.int64) * SINKS * DIM, sink, d, SINKS, DIM, dks)
    store_matrix(d_sink_v + (walk * heads + head).to(tl.int64) * SINKS * VALUE_DIM, sink, vd, SINKS, VALUE_DIM, dvs)


@triton.jit(do_not_specialize=["parts"])
def key_kernel(
    q, q_strides, k, k_strides, v, v_strides, do, do_strides, fq, fq_strides, fk, fk_strides, weight_q, weight_k,
    inverse, delta, peaks, tops, pulls, d_sink_k, d_sink_v, states, sums, dk, dk_strides, dv, dv_strides, df,
    df_strides, walks, sequences, positions, heads, tokens, scale, cap, pull_stride, parts,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, LINEAR: tl.constexpr,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, PHI: tl.constexpr,
    INPUTS: tl.constexpr, DF: tl.constexpr, NEAR: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_SINKS: tl.constexpr, SINKS_HERE: tl.constexpr, GROUP: tl.constexpr,
    MAPS: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Gradients on the key side (dk, dv and φ_k) from one kv head and one slice of the value dim.

    GROUP: query heads per kv head; MAPS: key maps per kv head. df: as in ``query_kernel``, for each map. Matrices of
    weights are (queries, keys), so values per query take two registers of a thread instead of sixteen. SINKS_HERE: add
    the sinks' gradients, which ``sink_kernel`` computed in ``parts`` walks, in the first tile; off if the sinks are in
    a context.
    """
    walk, kv_head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, begin, end, batch, first, length, entry, position = walk_bounds(walks, sequences, positions, walk)
    maps = tl.num_programs(1) * MAPS
    first_head, first_map = kv_head * GROUP, kv_head * MAPS
    q, k, v, fq, fk = input_pointers(
        q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, first_head, kv_head,
        first_map,
    )  # fmt: skip
    do = head_pointer(do, do_strides, batch, first_head, first)
    dk = head_pointer(dk, dk_strides, batch, kv_head, first) + piece.to(tl.int64) * dk_strides[3]
    dv = head_pointer(dv, dv_strides, batch, kv_head, first)
    df = head_pointer(df, df_strides, batch, first_map, first) + piece.to(tl.int64) * df_strides[3]
    rows = row_offset(batch, first_head, first, heads, tokens)
    inverse, delta, peaks, tops = inverse + rows, delta + rows, peaks + rows, tops + rows
    pulls += rows + piece.to(tl.int64) * pull_stride
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    first_piece, one = tl.where(piece == 0, 1.0, 0.0), tl.full((C,), 1.0, tl.float32)
    for tile in range(begin, end):
        at = tile * C
        t = at + row
        k_tile = load_tile(k, k_strides[2], at, length, row, d, DIM)
        v_tile = load_tile(v, v_strides[2], at, length, row, vd, VALUE_DIM).to(LOW)
        keys = key_positions(t, length, position, SINKS)
        if INPUTS:
            grad_k = tl.zeros((C, BLOCK_D), tl.float32)
            grad_v = tl.zeros((C, BLOCK_V), tl.float32)
        if LINEAR:
            # Queries from step ``after`` on see all keys of this tile; the state of the last step is empty.
            after = tl.cdiv(window_end(position + at + C - 1, WINDOW, SIZE) - position, SPAN)
            index = (entry + tl.minimum(after, tl.cdiv(length, SPAN)) - 1) * maps + first_map
            exists = (keys >= 0)[:, None]
            for m in range(MAPS):
                wk = load_weight(weight_k, first_map + m, d, j, DIM, WIDTH) if PHI == "inside" else 0
                S_up = load_state(states, index + m, 0, j, vd, WIDTH, VALUE_DIM)
                S_down = load_state(states, index + m, 1, j, vd, WIDTH, VALUE_DIM)
                REST: tl.constexpr = VALUE_DIM + 1 if CENTER else 0
                z_up = load_sum(sums, index + m, 0, j, WIDTH, REST)
                z_down = load_sum(sums, index + m, 1, j, WIDTH, REST)
                up, down = features(
                    k_tile, wk, fk + tl.cast(m, tl.int64) * fk_strides[1], fk_strides[2], at, length, row, one, j,
                    WIDTH, PHI, PRECISION,
                )  # fmt: skip
                up_low, down_low = tl.where(exists, up, 0.0).to(LOW), tl.where(exists, down, 0.0).to(LOW)
                if INPUTS:
                    grad_v = tl.dot(up_low, tl.trans(S_up), grad_v, input_precision=PRECISION)
                    grad_v = tl.dot(down_low, tl.trans(S_down), grad_v, input_precision=PRECISION)
                    if CENTER:
                        rest = sums + (index + m).to(tl.int64) * (2 * WIDTH + REST) + 2 * WIDTH
                        rows_do = tl.load(rest + vd, mask=vd < VALUE_DIM, other=0.0) * (2.0 / WIDTH)
                        grad_v += tl.where(exists, rows_do[None, :], 0.0)
                d_up = tl.dot(v_tile, S_up, input_precision=PRECISION) - z_up[None, :] * first_piece
                d_down = tl.dot(v_tile, S_down, input_precision=PRECISION) - z_down[None, :] * first_piece
                if NEAR:
                    near_begin = (window_end(position + at, WINDOW, SIZE) - position) // C
                    near_tiles = tl.maximum(tl.minimum(after * (SPAN // C), tl.cdiv(length, C)) - near_begin, 0)
                    for i in range(near_tiles * (GROUP // MAPS)):  # the tiles of a head, then the next head
                        h = m * (GROUP // MAPS) + i // near_tiles
                        near = (near_begin + i % near_tiles) * C
                        s = near + row
                        r, ratio, q_near, do_near = load_query(
                            q, q_strides, do, do_strides, inverse, delta, h, near, tokens, length, first_piece, row, d,
                            vd, DIM, VALUE_DIM,
                        )  # fmt: skip
                        do_near = do_near.to(LOW)
                        wq = load_weight(weight_q, first_head + h, d, j, DIM, WIDTH) if PHI == "inside" else 0
                        q_up, q_down = features(
                            q_near, wq, fq + tl.cast(h, tl.int64) * fq_strides[1], fq_strides[2], near, length, row,
                            one, j, WIDTH, PHI, PRECISION,
                        )  # fmt: skip
                        q_up, q_down = q_up.to(LOW), q_down.to(LOW)
                        mask = linear_mask((position + s)[:, None], keys[None, :], WINDOW, SIZE)
                        da = tl.dot(do_near, tl.trans(v_tile), input_precision=PRECISION) * r[:, None] - ratio[:, None]
                        da = tl.trans(tl.where(mask, da, 0.0).to(LOW))
                        d_up = tl.dot(da, q_up, d_up, input_precision=PRECISION)
                        d_down = tl.dot(da, q_down, d_down, input_precision=PRECISION)
                        if INPUTS:
                            a = tl.dot(q_up, tl.trans(up_low), input_precision=PRECISION)
                            a = tl.dot(q_down, tl.trans(down_low), a, input_precision=PRECISION)
                            a = tl.trans(tl.where(mask, a * r[:, None], 0.0).to(LOW))
                            grad_v = tl.dot(a, do_near, grad_v, input_precision=PRECISION)
                d_up, d_down = tl.where(exists, d_up, 0.0), tl.where(exists, d_down, 0.0)
                target = df + tl.cast(m, tl.int64) * df_strides[1]
                if PHI != "given":
                    dy = hedgehog_backward(up, down, d_up, d_down)
                    if DF:
                        store_tile(target, df_strides[2], at, length, row, j, WIDTH, dy)
                    if PHI == "inside" and INPUTS:
                        grad_k = tl.dot(dy.to(LOW), tl.trans(wk).to(LOW), grad_k, input_precision=PRECISION)
                elif DF:
                    store_tile(target, df_strides[2], at, length, row, j, WIDTH, d_up)
                    store_tile(target + WIDTH, df_strides[2], at, length, row, j, WIDTH, d_down)
        if INPUTS and SOFTMAX:
            for i in range(GROUP * TILES):  # a head's queries of the same tile, then of the next ones; the next head
                h, near = i // TILES, at + (i % TILES) * C
                s = near + row
                r, ratio, q_tile, do_tile = load_query(
                    q, q_strides, do, do_strides, inverse, delta, h, near, tokens, length, first_piece, row, d, vd, DIM,
                    VALUE_DIM,
                )  # fmt: skip
                do_tile = do_tile.to(LOW)
                mask = window_mask((position + s)[:, None], keys[None, :], WINDOW, SIZE)
                logits = softmax_logits(q_tile, k_tile, mask, scale, cap, CAPPED, PRECISION)
                da = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
                peak, top = load_rows(peaks + h * tokens, s, length), load_rows(tops + h * tokens, s, length)
                pull = load_rows(pulls + h * tokens, s, length)
                a, ds = softmax_backward(
                    logits, da, peak[:, None], r[:, None], ratio[:, None], pull[:, None], t[None, :] == top[:, None],
                    scale, cap, CAPPED,
                )  # fmt: skip
                grad_v = tl.dot(tl.trans((a * r[:, None]).to(LOW)), do_tile, grad_v, input_precision=PRECISION)
                grad_k = tl.dot(tl.trans(ds.to(LOW)), q_tile.to(LOW), grad_k, input_precision=PRECISION)
        if INPUTS and SINKS_HERE:
            begin_walk, end_walk = tl.load(sequences + sequence * 6 + 4), tl.load(sequences + sequence * 6 + 5)
            is_sink = (row < SINKS)[:, None]
            count = tl.where(tile == 0, end_walk - begin_walk, 0) * GROUP
            for i in range(count):
                part = (piece * parts + begin_walk + i // GROUP) * heads + first_head + i % GROUP
                grad_k += tl.load(
                    d_sink_k + part.to(tl.int64) * SINKS * DIM + row[:, None] * DIM + d[None, :],
                    mask=is_sink & (d < DIM)[None, :], other=0.0,
                )  # fmt: skip
                part = (begin_walk + i // GROUP) * heads + first_head + i % GROUP
                grad_v += tl.load(
                    d_sink_v + part.to(tl.int64) * SINKS * VALUE_DIM + row[:, None] * VALUE_DIM + vd[None, :],
                    mask=is_sink & (vd < VALUE_DIM)[None, :], other=0.0,
                )  # fmt: skip
        if INPUTS:
            store_tile(dk, dk_strides[2], at, length, row, d, DIM, grad_k)
            store_tile(dv, dv_strides[2], at, length, row, vd, VALUE_DIM, grad_v)


@triton.jit
def load_query(
    q, q_strides, do, do_strides, inverse, delta, head, at, tokens, length, first_piece, row, d, vd,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """For a tile of queries of the group's head ``head``: 1 / d_n, δ_n / d_n, q and dy."""
    h = tl.cast(head, tl.int64)
    r = load_rows(inverse + h * tokens, at + row, length)
    ratio = load_rows(delta + h * tokens, at + row, length) * r * first_piece
    q_tile = load_tile(q + h * q_strides[1], q_strides[2], at, length, row, d, DIM)
    do_tile = load_tile(do + h * do_strides[1], do_strides[2], at, length, row, vd, VALUE_DIM)
    return r, ratio, q_tile, do_tile


@triton.jit
def weight_kernel(
    x, x_strides, dy, dy_strides, d_weight, walks, sequences, positions, x_group, table, table_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Gradient of a feature map's weight, Σ x_nᵀ dy_n, from the tokens of one walk: (walks, maps, f, D) fp32. TURN: the
    map sees x turned back by ``table``."""
    walk, head = tl.program_id(0), tl.program_id(1)
    _, begin, end, batch, first, length, _, _ = walk_bounds(walks, sequences, positions, walk)
    x = head_pointer(x, x_strides, batch, head // x_group, first)
    dy = head_pointer(dy, dy_strides, batch, head, first)
    row, d, j = tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    d_weight += (walk * tl.num_programs(1) + head).to(tl.int64) * WIDTH * DIM
    if TURN:
        p = tl.arange(0, BLOCK_P)
        table = table_pointer(table, table_stride, batch, first, DIM)
        total_a, total_b = tl.zeros((BLOCK_F, BLOCK_P), tl.float32), tl.zeros((BLOCK_F, BLOCK_P), tl.float32)
        for tile in range(begin, end):
            at = tile * C
            u_a, u_b = turned_back(x, x_strides[2], table, at, length, row, p, DIM)
            dy_tile = tl.trans(load_tile(dy, dy_strides[2], at, length, row, j, WIDTH).to(LOW))
            total_a = tl.dot(dy_tile, u_a.to(LOW), total_a, input_precision=PRECISION)
            total_b = tl.dot(dy_tile, u_b.to(LOW), total_b, input_precision=PRECISION)
        store_half(d_weight, j, p, DIM, WIDTH, total_a)
        store_half(d_weight + DIM // 2, j, p, DIM, WIDTH, total_b)
    else:
        total = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
        for tile in range(begin, end):
            at = tile * C
            x_tile = load_tile(x, x_strides[2], at, length, row, d, DIM).to(LOW)
            dy_tile = load_tile(dy, dy_strides[2], at, length, row, j, WIDTH).to(LOW)
            total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision=PRECISION)
        store_matrix(d_weight, j, d, WIDTH, DIM, total)
