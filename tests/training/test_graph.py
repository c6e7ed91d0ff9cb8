"""Stage 1 with its micro-steps replayed. Capturing needs a GPU (tests/test_cuda.py): here a replay computes again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from support.stage_one import APART, Job, assert_same, logged, packed

from lolcats.data.rows import Data
from lolcats.errors import Interrupted
from lolcats.stages.transfer import graph, orders
from lolcats.stages.transfer.loop import LayerTrainer

GRAPH = "transfer.cuda_graph=true"
LONG = ["transfer.max_steps=8", "transfer.early_stopping_patience=0"]


@pytest.fixture
def job(settings: list[str], tmp_path: Path) -> Job:
    rows = torch.randint(6, 300, (33, 32), generator=torch.Generator().manual_seed(0))
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return Job(tmp_path / "model", Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {}), settings)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to graphs, which are worth their while for few steps already."""
    seen: list[str] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()
        seen.append("captured")

        def replay() -> None:
            seen.append("replayed")
            run()

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "WORTH", 2)
    monkeypatch.setattr(orders, "can_capture", lambda device: True)
    return seen


@pytest.mark.parametrize("changes", [
    LONG, [*LONG, "transfer.coupling=joint"], [*LONG, "transfer.micro_batch_size=2", "transfer.coupling=joint"],
    ["attention.layers={0: window, 2: linear}", *LONG], APART,
])  # fmt: skip
def test_replays_change_nothing(changes: list[str], job: Job, replays: list[str], tmp_path: Path) -> None:
    """An uneven last batch goes without the graph; with APART, the layers that still learn get a new graph twice."""
    maps, result = job.train(tmp_path / "plain", job.config(*changes))
    assert not replays
    others, same = job.train(tmp_path / "graph", job.config(*changes, GRAPH))
    assert replays.count("captured") == (1 if changes is not APART else 3)
    assert replays.count("replayed") > 4
    assert_same(maps, others)
    assert same == result
    assert logged(tmp_path / "plain") == logged(tmp_path / "graph")


def test_rows_of_documents_go_without_a_graph(job: Job, replays: list[str], tmp_path: Path) -> None:
    replace(job, data=packed(job.data)).train(tmp_path / "run", job.config(*LONG, GRAPH))
    assert not replays


def test_a_run_is_continued_with_and_without_a_graph(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = job.train(tmp_path / "plain", job.config(*LONG))
    own = LayerTrainer._end_step

    def stopping(self: LayerTrainer, *arguments: object) -> None:
        self.interrupted = arguments[-1] == 3
        own(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LayerTrainer, "_end_step", stopping)
        with pytest.raises(Interrupted):
            job.train(tmp_path / "run", job.config(*LONG))
    maps, _ = job.train(tmp_path / "run", job.config(*LONG, GRAPH))
    assert replays
    assert_same(expected, maps)


def test_what_cannot_be_captured_goes_on_without(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore lines.")

    monkeypatch.setattr(graph, "capture", fails)
    maps, result = job.train(tmp_path / "run", job.config(*LONG, GRAPH))
    expected, same = job.train(tmp_path / "plain", job.config(*LONG))
    assert_same(expected, maps)
    assert same == result
    assert [r.message for r in caplog.records if "CUDA graph" in r.message] == [
        "Stage 1 goes on without a CUDA graph: CUDA error: operation not permitted when stream is capturing."
    ]


def test_short_runs_have_no_graph(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "WORTH", 20)
    job.train(tmp_path / "run", job.config(*LONG, GRAPH))
    assert not replays
