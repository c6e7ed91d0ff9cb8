"""Attention to keys in blocks: the reference against SDPA, the kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.interpreted import DEVICE
from torch import Tensor

from lolcats.attention import use_backend
from lolcats.attention.paged import paged_attention, reference
from lolcats.attention.state import KeyValues
from lolcats.attention.subset import HeadSubset

SIZE, ROWS, LENGTHS = 16, 5, [0, 15, 16, 70, 127]
SHAPES = [(4, 2, 16), (3, 3, 24), (6, 1, 64)]  # query heads, key/value heads, head dim


def case(
    heads: int, kv_heads: int, dim: int, device: str = DEVICE
) -> tuple[list[Tensor], KeyValues, Tensor, Tensor]:  # fmt: skip
    """New q, k, v; a memory in which blocks are scattered, with NaN wherever no key is; tables; positions."""
    generator = torch.Generator().manual_seed(heads)
    new = [torch.randn(ROWS, n, 1, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    width = max(LENGTHS) // SIZE + 1
    tables = torch.randperm(ROWS * width, generator=generator).view(ROWS, width).int()
    memory = KeyValues(*(torch.full((ROWS * width * SIZE, kv_heads, dim), torch.nan) for _ in range(2)))
    for row, length in enumerate(LENGTHS):
        places = (tables[row].long()[:, None] * SIZE + torch.arange(SIZE)).flatten()[:length]
        for x in memory:
            x[places] = torch.randn(length, kv_heads, dim, generator=generator)
    memory = KeyValues(*(x.to(device) for x in memory))
    return [x.to(device) for x in new], memory, tables.to(device), torch.tensor(LENGTHS, device=device)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_sdpa_over_the_keys_in_order(shape: tuple[int, int, int], window: int) -> None:
    (q, k, v), memory, tables, positions = case(*shape, device="cpu")
    y = reference(q, k, v, memory, tables, positions, SIZE, 0.3, window=window)
    for row, length in enumerate(LENGTHS):
        places = (tables[row].long()[:, None] * SIZE + torch.arange(SIZE)).flatten()[: length + 1]
        keys, values = (x[places].transpose(0, 1)[None, :, -window:] for x in memory)
        torch.testing.assert_close(keys[0, :, -1], k[row, :, 0], atol=0, rtol=0)
        expected = F.scaled_dot_product_attention(q[row : row + 1], keys, values, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(y[row : row + 1], expected)


@pytest.mark.parametrize("asks", [{}, {"window": 20}, {"softcap": 2.0}, {"window": 1}, {"softcap": 5.0, "window": 64}])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_reference(shape: tuple[int, int, int], asks: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    (q, k, v), memory, tables, positions = case(*shape)
    own = KeyValues(*(x.clone() for x in memory))
    expected = reference(q, k, v, memory, tables, positions, SIZE, 0.3, **asks)
    with use_backend("triton"):
        y = paged_attention(q, k, v, own, tables, positions, SIZE, 0.3, **asks)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, memory, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_the_number_of_parts_changes_nothing(parts: int) -> None:
    """More parts than some rows have blocks among them; also for heads out of a whole layer."""
    pytest.importorskip("triton")
    from lolcats.attention.kernels.paged import paged_decode

    (q, k, v), memory, tables, positions = case(4, 2, 16)
    expected = reference(q, k, v, memory, tables, positions, SIZE, 0.3, window=90)
    whole = [torch.full((ROWS, n, 1, 16), torch.nan, device=DEVICE) for n in (10, 5, 5)]
    for x, part, heads in zip(whole, (q, k, v), ([2, 3, 8, 9], [1, 4], [1, 4]), strict=True):
        x[:, heads] = part
    out = torch.full((ROWS, 10, 16), torch.nan, device=DEVICE)
    subset = HeadSubset(torch.tensor([1, 4], device=DEVICE), out)
    paged_decode(*whole, memory, tables, positions, SIZE, 0.3, window=90, subset=subset, parts=parts)
    torch.testing.assert_close(out[:, [2, 3, 8, 9], None], expected, atol=1e-5, rtol=1e-5)
    assert out[:, [0, 1, 4, 5, 6, 7]].isnan().all()
    y = paged_decode(q, k, v, memory, tables, positions, SIZE, 0.3, window=90, parts=parts)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
