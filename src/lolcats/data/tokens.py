"""Token ids of short texts, for prompts that are put together from pieces."""

from __future__ import annotations

from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_with_spans(
    tokenizer: Any, text: str, places: list[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of ``text``, and the tokens [start, end) at each of its ``places`` [first, last), in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for first, last in places:
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < last and b > first]
        spans.append((inside[0], inside[-1] + 1))
    return encoded["input_ids"], spans


def special_prefix(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer adds before every text: a BOS token, or nothing."""
    plain, whole = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]
