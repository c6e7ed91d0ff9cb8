"""OpenAI's own package. test_project_openai.py runs this file in the project's environment too, with its version."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from plain import GREEDY, MESSAGES, PROMPT, TOKENS, USER, Server, chat_logprobs
from pydantic import BaseModel


class Answer(BaseModel):
    kind: Literal["warm", "green", "quiet"]
    far: bool


def works(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.works("openai", feature)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def create(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **GREEDY, **more})


@works("models")
def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@works("completions")
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "dogs like"], [7, 8, 9], [[7, 8, 9], [10, 11]]])
def test_completion(client: openai.OpenAI, server: Server, prompt: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    several = isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str))
    prompts = prompt if several else [prompt]
    assert [choice.text for choice in answer.choices] == [server.complete(one)["text"] for one in prompts]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS * len(prompts)


@works("streamed completions")
def test_streamed_completion(client: openai.OpenAI, server: Server) -> None:
    usage = {"include_usage": True}
    chunks = list(
        client.completions.create(model="tiny", prompt=PROMPT, stream=True, stream_options=usage, logprobs=1, **GREEDY)
    )
    whole = server.complete(logprobs=1)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == whole["text"]
    logged = [choice.logprobs for choice in choices if choice.logprobs]
    assert [value for entry in logged for value in entry.token_logprobs or []] == whole["logprobs"]["token_logprobs"]
    assert choices[-1].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TOKENS


@works("logprobs of completions")
def test_completion_logprobs(client: openai.OpenAI, server: Server) -> None:
    choice = client.completions.create(model="tiny", prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    assert choice.logprobs is not None
    lengths = {
        len(x or []) for x in (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs)
    }
    assert lengths == {TOKENS}
    assert choice.logprobs.model_dump() == server.complete(logprobs=2)["logprobs"]
    assert all((value or 0) < 0 for value in choice.logprobs.token_logprobs or [])


@works("logprobs of the prompt (echo)")
def test_echo(client: openai.OpenAI, server: Server) -> None:
    """The first token has no log-probability; the others have those that a completion of what is before them has."""
    ids = [7, 8, 9, 10]
    choice = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    answer = choice.choices[0]
    assert answer.logprobs is not None
    values, scored = answer.logprobs.token_logprobs or [], server.complete(ids, echo=True, logprobs=1, max_tokens=0)
    assert [len(values), len(scored["logprobs"]["token_logprobs"])] == [5, 4]
    assert values[0] is None
    assert values[1:4] == pytest.approx(scored["logprobs"]["token_logprobs"][1:], abs=1e-4)
    for i in (3, 4):
        (token,) = server.complete(ids[:i], logprobs=1, max_tokens=1)["logprobs"]["top_logprobs"]
        assert answer.logprobs.top_logprobs is not None
        assert dict(answer.logprobs.top_logprobs[i]) | token == pytest.approx(answer.logprobs.top_logprobs[i], abs=1e-4)
    assert answer.text == scored["text"] + server.complete(ids, max_tokens=1)["text"]


@works("chat")
def test_chat(client: openai.OpenAI, server: Server) -> None:
    answer = create(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == server.said()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS
    newer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=5, temperature=0)
    assert newer.choices[0].message.content == server.said(max_tokens=5)


@works("streamed chat")
def test_streamed_chat(client: openai.OpenAI, server: Server) -> None:
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == server.said()
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage.total_tokens == create(client).usage.total_tokens


@works("streamed chat")
def test_stream_helper(client: openai.OpenAI, server: Server) -> None:
    whole = server.said()
    stop = whole[6:8]  # at the limit of tokens get_final_completion raises, although nothing is to be parsed
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, stop=stop, **GREEDY) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == whole[: whole.index(stop)]


@works("logprobs of chat")
def test_chat_logprobs(client: openai.OpenAI, server: Server) -> None:
    choice = create(client, logprobs=True, top_logprobs=2).choices[0]
    expected = server.chat(logprobs=True, top_logprobs=2)
    assert len(choice.logprobs.content) == TOKENS
    assert chat_logprobs(choice.model_dump()) == chat_logprobs(expected)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    streamed = [c for chunk in create(client, logprobs=True, top_logprobs=2, stream=True) for c in chunk.choices]
    entries = [entry.logprob for choice in streamed if choice.logprobs for entry in choice.logprobs.content]
    assert entries == [entry.logprob for entry in choice.logprobs.content]


@works("multi-turn chat")
def test_multi_turn(client: openai.OpenAI, server: Server) -> None:
    """The reply goes back as the object that came, with all of its fields."""
    messages: list[Any] = list(USER)
    for text in ("dogs like", "birds sing"):
        messages.append(create(client, messages=messages).choices[0].message)
        messages.append({"role": "user", "content": text})
    plain = [
        message if isinstance(message, dict) else {"role": "assistant", "content": message.content}
        for message in messages
    ]
    assert create(client, messages=messages).choices[0].message.content == server.said(plain)
    assert server.said(plain) != server.said()


@works("multi-turn chat")
def test_multi_turn_with_every_field(client: openai.OpenAI, server: Server) -> None:
    """As dicts with the nulls of a reply of OpenAI's own."""
    nulls = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    middle: dict[str, Any] = {"role": "assistant", "content": "a mat"}
    answer = create(client, messages=[*USER, middle | nulls, *USER])
    assert answer.choices[0].message.content == server.said([*USER, middle, *USER])


