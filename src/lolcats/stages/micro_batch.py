"""What fits is tried before a stage's first step and kept for the run: ``micro_batch_size: auto``, as many rows at once
as fit, and ``gradient_checkpointing: auto``, layers that are computed again if their activations do not fit."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lolcats.config import UNTRIED, FinetuneConfig, StageConfig
from lolcats.errors import LolcatsError, out_of_memory
from lolcats.files import write_text
from lolcats.ranks import is_first, ranks
from lolcats.stages.distributed import any_rank

S = TypeVar("S", bound=StageConfig)
Trial = Callable[[int], None]
"""Passes a number of rows forwards and backwards, and leaves nothing behind."""

RECORD, AGAIN = "micro_batch.json", "gradient_checkpointing.json"
ENOUGH = 2048  # tokens at once, more of which save less time than computing layers again costs
TRIED = ("cuda",)  # device types on which too many rows raise an error
MARGIN = 0.05  # share of a GPU's memory that a trial leaves free: for fragmentation, optimizer state, other rows


def settled(stage: S, directory: Path, device: torch.device, trial: Trial | None = None) -> S:
    """``stage`` with a number as its ``micro_batch_size``.

    ``auto`` is the largest divisor of a rank's share of the batch that fits on every rank. It is kept in ``directory``,
    so that a continued run takes the same.

    Args:
        directory: working directory of the stage.
        trial: None, as on devices where running out of memory is no error: at most ``UNTRIED`` rows.

    Raises:
        LolcatsError: not even one row fits.
    """
    if stage.micro_batch_size != "auto":
        return stage
    share, path = max(1, stage.batch_size // ranks().size), directory / RECORD
    known = ranks().shared(_read(path) if is_first() else None)
    if known is None:
        options = [rows for rows in range(share, 0, -1) if share % rows == 0]
        if trial is None or device.type not in TRIED:
            known = next(rows for rows in options if rows <= UNTRIED)
        else:
            known = next((rows for rows in options if not any_rank(not _fits(trial, rows, device), device)), 0)
        if not known:
            raise LolcatsError(
                "Not even one row at a time fits into the GPU's memory. Use shorter rows (data.sequence_length), or in "
                "stage 2 finetune.gradient_checkpointing=true."
            )
        if is_first():
            directory.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"rows": known}))
    return replace(stage, micro_batch_size=math.gcd(known, share))


def recomputes(
    stage: FinetuneConfig, length: int, directory: Path, device: torch.device, trial: Trial | None = None
) -> bool:  # fmt: skip
    """Whether layers are computed again in the backward pass.

    ``auto``: only on a GPU, if a micro-batch does not fit on every rank without that. If ``micro_batch_size`` is
    ``auto`` as well, one with at least ``ENOUGH`` tokens. The answer is kept in ``directory``.

    Args:
        length: tokens of a row.
        trial: without checkpointing; None: a sharded model, whose micro-batches are not tried.
    """
    if stage.gradient_checkpointing != "auto":
        return stage.gradient_checkpointing
    path = directory / AGAIN
    known = ranks().shared(_read(path, "again") if is_first() else None)
    if known is None:
        share = max(1, stage.batch_size // ranks().size)
        if stage.micro_batch_size == "auto":
            options = (n for n in range(1, share + 1) if share % n == 0)
            rows = next((n for n in options if n * length >= ENOUGH), share)
        else:
            rows = min(stage.micro_batch_size, share)
        known = device.type in TRIED and (trial is None or any_rank(not _fits(trial, rows, device), device))
        if is_first():
            directory.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"again": known}))
    return bool(known)


def settled_rows(directory: Path) -> dict[str, Any]:
    """What ``auto`` became in a stage with this working directory, for run.json; empty if nothing was settled."""
    rows, again = _read(directory / RECORD), _read(directory / AGAIN, "again")
    return ({} if rows is None else {"micro_batch_size": rows}) | (
        {} if again is None else {"gradient_checkpointing": bool(again)}
    )


def _read(path: Path, name: str = "rows") -> int | None:
    try:
        return int(json.loads(path.read_text())[name]) if path.exists() else None
    except (KeyError, TypeError, ValueError) as error:
        raise LolcatsError(f"{path} is damaged ({error}): remove it.") from None


def _fits(trial: Trial, rows: int, device: torch.device) -> bool:
    spare: Any = None
    try:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            spare = torch.empty(int(MARGIN * total), dtype=torch.uint8, device=device)
        trial(rows)
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        del spare
        gc.collect()
        torch.cuda.empty_cache()
