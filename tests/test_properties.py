"""Properties that hold for any input: configurations, data files, packing. Every run uses the same examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lolcats.attention import Documents
from lolcats.config import Config, DataConfig, StageConfig, from_dict, load_config, to_dict, to_yaml
from lolcats.data.rows import Corpus, PackedRows, load_data, load_rows
from lolcats.data.sources import read_records
from lolcats.data.store import TokenStore
from lolcats.errors import LolcatsError
from lolcats.run import _difference

quick = settings(
    derandomize=True, deadline=None, max_examples=150, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SMALL = DataConfig(sequence_length=8, validation_rows=1, test_rows=1)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def sections() -> dict[str, list[str]]:
    """The fields of each section of a Config; top-level fields are under ``""``."""
    parts = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}
    inner = {name: [f.name for f in dataclasses.fields(x)] for name, x in parts.items() if dataclasses.is_dataclass(x)}
    return {"": [name for name in parts if name not in inner], **inner}


def trees(value: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Configurations with mostly known keys."""
    known = sections()
    some = {
        name: st.dictionaries(st.sampled_from(fields) | st.text(max_size=6), value, max_size=3) | value
        for name, fields in known.items() if name
    }  # fmt: skip
    own = st.dictionaries(st.sampled_from(known[""]) | st.text(max_size=6), value, max_size=2)
    return st.tuples(own, st.fixed_dictionaries({}, optional=some)).map(lambda pair: {**pair[0], **pair[1]})


def accepted(make: Callable[[], Any]) -> Any:
    """The result of ``make``, or None if it raised a LolcatsError. Any other error fails the test."""
    try:
        return make()
    except LolcatsError as error:
        if len(str(error)) < 10:
            raise AssertionError("no sentence") from error
        return None


@quick
@given(trees(values))
def test_any_tree_is_a_configuration_or_refused(tree: dict[str, Any]) -> None:
    config = accepted(lambda: from_dict(Config, tree))
    if config is not None:
        again = from_dict(Config, yaml.safe_load(to_yaml(config)))
        assert repr(again) == repr(config)  # NaN does not equal itself
        assert to_dict(again).keys() == to_dict(config).keys()


plausible = {
    float: st.floats(1e-6, 10), int: st.integers(1, 64), bool: st.booleans(), str: st.text(max_size=10),
}  # fmt: skip


@quick
@given(st.data())
def test_valid_configurations_round_trip(data: st.DataObject) -> None:
    """Through YAML and JSON; the identity of a run does not change either."""
    tree: dict[str, Any] = {}
    for name, default in vars(Config()).items():
        if not dataclasses.is_dataclass(default):
            continue
        chosen = data.draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(default)]), max_size=3))
        for field in chosen:
            if (kind := type(getattr(default, field))) in plausible and isinstance(default, (StageConfig, DataConfig)):
                tree.setdefault(name, {})[field] = data.draw(plausible[kind])
    config = accepted(lambda: from_dict(Config, tree))
    if config is not None:
        assert from_dict(Config, yaml.safe_load(to_yaml(config))) == config
        assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
        identity = {"base": {"fingerprint": ""}, "data": {"fingerprint": ""}, "config": to_dict(config)}
        assert _difference(identity, json.loads(json.dumps(identity))) == ""


@quick
@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(
    [f"{section}.{field}" for section, fields in sections().items() for field in fields]), st.text(max_size=12) | values
), max_size=3))  # fmt: skip
def test_any_override_is_taken_or_refused(overrides: list[str]) -> None:
    accepted(lambda: load_config("paper-sinks", overrides))


@pytest.mark.parametrize("text", ["2024-13-45", "[" * 1500, "&a [*a]", "1:99:99", "!!python/object:os.system x", "\x00",
                                  "{[]: 1}", "<<: 3", "? {a: 1}", "0x", "1e999", "99999999-01-01"])  # fmt: skip
