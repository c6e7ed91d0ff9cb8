"""Effective sequence length of a data set: how far back the base model's attention looks on it.

ESL of a row = mean over layers, heads and queries n of Σ_{i ≤ n} a_ni · (n − i + 1): the attention-weighted distance
from a query to its keys, where its own token counts as 1 (LoLCATs, Eq. 9). Uniform attention over T tokens gives about
T / 4. The paper's own code counts the own token as 0, which gives 1 less for every row and the same ranking. Rows with
a large ESL teach more about keys older than the window (the paper's Table 15).

Shapes: B batch, H query heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.attention.reference import query_blocks, softmax_logits
from lolcats.data.rows import Data
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.observe import watch_layers

QUANTILES = {"lowest": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "highest": 1.0}
"""Points of a distribution that tables and pictures show, by name."""


@dataclass(frozen=True)
class EffectiveLengths:
    """``rows`` (N,), one per row; ``heads`` (layers, H), means over all rows, NaN for heads that stay softmax
    attention; ``layers``, the indices of the layers."""

    rows: Tensor
    heads: Tensor
    layers: list[int]


def effective_lengths(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> EffectiveLengths:  # fmt: skip
    """Effective sequence lengths of the softmax attention in the linearized layers of a converted model.

    Args:
        batches: token ids (B, T) with position ids that restart at each document, or None.
    """

    def of_call(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
        lengths = lengths_of_call(layer, call)
        missing = torch.full_like(lengths[:, 0], torch.nan)
        return torch.stack([missing if x is None else x for x in layer.over_heads(lengths.unbind(1))], 1)

    found = [torch.stack(watch_layers(model, ids, of_call, positions), 1) for ids, positions in batches]
    lengths = torch.cat(found)  # (N, layers, H)
    layers = [layer.geometry.layer for layer in linearized_layers(model)]
    return EffectiveLengths(lengths.nanmean((1, 2)), lengths.mean(0), layers)


def longest(data: Data, model: PreTrainedModel, fraction: float, batch: int) -> tuple[EffectiveLengths, Tensor]:
    """Effective sequence lengths of all training rows, and the indices of the ``fraction`` of rows with the longest, in
    ascending order."""
    found = effective_lengths(model, data.batches(range(len(data.train)), batch))
    count = max(1, round(fraction * len(found.rows)))
    return found, found.rows.topk(count).indices.sort().values


def lengths_of_call(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    """(B, H) on the CPU: the effective length of each row and head of a call."""

    def distances(q: Tensor, k: Tensor) -> Tensor:
        return mean_distances(layer.spec.rotated(q), layer.spec.rotated(k), call.scale, call.softcap)

    return call.per_query(distances)[..., 0].mean(2).cpu()


def mean_distances(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """(B, H, T, 1) fp32: Σ_i a_ni · (n − i + 1) for each query n, over causal softmax weights a.

    q: (B, H, T, D); k: (B, G, T, D).
    """
    parts = []
    for queries, keys, n, i in query_blocks(q, k):
        distance = n - i + 1
        logits = softmax_logits(queries, keys, scale, softcap)
        weights = logits.masked_fill(distance < 1, -torch.inf).softmax(-1)
        parts.append((weights * distance).sum(-1, keepdim=True))
    return torch.cat(parts, 2)
