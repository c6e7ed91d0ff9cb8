"""A forward pass in transfer mode, in which something is measured of every linearized layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers, override

T = TypeVar("T")


@torch.no_grad()
def watch_layers(
    model: PreTrainedModel, ids: Tensor, function: Callable[[LinearizedAttention, AttentionCall], T],
    positions: Tensor | None = None,
) -> list[T]:  # fmt: skip
    """Pass token ids (B, T) through the base model, and return ``function(layer, call)`` of each linearized layer.

    The results are in the order of the layers. The model is in evaluation mode afterwards.

    Args:
        function: called while the pass runs, without gradients; what it keeps of a call stays in memory.
        positions: (B, T) position ids, which restart at 0 for each document; None if each row is one sequence.
    """
    found: dict[LinearizedAttention, T] = {}

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        found[layer] = function(layer, call)

    device = model.device
    given = inputs_of(ids.to(device), None if positions is None else positions.to(device))
    with override(model.eval(), mode="transfer", observer=observe):
        decoder(model)(**given)
    return [found[layer] for layer in linearized_layers(model)]
