"""Search for the heads that are worth keeping, chosen together: heads work in chains, one gathers what another copies.

A *unit* is what is kept or not as a whole: a key/value head, or all those of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lolcats.selection.scorer import Scorer

ONE_BY_ONE = 8  # units that are added singly
Head = tuple[int, int]
Unit = tuple[Head, ...]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """Units that were kept at some point of the search, and their loss (KL from the teacher in nats)."""

    units: tuple[Unit, ...]
    loss: float

    @property
    def heads(self) -> list[Head]:
        return sorted(head for unit in self.units for head in unit)


def units_of(scorer: Scorer, by_layer: bool) -> list[Unit]:
    if not by_layer:
        return [(head,) for head in scorer.heads]
    layers: dict[int, list[Head]] = {}
    for layer, head in scorer.heads:
        layers.setdefault(layer, []).append((layer, head))
    return [tuple(heads) for heads in layers.values()]


def grow(scorer: Scorer, kept: Sequence[Unit], others: Sequence[Unit], count: int, width: int, say: Say) -> list[Found]:
    """Add the unit that lowers the loss most, until ``count`` are kept.

    In each round the slopes of all units are computed at once, and only the ``width`` most promising ones are scored.
    The first ``ONE_BY_ONE`` units are added singly, since much depends on them; of many more, a 16th of ``count`` is
    added in a round, those with the lowest scores.

    Returns:
        The sets of all rounds, the last of which has ``count`` units.
    """
    found, kept, others = [], list(kept), list(others)
    while len(kept) < count and others:
        scorer.move_to(_heads(kept))
        tried = _steepest(scorer, kept, others, width, sign=1)
        losses = dict(zip(tried, scorer.losses([_heads([*kept, unit]) for unit in tried]), strict=True))
        several = 1 if len(kept) < ONE_BY_ONE else min(max(1, count // 16), count - len(kept))
        best = sorted(tried, key=losses.__getitem__)[:several]
        kept += best
        others = [unit for unit in others if unit not in best]
        loss = losses[best[0]] if len(best) == 1 else scorer.loss(_heads(kept))
        found.append(Found(tuple(kept), loss))
        say(f"{len(_heads(kept))} heads: {', '.join(map(_named, best))} added, loss {loss:.4f}")
    return found


def shrink(scorer: Scorer, kept: Sequence[Unit], count: int, width: int, say: Say, share: float = 0.0) -> list[Found]:
    """Drop the unit that raises the loss least, until ``count`` are kept; otherwise as :func:`grow`.

    Args:
        share: of the units that are left, the share to drop in one round.
    """
    found, kept = [], list(kept)
    while len(kept) > count:
        scorer.move_to(_heads(kept))
        drop = max(1, min(len(kept) - count, int(share * len(kept))))
        tried = _steepest(scorer, kept, kept, max(width, 2 * drop), sign=-1)
        left = [_heads([other for other in kept if other != unit]) for unit in tried]
        losses = dict(zip(tried, scorer.losses(left), strict=True))
        gone = sorted(tried, key=losses.__getitem__)[:drop]
        kept = [unit for unit in kept if unit not in gone]
        loss = losses[gone[0]] if drop == 1 else scorer.loss(_heads(kept))
        found.append(Found(tuple(kept), loss))
        say(f"{len(_heads(kept))} heads: {', '.join(map(_named, gone))} dropped, loss {loss:.4f}")
    return found


def _steepest(scorer: Scorer, kept: Sequence[Unit], units: Sequence[Unit], width: int, sign: int) -> list[Unit]:
    """The ``width`` units whose softmax attention lowers the loss most (sign 1) or least (−1) by their slopes."""
    if width >= len(units):
        return list(units)
    _, slopes = scorer.slopes(dict.fromkeys(_heads(kept), 1.0))
    return sorted(units, key=lambda unit: sign * sum(slopes[head] for head in unit))[:width]


def _heads(units: Sequence[Unit]) -> list[Head]:
    return [head for unit in units for head in unit]


def _named(unit: Unit) -> str:
    heads = ", ".join(str(head) for _, head in unit)
    return f"layer {unit[0][0]} head {heads}"
