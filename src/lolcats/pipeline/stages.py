"""The stages of a job. Each takes a job and leaves what it makes in the run's directory; none runs an earlier one."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import Any

import torch

from lolcats.compared import CONTROLS
from lolcats.config import Config
from lolcats.errors import LolcatsError
from lolcats.evaluation.effective_length import longest
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, save_feature_maps, save_lora
from lolcats.modeling.parts import lost_controls
from lolcats.pipeline.job import Job
from lolcats.ranks import is_first, ranks
from lolcats.report.table import loss_of
from lolcats.stages.finetune.controls import control_config, control_directory, train_control
from lolcats.stages.finetune.stage import finetune
from lolcats.stages.micro_batch import settled_rows
from lolcats.stages.result import StageResult
from lolcats.stages.transfer.stage import transfer, transfer_in_turn


def check_block(config: Config, block: int | None) -> None:
    """Raise LolcatsError if ``block`` is set but stage 1 has no blocks."""
    if block is not None and config.transfer.order != "blocks":
        raise LolcatsError("--block needs transfer.order=blocks (--schedule blocks), but this run has no blocks.")


def keep_longest(job: Job) -> Job:
    """The job with only the training rows that ``data.keep_longest_effective`` selects; measured once per run."""
    fraction, data = job.config.data.keep_longest_effective, job.data
    if fraction == 1:
        return job

    def measured() -> dict[str, Any]:
        job.say(f"Effective sequence lengths of {len(data.train)} rows")
        lengths, indices = longest(data, job.models.converted(), fraction, job.batch)
        means = {"all": lengths.rows.mean().item(), "kept": lengths.rows[indices].mean().item()}
        job.say(
            f"  training on the {len(indices)} of {len(data.train)} rows with the longest effective sequence length: "
            f"{means['kept']:.1f} tokens on average, {means['all']:.1f} over all rows"
        )
        return {"mean": means, "rows": indices.tolist()}

    rows = job.run.measure("effective_length", measured)["rows"]
    return replace(job, data=data.select(torch.tensor(rows)))


def run_transfer(job: Job, block: int | None = None) -> None:
    """Stage 1 unless done: train feature maps and gates, and leave ``feature_maps.safetensors``.

    ``block``: with ``transfer.order: blocks``, train only this block; the stage is done once all blocks are.
    """
    run, config = job.run, job.config
    check_block(config, block)
    if run.stage_done("transfer"):
        return
    model = job.models.skeleton().model if job.in_turn else job.models.converted()
    summary: dict[str, Any] | None = {"skipped": True}
    if job.learns and config.transfer.max_steps != 0:
        job.say(_headline(job, "Stage 1: attention transfer", "transfer"))
        started = time.time()
        result = _in_turn(job, block) if job.in_turn else transfer(model, job.data, config, run.directory, _base(job))
        summary = None if result is None else _summary(result, started)
    if summary is None:
        job.say("Other blocks are still untrained: train them too, then combine them with --join.")
        return
    if is_first():
        save_feature_maps(model, run.directory / FEATURE_MAPS)
    run.finish_stage("transfer", summary | settled_rows(run.directory / "checkpoints" / "transfer"))
    ranks().wait()
    if is_first():
        shutil.rmtree(run.directory / "checkpoints" / "transfer", ignore_errors=True)
    if config.transfer.order != "joint":
        job.models.drop()  # the skeleton


def _in_turn(job: Job, block: int | None) -> StageResult | None:
    result = transfer_in_turn(
        job.models.skeleton(), job.data, job.config, job.run.directory, _base(job), block, job.say
    )  # fmt: skip
    if result is not None:
        job.run.measure("layer_errors_before", lambda: result.errors_before)
        job.run.measure("layer_errors_after", lambda: result.errors_after)
    return result


def _base(job: Job) -> str:
    return job.run.base.fingerprint


def run_controls(job: Job) -> None:
    """Train the configured controls unless done, and leave each in ``controls/``."""
    run, config = job.run, job.config
    wanted = config.controls if config.finetune.max_steps != 0 and job.learns else []
    if wanted and ranks().size > 1:
        raise LolcatsError("Controls are trained in one process: run lolcats finetune --controls without torchrun.")
    if lost := lost_controls(run.directory):
        job.say(lost)
    if config.controls and not job.learns:
        job.say("No controls are trained: this model has no linear attention, which they would be compared with.")
    for name in wanted:
        if run.stage_done(name):
            continue
        model = job.models.converted()
        job.say(_headline(job, f"Control {CONTROLS[name].in_words}", "finetune"))
        started = time.time()
        result = train_control(model, name, job.data, config, run.base, run.directory)
        loss = control_config(config, name).finetune.loss
        run.finish_stage(name, {"loss": loss, **_summary(result, started)})
        shutil.rmtree(control_directory(run.directory, name) / "checkpoints", ignore_errors=True)


def run_finetune(job: Job) -> None:
    """Stage 2 unless done: train LoRA, and leave it in ``lora/``."""
    run, config, out = job.run, job.config, job.run.directory
    if not run.stage_done("transfer"):
        raise LolcatsError(f"{out}: run attention transfer first (lolcats transfer).")
    if run.stage_done("finetune"):
        return
    if config.finetune.max_steps == 0:
        run.finish_stage("finetune", {"skipped": True})
        return
    if config.finetune.quantize_base != "none" and ranks().size > 1:
        raise LolcatsError("finetune.quantize_base works on one GPU only: run this without torchrun.")
    model, to_shard = job.models.for_finetuning()
    what = "" if config.finetune.loss == "cross_entropy" else f" on {loss_of(config)}"
    kind = "low-rank linearizing" if config.finetune.learning_rate > 0 else "feature maps"
    job.say(_headline(job, f"Stage 2: {kind}{what}", "finetune"))
    started = time.time()
    if to_shard:
        config = replace(config, finetune=replace(config.finetune, sharding="always"))
    wrapped, result = finetune(model, job.data, config, out)
    save_lora(wrapped, run.base, out / LORA)
    if config.finetune.feature_map_learning_rate > 0:
        save_feature_maps(wrapped, out / FEATURE_MAPS)
    settings = {"loss": config.finetune.loss, **settled_rows(out / "checkpoints" / "finetune")}
    run.finish_stage("finetune", settings | _summary(result, started))
    ranks().wait()
    if is_first():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    del model
    job.models.trained(wrapped)


def _headline(job: Job, title: str, stage: str) -> str:
    config = getattr(job.config, stage)
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.epochs:g} epochs"
    return f"{title}: {length} of {config.batch_size} × {job.config.data.sequence_length} tokens"


def _summary(result: StageResult, started: float) -> dict[str, Any]:
    """A stage's entry in run.json; ``seconds`` counts from when the stage was last started or continued."""
    entry = {key: getattr(result, key) for key in ("steps", "best_step", "best_loss")}
    return {**entry, "seconds": round(time.time() - started, 1)}
