"""The commands that lolcats plan prints do what it planned, with the settings that it was given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import SETTINGS
from test_cli import sets
from typer.testing import CliRunner

from lolcats import pipeline
from lolcats.cli import app
from lolcats.config import Config, load_config
from lolcats.data import inputs
from lolcats.errors import LolcatsError
from lolcats.run import Run
from lolcats.selection import Selection
from lolcats.selection.result import Point, other_window
from lolcats.weights import base
from lolcats.weights.base import Base

HEADS = {"0": [1]}
BASE = Base("model", "directory", "sha256 of it")
BUDGET = "attention.softmax_budget=0.125"


def planned(*arguments: object) -> dict[str, list[str]]:
    """The words of the printed commands after ``lolcats``, by command."""
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.output.splitlines() if line.startswith(("lolcats ", "torchrun "))]
    found = [words[words.index("lolcats") + 1 :] for words in lines]
    return {words[0]: words for words in found}


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The configuration with which a printed command would start; nothing is loaded."""
    found: list[Config] = []

    def stop(*arguments: Any, **_: Any) -> None:
        found.append(next(argument for argument in arguments if isinstance(argument, Config)))
        raise LolcatsError("stopped here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "find_base", lambda *_: BASE)
    monkeypatch.setattr(inputs, "Inputs", lambda *_, **__: SimpleNamespace(tokenizer=None))
    for name in ("start", "device_and_dtype"):
        monkeypatch.setattr(pipeline, name, stop)

    def run(words: list[str]) -> Config:
        done = CliRunner().invoke(app, words)
        assert "stopped here" in done.output, done.output
        return found[-1]

    return run


def test_a_machine_that_is_too_small_for_a_part() -> None:
    """No commands that need a stage or a search that does not fit, and no refusal of a stage 1 that there is not."""
    for arguments, sentence, steps in (
        (["llama-3.1-70b", "--gpu-memory", "24GiB"], "Stage 2 does not fit in any form", ["select"]),
        (["llama-3-8b", "--gpu-memory", "12GiB", "--host-memory", "8GiB"], "The search for heads does not fit", []),
    ):
        done = CliRunner().invoke(app, ["plan", *arguments])
        assert done.exit_code == 2
        assert sentence in " ".join(done.output.replace("│", " ").split())
        assert "Stage 1" not in done.output
        assert re.findall("^lolcats ([a-z]+)", done.output, re.M) == steps


@pytest.mark.parametrize("where", ["settings", "recipe"])
def test_heads_are_searched_beside_the_windows_they_are_kept_beside(
    where: str, configured: Any, tmp_path: Path
) -> None:
    """Of 600 tokens, which also needs longer rows: select has to know both."""
    changed = ["attention.window_size=600", "attention.sinks=2", "data.sequence_length=2048", BUDGET]
    recipe, asked = tmp_path / "own.yaml", ["--recipe", "paper"]
    if where == "recipe":
        recipe.write_text(yaml.safe_dump({
            "attention": {"window_size": 600, "sinks": 2, "softmax_budget": 0.125},
            "data": {"sequence_length": 2048},
        }))  # fmt: skip
        asked, changed = ["--recipe", str(recipe)], []
    lines = planned("llama-3-8b", *asked, *sets(changed))
    assert list(lines) == ["select", "transfer", "finetune"]
    searched = configured(lines["select"])
    assert (searched.attention.window_size, searched.attention.sinks) == (600, 2)
    window = {name: getattr(searched.attention, name) for name in ("window", "window_size", "sinks")}
    point = Point(HEADS, 0.0, {"codes": 1.0}, 1)
    selection = Selection(BASE.record, window, HEADS, [point, point])
    selection.write(tmp_path / "selection.yaml")
    trained = configured(lines["transfer"])
    assert (trained.attention.softmax_heads, trained.attention.softmax_budget) == (HEADS, 0)
    assert other_window(trained, selection) == ""
    assert trained.data.sequence_length == 2048


@pytest.mark.parametrize(("model", "given", "order"), [
    ("llama-3-8b", ["transfer.order=stream", "transfer.coupling=per_layer"], "joint"),
    ("llama-3.1-405b", ["transfer.order=joint", "transfer.coupling=joint"], "stream"),
    ("llama-3-8b", ["data.keep_longest_effective=0.5"], "joint"),
])  # fmt: skip
def test_the_schedule_is_the_one_that_was_planned(model: str, given: list[str], order: str, configured: Any) -> None:
    gpus = ["--gpus", 16, "--host-memory", "2TiB"] if "405b" in model else []
    words = planned(
        model, "--recipe", "paper-sinks", *gpus, *sets(["finetune.rank=4", "finetune.batch_size=16", *given])
    )["transfer"]
    config = configured(words)
    assert (config.transfer.order, config.finetune.rank) == (order, 4)
    assert (config.transfer.coupling == "per_layer") >= (order == "stream")


def test_what_needs_all_layers_is_not_planned_layer_by_layer() -> None:
    done = CliRunner().invoke(
        app, ["plan", "llama-3.1-70b", "--recipe", "paper-sinks", "--set", "data.keep_longest_effective=0.5"]
    )
    assert done.exit_code == 2
    assert "Stage 1 does not fit in any form" in done.output
    assert done.output.count("data.keep_longest_effective needs the whole model in memory") >= 2


def test_controls_are_not_planned_in_4_bits() -> None:
    asked = ["llama-3.1-70b", "--recipe", "paper-70b"]
    assert "finetune.quantize_base=nf4" in planned(*asked)["transfer"]
    done = CliRunner().invoke(app, ["plan", *asked, "--set", "controls=[window_lora]"])
    assert done.exit_code == 2
    assert "Stage 2 does not fit in any form" in done.output
    assert "quantize_base" not in done.output


def test_the_command_of_the_default_recipe_runs(
    model_dirs: dict[str, Path], chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a stage 1, one command does everything after the search. The two stages' commands give the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lolcats.plan.quantized.LENGTHS", ((2048,),))
    asked = [*SETTINGS, "attention.softmax_budget=0.5"]
    lines = planned(model_dirs["llama"], *sets(asked))
    lines["transfer"] = ["transfer", *lines["linearize"][1:]]
    lines["finetune"] = ["finetune", "both"]
    for name, place in (("select", ""), ("linearize", "out"), ("transfer", "both"), ("finetune", "both")):
        words = [{"DATA": str(chat_file), "DIR": place}.get(word, word) for word in lines[name]]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    runs = [Run.open(Path(place)) for place in ("out", "both")]
    assert all(run.stage_done("finetune") and run.config.attention.kind == "window" for run in runs)
    assert runs[0].config.attention.softmax_heads == Selection.read(Path("selection.yaml")).heads
    assert runs[0].results["ppl_student"] == pytest.approx(runs[1].results["ppl_student"], rel=1e-6)


@pytest.mark.parametrize("where", ["settings", "recipe"])
def test_commands_run(where: str, model_dirs: dict[str, Path], chat_file: Path, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lolcats.plan.quantized.LENGTHS", ((2048,),))
    recipe, asked = "paper-sinks", [*SETTINGS, "attention.softmax_budget=0.5"]
    if where == "recipe":
        recipe, asked = "own.yaml", list(SETTINGS)
        Path(recipe).write_text("attention: {softmax_budget: 0.5}\n")
    lines = planned(model_dirs["llama"], "--recipe", recipe, *sets(asked))
    for name in ("select", "transfer", "finetune"):
        words = [{"DATA": str(chat_file), "DIR": "out"}.get(word, word) for word in lines[name]]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert "chosen while" not in done.output
    run, selection = Run.open(Path("out")), Selection.read(Path("selection.yaml"))
    assert selection.window == {"window": "terraced", "window_size": 8, "sinks": 2}
    assert run.config.attention.softmax_heads == selection.heads
    wanted = load_config("paper-sinks", SETTINGS)
    assert (run.config.data, run.config.transfer.max_steps) == (wanted.data, wanted.transfer.max_steps)
