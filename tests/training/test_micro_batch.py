"""``micro_batch_size: auto``: what fits is tried once, kept for the run, and changes losses only by rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

import lolcats
from lolcats import pipeline
from lolcats.config import Config, FinetuneConfig, TransferConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.run import Run
from lolcats.stages import micro_batch
from lolcats.stages.finetune.stage import finetune
from lolcats.stages.micro_batch import recomputes, settled, settled_rows
from lolcats.stages.transfer.stage import transfer
from lolcats.tensors import read_tensors

CPU = torch.device("cpu")
AUTO = FinetuneConfig(batch_size=12, micro_batch_size="auto")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose memory can run out without a kill."""
    monkeypatch.setattr(micro_batch, "TRIED", ("cuda", "cpu"))


class Memory:
    """Rows up to ``most`` fit."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, list[int]()

    def __call__(self, rows: int) -> None:
        self.asked.append(rows)
        if rows > self.most:
            raise torch.OutOfMemoryError(f"{rows} rows")


@pytest.mark.usefixtures("tried")
def test_as_many_rows_as_fit_and_the_same_again(tmp_path: Path) -> None:
    memory = Memory(5)
    stage = settled(AUTO, tmp_path, CPU, memory)
    assert stage == replace(AUTO, micro_batch_size=4)
    assert memory.asked == [12, 6, 4]
    assert settled(AUTO, tmp_path, CPU, Memory(12)) == stage
    assert settled_rows(tmp_path) == {"micro_batch_size": 4}
    given = replace(AUTO, micro_batch_size=3)
    assert settled(given, tmp_path, CPU, Memory(0)) is given
    (tmp_path / micro_batch.RECORD).write_text("{")
    with pytest.raises(LolcatsError, match="damaged"):
        settled(AUTO, tmp_path, CPU, memory)


@pytest.mark.usefixtures("tried")
def test_what_does_not_fit_at_all_and_other_errors(tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match="Not even one row"):
        settled(AUTO, tmp_path, CPU, Memory(0))

    def broken(rows: int) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        settled(AUTO, tmp_path, CPU, broken)
    assert settled_rows(tmp_path) == {}


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize(("changes", "most", "asked", "again"), [
    ({}, 12, [2], False), ({}, 1, [2], True), ({"micro_batch_size": 4}, 4, [4], False),
    ({"micro_batch_size": 4}, 2, [4], True), ({"batch_size": 1}, 1, [1], False),
])  # fmt: skip
def test_layers_are_computed_again_if_some_rows_do_not_fit(
    changes: dict[str, Any], most: int, asked: list[int], again: bool, tmp_path: Path
) -> None:
    """Rows of 1,024 tokens: two of them are enough to keep the activations of all layers."""
    stage, memory = replace(AUTO, gradient_checkpointing="auto", **changes), Memory(most)
    assert recomputes(stage, 1024, tmp_path, CPU, memory) is again
    assert memory.asked == asked
    assert recomputes(stage, 1024, tmp_path, CPU, Memory(0)) is again, "kept for the run"
    assert settled_rows(tmp_path) == {"gradient_checkpointing": again}
    for given in (False, True):
        fixed = replace(stage, gradient_checkpointing=given)
        assert recomputes(fixed, 1024, tmp_path, CPU, Memory(0)) is given
    assert recomputes(stage, 1024, tmp_path / "sharded", CPU) is True


def test_a_cpu_keeps_the_activations_of_all_layers(tmp_path: Path) -> None:
    stage = replace(AUTO, gradient_checkpointing="auto")
    assert recomputes(stage, 1024, tmp_path, CPU, Memory(0)) is False


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("most", [0, 4])
def test_stage_2_computes_layers_again_only_if_it_must(most: int, tmp_path: Path) -> None:
    """With the same losses."""
    rows = torch.randint(6, 300, (24, 32), generator=torch.Generator().manual_seed(0))
    data, counts = Data(rows[:16], rows[16:20], rows[20:], "test", {}), dict[Any, int]()

    def losses(again: Any) -> list[float]:
        settings = config(micro_batch_size=4, gradient_checkpointing=again)
        model: Any = lolcats.convert(tiny_model(), settings.attention)

        def limited(module: Any, args: Any, kwargs: Any) -> None:
            counts[again] = counts.get(again, 0) + 1
            if again == "auto" and not model.model.layers[0].gradient_checkpointing and most < 4:
                raise torch.OutOfMemoryError("activations")

        model.model.layers[0].self_attn.register_forward_pre_hook(limited, with_kwargs=True)
        model.eval()
        _, result = finetune(model, data, settings, tmp_path / str(again))
        return [entry["loss"] for entry in result.history if "loss" in entry]

    assert losses("auto") == pytest.approx(losses(most == 0), rel=1e-6)
    assert settled_rows(tmp_path / "auto" / "checkpoints" / "finetune") == {"gradient_checkpointing": most == 0}
    assert counts["auto"] > counts[most == 0], "what fits was tried"


@pytest.mark.parametrize(("batch", "rows"), [(8, 4), (6, 3), (5, 1), (2, 2)])
def test_without_a_trial(batch: int, rows: int, tmp_path: Path) -> None:
    """On a CPU, which would be out of memory without an error."""
    stage = FinetuneConfig(batch_size=batch, micro_batch_size="auto")
    assert settled(stage, tmp_path, CPU, Memory(99)).micro_batch_size == stage.rows_at_once == rows


def test_values() -> None:
    auto = load_config("paper-sinks", ["finetune.gradient_checkpointing=auto"]).finetune
    assert auto.gradient_checkpointing == "auto"
    with pytest.raises(LolcatsError, match="expected bool or auto, got 'never'"):
        load_config("paper-sinks", ["finetune.gradient_checkpointing=never"])
    assert load_config("paper-sinks").finetune.micro_batch_size == "auto"
    assert load_config("paper-sinks", ["transfer.micro_batch_size=2"]).transfer.micro_batch_size == 2
    for value, message in (("most", "expected int or auto, got 'most'"), ("0", "at least 1"), ("3", "multiple of")):
        with pytest.raises(LolcatsError, match=message):
            load_config("paper-sinks", [f"finetune.micro_batch_size={value}"])


def config(gradient_checkpointing: Any = False, **changes: Any) -> Config:
    few = {"batch_size": 4, "max_steps": 3, "log_steps": 1, "eval_steps": 3, "save_steps": 3, **changes}
    attention = ["attention.window_size=8", "attention.feature_dim=8", "data.sequence_length=32"]
    base = load_config("paper-sinks", attention)
    return replace(
        base,
        transfer=TransferConfig(**few),
        finetune=FinetuneConfig(rank=4, gradient_checkpointing=gradient_checkpointing, **few),
    )


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_stages_try_what_fits_and_leave_no_trace_of_it(stage: str, tmp_path: Path, monkeypatch) -> None:
    """Losses of a run with ``auto`` are bit for bit those of one with the number that it settles on, and equal up to
    rounding those with other numbers."""
    rows = torch.randint(6, 300, (24, 32), generator=torch.Generator().manual_seed(0))
    data, most, sizes = Data(rows[:16], rows[16:20], rows[20:], "test", {}), 2, list[int]()
    run_stage = {"transfer": transfer, "finetune": finetune}[stage]

    def losses(micro: Any) -> list[float]:
        settings, out = config(micro_batch_size=micro), tmp_path / str(micro)
        model = lolcats.convert(tiny_model(), settings.attention)

        def limited(module: Any, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[1] == 32:  # not of the search for the head
                sizes.append(len(kwargs["input_ids"]))
            if len(kwargs["input_ids"]) > most:
                raise torch.OutOfMemoryError("too many rows")

        if micro == "auto":
            model.get_decoder().register_forward_pre_hook(limited, with_kwargs=True)
        result = run_stage(model, data, settings, out)
        history = (result[1] if stage == "finetune" else result).history
        return [entry["loss"] for entry in history if "loss" in entry]

    auto, two, four = losses("auto"), losses(2), losses(4)
    assert sizes[0] == 4
    assert set(sizes[1:]) == {2}
    assert settled_rows(tmp_path / "auto" / "checkpoints" / stage) == {"micro_batch_size": 2}
    assert auto == two
    assert four == pytest.approx(two, rel=1e-5)
    assert len(two) == 3


def test_a_run_keeps_and_records_its_number(model_dirs, chat_file: Path, settings, tmp_path: Path, monkeypatch) -> None:
    """A run that an older recipe began with a number is continued with it; one that says auto records what it took."""
    started = [s for s in settings if "micro_batch_size" not in s]
    quiet: Any = {"say": lambda _: None}
    numbers = ["transfer.micro_batch_size=2", "finetune.micro_batch_size=1"]
    pipeline.linearize(
        str(model_dirs["llama"]), str(chat_file), tmp_path / "old", load_config("paper-sinks", settings), **quiet
    )
    again = load_config("paper-sinks", started)
    assert again.transfer.micro_batch_size == "auto"
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "old", again, **quiet)
    assert Run.open(tmp_path / "old").config.transfer.micro_batch_size == 2
    with pytest.raises(LolcatsError, match="holds another run"):
        pipeline.linearize(
            str(model_dirs["llama"]),
            str(chat_file),
            tmp_path / "old",
            load_config("paper-sinks", [*started, *numbers]),
            **quiet,
        )
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "auto", again, **quiet)
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["config"]["finetune"]["micro_batch_size"] == "auto"
    assert {name: stage["micro_batch_size"] for name, stage in record["stages"].items()} == {
        "transfer": 4, "finetune": 4,
    }  # fmt: skip
    old, auto = (read_tensors(tmp_path / name / "feature_maps.safetensors") for name in ("old", "auto"))
    torch.testing.assert_close(old, auto, rtol=1e-3, atol=1e-5)
