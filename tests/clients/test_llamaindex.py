"""LlamaIndex's ``OpenAILike``, as a chat model and as one of completions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from plain import GREEDY, MESSAGES, PROMPT, TOKENS, USER, Server


def works(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.works("LlamaIndex OpenAILike", feature)


def model(server: Server, chat: bool, **more: Any) -> OpenAILike:
    return OpenAILike(
        model="tiny", api_base=server.url, api_key="none", is_chat_model=chat, max_retries=0, context_window=2048,
        **GREEDY, **more,
    )  # fmt: skip


CONVERSATION = [ChatMessage(role="system", content="sing"), ChatMessage(role="user", content=PROMPT)]


@works("`complete`")
def test_complete(server: Server) -> None:
    assert model(server, False).complete(PROMPT).text == server.complete()["text"]
    assert model(server, True).complete(PROMPT).text == server.said(USER)


@works("`complete` with its defaults")
def test_defaults(server: Server) -> None:
    """It sends no ``max_tokens``: OpenAI's default for completions is 16."""
    answer = OpenAILike(model="tiny", api_base=server.url, api_key="none", max_retries=0).complete(PROMPT)
    assert answer.raw is not None
    choice = answer.raw.choices[0]  # type: ignore[union-attr]
    tokens = answer.raw.usage.completion_tokens  # type: ignore[union-attr]
    assert tokens == 16 if choice.finish_reason == "length" else tokens <= 16


@works("`stream_complete`")
@pytest.mark.parametrize("chat", [False, True])
def test_stream_complete(server: Server, chat: bool) -> None:
    pieces = list(model(server, chat).stream_complete(PROMPT))
    expected = server.said(USER) if chat else server.complete()["text"]
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].text == expected
    assert len(pieces) > 3


@works("`chat`")
def test_chat(server: Server) -> None:
    answer = model(server, True).chat(CONVERSATION)
    assert answer.message.content == server.said()
    assert answer.raw is not None
    assert answer.raw.usage.completion_tokens == TOKENS  # type: ignore[union-attr]


@works("`stream_chat`")
def test_stream_chat(server: Server) -> None:
    pieces = list(model(server, True).stream_chat(CONVERSATION))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content == server.said()


@works("conversations")
def test_conversation(server: Server) -> None:
    llm = model(server, True)
    answer = llm.chat(CONVERSATION).message
    history = [*CONVERSATION, answer, ChatMessage(role="user", content="dogs like")]
    plain = [*MESSAGES, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "dogs like"}]
    assert llm.chat(history).message.content == server.said(plain)


@works("`achat`, `astream_chat`")
def test_async(server: Server) -> None:
    async def both() -> tuple[str | None, str]:
        llm = model(server, True)
        whole = await llm.achat(CONVERSATION)
        pieces = [piece.delta or "" async for piece in await llm.astream_chat(CONVERSATION)]
        return whole.message.content, "".join(pieces)

    assert asyncio.run(both()) == (server.said(), server.said())


@works("`logprobs`")
def test_logprobs(server: Server) -> None:
    """It keeps the likeliest tokens only: a list of them for each token of the answer."""
    answer = model(server, True, logprobs=True, top_logprobs=2).chat(CONVERSATION)
    expected = server.chat(logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == TOKENS
    assert [[(top.token, top.logprob) for top in tops] for tops in answer.logprobs] == [
        [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] for entry in expected
    ]
    completed = model(server, False, logprobs=True, top_logprobs=2).complete(PROMPT)
    assert completed.logprobs is not None
    tops = server.complete(logprobs=2)["logprobs"]["top_logprobs"]
    assert [{top.token: top.logprob for top in entry} for entry in completed.logprobs] == tops
