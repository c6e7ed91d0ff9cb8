"""The decode step as CUDA graphs: one for each number of rows, replayed instead of run.

A step reads and writes nothing but static memory (its inputs, the states of the slots, its logits), so that one replay
stands for all kernel launches of a forward pass, and transformers' Python is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lolcats.modeling.cuda_graph import record

log = logging.getLogger(__name__)
Forward = Callable[[Tensor, Tensor, int], Tensor]


class Landing:
    """Tokens (B,) on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.arrived = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        self.arrived.record()

    def wait(self) -> list[int]:
        self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return tokens


class DecodeGraphs:
    """Captures ``forward(ids, positions, rows)``, (rows, 1) both -> logits (rows, V), for every one of ``sizes``.

    Capturing moves the states of the first rows: they must hold nothing yet.
    """

    def __init__(self, forward: Forward, sizes: Sequence[int], device: torch.device) -> None:
        self.inputs = torch.zeros(2, max(sizes), dtype=torch.long, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for rows in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            ids, positions = self.inputs[:, :rows, None]
            self.graphs[rows] = record(partial(forward, ids, positions, rows), pool)

    def run(self, rows: int, inputs: Tensor | None = None) -> Tensor:
        """Logits (rows, V), valid until the next run.

        inputs: (2, rows) ids and positions, on the host; None: what :meth:`follow` left.
        """
        if inputs is not None:
            self.inputs[:, :rows].copy_(inputs, non_blocking=True)
        graph, logits = self.graphs[rows]
        graph.replay()
        return logits

    def follow(self, tokens: Tensor) -> Landing:
        """Make ``tokens`` (B,) the inputs of the next run, one position on, and send them to the host."""
        self.inputs[0, : len(tokens)] = tokens
        self.inputs[1, : len(tokens)] += 1
        return Landing(tokens)


def capture(forward: Forward, sizes: Sequence[int], device: torch.device) -> DecodeGraphs | None:
    """None, with a warning, for a model whose forward pass cannot be captured: it decodes without graphs."""
    try:
        return DecodeGraphs(forward, sizes, device)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        log.warning("Cannot capture this model in CUDA graphs, so it decodes without them: %s", error)
        return None
