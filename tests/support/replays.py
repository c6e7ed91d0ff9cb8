"""Graphs of steps where there is no GPU: a replay computes again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lolcats.stages import cuda_graph
from lolcats.stages.transfer import orders


def record_on_any_device(patch: pytest.MonkeyPatch) -> list[str]:
    """Let stages record and replay graphs, which are worth their while for few steps already; what happened to them."""
    seen: list[str] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()
        seen.append("captured")

        def replay() -> None:
            seen.append("replayed")
            run()

        return replay

    patch.setattr(cuda_graph, "capture", capture)
    patch.setattr(cuda_graph, "WORTH", 2)
    patch.setattr(cuda_graph, "has_room", lambda *_: True)
    for module in (cuda_graph, orders):
        patch.setattr(module, "can_capture", lambda device: True)
    return seen
