"""RoPE as a value, for feature maps that see queries and keys before it.

Most paths take q and k with their values before RoPE beside them (``AttentionSpec.unrotated``). With a ``Turning`` they
stay narrow, and the kernels turn them back on chip wherever a map needs it.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Turning:
    """How RoPE turned q and k: channels i and i + D/2 of each head by columns i and i + D/2 of cos and sin.

    cos, sin: (B or 1, T, D), any float dtype, without gradient.
    """

    cos: Tensor
    sin: Tensor

    def beside(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, 2D) and k (B, G, T, 2D) with their values before RoPE beside them."""
        from lolcats.attention.kernels.unrotate import RotaryForm, append_unrotated

        return append_unrotated(q, k, self.cos, self.sin, RotaryForm(interleaved=False, first_half=False))

    def of_rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """cos and sin as (B, 1, T, D), to be laid out as q and k are."""
        cos, sin = (x[:, None].expand(batch, -1, -1, -1) for x in (self.cos, self.sin))
        return cos, sin

    @classmethod
    def laid_out(cls, cos: Tensor, sin: Tensor) -> Turning:
        """From what :meth:`of_rows` gave, laid out."""
        return cls(cos[:, 0], sin[:, 0])
