"""Hybrid attention in chunks: plain PyTorch with autograd, time and memory linear in T. The path of CPUs.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features, N chunks, C chunk length.
With C = window size, the keys of a query in chunk n fall into three groups: its own chunk and the one before (softmax
or linear, by a static C × 2C mask), all chunks before those (linear, through the state S, z), and sinks (softmax).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lolcats.attention.reference import expand_heads, output, softmax_logits
from lolcats.attention.spec import AttentionSpec


class Context(NamedTuple):
    """What came before the first key of a chunked call; rows may stand at different positions.

    offset: (B,) int64, position of each row's first key (a multiple of the window size if terraced).
    sink_k, sink_v: (B, G, sinks, D); S: (B, H or G, F, D) fp32; z: (B, H or G, F) fp32.
    """

    offset: Tensor
    sink_k: Tensor
    sink_v: Tensor
    S: Tensor
    z: Tensor


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor | None, fk: Tensor | None, gamma: Tensor, spec: AttentionSpec,
    scale: float, softcap: float | None = None, context: Context | None = None,
) -> Tensor:  # fmt: skip
    """Outputs (B, H, T, D) fp32 of :func:`lolcats.attention.reference.parallel_attention`.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D), any float dtype.
        fq: (B, H, T, F) and fk: (B, H or G, T, F) fp32; None if ``spec`` has no linear term.
        gamma: (H,), the window's weight.
        context: state before k[0]; None at the start of a sequence.
    """
    heads, length, chunk = q.shape[1], q.shape[2], spec.chunk
    position = torch.arange(-(-length // chunk) * chunk, device=q.device)[None]  # (1 or B, T')
    if context is not None:
        position = position + context.offset[:, None]
    q, k, v = q.float(), expand_heads(k, heads), expand_heads(v, heads)
    vc = _chunks(v, chunk)
    numerator = denominator = torch.zeros((), device=q.device)
    older = _older_mask(spec, q.device)  # (C, 2C)
    if spec.has_softmax:
        mask = _softmax_mask(spec, position, older)
        sinks = _sinks(k, v, spec, position, context)
        qc, kc = _chunks(q, chunk), _chunks(k, chunk)
        numerator, denominator = _softmax_part(qc, kc, vc, mask, gamma, scale, softcap, *sinks)
    if spec.has_linear:
        assert fq is not None and fk is not None  # noqa: PT018
        fk = pad(fk, (0, 0, 0, position.shape[1] - length)) * (position >= spec.softmax_sinks)[:, None, :, None]
        fqc, fkc = _chunks(fq, chunk), _chunks(expand_heads(fk, heads), chunk)
        state = (None, None) if context is None else (expand_heads(context.S, heads), expand_heads(context.z, heads))
        if spec.decays:
            log_decay = spec.log_decay(fk.shape[1], q.device).repeat_interleave(heads // fk.shape[1])
            num, den = _decaying_part(fqc, fkc, vc, log_decay, *state)
        else:
            near = None if spec.kind != "linear" and spec.window == "terraced" else older
            num, den = _linear_part(fqc, fkc, vc, near, *state)
        numerator, denominator = numerator + num, denominator + den
    return output(spec, numerator, denominator).flatten(2, 3)[:, :, :length]


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) -> (B, H, N, C, D), the end padded with zeros."""
    return pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


