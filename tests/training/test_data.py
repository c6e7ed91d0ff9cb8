"""Readers, templates, packing and the held-out splits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import sentence

from lolcats.config import DataConfig
from lolcats.data.rows import load_data
from lolcats.data.sources import read_records
from lolcats.data.templates import instruction_of, renderer
from lolcats.errors import LolcatsError

SMALL = DataConfig(sequence_length=16, validation_rows=6, test_rows=6)


def texts(count: int = 60) -> list[str]:
    rng = random.Random(5)
    return [f"{sentence(rng, 10)} {i}" for i in range(count)]


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_formats_give_the_same_rows(tmp_path: Path, tokenizer) -> None:
    records = [{"text": t} for t in texts()]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": records}))
    sources = [write_jsonl(tmp_path / "a.jsonl", records), str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    fingerprints = {load_data(s, tokenizer, SMALL).fingerprint for s in [*sources, str(tmp_path / "a.parquet")]}
    assert len(fingerprints) == 1


def test_hub_data_set_from_a_local_directory(tmp_path: Path, tokenizer) -> None:
    """The hub path is datasets.load_dataset, which also takes a directory."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in texts()])
    data = load_data(str(tmp_path / "set"), tokenizer, SMALL)
    direct = load_data(str(tmp_path / "set" / "train.jsonl"), tokenizer, SMALL)
    assert data.fingerprint == direct.fingerprint


def test_splits_share_no_document(tmp_path: Path, tokenizer) -> None:
    documents = texts(200)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in documents * 2])
    data = load_data(source, tokenizer, SMALL)
    assert (len(data.validation), len(data.test)) == (6, 6)
    assert data.summary["duplicate_records"] == 200

    def documents_in(rows: torch.Tensor) -> set[str]:
        text = tokenizer.decode(rows.flatten())
        return {d for d in documents if d in text}

    train, validation, test = (documents_in(r) for r in (data.train, data.validation, data.test))
    assert train
    assert test
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_packing_keeps_order_and_ends_documents(tmp_path: Path, tokenizer) -> None:
    data = load_data(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts()]), tokenizer, SMALL)
    assert data.train.shape[1] == 16
    assert data.train.dtype == torch.long
    flat = data.train.flatten().tolist()
    ends = flat.count(tokenizer.eos_token_id)
    assert ends > 10
    assert tokenizer.decode(flat).split("<eos>")[1] in texts()


def test_seed_changes_the_split_and_nothing_else_does(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts()])
    first, again, other = (load_data(source, tokenizer, SMALL, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.train, again.train)


def test_completions_follow_their_prompts(tmp_path: Path, tokenizer) -> None:
    """Also where the record has a text of its own."""
    records = [{"prompt": f"Q {t}\nA", "completion": f" is {t}.", "text": "unused"} for t in texts()]
    records += [{"prompt": "x", "completion": " "}, {"prompt": "x", "completion": None}]
    data = load_data(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, SMALL)
    assert data.summary["format"] == "completion"
    assert data.summary["empty_records"] == 2
    text = tokenizer.decode(data.train.flatten())
    assert "\nA is " in text
    assert "unused" not in text
    one = write_jsonl(tmp_path / "b.jsonl", [{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}])
    with pytest.raises(LolcatsError, match="its prompt has type list, expected text"):
        load_data(one, tokenizer, SMALL)


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (0, "0"), (0.0, "0.0"), (False, "False"), (None, "")])
def test_only_null_is_no_text(value: object, text: str, tokenizer) -> None:
    asked = "Add 1 and -1: "
    records = {
        "completion": {"prompt": asked, "completion": value}, "text": {"text": value},
        "alpaca": {"instruction": asked, "output": value},
    }  # fmt: skip
    for form, record in records.items():
        found = renderer(form, SMALL, tokenizer)(record)
        assert found.removeprefix(asked).rpartition("### Response:\n")[2] == text
    assert instruction_of({"instruction": 0, "input": 0}) == ("0", "0")


def test_alpaca_prompt(tmp_path: Path, tokenizer) -> None:
    records = [{"instruction": f"Say {t}", "input": "" if i % 2 else "now", "output": t} for i, t in enumerate(texts())]
    records += [{"instruction": "x", "input": "", "output": "<nooutput>"}, {"instruction": "y", "output": ""}]
    data = load_data(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, SMALL)
    assert data.summary["format"] == "alpaca"
    assert data.summary["empty_records"] == 2
    text = tokenizer.decode(data.train.flatten())
    assert "### Instruction:\nSay " in text
    assert "### Input:\nnow\n\n### Response:\n" in text
    assert "nooutput" not in text


def test_chat_template_and_sharegpt(tmp_path: Path, tokenizer) -> None:
    pairs = [(t, t.upper()) for t in texts()]
    openai = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    sharegpt = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs]
    one = load_data(write_jsonl(tmp_path / "a.jsonl", openai), tokenizer, SMALL)
    two = load_data(write_jsonl(tmp_path / "b.jsonl", sharegpt), tokenizer, SMALL)
    assert one.fingerprint == two.fingerprint
    assert "<|assistant|>" in tokenizer.decode(one.train.flatten())


def test_txt_is_cut_at_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"{i} " + "word " * 300 for i in range(40)]
    path.write_text("\n\n".join(paragraphs))
    records, _ = read_records(str(path), DataConfig())
    assert 5 < len(records) < 20
    assert "\n\n".join(r["text"] for r in records).split() == " ".join(paragraphs).split()


def test_broken_lines_are_named_counted_and_skipped_only_when_asked(tmp_path: Path, tokenizer) -> None:
    lines = [json.dumps({"text": t}).encode() for t in texts()]
    lines[3], lines[9], lines[11] = b'{"text": "cut', b'{"text": "\xff\xfe"}', b"[1, 2]"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(LolcatsError, match=r"3 broken line\(s\): line 4 .*line 10 .*line 12"):
        load_data(str(path), tokenizer, SMALL)
    skipping = DataConfig(sequence_length=16, validation_rows=6, test_rows=6, skip_broken=True)
    assert load_data(str(path), tokenizer, skipping).summary["broken_lines_skipped"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.txt", b"  \n\n ", "empty"),
        ("a.json", b"[]", "empty"),
        ("a.json", b"{broken", "not valid JSON"),
        ("a.json", b'"text"', "expected a list"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet"),
        ("a.csv", b"text\nhello", "unknown data format"),
        ("a.jsonl", b'{"body": "hello"}\n', "no text column. Its columns are body"),
        ("a.jsonl", b'{"text": ""}\n', "every record is empty"),
        ("a.jsonl", b'{"text": "short"}\n', "too few"),
        ("a.jsonl", b'{"messages": [{"role": "alien", "content": "x"}]}\n', "record 1 does not fit the chat"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "record 2 does not fit the text format"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path, tokenizer) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LolcatsError, match=message):
        load_data(str(tmp_path / name), tokenizer, SMALL)


def test_missing_sources(tokenizer) -> None:
    for source in ("./no/such/file.jsonl", "/no/such", "nobody/no-such-data-set"):
        with pytest.raises(LolcatsError, match=r"does not exist|Cannot load data set|needs the datasets package"):
            load_data(source, tokenizer, SMALL)


def test_validation_larger_than_the_data(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts(30)])
    with pytest.raises(LolcatsError, match="leave nothing to train on"):
        load_data(source, tokenizer, DataConfig(sequence_length=16, validation_rows=500))


def test_conversations_need_a_chat_template(tmp_path: Path, tokenizer) -> None:
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(LolcatsError, match="no chat template"):
        load_data(source, plain, SMALL)
