"""Fixed-size state of a sequence, advanced by many tokens (:func:`extend`) or by one (:func:`step`).

Both compute the same function as the parallel form. Each row of a batch counts its own tokens, so padding on any side,
prompts of different lengths and prefill in pieces need no special case.

If the host knows how many tokens every row has (``count``), nothing here waits for a GPU, and the first tokens of a
sequence are used without a copy.

The ring buffer holds the last W = ``spec.span`` keys: position p lives in slot p mod W. A key moves into S and z when
the window of an arriving token no longer reaches it, just before its slot is overwritten.

Shapes: B batch, H query heads, G key/value heads, T new tokens, D head dim, F features, W ring slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from lolcats.attention.chunked import Context, KeyMap, merged
from lolcats.attention.dispatch import attention, uses_decode_kernel, uses_kernels
from lolcats.attention.reference import expand_heads, output, softmax_logits
from lolcats.attention.rounding import stochastic
from lolcats.attention.spec import AttentionSpec

SEGMENT = 1024  # tokens laid out at a time by the chunked path


@dataclass
class AttentionState:
    """Everything that a layer remembers of the tokens seen.

    seen: (B,) int64, tokens so far; ring_k, ring_v: (B, G, W, D); sink_k, sink_v: (B, G, sinks, D);
    S: (B, H or G, F, D) fp32, or bf16 and rounded stochastically by :func:`step` (see :mod:`.rounding`); z: (B, H or G,
    F) fp32. F = 0 if the kind has no linear term.
    count: ``seen`` if it is the same in every row and known on the host, else None.
    counts: ``seen`` of each row, if known on the host; used only by the next :func:`step`.
    in_place: :func:`step` writes into these tensors instead of allocating new ones; no gradients.
    """

    seen: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    S: Tensor
    z: Tensor
    count: int | None
    in_place: bool = False
    counts: tuple[int, ...] | None = None

    @classmethod
    def empty(
        cls, k: Tensor, v: Tensor, maps: int, features: int, spec: AttentionSpec, dtype: torch.dtype = torch.float32
    ) -> AttentionState:
        """State before the first token, for keys and values like ``k``, ``v`` (B, G, *, D).

        maps: H or G. dtype: dtype of S.
        """
        batch, features = k.shape[0], features if spec.has_linear else 0

        def zeros(x: Tensor, length: int) -> Tensor:
            return x.new_zeros(*x.shape[:2], length, x.shape[3])

        return cls(
            seen=torch.zeros(batch, dtype=torch.long, device=k.device),
            ring_k=zeros(k, spec.span), ring_v=zeros(v, spec.span),
            sink_k=zeros(k, spec.softmax_sinks), sink_v=zeros(v, spec.softmax_sinks),
            S=torch.zeros(batch, maps, features, v.shape[3], dtype=dtype, device=k.device),
            z=torch.zeros(batch, maps, features, device=k.device),
            count=0,
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> AttentionState:
        """Apply ``change`` to every tensor, to reorder, repeat or move rows."""
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors().values())

    def ring_positions(self) -> Tensor:
        """(B, W) position of the key in each slot; negative if the slot is empty."""
        last, slots = self.seen[:, None] - 1, torch.arange(self.ring_k.shape[2], device=self.seen.device)
        return last - (last - slots) % slots.numel() if slots.numel() else slots.expand(self.seen.shape[0], 0)


def extend(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None, mask: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Outputs (B, H, T, D) for T new tokens, in the dtype of :func:`attention`, and the state after them.

    The kernels process any length at once. The chunked path splits long inputs into segments, so intermediates stay in
    the processor's caches and only inputs and outputs grow with T. With gradients, segments are recomputed in backward.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D), any float dtype.
        gamma: (H,) the window's weight, fp32.
        mask: (B, T) bool, False for padding (on either side, or in between), which is skipped and has output 0.
        counts: number of real tokens in each row, if already known on the host.
        phi_q, phi_k: feature maps of (B, H, T, D) and (B, G, T, D).
    """
    common = (phi_q, phi_k, gamma, spec, scale, softcap)
    if q.shape[2] <= SEGMENT or uses_kernels(q, spec, final=True):
        return _extend(state, q, k, v, *common, mask, counts)
    # split, not slices: the gradient of a slice is as large as the whole, so backward would be quadratic.
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
    spec: AttentionSpec, scale: float, softcap: float | None, mask: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """One segment of :func:`extend`: lay out, attend, and keep what later tokens need."""
    rows = _lay_out(state, q, k, v, spec, mask)
    sinks = _sinks(rows.k, state.sink_k, rows.start), _sinks(rows.v, state.sink_v, rows.start)
    fresh = state.count == 0
    context = None if fresh else Context(rows.start, *sinks, state.S.float(), state.z)
    added: Tensor | int = q.shape[2] if mask is None else mask.sum(1)
    after = dataclasses.replace(
        state, seen=state.seen + added, sink_k=sinks[0], sink_v=sinks[1],
        count=None if state.count is None or mask is not None else state.count + q.shape[2],
    )  # fmt: skip
    lengths = None if after.count is not None else counts if fresh and counts else after.seen - rows.start
    y, S, z = attention(
        rows.q, rows.k, rows.v, phi_q, phi_k, gamma, spec, scale, softcap, context=context, lengths=lengths, final=True
    )
    if S is not None and z is not None:
        after.S, after.z = S.to(state.S.dtype), z
    if spec.span:
        index = (after.ring_positions() - rows.start[:, None]).clamp_min(0)
        after.ring_k, after.ring_v = _gather(rows.k, index), _gather(rows.v, index)
    return rows.outputs(y, mask), after


