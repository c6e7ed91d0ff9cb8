"""The server as plain HTTP: what every client's answers are compared with."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "the cat sat"
MESSAGES = [{"role": "system", "content": "sing"}, {"role": "user", "content": PROMPT}]
USER = [{"role": "user", "content": PROMPT}]
TOKENS = 12
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}
KIND = ["warm", "green", "quiet"]
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"kind": {"type": "string", "enum": KIND}, "far": {"type": "boolean"}},
    "required": ["kind", "far"], "additionalProperties": False,
}  # fmt: skip
"""Few answers fit, so that even a random model soon ends one."""


@dataclass(frozen=True)
class Server:
    """A running server; ``directory`` has its model and tokenizer."""

    address: str
    directory: Path | None = None

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """(status, reply)"""
        data, headers = json.dumps({"model": "tiny", **body}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
        """The first choice of a greedy completion."""
        return self._choice("completions", prompt=prompt, **more)

    def chat(self, messages: Any = MESSAGES, **more: Any) -> dict[str, Any]:
        """The first choice of a greedy answer."""
        return self._choice("chat/completions", messages=messages, **more)

    def said(self, messages: Any = MESSAGES, **more: Any) -> str:
        return str(self.chat(messages, **more)["message"]["content"])

    def _choice(self, path: str, **body: Any) -> dict[str, Any]:
        status, reply = self.post(path, **{**GREEDY, **body})
        assert status == 200, reply
        choice: dict[str, Any] = reply["choices"][0]
        return choice


def chat_logprobs(choice: dict[str, Any]) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """(token, log-probability, the likeliest ones) of each token of an answer, from JSON."""
    return [
        (entry["token"], entry["logprob"], [(top["token"], top["logprob"]) for top in entry["top_logprobs"]])
        for entry in choice["logprobs"]["content"]
    ]
