"""The loss of attention transfer: one layer's linear attention against its softmax attention.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lolcats.attention.reference import attention_weights, softmax_weights
from lolcats.attention.spec import AttentionSpec
from lolcats.config import TransferConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import AttentionCall, LinearizedAttention
from lolcats.modeling.loss import mean_squared_error

QUERIES = 64  # queries whose weights are in memory at a time
WEIGHTS = 1 << 25  # weights in memory at a time, over all heads and as many rows as fit: 128 MiB in fp32


def attention_loss(layer: LinearizedAttention, call: AttentionCall, config: TransferConfig) -> Tensor:
    """Scalar loss of one layer on one call: mse_weight · MSE(ŷ, y) + xent_weight · cross-entropy of weights."""
    return attention_losses(layer, call, config)[0]


def attention_losses(
    layer: LinearizedAttention, call: AttentionCall, config: TransferConfig
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the mean squared error that is part of it."""
    error = squared_error(layer, call)
    loss = config.mse_weight * error
    if config.xent_weight:
        loss = loss + config.xent_weight * weight_cross_entropy(layer, call)
    return loss, error


def squared_error(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    """Scalar: the mean squared error of the layer's output on one call."""
    return mean_squared_error(layer.answer(call), call.target, call.padding)


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
        raise LolcatsError("transfer.xent_weight does not support padded rows: pack the rows, or set it to 0.")

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

    return call.per_query(of_rows).mean()


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
