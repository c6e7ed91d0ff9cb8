"""Deltas of the engine as OpenAI's objects: whole answers and chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.sampling import TokenLogprob
from lolcats.inference.engine.text import context_of, spelled, unfinished

Json = dict[str, Any]


@dataclass
class Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    unsent: list[TokenLogprob] = field(default_factory=list)
    """For tokens whose text is still held back."""
    prompt: str | None = None
    """What is to be repeated before the first token."""


class Reply:
    """One answer, whose choices are all of ``requests``; ``n`` of them share a prompt."""

    def __init__(self, model: str, chat: bool, requests: list[Request], n: int, tokenizer: Any) -> None:
        self.model, self.chat, self.requests, self.n, self.tokenizer = model, chat, requests, n, tokenizer
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.choices = [Choice() for _ in requests]
        self.texts: dict[int, str] = {}
        """Of single tokens: log-probabilities name the same ones again and again."""

    def echo(self, prompts: list[str | list[int]]) -> None:
        """Let each choice begin with its prompt."""
        texts = [prompt if isinstance(prompt, str) else self._shown(prompt) for prompt in prompts]
        for index, choice in enumerate(self.choices):
            choice.prompt = texts[index // self.n]

    def _shown(self, prompt: list[int]) -> str:
        """The text of a prompt, up to a character that the answer goes on with."""
        left = unfinished(self.tokenizer, context_of(self.tokenizer, prompt))
        answered = self.requests[0].params.max_tokens > 0
        return str(self.tokenizer.decode(prompt[: len(prompt) - left] if answered else prompt))

    def add(self, index: int, delta: Delta) -> tuple[str, list[TokenLogprob]]:
        """The text and log-probabilities that the delta adds, with the prompt's before the first."""
        choice, request, text, logprobs = self.choices[index], self.requests[index], delta.text, delta.logprobs
        if choice.prompt is not None:
            text, choice.prompt = choice.prompt + text, None
            if request.params.prompt_logprobs is not None:
                logprobs = [TokenLogprob(request.prompt[0], None, ()), *request.prompt_logprobs, *logprobs]
        choice.text += text
        choice.logprobs += logprobs
        choice.finish_reason = delta.finish_reason
        return text, logprobs

    @property
    def entries(self) -> int:
        """Log-probabilities in the whole answer."""
        return sum(1 + len(entry.top) for choice in self.choices for entry in choice.logprobs)

    def entries_of(self, index: int, delta: Delta) -> int:
        """Log-probabilities in the chunks of a delta."""
        choice, request = self.choices[index], self.requests[index]
        prompt = request.prompt_logprobs if choice.prompt is not None else []
        return sum(1 + len(entry.top) for entry in (*choice.unsent, *delta.logprobs, *prompt))

    def whole(self) -> Json:
        choices = []
        for index, choice in enumerate(self.choices):
            said: Json = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            content = said if self.chat else {"text": choice.text}
            choices.append(self._choice(index, content, choice.logprobs, choice.finish_reason, 0))
        return {**self._object("chat.completion", choices), "usage": self.usage()}

    def opening(self) -> list[Json]:
        """A chat's first chunks, which name the role."""
        if not self.chat:
            return []
        return [self._chunk(i, {"role": "assistant", "content": ""}, [], None, 0) for i in range(len(self.choices))]

    def chunks(self, index: int, delta: Delta) -> list[Json]:
        """The chunk for a delta; none while there is nothing to show."""
        choice, offset = self.choices[index], len(self.choices[index].text)
        text, logprobs = self.add(index, delta)
        choice.unsent += logprobs
        if not text and delta.finish_reason is None:
            return []
        logprobs, choice.unsent = choice.unsent, []
        content = {"content": text} if self.chat and text else {} if self.chat else {"text": text}
        return [self._chunk(index, content, logprobs, delta.finish_reason, offset)]

    def usage_chunk(self) -> Json:
        return {**self._object("chat.completion.chunk", []), "usage": self.usage()}

    def usage(self) -> Json:
        prompt = sum(len(request.prompt) for request in self.requests[:: self.n])
        new = sum(len(request.generated) for request in self.requests)
        cached = sum(request.cached for request in self.requests[:: self.n])
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _object(self, chat_kind: str, choices: list[Json]) -> Json:
        kind = chat_kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, index: int, content: Json, logprobs: list[TokenLogprob], reason: str | None, offset: int) -> Json:
        content = {"delta": content} if self.chat else content
        return self._object("chat.completion.chunk", [self._choice(index, content, logprobs, reason, offset)])

    def _choice(self, index: int, content: Json, logprobs: list[TokenLogprob], reason: str | None, offset: int) -> Json:
        shown: Json | None = None
        if logprobs and self.chat:
            shown = {"content": [self._chat_logprob(entry) for entry in logprobs]}
        elif logprobs:
            shown = self._logprobs(logprobs, offset)
        return {"index": index, **content, "logprobs": shown, "finish_reason": reason}

    def _chat_logprob(self, entry: TokenLogprob) -> Json:
        return {
            **self._token(entry.token, entry.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top],
        }

    def _token(self, token: int, logprob: float | None) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _logprobs(self, entries: list[TokenLogprob], offset: int) -> Json:
        texts, offsets = [self._text(entry.token) for entry in entries], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        tops = [None if entry.logprob is None else self._tops(entry) for entry in entries]
        logprobs = [entry.logprob for entry in entries]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _tops(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, as OpenAI has it. Tokens that are parts of characters share one text: the likeliest counts."""
        result: dict[str, float] = {}
        for token, logprob in entry.top:  # the likeliest first
            result.setdefault(self._text(token), logprob)
        return result

    def _text(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = spelled(self.tokenizer, token)
        return self.texts[token]
