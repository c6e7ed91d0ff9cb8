"""LangChain's ``ChatOpenAI`` and ``OpenAI``."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from plain import GREEDY, MESSAGES, PROMPT, TOKENS, USER, Server, chat_logprobs
from pydantic import BaseModel, SecretStr


class Answer(BaseModel):
    """What the cat is like."""

    kind: Literal["warm", "green", "quiet"]
    far: bool


def chat(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.works("LangChain ChatOpenAI", feature)


def text(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.works("LangChain OpenAI", feature)


@pytest.fixture
def model(server: Server) -> ChatOpenAI:
    return ChatOpenAI(base_url=server.url, api_key=SecretStr("none"), model="tiny", max_retries=0, **GREEDY)


@pytest.fixture
def completions(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=SecretStr("none"), model="tiny", max_retries=0, **GREEDY)


CONVERSATION = [SystemMessage("sing"), HumanMessage(PROMPT)]


@chat("`invoke`")
def test_invoke(model: ChatOpenAI, server: Server) -> None:
    answer = model.invoke(CONVERSATION)
    assert answer.text == server.said()
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == TOKENS
    assert model.invoke(PROMPT).text == server.said(USER)


@chat("`stream`")
def test_stream(model: ChatOpenAI, server: Server) -> None:
    pieces = list(model.stream(CONVERSATION))
    assert "".join(piece.text for piece in pieces) == server.said()
    assert len(pieces) > 3
    usage = [piece.usage_metadata for piece in model.stream(CONVERSATION, stream_usage=True) if piece.usage_metadata]
    assert sum(entry["output_tokens"] for entry in usage) == TOKENS


@chat("`batch`")
def test_batch(model: ChatOpenAI, server: Server) -> None:
    texts = ["the", "cat", "dogs like warm milk"]
    assert [answer.text for answer in model.batch(list(texts))] == [
        server.said([{"role": "user", "content": t}]) for t in texts
    ]


@chat("`ainvoke`, `astream`")
def test_async(model: ChatOpenAI, server: Server) -> None:
    async def both() -> tuple[str, str]:
        pieces = [piece.text async for piece in model.astream(CONVERSATION)]
        return (await model.ainvoke(CONVERSATION)).text, "".join(pieces)

    assert asyncio.run(both()) == (server.said(), server.said())


@chat("conversations")
def test_conversation(model: ChatOpenAI, server: Server) -> None:
    """The answer goes back as the AIMessage that came; so does one made by hand."""
    answer = model.invoke(CONVERSATION)
    history: list[Any] = [*CONVERSATION, answer, HumanMessage("dogs like")]
    plain = [*MESSAGES, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "dogs like"}]
    assert model.invoke(history).text == server.said(plain)
    made = [HumanMessage(PROMPT), AIMessage("a mat"), HumanMessage([{"type": "text", "text": "dogs"}])]
    plain = [*USER, {"role": "assistant", "content": "a mat"}, {"role": "user", "content": "dogs"}]
    assert model.invoke(made).text == server.said(plain)


@chat("`logprobs`")
def test_logprobs(model: ChatOpenAI, server: Server) -> None:
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(CONVERSATION)
    assert len(answer.response_metadata["logprobs"]["content"]) == TOKENS
    assert chat_logprobs(answer.response_metadata) == chat_logprobs(server.chat(logprobs=True, top_logprobs=2))


@chat("sampling parameters")
def test_parameters(server: Server) -> None:
    """Every parameter of the class, and several stops."""

    def said(**more: Any) -> str:
        stops = ["zq", "zx", "zw", "zv", "zk"]
        model = ChatOpenAI(
            base_url=server.url, api_key=SecretStr("none"), model="tiny", max_retries=0, seed=3, top_p=0.9,
            temperature=1.0, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={75: -100}, stop_sequences=stops,
            max_completion_tokens=TOKENS, n=1, **more,
        )  # fmt: skip
        return model.invoke(CONVERSATION).text

    assert said() == said()
    assert said(extra_body={"top_k": 1, "repetition_penalty": 1.1}) != said()


@chat("`with_structured_output`")
@pytest.mark.usefixtures("grammars")
def test_structured(model: ChatOpenAI) -> None:
    roomy = model.model_copy(update={"max_tokens": 200})
    answer = roomy.with_structured_output(Answer, method="json_schema").invoke(CONVERSATION)
    assert isinstance(answer, Answer)
    kept: Any = roomy.with_structured_output(Answer, method="json_schema", include_raw=True).invoke(CONVERSATION)
    assert kept["parsing_error"] is None
    assert Answer.model_validate_json(kept["raw"].text) == kept["parsed"] == answer
    streamed = list(roomy.with_structured_output(Answer, method="json_schema").stream(CONVERSATION))
    assert streamed[-1] == answer


@text("`invoke`")
def test_completion(completions: OpenAI, server: Server) -> None:
    assert completions.invoke(PROMPT) == server.complete()["text"]
    whole = server.complete()["text"]
    stop = whole[3:5]
    assert completions.invoke(PROMPT, stop=[stop, "zq", "zx", "zw", "zv"]) == whole[: whole.index(stop)]


@text("`invoke` with its defaults")
def test_defaults(server: Server) -> None:
    model = OpenAI(base_url=server.url, api_key=SecretStr("none"), model="tiny", max_retries=0)
    result = model.generate([PROMPT])
    assert 0 < result.llm_output["token_usage"]["completion_tokens"] <= 256  # type: ignore[index]


@text("`stream`")
def test_streamed_completion(completions: OpenAI, server: Server) -> None:
    pieces = list(completions.stream(PROMPT))
    assert "".join(pieces) == server.complete()["text"]
    assert len(pieces) > 3


@text("`batch`")
def test_batched_completions(completions: OpenAI, server: Server) -> None:
    """In one request, with a list of prompts."""
    texts = ["the", "cat", "dogs like warm milk"]
    assert completions.batch(list(texts)) == [server.complete(t)["text"] for t in texts]


@text("`logprobs`")
def test_completion_logprobs(server: Server) -> None:
    model = OpenAI(base_url=server.url, api_key=SecretStr("none"), model="tiny", max_retries=0, logprobs=2, **GREEDY)
    generation = model.generate([PROMPT]).generations[0][0]
    assert generation.generation_info is not None
    assert generation.generation_info["logprobs"] == server.complete(logprobs=2)["logprobs"]
    assert len(generation.generation_info["logprobs"]["token_logprobs"]) == TOKENS
