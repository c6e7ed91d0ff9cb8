"""From a record to messages and tools as chat templates take them: the conversations of OpenAI, ShareGPT and others."""

from __future__ import annotations

import json
from typing import Any

from lolcats.data.sources import Record
from lolcats.modeling.chat import ChatTemplate, Message, arguments_of, is_unicode

ALIASES = {"human": "user", "gpt": "assistant", "function_call": "assistant"}
PLAIN = ("system", "user", "assistant")
CLOSEST = {"developer": "system", "function": "tool", "observation": "tool"}
"""Roles that become another unless the chat template names them."""
OWN = ("role", "from", "content", "value", "tool_calls", "function_call")
"""Fields of a turn that are read here; the template gets all others as they are."""
HALF = "half a surrogate pair, which is not Unicode text"


class Misfit(ValueError):
    """A record that does not fit the format of its source. The message says why. ``data.skip_broken`` skips it."""

    advice = " Fix it, or skip such records with --set data.skip_broken=true."


class NoColumn(Misfit):
    """A record without the columns of the format, which is then probably the wrong one. Nothing skips it."""

    advice = ""


def messages_of(record: Record, template: ChatTemplate) -> list[Message]:
    """The messages of a record, empty if its conversation is.

    Raises:
        Misfit: a message cannot be rendered; names its number and role.
    """
    column = next((name for name in ("messages", "conversations") if record.get(name) is not None), None)
    if column is None:
        if "messages" in record or "conversations" in record:
            return []
        raise NoColumn("it has neither messages nor conversations")
    turns = record[column]
    if not isinstance(turns, list):
        raise Misfit(f"its {column} have type {type(turns).__name__}, expected a list")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        messages.append(_message(turn, number, messages, template))
    return _with_system(messages, record.get("system"))


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """Messages after that of a ShareGPT record's ``system`` column, unless they begin with one of their own."""
    if not (messages and system) or messages[0]["role"] == "system":
        return messages
    try:
        return [{"role": "system", "content": _text(system, empty=False)}, *messages]
    except Misfit as error:
        raise Misfit(f"its system column: {error}") from None


def tools_of(record: Record, template: ChatTemplate) -> list[Message] | None:
    """The tools that a record's conversation may use; None if it lists none or the template does not take tools."""
    tools = record.get("tools")
    if not tools or not template.knows_tools:
        return None
    tools = [_parsed(tool) for tool in _listed(_parsed(tools))]
    if not all(isinstance(tool, dict) and ("function" in tool or "name" in tool) for tool in tools):
        raise Misfit("its tools are not functions with names")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _message(turn: Any, number: int, before: list[Message], template: ChatTemplate) -> Message:
    """The message of a turn. Calls of ShareGPT have no ids, which some templates need: they get some."""
    if not isinstance(turn, dict):
        raise Misfit(f"message {number} has type {type(turn).__name__}, expected an object with role and content")
    name = _first(turn, "role", "from")
    if not isinstance(name, str):
        raise Misfit(f"message {number} has no role" if name is None else f"the role of message {number} is not text")
    try:
        role = _role(name, template)
        content, calls = _first(turn, "content", "value"), _calls(turn)
        if name == "function_call":
            content, calls = None, [{**call, "id": _id(i, before)} for i, call in enumerate(_calls_in(content))]
        if calls and not template.knows_tool_calls:
            raise Misfit("the chat template does not know tool calls")
        others = {key: value for key, value in _known(turn).items() if key not in OWN}
        if name == "observation" and role == "tool" and (waiting := _unanswered(before)):
            others.setdefault("tool_call_id", waiting[0])
        message = {"role": role, "content": _text(content, empty=bool(calls)), **others}
        return message | ({"tool_calls": calls} if calls else {})
    except Misfit as error:
        raise Misfit(f"message {number}, role {name!r}: {error}") from None


def _role(name: str, template: ChatTemplate) -> str:
    """The role as the template knows it."""
    role = ALIASES.get(name, name)
    if role in PLAIN or template.names(role):
        return role
    role = CLOSEST.get(role, role)
    if role in PLAIN or (role == "tool" and template.knows_tool_messages):
        return role
    raise Misfit("the chat template does not know this role")


def _text(content: Any, empty: bool) -> str:
    """The text of a message. ``empty``: it may have none."""
    if content is None or content == []:
        if empty:
            return ""
        raise Misfit("it has no content")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise Misfit(f"its content has type {type(content).__name__}, expected text or a list of text parts")
    if not is_unicode(content):
        raise Misfit(f"its content holds {HALF}")
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise Misfit(f"its content has a part of type {kind!r}; only text can be used")
    return str(part["text"])


def _calls(turn: Record) -> list[Message]:
    """The tool calls of a message: OpenAI's, or the one call of its older ``function_call``."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Misfit(f"its tool_calls have type {type(calls).__name__}, expected a list")
    older = turn.get("function_call")
    return [_call(call) for call in (*calls, *([older] if older else []))]


def _id(place: int, before: list[Message]) -> str:
    """An id of nine letters and digits, as Mistral's templates want them."""
    return f"call{place + sum(len(message.get('tool_calls', ())) for message in before):05d}"


def _unanswered(before: list[Message]) -> list[str]:
    """Ids of the calls that no tool has answered."""
    answered = {message.get("tool_call_id") for message in before}
    calls = [call for message in before for call in message.get("tool_calls", ())]
    return [call["id"] for call in calls if call.get("id", None) not in answered | {None}]


def _calls_in(value: Any) -> list[Message]:
    """The calls that ShareGPT's role ``function_call`` has as its text: one as JSON, or a list of them."""
    return [_call(call) for call in _listed(_parsed(value))]


def _call(call: Any) -> Message:
    """One call, with arguments as an object, and in OpenAI's form if it is only a name with arguments."""
    call = _parsed(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Misfit("a tool call is not a function with a name and arguments")
    arguments = function.get("arguments")
    arguments = arguments_of(arguments) if isinstance(arguments, str) else arguments or {}
    around = {} if function is call else _known(call)
    return {"type": "function", **around, "function": {**_known(function), "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """A value that may be written as JSON, as columns of Parquet files often are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first(turn: Record, *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _known(fields: Record) -> Record:
    """The fields that do not hold null, which templates would take as being there."""
    return {name: value for name, value in fields.items() if value is not None}
