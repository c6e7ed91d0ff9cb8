"""From records to packed rows of token ids, split into training, validation and test rows that share no document."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lolcats.config import DataConfig
from lolcats.errors import LolcatsError
from lolcats.training.sources import Record, read_records

# The prompts that the Alpaca data set was made with (Taori et al. 2023).
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
BATCH = 1_000  # documents tokenized at a time


class Rows(Dataset[dict[str, Tensor]]):
    """Packed rows, (N, L) int64, as transformers.Trainer wants them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@dataclass(frozen=True)
class Data:
    """Three splits of (N, L) int64 token ids, and what they were made from."""

    train: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str
    summary: dict[str, Any]


@dataclass(frozen=True)
class Documents:
    """The token ids of each document of a source, and what was read."""

    ids: list[list[int]]
    counts: dict[str, Any]


def load_data(source: str, tokenizer: Any, config: DataConfig, seed: int = 0) -> Data:
    """Read, render, tokenize, split by document and pack ``source``."""
    return split(tokenize_source(source, tokenizer, config), config, seed)


def tokenize_source(source: str, tokenizer: Any, config: DataConfig) -> Documents:
    """Documents that occur twice are used once, so no text of the held-out splits is trained on."""
    rendered, counts = _read(source, tokenizer, config)
    texts = list(dict.fromkeys(rendered))
    counts |= {"documents": len(texts), "duplicate_records": len(rendered) - len(texts)}
    return Documents(_tokenize(texts, tokenizer, counts["format"]), counts)


def split(documents: Documents, config: DataConfig, seed: int) -> Data:
    """Shuffle the documents, split by document and pack."""
    shuffled = list(documents.ids)
    random.Random(seed).shuffle(shuffled)
    splits = _split(shuffled, config, documents.counts["source"])
    digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in splits))
    summary = {
        **asdict(config),
        **documents.counts,
        **{f"{n}_rows": len(r) for n, r in zip(("train", "validation", "test"), splits, strict=True)},
    }
    return Data(*splits, fingerprint="sha256 " + digest.hexdigest(), summary=summary)


def load_rows(source: str, tokenizer: Any, config: DataConfig) -> Tensor:
    """(N, L) rows of everything in ``source``, in order: a data set used for evaluation alone."""
    texts, counts = _read(source, tokenizer, config)
    rows = _pack(_tokenize(texts, tokenizer, counts["format"]), config.sequence_length)
    if not len(rows):
        raise LolcatsError(f"{source} has fewer tokens than one row of {config.sequence_length}.")
    return rows


def _read(source: str, tokenizer: Any, config: DataConfig) -> tuple[list[str], dict[str, Any]]:
    """The texts of all records that have any, and what was read."""
    records, broken = read_records(source, config)
    render = _renderer(records[0], config, tokenizer, source)
    rendered = [_rendered(render, record, number, source) for number, record in enumerate(records, 1)]
    texts = [text for text in rendered if text]
    if not texts:
        raise LolcatsError(f"{source}: every record is empty.")
    empty = len(rendered) - len(texts)
    return texts, {
        "source": source,
        "format": render.__name__,
        "empty_records": empty,
        "broken_lines_skipped": broken,
    }


def _renderer(record: Record, config: DataConfig, tokenizer: Any, source: str) -> Callable[[Record], str]:
    """The function that turns a record into text; ``auto`` decides by the first record's columns."""

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

    fits = {
        "chat": "messages" in record or "conversations" in record,
        "alpaca": "instruction" in record and "output" in record,
        "text": config.text_column in record,
    }
    name = config.format if config.format != "auto" else next((n for n, fit in fits.items() if fit), None)
    if name is None or not fits[name]:
        raise LolcatsError(
            f"{source}: no text column. Its columns are {', '.join(record)}; expected messages or conversations "
            f"(chat), instruction and output (alpaca), or {config.text_column!r} (text; choose another with "
            "--set data.text_column=NAME)."
        )
    if name == "chat" and not tokenizer.chat_template:
        raise LolcatsError(f"{source} holds conversations, but this model's tokenizer has no chat template.")
    return {"chat": chat, "alpaca": alpaca, "text": text}[name]


def _rendered(render: Callable[[Record], str], record: Record, number: int, source: str) -> str:
    try:
        return render(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LolcatsError(
            f"{source}: record {number} does not fit the {render.__name__} format ({type(error).__name__}: {error})."
        ) from None


def _tokenize(texts: list[str], tokenizer: Any, form: str) -> list[list[int]]:
    """Token ids of each document; chat templates bring their own special tokens, other text ends with EOS."""
    chat = form == "chat"
    end = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batches = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
    encoded = (tokenizer(batch, add_special_tokens=not chat, verbose=False)["input_ids"] for batch in batches)
    return [ids + end for ids in chain.from_iterable(encoded)]


def _split(documents: list[list[int]], config: DataConfig, source: str) -> tuple[Tensor, Tensor, Tensor]:
    """Test rows from the first documents, validation rows from the next, training rows from all others."""
    length, position, splits = config.sequence_length, 0, []
    total = sum(map(len, documents))
    for wanted in (config.test_rows, config.validation_rows):
        first, tokens = position, 0
        while tokens < wanted * length and position < len(documents):
            tokens += len(documents[position])
            position += 1
        splits.append(_pack(documents[first:position], length)[:wanted])
    train = _pack(documents[position:], length)
    if len(splits[0]) < config.test_rows or len(splits[1]) < config.validation_rows or not len(train):
        raise LolcatsError(
            f"{source} has {total} tokens, too few: validation ({config.validation_rows} rows) and test "
            f"({config.test_rows}) of {length} tokens leave nothing to train on. Use more data, shorter rows "
            "(data.sequence_length) or smaller splits (data.validation_rows, data.test_rows)."
        )
    return train, splits[1], splits[0]


def _pack(documents: list[list[int]], length: int) -> Tensor:
    """(N, length): the documents one after another; what does not fill a row is dropped."""
    ids = torch.tensor(list(chain.from_iterable(documents)), dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)
