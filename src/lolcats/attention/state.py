"""Fixed-size state of a sequence, moved forward by many tokens (:func:`extend`) or by one (:func:`step`).

Both are the same function as the parallel form. Every row of a batch has its own count of tokens seen, so padding on
any side, prompts of different lengths and prefill in pieces need no special case.

The ring buffer holds the last W = ``spec.span`` keys: position p lives in slot p mod W. A key moves into S and z when
the window of an arriving token no longer reaches it, just before its slot is overwritten.

Shapes: B batch, H query heads, G key/value heads, T new tokens, D head dim, F features, W ring slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lolcats.attention.chunked import Context, chunked_attention
from lolcats.attention.reference import expand_heads, normalize, softmax_logits
from lolcats.attention.spec import AttentionSpec

KeyMap = Callable[[Tensor], Tensor]
SEGMENT = 1024  # tokens laid out at a time


@dataclass
class AttentionState:
    """All that a layer remembers of the tokens seen.

    seen: (B,) int64, tokens so far; ring_k, ring_v: (B, G, W, D); sink_k, sink_v: (B, G, sinks, D);
    S: (B, H or G, F, D) fp32; z: (B, H or G, F) fp32. F = 0 where the kind has no linear term.
    """

    seen: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    S: Tensor
    z: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, maps: int, features: int, spec: AttentionSpec) -> AttentionState:
        """State before the first token, for keys and values like ``k``, ``v`` (B, G, *, D); ``maps``: H or G."""
        batch, features = k.shape[0], features if spec.has_linear else 0

        def zeros(x: Tensor, length: int) -> Tensor:
            return x.new_zeros(*x.shape[:2], length, x.shape[3])

        return cls(
            seen=torch.zeros(batch, dtype=torch.long, device=k.device),
            ring_k=zeros(k, spec.span), ring_v=zeros(v, spec.span),
            sink_k=zeros(k, spec.softmax_sinks), sink_v=zeros(v, spec.softmax_sinks),
            S=torch.zeros(batch, maps, features, v.shape[3], device=k.device),
            z=torch.zeros(batch, maps, features, device=k.device),
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> AttentionState:
        """A state whose tensors are ``change(tensor)``: reorder, repeat, move."""
        return AttentionState(**{f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in dataclasses.fields(self))

    def ring_positions(self) -> Tensor:
        """(B, W) position of the key in each slot; negative: nothing there yet."""
        last, slots = self.seen[:, None] - 1, torch.arange(self.ring_k.shape[2], device=self.seen.device)
        return last - (last - slots) % slots.numel() if slots.numel() else slots.expand(self.seen.shape[0], 0)


def extend(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Outputs (B, H, T, D) fp32 for T new tokens, and the state after them.

    Long inputs go through in segments, so that what is computed on the way stays in the processor's caches and only
    inputs and outputs grow with T; with gradients, segments are recomputed in backward.

    Args:
        mask: (B, T) bool, False where a token is padding (on either side, or between): skipped, output 0.
        phi_q, phi_k: (B, H, T, D) or (B, G, T, D) -> features; phi_k expands to H heads by itself where maps are per
            query head.
    """
    common = (phi_q, phi_k, gamma, spec, scale, softcap)
    if q.shape[2] <= SEGMENT:
        return _extend(state, q, k, v, *common, mask)
    # split and not slices: the gradient of a slice is as large as the whole, which would make backward quadratic.
    pieces = zip(*(x.split(SEGMENT, 2) for x in (q, k, v)), strict=True)
    masks = repeat(None) if mask is None else mask.split(SEGMENT, 1)
    outputs = []
    for piece, rows in zip(pieces, masks, strict=False):
        arguments = (state, *piece, *common, rows)
        if torch.is_grad_enabled():
            y, state = checkpoint(_extend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _extend(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def _extend(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None, mask: Tensor | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """One segment of :func:`extend`.

    The keys still in the ring and the new ones are laid out as one sequence per row, beginning at the window start of
    the row's last token, so that the chunk grid of every row is aligned with its own first token.
    """
    batch, _, length, _ = q.shape
    valid = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
    start = spec.window_start(state.seen - 1).clamp_min(0).minimum(state.seen)  # (B,) first position laid out
    old = state.ring_positions()
    new = state.seen[:, None] + valid.cumsum(1) - 1
    room = int((state.seen - start).max()) + length
    index = torch.cat([old, new], 1) - start[:, None]
    index = index.where(torch.cat([old >= start[:, None], valid], 1), room)  # `room`: a slot that is thrown away
    rows = (
        _scatter(torch.cat([state.ring_k, k], 2), index, room),
        _scatter(torch.cat([state.ring_v, v], 2), index, room),
    )
    new_index = index[:, old.shape[1] :]
    queries = _scatter(q, new_index, room)
    fq, fk = (phi_q(queries), phi_k(rows[0])) if spec.has_linear else (None, None)
    sinks = _sinks(rows[0], state.sink_k, start), _sinks(rows[1], state.sink_v, start)
    context = Context(start, *sinks, state.S, state.z)
    y = chunked_attention(queries, *rows, fq, fk, gamma, spec, scale, softcap, context)
    y = _gather(y, new_index.clamp_max(room - 1)) * valid[:, None, :, None]
    return y, _after(state, rows, fk, sinks, start, valid.sum(1), spec)


def step(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Output (B, H, 1, D) fp32 for one new token a row, and the state after it. Constant time and memory."""
    state = _fold(state, k, v, phi_k, spec)
    n, heads = state.seen, q.shape[1]  # the new token's position, (B,)
    ring_k, ring_v = _write(state.ring_k, k, n), _write(state.ring_v, v, n)
    is_sink = (n[:, None] == torch.arange(state.sink_k.shape[2], device=n.device))[:, None, :, None]
    sink_k, sink_v = torch.where(is_sink, k, state.sink_k), torch.where(is_sink, v, state.sink_v)
    state = AttentionState(n + 1, ring_k, ring_v, sink_k, sink_v, state.S, state.z)
    numerator = denominator = torch.zeros((), device=q.device)
    if spec.has_softmax:
        positions = state.ring_positions()
        reach = positions >= spec.window_start(n)[:, None].clamp_min(spec.sinks)
        sinks = torch.arange(spec.sinks, device=n.device) <= n[:, None]
        keys, values = torch.cat([sink_k, ring_k], 2), torch.cat([sink_v, ring_v], 2)
        keys, values = expand_heads(keys, heads), expand_heads(values, heads)
        logits = softmax_logits(q.float(), keys, scale, softcap)
        logits = logits.masked_fill(~torch.cat([sinks, reach], 1)[:, None, None], -torch.inf)
        e = gamma.float().view(-1, 1, 1) * torch.exp(logits - logits.amax(-1, keepdim=True))
        numerator, denominator = e @ values, e.sum(-1, keepdim=True)
    if spec.has_linear:
        fq = phi_q(q)
        numerator = numerator + fq @ expand_heads(state.S, heads)
        denominator = denominator + fq @ expand_heads(state.z, heads)[..., None]
    return normalize(numerator, denominator), state


def _fold(state: AttentionState, k: Tensor, v: Tensor, phi_k: KeyMap, spec: AttentionSpec) -> AttentionState:
    """Move into S and z what the window of the arriving token no longer reaches."""
    if not spec.has_linear:
        return state
    if spec.kind == "linear":  # no window: the new key itself
        fk = phi_k(k)
        return dataclasses.replace(state, S=state.S + fk.mT @ expand_heads(v, fk.shape[1]), z=state.z + fk.sum(2))
    positions, n = state.ring_positions(), state.seen[:, None]
    leaving = (positions >= spec.window_start(n - 1).clamp_min(spec.sinks)) & (positions < spec.window_start(n))
    if not leaving.any():
        return state
    fk = phi_k(state.ring_k) * leaving[:, None, :, None]
    S = state.S + fk.mT @ expand_heads(state.ring_v, fk.shape[1])
    return dataclasses.replace(state, S=S, z=state.z + fk.sum(2))


def _after(
    state: AttentionState, rows: tuple[Tensor, Tensor], fk: Tensor | None, sinks: tuple[Tensor, Tensor], start: Tensor,
    added: Tensor, spec: AttentionSpec,
) -> AttentionState:  # fmt: skip
    """The state after a call of :func:`extend`, from its laid-out rows."""
    after = AttentionState(state.seen + added, state.ring_k, state.ring_v, sinks[0], sinks[1], state.S, state.z)
    if fk is not None:
        position = start[:, None] + torch.arange(rows[0].shape[2], device=start.device)
        end = spec.window_start(after.seen - 1).minimum(after.seen)[:, None]
        fk = fk * ((position >= spec.softmax_sinks) & (position < end))[:, None, :, None]
        after.S, after.z = state.S + fk.mT @ expand_heads(rows[1], fk.shape[1]), state.z + fk.sum(2)
    if spec.span:
        index = (after.ring_positions() - start[:, None]).clamp_min(0)
        after.ring_k, after.ring_v = _gather(rows[0], index), _gather(rows[1], index)
    return after


def _sinks(row: Tensor, known: Tensor, start: Tensor) -> Tensor:
    """(B, G, sinks, D): from the row where it begins at position 0, else those already known."""
    count = known.shape[2]
    fresh = torch.nn.functional.pad(row, (0, 0, 0, max(0, count - row.shape[2])))[:, :, :count]
    return torch.where((start == 0)[:, None, None, None], fresh, known)


def _write(ring: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """``ring`` (B, G, W, D) with x (B, G, 1, D) in the slot of ``position`` (B,)."""
    if not ring.shape[2]:
        return ring
    return ring.scatter(2, (position % ring.shape[2])[:, None, None, None].expand_as(x), x)


def _scatter(x: Tensor, index: Tensor, room: int) -> Tensor:
    """(B, heads, T, D) placed at ``index`` (B, T) of ``room`` slots; index ``room`` is dropped, gaps are 0."""
    out = x.new_zeros(*x.shape[:2], room + 1, x.shape[3])
    return out.scatter(2, index[:, None, :, None].expand_as(x), x)[:, :, :room]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, heads, T', D) read at ``index`` (B, T) -> (B, heads, T, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
