"""Choose the code that computes a call: Triton kernels on a GPU, the chunked PyTorch path everywhere else.

To force one, set ``LOLCATS_ATTENTION=triton`` (or ``chunked``, ``auto``) in the environment, or wrap a block in ``with
use_backend("chunked"):``. ``auto`` uses the kernels for 16-bit tensors on CUDA (or ROCm) if triton is
installed and the kernels are trusted with the geometry. fp32 tensors use the chunked path, which is exact to fp32.

A path is decided once per call and then passed on as a value, so recomputation in backward takes the same one.

Shapes: B batch, H query heads, T tokens, D head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from lolcats.attention.mixer import Mixer
from lolcats.attention.spec import AttentionSpec
from lolcats.errors import LolcatsError

Path = Literal["kernels", "chunked", "supra"]
BACKENDS = ("auto", "triton", "chunked")
TRUSTED = {torch.bfloat16: 256, torch.float16: 128}  # largest head dims with correct gradients on a GPU (LOG.md)
DECODED = 64 * 1024  # maximum bytes of one map's weights, in the dtype of the queries, for the decode kernel


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise LolcatsError(f"LOLCATS_ATTENTION: expected one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


DEFAULT = _known(os.environ.get("LOLCATS_ATTENTION", "auto"))
_backend = ContextVar("attention backend", default=DEFAULT)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute all attention inside the block, in this thread, with ``triton`` or ``chunked``; ``auto`` chooses by the
    tensors.

    Raises:
        LolcatsError: if the name is unknown.
    """
    before = _backend.set(_known(name))
    try:
        yield
    finally:
        _backend.reset(before)


def backend() -> str:
    """The backend asked for here and now: ``auto``, ``triton`` or ``chunked``."""
    return _backend.get()


def choose_path(q: Tensor, spec: AttentionSpec, final: bool = False, backend: str | None = None) -> Path:
    """The path for a call with queries like ``q`` (B, H, T, D, or 2D if ``spec.unrotated``).

    With gradients enabled, a call that returns a state (``final``) uses the chunked path even if the kernels are
    forced, since no gradient flows through the kernels' states. (Training keeps no states.)

    Raises:
        LolcatsError: if the kernels are forced but cannot compute it.
    """
    name = backend or _backend.get()
    if name == "triton" and not (final and torch.is_grad_enabled()):
        _check_kernels(q, spec)
        return "kernels"
    if spec.is_supra:
        return "supra"
    if name == "chunked" or (final and torch.is_grad_enabled()):
        return "chunked"
    trusted = q.is_cuda and fits_kernels(spec.rotated(q).shape[3], q.dtype, spec) and _has_triton()
    return "kernels" if trusted else "chunked"


def choose_decode_path(q: Tensor, mixer: Mixer, backend: str | None = None) -> Path:
    """The path that advances a state in place by one token. The decode kernel supports only the hedgehog map, without
    gradients."""
    if mixer.spec.is_supra:
        return "supra"
    return "kernels" if _decodes(q, mixer, backend or _backend.get()) else "chunked"


def choose_paged_path(q: Tensor) -> Path:
    """The path for kept heads whose keys lie in blocks, with queries like ``q`` (B, H, 1, D)."""
    if q.is_cuda:
        able = q.shape[3] <= 256 and _backend.get() != "chunked"
    else:
        able = _backend.get() == "triton" and q.dtype == torch.float32
    return "kernels" if able and _has_triton() else "chunked"


def choose_rotary_path(q: Tensor, backend: str | None = None) -> Path:
    """The path that appends their values before RoPE to queries and keys: the kernel if it is asked for, since it has
    not been measured. torch.compile fuses plain PyTorch by itself."""
    if (backend or _backend.get()) != "triton" or torch.compiler.is_compiling() or not _has_triton():
        return "chunked"
    able = (torch.float32, torch.bfloat16, torch.float16) if q.is_cuda else (torch.float32,)  # interpreted on a CPU
    return "kernels" if q.dtype in able else "chunked"


def _decodes(q: Tensor, mixer: Mixer, name: str) -> bool:
    spec = mixer.spec
    if name == "chunked" or torch.is_grad_enabled() or not _has_triton():
        return False
    if _misfit(spec.rotated(q).shape[3], spec) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if not q.is_cuda and (name != "triton" or q.dtype != torch.float32):  # the interpreter has no 16-bit products
        return False
    if not spec.has_linear:
        return True
    if getattr(mixer.phi_q, "name", "") != "hedgehog":
        return False
    columns, rows = (1 << (n - 1).bit_length() for n in mixer.phi_q.weight.shape[1:])  # type: ignore[attr-defined]
    return bool(rows * columns * q.dtype.itemsize <= DECODED)  # folding a chunk holds a map's weights in shared memory


def fits_kernels(head_dim: int, dtype: torch.dtype, spec: AttentionSpec) -> bool:
    """Whether the kernels are trusted with this geometry."""
    return head_dim <= TRUSTED.get(dtype, 0) and not _misfit(head_dim, spec)


def _check_kernels(q: Tensor, spec: AttentionSpec) -> None:
    """Raise LolcatsError if the kernels cannot compute this call."""
    if not _has_triton():
        raise LolcatsError("The Triton kernels were requested, but triton is not installed: pip install triton.")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise LolcatsError(
            f"The Triton kernels were requested, but the tensors are on {q.device.type}, where the kernels run only in "
            "Triton's interpreter. Set TRITON_INTERPRET=1 in the environment before triton is imported."
        )
    if misfit := _misfit(spec.rotated(q).shape[3], spec):
        raise LolcatsError(f"The Triton kernels were requested, but they support {misfit}.")


def _misfit(head_dim: int, spec: AttentionSpec) -> str:
    """What the kernels support instead; empty if they support this geometry."""
    if spec.is_supra:
        return "only attention.decay=none with attention.normalizer=sum"
    if spec.softmax_sinks > 16:
        return f"at most 16 sinks, not {spec.softmax_sinks}"
    return f"heads of at most 256 channels, not {head_dim}" if head_dim > 256 else ""


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
