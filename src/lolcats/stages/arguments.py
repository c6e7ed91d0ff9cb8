"""A stage's settings in transformers' terms."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from lolcats.config import StageConfig
from lolcats.errors import LolcatsError
from lolcats.ranks import ranks
from lolcats.stages.schedules import SCHEDULES, plateau_arguments


def training_arguments(
    config: StageConfig,
    directory: Path,
    seed: int,
    device: torch.device,
    report_to: list[str],
    validation_rows: int = 0,
) -> TrainingArguments:
    """Translate our settings for transformers. Under torchrun, the ranks share each batch equally."""
    count, rows = ranks().size, config.rows_at_once
    if config.batch_size % (rows * count):
        raise LolcatsError(
            f"A batch of {config.batch_size} rows cannot be shared by {count} ranks in micro-batches of "
            f"{rows}: set batch_size to a multiple of {rows * count}, or "
            "lower micro_batch_size."
        )
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=evaluation_batch(rows, validation_rows, count),
        gradient_accumulation_steps=config.batch_size // (rows * count),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=SCHEDULES[config.schedule],
        lr_scheduler_kwargs=plateau_arguments(config),
        warmup_steps=config.warmup_steps,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},  # else the host waits for every copy of a batch
        report_to=report_to or "none",
    )
    if arguments.n_gpu > 1:  # one GPU per process: several need torchrun, never DataParallel
        arguments._n_gpu = 1
    return arguments


def evaluation_batch(most: int, rows: int, ranks: int) -> int:
    """Number of rows to evaluate at a time, at most ``most``, such that no rank pads a batch with repeated rows."""
    if ranks == 1:
        return most
    return max((n for n in range(1, most + 1) if rows % (n * ranks) == 0), default=1)
