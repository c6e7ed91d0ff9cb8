"""Rows of a run: smaller splits for little data, and rows or documents that never reach the linear term."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentence
from test_cli import invoke, sets

from lolcats.attention.spec import AttentionSpec
from lolcats.config import DataConfig, load_config
from lolcats.data import rows, store
from lolcats.data.inputs import Inputs
from lolcats.data.rows import HELD_OUT, Corpus, load_data
from lolcats.data.store import TokenStore
from lolcats.errors import LolcatsError
from lolcats.lab.data_stats import data_statistics
from lolcats.pipeline import resume, run_finetune, run_transfer, start
from lolcats.pipeline.rows import check_rows, empty_share
from lolcats.report.table import EMPTY, remarks
from lolcats.run import Run


def write(path: Path, lengths: list[int]) -> str:
    """Documents of about as many tokens."""
    rng = random.Random(0)
    path.write_text("".join(json.dumps({"text": f"{i} {sentence(rng, n)}"}) + "\n" for i, n in enumerate(lengths)))
    return str(path)


def corpus(lengths: list[int]) -> Corpus:
    sizes = np.array(lengths, np.int32)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    ids, hashes = np.arange(sizes.sum(), dtype=np.int32), np.zeros((len(sizes), 2), np.uint64)
    tokens = TokenStore(ids, starts, sizes, hashes, np.arange(len(sizes)), {})
    counts = {"source": "x", "empty_records": 0, "broken_lines_skipped": 0, "misfit_records_skipped": 0}
    return Corpus((tokens,), np.zeros(len(sizes), np.int16), starts, sizes, counts)


@pytest.mark.parametrize(("total", "held_out"), [(65, 32), (66, 32), (64, 6), (45, 4), (10, 1)])
def test_default_splits_shrink_only_if_the_data_is_too_small(total: int, held_out: int) -> None:
    data = rows.split(corpus([16] * total), DataConfig(sequence_length=16), seed=3)
    assert (len(data.validation), len(data.test), len(data.train)) == (held_out, held_out, total - 2 * held_out)
    assert (data.summary["validation_rows"], data.summary["test_rows"]) == (held_out, held_out)
    ids = torch.cat([data.test, data.validation, data.train]).flatten()
    assert ids.unique().numel() == 16 * total, "a token is in two splits"


def test_splits_of_enough_data_are_those_of_older_versions() -> None:
    """So that their runs continue: whole documents in shuffled order, first for test rows, then for validation rows."""
    rng = random.Random(0)
    for seed in range(20):
        lengths = [rng.randint(1, 40) for _ in range(300)]
        config = DataConfig(sequence_length=8, test_rows=rng.randint(1, 40))
        data = rows.split(corpus(lengths), config, seed)
        starts, order = np.cumsum(lengths) - lengths, list(range(300))
        random.Random(seed).shuffle(order)
        for found, count in ((data.test, config.test_rows), (data.validation, 32), (data.train, None)):
            ids: list[int] = []
            while order and (count is None or len(ids) < 8 * count):
                document = order.pop(0)
                ids += range(starts[document], starts[document] + lengths[document])
            kept = 8 * (len(ids) // 8 if count is None else count)
            assert found.flatten().tolist() == ids[:kept]


def test_splits_of_documents_of_many_rows() -> None:
    """None is divided: two of the three documents are held out, and the splits are what they have."""
    data = rows.split(corpus([16 * 20] * 3), DataConfig(sequence_length=16), seed=0)
    assert (len(data.validation), len(data.test), len(data.train)) == (6, 6, 20)
    with pytest.raises(LolcatsError, match=r"too few documents \(2\), which are never divided"):
        rows.split(corpus([16 * 500] * 2), DataConfig(sequence_length=16), seed=0)


def test_sizes_that_someone_chose_are_kept_or_refused() -> None:
    chosen = DataConfig(sequence_length=16, validation_rows=20)
    data = rows.split(corpus([16] * 50), chosen, seed=0)
    assert (len(data.validation), len(data.test)) == (20, 5)
    with pytest.raises(LolcatsError, match="50 validation rows and 32 test rows of 16 tokens leave nothing"):
        rows.split(corpus([16] * 50), DataConfig(sequence_length=16, validation_rows=50), seed=0)
    assert HELD_OUT == DataConfig().validation_rows == DataConfig().test_rows


@pytest.mark.parametrize(("tokens", "named"), [(9_000, True), (8_000, False)])
def test_the_recipe_small_is_named_if_it_would_do(tokens: int, named: bool) -> None:
    documents = corpus([100] * (tokens // 100))
    with pytest.raises(LolcatsError, match="leave nothing to train on") as caught:
        rows.split(documents, load_config("paper-sinks").data, seed=0)
    assert ("--recipe small" in str(caught.value)) is named
    if named:
        assert len(rows.split(documents, load_config("small").data, seed=0).test) == 8


def test_a_run_on_little_data_says_so(model_dirs: dict[str, Path], settings: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [30] * 20)
    with Path(source).open("a") as file:
        file.write('{"text": \n{"text": ["a"]}\n{"text": "\\ud83d"}\n')
    own = [*(s for s in settings if "_rows" not in s), "data.skip_broken=true"]
    said: list[str] = []
    for directory in (tmp_path / "out", tmp_path / "again"):
        job = start(Inputs(str(model_dirs["llama"])), source, directory, load_config("paper-sinks", own), said.append)
    held_out, train = len(job.data.test), len(job.data.train)
    assert 1 <= held_out < HELD_OUT
    line = f"little data: {held_out} validation and {held_out} test rows are held out instead of 32 and 32, and {train}"
    assert sum(line in text for text in said) == 2
    assert sum("skipped records: 1 broken, 2 unusable" in text for text in said) == 2
    record = job.run.record
    assert (record["data"]["test_rows"], record["config"]["data"]["test_rows"]) == (held_out, 32)
    assert resume(tmp_path / "again", said.append).data.fingerprint == record["data"]["fingerprint"]


@pytest.mark.parametrize("kind", ["hybrid", "remote", "linear"])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_where_the_linear_term_begins(kind: Any, window: Any) -> None:
    for size in (1, 2, 3, 7):
        for sinks in range(size + 1):
            spec = AttentionSpec(kind, window, size, sinks)
            reaching = [spec.window_start(n) > spec.softmax_sinks for n in range(4 * size + 2)]
            assert reaching.index(True) == spec.linear_from
            assert all(reaching[spec.linear_from :])


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (128, []),
        (192, ["attention.sinks=64"]),
        (1024, ["attention.window_size=512"]),
        (128, ["attention.window=sliding", "attention.sinks=64"]),
        (64, ["attention.kind=linear", "attention.layers={'3': hybrid}"]),
        (128, ["attention.kind=softmax", "attention.layers={'0-3': hybrid}"]),
    ],
)
def test_rows_that_never_reach_the_linear_term_are_refused(length: int, changes: list[str]) -> None:
    with pytest.raises(LolcatsError, match=rf"data\.sequence_length \({length}\) is too short"):
        check_rows(load_config("paper-sinks", [f"data.sequence_length={length}", *changes]))


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (129, []),
        (193, ["attention.sinks=64"]),
        (128, ["attention.window=sliding"]),
        (128, ["attention.kind=window"]),
        (2, ["attention.kind=linear"]),
        (2, ["attention.kind=softmax"]),
    ],
)
def test_rows_that_reach_the_linear_term_or_have_none(length: int, changes: list[str]) -> None:
    check_rows(load_config("paper-sinks", [f"data.sequence_length={length}", *changes]))


def test_commands_refuse_rows_without_linear_term(model_dirs: dict[str, Path], chat_file: Path, tmp_path: Path) -> None:
    changes = ["attention.window_size=8", "attention.feature_dim=8", "data.sequence_length=16"]
    short = ["--recipe", "paper-sinks", *sets(changes)]
    for words in (("linearize", "--data", chat_file, "--out", tmp_path / "out"), ("plan",)):
        output = invoke(words[0], model_dirs["llama"], *words[1:], *short, code=2)
        assert "the first 16 tokens of a row" in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_finished_run_with_such_rows_still_opens(
    model_dirs: dict[str, Path], chat_file: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version trained it."""
    untrained = ["transfer.max_steps=0", "finetune.max_steps=0", "data.sequence_length=16"]
    config, quiet = load_config("paper-sinks", [*settings, *untrained]), lambda _: None
    with monkeypatch.context() as patch:
        patch.setattr("lolcats.pipeline.job.check_rows", lambda config: None)
        job = start(Inputs(str(model_dirs["llama"])), str(chat_file), tmp_path / "out", config, quiet)
    run_transfer(job)
    with pytest.raises(LolcatsError, match="is too short"):
        resume(tmp_path / "out", quiet)
    run_finetune(job)
    resume(tmp_path / "out", quiet)


