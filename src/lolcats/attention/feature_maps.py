"""Feature maps φ: head vectors to non-negative features, one map per head.

Shapes: B batch, H heads, T tokens, D head dim, f columns of the projection, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-12  # keeps φ(q)·Σφ(k) above zero: with t2r every feature can be 0, and the output would be 0/0


def hedgehog(y: Tensor) -> Tensor:
    """softmax(y) ⊕ softmax(−y) over the feature dim (Zhang et al. 2024, arXiv 2402.04347). (..., f) -> (..., 2f)"""
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)


def exp(y: Tensor) -> Tensor:
    """exp(y − max y) ⊕ exp(−y + min y): Hedgehog without its normalisation. (..., f) -> (..., 2f)"""
    return torch.cat([torch.exp(y - y.amax(-1, True)), torch.exp(y.amin(-1, True) - y)], -1)


def t2r(y: Tensor) -> Tensor:
    """relu(y) with y = xW + b (Kasai et al. 2021, arXiv 2103.13076). (..., D) -> (..., D)"""
    return torch.relu(y)


def elu(y: Tensor) -> Tensor:
    """1 + elu(x), without parameters (Katharopoulos et al. 2020). (..., D) -> (..., D)"""
    return 1 + nn.functional.elu(y)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"hedgehog": hedgehog, "exp": exp, "t2r": t2r, "elu": elu}


class FeatureMap(nn.Module):
    """φ for ``heads`` heads: activation(x @ weight + bias), in fp32 whatever the input's dtype.

    Args:
        name: ``hedgehog``, ``exp``, ``t2r`` or ``elu``.
        heads: number of maps, H or G.
        head_dim: D of the input; if it has more channels, the last D are used (see ``AttentionSpec.unrotated``).
        feature_dim: f; ignored by t2r (D × D) and elu (no weights).
    """

    def __init__(self, name: str, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.name, self.heads, self.head_dim = name, heads, head_dim
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        columns = head_dim if name in ("t2r", "elu") else feature_dim
        self.num_features = columns if name in ("t2r", "elu") else 2 * columns
        if name != "elu":
            self.weight = nn.Parameter(torch.empty(heads, head_dim, columns))
            nn.init.uniform_(self.weight, -math.sqrt(6 / (head_dim * columns)), math.sqrt(6 / (head_dim * columns)))
        if name == "t2r":
            self.bias = nn.Parameter(torch.zeros(heads, columns))

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, T, D) in any float dtype -> (B, heads, T, F) fp32, at least EPS.

        Key/value heads (B, G, T, D), if fewer than the maps, are repeated for the query heads of their group.
        """
        y = x[..., -self.head_dim :].float()
        if y.shape[1] < self.heads:
            y = y.repeat_interleave(self.heads // y.shape[1], 1)
        if self.weight is not None:
            y = y @ self.weight.float()
        if self.bias is not None:
            y = y + self.bias.float()[:, None]
        return ACTIVATIONS[self.name](y).clamp_min(EPS)
