"""A linearized model without training: softmax attention in the heads that retrieve, window and sinks elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lolcats.config import Config, to_yaml
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.modeling.checkpoint import save_adapter_config
from lolcats.modeling.convert import convert
from lolcats.modeling.merge import save_whole
from lolcats.pipeline.heads import FILE, found_heads
from lolcats.pipeline.job import log
from lolcats.pipeline.models import Say, device_and_dtype
from lolcats.ranks import is_first, ranks
from lolcats.report.card import write_untrained_card
from lolcats.selection import Selection, with_heads


def linearize_untrained(
    model: str, out: Path, config: Config, merge: bool = True, say: Say = log, selection: Selection | None = None
) -> Selection | None:
    """Write an adapter of ``model`` to ``out``, in which nothing is trained and no data is read.

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
    if out.is_dir() and {file.name for file in out.iterdir()} - {FILE, ".lock"}:
        raise LolcatsError(f"{out} is not empty: choose another --out.")
    known = ranks().shared(path.exists())  # every rank has checked the directory before one of them writes
    ranks().wait()
    device, dtype = device_and_dtype(config)
    inputs = Inputs(model, keep=device.type == "cuda", trust=config.trust_remote_code)
    config = replace(config, attention=replace(config.attention, kind="window"))
    out.mkdir(parents=True, exist_ok=True)
    if config.attention.softmax_budget:
        selection = Selection.read(path) if known else found_heads(path, config, inputs, device, dtype, say)
        selection.check(inputs.base, path)
        config = with_heads(config, selection)
    elif selection is not None and is_first():
        selection.write(path)
    if not is_first():
        return selection
    linearized = convert(inputs.model(dtype, device), config)
    inputs.tokenizer.save_pretrained(out)
    write_text(out / "config.yaml", to_yaml(config))
    write_untrained_card(out, linearized, inputs.base, config.attention, selection)
    if merge:
        say(f"Writing {out / 'merged'}")
        save_whole(linearized, inputs.tokenizer, out / "merged")
    save_adapter_config(linearized, inputs.base, out, parts={})  # last: with it, the adapter counts
    return selection
