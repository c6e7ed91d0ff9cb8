"""benchmarks/students.py and the data that it takes, at sizes too small to measure anything."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentence
from support.local_data import write_files
from support.scripts import script

from lolcats.config import DataConfig
from lolcats.data.mixture import read_mixture
from lolcats.data.rows import tokenize_source
from lolcats.data.sources import read_records
from lolcats.errors import LolcatsError
from lolcats.evaluation.text import encode
from lolcats.lab.sweep.plan import plan, read_sweep
from lolcats.selection import Point, Selection
from lolcats.selection.result import by_layer
from lolcats.weights.base import find_base, load_tokenizer


@pytest.fixture
def students_data(model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What students_data.py makes of tiny sources."""
    module, draw, sources = script("students_data"), random.Random(0), tmp_path / "sources"
    monkeypatch.setattr(module, "WINDOW", 600)
    (sources / "eval").mkdir(parents=True)
    write_files(sources / "eval")

    def asks(count: int, word: str) -> list[dict[str, str]]:
        return [{"instruction": f"{word} {i} {sentence(draw, 4)}", "input": "noinput" if i % 3 else "the cat",
                 "output": "nooutput" if i == 0 else sentence(draw, 12)} for i in range(count)]  # fmt: skip

    records = {
        "alpaca": asks(120, "warm"), "dolly": [*asks(6, "birds"), *asks(4, "Python")],
        "textbooks": [{"text": sentence(draw, 300)} for _ in range(9)],
        "books": [{"text": sentence(draw, 300), "title": "x"} for _ in range(9)],
        "gsm8k": [{"question": f"How many cats {i}?", "answer": f"#### {i}"} for i in range(12)],
    }  # fmt: skip
    for name, rows in records.items():
        (sources / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [word for name in records for word in (f"--{name}", str(sources / f"{name}.jsonl"))]
    module.main([
        str(model_dirs["llama"]), *files, "--eval", str(sources / "eval"), "--out", str(tmp_path / "data"),
        "--tokens", "2000", "--windows", "2", "--prompts", "alpaca=20,gsm8k=5,code=9,chat=3",
    ])  # fmt: skip
    return tmp_path / "data"


def test_data_of_students(students_data: Path, model_dirs: dict[str, Path]) -> None:
    def records(file: str) -> list[dict[str, Any]]:
        return read_records(str(students_data / file), DataConfig())[0]

    asked, trained = records("prompts.jsonl"), records("alpaca.parquet")
    assert Counter(r["instruction"].split()[0] for r in asked) == {"warm": 20, "How": 5, "Python": 3, "birds": 3}
    assert not {r["instruction"] for r in asked} & {r["instruction"] for r in trained}
    assert not {f"How many cats {i}?" for i in range(5)} & {r["instruction"] for r in asked}, (
        "the evaluation's examples"
    )
    assert {r["input"] for r in asked} == {"", "the cat"}
    assert all(r["output"] != "nooutput" for r in trained)
    assert len(records("eval/gsm8k_train.parquet")) == 5
    tokenizer = load_tokenizer(find_base(str(model_dirs["llama"])))
    assert len(encode(tokenizer, records("eval/long_books.parquet")[0]["text"])) in range(1200, 1265)
    shares = {
        Path(share.source).name: share.share for share in read_mixture(str(students_data / "own.yaml"), DataConfig())
    }
    assert shares == pytest.approx({"alpaca.parquet": 1 / 3, "textbooks.parquet": 1 / 6, "books.parquet": 1 / 6,
                                    "own.jsonl": 1 / 3})  # fmt: skip
    data = tokenize_source(str(students_data / "both.yaml"), tokenizer, DataConfig())
    assert int(data.length.sum()) > 4000
    with pytest.raises(SystemExit):
        script("students_data").main(["model", "--prompts", "poems=3"])


def selection_of(model: Path, heads: list[tuple[int, int]]) -> Selection:
    points = [Point(by_layer(heads[:n]), 1.0, {"codes": 1.0}, n) for n in range(len(heads) + 1)]
    window = {"window": "terraced", "window_size": 64, "sinks": 4}
    return Selection(find_base(str(model)).record, window, by_layer(heads), points)


def test_students(students_data: Path, model_dirs: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Rows by number of heads, measured and in the table. What is done is not made again; rows without data wait."""
    module, model, out = script("students"), model_dirs["llama"], tmp_path / "out"
    selection_of(model, [(1, 0), (0, 1), (0, 0)]).write(tmp_path / "selection.yaml")
    rows = {"two": ["kept=2", "base.data=both"], "none": ["kept=0", "base.data=alpaca"],
            "control": ["kept=2", "base.data=both", "attention.kind=window"], "own": ["kept=2", "base.data=own"],
            "plain": ["kept=3", "base.data=both", "attention.kind=window", "transfer.max_steps=0",
                      "finetune.max_steps=0"]}  # fmt: skip
    base = yaml.safe_load(module.ROWS.read_text())["base"]
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"title": "x", "base": base, "rows": rows}, sort_keys=False))
    settings = ["data.sequence_length=32", "transfer.max_steps=1", "finetune.max_steps=1", "attention.window_size=8"]
    command = [
        str(model), str(students_data), "--selection", str(tmp_path / "selection.yaml"), "--out", str(out), "--tiny",
        "--rows", str(tmp_path / "rows.yaml"), "--gsm8k", "0", "--answers", "1",
        *(word for setting in [*settings, "seeds=[3]"] for word in ("--set", setting)),
    ]  # fmt: skip
    module.main([*command, "--minutes", "0"])
    assert not (out / "results.jsonl").exists()
    module.main([*command, "--only", "^(?!none)"])
    said, lines = capsys.readouterr().out, (out / "results.jsonl").read_text()
    assert "own.jsonl is missing: own" in said
    results = [json.loads(line) for line in lines.splitlines()]
    assert [r["name"] for r in results] == ["teacher", "window + sinks, nothing trained", "two", "control", "plain"]
    assert results[2]["systems"]["student"]["positions kl 256-511"]["value"] > 0
    assert [r["tokens"]["transfer"] > 0 for r in results[2:]] == [True, False, False]
    assert [r["tokens"]["finetune"] > 0 for r in results[2:]] == [True, True, False], "a row's own settings win"
    table = (out / "students.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        "| model", "| ---", "| teacher", "| window + sinks, nothing trained", "| two", "| control", "| plain",
    ]  # fmt: skip
    module.main([*command, "--only", "^(?!none)"])
    assert (out / "results.jsonl").read_text() == lines
    assert {r["seed"] for r in results[2:]} == {3}
    run = json.loads((out / results[2]["directory"] / "run.json").read_text())
    assert run["config"]["attention"]["softmax_heads"] == {"0": [1], "1": [0]}
    with pytest.raises(LolcatsError, match=r"No set of 2 heads is known\. Sets in the selection: none: give --select"):
        module.main([word for word in command if "selection" not in word])
    with pytest.raises(LolcatsError, match=r"--only x: no such row\. Rows: two; none; control; own; plain"):
        module.main([*command, "--only", "x"])


def test_rows_of_students(students_data: Path, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """At most 12 trained rows, one change each, 3.3M tokens a stage."""
    module = script("students")
    (students_data / "own.jsonl").write_text("")
    arguments = module.arguments_of(["model", str(students_data), "--out", str(tmp_path)])
    selection = selection_of(model_dirs["llama"], [(layer, head) for layer in range(7) for head in range(2)])
    path = tmp_path / "students.yaml"
    wide = selection_of(model_dirs["llama"], [(layer, 0) for layer in range(14)])
    wide.window["window_size"] = 256
    path.write_text(yaml.safe_dump(module.sweep_of(arguments, [wide, selection])))
    rows = {row.name: row for row in plan(read_sweep(path, ["base.model=m"]))}
    trained = {name: row for name, row in rows.items() if row.tokens("finetune")}
    assert len(trained) <= 12
    base = trained["7 heads"]
    assert {row.tokens("finetune") for row in trained.values()} == {400 * 8192}
    assert {row.tokens("transfer") for row in trained.values()} == {400 * 8192}
    assert sum(map(len, base.config.attention.softmax_heads.values())) == 7
    for name, row in trained.items():
        begins = [other for other in trained if name.startswith(f"{other},")]
        base = trained[max(begins, key=len, default="7 heads")]
        sections = {(section, key) for section in ("attention", "data", "finetune", "transfer")
                    for key, value in vars(getattr(row.config, section)).items()
                    if value != getattr(getattr(base.config, section), key)}  # fmt: skip
        if name == "7 heads, window of 64":
            assert base.config.attention.softmax_heads == {str(layer): [0] for layer in range(7)}
            assert row.config.attention.softmax_heads == {**{str(layer): [0, 1] for layer in range(3)}, "3": [0]}
            sections.remove(("attention", "softmax_heads"))
        assert len(sections) + (row.data != base.data) == (row is not base), (name, sections)


def test_table_of_students() -> None:
    def entry(value: float, stderr: float | None = None) -> dict[str, float | None]:
        return {"value": value, "stderr": stderr}

    found = {"passkey@1024 exact beyond the window": entry(0.95), "passkey@8192 exact beyond the window": entry(0.5),
             "gsm8k_local exact_match (strict-match)": entry(0.4, 0.04),
             "gsm8k_local exact_match (flexible-extract)": entry(0.45),
             "positions nll 0-63": entry(5.0), "positions nll 2048-4095": {**entry(3.0), "items": [3.0, 3.0]},
             "positions nll 4096-8191": {**entry(3.25, 0.01), "items": [3.0, 3.5]},
             "positions kl 4096-8191": entry(0.125)}  # fmt: skip
    same = {"evaluation": "e", "hardware": "a GPU", "date": "2026-11-30", "commit": "abc"}
    teacher = {"kind": "untrained", "name": "teacher", "systems": {"teacher": found}, "seconds": {"evaluation": 9.0}}
    row = {"kind": "row", "name": "a", "seed": 0, "systems": {"teacher": {}, "student": found},
           "seconds": {"transfer": 1.0, "finetune": 2.0, "evaluation": 3.0, "all": 10.0},
           "tokens": {"transfer": 3276800, "finetune": 3276800}, "bytes": {"8192": [230 << 20, 29 << 20]}}  # fmt: skip
    module = script("students")
    worse = {**found, "positions nll 4096-8191": {**entry(3.5, 0.01), "items": [3.2, 3.8]}}
    control = {**row, "name": module.CONTROL, "systems": {"student": worse}}
    lines = module.table([{**x, **same} for x in (row, teacher, control)]).splitlines()
    scores = "95 / 50 | – / – | – / – | 40.0 (4.0) / 45.0 | 3.250 (0.010) | 0.125"
    assert f"| teacher | {scores} | – | – | – | 230.0 | – | 9 |" in lines
    assert f"| a | {scores} | +0.000 (0.000) / -0.250 (0.050) | – | – | 29.0 | 3.28 + 3.28 | 3 + 3 + 4 |" in lines
    assert any(line.startswith(f"| {module.CONTROL} |") and "0.125 | – | – | – |" in line for line in lines)
    assert "hardware a GPU; commit abc; date 2026-11-30" in lines


def test_results_of_processes_say_the_script_s_command(tmp_path: Path) -> None:
    module, path = script("students"), tmp_path / "results.jsonl"
    module.say_own_command(path, "nothing is there yet")
    commands = ["lolcats sweep /some/place/students.yaml", "students.py an earlier one"]
    path.write_text("".join(json.dumps({"command": command, "seed": 1}) + "\n" for command in commands))
    own = module.own_command(module.arguments_of(["/some/model", "/some/data", "--out", "/some/out", "--jobs", "2"]))
    module.say_own_command(path, own)
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert results == [
        {"command": "students.py model data --out out --jobs 2", "seed": 1},
        {"command": "students.py an earlier one", "seed": 1},
    ]
