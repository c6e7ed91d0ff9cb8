"""Queries and keys with their values before RoPE appended, for both in one launch.

A program takes one token with all its heads, so that its cosines and sines are read once. RoPE turns pairs of channels:
u before RoPE became x_a = c_a·u_a − s_a·u_b, x_b = c_b·u_b + s_b·u_a. Turning back by c / (c² + s²) and
s / (c² + s²) also undoes a scale of both (YaRN).

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, R channels that RoPE turns, the first of D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lolcats.attention.kernels.launcher import MOST, kind_of, launch
from lolcats.attention.kernels.layout import power_of_two

_compiled: dict[Any, Any] = {}


@dataclass(frozen=True)
class RotaryForm:
    """How a family's RoPE turns R channels. interleaved: pairs are channels 2i and 2i + 1, not i and i + R / 2.
    first_half: both channels of pair i use column i of cos and sin, not each its own."""

    interleaved: bool
    first_half: bool


def append_unrotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm) -> tuple[Tensor, Tensor]:
    """q (B, H, T, 2D) and k (B, G, T, 2D) from q (B, H, T, D) and k (B, G, T, D) after RoPE by cos and sin (B or 1, T,
    R). Computed in fp32, differentiable in q and k."""
    return _Append.apply(q, k, cos, sin, form)  # type: ignore[no-any-return, no-untyped-call]


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = [_empty_like(x, 2 * x.shape[3]) for x in (q, k)]
        _launch([q, k], wide, cos, sin, form, back=False)
        ctx.save_for_backward(cos, sin)
        ctx.form = form
        return wide[0], wide[1]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *wide: Tensor) -> tuple[Tensor | None, ...]:
        narrow = [_empty_like(x, x.shape[3] // 2) for x in wide]
        cos, sin = ctx.saved_tensors
        _launch(narrow, list(wide), cos, sin, ctx.form, back=True)
        return narrow[0], narrow[1], None, None, None


def _empty_like(x: Tensor, channels: int) -> Tensor:
    """(B, heads, T, channels), stored token by token as projections leave their outputs."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def _launch(
    narrow: list[Tensor], wide: list[Tensor], cos: Tensor, sin: Tensor, form: RotaryForm, back: bool
) -> None:  # fmt: skip
    """Write ``wide`` from ``narrow``, or with ``back`` the gradients ``narrow`` from the gradients ``wide``."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (*narrow, *wide, cos, sin)]
    batch, heads, tokens, dim = narrow[0].shape
    args = [part for x in tensors for part in (x, _strides(x))]
    grid, key = (tokens, batch, 1), (form, back, *map(kind_of, tensors))
    kv_heads, pairs, rest = narrow[1].shape[1], cos.shape[2] // 2, dim - cos.shape[2]

    def constants() -> dict[str, Any]:
        return {
            "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "PAIRS": pairs, "INTERLEAVED": form.interleaved,
            "FIRST_HALF": form.first_half, "BACK": back, "BLOCK_H": power_of_two(heads),
            "BLOCK_G": power_of_two(kv_heads), "BLOCK_P": power_of_two(pairs), "BLOCK_R": power_of_two(rest),
            "num_warps": 4,
        }  # fmt: skip

    if len(_compiled) >= MOST and key not in _compiled:
        _compiled.clear()
    launch(_compiled, key, unrotate_kernel, grid, args, constants)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head and token; of cos and sin (B or 1, T, R), of batch and token."""
    batch, *rest, _ = x.stride()
    return 0 if x.shape[0] == 1 else batch, *rest


