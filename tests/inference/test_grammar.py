"""response_format: answers satisfy their schema, and schemas that cannot be used are refused in a sentence."""

from __future__ import annotations

import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.grammars import (
    EOS,
    LIMITS,
    PAD,
    PATTERN,
    SCALAR,
    TREE,
    VOCABULARY,
    compiling,
    options,
    schema,
    walk,
)

pytest.importorskip("llguidance")

from lolcats.errors import LolcatsError
from lolcats.inference.engine.grammar import GrammarError, allowed, packed
from lolcats.inference.server.grammar import Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "minItems": 1, "maxItems": 3},
        "note": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "pets", "note"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Iterator[Grammars]:
    with compiling(tokenizer) as made:
        yield made


@pytest.fixture(scope="module")
def endless(tokenizer) -> Iterator[Grammars]:
    """Of an engine without end tokens."""
    with compiling(tokenizer, ()) as made:
        yield made


def is_person(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and list(value) == list(PERSON["properties"])
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and 1 <= len(value["pets"]) <= 3
        and set(value["pets"]) <= {"cat", "dog"}
        and value["note"] in (None, True, False)
    )


def is_tree(value: Any) -> bool:
    while value is not None:
        if list(value) != ["v", "next"] or value["v"] != 1:
            return False
        value = value["next"]
    return True


def is_pattern(value: Any) -> bool:
    letters, digits = value.split("-")
    return 2 <= len(letters) <= 4 and set(letters) <= set("abc") and len(digits) == 3 and digits.isdigit()


@pytest.mark.parametrize(
    ("wanted", "satisfied"),
    [
        (PERSON, is_person),
        (TREE, is_tree),
        (PATTERN, is_pattern),
        (SCALAR, lambda value: type(value) is int and -20 <= value <= 20),
    ],
    ids=["person", "tree", "pattern", "scalar"],
)
@pytest.mark.parametrize("stops", [True, False], ids=["stops", "no-stops"])
def test_random_answers_satisfy_their_schema(
    grammars: Grammars, endless: Grammars, tokenizer, wanted: Any, satisfied: Callable[[Any], bool], stops: bool
) -> None:
    grammar = (grammars if stops else endless).compile(schema(wanted))
    for seed in range(10):
        tokens = walk(grammar(), random.Random(seed))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert satisfied(json.loads(text)), text
        assert not {EOS, PAD} & set(tokens[:-1])


def test_json_object_is_any_object(grammars: Grammars, tokenizer) -> None:
    matcher = grammars.compile({"type": "json_object"})()
    assert all(tokenizer.decode([token])[0] == "{" for token in options(matcher))
    for token in tokenizer.encode('{"the cat": [1, -2.5e3, {"sat": null}], "on": true}', add_special_tokens=False):
        matcher.accept(token)
    assert matcher.stopped
    assert options(matcher) == [PAD, EOS]


def test_end_tokens_are_allowed_exactly_where_the_text_may_end(grammars: Grammars, endless, tokenizer) -> None:
    """3 and 12 are whole numbers of the schema, and 3 is the beginning of none; - is not whole."""
    for text, ends, goes_on in [("", False, True), ("-", False, True), ("1", True, True), ("3", True, False)]:
        with_stops, without = (g.compile(schema(SCALAR))() for g in (grammars, endless))
        for token in tokenizer.encode(text, add_special_tokens=False):
            with_stops.accept(token)
            without.accept(token)
        assert {EOS, PAD} & set(options(with_stops)) == ({EOS, PAD} if ends else set())
        assert set(options(without)) == set(options(with_stops)) - {EOS, PAD}
        assert with_stops.stopped is without.stopped is not goes_on


def test_a_stop_token_ends_it_and_one_that_is_not_allowed_is_an_error(grammars: Grammars, tokenizer) -> None:
    matcher = grammars.compile(schema(SCALAR))()
    with pytest.raises(GrammarError, match="Token 2 cannot follow"):
        matcher.accept(EOS)
    matcher.accept(*tokenizer.encode("1", add_special_tokens=False))
    matcher.accept(PAD)
    assert matcher.stopped
    with pytest.raises(GrammarError, match="cannot follow"):
        matcher.accept(EOS)


def test_a_stop_token_that_is_text_is_allowed_only_at_the_end(tokenizer) -> None:
    """Of a text it would end the answer in the middle."""
    seven, eight = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "78")
    grammars = Grammars(tokenizer, VOCABULARY, {seven}, LIMITS)
    try:
        matcher = grammars.compile(schema({"enum": [77, 88]}))()
    finally:
        grammars.close()
    for _ in range(2):
        assert options(matcher) == [eight]
        matcher.accept(eight)
    assert matcher.stopped
    assert options(matcher) == [seven]


