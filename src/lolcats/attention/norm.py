"""A group norm over heads, which can replace the denominator of linear attention.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

EPS = 1e-5  # default of torch.nn.GroupNorm


class HeadNorm(nn.Module):
    """Normalize each head's output at each token to mean 0 and variance 1 over its channels, then scale and shift each
    channel: ``torch.nn.GroupNorm(H, H * D)`` on one token at a time, in fp32 (SUPRA, arXiv 2405.06640)."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, y: Tensor) -> Tensor:
        """(B, H, T, D) -> the same in fp32."""
        y = layer_norm(y.float(), y.shape[-1:], eps=EPS)
        return y * self.weight.float()[:, None] + self.bias.float()[:, None]
