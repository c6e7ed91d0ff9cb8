"""The kernels behind one differentiable function.

Shapes: B batch, H query heads, G key/value heads, M key maps (H or G), T tokens, D head dim, f half of the features,
N sequences. The kernels take the two halves of a feature map (softmax(y) and softmax(−y)) apart, so that both
products with the state are small enough to stay in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.attention.chunked import Context
from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.kernels.backward import key_kernel, query_kernel, shift_kernel
from lolcats.attention.kernels.forward import output_kernel, scan_kernel, sum_kernel
from lolcats.attention.kernels.layout import Blocks, Layout, Rows, choose_blocks, dense_rows, make_layout, packed_rows
from lolcats.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """Everything about a call that is no tensor to differentiate."""

    spec: AttentionSpec
    scale: float
    softcap: float | None
    rows: Rows
    context: Context | None = None
    final: bool = False
    segment: int | None = None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: FeatureMap | None, phi_k: FeatureMap | None, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None, *, features: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None, lengths: Sequence[int] | None = None, cu_seqlens: Sequence[int] | None = None,
    final: bool = False, segment: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Hybrid or linear attention by the Triton kernels, differentiable in q, k, v, both feature maps and gamma.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D); fp32, bf16 or fp16, any strides whose last is 1.
        phi_q, phi_k: feature maps with H and H or G heads. Hedgehog is computed inside the kernels, others before them.
        gamma: (H,) fp32.
        features: φ(q) (B, H, T, F) and φ(k) (B, H or G, T, F) instead of feature maps; F even.
        context: what came before the first token (see :class:`Context`); no gradient flows into it.
        lengths: of each batch row, when rows are shorter than T (outputs behind them are 0).
        cu_seqlens: cumulative lengths [0, ..., T] of sequences packed into a batch of one.
        final: also return the state after each sequence's last token.
        segment: blocks per program; chosen from the number of processors if None.

    Returns:
        outputs (B, H, T, D) in bf16 for bf16 inputs, else fp32; and, with ``final``, S (N, H or G, F, D) and
        z (N, H or G, F) fp32 over all keys that the window of the last token no longer reaches, no gradient through
        them; else None.
    """
    batch, _, tokens, _ = q.shape
    rows = dense_rows(batch, tokens, lengths) if cu_seqlens is None else packed_rows(cu_seqlens)
    call = Call(spec, float(scale), softcap, rows, context, final, segment)
    fq = fk = wq = wk = None
    if spec.has_linear and features is not None:
        fq, fk = features
    elif spec.has_linear:
        assert phi_q is not None and phi_k is not None  # noqa: PT018
        if phi_q.name == "hedgehog":
            wq, wk = phi_q.weight, phi_k.weight
        else:
            fq, fk = phi_q(q), phi_k(k)
    o, S, z = _Attention.apply(q, k, v, fq, fk, wq, wk, gamma, call)  # type: ignore[no-untyped-call]
    return o, S, z


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, fq: Tensor | None, fk: Tensor | None, wq: Tensor | None,
        wk: Tensor | None, gamma: Tensor, call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        problem = Problem(call, *map(_ready, (q, k, v, fq, fk)), *map(_plain, (wq, wk, gamma)))
        ctx.needs = any(ctx.needs_input_grad)
        o, inverse, states, final = problem.forward(ctx.needs)
        if ctx.needs:
            nothing: dict[str, Any] = dict.fromkeys(TENSORS)
            ctx.problem = dataclasses.replace(problem, **nothing)
            ctx.save_for_backward(*(getattr(problem, name) for name in TENSORS), o, inverse, states)
        S, z = (None, None) if final is None else problem.unpack(final)
        ctx.mark_non_differentiable(*(x for x in (S, z) if x is not None))
        return o, S, z

    @staticmethod
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, o, inverse, states = ctx.saved_tensors
        problem = dataclasses.replace(ctx.problem, **dict(zip(TENSORS, tensors, strict=True)))
        inputs = any(ctx.needs_input_grad[:3])
        return (*problem.backward(_ready(do), o, inverse, states, inputs), None)


TENSORS = ("q", "k", "v", "fq", "fk", "wq", "wk", "gamma")


