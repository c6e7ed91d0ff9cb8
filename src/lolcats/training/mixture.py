"""Several sources as one: a YAML file given as ``--data`` lists them with their shares of the tokens.

sources:
- {path: books.jsonl, weight: 3}
- {path: chats.parquet, weight: 1, format: chat}
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lolcats.config import DataConfig, from_dict, read_yaml
from lolcats.errors import LolcatsError


@dataclass(frozen=True)
class MixtureSource:
    """One source; what is not given is the run's ``data`` setting."""

    path: str
    """A local file, relative to the mixture's, or a hub data set id."""
    weight: float = 1.0
    """Tokens of this source are weight / sum of weights of all that are used."""
    format: Literal["auto", "alpaca", "chat", "text"] | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    streaming: bool | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise LolcatsError(f"weight of {self.path} must be positive, not {self.weight}.")


@dataclass(frozen=True)
class Mixture:
    sources: list[MixtureSource] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """A source with its settings and its share of the tokens."""

    source: str
    config: DataConfig
    share: float


def is_mixture(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def read_mixture(source: str, config: DataConfig) -> list[Share]:
    """The sources of a mixture file. LolcatsError if it is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise LolcatsError(f"Data file {source} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LolcatsError(f"{source} is not UTF-8 text.") from None
    try:
        sources = from_dict(Mixture, read_yaml(text, source) or {}).sources
    except (LolcatsError, TypeError) as error:
        raise LolcatsError(f"{source}: {error}") from None
    if not sources:
        raise LolcatsError(f"{source} lists no sources: expected sources: [{{path: FILE, weight: 1}}, ...].")
    total, shares = sum(entry.weight for entry in sources), []
    for entry in sources:
        names = ("format", "text_column", "split", "subset", "streaming", "max_tokens")
        changes = {name: getattr(entry, name) for name in names if getattr(entry, name) is not None}
        beside = path.parent / Path(entry.path).expanduser()
        name = str(beside) if beside.exists() else entry.path
        if is_mixture(name):
            raise LolcatsError(f"{source}: {entry.path} is a mixture itself; list its sources here.")
        shares.append(Share(name, replace(config, **changes), entry.weight / total))
    return shares
