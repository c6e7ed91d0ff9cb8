"""Some heads of a layer, decoded by one kernel while another decodes the rest.

Both read their heads out of the same queries, keys and values, and write into the same outputs, so nothing is taken
apart or put together around them.

Shapes: B rows, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeadSubset(NamedTuple):
    """Key/value heads of a layer, with the query heads that use them.

    heads: (some of G,) ints on the device, ascending. out: (B, H, D), contiguous, the outputs of all query heads.
    """

    heads: Tensor
    out: Tensor


def side_by_side(device: torch.device, short: Callable[[], Any], long: Callable[[], Any]) -> None:
    """Call both. On a GPU, what they launch may run at the same time, and ``short`` gets free multiprocessors first, so
    that ``long`` fills what it leaves. Later work waits for both. They must not write what the other reads."""
    if device.type != "cuda":
        short()
        long()
        return
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            short()
        long()
    finally:
        current.wait_stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
