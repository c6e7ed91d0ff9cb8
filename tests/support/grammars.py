"""Schemas for ``response_format``, what compiles them, and walks through their grammars."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lolcats.inference.engine.grammar import Matcher, allowed
from lolcats.inference.server.grammar import GrammarLimits, Grammars

VOCABULARY, EOS, PAD = 320, 2, 0  # 300 tokens are the tokenizer's
LIMITS = GrammarLimits(seconds=20)  # the machine may be busy
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"const": 1}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
PATTERN = {"type": "string", "pattern": "^[a-c]{2,4}-\\d{3}$"}
SCALAR = {"type": "integer", "minimum": -20, "maximum": 20}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}


@contextmanager
def compiling(tokenizer: Any, stop_tokens: Iterable[int] = (EOS, PAD)) -> Iterator[Grammars]:
    made = Grammars(tokenizer, VOCABULARY, stop_tokens, LIMITS)
    try:
        yield made
    finally:
        made.close()


def options(matcher: Matcher) -> list[int]:
    return allowed(matcher.bitmask()[None], VOCABULARY)[0].nonzero().flatten().tolist()


def walk(matcher: Matcher, rng: random.Random, most: int = 2000) -> list[int]:
    """Random allowed tokens until the grammar is at its end or a stop token was drawn."""
    tokens: list[int] = []
    while not matcher.stopped:
        assert len(tokens) < most
        tokens.append(rng.choice(options(matcher)))
        matcher.accept(tokens[-1])
    return tokens
