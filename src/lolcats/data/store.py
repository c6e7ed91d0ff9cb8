"""Token ids of a source's documents, in memory for small sources and in a file for large ones.

A large source is tokenized on all cores, a piece at a time, and kept in a cache directory under a hash of its content,
the tokenizer and the reader's settings; later runs open it there. ``LOLCATS_CACHE`` sets the directory.

    ids.bin      int32, all documents concatenated; with data.loss=completion, prompts have ~id instead of id
    starts.npy, lengths.npy, hashes.npy   one entry per document
    first.npy    indices of the documents that did not occur before
    store.json   counts; written last
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import transformers
from numpy.typing import NDArray

from lolcats.config import DataConfig
from lolcats.data.answers import Spans, answer_finder, check_answers, hide_prompts
from lolcats.data.conversations import Misfit, NoColumn
from lolcats.data.sources import Broken, Piece, Record, hub_dataset, hub_records, local_file, pieces
from lolcats.data.templates import record_format, renderer
from lolcats.errors import LolcatsError

LARGE = 64 << 20  # a source of this many bytes or more is kept in a file
BATCH = 1_000  # documents to tokenize at a time,
CHARACTERS = 1 << 20  # or fewer if they have this many characters
HASH = 16  # bytes of a document's hash
HASHED = 64 << 20  # bytes per part of a file that a thread hashes
VERSION = 2  # of the store's format; runs remember it in the fingerprint of their data
TEXT = 2  # of how records become text: a store of an earlier version is made again
ARRAYS = ("starts", "lengths", "hashes", "first")

Array = NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """The documents of one piece of a source. ``misfits``: records that do not fit the format and were skipped;
    ``misfit``: number of the one that stopped the piece, and why."""

    ids: Array
    lengths: Array
    hashes: Array
    broken: Broken
    records: int
    empty: int
    misfits: int = 0
    misfit: tuple[int, Misfit] | None = None

    def limited(self, tokens: int) -> Chunk:
        """The first documents, up to the one that reaches ``tokens`` tokens."""
        count = int(np.searchsorted(np.cumsum(self.lengths), tokens)) + 1
        kept = int(self.lengths[:count].sum())
        return replace(self, ids=self.ids[:kept], lengths=self.lengths[:count], hashes=self.hashes[:count])


@dataclass(frozen=True)
class Reading:
    """Everything a process needs to turn records into token ids."""

    source: str
    form: str
    config: DataConfig
    tokenizer: Any

    def piece(self, piece: Piece) -> Chunk:
        broken = Broken()
        return self.chunk(piece.records(broken), broken)

    def chunk(self, records: Iterator[Record], broken: Broken) -> Chunk:
        """Render and tokenize ``records``; reading them fills ``broken``."""
        render = renderer(self.form, self.config, self.tokenizer)
        find = answer_finder(self.form, self.config, self.tokenizer)
        ids: list[Array] = []
        lengths: list[Array] = []
        hashes = bytearray()
        texts: list[str] = []
        answers: list[Spans] = []
        number = empty = characters = misfits = 0
        misfit = None
        for record in records:
            number += 1
            try:
                text = render(record)
                spans = find(record, text) if find and text else []
            except Misfit as error:
                if isinstance(error, NoColumn) or not self.config.skip_broken:
                    misfit = number, error
                    break
                misfits += 1
                continue
            if not text or (find and not spans):
                empty += 1
                continue
            texts.append(text)
            answers.append(spans)
            hashes += hashlib.blake2b(text.encode(), digest_size=HASH).digest()
            characters += len(text)
            if len(texts) == BATCH or characters >= CHARACTERS:
                self._tokenize(texts, answers, ids, lengths)
                texts, answers, characters = [], [], 0
        self._tokenize(texts, answers, ids, lengths)
        joined = _joined(ids), _joined(lengths)
        return Chunk(*joined, np.frombuffer(hashes, np.uint64).reshape(-1, 2), broken, number, empty, misfits, misfit)

    def _tokenize(self, texts: list[str], answers: list[Spans], ids: list[Array], lengths: list[Array]) -> None:
        """Chat templates add their own special tokens; other text ends with EOS, which belongs to the answer."""
        if not texts:
            return
        chat = self.form == "chat"
        end = [] if chat or self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        only_answers = self.config.loss == "completion"
        encoded = self.tokenizer(
            texts, add_special_tokens=not chat, verbose=False, return_attention_mask=False,
            return_offsets_mapping=only_answers,
        )  # fmt: skip
        documents = encoded["input_ids"]
        if only_answers:
            documents = list(map(hide_prompts, documents, encoded["offset_mapping"], answers))
        lengths.append(np.array([len(x) + len(end) for x in documents], np.int32))
        flat = chain.from_iterable(chain(x, end) for x in documents)
        ids.append(np.fromiter(flat, np.int32, int(lengths[-1].sum())))


def _joined(parts: list[Array]) -> Array:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


@dataclass(frozen=True)
class TokenStore:
    """The documents of one source. ``first``: indices of those that are not a copy of an earlier one."""

    ids: Array | Path
    starts: Array
    lengths: Array
    hashes: Array
    first: Array
    counts: dict[str, Any]
    identity: str = ""
    """Hash of everything the content depends on; empty if it is not in the cache."""
    temporary: TemporaryDirectory[str] | None = None
    only_answers: bool = False
    """Whether tokens of prompts have ~id instead of id (``data.loss: completion``)."""

    def read(self, start: int, count: int) -> Array:
        """Token ids [start, start + count) of all documents concatenated."""
        if not isinstance(self.ids, Path):
            return self.ids[start : start + count]
        return np.frombuffer(os.pread(self._file.fileno(), 4 * count, 4 * start), np.int32)

    @cached_property
    def _file(self) -> BinaryIO:
        assert isinstance(self.ids, Path)
        return self.ids.open("rb", buffering=0)


def open_source(source: str, tokenizer: Any, config: DataConfig) -> TokenStore:
    """Open the documents of a local file or a hub data set; a large source is cached.

    Raises:
        LolcatsError: the source cannot be read; the message names the line or record.
    """
    path = local_file(source)
    if path is None:
        return _open_hub(source, tokenizer, config)

    def build(folder: Path | None) -> TokenStore:
        parts = pieces(path)
        return _build(
            source, lambda: Piece(path).records(Broken()), lambda reading: _chunks(reading, parts), tokenizer, config,
            folder,
        )  # fmt: skip

    if path.stat().st_size < LARGE:
        return build(None)
    return _cached(_key([path.suffix, content_hash(path)], tokenizer, config), build, source)


def _open_hub(name: str, tokenizer: Any, config: DataConfig) -> TokenStore:
    """A streamed data set has no identity before it is read, so it is kept in a temporary file of this process."""
    dataset = hub_dataset(name, config)

    def records() -> Iterator[Record]:
        return hub_records(dataset, name, Broken())

    def chunks(reading: Reading) -> Iterator[Chunk]:
        broken = Broken()
        rest = hub_records(dataset, name, broken)
        while (part := list(islice(rest, BATCH))) or broken.count:
            yield reading.chunk(iter(part), broken.taken())

    def build(folder: Path | None) -> TokenStore:
        return _build(name, records, chunks, tokenizer, config, folder)

    if config.streaming:
        cache_directory().mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=cache_directory(), prefix="stream.")
        build(Path(temporary.name))
        return _load(Path(temporary.name), name, temporary=temporary)
    if dataset.data.nbytes < LARGE:
        return build(None)
    return _cached(_key([dataset._fingerprint], tokenizer, config), build, name)


def _build(
    source: str, probe: Callable[[], Iterator[Record]], chunks: Callable[[Reading], Iterable[Chunk]], tokenizer: Any,
    config: DataConfig, folder: Path | None,
) -> TokenStore:  # fmt: skip
    """Read, render and tokenize everything, into ``folder`` or into memory.

    Args:
        probe: returns the source's records; only the first is read.
        chunks: returns all records, tokenized.
    """
    record = next(probe(), None)
    form = "text" if record is None else record_format(record, config, tokenizer, source)
    if record is not None:
        check_answers(form, config, tokenizer, source)
    sinks: dict[str, Any] = {name: io.BytesIO() for name in ("ids", "lengths", "hashes")}
    if folder is not None:
        sinks["ids"] = (folder / "ids.bin").open("wb")
    with sinks["ids"]:
        total = _write(sinks, chunks(Reading(source, form, config, tokenizer)), source, form, config)
        total.broken.check(source, config)
        ids = np.frombuffer(sinks["ids"].getvalue(), np.int32) if folder is None else folder / "ids.bin"
    if record is None:
        raise LolcatsError(f"{source} is empty: no records.")
    lengths = np.frombuffer(sinks["lengths"].getvalue(), np.int32)
    hashes = np.frombuffer(sinks["hashes"].getvalue(), np.uint64).reshape(-1, 2)
    if not len(lengths):
        unfit = f" or does not fit the {form} format ({total.misfits} do not)" if total.misfits else ""
        raise LolcatsError(f"{source}: every record is empty{unfit}.")
    unique = first_occurrences(hashes)
    counts = {
        "source": source, "format": form, "empty_records": total.empty, "broken_lines_skipped": total.broken.count,
        "misfit_records_skipped": total.misfits, "documents": len(unique),
        "duplicate_records": len(lengths) - len(unique),
    }  # fmt: skip
    only = config.loss == "completion"
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    store = TokenStore(ids, starts, lengths, hashes, unique, counts, only_answers=only)
    if folder is not None:
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(store, name))
        (folder / "store.json").write_text(json.dumps({**counts, "tokens": total.tokens, "only_answers": only}))
    return store


@dataclass
class _Total:
    """Counts over all chunks so far."""

    broken: Broken = field(default_factory=Broken)
    records: int = 0
    empty: int = 0
    misfits: int = 0
    tokens: int = 0


def _write(sinks: dict[str, Any], chunks: Iterable[Chunk], source: str, form: str, config: DataConfig) -> _Total:
    """Append the arrays of ``chunks`` to their sinks, until ``config.max_tokens`` tokens are written."""
    total = _Total()
    for chunk in chunks:
        if chunk.misfit:
            number, why = total.records + chunk.misfit[0], chunk.misfit[1]
            raise LolcatsError(f"{source}: record {number} does not fit the {form} format ({why}).{why.advice}")
        if config.max_tokens and total.tokens + len(chunk.ids) >= config.max_tokens:
            chunk = chunk.limited(config.max_tokens - total.tokens)
        total.broken.extend(chunk.broken)
        total.records, total.empty = total.records + chunk.records, total.empty + chunk.empty
        total.misfits += chunk.misfits
        total.tokens += len(chunk.ids)
        for name, sink in sinks.items():
            sink.write(getattr(chunk, name).tobytes())
        if config.max_tokens and total.tokens >= config.max_tokens:
            break
    return total


def first_occurrences(hashes: Array) -> Array:
    """(n, 2) uint64 -> ascending indices of the rows that differ from every earlier row."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in order
    ranked = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    return np.sort(order[new])


