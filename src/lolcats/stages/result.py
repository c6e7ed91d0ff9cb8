"""What a stage hands back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageResult:
    """What a stage did: its number of optimizer steps, and its log.

    ``best_loss`` is the validation loss of the model's final weights, which are those of step ``best_step``.
    """

    steps: int
    best_step: int
    best_loss: float
    history: list[dict[str, float]]
