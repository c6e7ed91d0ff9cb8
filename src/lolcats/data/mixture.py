"""Mix several sources: a YAML file passed as ``--data`` lists them with their shares of the tokens.

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
    """One source. Fields that are left out default to the run's ``data`` settings."""

    path: str
    """A local file, relative to the mixture file, or a hub data set id."""
    weight: float = 1.0
    """This source provides a fraction weight / (sum of all weights) of the tokens."""
    format: Literal["auto", "alpaca", "chat", "completion", "text"] | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    streaming: bool | None = None
    max_tokens: int | None = None
    loss: Literal["all", "completion"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise LolcatsError(f"weight of {self.path} must be positive and finite, not {self.weight}.")


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
    """Read the sources of a mixture file; raise LolcatsError if it is not valid."""
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
        raise LolcatsError(f"{source} lists no sources. Expected: sources: [{{path: FILE, weight: 1}}, ...].")
    total, shares = sum(entry.weight for entry in sources), []
    for entry in sources:
        own = {name: x for name, x in vars(entry).items() if x is not None and name not in ("path", "weight")}
        beside = path.parent / Path(entry.path).expanduser()
        name = str(beside) if beside.exists() else entry.path
        if is_mixture(name):
            raise LolcatsError(f"{source}: {entry.path} is itself a mixture: list its sources here instead.")
        shares.append(Share(name, replace(config, **own), entry.weight / total))
    return shares
