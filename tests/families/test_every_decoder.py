"""Every decoder class that transformers lists is linearized right or refused with a reason, never silently wrong."""

from __future__ import annotations

import pytest
from checks import outcome
from table import NOT_BUILT, model_types, written


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in NOT_BUILT])
def test_linearized_right_or_refused(model_type: str) -> None:
    outcome(model_type)
