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
from lolcats.attention.kernels.backward import delta_kernel, key_kernel, query_kernel, sink_kernel, weight_kernel
from lolcats.attention.kernels.forward import output_kernel
from lolcats.attention.kernels.layout import (
    Blocks,
    Launch,
    Layout,
    Rows,
    Tiling,
    choose_blocks,
    choose_launch,
    choose_tiling,
    dense_rows,
    fuses,
    make_layout,
    packed_rows,
    window_tiles,
)
from lolcats.attention.kernels.states import scan_kernel, state_kernel
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
    tiling: Tiling | None = None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: FeatureMap | None, phi_k: FeatureMap | None, gamma: Tensor,
    spec: AttentionSpec, scale: float, softcap: float | None = None, *, features: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None, lengths: Sequence[int] | None = None, cu_seqlens: Sequence[int] | None = None,
    final: bool = False, tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Hybrid or linear attention by the Triton kernels, differentiable in q, k, v, both feature maps and gamma.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D); fp32, bf16 or fp16, any strides whose last is 1.
        phi_q, phi_k: feature maps with H and H or G heads. Hedgehog is computed inside the kernels unless its
            weights are too large, others before them.
        gamma: (H,) fp32.
        features: φ(q) (B, H, T, F) and φ(k) (B, H or G, T, F) instead of feature maps; F even.
        context: what came before the first token (see :class:`Context`); no gradient flows into it.
        lengths: of each batch row, when rows are shorter than T (outputs behind them are 0).
        cu_seqlens: cumulative lengths [0, ..., T] of sequences packed into a batch of one.
        final: also return the state after each sequence's last token.
        tiling: how the work is cut up; chosen by measurement if None.

    Returns:
        outputs (B, H, T, D) in bf16 for bf16 inputs, else fp32; and, with ``final``, S (N, H or G, F, D) and
        z (N, H or G, F) fp32 over all keys that the window of the last token no longer reaches, no gradient through
        them; else None.
    """
    batch, _, tokens, _ = q.shape
    rows = dense_rows(batch, tokens, lengths) if cu_seqlens is None else packed_rows(cu_seqlens)
    call = Call(spec, float(scale), softcap, rows, context, final, tiling)
    fq = fk = wq = wk = None
    if spec.has_linear and features is not None:
        fq, fk = features
    elif spec.has_linear:
        assert phi_q is not None and phi_k is not None  # noqa: PT018
        weight = phi_q.weight
        small = weight is not None and fuses(weight.shape[1], weight.shape[2], q.dtype.itemsize)
        if phi_q.name == "hedgehog" and small:
            wq, wk = weight, phi_k.weight
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
        weights = (None if w is None else w.detach().to(q.dtype).contiguous() for w in (wq, wk))
        problem = Problem(call, *map(_ready, (q, k, v, fq, fk)), *weights, gamma.detach().float().contiguous())
        save = any(ctx.needs_input_grad)
        o, softmax, S, z = problem.forward(save, peaks=any(ctx.needs_input_grad[:3]))
        if save:
            nothing: dict[str, Any] = dict.fromkeys(TENSORS)
            ctx.problem = dataclasses.replace(problem, **nothing)
            ctx.save_for_backward(*(getattr(problem, name) for name in TENSORS), o, *softmax)
        ctx.mark_non_differentiable(*(x for x in (S, z) if x is not None))
        return o, S, z

    @staticmethod
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, o, inverse, peaks, tops = ctx.saved_tensors
        problem = dataclasses.replace(ctx.problem, **dict(zip(TENSORS, tensors, strict=True)))
        inputs, weights = any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[5:7])
        return (*problem.backward(_ready(do), o, (inverse, peaks, tops), inputs, weights), None)


Softmax = tuple[Tensor | None, Tensor | None, Tensor | None]  # of each query: 1 / d_n, c_n, key of c_n; (B, H, T)
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
    def wide(self) -> bool:
        """Whether products are made in fp32."""
        return self.q.dtype == torch.float32

    @cached_property
    def tiling(self) -> Tiling:
        return self.call.tiling or choose_tiling(self.q.dtype.itemsize)

    @cached_property
    def blocks(self) -> Blocks:
        return choose_blocks(self.q.shape[3], self.width)

    @cached_property
    def layout(self) -> Layout:
        grid = self.q.shape[0], self.q.shape[2]
        return make_layout(
            self.call.rows, grid, self.tiling, self.heads, self.k.shape[1], self.maps, self.q.device
        )

    def launch(self, kernel: str) -> Launch:
        fused = self.fq is None and self.call.spec.has_linear
        return choose_launch(kernel, self.v.shape[3], self.blocks, self.tiling.tile, self.q.dtype.itemsize, fused)

    def forward(self, save: bool, peaks: bool) -> tuple[Tensor, Softmax, Tensor | None, Tensor | None]:
        """Outputs, what backward needs of each query's softmax (``save``; ``peaks`` too), final S and z."""
        launch, peaks = self.launch("output"), peaks and self.call.spec.has_softmax
        o = self.new_output(self.heads, self.v.shape[3], torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32)
        softmax = (
            self.per_query() if save else None,
            self.per_query() if peaks else None,
            self.per_query(dtype=torch.int32) if peaks else None,
        )
        states, sums, S, z = self.forward_states()
        output_kernel[(len(self.layout.walks), self.heads, launch.pieces)](
            *self.tensors(), *_strided(o), *self.features(), self.wq, self.wk, self.gamma, *self.sinks(),
            *(o if x is None else x for x in softmax), states, sums, self.layout.walks, *self.tables(), *self.sizes(),
            SAVE=save, PEAKS=peaks, **self.sink_constants(), **self.constants(launch),
        )  # fmt: skip
        return o, softmax, S, z

    def backward(
        self, do: Tensor, o: Tensor, softmax: Softmax, inputs: bool, weights: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of TENSORS; those of q, k, v (``inputs``) and of the maps' ``weights`` only where wanted."""
        delta, pulls = self.delta(do, o), self.per_query(self.launch("query").pieces)
        softmax = tuple(do if x is None else x for x in softmax)  # type: ignore[assignment]
        weights = weights and self.wq is not None
        grads = self.query_gradients(do, softmax, delta, pulls, inputs, weights)
        sinks = self.sink_gradients(do, softmax, delta, pulls) if inputs else None
        grads |= self.key_gradients(do, softmax, delta, pulls, sinks, inputs, weights)
        for name in ("q", "k", "v", "fq", "fk"):
            if (x := grads.get(name)) is not None:
                grads[name] = x.to(getattr(self, name).dtype)
        return tuple(grads.get(name) for name in TENSORS)

    def query_gradients(
        self, do: Tensor, softmax: Softmax, delta: Tensor, pulls: Tensor, inputs: bool, weights: bool
    ) -> dict[str, Tensor | None]:
        """Of q, φ(q), φ_q's weights and γ; None where not wanted. Writes ``pulls``."""
        layout, launch, heads = self.layout, self.launch("query"), self.heads
        programs = launch.pieces * len(layout.walks)
        dq = self.new_gradient(heads, self.q.shape[3], launch.pieces, inputs)
        df = self.new_feature_gradient(heads, launch.pieces, weights)
        d_gamma = self.q.new_empty(programs, heads, dtype=torch.float32)
        query_kernel[(len(layout.walks), heads, launch.pieces)](
            *self.tensors(), *_strided(do), *self.features(), self.wq, self.wk, *self.sinks(), softmax[0], delta,
            *softmax[1:], *self.forward_states()[:2], *_strided_pieces(dq, do), *_strided_pieces(df, do), d_gamma,
            pulls, layout.walks, *self.tables(), *self.sizes(), pulls.stride(0),
            INPUTS=inputs, WEIGHTS=weights, **self.sink_constants(), **self.constants(launch),
        )  # fmt: skip
        return {
            "q": _add_pieces(dq), "gamma": d_gamma.sum(0) / self.gamma,
            **self.feature_gradients("q", self.q, _add_pieces(df)),
        }  # fmt: skip

    def sink_gradients(
        self, do: Tensor, softmax: Softmax, delta: Tensor, pulls: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """By walk and query head, of the sinks' keys (pieces, W, H, sinks, D) and values (W, H, sinks, Dv).

        None if there are no sinks among the tokens at hand.
        """
        spec = self.call.spec
        if not (spec.softmax_sinks and spec.has_softmax) or self.call.context is not None:
            return None
        layout, launch, heads = self.layout, self.launch("query"), self.heads
        shape = (len(layout.walks), heads, spec.softmax_sinks)
        dk = self.q.new_empty(launch.pieces, *shape, self.q.shape[3], dtype=torch.float32)
        dv = self.q.new_empty(*shape, self.v.shape[3], dtype=torch.float32)
        constants = {name: x for name, x in self.constants(launch).items() if name not in NOT_OF_SINKS}
        sink_kernel[(len(layout.walks), heads, launch.pieces)](
            *_strided(self.q), *_strided(do), *self.sinks(), softmax[0], delta, *softmax[1:], pulls, dk, dv,
            layout.walks, *self.tables(), heads, heads // self.k.shape[1], *self.sizes()[3:], pulls.stride(0),
            **self.sink_constants(), **constants,
        )  # fmt: skip
        return dk, dv

    def key_gradients(
        self, do: Tensor, softmax: Softmax, delta: Tensor, pulls: Tensor, sinks: tuple[Tensor, Tensor] | None,
        inputs: bool, weights: bool,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        """Of k, v, φ(k) and φ_k's weights; None where not wanted."""
        layout, launch, kv_heads, maps = self.layout, self.launch("key"), self.k.shape[1], self.maps
        dk = self.new_gradient(kv_heads, self.q.shape[3], launch.pieces, inputs)
        dv = self.new_gradient(kv_heads, self.v.shape[3], 1, inputs)
        df = self.new_feature_gradient(maps, launch.pieces, weights)
        heads, _, _, *sizes = self.sizes()
        key_kernel[(len(layout.key_walks), kv_heads, launch.pieces)](
            *self.tensors(), *_strided(do), *self.features(), self.wq, self.wk, softmax[0], delta, *softmax[1:],
            pulls, *(sinks or (do, do)), *self.backward_states(do, softmax[0], delta), *_strided_pieces(dk, do),
            *_strided_pieces(dv, do), *_strided_pieces(df, do), layout.key_walks, *self.tables(), heads, *sizes,
            pulls.stride(0), len(layout.walks), INPUTS=inputs, WEIGHTS=weights, SINKS_HERE=sinks is not None,
            GROUP=heads // kv_heads, MAPS=maps // kv_heads, BLOCK_SINKS=self.blocks.sinks, **self.constants(launch),
        )  # fmt: skip
        return {
            "k": _add_pieces(dk), "v": _add_pieces(dv), **self.feature_gradients("k", self.k, _add_pieces(df)),
        }  # fmt: skip

    def feature_gradients(self, name: str, x: Tensor, df: Tensor | None) -> dict[str, Tensor | None]:
        """Of φ(x), or of the weights of its map from those of x·W."""
        if df is None or self.fq is not None:
            return {f"f{name}": df}
        layout, maps, launch = self.layout, df.shape[1], self.launch("weight")
        walks = layout.walks if maps == self.heads else layout.key_walks
        partial = x.new_empty(len(walks), maps, self.width, x.shape[3], dtype=torch.float32)
        weight_kernel[(len(walks), maps)](
            *_strided(x), *_strided(df), partial, walks, *self.tables(), maps // x.shape[1], DIM=x.shape[3],
            WIDTH=self.width, LOW=tl.float32 if self.wide else tl.bfloat16, PRECISION=precision(), C=self.tiling.tile,
            BLOCK_D=self.blocks.dim, BLOCK_F=self.blocks.feature, num_warps=launch.num_warps, num_stages=2,
        )  # fmt: skip
        return {f"w{name}": partial.sum(0).mT}

    def delta(self, do: Tensor, o: Tensor) -> Tensor:
        """(B, H, T): δ_n."""
        delta, tokens, value_dim = self.per_query(), self.q.shape[2], self.v.shape[3]
        delta_kernel[(triton.cdiv(tokens, 32), self.heads, self.q.shape[0])](
            *_strided(o), *_strided(do), delta, self.heads, tokens, VALUE_DIM=value_dim, BLOCK_T=32,
            BLOCK_V=triton.next_power_of_2(value_dim),
        )  # fmt: skip
        return delta

    def forward_states(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """S and z of all keys before each step, and those at the end of each sequence if the call wants them."""
        if not self.call.spec.has_linear:
            return self.q, self.q, None, None
        context = self.call.context
        initial = None if context is None else self.pack(context.S, context.z)
        k, v = _strided(self.k), _strided(self.v)
        arguments = *k, *v, *self.features()[2:], self.wk, self.gamma, self.gamma  # forward sums are not weighted
        states, sums, totals = self.states(arguments, self.maps // self.k.shape[1], initial, final=self.call.final)
        if totals is None:
            return states, sums, None, None
        # A sequence without tokens has no segment: it ends as it began.
        final = totals.new_zeros(len(self.layout.rows), *totals.shape[1:]) if initial is None else initial.clone()
        ends = self.layout.ranges[1:].long()
        present = ends > self.layout.ranges[:-1]
        final = torch.where(present[:, None, None], totals[(ends - 1).clamp_min(0)], final) if len(totals) else final
        return states, sums, *self.unpack(final)

    def backward_states(self, do: Tensor, inverse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """dS and dz of all queries behind each step, one of each key map."""
        if not self.call.spec.has_linear:
            return self.q, self.q
        x = (*_strided(self.q), *_strided(do))
        return self.states((*x, *self.features()[:2], self.wq, inverse, delta), 1, None, backward=True)[:2]

    def states(
        self, arguments: tuple[Any, ...], group: int, initial: Tensor | None, backward: bool = False, final: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (entries, maps, 2, Dv, f), sums (entries, maps, 2f), and totals behind each segment if ``final``."""
        layout, launch, width, value_dim = self.layout, self.launch("state"), self.width, self.v.shape[3]
        heads = self.maps
        size, segments = 2 * width * (value_dim + 1), len(layout.segments)
        states = self.q.new_empty(
            layout.entries, heads, 2, value_dim, width, dtype=torch.float32 if self.wide else torch.bfloat16
        )
        sums = self.q.new_empty(layout.entries, heads, 2 * width, dtype=torch.float32)
        constants = self.constants(launch)
        constants = {name: value for name, value in constants.items() if name not in NOT_OF_STATES}

        def run(starts: Tensor | None, totals: Tensor | None, store: bool) -> None:
            state_kernel[(segments, heads, launch.pieces)](
                *arguments, starts, totals, states, sums, layout.segments, *self.tables(), self.heads, group,
                self.q.shape[2], HEADS=self.heads // heads if backward else 1, BACKWARD=backward, STORE=store,
                HAS_STARTS=starts is not None, HAS_TOTALS=totals is not None, **constants,
            )  # fmt: skip

        starts = initial
        if layout.split:
            starts = self.q.new_empty(segments, heads, size, dtype=torch.float32)
            run(None, starts, store=False)
            scan_kernel[(len(layout.rows), heads, triton.cdiv(size, 1024))](
                starts, initial, layout.ranges, size, HAS_INITIAL=initial is not None, REVERSE=backward, BLOCK=1024
            )
        elif initial is not None:
            starts = initial[layout.segments[:, 0].long()]
        totals = self.q.new_empty(segments, heads, size, dtype=torch.float32) if final else None
        run(starts, totals, store=True)
        return states, sums, totals

    def pack(self, S: Tensor, z: Tensor) -> Tensor:
        """(N, M, 2f · (D + 1)) fp32 as the kernels hold a state: both halves of Sᵀ, then z."""
        halves = S.float().unflatten(2, (2, self.width)).mT
        return torch.cat([halves.flatten(2), z.float()], 2).contiguous()

    def unpack(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """S (N, M, 2f, D) and z (N, M, 2f) of packed states."""
        width, value_dim = self.width, self.v.shape[3]
        S, z = totals.split([2 * width * value_dim, 2 * width], 2)
        return S.unflatten(2, (2, value_dim, width)).mT.flatten(2, 3), z.contiguous()

    def tensors(self) -> tuple[Any, ...]:
        return *_strided(self.q), *_strided(self.k), *_strided(self.v)

    def features(self) -> tuple[Any, ...]:
        fq, fk = (self.q, self.k) if self.fq is None or self.fk is None else (self.fq, self.fk)
        return *_strided(fq), *_strided(fk)

    def tables(self) -> tuple[Tensor, Tensor]:
        context = self.call.context
        return self.layout.sequences, self.layout.start if context is None else context.offset.int()

    def sizes(self) -> tuple[Any, ...]:
        heads, call = self.heads, self.call
        groups = heads // self.k.shape[1], heads // self.maps
        return heads, *groups, self.q.shape[2], call.scale, float(call.softcap or 0)

    def constants(self, launch: Launch) -> dict[str, Any]:
        spec, blocks, tiling = self.call.spec, self.blocks, self.tiling
        tiles = window_tiles(spec, tiling.tile)
        # A step's state is all that is older than the window if windows of its tiles begin where steps do.
        whole = spec.kind != "linear" and spec.window == "terraced" and spec.window_size % tiling.span == 0
        return {
            "DIM": self.q.shape[3], "VALUE_DIM": self.v.shape[3], "WIDTH": self.width,
            "SOFTMAX": spec.has_softmax, "LINEAR": spec.has_linear, "NEAR": spec.has_linear and not whole,
            "WINDOW": "none" if spec.kind == "linear" else spec.window, "SIZE": spec.window_size,
            "SINKS": spec.softmax_sinks, "CAPPED": self.call.softcap is not None, "FUSED": self.fq is None,
            "LOW": tl.float32 if self.wide else tl.bfloat16, "PRECISION": precision(), "TILES": tiles,
            "C": tiling.tile, "SPAN": tiling.span, "BLOCK_D": blocks.dim, "BLOCK_V": launch.value,
            "BLOCK_F": blocks.feature, "num_warps": launch.num_warps, "num_stages": launch.num_stages,
        }  # fmt: skip

    def sinks(self) -> tuple[Any, ...]:
        """Where keys and values of the sinks are: with a context there, else the first tokens of each sequence."""
        context = self.call.context
        k, v = (self.k, self.v) if context is None else (context.sink_k, context.sink_v)
        return *_strided(_ready(k)), *_strided(_ready(v))

    def sink_constants(self) -> dict[str, Any]:
        return {"CONTEXT": self.call.context is not None, "BLOCK_SINKS": self.blocks.sinks}

    def per_query(self, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An unwritten (*lead, B, H, T) tensor."""
        return self.q.new_empty((*lead, self.q.shape[0], self.heads, self.q.shape[2]), dtype=dtype)

    def new_output(self, heads: int, dim: int, dtype: torch.dtype, *lead: int) -> Tensor:
        """A (*lead, B, heads, T, dim) tensor laid out with heads inside tokens, zero where no sequence will write."""
        shape = (*lead, self.q.shape[0], self.q.shape[2], heads, dim)
        make = self.q.new_empty if self.layout.complete else self.q.new_zeros
        return make(shape, dtype=dtype).transpose(-2, -3)

    def new_gradient(self, heads: int, dim: int, pieces: int, wanted: bool) -> Tensor | None:
        """(pieces, B, heads, T, dim) for what each slice of the value dim contributes."""
        return self.new_output(heads, dim, self.q.dtype if pieces == 1 else torch.float32, pieces) if wanted else None

    def new_feature_gradient(self, maps: int, pieces: int, weights: bool) -> Tensor | None:
        """(pieces, B, maps, T, 2f) fp32 of given features, (pieces, B, maps, T, f) of x·W for those of weights."""
        if self.fq is not None:
            return self.new_output(maps, 2 * self.width, torch.float32, pieces)
        return self.new_gradient(maps, self.width, pieces, weights)


def precision() -> str:
    """Of products of fp32 tiles: on NVIDIA's tensor cores three tf32 products, whose sum has fp32's precision."""
    return "tf32x3" if torch.cuda.is_available() and torch.version.hip is None else "ieee"


NOT_OF_STATES = ("SOFTMAX", "LINEAR", "NEAR", "CAPPED", "TILES")  # constants that these kernels do not take
NOT_OF_SINKS = ("SOFTMAX", "LINEAR", "NEAR", "TILES", "WINDOW", "SIZE", "WIDTH", "FUSED", "SPAN", "BLOCK_F")


def _add_pieces(x: Tensor | None) -> Tensor | None:
    """(pieces, ...) -> (...): what the slices of the value dim contribute."""
    return x if x is None else x[0] if x.shape[0] == 1 else x.sum(0)


def _strided(x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """A (B, heads, T, dim) tensor and its strides; that of tokens is compiled in, to save registers."""
    batch, head, token, _ = x.stride()
    return x, (batch, head, tl.constexpr(token))


def _strided_pieces(x: Tensor | None, unused: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """A (pieces, B, heads, T, dim) tensor and its strides in the order of the kernels: batch, head, token, piece.

    ``unused`` stands in for an output that is not wanted: kernels do arithmetic on its pointer.
    """
    if x is None:
        return unused, (0, 0, tl.constexpr(0), 0)
    piece, batch, head, token, _ = x.stride()
    return x, (batch, head, tl.constexpr(token), piece)


def _ready(x: Tensor | None) -> Any:
    """Detached, with neighbouring columns."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
