"""The kernels as one differentiable function.

Shapes: B batch, H query heads, G key/value heads, M key maps (H or G), T tokens, D head dim, f half of the features,
N sequences. The kernels handle the two halves of a feature map (softmax(y) and softmax(−y)) separately, so that both
products with the state fit in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from lolcats.attention.chunked import Context
from lolcats.attention.kernels.backward import delta_kernel, key_kernel, query_kernel, sink_kernel, weight_kernel
from lolcats.attention.kernels.call import Call, hedgehog_weights
from lolcats.attention.kernels.forward import output_kernel
from lolcats.attention.kernels.launcher import Launcher, find_launcher, ready
from lolcats.attention.kernels.layout import Layout, Phi, Tiling, dense_rows, fits_inside, packed_rows
from lolcats.attention.kernels.projection import add_project_back, project, project_back
from lolcats.attention.kernels.states import pack, scan_kernel, state_kernel, unpack
from lolcats.attention.mixer import Mixer
from lolcats.attention.turning import Turning


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, *, seen: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None, lengths: Sequence[int] | None = None, cu_seqlens: Sequence[int] | None = None,
    final: bool = False, tiling: Tiling | None = None, turning: Turning | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Hybrid or linear attention by the Triton kernels, differentiable in q, k, v, both feature maps and gamma.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D); fp32, bf16 or fp16, any strides whose last is 1.
        mixer: Hedgehog maps are computed inside the kernels; other maps are computed before them and need an even
            number of features.
        seen: (B, H, T, D) and (B, G, T, D), inputs of the feature maps, if not q and k.
        context: state before the first token (see :class:`Context`); no gradient flows into it.
        lengths: length of each batch row, if rows are shorter than T; outputs after their end are 0.
        cu_seqlens: cumulative lengths [0, ..., T] of sequences packed into a batch of one.
        final: also return the state after each sequence's last token.
        tiling: how the work is split; None uses the measured best.
        turning: how RoPE turned q and k, if the maps see them before it.

    Returns:
        outputs (B, H, T, D) in bf16 for bf16 inputs, else fp32. With ``final``, also S (N, H or G, F, D) and z (N, H or
        G, F) in fp32 over all keys older than the window of the last token, without gradient; otherwise None.
    """
    batch, _, tokens, _ = q.shape
    rows = dense_rows(batch, tokens, lengths) if cu_seqlens is None else packed_rows(cu_seqlens)
    spec, phi_q, phi_k = mixer.spec, mixer.phi_q, mixer.phi_k
    call = Call(spec, float(mixer.scale), mixer.softcap, rows, context, final, tiling, train=torch.is_grad_enabled())
    maps: dict[str, Tensor] = {}  # what the kernels get of them, by the names in TENSORS
    weights = hedgehog_weights(phi_q, phi_k)
    if turning is not None and not (weights is not None and (tiling is None or tiling.turn)):
        (q, x_q), (k, x_k) = (x.chunk(2, -1) for x in turning.beside(q, k))
        seen, turning = (x_q, x_k), None
    x_q, x_k = seen or (q, k)
    if weights is not None and spec.has_linear:
        _, dim, width = weights[0].shape
        inside = seen is None and turning is None and fits_inside(dim, width, q.dtype.itemsize)
        learned = any(w.requires_grad for w in weights)
        call = dataclasses.replace(call, phi="inside" if inside else "projected", learned=learned, turning=turning)
        maps = {"wq": weights[0], "wk": weights[1]}
        if not inside and turning is None:
            maps |= {"x_q": x_q, "x_k": x_k}
    elif spec.has_linear:
        call, maps = dataclasses.replace(call, phi="given"), {"fq": phi_q(x_q), "fk": phi_k(x_k)}
    of_maps = (maps.get(name) for name in TENSORS[3:-1])
    o, S, z = _Attention.apply(q, k, v, *of_maps, mixer.gamma, call)  # type: ignore[no-untyped-call]
    return o, S, z


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, x_q: Tensor | None, x_k: Tensor | None, fq: Tensor | None,
        fk: Tensor | None, wq: Tensor | None, wk: Tensor | None, gamma: Tensor, call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        dtype = q.dtype if call.phi == "inside" else torch.float32
        weights = (w if w is None else w.detach().to(dtype).contiguous() for w in (wq, wk))
        tensors = *map(ready, (q, k, v, x_q, x_k, fq, fk)), *weights, gamma.detach().float().contiguous()
        problem = Problem.of(call, tensors)
        save = call.train and any(ctx.needs_input_grad)  # needs_input_grad is true even without gradients
        o, lost, softmax, S, z = problem.forward(save, peaks=save and any(ctx.needs_input_grad[:3]))
        if save:
            nothing: dict[str, Any] = dict.fromkeys(TENSORS)
            ctx.problem = dataclasses.replace(problem, **nothing)
            ctx.save_for_backward(*tensors, o, lost, *softmax)
        ctx.mark_non_differentiable(*(x for x in (S, z) if x is not None))
        return o, S, z

    @staticmethod
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, o, lost, inverse, peaks, tops = ctx.saved_tensors
        problem = dataclasses.replace(ctx.problem, **dict(zip(TENSORS, tensors, strict=True)))
        needs = ctx.needs_input_grad
        seen = any(needs[:3] if problem.call.turning else needs[3:5])
        wanted = Wanted(any(needs[:3]), seen or any(needs[3:9]), seen, any(needs[7:9]), needs[9])
        return (*problem.backward(ready(do), o, lost, (inverse, peaks, tops), wanted), None)


