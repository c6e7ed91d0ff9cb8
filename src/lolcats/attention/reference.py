"""The specification: hybrid attention in fp32, written for reading. Every fast path is tested against it.

    ŷ_n = ( Σ_{i∈soft(n)} γ·exp(s_ni − c_n)·v_i + φ(q_n)ᵀ S_n ) / ( Σ_{i∈soft(n)} γ·exp(s_ni − c_n) + φ(q_n)ᵀ z_n )

with s_ni = scale·q_n·k_i, c_n = max over soft(n) of s_ni, S_n = Σ φ(k_j) v_jᵀ and z_n = Σ φ(k_j) over the keys older
than the window (Zhang et al. 2025, arXiv 2410.10254, Eq. 7; sinks are ours). Only the softmax logits are shifted by
c_n: this is not a log-sum-exp merge of two attentions.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
    q (B, H, T, D)   k, v (B, G, T, D)   fq (B, H, T, F)   fk (B, H or G, T, F)   gamma (H,)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lolcats.attention.spec import AttentionSpec

QUERIES = 128  # queries whose weights are in memory at a time


def softmax_logits(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """scale·q·kᵀ, optionally squashed to (−softcap, softcap) as Gemma 2 does."""
    logits = (q * scale) @ k.mT
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax_weights(q: Tensor, k: Tensor, scale: float, softcap: float | None = None, first: int = 0) -> Tensor:
    """The teacher's causal attention weights (B, H, T, T) fp32 for unpadded rows; ``first``: position of q[:, :, 0]."""
    logits = softmax_logits(q.float(), expand_heads(k, q.shape[1]), scale, softcap)
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(first)
    return logits.masked_fill(~causal, -torch.inf).softmax(-1)


def query_blocks(q: Tensor, k: Tensor, size: int = QUERIES) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield blocks of t <= ``size`` queries (B, H, t, D) and the keys up to the last of them (B, H, T', D), in fp32,
    with their positions n (t, 1) and i (T',): quadratic time without a T × T tensor."""
    k, positions = expand_heads(k, q.shape[1]), torch.arange(q.shape[2], device=q.device)
    for first in range(0, q.shape[2], size):
        n = positions[first : first + size, None]
        end = first + len(n)
        yield q[:, :, first:end].float(), k[:, :, :end], n, positions[:end]


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, ...) -> (B, H, ...) in fp32: each key/value head repeated for its group of query heads."""
    return x.float().repeat_interleave(heads // x.shape[1], dim=1)


def normalize(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, or 0 if a query sees no key (kind ``remote`` at the start of a sequence)."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


def output(spec: AttentionSpec, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The output of attention: the quotient, or just the numerator if a group norm follows."""
    return normalize(numerator, denominator) if spec.divides else numerator


def older_keys(spec: AttentionSpec, n: Tensor, i: Tensor) -> Tensor:
    """Whether the query at position n sees the key at position i through the linear term."""
    return (i >= spec.softmax_sinks) & (i < spec.window_start(n)) & (i <= n)


def attention_weights(
    q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None = None, first: int = 0,
) -> Tensor:  # fmt: skip
    """The full (B, H, T, T) matrix of attention weights, whose rows sum to 1; quadratic in T.

    Args:
        q, k, fq, fk, gamma: as above, any float dtype; the weights are fp32.
        scale: factor of the logits; softcap: bound to which they are squashed before masking.
        first: position of q[:, :, 0], if q and fq hold only some of the queries.
    """
    weights = unnormalized_weights(q, k, fq, fk, gamma, spec, scale, softcap, first)
    return normalize(weights, weights.sum(-1, keepdim=True))


def unnormalized_weights(
    q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None = None, first: int = 0,
) -> Tensor:  # fmt: skip
    """Parallel form: the weights of :func:`attention_weights` before normalization. Same arguments."""
    heads, length, maps = q.shape[1], k.shape[2], fk.shape[1]
    k, fk = expand_heads(k, heads), expand_heads(fk, heads)
    n = first + torch.arange(q.shape[2], device=q.device)[:, None]
    i = torch.arange(length, device=q.device)[None, :]
    older = older_keys(spec, n, i)
    soft = (i <= n) & ~older
    weights = torch.zeros(q.shape[0], heads, q.shape[2], length, device=q.device)
    if spec.has_softmax:
        logits = softmax_logits(q.float(), k, scale, softcap).masked_fill(~soft, -torch.inf)
        weights = weights + gamma[:, None, None] * torch.exp(logits - logits.amax(-1, keepdim=True))
    if spec.has_linear:
        log_decay = spec.log_decay(maps, q.device).repeat_interleave(heads // maps)[:, None, None]
        weights = weights + (fq.float() @ fk.mT) * torch.exp(log_decay * (n - i).clamp_min(0)) * older
    return weights


def parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Outputs (B, H, T, D) fp32 from the full matrix of :func:`attention_weights`."""
    weights = unnormalized_weights(q, k, fq, fk, gamma, spec, scale, softcap)
    return output(spec, weights, weights.sum(-1, keepdim=True)) @ expand_heads(v, q.shape[1])


def recurrent_attention(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The same outputs one token at a time, from S, z, the window's keys and the sinks: memory constant in T."""
    heads, length, maps = q.shape[1], q.shape[2], fk.shape[1]
    decay = spec.log_decay(maps, q.device).exp().repeat_interleave(heads // maps)[:, None]
    k, v, fk = (expand_heads(x, heads) for x in (k, v, fk))
    q, fq = q.float(), fq.float()
    S = torch.zeros(*fk.shape[:2], fk.shape[3], v.shape[3], device=q.device)  # (B, H, F, D)
    z = torch.zeros(*fk.shape[:2], fk.shape[3], device=q.device)  # (B, H, F)
    folded, outputs = 0, []  # keys before `folded` are in S and z, except sinks
    for n in range(length):
        S, z = S * decay[..., None], z * decay
        while folded < min(spec.window_start(n), n + 1):
            if folded >= spec.softmax_sinks:
                S = S + fk[:, :, folded, :, None] * v[:, :, folded, None, :]
                z = z + fk[:, :, folded]
            folded += 1
        numerator, denominator = torch.zeros_like(v[:, :, n]), torch.zeros_like(v[:, :, n, :1])
        if spec.has_softmax:
            soft = list(range(min(spec.softmax_sinks, folded))) + list(range(folded, n + 1))
            logits = softmax_logits(q[:, :, n : n + 1], k[:, :, soft], scale, softcap)
            e = gamma[:, None, None] * torch.exp(logits - logits.amax(-1, keepdim=True))
            numerator, denominator = numerator + (e @ v[:, :, soft])[:, :, 0], denominator + e.sum(-1)
        if spec.has_linear:
            numerator = numerator + (fq[:, :, n, None] @ S)[:, :, 0]
            denominator = denominator + (fq[:, :, n] * z).sum(-1, keepdim=True)
        outputs.append(output(spec, numerator, denominator))
    return torch.stack(outputs, dim=2)
