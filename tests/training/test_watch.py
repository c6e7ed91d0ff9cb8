"""A NaN or infinite loss stops the stage, the error names step and layer, and nothing bad is saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model

import lolcats
from lolcats.config import Config, load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.stages.finetune.stage import finetune
from lolcats.stages.finetune.trainer import newest_checkpoint
from lolcats.stages.transfer import loop
from lolcats.stages.transfer.stage import transfer
from lolcats.stages.transfer.units import read_progress
from lolcats.stages.watch import LossWatch, first_bad_weight
from lolcats.tensors import read_tensors


@pytest.fixture
def config(settings: list[str]) -> Config:
    return load_config(
        "paper-sinks", [*settings, "transfer.max_steps=9", "transfer.log_steps=50", "finetune.log_steps=50"]
    )


@pytest.fixture
def data() -> Data:
    rows = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(rows[8:], rows[:4], rows[4:8], "", {})


def converted(config: Config) -> Any:
    torch.manual_seed(1)
    return lolcats.convert(tiny_model(), config)


def test_stage_one_names_step_and_layer(config: Config, data: Data, tmp_path: Path, monkeypatch) -> None:
    """Also if it is logged much later. The checkpoint of the step before and the best weights stay intact."""
    real, calls = loop.attention_loss, []

    def loss(layer, call, settings):
        calls.append(layer.geometry.layer == 1)
        bad = sum(calls) == 10 and calls[-1]  # the second of two micro-batches in step 5
        return real(layer, call, settings) * (float("nan") if bad else 1.0)

    model = converted(config)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "attention_loss", loss)
        with pytest.raises(LolcatsError, match="In step 5 of transfer the loss became NaN or infinite in layer 1"):
            transfer(model, data, config, tmp_path)
    unit = tmp_path / "checkpoints" / "transfer" / "units" / "all-layers.safetensors"
    assert read_progress(unit).step == 4
    assert first_bad_weight(read_tensors(unit)) == ""
    assert transfer(converted(config), data, config, tmp_path).steps == 9  # goes on from there


def test_stage_two_that_diverges(settings: list[str], data: Data, tmp_path: Path) -> None:
    """Every layer's LoRA has grown too large; the first one is named."""
    changes = ["finetune.learning_rate=1e30", "finetune.max_grad_norm=0", "finetune.log_steps=50"]
    config = load_config("paper-sinks", [*settings, *changes])
    with pytest.raises(LolcatsError, match="In step 2 of finetune the loss became NaN or infinite in layer 0"):
        finetune(converted(config), data, config, tmp_path)


def test_stage_two_names_the_layer(config: Config, data: Data, tmp_path: Path) -> None:
    model = converted(config)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 3] = float("inf")
    with pytest.raises(LolcatsError, match="In step 1 of finetune the loss became NaN or infinite in layer 1"):
        finetune(model, data, config, tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints" / "finetune") is None


def test_weights_with_nan_are_not_saved() -> None:
    watch = LossWatch("transfer")
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.ones(1)}
    with pytest.raises(LolcatsError, match="By step 7 of transfer, b has become NaN or infinite"):
        watch.check_weights(7, weights)
    watch.check_weights(7, {"a": weights["a"]})


def test_on_a_gpu_only_saving_waits_for_losses() -> None:
    """A step's losses are checked once they have been copied; a save waits for them."""
    event = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    watch = LossWatch("transfer")
    where = lambda bad: f" in place {int(bad.long().argmax())}"  # noqa: E731
    watch.steps.append((3, torch.tensor([False, True]), where, event))
    watch.end_step()
    assert len(watch.steps) == 1
    with pytest.raises(LolcatsError, match=r"In step 3 .* in place 1"):
        watch.check_weights(4, {"a": torch.ones(1)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu() -> None:
    watch = LossWatch("transfer")
    watch.step = 4
    watch.add(torch.tensor([1.0, float("nan")], device="cuda"), lambda bad: "")

    def look() -> None:
        watch.end_step()  # raises, if the copy has arrived by then
        watch.check()

    with pytest.raises(LolcatsError, match="In step 4"):
        look()
