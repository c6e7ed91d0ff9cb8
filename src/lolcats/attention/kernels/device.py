"""Building blocks of the kernels: tiles, feature maps, masks, logits. Device functions only.

Sequences are cut into tiles of C tokens, counted from their own first token. Row-wise quantities of a tile are 1-D
tensors of length C. Positions n, i count from the beginning of the text; tokens t count from the first token of the
call, whose position is ``position``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-12)  # lolcats.attention.feature_maps.EPS


@triton.constexpr_function
def divides(block, size):
    """Whether ``block`` divides ``size``, so that blocks need no mask."""
    return size % block == 0


@triton.jit
def head_pointer(x, strides, batch, head, first):
    """Where the tokens of one head of one sequence begin in a (batch, head, token, dim) tensor."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + first.to(tl.int64) * strides[2]


@triton.jit
def walk_bounds(walks, sequences, positions, walk):
    """For a walk: its sequence, first tile (or step) and the one after the last; for that sequence: batch index, first
    token, length, first entry among the states and position of the first token."""
    sequence = tl.load(walks + walk * 3)
    begin, end = tl.load(walks + walk * 3 + 1), tl.load(walks + walk * 3 + 2)
    row = sequences + sequence * 6
    batch, first, length, entry = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return sequence, begin, end, batch, first, length, entry, tl.load(positions + sequence)


@triton.jit
def input_pointers(
    q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head, map_head
):  # fmt: skip
    """Where one query head's sequence begins in q, k, v, and in φ(q) and φ(k) or what they are computed from."""
    q, fq = head_pointer(q, q_strides, batch, head, first), head_pointer(fq, fq_strides, batch, head, first)
    k, v = head_pointer(k, k_strides, batch, kv_head, first), head_pointer(v, v_strides, batch, kv_head, first)
    return q, k, v, fq, head_pointer(fk, fk_strides, batch, map_head, first)


@triton.jit
def row_offset(batch, head, first, heads, tokens):
    """Where a head of a sequence begins in a contiguous (batch, heads, tokens) tensor of row-wise quantities."""
    return (batch.to(tl.int64) * heads + head) * tokens + first


@triton.jit
def load_tile(base, stride, at, length, row, column, WIDTH: tl.constexpr):
    """Tokens ``at + row`` × columns of a (token, dim) matrix; zeros outside [0, length) and [0, WIDTH)."""
    mask = ((at + row >= 0) & (at + row < length))[:, None]
    if not divides(column.shape[0], WIDTH):
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + at.to(tl.int64) * stride + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(base, stride, at, length, row, column, WIDTH: tl.constexpr, x):
    mask = ((at + row >= 0) & (at + row < length))[:, None]
    if not divides(column.shape[0], WIDTH):
        mask = mask & (column < WIDTH)[None, :]
    x = x.to(base.dtype.element_ty)
    tl.store(base + at.to(tl.int64) * stride + (row[:, None] * stride + column[None, :]), x, mask=mask)


@triton.jit
def lost_bits(x):
    """What rounding fp32 ``x`` to bf16 loses, as int8: the difference of the bits, without the last nine."""
    rounded = x.to(tl.bfloat16).to(tl.float32)
    return ((x.to(tl.int32, bitcast=True) - rounded.to(tl.int32, bitcast=True)) >> 9).to(tl.int8)


