"""Conversations as data sets have them: tools, other roles, parts, and what no template can render."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lolcats.config import DataConfig
from lolcats.data.conversations import Misfit
from lolcats.data.rows import load_data, tokenize_source
from lolcats.data.templates import renderer
from lolcats.errors import LolcatsError

SMALL = DataConfig(sequence_length=16, validation_rows=2, test_rows=2)
SKIPPING = DataConfig(sequence_length=16, validation_rows=2, test_rows=2, skip_broken=True)
KNOWS_ALL = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
ONLY_PLAIN = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant', 'system'] %}<{{ m.role }}>{{ m.content }}{% else %}"
    "{{ raise_exception('Only user, assistant and system') }}{% endif %}{% endfor %}"
)
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"city": "Bern"}}
TEXT = '<user>how warm?<assistant>weather({"city": "Bern"})<tool>12 °C<assistant>cool'
OPENAI: list[dict[str, Any]] = [
    {"role": "user", "content": "how warm?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
    {"role": "assistant", "content": "cool"},
]
SHAREGPT = [
    {"from": "human", "value": "how warm?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "12 °C"},
    {"from": "gpt", "value": "cool"},
]
PLAIN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
HALF = "a\ud83d"


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def rendered(record: dict[str, Any], tokenizer: Any, template: str = KNOWS_ALL) -> str:
    return renderer("chat", SMALL, with_template(tokenizer, template))(record)


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, fields]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": OPENAI},
        {"messages": OPENAI, "tools": None},
        {"messages": OPENAI, "tools": "[]"},
        {"conversations": SHAREGPT},
        {"conversations": [*SHAREGPT[:1], {"from": "function_call", "value": [CALL]}, *SHAREGPT[2:]]},
        {"messages": [*OPENAI[:1], {"role": "assistant", "tool_calls": [CALL]}, *OPENAI[2:]]},
        {"messages": [*OPENAI[:1], {"role": "assistant", "function_call": {**CALL, "arguments": '{"city": "Bern"}'}},
                      {"role": "function", "name": "weather", "content": "12 °C"}, OPENAI[3]]},
        {"messages": [{**OPENAI[0], "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "warm?"}]},
                      *OPENAI[1:]]},
        {"messages": [{"name": None, "tool_calls": [], "tool_call_id": None, **message} for message in OPENAI]},
    ],
    ids=["openai", "no tools", "empty tools", "sharegpt", "sharegpt list", "flat call", "older", "parts", "nulls"],
)  # fmt: skip
def test_tool_calls_of_every_form_are_one_conversation(record: dict[str, Any], tokenizer: Any) -> None:
    assert rendered(record, tokenizer) == TEXT


@pytest.mark.parametrize("tools", [
    [FUNCTION], [{"type": "function", "function": FUNCTION}], json.dumps([FUNCTION]), [json.dumps(FUNCTION)],
])  # fmt: skip
def test_tools_reach_a_template_that_takes_them(tools: Any, tokenizer: Any) -> None:
    assert rendered({"messages": OPENAI[:1], "tools": tools}, tokenizer) == "[weather]<user>how warm?"
    assert rendered({"messages": OPENAI[:1], "tools": tools}, tokenizer, ONLY_PLAIN) == "<user>how warm?"


def test_roles_are_passed_on_or_become_the_closest_one(tokenizer: Any) -> None:
    names = "{# 'developer' 'ipython' #}" + KNOWS_ALL
    for role, shown, template in (
        ("developer", "system", KNOWS_ALL), ("developer", "developer", names), ("ipython", "ipython", names),
        ("tool", "tool", KNOWS_ALL), ("function", "tool", KNOWS_ALL), ("human", "user", names),
    ):  # fmt: skip
        assert rendered({"messages": [{"role": role, "content": "x"}]}, tokenizer, template) == f"<{shown}>x"


def test_a_system_column_is_the_first_message(tokenizer: Any) -> None:
    asked = [{"from": "human", "value": "a"}]
    assert rendered({"conversations": asked, "system": "be kind"}, tokenizer) == "<system>be kind<user>a"
    assert rendered({"conversations": asked, "system": ""}, tokenizer) == "<user>a"
    own = [{"from": "system", "value": "own"}, *asked]
    assert rendered({"conversations": own, "system": "be kind"}, tokenizer) == "<system>own<user>a"
    with pytest.raises(Misfit, match="its system column: its content has type int"):
        rendered({"conversations": asked, "system": 3}, tokenizer)


def test_fields_of_a_message_reach_the_template(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    record = {"messages": [{"role": "assistant", "content": "b", "reasoning_content": "why", "from": None}]}
    assert rendered(record, tokenizer, template) == "why|b"


UNUSABLE = [
    ({"messages": turn(role="alien", content="x")}, KNOWS_ALL, "message 2, role 'alien': the chat template does"),
    ({"messages": OPENAI}, ONLY_PLAIN, "message 2, role 'assistant': the chat template does not know tool calls"),
    ({"conversations": SHAREGPT}, ONLY_PLAIN, "message 2, role 'function_call': the chat template does not know tool"),
    ({"messages": turn(role="tool", content="x")}, ONLY_PLAIN, "message 2, role 'tool': the chat template does"),
    ({"messages": turn(role="user", content=None)}, KNOWS_ALL, "message 2, role 'user': it has no content"),
    ({"messages": turn(role="user", content=[])}, KNOWS_ALL, "message 2, role 'user': it has no content"),
    ({"messages": turn(role="user", content=3)}, KNOWS_ALL, "role 'user': its content has type int"),
    ({"messages": turn(role="user", content=[{"type": "image_url", "image_url": "x"}])}, KNOWS_ALL, "type 'image_url'"),
    ({"messages": turn(role="user", content=HALF)}, KNOWS_ALL, "message 2, role 'user': .* half a surrogate pair"),
    ({"messages": turn(role="user", content="b", name=HALF)}, "{% for m in messages %}{{ m.name }}{% endfor %}",
     "half a surrogate pair"),
    ({"messages": turn(role="assistant", tool_calls=3)}, KNOWS_ALL, "role 'assistant': its tool_calls have type int"),
    ({"messages": turn(role="assistant", tool_calls=[{"id": "c1"}])}, KNOWS_ALL, "a tool call is not a function"),
    ({"conversations": [{"from": "function_call", "value": "call it"}]}, KNOWS_ALL, "'function_call': a tool call"),
    ({"messages": turn(content="x")}, KNOWS_ALL, "message 2 has no role"),
    ({"messages": turn(role=["user"], content="x")}, KNOWS_ALL, "the role of message 2 is not text"),
    ({"messages": ["hello"]}, KNOWS_ALL, "message 1 has type str, expected an object"),
    ({"messages": "hello"}, KNOWS_ALL, "its messages have type str, expected a list"),
    ({"conversations": [*SHAREGPT[:2], {"from": "gpt", "value": "b", "tool_call_id": []}, SHAREGPT[2]]}, KNOWS_ALL,
     "TypeError: unhashable"),
    ({"messages": OPENAI[:1], "tools": [3]}, KNOWS_ALL, "its tools are not functions"),
    ({"messages": turn(role="system", content="x")},
     "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
     "{% endfor %}", "message 2, role 'system': the chat template refuses it .*no system"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "template", "reason"), UNUSABLE)
def test_what_cannot_be_rendered_is_named_or_counted_and_skipped(
    record: dict[str, Any], template: str, reason: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = [{"messages": [{"role": "user", "content": f"the cat sat {i}", "name": "b"}]} for i in range(60)]
    changed, path = with_template(tokenizer, template), tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*good[:30], record, record, *good[30:]]))
    with pytest.raises(LolcatsError, match=rf"record 31 does not fit the chat format \(.*{reason}.*data\.skip_broken"):
        tokenize_source(str(path), changed, SMALL)
    assert tokenize_source(str(path), changed, SKIPPING, unique=False).counts["misfit_records_skipped"] == 2
    assert len(tokenize_source(str(path), changed, SKIPPING, unique=False)) == 60


def test_empty_conversations_are_empty_records(tmp_path: Path, tokenizer: Any) -> None:
    empty = [{"messages": []}, {"messages": None}, {"conversations": []}]
    (tmp_path / "a.json").write_text(json.dumps([PLAIN, *empty]))
    assert tokenize_source(str(tmp_path / "a.json"), tokenizer, SMALL).counts["empty_records"] == 3


@pytest.mark.parametrize("records", [[PLAIN, {"text": "x"}], [{"text": "x"}, PLAIN]])
def test_records_of_another_format_are_never_skipped(records: list[Any], tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(LolcatsError, match="record 2 does not fit") as caught:
        tokenize_source(str(tmp_path / "a.json"), tokenizer, SKIPPING)
    assert "skip_broken" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"text": "the cat"}, {"text": HALF}),
        ({"text": "the cat"}, {"text": ["a", "b"]}),
        ({"instruction": "say", "output": "cat"}, {"instruction": HALF, "output": "cat"}),
        ({"instruction": "say", "output": "cat"}, {"instruction": "say", "input": [1], "output": "cat"}),
        ({"instruction": "say", "output": "cat"}, {"instruction": None, "output": "cat"}),
    ],
)
def test_text_that_is_none_is_a_sentence_or_skipped(
    good: Any, bad: Any, name: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([good, bad]) if name == "a.json" else f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(LolcatsError, match=r"record 2 does not fit the (text|alpaca) format \(it"):
        tokenize_source(str(path), tokenizer, SMALL)
    found = tokenize_source(str(path), tokenizer, SKIPPING)
    assert (len(found), found.counts["misfit_records_skipped"]) == (1, 1)


def test_a_source_of_which_nothing_is_left(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": HALF}, {"text": ""}]))
    with pytest.raises(LolcatsError, match=r"every record is empty or does not fit the text format \(1 do not\)"):
        tokenize_source(str(tmp_path / "a.json"), tokenizer, SKIPPING)


def test_nulls_that_parquet_adds_are_not_rendered(tmp_path: Path, tokenizer: Any) -> None:
    """An Arrow column gives every object the keys of all others."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"name": "sum", "arguments": {"a": 1}}
    calls = [{"messages": [*OPENAI[:1], {"role": "assistant", "tool_calls": [c]}], "tools": [
        {"name": c["name"], "parameters": {"properties": {key: {"type": "x"} for key in c["arguments"]}}}
    ]} for c in (CALL, other)]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(calls))
    parquet.write_table(pyarrow.Table.from_pylist(calls), tmp_path / "a.parquet")
    changed = with_template(tokenizer, "{{ tools | tojson }}" + KNOWS_ALL)
    texts = []
    for name in ("a.json", "a.parquet"):
        found = tokenize_source(str(tmp_path / name), changed, SMALL)
        texts.append([tokenizer.decode(found.read(i, 0, int(n))) for i, n in enumerate(found.length)])
    assert texts[0] == texts[1]
    assert 'weather({"city": "Bern"})' in texts[1][0]