@dataclass(frozen=True)
class Problem:
    """One call's tensors and sizes; launches the kernels."""

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor | None
    fk: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    gamma: Tensor

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def maps(self) -> int:
        for x, dim in ((self.wk, 0), (self.fk, 1)):
            if x is not None:
                return x.shape[dim]
        return self.heads

    @property
    def width(self) -> int:
        """f: half of the features."""
        if self.wq is not None:
            return self.wq.shape[2]
        return 16 if self.fq is None else self.fq.shape[3] // 2

    @property
    def state_size(self) -> int:
        return 2 * self.width * (self.v.shape[3] + 1)

    @cached_property
    def blocks(self) -> Blocks:
        wide = self.q.dtype == torch.float32
        return choose_blocks(self.q.shape[3], self.v.shape[3], self.width, wide, self.call.spec)

    @cached_property
    def layout(self) -> Layout:
        grid, spec, programs = (self.q.shape[0], self.q.shape[2]), self.call.spec, self.heads * self.blocks.pieces
        return make_layout(self.call.rows, grid, spec.chunk, programs, self.q.device, self.call.segment)

    def forward(self, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Outputs, 1 / denominators (B, H, T), states at the segments' starts, final states."""
        layout, blocks, spec = self.layout, self.blocks, self.call.spec
        dtype = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        o = self.new_output(self.v.shape[3], dtype)
        inverse = self.per_query() if save else o
        states, final = self.forward_states(), None
        if self.call.final and spec.has_linear:
            initial = self.initial_state()
            shape = (len(layout.rows), self.maps, self.state_size)
            final = self.q.new_zeros(shape, dtype=torch.float32) if initial is None else initial.clone()
        sink_k, sink_v = self.sinks()
        output_kernel[(len(layout.segments), self.heads, blocks.pieces)](
            *self.tensors(), o, o.stride()[:3], *self.features(), self.wq, self.wk, self.gamma, sink_k, sink_v,
            inverse, states, final, *self.tables(), *self.sizes(),
            SAVE=save, FINAL=final is not None, HAS_STATES=states is not None, BLOCK_SINKS=blocks.sinks,
            **self.constants(), **self.launch(),
        )  # fmt: skip
        return o, inverse, states, final

    def backward(
        self, do: Tensor, o: Tensor, inverse: Tensor, states: Tensor | None, inputs: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of TENSORS."""
        layout, blocks, spec = self.layout, self.blocks, self.call.spec
        heads, dim, value_dim, pieces = self.heads, self.q.shape[3], self.v.shape[3], blocks.pieces
        programs = pieces * len(layout.segments)
        shift, peaks, pulls = self.per_query(), self.per_query(), self.per_query(pieces)
        tops = self.per_query(dtype=torch.int32)
        grid = (triton.cdiv(self.q.shape[2], 32), heads, self.q.shape[0])
        shift_kernel[grid](
            o,
            o.stride()[:3],
            do,
            do.stride()[:3],
            inverse,
            shift,
            heads,
            self.q.shape[2],
            value_dim,
            32,
            triton.next_power_of_2(value_dim),
        )
        dq, dk = (self.new_gradient(dim, inputs) for _ in range(2))
        dv = self.new_gradient(value_dim, inputs, pieces=1)
        dfq, dfk = (self.new_gradient(2 * self.width, self.fq is not None, torch.float32) for _ in range(2))
        dwq, dwk = (self.partial(programs, self.wq) for _ in range(2))
        d_gamma = self.q.new_empty(programs, heads, dtype=torch.float32)
        sink_k, sink_v = self.sinks()
        sinks = spec.softmax_sinks if inputs and spec.has_softmax else 0
        d_sink_k = self.q.new_empty(programs, heads, sinks, dim, dtype=torch.float32)
        d_sink_v = self.q.new_empty(len(layout.segments), heads, sinks, value_dim, dtype=torch.float32)
        common = (*self.tensors(), do, do.stride()[:3], *self.features(), self.wq, self.wk)
        launch = (len(layout.segments), heads, pieces)
        query_kernel[launch](
            *common, self.gamma, sink_k, sink_v, inverse, shift, states, *_strided(dq, do), *_strided(dfq, do), dwq,
            d_gamma, d_sink_k, d_sink_v, peaks, tops, pulls, *self.tables(), *self.sizes(), pulls.stride(0),
            INPUTS=inputs, HAS_STATES=states is not None, BLOCK_SINKS=blocks.sinks, **self.constants(),
            **self.launch(backward=True),
        )  # fmt: skip
        d_states = self.backward_states(do, inverse, shift)
        key_kernel[launch](
            *common, inverse, shift, peaks, tops, pulls, d_states, *_strided(dk, do), *_strided(dv, do),
            *_strided(dfk, do),
            dwk, *self.tables(), *self.sizes(), pulls.stride(0),
            INPUTS=inputs, HAS_STATES=d_states is not None, **self.constants(), **self.launch(backward=True),
        )  # fmt: skip
        kv_heads, maps = self.k.shape[1], self.maps
        grads = [_reduce(x, h) for x, h in ((dq, heads), (dk, kv_heads), (dv, kv_heads), (dfq, heads), (dfk, maps))]
        if sinks:
            self.add_sinks(grads[1], grads[2], d_sink_k, d_sink_v)
        dtypes = (x.dtype if x is not None else None for x in (self.q, self.k, self.v, self.fq, self.fk))
        grads = [None if g is None else g.to(t) for g, t in zip(grads, dtypes, strict=True)]
        if dwq is not None and dwk is not None:
            grads += [dwq.sum(0), dwk.sum(0).unflatten(0, (maps, -1)).sum(1)]
        else:
            grads += [None, None]
        return (*grads, d_gamma.sum(0) / self.gamma)

    def forward_states(self) -> Tensor | None:
        """(M segments, key maps, state) before each segment's first block; None: all zero."""
        initial = self.initial_state() if self.call.spec.has_linear else None
        if not self.call.spec.has_linear or not (self.layout.split or initial is not None):
            return None
        k_group, v_group = self.maps // self.k.shape[1], self.maps // self.v.shape[1]
        k, v = (self.k, self.k.stride()[:3]), (self.v, self.v.stride()[:3])
        no_rows = self.gamma, self.gamma  # the forward sums are not weighted
        return self.states((*k, *v, *self.features()[2:], self.wk, *no_rows), (k_group, v_group), initial, self.maps)

    def backward_states(self, do: Tensor, inverse: Tensor, shift: Tensor) -> Tensor | None:
        """(M segments, H, state): dS and dz behind each segment's last block; None: all zero."""
        if not self.call.spec.has_linear or not self.layout.split:
            return None
        x = (self.q, self.q.stride()[:3], do, do.stride()[:3])
        return self.states((*x, *self.features()[:2], self.wq, inverse, shift), (1, 1), None, self.heads, True)

    def states(
        self, arguments: tuple[Any, ...], groups: tuple[int, int], initial: Tensor | None, heads: int,
        backward: bool = False,
    ) -> Tensor:  # fmt: skip
        """Sums of all segments, turned into running totals."""
        layout, blocks, size = self.layout, self.blocks, self.state_size
        states = self.q.new_empty(len(layout.segments), heads, size, dtype=torch.float32)
        lag = 1 if self.call.spec.kind == "linear" else 2
        constants = self.constants()
        sum_kernel[(len(layout.segments), heads, blocks.pieces)](
            *arguments, states, *self.tables(), heads, *groups, self.q.shape[2], self.q.shape[3], self.v.shape[3],
            self.width, STEP=(lag - 1) if backward else (1 - lag), BACKWARD=backward,
            **{name: constants[name] for name in SUM_CONSTANTS}, **self.launch(),
        )  # fmt: skip
        scan_kernel[(len(layout.rows), heads, triton.cdiv(size, 1024))](
            states, initial, layout.ranges, size, HAS_INITIAL=initial is not None, REVERSE=backward, BLOCK=1024
        )
        return states

    def tensors(self) -> tuple[Any, ...]:
        return tuple(part for x in (self.q, self.k, self.v) for part in (x, x.stride()[:3]))

    def features(self) -> tuple[Any, ...]:
        fq, fk = (self.q, self.k) if self.fq is None or self.fk is None else (self.fq, self.fk)
        return fq, fq.stride()[:3], fk, fk.stride()[:3]

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        layout, context = self.layout, self.call.context
        positions = layout.sequences.new_zeros(len(layout.rows)) if context is None else context.offset.int()
        return layout.segments, layout.sequences, positions

    def sizes(self) -> tuple[Any, ...]:
        heads, call = self.heads, self.call
        groups = heads // self.k.shape[1], heads // self.maps
        dims = self.q.shape[2], self.q.shape[3], self.v.shape[3], self.width
        return heads, *groups, *dims, call.scale, float(call.softcap or 0)

    def constants(self) -> dict[str, Any]:
        spec, blocks, wide = self.call.spec, self.blocks, self.q.dtype == torch.float32
        return {
            "SOFTMAX": spec.has_softmax, "LINEAR": spec.has_linear, "LAG": 1 if spec.kind == "linear" else 2,
            "SLIDING": spec.kind != "linear" and spec.window == "sliding", "SINKS": spec.softmax_sinks,
            "CAPPED": self.call.softcap is not None, "FUSED": self.fq is None,
            "LOW": tl.float32 if wide else tl.bfloat16, "PRECISION": "ieee", "C": spec.chunk,
            "BLOCK_D": blocks.dim, "BLOCK_V": blocks.value, "BLOCK_F": blocks.feature,
        }  # fmt: skip

    def launch(self, backward: bool = False) -> dict[str, int]:
        return {"num_warps": self.blocks.num_warps, "num_stages": 1 if backward else 2}

    def initial_state(self) -> Tensor | None:
        """(N, key maps, state) as the kernels hold it."""
        context = self.call.context
        return None if context is None else torch.cat([context.S.flatten(2), context.z], 2).float().contiguous()

    def unpack(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """S (N, key maps, F, D) and z (N, key maps, F) of packed states."""
        features, value_dim = 2 * self.width, self.v.shape[3]
        S, z = states.split([features * value_dim, features], 2)
        return S.unflatten(2, (features, value_dim)).contiguous(), z.contiguous()

    def sinks(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks, (N, G, sinks, D) contiguous; what lies behind a short sequence is unused."""
        count, context = self.call.spec.softmax_sinks, self.call.context
        if not (count and self.call.spec.has_softmax):
            return self.k, self.v
        if context is not None:
            return context.sink_k.contiguous(), context.sink_v.contiguous()
        batch, token = _sink_tokens(self.layout, count)
        return tuple(x[batch, :, token].transpose(1, 2).contiguous() for x in (self.k, self.v))  # type: ignore[return-value]

    def add_sinks(self, dk: Tensor | None, dv: Tensor | None, d_sink_k: Tensor, d_sink_v: Tensor) -> None:
        """Add the sinks' gradients, partial sums of each program, to those of the tokens they are."""
        if dk is None or dv is None or self.call.context is not None:
            return
        layout, count = self.layout, self.call.spec.softmax_sinks
        belongs = torch.arange(len(layout.rows), device=dk.device)[:, None] == layout.segments[:, 0]
        batch, token = _sink_tokens(layout, count)
        exists = layout.sequences[:, 2, None] > torch.arange(count, device=dk.device)
        for gradient, parts in ((dk, d_sink_k.unflatten(0, (-1, len(layout.segments))).sum(0)), (dv, d_sink_v)):
            each = torch.einsum("nm,mhsd->nshd", belongs.float(), parts)
            each = each.unflatten(2, (gradient.shape[1], -1)).sum(3).to(gradient.dtype)
            at = (batch.expand_as(token)[exists], slice(None), token[exists])
            gradient[at] = gradient[at] + each[exists]

    def per_query(self, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An unwritten (*lead, B, H, T) tensor."""
        return self.q.new_empty((*lead, self.q.shape[0], self.heads, self.q.shape[2]), dtype=dtype)

    def new_output(self, dim: int, dtype: torch.dtype, *lead: int) -> Tensor:
        """A (*lead, B, H, T, dim) tensor laid out with heads inside tokens, zero where no sequence will write."""
        shape = (*lead, self.q.shape[0], self.q.shape[2], self.heads, dim)
        make = self.q.new_empty if self.layout.complete else self.q.new_zeros
        return make(shape, dtype=dtype).transpose(-2, -3)

    def new_gradient(
        self, dim: int, wanted: bool, dtype: torch.dtype | None = None, pieces: int | None = None
    ) -> Tensor | None:
        """(pieces, B, H, T, dim) for what each slice of the value dim and each query head contributes."""
        pieces = pieces or self.blocks.pieces
        dtype = dtype or (self.q.dtype if pieces == 1 else torch.float32)
        return self.new_output(dim, dtype, pieces) if wanted else None

    def partial(self, programs: int, weight: Tensor | None) -> Tensor | None:
        """(programs, H, D, f) for what each program contributes to the gradient of a feature map's weight."""
        return None if weight is None else weight.new_empty(programs, self.heads, *weight.shape[1:])


SUM_CONSTANTS = ("SINKS", "FUSED", "LOW", "PRECISION", "C", "BLOCK_D", "BLOCK_V", "BLOCK_F")


def _sink_tokens(layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """Batch index (N, 1) and token index (N, count) of each sequence's sinks, clamped to its last token."""
    batch, first, length = layout.sequences.long().unbind(1)
    token = first[:, None] + torch.arange(count, device=first.device).minimum((length[:, None] - 1).clamp_min(0))
    return batch[:, None], token


def _reduce(pieces: Tensor | None, heads: int) -> Tensor | None:
    """(pieces, B, H, T, dim) -> (B, heads, T, dim): slices of the value dim and query heads of a group added up."""
    if pieces is None:
        return None
    x = pieces[0] if pieces.shape[0] == 1 else pieces.sum(0)
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _strided(x: Tensor | None, unused: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A (pieces, B, heads, T, dim) tensor and its strides in the order of the kernels: batch, head, token, piece.

    ``unused`` stands in for an output that is not wanted: kernels do arithmetic on its pointer.
    """
    return (unused, (0, 0, 0, 0)) if x is None else (x, (*x.stride()[1:4], x.stride(0)))


def _ready(x: Tensor | None) -> Any:
    """Detached, with neighbouring columns."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _plain(x: Tensor | None) -> Any:
    return None if x is None else x.detach().float().contiguous()
