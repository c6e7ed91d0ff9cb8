"""Attention of whole rows, by the path that was decided for the call.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lolcats.attention.chunked import Context, chunked_attention
from lolcats.attention.documents import Documents
from lolcats.attention.mixer import Mixer
from lolcats.attention.path import Path, choose_path
from lolcats.attention.supra import supra_attention
from lolcats.attention.turning import Turning

Result = tuple[Tensor, Tensor | None, Tensor | None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, path: Path | None = None, *, context: Context | None = None,
    lengths: Sequence[int] | Tensor | None = None, final: bool = False, documents: Documents | None = None,
    turning: Turning | None = None,
) -> Result:  # fmt: skip
    """Hybrid or linear attention of whole rows.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D), any float dtype. If ``mixer.spec.unrotated``, q and k have 2D channels.
        path: the code that computes it; None chooses it now (:func:`lolcats.attention.path.choose_path`).
        context: state before the first token; None at the start of a sequence.
        lengths: length of each row, if rows are shorter than T; affects only the final state. The kernels need them on
            the host, so a tensor on the GPU forces a synchronization.
        final: also return the state after each row's last token.
        documents: the sequences packed into each row; cannot be combined with ``context`` or ``final``.
        turning: only for the kernels, and not with ``context`` or ``final``: q and k have D channels although the spec
            is unrotated, and this turns them back for the maps.

    Returns:
        outputs (B, H, T, D), in bf16 from the kernels for bf16 inputs and in fp32 otherwise. With ``final``, if the
        kind has a linear term, also S (B, H or G, F, D) and z (B, H or G, F) in fp32 over all keys older than the
        window of the row's last token; otherwise None. The kernels' S and z carry no gradient.
    """
    path = path or choose_path(q, mixer.spec, final)
    if path == "kernels" and (documents is not None or turning is not None):
        return _whole_rows(q, k, v, mixer, documents, turning), None, None
    assert turning is None
    if documents is None:
        return WHOLE[path](q, k, v, mixer, context, lengths, final)
    apart: Callable[..., Tensor] = lambda *rows: WHOLE[path](*rows, mixer, None, None, False)[0]  # noqa: E731
    return documents.apart(apart, q, k, v), None, None


def _whole_rows(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, documents: Documents | None, turning: Turning | None
) -> Tensor:  # fmt: skip
    """Outputs (B, H, T, D) of the kernels; of all documents in one call, without padding."""
    if documents is None:
        return _kernels(q, k, v, mixer, None, None, False, turning=turning)[0]
    batch, length = q.shape[0], q.shape[2]
    q, k, v, *table = documents.laid_out([q, k, v] if turning is None else [q, k, v, turning.of_rows(batch)])
    turning = Turning.laid_out(*table) if table else None
    y = _kernels(q, k, v, mixer, None, None, False, documents.cumulative, turning)[0]
    return y.unflatten(2, (batch, length))[0].transpose(0, 1)


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, context: Context | None, lengths: Sequence[int] | Tensor | None,
    final: bool, cu_seqlens: Sequence[int] | None = None, turning: Turning | None = None,
) -> Result:  # fmt: skip
    from lolcats.attention.kernels import triton_attention

    dtype, spec = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32, mixer.spec
    if not q.is_cuda:  # the interpreter has no 16-bit products
        q, k, v = q.float(), k.float(), v.float()
        if context is not None:
            context = context._replace(sink_k=context.sink_k.float(), sink_v=context.sink_v.float())
    host = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    seen = None
    if spec.unrotated and turning is None:
        (q, plain_q), (k, plain_k) = q.chunk(2, -1), k.chunk(2, -1)
        seen = plain_q, plain_k
        if context is not None:
            context = context._replace(sink_k=spec.rotated(context.sink_k))
    y, S, z = triton_attention(
        q, k, v, mixer, seen=seen, context=context, lengths=host, cu_seqlens=cu_seqlens, final=final, turning=turning
    )  # fmt: skip
    return y.to(dtype), S, z


WHOLE: dict[Path, Callable[..., Any]] = {
    "kernels": _kernels, "chunked": chunked_attention, "supra": supra_attention
}  # fmt: skip
