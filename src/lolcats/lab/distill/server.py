"""A teacher on a server with OpenAI's API, such as vLLM or lolcats serve."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from lolcats.errors import LolcatsError, first_line
from lolcats.lab.distill.prompts import Prompt
from lolcats.lab.distill.teacher import Answer, Numbered, Sampling
from lolcats.modeling.chat import Message

TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 1.0, 30.0
REFUSED = (400, 413, 422)
"""Statuses of a prompt that the server does not take; other prompts may pass."""
BUSY = (408, 409, 429)
SECONDS = 3600
"""That one answer may take."""


class Refused(Exception):
    """The server does not take this prompt."""


class ServedTeacher:
    """Asks a server, several prompts at once. Conversations go to its chat template, texts are continued.

    Args:
        address: up to where ``/chat/completions`` follows, usually ending in ``/v1``.
        model: its name on the server.
        parallel: requests at a time.
    """

    def __init__(self, address: str, model: str, sampling: Sampling, parallel: int, api_key: str = "") -> None:
        if not address.startswith(("http://", "https://")):
            raise LolcatsError(f"--server {address}: expected an address such as http://localhost:8000/v1.")
        self.address, self.model, self.sampling, self.parallel = address.rstrip("/"), model, sampling, parallel
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def answers(self, prompts: Sequence[Numbered]) -> Iterator[tuple[int, Answer]]:
        """
        Raises:
            LolcatsError: the server does not answer, or not as OpenAI's API does.
        """
        asked, answered = SimpleQueue[Numbered](), SimpleQueue[tuple[int, Answer | Exception]]()
        for one in prompts:
            asked.put(one)
        for _ in range(min(self.parallel, len(prompts))):  # daemons, so that Ctrl-C does not wait for answers
            threading.Thread(target=self._work, args=(asked, answered), daemon=True).start()
        try:
            for _ in prompts:
                number, answer = answered.get()
                if isinstance(answer, Exception):
                    raise answer
                yield number, answer
        finally:
            with suppress(Empty):
                while True:
                    asked.get_nowait()

    def _work(self, asked: SimpleQueue[Numbered], answered: SimpleQueue[tuple[int, Answer | Exception]]) -> None:
        with suppress(Empty):
            while True:
                number, prompt = asked.get_nowait()
                try:
                    answered.put((number, self._answer(number, prompt)))
                except Exception as error:
                    answered.put((number, error))

    def _answer(self, number: int, prompt: Prompt) -> Answer:
        asked = self.sampling
        body: dict[str, Any] = {"model": self.model, "max_tokens": asked.max_tokens, "temperature": asked.temperature}
        if asked.temperature:
            body |= {"top_p": asked.top_p, "seed": asked.seed_of(number)}
        if prompt.text is None:
            path, body["messages"] = "chat/completions", [_with_json(message) for message in prompt.messages]
            body |= {"tools": list(prompt.tools), "tool_choice": "none"} if prompt.tools else {}
        else:
            path, body["prompt"] = "completions", prompt.text
        try:
            return _read(self._post(path, body), prompt)
        except Refused as error:
            return Answer(reason=f"refused by the server: {error}")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's reply, waited for where it has no room."""
        request = urllib.request.Request(f"{self.address}/{path}", json.dumps(body).encode(), self.headers)
        for attempt in range(TRIES):
            pause = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"{error.code}: {_said(error)}"
                if error.code in REFUSED:
                    raise Refused(problem) from None
                if error.code not in BUSY and error.code < 500:
                    raise LolcatsError(f"The server at {self.address} answers {problem}") from None
                pause = _asked_to_wait(error) or pause
            except (OSError, ValueError, http.client.HTTPException) as error:  # not reached, or not JSON
                problem = (
                    first_line(getattr(error, "reason", None) or error) if isinstance(error, OSError) else repr(error)
                )
            if attempt + 1 < TRIES:
                time.sleep(pause)
        raise LolcatsError(
            f"The server at {self.address} did not answer in {TRIES} tries ({problem}). Answers so far are saved: "
            "run the same command again to continue."
        )


def _read(reply: Any, prompt: Prompt) -> Answer:
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["text"] if prompt.text is not None else choice["message"]["content"]
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise LolcatsError(f"The server's reply is not one of OpenAI's API: {str(reply)[:200]}") from None
    if reason not in ("stop", "length"):
        return Answer(reason=f"ended by the server with {reason!r}")
    prompt_tokens, tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text or "", reason == "length", prompt_tokens, tokens)


def _said(error: urllib.error.HTTPError) -> str:
    """The message of an error, as OpenAI's servers and others send it."""
    body = error.read().decode(errors="replace")
    try:
        found = json.loads(body)
        body = found.get("error", found).get("message", body)
    except (ValueError, AttributeError):
        pass
    return (body.strip() or str(error.reason)).splitlines()[0][:500]


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
    """Seconds of ``Retry-After``; 0 if it is missing or a date."""
    try:
        return min(LONGEST_WAIT, float(error.headers.get("Retry-After") or 0))
    except ValueError:
        return 0.0


def _with_json(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON text, as OpenAI's API wants them."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments") or {})}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message
