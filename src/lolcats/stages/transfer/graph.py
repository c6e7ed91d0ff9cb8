"""A micro-step of attention transfer as a CUDA graph.

A micro-step reads rows and shares of the loss, adds to the gradients of the units and puts out losses, all of it in
memory that stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.stages import cuda_graph
from lolcats.stages.cuda_graph import Asked
from lolcats.stages.transfer.hidden import Inputs
from lolcats.stages.transfer.units import Unit


class Learned(NamedTuple):
    """What came of a batch. hidden: (N, T, E) after the last layer; losses: (L,) of the layers that learn from it;
    parts: of each unit's mean loss."""

    hidden: Tensor
    losses: Tensor
    parts: list[Tensor]


Learn = Callable[[Inputs, Sequence[float | Tensor]], Learned]
"""From a batch and each unit's share of the mean loss to what came of it; adds to the units' gradients."""


class MicroStepGraph:
    """Replays ``learn`` for rows of one shape, without documents, and always the same units."""

    def __init__(self, learn: Learn, units: Sequence[Unit], rows: Tensor) -> None:
        self.units, self.rows = list(units), rows.clone()
        self.shares = [torch.zeros((), device=rows.device) for _ in units]  # so a run adds nothing to gradients
        self.found: Learned
        for unit in units:
            unit.keep_gradients()

        def run() -> None:
            self.found = learn((self.rows, None), self.shares)

        self.replay = cuda_graph.capture(run)

    def takes(self, units: Sequence[Unit], inputs: Inputs) -> bool:
        return self.units == list(units) and self.rows.shape == inputs[0].shape and inputs[1] is None

    def __call__(self, inputs: Inputs, shares: Sequence[float]) -> Learned:
        """As ``learn``; the results are valid until the next call."""
        self.rows.copy_(inputs[0], non_blocking=True)
        for tensor, share in zip(self.shares, shares, strict=True):
            tensor.fill_(share)
        self.replay()
        return self.found


class Graphs:
    """The graph of a run, made once it is known which parameters have gradients."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.graph: MicroStepGraph | None = None

    def find(self, learn: Learn, units: Sequence[Unit], inputs: Inputs) -> MicroStepGraph | None:
        """The graph for this batch; None if it is to be computed kernel by kernel."""
        if not (self.asked and units and inputs[1] is None and all(unit.knows_gradients for unit in units)):
            return None
        if self.graph is None or self.graph.units != list(units):
            self.graph = None
            if min(unit.steps - unit.progress.step for unit in units) < cuda_graph.WORTH:
                return None
            rows = inputs[0]
            self.graph = cuda_graph.recorded(
                "Stage 1", self.asked, rows.device, lambda: MicroStepGraph(learn, units, rows)
            )
            self.asked = self.asked if self.graph is not None else False
        return self.graph if self.graph is not None and self.graph.takes(units, inputs) else None
