"""Tools and tool messages: passed on where the chat template shows them, refused where it would leave them out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.messages import Template
from lolcats.inference.server.schema import ChatRequest, parse
from lolcats.inference.server.tokenizing import Tokenizing

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "how warm is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
]
KNOWS_ALL = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}"
    "{% endfor %}"
)


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def body(messages: list[dict[str, Any]], **more: Any) -> ChatRequest:
    return parse(ChatRequest, {"model": "tiny", "messages": messages, **more})


def test_a_template_that_knows_tools_gets_them(tokenizer: Any) -> None:
    template, given = Template(with_template(tokenizer, KNOWS_ALL)), body(CONVERSATION, tools=TOOLS)
    template.check(given.messages, given.tools)
    text = template.render([m.plain() for m in given.messages], [tool.plain() for tool in given.tools])
    assert text == '[weather]<user>how warm is it?<assistant>weather({"city": "Bern"})<tool>12 °C'


@pytest.mark.parametrize(
    ("template", "messages", "tools", "field"),
    [
        (None, CONVERSATION[:1], TOOLS, "tools"),
        ("own", CONVERSATION[:1], TOOLS, "tools"),
        ("own", CONVERSATION, [], "messages.1.tool_calls"),
        (REFUSES, [CONVERSATION[0], CONVERSATION[2]], [], "messages.1.role"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(
    template: str | None, messages: Any, tools: Any, field: str, tokenizer: Any
) -> None:
    changed = Template(tokenizer if template == "own" else with_template(tokenizer, template))
    given = body(messages, tools=tools)
    with pytest.raises(ApiError, match="does not know") as caught:
        changed.check(given.messages, given.tools)
    assert (caught.value.status, caught.value.param) == (400, field)


def test_a_template_that_shows_any_role_knows_tool_messages(tokenizer: Any) -> None:
    given = body([CONVERSATION[0], CONVERSATION[2]])
    Template(tokenizer).check(given.messages, [])


WANTS_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
)


def test_arguments_are_text_for_a_template_that_takes_text(tokenizer: Any) -> None:
    template, given = Template(with_template(tokenizer, WANTS_TEXT)), body(CONVERSATION)
    template.check(given.messages, [])
    text = template.render([m.plain() for m in given.messages])
    assert text == '<user>how warm is it?<assistant>weather{"city": "Bern"}<tool>12 °C'


def test_a_template_of_its_own_for_tools(tokenizer: Any) -> None:
    both: Any = {"default": REFUSES, "tool_use": KNOWS_ALL}
    template, given = Template(with_template(tokenizer, both)), body(CONVERSATION, tools=TOOLS)
    template.check(given.messages, given.tools)
    text = template.render([m.plain() for m in given.messages], [tool.plain() for tool in given.tools])
    assert text.startswith("[weather]<user>")
    with pytest.raises(ApiError, match="does not know tool calls"):
        template.check(given.messages, [])


def test_what_a_template_refuses_is_the_client_s_mistake(tokenizer: Any) -> None:
    for source in (REFUSES, "{{ messages[0].content.nothing() }}", "{{ messages[0]['content'] + 1 }}"):
        with pytest.raises(ApiError, match="refuses these messages") as caught:
            Template(with_template(tokenizer, source)).render([{"role": "tool", "content": "x"}])
        assert caught.value.status == 400


@pytest.mark.parametrize("arguments", ["[" * 2000 + "]" * 2000, '"\\ud800"', "{", ""])
def test_arguments_that_are_not_json_are_text(arguments: str, tokenizer: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    given = body([CONVERSATION[0], {**CONVERSATION[1], "tool_calls": [call]}])
    text = Template(with_template(tokenizer, KNOWS_ALL)).render([m.plain() for m in given.messages])
    text.encode()
    assert "weather(" in text


@pytest.mark.parametrize("text", ["the cat — 猫 🐈‍⬛", "", " a\n\n b", "<eos>x"])
def test_token_ids_are_the_tokenizer_s_own(text: str, tokenizer: Any) -> None:
    tokenizing = Tokenizing(tokenizer)
    assert tokenizing.encode(text, True) == tokenizer(text)["input_ids"]
    conversation = [{"role": "user", "content": text}]
    own = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    rendered = tokenizing.template.render(conversation)
    assert tokenizing.encode(rendered, False) == own
