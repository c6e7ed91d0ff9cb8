"""Prompts that wait for a slot, and whose turn it is to be prefilled.

Every other piece goes to the prompt with the fewest tokens left, so a short prompt never waits for a long one: if it
comes while the only other prompt is prefilled, it is next. The pieces between go in turns to the prompt that came first
and to the one that has waited longest for a piece, so none starves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from lolcats.inference.engine.request import Request


class Prompts:
    """The waiting requests, in the order in which they came.

    Args:
        most_begun: prompts that may be partly prefilled at a time, which each hold a state.
    """

    def __init__(self, most_begun: int) -> None:
        self.requests: dict[Request, int] = {}
        """With the time, in pieces, at which each came or was last served."""
        self.most_begun, self.time, self.came = most_begun, 0, 0
        self.shortest_next, self.oldest_next = True, True

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: Request) -> bool:
        return request in self.requests

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self.requests))

    def add(self, request: Request) -> None:
        self.came += 1
        request.number = self.came
        self.requests[request] = self.time

    def remove(self, request: Request) -> None:
        del self.requests[request]

    def next(self, may_begin: Callable[[Request], bool] | None = None) -> Request | None:
        """Whose piece is computed next; None if nobody's can be.

        may_begin: whether there is room for all of a prompt. While there is none for the oldest that has not begun, no
        other begins, so that a long one does not wait for ever.
        """
        begun = [request for request in self.requests if request.cache is not None]
        able = begun if len(begun) >= self.most_begun else list(self.requests)
        chosen = self._choose(able)
        if may_begin is None or chosen is None or chosen.cache is not None:
            return chosen
        oldest = next(request for request in able if request.cache is None)
        if not may_begin(oldest):
            return self._choose(begun)
        if chosen is oldest or may_begin(chosen):
            return chosen
        return self._choose([request for request in able if request.cache is not None or request is oldest])

    def _choose(self, able: list[Request]) -> Request | None:
        if self.shortest_next or not able:
            return min(able, key=lambda request: request.left, default=None)
        return able[0] if self.oldest_next else min(able, key=self.requests.__getitem__)

    def served(self, request: Request) -> None:
        """A piece of this prompt is computed: whose turn is next?"""
        self.time += 1
        self.requests[request] = self.time
        if self.shortest_next:
            self.shortest_next = request is next(iter(self.requests))  # it is the oldest as well
        else:
            self.shortest_next, self.oldest_next = True, not self.oldest_next

    def alike(self, first: Request, most: int) -> list[Request]:
        """``first`` and other prompts of its length that can be prefilled in one batch, all after the same state."""
        if most < 2 or not _plain(first):
            return [first]
        length, start = len(first.prompt), first.start
        others = (r for r in self.requests
                  if r is not first and len(r.prompt) == length and r.start is start and _plain(r))  # fmt: skip
        return [first, *islice(others, most - 1)]


def _plain(request: Request) -> bool:
    """Whether nothing of the prompt is known yet, and nothing but its last logits is asked for."""
    asks = request.params
    return request.cache is None and asks.prompt_logprobs is None and asks.max_tokens > 0
