"""Stochastic rounding to bf16: up or down at random, so that the mean is unbiased.

A bf16 sum stops growing once the addends are smaller than half its spacing: rounded to the nearest, S would stall after
some ten thousand tokens. The random bits are a hash of position and element index, so a row's state depends only on its
own tokens, and every path rounds the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic(x: Tensor, position: Tensor) -> Tensor:
    """(B, ...) fp32 -> bf16; ``position`` (B,): position of the token at which each row is written."""
    index = torch.arange(x[0].numel(), device=x.device) * 0x9E3779B1
    h = (index + position[:, None] * 0x85EBCA77) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    h = ((h ^ (h >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    h = (h ^ (h >> 15)) & 0xFFFF
    bits = x.contiguous().view(torch.int32).flatten(1) + h.int()
    return (bits & -0x10000).view(torch.float32).view(x.shape).to(torch.bfloat16)


def rounded(x: Tensor, dtype: torch.dtype, position: Tensor) -> Tensor:
    """Sums ``x`` (B, ...) fp32 in the dtype in which they are kept; ``position``: see :func:`stochastic`."""
    return stochastic(x.float(), position) if dtype == torch.bfloat16 else x.to(dtype)
