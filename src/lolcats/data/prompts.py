"""Prompts that ask for something that stands earlier in them.

Every prompt has exactly the requested number of tokens up to its first answer, so batches need no padding. What is
hidden, asked and answered are arguments; ``evaluation/kinds.py`` has the texts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lolcats.data.tokens import encode, encode_with_spans, special_prefix
from lolcats.errors import LolcatsError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the answer lies: share of the text before it
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
TRIED = 200  # made-up words at a time


@dataclass(frozen=True)
class Answer:
    """Tokens [start, end) of a continuation, and the depth at which they lie in the prompt."""

    start: int
    end: int
    depth: float
    source: int | None = None
    """Number of tokens of the prompt up to the end of the passage that holds the answer, if known. For an answer that
    is counted over a list: up to the first place where it stands."""


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the first answer, their true continuation, and the answers within the continuation."""

    ids: list[int]
    continuation: list[int]
    answers: list[Answer]
    listed: bool = False
    """The answers are one list, with nothing but commas between them."""


Draw = Callable[[random.Random], tuple[str, str, str]]
"""Draws a sentence to hide, the question at the end of the prompt, and its answer."""


def hidden_prompts(
    draw: Draw, tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str
) -> list[Prompt]:  # fmt: skip
    """Prompts with one hidden sentence, ``samples`` for each depth."""
    prompts = []
    for depth in DEPTHS:
        for i in range(samples):
            rng = random.Random(f"{seed}/{depth}/{i}")
            sentence, question, answer = draw(rng)
            asked = [(f"\n\n{question}", answer, 0)]
            prompts.append(hidden_prompt(tokenizer, haystack, length, [(sentence, depth)], asked, rng))
    return prompts


def hidden_prompt(tokenizer: Any, haystack: Sequence[int], length: int, passages: Sequence[tuple[str, float]],
                  questions: Sequence[tuple[str, str, int]], rng: random.Random,
                  listed: bool = False) -> Prompt:  # fmt: skip
    """A prompt with passages hidden in text, and questions at its end.

    passages: text and depth of each; those of equal depth follow each other.
    questions: text and answer of each, and the index of the passage that holds the answer.
    """
    start = special_prefix(tokenizer)
    hidden = [encode(tokenizer, f"\n\n{text}\n\n") for text, _ in passages]
    asked, continuation, answers = tail(tokenizer, [(q, answer, passages[i][1]) for q, answer, i in questions])
    space = room(length, len(start) + sum(map(len, hidden)) + len(asked))
    text = filler(haystack, space, rng)
    ids, sources, done = list(start), {}, 0
    for i, (_, depth) in sorted(enumerate(passages), key=lambda passage: passage[1][1]):
        at = round(depth * space)
        ids += [*text[done:at], *hidden[i]]
        sources[i], done = len(ids), at
    found = [replace(answer, source=sources[i]) for answer, (_, _, i) in zip(answers, questions, strict=True)]
    return Prompt([*ids, *text[done:], *asked], continuation, found, listed)


def lookup_prompt(tokenizer: Any, haystack: Sequence[int], length: int, pairs: Sequence[tuple[str, str]], line: str,
                  question: str, rng: random.Random) -> Prompt:  # fmt: skip
    """As many lines of key and value as fit, then one question for each depth, in random order.

    pairs: at least as many keys and values as fit. line, question: templates with {key} and {value}.
    """
    lines = _encoded(tokenizer, [line.format(key=key, value=value) for key, value in pairs])
    longest = max(map(len, lines))
    start = special_prefix(tokenizer)
    space = room(length, len(start) + len(encode(tokenizer, "\n\n")) + longest + len(DEPTHS) * longest)
    ids: list[int] = []
    ends: list[int] = []
    while len(ends) < len(lines) and len(ids) + len(lines[len(ends)]) <= space:
        ids += lines[len(ends)]
        ends.append(len(ids))
    if len(ends) < len(DEPTHS):
        raise LolcatsError(f"{length} tokens are too few for {len(DEPTHS)} key-value pairs.")
    places = [(depth, round(depth * (len(ends) - 1))) for depth in DEPTHS]
    rng.shuffle(places)
    questions = [(question.format(key=pairs[i][0]), pairs[i][1], depth) for depth, i in places]
    asked, continuation, answers = tail(tokenizer, questions)
    before = _before_list(tokenizer, haystack, length - len(ids) - len(asked), rng)
    found = [replace(a, source=len(before) + ends[i]) for a, (_, i) in zip(answers, places, strict=True)]
    return Prompt([*before, *ids, *asked], continuation, found)


