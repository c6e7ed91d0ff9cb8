"""A sweep's table: seeds, and differences to the control with their standard errors."""

from __future__ import annotations

import json
import math
import random

import pytest

from lolcats.evaluation import scores
from lolcats.evaluation.scores import Score, average, mean_score
from lolcats.lab.sweep import measure
from lolcats.lab.sweep.table import difference, render


def test_table_over_seeds() -> None:
    def result(seed: int, value: float) -> dict:
        score = {"value": 0.5, "stderr": 0.2, "items": "0101"}
        systems = {"teacher": {"held-out": {"value": 6.0}},
                   "student": {"held-out": {"value": value}, "piqa acc": score},
                   "window+lora": {"piqa acc": {"value": 0.25, "items": "0100"}}}  # fmt: skip
        return {"kind": "row", "name": "a", "seed": seed, "systems": systems, "layer_error": 0.25,
                "tokens": {"transfer": 2e6, "finetune": 4e6}, "seconds": {"transfer": 2.0, "evaluation": 1.0},
                "date": "2026-01-01"}  # fmt: skip

    reference = {
        "kind": "untrained",
        "name": "teacher",
        "systems": {"teacher": {"wiki": {"value": 25.0}}},
        "seconds": {},
    }
    text = render("T", [reference, result(0, 1.0), result(1, 9.0), result(1, 2.0)], "lolcats sweep x")
    assert "| teacher |  | 6 | 25 |  |" in text
    assert "| a | 2 | 1.50 ± 0.71 |  | 50 | 0.25 | 2M + 4M | 2 + 1 |" in text
    single = render("T", [reference, result(0, 1.0)], "lolcats sweep x", ["piqa acc"])
    assert "| row | seeds | piqa acc, % | layer error" in single
    assert "| a | 1 | 50 (20) | 0.25 |" in single
    assert "| – *what the linear term adds* |  | +25.00 (25) |" in single
    assert "lolcats sweep x" in text


def test_differences_are_paired() -> None:
    """Those of a perplexity are in %, from the losses of rows; those of a score in points."""
    ours, theirs = [1.0, 2.0, 3.0], [1.1, 2.2, 3.3]
    entries = [{"value": math.exp(sum(x) / 3), "items": x} for x in (ours, theirs)]
    value, error = difference(*entries, "wikitext2")
    assert value == pytest.approx(100 * (math.exp(-0.2) - 1))
    assert error == pytest.approx(100 * math.exp(-0.2) * 0.1 / math.sqrt(3))
    nll, exact = "positions nll 0-63", "passkey@1024 exact"
    assert difference({"value": 2.0}, {"value": 1.0}, nll) == (pytest.approx(100 * (math.e - 1)), None)
    assert difference(*({"value": sum(x) / 3, "items": x} for x in (ours, theirs)), nll) == pytest.approx(
        (value, error)
    )
    assert difference({"value": 2.0}, {"value": 1.0}, exact) is None
    assert difference({"value": 2.0}, {"value": 1.0}, "held-out") == (100.0, None)


def items(count: int, seed: int, share: float) -> tuple[float, ...]:
    draw = random.Random(seed)
    return tuple(float(draw.random() < share) for _ in range(count))


def stored(score: Score) -> dict:
    """As results.jsonl has it."""
    return json.loads(json.dumps(measure._entry(score)))


def test_an_average_has_the_error_of_its_parts() -> None:
    """Tasks of 50 and 400 items count alike, so that the small one brings most of the error."""
    ours, theirs = (
        average("zero-shot average", "acc, acc_norm", [
            mean_score("small", "acc", (items(50, seed, share),)),
            mean_score("large", "acc_norm", (items(400, seed + 1, share),)),
        ])
        for seed, share in ((0, 0.6), (7, 0.4))
    )  # fmt: skip
    expected = scores.difference(ours, theirs)
    metric = "zero-shot average acc, acc_norm"
    found = difference(stored(ours), stored(theirs), metric)
    assert found == pytest.approx((100 * expected.value, 100 * expected.stderr))
    one_sample = [{name: x for name, x in stored(s).items() if name != "strata"} for s in (ours, theirs)]
    assert found[1] > 1.3 * difference(*one_sample, metric)[1], "a result of an earlier version"
    assert difference(stored(ours), one_sample[1], metric) == difference(one_sample[0], stored(theirs), metric) == found


def test_answers_of_one_prompt_are_no_independent_items() -> None:
    draw = random.Random(0)
    prompts = [number for number in range(40) for _ in range(5)]
    own = [[draw.gauss(2, 1) for _ in range(40)] for _ in range(2)]
    ours, theirs = (
        mean_score("needles@1024", "nll", (tuple(each[p] + draw.gauss(0, 0.1) for p in prompts),), False, (), prompts)
        for each in own
    )
    expected = scores.difference(ours, theirs)
    value, error = difference(stored(ours), stored(theirs), "needles@1024 nll")
    ratio = math.exp(ours.value - theirs.value)
    assert (value, error) == pytest.approx((100 * (ratio - 1), 100 * ratio * expected.stderr), rel=1e-3)
    unclustered = [{name: x for name, x in stored(s).items() if name != "clusters"} for s in (ours, theirs)]
    assert error > 2 * difference(*unclustered, "needles@1024 nll")[1]


def test_a_single_item_has_no_error() -> None:
    one, other = (stored(mean_score("piqa", "acc", ((x,),))) for x in (1.0, 0.0))
    assert difference(one, other, "piqa acc") == (100, None)
