"""What a teacher is asked and what it answers, wherever it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lolcats.lab.distill.prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How completions are chosen. temperature: 0 is greedy. seed: of the run; each prompt has one of its own."""

    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, number: int) -> int:
        """The seed of prompt ``number``: it depends on nothing that is generated beside it."""
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1  # some servers take no more than 31 bits


@dataclass(frozen=True)
class Answer:
    """A completion; ``reason``: why there is none. cut: it ended at the limit of tokens."""

    text: str = ""
    cut: bool = False
    prompt_tokens: int = 0
    tokens: int = 0
    reason: str = ""


class Numbered(NamedTuple):
    number: int
    prompt: Prompt


class Teacher(Protocol):
    """What answers prompts, many at once and in any order."""

    def answers(self, prompts: Sequence[Numbered]) -> Iterator[tuple[int, Answer]]: ...
