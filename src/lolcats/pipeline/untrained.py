"""A linearized model without training: softmax attention in the heads that retrieve, window and sinks elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from lolcats.config import Config, to_dict, to_yaml
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.files import LOCK, write_text
from lolcats.modeling.checkpoint import save_adapter_config
from lolcats.modeling.convert import convert
from lolcats.modeling.merge import save_whole
from lolcats.pipeline.heads import FILE, found_heads
from lolcats.pipeline.job import log
from lolcats.pipeline.models import Say, device_and_dtype
from lolcats.ranks import is_first, ranks
from lolcats.report.card import write_untrained_card
from lolcats.selection import Selection, with_heads
from lolcats.weights.base import Base

UNFINISHED = "unfinished.json"
"""In a directory whose model is not complete: what is being made there, so that the same command can go on."""


def linearize_untrained(
    model: str, out: Path, config: Config, merge: bool = True, say: Say = log, selection: Selection | None = None
) -> Selection | None:
    """Write an adapter of ``model`` to ``out``, in which nothing is trained and no data is read. If that is
    interrupted, the same call completes it.

    Args:
        config: ``attention`` says which heads stay softmax attention (``softmax_heads``, or ``softmax_budget`` for a
            search), and window and sinks of the others; its ``kind`` becomes ``window``.
        selection: where ``softmax_heads`` come from, for the model card.

    Returns:
        The selection of heads, if there is one.

    Raises:
        LolcatsError: the model or settings cannot be used, or ``out`` holds something else.
    """
    path = out / FILE
    device, dtype = device_and_dtype(config)
    inputs = Inputs(model, keep=device.type == "cuda", trust=config.trust_remote_code)
    config = replace(config, attention=replace(config.attention, kind="window"))
    task = _task(inputs.base, config)
    _check_own(out, task)
    known = ranks().shared(path.exists())  # every rank has checked the directory before one of them writes
    ranks().wait()
    out.mkdir(parents=True, exist_ok=True)
    if config.attention.softmax_budget:
        selection = Selection.read(path) if known else found_heads(path, config, inputs, device, dtype, say)
        selection.check(inputs.base, path)
        config = with_heads(config, selection)
    elif selection is not None and is_first():
        selection.write(path)
    if not is_first():
        return selection
    torch.manual_seed(config.seed)
    linearized = convert(inputs.model(dtype, device), config)
    write_text(out / UNFINISHED, task)
    inputs.tokenizer.save_pretrained(out)
    write_text(out / "config.yaml", to_yaml(config))
    write_untrained_card(out, linearized, inputs.base, config.attention, selection)
    for left in ("merged", "merged.partial"):
        shutil.rmtree(out / left, ignore_errors=True)
    if merge:
        say(f"Writing {out / 'merged'}")
        save_whole(linearized, inputs.tokenizer, out / "merged")
    save_adapter_config(linearized, inputs.base, out, parts={})  # with it, the adapter counts
    (out / UNFINISHED).unlink()
    return selection


def _task(base: Base, config: Config) -> str:
    """What a call makes, as its unfinished directory records it."""
    settings = to_dict(replace(config, trust_remote_code=False))  # consent is each command's own
    return json.dumps({"base": base.fingerprint, "config": settings}, sort_keys=True)


def _check_own(out: Path, task: str) -> None:
    """
    Raises:
        LolcatsError: ``out`` holds something other than what an interrupted call with the same ``task`` left there.
    """
    if not out.is_dir():
        return
    begun = out / UNFINISHED
    if begun.is_file():
        if begun.read_text() == task:
            return
        raise LolcatsError(
            f"{out} holds an unfinished model from another base model or other settings: choose another --out, or "
            "repeat the original command."
        )
    if {file.name.partition(".partial")[0] for file in out.iterdir()} - {FILE, LOCK, UNFINISHED}:
        raise LolcatsError(f"{out} is not empty: choose another --out.")
