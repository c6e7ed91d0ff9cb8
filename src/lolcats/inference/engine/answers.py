"""Whole answers to many prompts, for callers that have them all at hand and wait for no single one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from lolcats.errors import LolcatsError
from lolcats.inference.engine.engine import Engine
from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.inference.engine.states import Snapshot

AHEAD = 4
"""Requests given to the engine for each slot, so that none is empty between two steps."""


@dataclass
class Answered:
    """A prompt, by its number, and what the engine has said to it."""

    number: int
    prompt_tokens: int
    deltas: list[Delta] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        """All of them, what ended the answer included."""
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def cut(self) -> bool:
        """Whether it ended at the limit of tokens."""
        return self.deltas[-1].finish_reason == "length"


def answer_all(
    engine: Engine, asked: Iterable[tuple[int, list[int], SamplingParams]], start: Snapshot | None = None,
    anew: Container[int] = (),
) -> Iterator[Answered]:  # fmt: skip
    """Answers in the order in which they end.

    Args:
        asked: number and token ids of each prompt, and how its answer is chosen.
        start: what all prompts go on from.
        anew: numbers of the prompts whose answers begin a text of their own (see :class:`.request.Request`).

    Raises:
        LolcatsError: the engine refused or failed one.
    """
    left, running = iter(asked), list[Answered]()
    while True:
        while len(running) < AHEAD * engine.table.slots and (one := next(left, None)) is not None:
            number, tokens, params = one
            running.append(Answered(number, len(tokens)))
            engine.submit(Request(tokens, params, running[-1].deltas.append, start, anew=number in anew))
        if not running:
            return
        engine.step()
        for answered in (one for one in running if one.ended):
            if answered.deltas[-1].finish_reason not in ("stop", "length"):
                raise LolcatsError(
                    f"Prompt {answered.number + 1} could not be answered: {answered.deltas[-1].error}"
                )  # fmt: skip
            yield answered
        running = [one for one in running if not one.ended]
