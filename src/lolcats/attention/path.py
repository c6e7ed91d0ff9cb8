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
HALF = (torch.bfloat16, torch.float16)
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
    gradients.

    Raises:
        LolcatsError: if the kernels are forced but cannot run here; likewise in the functions below.
    """
    if mixer.spec.is_supra:
        return "supra"
    return _kernels_if(_decodes(q, mixer), q, backend or _backend.get())


def choose_paged_path(q: Tensor) -> Path:
    """The path for kept heads whose keys lie in blocks, with queries like ``q`` (B, H, 1, D)."""
    return _kernels_if(q.shape[3] <= 256, q, _backend.get())


def choose_rotary_path(q: Tensor, backend: str | None = None) -> Path:
    """The path that turns queries and keys back to before RoPE for feature maps: ``auto`` uses the kernels for 16-bit
    tensors on CUDA. torch.compile fuses plain PyTorch by itself."""
    name = backend or _backend.get()
    able = q.dtype in HALF or (name == "triton" and q.dtype == torch.float32)
    return _kernels_if(able and not torch.compiler.is_compiling(), q, name)


def choose_loss_path(hidden: Tensor) -> Path:
    """The path for the losses of stage 2 and their gradients from hidden states like ``hidden`` (N, E)."""
    return _kernels_if(hidden.dtype in (torch.float32, *HALF), hidden, _backend.get())


def _kernels_if(able: bool, q: Tensor, name: str) -> Path:
    """``kernels`` if they are ``able`` to compute a call with queries like ``q`` and the backend ``name`` allows it."""
    if not able or name == "chunked":
        return "chunked"
    if name == "triton" and (q.is_cuda or q.dtype == torch.float32):  # the interpreter has no 16-bit products
        _check_runs(q)
        return "kernels"
    return "kernels" if q.is_cuda and _has_triton() else "chunked"


def _decodes(q: Tensor, mixer: Mixer) -> bool:
    spec = mixer.spec
    if torch.is_grad_enabled() or q.dtype not in (torch.float32, *HALF) or _misfit(spec.rotated(q).shape[3], spec):
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
    _check_runs(q)
    if misfit := _misfit(spec.rotated(q).shape[3], spec):
        raise LolcatsError(f"The Triton kernels were requested, but they support {misfit}.")


def _check_runs(q: Tensor) -> None:
    """Raise LolcatsError if no kernel runs for tensors where ``q`` is."""
    if not _has_triton():
        raise LolcatsError("The Triton kernels were requested, but triton is not installed: pip install triton.")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise LolcatsError(
            f"The Triton kernels were requested, but the tensors are on {q.device.type}, where the kernels run only in "
            "Triton's interpreter. Set TRITON_INTERPRET=1 in the environment before triton is imported."
        )


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
