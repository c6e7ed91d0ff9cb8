"""``lolcats sweep``: rows and seeds of a file, results that stay, one loaded model that no row changes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from conftest import SETTINGS
from local_data import FILES
from typer.testing import CliRunner

from lolcats.cli import app
from lolcats.errors import LolcatsError
from lolcats.files import append_line, read_lines
from lolcats.inputs import Inputs
from lolcats.sweep import execute
from lolcats.sweep.execute import run_sweep
from lolcats.sweep.plan import Sweep, plan, read_sweep
from lolcats.sweep.table import render

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
FEW = ["transfer.max_steps=2", "finetune.max_steps=2", "transfer.eval_steps=2"]
ROWS = {
    "linear, trained late": [
        "attention.kind=linear",
        "transfer.max_steps=0",
        "finetune.feature_map_learning_rate=1e-2",
    ],
    "hybrid": ["controls=[window_lora]"],
}


@pytest.fixture
def file(tmp_path: Path, chat_file: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    tree = {"title": "Tiny", "base": {"set": [*SETTINGS, *FEW]}, "rows": ROWS, "seeds": [0],
            "evaluate": {"perplexity": {"chat": str(chat_file), "other": ""}, "tasks": ["positions"],
                         "lengths": [96], "limit": 1}}  # fmt: skip
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture
def place(model_dirs, chat_file: Path) -> list[str]:
    return [f"base.model={model_dirs['llama']}", f"base.data={chat_file}"]


def run(sweep: Sweep, out: Path, **more: float) -> tuple[list[dict], str]:
    said: list[str] = []
    results = run_sweep(sweep, out, "lolcats sweep", said.append, **more)
    return results, "\n".join(said)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments(path: Path) -> None:
    text = path.read_text()
    assert "/" not in text.replace("recipes/", ""), "no path in a sweep's file"
    rows = plan(read_sweep(path))
    assert len({(row.name, row.config.seed) for row in rows}) == len(rows) > 1
    for row in rows:
        assert row.config.data.sequence_length == 1024
        assert row.config.transfer.batch_size == row.config.finetune.batch_size == 8
        assert row.tokens("transfer") is not None
        assert row.tokens("finetune") >= 900_000
    everything = [*FEW, "seeds=[3]"]
    assert {(r.config.seed, r.tokens("finetune")) for r in plan(read_sweep(path, everything))} == {(3, 2 * 8 * 1024)}


def test_grid_seeds_and_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    grid = [["attention.sinks=0", "attention.sinks=4"], ["attention.window=sliding", "attention.window=terraced"]]
    path.write_text(yaml.safe_dump({"grid": grid, "seeds": [0, 1]}))
    rows = plan(read_sweep(path, ["data.test_rows=5"]))
    assert [row.name for row in rows[:4]] == [
        "sinks=0, window=sliding", "sinks=0, window=terraced", "sinks=4, window=sliding", "sinks=4, window=terraced",
    ]  # fmt: skip
    assert [row.config.seed for row in rows] == [0] * 4 + [1] * 4
    assert {row.config.data.test_rows for row in rows} == {5}
    output = CliRunner().invoke(app, ["sweep", str(path), "--dry-run"]).output
    assert "sinks=4, window=sliding" in output
    for tree, message in (
        ({}, "no rows"),
        ({"rows": {"a": ["attention.sinks=x"]}}, "Row 'a': attention.sinks: expected int"),
        ({"rows": {"a": ["base.data=b"]}}, "'b' is no name of base.sources"),
        ({"row": {}}, "Did you mean rows"),
    ):
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        with pytest.raises(LolcatsError, match=message):
            read_sweep(path)
    path.write_text(yaml.safe_dump({"rows": {"a": []}}))
    for given, message in (([], "no base model"), (["base.model=x"], "give --data DATA")):
        with pytest.raises(LolcatsError, match=message):
            run(read_sweep(path, given), tmp_path / "out")


def test_sweep_resumes_and_skips(file: Path, place: list[str], tmp_path: Path, monkeypatch) -> None:
    """Stopped by the deadline, killed while a row trains, its last line half written: the same command goes on."""
    book = tmp_path / "book.txt"
    book.write_text(FILES["long_books"][0]["text"])
    sweep, out = read_sweep(file, [*place, f"evaluate.text={book}"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(execute, "_references", lambda *_: time.sleep(1.2) or {"systems": {}, "seconds": {}})
        results, said = run(sweep, tmp_path / "late", deadline=1.0)
        assert len(results) == 1
        assert "Deadline: 2 rows are left" in said

    with monkeypatch.context() as patch:
        patch.setattr(execute, "run_finetune", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(sweep, out)
    assert len(read_lines(out / "results.jsonl")) == 1
    with (out / "results.jsonl").open("a") as torn:
        torn.write('{"row": "half')
    results, said = run(sweep, out)
    assert "1 of 3 results are in" in said
    assert "No perplexity on other" in said
    assert [r["name"] for r in results] == ["", *ROWS]
    lines = (out / "results.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == results

    hybrid = results[2]
    assert set(hybrid["systems"]) == {
        "teacher", "window + sinks, nothing trained", "student", "linear off", "window+lora",
    }  # fmt: skip
    measured = {"held-out", "chat", "positions nll 0-63"}
    for name in ("student", "window+lora"):
        assert measured <= set(hybrid["systems"][name])
    assert set(hybrid["systems"]["linear off"]) == {"held-out", "chat"}
    assert measured - {"held-out"} <= set(results[0]["systems"]["teacher"])
    assert (hybrid["tokens"], hybrid["seed"]) == ({"transfer": 256, "finetune": 256}, 0)
    assert results[1]["tokens"] == {"transfer": 0, "finetune": 256}
    assert {"commit", "date", "hardware", "command", "versions"} <= set(hybrid)

    again, said = run(sweep, out)
    assert (again, (out / "results.jsonl").read_text()) == (results, lines)
    assert "3 of 3 results" in said
    more = read_sweep(file, [*place, f"evaluate.text={book}", "seeds=[0, 1]"])
    assert len(run(more, out)[0]) == 5
    table = (out / "table.md").read_text()
    student = next(line for line in table.splitlines() if line.startswith("| hybrid | 2 |"))
    assert "±" in student
    assert "| – window+lora |" in table


def test_a_row_that_fails_does_not_stop_the_others(file: Path, place: list[str], tmp_path: Path) -> None:
    rows = "rows={wrong: [data.format=alpaca], fine: [transfer.max_steps=0]}"
    sweep = read_sweep(file, [*place, "evaluate.tasks=[]", "evaluate.perplexity={}", rows])
    with pytest.raises(LolcatsError, match=r"1 rows failed, the others are in .*: wrong, seed 0"):
        run(sweep, tmp_path / "out")
    assert [json.loads(line)["name"] for line in read_lines(tmp_path / "out" / "results.jsonl")] == ["", "fine"]


def test_no_state_leaks_between_rows(file: Path, place: list[str], tmp_path: Path) -> None:
    """A row that trained everything comes first; the second ends with the weights and figures it has alone."""
    changes = [*place, "evaluate.tasks=[]"]
    both, _ = run(read_sweep(file, changes), tmp_path / "both")
    alone, _ = run(read_sweep(file, [*changes, "rows={hybrid: ['controls=[window_lora]']}"]), tmp_path / "alone")
    assert both[2]["systems"] == alone[1]["systems"]
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
        first, second = ((tmp_path / d / r["directory"] / name) for d, r in (("both", both[2]), ("alone", alone[1])))
        assert first.read_bytes() == second.read_bytes()


def test_inputs_are_read_once(model_dirs, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lolcats.inputs as inputs
    from lolcats.config import DataConfig
    from lolcats.training.data import load_data

    kept = Inputs(str(model_dirs["llama"]), keep=True)
    config = DataConfig(sequence_length=32, validation_rows=4, test_rows=4)
    first = kept.data(str(chat_file), config, 0)
    kept.model(execute.torch.float32, execute.torch.device("cpu")).lm_head.weight.data.zero_()
    monkeypatch.setattr(inputs, "tokenize_source", None)
    monkeypatch.setattr(inputs, "load_model", None)
    other = kept.data(str(chat_file), config, 1)
    assert first.fingerprint == load_data(str(chat_file), kept.tokenizer, config, 0).fingerprint
    assert other.fingerprint == load_data(str(chat_file), kept.tokenizer, config, 1).fingerprint != first.fingerprint
    assert kept.model(execute.torch.float32, execute.torch.device("cpu")).lm_head.weight.any()


def test_table_over_seeds() -> None:
    def result(seed: int, value: float) -> dict:
        systems = {"teacher": {"held-out": {"value": 6.0}}, "student": {"held-out": {"value": value}}}
        return {"name": "a", "seed": seed, "systems": systems, "tokens": {"transfer": 2e6, "finetune": 4e6},
                "seconds": {"transfer": 2.0, "evaluation": 1.0}, "layer_error": 0.25, "date": "2026-01-01"}  # fmt: skip

    reference = {"name": "", "systems": {"teacher": {"wiki": {"value": 25.0}}}, "seconds": {}}
    text = render("T", [reference, result(0, 1.0), result(1, 9.0), result(1, 2.0)], "lolcats sweep x")
    assert "| teacher |  | 6 | 25 |" in text
    assert "| a | 2 | 1.50 ± 0.71 |  | 0.25 | 2M + 4M | 2 + 1 |" in text
    assert "lolcats sweep x" in text


def test_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_lines(path) == []
    append_line(path, "a")
    with path.open("a") as file:
        file.write("half")
    assert read_lines(path) == ["a"]
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"
