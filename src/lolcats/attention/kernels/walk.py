"""Forward kernel that carries S and z from tile to tile, so that they are written once per stretch instead of once per
step.

A stretch is the tiles that one program walks through. Stretches of one sequence start from the sums of all keys before
them: ``state_kernel`` computes the sums of each stretch's keys and ``scan_kernel`` adds them up. A sequence that is one
stretch needs neither. With shared key maps a program can take several query heads of a group. Their rows stand one
below the other in a tile, and they share keys, values and S.

A tile of C queries at token ``at`` reads the keys of [at − LAG, at + C) in blocks of KEYS. S holds all keys before
them. Keys of these blocks that are older than a query's window, all before at + NEAR_END, reach it by a product of
features. At the end of a tile the first C of these keys enter S. See ``layout.walk_lag``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.device import (
    append,
    features,
    head_pointer,
    hedgehog,
    input_pointers,
    key_positions,
    linear_mask,
    load_heads,
    load_matrix,
    load_parts,
    load_sinks,
    load_tile,
    load_weight,
    log2_scale,
    lost_bits,
    parts_product,
    row_offset,
    sinks_mask,
    softmax_logits,
    store_heads,
    walk_bounds,
    window_mask,
)
from lolcats.attention.kernels.launcher import Launcher
from lolcats.attention.kernels.layout import Layout, Stretches
from lolcats.attention.kernels.states import scan_kernel, state_kernel, total_size

SCANNED = 512  # numbers of a state that a program of ``scan_kernel`` adds up


@dataclass(frozen=True)
class WalkArguments:
    """A call as its kernels take it, made by ``function.Problem``; tensors are followed by their strides.

    initial: the packed states that sequences start from, if not zero; inputs: q, k and v; features: what φ(q) and φ(k)
    are computed from; weights: those of both maps, and γ.
    """

    launcher: Launcher
    layout: Layout
    initial: Tensor | None
    inputs: tuple[Any, ...]
    features: tuple[Any, ...]
    weights: tuple[Tensor | None, Tensor | None, Tensor]
    sinks: tuple[Any, ...]
    tables: tuple[Tensor, Tensor]
    sizes: tuple[Any, ...]
    sink_constants: dict[str, Any]


def run_walk(call: WalkArguments, o: Tensor, lost: Tensor | None, softmax: tuple[Tensor | None, ...]) -> None:
    """Write the outputs of a call, their lost bits and each query's softmax values."""
    launcher, walk, stretches = call.launcher, call.launcher.walk, call.layout.stretches
    assert walk is not None
    assert stretches is not None
    starts = stretch_starts(call, stretches)
    inverse, peaks, _ = softmax
    args = (
        *constant_heads(call.inputs), *constant_heads(launcher.strided("o", o)), lost, *constant_heads(call.features),
        *call.weights, *call.sinks, *(o if x is None else x for x in softmax), starts, stretches.tiles, *call.tables,
        *call.sizes, stretches.parts if stretches.split else 1,
    )  # fmt: skip
    grid = stretches.tiles.shape[0], launcher.heads // walk.heads, launcher.launch("walk").pieces
    launcher.run(
        walk_kernel, "walk", grid, args, SAVE=inverse is not None, LOST=lost is not None, PEAKS=peaks is not None,
        HAS_STARTS=starts is not None, **call.sink_constants,
    )  # fmt: skip


