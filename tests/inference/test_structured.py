"""``response_format`` over HTTP: answers that follow their schema, and hostile schemas that hurt nobody else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.serving import serving, tiny_engine, wait_until
from test_server import slow_down

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 20}},
}  # fmt: skip
HOSTILE = {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    engine = tiny_engine(tokenizer, slots=8)
    slow_down(engine)
    with serving(engine) as (address, service):
        service.prepare()
        yield address, service


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}


def post(address: str, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "cat"}], "max_tokens": 90, **more}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 2, "seed": 1, "n": 4, "logprobs": True}])
def test_answers_follow_their_schema(server: tuple[str, Any], sampling: dict[str, Any]) -> None:
    reply = post(server[0], response_format=format_of(SCHEMA), **sampling)
    for choice in reply.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        value = json.loads(choice["message"]["content"])
        assert set(value) == {"name", "age"}
        assert value["name"] in ("cat", "dog")
        assert 0 <= value["age"] <= 20


def test_a_request_beside_it_is_free(server: tuple[str, Any]) -> None:
    plain, texts = post(server[0], temperature=0).json(), []
    threads = [
        threading.Thread(target=lambda kw=kw: texts.append(post(server[0], temperature=0, **kw).json()))
        for kw in ({}, {"response_format": format_of(SCHEMA)}, {})
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = [reply["choices"][0]["message"]["content"] for reply in texts]
    assert contents.count(plain["choices"][0]["message"]["content"]) == 2


def test_streams_and_completions_follow_it_as_well(server: tuple[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "cat", "max_tokens": 90, "response_format": format_of(SCHEMA), "stream": True}
    text = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=60).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert set(json.loads("".join(chunk["choices"][0]["text"] for chunk in chunks))) == {"name", "age"}


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ({"type": "json_schema"}, "json_schema"),
        (format_of({"type": "wizard"}), "wizard"),
        (format_of({"$ref": "https://example.org/schema.json"}), r"$ref"),
        (format_of({"type": "string", "pattern": "(("}), "regex"),
    ],
)
def test_schemas_that_are_wrong(server: tuple[str, Any], wanted: dict[str, Any], part: str) -> None:
    reply = post(server[0], response_format=wanted)
    assert reply.status_code == 400
    assert part in reply.json()["error"]["message"]


def test_a_hostile_schema_is_refused_and_other_streams_go_on(server: tuple[str, Any]) -> None:
    address, service = server
    replies: list[httpx.Response] = []
    hostile = threading.Thread(target=lambda: replies.append(post(address, response_format=format_of(HOSTILE))))
    body = {
        "model": "tiny",
        "prompt": "cat",
        "max_tokens": 1500,
        "stream": True,
        "temperature": 0,
        "logit_bias": {"2": -100},
    }
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as stream:
        lines, worst = stream.iter_lines(), 0.0
        next(lines)
        hostile.start()
        wait_until(lambda: service.compiling.waiting == 1)
        while hostile.is_alive():
            started = time.monotonic()
            if next(lines, None) is None:
                break
            worst = max(worst, time.monotonic() - started)
    hostile.join()
    assert replies[0].status_code == 400
    assert worst < 1
    assert post(address, response_format=format_of(SCHEMA)).status_code == 200


def test_more_grammars_than_can_be_compiled_are_refused_with_429(
    server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lolcats.inference.server.compiling.MOST_WAITING", 0)
    assert post(server[0], response_format={"type": "json_object"}).status_code == 429
    assert post(server[0], response_format={"type": "text"}).status_code == 200


def test_a_grammar_that_fails_in_the_middle_ends_its_own_request(
    server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lolcats.inference.engine.grammar import GrammarError, Matcher

    accept, calls = Matcher.accept, []

    def failing(self: Matcher, token: int) -> None:
        calls.append(token)
        if len(calls) == 5:
            raise GrammarError("too much")
        accept(self, token)

    monkeypatch.setattr(Matcher, "accept", failing)
    expected = post(server[0], temperature=0).json()["choices"]
    replies: list[Any] = []
    plain = threading.Thread(target=lambda: replies.append(post(server[0], temperature=0)))
    plain.start()
    broken = post(server[0], response_format=format_of(SCHEMA))
    plain.join()
    assert (broken.status_code, broken.json()["error"]["message"]) == (400, "too much")
    assert replies[0].json()["choices"] == expected
