"""Perplexity of a model on packed rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lolcats.modeling.loss import next_token_loss


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, rows: Tensor, batch_size: int = 4, positions: Tensor | None = None
) -> float:  # fmt: skip
    """exp of the mean next-token cross-entropy over rows (N, L) of token ids; rows are independent sequences.

    positions: (N, L), which start again at 0 where another document begins: documents are then the sequences.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size].to(device)
        places = None if positions is None else positions[start : start + batch_size].to(device)
        given = {} if places is None else {"position_ids": places}
        tokens = ids[:, 1:].numel() if places is None else int((places[:, 1:] > 0).sum())
        total += next_token_loss(model(input_ids=ids, use_cache=False, **given).logits, ids, places).item() * tokens
        count += tokens
    return math.exp(total / count)
