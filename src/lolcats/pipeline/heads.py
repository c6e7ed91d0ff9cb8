"""The heads that a run keeps as softmax attention, if ``attention.softmax_budget`` leaves the choice to a search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lolcats.config import Config
from lolcats.data.inputs import Inputs
from lolcats.memory import weights_room
from lolcats.modeling.skeleton import Skeleton, build_skeleton
from lolcats.ranks import is_first, ranks
from lolcats.run import Run
from lolcats.selection import Selection, Settings, select, with_heads
from lolcats.selection.select import trial_attention
from lolcats.weights.base import Quantize, empty_model

FILE = "selection.yaml"


def choose_heads(
    run: Run, inputs: Inputs, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    """Search for the run's heads and leave them in DIR/selection.yaml, if its budget asks for it and none are there.

    If stage 1 loads one layer after another and no later stage has the model in 4 bits, the search does so, too.
    """
    if not run.config.attention.softmax_budget:
        return
    in_turn, quantized = run.config.transfer.order != "joint", run.config.finetune.quantize_base != "none"
    if not ranks().shared((run.directory / FILE).exists()):
        if is_first():
            run.save()  # so that a search that was interrupted can be repeated here
        in_4_bits = ranks().shared(only_in_4_bits(run.config, inputs, device, dtype))
        quantize: Quantize = "nf4" if in_4_bits else "none"
        streamed = in_turn and not quantized
        found_heads(run.directory / FILE, run.config, inputs, device, dtype, say, quantize, streamed)
    Selection.read(run.directory / FILE).check(inputs.base, run.directory / FILE)


def found_heads(
    path: Path, config: Config, inputs: Inputs, device: torch.device, dtype: torch.dtype, say: Callable[[str], None],
    quantize: Quantize = "none", streamed: bool = False,
) -> Selection:  # fmt: skip
    """Search for heads within the budget, on all ranks together, and write them to ``path``.

    quantize: of the model that is searched; streamed: its layers are loaded one after another.
    """
    if quantize != "none":
        say(f"Loading {inputs.base.path} in 4 bits to choose heads")
    model: PreTrainedModel | Skeleton
    if streamed:
        say(f"Loading {inputs.base.path} layer by layer to choose heads")
        attention = trial_attention(config.attention)
        model = build_skeleton(inputs.base, attention, dtype, device, config.seed, inputs.trust)
    else:
        model = inputs.model(dtype, device, quantize)
    settings = Settings(seed=config.seed)
    selection = select(model, inputs.tokenizer, inputs.base, config.attention, settings=settings, say=say)
    if is_first():
        selection.write(path)
    ranks().wait()
    return selection


def only_in_4_bits(config: Config, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the base model is in 4 bits wherever all of it is needed: it is for stage 2, and its own weights do not
    fit into this machine's memory."""
    if config.finetune.quantize_base == "none":
        return False
    model = empty_model(inputs.base, inputs.trust)
    return dtype.itemsize * sum(p.numel() for p in model.parameters()) > weights_room(device)


def with_run_heads(run: Run) -> Config:
    """The run's configuration, with the heads that were chosen for it."""
    if not run.config.attention.softmax_budget:
        return run.config
    return with_heads(run.config, Selection.read(run.directory / FILE))
