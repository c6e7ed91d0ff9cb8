"""Learning-rate schedules by our names and by those of transformers."""

from __future__ import annotations

from lolcats.config import StageConfig

SCHEDULES = {
    "reduce_on_plateau": "reduce_lr_on_plateau", "constant": "constant_with_warmup", "linear": "linear",
    "cosine": "cosine",
}  # fmt: skip


def plateau_arguments(config: StageConfig) -> dict[str, float]:
    """What transformers needs to know of a schedule that looks at the validation loss."""
    if config.schedule != "reduce_on_plateau":
        return {}
    return {"factor": config.plateau_factor, "patience": config.plateau_patience, "min_lr": config.min_learning_rate}
