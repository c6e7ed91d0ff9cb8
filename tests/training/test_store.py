"""Large sources: tokenized by several processes into a cached file, and the same rows as in memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentence

from lolcats.config import DataConfig, load_config
from lolcats.data import sources, store
from lolcats.data.rows import PackedRows, load_data, load_rows, tokenize_source
from lolcats.data.sources import pieces
from lolcats.errors import LolcatsError
from lolcats.lab.sweep.measure import source_identity
from lolcats.pipeline import linearize

SMALL = DataConfig(sequence_length=16, validation_rows=6, test_rows=6)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Treat every file as large, in pieces of 4 kB; returns the cache directory."""
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(sources, "PIECE", 4096)
    monkeypatch.setattr(store, "cores", lambda: 2)
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, count: int = 400, seed: int = 5) -> str:
    rng = random.Random(seed)
    lines = [json.dumps({"text": f"{sentence(rng, rng.randint(1, 60))} {i}"}) for i in range(count)]
    path.write_text("\n".join(lines + lines[:30]) + "\n\n")
    return str(path)


def whole(data) -> torch.Tensor:
    return data.train.whole()[0] if isinstance(data.train, PackedRows) else data.train


def test_same_rows_as_in_memory(tmp_path: Path, tokenizer, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl")
    assert len(pieces(Path(source))) > 10
    stored = load_data(source, tokenizer, SMALL)
    assert isinstance(stored.train, PackedRows)
    monkeypatch.setattr(store, "LARGE", 1 << 30)
    monkeypatch.setattr(sources, "PIECE", 1 << 30)
    memory = load_data(source, tokenizer, SMALL)
    assert isinstance(memory.train, torch.Tensor)
    assert torch.equal(whole(stored), memory.train)
    assert torch.equal(stored.validation, memory.validation)
    assert torch.equal(stored.test, memory.test)
    assert stored.summary == memory.summary
    assert memory.summary["duplicate_records"] == 30
    items = stored.dataset("train")
    assert torch.equal(torch.stack([items[i]["input_ids"] for i in range(len(items))]), memory.train)
    rows = load_rows(source, tokenizer, SMALL)[0]
    assert len(rows) > len(memory.train) + 12  # everything, duplicates too


def test_records_that_become_other_text_are_read_again(
    tmp_path: Path, tokenizer, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint stays that of the same rows, so runs go on."""
    source = write(tmp_path / "a.jsonl")
    before = load_data(source, tokenizer, SMALL).fingerprint
    (folder,) = large.iterdir()
    assert load_data(source, tokenizer, SMALL).fingerprint == before
    assert list(large.iterdir()) == [folder]
    monkeypatch.setattr(store, "TEXT", store.TEXT + 1)
    assert load_data(source, tokenizer, SMALL).fingerprint == before
    assert len(list(large.iterdir())) == 2


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.parquet"])
def test_other_formats(name: str, tmp_path: Path, tokenizer, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    texts = [sentence(rng, rng.randint(1, 300)) for _ in range(200)]
    if name == "a.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.Table.from_pylist([{"text": t} for t in texts])
        parquet.write_table(table, tmp_path / name, row_group_size=20)
        assert len(pieces(tmp_path / name)) == 10
    else:
        content = json.dumps([{"text": t} for t in texts]) if name == "a.json" else "\r\n\r\n".join(texts)
        (tmp_path / name).write_bytes(content.encode())
    stored = load_data(str(tmp_path / name), tokenizer, SMALL)
    monkeypatch.setattr(store, "LARGE", 1 << 30)
    assert torch.equal(whole(stored), load_data(str(tmp_path / name), tokenizer, SMALL).train)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_txt_read_in_blocks_equals_txt_read_whole(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "é\r\n\r\n\r\nb\n\n\n\nc\r\r\nd\r\n\r\n" * 3 + "end\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(sources, "BLOCK", block)
    assert list(sources._paragraphs(tmp_path / "a.txt")) == text.replace("\r\n", "\n").split("\n\n")
    (tmp_path / "a.txt").write_bytes("é".encode() * 5 + b"\xc3")
    with pytest.raises(LolcatsError, match="byte 10"):
        list(sources._paragraphs(tmp_path / "a.txt"))


def test_second_run_comes_from_the_cache_by_content(tmp_path: Path, tokenizer, large: Path, monkeypatch) -> None:
    source = write(tmp_path / "a.jsonl")
    first = load_data(source, tokenizer, SMALL)
    (key,) = large.iterdir()
    moved = tmp_path / "b.jsonl"
    moved.write_bytes(Path(source).read_bytes())
    os.utime(moved, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_build", None)
        again = load_data(str(moved), tokenizer, SMALL)
        other_rows = load_data(source, tokenizer, replace(SMALL, sequence_length=24), seed=1)
    assert again.fingerprint == first.fingerprint != other_rows.fingerprint
    assert again.summary["source"] == str(moved)
    with moved.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert load_data(str(moved), tokenizer, SMALL).fingerprint != first.fingerprint
    other = replace(SMALL, format="text", text_column="text")
    tokenize_source(source, tokenizer, other)
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<pad>")
    tokenize_source(source, changed, SMALL)
    assert len(list(large.iterdir())) == 4
    ids = key / "ids.bin"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(LolcatsError, match="delete that folder"):
        load_data(source, tokenizer, SMALL)


def test_an_unfinished_store_is_not_used(tmp_path: Path, tokenizer, large: Path, monkeypatch) -> None:
    source = write(tmp_path / "a.jsonl")
    left = (
        large / f"{store._key(['.jsonl', store.content_hash(Path(source))], tokenizer, SMALL)}-{store.TEXT}.999999999"
    )
    left.mkdir(parents=True)  # left by a killed process
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_data(source, tokenizer, SMALL)
    assert not list(large.iterdir())
    load_data(source, tokenizer, SMALL)


def test_lines_and_records_are_counted_through_all_pieces(tmp_path: Path, tokenizer, large: Path) -> None:
    source = Path(write(tmp_path / "a.jsonl"))
    lines = source.read_bytes().split(b"\n")
    lines[7], lines[211], lines[400] = b"{", b"[]", b"\xff"
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(LolcatsError, match=r"3 broken line\(s\): line 8 .*line 212 .*line 401"):
        load_data(str(source), tokenizer, SMALL)
    assert not list(large.iterdir())
    assert load_data(str(source), tokenizer, replace(SMALL, skip_broken=True)).summary["broken_lines_skipped"] == 3
    lines[300] = b'{"txt": "x"}'
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(LolcatsError, match="record 299 does not fit the text format"):  # two broken ones before it
        load_data(str(source), tokenizer, replace(SMALL, skip_broken=True))


def test_records_that_cannot_be_rendered_are_counted_through_all_pieces(tmp_path: Path, tokenizer, large: Path) -> None:
    source = Path(write(tmp_path / "a.jsonl"))
    lines = source.read_bytes().split(b"\n")
    lines[7], lines[250], lines[400] = b'{"text": "\\ud83d"}', b'{"text": ["a"]}', b'{"text": {"a": 1}}'
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(LolcatsError, match=r"record 8 does not fit the text format \(it holds half a surrogate pair"):
        load_data(str(source), tokenizer, SMALL)
    skipping = replace(SMALL, skip_broken=True)
    assert load_data(str(source), tokenizer, skipping).summary["misfit_records_skipped"] == 3
    (tmp_path / "mix.yaml").write_text("sources: [{path: a.jsonl, weight: 1}]")
    assert load_data(str(tmp_path / "mix.yaml"), tokenizer, skipping).summary["misfit_records_skipped"] == 3
    record = next(large.glob("*/store.json"))
    counts = json.loads(record.read_text())
    del counts["misfit_records_skipped"]  # as older versions wrote it
    record.write_text(json.dumps(counts))
    assert load_data(str(source), tokenizer, skipping).summary["misfit_records_skipped"] == 0


def test_a_killed_worker_is_an_error_message(tmp_path: Path, tokenizer, large: Path, monkeypatch) -> None:
    monkeypatch.setattr(store.Reading, "piece", lambda self, piece: os._exit(9))
    with pytest.raises(LolcatsError, match="was killed"):
        load_data(write(tmp_path / "a.jsonl"), tokenizer, SMALL)


def test_max_tokens(tmp_path: Path, tokenizer, large: Path) -> None:
    documents = tokenize_source(write(tmp_path / "a.jsonl"), tokenizer, replace(SMALL, max_tokens=1000), unique=False)
    everything = tokenize_source(write(tmp_path / "a.jsonl"), tokenizer, SMALL, unique=False)
    count = len(documents)
    assert documents.length.sum() >= 1000 > documents.length[:-1].sum()
    assert (documents.length == everything.length[:count]).all()


def test_hub_data_set_streams(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets package loads a directory like a hub data set."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    source = write(tmp_path / "set" / "train.jsonl")
    direct = load_data(source, tokenizer, SMALL)
    asked = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k["streaming"]) or real(*a, **k))
    streamed = load_data(str(tmp_path / "set"), tokenizer, replace(SMALL, streaming=True))
    assert asked == [True]
    assert isinstance(streamed.train, PackedRows)
    assert torch.equal(whole(streamed), direct.train)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("stream.")
    first = load_data(str(tmp_path / "set"), tokenizer, replace(SMALL, streaming=True, max_tokens=2000))
    assert len(first.train) < len(direct.train)
    monkeypatch.setattr(store, "LARGE", 0)
    cached = load_data(str(tmp_path / "set"), tokenizer, SMALL)
    assert torch.equal(whole(cached), direct.train)
    monkeypatch.setattr(store, "_build", None)
    assert load_data(str(tmp_path / "set"), tokenizer, SMALL).fingerprint == cached.fingerprint


MIXTURE = "sources:\n- {path: a.jsonl, weight: 3}\n- {path: sub/b.jsonl, weight: 1, text_column: body}\n"


def mixture(tmp_path: Path) -> str:
    write(tmp_path / "a.jsonl", 300)
    (tmp_path / "sub").mkdir(exist_ok=True)
    rng = random.Random(9)
    records = [{"body": f"B{i} " + sentence(rng, 20)} for i in range(300)]
    records += [{"body": json.loads(line)["text"]} for line in (tmp_path / "a.jsonl").read_text().split("\n")[:50]]
    (tmp_path / "sub" / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "mix.yaml").write_text(MIXTURE)
    return str(tmp_path / "mix.yaml")


@pytest.mark.parametrize("stored", [False, True])
def test_mixture_has_the_requested_shares(stored: bool, tmp_path: Path, tokenizer, request) -> None:
    if stored:
        request.getfixturevalue("large")
    source = mixture(tmp_path)
    documents = tokenize_source(source, tokenizer, SMALL)
    assert documents.counts["duplicate_records"] == 30 + 50  # within a, and of a in b
    data = load_data(source, tokenizer, SMALL)
    again, other = load_data(source, tokenizer, SMALL), load_data(source, tokenizer, SMALL, seed=1)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    rows = torch.cat([whole(data), data.validation, data.test])
    text = tokenizer.decode(rows.flatten()).split("<eos>")
    lengths = [(len(tokenizer(t)["input_ids"]) + 1, t.startswith("B")) for t in text]
    share = sum(n for n, b in lengths if b) / sum(n for n, _ in lengths)
    assert share == pytest.approx(0.25, abs=0.02)
    everything = [int(documents.length[documents.which == n].sum()) for n in (0, 1)]
    assert rows.numel() == pytest.approx(min(everything[0] / 0.75, everything[1] / 0.25), rel=0.02)


def test_identity_of_a_mixture_depends_on_the_content_of_its_sources(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    before = source_identity(source)
    assert source_identity(source) == before
    with (tmp_path / "sub" / "b.jsonl").open("a") as file:
        file.write(json.dumps({"body": "more"}) + "\n")
    assert source_identity(source) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: []", "lists no sources"),
        ("", "lists no sources"),
        ("sources: [{path: a.jsonl, weight: 0}]", "must be positive"),
        ("sources: [{path: a.jsonl, weight: .inf}]", "expected a finite number, got inf"),
        ("sources: [{weight: 1}]", "path"),
        ("sources: [{path: ./none.jsonl}]", "does not exist"),
        ("sources: [{path: a.jsonl, wieght: 1}]", "Did you mean"),
        ("sources: [{path: mix.yaml}]", "itself a mixture"),
        ("sources: {", "not valid YAML"),
        ("- a", "expected a mapping"),
    ],
)
def test_bad_mixtures(content: str, message: str, tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(LolcatsError, match=message):
        load_data(str(tmp_path / "mix.yaml"), tokenizer, SMALL)
    with pytest.raises(LolcatsError, match="does not exist"):
        load_data(str(tmp_path / "none.yaml"), tokenizer, SMALL)


@pytest.mark.parametrize("stored", [False, True])
def test_positions_start_again_with_documents_and_rows(stored: bool, tmp_path: Path, tokenizer, request) -> None:
    if stored:
        request.getfixturevalue("large")
    source = write(tmp_path / "a.jsonl")
    data = load_data(source, tokenizer, replace(SMALL, reset_at_documents=True))
    assert torch.equal(whole(data), whole(load_data(source, tokenizer, SMALL)))
    for split in ("train", "validation", "test"):
        items = data.dataset(split)
        for item in (items[i] for i in range(len(items))):
            ends = (item["input_ids"] == tokenizer.eos_token_id).roll(1)
            ends[0] = True
            assert torch.equal(item["position_ids"] == 0, ends)
            steps = item["position_ids"].diff()
            assert ((steps == 1) | (item["position_ids"][1:] == 0)).all()


def test_a_run_trains_on_a_store_as_on_memory(
    model_dirs, tmp_path: Path, settings, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl")
    config = load_config("paper-sinks", [*settings, "data.reset_at_documents=true", "data.keep_longest_effective=0.5"])
    runs = [linearize(str(model_dirs["llama"]), source, tmp_path / "stored", config, merge=False)]
    monkeypatch.setattr(store, "LARGE", 1 << 30)
    runs.append(linearize(str(model_dirs["llama"]), source, tmp_path / "memory", config, merge=False))
    found = [{name: run.results[name] for name in run.results if name.startswith("ppl_")} for run in runs]
    assert found[0] == found[1]
    chosen = [run.results["effective_length"] for run in runs]
    assert chosen[0] == chosen[1]
    assert chosen[0]["mean"]["kept"] > chosen[0]["mean"]["all"]
    assert len(chosen[0]["rows"]) == pytest.approx(runs[0].record["data"]["train_rows"] / 2, abs=1)


def test_first_occurrences() -> None:
    hashes = np.random.default_rng(0).integers(0, 4, (500, 2)).astype(np.uint64)
    seen: dict[bytes, int] = {}
    for number, row in enumerate(hashes):
        seen.setdefault(row.tobytes(), number)
    assert store.first_occurrences(hashes).tolist() == list(seen.values())


MEASURE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from lolcats.config import DataConfig
from lolcats.data import sources
from lolcats.data import store
from lolcats.data.rows import load_data
store.LARGE, sources.PIECE = 0, 1 << 20  # both files fall into more pieces than are read at once
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
load_data(sys.argv[1] + "/small.jsonl", tokenizer, DataConfig(sequence_length=128))
before = peak()
rows = load_data(sys.argv[1] + "/large.jsonl", tokenizer, DataConfig(sequence_length=128)).dataset("train")
for index in range(0, len(rows), 50):
    rows[index]
print(peak() - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, len(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path, model_dirs) -> None:
    """A file of 64 MB needs hardly more memory than one of 12 MB, although its token ids take over 60 MB more."""
    rng = random.Random(0)
    for name, megabytes in (("small", 12), ("large", 64)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            size = 0
            while size < megabytes << 20:
                size += file.write(json.dumps({"text": f"{rng.random()} " + sentence(rng, 30) * 20}) + "\n")
    environment = {**os.environ, "LOLCATS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(model_dirs["llama"])]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()
    grown, worker, rows = map(int, found)
    assert rows * 128 * 4 > 80 << 20
    assert grown < 25, f"{grown} MB more; a worker {worker} MB"