def test_yaml_that_is_odd(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert accepted(lambda: load_config("paper-sinks", [f"seed={text}"])) is None
    accepted(lambda: load_config(str(tmp_path / "a.yaml")))
    assert accepted(lambda: load_data(str(tmp_path / "a.yaml"), None, SMALL)) is None


record_like = st.fixed_dictionaries({}, optional={
    "text": values, "instruction": values, "input": values, "output": values,
    "messages": st.lists(st.fixed_dictionaries({}, optional={
        "role": st.sampled_from(["user", "assistant", "system", "alien"]) | values, "content": values, "from": values,
    }) | values, max_size=3) | values,
})  # fmt: skip


def check_source(path: Path, tokenizer: Any) -> None:
    """Rows of the right shape, or an error that names the file."""
    for read in (
        lambda: read_records(str(path), DataConfig()),
        lambda: load_rows(str(path), tokenizer, SMALL)[0],
        lambda: load_data(str(path), tokenizer, SMALL).train,
        lambda: load_rows(str(path), tokenizer, dataclasses.replace(SMALL, skip_broken=True))[0],
    ):
        try:
            found = read()
        except LolcatsError as error:
            if path.name not in str(error):
                raise AssertionError("the file is not named") from error
            continue
        if isinstance(found, torch.Tensor):
            assert found.shape[1] == SMALL.sequence_length
            assert ((found >= 0) & (found < len(tokenizer))).all()
        else:
            assert all(isinstance(record, dict) for record in found[0])


@quick
@given(st.binary(max_size=200), st.sampled_from(["a.json", "a.jsonl", "a.txt", "a.parquet"]))
def test_any_bytes_are_records_or_refused(tmp_path: Path, tokenizer, content: bytes, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    check_source(tmp_path / name, tokenizer)


@quick
@given(st.lists(record_like | values, max_size=6), st.booleans())
def test_any_json_is_records_or_refused(tmp_path: Path, tokenizer, records: list[Any], lines: bool) -> None:
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
    check_source(path, tokenizer)


ODD = [b"[" * 100_000, b'{"text": ' + b"9" * 10_000 + b"}", b'{"text": "\\ud800"}', b"NaN", b'{"text": NaN}',
       b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}", b'{"text": 1e999}']  # fmt: skip


@pytest.mark.parametrize("line", ODD)
def test_lines_that_are_odd(line: bytes, tmp_path: Path, tokenizer) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b'{"text": "a cat on a mat"}\n' * 30 + line if name == "a.jsonl" else line)
        check_source(tmp_path / name, tokenizer)


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 9), st.randoms(use_true_random=False))
def test_packing_is_the_documents_one_after_another(lengths: list[int], row: int, rng: Any) -> None:
    ids, sizes = np.arange(sum(lengths), dtype=np.int32), np.array(lengths, np.int32)
    starts = np.cumsum(sizes) - sizes
    store = TokenStore(ids, starts, sizes, np.zeros((len(sizes), 2), np.uint64), np.arange(len(sizes)), {})
    table = Corpus((store,), np.zeros(len(sizes), np.int16), starts, sizes, {})
    order = np.array(rng.sample(range(len(sizes)), len(sizes)))
    flat = [(int(starts[d]) + i, i) for d in order for i in range(lengths[d])]
    flat = flat[: len(flat) // row * row]
    packed = PackedRows(table, order, row, positions=True)
    whole, positions = packed.whole()
    assert whole.flatten().tolist() == [token for token, _ in flat]
    assert positions.flatten().tolist() == [min(i, place % row) for place, (_, i) in enumerate(flat)]
    for number in range(len(packed)):
        item = packed[number]
        assert torch.equal(item["input_ids"], whole[number])
        assert torch.equal(item["position_ids"], positions[number])


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_documents_come_apart_and_together(lengths: list[int], rng: Any) -> None:
    """Every token once, in its place, in a row that begins with its document; padding at most doubles the work."""
    other = rng.sample(lengths, len(lengths))
    documents = Documents((tuple(lengths), tuple(other)), torch.device("cpu"))
    x = torch.arange(2.0 * sum(lengths)).view(2, 1, -1, 1)
    seen: list[torch.Tensor] = []
    y = documents.apart(lambda rows: seen.append(rows) or rows.cumsum(2), x)
    expected = [part.cumsum(1) for row, parts in zip(x, (lengths, other), strict=True) for part in row.split(parts, 1)]
    torch.testing.assert_close(y.flatten(), torch.cat(expected, 1).flatten())
    assert sum(rows.numel() for rows in seen) <= 2 * x.numel()
