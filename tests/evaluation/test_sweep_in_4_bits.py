"""Rows of a sweep whose stage 2 trains on a base model in 4 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SETTINGS, tiny_model

import lolcats
from lolcats import pipeline
from lolcats.data.inputs import Inputs
from lolcats.evaluation.perplexity import perplexity
from lolcats.lab.sweep.execute import run_sweep
from lolcats.lab.sweep.measure import Measurement
from lolcats.lab.sweep.plan import plan, read_sweep
from lolcats.report.table import remarks
from lolcats.run import Run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")


def linear4bit(model: Any) -> int:
    from bitsandbytes.nn import Linear4bit

    return sum(isinstance(module, Linear4bit) for module in model.modules())


def test_a_row_trained_in_4_bits_is_measured_in_4_bits(
    tokenizer: Any, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``lolcats evaluate --quantize nf4`` loads it, also after an interruption. The teacher of the KL divergence
    keeps its own weights."""
    monkeypatch.setattr(pipeline.job, "check_quantized", lambda *_, **__: None)  # training needs a GPU
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(base)  # its blocks of weights hold 64
    tokenizer.save_pretrained(base)
    (tmp_path / "book.txt").write_text("the cat sat on a mat and saw that dogs like warm milk while birds sing\n" * 20)
    few = ["transfer.max_steps=2", "finetune.max_steps=2", "transfer.eval_steps=2", "finetune.loss=kl",
           "finetune.learning_rate=1e-2", "finetune.feature_map_learning_rate=1e-2", "device=cpu"]  # fmt: skip
    rows: dict[str, list[str]] = {"own weights": [], "4 bits": ["finetune.quantize_base=nf4"]}
    tree = {"base": {"recipe": "paper-sinks", "model": str(base), "data": str(chat_file), "set": [*SETTINGS, *few]},
            "rows": rows,
            "evaluate": {"perplexity": {"chat": str(chat_file)}, "tasks": ["positions"], "lengths": [96], "limit": 1,
                         "kl": True, "text": str(tmp_path / "book.txt")}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    sweep = read_sweep(tmp_path / "sweep.yaml")
    real, trained, measured = pipeline.stages.finetune, list[int](), list[int]()

    def watched(model: Any, *arguments: Any) -> Any:
        trained.append(linear4bit(model))
        return real(model, *arguments)

    def interrupted(measurement: Measurement, name: str, model: Any) -> Any:
        measured.append(linear4bit(model))
        if measured[-1]:
            raise KeyboardInterrupt
        return task(measurement, name, model)

    monkeypatch.setattr(pipeline.stages, "finetune", watched)
    task = Measurement._task
    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, out, "lolcats sweep", lambda _: None)
    results = run_sweep(sweep, out, "lolcats sweep", lambda _: None)
    assert trained == [0, 14]
    assert measured == [0, 0, 0, 14], "teacher, window, both rows"
    first, second = (r for r in results if r["kind"] == "row")
    assert second["transfer_of"] == first["directory"], "stage 1 is the same"

    directory, config = out / second["directory"], plan(sweep)[1].config
    inputs = Inputs(str(base))
    measurement = Measurement(sweep.evaluate, inputs, config, lambda _: None)
    found = second["systems"]["student"]
    as_evaluated = lolcats.load(directory, torch.float32, quantize="nf4")
    expected = measurement.everything(as_evaluated)
    assert {name: entry for name, entry in found.items() if name != "held-out"} == expected
    assert any(" kl " in name and entry["value"] > 0 for name, entry in expected.items())
    merged = measurement.everything(lolcats.load(directory, torch.float32))
    assert all(merged[name]["value"] != entry["value"] for name, entry in expected.items())
    data = inputs.data(str(chat_file), config.data, config.seed)
    held_out = perplexity(as_evaluated, data.test, 8, data.positions.get("test"))
    assert found["held-out"]["value"] == pytest.approx(held_out, rel=1e-6)
    teachers = [row["systems"]["teacher"]["held-out"] for row in (first, second)]
    assert teachers[0] == teachers[1], "on its own weights"
    assert "in 4 bits that it was trained on" in remarks(Run.open(directory))[0]
    assert "in 4 bits" not in str(remarks(Run.open(out / first["directory"])))
