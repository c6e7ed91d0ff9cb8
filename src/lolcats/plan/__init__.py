"""Estimate memory, disk and time of a run from the model's configuration (``lolcats plan``)."""

from lolcats.plan import quantized, report
from lolcats.plan.costs import Machine, Plan, Speeds, Work, plan_finetune, plan_transfer
from lolcats.plan.size import Size, read_config, size_of

__all__ = [
    "Machine", "Plan", "Size", "Speeds", "Work", "plan_finetune", "plan_transfer", "quantized", "read_config", "report",
    "size_of",
]  # fmt: skip
