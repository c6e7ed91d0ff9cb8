"""Triton kernels: the fast path on GPUs. Importing them needs triton; the rest of the package does not."""

from lolcats.attention.kernels.function import triton_attention

__all__ = ["triton_attention"]
