"""Fields of OpenAI's API, of vLLM's and of routers that this server does not have, and the values that change nothing.

Clients send many of them always, at their neutral value. Those are taken; any other value would change the answer, so
it is refused, as is a field that nobody knows. ``null`` means that a field is not set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lolcats.inference.server.errors import bad_field

Accepts = Callable[[Any], bool]
Table = Mapping[str, tuple[Accepts, str]]
"""For each field: which values are taken, and how to say which."""


def _same(value: Any, neutral: Any) -> bool:
    """Equality as JSON has it: true is not 1, but 1 is 1.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def only(*neutral: Any) -> Accepts:
    return lambda value: any(_same(value, x) for x in neutral)


def kind(*types: type) -> Accepts:
    """Any value of these types: it says nothing about the answer."""
    return lambda value: isinstance(value, types)


NEVER = only()
"""Only null."""

SHARED: Table = {
    # OpenAI's
    "metadata": (kind(dict), "an object"),
    "user": (kind(str), "a string"),
    "safety_identifier": (kind(str), "a string"),
    "prompt_cache_key": (kind(str), "a string"),
    "prompt_cache_retention": (kind(str), "a string"),
    "prompt_cache_options": (kind(dict), "an object"),
    "service_tier": (kind(str), "a string"),
    "store": (only(False), "false"),
    # vLLM's
    "use_beam_search": (only(False), "false"),
    "early_stopping": (only(False), "false"),
    "length_penalty": (only(1), "1"),
    "watermarking": (only(False), "false"),
    "stop_token_ids": (only([]), "[]"),
    "include_stop_str_in_output": (only(False), "false"),
    "ignore_eos": (only(False), "false"),
    "min_tokens": (only(0), "0"),
    "skip_special_tokens": (only(True), "true"),
    "spaces_between_special_tokens": (only(True), "true"),
    "truncate_prompt_tokens": (NEVER, "null"),
    "truncation_side": (NEVER, "null"),
    "prompt_logprobs": (NEVER, "null"),
    "logprob_token_ids": (only([]), "[]"),
    "allowed_token_ids": (NEVER, "null"),
    "bad_words": (only([]), "[]"),
    "structured_outputs": (NEVER, "null"),
    "guided_json": (NEVER, "null"),
    "guided_regex": (NEVER, "null"),
    "guided_choice": (NEVER, "null"),
    "guided_grammar": (NEVER, "null"),
    "priority": (only(0), "0"),
    "request_id": (kind(str), "a string"),
    "session_id": (kind(str), "a string"),
    "return_tokens_as_token_ids": (only(False), "false"),
    "return_token_ids": (only(False), "false"),
    "return_token_offsets": (only(False), "false"),
    "return_mm_kwargs": (only(False), "false"),
    "routed_experts_prompt_start": (only(0), "0"),
    "mm_payload": (only("tensors"), '"tensors"'),
    "mm_processor_kwargs": (only({}), "{}"),
    "media_io_kwargs": (only({}), "{}"),
    "cache_salt": (NEVER, "null"),
    "kv_transfer_params": (only({}), "{}"),
    "ec_transfer_params": (only({}), "{}"),
    "vllm_xargs": (only({}), "{}"),
    "repetition_detection": (NEVER, "null"),
    "stream_interval": (kind(int), "an integer"),
    "thinking_token_budget": (NEVER, "null"),
    # routers'
    "no_stop_trim": (only(False), "false"),
    "return_hidden_states": (only(False), "false"),
}
CHAT: Table = {
    "audio": (NEVER, "null"),
    "modalities": (only(["text"]), '["text"]'),
    "moderation": (NEVER, "null"),
    "prediction": (kind(dict), "an object"),
    "reasoning_effort": (only("none"), '"none"'),
    "verbosity": (only("medium"), '"medium"'),
    "web_search_options": (NEVER, "null"),
    "functions": (only([]), "[]"),
    "function_call": (only("none", "auto"), '"none" or "auto"'),
    "parallel_tool_calls": (kind(bool), "true or false"),
    "echo": (only(False), "false"),
    "best_of": (only(1), "1"),
    "add_generation_prompt": (only(True), "true"),
    "continue_final_message": (only(False), "false"),
    "add_special_tokens": (only(False), "false"),
    "documents": (only([]), "[]"),
    "chat_template": (NEVER, "null"),
    "chat_template_kwargs": (only({}), "{}"),
    "return_prompt_text": (only(False), "false"),
    "include_reasoning": (kind(bool), "true or false"),
    "separate_reasoning": (kind(bool), "true or false"),
    "stream_reasoning": (kind(bool), "true or false"),
}
COMPLETION: Table = {
    "suffix": (only(""), '""'),
    "add_special_tokens": (only(True), "true"),
    "prompt_embeds": (NEVER, "null"),
}
STREAM_OPTIONS: Table = {
    "include_obfuscation": (kind(bool), "true or false"),
    "continuous_usage_stats": (only(False), "false"),
}
MESSAGE: Table = {
    "refusal": (NEVER, "null"),
    "audio": (NEVER, "null"),
    "function_call": (NEVER, "null"),
    "annotations": (only([]), "[]"),
    "reasoning": (only(""), '""'),
    "reasoning_content": (only(""), '""'),
    "provider_specific_fields": (only({}), "{}"),
}
TEXT_PART: Table = {
    "cache_control": (kind(dict), "an object"),
    "prompt_cache_breakpoint": (kind(dict, bool), "an object"),
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
