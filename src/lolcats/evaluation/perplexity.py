"""Perplexity of a model on packed rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lolcats.modeling.loss import next_token_loss


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: Tensor, batch_size: int = 4) -> float:
    """exp of the mean next-token cross-entropy over rows (N, L) of token ids; rows are independent sequences."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for ids in rows.split(batch_size):
        ids = ids.to(device)
        total += next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).item() * len(ids)
    return math.exp(total / len(rows))
