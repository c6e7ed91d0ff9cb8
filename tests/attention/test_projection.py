"""x·W for the kernels, and its gradients."""

from __future__ import annotations

import pytest
import torch

from lolcats.attention.kernels.projection import project


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [2, 6])
def test_equals_products_of_single_heads(maps: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 7, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(maps, 5, 4, requires_grad=True)
    heads = x.float().repeat_interleave(maps // 2, 1)
    expected, y = torch.einsum("bmtd,mdf->bmtf", heads, weight), project(x, weight)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, weight), direction), torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gradients_of_one_alone() -> None:
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 4, 4)
    for wanted in (x, weight):
        wanted.requires_grad_()
        (found,) = torch.autograd.grad(project(x, weight).sum(), wanted)
        assert found.shape == wanted.shape
        wanted.requires_grad_(False)
