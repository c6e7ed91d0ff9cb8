"""Move a state forward by many tokens (:func:`extend`) or by one (:func:`step`).

Both compute the same function as the parallel form. Each row of a batch counts its own tokens, so padding on any side,
prompts of different lengths and prefill in pieces need no special case.

If the host knows how many tokens every row has (``Seen.known``), nothing here waits for a GPU, and the first tokens of
a sequence are used without a copy.

Shapes: B batch, H query heads, G key/value heads, T new tokens, D head dim, F features, W ring slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from lolcats.attention.chunked import Context, merged
from lolcats.attention.dispatch import attention
from lolcats.attention.mixer import KeyMap, Mixer
from lolcats.attention.path import Path, choose_decode_path, choose_path
from lolcats.attention.reference import expand_heads, softmax_logits
from lolcats.attention.rounding import rounded
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import AttentionState, KeyValues, SlotState, Sums
from lolcats.attention.subset import HeadSubset
from lolcats.attention.supra import decay_of_a_step, finished

SEGMENT = 1024  # tokens laid out at a time by the chunked path


def extend(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, mask: Tensor | None = None,
    counts: Sequence[int] | None = None, path: Path | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Outputs (B, H, T, D) for T new tokens, in the dtype of :func:`attention`, and the state after them.

    The kernels process any length at once. The chunked path splits long inputs into segments, so intermediates stay in
    the processor's caches and only inputs and outputs grow with T. With gradients, segments are recomputed in backward.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D), any float dtype.
        mask: (B, T) bool, False for padding (on either side, or in between), which is skipped and has output 0.
        counts: number of real tokens in each row, if already known on the host.
        path: the code that computes it; None chooses it now.
    """
    path = path or choose_path(q, mixer.spec, final=True)
    if q.shape[2] <= SEGMENT or path == "kernels":
        return _extend(state, q, k, v, mixer, path, mask, counts)
    # split, not slices: the gradient of a slice is as large as the whole, so backward would be quadratic.
    pieces = zip(*(x.split(SEGMENT, 2) for x in (q, k, v)), strict=True)
    masks = repeat(None) if mask is None else mask.split(SEGMENT, 1)
    outputs = []
    for piece, rows in zip(pieces, masks, strict=False):
        arguments = (state, *piece, mixer, path, rows)
        if torch.is_grad_enabled():
            y, state = checkpoint(_extend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _extend(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def _extend(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, path: Path, mask: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """One segment of :func:`extend`: lay out, attend, and keep what later tokens need."""
    rows = _lay_out(state, q, k, v, mixer.spec, mask)
    sinks = KeyValues(_sinks(rows.k, state.sinks.k, rows.start), _sinks(rows.v, state.sinks.v, rows.start))
    fresh = state.seen.same == 0
    context = None if fresh else Context(rows.start, *sinks, state.sums.S.float(), state.sums.z)
    seen = state.seen.plus(q.shape[2]) if mask is None else state.seen.plus(mask.sum(1), counts)
    lengths = None if seen.same is not None else seen.each if fresh and seen.each else seen.rows - rows.start
    y, S, z = attention(rows.q, rows.k, rows.v, mixer, path, context=context, lengths=lengths, final=True)
    sums = state.sums if S is None or z is None else Sums(rounded(S, state.sums.S.dtype, seen.rows - 1), z)
    after = dataclasses.replace(state, seen=seen, sinks=sinks, sums=sums)
    if mixer.spec.span:
        index = (after.ring_positions() - rows.start[:, None]).clamp_min(0)
        after = dataclasses.replace(after, ring=KeyValues(_gather(rows.k, index), _gather(rows.v, index)))
    return rows.outputs(y, mask), after


def compacted(mask: Tensor, attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``attend(*tensors)`` (B, H, T, D) with each row's real tokens moved to the front, and back; 0 for padding.

    mask: (B, T) bool, False for padding. tensors: (B, heads, T, D) each.
    """
    length = mask.shape[1]
    index = (mask.cumsum(1) - 1).where(mask, length)
    y = attend(*(_scatter(x, index, length) for x in tensors))
    return _gather(y, index.clamp_max(length - 1)) * mask[:, None, :, None]


def step(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, backend: str | None = None,
    subset: HeadSubset | None = None, slots: Tensor | None = None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """Output (B, H, 1, D) for one new token per row, and the state after it. Constant time and memory.

    Arguments as for :func:`extend`, with q (B, H, 1, D) and k, v (B, G, 1, D).

    A :class:`SlotState` is written in place, by the decode kernel if possible, with the output dtype of the other
    kernels; otherwise the output is fp32.

    Args:
        subset: the heads that the state is of, if q, k and v have more. Only for the kernel; the output is then
            ``subset.out``.
        slots: (B,) the row of the state's tensors for each row of q, and ``state.seen.rows`` (B,) its tokens. Only for
            the kernel, which neither counts the tokens nor reads what a sequence that begins finds in its row. A row
            with −1 tokens is padding: its output is 0.
    """
    if isinstance(state, SlotState) and choose_decode_path(q, mixer, backend) == "kernels":
        from lolcats.attention.kernels.decode import decode

        return decode(state, q, k, v, mixer, subset, slots), state.at(None)
    assert subset is None
    assert slots is None
    spec, arrival = mixer.spec, _arrival(state, mixer.spec)
    state = _fold(state, k, v, mixer.phi_k, spec, arrival).stored(k, v, arrival.slot, arrival.sink)
    linear = None
    if spec.has_linear:
        fq = _grouped(mixer.phi_q(q), state.sums.S)
        linear = _ungrouped(fq @ state.sums.S.float()), _ungrouped(fq @ state.sums.z[..., None])
    if not spec.has_softmax:
        assert linear is not None
        return finished(*linear, mixer), state
    keys = spec.rotated(torch.cat((state.sinks.k, state.ring.k), 2).float())
    values, queries = torch.cat((state.sinks.v, state.ring.v), 2).float(), _grouped(spec.rotated(q).float(), k)
    p = (softmax_logits(queries, keys, mixer.scale, mixer.softcap) + arrival.bias).softmax(-1)
    return merged(_ungrouped(p @ values), _ungrouped(p.amax(-1, keepdim=True)), mixer.gamma, linear), state


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
    seen, each = state.seen.rows, state.seen.each
    return Arrival.of(seen, spec) if each is None else _known_arrival(each, spec, seen.device)


@lru_cache(maxsize=8)  # all layers of a model ask for the same
def _known_arrival(counts: tuple[int, ...], spec: AttentionSpec, device: torch.device) -> Arrival:
    with torch.inference_mode(False), torch.no_grad():  # autograd may use what inference mode cached
        bias, slot, sink, leaving = Arrival.of(torch.tensor(counts), spec)
    if leaving is not None:
        leaving = leaving[0].to(device), leaving[1].to(device), leaving[2].to(device)
    return Arrival(bias.to(device), slot.to(device), None if sink is None else sink.to(device), leaving)


def _fold(
    state: AttentionState, k: Tensor, v: Tensor, phi_k: KeyMap, spec: AttentionSpec, arrival: Arrival
) -> AttentionState:  # fmt: skip
    """Move the keys that leave the window of the new token into S and z."""
    if not spec.has_linear:
        return state
    if spec.kind == "linear":  # no window: the new key itself
        fk = phi_k(k)
        S, z = fk.mT @ expand_heads(v, fk.shape[1]), fk.sum(2)
        if spec.decays:
            S, z = (new + lost for new, lost in zip((S, z), decay_of_a_step(state.sums, spec), strict=True))
        return state.added(torch.arange(len(k), device=k.device), S, z)
    if arrival.leaving is None:
        return state
    rows, slots, leaving = arrival.leaving
    old_k, old_v = (_gather(x[rows], slots) for x in state.ring)
    fk = phi_k(old_k) * leaving[:, None, :, None]
    return state.added(rows, fk.mT @ expand_heads(old_v, fk.shape[1]), fk.sum(2))


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
    seen, count, ring = state.seen.rows, state.seen.same, state.ring
    if count is not None and mask is None:
        first = min(max(spec.window_start(count - 1), 0), count)
        start, old = torch.full_like(seen, first), count - first
        if not old:
            return _Rows(q, k, v, start, 0)
        slots = torch.arange(first, count, device=q.device) % ring.k.shape[2]
        k, v = torch.cat([ring.k[:, :, slots], k], 2), torch.cat([ring.v[:, :, slots], v], 2)
        return _Rows(pad(q, (0, 0, old, 0)), k, v, start, old)
    valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
    start = spec.window_start(seen - 1).clamp_min(0).minimum(seen)
    old_positions, room = state.ring_positions(), q.shape[2] + (0 if count == 0 else ring.k.shape[2])
    index = torch.cat([old_positions, seen[:, None] + valid.cumsum(1) - 1], 1) - start[:, None]
    # `room`: a slot that is discarded
    index = index.where(torch.cat([old_positions >= start[:, None], valid], 1), room)
    new = index[:, old_positions.shape[1] :]
    k = _scatter(torch.cat([ring.k, k], 2), index, room)
    v = _scatter(torch.cat([ring.v, v], 2), index, room)
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