Softmax = tuple[Tensor | None, Tensor | None, Tensor | None]  # per query: 1 / d_n, c_n, key of c_n; (B, H, T)
TENSORS = ("q", "k", "v", "x_q", "x_k", "fq", "fk", "wq", "wk", "gamma")


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted: of q, k and v (inputs), of x·W or φ (maps), through x·W of the x that was projected
    (seen), of the maps' weights, of γ."""

    inputs: bool
    maps: bool
    seen: bool
    weights: bool
    gamma: bool


@dataclass(frozen=True)
class Problem:
    """One call's tensors; launches the kernels. If ``call.phi`` is projected, x_q and x_k are the inputs of the maps
    (None: q and k turned back), and the kernels read their projections x·W as fq and fk."""

    call: Call
    launcher: Launcher
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    x_q: Tensor | None
    x_k: Tensor | None
    fq: Tensor | None
    fk: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    gamma: Tensor

    @classmethod
    def of(cls, call: Call, tensors: tuple[Any, ...]) -> Problem:
        """``tensors``: in the order of TENSORS."""
        named, context = dict(zip(TENSORS, tensors, strict=True)), call.context
        if context is not None:
            named |= {"sink_k": ready(context.sink_k), "sink_v": ready(context.sink_v)}
        if call.turning is not None:
            named |= {"table": call.turning.table}
        launcher = find_launcher(call.spec, call.phi, call.softcap is not None, call.tiling, context is not None, named)
        problem = cls(call, launcher, launcher.layout(call.rows), *tensors)
        return problem.projected([side for side in "qk" if side not in launcher.seen])

    def phi(self, side: str) -> Phi:
        """How the kernels get φ(q) or φ(k), where ``side`` is q or k: from x itself as long as x·W is not computed."""
        if self.call.phi == "projected" and getattr(self, f"f{side}") is None:
            return "seen" if self.call.turning is None else "turned"
        return self.call.phi

    def seen(self, side: str) -> str:
        """The name of what the map of q or k sees, or sees turned back."""
        return side if getattr(self, f"x_{side}") is None else f"x_{side}"

    def projected(self, sides: Sequence[str] = "qk") -> Problem:
        """Add x·W for q or k, or both, if the kernels need it. It is recomputed for the backward pass, since keeping it
        would double the memory of such maps."""
        if self.call.phi != "projected":
            return self
        products: dict[str, Any] = {}
        for side in sides:
            if getattr(self, f"f{side}") is None:
                seen, weight = self.seen(side), getattr(self, f"w{side}")
                products[f"f{side}"] = project(self.launcher, seen, getattr(self, seen), weight, self.call.rotation)
        return dataclasses.replace(self, **products)

    def forward(self, save: bool, peaks: bool) -> tuple[Tensor, Tensor | None, Softmax, Tensor | None, Tensor | None]:
        """Outputs; their lost bits and each query's softmax values, as backward needs them (``save``, ``peaks``); final
        S and z."""
        launcher, peaks = self.launcher, peaks and self.call.spec.has_softmax
        rounded = launcher.dtype == torch.bfloat16
        o = self.new_output(launcher.heads, launcher.value_dim, launcher.dtype if rounded else torch.float32)
        lost = self.new_output(launcher.heads, launcher.value_dim, torch.int8) if save and rounded else None
        softmax = (
            self.per_query() if save else None,
            self.per_query() if peaks else None,
            self.per_query(dtype=torch.int32) if peaks else None,
        )
        states, sums, S, z = self.forward_states()
        args = (
            *self.inputs(), *launcher.strided("o", o), lost, *self.features(), self.wq, self.wk, self.gamma,
            *self.sinks(), *self.call.rotation, *(o if x is None else x for x in softmax), states, sums,
            self.layout.walks, *self.tables(), *self.sizes(),
        )  # fmt: skip
        launcher.run(
            output_kernel, "output", (self.layout.walks.shape[0], launcher.heads, launcher.launch("output").pieces),
            args, SAVE=save, LOST=lost is not None, PEAKS=peaks, PHI=self.phi("q"),
            KEY_PHI=self.phi("k"), **self.sink_constants(),
        )  # fmt: skip
        return o, lost, softmax, S, z

    def backward(
        self, do: Tensor, o: Tensor, lost: Tensor | None, softmax: Softmax, wanted: Wanted
    ) -> tuple[Tensor | None, ...]:
        """Gradients of TENSORS, None for those not wanted."""
        inverse, peaks, tops = (do if x is None else x for x in softmax)
        back = Backward(self.projected(), do, o, lost, inverse, peaks, tops, wanted)
        grads = {**back.query_gradients(), **back.key_gradients()}
        for name in ("q", "k", "v", *(("fq", "fk") if self.call.phi == "given" else ())):
            if (x := grads.get(name)) is not None:
                grads[name] = x.to(getattr(self, name).dtype)
        return tuple(grads.get(name) for name in TENSORS)

    def forward_states(self, center: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """S and z of all keys before each step, and those at the end of each sequence if the call wants them.

        center: of centered features, for gradients; nothing at the end of sequences.
        """
        launcher, context = self.launcher, self.call.context
        if not launcher.spec.has_linear:
            return self.q, self.q, None, None
        initial = None if context is None else pack(context.S, context.z, launcher.width, center)
        v, x = launcher.strided("v", self.v), launcher.strided("k", self.k)
        if self.phi("k") == "seen":
            x = self.features()[2:]
        arguments = *x, *v, *self.features()[2:], self.wk, self.gamma, self.gamma  # forward sums are not weighted
        final = self.call.final and not center
        states, sums, totals = self.states(arguments, launcher.maps // launcher.kv_heads, initial, center, final=final)
        if totals is None:
            return states, sums, None, None
        # A sequence without tokens has no segment: it ends as it began.
        end = totals.new_zeros(len(self.layout.rows), *totals.shape[1:]) if initial is None else initial.clone()
        ends = self.layout.ranges[1:].long()
        present = ends > self.layout.ranges[:-1]
        end = torch.where(present[:, None, None], totals[(ends - 1).clamp_min(0)], end) if len(totals) else end
        return states, sums, *unpack(end, launcher.width, launcher.value_dim)

    def states(
        self, arguments: tuple[Any, ...], group: int, initial: Tensor | None, center: bool, variant: Any = None,
        final: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """States (entries, maps, 2, Dv, f), sums (entries, maps, 2f), and totals after each segment if ``final``.

        center: sums are (entries, maps, 2f + Dv + 1), see :mod:`.states`. variant: None in the forward pass; in the
        backward pass the strides of dy.
        """
        launcher, layout, maps, backward = self.launcher, self.layout, self.launcher.maps, variant is not None
        seen = not backward and self.phi("k") in ("seen", "turned")
        kind = "query_state" if backward and maps < launcher.heads else "seen_state" if seen else "state"
        width, value_dim = launcher.width, launcher.value_dim
        rest = value_dim + 1 if center else 0
        size, segments = 2 * width * (value_dim + 1) + rest, layout.segments.shape[0]
        low = torch.float32 if launcher.wide else torch.bfloat16
        states = self.q.new_empty(layout.entries, maps, 2, value_dim, width, dtype=low)
        sums = self.q.new_empty(layout.entries, maps, 2 * width + rest, dtype=torch.float32)

        def run(starts: Tensor | None, totals: Tensor | None, store: bool) -> None:
            args = (
                *arguments, *self.call.rotation, starts, totals, states, sums, layout.segments, *self.tables(),
                launcher.heads, group, launcher.tokens,
            )  # fmt: skip
            launcher.run(
                state_kernel, kind, (segments, maps, launcher.launch(kind).pieces), args, variant,
                HEADS=launcher.heads // maps if backward else 1, BACKWARD=backward, STORE=store, CENTER=center,
                PHI=self.phi("q" if backward else "k"), HAS_STARTS=starts is not None, HAS_TOTALS=totals is not None,
            )  # fmt: skip

        starts = initial
        if layout.split:
            starts = self.q.new_empty(segments, maps, size, dtype=torch.float32)
            run(None, starts, store=False)
            scan_kernel[(len(layout.rows), maps, triton.cdiv(size, 1024))](
                starts, initial, layout.ranges, size, HAS_INITIAL=initial is not None, REVERSE=backward, BLOCK=1024
            )
        elif initial is not None:
            starts = initial[layout.segments[:, 0].long()]
        totals = self.q.new_empty(segments, maps, size, dtype=torch.float32) if final else None
        run(starts, totals, store=True)
        return states, sums, totals

    def inputs(self) -> tuple[Any, ...]:
        strided = self.launcher.strided
        return *strided("q", self.q), *strided("k", self.k), *strided("v", self.v)

    def features(self) -> tuple[Any, ...]:
        """What φ(q) and φ(k) are computed from."""
        strided = self.launcher.strided
        names = [self.seen(x) if getattr(self, f"f{x}") is None else f"f{x}" for x in "qk"]
        return *strided(names[0], getattr(self, names[0])), *strided(names[1], getattr(self, names[1]))

    def tables(self) -> tuple[Tensor, Tensor]:
        context = self.call.context
        return self.layout.sequences, self.layout.start if context is None else context.offset.int()

    def sizes(self) -> tuple[Any, ...]:
        launcher, call = self.launcher, self.call
        groups = launcher.heads // launcher.kv_heads, launcher.heads // launcher.maps
        return launcher.heads, *groups, launcher.tokens, call.scale, float(call.softcap or 0)

    def sinks(self) -> tuple[Any, ...]:
        """Keys and values of the sinks: from the context if there is one, else the first tokens of each sequence."""
        context, strided = self.call.context, self.launcher.strided
        if context is None:
            return *strided("k", self.k), *strided("v", self.v)
        return *strided("sink_k", ready(context.sink_k)), *strided("sink_v", ready(context.sink_v))

    def sink_constants(self) -> dict[str, Any]:
        return {"CONTEXT": self.call.context is not None, "BLOCK_SINKS": self.launcher.blocks.sinks}

    def per_query(self, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized (*lead, B, H, T) tensor."""
        return self.q.new_empty((*lead, self.launcher.batch, self.launcher.heads, self.launcher.tokens), dtype=dtype)

    def new_output(self, heads: int, dim: int, dtype: torch.dtype, *lead: int) -> Tensor:
        """A (*lead, B, heads, T, dim) tensor stored as (*lead, B, T, heads, dim); zero where no sequence writes."""
        shape = (*lead, self.launcher.batch, self.launcher.tokens, heads, dim)
        make = self.q.new_empty if self.layout.complete else self.q.new_zeros
        return make(shape, dtype=dtype).transpose(-2, -3)


@dataclass(frozen=True)
class Backward:
    """The backward pass of a problem. do, o, lost (``lost_bits`` of o): (B, H, T, Dv); the others (B, H, T), or a
    placeholder if not saved."""

    problem: Problem
    do: Tensor
    o: Tensor
    lost: Tensor | None
    inverse: Tensor
    peaks: Tensor
    tops: Tensor
    wanted: Wanted

    @property
    def launcher(self) -> Launcher:
        return self.problem.launcher

    @cached_property
    def dy(self) -> tuple[Tensor, tuple[Any, ...]]:
        """dy and its strides; the kernels are specialised on them besides the launcher."""
        return self.launcher.strided(f"do {self.do.stride()}", self.do)

    @property
    def center(self) -> bool:
        """Whether states are of centered features. They cost registers, so only if the maps' gradients need them."""
        return self.launcher.phi != "given" and (self.problem.call.learned or self.wanted.gamma)

    @cached_property
    def variant(self) -> Any:
        return self.do.stride(), self.do.dtype, self.do.data_ptr() % 16 == 0

    @cached_property
    def pulls(self) -> Tensor:
        return self.problem.per_query(self.launcher.launch("query").pieces)

    @cached_property
    def delta(self) -> Tensor:
        """(B, H, T): δ_n; left to the query kernel if one of its programs holds the whole value dim."""
        launcher, delta = self.launcher, self.problem.per_query()
        if launcher.launch("query").pieces > 1:
            delta_kernel[(triton.cdiv(launcher.tokens, 32), launcher.heads, launcher.batch)](
                *launcher.strided("o", self.o), self.lost, *self.dy, delta, launcher.heads, launcher.tokens,
                VALUE_DIM=launcher.value_dim, LOST=self.lost is not None, BLOCK_T=32,
                BLOCK_V=triton.next_power_of_2(launcher.value_dim),
            )  # fmt: skip
        return delta

    def query_gradients(self) -> dict[str, Tensor | None]:
        """Gradients of q, γ and φ_q (features, or inputs and weights), None if not wanted. Sets ``delta`` and
        ``pulls``."""
        problem, launcher, wanted = self.problem, self.launcher, self.wanted
        walks, pieces = problem.layout.walks, launcher.launch("query").pieces
        dq = self.new_gradient(launcher.heads, launcher.dim, pieces, wanted.inputs)
        df = self.new_feature_gradient(launcher.heads, pieces)
        d_gamma = problem.q.new_empty(pieces * walks.shape[0], launcher.heads, dtype=torch.float32)
        args = (
            *problem.inputs(), *launcher.strided("o", self.o), self.lost, *self.dy, *problem.features(), problem.wq,
            problem.wk, *problem.sinks(), self.inverse, self.delta, self.peaks, self.tops,
            *problem.forward_states(self.center)[:2], *self.output("dq", dq), *self.output("dfq", df), d_gamma,
            self.pulls, walks, *problem.tables(), *problem.sizes(), self.pulls.stride(0),
        )  # fmt: skip
        launcher.run(
            query_kernel, "query", (walks.shape[0], launcher.heads, pieces), args, self.variant, INPUTS=wanted.inputs,
            DF=wanted.maps, WHOLE=pieces == 1, LOST=self.lost is not None, CENTER=self.center,
            **problem.sink_constants(),
        )  # fmt: skip
        gamma = d_gamma.sum(0) / problem.gamma if wanted.gamma else None
        found = {"q": _add_pieces(dq), "gamma": gamma}
        return found | self.feature_gradients("q", _add_pieces(df), found["q"])

    def sink_gradients(self) -> tuple[Tensor, Tensor] | None:
        """Gradients by walk and query head of the sinks' keys (pieces, W, H, sinks, D) and values (W, H, sinks, Dv).

        None if gradients of the inputs are not wanted, or the sinks are not among the tokens of the call.
        """
        problem, launcher, spec = self.problem, self.launcher, self.launcher.spec
        here = spec.softmax_sinks and spec.has_softmax and problem.call.context is None
        if not (here and self.wanted.inputs):
            return None
        walks, pieces = problem.layout.walks, launcher.launch("query").pieces
        shape = (walks.shape[0], launcher.heads, spec.softmax_sinks)
        dk = problem.q.new_empty(pieces, *shape, launcher.dim, dtype=torch.float32)
        dv = problem.q.new_empty(*shape, launcher.value_dim, dtype=torch.float32)
        heads, group, _, *sizes = problem.sizes()
        args = (
            *launcher.strided("q", problem.q), *self.dy, *problem.sinks(), self.inverse, self.delta, self.peaks,
            self.tops, self.pulls, dk, dv, walks, *problem.tables(), heads, group, *sizes, self.pulls.stride(0),
        )  # fmt: skip
        grid = walks.shape[0], launcher.heads, pieces
        launcher.run(sink_kernel, "sink", grid, args, self.variant, **problem.sink_constants())
        return dk, dv

    def key_gradients(self) -> dict[str, Tensor | None]:
        """Gradients of k, v and φ_k, as for queries; None if not wanted. Call after ``query_gradients``."""
        problem, launcher, wanted = self.problem, self.launcher, self.wanted
        layout, pieces, kv_heads, maps = problem.layout, launcher.launch("key").pieces, launcher.kv_heads, launcher.maps
        dk = self.new_gradient(kv_heads, launcher.dim, pieces, wanted.inputs)
        dv = self.new_gradient(kv_heads, launcher.value_dim, 1, wanted.inputs)
        df = self.new_feature_gradient(maps, pieces)
        heads, _, _, *sizes = problem.sizes()
        sinks = self.sink_gradients()
        args = (
            *problem.inputs(), *self.dy, *problem.features(), problem.wq, problem.wk, self.inverse, self.delta,
            self.peaks, self.tops, self.pulls, *(sinks or (self.do, self.do)), *self.states(),
            *self.output("dk", dk), *self.output("dv", dv), *self.output("dfk", df), layout.key_walks,
            *problem.tables(), heads, *sizes, self.pulls.stride(0), layout.walks.shape[0],
        )  # fmt: skip
        launcher.run(
            key_kernel, "key", (layout.key_walks.shape[0], kv_heads, pieces), args, self.variant, INPUTS=wanted.inputs,
            DF=wanted.maps, SINKS_HERE=sinks is not None, GROUP=heads // kv_heads,
            MAPS=maps // kv_heads, BLOCK_SINKS=launcher.blocks.sinks, CENTER=self.center,
        )  # fmt: skip
        found = {"k": _add_pieces(dk), "v": _add_pieces(dv)}
        return found | self.feature_gradients("k", _add_pieces(df), found["k"])

    def feature_gradients(self, name: str, df: Tensor | None, dx: Tensor | None) -> dict[str, Tensor | None]:
        """The gradient ``df`` of φ(x) if features are given; if ``df`` is that of x·W, the gradients of W and x. That
        of an x turned back is added to ``dx``, the gradient of q or k."""
        problem, launcher = self.problem, self.launcher
        if df is None or launcher.phi == "given":
            return {f"f{name}": df}
        found: dict[str, Tensor | None] = {}
        seen, weight = problem.seen(name), getattr(problem, f"w{name}")
        if launcher.phi == "projected" and self.wanted.seen:
            if dx is not None and problem.call.turning is not None:
                add_project_back(launcher, seen, df, weight, dx, problem.call.rotation)
            else:
                found[seen] = project_back(launcher, seen, df, weight, getattr(problem, seen))
        if self.wanted.weights:
            found[f"w{name}"] = self.weight_gradient(seen, df)
        return found

    def weight_gradient(self, name: str, df: Tensor) -> Tensor:
        """(M, D, f) fp32 from the x (B, H or G, T, D) of that name and the gradients ``df`` (B, M, T, f) of x·W."""
        problem, launcher, maps, x = self.problem, self.launcher, df.shape[1], getattr(self.problem, name)
        walks = problem.layout.walks if maps == launcher.heads else problem.layout.key_walks
        partial = x.new_empty(walks.shape[0], maps, launcher.width, launcher.dim, dtype=torch.float32)
        strided = *launcher.strided(name, x), *launcher.strided(f"sum of d{name}·W", df)
        args = *strided, partial, walks, *problem.tables(), maps // x.shape[1], *problem.call.rotation
        turn = problem.call.turning is not None
        launcher.run(weight_kernel, "weight", (walks.shape[0], maps, 1), args, name, TURN=turn)
        return partial.sum(0).mT

    def states(self) -> tuple[Tensor, Tensor]:
        """dS and dz of all queries after each step, one per key map."""
        problem = self.problem
        if not self.launcher.spec.has_linear:
            return problem.q, problem.q
        x = (*self.launcher.strided("q", problem.q), *self.dy, *problem.features()[:2])
        arguments = *x, problem.wq, self.inverse, self.delta
        return problem.states(arguments, 1, None, self.center, self.variant)[:2]

    def output(self, name: str, x: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        """A (pieces, ...) output; a placeholder if not wanted, since kernels still do arithmetic on its pointer."""
        return self.launcher.strided("none", self.do) if x is None else self.launcher.strided(name, x)

    def new_gradient(self, heads: int, dim: int, pieces: int, wanted: bool) -> Tensor | None:
        """(pieces, B, heads, T, dim) for the contribution of each slice of the value dim."""
        dtype = self.launcher.dtype if pieces == 1 else torch.float32
        return self.problem.new_output(heads, dim, dtype, pieces) if wanted else None

    def new_feature_gradient(self, maps: int, pieces: int) -> Tensor | None:
        """(pieces, B, maps, T, 2f) fp32 for given features, else (pieces, B, maps, T, f) for x·W."""
        if self.launcher.phi == "given" and self.wanted.maps:
            return self.problem.new_output(maps, 2 * self.launcher.width, torch.float32, pieces)
        return self.new_gradient(maps, self.launcher.width, pieces, self.wanted.maps)


def _add_pieces(x: Tensor | None) -> Tensor | None:
    """(pieces, ...) -> (...): sum over the slices of the value dim."""
    return x if x is None else x[0] if x.shape[0] == 1 else x.sum(0)
