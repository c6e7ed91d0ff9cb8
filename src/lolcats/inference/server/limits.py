"""What clients may ask for, and how long they may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What clients may ask for, and how long they may take.

    Args:
        context: tokens of prompt and answer together.
        max_tokens: tokens of an answer.
        body_bytes: size of a request.
        waiting: requests that wait for a slot; more are refused with 429.
        choices: prompts times n in one request.
        connections: open connections; more are refused with 429.
        read_seconds: for the head of a request, and again for its body.
        write_seconds: without the client reading anything of its answer.
        idle_seconds: between two requests on one connection.
    """

    context: int = 8192
    max_tokens: int = 4096
    body_bytes: int = 1 << 20
    waiting: int = 128
    choices: int = 16
    connections: int = 512
    read_seconds: float = 30
    write_seconds: float = 60
    idle_seconds: int = 30
