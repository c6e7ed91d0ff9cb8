"""The controls of a run: what they are, that they leave no trace, and that they can be added to a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import load_config
from lolcats.data.rows import load_data
from lolcats.evaluation.perplexity import perplexity
from lolcats.evaluation.systems import systems
from lolcats.modeling.layer import linearized_layers
from lolcats.pipeline import linearize

CPU = (torch.device("cpu"), torch.float32)
NAMES = ("window_lora", "teacher_lora")


@pytest.fixture(scope="module")
def runs(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run without controls and with them."""
    root = tmp_path_factory.mktemp("controls")
    for name, controls in (("without", "[]"), ("with", "[window_lora, teacher_lora]")):
        config = load_config("paper-sinks", [*SETTINGS, f"controls={controls}"])
        linearize(str(model_dirs["llama"]), str(chat_file), root / name, config, merge=False, say=lambda _: None)
    return {name: root / name for name in ("without", "with")}


def results(run: Path) -> dict[str, float]:
    return json.loads((run / "run.json").read_text())["results"]


def invoke(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_controls_do_not_change_the_student(runs: dict[str, Path]) -> None:
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
        assert (runs["with"] / name).read_bytes() == (runs["without"] / name).read_bytes()
    without, found = results(runs["without"]), results(runs["with"])
    assert {k: v for k, v in found.items() if k in without} == without
    assert set(found) - set(without) == {"ppl_window_lora", "ppl_teacher_lora"}


def test_controls_are_adapters_without_linear_term(runs: dict[str, Path], chat_file: Path, tokenizer) -> None:
    config = load_config("paper-sinks", SETTINGS)
    rows = load_data(str(chat_file), tokenizer, config.data, config.seed).test
    expected = {"window_lora": {"window"}, "teacher_lora": set()}
    for name, kinds in expected.items():
        directory = runs["with"] / "controls" / name
        assert {p.name for p in directory.iterdir()} == {"config.json", "lora", "metrics.jsonl"}
        model = lolcats.load(directory)
        assert {layer.spec.kind for layer in linearized_layers(model)} == kinds
        found = perplexity(model, rows, 2)
        assert found == pytest.approx(results(runs["with"])[f"ppl_{name}"], rel=1e-5)
        with torch.no_grad():
            for layer in linearized_layers(model):
                for parameter in layer.parameters():
                    parameter.fill_(float("nan"))
                layer.gate.fill_(1.0)
        assert perplexity(model, rows, 2) == pytest.approx(found), "no parameter of the linear term plays a part"
        steps = json.loads((runs["with"] / "run.json").read_text())["stages"]
        assert steps[name]["steps"] == steps["finetune"]["steps"] == 4


def test_controls_as_baselines(runs: dict[str, Path], chat_file: Path) -> None:
    """In one pass over all baselines, no model changes the next one."""
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        every = ["window", "window+sinks", "window+lora", "teacher+lora", "linear-off", "window-off"]
        found = {name: m(ids, use_cache=False).logits for name, m in systems(str(runs["with"]), every, *CPU)}
        assert list(found) == ["teacher", *every[:4], "student", *every[4:]]
        for name in ("window+lora", "teacher+lora"):
            alone = {n: m(ids, use_cache=False).logits for n, m in systems(str(runs["with"]), [name], *CPU)}
            torch.testing.assert_close(alone[name], found[name], rtol=0, atol=0)
            saved = lolcats.load(runs["with"] / "controls" / name.replace("+", "_"))
            torch.testing.assert_close(saved(ids, use_cache=False).logits, found[name])
    assert not torch.allclose(found["window+lora"], found["linear-off"], atol=1e-3)
    table = invoke("evaluate", runs["with"], "--data", chat_file)
    assert f"{results(runs['with'])['ppl_window_lora']:.3f}" in table
    assert "--controls" not in table


def test_controls_are_added_to_a_finished_run(runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    late = tmp_path / "late"
    shutil.copytree(runs["without"], late)
    assert "lolcats finetune DIR --controls" in (late / "README.md").read_text()
    table = invoke("finetune", late, "--controls", "--no-merge")
    assert "the same LoRA, no linear term" in table
    assert "What linear attention adds" in table
    assert results(late) == {**results(late), **results(runs["with"])}
    for name in NAMES:
        weights = f"controls/{name}/lora/adapter_model.safetensors"
        assert (late / weights).read_bytes() == (runs["with"] / weights).read_bytes()
    assert "What linear attention adds" in (late / "README.md").read_text()
