"""Every field that clients of this field send: taken where it changes nothing, an error that names it elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat
from support import vllm_fields

from lolcats.inference.server import fields
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.schema import ChatRequest, CompletionRequest, parse

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "cat"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "cat"}
SENT = json.loads((Path(__file__).parents[1] / "clients" / "sent_fields.json").read_text())["requests"]
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [],
    "tool_choice": "none", "store": False, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto",
    "parallel_tool_calls": False, "stream_options": {"include_obfuscation": False}, "top_k": -1, "modalities": ["text"],
    "functions": [], "function_call": "none", "prediction": {"type": "content", "content": "x"}, "verbosity": "medium",
    "reasoning_effort": "none", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "auto"}, "seed": 3, "n": 1, "stop": [], "temperature": 1, "top_p": 1,
    "max_tokens": 5, "max_completion_tokens": 5, "logprobs": False, "top_logprobs": 0, "stream": False,
}  # fmt: skip
MUST_BE_NULL = {"audio", "moderation", "web_search_options"}


def taken(kind: Any, body: dict[str, Any], **change: Any) -> Any:
    return parse(kind, json.loads(json.dumps({**body, **change})))


def refused(kind: Any, body: dict[str, Any], **change: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        taken(kind, body, **change)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("name", sorted({*openai_chat.CompletionCreateParamsBase.__annotations__, "stream"}))
def test_every_chat_field_of_openai(name: str) -> None:
    if name not in CHAT:
        assert taken(ChatRequest, CHAT, **{name: None}) == taken(ChatRequest, CHAT)
        if name in MUST_BE_NULL:
            assert refused(ChatRequest, CHAT, **{name: {"a": 1}}).param == name
        else:
            taken(ChatRequest, CHAT, **{name: NEUTRAL[name]})


@pytest.mark.parametrize("name", sorted({*openai_completion.CompletionCreateParamsBase.__annotations__, "stream"}))
def test_every_completion_field_of_openai(name: str) -> None:
    neutral = {**NEUTRAL, "best_of": 1, "echo": False, "suffix": "", "logprobs": 0}
    if name not in COMPLETION:
        assert taken(CompletionRequest, COMPLETION, **{name: None}) == taken(CompletionRequest, COMPLETION)
        taken(CompletionRequest, COMPLETION, **{name: neutral[name]})


@pytest.mark.parametrize(
    ("kind", "body", "fields"),
    [
        (ChatRequest, CHAT, vllm_fields.CHAT),
        (ChatRequest, CHAT, vllm_fields.ROUTER_CHAT),
        (CompletionRequest, COMPLETION, vllm_fields.COMPLETION),
        (CompletionRequest, COMPLETION, vllm_fields.ROUTER_COMPLETION),
    ],
)
def test_every_field_of_vllm_and_its_router_at_its_default(kind: Any, body: Any, fields: dict[str, Any]) -> None:
    for name, default in fields.items():
        taken(kind, body, **{name: default})
        taken(kind, body, **{name: None})
    assert taken(kind, body, **fields).sampling(16, 0) == taken(kind, body).sampling(16, 0)


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: f"{sent['client']} {sent['endpoint']}")
def test_what_clients_were_seen_to_send_is_taken(sent: dict[str, Any]) -> None:
    kind, body = (ChatRequest, CHAT) if "chat" in sent["endpoint"] else (CompletionRequest, COMPLETION)
    for name, values in sent["fields"].items():
        for value in values:
            needed = {"logprobs": True} if name == "top_logprobs" else {}
            taken(kind, body, **needed, **{name: value})


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"cache_salt": "x"}, "cache_salt"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"stream_options": {"include": True}}, "stream_options.include"),
    ({"temprature": 0}, "temprature"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_k": 2**63}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 1e-39}, "repetition_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": float("1e300")}, "presence_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": "\ud800"}, "stop"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages.0.refusal"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "so"}]}, "messages.0.reasoning_content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
     "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "a"}]}, "messages.1.role"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), CHANGES, ids=lambda value: str(value)[:60])
def test_what_would_change_the_answer_is_an_error_that_names_it(change: dict[str, Any], field: str) -> None:
    error = refused(ChatRequest, CHAT, **change)
    assert error.param == field
    assert error.message.startswith(f"{field}: ")
    assert "<" not in error.message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt.1"), ({"prompt": ["a", 1]}, "prompt.1"), ({"prompt": [[1], "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"), ({"logprobs": True}, "logprobs"), ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)  # fmt: skip
def test_fields_of_completions_that_are_wrong(change: dict[str, Any], field: str) -> None:
    assert refused(CompletionRequest, COMPLETION, **change).param == field


def test_numbers_are_json_s() -> None:
    assert taken(ChatRequest, CHAT, max_tokens=16.0, n=2.0, temperature=1).max_tokens == 16
    assert taken(CompletionRequest, COMPLETION, n=3, best_of=3).n == 3
    assert taken(CompletionRequest, COMPLETION, max_tokens=0, echo=True).max_tokens == 0


def test_an_assistant_s_message_comes_back_as_it_was_sent() -> None:
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for more in (empty, {"tool_calls": []}, {"annotations": None, "name": None}):
        for content in ("meow", None, "", [{"type": "text", "text": "meow", "cache_control": {"type": "ephemeral"}}]):
            message = {"role": "assistant", "content": content, **more}
            body = taken(ChatRequest, CHAT, messages=[*CHAT["messages"], message])
            assert body.messages[1].plain() == {"role": "assistant", "content": "meow" if content else ""}


def test_sampling_parameters_arrive() -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "frequency_penalty": 0.2,
        "presence_penalty": -0.3, "logit_bias": {"5": -100, "7": 2.5}, "stop": list("abcdef"), "seed": 4, "logprobs": 3,
        "echo": True,
    }  # fmt: skip
    params = taken(CompletionRequest, COMPLETION, **given).sampling(9, 1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.1, 0.2, -0.3)
    assert params.logit_bias == ((5, -100), (7, 2.5))
    assert (params.stop, params.seed, params.logprobs, params.prompt_logprobs) == (tuple("abcdef"), 5, 3, 3)


def field_table() -> str:
    """The tables of fields as docs/compatibility.md has them."""
    places = {
        "both kinds of completion": fields.SHARED, "chat": fields.CHAT, "completions": fields.COMPLETION,
        "`stream_options`": fields.STREAM_OPTIONS, "a message": fields.MESSAGE, "a text part": fields.TEXT_PART,
    }  # fmt: skip
    lines = ["| in | field | accepted, without effect |", "|---|---|---|"]
    for place, table in places.items():
        expected: dict[str, list[str]] = {}
        for name, (_, values) in table.items():
            expected.setdefault(values, []).append(f"`{name}`")
        for values, names in expected.items():
            lines.append(
                f"| {place} | {', '.join(names)} | {values if values[:2] in ('a ', 'an') else f'`{values}`'} |"
            )
    return "\n".join(lines)


def test_the_page_has_the_fields() -> None:
    """To write it: python -c 'import test_fields as t; t.write_page()' in this directory."""
    assert f"<!-- fields -->\n{field_table()}\n<!-- /fields -->" in PAGE.read_text()


def write_page() -> None:
    before, rest = PAGE.read_text().split("<!-- fields -->")
    after = rest.split("<!-- /fields -->")[1]
    PAGE.write_text(f"{before}<!-- fields -->\n{field_table()}\n<!-- /fields -->{after}")
