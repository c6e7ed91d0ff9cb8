"""Grammars of requests, made in threads: new schemas one after another, known ones beside them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lolcats.inference.engine.grammar import GrammarError, Matcher
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.grammar import Grammar, Grammars

MOST_WAITING = 16
MOST_SECONDS = 2.0
"""Processor time for all answers of a request: each has a matcher of its own."""


class Compiling:
    """Makes matchers for ``response_format`` without holding up the event loop, or requests whose schemas are known."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars, self.waiting = grammars, 0
        self.new, self.known = ThreadPoolExecutor(1, "schemas"), ThreadPoolExecutor(2, "grammar")

    async def matchers(self, response_format: dict[str, Any], count: int) -> list[Matcher | None]:
        """One for each of ``count`` answers. To cancel this stops the work.

        Raises:
            ApiError: 400, the grammar cannot be used; 429, too many are waiting.
        """
        if response_format["type"] == "text":
            return [None] * count
        if self.waiting >= MOST_WAITING:
            raise ApiError(429, "Too many grammars are being compiled; try again soon.", code="queue_full")
        loop, gone = asyncio.get_running_loop(), threading.Event()
        self.waiting += 1
        try:
            grammar = await loop.run_in_executor(self.known, self.grammars.find, response_format)
            if grammar is None:
                grammar = await loop.run_in_executor(self.new, self.grammars.compile, response_format)
            return await loop.run_in_executor(self.known, _make, grammar, count, gone)
        except GrammarError as error:
            raise ApiError(400, str(error), "response_format") from None
        finally:
            gone.set()
            self.waiting -= 1

    def close(self) -> None:
        self.grammars.close()
        self.new.shutdown(wait=False, cancel_futures=True)
        self.known.shutdown(wait=False, cancel_futures=True)


def _make(grammar: Grammar, count: int, gone: threading.Event) -> list[Matcher | None]:
    begin, result = time.thread_time(), list[Matcher | None]()
    while len(result) < count and not gone.is_set():
        result.append(grammar())
        if (time.thread_time() - begin) * count > MOST_SECONDS * len(result):
            raise GrammarError(
                f"response_format: this schema takes too much time for {count} answers; ask for fewer, or make it "
                "simpler."
            )
    return result
