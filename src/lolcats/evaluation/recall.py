"""Recall by kind, length and depth: does a model find what lies far back in its context?

The model reads a prompt once. Then every answer is measured in two ways:

forced      The true continuation is fed, so the true earlier answers stand before each one. ``exact``: every token of
            the answer was the most likely one; ``argmax``: the share of such tokens; ``nll``: their mean −log p.
generated   The model's own greedy tokens are fed. Questions between answers are given. ``generated``: the answer is the
            true one; of a list, that the true one is among the words generated.

An answer counts as in the window if the window of its first token can reach the passage that holds it, or if that lies
in the sinks (:class:`Sight`). The same answers do for every model that is compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig
from lolcats.data.prompts import Answer, Prompt
from lolcats.errors import LolcatsError
from lolcats.evaluation.kinds import KINDS
from lolcats.evaluation.scores import Score, mean_score
from lolcats.evaluation.text import ROW
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import layer_spec

BEYOND = "exact beyond the window"
ANSWERS = 200  # per kind and length unless a limit says otherwise


@dataclass(frozen=True)
class Sight:
    """What a linearized layer sees exactly: at most the last ``window`` tokens, and the first ``sinks``."""

    window: int
    sinks: int

    def holds(self, prompt: Prompt, answer: Answer) -> bool:
        """Whether the passage that holds the answer is in sight where the answer begins."""
        if answer.source is None:
            return False
        return answer.source <= self.sinks or len(prompt.ids) + answer.start - answer.source < self.window


@dataclass(frozen=True)
class Found:
    """What a model made of one answer."""

    prompt: int
    depth: float
    in_window: bool
    exact: float
    generated: float
    argmax: float
    nll: float


def sight(attention: AttentionConfig) -> Sight | None:
    """What linearized layers with this attention see; None if no layer is linearized."""
    kinds = [kind for kind in (attention.kind, *attention.layers.values()) if kind != "softmax"]
    specs = [layer_spec(attention, kind) for kind in kinds]
    return max((Sight(s.span, s.softmax_sinks) for s in specs), key=lambda s: s.window) if specs else None


def recall(model: PreTrainedModel, tokenizer: Any, haystack: Sequence[int], lengths: Sequence[int],
           answers: int | None, batch_size: int, seed: int, seen: Sight | None = None,
           kinds: Sequence[str] = tuple(KINDS)) -> list[Score]:  # fmt: skip
    """Scores of every kind at every prompt length.

    haystack: token ids of the text to hide answers in.
    answers: number of answers per kind and length, rounded up to whole prompts and depths. Default: ANSWERS.
    batch_size: rows of ROW tokens; of prompts, as many as hold the same number of tokens.
    seen: also score answers beyond and in the window apart.
    """
    if not tokenizer.is_fast:
        raise LolcatsError("Recall needs a fast tokenizer, which maps each token to its place in the text.")
    scores: list[Score] = []
    for kind in kinds:
        for length in lengths:
            prompts = make_prompts(kind, tokenizer, haystack, length, answers or ANSWERS, seed)
            found = measure(model, tokenizer, prompts, max(1, batch_size * ROW // length), seen)
            scores += scores_of(f"{kind}@{length}", found, seen is not None)
    return scores


def make_prompts(
    kind: str, tokenizer: Any, haystack: Sequence[int], length: int, answers: int, seed: int
) -> list[Prompt]:  # fmt: skip
    """Prompts with at least that many answers, the same number at each depth."""
    place = f"{seed}/{kind}/{length}"
    one = sum(len(prompt.answers) for prompt in KINDS[kind](tokenizer, haystack, length, 1, place))
    return KINDS[kind](tokenizer, haystack, length, -(-answers // one), place)


def measure(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int, seen: Sight | None = None
) -> list[Found]:  # fmt: skip
    """Every answer of every prompt. The prompts have the same number of tokens."""
    model.eval()
    found: list[Found] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        cache = _read(model, batch)
        forced = _force(model, batch, copy.deepcopy(cache))
        generated = _generate(model, batch, cache).tolist()
        for i, prompt in enumerate(batch):
            found += _answers(tokenizer, prompt, first + i, forced[i], generated[i], seen)
    return found


def _answers(tokenizer: Any, prompt: Prompt, number: int, forced: Tensor, generated: list[int],
             seen: Sight | None) -> Iterator[Found]:  # fmt: skip
    """forced: (C, vocabulary) log-probabilities of the true continuation; generated: C tokens."""
    truth = torch.tensor(prompt.continuation, device=forced.device)
    right = forced[: len(truth)].argmax(1) == truth
    words = _words(tokenizer, generated[: len(truth)]) if prompt.listed else []
    for answer in prompt.answers:
        span = slice(answer.start, answer.end)
        wanted = prompt.continuation[span]
        same = _words(tokenizer, wanted)[0] in words if prompt.listed else generated[span] == wanted
        yield Found(
            number, answer.depth, seen is not None and seen.holds(prompt, answer), float(right[span].all()),
            float(same), right[span].float().mean().item(), -forced[span].gather(1, truth[span, None]).mean().item(),
        )  # fmt: skip


def _words(tokenizer: Any, tokens: list[int]) -> list[str]:
    return re.findall(r"\w+", tokenizer.decode(tokens))


def scores_of(task: str, found: Sequence[Found], apart: bool) -> Iterator[Score]:
    """Every metric over all answers; if ``apart``, ``exact`` also over those beyond and in the window."""
    depths = [f"{one.depth:g}" for one in found]

    def score(metric: str, key: str, chosen: Sequence[Found], better: bool = True) -> Score:
        items = tuple(getattr(one, key) for one in chosen)
        labels = depths if chosen is found and len(set(depths)) > 1 else []
        return mean_score(task, metric, (items,), better, labels, [one.prompt for one in chosen])

    yield score("exact", "exact", found)
    for metric, wanted in ((BEYOND, False), ("exact in the window", True)) if apart else ():
        if chosen := [one for one in found if one.in_window is wanted]:
            yield score(metric, "exact", chosen)
    yield score("generated", "generated", found)
    yield score("argmax", "argmax", found)
    yield score("nll", "nll", found, better=False)


@torch.no_grad()
def _read(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Any:
    """The cache of all prompt tokens but the last."""
    ids = torch.tensor([p.ids for p in prompts], device=model.device)
    return decoder(model)(input_ids=ids[:, :-1], use_cache=True).past_key_values


@torch.no_grad()
def _force(model: PreTrainedModel, prompts: Sequence[Prompt], cache: Any) -> Tensor:
    """Log-probabilities (B, C, vocabulary) at each token of the true continuations."""
    truth = _padded([p.continuation for p in prompts], model)
    fed = torch.cat([_last(prompts, model), truth[:, :-1]], dim=1)
    return model(input_ids=fed, past_key_values=cache).logits.float().log_softmax(-1)


@torch.no_grad()
def _generate(model: PreTrainedModel, prompts: Sequence[Prompt], cache: Any) -> Tensor:
    """Continuations (B, C) with the model's own greedy answers; a list is its own altogether."""
    tokens = _padded([p.continuation for p in prompts], model)
    own = _padded([_is_own(p) for p in prompts], model).bool()
    fed = [_last(prompts, model)]
    for place, any_own in enumerate(own.any(0).tolist()):
        if any_own:
            logits = model(input_ids=torch.cat(fed, dim=1), past_key_values=cache).logits[:, -1]
            tokens[:, place] = torch.where(own[:, place], logits.argmax(-1), tokens[:, place])
            fed = []
        fed.append(tokens[:, place : place + 1])
    return tokens


def _is_own(prompt: Prompt) -> list[int]:
    """1 for each token of the continuation that the model is to generate, 0 for those that are given."""
    inside = {i for answer in prompt.answers for i in range(answer.start, answer.end)}
    return [int(prompt.listed or i in inside) for i in range(len(prompt.continuation))]


def _last(prompts: Sequence[Prompt], model: PreTrainedModel) -> Tensor:
    return torch.tensor([p.ids[-1:] for p in prompts], device=model.device)


def _padded(rows: list[list[int]], model: PreTrainedModel) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