def _with_previous(x: Tensor) -> Tensor:
    """(B, H, N, C, D) -> (B, H, N, 2C, D): each chunk behind its predecessor, zeros before the first."""
    return torch.cat([pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=3)


def _older_mask(spec: AttentionSpec, device: torch.device) -> Tensor:
    """(C, 2C): which keys of the previous and the own chunk a query sees through the linear term."""
    chunk = spec.chunk
    # Two chunks into any sequence the pattern no longer depends on where the chunk stands.
    n = torch.arange(chunk, device=device)[:, None] + 2 * chunk
    i = torch.arange(2 * chunk, device=device)[None, :] + chunk
    return (i < spec.window_start(n)) & (i <= n)


def _softmax_mask(spec: AttentionSpec, position: Tensor, older: Tensor) -> Tensor:
    """(1 or B, 1, N, C, 2C): causal, inside the window, no sink, and not before the row's first key."""
    chunk = spec.chunk
    causal = torch.ones(chunk, 2 * chunk, dtype=torch.bool, device=older.device).tril(chunk)
    keys = position.unflatten(1, (-1, chunk))[:, None, :, None]  # (1 or B, 1, N, 1, C)
    first = position[:, :1].clamp_min(spec.sinks).view(-1, 1, 1, 1, 1)
    return causal & ~older & (torch.cat([keys - chunk, keys], -1) >= first)


def _sinks(
    k: Tensor, v: Tensor, spec: AttentionSpec, position: Tensor, context: Context | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the sinks, (B, H, sinks, D), and which queries may see them, (1 or B, 1, N, C, sinks)."""
    if context is None:
        sink_k, sink_v = k[:, :, : spec.sinks], v[:, :, : spec.sinks]
    else:
        sink_k, sink_v = expand_heads(context.sink_k, k.shape[1]), expand_heads(context.sink_v, k.shape[1])
    queries = position.unflatten(1, (-1, spec.chunk))[:, None, :, :, None]
    return sink_k, sink_v, queries >= torch.arange(sink_k.shape[2], device=k.device)


def _softmax_part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, gamma: Tensor, scale: float, softcap: float | None,
    sink_k: Tensor, sink_v: Tensor, sink_mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numerator (B, H, N, C, D) and denominator (B, H, N, C, 1) of window and sinks."""
    logits = softmax_logits(q, _with_previous(k), scale, softcap).masked_fill(~mask, -torch.inf)
    sink_logits = softmax_logits(q, sink_k[:, :, None], scale, softcap).masked_fill(~sink_mask, -torch.inf)
    peak = torch.cat([logits, sink_logits], -1).amax(-1, keepdim=True)
    weight = gamma.float().view(-1, 1, 1, 1)
    e, e_sink = weight * torch.exp(logits - peak), weight * torch.exp(sink_logits - peak)
    numerator = e @ _with_previous(v) + e_sink @ sink_v[:, :, None]
    return numerator, e.sum(-1, keepdim=True) + e_sink.sum(-1, keepdim=True)


def _linear_part(
    fq: Tensor, fk: Tensor, v: Tensor, mask: Tensor | None, S: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the linear term: state up to two chunks back, and ``mask`` within the last two."""
    sums, totals = fk.mT @ v, fk.sum(3)  # of each chunk: (B, H, N, F, D), (B, H, N, F)
    start_S = torch.zeros_like(sums[:, :, :1]) if S is None else S[:, :, None]
    start_z = torch.zeros_like(totals[:, :, :1]) if z is None else z[:, :, None]
    S = torch.cat([start_S, start_S, start_S + sums[:, :, :-2].cumsum(2)], 2)[:, :, : fq.shape[2]]
    z = torch.cat([start_z, start_z, start_z + totals[:, :, :-2].cumsum(2)], 2)[:, :, : fq.shape[2]]
    numerator, denominator = fq @ S, fq @ z[..., None]
    if mask is not None:
        near = (fq @ _with_previous(fk).mT) * mask
        numerator, denominator = numerator + near @ _with_previous(v), denominator + near.sum(-1, keepdim=True)
    return numerator, denominator


def _decaying_part(
    fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor, S: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of kind ``linear`` with decay: the state behind the chunk before, and the own chunk's keys up to the query.

    log_decay: (H,).
    """
    count, chunk = fk.shape[2:4]
    a, n = torch.arange(chunk, device=fk.device), torch.arange(count, device=fk.device)

    def decayed(age: Tensor) -> Tensor:
        """(H, *age.shape): γ^age, 0 for ages below 0."""
        return torch.exp(log_decay.view(-1, *[1] * age.ndim) * age.clamp_min(0)) * (age >= 0)

    keys = fk * decayed(chunk - 1 - a)[:, None, :, None]
    between, since = decayed((n[:, None] - 1 - n) * chunk), decayed(n * chunk)  # (H, N, N), (H, N)
    sums = torch.einsum("hnm,bhmfd->bhnfd", between, keys.mT @ v)
    totals = torch.einsum("hnm,bhmf->bhnf", between, keys.sum(3))
    if S is not None and z is not None:
        sums, totals = sums + S[:, :, None] * since[..., None, None], totals + z[:, :, None] * since[..., None]
    queries, near = fq * decayed(a + 1)[:, None, :, None], (fq @ fk.mT) * decayed(a[:, None] - a)[:, None]
    return queries @ sums + near @ v, queries @ totals[..., None] + near.sum(-1, keepdim=True)