def surrogates(folder: Path) -> Path:
    """A Parquet file of 40 texts; two hold half a surrogate pair, which its writer did not check."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [b"a\xed\xa0\xbdb" if i in (7, 39) else f"the cat sat on a mat {i}".encode() for i in range(40)]
    buffers = pyarrow.array(texts).buffers()
    folder.mkdir()
    column = pyarrow.StringArray.from_buffers(len(texts), buffers[1], buffers[2])
    parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("hub", [False, True])
def test_parquet_text_that_is_not_unicode(hub: bool, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    source = surrogates(tmp_path / "set")
    if hub:  # the datasets package loads a directory like a hub data set
        pytest.importorskip("datasets")
        source = source.parent
    with pytest.raises(LolcatsError, match=r"2 broken line\(s\): record 8 \(its text is not UTF-8\); record 40"):
        tokenize_source(str(source), tokenizer, SMALL)
    for batch in (1000, 8):
        monkeypatch.setattr("lolcats.data.store.BATCH", batch)
        found = tokenize_source(str(source), tokenizer, SKIPPING)
        assert (len(found), found.counts["broken_lines_skipped"]) == (38, 2)


def test_streamed_text_that_is_not_unicode_is_a_sentence(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    source = surrogates(tmp_path / "set").parent
    streaming = DataConfig(sequence_length=16, validation_rows=2, test_rows=2, streaming=True, skip_broken=True)
    with pytest.raises(LolcatsError, match=r"record 8 is broken \(its text is not UTF-8\)"):
        load_data(str(source), tokenizer, streaming)


def test_why_a_hub_data_set_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": HALF}) + "\n")
    with pytest.raises(LolcatsError, match="surrogate"):
        load_data(str(tmp_path / "set"), tokenizer, SMALL)


WANTS_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
)


def test_arguments_are_text_for_templates_that_take_text(tokenizer: Any) -> None:
    """functionary's does."""
    assert rendered({"messages": OPENAI}, tokenizer, WANTS_TEXT) == TEXT.replace("(", "").replace(")", "")