def test_share_of_an_empty_linear_term(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from positions in memory, from the lengths of documents on disk, and token by token."""
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(1)
    source = write(tmp_path / "a.jsonl", [rng.randint(1, 60) for _ in range(300)])
    config = load_config("paper-sinks", ["attention.window_size=8", "attention.sinks=2", "data.sequence_length=40",
                                     "data.reset_at_documents=true"])  # fmt: skip
    memory = load_data(source, tokenizer, config.data)
    monkeypatch.setattr(store, "LARGE", 0)
    stored = load_data(source, tokenizer, config.data)
    expected = float((memory.positions["train"] < 16).double().mean())
    assert 0.4 < expected < 0.9
    assert empty_share(memory, config) == pytest.approx(expected)
    assert empty_share(stored, config) == pytest.approx(expected)
    some = torch.tensor([0, 3, 4, len(memory.train) - 1])
    assert empty_share(stored.select(some), config) == pytest.approx(empty_share(memory.select(some), config))
    together = load_config("paper-sinks", ["attention.window_size=8", "attention.sinks=2", "data.sequence_length=40"])
    assert empty_share(load_data(source, tokenizer, together.data), together) == 0.4
    assert empty_share(memory, load_config("paper-sinks", ["attention.kind=linear"])) is None


def test_documents_without_linear_term_are_said_or_refused(
    model_dirs: dict[str, Path], settings: list[str], tmp_path: Path
) -> None:
    config = load_config("paper-sinks", [*settings, "data.reset_at_documents=true"])
    inputs, said = Inputs(str(model_dirs["llama"])), list[str]()
    mixed = write(tmp_path / "mixed.jsonl", [4, 4, 40] * 60)
    share = start(inputs, mixed, tmp_path / "out", config, said.append).run.record["data"][EMPTY]
    assert 0.3 < share < 0.9
    line = f"{share:.1%} of the training tokens have an empty linear term"
    assert any(line in text for text in said)
    assert line in remarks(Run.open(tmp_path / "out"))[0]
    with pytest.raises(LolcatsError, match=r"no document is long enough .* the first 16 tokens"):
        start(inputs, write(tmp_path / "short.jsonl", [2] * 200), tmp_path / "other", config, said.append)
    assert not (tmp_path / "other").exists()


def test_statistics_have_the_share(model_dirs: dict[str, Path], settings: list[str], tmp_path: Path) -> None:
    source, shares = write(tmp_path / "a.jsonl", [4, 4, 40] * 60), []
    for apart in ("true", "false"):
        config = load_config("paper-sinks", [*settings, f"data.reset_at_documents={apart}"])
        found = data_statistics(str(model_dirs["llama"]), source, config, torch.device("cpu"), torch.float32, 4).facts
        shares.append(float(found["training tokens with an empty linear term"].removesuffix("%")))
        assert found["validation and test rows"] == "4 and 4"
    assert shares[1] == 50 < shares[0] < 100


def test_rows_longer_than_the_model_s_positions(model_dirs: dict[str, Path], chat_file: Path, tmp_path: Path) -> None:
    """Refused before anything is searched or written."""
    out = tmp_path / "out"
    said = invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, "--recipe", "default", code=2)
    assert "this model has only 2048 positions: use --set data.sequence_length=2048" in " ".join(said.split())
    assert not out.exists()
