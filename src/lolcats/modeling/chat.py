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
    know without an error.

    tools: what is found out holds for conversations with tools, for which some tokenizers have a template of their own.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Message] | None = None) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self._roles: dict[str, bool] = {}

    def text(self, messages: Sequence[Message], tools: Sequence[Message] | None = None, answer: bool = False) -> str:
        """The text of a conversation, with ``answer`` up to where the assistant's answer begins. Raises whatever the
        template raises.

        The arguments of tool calls are objects, which become JSON for templates that take text.
        """
        if self._takes_json and any(message.get("tool_calls") for message in messages):
            messages = [_with_json(message) for message in messages]
        return self._text(messages, tools, answer)

    @cached_property
    def with_tools(self) -> ChatTemplate:
        """What the template knows if a conversation has tools."""
        return ChatTemplate(self.tokenizer, [_tool("f")])

    @cached_property
    def knows_tools(self) -> bool:
        return self._shows([USER], [_tool(MARK)])

    @cached_property
    def knows_tool_calls(self) -> bool:
        return self._shows_calls(_called(MARK)) or self._takes_json

    @cached_property
    def knows_tool_messages(self) -> bool:
        calls = _with_json(_called("f")) if self._takes_json else _called("f")
        return self._shows([USER, *([calls] if self.knows_tool_calls else []), _answered(MARK)])

    @cached_property
    def _takes_json(self) -> bool:
        """Whether the template shows tool calls only if their arguments are JSON text."""
        return not self._shows_calls(_called(MARK)) and self._shows_calls(_with_json(_called(MARK)))

    def _shows_calls(self, message: Message) -> bool:
        """Whether calls are shown where a conversation ends with them, or where a tool has answered."""
        return self._shows([USER, message]) or self._shows([USER, message, _answered("a")])

    def names(self, role: str) -> bool:
        """Whether the template names ``role`` in its code, and shows the content of messages that have it."""
        if role not in self._roles:
            message = {"role": role, "content": MARK}
            places = ([message, USER], [USER, message], [USER, _called("f"), message])
            quoted = any(f"{quote}{role}{quote}" in self._source for quote in "'\"")
            self._roles[role] = quoted and any(map(self._shows, places))
        return self._roles[role]

    @cached_property
    def _source(self) -> str:
        """The template's code; of all templates if the tokenizer has several."""
        source = self.tokenizer.chat_template or ""
        return "\n".join(map(str, source.values())) if isinstance(source, dict) else str(source)

    def _shows(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> bool:
        if not self.tokenizer.chat_template:
            return False
        try:
            return MARK in self._text(messages, tools or self.tools, answer=True)
        except Exception as error:  # a template is code from the model: it may raise anything
            if out_of_memory(error):
                raise
            return False

    def _text(self, messages: Sequence[Message], tools: Sequence[Message] | None, answer: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=answer, tokenize=False
            )
        )


def _tool(name: str) -> Message:
    function = {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def _called(name: str) -> Message:
    """An assistant's message that calls a function."""
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {name: name}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _answered(content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": "call00001", "name": "f"}


def _with_json(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message


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
