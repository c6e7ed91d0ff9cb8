"""Attention transfer decides, logs and learns the same as at commit b5a2d0a, also with transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from goldens.make import CASES, GOLDENS, SERIES, case_config, measure, metric_names

RECORDED = json.loads(GOLDENS.read_text())
TOLERANCE = 1e-6  # as between both engines in test_layerwise.py; digests of feature maps: relative to their norm


@pytest.mark.parametrize("case", CASES)
def test_stage_1(case: str, tmp_path: Path) -> None:
    found, expected = measure(case, tmp_path), dict(RECORDED["cases"][case])
    if case == "per_layer":  # at that commit it logged the rate of the step after; now, as joint does, that of the step
        expected["learning_rate"] = RECORDED["cases"]["joint"]["learning_rate"]
    assert [found[name] for name in ("steps", "best_step")] == [expected[name] for name in ("steps", "best_step")]
    assert found["best_loss"] == pytest.approx(expected["best_loss"], rel=TOLERANCE)
    for name in SERIES:
        assert steps(found, name) == steps(expected, name), name
        assert values(found, name) == pytest.approx(values(expected, name), rel=TOLERANCE), name
    assert list(found["maps"]) == list(expected["maps"])
    for name, digest in expected["maps"].items():
        assert found["maps"][name] == pytest.approx(digest, rel=0, abs=TOLERANCE * digest[0]), name


def test_metric_names(tmp_path: Path) -> None:
    expected = RECORDED["metric_names"]
    joint = expected["transfer, joint"]  # at that commit only transformers' Trainer had all of them
    assert metric_names(tmp_path) == {**expected, "transfer, per_layer": joint}


def test_cases_show_what_they_are_for() -> None:
    """Each case exercises the schedule, clip or stop it is for; otherwise no test would check it."""
    cases = RECORDED["cases"]
    assert list(cases) == list(CASES)
    for case in ("early stopping", "early stopping, per_layer"):
        assert cases[case]["best_step"] < cases[case]["steps"] < case_config(case).transfer.max_steps
    for case in ("plateau", "plateau, per_layer"):
        assert len(set(values(cases[case], "learning_rate"))) > 1
    assert len(set(values(cases["plateau, per_layer"], "learning_rate"))) > 3, "choose settings in which layers differ"
    limit, norms = case_config("clip").transfer.max_grad_norm, values(cases["clip"], "grad_norm")
    assert min(norms) < limit < max(norms)
    results = [json.dumps(case["maps"]) for case in cases.values()]
    assert len(set(results)) == len(results)


def steps(case: dict[str, Any], name: str) -> list[int]:
    return [step for step, _ in case[name]]


def values(case: dict[str, Any], name: str) -> list[float]:
    return [value for _, value in case[name]]
