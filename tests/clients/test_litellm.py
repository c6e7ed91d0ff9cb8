"""LiteLLM, with the three prefixes that lead to a server like OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal

import litellm
import pytest
from plain import GREEDY, MESSAGES, PROMPT, TOKENS, USER, Server, chat_logprobs
from pydantic import BaseModel

CHAT = ("openai/", "hosted_vllm/")
TEXT = "text-completion-openai/"


class Answer(BaseModel):
    kind: Literal["warm", "green", "quiet"]
    far: bool


def works(feature: str, *prefixes: str) -> Callable[[Any], Any]:
    """Runs the test for each prefix."""
    marked = [pytest.param(p, marks=pytest.mark.works(f"LiteLLM {p}", feature), id=p) for p in prefixes]
    return pytest.mark.parametrize("prefix", marked)


@pytest.fixture
def options(server: Server) -> dict[str, Any]:
    assert not litellm.drop_params  # fields that it would leave out are errors here
    return {"api_base": server.url, "api_key": "none", "num_retries": 0, "max_retries": 0, **GREEDY}


def expected(server: Server, prefix: str) -> str:
    return str(server.complete()["text"]) if prefix == TEXT else server.said(USER)


@works("`completion`", *CHAT, TEXT)
def test_completion(prefix: str, server: Server, options: dict[str, Any]) -> None:
    answer = litellm.completion(model=f"{prefix}tiny", messages=USER, **options)
    assert answer.choices[0].message.content == expected(server, prefix)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS


@works("streams", *CHAT, TEXT)
def test_stream(prefix: str, server: Server, options: dict[str, Any]) -> None:
    usage = {"include_usage": True}
    chunks = list(
        litellm.completion(model=f"{prefix}tiny", messages=USER, stream=True, stream_options=usage, **options)
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected(server, prefix)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    counted = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert counted[-1].completion_tokens == TOKENS


@works("`acompletion`", *CHAT, TEXT)
def test_async(prefix: str, server: Server, options: dict[str, Any]) -> None:
    async def both() -> tuple[str, str]:
        call: Callable[..., Coroutine[Any, Any, Any]] = litellm.acompletion
        whole = await call(model=f"{prefix}tiny", messages=USER, **options)
        stream = await call(model=f"{prefix}tiny", messages=USER, stream=True, **options)
        pieces = [c.delta.content or "" async for chunk in stream for c in chunk.choices]
        return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(both()) == (expected(server, prefix), expected(server, prefix))


@works("conversations", *CHAT)
def test_conversation(prefix: str, server: Server, options: dict[str, Any]) -> None:
    """The reply goes back as the object that came."""
    message = litellm.completion(model=f"{prefix}tiny", messages=MESSAGES, **options).choices[0].message
    more = {"role": "user", "content": "dogs like"}
    answer = litellm.completion(model=f"{prefix}tiny", messages=[*MESSAGES, message, more], **options)
    plain = [*MESSAGES, {"role": "assistant", "content": message.content}, more]
    assert answer.choices[0].message.content == server.said(plain)


@works("`logprobs`", *CHAT)
def test_logprobs(prefix: str, server: Server, options: dict[str, Any]) -> None:
    answer = litellm.completion(model=f"{prefix}tiny", messages=USER, logprobs=True, top_logprobs=2, **options)
    choice = answer.choices[0].model_dump()
    assert len(choice["logprobs"]["content"]) == TOKENS
    assert chat_logprobs(choice) == chat_logprobs(server.chat(USER, logprobs=True, top_logprobs=2))


@works("`logprobs`", TEXT)
def test_text_logprobs(prefix: str, server: Server, options: dict[str, Any]) -> None:
    answer = litellm.text_completion(model=f"{prefix}tiny", prompt=PROMPT, logprobs=2, **options)
    choice = server.complete(logprobs=2)
    assert answer.choices[0].text == choice["text"]
    logprobs = answer.choices[0].logprobs
    found = logprobs if isinstance(logprobs, dict) else logprobs.model_dump()
    assert found["token_logprobs"] == choice["logprobs"]["token_logprobs"]
    assert found["tokens"] == choice["logprobs"]["tokens"]


@works("sampling parameters", *CHAT)
def test_parameters(prefix: str, options: dict[str, Any]) -> None:
    def said(**more: Any) -> str:
        parameters = {
            **options,
            "temperature": 1.0,
            "seed": 3,
            "top_p": 0.9,
            "n": 1,
            "stop": ["zq", "zx"],
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "logit_bias": {"75": -100},
            "user": "someone",
        }
        answer = litellm.completion(model=f"{prefix}tiny", messages=USER, **parameters, **more)
        return str(answer.choices[0].message.content)  # fmt: skip

    assert said() == said()
    assert said(extra_body={"top_k": 1, "repetition_penalty": 1.1}) != said()


@works("sampling parameters", *CHAT)
def test_the_newer_limit(prefix: str, server: Server, options: dict[str, Any]) -> None:
    del options["max_tokens"]
    answer = litellm.completion(model=f"{prefix}tiny", messages=USER, max_completion_tokens=5, **options)
    assert answer.choices[0].message.content == server.said(USER, max_tokens=5)


@works("structured answers", *CHAT)
@pytest.mark.usefixtures("grammars")
def test_structured(prefix: str, options: dict[str, Any]) -> None:
    answer = litellm.completion(
        model=f"{prefix}tiny", messages=USER, response_format=Answer, **{**options, "max_tokens": 200}
    )
    assert Answer.model_validate_json(answer.choices[0].message.content)


@works("errors", *CHAT, TEXT)
def test_errors(prefix: str, options: dict[str, Any]) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(model=f"{prefix}tiny", messages=USER, **{**options, "temperature": -1})


@works("`Router`", *CHAT)
def test_router(prefix: str, server: Server, options: dict[str, Any]) -> None:
    """Two servers under one name."""
    entries = [{"model_name": "cats", "litellm_params": {"model": f"{prefix}tiny", **options}} for _ in range(2)]
    router = litellm.Router(model_list=entries, num_retries=0)
    texts = [router.completion("cats", USER).choices[0].message.content for _ in range(3)]  # type: ignore[union-attr]
    assert texts == [server.said(USER)] * 3
