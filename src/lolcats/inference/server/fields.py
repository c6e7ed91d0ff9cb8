"""Fields of OpenAI's API, of vLLM's and of routers that this server does not have, and the values that change nothing.

Clients send many of them always, at their neutral value. Those are taken; any other value would change the answer, so
it is refused, as is a field that nobody knows. ``null`` means that a field is not set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lolcats.inference.server.errors import bad_field

Rule = tuple[Callable[[Any], bool], str]
"""Which values are taken, and how to say which."""
Table = Mapping[str, Rule]


def _same(value: Any, neutral: Any) -> bool:
    """Equality as JSON has it: true is not 1, but 1 is 1.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def only(*neutral: Any) -> Rule:
    expected = " or ".join(map(json.dumps, neutral)) or "null"
    return lambda value: any(_same(value, x) for x in neutral), expected


def kind(expected: str, *types: type) -> Rule:
    """Any value of these types: it says nothing about the answer."""
    return lambda value: isinstance(value, types), expected


NEVER = only()
"""Only null."""
OBJECT, STRING, BOOLEAN = kind("an object", dict), kind("a string", str), kind("true or false", bool)

SHARED: Table = {
    # OpenAI's
    "metadata": OBJECT,
    "user": STRING,
    "safety_identifier": STRING,
    "prompt_cache_key": STRING,
    "prompt_cache_retention": STRING,
    "prompt_cache_options": OBJECT,
    "service_tier": STRING,
    "store": only(False),
    # vLLM's
    "use_beam_search": only(False),
    "early_stopping": only(False),
    "length_penalty": only(1),
    "watermarking": only(False),
    "stop_token_ids": only([]),
    "include_stop_str_in_output": only(False),
    "ignore_eos": only(False),
    "min_tokens": only(0),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "truncate_prompt_tokens": NEVER,
    "truncation_side": NEVER,
    "prompt_logprobs": NEVER,
    "logprob_token_ids": only([]),
    "allowed_token_ids": NEVER,
    "bad_words": only([]),
    "structured_outputs": NEVER,
    "guided_json": NEVER,
    "guided_regex": NEVER,
    "guided_choice": NEVER,
    "guided_grammar": NEVER,
    "priority": only(0),
    "request_id": STRING,
    "session_id": STRING,
    "return_tokens_as_token_ids": only(False),
    "return_token_ids": only(False),
    "return_token_offsets": only(False),
    "return_mm_kwargs": only(False),
    "routed_experts_prompt_start": only(0),
    "mm_payload": only("tensors"),
    "mm_processor_kwargs": only({}),
    "media_io_kwargs": only({}),
    "cache_salt": NEVER,
    "kv_transfer_params": only({}),
    "ec_transfer_params": only({}),
    "vllm_xargs": only({}),
    "repetition_detection": NEVER,
    "stream_interval": kind("an integer", int),
    "thinking_token_budget": NEVER,
    # routers'
    "no_stop_trim": only(False),
    "return_hidden_states": only(False),
}
CHAT: Table = {
    "audio": NEVER,
    "modalities": only(["text"]),
    "moderation": NEVER,
    "prediction": OBJECT,
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "web_search_options": NEVER,
    "functions": only([]),
    "function_call": only("none", "auto"),
    "parallel_tool_calls": BOOLEAN,
    "echo": only(False),
    "best_of": only(1),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "add_special_tokens": only(False),
    "documents": only([]),
    "chat_template": NEVER,
    "chat_template_kwargs": only({}),
    "return_prompt_text": only(False),
    "include_reasoning": BOOLEAN,
    "separate_reasoning": BOOLEAN,
    "stream_reasoning": BOOLEAN,
}
COMPLETION: Table = {
    "suffix": only(""),
    "add_special_tokens": only(True),
    "prompt_embeds": NEVER,
}
STREAM_OPTIONS: Table = {
    "include_obfuscation": BOOLEAN,
    "continuous_usage_stats": only(False),
}
MESSAGE: Table = {
    "refusal": NEVER,
    "audio": NEVER,
    "function_call": NEVER,
    "annotations": only([]),
    "reasoning": only(""),
    "reasoning_content": only(""),
    "provider_specific_fields": only({}),
}
TEXT_PART: Table = {
    "cache_control": OBJECT,
    "prompt_cache_breakpoint": kind("an object", dict, bool),
}


def settle(given: Any, own: set[str], *tables: Table, place: str = "") -> Any:
    """``given`` without what is not set and what changes nothing; what is not an object comes back as it is.

    Args:
        given: an object of a request, as parsed.
        own: the fields that the server has.
        tables: fields that it does not have.
        place: where the object stands in the request, such as ``messages.1.``.

    Raises:
        ApiError: a field at a value that would change the answer, or one that is not known.
    """
    if not isinstance(given, dict):
        return given
    result = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in own:
            result[name] = value
            continue
        accepts, expected = next((table[name] for table in tables if name in table), (None, ""))
        if accepts is None:
            raise bad_field(f"{place}{name}", "this server does not know this field.")
        if not accepts(value):
            raise bad_field(f"{place}{name}", f"not supported; leave it out or send {expected}.")
    return result
