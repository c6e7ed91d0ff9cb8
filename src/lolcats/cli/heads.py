"""``lolcats select``: which heads to keep as softmax attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats.cli.app import (
    Model,
    Recipe,
    Sets,
    Trust,
    check_picture,
    command,
    curve_table,
    numbers,
    out,
    print_rows,
    quantization,
    settings,
)
from lolcats.errors import LolcatsError

IN_4_BITS = 0.6  # bytes of each parameter: 4 bits, their scales, and embeddings in 16 bits


@command
def select(
    model: Model,
    out_: Annotated[Path, typer.Option("--out", dir_okay=False, help="YAML file for the chosen heads and the curve.")],
    budget: Annotated[float, typer.Option(help="Share of the key/value heads to keep, at least one.")] = 0.0,
    heads: Annotated[int, typer.Option(min=0, help="Number of key/value heads to keep, in place of --budget.")] = 0,
    unit: Annotated[str, typer.Option(help="Choose single heads (head) or whole layers (layer).")] = "head",
    data: Annotated[str, typer.Option("--data", help="Text to hide answers in: a .txt file, or data with a text "
                                                     "column. Default: sentences that come with lolcats.")] = "",
    lengths: Annotated[str, typer.Option(help="Lengths of the prompts in tokens.")] = "2048,4096,8192",
    picture: Annotated[Path | None, typer.Option(help="PNG file for the curve.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    beyond: Annotated[float, typer.Option(min=1, help="How far the curve goes on after the chosen heads, as a multiple "
                                                      "of their number (1 = it ends there).")] = 2.0,
    quantize: Annotated[str, typer.Option(help="nf4: load the weights of linear layers in 4 bits (bitsandbytes), for a "
                                               "model that does not fit otherwise.", metavar="nf4")] = "",
    schedule: Annotated[str, typer.Option(help="joint: the whole model in memory; stream: one layer at a time, "
                                               "read from the files in every step of the search.")] = "joint",
    recipe: Recipe = "default", trust: Trust = False, set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Choose the heads that stay softmax attention, by what recall prompts need. Nothing is trained.

    The other heads see window and sinks of the recipe. Takes a minute or more on a GPU and hours on a CPU. Without
    --budget and --heads, an eighth of the heads is kept. Under torchrun the ranks share the work. A model that does not
    fit can be searched in 4 bits (--quantize nf4) or, on any GPU that holds a few of its layers, with --schedule
    stream.
    """
    config, how = settings(recipe, set_, trust), quantization(quantize)
    if unit not in ("head", "layer"):
        raise LolcatsError(f"--unit {unit}: expected head or layer.")
    if schedule not in ("joint", "stream"):
        raise LolcatsError(f"--schedule {schedule}: expected joint or stream.")
    if schedule == "stream" and how != "none":
        raise LolcatsError("--schedule stream reads the model's own weights: leave out --quantize.")
    if budget and heads:
        raise LolcatsError("--budget and --heads both say how many heads to keep: give one of them.")
    if config.attention.softmax_heads:
        raise LolcatsError("attention.softmax_heads lists heads already: leave it out to choose them.")

    from lolcats.files import check_file

    check_file(out_, "--out")
    if picture is not None:
        check_picture(picture)

    from lolcats.data.inputs import Inputs
    from lolcats.modeling.skeleton import build_skeleton
    from lolcats.pipeline import device_and_dtype
    from lolcats.ranks import is_first
    from lolcats.report.curve import draw_curve
    from lolcats.selection import Settings
    from lolcats.selection import select as choose
    from lolcats.selection.select import trial_attention

    share = budget or config.attention.softmax_budget or 0.125
    attention = replace(config.attention, softmax_budget=share)
    say = out.print if is_first() else lambda _: None
    inputs = Inputs(model, trust=trust)
    text = _tokens(data, inputs.tokenizer)
    asked: Any = Settings(unit=unit, lengths=numbers(lengths), seed=seed, beyond=beyond)  # type: ignore[arg-type]
    device, dtype = device_and_dtype(config)
    loaded: Any = None
    if schedule == "stream":
        trust = config.trust_remote_code
        loaded = build_skeleton(inputs.base, trial_attention(attention), dtype, device, config.seed, trust)
    else:
        loaded = _model(inputs, dtype, device, how)
    found = choose(loaded, inputs.tokenizer, inputs.base, attention, heads, asked, text, say)
    if not is_first():
        return
    found.write(out_)
    print_rows(*curve_table(found))
    drawn = f"   curve: {picture}" if picture is not None and draw_curve(found, picture) else ""
    out.print(f"\nHeads: {out_}{drawn}. Next: lolcats linearize {model} --selection {out_} ...", soft_wrap=True)


def _model(inputs: Any, dtype: Any, device: Any, quantize: Any) -> Any:
    """The base model; if there is not enough memory for it, an error that says what would fit."""
    from lolcats.memory import weights_room
    from lolcats.weights.base import check_quantized, empty_model

    if quantize != "none":
        check_quantized(inputs.base, device, inputs.trust, gradients=True)
    elif inputs.base.form != "gguf":
        size = dtype.itemsize * sum(p.numel() for p in empty_model(inputs.base, inputs.trust).parameters())
        if size > (room := weights_room(device)):
            raise LolcatsError(
                f"{inputs.base.path} takes {size / 2**30:.1f} GiB, and there is room for {room / 2**30:.1f} GiB of "
                f"weights on {device.type} (they are read into host memory first). In 4 bits it takes about "
                f"{size / 2**30 / dtype.itemsize * IN_4_BITS:.1f} GiB: --quantize nf4. With --schedule stream, "
                "one layer at a time is in memory."
            )
    return inputs.model(dtype, device, quantize)


def _tokens(source: str, tokenizer: Any) -> list[int]:
    """The token ids of all documents of ``source``; none without one."""
    from lolcats.data.tokens import encode
    from lolcats.evaluation.text import read_documents

    return [token for document in read_documents(source) for token in encode(tokenizer, document)] if source else []
