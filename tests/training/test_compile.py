"""``finetune.compile``: the same losses up to rounding, and one graph for each layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch._dynamo.utils import counters

import lolcats
from lolcats.attention import use_backend
from lolcats.config import Config, FinetuneConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import decoder_layers
from lolcats.stages.finetune import compiled
from lolcats.stages.finetune.compiled import compiles
from lolcats.stages.finetune.stage import finetune

ROWS = torch.randint(6, 300, (12, 32), generator=torch.Generator().manual_seed(0))
DATA = Data(ROWS[:8], ROWS[8:10], ROWS[10:], "test", {})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the code generator, which takes minutes on a CPU."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def config(*settings: str, **changes: Any) -> Config:
    few = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1, "log_steps": 1, "eval_steps": 2, "save_steps": 2}
    base = load_config(
        "default", ["attention.window_size=8", "attention.feature_dim=8", "data.sequence_length=32", *settings]
    )
    return replace(base, finetune=FinetuneConfig(rank=4, learning_rate=1e-2, **{**few, **changes}))


def history(settings: Config, directory: Path, family: str = "llama") -> list[float]:
    model = lolcats.convert(tiny_model(family), settings.attention)
    with use_backend("triton"):
        _, result = finetune(model, DATA, settings, directory)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    return [entry.get("loss", entry.get("eval_loss", 0.0)) for entry in result.history]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("family", "settings", "changes"), [
    ("llama", [], {}), ("qwen2", ["attention.softmax_heads={0: [1]}"], {}),
    ("llama", ["attention.layers={1: softmax}"], {}), ("llama", [], {"loss": "mix"}),
], ids=["llama", "kept_heads", "kept_layer", "taught"])  # fmt: skip
def test_losses_are_those_of_layers_that_are_not_compiled(
    family: str, settings: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = history(config(*settings, **changes), tmp_path / "plain", family)
    assert not counters["stats"]
    both = history(config(*settings, compile=True, **changes), tmp_path / "compiled", family)
    assert both == pytest.approx(plain, rel=1e-5)
    assert len({*both}) > 1
    assert counters["stats"]["unique_graphs"] == 2, "the first layer, whose input has no gradient, and the others"
    assert not counters["graph_break"]


@pytest.mark.parametrize(("settings", "changes", "message"), [
    (["data.reset_at_documents=true"], {}, "reset_at_documents"),
    (["attention.feature_map=elu"], {}, "feature_map=elu"),
    ([], {"feature_map_learning_rate": 1e-3}, "feature_map_learning_rate"),
    (["attention.kind=softmax"], {}, "without linearized layers"),
    ([], {"gradient_checkpointing": True}, "gradient_checkpointing=true"),
], ids=["documents", "maps", "trained_maps", "softmax", "recomputed"])  # fmt: skip
def test_what_is_not_supported(settings: list[str], changes: dict[str, Any], message: str) -> None:
    asked = config(*settings, compile=True, **changes)
    model = lolcats.convert(tiny_model(), asked.attention)
    positions = {"train": ROWS} if asked.data.reset_at_documents else {}
    data = replace(DATA, positions=positions)
    with pytest.raises(LolcatsError, match=message):
        compiles(model, asked, data)
    for setting in ("auto", False):
        assert not compiles(model, replace(asked, finetune=replace(asked.finetune, compile=setting)), data)


def test_auto_is_for_long_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lolcats.convert(tiny_model(), config().attention)
    assert not compiles(model, config(compile="auto", max_steps=compiled.LONG), DATA)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert compiles(model, config(compile="auto", max_steps=compiled.LONG), DATA)
    assert not compiles(model, config(compile="auto", max_steps=compiled.LONG - 1), DATA)
    assert not compiles(model, config(compile="auto", max_steps=-1, epochs=2.0), DATA)


def test_a_model_without_linearized_layers_trains(tmp_path: Path) -> None:
    settings = config("attention.kind=softmax", compile="auto")
    _, result = finetune(lolcats.convert(tiny_model(), settings.attention), DATA, settings, tmp_path)
    assert result.steps == 1


@pytest.mark.slow
def test_compiled_to_machine_code(tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain, both = (history(config(compile=on), tmp_path / str(on)) for on in (False, True))
    assert both == pytest.approx(plain, rel=1e-4)
