"""Token ids of short texts, for prompts that are put together from pieces."""

from __future__ import annotations

from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def special_prefix(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer adds before every text: a BOS token, or nothing."""
    plain, whole = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]
