"""Stage 1, attention transfer: each layer's linear attention learns the output of the layer's softmax attention.

The teacher's hidden states flow through the model, because each layer outputs its softmax attention. So the loss of a
layer only depends on its own parameters: backward runs inside its forward, and peak memory is that of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import Config, TransferConfig
from lolcats.data.rows import Data
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers, override
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.skeleton import Skeleton
from lolcats.ranks import ranks
from lolcats.stages.trainer import StageResult, StageTrainer, train_only
from lolcats.stages.transfer.loop import LayerwiseResult
from lolcats.stages.transfer.loss import attention_loss
from lolcats.stages.transfer.orders import LayerByLayer, Say, train_joint
from lolcats.stages.transfer.visits import first_visit, hidden_windows


def transfer(
    model: PreTrainedModel, data: Data, config: Config, directory: Path, base: str = ""
) -> StageResult:  # fmt: skip
    """Train the feature maps and gates of a converted model in place; everything else is frozen.

    Uses transformers' Trainer in one process with ``coupling: joint``, else :mod:`lolcats.stages.transfer.loop`.

    Args:
        model: result of :func:`lolcats.modeling.convert.convert`, in any float dtype; feature maps and gates are fp32.
        data: rows (N, L) of token ids.
        directory: run directory, for ``metrics.jsonl`` and working files under ``checkpoints/transfer``.
        base: fingerprint of the base model, to tell this run from others.

    Returns:
        The result of the stage. The model has the feature maps with the best validation loss.
    """
    train_only(model, lambda name: ".lolcats." in name)
    here = ranks()
    if here.size > 1 or config.transfer.coupling == "per_layer":
        return train_joint(model, data, config, directory, here, base)
    trainer = TransferTrainer(
        model, config.transfer, data.dataset("train"), data.dataset("validation"), "transfer",
        directory / "checkpoints" / "transfer", directory / "metrics.jsonl", config.seed, config.report_to,
    )  # fmt: skip
    with fused_layers(model, config.transfer.liger):
        return trainer.run()


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
    work = LayerByLayer(skeleton, data, config, directory, ranks(), base, say)
    return work.stream() if config.transfer.order == "stream" else work.blocks(only)


class TransferTrainer(StageTrainer):
    """Loss: mean over layers of mse_weight · MSE(ŷ, y) (+ xent_weight · cross-entropy of attention weights)."""

    stage_config: TransferConfig
    seen = (-1, 0)
    """The current optimizer step, and how many of its rows have been processed."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        scale = 1 / self.current_gradient_accumulation_steps
        inputs = self._prepare_inputs(inputs)
        ids = inputs["input_ids"]
        losses = layer_losses(model, ids, self.stage_config, scale, inputs.get("position_ids"), self._hidden(len(ids)))
        self.watch.add(losses)
        return losses.mean() * scale

    def _hidden(self, rows: int) -> list[int]:
        """Which of the next rows of this step hide their window."""
        config, step = self.stage_config, self.state.global_step
        before = self.seen[1] if self.seen[0] == step else 0
        self.seen = step, before + rows
        first = before + first_visit(step, len(self.train_dataset), config.batch_size)
        return hidden_windows(range(first, first + rows), config.window_dropout, self.args.seed)

    def where(self, bad: Tensor) -> str:
        layers = [layer.geometry.layer for layer in linearized_layers(self.model)]
        return f" in layer {layers[int(bad.long().argmax())]}"

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        return layer_losses(
            model, inputs["input_ids"], self.stage_config, positions=inputs.get("position_ids")
        ).mean()  # fmt: skip


def layer_losses(
    model: PreTrainedModel, input_ids: Tensor, config: TransferConfig, backward_scale: float | None = None,
    positions: Tensor | None = None, hidden: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """(layers,) losses of one batch (B, T) of token ids.

    With ``backward_scale``, also accumulates the gradient of backward_scale · mean(losses), layer by layer.

    Args:
        positions: (B, T) position ids, which restart at 0 for each document; None if each row is one sequence.
        hidden: indices of rows that hide their window, see :func:`attention_loss`.
    """
    losses: list[Tensor] = []
    count = len(linearized_layers(model))

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        with torch.set_grad_enabled(backward_scale is not None):
            loss = attention_loss(layer, call, config, hidden)
            if backward_scale is not None:
                (loss * (backward_scale / count)).backward()
        losses.append(loss.detach())

    model.eval()  # the teacher has no dropout
    with torch.no_grad(), override(model, mode="transfer", observer=observe):
        extra = {} if positions is None else {"position_ids": positions}
        decoder(model)(input_ids=input_ids, use_cache=False, **extra)
    return torch.stack(losses)


def layer_errors(
    model: PreTrainedModel, rows: Iterable[Tensor], positions: Iterable[Tensor | None] = repeat(None)
) -> list[float]:  # fmt: skip
    """Mean squared error of each linearized layer's output over batches of token ids (B, T) and position ids."""
    unit, losses = TransferConfig(mse_weight=1.0), []
    for ids, places in zip(rows, positions, strict=False):
        places = None if places is None else places.to(model.device)
        losses.append(layer_losses(model, ids.to(model.device), unit, positions=places))
    return torch.stack(losses).mean(0).tolist()
