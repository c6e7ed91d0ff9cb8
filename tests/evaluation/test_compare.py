"""Which rows ``lolcats evaluate RUN --data`` measures: never a document that the run was trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentence
from torch import Tensor

from lolcats.config import Config, load_config, to_dict
from lolcats.data import store
from lolcats.data.rows import PackedRows, load_data, load_rows
from lolcats.errors import LolcatsError
from lolcats.evaluation import compare
from lolcats.evaluation.compare import evaluation_rows
from lolcats.run import Run

SETTINGS = ["attention.window_size=8", "data.sequence_length=32", "data.validation_rows=4", "data.test_rows=16"]


def write(path: Path, number: int = 120, seed: int = 0, name: str = "document") -> Path:
    """Documents that each begin with a number of their own."""
    rng = random.Random(seed)
    texts = [f"{name} {i} {sentence(rng, rng.randrange(3, 30))}" for i in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def trained(directory: Path, source: str, tokenizer: Any, *changes: str) -> tuple[str, Config, Any]:
    """The record of a run on ``source``: its directory, configuration and data."""
    config = load_config("paper-sinks", [*SETTINGS, *changes])
    data = load_data(source, tokenizer, config.data, config.seed)
    record = {"config": to_dict(config), "data": {**data.summary, "fingerprint": data.fingerprint}}
    Run(directory, {**record, "versions": {"transformers": "1.0"}, "stages": {}, "results": {}}).save()
    return str(directory), config, data


def documents(tokenizer: Any, rows: Tensor) -> set[str]:
    """The documents that are in the rows (N, L) with their beginning, by their numbers."""
    text = tokenizer.decode(rows.flatten().tolist())
    return {part.split()[0] for part in text.split("document ")[1:-1]}


def test_the_rows_are_those_of_the_final_table(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    run, config, data = trained(tmp_path / "run", source, tokenizer)
    rows, positions = evaluation_rows(run, source, tokenizer, config)
    assert torch.equal(rows, data.test)
    assert positions is None


@pytest.mark.parametrize("changes", [
    ["data.sequence_length=128"], ["data.sequence_length=20"], ["seed=5"], ["data.test_rows=40"],
    ["data.validation_rows=20"], ["data.sequence_length=64", "data.reset_at_documents=true", "seed=3"],
    ["data.max_tokens=1000"],
])  # fmt: skip
@pytest.mark.parametrize("large", [False, True], ids=["memory", "file"])
def test_other_settings_measure_no_document_of_training(
    changes: list[str], large: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE", 1 if large else store.LARGE)
    source = str(write(tmp_path / "a.jsonl"))
    run, _, data = trained(tmp_path / "run", source, tokenizer)
    assert isinstance(data.train, PackedRows) == large
    asked = load_config("paper-sinks", [*SETTINGS, *changes])
    rows, positions = evaluation_rows(run, source, tokenizer, asked)
    held_out = documents(tokenizer, data.test)
    learned = documents(tokenizer, data.train.whole()[0] if large else data.train)
    assert len(held_out) > 10 < len(learned)
    found = documents(tokenizer, rows)
    assert found & held_out
    assert not found & learned
    assert rows.shape[1] == asked.data.sequence_length
    assert rows.numel() > 0.7 * data.test.numel()
    if asked.data.reset_at_documents:
        assert positions is not None
        assert torch.equal(positions[:, 1:] == 0, rows[:, :-1] == tokenizer.eos_token_id)
    else:
        assert positions is None


def test_rows_longer_than_all_test_documents_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    run, _, _ = trained(tmp_path / "run", source, tokenizer)
    asked = load_config("paper-sinks", [*SETTINGS, "data.sequence_length=1024"])
    with pytest.raises(LolcatsError, match=r"test documents of .*a.jsonl have \d+ tokens, fewer than one row of 1,024"):
        evaluation_rows(run, source, tokenizer, asked)


@pytest.mark.parametrize("number", [119, 121, 3], ids=["shorter", "longer", "nearly empty"])
def test_data_that_has_changed_is_refused(number: int, tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl")
    run, config, _ = trained(tmp_path / "run", str(source), tokenizer)
    write(source, number)
    with pytest.raises(LolcatsError, match=r"a.jsonl has changed since .*run was trained on it \(it was sha256"):
        evaluation_rows(run, str(source), tokenizer, config)


def test_a_large_source_read_by_another_version_is_known_by_its_counts(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Its fingerprint holds the version of transformers that has read it."""
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE", 1)
    source = write(tmp_path / "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(store.transformers, "__version__", "1.0")
        run, config, data = trained(tmp_path / "run", str(source), tokenizer)
    again = load_data(str(source), tokenizer, config.data, config.seed)
    assert again.fingerprint != data.fingerprint
    assert torch.equal(evaluation_rows(run, str(source), tokenizer, config)[0], data.test)
    write(source, 121)
    with pytest.raises(LolcatsError, match="has changed"):
        evaluation_rows(run, str(source), tokenizer, config)


def test_a_run_is_measured_with_the_tokenizer_that_it_saved(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    source = str(write(tmp_path / "a.jsonl"))
    run, config, data = trained(tmp_path / "run", source, tokenizer)
    monkeypatch.setattr(compare, "has_tokenizer", lambda directory: str(directory) == run)
    monkeypatch.setattr(compare, "saved_tokenizer", lambda *_: tokenizer)
    assert torch.equal(evaluation_rows(run, source, None, config)[0], data.test)


def test_other_data_is_measured_whole(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file, another split of the same data set, and anything for a model that is not a run."""
    source, other = str(write(tmp_path / "a.jsonl")), str(write(tmp_path / "b.jsonl", 50, seed=1))
    run, config, _ = trained(tmp_path / "run", source, tokenizer)
    for model, data in ((run, other), (str(tmp_path), source)):
        rows, _ = evaluation_rows(model, data, tokenizer, config)
        assert torch.equal(rows, load_rows(data, tokenizer, config.data)[0])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(*(evaluation_rows(run, name, tokenizer, config)[0] for name in ("a.jsonl", source)))


def test_another_split_of_a_data_set_is_other_data(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", 50, seed=1)
    run, config, data = trained(tmp_path / "run", str(folder), tokenizer)
    assert torch.equal(evaluation_rows(run, str(folder), tokenizer, config)[0], data.test)
    asked = load_config("paper-sinks", [*SETTINGS, "data.split=test"])
    rows, _ = evaluation_rows(run, str(folder), tokenizer, asked)
    assert torch.equal(rows, load_rows(str(folder / "test.jsonl"), tokenizer, config.data)[0])
