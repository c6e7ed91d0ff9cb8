"""A tokenizer's chat template, and what it knows besides plain messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lolcats.errors import out_of_memory

Message = dict[str, Any]

MARK = "qzx7kjw"
"""A name or text that no template has: if it is in what a template makes, the template knows where it came from."""
USER: Message = {"role": "user", "content": "a"}


class ChatTemplate:
    """A tokenizer's chat template. What it knows is found out by rendering: many templates leave out what they do not
    know without an error."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._roles: dict[str, bool] = {}

    def text(self, messages: Sequence[Message], tools: Sequence[Message] | None = None, answer: bool = False) -> str:
        """The text of a conversation, with ``answer`` up to where the assistant's answer begins. Raises whatever the
        template raises."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=answer, tokenize=False
            )
        )

    @cached_property
    def knows_tools(self) -> bool:
        function = {"name": MARK, "description": "", "parameters": {"type": "object", "properties": {}}}
        return self._shows([USER], [{"type": "function", "function": function}])

    @cached_property
    def knows_tool_calls(self) -> bool:
        return self._shows([USER, called(MARK)])

    @cached_property
    def knows_tool_messages(self) -> bool:
        answer = {"role": "tool", "content": MARK, "tool_call_id": "call00001", "name": "f"}
        return self._shows([USER, *([called("f")] if self.knows_tool_calls else []), answer])

    def names(self, role: str) -> bool:
        """Whether the template names ``role`` in its code, and shows the content of messages that have it."""
        if role not in self._roles:
            message = {"role": role, "content": MARK}
            places = ([message, USER], [USER, message], [USER, called("f"), message])
            quoted = any(f"{quote}{role}{quote}" in self._source for quote in "'\"")
            self._roles[role] = quoted and any(map(self._shows, places))
        return self._roles[role]

    @cached_property
    def _source(self) -> str:
        """The template's code; of all templates if the tokenizer has several."""
        source = self.tokenizer.chat_template or ""
        return "\n".join(map(str, source.values())) if isinstance(source, dict) else str(source)

    def takes(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> bool:
        """Whether the template renders a conversation without an error."""
        return self._tried(messages, tools) is not None

    def _shows(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> bool:
        return bool(self.tokenizer.chat_template) and MARK in (self._tried(messages, tools, answer=True) or "")

    def _tried(self, messages: Sequence[Message], tools: Sequence[Message] | None, answer: bool = False) -> str | None:
        try:
            return self.text(messages, tools, answer)
        except Exception as error:  # a template is code from the model: it may raise anything
            if out_of_memory(error):
                raise
            return None


def called(name: str) -> Message:
    """An assistant's message that calls a function."""
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def arguments_of(text: str) -> Any:
    """The arguments of a tool call as chat templates take them: an object, or the text if it is not JSON."""
    try:
        arguments = json.loads(text or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # not JSON, or not Unicode
        return text
    return arguments


def is_unicode(text: str) -> bool:
    """Whether ``text`` is Unicode. JSON can escape halves of surrogate pairs, which are not, and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
