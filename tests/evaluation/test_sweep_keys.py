"""The keys of a sweep's measurements: equal only where the same numbers come of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SETTINGS
from support.local_data import FILES, write_files

from lolcats.config import load_config
from lolcats.data.inputs import Inputs
from lolcats.evaluation import suite, tasks, text
from lolcats.files import append_line
from lolcats.lab.sweep.execute import Shared, _setup, run_sweep
from lolcats.lab.sweep.measure import Measurement
from lolcats.lab.sweep.plan import Evaluate, Sweep, plan, read_sweep
from lolcats.lab.sweep.row import run_key

BOOK = FILES["long_books"][0]["text"]
UNTRAINED = ["transfer.max_steps=0", "finetune.max_steps=0"]


@pytest.fixture
def inputs(model_dirs) -> Inputs:
    return Inputs(str(model_dirs["llama"]))


def measurement(inputs: Inputs, wanted: Evaluate, *settings: str) -> Measurement:
    return Measurement(wanted, inputs, load_config("paper-sinks", [*SETTINGS, *settings]), lambda _: None)


def sweep_of(folder: Path, model: Path, data: Path, *changes: str, **evaluate: Any) -> Sweep:
    tree = {"base": {"recipe": "paper-sinks", "model": str(model), "data": str(data), "set": SETTINGS},
            "rows": {"plain": UNTRAINED}, "evaluate": evaluate}  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_sweep(path, changes)


def test_rows_of_files_are_in_the_key(inputs: Inputs, chat_file: Path) -> None:
    """Their length and how records become rows; not what is held out of the training data."""
    files = Evaluate(perplexity={"chat": str(chat_file)})
    now = measurement(inputs, files)
    for setting in ("data.sequence_length=48", "data.reset_at_documents=true", "data.max_tokens=5000"):
        other = measurement(inputs, files, setting)
        assert (other.key != now.key, other.former_key == now.former_key) == (True, True), setting
    for setting in ("data.test_rows=5", "data.loss=completion", "attention.window_size=4"):
        assert measurement(inputs, files, setting).key == now.key, setting
    assert measurement(inputs, Evaluate(), "data.sequence_length=48").key == measurement(inputs, Evaluate()).key


def test_texts_and_benchmark_files_are_in_the_key_by_content(inputs: Inputs, tmp_path: Path) -> None:
    book, folder = tmp_path / "book.txt", write_files(tmp_path)
    book.write_text(BOOK)
    long = Evaluate(tasks=["positions", "recall-passkey"], text=str(book), lengths=[600])
    local = Evaluate(tasks=["positions"], data_dir=str(folder), lengths=[600])
    before = [measurement(inputs, wanted).key for wanted in (long, local)]
    book.write_text(BOOK + " milk")
    (tmp_path / "notes.parquet").write_bytes(b"")
    assert measurement(inputs, long).key != before[0]
    assert measurement(inputs, local).key == before[1], "its files are the same"
    books = next(folder.rglob("long_books.parquet"))
    books.write_bytes(next(folder.rglob("wikitext2_raw_test.parquet")).read_bytes())
    local_text = Evaluate(**{**asdict(local), "lengths": [8]})
    assert measurement(inputs, local_text).key != before[1]


NAMES = [*tasks.LOCAL, "mmlu_half", "gsm8k", *suite.IN_SUITES, "positions", "recall-passkey"]


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_the_files_that_a_task_reads(
    name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if name not in suite.LONG:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lolcats[eval]'")
    read, real = set[str](), tasks.read_records

    def watched(source: str, *arguments: Any) -> Any:
        read.add(source)
        return real(source, *arguments)

    for module in (tasks, text):
        monkeypatch.setattr(module, "read_records", watched)
    options = suite.Options(write_files(tmp_path), lengths=(600,), limit=1)
    suite.prepare([name], options, inputs.tokenizer)
    assert set(suite.sources(name, options)) == read
    assert read


def test_rows_of_another_length_have_references_of_their_own(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "out", {}
    for length in (32, 64, 32):
        changes = [f"data.sequence_length={length}"]
        sweep = sweep_of(tmp_path, model_dirs["llama"], chat_file, *changes, perplexity={"chat": str(chat_file)})
        results = run_sweep(sweep, out, "", lambda _: None)
        values = [len(next(iter(r["systems"].values()))["chat"]["items"]) for r in results[:2]]
        values.append(len(results[2]["systems"]["student"]["chat"]["items"]))
        assert len(set(values)) == 1
        found.setdefault(length, values)
        assert found[length] == values
    assert found[32][0] >= 2 * found[64][0]
    assert len((out / "results.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("setting", ["attention.window_size=4", "dtype=bfloat16", "device=cpu"])
def test_sweeps_of_one_command_are_measured_as_each_by_itself(
    setting: str, model_dirs, chat_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    wanted = {"tasks": ["recall-passkey", "positions"], "lengths": [600], "text": str(book), "kl": True}
    sweeps = [sweep_of(tmp_path, model_dirs["llama"], chat_file, *more, **wanted) for more in ([], [setting])]

    def shared() -> Shared:
        return Shared(tmp_path / "out", lambda _: None)

    together, apart = shared(), [_setup(sweep, shared(), "") for sweep in sweeps]
    setups = [_setup(sweep, together, "") for sweep in sweeps]
    assert [s.evaluation for s in setups] == [s.evaluation for s in apart]
    assert (setups[0].evaluation == setups[1].evaluation) == (setting == "device=cpu")
    assert setups[0].measurement is not setups[1].measurement
    assert setups[0].measurement is _setup(sweeps[0], together, "").measurement


def test_results_of_an_earlier_version_count_where_it_measured_these_rows(
    model_dirs, chat_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    """It told nothing of the rows' length: results of other lengths are not taken."""
    said: list[str] = []
    sweeps = {length: sweep_of(tmp_path, model_dirs["llama"], chat_file, f"data.sequence_length={length}",
                               perplexity={"chat": str(chat_file)}) for length in (32, 64)}  # fmt: skip
    shared = Shared(tmp_path, said.append)
    setups = {length: _setup(sweep, shared, "") for length, sweep in sweeps.items()}
    keys = {length: setup.measurement.key for length, setup in setups.items()}
    former = setups[32].measurement.former_key
    assert former == setups[64].measurement.former_key
    assert {length: setup.evaluation for length, setup in setups.items()} == keys
    row = run_key(setups[32], plan(sweeps[32])[0])
    append_line(tmp_path / "results.jsonl", json.dumps({"kind": "row", "row": row, "evaluation": former}))
    assert not said
    assert _setup(sweeps[32], shared, "").evaluation == former
    assert "from an earlier version" in said[-1]
    assert _setup(sweeps[64], shared, "").evaluation == keys[64]
    append_line(tmp_path / "results.jsonl", json.dumps({"kind": "row", "row": row, "evaluation": keys[32]}))
    assert _setup(sweeps[32], shared, "").evaluation == keys[32], "measured again by this version"


def test_a_file_under_the_home_directory_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from lolcats.lab.sweep.measure import source_identity

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text(BOOK)
    assert source_identity("~/book.txt") == source_identity(str(tmp_path / "book.txt"))
