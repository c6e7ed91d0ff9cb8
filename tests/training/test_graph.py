"""Stage 1 with its micro-steps replayed. Capturing needs a GPU (tests/test_cuda.py): here a replay computes again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from support.replays import record_on_any_device
from support.stage_one import APART, Job, assert_same, logged, packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lolcats
from lolcats.attention import AttentionSpec, choose_path, use_backend
from lolcats.config import AttentionConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.ranks import Ranks
from lolcats.stages import cuda_graph
from lolcats.stages.transfer import orders
from lolcats.stages.transfer.loop import LayerTrainer

GRAPH, PLAIN, AUTO = (f"transfer.cuda_graph={x}" for x in ("true", "false", "auto"))
LONG = ["transfer.max_steps=8", "transfer.early_stopping_patience=0"]


@pytest.fixture
def job(settings: list[str], tmp_path: Path) -> Job:
    rows = torch.randint(6, 300, (33, 32), generator=torch.Generator().manual_seed(0))
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return Job(tmp_path / "model", Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {}), settings)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_on_any_device(monkeypatch)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of graphs."""
    return [r.message for r in caplog.records if "CUDA graph" in r.message and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("changes", [
    LONG, [*LONG, "transfer.coupling=joint"], [*LONG, "transfer.micro_batch_size=2", "transfer.coupling=joint"],
    ["attention.layers={0: window, 2: linear}", *LONG], APART,
])  # fmt: skip
def test_replays_change_nothing(changes: list[str], job: Job, replays: list[str], tmp_path: Path) -> None:
    """An uneven last batch goes without the graph; with APART, the layers that still learn get a new graph twice."""
    maps, result = job.train(tmp_path / "plain", job.config(*changes, PLAIN))
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


@pytest.mark.parametrize("asked", [GRAPH, AUTO])
def test_a_run_is_continued_with_and_without_a_graph(
    asked: str, job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "choose_path", lambda *_: "kernels")
    expected, _ = job.train(tmp_path / "plain", job.config(*LONG, PLAIN))
    own = LayerTrainer._end_step

    def stopping(self: LayerTrainer, *arguments: object) -> None:
        self.interrupted = arguments[-1] == 3
        own(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LayerTrainer, "_end_step", stopping)
        with pytest.raises(Interrupted):
            job.train(tmp_path / "run", job.config(*LONG, PLAIN))
    assert not replays
    maps, _ = job.train(tmp_path / "run", job.config(*LONG, asked))
    assert replays
    assert_same(expected, maps)


def test_what_cannot_be_captured_goes_on_without(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore lines.")

    monkeypatch.setattr(cuda_graph, "capture", fails)
    maps, result = job.train(tmp_path / "run", job.config(*LONG, GRAPH))
    expected, same = job.train(tmp_path / "plain", job.config(*LONG, PLAIN))
    assert_same(expected, maps)
    assert same == result
    assert warnings(caplog) == [
        "Stage 1 goes on without a CUDA graph: CUDA error: operation not permitted when stream is capturing."
    ]
    caplog.clear()
    monkeypatch.setattr(cuda_graph, "choose_path", lambda *_: "kernels")
    others, _ = job.train(tmp_path / "auto", job.config(*LONG, AUTO))
    assert_same(expected, others)
    assert not warnings(caplog)


def test_short_runs_have_no_graph(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(cuda_graph, "WORTH", 20)
    job.train(tmp_path / "run", job.config(*LONG, GRAPH))
    assert not replays


def test_auto_records_where_it_can(
    job: Job, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the default. A graph that leaves too little memory is given up; one that was asked for by name stays."""
    assert job.config().transfer.cuda_graph == "auto"
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cuda_graph, "choose_path", lambda *_: "kernels")
    said, expected = [], job.train(tmp_path / "plain", job.config(*LONG, PLAIN))[0]
    for name, asked, room in (("graph", AUTO, True), ("full", AUTO, False), ("all", GRAPH, False)):
        monkeypatch.setattr(cuda_graph, "has_room", lambda *_, room=room: room)
        replays.clear()
        caplog.clear()
        maps, _ = job.train(tmp_path / name, job.config(*LONG, asked))
        assert_same(expected, maps)
        assert ("replayed" in replays) == (name != "full")
        assert not warnings(caplog)
        said.append([r.message for r in caplog.records if "CUDA graph" in r.message])
    recorded = ["Stage 1 has recorded a CUDA graph, which it replays from now on."]
    full = ["Stage 1 goes on without a CUDA graph: it leaves too little memory."]
    assert said == [recorded, full, recorded]


def test_which_runs_get_a_graph_unasked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for which a gain was measured: 16 bits on one GPU, computed by the kernels."""
    pytest.importorskip("triton")

    def on_gpu(q: Tensor, spec: AttentionSpec) -> str:
        shape = spec.rotated(q).shape
        with FakeTensorMode():
            return choose_path(torch.empty(shape, dtype=q.dtype, device="cuda"), replace(spec, unrotated=False))

    monkeypatch.setattr(cuda_graph, "choose_path", on_gpu)
    monkeypatch.setattr(orders, "can_capture", lambda device: device.type == "cpu")
    model = converted()
    cases = {
        "plain": (model, job.data, Ranks()), "before RoPE": (converted(feature_inputs="unrotated"), job.data, Ranks()),
        "a softmax layer": (converted(layers={"0": "softmax"}), job.data, Ranks()),
        "fp32": (converted().float(), job.data, Ranks()), "ranks": (model, job.data, Ranks(0, 2)),
        "documents": (model, packed(job.data), Ranks()),
        "kept heads": (converted(softmax_heads={"1": [0]}), job.data, Ranks()),
        "SUPRA": (converted(kind="linear", decay="retnet", normalizer="group_norm"), job.data, Ranks()),
        "experts": (converted(), job.data, Ranks()), "devices": (converted(), job.data, Ranks()),
        "a device without graphs": (converted().to("meta"), job.data, Ranks()),
    }  # fmt: skip
    cases["experts"][0].model.layers[0].mlp.experts = torch.nn.Linear(1, 1)
    cases["devices"][0].model.layers[1].to("meta")
    found = {name: orders.graph_for("auto", *case) for name, case in cases.items()}
    assert [name for name, answer in found.items() if answer == "auto"] == ["plain", "before RoPE", "a softmax layer"]
    assert set(found.values()) == {"auto", False}
    assert [name for name, case in cases.items() if orders.graph_for(True, *case) is not True] == [
        "a device without graphs"
    ]
    assert not any(orders.graph_for(False, *case) for case in cases.values())
    with use_backend("chunked"):
        assert orders.graph_for("auto", *cases["plain"]) is False


def converted(**attention: Any) -> Any:
    config = AttentionConfig(window_size=8, sinks=2, feature_dim=8, **attention)
    return lolcats.convert(tiny_model().bfloat16(), config)


def test_values_of_the_setting() -> None:
    values = [load_config("paper-sinks", [x]).transfer.cuda_graph for x in (GRAPH, PLAIN, AUTO)]
    assert values == [True, False, "auto"]
    with pytest.raises(LolcatsError, match=r"transfer\.cuda_graph"):
        load_config("paper-sinks", ["transfer.cuda_graph=never"])