@triton.jit
def unrotate_kernel(
    q, q_strides, k, k_strides, wide_q, wide_q_strides, wide_k, wide_k_strides, cos, cos_strides, sin, sin_strides,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    FIRST_HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One token. q, k: (B, heads, T, DIM); wide: (B, heads, T, 2 · DIM). BACK: these are gradients, and q and k are
    written."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    if INTERLEAVED:
        a, b = 2 * pair, 2 * pair + 1
    else:
        a, b = pair, pair + PAIRS
    cos += batch * cos_strides[0] + token * cos_strides[1]
    sin += batch * sin_strides[0] + token * sin_strides[1]
    cos_a, sin_a = inverse_rotation(cos, sin, pair if FIRST_HALF else a, pair < PAIRS)
    cos_b, sin_b = inverse_rotation(cos, sin, pair if FIRST_HALF else b, pair < PAIRS)
    rotation = cos_a, sin_a, cos_b, sin_b
    turn_heads(
        q, q_strides, wide_q, wide_q_strides, batch, token, a, b, rotation, HEADS, DIM, PAIRS, BACK, BLOCK_H, BLOCK_R
    )
    turn_heads(
        k, k_strides, wide_k, wide_k_strides, batch, token, a, b, rotation, KV_HEADS, DIM, PAIRS, BACK, BLOCK_G, BLOCK_R
    )


@triton.jit
def inverse_rotation(cos, sin, column, mask):
    """c / (c² + s²) and s / (c² + s²) as rows."""
    c = tl.load(cos + column, mask=mask, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    size = tl.maximum(c * c + s * s, 1e-20)  # 0 for padding in a laid-out table
    return c / size, s / size


@triton.jit
def turn_heads(
    narrow, narrow_strides, wide, wide_strides, batch, token, a, b, rotation,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All heads of one token, channels ``a`` and ``b`` of each pair and those that RoPE leaves."""
    cos_a, sin_a, cos_b, sin_b = rotation
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    narrow += batch * narrow_strides[0] + token * narrow_strides[2] + head * narrow_strides[1]
    wide += batch * wide_strides[0] + token * wide_strides[2] + head * wide_strides[1]
    mask = (head < HEADS) & (tl.arange(0, a.shape[0]) < PAIRS)[None, :]
    a, b = a[None, :], b[None, :]
    if BACK:
        u_a = tl.load(wide + DIM + a, mask=mask, other=0.0).to(tl.float32)
        u_b = tl.load(wide + DIM + b, mask=mask, other=0.0).to(tl.float32)
        x_a = tl.load(wide + a, mask=mask, other=0.0).to(tl.float32)
        x_b = tl.load(wide + b, mask=mask, other=0.0).to(tl.float32)
        tl.store(narrow + a, (x_a + cos_a * u_a - sin_b * u_b).to(narrow.dtype.element_ty), mask=mask)
        tl.store(narrow + b, (x_b + cos_b * u_b + sin_a * u_a).to(narrow.dtype.element_ty), mask=mask)
    else:
        x_a, x_b = tl.load(narrow + a, mask=mask, other=0.0), tl.load(narrow + b, mask=mask, other=0.0)
        tl.store(wide + a, x_a, mask=mask)
        tl.store(wide + b, x_b, mask=mask)
        x_a, x_b = x_a.to(tl.float32), x_b.to(tl.float32)
        tl.store(wide + DIM + a, (cos_a * x_a + sin_a * x_b).to(wide.dtype.element_ty), mask=mask)
        tl.store(wide + DIM + b, (cos_b * x_b - sin_b * x_a).to(wide.dtype.element_ty), mask=mask)
    if 2 * PAIRS < DIM:
        rest = (2 * PAIRS + tl.arange(0, BLOCK_R))[None, :]
        mask = (head < HEADS) & (rest < DIM)
        if BACK:
            x = tl.load(wide + rest, mask=mask, other=0.0).to(tl.float32)
            x += tl.load(wide + DIM + rest, mask=mask, other=0.0).to(tl.float32)
            tl.store(narrow + rest, x.to(narrow.dtype.element_ty), mask=mask)
        else:
            x = tl.load(narrow + rest, mask=mask, other=0.0)
            tl.store(wide + rest, x, mask=mask)
            tl.store(wide + DIM + rest, x, mask=mask)
