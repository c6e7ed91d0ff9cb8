"""Long texts as token ids, for evaluations that cut contexts from them."""

from __future__ import annotations

from pathlib import Path

from lolcats.config import DataConfig
from lolcats.data.sources import read_records
from lolcats.data.tokens import encode, special_prefix
from lolcats.errors import LolcatsError
from lolcats.modeling.chat import is_unicode

ROW = 1024  # tokens per row of a batch size: n rows are as many prompts or requests as hold n × ROW tokens


def read_documents(source: str) -> list[str]:
    """Whole documents: a .txt file is one; other files and data sets need a ``text`` column."""
    path = Path(source).expanduser()
    if path.suffix == ".txt" and path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise LolcatsError(f"{source} is not UTF-8 text (byte {error.start}).") from None
    records, _ = read_records(source, DataConfig())
    if "text" not in records[0]:
        raise LolcatsError(f"{source} has no text column; its columns are {', '.join(records[0])}.")
    texts = ["" if record.get("text") is None else record["text"] for record in records]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not is_unicode(text):
            raise LolcatsError(f"{source}: the text of record {number} is not Unicode text.")
    return [text for text in texts if text]


__all__ = ["ROW", "encode", "read_documents", "special_prefix"]
