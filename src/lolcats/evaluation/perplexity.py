"""Perplexity of a model on packed rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lolcats.modeling.install import inputs_of
from lolcats.modeling.loss import next_token_loss


def perplexity(
    model: torch.nn.Module, rows: Tensor, batch_size: int = 4, positions: Tensor | None = None
) -> float:  # fmt: skip
    """exp of the mean next-token cross-entropy over rows (N, L) of token ids; each row is its own sequence.

    positions: (N, L), restarting at 0 at each document; then each document is its own sequence.
    """
    losses, counts = row_losses(model, rows, batch_size, positions)
    return math.exp((losses * counts).sum().item() / counts.sum().item())


@torch.no_grad()
def row_losses(
    model: torch.nn.Module, rows: Tensor, batch_size: int = 4, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean cross-entropy and number of predicted tokens of each row, (N,) float64. Arguments as above."""
    model.eval()
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size].to(device)
        places = None if positions is None else positions[start : start + batch_size].to(device)
        logits = model(**inputs_of(ids, places)).logits
        for i in range(len(ids)):
            losses.append(
                next_token_loss(logits[i : i + 1], ids[i : i + 1], None if places is None else places[i : i + 1])
            )
    counts = torch.full((len(rows),), rows.shape[1] - 1) if positions is None else (positions[:, 1:] > 0).sum(1)
    return torch.stack(losses).cpu().double(), counts.double()
