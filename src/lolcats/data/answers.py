"""Which part of a document is an answer to a prompt: the output of an instruction, the assistant's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lolcats.config import DataConfig
from lolcats.data.conversations import Misfit, messages_of, tools_of
from lolcats.data.sources import Record
from lolcats.errors import LolcatsError, out_of_memory
from lolcats.modeling.chat import ChatTemplate, Message

Spans = list[tuple[int, int]]
"""Where the answers of a text begin and end, in characters."""


def check_answers(form: str, config: DataConfig, tokenizer: Any, source: str) -> None:
    """Raise LolcatsError if ``data.loss`` asks for completions where they cannot be told from prompts."""
    if config.loss == "all":
        return
    if form == "text":
        raise LolcatsError(
            f"data.loss=completion needs prompts, but {source} is read as plain text. Use conversations, "
            "instructions or prompts with completions, or data.loss=all (in a file that mixes sources, loss: all for "
            "this one)."
        )
    if not tokenizer.is_fast:
        raise LolcatsError("data.loss=completion needs a fast tokenizer (tokenizer.json), which says where tokens lie.")


def answer_finder(form: str, config: DataConfig, tokenizer: Any) -> Callable[[Record, str], Spans] | None:
    """Return the function that finds the answers in the text of a record; None if ``data.loss`` is ``all``."""
    if config.loss == "all":
        return None
    template = ChatTemplate(tokenizer)

    def chat(record: Record, text: str) -> Spans:
        tools = tools_of(record, template)
        own = template.with_tools if tools else template
        return _in_conversation(text, messages_of(record, own), tools, own)

    def alpaca(record: Record, text: str) -> Spans:
        return [(len(text) - len(str(record["output"])), len(text))]

    def completion(record: Record, text: str) -> Spans:
        return [(len(text) - len(str(record["completion"])), len(text))]

    return {"chat": chat, "alpaca": alpaca, "completion": completion}[form]


def _in_conversation(
    text: str, messages: Sequence[Message], tools: Sequence[Message] | None, template: ChatTemplate
) -> Spans:
    """The assistant's messages, each from the end of the prompt for it to the end of its turn.

    An answer that is written otherwise once the conversation goes on (Qwen3 drops its thoughts) is not what a model
    would say at that place, and is left out.

    Raises:
        Misfit: no answer can be told from its prompt.
    """
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans: Spans = []
    for i in numbers:
        prompt = _length(text, messages[:i], tools, template, answer=True)
        start = _length(text, messages[:i], tools, template) if prompt is None else prompt
        stop = len(text) if i + 1 == len(messages) else _length(text, messages[: i + 1], tools, template)
        if start is not None and stop is not None and start < stop:
            spans.append((start, stop))
    if numbers and not spans:
        raise Misfit("the chat template does not show where its answers begin, as data.loss=completion needs")
    return spans


def _length(
    text: str, messages: Sequence[Message], tools: Sequence[Message] | None, template: ChatTemplate,
    answer: bool = False,
) -> int | None:  # fmt: skip
    """The length of the first messages as ``text`` begins with them; None if it does not, or the template refuses."""
    try:
        begun = template.text(messages, tools, answer)
    except Exception as error:  # a template is code from the model: it may raise anything
        if out_of_memory(error):
            raise
        return None
    return len(begun) if text.startswith(begun) else None


def hide_prompts(ids: Sequence[int], offsets: Sequence[tuple[int, int]], answers: Spans) -> list[int]:
    """Token ids, each that holds no character of an answer as ~id (−1 − id). A token without characters goes with the
    one before it.

    offsets: where each token begins and ends in the text, in characters.
    """
    begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(begin), bool)
    for start, stop in answers:
        inside |= (end > start) & (begin < stop)
    places = np.arange(len(begin))
    before = np.maximum.accumulate(np.where(begin < end, places, 0))
    inside = inside[before]
    hidden: list[int] = np.where(inside, ids, ~np.asarray(ids, np.int64)).tolist()
    return hidden
