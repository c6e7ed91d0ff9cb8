"""Choose the heads to keep: prompts, search and curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, Kind
from lolcats.errors import LolcatsError, out_of_memory
from lolcats.memory import free_host_memory
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.probe import text_config
from lolcats.modeling.skeleton import Skeleton
from lolcats.ranks import ranks
from lolcats.selection.prompts import prompts
from lolcats.selection.result import Point, Selection, by_layer
from lolcats.selection.scorer import Scorer
from lolcats.selection.search import Found, Head, added_at, grow, units_of
from lolcats.selection.streamed import StreamedScorer
from lolcats.weights.base import Base, with_content

Say = Callable[[str], None]
Make = Callable[..., Scorer]
"""Makes a scorer of prompts, tokens per forward pass and, optionally, where to record."""
LONGEST = (("codes", 1), ("facts", 1), ("ledger", 2), ("passage", 1), ("examples", 1))
"""Kinds of prompt at the longest length, and how many of each."""
SHORTER = ("codes", "ledger", "examples", "passage", "facts")
"""Kinds at the shorter lengths, two of each length in turn."""
SHORTEST = 512
"""Tokens of a prompt, at least."""
LONG = 0.2
"""Hours of a search that are worth a warning."""
PASS = {"cuda": 16_384, "cpu": 4_096}
"""Tokens per forward pass, before memory is short. Small enough for two ranks to share a set's prompts evenly."""


@dataclass(frozen=True)
class Settings:
    """How to search. lengths: tokens of the prompts; width: units that are scored in a round, out of all by slopes;
    beyond: how far the curve goes on after the chosen heads, as a multiple of their number."""

    unit: Literal["head", "layer"] = "head"
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    width: int = 12
    seed: int = 0
    beyond: float = 1.0


def select(
    model: PreTrainedModel | Skeleton, tokenizer: Any, base: Base, attention: AttentionConfig, heads: int = 0,
    settings: Settings = Settings(), text: Sequence[int] = (), say: Say = lambda _: None,
) -> Selection:  # fmt: skip
    """Choose ``heads`` key/value heads of a base model that stay softmax attention; nothing is trained.

    The other heads have the window and sinks of ``attention`` while heads are tried. The model is converted in place.
    Under torchrun every rank calls this, and each scores some of the candidates; all get the same selection.

    Args:
        model: or the skeleton of a model that was converted by :func:`trial_attention`; then one layer at a time comes
            to the device, and what is scored together goes through it together.
        heads: how many; 0: as many as ``attention.softmax_budget`` allows.
        text: token ids to hide answers in; empty: sentences of our own.

    Raises:
        LolcatsError: a budget below one layer where whole layers are chosen, a prompt that the model has no room for,
            or a model without heads to choose from.
    """
    make: Make
    device = model.device
    if isinstance(model, Skeleton):
        model, make = model.model, partial(StreamedScorer, model)
    else:
        make = partial(Scorer, convert(model, trial_attention(attention)))
    units = sum(layer.geometry.kv_heads for layer in linearized_layers(model))
    count = heads or heads_in_budget(attention.softmax_budget, units)
    if not heads and units and attention.softmax_budget * units < 1:
        say(f"A budget of {attention.softmax_budget:g} is less than one of the {units} key/value heads that would be "
            "linearized, so one is kept.")  # fmt: skip
    if count > units:
        raise LolcatsError(f"Cannot keep {count} heads: only {units} of this model could be linearized.")
    plan, started = prompt_plan(check_lengths(settings.lengths, model)), time.time()
    asked = [prompts(tokenizer, plan, f"{settings.seed}/{part}", text) for part in ("search", "check")]
    written = time.time()
    scorer = fitting_scorer(make, asked[0], device)
    say(f"Choosing {count} of {units} key/value heads with {len(plan)} prompts, {scorer.tokens:,} tokens per score")
    prepared = time.time()
    hours = passes_of_search(count) * (prepared - written) / scorer.ranks.size / 3600
    if device.type == "cpu" and hours > LONG:
        say(
            f"This search takes about {hours:.1f} hours on this CPU; on a GPU it takes minutes. A file that lolcats "
            "select has written elsewhere can be used here: --selection FILE."
        )
    trail = search(scorer, count, settings, say)
    searched = time.time()
    checker = make(asked[1], scorer.batch_tokens)
    checker.ranks = scorer.ranks
    further = [] if settings.beyond <= 1 else _further(scorer, trail[-1], int(settings.beyond * count), settings, say)
    found: list[Found | None] = [Found((), scorer.loss(())), *trail, *further, None]
    exact = checker.exacts([None if each is None else each.heads for each in found])
    curve = [_point(each, model, checker, shares) for each, shares in zip(found, exact, strict=True)]
    in_4_bits = getattr(model, "is_loaded_in_4bit", False)
    info: dict[str, Any] = asdict(settings) | {
        "weights": "nf4" if in_4_bits else str(model.dtype).removeprefix("torch."),
        "lengths": list(settings.lengths), "tokens_per_score": scorer.tokens,
        "seconds": {"prompts": round(prepared - started, 1), "search": round(searched - prepared, 1),
                    "curve": round(time.time() - searched, 1)},
    }  # fmt: skip
    window = {name: getattr(attention, name) for name in ("window", "window_size", "sinks")}
    return Selection(with_content(base).record, window, by_layer(trail[-1].heads), curve, info)


