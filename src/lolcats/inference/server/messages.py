"""Messages of a conversation: what clients send, and as much of it as the model's chat template knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from lolcats.inference.generate import plain_text
from lolcats.inference.server import fields
from lolcats.inference.server.errors import ApiError, bad_field
from lolcats.inference.server.strict import TEXT_OR_LIST, Int, Strict, Text
from lolcats.modeling.chat import ChatTemplate, arguments_of


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Function(Strict):
    name: Text
    arguments: Text | dict[str, Any] = ""


class ToolCall(Strict):
    id: Text = ""
    type: Literal["function"] = "function"
    function: Function
    index: Int = 0

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: arguments are an object there."""
        arguments = self.function.arguments
        arguments = arguments_of(arguments) if isinstance(arguments, str) else arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class ToolFunction(Strict):
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: ToolFunction

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], TEXT_OR_LIST
    ] | None = None  # fmt: skip
    name: Text | None = None
    tool_calls: list[ToolCall] = Field([])
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _possible(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: expected text; only an assistant's may be null")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only assistant messages may have them")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id: only a tool's message has one")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        result: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        result |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            result["tool_calls"] = [call.plain() for call in self.tool_calls]
        return result


def settled_message(given: Any, number: int) -> Any:
    """A message without the fields that change nothing; see :func:`.fields.settle`."""
    place = f"messages.{number}."
    message = fields.settle(given, set(Message.model_fields), fields.MESSAGE, place=place)
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    for i, part in enumerate(message["content"]):
        if isinstance(part, dict) and part.get("type") != "text":
            reason = f'expected "text", got {part.get("type")!r}; this server accepts only text.'
            raise bad_field(f"{place}content.{i}.type", reason)
    parts = [
        fields.settle(part, set(TextPart.model_fields), fields.TEXT_PART, place=f"{place}content.{i}.")
        for i, part in enumerate(message["content"])
    ]
    return {**message, "content": parts}


class Template(ChatTemplate):
    """A tokenizer's chat template for requests: what it cannot render is the client's mistake."""

    def check(self, messages: list[Message], tools: list[Tool]) -> None:
        """Refuse what the template would leave out.

        Raises:
            ApiError: tools, tool calls or tool messages that it does not know.
        """
        if tools and not self.knows_tools:
            raise bad_field("tools", "this model's chat template does not know tools.")
        known = self.with_tools if tools else self
        for i, message in enumerate(messages):
            if message.tool_calls and not known.knows_tool_calls:
                raise bad_field(f"messages.{i}.tool_calls", "this model's chat template does not know tool calls.")
            if message.role == "tool" and not known.knows_tool_messages:
                raise bad_field(f"messages.{i}.role", 'this model\'s chat template does not know the role "tool".')

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Raises:
            ApiError: the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            return plain_text(messages)
        try:
            return (self.with_tools if tools else self).text(messages, tools, answer=True)
        except Exception as error:  # whatever a template raises, it does so because of these messages
            raise ApiError(400, f"The chat template refuses these messages: {error}", "messages") from None
