"""Records from a Hugging Face data set id or a local .json, .jsonl, .parquet or .txt file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lolcats.config import DataConfig
from lolcats.errors import LolcatsError

Record = dict[str, Any]
TXT_DOCUMENT = 8_000  # characters: where a .txt file is cut, at the next end of a paragraph
NAMED = 5  # broken lines named in an error


def read_records(source: str, config: DataConfig) -> tuple[list[Record], int]:
    """All records of ``source`` and how many broken lines were skipped (only with ``config.skip_broken``).

    Raises:
        LolcatsError: no such file or data set, no records, or broken lines (named by number and counted).
    """
    path = Path(source).expanduser()
    skipped: list[str] = []
    if path.is_file():
        if path.suffix not in READERS:
            raise LolcatsError(f"{source}: unknown data format; expected one of {', '.join(READERS)}.")
        records = list(READERS[path.suffix](path, skipped))
    elif not path.is_dir() and (path.suffix in READERS or path.is_absolute() or source.startswith(".")):
        raise LolcatsError(f"Data file {source} does not exist.")
    else:  # a hub id, or a directory laid out as one
        records = list(_hub(source, config))
    if skipped and not config.skip_broken:
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        raise LolcatsError(
            f"{source} has {len(skipped)} broken line(s): {'; '.join(skipped[:NAMED])}{more}. Mend them, or skip them "
            "with --set data.skip_broken=true."
        )
    if not records:
        raise LolcatsError(f"{source} is empty: no records.")
    return records, len(skipped)


def _jsonl(path: Path, broken: list[str]) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                broken.append(f"line {number} ({getattr(error, 'msg', None) or getattr(error, 'reason', error)})")
                continue
            if isinstance(record, dict):
                yield record
            else:
                broken.append(f"line {number} (a {type(record).__name__}, expected an object)")


def _json(path: Path, broken: list[str]) -> Iterator[Record]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LolcatsError(f"{path} is not valid JSON ({error}). One object a line? Then name it .jsonl.") from None
    if isinstance(content, dict):
        content = next((v for v in content.values() if isinstance(v, list)), [content])
    if not isinstance(content, list):
        raise LolcatsError(f"{path}: expected a list of objects, found a {type(content).__name__}.")
    for number, record in enumerate(content, 1):
        if isinstance(record, dict):
            yield record
        else:
            broken.append(f"record {number} (a {type(record).__name__}, expected an object)")


def _parquet(path: Path, broken: list[str]) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LolcatsError("Reading .parquet files needs pyarrow: pip install 'lolcats[data]'.") from None
    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise LolcatsError(f"{path} is no readable Parquet file ({error}).") from None


def _txt(path: Path, broken: list[str]) -> Iterator[Record]:
    """Documents of about TXT_DOCUMENT characters, cut at the ends of paragraphs."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LolcatsError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    document = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        document += paragraph + "\n\n"
        if len(document) >= TXT_DOCUMENT:
            yield {"text": document.strip()}
            document = ""
    if document.strip():
        yield {"text": document.strip()}


def _hub(name: str, config: DataConfig) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise LolcatsError(
            f"{name} is no local file, and reading a hub data set needs the datasets package: "
            "pip install 'lolcats[data]'."
        ) from None
    try:
        yield from datasets.load_dataset(name, config.subset or None, split=config.split)
    except (OSError, ValueError, RuntimeError) as error:  # datasets and hub errors derive from these
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LolcatsError(f"No data set {name!r} on disk or on the Hugging Face hub ({reason}).") from None


READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _txt,
}
