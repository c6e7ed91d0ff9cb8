"""The server as its clients see it: OpenAI's own client, bad requests, limits, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from conftest import sentence
from support.serving import serving, tiny_engine, wait_until

from lolcats.inference.engine import Engine, Request
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.inference.server import Limits

LIMITS = Limits(context=400, max_tokens=300, body_bytes=5000, waiting=200, choices=4)
MESSAGES: Any = [{"role": "system", "content": "sing"}, {"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Engine:
    return tiny_engine(tokenizer, slots=8, stop_tokens=())


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[tuple[str, Any]]:
    with serving(engine, LIMITS) as (address, service):
        yield address, service


@pytest.fixture
def client(running: tuple[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0)


def expected(tokenizer: Any, prompt: list[int], **params: Any) -> str:
    """What an engine of its own says."""
    engine, texts = tiny_engine(tokenizer, slots=1, stop_tokens=()), list[str]()
    engine.submit(Request(prompt, SamplingParams(**params), lambda delta: texts.append(delta.text)))
    engine.run()
    return "".join(texts)


def chat_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lolcats"
    with pytest.raises(openai.NotFoundError, match="has the model 'tiny'"):
        client.models.retrieve("other")


def test_completion(client: openai.OpenAI, tokenizer: Any) -> None:
    prompts = ["the cat", "dogs like warm milk"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0, logprobs=2)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.text == expected(tokenizer, tokenizer(prompt)["input_ids"], max_tokens=12)
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs or []) == 12
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs or [])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)


def test_streamed_completion_of_token_ids(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer("green hills")["input_ids"]
    chunks = list(client.completions.create(model="tiny", prompt=ids, max_tokens=15, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(tokenizer, ids, max_tokens=15)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_chat(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].message.content == expected(tokenizer, chat_ids(tokenizer), max_tokens=20)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == 20
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy


def test_streamed_chat(client: openai.OpenAI, tokenizer: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True, logprobs=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected(tokenizer, chat_ids(tokenizer), max_tokens=20)
    logged = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert sum(len(entry.content or []) for entry in logged if entry) == 20
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_ids(tokenizer)), 20)


def test_choices_seeds_and_stop(client: openai.OpenAI, tokenizer: Any) -> None:
    def texts(**more: Any) -> list[str]:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=30, n=3, seed=7, temperature=1.5, **more
        )
        return [choice.message.content or "" for choice in answer.choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 3
    stop = first[0][4:6]
    assert texts(stop=stop)[0] == first[0][: first[0].index(stop)]
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    assert set(texts(extra_body=extra)) == {expected(tokenizer, chat_ids(tokenizer), max_tokens=30)}


def test_penalties_and_biases(client: openai.OpenAI, tokenizer: Any) -> None:
    def text(**more: Any) -> str:
        answer = client.completions.create(
            model="tiny", prompt=[5, 6], max_tokens=30, temperature=0, logprobs=0, **more
        )
        return answer.choices[0].logprobs.tokens if answer.choices[0].logprobs else []

    plain = text()
    assert len(set(text(frequency_penalty=2))) > len(set(plain))
    assert len(set(text(presence_penalty=2))) > len(set(plain))
    assert text(frequency_penalty=0, presence_penalty=0, logit_bias={}) == plain
    wanted = tokenizer("milk")["input_ids"][0]
    assert set(text(logit_bias={str(wanted): 100})) == {tokenizer.decode([wanted])}
    with pytest.raises(openai.BadRequestError, match="logit_bias: expected token ids"):
        text(logit_bias={"320": 1})


def test_what_the_server_said_can_be_sent_back(client: openai.OpenAI) -> None:
    messages = list(MESSAGES)
    for _ in range(3):
        reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
        messages.append(reply.choices[0].message)
        messages.append({"role": "user", "content": "more"})
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 20


CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "cat"}], "max_tokens": 3}
BAD = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": "cat"}, 400, "messages"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**12}, 400, "max_tokens"),
    ({"max_tokens": 299, "messages": [{"role": "user", "content": "the cat " * 120}]}, 400, "limit of 400"),
    ({"n": 5}, 400, "choices"),
    ({"n": True}, 400, "n"),
    ({"stop": ["a"] * 65}, 400, "at most 64"),
    ({"stop": [""]}, 400, "stop"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"seed": 2**70}, 400, "seed"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ({"model": "gpt-4"}, 404, "gpt-4"),
    ({"user": "x" * 6000}, 413, "5000 bytes"),
]


@pytest.mark.parametrize(("change", "status", "part"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields(running: tuple[str, Any], change: dict[str, Any], status: int, part: str) -> None:
    reply = httpx.post(f"{running[0]}/v1/chat/completions", content=json.dumps({**CHAT, **change}), headers=JSON)
    assert_error(reply, status, part)


JSON = {"Content-Type": "application/json"}
RAW = [
    (b"{", 400, "not valid JSON"),
    (b"", 400, "not valid JSON"),
    (b"[]", 400, "dictionary"),
    (b'{"model": "tiny", "prompt": "\xff"}', 400, "not valid UTF-8"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "NaN"),
    (b"[" * 4000, 400, "JSON"),
    (b'{"model": "tiny"}', 400, "prompt"),
    (b'{"model": "tiny", "prompt": ""}', 400, "at least one token"),
    (b'{"model": "tiny", "prompt": []}', 400, "at least one token"),
    (b'{"model": "tiny", "prompt": [999999]}', 400, "all between 0 and 319"),
    (b'{"model": "tiny", "prompt": [1, "a"]}', 400, "prompt"),
]


@pytest.mark.parametrize(("body", "status", "part"), RAW, ids=lambda value: str(value)[:40])
def test_bad_bodies(running: tuple[str, Any], body: bytes, status: int, part: str) -> None:
    assert_error(httpx.post(f"{running[0]}/v1/completions", content=body, headers=JSON), status, part)


def assert_error(reply: httpx.Response, status: int, part: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]


def test_other_content_types_paths_and_methods(running: tuple[str, Any]) -> None:
    # a page of another site can post text/plain without asking; application/json it cannot
    url = f"{running[0]}/v1/chat/completions"
    assert_error(httpx.post(url, content=json.dumps(CHAT), headers={"Content-Type": "text/plain"}), 415, "JSON")
    assert_error(httpx.get(f"{running[0]}/v2"), 404, "Not Found")
    assert_error(httpx.get(url), 405, "Method Not Allowed")


def test_api_key(tokenizer: Any) -> None:
    with serving(tiny_engine(tokenizer, slots=1), api_key="sésame") as (address, _):
        for key in ("x", "sésam", "sesame"):
            reply = httpx.get(f"{address}/v1/models", headers={b"Authorization": f"Bearer {key}".encode()})
            assert_error(reply, 401, "API key")
        for path in ("v1/models", "metrics"):
            good = httpx.get(f"{address}/{path}", headers={b"Authorization": "Bearer sésame".encode()})
            assert good.status_code == 200
            assert httpx.get(f"{address}/{path}").status_code == 401
        assert_error(httpx.post(f"{address}/v1/chat/completions", json=CHAT), 401, "API key")
        assert httpx.get(f"{address}/health").status_code == httpx.get(address).status_code == 200


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_slot(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=1, stop_tokens=())
    slow_down(engine)
    body = {**CHAT, "max_tokens": 4000}
    with serving(engine, Limits(waiting=1)) as (address, service), httpx.Client(base_url=address, timeout=20) as http:
        streams = [http.build_request("POST", "/v1/chat/completions", json={**body, "stream": True}) for _ in range(2)]
        running = http.send(streams[0], stream=True)
        wait_until(lambda: len(engine.running) == 1)
        waiting = http.send(streams[1], stream=True)
        wait_until(lambda: service.worker.waiting == 1)
        refused = http.post("/v1/chat/completions", json=body)
        assert_error(refused, 429, "waiting")
        assert refused.headers["Retry-After"] == "1"
        first = engine.running[0]
        running.close()
        wait_until(lambda: engine.running and engine.running[0] is not first)
        waiting.close()
        wait_until(lambda: engine.idle and service.worker.open == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=0.3)  # not streamed: leaves just the same
        wait_until(lambda: engine.idle and service.worker.open == 0)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def slow_down(engine: Engine) -> None:
    """A few milliseconds a step, so that requests overlap."""
    import time

    step = engine.step

    def slow() -> None:
        time.sleep(0.005)
        step()

    engine.step = slow  # type: ignore[method-assign]


def test_a_failing_step_ends_its_requests_with_an_error_and_the_server_goes_on(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2)
    forward, broken = engine._forward, [True]

    def failing(*args: Any) -> Any:
        if broken:
            raise RuntimeError("out of memory")
        return forward(*args)

    engine._forward = failing  # type: ignore[method-assign]
    with serving(engine) as (address, service):
        assert_error(httpx.post(f"{address}/v1/chat/completions", json=CHAT), 500, "out of memory")
        stream = openai.OpenAI(base_url=f"{address}/v1", api_key="none").chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
        broken.clear()
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200
        assert service.worker.open == 0


def test_three_hundred_requests_with_clients_that_leave(engine: Engine, running: tuple[str, Any],
                                                        tokenizer: Any) -> None:  # fmt: skip
    """50 at a time; every third client leaves after three chunks; all others get their whole, right answer."""
    address, service = running
    rng = random.Random(0)
    texts = [sentence(rng, rng.randint(1, 12)) for _ in range(30)]
    right = [expected(tokenizer, tokenizer(text)["input_ids"], max_tokens=20) for text in texts]

    async def one(client: openai.AsyncOpenAI, gate: asyncio.Semaphore, index: int) -> str | None:
        async with gate:
            stream = await client.completions.create(
                model="tiny", prompt=texts[index % 30], max_tokens=20, temperature=0, stream=True
            )
            answer, chunks = "", 0
            async with stream, contextlib.aclosing(stream.__aiter__()) as received:  # type: ignore[type-var]
                async for chunk in received:
                    answer, chunks = answer + chunk.choices[0].text, chunks + 1
                    if index % 3 == 0 and chunks == 3:
                        return None
            return answer

    async def everyone() -> list[str | None]:
        gate = asyncio.Semaphore(50)
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, gate, i) for i in range(300)))

    asyncio.run(everyone())  # threads, pools and caches are there now
    before = psutil.Process().memory_info().rss
    answers = asyncio.run(everyone())
    assert psutil.Process().memory_info().rss < before + (16 << 20)
    assert [a for i, a in enumerate(answers) if i % 3] == [right[i % 30] for i in range(300) if i % 3]
    assert answers[::3] == [None] * 100
    wait_until(lambda: engine.idle and service.worker.open == 0)
    assert engine.running == []
    figures = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if not line.startswith("#")
    )
    assert float(figures["lolcats_running"]) == float(figures["lolcats_waiting"]) == 0
    assert float(figures['lolcats_requests_total{reason="length"}']) >= 200
    assert float(figures["lolcats_first_token_seconds_count"]) >= 200


def test_health(running: tuple[str, Any], engine: Engine) -> None:
    state = httpx.get(f"{running[0]}/health").json()
    assert (state["status"], state["slots"], state["state_bytes"]) == ("ok", 8, engine.state_bytes)
    assert state["token_bytes"] == 0


def test_head_allow_and_what_is_not_shown(running: tuple[str, Any]) -> None:
    for path in ("", "health", "v1/models"):
        assert httpx.head(f"{running[0]}/{path}").status_code == 200
    reply = httpx.put(f"{running[0]}/v1/completions", content=b"")
    assert (reply.status_code, reply.headers["Allow"]) == (405, "POST")
    assert httpx.get(f"{running[0]}/openapi.json").status_code == 404


SURROGATES = [
    {"model": "tiny", "prompt": "a", "\ud800": 1}, {"model": "tiny", "prompt": "a", "stream_options": {"\ud800": 1}},
    {"model": "tiny", "prompt": "a", "metadata": {"a": "\udfff"}},
]  # fmt: skip


@pytest.mark.parametrize("body", SURROGATES, ids=str)
def test_surrogates_anywhere_are_an_error(running: tuple[str, Any], body: dict[str, Any]) -> None:
    reply = httpx.post(f"{running[0]}/v1/completions", content=json.dumps(body), headers=JSON)
    assert_error(reply, 400, "surrogate")


def test_errors_of_the_engine_name_their_field(running: tuple[str, Any]) -> None:
    for change, field in (({"prompt": []}, "prompt"), ({"logit_bias": {"320": 1}}, "logit_bias")):
        reply = httpx.post(f"{running[0]}/v1/completions", json={"model": "tiny", "prompt": "a", **change})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_every_first_token_is_counted(engine: Engine, running: tuple[str, Any]) -> None:
    def counted() -> float:
        lines = httpx.get(f"{running[0]}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("lolcats_first_token_seconds_count")).split()[1])

    before = counted()
    for _ in range(10):
        httpx.post(f"{running[0]}/v1/completions", json={"model": "tiny", "prompt": [5, 6], "n": 4, "max_tokens": 8})
    assert counted() == before + 40
