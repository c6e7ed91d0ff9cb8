"""Prompts for ``lolcats distill-data``, from records of the formats that training data has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lolcats.data.conversations import HALF, Misfit, NoColumn, messages_of, tools_of
from lolcats.data.sources import Record
from lolcats.data.templates import alpaca_prompt, column, instruction_of
from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.modeling.chat import ChatTemplate, Message, is_unicode

COLUMNS = "messages or conversations, instruction (and input), or prompt"


@dataclass(frozen=True)
class Prompt:
    """What the teacher is asked, and the record that is written with its answer.

    Args:
        text: to be continued as it is; None for a conversation.
        messages: a conversation that the assistant's answer ends.
        columns: of the record, beside the answer; ``answer`` names the answer's column.
    """

    text: str | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Message] | None = None
    columns: Record = field(default_factory=dict)
    answer: str = "completion"

    def record(self, answer: str) -> Record:
        """The record that ``--data`` takes, with prompt and answer apart."""
        if self.text is None:
            messages = [*self.messages, {"role": "assistant", "content": answer}]
            return {"messages": messages} | ({"tools": list(self.tools)} if self.tools else {})
        record = {**self.columns, self.answer: answer}
        return record if self.answer == "output" else {**record, "text": self.text + answer}


class AnyTemplate(ChatTemplate):
    """The template of a model on a server. It cannot be seen from here, so it is assumed to know tools."""

    knows_tools = knows_tool_calls = knows_tool_messages = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def with_tools(self) -> ChatTemplate:  # type: ignore[override]
        return self

    def names(self, role: str) -> bool:
        return False


def prompt_reader(template: ChatTemplate | None) -> Callable[[Record], Prompt]:
    """Return the function that turns a record into a prompt; it raises Misfit for one that cannot be used.

    template: makes conversations of instructions and prompts; without one they are texts, Alpaca's or as they are.
    """

    def read(record: Record) -> Prompt:
        try:
            prompt = _prompt(record, template)
            sayable = is_unicode(json.dumps(prompt.record(prompt.text or ""), ensure_ascii=False))
        except Misfit:
            raise
        except Exception as error:  # data may hold anything anywhere
            if out_of_memory(error):
                raise
            raise Misfit(f"{type(error).__name__}: {first_line(error)}") from error
        if not sayable:
            raise Misfit(f"it holds {HALF}")
        return prompt

    return read


def _prompt(record: Record, template: ChatTemplate | None) -> Prompt:
    if "messages" in record or "conversations" in record:
        return _conversation(record, template)
    if "instruction" in record:
        instruction, more = instruction_of(record)
        if not instruction.strip():
            raise Misfit("its instruction is empty")
        if template:
            return _asked(f"{instruction}\n\n{more}" if more else instruction)
        columns = {"instruction": instruction} | ({"input": more} if more else {})
        return Prompt(alpaca_prompt(instruction, more), columns=columns, answer="output")
    if "prompt" not in record:
        raise NoColumn(f"its columns are {', '.join(map(str, record))}; expected {COLUMNS}")
    if isinstance(record["prompt"], list):
        return _conversation({**record, "messages": record["prompt"]}, template)
    text = column(record, "prompt")
    if not text.strip():
        raise Misfit("its prompt is empty")
    return _asked(text) if template else Prompt(text, columns={"prompt": text})


def _asked(text: str) -> Prompt:
    return Prompt(messages=[{"role": "user", "content": text}])


def _conversation(record: Record, template: ChatTemplate | None) -> Prompt:
    """A conversation up to its last answer, which is left out."""
    if template is None:
        raise LolcatsError(
            "The prompts are conversations, which need a chat template: leave out --raw, or use a model whose "
            "tokenizer has one."
        )
    tools = tools_of(record, template)
    messages = messages_of(record, template.with_tools if tools else template)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise Misfit("its conversation asks nothing")
    return Prompt(messages=messages, tools=tools)


def text_of(prompt: Prompt, template: ChatTemplate) -> str:
    """A conversation as text, up to where the answer begins.

    Raises:
        Misfit: the template refuses it.
    """
    own: Any = template.with_tools if prompt.tools else template
    try:
        return str(own.text(prompt.messages, prompt.tools, answer=True))
    except Exception as error:  # a template is code from the model: it may raise anything
        if out_of_memory(error):
            raise
        raise Misfit(f"the chat template refuses it ({type(error).__name__}: {first_line(error)})") from error
