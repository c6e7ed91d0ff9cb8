"""Learning-rate schedules by our names and by those of transformers."""

from __future__ import annotations

SCHEDULES = {
    "reduce_on_plateau": "reduce_lr_on_plateau", "constant": "constant_with_warmup", "linear": "linear",
    "cosine": "cosine",
}  # fmt: skip
