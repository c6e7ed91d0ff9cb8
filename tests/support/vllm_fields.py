"""Fields of vLLM's requests and their defaults: vllm 0.32.0, chat_completion/ and completion/protocol.py, 2026-11-29.

And what vllm-router 0.1.17 adds to a request. A list made by a script that read the classes' annotations.
"""

from __future__ import annotations

from typing import Any

SHARED: dict[str, Any] = {
    "frequency_penalty": None, "logit_bias": None, "max_tokens": None, "n": 1, "presence_penalty": None, "seed": None,
    "stop": [], "stream": False, "stream_options": None, "temperature": None, "top_p": None, "user": None,
    "use_beam_search": False, "top_k": None, "min_p": None, "repetition_penalty": None, "watermarking": None,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False,
    "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "truncation_side": None, "allowed_token_ids": None, "prompt_logprobs": None,
    "logprob_token_ids": None, "bad_words": [], "response_format": None, "structured_outputs": None, "priority": 0,
    "request_id": "cmpl-0", "session_id": None, "return_tokens_as_token_ids": None, "return_token_ids": None,
    "routed_experts_prompt_start": 0, "return_token_offsets": False, "mm_payload": "tensors",
    "return_mm_kwargs": None, "cache_salt": None, "kv_transfer_params": None, "ec_transfer_params": None,
    "vllm_xargs": None, "repetition_detection": None, "thinking_token_budget": None, "stream_interval": None,
}  # fmt: skip
CHAT: dict[str, Any] = {
    **SHARED, "logprobs": False, "top_logprobs": 0, "max_completion_tokens": None, "tools": None,
    "tool_choice": "none", "reasoning_effort": None, "include_reasoning": True, "parallel_tool_calls": True,
    "echo": False, "add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False,
    "documents": None, "chat_template": None, "chat_template_kwargs": None, "media_io_kwargs": None,
    "mm_processor_kwargs": None, "return_prompt_text": None,
}  # fmt: skip
COMPLETION: dict[str, Any] = {
    **SHARED, "max_tokens": 16, "echo": False, "logprobs": None, "suffix": None, "prompt_embeds": None,
    "add_special_tokens": True,
}  # fmt: skip
ROUTER_CHAT: dict[str, Any] = {
    "stream": False, "logprobs": False, "no_stop_trim": False, "ignore_eos": False, "continue_final_message": False,
    "return_hidden_states": False, "skip_special_tokens": True, "separate_reasoning": True, "stream_reasoning": True,
    "include_reasoning": True,
}  # fmt: skip
ROUTER_COMPLETION: dict[str, Any] = {
    "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False, "return_hidden_states": False,
    "skip_special_tokens": True,
}  # fmt: skip
