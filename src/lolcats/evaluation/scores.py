"""Scores with standard errors: of one model, of the paired difference of two, and of the share of a gap closed.

Items are in the same order for every model, so two models are compared item by item. An item that is hard for one model
is often hard for the other, so the difference is known more precisely than either score. Items are grouped in strata
(usually one); a score is the mean of the strata's means, e.g. the average of five benchmarks of different sizes. Items
of one cluster (answers of one prompt) are not independent; the standard error is that of clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Strata = tuple[tuple[float, ...], ...]
"""Results of single items by stratum; empty if a metric is not a mean over items (e.g. corpus perplexity)."""

NOISE = 2.0  # teacher and baseline count as equal below this many standard errors


@dataclass(frozen=True)
class Score:
    """One metric of one task for one model."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: Strata = ()
    higher_is_better: bool = True
    labels: tuple[str, ...] = ()
    """A label for each item of a single stratum (e.g. its depth), for tables that split the score."""
    clusters: tuple[int, ...] = ()
    """The cluster of each item of a single stratum (e.g. its prompt); empty if items are independent."""

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.metric

    @property
    def count(self) -> int:
        return sum(map(len, self.items))


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, or None if the error is unknown."""

    value: float
    stderr: float | None = None


def mean_score(task: str, metric: str, items: Strata, higher_is_better: bool = True,
               labels: Sequence[str] = (), clusters: Sequence[int] = ()) -> Score:  # fmt: skip
    """The score of these items: the mean of the strata's means. For independent 0/1 items its error is the binomial
    one."""
    estimate = estimate_of(items, clusters)
    return Score(
        task, metric, estimate.value, estimate.stderr, items, higher_is_better, tuple(labels), tuple(clusters)
    )  # fmt: skip


def average(task: str, metric: str, scores: Sequence[Score]) -> Score:
    """The unweighted average of several scores."""
    return mean_score(task, metric, tuple(stratum for score in scores for stratum in score.items))


def difference(score: Score, other: Score) -> Estimate:
    """score − other, with the standard error of the differences by item."""
    if not score.items:
        return Estimate(score.value - other.value)
    return estimate_of(_combine(lambda a, b: a - b, score, other), score.clusters)


def share_closed(student: Score, teacher: Score, baseline: Score) -> Estimate | None:
    """(student − baseline) / (teacher − baseline) with its first-order error; None if the gap is within noise."""
    gap = difference(teacher, baseline)
    if gap.value == 0 or (gap.stderr is not None and abs(gap.value) < NOISE * gap.stderr):
        return None
    share = (student.value - baseline.value) / gap.value
    if not student.items:
        return Estimate(share)
    parts = _combine(lambda s, t, b: (s - b) - share * (t - b), student, teacher, baseline)
    rest = estimate_of(parts, student.clusters)
    return Estimate(share, rest.stderr / abs(gap.value) if rest.stderr is not None else None)


def _combine(function: Callable[..., float], *scores: Score) -> Strata:
    strata = zip(*(score.items for score in scores), strict=True)
    return tuple(tuple(function(*values) for values in zip(*stratum, strict=True)) for stratum in strata)


def estimate_of(items: Strata, clusters: Sequence[int] = ()) -> Estimate:
    """Mean of the strata's means and its standard error √(Σ s²/n) / number of strata.

    With G clusters of a single stratum: √(G/(G − 1) Σ_c (Σ_{i in c} (x_i − mean))²) / n.
    """
    value, variance = 0.0, 0.0
    for stratum in items:
        mean = math.fsum(stratum) / len(stratum)
        value += mean
        groups: dict[int, list[float]] = {}
        for cluster, x in zip(clusters or range(len(stratum)), stratum, strict=True):
            groups.setdefault(cluster, []).append(x - mean)
        if len(groups) > 1:
            squares = math.fsum(math.fsum(group) ** 2 for group in groups.values())
            variance += squares * len(groups) / (len(groups) - 1) / len(stratum) ** 2
        else:
            variance = math.nan
    value /= len(items)
    return Estimate(value, None if math.isnan(variance) else math.sqrt(variance) / len(items))