@triton.jit
def with_lost_bits(x, lost):
    """fp32 of a bf16 tile and its ``lost_bits``."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) + (lost.to(tl.int32) << 9)).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(base, t, length):
    """A row-wise quantity at tokens ``t``; zeros outside [0, length)."""
    return tl.load(base + t, mask=(t >= 0) & (t < length), other=0)


@triton.jit
def load_matrix(base, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part of a contiguous (ROWS, COLUMNS) matrix; zeros outside."""
    x = base + row[:, None] * COLUMNS + column[None, :]
    if divides(row.shape[0], ROWS) and divides(column.shape[0], COLUMNS):
        return tl.load(x)
    else:
        return tl.load(x, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_matrix(base, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, x):
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(base + row[:, None] * COLUMNS + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(weight, head, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One head's weight (D, f) of the feature maps."""
    return load_matrix(weight + head.to(tl.int64) * DIM * WIDTH, d, j, DIM, WIDTH)


@triton.jit
def load_parts(weight, head, d, j, DIM: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The weight as a tuple of parts whose products with x, of type DTYPE, add up: for 16-bit x an fp32 weight is its
    rounding and the remainder, as in :mod:`.projection`."""
    return parts_of(load_weight(weight, head, d, j, DIM, WIDTH), DTYPE)


@triton.jit
def parts_of(w, DTYPE: tl.constexpr):
    if w.dtype == tl.float32 and tl.float32 != DTYPE:
        high = w.to(DTYPE)
        return high, (w - high.to(tl.float32)).to(DTYPE)
    else:
        return (w,)


@triton.jit
def load_sinks(
    base, strides, sequence, batch, first, length, head, sink, column,
    WIDTH: tl.constexpr, SINKS: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    """One head's keys or values of a sequence's sinks: its first tokens, or those of the context if there is one."""
    if CONTEXT:
        base, length = head_pointer(base, strides, sequence, head, first * 0), SINKS
    else:
        base = head_pointer(base, strides, batch, head, first)
    return load_tile(base, strides[2], first * 0, tl.minimum(length, SINKS), sink, column, WIDTH)


@triton.jit
def hedgehog(y, weight, column, WIDTH: tl.constexpr):
    """softmax(y) and softmax(−y) over the WIDTH real columns, at least EPS, times the row's ``weight``; other columns
    0. (C, f) fp32 each."""
    if divides(column.shape[0], WIDTH):
        up = tl.exp2(y * LOG2E - tl.max(y, 1)[:, None] * LOG2E)
        down = tl.exp2(tl.min(y, 1)[:, None] * LOG2E - y * LOG2E)
    else:
        real = (column < WIDTH)[None, :]
        high, low = tl.max(tl.where(real, y, -float("inf")), 1), tl.min(tl.where(real, y, float("inf")), 1)
        up = tl.where(real, tl.exp2((y - high[:, None]) * LOG2E), 0.0)
        down = tl.where(real, tl.exp2((low[:, None] - y) * LOG2E), 0.0)
    least = weight[:, None] * EPS
    up = tl.maximum(up * (weight / tl.sum(up, 1))[:, None], least)
    down = tl.maximum(down * (weight / tl.sum(down, 1))[:, None], least)
    if divides(column.shape[0], WIDTH):
        return up, down
    else:
        return tl.where(real, up, 0.0), tl.where(real, down, 0.0)


@triton.jit
def hedgehog_backward(up, down, d_up, d_down):
    """Gradient of y from those of softmax(y) and softmax(−y)."""
    d_y = up * (d_up - tl.sum(up * d_up, 1)[:, None])
    return d_y - down * (d_down - tl.sum(down * d_down, 1)[:, None])


@triton.jit
def features(
    x, w, base, stride, at, length, row, weight, column,
    WIDTH: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of φ times the row's ``weight``, (C, f) fp32 each; see ``layout.Phi``. w: (D, f), for maps computed
    inside (seen: its ``load_parts``; turned: those of both halves, as x is two halves); ``base``: where x·W (projected)
    or φ (given) is stored."""
    if PHI == "inside":
        return hedgehog(tl.dot(x, w, input_precision=PRECISION), weight, column, WIDTH)
    elif PHI == "seen":
        y = tl.zeros((x.shape[0], column.shape[0]), tl.float32)
        return hedgehog(add_parts(x, w, y, PRECISION), weight, column, WIDTH)
    elif PHI == "turned":
        y = tl.zeros((x[0].shape[0], column.shape[0]), tl.float32)
        y = add_parts(x[1], w[1], add_parts(x[0], w[0], y, PRECISION), PRECISION)
        return hedgehog(y, weight, column, WIDTH)
    elif PHI == "projected":
        y = load_tile(base, stride, at, length, row, column, WIDTH).to(tl.float32)
        return hedgehog(y, weight, column, WIDTH)
    else:
        up = load_tile(base, stride, at, length, row, column, WIDTH).to(tl.float32) * weight[:, None]
        down = load_tile(base + WIDTH, stride, at, length, row, column, WIDTH).to(tl.float32) * weight[:, None]
        return up, down


@triton.jit
def add_parts(x, w, y, PRECISION: tl.constexpr):
    """y + x·W for the ``parts_of`` W."""
    if len(w) == 2:
        y = tl.dot(x, w[1], y, input_precision=PRECISION)
    return tl.dot(x, w[0], y, input_precision=PRECISION)


@triton.jit
def window_start(n, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """``AttentionSpec.window_start``."""
    if WINDOW == "none":
        return n + 1
    elif WINDOW == "terraced":
        return (n // SIZE - 1) * SIZE
    else:
        return n - SIZE + 1


@triton.jit
def window_end(i, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """First query whose window no longer reaches the key at position i."""
    if WINDOW == "none":
        return i
    elif WINDOW == "terraced":
        return (i // SIZE + 2) * SIZE
    else:
        return i + SIZE


@triton.jit
def key_positions(t, length, position, SINKS: tl.constexpr):
    """Positions of the keys at tokens ``t``; far below any window if the token does not exist or is a sink."""
    return tl.where((t >= 0) & (t < length) & (position + t >= SINKS), position + t, -(1 << 30))


@triton.jit
def window_mask(n, i, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Which keys each query sees through softmax: start <= i <= n. n, i: positions, as a row and a column or the other
    way round; i from ``key_positions``."""
    start = window_start(n, WINDOW, SIZE)
    return (i - start).to(tl.uint32, bitcast=True) <= (n - start).to(tl.uint32, bitcast=True)


@triton.jit
def linear_mask(n, i, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Which keys are older than the window of each query."""
    return (i < window_start(n, WINDOW, SIZE)) & (i >= 0)


@triton.jit
def sinks_mask(n, sink, SINKS: tl.constexpr):
    """Which sinks each query sees: those up to its own position. n, sink: a row and a column."""
    return (sink <= n) & (sink < SINKS)


@triton.jit
def softmax_logits(q, k, mask, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """q·kᵀ, or with a cap cap · tanh(scale·q·kᵀ / cap); −inf outside the mask. Times ``log2_scale`` these are the
    logits in base 2."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits * scale / cap) - 1)
    return tl.where(mask, logits, -float("inf"))


@triton.jit
def log2_scale(scale, CAPPED: tl.constexpr):
    return LOG2E if CAPPED else scale * LOG2E


@triton.jit
def softmax_backward(logits, da, peak, r, h, pull, is_top, scale, cap, CAPPED: tl.constexpr):
    """Weights a = γ·exp(s − c) and the gradient of q·kᵀ.

    logits: from ``softmax_logits``; da: dy·v. For each query, along rows or columns: ``peak`` is c in base 2 including
    γ, r = 1 / d, h = δ / d, ``pull`` is r_n. ``is_top``: whether c comes from this key.
    """
    a = tl.exp2(logits * log2_scale(scale, CAPPED) - peak)
    ds = a * (da * r - h) - tl.where(is_top, pull, 0.0)
    if CAPPED:
        ds = tl.where(logits > -float("inf"), ds * (1 - (logits / cap) * (logits / cap)), 0.0)
    return a, ds * scale
