"""Softmax attention of one new token a row to keys that lie in blocks: what it computes, and the choice of its code."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.attention.path import choose_paged_path
from lolcats.attention.state import KeyValues
from lolcats.attention.subset import HeadSubset


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, tables: Tensor, positions: Tensor, size: int, scale: float,
    softcap: float | None = None, window: int = 0, subset: HeadSubset | None = None,
) -> Tensor:  # fmt: skip
    """Outputs (B, H, 1, D), and the new keys and values stored in the blocks.

    Args:
        q: (B, H, 1, D); k, v: (B, G, 1, D), of the new tokens.
        memory: keys and values (places, G, D); a block of ``size`` tokens is ``size`` places.
        tables: (B, W) int32, the blocks of each row in order.
        positions: (B,) of the new tokens: how many keys each row has already.
        window: how many of the last keys a query sees, its own among them; 0 for all.
        subset: the heads whose keys are in the memory, if q, k and v have more. Only for the kernels; what is returned
            is then ``subset.out``.
    """
    if choose_paged_path(q) == "kernels":
        from lolcats.attention.kernels.paged import paged_decode

        return paged_decode(q, k, v, memory, tables, positions, size, scale, softcap, window, subset)
    assert subset is None
    return reference(q, k, v, memory, tables, positions, size, scale, softcap, window)


def reference(
    q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, tables: Tensor, positions: Tensor, size: int, scale: float,
    softcap: float | None = None, window: int = 0,
) -> Tensor:  # fmt: skip
    """The specification, in fp32 over whole tables."""
    places = (tables.long()[:, :, None] * size + torch.arange(size, device=tables.device)).flatten(1)  # (B, W size)
    new = places.gather(1, positions[:, None])[:, 0]
    for x, y in zip(memory, (k, v), strict=True):
        x.index_copy_(0, new, y[:, :, 0].to(x.dtype))
    keys, values = (x[places].transpose(1, 2).float() for x in memory)  # (B, G, W size, D)
    queries = q.float().unflatten(1, (k.shape[1], -1))[:, :, :, 0]  # (B, G, H/G, D)
    logits = scale * queries @ keys.transpose(2, 3)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    index, last = torch.arange(places.shape[1], device=q.device), positions[:, None]
    seen = (index <= last) & (index > last - (window or places.shape[1] + 1))
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    values = values.masked_fill(~seen[:, None, :, None], 0)  # what lies there may be anything
    return (weights @ values).flatten(1, 2)[:, :, None].to(q.dtype)