def test_tokens_of_only_the_model_or_only_the_tokenizer_are_never_allowed(tokenizer) -> None:
    """A string allows almost every token; 300 and above are not the tokenizer's, special ones are no text."""
    for size in (320, 299, 257, 1000):
        grammars = Grammars(tokenizer, size, {EOS, 10_000}, LIMITS)
        try:
            matcher = grammars.compile(schema({"type": "string"}))()
        finally:
            grammars.close()
        (quote,) = tokenizer.encode('"', add_special_tokens=False)
        matcher.accept(quote)
        assert matcher.bitmask().shape == ((size + 31) // 32,)
        tokens = allowed(matcher.bitmask()[None], (size + 31) // 32 * 32)[0].nonzero().flatten().tolist()
        assert 6 <= min(tokens) < max(tokens) < min(size, 300)


def test_masks_of_rows() -> None:
    bits = torch.rand(3, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.stack([packed(row) for row in bits])
    assert rows.dtype == torch.int32
    assert torch.equal(allowed(rows, 96), bits)
    assert torch.equal(allowed(rows, 70), bits[:, :70])


def test_choices_share_nothing(grammars: Grammars, tokenizer) -> None:
    grammar = grammars.compile(schema(PERSON))
    alone = walk(grammar(), random.Random(5))
    first, second, rng = grammar(), grammar(), random.Random(5)
    for token in alone:
        if not second.stopped:
            second.accept(random.Random(len(options(second))).choice(options(second)))
        assert rng.choice(options(first)) == token
        first.accept(token)
    assert first.stopped


def test_whitespace_does_not_go_on_for_ever(grammars: Grammars, tokenizer) -> None:
    """But usual layouts are allowed."""
    wanted = {"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}}}, "required": ["a"]}
    for layout in ('{"a":[1,1]}', '{"a": [1, 1]}', '{\n  "a": [\n    1,\n    1\n  ]\n}', '{\r\n\t"a": [1]}'):
        matcher = grammars.compile(schema(wanted | {"additionalProperties": False}))()
        for token in tokenizer.encode(layout, add_special_tokens=False):
            matcher.accept(token)
        assert matcher.stopped
    matcher = grammars.compile(schema(wanted))()
    matcher.accept(*tokenizer.encode("{", add_special_tokens=False))
    blank = [token for token in options(matcher) if tokenizer.decode([token]).isspace()]
    count = 0
    while blank and count < 70:
        matcher.accept(blank[-1])
        blank, count = [t for t in options(matcher) if tokenizer.decode([t]).isspace()], count + 1
    assert count < 70


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"type": "text"}, "expected text, json_object or json_schema"),
        ({"type": "json_schema"}, "expected a JSON Schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}, "expected a JSON Schema"),
        (schema({"type": "nope"}), "Invalid type: nope"),
        (schema({"type": "string", "pattern": "("}), "unclosed group"),
        (schema({"$ref": "#/$defs/none"}), "does not exist"),
        (schema({"$ref": "#"}), "no text satisfies it"),
        (schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ."uniqueItems".'),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"oneOf": [{"const": 1}, {"type": "integer"}]}), "use anyOf"),
        (schema({"const": 10**400}), "."),
        (schema({"const": float("nan")}), "not JSON"),
        (schema({"type": "string", "x-guidance": {"lenient": True}}), "x-guidance is not a keyword"),
        (schema({"$schema": "http://127.0.0.1/schema", "type": "string"}), "not a draft"),
        (schema({"const": "x" * 70_000}), "at most 65536"),
        (schema(json.loads('{"items":' * 65 + "{}" + "}" * 65)), "more than 64 levels deep"),
        (schema({"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}), "too many properties"),
    ],
    ids=str,
)
def test_bad_schemas_are_refused_in_a_sentence(grammars: Grammars, bad: Any, reason: str) -> None:
    for _ in range(2):  # the second time it is known
        with pytest.raises(GrammarError, match=reason) as refused:
            grammars.compile(bad)
        assert isinstance(refused.value, LolcatsError)
        assert str(refused.value).startswith("response_format")
        assert len(str(refused.value).splitlines()) == 1
    assert grammars.compile(schema(SCALAR)) is not None


@pytest.mark.parametrize("depth", [30])
def test_deep_schemas_are_accepted(grammars: Grammars, depth: int) -> None:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False}
    assert not grammars.compile(schema(value))().stopped


def test_nothing_remote_is_fetched(grammars: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        refused = [
            {"$ref": f"{url}/x.json"},
            {"$ref": f"{url}/x.json#/a"},
            {"$ref": "other.json"},
            {"$ref": "file:///etc/passwd"},
            {"$ref": ""},
            {"$id": url, "$ref": "x.json"},
            {"$dynamicRef": f"{url}/x"},
            {"type": "object", "properties": {"a": {"anyOf": [{"$ref": url}]}}},
            {"$schema": url},
            {"$schema": {"$ref": url}},
        ]
        for value in refused:
            with pytest.raises(GrammarError):
                grammars.compile(schema(value))
        tricks = [
            {"$id": f"{url}/", "$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
            {"$id": f"{url}/", "$ref": "#/$defs/a", "$defs": {"a": {"$id": f"{url}/b", "$ref": "#/x"}}},
            {"$id": f"{url}/", "$ref": "#a", "$defs": {"a": {"$anchor": "a", "type": "string"}}},
            {"$id": f"{url}/x", "$ref": "#"},
            {"type": "object", "properties": {"$ref": {"type": "string"}}},
        ]
        for value in tricks:
            try:
                grammars.compile(schema(value))()
            except GrammarError:
                continue
        with pytest.raises(TimeoutError):
            listening.accept()


def test_without_llguidance_or_limits_it_is_a_sentence(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, reason in [("llguidance", r"pip install 'lolcats\[grammar\]'"), ("resource", "use Linux")]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(GrammarError, match=reason):
                Grammars(tokenizer, VOCABULARY, {EOS}, LIMITS).compile({"type": "json_object"})
    with pytest.raises(GrammarError, match="fast tokenizer"):
        Grammars(object(), VOCABULARY, {EOS}, LIMITS).compile({"type": "json_object"})


def test_time_of_a_mask(grammars: Grammars, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for seed in range(20):
        matcher, rng = grammars.compile(schema(PERSON))(), random.Random(seed)
        while not matcher.stopped:
            token = rng.choice(options(matcher))
            begin = time.perf_counter()
            matcher.accept(token)
            times.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\nmask and token: median {statistics.median(times) * 1e3:.3f} ms of {len(times)}")
