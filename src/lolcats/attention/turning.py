"""RoPE as a value, for feature maps that see queries and keys before it.

Most paths take q and k with their values before RoPE beside them (``AttentionSpec.unrotated``). With a ``Turning`` they
stay narrow, and the kernels turn them back on chip wherever a map needs it.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turning:
    """What turns q and k back, where RoPE turned channels i and i + D/2 of each head by the same angle.

    table: (B or 1, T, D) without gradient, contiguous, c / (c² + s²) of each pair and then s / (c² + s²).
    """

    table: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Turning:
        """For q and k of this dtype, from cos and sin (B or 1, T, D), of which the first half of the columns counts.

        The table has fp32, or for bf16 fp16, whose rounding errors are an eighth of those of q and k.
        """
        dtype = torch.float16 if dtype == torch.bfloat16 else torch.float32
        halves = inverse_rotation(*(x[..., : x.shape[-1] // 2].float() for x in (cos, sin)))
        return cls(torch.cat(halves, -1).to(dtype))

    def beside(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, 2D) and k (B, G, T, 2D) with their values before RoPE beside them."""
        from lolcats.attention.kernels.unrotate import RotaryForm, append_unrotated

        cos, sin = (torch.cat([x, x], -1) for x in inverse_rotation(*self.table.float().chunk(2, -1)))
        return append_unrotated(q, k, cos, sin, RotaryForm(interleaved=False, first_half=False))

    def of_rows(self, batch: int) -> Tensor:
        """The table as (B, 1, T, D), to be laid out as q and k are."""
        return self.table[:, None].expand(batch, -1, -1, -1)

    @classmethod
    def laid_out(cls, table: Tensor) -> Turning:
        """From what :meth:`of_rows` gave, laid out."""
        return cls(table[:, 0].contiguous())


def inverse_rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation that undoes this one, a scale of both included; 0 for tokens that are padding, with 0 in both."""
    size = (cos.square() + sin.square()).clamp_min(1e-20)
    return cos / size, sin / size
