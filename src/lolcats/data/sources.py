"""Read records one by one from a Hugging Face data set or a local .json, .jsonl, .parquet or .txt file.

A large .jsonl or .parquet file is split into pieces that can be read independently, by several processes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lolcats.config import DataConfig
from lolcats.errors import LolcatsError, first_line

Record = dict[str, Any]
TXT_DOCUMENT = 8_000  # characters after which a .txt file is cut at the next end of a paragraph
LONGEST = 1 << 20  # maximum number of characters per paragraph; a longer one is cut
NAMED = 5  # broken lines listed in an error
PIECE = 8 << 20  # bytes per piece of a .jsonl file
BLOCK = 1 << 20  # bytes to read at a time
NOT_UNICODE = "its text is not UTF-8"


@dataclass(frozen=True)
class Piece:
    """Part of a local file: bytes of a .jsonl file, row groups of a .parquet file, or all of any other file."""

    path: Path
    start: int = 0
    stop: int | None = None

    def records(self, broken: Broken) -> Iterator[Record]:
        return READERS[self.path.suffix](self, broken)


@dataclass
class Broken:
    """The broken lines of a piece: how many there are, and the numbers of the first few, counted within the piece."""

    unit: str = "line"
    read: int = 0
    count: int = 0
    named: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append((number, reason))

    def extend(self, other: Broken) -> None:
        """Add the broken lines of the next piece."""
        self.unit, self.count = other.unit, self.count + other.count
        shifted = [(self.read + number, reason) for number, reason in other.named]
        self.named, self.read = [*self.named, *shifted][:NAMED], self.read + other.read

    def taken(self) -> Broken:
        """What was counted since this was last called, as a piece of its own."""
        piece = replace(self)
        self.read, self.count, self.named = 0, 0, []
        return piece

    def check(self, source: str, config: DataConfig) -> None:
        """Raise LolcatsError with the broken lines, unless they are skipped."""
        if self.count and not config.skip_broken:
            more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
            named = "; ".join(f"{self.unit} {number} ({reason})" for number, reason in self.named)
            raise LolcatsError(
                f"{source} has {self.count} broken line(s): {named}{more}. Fix them, or skip them with --set "
                "data.skip_broken=true."
            )


def local_file(source: str) -> Path | None:
    """The file that ``source`` names; None for a hub data set or a local directory with the layout of one.

    Raises:
        LolcatsError: the file does not exist or has an unknown format.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise LolcatsError(f"{source}: unknown data format; expected one of {', '.join(READERS)}.")
        return path
    if not path.is_dir() and (path.suffix in READERS or path.is_absolute() or source.startswith(".")):
        raise LolcatsError(f"Data file {source} does not exist.")
    return None


def read_records(source: str, config: DataConfig) -> tuple[list[Record], int]:
    """Read all records of ``source``, and count the broken lines that were skipped (only with ``config.skip_broken``).

    Raises:
        LolcatsError: the source does not exist, has no records, or has broken lines (counted, with line numbers).
    """
    path, broken = local_file(source), Broken()
    found = hub_records(hub_dataset(source, config), source, broken) if path is None else Piece(path).records(broken)
    records = list(found)
    broken.check(source, config)
    if not records:
        raise LolcatsError(f"{source} is empty: no records.")
    return records, broken.count


def pieces(path: Path) -> list[Piece]:
    """Split a file into pieces of about PIECE bytes that hold whole lines or row groups, in order."""
    if path.suffix == ".parquet":
        groups = _parquet_file(path).num_row_groups
        return [Piece(path, i, i + 1) for i in range(groups)] or [Piece(path)]
    size = path.stat().st_size
    if path.suffix != ".jsonl" or size <= PIECE:
        return [Piece(path)]
    cuts = [0]
    with path.open("rb") as file:
        while cuts[-1] + PIECE < size:
            file.seek(cuts[-1] + PIECE)
            file.readline()
            cuts.append(file.tell())
    return [Piece(path, a, b) for a, b in pairwise([*cuts, size] if cuts[-1] < size else cuts)]


def _jsonl(piece: Piece, broken: Broken) -> Iterator[Record]:
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        while line := file.readline() if piece.stop is None or file.tell() < piece.stop else b"":
            broken.read += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors, huge numbers too
                broken.add(broken.read, str(getattr(error, "msg", None) or getattr(error, "reason", error)))
                continue
            if isinstance(record, dict):
                yield record
            else:
                broken.add(broken.read, f"a {type(record).__name__}, expected an object")


