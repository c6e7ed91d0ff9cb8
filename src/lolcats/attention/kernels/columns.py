"""The columns of a matrix as three matrices of their own: queries, keys and values out of one product."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def columns_kernel(x, first, second, third, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """x: (rows, A + B + C); first, second, third: (rows, A), (rows, B), (rows, C)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + row * (A + B + C) + column, mask=column < A + B + C)
    tl.store(first + row * A + column, y, mask=column < A)
    tl.store(second + row * B + (column - A), y, mask=(column >= A) & (column < A + B))
    tl.store(third + row * C + (column - A - B), y, mask=(column >= A + B) & (column < A + B + C))


def columns(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Three contiguous tensors (..., size) out of ``x`` (..., all sizes together), which is contiguous, too."""
    parts = [x.new_empty(*x.shape[:-1], size) for size in sizes]
    first, second, third = sizes
    columns_kernel[x[..., 0].numel(), triton.cdiv(x.shape[-1], BLOCK)](
        x, *parts, A=first, B=second, C=third, BLOCK=BLOCK, num_warps=4
    )
    return parts
