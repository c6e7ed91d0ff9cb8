"""Errors of the student's attention outputs, and the entropy of the teacher's attention, by layer and head.

The paper's Tables 17 and 18 and Figures 5 and 6 show the same: errors by layer, and errors against entropy.

Shapes: B batch, H query heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.attention import AttentionSpec
from lolcats.attention.reference import older_keys, query_blocks, softmax_logits
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.observe import watch_layers


def measure_layers(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor | None]], of: str
) -> dict[str, Any]:  # fmt: skip
    """Compare softmax and linearized attention on the queries, keys and values of the model's softmax forward pass.

    Args:
        batches: token ids (B, T) with position ids that restart at each document, or None; all rows of equal length.
        of: the model that the queries and keys come from, ``teacher`` or (with LoRA) ``student``; returned unchanged.

    Returns:
        ``layers`` (their indices), ``rows``, ``tokens``, ``of``; and means over rows and queries, (layers, H), None for
        heads that stay softmax attention:
        ``errors``, the squared error of each head's output; ``sizes``, the squared softmax output; ``entropies``,
        −Σ a log a of the softmax weights a, in nats; ``older``, the share of these weights on keys of the linear term.
    """
    layers = linearized_layers(model)
    totals: list[Any] = [0.0] * len(layers)  # (4, H) each
    rows = length = 0
    for ids, positions in batches:
        of_rows = watch_layers(model, ids, _of_call, positions)
        totals = [total + found * len(ids) for total, found in zip(totals, of_rows, strict=True)]
        rows, length = rows + len(ids), ids.shape[1]
    names = ("errors", "sizes", "entropies", "older")
    means = [
        [layer.over_heads(x) for x in (total / rows).tolist()] for layer, total in zip(layers, totals, strict=True)
    ]
    found = {name: [of_layer[i] for of_layer in means] for i, name in enumerate(names)}
    indices = [layer.geometry.layer for layer in layers]
    return {"of": of, "rows": rows, "tokens": length, "layers": indices, **found}


def _of_call(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    """(4, H): error, size, entropy and older share of one layer, as means over the rows of a call."""
    weights = partial(weights_of_queries, spec=layer.spec, scale=call.scale, softcap=call.softcap)
    return torch.cat([head_errors(layer, call), call.per_query(weights).mean((0, 2)).T]).double().cpu()


def head_errors(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    """(2, H): the mean squared error of each head's output in a call, and the mean square of its softmax output."""
    y, target = layer.answer(call).float(), call.target.float()
    return torch.stack([(y - target).square(), target.square()]).mean((1, 2, 4))


def weights_of_queries(
    q: Tensor, k: Tensor, spec: AttentionSpec, scale: float, softcap: float | None = None
) -> Tensor:  # fmt: skip
    """(B, H, T, 2): entropy in nats of each query's causal softmax weights, and their share on older keys.

    q: (B, H, T, D); k: (B, G, T, D).
    """
    parts = []
    for queries, keys, n, i in query_blocks(spec.rotated(q), spec.rotated(k)):
        weights = softmax_logits(queries, keys, scale, softcap).masked_fill(i > n, -torch.inf).softmax(-1)
        older = weights * older_keys(spec, n, i)
        parts.append(torch.stack([torch.special.entr(weights).sum(-1), older.sum(-1)], -1))
    return torch.cat(parts, 2)
