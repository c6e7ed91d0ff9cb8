"""Stage 2 with its passes replayed. Capturing needs a GPU (tests/test_cuda.py): here a replay computes again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupt_at, tiny_model
from support.stage_one import packed

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.ranks import Ranks
from lolcats.stages import cuda_graph
from lolcats.stages.finetune import graph
from lolcats.stages.finetune.stage import finetune

KL = ["finetune.loss=kl", "finetune.feature_map_learning_rate=1e-3", "attention.softmax_heads={0: [1]}"]
UNEVEN = ["finetune.batch_size=6", "finetune.micro_batch_size=2", "finetune.max_steps=9"]  # of 34 rows
GRAPH, PLAIN, AUTO = (f"finetune.cuda_graph={x}" for x in ("true", "false", "auto"))


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

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "has_room", lambda *_: True)
    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(cuda_graph, "WORTH", 2)
    return seen


def rows() -> Data:
    ids = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(ids[6:], ids[:3], ids[3:6], "", {})


def run(directory: Path, settings: list[str], data: Data | None = None) -> tuple[dict[str, Any], Any]:
    config = load_config("default", settings)
    torch.manual_seed(1)
    wrapped, result = finetune(lolcats.convert(tiny_model(), config), data or rows(), config, directory)
    return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}, result


def losses(result: Any) -> list[float]:
    return [entry[key] for entry in result.history for key in ("loss", "eval_loss") if key in entry]


def test_replays_change_nothing(settings: list[str], replays: list[str], tmp_path: Path) -> None:
    """The last step of an epoch has fewer micro-batches, and goes without the graph."""
    changes = [*settings, *KL, *UNEVEN]
    expected, result = run(tmp_path / "plain", [*changes, PLAIN])
    assert not replays
    found, same = run(tmp_path / "graph", [*changes, GRAPH])
    assert replays.count("captured") == 1
    assert 0 < replays.count("replayed") < 3 * 9
    assert all(p.grad is None for p in found.values())
    assert losses(same) == losses(result)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_cross_entropy_does_not_wait_for_the_gpu(settings: list[str], replays: list[str], tmp_path: Path) -> None:
    """It is computed in another way than without a graph, with the same result but for rounding."""
    expected, result = run(tmp_path / "plain", [*settings, *UNEVEN, PLAIN])
    found, same = run(tmp_path / "graph", [*settings, *UNEVEN, GRAPH])
    assert "replayed" in replays
    assert losses(same) == pytest.approx(losses(result), rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


def test_rows_of_documents_go_without_a_graph(settings: list[str], replays: list[str], tmp_path: Path) -> None:
    run(tmp_path, [*settings, *KL, GRAPH], packed(rows()))
    assert not replays


def test_short_runs_have_no_graph(
    settings: list[str], replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(cuda_graph, "WORTH", 20)
    run(tmp_path, [*settings, *KL, *UNEVEN, GRAPH])
    assert not replays


def test_a_run_is_continued_with_and_without_a_graph(
    settings: list[str], replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*settings, *KL, *UNEVEN]
    expected, _ = run(tmp_path / "plain", [*changes, PLAIN])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", [*changes, PLAIN])
    found, _ = run(tmp_path / "run", [*changes, GRAPH])
    assert "replayed" in replays
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("asked", [GRAPH, AUTO])
def test_what_cannot_be_captured_goes_on_without(
    asked: str, settings: list[str], replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore lines.")

    changes = [*settings, *KL, *UNEVEN]
    expected, _ = run(tmp_path / "plain", [*changes, PLAIN])
    monkeypatch.setattr(cuda_graph, "capture", fails)
    monkeypatch.setattr(cuda_graph, "choose_path", lambda *_: "kernels")
    found, _ = run(tmp_path / "run", [*changes, asked])
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    said = [r.message for r in caplog.records if "CUDA graph" in r.message and r.levelno >= logging.WARNING]
    problem = "Stage 2 goes on without a CUDA graph: CUDA error: operation not permitted when stream is capturing."
    assert said == ([problem] if asked == GRAPH else [])


def test_a_loss_of_nan_is_noticed(settings: list[str], replays: list[str], tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match="the loss became NaN or infinite"):
        run(tmp_path, [*settings, *KL, *UNEVEN, GRAPH, "finetune.learning_rate=1e30"])
    assert "replayed" in replays


def test_which_runs_get_a_graph_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "choose_path", lambda q, _: "kernels" if q.dtype == torch.bfloat16 else "chunked")
    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: device.type == "cpu")
    stage = FinetuneConfig()

    def model(**attention: Any) -> Any:
        config = AttentionConfig(window_size=8, sinks=2, feature_dim=8, **attention)
        return lolcats.convert(tiny_model().bfloat16(), config)

    again, experts, in_4_bits = model(), model(), model()
    in_4_bits.is_quantized = True
    again.gradient_checkpointing_enable()
    experts.model.layers[0].mlp.experts = torch.nn.Linear(1, 1)
    cases: dict[str, tuple[Any, Data, FinetuneConfig]] = {
        "plain": (model(), rows(), stage), "kept heads": (model(softmax_heads={"1": [0]}), rows(), stage),
        "a softmax layer": (model(layers={"0": "softmax"}), rows(), stage), "fp32": (model().float(), rows(), stage),
        "documents": (model(), packed(rows()), stage), "dropout": (model(), rows(), FinetuneConfig(dropout=0.1)),
        "checkpointing": (again, rows(), stage), "experts": (experts, rows(), stage),
        "4 bits": (in_4_bits, rows(), stage),
        "another device": (model().to("meta"), rows(), stage),
    }  # fmt: skip
    found = {name: graph.graph_for("auto", *case) for name, case in cases.items()}
    assert [name for name, answer in found.items() if answer == "auto"] == ["plain", "kept heads", "a softmax layer"]
    assert not any(graph.graph_for(False, *case) for case in cases.values())
    assert graph.graph_for(True, *cases["experts"]) is True
    monkeypatch.setattr(graph, "ranks", lambda: Ranks(0, 2))
    assert graph.graph_for("auto", *cases["plain"]) is False
