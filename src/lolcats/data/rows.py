"""Pack documents into rows of token ids. Training, validation and test rows share no document."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lolcats.config import DataConfig, load_config
from lolcats.data.mixture import is_mixture, read_mixture
from lolcats.data.store import Array, TokenStore, first_occurrences, open_source
from lolcats.errors import LolcatsError

Item = dict[str, Tensor]

HELD_OUT = DataConfig.test_rows
"""The default number of test rows, and of validation rows; smaller for little data."""


@dataclass(frozen=True)
class Corpus:
    """The documents of one or several sources; each is the token ids [begin, begin + length) of the store ``which``.

    ``shares``: fraction of the tokens that each store contributes to a mixture.
    """

    stores: tuple[TokenStore, ...]
    which: Array
    begin: Array
    length: Array
    counts: dict[str, Any]
    shares: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.length)

    @property
    def in_memory(self) -> bool:
        return all(isinstance(store.ids, np.ndarray) for store in self.stores)

    @property
    def only_answers(self) -> bool:
        """Whether only some tokens are to be predicted: those of prompts have ~id instead of id."""
        return any(store.only_answers for store in self.stores)

    def read(self, number: int, start: int, stop: int) -> Array:
        """Token ids [start, stop) of a document, ~id for tokens that are not to be predicted."""
        store = self.stores[self.which[number]]
        return store.read(int(self.begin[number]) + start, stop - start)


class PackedRows(Dataset[Item]):
    """Documents packed into rows of L tokens. Rows are assembled when accessed; an incomplete last row is dropped.

    Args:
        order: indices of the documents, in the order to pack them.
        positions: also return position_ids, which restart at 0 for each document (and each row).
        rows: indices of the rows to keep (default: all).
    """

    def __init__(
        self, documents: Corpus, order: Array, length: int, positions: bool = False, rows: Array | None = None
    ) -> None:  # fmt: skip
        self.documents, self.order, self.length, self.positions = documents, order, length, positions
        self.ends = np.cumsum(documents.length[order], dtype=np.int64)
        self.rows = np.arange((self.ends[-1] if len(order) else 0) // length) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        ids, positions = self.row(int(self.rows[index]))
        item = {"input_ids": ids, "labels": ids}
        if self.documents.only_answers:
            item = {"input_ids": _ids(ids), "labels": _labels(ids, positions if self.positions else None)}
        return item | {"position_ids": positions} if self.positions else item

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Token ids as :meth:`Corpus.read` has them and positions of a row, (L,) int64 each."""
        place, end = number * self.length, (number + 1) * self.length
        parts, positions = [], []
        at = int(np.searchsorted(self.ends, place, side="right"))
        while place < end:
            document = int(self.order[at])
            first = int(self.ends[at]) - int(self.documents.length[document])
            stop = min(int(self.ends[at]), end)
            parts.append(self.documents.read(document, place - first, stop - first))
            positions.append(np.arange(stop - place))
            place, at = stop, at + 1
        ids, places = (torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (parts, positions))
        return ids, places

    def whole(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Load the first ``count`` rows (default: all) as :meth:`row` has them into memory, (N, L) int64 each."""
        rows = self.rows[:count]
        tokens = (int(rows.max()) + 1) * self.length if len(rows) else 0
        order = self.order[: int(np.searchsorted(self.ends, tokens)) + 1]
        lengths = self.documents.length[order]
        parts = [self.documents.read(number, 0, length) for number, length in zip(order, lengths, strict=True)]
        ids = np.concatenate([np.empty(0, np.int32), *parts])[:tokens].astype(np.int64).reshape(-1, self.length)
        begins = np.repeat(self.ends[: len(order)] - lengths, lengths)[:tokens].reshape(-1, self.length)
        places = np.arange(tokens).reshape(-1, self.length)
        positions = places - np.maximum(begins, places[:, :1])
        return torch.from_numpy(ids[rows]), torch.from_numpy(positions[rows])

    def pieces(self) -> Array:
        """Lengths of the pieces that rows and documents cut each other into, of the rows that are here."""
        edges = np.arange(0, (int(self.rows.max()) + 2) * self.length, self.length) if len(self.rows) else np.arange(1)
        cuts = np.union1d(edges, self.ends[self.ends < edges[-1]])
        return np.diff(cuts)[np.isin(cuts[:-1] // self.length, self.rows)]

    def select(self, chosen: Array) -> PackedRows:
        """The rows at the given indices."""
        return PackedRows(self.documents, self.order, self.length, self.positions, self.rows[chosen])


class Rows(Dataset[Item]):
    """Packed rows in memory, (N, L) int64, as a data set for transformers.Trainer; ``positions`` as in PackedRows.

    labels: the ids, −100 where a token is not to be predicted; None: all are.
    """

    def __init__(self, rows: Tensor, positions: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.rows, self.positions, self.labels = rows, positions, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        labels = self.rows if self.labels is None else self.labels
        item = {"input_ids": self.rows[index], "labels": labels[index]}
        return item if self.positions is None else item | {"position_ids": self.positions[index]}


@dataclass(frozen=True)
class Data:
    """Three splits of (N, L) int64 token ids, and a summary of where they come from.

    The ``train`` split of a large source is read from its file during training. With ``data.reset_at_documents``,
    ``positions`` holds (N, L) position ids for each split that is in memory, and with ``data.loss: completion``,
    ``labels`` the (N, L) ids to predict, −100 for others.
    """

    train: Tensor | PackedRows
    validation: Tensor
    test: Tensor
    fingerprint: str
    summary: dict[str, Any]
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    def dataset(self, split: str) -> Dataset[Item]:
        """A split as a data set for transformers.Trainer."""
        rows = getattr(self, split)
        return rows if isinstance(rows, PackedRows) else Rows(rows, self.positions.get(split), self.labels.get(split))

    def select(self, kept: Tensor) -> Data:
        """The same data with only the training rows at indices ``kept``."""
        if isinstance(self.train, PackedRows):
            return replace(self, train=self.train.select(kept.numpy()))
        positions, labels = (
            {name: x[kept] if name == "train" else x for name, x in known.items()}
            for known in (self.positions, self.labels)
        )
        return replace(self, train=self.train[kept], positions=positions, labels=labels)

    def share_before(self, position: int) -> float:
        """Share of the training tokens before ``position`` in their sequence: their row, or their document if documents
        are kept apart."""
        rows = self.train
        if "train" in self.positions:
            return float((self.positions["train"] < position).double().mean())
        if isinstance(rows, PackedRows) and rows.positions:
            pieces = rows.pieces()
            return float(np.minimum(pieces, position).sum() / pieces.sum())
        return min(position / self.summary["sequence_length"], 1.0)

    def batches(self, numbers: Sequence[int], size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Token ids and position ids of the training rows at indices ``numbers``, ``size`` rows at a time."""
        rows = self.dataset("train")
        for start in range(0, len(numbers), size):
            items = [rows[number] for number in numbers[start : start + size]]
            positions = [item["position_ids"] for item in items if "position_ids" in item]
            yield torch.stack([item["input_ids"] for item in items]), torch.stack(positions) if positions else None


def load_data(source: str, tokenizer: Any, config: DataConfig, seed: int = 0) -> Data:
    """Read, render, tokenize, split by document and pack ``source``.

    Args:
        source: hub data set id; .json, .jsonl, .parquet or .txt file; or .yaml file that mixes several sources.

    Raises:
        LolcatsError: the source does not exist, has broken or unknown records, or has too few tokens.
    """
    return split(tokenize_source(source, tokenizer, config), config, seed)


def tokenize_source(source: str, tokenizer: Any, config: DataConfig, unique: bool = True) -> Corpus:
    """Tokenize the documents of a file, a hub data set or a mixture of them.

    ``unique``: drop documents that occurred before, so that no held-out text is trained on.
    """
    if not is_mixture(source):
        return _table([open_source(source, tokenizer, config)], unique)
    parts = read_mixture(source, config)
    stores = [open_source(part.source, tokenizer, part.config) for part in parts]
    table = _table(stores, unique, tuple(part.share for part in parts))
    counts: dict[str, Any] = {"source": source, "format": ", ".join(store.counts["format"] for store in stores)}
    for name in ("empty_records", "broken_lines_skipped", "misfit_records_skipped"):
        counts[name] = sum(store.counts[name] for store in stores)
    records = sum(len(store.lengths) for store in stores)
    counts |= {"documents": len(table), "duplicate_records": records - len(table) if unique else 0}
    return replace(table, counts=counts)


def _table(stores: list[TokenStore], unique: bool, shares: tuple[float, ...] = ()) -> Corpus:
    """All documents of ``stores``, in order."""
    chosen = [store.first if unique else np.arange(len(store.lengths)) for store in stores]
    which = np.repeat(np.arange(len(stores), dtype=np.int16), [len(x) for x in chosen])
    begin, length = (
        np.concatenate([getattr(store, name)[x] for store, x in zip(stores, chosen, strict=True)])
        for name in ("starts", "lengths")
    )
    if unique and len(stores) > 1:
        kept = first_occurrences(np.concatenate([s.hashes[x] for s, x in zip(stores, chosen, strict=True)]))
        which, begin, length = which[kept], begin[kept], length[kept]
    return Corpus(tuple(stores), which, begin, length, stores[0].counts, shares)


def split(documents: Corpus, config: DataConfig, seed: int) -> Data:
    """Shuffle the documents, trim a mixture to its shares, split by document and pack."""
    order = _shuffled(documents, seed)
    length, place, reset = config.sequence_length, 0, config.reset_at_documents
    held_out = []
    for count, stop in _held_out(documents, order, config):
        held_out.append(PackedRows(documents, order[place:stop], length, reset).whole(count))
        place = stop
    (test, test_positions), (validation, validation_positions) = held_out
    train: Tensor | PackedRows = PackedRows(documents, order[place:], length, reset)
    positions = {"validation": validation_positions, "test": test_positions}
    if documents.in_memory and isinstance(train, PackedRows):
        train, positions["train"] = train.whole()
    digest = hashlib.sha256(_identity(documents, train, seed))
    for rows in (validation, test):
        digest.update(rows.numpy().tobytes())
    counted = {
        f"{name}_rows": len(rows) for name, rows in (("train", train), ("validation", validation), ("test", test))
    }
    summary = {**asdict(config), **documents.counts, **counted}
    positions = positions if reset else {}
    labels = {}
    if documents.only_answers:
        raw = {"train": train, "validation": validation, "test": test}
        labels = {name: _labels(x, positions.get(name)) for name, x in raw.items() if isinstance(x, Tensor)}
        _check_labels(labels, str(documents.counts["source"]))
        train = _ids(train) if isinstance(train, Tensor) else train
        validation, test = _ids(validation), _ids(test)
    return Data(train, validation, test, "sha256 " + digest.hexdigest(), summary, positions, labels)


def _shuffled(documents: Corpus, seed: int) -> Array:
    """The documents in the order in which they are split; those of a mixture that exceed their share are left out."""
    numbers = array("q", range(len(documents)))
    random.Random(seed).shuffle(numbers)
    order = np.frombuffer(numbers, np.int64)
    return order[_within_shares(documents, order)] if documents.shares else order


def held_out_rows(documents: Corpus, config: DataConfig, seed: int, length: int) -> tuple[Tensor, Tensor]:
    """The documents that :func:`split` holds out for testing, packed again into rows of ``length`` tokens.

    Returns:
        Token ids and positions within the documents, (N, length) int64 each: all rows that the documents fill, or as
        many as ``split`` has if they are as long.

    Raises:
        LolcatsError: the documents do not fill one row.
    """
    order = _shuffled(documents, seed)
    count, stop = _held_out(documents, order, config)[0]
    raw, positions = PackedRows(documents, order[:stop], length).whole(
        count if length == config.sequence_length else None
    )
    if not len(raw):
        tokens = int(documents.length[order[:stop]].sum())
        raise LolcatsError(
            f"The test documents of {documents.counts['source']} have {tokens:,} tokens, fewer than one row of "
            f"{length:,}: use shorter rows (data.sequence_length), or data that the run was not trained on."
        )
    return _ids(raw), positions


def _ids(raw: Tensor) -> Tensor:
    return torch.where(raw < 0, ~raw, raw)


def _labels(raw: Tensor, positions: Tensor | None) -> Tensor:
    """The ids to predict; −100 for those of prompts, and where a document begins if documents are kept apart."""
    hidden = raw < 0 if positions is None else (raw < 0) | (positions == 0)
    return raw.masked_fill(hidden, -100)


def _check_labels(labels: Mapping[str, Tensor], source: str) -> None:
    """Refuse splits in which nothing is to be predicted."""
    for name in ("train", "validation"):
        if name in labels and not (labels[name][:, 1:] >= 0).any():
            raise LolcatsError(
                f"{source}: no {name} row holds a token of an answer, which data.loss=completion learns to predict. "
                "Use more data, or more validation rows (data.validation_rows)."
            )


def _held_out(documents: Corpus, order: Array, config: DataConfig) -> list[tuple[int, int]]:
    """For test and validation rows, in this order: how many there are, and where in ``order`` their documents end.

    If the data is too small, splits of the default size shrink to at most a tenth of all rows each.
    """
    ends = np.cumsum(documents.length[order], dtype=np.int64)
    tokens = int(ends[-1]) if len(ends) else 0
    if stops := _stops(ends, config):
        return stops
    for fewer in range(min(HELD_OUT, tokens // config.sequence_length // 10), 0, -1):
        test, validation = (fewer if n == HELD_OUT else n for n in (config.test_rows, config.validation_rows))
        if stops := _stops(ends, replace(config, test_rows=test, validation_rows=validation)):
            return stops
    needed = (config.test_rows + config.validation_rows + 1) * config.sequence_length
    few = f"tokens ({tokens})" if tokens < needed else f"documents ({len(order)}), which are never divided among splits"
    small = "--recipe small, " if _stops(ends, load_config("small").data) else ""
    raise LolcatsError(
        f"{documents.counts['source']} has too few {few}: {config.validation_rows} validation rows and "
        f"{config.test_rows} test rows of {config.sequence_length} tokens leave nothing to train on. Use more data, "
        f"{small}shorter rows (data.sequence_length) or smaller splits (data.validation_rows, data.test_rows)."
    )


def _stops(ends: Array, config: DataConfig) -> list[tuple[int, int]]:
    """As :func:`_held_out`; empty if the documents, which end at ``ends``, do not fill the splits and one more row."""
    place, before, stops = 0, 0, []
    for rows in (config.test_rows, config.validation_rows):
        place = int(np.searchsorted(ends, before + rows * config.sequence_length)) + 1
        if place > len(ends):
            return []
        before = int(ends[place - 1])
        stops.append((rows, place))
    return stops if ends[-1] - before >= config.sequence_length else []


def _identity(documents: Corpus, train: Tensor | PackedRows, seed: int) -> bytes:
    """The bytes that identify the training rows: the rows, or for a large source everything they depend on."""
    if isinstance(train, Tensor):
        return train.numpy().tobytes()
    sources = [store.identity or hashlib.sha256(store.hashes.tobytes()).hexdigest() for store in documents.stores]
    return json.dumps([sources, documents.shares, seed, len(train), train.length]).encode()


def _within_shares(documents: Corpus, order: Array) -> Array:
    """Mask of the shuffled documents that gives each store its share of the tokens without using any twice. All of the
    scarcest store is used."""
    length, which = documents.length[order].astype(np.int64), documents.which[order]
    tokens = [int(length[which == store].sum()) for store in range(len(documents.stores))]
    total = min(have / share for have, share in zip(tokens, documents.shares, strict=True))
    taken = np.zeros(len(order), bool)
    for store, share in enumerate(documents.shares):
        own = which == store
        before = np.cumsum(length[own]) - length[own]
        taken[own] = before < share * total
    return taken


def load_rows(source: str, tokenizer: Any, config: DataConfig) -> tuple[Tensor, Tensor | None]:
    """Load all of ``source``, in order, as (N, L) rows for evaluation, with position ids if
    ``config.reset_at_documents`` is set."""
    documents = tokenize_source(source, tokenizer, replace(config, loss="all"), unique=False)
    raw, positions = PackedRows(documents, np.arange(len(documents)), config.sequence_length).whole()
    rows = _ids(raw)
    if not len(rows):
        raise LolcatsError(f"{source} has fewer tokens than one row of {config.sequence_length}: use more data.")
    return rows, positions if config.reset_at_documents else None
