"""Prompts to token ids, off the event loop: a long one delays neither other prompts nor the answers of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lolcats.inference.server.messages import Message, Template, Tool

T = TypeVar("T")
SHORT = 4096
"""Characters or bytes below which a change of threads costs more than the work."""


class Tokenizing:
    """A tokenizer for many threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.template = tokenizer, Template(tokenizer)
        self.pool = ThreadPoolExecutor(4, "tokenizer")
        self.backend, self.lock = getattr(tokenizer, "backend_tokenizer", None), threading.Lock()
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """``work()``, in a thread unless it is as short as ``size`` says."""
        return work() if size <= SHORT else await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def prompt(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return await self.run(len(prompt), lambda: self.encode(prompt, True))

    async def conversation(self, messages: list[Message], tools: list[Tool]) -> list[int]:
        self.template.check(messages, tools)

        def encode() -> list[int]:
            text = self.template.render([m.plain() for m in messages], [tool.plain() for tool in tools] or None)
            return self.encode(text, not self.tokenizer.chat_template)

        size = sum(64 + len(m.text) for m in messages)  # a template takes time for each, even if it is empty
        return await self.run(size, encode)

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; ``special``: with the tokens that begin and end a text."""
        if self.backend is not None:  # without offsets and, unlike the tokenizer itself, while other threads run
            return list(self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        with self.lock:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