def constant_heads(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors and strides with the strides of heads compiled in, so that addresses of several heads take no more
    registers than those of one."""
    return tuple((x[0], tl.constexpr(x[1]), *x[2:]) if isinstance(x, tuple) else x for x in arguments)


def stretch_starts(call: WalkArguments, stretches: Stretches) -> Tensor | None:
    """(stretches · parts, maps, 2f · (Dv + 1)) fp32: S and z before each part of a stretch; None if they are zero."""
    launcher, initial = call.launcher, call.initial
    if not stretches.split:
        return None if initial is None else initial[stretches.tiles[:, 0].long()]
    maps, size, count = launcher.maps, 2 * launcher.width * (launcher.value_dim + 1), stretches.keys.shape[0]
    (_, wk, gamma), k, v, fk = call.weights, call.inputs[2:4], call.inputs[4:], call.features[2:]
    starts = gamma.new_empty(count, maps, size)
    args = (
        *(fk if launcher.walk_phi == "seen" else k), *v, *fk, wk, gamma, gamma, None, starts, starts, starts,
        stretches.keys, *call.tables, launcher.heads, maps // launcher.kv_heads, launcher.tokens,
    )  # fmt: skip
    launcher.run(
        state_kernel, "totals", (count, maps, launcher.launch("state").pieces), args, HEADS=1, BACKWARD=False,
        STORE=False, CENTER=False, HAS_STARTS=False, HAS_TOTALS=True,
    )  # fmt: skip
    scan_kernel[(len(call.layout.rows), maps, triton.cdiv(size, SCANNED))](
        starts, initial, stretches.ranges, size, HAS_INITIAL=initial is not None, REVERSE=False, BLOCK=SCANNED, BATCH=8
    )
    return starts


@triton.jit(do_not_specialize=["parts"])
def walk_kernel(
    q, q_strides, k, k_strides, v, v_strides, o, o_strides, lost, fq, fq_strides, fk, fk_strides, weight_q, weight_k,
    gamma, sink_k, sink_k_strides, sink_v, sink_v_strides, inverse, peaks, tops, starts, stretches, sequences,
    positions, heads, group, map_group, tokens, scale, cap, parts,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, PHI: tl.constexpr, SAVE: tl.constexpr,
    LOST: tl.constexpr, PEAKS: tl.constexpr, HAS_STARTS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, LAG: tl.constexpr, NEAR_END: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_SINKS: tl.constexpr,
    CONTEXT: tl.constexpr,
):  # fmt: skip
    """One stretch of HEADS query heads that share a map, for one slice of the value dim. SAVE, LOST, PEAKS: as in
    ``output_kernel``. starts: (stretches · parts, maps, ...), as in ``state_kernel``."""
    stretch, head, piece = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    sequence, begin, end, batch, first, length, _, position = walk_bounds(stretches, sequences, positions, stretch)
    kv_head, map_head = head // group, head // map_group
    q, k, v, fq, fk = input_pointers(
        q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head,
        kv_head if PHI == "seen" else map_head,
    )  # fmt: skip
    o = head_pointer(o, o_strides, batch, head, first)
    if LOST:
        lost = head_pointer(lost, o_strides, batch, head, first)
    row, d, j = tl.arange(0, HEADS * C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    vd, column = piece * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, KEYS)
    lane, token = row // C, row % C
    rows = row_offset(batch, head, first, heads, tokens) + lane.to(tl.int64) * tokens
    inverse, peaks, tops = inverse + rows, peaks + rows, tops + rows
    log_gamma, one = tl.log2(tl.load(gamma + head + lane)), tl.full((HEADS * C,), 1.0, tl.float32)
    wq = load_maps(weight_q, head, d, j, DIM, WIDTH, fq.dtype.element_ty, PHI, HEADS)
    wk = load_maps(weight_k, map_head, d, j, DIM, WIDTH, fk.dtype.element_ty, PHI, 1)[0]
    index = stretch * parts * (heads // map_group) + map_head
    S_up, z_up = load_start(starts, index, 0, j, vd, WIDTH, VALUE_DIM, HAS_STARTS)
    S_down, z_down = load_start(starts, index, 1, j, vd, WIDTH, VALUE_DIM, HAS_STARTS)
    if SOFTMAX and SINKS > 0:
        sink = tl.arange(0, BLOCK_SINKS)
        ks = load_sinks(sink_k, sink_k_strides, sequence, batch, first, length, kv_head, sink, d, DIM, SINKS, CONTEXT)
        vs = load_sinks(
            sink_v, sink_v_strides, sequence, batch, first, length, kv_head, sink, vd, VALUE_DIM, SINKS, CONTEXT
        )
    BLOCKS: tl.constexpr = (LAG + C) // KEYS
    for tile in range(begin, end):
        at = tile * C
        t = at + token
        n = position + t
        if PHI == "seen":  # before the other tiles, which take its place in shared memory
            x_tile = load_heads(fq, fq_strides, at, length, row, d, DIM, C)
            up, down = hedgehog(query_product(x_tile, wq, row, PHI, PRECISION, C, HEADS), one, j, WIDTH)
        q_tile = load_heads(q, q_strides, at, length, row, d, DIM, C)
        blocks = ()
        for block in tl.static_range(BLOCKS):  # keys and values, the oldest first; loaded early, as registers are free
            begins = at - LAG + block * KEYS
            k_tile = load_tile(k, k_strides[2], begins, length, column, d, DIM)
            v_tile = load_tile(v, v_strides[2], begins, length, column, vd, VALUE_DIM)
            blocks = append(blocks, (k_tile, v_tile))
        if PHI == "given":
            up = load_heads(fq, fq_strides, at, length, row, j, WIDTH, C).to(tl.float32)
            down = load_heads(fq + WIDTH, fq_strides, at, length, row, j, WIDTH, C).to(tl.float32)
        elif PHI == "projected":
            up, down = hedgehog(load_heads(fq, fq_strides, at, length, row, j, WIDTH, C).to(tl.float32), one, j, WIDTH)
        elif PHI == "inside":
            up, down = hedgehog(query_product(q_tile, wq, row, PHI, PRECISION, C, HEADS), one, j, WIDTH)
        denominator = tl.sum(up * z_up[None, :], 1) + tl.sum(down * z_down[None, :], 1)
        up, down = up.to(LOW), down.to(LOW)
        numerator = tl.dot(up, tl.trans(S_up.to(LOW)), input_precision=PRECISION)
        numerator = tl.dot(down, tl.trans(S_down.to(LOW)), numerator, input_precision=PRECISION)
        old = ()  # features of keys that enter S
        for block in tl.static_range(BLOCKS):
            begins = at - LAG + block * KEYS
            k_tile, v_tile = blocks[block]
            if block * KEYS - LAG < NEAR_END:
                keys = key_positions(begins + column, length, position, SINKS)
                k_up, k_down = key_features(
                    k_tile, wk, fk, fk_strides[2], begins, length, column, keys, d, j, DIM, WIDTH, PHI, PRECISION
                )
                if block * KEYS < C:
                    old = append(old, (k_up, k_down))
                a = tl.dot(up, tl.trans(k_up.to(LOW)), input_precision=PRECISION)
                a = tl.dot(down, tl.trans(k_down.to(LOW)), a, input_precision=PRECISION)
                a = tl.where(linear_mask(n[:, None], keys[None, :], WINDOW, SIZE), a, 0.0)
                denominator += tl.sum(a, 1)
                numerator = tl.dot(a.to(LOW), v_tile.to(LOW), numerator, input_precision=PRECISION)
        if SOFTMAX:
            if SINKS > 0:
                seen = sinks_mask(n[:, None], sink[None, :], SINKS)
                far = softmax_logits(q_tile, ks, seen, scale, cap, CAPPED, PRECISION)
                peak = tl.max(far, 1)
            else:
                peak = tl.full((HEADS * C,), -float("inf"), tl.float32)
            logits = ()
            for block in tl.static_range(BLOCKS):
                keys = key_positions(at - LAG + block * KEYS + column, length, position, SINKS)
                mask = window_mask(n[:, None], keys[None, :], WINDOW, SIZE)
                soft = softmax_logits(q_tile, blocks[block][0], mask, scale, cap, CAPPED, PRECISION)
                peak = tl.maximum(peak, tl.max(soft, 1))
                logits = append(logits, soft)
            factor = log2_scale(scale, CAPPED)
            shift = peak * factor - log_gamma  # γ·exp(s − max)
            if PEAKS:
                top = token * 0 + length
                if SINKS > 0:
                    top = tl.minimum(top, tl.min(tl.where(far == peak[:, None], -1 - sink[None, :], length), 1))
                for block in tl.static_range(BLOCKS):
                    here = (at - LAG + block * KEYS + column)[None, :]
                    top = tl.minimum(top, tl.min(tl.where(logits[block] == peak[:, None], here, length), 1))
                tl.store(tops + t, top, mask=(t < length) & (piece == 0))
                tl.store(peaks + t, shift, mask=(t < length) & (piece == 0))
            if SINKS > 0:
                far = tl.exp2(far * factor - shift[:, None])
                denominator += tl.sum(far, 1)
                numerator = tl.dot(far.to(vs.dtype), vs, numerator, input_precision=PRECISION)
            for block in tl.static_range(BLOCKS):
                soft = tl.exp2(logits[block] * factor - shift[:, None])
                denominator += tl.sum(soft, 1)
                v_tile = blocks[block][1]
                numerator = tl.dot(soft.to(v_tile.dtype), v_tile, numerator, input_precision=PRECISION)
        reciprocal = tl.where(denominator == 0, 1.0, 1 / denominator)
        y = numerator * reciprocal[:, None]
        store_heads(o, o_strides, at, length, row, vd, VALUE_DIM, C, y)
        if LOST:
            store_heads(lost, o_strides, at, length, row, vd, VALUE_DIM, C, lost_bits(y))
        if SAVE:
            tl.store(inverse + t, reciprocal, mask=(t < length) & (piece == 0))
        for block in tl.static_range(C // KEYS):
            begins = at - LAG + block * KEYS
            if block < len(old):
                k_up, k_down = old[block]
            else:
                keys = key_positions(begins + column, length, position, SINKS)
                k_up, k_down = key_features(
                    blocks[block][0], wk, fk, fk_strides[2], begins, length, column, keys, d, j, DIM, WIDTH, PHI,
                    PRECISION,
                )  # fmt: skip
            v_tile = tl.trans(blocks[block][1].to(LOW))
            z_up += tl.sum(k_up, 0)
            z_down += tl.sum(k_down, 0)
            S_up = tl.dot(v_tile, k_up.to(LOW), S_up, input_precision=PRECISION)
            S_down = tl.dot(v_tile, k_down.to(LOW), S_down, input_precision=PRECISION)


@triton.jit
def key_features(
    k, w, base, stride, at, length, column, keys, d, j,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of φ(k); 0 for keys that do not exist or are sinks."""
    x = load_tile(base, stride, at, length, column, d, DIM) if PHI == "seen" else k
    return features(x, w, base, stride, at, length, column, (keys >= 0).to(tl.float32), j, WIDTH, PHI, PRECISION)


@triton.jit
def load_maps(
    weight, head, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PHI: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The weights of HEADS maps, each as ``features`` takes them, as a tuple."""
    maps = ()
    for i in tl.static_range(HEADS):
        if PHI == "inside":
            maps = append(maps, load_weight(weight, head + i, d, j, DIM, WIDTH))
        elif PHI == "seen":
            maps = append(maps, load_parts(weight, head + i, d, j, DIM, WIDTH, DTYPE))
        else:
            maps = append(maps, 0)
    return maps


@triton.jit
def query_product(
    x, maps, row, PHI: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """x·W for the rows of HEADS heads, each with its own map."""
    y = map_product(x, maps[0], PHI, PRECISION)
    for i in tl.static_range(1, HEADS):
        y = tl.where((row // C == i)[:, None], map_product(x, maps[i], PHI, PRECISION), y)
    return y


@triton.jit
def map_product(x, w, PHI: tl.constexpr, PRECISION: tl.constexpr):
    if PHI == "inside":
        return tl.dot(x, w, input_precision=PRECISION)
    else:
        return parts_product(x, w, PRECISION)


@triton.jit
def load_start(
    starts, index, half, j, vd, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_STARTS: tl.constexpr
):  # fmt: skip
    """Half of Sᵀ (value slice, f) and z (f,) before a stretch; zeros without HAS_STARTS."""
    if not HAS_STARTS:
        return tl.zeros((vd.shape[0], j.shape[0]), tl.float32), tl.zeros((j.shape[0],), tl.float32)
    else:
        base = starts + index.to(tl.int64) * total_size(WIDTH, VALUE_DIM, False)
        S = load_matrix(base + half * WIDTH * VALUE_DIM, vd, j, VALUE_DIM, WIDTH)
        return S, tl.load(base + 2 * WIDTH * VALUE_DIM + half * WIDTH + j, mask=j < WIDTH, other=0.0)
