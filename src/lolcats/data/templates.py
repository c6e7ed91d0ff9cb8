"""Turn a record into the text of a document: with the chat template, Alpaca's prompt, or one column as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lolcats.config import DataConfig
from lolcats.data.sources import Record
from lolcats.errors import LolcatsError

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
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def record_format(record: Record, config: DataConfig, tokenizer: Any, source: str) -> str:
    """``chat``, ``alpaca`` or ``text``; ``auto`` chooses by the columns of the source's first record."""
    fits = {
        "chat": "messages" in record or "conversations" in record,
        "alpaca": "instruction" in record and "output" in record,
        "text": config.text_column in record,
    }
    name = config.format if config.format != "auto" else next((n for n, fit in fits.items() if fit), None)
    if name is None or not fits[name]:
        raise LolcatsError(
            f"{source} has no {name or 'text'} column. Its columns are {', '.join(map(str, record))}. Expected "
            f"messages or conversations (chat), instruction and output (alpaca), or {config.text_column!r} (text; "
            "choose another with --set data.text_column=NAME)."
        )
    if name == "chat" and not tokenizer.chat_template:
        raise LolcatsError(f"{source} holds conversations, but this model's tokenizer has no chat template.")
    return name


def renderer(form: str, config: DataConfig, tokenizer: Any) -> Callable[[Record], str]:
    """Return the function that turns a record into text: "" for an empty record, an exception for one that misfits."""

    def chat(record: Record) -> str:
        turns = record.get("messages") or record.get("conversations") or []
        messages = [
            {"role": ROLES[t.get("role", t.get("from"))], "content": t.get("content", t.get("value"))} for t in turns
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False)) if messages else ""

    def alpaca(record: Record) -> str:
        if record["output"].strip().lower() in NO_OUTPUT:
            return ""
        has_input = (record.get("input") or "").strip().lower() not in NO_INPUT
        return (ALPACA_INPUT if has_input else ALPACA).format_map(record) + record["output"]

    def text(record: Record) -> str:
        return str(record[config.text_column] or "")

    return {"chat": chat, "alpaca": alpaca, "text": text}[form]
