"""A micro-batch's forward and backward pass of stage 2 as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig
from lolcats.data.rows import Data
from lolcats.modeling.layer import LinearizedAttention
from lolcats.ranks import ranks
from lolcats.stages import cuda_graph
from lolcats.stages.cuda_graph import Asked

Pass = Callable[[dict[str, Tensor], Tensor], Tensor]
"""From a micro-batch's tensors and the number of predicted tokens to its loss; adds to the gradients."""


def graph_for(asked: Asked, model: PreTrainedModel, data: Data, config: FinetuneConfig) -> Asked:
    """``finetune.cuda_graph`` for this run. ``auto`` becomes False where no graph has been measured."""
    if not asked or not cuda_graph.can_capture(model.device):
        return False
    if asked != "auto":
        return asked
    plain = cuda_graph.in_one_place(model, ranks()) and not data.positions
    plain = plain and config.dropout == 0 and not config.use_dora
    plain = plain and not model.is_gradient_checkpointing and not getattr(model, "is_quantized", False)
    layers = (module for module in model.modules() if isinstance(module, LinearizedAttention))
    return "auto" if plain and all(cuda_graph.by_kernels(layer, model) for layer in layers) else False


class PassGraph:
    """Replays a pass for micro-batches of one shape that are an equal part of their optimizer step.

    Args:
        run: what is recorded. Everything but the tensors that it is given stays as it is now.
        batch: its tensors are the example that is recorded.
        count: () the number of predicted tokens of the optimizer step.
        parts: micro-batches of an optimizer step.
    """

    def __init__(self, run: Pass, batch: Mapping[str, Tensor], count: Tensor, parts: int) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self.count, self.parts = count.clone(), parts
        self.loss: Tensor

        def once() -> None:
            self.loss = run(self.batch, self.count)

        self.replay = cuda_graph.capture(once)

    def takes(self, batch: Mapping[str, Tensor], parts: int) -> bool:
        shapes = {name: tensor.shape for name, tensor in batch.items()}
        return parts == self.parts and shapes == {name: tensor.shape for name, tensor in self.batch.items()}

    def __call__(self, batch: Mapping[str, Tensor], count: Tensor) -> Tensor:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        self.count.copy_(count)
        self.replay()
        return self.loss.clone()


@dataclass
class PassGraphs:
    """The graph of a run, recorded before its first step.

    asked: whether there may be one; False once it could not be recorded.
    recording: whether a pass runs only to be recorded, which must not wait for the GPU.
    """

    asked: Asked = False
    graph: PassGraph | None = None
    recording: bool = False

    def find(
        self, run: Pass, batch: Mapping[str, Tensor], count: Tensor, parts: int, forget: Callable[[], None] | None
    ) -> PassGraph | None:  # fmt: skip
        """The graph for this micro-batch; None if it is to be computed kernel by kernel, as rows of documents are.

        Args:
            parts: micro-batches of its optimizer step.
            forget: removes the gradients that recording leaves. None: this is not the time to record one.
        """
        if self.asked and self.graph is None and forget is not None and "position_ids" not in batch:
            self.recording = True
            try:
                self.graph = cuda_graph.recorded(
                    "Stage 2", self.asked, count.device, lambda: PassGraph(run, batch, count, parts)
                )
            finally:
                self.recording = False
            self.asked = self.asked if self.graph is not None else False
            forget()
        return self.graph if self.graph is not None and self.graph.takes(batch, parts) else None


def zero(gradients: list[Tensor]) -> None:
    """Set gradients to zero where they are."""
    if gradients:
        torch._foreach_zero_(gradients)
