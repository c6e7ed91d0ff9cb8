"""Prompts that wait for a slot, and whose turn it is to be prefilled.

Pieces of prompts alternate between the prompt that came first, so that none starves, and the one with the fewest
tokens left, so that a short prompt never waits for a long one. A short prompt that comes while the only other one is
prefilled is next.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lolcats.inference.engine.request import Request


class Prompts:
    """The waiting requests, in the order in which they came.

    Args:
        most_begun: prompts that may be partly prefilled at a time, which each hold a state.
    """

    def __init__(self, most_begun: int) -> None:
        self.requests: dict[Request, None] = {}
        self.most_begun, self.oldest_was_last = most_begun, False

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: Request) -> bool:
        return request in self.requests

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self.requests))

    def add(self, request: Request) -> None:
        self.requests[request] = None

    def remove(self, request: Request) -> None:
        del self.requests[request]

    def next(self) -> Request:
        """Whose piece is computed next."""
        begun = [request for request in self.requests if request.cache is not None]
        able = begun if len(begun) >= self.most_begun else list(self.requests)
        return min(able, key=lambda request: request.left) if self.oldest_was_last else able[0]

    def served(self, request: Request) -> None:
        """A piece of this prompt was computed: the other rule chooses the next one."""
        self.oldest_was_last = request is next(iter(self.requests))

    def alike(self, first: Request, most: int) -> list[Request]:
        """``first`` and other prompts of its length that can be prefilled in one batch."""
        if most < 2 or not _plain(first):
            return [first]
        length = len(first.prompt)
        others = (r for r in self.requests if r is not first and len(r.prompt) == length and _plain(r))
        return [first, *islice(others, most - 1)]


def _plain(request: Request) -> bool:
    """Whether nothing of the prompt is known yet, and nothing but its last logits is asked for."""
    return request.cache is None and request.start is None and request.params.prompt_logprobs is None
