"""Stage 1, attention transfer: each layer's linear attention learns the output of the layer's softmax attention.

The teacher's hidden states flow through the model, because each layer outputs its softmax attention. So the loss of a
layer only depends on its own parameters: backward runs inside its forward, and peak memory is that of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import Config, TransferConfig
from lolcats.data.rows import Data
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.observe import watch_layers
from lolcats.modeling.skeleton import Skeleton
from lolcats.ranks import ranks
from lolcats.stages.micro_batch import Trial, settled
from lolcats.stages.result import StageResult
from lolcats.stages.trained import train_only
from lolcats.stages.transfer.loop import LayerwiseResult
from lolcats.stages.transfer.loss import attention_loss, squared_error
from lolcats.stages.transfer.orders import LayerByLayer, Say, train_joint


def transfer(
    model: PreTrainedModel, data: Data, config: Config, directory: Path, base: str = ""
) -> StageResult:  # fmt: skip
    """Train the feature maps and gates of a converted model in place; everything else is frozen.

    Args:
        model: result of :func:`lolcats.modeling.convert.convert`, in any float dtype; feature maps and gates are fp32.
        data: rows (N, L) of token ids.
        directory: run directory, for ``metrics.jsonl`` and working files under ``checkpoints/transfer``.
        base: fingerprint of the base model, to tell this run from others.

    Returns:
        The result of the stage. The model has the feature maps with the best validation loss.
    """
    train_only(model, lambda name: ".lolcats." in name)

    def trial(rows: int) -> None:
        ids, positions = next(data.batches([n % len(data.train) for n in range(rows)], rows))
        with fused_layers(model, config.transfer.liger):
            layer_losses(model, ids, config.transfer, 1.0, positions)
        model.zero_grad()

    config = _settled(config, directory, model.device, trial)
    return train_joint(model, data, config, directory, ranks(), base)


def _settled(config: Config, directory: Path, device: torch.device, trial: Trial | None = None) -> Config:
    stage = settled(config.transfer, directory / "checkpoints" / "transfer", device, trial)
    return replace(config, transfer=stage)


def transfer_in_turn(
    skeleton: Skeleton, data: Data, config: Config, directory: Path, base: str = "", only: int | None = None,
    say: Say = lambda text: None,
) -> LayerwiseResult | None:  # fmt: skip
    """Like :func:`transfer`, for the orders that load one layer or block after another onto the device.

    Args:
        only: with ``order: blocks``, train only this block.

    Returns:
        None while other blocks are untrained.
    """
    config = _settled(config, directory, skeleton.device)
    work = LayerByLayer(skeleton, data, config, directory, ranks(), base, say)
    return work.stream() if config.transfer.order == "stream" else work.blocks(only)


def layer_losses(
    model: PreTrainedModel, input_ids: Tensor, config: TransferConfig, backward_scale: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(layers,) losses of one batch (B, T) of token ids.

    With ``backward_scale``, also accumulates the gradient of backward_scale · mean(losses), layer by layer.

    Args:
        positions: (B, T) position ids, which restart at 0 for each document; None if each row is one sequence.
    """
    count = len(linearized_layers(model))

    def loss_of(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
        with torch.set_grad_enabled(backward_scale is not None):
            loss = attention_loss(layer, call, config)
            if loss.requires_grad and backward_scale is not None:
                (loss * (backward_scale / count)).backward()
        return loss.detach()

    return torch.stack(watch_layers(model, input_ids, loss_of, positions))


def layer_errors(
    model: PreTrainedModel, rows: Iterable[Tensor], positions: Iterable[Tensor | None] = repeat(None)
) -> list[float]:  # fmt: skip
    """Mean squared error of each linearized layer's output over all rows of token ids, given as batches (B, T), of any
    number of rows, with their position ids."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, places in zip(rows, positions, strict=False):
        found = torch.stack(watch_layers(model, ids, squared_error, places)).cpu().double()
        total, count = total + found * len(ids), count + len(ids)
    return (total / count).tolist()
