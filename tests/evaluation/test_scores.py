"""Standard errors, paired differences and the share of a gap closed, against figures computed by hand."""

from __future__ import annotations

import math

import pytest

from lolcats.evaluation.scores import Score, average, difference, mean_score, share_closed
from lolcats.report.comparison import comparison, comparison_rows


def score(*items: float, task: str = "task") -> Score:
    return mean_score(task, "acc", (items,))


def test_error_of_an_accuracy_is_binomial() -> None:
    result = score(*[1.0] * 30, *[0.0] * 10)
    assert result.value == 0.75
    assert result.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert result.count == 40
    assert score(1.0).stderr is None


def test_answers_of_one_prompt_are_one_observation() -> None:
    """Two equal answers per prompt have the error of one; independent items that of single clusters."""
    pairs = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    once, twice = score(1, 0, 0, 1, 1), mean_score("task", "acc", ((1, 1, 0, 0, 0, 0, 1, 1, 1, 1),), clusters=pairs)
    assert twice.stderr == pytest.approx(once.stderr)
    single = mean_score("task", "acc", ((1, 0, 0, 1, 1),), clusters=range(5))
    assert single.stderr == pytest.approx(once.stderr)
    uneven = mean_score("task", "acc", ((1, 1, 0),), clusters=[7, 7, 9])
    assert uneven.stderr == pytest.approx(math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2)) / 3)
    assert mean_score("task", "acc", ((1, 0),), clusters=[3, 3]).stderr is None
    other = mean_score("task", "acc", ((0,) * 10,), clusters=twice.clusters)
    assert difference(twice, other).stderr == pytest.approx(once.stderr)
    half = mean_score("task", "acc", ((1, 1, 0, 0, 0, 0, 0, 0, 1, 1),), clusters=twice.clusters)
    third = share_closed(half, twice, other)
    expected = share_closed(score(1, 0, 0, 0, 1), once, score(0, 0, 0, 0, 0))
    assert third.stderr == pytest.approx(expected.stderr)


def test_difference_is_paired() -> None:
    teacher, student = score(1, 1, 1, 0, 0, 0, 1, 1), score(1, 1, 0, 0, 0, 0, 1, 1)
    found = difference(student, teacher)
    assert found.value == pytest.approx(-0.125)
    assert found.stderr == pytest.approx(math.sqrt((1 - 1 / 8) / 8 / 7))
    assert found.stderr < math.hypot(student.stderr, teacher.stderr)
    with pytest.raises(ValueError, match="zip"):
        difference(student, score(1, 0))


def test_average_counts_every_task_alike() -> None:
    small, large = score(1, 0), score(*[1.0] * 9, 0)
    result = average("average", "acc", [small, large])
    assert result.value == pytest.approx((0.5 + 0.9) / 2)
    assert result.stderr == pytest.approx(math.hypot(small.stderr, large.stderr) / 2)


def test_share_of_the_gap() -> None:
    teacher, baseline = score(*[1.0] * 80, *[0.0] * 20), score(*[1.0] * 40, *[0.0] * 60)
    student = score(*[1.0] * 70, *[0.0] * 30)
    share = share_closed(student, teacher, baseline)
    assert share is not None
    assert share.value == pytest.approx(0.75)
    assert share.stderr == pytest.approx(0.069, abs=0.002)
    full = share_closed(teacher, teacher, baseline)
    assert full is not None
    assert (full.value, full.stderr) == (1, 0)
    assert share_closed(student, teacher, score(*[1.0] * 79, *[0.0] * 21)) is None, "one item of 100 is noise"
    assert share_closed(student, teacher, teacher) is None
    corpus = [Score("wikitext", "word_perplexity", value, None) for value in (30.0, 20.0, 60.0)]
    assert share_closed(*corpus).value == pytest.approx(0.75)


def test_table() -> None:
    scores = {"teacher": [score(1, 1, 1, 0)], "window": [score(0, 0, 0, 0)], "student": [score(1, 1, 0, 0)]}
    header, rows = comparison_rows(scores)
    assert header == ("task", "items", "teacher", "window", "student", "student − teacher", "student − window",
                      "gap closed")  # fmt: skip
    assert rows == [("task acc", "4", "0.750 ± 0.250", "0.000 ± 0.000", "0.500 ± 0.289", "-0.250 ± 0.250",
                     "+0.500 ± 0.289", "67% ± 31%")]  # fmt: skip
    alone = comparison({"model": [score(1, 0)]})[0]
    assert "difference" not in alone
    assert alone["results"] == {"model": ((1, 0),)}
