"""Search for the heads that are worth keeping, chosen together: heads work in chains, one gathers what another copies.

A *unit* is what is kept or not as a whole: a key/value head, or all those of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from lolcats.selection.scorer import Scorer

ONE_BY_ONE, ROUNDS = 8, 8  # units that are added singly, and about as many rounds for all others
GAIN, NOISE = 0.01, 1e-6
"""A set that replaces another one of its size has a loss lower by this share, and by that many nats."""
Head = tuple[int, int]
Unit = tuple[Head, ...]
Say = Callable[[str], None]
Slopes = Callable[[], dict[Head, float]]


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
    """Add the unit that lowers the loss most, until ``count`` are kept: a floating forward search (Pudil et al. 1994).

    In each round the slopes of all units are computed at once, and only the ``width`` most promising ones are scored.
    The first ``ONE_BY_ONE`` units are added singly, since much depends on them; of many more, several are added in a
    round, those with the lowest scores. After every round, units go again as long as what is left is better
    by ``GAIN`` than the best set of that size: what was the best beginning may be worth little later.

    Returns:
        The best set of every size that was reached, the last of which has ``count`` units.
    """
    units, kept = [*kept, *others], list(kept)
    best: dict[int, Found] = {}
    while True:
        slopes = _moved_to(scorer, kept)
        others = [unit for unit in units if unit not in kept]
        known = best.get(len(kept) - 1)
        if known and _better(fewer := _without_one(scorer, kept, width, slopes), known):
            (gone,) = set(kept) - set(fewer.units)
            say(f"{_counted(fewer)}: {_named(gone)} dropped again, loss {fewer.loss:.4f}")
            kept, best[len(fewer.units)] = list(fewer.units), fewer
        elif len(kept) < count and others:
            more = _with_more(scorer, kept, others, count, width, slopes)
            added = ", ".join(map(_named, more.units[len(kept) :]))
            say(f"{_counted(more)}: {added} added, loss {more.loss:.4f}")
            better = min(best.get(len(more.units), more), more, key=lambda found: found.loss)
            kept, best[len(more.units)] = list(better.units), better
        else:
            return [best[size] for size in sorted(best)]


def added_at(kept: int, count: int) -> int:
    """How many units of ``count`` a round adds to ``kept``."""
    return 1 if kept < ONE_BY_ONE else max(1, min((count - ONE_BY_ONE) // ROUNDS, count - kept))


def _better(found: Found, known: Found) -> bool:
    return known.loss - found.loss > max(GAIN * known.loss, NOISE)


def _with_more(
    scorer: Scorer, kept: Sequence[Unit], others: Sequence[Unit], count: int, width: int, slopes: Slopes
) -> Found:  # fmt: skip
    """``kept`` and the next unit or units."""
    tried = _steepest(slopes, others, width, sign=1)
    losses = dict(zip(tried, scorer.losses([_heads([*kept, unit]) for unit in tried]), strict=True))
    added = sorted(tried, key=losses.__getitem__)[: added_at(len(kept), count)]
    more = (*kept, *added)
    return Found(more, losses[added[0]] if len(added) == 1 else scorer.losses([_heads(more)])[0])


def _without_one(scorer: Scorer, kept: Sequence[Unit], width: int, slopes: Slopes) -> Found:
    """``kept`` less the unit that is missed least."""
    sets = [tuple(unit for unit in kept if unit != gone) for gone in _steepest(slopes, kept, width, sign=-1)]
    losses = scorer.losses([_heads(units) for units in sets])
    return min(map(Found, sets, losses), key=lambda found: found.loss)


def shrink(scorer: Scorer, kept: Sequence[Unit], count: int, width: int, say: Say, share: float = 0.0) -> list[Found]:
    """Drop the unit that raises the loss least, until ``count`` are kept; otherwise as :func:`grow`.

    Args:
        share: of the units that are left, the share to drop in one round.
    """
    found, kept = [], list(kept)
    while len(kept) > count:
        slopes = _moved_to(scorer, kept)
        drop = max(1, min(len(kept) - count, int(share * len(kept))))
        tried = _steepest(slopes, kept, max(width, 2 * drop), sign=-1)
        left = [_heads([other for other in kept if other != unit]) for unit in tried]
        losses = dict(zip(tried, scorer.losses(left), strict=True))
        gone = sorted(tried, key=losses.__getitem__)[:drop]
        kept = [unit for unit in kept if unit not in gone]
        loss = losses[gone[0]] if drop == 1 else scorer.loss(_heads(kept))
        found.append(Found(tuple(kept), loss))
        say(f"{_counted(found[-1])}: {', '.join(map(_named, gone))} dropped, loss {loss:.4f}")
    return found


def _moved_to(scorer: Scorer, kept: Sequence[Unit]) -> Slopes:
    """Move the scorer to ``kept``; the slopes there are computed when they are first asked for."""
    scorer.move_to(_heads(kept))
    return cache(lambda: scorer.slopes(dict.fromkeys(_heads(kept), 1.0))[1])


def _steepest(slopes: Slopes, units: Sequence[Unit], width: int, sign: int) -> list[Unit]:
    """The ``width`` units whose softmax attention lowers the loss most (sign 1) or least (−1) by their slopes."""
    if width >= len(units):
        return list(units)
    known = slopes()
    return sorted(units, key=lambda unit: sign * sum(known[head] for head in unit))[:width]


def _heads(units: Sequence[Unit]) -> list[Head]:
    return [head for unit in units for head in unit]


def _counted(found: Found) -> str:
    return f"{len(found.heads)} head{'s' if len(found.heads) != 1 else ''}"


def _named(unit: Unit) -> str:
    heads = ", ".join(str(head) for _, head in unit)
    return f"layer {unit[0][0]} head {heads}"
