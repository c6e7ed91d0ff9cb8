"""The search for heads in ``large.py``: a round on a model in 4 bits, and with one layer at a time on the GPU."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import common
import torch
from large_weights import KEPT, Model, Repeated, quantized_model, shape

ANSWER = 40  # answer tokens of a random prompt
SLOPES = 3.0  # passes that ``passes_of_search`` counts for slopes, of which a streamed search needs two
WARM_LAYERS = 2  # of the model whose search compiles the kernels


def selection(model: Model, device: torch.device, tell: Callable[..., None]) -> dict[str, Any]:
    """A round of the search on the model in 4 bits."""
    import lolcats
    from lolcats.config import AttentionConfig
    from lolcats.selection.scorer import Scorer
    from lolcats.selection.select import trial_attention

    def search(part: Model, tell: Callable[..., None]) -> None:
        built = quantized_model(shape(part), device, in_4_bits=device.type == "cuda")
        lolcats.convert(built, trial_attention(AttentionConfig(sinks=4)))
        round_of_search(partial(Scorer, built), part, device, tell)

    warm_and_measured(search, model, device, partial(tell, "selection"))
    return {}


def streamed_selection(model: Model, device: torch.device, tell: Callable[..., None]) -> dict[str, Any]:
    """A round of the search with one layer at a time on the GPU, from host memory: reading files is left out."""
    from lolcats.config import AttentionConfig
    from lolcats.modeling.skeleton import Skeleton, convert_empty, empty_model
    from lolcats.selection.select import trial_attention
    from lolcats.selection.streamed import StreamedScorer

    dtype, source = torch.bfloat16 if device.type == "cuda" else torch.float32, Repeated()

    def search(part: Model, tell: Callable[..., None]) -> None:
        empty = convert_empty(empty_model(shape(part), dtype), trial_attention(AttentionConfig(sinks=4)))
        round_of_search(partial(StreamedScorer, Skeleton(empty, source, device)), part, device, tell)

    warm_and_measured(search, model, device, partial(tell, "streamed selection"))
    return {}


def warm_and_measured(
    search: Callable[..., None], model: Model, device: torch.device, tell: Callable[..., None]
) -> None:  # fmt: skip
    """A search on few layers, which compiles the kernels and draws the weights, then that of all layers."""
    search(replace(model, layers=WARM_LAYERS), lambda _: None)
    common.free(device)
    search(model, tell)


def round_of_search(
    make: Callable[..., Any], model: Model, device: torch.device, tell: Callable[..., None]
) -> None:  # fmt: skip
    """A round, piece by piece: seconds of a pass through all layers with all prompts, and of a whole search."""
    from lolcats.plan.quantized import passes_of_search
    from lolcats.selection.prompts import Scored
    from lolcats.selection.select import PASS, Settings, prompt_plan, where_to_record

    draw, config = random.Random(0), shape(model)
    asked = [
        Scored(kind, [draw.randrange(config.vocab_size) for _ in range(n)], [(n - ANSWER, n)])
        for kind, n in prompt_plan(model.lengths)
    ]
    common.reset_peak(device)
    began = time.perf_counter()
    scorer = make(asked, PASS.get(device.type, PASS["cpu"]))
    scorer.record_on = where_to_record(scorer)
    common.synchronize(device)
    count = max(1, int(KEPT * len(scorer.heads)))
    candidates = [[scorer.heads[i * len(scorer.heads) // Settings().width]] for i in range(Settings().width)]
    spent: dict[str, list[float]] = {"the teacher's answers": [time.perf_counter() - began, scorer.passes]}
    pieces = [("hidden states", partial(scorer.move_to, ())), ("slopes", partial(scorer.slopes, {}))]
    for name, piece in [*pieces, ("candidates", partial(scorer.losses, candidates))]:
        started, passes = time.perf_counter(), scorer.passes
        piece()
        common.synchronize(device)
        spent[name] = [time.perf_counter() - started, scorer.passes - passes]
        whole = passes_of_search(count)
        counted = sum(SLOPES if piece == "slopes" else passes for piece, (_, passes) in spent.items())
        seconds = sum(seconds for seconds, _ in spent.values()) / counted * whole
        tell({
            "heads": f"{count} of {len(scorer.heads)}", "lengths": model.lengths, "tokens_per_score": scorer.tokens,
            "recorded_on": scorer.record_on.type, "spent": spent, "passes": whole, "seconds": seconds,
            "peak_gib": common.peak_gib(device),
        })  # fmt: skip
