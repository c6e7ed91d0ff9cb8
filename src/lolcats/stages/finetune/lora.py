"""LoRA with as few operations as it needs while stage 2 trains. PEFT makes, saves and merges the layers.

PEFT computes W·x, A·x, B·(A·x), a product with the scale and a sum, and autograd does the same backwards. In every
layer fp32 matrices are cast to the model's dtype, and their gradients back. Here the matrices of all layers are cast at
once, the scale is part of B, and sums are part of matrix products.

Shapes: N tokens, E inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


class LeanLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA on a frozen linear layer with one adapter; uses ``matrices`` while they are set.

    matrices: A (r, E) and scale · B (O, r), in the dtype of the input.
    """

    matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.matrices is None or self.disable_adapters or args or kwargs or x.dtype != self.matrices[0].dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b = self.matrices
        base = self.base_layer
        if torch.compiler.is_compiling():  # which fuses by itself
            return linear(x, base.weight, base.bias) + linear(linear(x, a), b)
        return _LoraLinear.apply(x, base.weight, base.bias, a, b)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    """x (..., E) -> W·x + bias + b·(a·x) (..., O), with gradients of x, a and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ a.t()
        y = linear(flat, weight, bias).addmm_(hidden, b.t())
        ctx.save_for_backward(flat, weight, a, b, hidden)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, hidden = ctx.saved_tensors
        flat_dy, dx = dy.reshape(-1, dy.shape[-1]), None
        d_hidden = flat_dy @ b
        if ctx.needs_input_grad[0]:
            dx = (flat_dy @ weight).addmm_(d_hidden, a).view(*dy.shape[:-1], flat.shape[-1])
        return dx, None, None, d_hidden.t() @ flat, flat_dy.t() @ hidden


class _Cast(torch.autograd.Function):
    """All A and B (fp32) -> A and scale · B in ``dtype``, in a few launches for all layers."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient, rather than one of zeros
        ctx.scales, count = scales, len(scales)
        cast = [torch.empty_like(x, dtype=dtype) for x in matrices]
        torch._foreach_copy_(cast, [*matrices[:count], *torch._foreach_mul(matrices[count:], scales)])
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        places = [place for place, x in enumerate(gradients) if x is not None]
        given = [x for x in gradients if x is not None]
        found = [torch.empty_like(x, dtype=torch.float32) for x in given]
        torch._foreach_copy_(found, given)
        of_b = [n for n, place in enumerate(places) if place >= len(ctx.scales)]
        torch._foreach_mul_([found[n] for n in of_b], [ctx.scales[places[n] - len(ctx.scales)] for n in of_b])
        result: list[Tensor | None] = [None] * len(gradients)
        for place, x in zip(places, found, strict=True):
            result[place] = x
        return None, None, *result


class LeanLora:
    """The LoRA layers of a model that :class:`LeanLinear` can compute.

    dtype: that of their inputs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
        for layer in self.layers:
            layer.__class__ = LeanLinear  # which is PEFT's own layer while it has no ``matrices``
        adapters = [layer.active_adapters[0] for layer in self.layers]
        self.scales = [float(layer.scaling[name]) for layer, name in zip(self.layers, adapters, strict=True)]
        pairs = list(zip(self.layers, adapters, strict=True))
        self.matrices: Sequence[Tensor] = [
            *(layer.lora_A[name].weight for layer, name in pairs),
            *(layer.lora_B[name].weight for layer, name in pairs),
        ]

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Inside the block, a forward and a backward pass use the matrices as they are at its beginning."""
        if not self.layers:
            yield
            return
        cast = _Cast.apply(self.scales, self.dtype, *self.matrices)  # type: ignore[no-untyped-call]
        try:
            for layer, a, b in zip(self.layers, cast, cast[len(self.layers) :], strict=False):
                layer.matrices = a, b
            yield
        finally:
            for layer in self.layers:
                layer.matrices = None


def _is_plain(module: Any) -> bool:
    """Whether a module is PEFT's LoRA on a frozen linear layer, with nothing else that PEFT has."""
    if type(module) not in (Linear, LeanLinear) or len(module.active_adapters) != 1 or module.merged:
        return False
    name, base = module.active_adapters[0], module.base_layer
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return False
    parts = [base, module.lora_A[name], module.lora_B[name]]
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts) or type(base) is not nn.Linear:
        return False
    trained = module.lora_A[name].weight.requires_grad and module.lora_B[name].weight.requires_grad
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return trained and frozen and isinstance(module.lora_dropout[name], nn.Identity)
