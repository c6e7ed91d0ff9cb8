"""Answers to many prompts by the engine, with continuous batching and CUDA graphs instead of padded batches in turn.

What all prompts begin with, such as the worked examples of a task, is computed once. Prompts of one length are
prefilled together, since a call of a small model with few tokens costs a GPU as much as one with many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request, SamplingParams, Snapshot, answer_all, check_model
from lolcats.modeling.layer import linearized_layers

SLOTS = 64
PIECE = 2048  # prompt tokens between two decode steps: nobody waits for a single answer
SHARED = 64  # tokens that prompts must share for it to be worth a state of their own
TOGETHER = 16384  # prompt tokens to prefill together
REFILL = 0.25  # share of the slots that must be free before more prompts are prefilled


def uses_engine(model: PreTrainedModel) -> bool:
    """Whether a model is on a GPU and the engine gives its own answers: it knows nothing of the teacher mode."""
    if model.device.type != "cuda":
        return False
    try:
        check_model(model)
    except LolcatsError:
        return False
    return all(layer.mode == "student" for layer in linearized_layers(model))


def generate(
    model: PreTrainedModel, tokenizer: Any, asked: Sequence[tuple[list[int], SamplingParams]], slots: int = SLOTS
) -> list[list[int]]:
    """The answer to each prompt, as tokens; what ended it may be among them.

    The same prompts get the same answers again. In 16 bits an answer may depend on what its prompt was prefilled with,
    since products of several rows round differently. Decode steps have one batch size.

    Raises:
        LolcatsError: a prompt has no room, or the engine failed.
    """
    slots = max(1, min(slots, len(asked)))
    longest = max((len(prompt) + params.max_tokens for prompt, params in asked), default=1)
    shared = beginning([prompt for prompt, _ in asked])
    numbered = [(number, prompt[len(shared) :], params) for number, (prompt, params) in enumerate(asked)]
    numbered.sort(key=lambda each: -len(each[1]))  # neighbours are prefilled together
    together = max(1, TOGETHER // max((len(prompt) for _, prompt, _ in numbered), default=1))
    engine = Engine(model, tokenizer, slots, PIECE, prefix_bytes=0, batch_sizes=[slots], context=longest,
                    prefill_rows=together, refill=int(REFILL * slots))  # fmt: skip
    found: list[list[int]] = [[] for _ in asked]
    try:
        for answered in answer_all(engine, numbered, after(engine, shared)):
            found[answered.number] = answered.tokens
    finally:
        engine.close()
    return found


def beginning(prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with, at least one token less than each; nothing if that is short."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # in lexicographic order: all others share what these two do
    most = min(map(len, prompts)) - 1
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    return first[: min(count, most)] if min(count, most) >= SHARED else []


def after(engine: Engine, tokens: list[int]) -> Snapshot | None:
    """The state after ``tokens``, None for none."""
    deltas: list[Delta] = []
    if tokens:
        engine.submit(Request(tokens, SamplingParams(max_tokens=0), deltas.append, keep_state=True, text=False))
        engine.run()
        if (snapshot := deltas[-1].snapshot) is not None:
            return snapshot
        raise LolcatsError(f"What all prompts begin with could not be computed: {deltas[-1].error}")
    return None
