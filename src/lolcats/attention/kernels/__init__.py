"""Triton kernels: the fast path of GPUs. ``import`` needs triton; the rest of the package does not."""

from lolcats.attention.kernels.function import triton_attention

__all__ = ["triton_attention"]
