"""The heads that a run keeps as softmax attention, if ``attention.softmax_budget`` leaves the choice to a search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lolcats.config import Config
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.ranks import is_first, ranks
from lolcats.run import Run
from lolcats.selection import Selection, Settings, select, with_heads

FILE = "selection.yaml"


def choose_heads(
    run: Run, inputs: Inputs, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    """Search for the run's heads and leave them in DIR/selection.yaml, if its budget asks for it and none are there."""
    if not run.config.attention.softmax_budget:
        return
    if run.config.transfer.order != "joint" and not run.stage_done("transfer"):
        raise LolcatsError(
            "attention.softmax_budget needs the whole model in memory, and stage 1 loads one layer after another. Run "
            "lolcats select where the model fits, and pass its file with --selection."
        )
    if not ranks().shared((run.directory / FILE).exists()):
        if is_first():
            run.save()  # so that a search that was interrupted can be repeated here
        found_heads(run.directory / FILE, run.config, inputs, device, dtype, say)
    Selection.read(run.directory / FILE).check(inputs.base, run.directory / FILE)


def found_heads(
    path: Path, config: Config, inputs: Inputs, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> Selection:
    """Search for heads within the budget, on all ranks together, and write them to ``path``."""
    model = inputs.model(dtype, device)
    settings = Settings(seed=config.seed)
    selection = select(model, inputs.tokenizer, inputs.base, config.attention, settings=settings, say=say)
    if is_first():
        selection.write(path)
    ranks().wait()
    return selection


def with_run_heads(run: Run) -> Config:
    """The run's configuration, with the heads that were chosen for it."""
    if not run.config.attention.softmax_budget:
        return run.config
    return with_heads(run.config, Selection.read(run.directory / FILE))
