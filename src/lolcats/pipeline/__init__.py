"""The whole job in order: teacher, attention transfer, LoRA, table, export. A killed run continues where it stopped."""

from __future__ import annotations

from pathlib import Path

from lolcats.config import Config
from lolcats.data.inputs import Inputs
from lolcats.pipeline.finish import finish, report
from lolcats.pipeline.job import Job, log, resume, start
from lolcats.pipeline.measure import judge, measure, measure_heads
from lolcats.pipeline.models import Models, Say, device_and_dtype
from lolcats.pipeline.stages import check_block, keep_longest, run_controls, run_finetune, run_transfer
from lolcats.pipeline.untrained import linearize_untrained
from lolcats.run import Run


def linearize(model: str, data: str, out: Path, config: Config, merge: bool = True, say: Say = log) -> Run:
    """Turn ``model`` into a linear-attention model by training on ``data``, and write everything to ``out``.

    When called again with the same arguments, it continues where it stopped and ends with the same weights.

    Args:
        model: hub id, directory or .gguf file.
        data: hub data set id or file, see :func:`lolcats.data.rows.load_data`.
        merge: also write ``out``/merged.
        say: called with each progress message.

    Raises:
        LolcatsError: the model, data or settings cannot be used, or ``out`` holds something else.
    """
    job = start(Inputs(model, trust=config.trust_remote_code), data, out, config, say)
    train_maps(job)
    train_lora(job, merge)
    return job.run


def train_maps(job: Job, block: int | None = None) -> None:
    """Stage 1, and what can be measured before and after it without loading the whole model only to measure."""
    whole = not job.in_turn
    if whole:
        measure(job)
    run_transfer(keep_longest(job) if whole else job, block)
    if whole:
        measure(job)


def train_lora(job: Job, merge: bool = True) -> None:
    """Controls and stage 2 of a run whose stage 1 is done; then everything is measured and written."""
    job = keep_longest(job)
    measure(job)
    run_controls(job)
    run_finetune(job)
    measure(job)
    judge(job)
    finish(job, merge)


__all__ = [
    "Job", "Models", "check_block", "device_and_dtype", "finish", "judge", "keep_longest", "linearize",
    "linearize_untrained", "log", "measure", "measure_heads", "report", "resume", "run_controls", "run_finetune",
    "run_transfer", "start",
    "train_lora", "train_maps",
]  # fmt: skip
