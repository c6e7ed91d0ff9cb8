"""Work that a model does again and again on the same memory, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def record(run: Callable[[], T], pool: Any = None, errors: str = "global") -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of ``run``, and what that returned: memory that each replay writes anew.

    It first runs once without a graph, which compiles kernels and loads libraries.

    Args:
        pool: memory shared with other graphs.
        errors: what other threads may do meanwhile, as ``capture_error_mode`` of :class:`torch.cuda.graph`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=errors):
        result = run()
    return graph, result
