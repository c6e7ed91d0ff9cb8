"""Which values the numeric settings of :mod:`lolcats.config` may have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lolcats.errors import LolcatsError


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``. above: without ``low`` itself; below: without ``high`` itself."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return "positive" if self.above and self.low == 0 else f"at least {self.low:.10g}"
        if self.above == self.below:
            return f"{'strictly ' * self.above}between {self.low:.10g} and {self.high:.10g}"
        low = f"greater than {self.low:.10g}" if self.above else f"at least {self.low:.10g}"
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:.10g}"


FROM_0, FROM_1, POSITIVE = Range(0), Range(1), Range(0, above=True)
STAGE = {
    "learning_rate": POSITIVE, "weight_decay": FROM_0, "batch_size": FROM_1, "micro_batch_size": FROM_1,
    "max_steps": Range(-1), "max_grad_norm": FROM_0, "warmup_steps": FROM_0, "plateau_factor": Range(0, 1, below=True),
    "plateau_patience": FROM_0, "min_learning_rate": FROM_0, "eval_steps": FROM_1, "save_steps": FROM_1,
    "log_steps": FROM_1, "early_stopping_patience": FROM_0,
}  # fmt: skip
RANGES: dict[str, dict[str, Range]] = {
    "": {"seed": Range(0, 2**32 - 1)},  # of NumPy, which transformers seeds too
    "attention": {
        "softmax_budget": Range(0, 1), "feature_dim": FROM_1, "window_size": FROM_1, "sinks": FROM_0,
        "gate_init": Range(-math.inf),
    },
    "data": {
        "sequence_length": Range(2), "validation_rows": FROM_1, "test_rows": FROM_1, "max_tokens": FROM_0,
        "keep_longest_effective": Range(0, 1, above=True),
    },
    "transfer": {
        **STAGE, "mse_weight": FROM_0, "xent_weight": FROM_0, "block_size": FROM_1, "chunk_tokens": FROM_1,
    },
    "finetune": {
        **STAGE, "learning_rate": FROM_0, "feature_map_learning_rate": FROM_0, "rank": FROM_1, "alpha": POSITIVE,
        "dropout": Range(0, 1, below=True), "kl_weight": Range(0, 1, above=True, below=True),
        "kl_temperature": POSITIVE,
    },
}  # fmt: skip
"""By section and name. ``epochs`` only counts without ``max_steps``, ``plateau_factor`` with its schedule."""
INSTEAD = {
    "finetune.kl_weight": "For one loss only, set finetune.loss to cross_entropy or kl.",
    "transfer.epochs": "To skip stage 1, set transfer.max_steps=0.",
    "finetune.epochs": "To skip stage 2, set finetune.max_steps=0.",
}
"""What to set instead of a value outside the range."""


def check_ranges(config: Any, section: str) -> None:
    """
    Raises:
        LolcatsError: a number of a section of the configuration is not finite or out of its range.
    """
    ranges = dict(RANGES[section])
    if section in ("transfer", "finetune"):
        if config.max_steps < 0:
            ranges["epochs"] = POSITIVE
        if config.schedule != "reduce_on_plateau":
            del ranges["plateau_factor"]
    for name, allowed in ranges.items():
        full, value = f"{section}.{name}".removeprefix("."), getattr(config, name)
        if isinstance(value, str):  # auto
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise LolcatsError(f"{full}: expected a finite number, got {value}.")
        if value not in allowed:
            shown = f"{value:.10g}" if isinstance(value, float) else value
            raise LolcatsError(f"{full} must be {allowed}, not {shown}. {INSTEAD.get(full, '')}".rstrip())
