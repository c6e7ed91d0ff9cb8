"""Prompts whose answers lie far back in the context: what a selection of heads is scored on.

Wording, text and seeds are those of selection only. ``lolcats evaluate --tasks recall`` uses others, so that its scores
are not those of the prompts that heads were chosen on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from lolcats.data.tokens import encode, encode_with_spans, special_prefix
from lolcats.errors import LolcatsError
from lolcats.selection.problems import PROBLEMS
from lolcats.selection.text import PEOPLE, PLACES, THINGS, sentences

WORDS = (
    "amber", "badger", "cedar", "dagger", "ember", "falcon", "garnet", "hazel", "indigo", "jasper", "kestrel", "lemon",
    "maple", "nutmeg", "olive", "pepper", "quartz", "raven", "saffron", "tulip", "umber", "velvet", "walnut", "yarrow",
    "zephyr", "acorn", "basil", "cobalt", "dahlia", "ebony", "fennel", "ginger", "heron", "ivory", "juniper", "lilac",
)  # fmt: skip
NAMES = ("Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luis")
ASKED = 12  # lines of a ledger that are asked for
COUNTS = ((4, 3), (3, 2), (2, 1), (1, 1))  # problems of a prompt that are shown with solutions, and those to solve
PASSAGE, CUE = 32, 16  # tokens of a passage to repeat, and of its beginning that is given


@dataclass(frozen=True)
class Scored:
    """A context, then questions with their true answers: token ids, and the tokens [start, end) of the answers."""

    kind: str
    ids: list[int]
    answers: list[tuple[int, int]]


@dataclass
class Writer:
    """What a kind of prompt is written with."""

    tokenizer: Any
    length: int
    """Tokens of the whole prompt, answers included."""
    rng: random.Random
    text: Iterator[int]
    """Token ids of the text around it."""
    start: list[int]
    """Special tokens before every prompt."""

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def filler(self, tokens: int) -> list[int]:
        """The next ``tokens`` of the text.

        Raises:
            LolcatsError: there is no room for text.
        """
        if tokens <= 0:
            raise LolcatsError(
                f"{self.length} tokens are too few for a recall prompt: use longer ones (lolcats select --lengths), or "
                "list the heads to keep yourself (attention.softmax_heads), or keep none (attention.softmax_budget=0)."
            )
        return [next(self.text) for _ in range(tokens)]

    def prompt(
        self, kind: str, hidden: Sequence[str], questions: Sequence[tuple[str, str]], dense: bool = False
    ) -> Scored:
        """Text with the ``hidden`` lines in it, at even distances in random order, or one right after the other
        (``dense``); then the questions, each with its answer."""
        pieces = [self.encode(line) for line in hidden]
        tail, answers = self._tail(questions)
        text = self.filler(self.length - len(self.start) - sum(map(len, pieces)) - len(tail))
        ids = list(self.start)
        if dense:
            ids += text + [token for piece in pieces for token in piece]
        else:
            step = len(text) / len(pieces)
            for i, piece in enumerate(pieces):
                first, middle, last = (round((i + part) * step) for part in (0, 0.5, 1))
                ids += [*text[first:middle], *piece, *text[middle:last]]
        return Scored(kind, ids + tail, [(len(ids) + a, len(ids) + b) for a, b in answers])

    def _tail(self, questions: Sequence[tuple[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
        text, places = "\n\n", []
        for question, answer in questions:
            text += f"{question} {answer}\n"
            places.append((len(text) - len(answer) - 1, len(text) - 1))
        return encode_with_spans(self.tokenizer, text, places)


def codes(writer: Writer) -> Scored:
    """Numbers hidden in text, all asked for in another order."""
    rng = writer.rng
    pairs = [(word, str(rng.randrange(10000, 100000))) for word in rng.sample(WORDS, 6)]
    hidden = [f"\n\nLocker {word} opens with code {code}.\n\n" for word, code in pairs]
    questions = [(f"Locker {word} opens with code", code) for word, code in rng.sample(pairs, 6)]
    return writer.prompt("codes", hidden, questions)


def facts(writer: Writer) -> Scored:
    """Sentences hidden in text, each asked for by its beginning."""
    rng = writer.rng
    found = [f"What {name} left with {rng.choice(PEOPLE)} at {rng.choice(PLACES)} was" for name in rng.sample(NAMES, 4)]
    pairs = list(zip(found, rng.sample(THINGS, 4), strict=True))
    hidden = [f"\n\n{beginning} {thing}.\n\n" for beginning, thing in pairs]
    return writer.prompt("facts", hidden, rng.sample(pairs, 4))


def ledger(writer: Writer) -> Scored:
    """A table that fills the context, of which some lines are asked for again."""
    rng, pairs = writer.rng, dict[str, str]()
    line = 2 * max(len(writer.encode(f"{word}-{word} = 1234\n")) for word in WORDS[:4])  # more than any takes
    room = writer.length - len(writer.start) - ASKED * line - line
    while room > 0 and len(pairs) < len(WORDS) ** 2 // 2:
        key, value = "-".join(rng.sample(WORDS, 2)), str(rng.randrange(1000, 10000))
        if key not in pairs:
            pairs[key] = value
            room -= len(writer.encode(f"{key} = {value}\n"))
    asked = rng.sample(list(pairs.items()), min(ASKED, len(pairs)))
    lines = [f"{key} = {value}\n" for key, value in pairs.items()]
    return writer.prompt("ledger", lines, [(f"{key} =", value) for key, value in asked], dense=True)


def passage(writer: Writer) -> Scored:
    """A passage of the text, to be repeated word by word from its beginning on."""
    cue = writer.encode("\n\nThe same passage again:\n\n")
    text = writer.filler(writer.length - len(writer.start) - len(cue) - CUE - PASSAGE)
    at = writer.rng.randrange(len(text) // 8, len(text) * 3 // 4)
    ids = [*writer.start, *text, *cue, *text[at : at + CUE + PASSAGE]]
    return Scored("passage", ids, [(len(ids) - PASSAGE, len(ids))])


def examples(writer: Writer) -> Scored:
    """Worked problems in a form of their own, and more of them to be solved in that form: as many as leave room for
    text."""
    problem = writer.rng.choice(PROBLEMS)
    made = [problem(writer.rng) for _ in range(sum(COUNTS[0]))]
    for shown, asked in COUNTS:
        hidden = [f"{task} {answer}\n\n" for task, answer in made[:shown]]
        if sum(map(len, map(writer.encode, [*hidden, *map("".join, made[-asked:])]))) < writer.length * 7 // 8:
            break
    return writer.prompt("examples", hidden, made[-asked:], dense=True)


KINDS: dict[str, Callable[[Writer], Scored]] = {
    "codes": codes, "facts": facts, "ledger": ledger, "passage": passage, "examples": examples,
}  # fmt: skip


def prompts(tokenizer: Any, plan: Sequence[tuple[str, int]], seed: str, text: Sequence[int] = ()) -> list[Scored]:
    """One prompt for each (kind, length in tokens) of ``plan``.

    Args:
        text: token ids to hide the answers in; empty: sentences of our own.
        seed: the same seed gives the same prompts; another one shares none with them.
    """
    made = []
    for i, (kind, length) in enumerate(plan):
        own = f"selection/{seed}/{kind}/{length}/{i}"
        writer = Writer(tokenizer, length, random.Random(own), iter(()), special_prefix(tokenizer))
        writer.text = _from(text, writer.rng) if text else _own(writer, own)
        made.append(KINDS[kind](writer))
    return made


def _own(writer: Writer, seed: str) -> Iterator[int]:
    written = sentences(seed)
    while True:
        yield from writer.encode("".join(next(written) for _ in range(64)))


def _from(text: Sequence[int], rng: random.Random) -> Iterator[int]:
    """The tokens of ``text`` from a random place on, and again from its beginning after its end."""
    start = rng.randrange(len(text))
    return (text[(start + i) % len(text)] for i in count())