@works("parts of text")
def test_parts(client: openai.OpenAI, server: Server) -> None:
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]
    answer = create(client, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == server.said(USER)


@works("seeds, `n`, `stop`")
def test_seeds_choices_and_stops(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        return [c.message.content for c in create(client, temperature=1.5, n=3, seed=7, **more).choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 3
    stop = first[0][3:5]
    assert texts(stop=[stop, "zq", "zx", "zw", "zv", "zk"])[0] == first[0][: first[0].index(stop)]


@works("penalties, `logit_bias`")
def test_penalties_and_biases(client: openai.OpenAI, server: Server) -> None:
    """At neutral values nothing changes; a bias of 100 decides, and a penalty then lets other tokens through."""
    answer = create(client, frequency_penalty=0, presence_penalty=0, logit_bias={}, top_p=1, user="someone")
    assert answer.choices[0].message.content == server.said()
    biased = create(client, logit_bias={"75": 100}, logprobs=True).choices[0].logprobs.content
    assert {entry.token for entry in biased} == {biased[0].token}
    other = create(client, logit_bias={"75": 1.5}, frequency_penalty=2, presence_penalty=2, logprobs=True)
    tokens = [entry.token for entry in other.choices[0].logprobs.content]
    assert tokens.count(biased[0].token) < 2


@works("fields of vLLM (`extra_body`)")
def test_extra_body(client: openai.OpenAI, server: Server) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    assert create(client, temperature=1, extra_body=extra).choices[0].message.content == server.said()


@works("structured answers")
@pytest.mark.usefixtures("grammars")
def test_structured(client: openai.OpenAI) -> None:
    parse = client.chat.completions.parse
    answer = parse(model="tiny", messages=MESSAGES, response_format=Answer, max_tokens=200, temperature=0).choices[0]
    assert isinstance(answer.message.parsed, Answer)
    assert Answer(**json.loads(answer.message.content or "")) == answer.message.parsed
    streamed = create(
        client, stream=True, max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "Answer", "strict": True, "schema": Answer.model_json_schema()},
        },
    )  # fmt: skip
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert Answer.model_validate_json(text) == answer.message.parsed


@works("`AsyncOpenAI`")
def test_async(server: Server) -> None:
    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def one(text: str) -> str:
                messages: Any = [{"role": "user", "content": text}]
                stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True, **GREEDY)
                return "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices])

            return list(await asyncio.gather(*(one(text) for text in ("the", "cat", "sat"))))

    expected = [server.said([{"role": "user", "content": text}]) for text in ("the", "cat", "sat")]
    assert asyncio.run(several()) == expected


@works("errors")
def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        create(client, model="other")