def counting_prompt(tokenizer: Any, haystack: Sequence[int], length: int, counts: Callable[[int], Sequence[int]],
                    question: str, answers: int, by_place: bool, rng: random.Random) -> Prompt:  # fmt: skip
    """A list of words, one per line in random order, and a question for the most frequent ones.

    counts: from the number of lines that fit to how often each word stands in the list, most frequent first.
    answers: how many of the words are asked for.
    by_place: in the order in which they first stand in the list; otherwise, most frequent first.
    """
    asked, _, _ = tail(tokenizer, [(question, "a", 0.0)])
    space = room(length, len(special_prefix(tokenizer)) + len(asked) + 2)
    size = Counter(map(len, _encoded(tokenizer, [f"{made_up_word(rng)}\n" for _ in range(TRIED)]))).most_common(1)[0][0]
    times = counts(space // size)
    words, lines = _equal_lines(tokenizer, len(times), size, rng)
    order = [i for i, count in enumerate(times) for _ in range(count)]
    rng.shuffle(order)
    clear = times[answers - 1 : answers + 1] if by_place else times[: answers + 1]  # must differ from one to the next
    if len(order) * size > space or len(times) < answers or any(a <= b for a, b in pairwise(clear)):
        raise LolcatsError(f"{length} tokens are too few for a list of words in which {answers} are frequent.")
    wanted = list(range(answers))
    if by_place:
        wanted.sort(key=order.index)
    texts = [question, *[","] * (answers - 1)]
    asked, continuation, found = tail(tokenizer, [(q, words[i], 0.0) for q, i in zip(texts, wanted, strict=True)])
    ids = [token for i in order for token in lines[i]]
    before = _before_list(tokenizer, haystack, length - len(ids) - len(asked), rng)
    placed = [
        replace(answer, source=len(before) + (order.index(i) + 1) * size)
        for answer, i in zip(found, wanted, strict=True)
    ]
    return Prompt([*before, *ids, *asked], continuation, placed, listed=True)


def tail(
    tokenizer: Any, questions: Sequence[tuple[str, str, float]]
) -> tuple[list[int], list[int], list[Answer]]:  # fmt: skip
    """(tokens before the first answer, tokens from there on, places of the answers in the latter).

    questions: text, answer and depth of each.
    """
    text, places = "", []
    for question, answer, _ in questions:
        text += f"{question} {answer}"
        places.append((len(text) - len(answer), len(text)))
    ids, spans = encode_with_spans(tokenizer, text, places)
    cut = spans[0][0]
    depths = [depth for _, _, depth in questions]
    answers = [Answer(a - cut, b - cut, depth) for (a, b), depth in zip(spans, depths, strict=True)]
    return ids[:cut], ids[cut:], answers


def filler(haystack: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """``count`` tokens of the haystack from a random place on, wrapping around at its end."""
    start = rng.randrange(len(haystack))
    text = list(haystack[start : start + count])
    while len(text) < count:
        text += haystack[: count - len(text)]
    return text


def room(length: int, needed: int) -> int:
    """How many of ``length`` tokens are left."""
    if needed >= length:
        raise LolcatsError(f"{length} tokens are too few: question and answer already take {needed}.")
    return length - needed


def made_up_word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def _before_list(tokenizer: Any, haystack: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """``count`` tokens before a list: the special ones, text, and a line break."""
    start = special_prefix(tokenizer)
    return [*start, *filler(haystack, count - len(start) - 1, rng), *encode(tokenizer, "\n")[-1:]]


def _equal_lines(tokenizer: Any, count: int, size: int, rng: random.Random) -> tuple[list[str], list[list[int]]]:
    """``count`` different made-up words, and each as a line of ``size`` tokens."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        words = [made_up_word(rng) for _ in range(max(TRIED, count))]
        lines = _encoded(tokenizer, [f"{word}\n" for word in words])
        found |= {word: line for word, line in zip(words, lines, strict=True) if len(line) == size}
    return list(found)[:count], list(found.values())[:count]


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids
