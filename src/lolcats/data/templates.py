"""Turn a record into the text of a document: with the chat template, Alpaca's prompt, or columns as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lolcats.config import DataConfig
from lolcats.data.conversations import HALF, Misfit, NoColumn, messages_of, tools_of
from lolcats.data.sources import Record
from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.modeling.chat import ChatTemplate, Message, is_unicode

# The prompts of the Alpaca data set (Taori et al. 2023).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
NO_INPUT = {"", "noinput", "<noinput>", "no input"}
NO_OUTPUT = {"", "nooutput", "<nooutput>", "no output"}


def record_format(record: Record, config: DataConfig, tokenizer: Any, source: str) -> str:
    """``chat``, ``alpaca``, ``completion`` or ``text``; ``auto`` chooses by the columns of the first record."""
    fits = {
        "chat": "messages" in record or "conversations" in record,
        "alpaca": "instruction" in record and "output" in record,
        "completion": "prompt" in record and "completion" in record,
        "text": config.text_column in record,
    }
    name = config.format if config.format != "auto" else next((n for n, fit in fits.items() if fit), None)
    if name is None or not fits[name]:
        raise LolcatsError(
            f"{source} has no {name or 'text'} column. Its columns are {', '.join(map(str, record))}. Expected "
            "messages or conversations (chat), instruction and output (alpaca), prompt and completion (completion), or "
            f"{config.text_column!r} (text; choose another with --set data.text_column=NAME)."
        )
    if name == "chat" and not tokenizer.chat_template:
        raise LolcatsError(f"{source} holds conversations, but this model's tokenizer has no chat template.")
    return name


def renderer(form: str, config: DataConfig, tokenizer: Any) -> Callable[[Record], str]:
    """Return the function that turns a record into text: "" for an empty one; raises Misfit for one that misfits."""
    template = ChatTemplate(tokenizer)

    def chat(record: Record) -> str:
        tools = tools_of(record, template)
        own = template.with_tools if tools else template
        messages = messages_of(record, own)
        return _conversation(messages, tools, own) if messages else ""

    def alpaca(record: Record) -> str:
        names = ("instruction", "output", *(["input"] if "input" in record else []))
        columns = {name: column(record, name) for name in names}
        if columns["output"].strip().lower() in NO_OUTPUT:
            return ""
        return alpaca_prompt(*instruction_of(record)) + columns["output"]

    def completion(record: Record) -> str:
        answer = column(record, "completion")
        return column(record, "prompt") + answer if answer.strip() else ""

    def text(record: Record) -> str:
        return column(record, config.text_column)

    return _guarded({"chat": chat, "alpaca": alpaca, "completion": completion, "text": text}[form])


def instruction_of(record: Record) -> tuple[str, str]:
    """Instruction and input of a record, the input "" if it has none."""
    instruction, more = column(record, "instruction"), column(record, "input") if "input" in record else ""
    if record["instruction"] is None:
        raise Misfit("its instruction is null")
    return instruction, "" if more.strip().lower() in NO_INPUT else more


def alpaca_prompt(instruction: str, more: str) -> str:
    """Alpaca's text up to where the output begins; ``more``: the input."""
    return (ALPACA_INPUT if more else ALPACA).format(instruction=instruction, input=more)


def _conversation(messages: list[Message], tools: list[Message] | None, template: ChatTemplate) -> str:
    """The text of a conversation; the template is code from the model and may raise anything."""
    try:
        return template.text(messages, tools)
    except Exception as error:
        if out_of_memory(error):
            raise
        number = _first_refused(messages, tools, template)
        role, reason = messages[number - 1]["role"], f"{type(error).__name__}: {first_line(error)}"
        raise Misfit(f"message {number}, role {role!r}: the chat template refuses it ({reason})") from error


def _first_refused(messages: list[Message], tools: list[Message] | None, template: ChatTemplate) -> int:
    """Number of the first message with which a conversation cannot be rendered."""
    for number in range(1, len(messages)):
        try:
            template.text(messages[:number], tools)
        except Exception:  # whatever it is, the same happened to the whole conversation
            return number
    return len(messages)


def column(record: Record, name: str) -> str:
    """A column's text; "" if it is null."""
    if name not in record:
        raise NoColumn(f"it has no column {name!r}")
    value = record[name]
    if isinstance(value, list | dict | bytes):
        raise Misfit(f"its {name} has type {type(value).__name__}, expected text")
    return "" if value is None else str(value)


def _guarded(render: Callable[[Record], str]) -> Callable[[Record], str]:
    """``render``, which raises only Misfit, also for text that is not Unicode: data may hold anything anywhere."""

    def guarded(record: Record) -> str:
        try:
            text = render(record)
        except Misfit:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise Misfit(f"{type(error).__name__}: {first_line(error)}") from error
        if not is_unicode(text):
            raise Misfit(f"it holds {HALF}")
        return text

    return guarded
