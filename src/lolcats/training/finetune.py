"""Stage 2, low-rank linearizing: LoRA on next-token loss through the linearized attentions, feature maps frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import Config, FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.loss import next_token_loss
from lolcats.training.data import Data
from lolcats.training.trainer import StageResult, StageTrainer, train_only


def finetune(
    model: PreTrainedModel, data: Data, config: Config, directory: Path
) -> tuple[PeftModel, StageResult]:  # fmt: skip
    """Wrap ``model`` with LoRA (PEFT) and train it; only LoRA matrices train unless the recipe says otherwise.

    Returns:
        the PEFT model with its best weights (``.merge_and_unload()`` folds them in), and what the stage did.
    """
    torch.manual_seed(config.seed)
    wrapped = add_lora(model, config.finetune)
    trainer = FinetuneTrainer(
        wrapped, config.finetune, data.train, data.validation, "finetune",
        directory / "checkpoints" / "finetune", directory / "metrics.jsonl", config.seed, config.report_to,
    )  # fmt: skip
    return wrapped, trainer.run()


def add_lora(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """LoRA on ``config.targets``; sets what requires a gradient."""
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets),
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise LolcatsError(f"finetune.targets {config.targets} do not fit this model: {error}") from None
    maps = config.feature_map_learning_rate > 0
    train_only(wrapped, lambda name: "lora_" in name or (maps and ".lolcats." in name))
    return wrapped


class FinetuneTrainer(StageTrainer):
    """Loss: cross-entropy of the next token, mean over all tokens."""

    stage_config: FinetuneConfig

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        ids = inputs["input_ids"]
        return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; feature maps, where they train, form a group with their own rate."""
        rate = self.stage_config.feature_map_learning_rate
        if self.optimizer is None and rate > 0:
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            lora: dict[str, Any] = {"params": [p for name, p in trained if ".lolcats." not in name]}
            maps: dict[str, Any] = {"params": [p for name, p in trained if ".lolcats." in name], "lr": rate}
            self.optimizer: Any = torch.optim.AdamW(
                [lora, maps], lr=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
        return super().create_optimizer() if self.optimizer is None else self.optimizer