def compacted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """``attend(q, k, v)`` (B, H, T, D) with each row's real tokens moved to the front, and back; 0 for padding.

    mask: (B, T) bool, False for padding.
    """
    length = q.shape[2]
    index = (mask.cumsum(1) - 1).where(mask, length)
    y = attend(*(_scatter(x, index, length) for x in (q, k, v)))
    return _gather(y, index.clamp_max(length - 1)) * mask[:, None, :, None]


def step(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Output (B, H, 1, D) for one new token per row, and the state after it. Constant time and memory.

    Arguments as for :func:`extend`, with q (B, H, 1, D) and k, v (B, G, 1, D).

    States that are ``in_place`` use the decode kernel if possible, with the output dtype of the other kernels;
    otherwise the output is fp32.
    """
    if state.in_place and uses_decode_kernel(q, phi_q, spec):
        from lolcats.attention.kernels.decode import decode

        return decode(state, q, k, v, phi_q, phi_k, gamma, spec, scale, softcap), state
    arrival = _arrival(state, spec)
    state = _fold(state, k, v, phi_k, spec, arrival)
    state = _append(state, k, v, arrival)
    linear = None
    if spec.has_linear:
        fq = _grouped(phi_q(q), state.S)
        linear = _ungrouped(fq @ state.S.float()), _ungrouped(fq @ state.z[..., None])
    if not spec.has_softmax:
        assert linear is not None
        return output(spec, *linear), state
    keys, values = (torch.cat(x, 2).float() for x in ((state.sink_k, state.ring_k), (state.sink_v, state.ring_v)))
    queries, keys = _grouped(spec.rotated(q).float(), k), spec.rotated(keys)
    p = (softmax_logits(queries, keys, scale, softcap) + arrival.bias).softmax(-1)
    return merged(_ungrouped(p @ values), _ungrouped(p.amax(-1, keepdim=True)), gamma, linear), state


class Arrival(NamedTuple):
    """Where the new token of each row, at position n (B,), goes and what it sees: the same in every layer.

    bias: (B, 1, 1, sinks + W), 0 for sinks and ring slots that it sees through softmax (its own included), else −∞.
    slot: (B, 1, 1, 1), its slot in the ring.
    sink: (B, 1, sinks, 1) bool, True if the token is that sink; None if no row's token is a sink.
    leaving: rows (R,), ring slots and mask (R, stride) of the keys that leave the window; None if no key does.
    """

    bias: Tensor
    slot: Tensor
    sink: Tensor | None
    leaving: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, n: Tensor, spec: AttentionSpec) -> Arrival:
        n, slots = n[:, None], torch.arange(spec.span, device=n.device)
        places = torch.arange(spec.softmax_sinks, device=n.device)
        positions = n - (n - slots) % max(spec.span, 1)  # of the key in each slot, once the token is added
        reached = positions >= spec.window_start(n).clamp_min(spec.sinks)
        seen = torch.cat([places <= n, reached], 1)[:, None, None]
        is_sink = n == places
        first, end = spec.window_start(n - 1), spec.window_start(n)
        old = first + torch.arange(spec.stride, device=n.device)
        leaves = (old >= spec.sinks) & (old < end)
        rows = leaves.any(1).nonzero()[:, 0]
        return cls(
            bias=torch.zeros(seen.shape, device=n.device).masked_fill(~seen, -torch.inf),
            slot=(n % max(spec.span, 1))[:, None, :, None],
            sink=is_sink[:, None, :, None] if is_sink.any() else None,
            leaving=(rows, old[rows] % max(spec.span, 1), leaves[rows]) if len(rows) else None,
        )


def _arrival(state: AttentionState, spec: AttentionSpec) -> Arrival:
    counts = state.counts
    if counts is None and state.count is not None:
        counts = (state.count,) * len(state.seen)
    return Arrival.of(state.seen, spec) if counts is None else _known_arrival(counts, spec, state.seen.device)


@lru_cache(maxsize=8)  # all layers of a model ask for the same
def _known_arrival(counts: tuple[int, ...], spec: AttentionSpec, device: torch.device) -> Arrival:
    with torch.inference_mode(False), torch.no_grad():  # autograd may use what inference mode cached
        bias, slot, sink, leaving = Arrival.of(torch.tensor(counts), spec)
    if leaving is not None:
        leaving = leaving[0].to(device), leaving[1].to(device), leaving[2].to(device)
    return Arrival(bias.to(device), slot.to(device), None if sink is None else sink.to(device), leaving)


def _append(state: AttentionState, k: Tensor, v: Tensor, arrival: Arrival) -> AttentionState:
    """Store the new key and value (B, G, 1, D) in ring and sinks, and count the token."""
    new: dict[str, Any] = {}
    if arrival.sink is not None:
        new = {
            "sink_k": torch.where(arrival.sink, k, state.sink_k), "sink_v": torch.where(arrival.sink, v, state.sink_v)
        }  # fmt: skip
    if state.ring_k.shape[2]:
        index = arrival.slot.expand_as(k), arrival.slot.expand_as(v)
        scatter: Any = Tensor.scatter_ if state.in_place else Tensor.scatter
        new |= {"ring_k": scatter(state.ring_k, 2, index[0], k), "ring_v": scatter(state.ring_v, 2, index[1], v)}
    if not state.in_place:
        count = None if state.count is None else state.count + 1
        return dataclasses.replace(state, seen=state.seen + 1, count=count, **new)
    for name in ("sink_k", "sink_v"):
        if name in new:
            getattr(state, name).copy_(new[name])
    state.seen += 1
    state.counts = None
    return state


def _add(state: AttentionState, rows: Tensor, S: Tensor, z: Tensor) -> AttentionState:
    """Add ``S`` and ``z`` to the sums of ``rows`` (R,)."""
    if state.S.dtype != torch.float32:
        after = stochastic(state.S[rows].float() + S, state.seen[rows])
        if state.in_place:
            state.S[rows] = after
            state.z.index_add_(0, rows, z)
            return state
        return dataclasses.replace(state, S=state.S.index_copy(0, rows, after), z=state.z.index_add(0, rows, z))
    if state.in_place:
        state.S.index_add_(0, rows, S)
        state.z.index_add_(0, rows, z)
        return state
    return dataclasses.replace(state, S=state.S.index_add(0, rows, S), z=state.z.index_add(0, rows, z))


def _fold(
    state: AttentionState, k: Tensor, v: Tensor, phi_k: KeyMap, spec: AttentionSpec, arrival: Arrival
) -> AttentionState:  # fmt: skip
    """Move the keys that leave the window of the new token into S and z."""
    if not spec.has_linear:
        return state
    if spec.kind == "linear":  # no window: the new key itself
        fk = phi_k(k)
        rows = torch.arange(len(state.seen), device=k.device)
        S, z = fk.mT @ expand_heads(v, fk.shape[1]), fk.sum(2)
        if spec.decays:
            lost = -torch.expm1(spec.log_decay(fk.shape[1], k.device))[:, None]
            S, z = S - lost[..., None] * state.S.float(), z - lost * state.z
        return _add(state, rows, S, z)
    if arrival.leaving is None:
        return state
    rows, slots, leaving = arrival.leaving
    old_k, old_v = _gather(state.ring_k[rows], slots), _gather(state.ring_v[rows], slots)
    fk = phi_k(old_k) * leaving[:, None, :, None]
    return _add(state, rows, fk.mT @ expand_heads(old_v, fk.shape[1]), fk.sum(2))


def _grouped(x: Tensor, shared: Tensor) -> Tensor:
    """(B, H, 1, D) -> (B, G, H / G, D): query heads grouped by the head of ``shared`` that they use."""
    return x[:, :, 0].unflatten(1, (shared.shape[1], -1))


def _ungrouped(y: Tensor) -> Tensor:
    """(B, G, H / G, D) -> (B, H, 1, D)"""
    return y.flatten(1, 2)[:, :, None]


class _Rows(NamedTuple):
    """Keys from the ring followed by the new tokens, one sequence per row, from the last seen token's window start on.

    This aligns the chunk grid of every row with its own first token. q: (B, H, T', D); k, v: (B, G, T', D); start: (B,)
    position of the first key; place: (B, T) places of the new tokens, or the number of old ones before them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    place: Tensor | int

    def outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T', D) -> (B, H, T, D): the outputs of the new tokens, 0 for padding."""
        if isinstance(self.place, int):
            return y[:, :, self.place :]
        y = _gather(y, self.place.clamp_max(y.shape[2] - 1))
        return y if mask is None else y * mask[:, None, :, None]


def _lay_out(state: AttentionState, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> _Rows:
    if state.count is not None and mask is None:
        first = min(max(spec.window_start(state.count - 1), 0), state.count)
        start, old = torch.full_like(state.seen, first), state.count - first
        if not old:
            return _Rows(q, k, v, start, 0)
        slots = torch.arange(first, state.count, device=q.device) % state.ring_k.shape[2]
        k, v = torch.cat([state.ring_k[:, :, slots], k], 2), torch.cat([state.ring_v[:, :, slots], v], 2)
        return _Rows(pad(q, (0, 0, old, 0)), k, v, start, old)
    valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
    start = spec.window_start(state.seen - 1).clamp_min(0).minimum(state.seen)
    old_positions, room = state.ring_positions(), q.shape[2] + (0 if state.count == 0 else state.ring_k.shape[2])
    index = torch.cat([old_positions, state.seen[:, None] + valid.cumsum(1) - 1], 1) - start[:, None]
    # `room`: a slot that is discarded
    index = index.where(torch.cat([old_positions >= start[:, None], valid], 1), room)
    new = index[:, old_positions.shape[1] :]
    k = _scatter(torch.cat([state.ring_k, k], 2), index, room)
    v = _scatter(torch.cat([state.ring_v, v], 2), index, room)
    return _Rows(_scatter(q, new, room), k, v, start, new)


def _sinks(row: Tensor, known: Tensor, start: Tensor) -> Tensor:
    """(B, G, sinks, D): taken from rows that start at position 0, otherwise those already known."""
    count = known.shape[2]
    fresh = pad(row, (0, 0, 0, max(0, count - row.shape[2])))[:, :, :count]
    return torch.where((start == 0)[:, None, None, None], fresh, known)


def _scatter(x: Tensor, index: Tensor, room: int) -> Tensor:
    """(B, heads, T, D) placed at ``index`` (B, T) of ``room`` slots; index ``room`` is dropped, gaps are 0."""
    out = x.new_zeros(*x.shape[:2], room + 1, x.shape[3])
    return out.scatter(2, index[:, None, :, None].expand_as(x), x)[:, :, :room]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, heads, T', D) read at ``index`` (B, T) -> (B, heads, T, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
