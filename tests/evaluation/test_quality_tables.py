"""benchmarks/quality.py: from the results of several sweeps to a table and a record of each experiment."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from conftest import SETTINGS
from scripts import script

from lolcats.sweep.execute import run_sweeps
from lolcats.sweep.plan import read_sweep

FEW = ["transfer.max_steps=2", "finetune.max_steps=2", "transfer.eval_steps=2"]


def test_tables_of_several_experiments(model_dirs, chat_file: Path, tmp_path: Path, capsys) -> None:
    quality, experiments = script("quality"), Path(__file__).parents[2] / "experiments"
    rows = {"table1": "rows={a: ['controls=[window_lora]']}", "lora": "rows={b: [finetune.rank=2], c: []}"}
    common = [f"base.model={model_dirs['llama']}", f"base.data={chat_file}", "evaluate.tasks=[]", *SETTINGS, *FEW]
    files = [f"evaluate.perplexity={{wikitext2: {chat_file}}}", "evaluate.rows=4", "evaluate.batch_size=3"]
    sweeps = [read_sweep(experiments / f"{name}.yaml", [*common, *files, own]) for name, own in rows.items()]
    said: list[str] = []
    command = "lolcats sweep experiments/lora.yaml /a/b/model --set 'x=/c/d.parquet' --set y=[1, 2]"
    written = run_sweeps(sweeps, tmp_path / "out", command, said.append)
    assert [path.name for path in written] == ["table1.md", "lora.md"]
    assert sum("No perplexity on" in line for line in said) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in lines.splitlines()]
    assert kinds == ["untrained", "untrained", "control", "row", "row", "row"], "the untrained models serve both sweeps"

    (tmp_path / "packed.gz").write_bytes(gzip.compress(lines.encode()))
    results = quality.read_results([tmp_path / "packed.gz"])
    assert results == [json.loads(line) for line in lines.splitlines()]
    paths = quality.tables(results, "tiny", "a random model", "Nothing was measured.", tmp_path / "tables", "abc")
    assert [path.name for path in paths] == ["lora-tiny.md", "table1-tiny.md"]
    text = paths[1].read_text()
    assert "Teacher: a random model. Nothing was measured." in text
    assert "| teacher |" in text
    assert "| – window+lora |" in text
    assert "| – *what the linear term adds* |" in text
    assert "lolcats sweep experiments/lora.yaml model --set 'x=d.parquet' --set y=[1, 2]" in text
    assert str(tmp_path) not in text + paths[1].with_suffix(".json").read_text()
    record = json.loads(paths[1].with_suffix(".json").read_text())
    (row,) = [r for r in record["results"] if r["kind"] == "row"]
    student, control = (row["systems"][name]["wikitext2"]["value"] for name in ("student", "window+lora"))
    added = row["adds"]["wikitext2"]
    assert added["value"] == pytest.approx(100 * (student / control - 1))
    assert added["stderr"] > 0
    assert "items" not in row["systems"]["student"]["wikitext2"]
    assert len(row["layers"]["entropies"]) == 2

    layers = script("layers")
    assert [row.name for row in layers.read_sweep(tmp_path / "out", "lora")] == ["b", "c"]
    assert len(layers.read_sweep(tmp_path / "out")) == 3
