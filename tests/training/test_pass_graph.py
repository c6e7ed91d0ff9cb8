"""Stage 2 with its passes replayed. Capturing needs a GPU (tests/test_cuda.py): here a replay computes again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupt_at, tiny_model
from support.replays import record_on_any_device
from support.stage_one import packed
from torch import Tensor

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.ranks import Ranks
from lolcats.stages import cuda_graph
from lolcats.stages.finetune import graph, stage
from lolcats.stages.finetune.distillation import Distillation
from lolcats.stages.finetune.stage import FinetuneTrainer, finetune

KL = ["finetune.loss=kl", "finetune.feature_map_learning_rate=1e-3", "attention.softmax_heads={0: [1]}"]
UNEVEN = ["finetune.batch_size=6", "finetune.micro_batch_size=2", "finetune.max_steps=9"]  # of 34 rows
GRAPH, PLAIN, AUTO = (f"finetune.cuda_graph={x}" for x in ("true", "false", "auto"))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to graphs. As in a CUDA graph, what is no tensor stays as it was when a pass was recorded, and
    gradients stay where they were."""
    own, state = FinetuneTrainer._pass, {}

    def again(self: FinetuneTrainer, inputs: dict[str, Tensor], count: Tensor) -> Tensor:
        now = self.current_gradient_accumulation_steps
        first = self.graphs.recording
        if first:
            state["parts"] = now
        places = [] if first else [p.grad.data_ptr() for p in self.trained]
        assert first or state.setdefault("places", places) == places
        self.graphs.recording, self.current_gradient_accumulation_steps = True, state["parts"]
        try:
            return own(self, inputs, count)
        finally:
            self.graphs.recording, self.current_gradient_accumulation_steps = first, now

    monkeypatch.setattr(FinetuneTrainer, "_pass", again)
    return record_on_any_device(monkeypatch)


def rows() -> Data:
    """Rows that predict different numbers of tokens."""
    ids = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(32) < torch.arange(40)[:, None] % 29, -100)
    splits = {"train": slice(6, None), "validation": slice(3), "test": slice(3, 6)}
    parts = {name: ids[part] for name, part in splits.items()}
    return Data(**parts, fingerprint="", summary={}, labels={name: labels[part] for name, part in splits.items()})


def run(directory: Path, settings: list[str], data: Data | None = None) -> tuple[dict[str, Any], Any]:
    config = load_config("paper-sinks", settings)
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
    assert replays.count("replayed") == 8 * 3  # of nine steps, the sixth has two micro-batches of two rows
    assert all(p.grad is None for p in found.values())
    assert losses(same) == losses(result)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_cross_entropy_does_not_wait_for_the_gpu(
    settings: list[str], replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed in another way than without a graph, with the same result but for rounding."""
    seen: list[Distillation] = []
    own = stage.distillation_loss
    monkeypatch.setattr(stage, "distillation_loss", lambda *given: seen.append(given[3]) or own(*given))
    expected, result = run(tmp_path / "plain", [*settings, *UNEVEN, PLAIN])
    found, same = run(tmp_path / "graph", [*settings, *UNEVEN, GRAPH])
    assert len(seen) == len(replays) > 20
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


@pytest.mark.parametrize("after", [3, 5])
def test_a_run_is_continued_with_and_without_a_graph(
    after: int, settings: list[str], replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is of a regular micro-batch, also if the first step is the short one at the end of an epoch."""
    changes = [*settings, *KL, *UNEVEN]
    expected, _ = run(tmp_path / "plain", [*changes, PLAIN])
    with monkeypatch.context() as patch:
        interrupt_at(patch, after)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", [*changes, PLAIN])
    found, _ = run(tmp_path / "run", [*changes, GRAPH])
    assert replays.count("captured") == 1
    assert replays.count("replayed") == 3 * (8 - after if after == 3 else 3)
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
    with pytest.raises(LolcatsError, match=r"In step [23] of finetune the loss became NaN or infinite"):
        run(tmp_path, [*settings, *KL, *UNEVEN, GRAPH, "finetune.learning_rate=1e30"])
    assert "replayed" in replays


def test_which_runs_get_a_graph_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "choose_path", lambda q, _: "kernels" if q.dtype == torch.bfloat16 else "chunked")
    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: device.type == "cpu")
    plain = FinetuneConfig()

    def model(**attention: Any) -> Any:
        config = AttentionConfig(window_size=8, sinks=2, feature_dim=8, **attention)
        return lolcats.convert(tiny_model().bfloat16(), config)

    again, experts, in_4_bits = model(), model(), model()
    in_4_bits.is_quantized = True
    again.gradient_checkpointing_enable()
    experts.model.layers[0].mlp.experts = torch.nn.Linear(1, 1)
    cases: dict[str, tuple[Any, Data, FinetuneConfig]] = {
        "plain": (model(), rows(), plain), "kept heads": (model(softmax_heads={"1": [0]}), rows(), plain),
        "a softmax layer": (model(layers={"0": "softmax"}), rows(), plain), "fp32": (model().float(), rows(), plain),
        "documents": (model(), packed(rows()), plain), "dropout": (model(), rows(), FinetuneConfig(dropout=0.1)),
        "DoRA": (model(), rows(), FinetuneConfig(use_dora=True)),
        "checkpointing": (again, rows(), plain), "experts": (experts, rows(), plain),
        "4 bits": (in_4_bits, rows(), plain),
        "another device": (model().to("meta"), rows(), plain),
    }  # fmt: skip
    found = {name: graph.graph_for("auto", *case) for name, case in cases.items()}
    assert [name for name, answer in found.items() if answer == "auto"] == ["plain", "kept heads", "a softmax layer"]
    assert not any(graph.graph_for(False, *case) for case in cases.values())
    assert graph.graph_for(True, *cases["experts"]) is True
    assert plain.cuda_graph is False
    monkeypatch.setattr(graph, "ranks", lambda: Ranks(0, 2))
    assert graph.graph_for("auto", *cases["plain"]) is False
