"""What a selection of heads found, as a YAML file that names the model it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from lolcats.config import AttentionConfig, Config
from lolcats.errors import LolcatsError, first_line
from lolcats.files import write_text
from lolcats.weights.base import Base, with_content

Kept = dict[str, list[int]]
"""Key/value heads by layer, as in ``attention.softmax_heads``."""


@dataclass(frozen=True)
class Point:
    """A point of the curve. loss: KL from the teacher on the answers of the search's prompts, in nats; exact: share of
    right answers by kind of prompt, on other prompts of these kinds; bytes_per_token: of the kept keys and values."""

    heads: Kept
    loss: float
    exact: dict[str, float]
    bytes_per_token: int

    @property
    def count(self) -> int:
        return sum(map(len, self.heads.values()))

    @property
    def recall(self) -> float:
        """The mean of ``exact`` over the kinds."""
        return sum(self.exact.values()) / len(self.exact)


@dataclass(frozen=True)
class Selection:
    """The heads to keep, and how they were found.

    base: the model's record, with its fingerprint. window: kind and size of the window and sinks that the other heads
    had. curve: from no head on to all that were tried, then the teacher. search: prompts, method and time.
    """

    base: dict[str, str]
    window: dict[str, Any]
    heads: Kept
    curve: list[Point]
    search: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        write_text(path, HEADER + yaml.safe_dump(asdict(self), sort_keys=False, width=120, default_flow_style=None))

    @classmethod
    def read(cls, path: Path) -> Selection:
        """
        Raises:
            LolcatsError: the file is not a selection.
        """
        try:
            tree = yaml.safe_load(path.read_text())
            points = [Point(**point) for point in tree.pop("curve")]
            return cls(**tree, curve=points)
        except OSError as error:
            raise LolcatsError(f"Cannot read {path}: {first_line(error)}.") from None
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
            raise LolcatsError(f"{path} is not a selection of heads: make one with lolcats select.") from None

    def check(self, base: Base, path: Path) -> None:
        """
        Raises:
            LolcatsError: the selection is of another model.
        """
        known = Base(**cast(Any, self.base))
        content = with_content(base).content
        if base.fingerprint != known.fingerprint and not (content and content == known.content):
            raise LolcatsError(
                f"{path} was made for {known.path} ({known.fingerprint}), and {base.path} is another model "
                f"({base.fingerprint}): heads are chosen for one model. Run lolcats select on it."
            )


HEADER = "# Heads that stay softmax attention: lolcats linearize --selection FILE. Made by lolcats select.\n"


def by_layer(heads: Iterable[tuple[int, int]]) -> Kept:
    """(layer, head) pairs as ``attention.softmax_heads`` has them."""
    found: Kept = {}
    for layer, head in sorted(heads):
        found.setdefault(str(layer), []).append(head)
    return found


def other_window(config: Config, selection: Selection) -> str:
    """A sentence if heads were chosen beside other windows and sinks than those of the configuration; else empty."""
    then, now = selection.window, config.attention
    if not then or all(then[name] == getattr(now, name) for name in then):
        return ""
    return (
        f"These heads were chosen while all others had {_windows(**then)}. Here the others have "
        f"{_windows(now.window, now.window_size, now.sinks)}, for which lolcats select might choose other heads."
    )


def _windows(window: str, window_size: int, sinks: int) -> str:
    return f"{window} windows of {window_size} and {sinks} sinks"


def with_selection(config: Config, path: Path, base: Base) -> Config:
    """The configuration with the heads of a selection file, instead of those that a budget would choose.

    Raises:
        LolcatsError: it is of another model, or the configuration has heads of its own.
    """
    if config.attention.softmax_heads:
        raise LolcatsError("A selection file says which heads to keep: leave out attention.softmax_heads.")
    selection = Selection.read(path)
    selection.check(base, path)
    return with_heads(config, selection)


def with_heads(config: Config, selection: Selection) -> Config:
    attention: AttentionConfig = replace(config.attention, softmax_heads=selection.heads, softmax_budget=0.0)
    return replace(config, attention=attention)
