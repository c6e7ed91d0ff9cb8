"""Hybrid attention in chunks, in plain PyTorch with autograd: time and memory linear in T. The path used on CPUs.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, M maps of keys (H or G), F features, N chunks,
C chunk length, R query heads that share a key (H / G) or a state (H / M).
With C = window size, softmax reaches the sinks and two chunks, the query's own and the previous one. The linear term
reaches all earlier chunks through a state S, z and, unless the window is terraced, some keys of the next chunk through
a static C × C mask. Work that no query needs is skipped: with 512 tokens and a terraced window of 64, the first 128
queries have no older keys, and the last 128 keys lie in the window of every query that sees them.

The window's weights e_i = exp(s_i − c) are computed as p = softmax(s), in one pass over the logits. Since c is the
maximum of s, the largest p is 1 / Σ e_i; numerator and denominator of the specification are both multiplied by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lolcats.attention.mixer import KeyMap, Mixer
from lolcats.attention.reference import expand_heads, normalize, softmax_logits
from lolcats.attention.spec import AttentionSpec


class Context(NamedTuple):
    """The state before the first key of a chunked call. Rows may be at different positions.

    offset: (B,) int64, position of each row's first key (a multiple of the window size if terraced).
    sink_k, sink_v: (B, G, sinks, D); S: (B, H or G, F, D) fp32; z: (B, H or G, F) fp32.
    """

    offset: Tensor
    sink_k: Tensor
    sink_v: Tensor
    S: Tensor
    z: Tensor


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, context: Context | None = None,
    lengths: Sequence[int] | Tensor | None = None, final: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Outputs (B, H, T, D) fp32 of :func:`lolcats.attention.reference.parallel_attention`, and the final state.

    Arguments and results are those of :func:`lolcats.attention.attention`.
    """
    spec, length = mixer.spec, q.shape[2]
    position = positions(q, spec, context)
    linear = S = z = None
    if spec.has_linear:
        past = Past(k, v, mixer.phi_k, spec, position, context)
        linear = past.read(q, mixer.phi_q)
        S, z = past.final(length, lengths) if final else (None, None)
    if spec.has_softmax:
        y = merged(*_softmax_part(q, k, v, mixer, position, context), mixer.gamma, linear)
    else:
        assert linear is not None
        y = normalize(*linear)
    return unchunked(y, length), S, z