def _json(piece: Piece, broken: Broken) -> Iterator[Record]:
    path, broken.unit = piece.path, "record"
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LolcatsError(f"{path} is not valid JSON ({error}). With one object per line, name it .jsonl.") from None
    if isinstance(content, dict):
        content = next((v for v in content.values() if isinstance(v, list)), [content])
    if not isinstance(content, list):
        raise LolcatsError(f"{path}: expected a list of objects, found a {type(content).__name__}.")
    for record in content:
        broken.read += 1
        if isinstance(record, dict):
            yield record
        else:
            broken.add(broken.read, f"a {type(record).__name__}, expected an object")


def _parquet(piece: Piece, broken: Broken) -> Iterator[Record]:
    import pyarrow

    file, broken.unit = _parquet_file(piece.path), "record"
    groups = None if piece.stop is None else list(range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(batch_size=1_000, row_groups=groups):
            yield from map(without_nulls, _rows(batch, broken))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LolcatsError(f"{piece.path} is not a readable Parquet file ({error}).") from None


def _rows(batch: Any, broken: Broken) -> list[Record]:
    """The rows of a batch of pyarrow. Their text may not be Unicode: neither writers nor readers check it."""
    try:
        rows: list[Record] = batch.to_pylist()
        broken.read += len(rows)
        return rows
    except UnicodeDecodeError:
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1), broken)]
        broken.read += 1
        broken.add(broken.read, NOT_UNICODE)
        return []


def without_nulls(record: Record) -> Record:
    """A record of Arrow, whose objects all have the keys of all others, without the nested keys that hold null."""
    return {name: _pruned(value) for name, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(x) for key, x in value.items() if x is not None}
    return [_pruned(x) for x in value] if isinstance(value, list) else value


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LolcatsError("Reading .parquet files needs pyarrow: pip install 'lolcats[data]'.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise LolcatsError(f"{path} is not a readable Parquet file ({error}).") from None


def _txt(piece: Piece, broken: Broken) -> Iterator[Record]:
    """Cut a file at the ends of paragraphs into documents of about TXT_DOCUMENT characters."""
    document = ""
    for paragraph in _paragraphs(piece.path):
        document += paragraph + "\n\n"
        if len(document) >= TXT_DOCUMENT:
            yield {"text": document.strip()}
            document = ""
    if document.strip():
        yield {"text": document.strip()}


def _paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file, separated by empty lines; one longer than LONGEST comes in pieces."""
    decoder, rest, held, place = codecs.getincrementaldecoder("utf-8")(), "", "", 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = held + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise LolcatsError(f"{path} is not UTF-8 text (byte {place - pending + error.start}).") from None
            place += len(block)
            held = "\r" if block and text.endswith("\r") else ""  # may be half of a line ending
            *whole, rest = (rest + text.removesuffix(held).replace("\r\n", "\n")).split("\n\n")
            yield from whole
            if not block or len(rest) > LONGEST:
                yield rest
                rest = ""
            if not block:
                return


def hub_dataset(name: str, config: DataConfig) -> Any:
    """Open a data set with the ``datasets`` package; with ``config.streaming``, read it while it downloads."""
    try:
        import datasets
    except ImportError:
        raise LolcatsError(
            f"{name} is not a local file, and reading a hub data set needs the datasets package: "
            "pip install 'lolcats[data]'."
        ) from None
    with _hub_errors(name):
        return datasets.load_dataset(
            name, config.subset or None, split=config.split, streaming=config.streaming or None
        )  # fmt: skip


def hub_records(dataset: Any, name: str, broken: Broken) -> Iterator[Record]:
    """The records of a data set of the ``datasets`` package. Text that is not Unicode is a broken record, but stops one
    that is read while it downloads, since that cannot go on after an error."""
    broken.unit = "record"
    records, place = iter(dataset), 0
    while True:
        with _hub_errors(name):
            try:
                record = next(records, None)
            except UnicodeDecodeError:
                if not hasattr(dataset, "__len__"):
                    raise LolcatsError(f"{name}: record {place + 1} is broken ({NOT_UNICODE}).") from None
                rest = range(place + 1, len(dataset))
                record, records = {}, iter(dataset.select(rest) if rest else ())
                broken.add(broken.read + 1, NOT_UNICODE)
        if record is None:
            return
        place, broken.read = place + 1, broken.read + 1
        if record:
            yield without_nulls(record)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn errors of datasets and the hub into a LolcatsError of one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # the hub's errors derive from the first three
        reason = first_line(error.__cause__ or error)  # datasets says only that something went wrong
        if Path(name).is_dir():
            raise LolcatsError(f"{name} cannot be read as a data set ({reason}): pass one of its files.") from None
        raise LolcatsError(f"Cannot load data set {name!r} from disk or the Hugging Face hub ({reason}).") from None


READERS: dict[str, Callable[[Piece, Broken], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _txt,
}