def test_a_template_of_its_own_for_tools(tokenizer: Any) -> None:
    """The tokenizers of Hermes and Command R have one that knows calls, beside one that does not."""
    both: Any = {"default": ONLY_PLAIN, "tool_use": KNOWS_ALL}
    record = {"messages": OPENAI, "tools": [FUNCTION]}
    assert rendered(record, tokenizer, both) == "[weather]" + TEXT
    with pytest.raises(Misfit, match="does not know tool calls"):
        rendered({"messages": OPENAI}, tokenizer, both)


def test_calls_without_ids_get_some_that_answers_name(tokenizer: Any) -> None:
    """Mistral's templates refuse calls without an id of nine characters."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}({{ c.id }} {{ c.function.name }}){% endfor %}"
        "<{{ m.tool_call_id }}>{{ m.content }}{% endfor %}"
    )
    calls = {"from": "function_call", "value": json.dumps([CALL, CALL])}
    turns = [SHAREGPT[0], calls, SHAREGPT[2], SHAREGPT[2], SHAREGPT[1], SHAREGPT[2]]
    assert rendered({"conversations": turns}, tokenizer, template) == (
        "<>how warm?(call00000 weather)(call00001 weather)<><call00000>12 °C<call00001>12 °C(call00002 weather)<>"
        "<call00002>12 °C"
    )
