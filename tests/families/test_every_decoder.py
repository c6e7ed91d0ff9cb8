"""Every decoder class that transformers lists is linearized correctly or refused with a reason, never silently
wrong."""

from __future__ import annotations

import pytest
import transformers
from support.checks import outcome
from support.table import NOT_BUILT, model_types, render, written

OF_THE_TABLE = f"| transformers {transformers.__version__} |" in written()
TRIED = [t for t in model_types() if t not in NOT_BUILT]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRIED)
def test_linearized_right_or_refused(model_type: str) -> None:
    found = outcome(model_type)
    assert not found.refused or found.refused.endswith(".")


@pytest.mark.slow
def test_table_in_the_docs() -> None:
    """``python tests/support/table.py`` rewrites it."""
    if not OF_THE_TABLE:
        pytest.skip("the table is of another version of transformers")
    assert written() == render(outcome(t) for t in TRIED)


def test_every_class_is_tried_or_listed() -> None:
    assert len(TRIED) > 150
    assert not OF_THE_TABLE or set(NOT_BUILT) <= set(model_types())
