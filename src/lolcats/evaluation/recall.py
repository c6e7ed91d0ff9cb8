"""Pass key, needle and multi-query recall by length and depth: does a model find what lies far back in its context?

Every prompt has exactly the requested number of tokens, so batches need no padding. The model reads a prompt once and
is then fed the true answer. ``exact``: every token of the answer was the most likely one, so greedy generation produces
it; ``argmax``: the share of such tokens; ``nll``: the mean −log p of all tokens. The last two still give a signal where
a small model never gets an answer fully right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.scores import Score, mean_score
from lolcats.evaluation.text import ROW, encode, special_prefix
from lolcats.modeling.install import decoder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the answer lies: share of the text before it
SAMPLES = 10  # prompts per length and depth unless a limit says otherwise
DIGITS = 5
CITIES = ("Lisbon", "Chicago", "Nairobi", "Oslo", "Kyoto", "Lima", "Cairo", "Toronto")
ACTIVITIES = (
    "feed the swans on the old canal", "ride the red tram to the hill", "eat plum cake under the clock tower",
    "watch the fishing boats come in", "climb the stairs of the lighthouse", "listen to the street musicians at noon",
    "walk through the glass houses", "drink mint tea on the roof",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Tokens [start, end) of a continuation, and the depth at which they lie in the prompt."""

    start: int
    end: int
    depth: float


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the first answer, their true continuation, and the answers within the continuation."""

    ids: list[int]
    continuation: list[int]
    answers: list[Answer]


def recall(model: PreTrainedModel, tokenizer: Any, haystack: Sequence[int], lengths: Sequence[int],
           samples: int | None, batch_size: int, seed: int) -> list[Score]:  # fmt: skip
    """Scores of every task at every prompt length; ``haystack`` holds the token ids of the text to hide answers in."""
    if not tokenizer.is_fast:
        raise LolcatsError("Recall needs a fast tokenizer, which maps each token to its place in the text.")
    scores: list[Score] = []
    for name, make in TASKS.items():
        for length in lengths:
            prompts = make(tokenizer, haystack, length, samples or SAMPLES, f"{seed}/{name}/{length}")
            scores += _measure(model, prompts, f"{name}@{length}", max(1, batch_size * ROW // length))
    return scores


def passkey(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """A number hidden in text (Mohtashami and Jaggi 2023)."""

    def draw(rng: random.Random) -> tuple[str, str, str]:
        key = "".join(rng.choice("0123456789") for _ in range(DIGITS))
        return (
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            "What is the pass key? The pass key is",
            key,
        )

    return _hidden(draw, tokenizer, haystack, length, samples, seed)


def needle(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """A sentence hidden in text (Kamradt 2023); the question is its beginning."""

    def draw(rng: random.Random) -> tuple[str, str, str]:
        start, end = f"The best thing to do in {rng.choice(CITIES)} is to", rng.choice(ACTIVITIES)
        return f"{start} {end}.", start, end

    return _hidden(draw, tokenizer, haystack, length, samples, seed)


def multi_query(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """Associative recall: as many ``key: value`` lines as fit, then one query per depth in random order."""
    return [_multi_query(tokenizer, haystack, length, random.Random(f"{seed}/{i}")) for i in range(samples)]


TASKS: dict[str, Callable[[Any, Sequence[int], int, int, str], list[Prompt]]] = {
    "passkey": passkey, "needle": needle, "multi-query": multi_query,
}  # fmt: skip


def _hidden(draw: Callable[[random.Random], tuple[str, str, str]], tokenizer: Any, haystack: Sequence[int],
            length: int, samples: int, seed: str) -> list[Prompt]:  # fmt: skip
    """Prompts with a sentence at each depth and a question at the end; ``draw`` returns sentence, question, answer."""
    prompts = []
    for depth in DEPTHS:
        for i in range(samples):
            rng = random.Random(f"{seed}/{depth}/{i}")
            sentence, question, answer = draw(rng)
            hidden = encode(tokenizer, f"\n\n{sentence}\n\n")
            asked, continuation, answers = _tail(tokenizer, [(f"\n\n{question}", answer, depth)])
            start = special_prefix(tokenizer)
            room = _room(length, len(start) + len(hidden) + len(asked))
            text = _filler(haystack, room, rng)
            at = round(depth * room)
            prompts.append(Prompt([*start, *text[:at], *hidden, *text[at:], *asked], continuation, answers))
    return prompts


def _multi_query(tokenizer: Any, haystack: Sequence[int], length: int, rng: random.Random) -> Prompt:
    keys: dict[str, int] = {}
    while len(keys) < length // 4:  # a line takes more than four tokens
        keys["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))] = rng.randrange(100, 1000)
    pairs = list(keys.items())
    lines = tokenizer([f"{key}: {value}\n" for key, value in pairs], add_special_tokens=False)["input_ids"]
    longest = max(map(len, lines))
    start = special_prefix(tokenizer)
    room = _room(length, len(start) + len(encode(tokenizer, "\n\n")) + longest + len(DEPTHS) * longest)
    ids: list[int] = []
    count = 0
    while count < len(lines) and len(ids) + len(lines[count]) <= room:
        ids += lines[count]
        count += 1
    if count < len(DEPTHS):
        raise LolcatsError(f"{length} tokens are too few for {len(DEPTHS)} key-value pairs.")
    asked_for = [(depth, *pairs[round(depth * (count - 1))]) for depth in DEPTHS]
    rng.shuffle(asked_for)
    asked, continuation, answers = _tail(
        tokenizer, [(f"\n{key}:", str(value), depth) for depth, key, value in asked_for]
    )
    text = _filler(haystack, length - len(start) - len(ids) - len(asked) - 1, rng)
    newline = encode(tokenizer, "\n")[-1:]
    return Prompt([*start, *text, *newline, *ids, *asked], continuation, answers)


def _tail(tokenizer: Any, questions: list[tuple[str, str, float]]) -> tuple[list[int], list[int], list[Answer]]:
    """(tokens before the first answer, tokens from there on, places of the answers in the latter)."""
    text, places = "", []
    for question, answer, _ in questions:
        text += f"{question} {answer}"
        places.append((len(text) - len(answer), len(text)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for first, last in places:
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < last and b > first]
        spans.append((inside[0], inside[-1] + 1))
    cut = spans[0][0]
    depths = [depth for _, _, depth in questions]
    answers = [Answer(a - cut, b - cut, depth) for (a, b), depth in zip(spans, depths, strict=True)]
    return encoded["input_ids"][:cut], encoded["input_ids"][cut:], answers


def _filler(haystack: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """``count`` tokens of the haystack from a random place on, wrapping around at its end."""
    start = rng.randrange(len(haystack))
    return [haystack[(start + i) % len(haystack)] for i in range(count)]


def _room(length: int, needed: int) -> int:
    if needed >= length:
        raise LolcatsError(f"{length} tokens are too few: question and answer already take {needed}.")
    return length - needed


def _measure(model: PreTrainedModel, prompts: list[Prompt], task: str, batch_size: int) -> Iterator[Score]:
    """Scores ``exact``, ``argmax`` and ``nll``.

    ``exact`` looks only at the first answer of each prompt: greedy generation would go on with its own text after it.
    """
    exact: list[float] = []
    argmax: list[float] = []
    nll: list[float] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        for prompt, row in zip(batch, _read_and_answer(model, batch), strict=True):
            truth = torch.tensor(prompt.continuation, device=row.device)
            right = row[: len(truth)].argmax(1) == truth
            exact.append(float(right[: prompt.answers[0].end].all()))
            for answer in prompt.answers:
                span = slice(answer.start, answer.end)
                argmax.append(right[span].float().mean().item())
                nll.append(-row[span].gather(1, truth[span, None]).mean().item())
    every = [f"{answer.depth:g}" for prompt in prompts for answer in prompt.answers]
    firsts = [f"{prompt.answers[0].depth:g}" for prompt in prompts]
    yield mean_score(task, "exact", (tuple(exact),), labels=firsts)
    yield mean_score(task, "argmax", (tuple(argmax),), labels=every)
    yield mean_score(task, "nll", (tuple(nll),), higher_is_better=False, labels=every)


@torch.no_grad()
def _read_and_answer(model: PreTrainedModel, prompts: list[Prompt]) -> Tensor:
    """Log-probabilities (B, C, vocabulary) at each token of the true continuations."""
    ids = torch.tensor([p.ids for p in prompts], device=model.device)
    longest = max(len(p.continuation) for p in prompts)
    truth = torch.tensor([p.continuation + [0] * (longest - len(p.continuation)) for p in prompts], device=model.device)
    cache = decoder(model)(input_ids=ids[:, :-1], use_cache=True).past_key_values
    fed = torch.cat([ids[:, -1:], truth[:, :-1]], dim=1)
    return model(input_ids=fed, past_key_values=cache).logits.float().log_softmax(-1)
