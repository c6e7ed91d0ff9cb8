"""The models that are compared: names that users type and files keep, and how many sinks the baseline has."""

from __future__ import annotations

from typing import get_args

import pytest

from lolcats.cli import use
from lolcats.compared import BASELINES, COMPARED, CONTROLS, WINDOW_SINKS, baseline_sinks
from lolcats.config import AttentionConfig, Control

KEPT = {
    "teacher": ("ppl_teacher", "teacher"),
    "window": ("ppl_window", "window, nothing trained"),
    "window+sinks": ("ppl_window_sinks", "window + sinks, nothing trained"),
    "transfer": ("ppl_transfer", "transfer"),
    "student": ("ppl_student", "student"),
    "linear-off": ("ppl_linear_off", "linear off"),
    "window-off": ("ppl_window_off", "window-off"),
    "window+lora": ("ppl_window_lora", "window+lora"),
    "teacher+lora": ("ppl_teacher_lora", "teacher+lora"),
}
"""Keys in run.json and names in the results of sweeps: existing files have them."""


def test_names_of_existing_files() -> None:
    assert {model.name: (model.result, model.in_sweeps) for model in COMPARED} == KEPT


def test_controls_are_those_of_the_configuration() -> None:
    assert tuple(CONTROLS) == get_args(Control)


def test_help_names_every_baseline() -> None:
    text = str(use.evaluate.__annotations__["baseline"])
    assert [name for name in BASELINES if name not in text] == []


@pytest.mark.parametrize(("sinks", "window_size", "expected"), [(2, 64, 2), (0, 64, 4), (0, 4, 4), (0, 3, 3)])
def test_sinks_of_the_baseline(sinks: int, window_size: int, expected: int) -> None:
    attention = AttentionConfig(sinks=sinks, window_size=window_size)
    assert baseline_sinks(attention) == expected
    assert WINDOW_SINKS.changes(attention) == {"kind": "window", "sinks": expected}
    assert WINDOW_SINKS.label(attention) == f"window + {expected} sinks, nothing trained"
