"""The kernels as one operation for torch.compile, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.interpreted import add_bf16_products
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lolcats.attention import AttentionSpec, FeatureMap, Mixer
from lolcats.attention.kernels import compiled, triton_attention

CASES = [("hybrid", False), ("hybrid", True), ("linear", False), ("window", False)]


def problem(kind: Any, unrotated: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Mixer]:
    torch.manual_seed(0)
    spec = AttentionSpec(kind, "terraced", 16, 0 if kind == "linear" else 2, "none", "sum", unrotated)
    phi_q, phi_k = (FeatureMap("hedgehog", 4, 16, 16).requires_grad_(False) for _ in range(2))
    shapes = [(1, 4, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16), *[(1, 4, 40, 16), (1, 2, 40, 16)][: 2 * unrotated]]
    mixer = Mixer(phi_q, phi_k, torch.full((4,), 0.3), spec, 0.25)
    return [torch.randn(shape).to(dtype) for shape in shapes], mixer


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    y = function(*leaves[:3], seen=tuple(leaves[3:]) or None)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize(("kind", "unrotated"), CASES)
def test_is_what_the_kernels_compute(kind: str, unrotated: bool) -> None:
    tensors, mixer = problem(kind, unrotated)
    theirs = gradients(lambda q, k, v, seen: triton_attention(q, k, v, mixer, seen=seen)[0], tensors)
    ours = gradients(lambda q, k, v, seen: compiled.compiled_attention(q, k, v, mixer, seen), tensors)
    assert len(ours) == 1 + len(tensors)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "unrotated"), CASES[1:3])
def test_says_what_it_puts_out(kind: str, unrotated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, strides and dtypes without computing, as torch.compile asks for them."""
    add_bf16_products(monkeypatch)
    tensors, mixer = problem(kind, unrotated, dtype)
    maps: Any = [mixer.phi_q.weight, mixer.phi_k.weight, mixer.gamma]  # type: ignore[attr-defined]
    seen: list[Any] = [*tensors[3:], *[None, None][len(tensors) - 3 :]]
    rest = [f"{kind},terraced,none,sum", [16, mixer.spec.sinks, int(unrotated)], 0.25, None]

    def both(tensors: list[Any]) -> list[Tensor]:
        outputs = compiled._attend(*tensors, *rest)
        return [*outputs, *compiled._attend_backward(outputs[0], *tensors, *outputs, *rest)]

    inputs, mode = [*tensors[:3], *seen, *maps], FakeTensorMode()
    with torch.no_grad():
        real = both(inputs)
        fake = both([None if x is None else mode.from_tensor(x) for x in inputs])
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]