def _load(folder: Path, source: str, identity: str = "", temporary: Any = None) -> TokenStore:
    """Open a finished store; raise LolcatsError if its files do not match its record."""
    try:
        counts = json.loads((folder / "store.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy") for name in ARRAYS}
        if (folder / "ids.bin").stat().st_size != 4 * counts.pop("tokens"):
            raise ValueError("ids.bin has the wrong size")
    except (OSError, ValueError, KeyError) as error:
        raise LolcatsError(f"The cached data in {folder} is damaged ({error}): delete that folder.") from None
    counts = {"misfit_records_skipped": 0, **counts, "source": source}
    only = counts.pop("only_answers", False)
    return TokenStore(
        folder / "ids.bin", **arrays, counts=counts, identity=identity, temporary=temporary, only_answers=only
    )  # fmt: skip


def cache_directory() -> Path:
    """``LOLCATS_CACHE`` if it is set, else ``lolcats`` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOLCATS_CACHE") or Path(home) / "lolcats")


def _cached(key: str, build: Callable[[Path], TokenStore], source: str) -> TokenStore:
    """Open the store under ``key``, and build it first if needed. A folder gets its name only once it is complete."""
    folder = cache_directory() / f"{key}-{TEXT}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        for left in folder.parent.glob(f"{folder.name}.*"):
            if not _alive(int(left.suffix[1:])):
                shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            build(unfinished)
            if not folder.exists():
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return _load(folder, source, key)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _key(content: list[str], tokenizer: Any, config: DataConfig) -> str:
    """Hash of everything that a store's content depends on."""
    asked = [config.format, config.text_column, config.split, config.subset, config.skip_broken, config.max_tokens]
    asked += [] if config.loss == "all" else [config.loss]
    parts = [VERSION, transformers.__version__, *content, tokenizer_hash(tokenizer), *asked]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that decides how text becomes token ids."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    body = core.to_str() if core is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [type(tokenizer).__name__, body, str(tokenizer.chat_template), tokenizer.eos_token_id]
    parts.append(str(tokenizer.special_tokens_map))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """sha256 of the sha256 hashes of each 64 MiB of a file, computed on all cores."""

    def part(start: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = HASHED
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    with ThreadPoolExecutor(cores()) as pool:
        return hashlib.sha256(b"".join(pool.map(part, range(0, path.stat().st_size, HASHED)))).hexdigest()


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(reading: Reading, parts: list[Piece]) -> Iterator[Chunk]:
    """Chunks of all pieces in order; if there are enough pieces, one process per core makes them."""
    if len(parts) < 4 or cores() == 1 or sys.platform != "linux":
        yield from map(reading.piece, parts)
        return
    with _pool(reading) as pool:
        waiting: deque[Future[Chunk]] = deque()
        rest = iter(parts)
        try:
            waiting.extend(pool.submit(_work, part) for part in islice(rest, 2 * cores()))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_work, part) for part in islice(rest, 1))
        except BrokenProcessPool:
            raise LolcatsError(
                f"{reading.source}: a tokenizing process was killed, perhaps because memory ran out. Run the same "
                "command again."
            ) from None


@contextmanager
def _pool(reading: Reading) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes, as in datasets: they import nothing again, and do not touch torch or a GPU."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(cores(), context, initializer=_start, initargs=(reading,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_reading: list[Reading] = []  # set in worker processes


def _start(reading: Reading) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough
    _reading[:] = [reading]


def _work(piece: Piece) -> Chunk:
    return _reading[0].piece(piece)
