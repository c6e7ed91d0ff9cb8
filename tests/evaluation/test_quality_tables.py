"""benchmarks/quality.py: turns the results of several sweeps into a table and a record of each experiment."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SETTINGS
from support.scripts import script

from lolcats.config import DataConfig
from lolcats.data.mixture import read_mixture
from lolcats.lab.sweep.execute import run_sweeps
from lolcats.lab.sweep.plan import read_sweep

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
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

    common = script("common")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(lines.encode()))
    results = common.read_lines(tmp_path / "packed.gz")
    assert results == [json.loads(line) for line in lines.splitlines()]
    about = {"name": "tiny-1.5b", "teacher": "a random model", "note": "Nothing was measured."}
    kept = quality.merged([*results, results[-1]], about, "abc")
    assert len(kept) == 1 + len(results), "a result that is there twice counts once"
    paths = quality.tables(kept, tmp_path / "tables")
    assert [path.name for path in paths] == ["lora-tiny-1.5b.md", "table1-tiny-1.5b.md"]
    text = paths[1].read_text()
    assert "Teacher: a random model. Nothing was measured." in text
    assert "Not run yet: Hedgehog, window, transfer; " in text
    assert "| teacher |" in text
    assert "| – window+lora |" in text
    assert "| – *what the linear term adds* |" in text
    assert "lolcats sweep experiments/lora.yaml model --set 'x=d.parquet' --set y=[1, 2]" in text

    packed = tmp_path / "tables" / "tiny-1.5b.jsonl.gz"
    again = common.read_lines(packed)
    assert str(tmp_path) not in text + json.dumps(again)
    assert again[1]["systems"] == results[0]["systems"], "single items are kept"
    assert quality.merged(again, dict.fromkeys(about, ""), "") == again

    layers = script("layers")
    assert [row.name for row in layers.read_sweep(packed, "lora")] == ["b", "c"]
    assert len(layers.read_sweep(tmp_path / "out" / "results.jsonl")) == 3


def test_rows_measured_alike() -> None:
    alike = script("common").alike
    old, new = {"evaluation": "old"}, {"evaluation": "new"}
    assert alike([]) == []
    assert alike([old, new]) == [new]
    assert alike([old, new, old]) == [old, old]


def test_data_of_the_sweeps(tmp_path: Path) -> None:
    """Nothing is both held out and trained on, and only records without an answer are dropped."""
    data = script("quality_data")
    alpaca = [{"instruction": f"i{n}", "input": "", "output": "<nooutput>" if n == 7 else f"o{n}"} for n in range(101)]
    books = [{"title": f"b{n}", "text": f"{n} " * 50_000} for n in range(20)]
    sources = {"alpaca": alpaca, "textbooks": books, "books": books}
    for name, records in sources.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    data.write(tmp_path / "out", {name: str(tmp_path / f"{name}.json") for name in sources})

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]

    assert {name: len(read(f"{name}_heldout")) for name in sources} == {"alpaca": 2, "textbooks": 1, "books": 2}
    assert max(len(r["text"]) for r in read("books_heldout")) == data.LONGEST
    kept = [r["title"] for name in ("books", "books_heldout") for r in read(name)]
    assert sorted(kept) == sorted(r["title"] for r in books)
    assert len(read("alpaca")) == 98
    shares = read_mixture(str(tmp_path / "out" / "both.yaml"), DataConfig())
    assert [share.share for share in shares] == [0.5, 0.25, 0.25]


@pytest.mark.slow
def test_processes_share_the_rows_out(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """Two processes fill one table; starting them again finds every result there."""
    for folder in ("models", "data", "eval"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models" / "tiny").symlink_to(model_dirs["llama"])
    for name in ("alpaca", "alpaca_heldout", "textbooks_heldout", "books_heldout"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(chat_file.read_bytes())
    own = ["rows={a: [], b: [finetune.rank=2]}", "evaluate.tasks=[]", f"evaluate.perplexity.wikitext2={chat_file}"]
    steps = [{"sweeps": ["lora"], "set": [*own, *SETTINGS, *FEW]}]
    runs = {"processes": [{"model": "tiny", "copies": 2, "steps": steps}]}
    (tmp_path / "runs.yaml").write_text(json.dumps(runs))
    folders = [word for name in ("models", "data", "eval", "out") for word in (f"--{name}", tmp_path / name)]
    command = [sys.executable, QUALITY.parent / "quality_runs.py", tmp_path / "runs.yaml", *folders, "--seconds", "240"]
    results = tmp_path / "out" / "tiny" / "results.jsonl"
    for _ in range(2):
        subprocess.run(command, check=True)
        kinds = [json.loads(line)["kind"] for line in results.read_text().splitlines()]
        assert sorted(kinds) == ["row", "row", "untrained", "untrained"]


@pytest.mark.parametrize("packed", sorted(QUALITY.glob("*.jsonl.gz")), ids=lambda path: path.name)
def test_committed_tables_are_of_the_committed_results(packed: Path, tmp_path: Path) -> None:
    quality = script("quality")
    written = quality.tables(script("common").read_lines(packed), tmp_path)
    assert written
    for path in written:
        assert path.read_text() == (QUALITY / path.name).read_text()
    name = packed.name.removesuffix(".jsonl.gz")
    assert {p.name for p in QUALITY.glob(f"*-{name}.md")} == {p.name for p in written}
