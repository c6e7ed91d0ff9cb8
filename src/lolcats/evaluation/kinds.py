"""The kinds of recall prompts: pass key, needle, multi-query, and kinds of RULER (Hsieh et al. 2024, arXiv 2404.06654).

RULER's kinds have its numbers of keys, hops and repetitions, but texts of our own, and answers in a given order so that
they can be forced. Every kind is a function (tokenizer, haystack, length, samples, seed) → prompts; one sample asks at
every depth that the kind has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from lolcats.data.prompts import (
    DEPTHS,
    Prompt,
    counting_prompt,
    hidden_prompt,
    hidden_prompts,
    lookup_prompt,
    made_up_word,
)

DIGITS = 5
CITIES = ("Lisbon", "Chicago", "Nairobi", "Oslo", "Kyoto", "Lima", "Cairo", "Toronto")
ACTIVITIES = (
    "feed the swans on the old canal", "ride the red tram to the hill", "eat plum cake under the clock tower",
    "watch the fishing boats come in", "climb the stairs of the lighthouse", "listen to the street musicians at noon",
    "walk through the glass houses", "drink mint tea on the roof",
)  # fmt: skip
COLOURS = ("red", "green", "yellow", "black", "white", "silver", "purple", "brown")
THINGS = ("suitcase", "bicycle", "umbrella", "lantern", "cupboard", "mailbox", "piano", "wheelbarrow")
CODE = "The code of the {} is {}."
CODE_QUESTION = "The code of the {} is"
OTHER_KEYS = 3
COMMON, FREQUENT = 10, 3  # words asked for
SHORT = 4096  # below, RULER repeats common words less often


def passkey(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """A number hidden in text (Mohtashami and Jaggi 2023)."""

    def draw(rng: random.Random) -> tuple[str, str, str]:
        key = _number(rng)
        return (
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            "What is the pass key? The pass key is",
            key,
        )

    return hidden_prompts(draw, tokenizer, haystack, length, samples, seed)


def needle(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """A sentence hidden in text (Kamradt 2023); the question is its beginning."""

    def draw(rng: random.Random) -> tuple[str, str, str]:
        start, end = f"The best thing to do in {rng.choice(CITIES)} is to", rng.choice(ACTIVITIES)
        return f"{start} {end}.", start, end

    return hidden_prompts(draw, tokenizer, haystack, length, samples, seed)


def multi_query(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """Associative recall: as many ``key: value`` lines as fit, then one query per depth in random order."""
    prompts = []
    for i in range(samples):
        rng = random.Random(f"{seed}/{i}")
        keys: dict[str, str] = {}
        while len(keys) < length // 4:  # a line takes more than four tokens
            keys[made_up_word(rng)] = str(rng.randrange(100, 1000))
        pairs = list(keys.items())
        prompts.append(lookup_prompt(tokenizer, haystack, length, pairs, "{key}: {value}\n", "\n{key}:", rng))
    return prompts


def needles(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's multi-query needle: a key with a value at each depth, all asked in random order."""
    prompts = []
    for i in range(samples):
        rng = random.Random(f"{seed}/{i}")
        things = _things(rng, len(DEPTHS))
        codes = [_number(rng) for _ in things]
        passages = [(CODE.format(thing, code), at) for thing, code, at in zip(things, codes, DEPTHS, strict=True)]
        order = rng.sample(range(len(things)), len(things))
        asked = [("\n\n" + CODE_QUESTION.format(things[n]), codes[n], n) for n in order]
        prompts.append(hidden_prompt(tokenizer, haystack, length, passages, asked, rng))
    return prompts


