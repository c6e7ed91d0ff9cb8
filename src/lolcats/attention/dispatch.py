"""Select the code that computes attention: Triton kernels on a GPU, the chunked PyTorch path everywhere else.

To force one, set ``LOLCATS_ATTENTION=triton`` (or ``chunked``, ``auto``) in the environment, or wrap a block in ``with
use_backend("chunked"):``. ``auto`` uses the kernels for 16-bit tensors on CUDA (or ROCm) if triton is
installed and the kernels are trusted with the geometry. fp32 tensors use the chunked path, which is exact to fp32.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lolcats.attention.chunked import Context, KeyMap, chunked_attention
from lolcats.attention.documents import Documents
from lolcats.attention.spec import AttentionSpec
from lolcats.errors import LolcatsError

BACKENDS = ("auto", "triton", "chunked")
TRUSTED = {torch.bfloat16: 256, torch.float16: 128}  # largest head dims with correct gradients on a GPU (LOG.md)

DECODED = 64 * 1024  # maximum bytes of one map's weights, in the dtype of the queries, for the decode kernel


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise LolcatsError(f"LOLCATS_ATTENTION: expected one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


_backend = _known(os.environ.get("LOLCATS_ATTENTION", "auto"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute all attention inside the block with ``triton`` or ``chunked``; ``auto`` chooses by the tensors.

    Raises:
        LolcatsError: if the name is unknown.
    """
    global _backend
    before, _backend = _backend, _known(name)
    try:
        yield
    finally:
        _backend = before


def attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: KeyMap, phi_k: KeyMap, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None = None, *, context: Context | None = None, lengths: Sequence[int] | Tensor | None = None,
    final: bool = False, documents: Documents | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Hybrid or linear attention of whole rows.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D), any float dtype. If ``spec.unrotated``, q and k have 2D channels.
        phi_q, phi_k: feature maps with H and H or G heads.
        gamma: (H,) the window's weight, fp32.
        context: state before the first token; None at the start of a sequence.
        lengths: length of each row, if rows are shorter than T; affects only the final state. The kernels need them on
            the host, so a tensor on the GPU forces a synchronization.
        final: also return the state after each row's last token.
        documents: the sequences packed into each row; cannot be combined with ``context`` or ``final``.

    Returns:
        outputs (B, H, T, D), in bf16 from the kernels for bf16 inputs and in fp32 otherwise. With ``final``, if the
        kind has a linear term, also S (B, H or G, F, D) and z (B, H or G, F) in fp32 over all keys older than the
        window of the row's last token; otherwise None. The kernels' S and z carry no gradient, see
        :func:`uses_kernels`.
    """
    path = _kernels if uses_kernels(q, spec, final) else chunked_attention
    if documents is not None:
        apart = _packed_kernels if path is _kernels else _packed_chunked
        return apart(documents, q, k, v, phi_q, phi_k, gamma, spec, scale, softcap), None, None
    return path(q, k, v, phi_q, phi_k, gamma, spec, scale, softcap, context, lengths, final)


def _packed_kernels(documents: Documents, q: Tensor, k: Tensor, v: Tensor, *common: Any) -> Tensor:
    """All documents in one call, without padding."""
    attend: Callable[..., Any] = _kernels
    y = attend(*documents.laid_out((q, k, v)), *common, None, None, False, documents.cumulative)[0]
    return y.unflatten(2, (q.shape[0], q.shape[2]))[0].transpose(0, 1)


def _packed_chunked(documents: Documents, q: Tensor, k: Tensor, v: Tensor, *common: Any) -> Tensor:
    """One call per group of documents of similar length."""
    return documents.apart(lambda *rows: chunked_attention(*rows, *common)[0], q, k, v)


def uses_kernels(q: Tensor, spec: AttentionSpec, final: bool = False) -> bool:
    """Whether the Triton kernels compute this call.

    With gradients enabled, a call that returns a state uses the chunked path even if the kernels are forced, since no
    gradient flows through the kernels' states. (Training keeps no states.)

    Raises:
        LolcatsError: if the kernels are forced but cannot compute it.
    """
    name = _backend
    if name == "chunked" or (final and torch.is_grad_enabled()):
        return False
    if name == "auto":
        return q.is_cuda and fits_kernels(spec.rotated(q).shape[3], q.dtype, spec) and _has_triton()
    if not _has_triton():
        raise LolcatsError("The Triton kernels were requested, but triton is not installed: pip install triton.")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise LolcatsError(
            f"The Triton kernels were requested, but the tensors are on {q.device.type}, where the kernels run only in "
            "Triton's interpreter. Set TRITON_INTERPRET=1 in the environment before triton is imported."
        )
    if misfit := _misfit(spec.rotated(q).shape[3], spec):
        raise LolcatsError(f"The Triton kernels were requested, but they support {misfit}.")
    return True


def uses_decode_kernel(q: Tensor, phi_q: Any, spec: AttentionSpec) -> bool:
    """Whether the decode kernel advances a state by one token. It supports only the hedgehog map, without gradients."""
    if _backend == "chunked" or torch.is_grad_enabled() or not _has_triton():
        return False
    if _misfit(spec.rotated(q).shape[3], spec) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if not q.is_cuda and (_backend != "triton" or q.dtype != torch.float32):  # the interpreter has no 16-bit products
        return False
    if not spec.has_linear:
        return True
    if getattr(phi_q, "name", "") != "hedgehog":
        return False
    columns, rows = (1 << (n - 1).bit_length() for n in phi_q.weight.shape[1:])
    return bool(rows * columns * q.dtype.itemsize <= DECODED)  # folding a chunk holds a map's weights in shared memory


def fits_kernels(head_dim: int, dtype: torch.dtype, spec: AttentionSpec) -> bool:
    """Whether the kernels are trusted with this geometry."""
    return head_dim <= TRUSTED.get(dtype, 0) and not _misfit(head_dim, spec)


def _misfit(head_dim: int, spec: AttentionSpec) -> str:
    """What the kernels support instead; empty if they support this geometry."""
    if spec.decays or not spec.divides:
        return "only attention.decay=none with attention.normalizer=sum"
    if spec.softmax_sinks > 16:
        return f"at most 16 sinks, not {spec.softmax_sinks}"
    return f"heads of at most 256 channels, not {head_dim}" if head_dim > 256 else ""


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Any, phi_k: Any, gamma: Tensor, spec: AttentionSpec, scale: float,
    softcap: float | None, context: Context | None, lengths: Sequence[int] | Tensor | None, final: bool,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    from lolcats.attention.kernels import triton_attention

    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    if not q.is_cuda:  # the interpreter has no 16-bit products
        q, k, v = q.float(), k.float(), v.float()
        if context is not None:
            context = context._replace(sink_k=context.sink_k.float(), sink_v=context.sink_v.float())
    host = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    seen = None
    if spec.unrotated:
        (q, plain_q), (k, plain_k) = q.chunk(2, -1), k.chunk(2, -1)
        seen = plain_q, plain_k
        if context is not None:
            context = context._replace(sink_k=spec.rotated(context.sink_k))
    y, S, z = triton_attention(
        q, k, v, phi_q, phi_k, gamma, spec, scale, softcap, seen=seen, context=context, lengths=host,
        cu_seqlens=cu_seqlens, final=final,
    )  # fmt: skip
    return y.to(dtype), S, z


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
