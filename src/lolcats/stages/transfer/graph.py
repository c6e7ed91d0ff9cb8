"""A micro-step of attention transfer as a CUDA graph: one launch instead of the thousands that small models wait for.

A micro-step reads rows and shares of the loss, adds to the gradients of the units and puts out losses, all of it in
memory that stays in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lolcats.errors import first_line
from lolcats.modeling.cuda_graph import record
from lolcats.stages.transfer.hidden import Inputs
from lolcats.stages.transfer.units import Unit

log = logging.getLogger(__name__)


class Learned(NamedTuple):
    """What came of a batch. hidden: (N, T, E) after the last layer; losses: (L,) of the layers that learn from it;
    parts: of each unit's mean loss."""

    hidden: Tensor
    losses: Tensor
    parts: list[Tensor]


Learn = Callable[[Inputs, Sequence[float | Tensor]], Learned]
"""From a batch and each unit's share of the mean loss to what came of it; adds to the units' gradients."""
Asked = bool | Literal["auto"]
WORTH = 20
"""Optimizer steps from which on a graph pays off."""


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

        self.replay = capture(run)

    def takes(self, units: Sequence[Unit], inputs: Inputs) -> bool:
        return self.units == list(units) and self.rows.shape == inputs[0].shape and inputs[1] is None

    def __call__(self, inputs: Inputs, shares: Sequence[float]) -> Learned:
        """As ``learn``; the results are valid until the next call."""
        self.rows.copy_(inputs[0], non_blocking=True)
        for tensor, share in zip(self.shares, shares, strict=True):
            tensor.fill_(share)
        self.replay()
        return self.found


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record ``run`` as a CUDA graph, and return what replays it. It runs once before that, and other threads may go on
    copying batches."""
    return record(run, errors="thread_local")[0].replay


class Graphs:
    """The graph of a run, made once it is known which parameters have gradients.

    Args:
        asked: whether there may be one. With ``auto``, nobody is warned if it cannot be recorded, and it is given up if
            it leaves too little memory.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.graph: MicroStepGraph | None = None

    def find(self, learn: Learn, units: Sequence[Unit], inputs: Inputs) -> MicroStepGraph | None:
        """The graph for this batch; None if it is to be computed kernel by kernel."""
        if not (self.asked and units and inputs[1] is None and all(unit.knows_gradients for unit in units)):
            return None
        if self.graph is None or self.graph.units != list(units):
            self.graph = None
            if min(unit.steps - unit.progress.step for unit in units) < WORTH:
                return None
            self._record(learn, units, inputs[0])
        return self.graph if self.graph is not None and self.graph.takes(units, inputs) else None

    def _record(self, learn: Learn, units: Sequence[Unit], rows: Tensor) -> None:
        before = reserved(rows.device)
        try:
            self.graph = MicroStepGraph(learn, units, rows)
            problem = "" if self.asked is True or has_room(rows.device, before) else "it leaves too little memory"
        except RuntimeError as error:
            problem = first_line(error)
        if problem:
            self.graph, warned = None, self.asked is True
            self.asked = False
            log.log(logging.WARNING if warned else logging.INFO, "Stage 1 goes on without a CUDA graph: %s.", problem)
        else:
            log.info("Stage 1 has recorded a CUDA graph, which it replays from now on.")


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU, without those that nothing uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def has_room(device: torch.device, before: int) -> bool:
    """Whether as much memory is free as a graph took that was recorded when ``before`` bytes were reserved. Validation
    and uneven batches, which go without the graph, need it beside the graph's own."""
    return torch.cuda.mem_get_info(device)[0] >= torch.cuda.memory_reserved(device) - before