def multi_key(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's multi-key needle: the asked key at its depth, three others at random depths."""
    prompts = []
    for depth in DEPTHS:
        for i in range(samples):
            rng = random.Random(f"{seed}/{depth}/{i}")
            things = _things(rng, 1 + OTHER_KEYS)
            codes = [_number(rng) for _ in things]
            depths = [depth, *(rng.random() for _ in range(OTHER_KEYS))]
            passages = [(CODE.format(thing, code), at) for thing, code, at in zip(things, codes, depths, strict=True)]
            asked = [("\n\n" + CODE_QUESTION.format(things[0]), codes[0], 0)]
            prompts.append(hidden_prompt(tokenizer, haystack, length, passages, asked, rng))
    return prompts


def multi_value(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's multi-value needle: one key with a value at each depth."""

    def draw(rng: random.Random) -> tuple[list[str], str, list[str]]:
        (thing,) = _things(rng, 1)
        codes = [_number(rng) for _ in DEPTHS]
        question = f"What are all codes of the {thing}, in the order of the text? The codes of the {thing} are"
        return [f"One code of the {thing} is {code}." for code in codes], question, codes

    return _listing(draw, tokenizer, haystack, length, samples, seed)


def variables(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's variable tracking: a chain of assignments, one at each depth; which variables have the value?"""

    def draw(rng: random.Random) -> tuple[list[str], str, list[str]]:
        names: list[str] = []
        while len(names) < len(DEPTHS):
            names += [name] if (name := made_up_word(rng, 2)) not in names else []
        value = _number(rng)
        chain = [f"Set {name} to {before}." for name, before in zip(names, [value, *names[:-1]], strict=True)]
        which = f"variables with the value {value}"
        question = f"What are all {which}, in the order of the text? The {which} are"
        return chain, question, names

    return _listing(draw, tokenizer, haystack, length, samples, seed)


def common_words(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's common words extraction: ten words stand in a list ten times (below 4,096 tokens six times) as often as
    all others."""
    often, seldom = (30, 3) if length >= SHORT else (6, 1)

    def counts(lines: int) -> list[int]:
        return [often] * COMMON + [seldom] * ((lines - COMMON * often) // seldom)

    question = f"\nThe {COMMON} most common words of the list, in the order in which each first appears, are:"
    return [
        counting_prompt(tokenizer, haystack, length, counts, question, COMMON, True, random.Random(f"{seed}/{i}"))
        for i in range(samples)
    ]


def frequent_words(tokenizer: Any, haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:
    """RULER's frequent words extraction: word k of a list is as frequent as 1/k², without the most frequent one."""

    def counts(lines: int) -> list[int]:
        shares = [rank**-2 for rank in range(2, lines + 2)]
        total = sum(shares)
        times = [int(lines * share / total) for share in shares]
        return [count for count in times if count]

    question = f"\nThe {FREQUENT} most common words of the list, the most common one first, are:"
    return [
        counting_prompt(tokenizer, haystack, length, counts, question, FREQUENT, False, random.Random(f"{seed}/{i}"))
        for i in range(samples)
    ]


KINDS: dict[str, Callable[[Any, Sequence[int], int, int, str], list[Prompt]]] = {
    "passkey": passkey, "needle": needle, "multi-query": multi_query, "needles": needles, "multi-key": multi_key,
    "multi-value": multi_value, "variables": variables, "common-words": common_words, "frequent-words": frequent_words,
}  # fmt: skip


def _listing(draw: Callable[[random.Random], tuple[list[str], str, list[str]]], tokenizer: Any,
             haystack: Sequence[int], length: int, samples: int, seed: str) -> list[Prompt]:  # fmt: skip
    """Prompts with a passage at each depth, and a question for a list with one word of each; ``draw`` returns passages,
    question and answers."""
    prompts = []
    for i in range(samples):
        rng = random.Random(f"{seed}/{i}")
        passages, question, answers = draw(rng)
        texts = [f"\n\n{question}", *[","] * (len(answers) - 1)]
        asked = [(text, answer, n) for n, (text, answer) in enumerate(zip(texts, answers, strict=True))]
        places = list(zip(passages, DEPTHS, strict=True))
        prompts.append(hidden_prompt(tokenizer, haystack, length, places, asked, rng, listed=True))
    return prompts


def _number(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(DIGITS))


def _things(rng: random.Random, count: int) -> list[str]:
    """Different things, each with a colour."""
    return [f"{COLOURS[n // len(THINGS)]} {THINGS[n % len(THINGS)]}"
            for n in rng.sample(range(len(COLOURS) * len(THINGS)), count)]  # fmt: skip
