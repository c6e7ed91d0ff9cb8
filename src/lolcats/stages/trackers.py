"""Trackers such as TensorBoard or Weights & Biases for a loop of our own, through transformers' callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from lolcats.errors import LolcatsError


def name_directory(report_to: list[str], metrics: Path) -> None:
    """Have TensorBoard write beside ``metrics``, unless the environment says where."""
    if "tensorboard" in report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(metrics.parent / "tensorboard"))


class Trackers:
    """Hands the entries of a stage's log to trackers, under the names that transformers' Trainer gives them.

    Args:
        report_to: names of trackers as transformers has them; none: nothing happens.
        arguments: the stage's settings, for trackers that record them.
        steps: optimizer steps in total.

    Raises:
        LolcatsError: a tracker is unknown or cannot start.
    """

    def __init__(self, report_to: list[str], arguments: TrainingArguments, model: nn.Module, steps: int) -> None:
        self.arguments, self.control, self.model = arguments, TrainerControl(), model
        self.state = TrainerState(max_steps=steps)
        try:
            callbacks = [callback() for callback in get_reporting_integration_callbacks(report_to)]
            self.handler: Any = CallbackHandler(callbacks, model, None, None, None)
            self.handler.on_train_begin(arguments, self.state, self.control)
        except (ImportError, RuntimeError, ValueError) as error:
            raise LolcatsError(f"report_to {', '.join(report_to)}: {error}") from error

    def log(self, entry: dict[str, Any]) -> None:
        """One entry of metrics.jsonl."""
        self.state.global_step, self.state.epoch = entry["step"], entry.get("epoch", 0)
        logs = {name: value for name, value in entry.items() if name != "step"}
        self.handler.on_log(self.arguments, self.state, self.control, logs)

    def close(self) -> None:
        self.handler.on_train_end(self.arguments, self.state, self.control)
