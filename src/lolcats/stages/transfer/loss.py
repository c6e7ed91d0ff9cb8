"""The loss of attention transfer: one layer's linear attention against its softmax attention.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lolcats.attention.reference import (
    attention_weights,
    expand_heads,
    older_keys,
    query_blocks,
    softmax_logits,
    softmax_weights,
)
from lolcats.attention.spec import AttentionSpec
from lolcats.config import TransferConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, override
from lolcats.modeling.loss import mean_squared_error

QUERIES = 64  # queries whose weights are in memory at a time
WEIGHTS = 1 << 25  # weights in memory at a time, over all heads and as many rows as fit: 128 MiB in fp32


def attention_loss(
    layer: LinearizedAttention, call: AttentionCall, config: TransferConfig, hidden: Sequence[int] = ()
) -> Tensor:  # fmt: skip
    """Scalar loss of one layer on one call: mse_weight · MSE(ŷ, y) + xent_weight · cross-entropy of weights.

    Args:
        hidden: indices of rows that hide their window (``window_dropout``), see :func:`older_error`. The cross-entropy
            ignores this.
    """
    return attention_losses(layer, call, config, hidden)[0]


def attention_losses(
    layer: LinearizedAttention, call: AttentionCall, config: TransferConfig, hidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the mean squared error that is part of it."""
    if not hidden or layer.spec.kind != "hybrid":
        error = _error(layer, call)
    else:
        share = len(hidden) / len(call.q)
        error = share * older_error(layer, call.rows(hidden))
        if shown := [row for row in range(len(call.q)) if row not in hidden]:
            error = error + (1 - share) * _error(layer, call.rows(shown))
    loss = config.mse_weight * error
    if config.xent_weight:
        loss = loss + config.xent_weight * weight_cross_entropy(layer, call)
    return loss, error


def _error(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    y = layer(call.q, call.k, call.v, call.scale, call.softcap, call.padding, call.documents).transpose(1, 2)
    return mean_squared_error(y, call.target, call.padding)


def older_error(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    """MSE between the linear term and softmax attention over the same keys, without sinks and window in either.

    Queries without such keys have zero error.
    """
    if call.padding is not None:
        raise LolcatsError("transfer.window_dropout needs rows without padding.")
    older = partial(older_attention, spec=layer.spec, scale=call.scale, softcap=call.softcap)
    attend = older if call.documents is None else partial(call.documents.apart, older)
    target = attend(call.q, call.k, call.v)
    with override(layer, kind="remote"):
        y = layer(call.q, call.k, call.v, call.scale, call.softcap, None, call.documents)
    return mean_squared_error(y, target.to(y.dtype))


@torch.no_grad()
def older_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, softcap: float | None = None
) -> Tensor:  # fmt: skip
    """(B, H, T, D) fp32 softmax attention over only the keys of the linear term; 0 for queries without such keys.

    Takes quadratic time, with the weights of QUERIES queries in memory at a time.
    """
    q, k, v, found = spec.rotated(q), spec.rotated(k), expand_heads(v, q.shape[1]), []
    for queries, keys, n, i in query_blocks(q, k, QUERIES):
        seen = older_keys(spec, n, i)
        logits = softmax_logits(queries, keys, scale, softcap).masked_fill(~seen, -torch.inf)
        found.append(logits.softmax(-1).masked_fill(~seen, 0) @ v[:, :, : len(i)])
    return torch.cat(found, 2)


def weight_cross_entropy(
    layer: LinearizedAttention, call: AttentionCall, queries: int = QUERIES, weights: int = WEIGHTS
) -> Tensor:  # fmt: skip
    """Cross-entropy −Σ a·log â of softmax and hybrid attention weights, mean over queries, heads and (unpadded) rows.

    Takes quadratic time, but makes no T × T tensor: it computes the weights of some rows and ``queries`` queries at a
    time, and recomputes them in the backward pass.

    Args:
        weights: maximum number of elements in a tensor of weights; a single row may exceed it.
    """
    if call.padding is not None:
        raise LolcatsError("The cross-entropy of attention weights (transfer.xent_weight) needs rows without padding.")

    def of_rows(q: Tensor, k: Tensor) -> Tensor:
        fq, fk, gamma = layer.phi_q(q), layer.phi_k(k), layer.gamma
        length, found = q.shape[2], []
        rows = max(1, weights // (q.shape[1] * min(queries, length) * length))
        for row in range(0, q.shape[0], rows):
            some, pieces = slice(row, row + rows), []
            for first in range(0, length, queries):
                last = min(first + queries, length)
                part = (q[some, :, first:last], k[some, :, :last], fq[some, :, first:last], fk[some, :, :last], gamma)
                common = (layer.spec, call.scale, call.softcap, first)
                pieces.append(checkpoint(_of_queries, *part, *common, use_reentrant=False, preserve_rng_state=False))
            found.append(torch.cat(pieces, 2))
        return torch.cat(found)

    per_query = of_rows if call.documents is None else partial(call.documents.apart, of_rows)
    return per_query(call.q, call.k).mean()


def _of_queries(
    q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None, first: int,
) -> Tensor:  # fmt: skip
    """(B, H, T, 1) cross-entropy of each query; ``first`` is the position of the first one."""
    q, k = spec.rotated(q), spec.rotated(k)
    with torch.no_grad():
        target = softmax_weights(q, k, scale, softcap, first)
    predicted = attention_weights(q, k, fq, fk, gamma, spec, scale, softcap, first)
    return -(target * predicted.clamp_min(1e-12).log()).sum(-1, keepdim=True)
