"""What the kernels are made of: tiles, feature maps, masks, logits. Device functions only.

Sequences are cut into tiles of C tokens, counted from their own first token; C is so large that the window of a query
never reaches beyond the tile before its own. Row-wise quantities of a tile are 1-D tensors of length C. Positions n, i
count from the beginning of the text; tokens t from the first token at hand, which stands at ``position``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-12)  # lolcats.attention.feature_maps.EPS


@triton.jit
def head_pointer(x, strides, batch, head, first):
    """Where the tokens of one head of one sequence begin in a (batch, head, token, dim) tensor."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + first.to(tl.int64) * strides[2]


@triton.jit
def walk_bounds(walks, sequences, positions, walk):
    """Of a walk: its sequence, first tile (or step) and the one after the last; of the sequence: batch index, first
    token, length, first entry among the states and position of the first token."""
    sequence = tl.load(walks + walk * 3)
    begin, end = tl.load(walks + walk * 3 + 1), tl.load(walks + walk * 3 + 2)
    row = sequences + sequence * 4
    batch, first, length, entry = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return sequence, begin, end, batch, first, length, entry, tl.load(positions + sequence)


@triton.jit
def input_pointers(
    q, q_strides, k, k_strides, v, v_strides, fq, fq_strides, fk, fk_strides, batch, first, head, kv_head, map_head
):  # fmt: skip
    """Where one query head's sequence begins in q, k, v, φ(q) and φ(k)."""
    q, fq = head_pointer(q, q_strides, batch, head, first), head_pointer(fq, fq_strides, batch, head, first)
    k, v = head_pointer(k, k_strides, batch, kv_head, first), head_pointer(v, v_strides, batch, kv_head, first)
    return q, k, v, fq, head_pointer(fk, fk_strides, batch, map_head, first)


@triton.jit
def row_offset(batch, head, first, heads, tokens):
    """Where a head of a sequence begins in a contiguous (batch, heads, tokens) tensor of row-wise quantities."""
    return (batch.to(tl.int64) * heads + head) * tokens + first


@triton.jit
def load_tile(base, stride, t, length, column, width):
    """Tokens ``t`` × columns of a (token, dim) matrix; zeros outside [0, length) and [0, width)."""
    mask = ((t >= 0) & (t < length))[:, None] & (column < width)[None, :]
    return tl.load(base + t[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, stride, t, length, column, width, x):
    mask = ((t >= 0) & (t < length))[:, None] & (column < width)[None, :]
    tl.store(base + t[:, None].to(tl.int64) * stride + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(base, t, length):
    """A row-wise quantity at tokens ``t``; zeros outside [0, length)."""
    return tl.load(base + t, mask=(t >= 0) & (t < length), other=0)


@triton.jit
def matrix(row, column, rows, columns):
    """Offsets into a contiguous (rows, columns) matrix, and which of them exist."""
    return row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_weight(weight, head, d, j, dim, width):
    """One head's (D, f) of the feature maps' weights, fp32."""
    offsets, exists = matrix(d, j, dim, width)
    return tl.load(weight + head.to(tl.int64) * dim * width + offsets, mask=exists, other=0.0)


@triton.jit
def store_weight(weight, head, d, j, dim, width, x):
    offsets, exists = matrix(d, j, dim, width)
    tl.store(weight + head.to(tl.int64) * dim * width + offsets, x, mask=exists)


@triton.jit
def load_sinks(base, sequence, head, heads, sink, column, width, SINKS: tl.constexpr):
    """One head's keys or values of a sequence's sinks, from (sequences, heads, SINKS, width)."""
    return load_tile(base + (sequence * heads + head).to(tl.int64) * SINKS * width, width, sink, SINKS, column, width)


@triton.jit
def hedgehog(y, column, width):
    """softmax(y) and softmax(−y) over the ``width`` real columns, at least EPS; other columns 0. (C, f) fp32 each."""
    y = y * LOG2E
    real = (column < width)[None, :]
    up = tl.where(real, y, -float("inf"))
    down = tl.where(real, -y, -float("inf"))
    up = tl.exp2(up - tl.max(up, 1)[:, None])
    down = tl.exp2(down - tl.max(down, 1)[:, None])
    up = up * (1 / tl.sum(up, 1))[:, None]
    down = down * (1 / tl.sum(down, 1))[:, None]
    return tl.where(real, tl.maximum(up, EPS), 0.0), tl.where(real, tl.maximum(down, EPS), 0.0)


@triton.jit
def hedgehog_backward(up, down, d_up, d_down):
    """Gradient of y from those of softmax(y) and softmax(−y)."""
    d_y = up * (d_up - tl.sum(up * d_up, 1)[:, None])
    return d_y - down * (d_down - tl.sum(down * d_down, 1)[:, None])


@triton.jit
def features(x, weight, base, stride, t, length, column, width, FUSED: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves of φ, (C, f) fp32 each: of the tile x by ``weight`` (D, f), or read from ``base``."""
    if FUSED:
        return hedgehog(tl.dot(x, weight, input_precision=PRECISION), column, width)
    else:
        up = load_tile(base, stride, t, length, column, width).to(tl.float32)
        down = load_tile(base + width, stride, t, length, column, width).to(tl.float32)
        return up, down


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
    """Positions of the keys at tokens ``t``; far below any window where there is none or it is a sink."""
    return tl.where((t >= 0) & (t < length) & (position + t >= SINKS), position + t, -(1 << 30))


@triton.jit
def own_mask(n, i, WINDOW: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Which keys of its own tile each query sees through softmax. n, i: positions, as a row and a column or the
    other way round; i from ``key_positions``."""
    if C > SIZE:
        return (i <= n) & (i >= 0) & (i >= window_start(n, WINDOW, SIZE))
    else:
        return (i <= n) & (i >= 0)


@triton.jit
def previous_mask(n, i, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Which keys of the tile before its own each query sees through softmax."""
    return (i >= window_start(n, WINDOW, SIZE)) & (i >= 0)


@triton.jit
def linear_mask(n, i, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Which keys are older than the window of each query."""
    return (i < window_start(n, WINDOW, SIZE)) & (i >= 0)


@triton.jit
def sinks_mask(n, sink, SINKS: tl.constexpr):
    """Which sinks each query sees: those that are not ahead of it."""
    return (sink[None, :] <= n[:, None]) & (sink < SINKS)[None, :]


@triton.jit
def softmax_logits(q, k, mask, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """scale·q·kᵀ, capped (cap · tanh(logits / cap)); and the same in base 2, −inf outside the mask."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)
    return logits, tl.where(mask, logits * LOG2E, -float("inf"))


@triton.jit
def softmax_logits_backward(d_logits, logits, scale, cap, CAPPED: tl.constexpr):
    """Gradient of q·kᵀ from that of ``softmax_logits``."""
    if CAPPED:
        d_logits *= 1 - (logits / cap) * (logits / cap)
    return d_logits * scale
