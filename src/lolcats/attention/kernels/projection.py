"""x·W for kernels that cannot have W inside, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x·W (B, M, T, f) in fp32, of heads (B, G, T, D) in any float dtype and weights (M, D, f); M a multiple of G.

    Neither W nor the product is rounded to x's dtype: of trained maps |x·W| is 10 and more, and φ is an exponential.
    """
    return _Project.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Project(torch.autograd.Function):
    """Keeps x as it is, where autograd would keep it in fp32. Maps that share a head are one product with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_map(x.float() @ _by_head(weight, x), weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.float().unflatten(1, (x.shape[1], -1)).transpose(2, 3).flatten(3)  # (B, G, T, M / G · f)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ _by_head(weight, x).mT).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _by_map((x.float().mT @ dy).sum(0, keepdim=True), weight)[0].to(weight.dtype)
        return dx, dw


def _by_head(weight: Tensor, x: Tensor) -> Tensor:
    """(M, D, f) -> (G, D, M / G · f) fp32"""
    return weight.float().unflatten(0, (x.shape[1], -1)).transpose(1, 2).flatten(2)


def _by_map(y: Tensor, weight: Tensor) -> Tensor:
    """(B, G, N, M / G · f) -> (B, M, N, f)"""
    return y.unflatten(3, (-1, weight.shape[2])).transpose(2, 3).flatten(1, 2)
