"""Next-token cross-entropy without a second tensor of the logits' size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

TOKENS = 512  # logits turned into fp32 log-probabilities at a time: with 128k words, 256 MB


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean −log p(ids[:, n+1] | ids[:, ≤n]) in fp32; logits (B, T, vocabulary) in any float dtype, ids (B, T) int64."""
    targets = pad(ids[:, 1:], (0, 1), value=-100).flatten()
    parts = zip(logits.flatten(0, 1).split(TOKENS), targets.split(TOKENS), strict=True)
    total = sum(checkpoint(_summed, part, target, use_reentrant=False) for part, target in parts)
    return torch.as_tensor(total) / (targets >= 0).sum()


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")