def search(scorer: Scorer, count: int, settings: Settings, say: Say) -> list[Found]:
    """The sets of kept heads, one unit more each time, up to ``count`` heads."""
    units = units_of(scorer, settings.unit == "layer")
    size = max(map(len, units))
    if count < size:
        raise LolcatsError(
            f"A budget of {count} heads is below one layer, which has {size}: use --unit head, or a larger budget."
        )
    return grow(scorer, [], units, count // size, settings.width, say)


def heads_in_budget(budget: float, heads: int) -> int:
    """How many of ``heads`` a share of them is, rounded down, but at least one."""
    return max(1, int(budget * heads))


def passes_of_search(count: int, slopes: int = 3) -> float:
    """Forward passes through all layers until ``count`` heads are chosen, and those of the curve up to there.

    slopes: passes that the slopes of a set take; a streamed search has the hidden states, so it needs 2.
    """
    kept, passes = 0, 0.0
    while kept < count:
        added = min(added_at(kept, count), Settings().width)
        kept += added
        candidates = (Settings().width + (added > 1)) / 2
        passes += 1 + slopes + candidates + 1  # hidden states, slopes, candidates, right answers
        if kept > 1 and added == 1:  # each kept head, or the least steep ones, is left out once
            passes += min(kept, Settings().width) / 2 + slopes * (Settings().width < kept == count)
    return passes + 7  # the teacher's answers, the first slopes, a model without heads, the last hidden states


def trial_attention(attention: AttentionConfig) -> AttentionConfig:
    """Window and sinks in every layer that would be linearized."""
    stay: dict[str, Kind] = {layers: kind for layers, kind in attention.layers.items() if kind == "softmax"}
    return replace(
        attention, kind="window", layers=stay, softmax_heads={}, softmax_budget=0.0, decay="none", normalizer="sum",
        feature_inputs="rotated",
    )  # fmt: skip


def prompt_plan(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """(kind, length) of every prompt: all kinds at the longest length, where most is lost, and two at each other."""
    *others, longest = sorted(lengths)
    plan = [(kind, longest) for kind, count in LONGEST for _ in range(count)]
    for i, length in enumerate(others):
        plan += [(SHORTER[(2 * i + j) % len(SHORTER)], length) for j in range(2)]
    return plan


def check_lengths(lengths: Sequence[int], model: PreTrainedModel) -> tuple[int, ...]:
    """The lengths that the model has positions for.

    Raises:
        LolcatsError: there are none.
    """
    most = getattr(text_config(model), "max_position_embeddings", None) or max(lengths)
    fitting = tuple(sorted({min(length, most) for length in lengths}))
    if most < SHORTEST:
        raise LolcatsError(
            f"The search for heads needs prompts of at least {SHORTEST} tokens, and this model has only {most} "
            "positions: list the heads to keep yourself (attention.softmax_heads), or keep none "
            "(attention.softmax_budget=0)."
        )
    if not fitting or fitting[0] < SHORTEST:
        raise LolcatsError(f"The search for heads needs prompts of at least {SHORTEST} tokens: use longer --lengths.")
    return fitting


def fitting_scorer(make: Make, asked: Sequence[Any], device: torch.device) -> Scorer:
    """A scorer that passes as many tokens at once as memory allows, and shares its work with other ranks."""
    return _shared(_fitting(make, asked, device), make, asked)


def _fitting(make: Make, asked: Sequence[Any], device: torch.device) -> Scorer:
    """A scorer that passes as many tokens at once as memory allows, but at least one prompt."""
    tokens = PASS.get(device.type, PASS["cpu"])
    while True:
        try:
            scorer = make(asked, tokens)
            scorer.record_on = where_to_record(scorer, memory_of(scorer.try_memory, device))
            return scorer
        except Exception as error:
            if not out_of_memory(error) or tokens <= max(len(prompt.ids) for prompt in asked):
                raise
        tokens //= 2
        torch.cuda.empty_cache()


def _shared(scorer: Scorer, make: Make, asked: Sequence[Any]) -> Scorer:
    """The scorer, which shares its work with those of the other ranks: all with as many tokens at once as the one with
    the least memory."""
    together = ranks()
    tokens = min(together.spread(lambda _: scorer.batch_tokens, range(together.size)))
    if tokens < scorer.batch_tokens:
        scorer = make(asked, tokens, scorer.record_on)
    scorer.ranks = together
    return scorer


def memory_of(function: Callable[[], None], device: torch.device) -> int:
    """Bytes that a call takes on a GPU, at its peak; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def where_to_record(scorer: Scorer, need: int = 0) -> torch.device:
    """Where there is room for what all decoder layers put out for all prompts: the GPU, if as much again and ``need``
    bytes are free beside it, or the host.

    Raises:
        LolcatsError: neither.
    """
    device, model = scorer.model.device, scorer.model
    width = model.get_input_embeddings().weight.shape[1]
    size = len(scorer.blocks) * scorer.tokens * width * model.dtype.itemsize
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if size + max(size, need) <= torch.cuda.mem_get_info(device)[0]:
            return device
    if size > (free := free_host_memory()):
        raise LolcatsError(
            f"The search keeps {size / 2**30:.1f} GiB of hidden states, and only {free / 2**30:.1f} GiB of host memory "
            "are free: use shorter prompts (lolcats select --lengths)."
        )
    return torch.device("cpu")


def _further(scorer: Scorer, found: Found, count: int, settings: Settings, say: Say) -> list[Found]:
    rest = [unit for unit in units_of(scorer, settings.unit == "layer") if unit not in found.units]
    size = max(map(len, found.units))
    return grow(scorer, found.units, rest, count // size, settings.width, say)


def _point(found: Found | None, model: PreTrainedModel, checker: Scorer, exact: dict[str, float]) -> Point:
    """A point of the curve; None: the teacher, all of whose heads are softmax attention."""
    heads: list[Head] = checker.heads if found is None else found.heads
    shapes = {layer.geometry.layer: layer.geometry for layer in linearized_layers(model)}
    width = model.dtype.itemsize
    size = sum((shapes[layer].head_dim + shapes[layer].value_dim) * width for layer, _ in heads)
    loss = 0.0 if found is None else round(found.loss, 5)
    return Point(by_layer(heads), loss, {kind: round(share, 4) for kind, share in exact.items()}, size)
