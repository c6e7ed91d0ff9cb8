"""The kernels as an operation that torch.compile does not look into, so that a compiled layer stays one graph.

For whole rows without documents, and Hedgehog maps that are not trained: what stage 2 computes.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, f half of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.kernels.call import Call
from lolcats.attention.kernels.function import TENSORS, Problem, Wanted, _ready
from lolcats.attention.kernels.layout import dense_rows, fits_inside
from lolcats.attention.mixer import Mixer
from lolcats.attention.spec import AttentionSpec

Optional = Tensor | None


def compiled_attention(q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, seen: tuple[Tensor, Tensor] | None) -> Tensor:
    """Outputs (B, H, T, D) as of :func:`triton_attention`, differentiable in q, k, v and ``seen``."""
    spec, phi_q, phi_k = mixer.spec, mixer.phi_q, mixer.phi_k
    wq = wk = None
    if spec.has_linear:
        assert isinstance(phi_q, FeatureMap)
        assert isinstance(phi_k, FeatureMap)
        wq, wk = phi_q.weight, phi_k.weight
    inside = seen is None and wq is not None and fits_inside(wq.shape[1], wq.shape[2], q.dtype.itemsize)
    x_q, x_k = (None, None) if inside or wq is None else seen or (q, k)
    settings = f"{spec.kind},{spec.window},{spec.decay},{spec.normalizer}"
    sizes = [spec.window_size, spec.sinks, int(spec.unrotated)]
    return _attend(  # type: ignore[no-any-return]
        q, k, v, x_q, x_k, wq, wk, mixer.gamma, settings, sizes, float(mixer.scale), mixer.softcap
    )[0]


def _problem(tensors: tuple[Any, ...], settings: str, sizes: list[int], scale: float, softcap: Any) -> Problem:
    """``tensors``: q, k, v, x_q, x_k, wq, wk, gamma."""
    q, k, v, x_q, x_k, wq, wk, gamma = tensors
    kind, window, decay, normalizer = settings.split(",")
    spec: Any = AttentionSpec(kind, window, sizes[0], sizes[1], decay, normalizer, bool(sizes[2]))  # type: ignore[arg-type]
    call = Call(spec, scale, softcap, dense_rows(q.shape[0], q.shape[2]), phi="inside" if x_q is None else "projected")
    dtype = q.dtype if call.phi == "inside" else torch.float32
    weights = (w if w is None else w.to(dtype).contiguous() for w in (wq, wk))
    ready = *map(_ready, (q, k, v, x_q, x_k)), None, None, *weights, gamma.float().contiguous()
    return Problem.of(call, ready)


@torch.library.custom_op("lolcats::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, x_q: Optional, x_k: Optional, wq: Optional, wk: Optional, gamma: Tensor,
    settings: str, sizes: list[int], scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, their lost bits, and each query's softmax values; empty tensors for what there is not."""
    problem = _problem((q, k, v, x_q, x_k, wq, wk, gamma), settings, sizes, scale, softcap)
    o, lost, (inverse, peaks, tops), _, _ = problem.forward(save=True, peaks=True)
    assert inverse is not None
    nothing = q.new_empty(0, dtype=torch.float32)
    return (
        o, nothing.to(torch.int8) if lost is None else lost, inverse, nothing.clone() if peaks is None else peaks,
        nothing.to(torch.int32) if tops is None else tops,
    )  # fmt: skip


@_attend.register_fake
def _(q: Any, k: Any, v: Any, x_q: Any, x_k: Any, wq: Any, wk: Any, gamma: Any, settings: Any, *_: Any) -> Any:
    batch, heads, tokens, _ = q.shape
    rounded, softmax = q.dtype == torch.bfloat16, not settings.startswith("linear,")
    shape = batch, tokens, heads, v.shape[3]
    o = q.new_empty(shape, dtype=q.dtype if rounded else torch.float32).transpose(1, 2)
    lost = q.new_empty(shape, dtype=torch.int8).transpose(1, 2) if rounded else q.new_empty(0, dtype=torch.int8)
    each = (batch, heads, tokens) if softmax else (0,)
    return (
        o, lost, q.new_empty((batch, heads, tokens), dtype=torch.float32), q.new_empty(each, dtype=torch.float32),
        q.new_empty(each, dtype=torch.int32),
    )  # fmt: skip


@torch.library.custom_op("lolcats::attend_backward", mutates_args=())
def _attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, x_q: Optional, x_k: Optional, wq: Optional, wk: Optional,
    gamma: Tensor, o: Tensor, lost: Tensor, inverse: Tensor, peaks: Tensor, tops: Tensor, settings: str,
    sizes: list[int], scale: float, softcap: float | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, and of x_q and x_k if they are given."""
    problem = _problem((q, k, v, x_q, x_k, wq, wk, gamma), settings, sizes, scale, softcap)
    softmax = (inverse, peaks, tops) if len(peaks) else (inverse, None, None)
    seen = x_q is not None
    wanted = Wanted(inputs=True, maps=seen, seen=seen, weights=False, gamma=False)
    found = problem.backward(_ready(do), o, lost if len(lost) else None, softmax, wanted)
    grads: dict[str, Any] = dict(zip(TENSORS, found, strict=True))
    names = ("q", "k", "v", "x_q", "x_k") if seen else ("q", "k", "v")
    return [grads[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names]


@_attend_backward.register_fake
def _(do: Any, q: Any, k: Any, v: Any, x_q: Any, x_k: Any, *_: Any) -> Any:
    given = [x for x in (q, k, v, x_q, x_k) if x is not None]
    return [x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2) for x in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.rest = inputs[8:]


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = [*_attend_backward(do, *tensors, *ctx.rest), None, None][:5]
    return (*grads, None, None, None, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)