def positions(q: Tensor, spec: AttentionSpec, context: Context | None) -> Tensor:
    """(1 or B, N · C): the position of every token of whole chunks."""
    chunk = spec.chunk
    position = torch.arange(-(-q.shape[2] // chunk) * chunk, device=q.device)[None]
    return position if context is None else position + context.offset[:, None]


def unchunked(y: Tensor, length: int) -> Tensor:
    """(B, H, N, C, D) -> (B, H, T, D) without the padding at the end."""
    return y.flatten(2, 3)[:, :, :length]


def merged(mean: Tensor, largest: Tensor, gamma: Tensor, linear: tuple[Tensor, Tensor] | None) -> Tensor:
    """Combine softmax and linear term under one denominator.

    Args:
        mean, largest: output of the softmax part, (B, H, ..., D), and its largest weight, (B, H, ..., 1).
        gamma: (H,)
        linear: numerator (B, H, ..., D) and denominator (B, H, ..., 1) of the linear term.
    """
    weight = gamma.float().view(-1, *(1,) * (mean.ndim - 2))  # above 0, so no denominator is 0
    if linear is None:
        return weight * mean / weight
    return torch.addcmul(weight * mean, largest, linear[0]) / torch.addcmul(weight, largest, linear[1])


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) -> (B, H, N, C, D), padded with zeros at the end."""
    missing = -x.shape[2] % chunk
    x = pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (x.shape[2] // chunk, chunk))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, H, N, C, D) -> (B, G, N, R · C, D): heads that share a key or a state become rows of one matrix."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """(B, G, N, R · C, D) -> (B, H, N, C, D)"""
    return x.unflatten(3, (heads // x.shape[1], -1)).transpose(2, 3).flatten(1, 2)


def _older_mask(spec: AttentionSpec, device: torch.device) -> Tensor:
    """(C, 2C): which keys of the previous and its own chunk a query sees through the linear term."""
    chunk = spec.chunk
    # From the third chunk of a sequence on, the pattern does not depend on the position of the chunk.
    n = torch.arange(chunk, device=device)[:, None] + 2 * chunk
    i = torch.arange(2 * chunk, device=device)[None, :] + chunk
    return (i < spec.window_start(n)) & (i <= n)


def _softmax_part(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, position: Tensor, context: Context | None
) -> tuple[Tensor, Tensor]:
    """Softmax over only sinks and window, (B, H, N, C, D), and the largest weight of each query, (B, H, N, C, 1)."""
    spec, groups = mixer.spec, k.shape[1]
    q, k = spec.rotated(q), spec.rotated(k)
    sinks = k[:, :, : spec.sinks], v[:, :, : spec.sinks]
    if context is not None:
        sinks = spec.rotated(context.sink_k), context.sink_v
    keys, values = (_with_sinks(*pair, spec) for pair in zip((k, v), sinks, strict=True))  # (B, G, N, sinks + 2C, D)
    logits = softmax_logits(_grouped(_chunks(q.float(), spec.chunk), groups), keys, mixer.scale, mixer.softcap)
    logits.unflatten(3, (-1, spec.chunk)).add_(_softmax_mask(spec, position, sinks[0].shape[2]))
    p = logits.softmax(-1)
    return _ungrouped(p @ values, q.shape[1]), _ungrouped(p.amax(-1, keepdim=True), q.shape[1])


def _with_sinks(x: Tensor, sinks: Tensor, spec: AttentionSpec) -> Tensor:
    """Lay out keys or values (B, G, T, D) for the queries of each chunk: sinks, the previous chunk, their own."""
    own = _chunks(x.float(), spec.chunk)
    before = pad(own[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([sinks.float()[:, :, None].expand(-1, -1, own.shape[2], -1, -1), before, own], 3)


def _softmax_mask(spec: AttentionSpec, position: Tensor, sinks: int) -> Tensor:
    """(1 or B, 1, N, 1, C, sinks + 2C): 0 for keys that a query sees through softmax, else −∞.

    A query sees the sinks up to its own position, and the keys in its window except sinks and positions before the
    row's first.
    """
    chunk = spec.chunk
    own = position.unflatten(1, (-1, chunk))  # (1 or B, N, C)
    to_sinks = own[..., None] >= torch.arange(sinks, device=own.device)
    causal = torch.ones(chunk, 2 * chunk, dtype=torch.bool, device=own.device).tril(chunk)
    first = position[:, :1].clamp_min(spec.sinks)[..., None]
    to_window = (causal & ~_older_mask(spec, own.device)) & (torch.cat([own - chunk, own], -1) >= first)[:, :, None]
    seen = torch.cat([to_sinks, to_window], -1)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, :, None]


class Past:
    """The keys that the linear term reaches: for each chunk of queries, a state and possibly one more chunk of keys.

    first: number of leading chunks of queries without older keys.
    fk, v: (B, M, N − first, C, F) and (B, M, N − first, C, D), features and values of keys that queries reach.
    near: (C, C) or (M, 1, C, C), how queries weight the keys that they see directly; None if all are in S, z.
    S, z: (B, M, N', F, D) and (B, M, N', F) for the last N' chunks of queries (all but the ``first``, if no
    ``context``).
    """

    def __init__(
        self, k: Tensor, v: Tensor, phi_k: KeyMap, spec: AttentionSpec, position: Tensor, context: Context | None
    ) -> None:
        self.spec, self.position, self.context = spec, position, context
        self.place = torch.arange(spec.chunk, device=k.device)
        self.first = 2 if spec.window == "terraced" else 1
        if spec.kind == "linear":
            self.first = 0
        self.chunks = position.shape[1] // spec.chunk
        kept = max(self.chunks - self.first, 0) * spec.chunk
        fk = phi_k(k[:, :, :kept])
        fk = fk * (position[:, : fk.shape[2]] >= spec.softmax_sinks)[:, None, :, None]
        self.fk, self.v = _chunks(fk, spec.chunk), _chunks(expand_heads(v[:, :, :kept], fk.shape[1]), spec.chunk)
        self.near = self._near()
        self.S, self.z = self._sums()

    def _near(self) -> Tensor | None:
        chunk = self.spec.chunk
        if self.first == 2:
            return None
        own = slice(chunk, None) if self.spec.kind == "linear" else slice(chunk)
        return _older_mask(self.spec, self.place.device)[:, own]

    def _sums(self) -> tuple[Tensor, Tensor]:
        """The state that each chunk of queries sees: the sums at the chunk's start, or one chunk earlier."""
        S, z = (self.fk.mT @ self.v).cumsum_(2), self.fk.sum(3).cumsum_(2)
        if self.near is not None:  # the chunk itself is seen through the mask
            S, z = (pad(x[:, :, :-1], (*(0, 0) * (x.ndim - 3), 1, 0)) for x in (S, z))
        if self.context is not None:
            before = self.context.S[:, :, None], self.context.z[:, :, None]
            S, z = (torch.cat([x] * self.first + [x + y], 2) for x, y in zip(before, (S, z), strict=True))
        return S, z

    def _to_state(self, fq: Tensor, shared: int) -> Tensor:
        """The features (B, M, N, R · C, F) of queries as they read the state; ``shared``: R."""
        return fq

    def _aged(
        self, S: Tensor, z: Tensor, fk: Tensor, since: Tensor, age: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Sums as of ``since`` (B,) tokens ago and keys that are ``age`` (B, C) tokens old, as they weigh now."""
        return S, z, fk

    def read(self, q: Tensor, phi_q: KeyMap) -> tuple[Tensor, Tensor]:
        """Numerator (B, H, N, C, D) and denominator (B, H, N, C, 1) of the linear term."""
        maps, empty = self.fk.shape[1], self.chunks - self.S.shape[2]
        shared = q.shape[1] // maps
        fq = _grouped(_chunks(phi_q(q[:, :, empty * self.spec.chunk :]), self.spec.chunk), maps)
        to_state = self._to_state(fq, shared)
        numerator, denominator = to_state @ self.S, (to_state * self.z[..., None, :]).sum(-1, keepdim=True)
        if self.near is not None:
            skipped = self.S.shape[2] - self.fk.shape[2]
            weights = self.near.repeat(*(1,) * (self.near.ndim - 2), shared, 1)
            near = (fq[:, :, skipped:] @ self.fk.mT) * weights
            numerator = numerator + pad(near @ self.v, (0, 0, 0, 0, skipped, 0))
            denominator = denominator + pad(near.sum(-1, keepdim=True), (0, 0, 0, 0, skipped, 0))
        parts = (_ungrouped(x, q.shape[1]) for x in (numerator, denominator))
        numerator, denominator = (pad(x, (0, 0, 0, 0, empty, 0)) if empty else x for x in parts)
        return numerator, denominator

    def final(self, length: int, lengths: Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor]:
        """S (B, M, F, D) and z (B, M, F): the state that each row's last token sees; ``lengths``: default all T."""
        count = torch.as_tensor(length if lengths is None else lengths, device=self.place.device).expand(len(self.fk))
        chunk, last = self.spec.chunk, None if lengths is None else (count - 1).clamp_min(0) // self.spec.chunk
        S, z = self._at(self.S, last), self._at(self.z, last)
        if self.near is None:
            return S, z
        seen = self.position[:, 0] + count  # (B,)
        end = self.spec.window_start(seen - 1).minimum(seen)[:, None]
        begin = (self.chunks - 1 if last is None else last[:, None]) * chunk
        place = self.position[:, :1] + begin - self.first * chunk + self.place
        fk = self._at(self.fk, last) * (place < end)[:, None, :, None]
        S, z, fk = self._aged(S, z, fk, (count[:, None] - begin)[:, 0], seen[:, None] - 1 - place)
        return S + fk.mT @ self._at(self.v, last), z + fk.sum(2)

    def _at(self, x: Tensor, last: Tensor | None) -> Tensor:
        """Select each row's chunk ``last`` (B,; default: the final one) from x (B, M, n, ...) for the last n chunks."""
        if last is None and x.shape[2]:
            return x[:, :, -1].clone()
        x = pad(x, (*(0, 0) * (x.ndim - 3), self.chunks - x.shape[2], 0))
        return x[:, :, -1] if last is None else x[torch.arange(len(x), device=x.device), :, last]
