"""Tokens to text as they come: whole characters only, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer gives for an incomplete character
LONGEST = 8  # more tokens than any character takes
LOOKED_AT = 256  # last tokens of a prompt


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    Some tokenizers strip or add spaces at the start of what they decode. So each piece is decoded together with the
    few tokens before it, whose text is then cut off.

    Args:
        prompt: token ids before the first one. The text goes on from theirs, so a character that they begin is part of
            it. After a special token it begins anew, as a text does for a tokenizer.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.tokens = tokenizer, context_of(tokenizer, prompt)
        # tokens[context:done] are out already and are decoded again
        self.context, self.done = 0, len(self.tokens) - unfinished(tokenizer, self.tokens)

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while it ends inside a character."""
        self.tokens.append(token)
        before, after = self._decode(self.tokens[self.context : self.done]), self._decode(self.tokens[self.context :])
        if after.endswith(REPLACEMENT) and len(self.tokens) - self.done < LONGEST:
            return ""
        if before and after == before:  # a special token, say: what follows goes on from the text before it
            del self.tokens[self.done :]
            return ""
        self.context, self.done = self.done, len(self.tokens)
        return after[len(before) :]

    def rest(self) -> str:
        """What is left at the end, broken characters included."""
        before, after = self._decode(self.tokens[self.context : self.done]), self._decode(self.tokens[self.context :])
        self.done = len(self.tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def context_of(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """The end of a prompt from its last token that is text by itself, or after a special token that comes later."""
    start, text = len(prompt), ""
    while start > max(0, len(prompt) - LOOKED_AT) and (not text or REPLACEMENT in text):
        token = [prompt[start - 1]]
        text = decode(tokenizer, token)
        if not text and tokenizer.decode(token):  # a special token
            break
        start -= 1
    found = list(prompt[start:])
    for cut in range(LONGEST if len(found) == LOOKED_AT else 0):  # it may begin within a character
        rest = found[cut:]
        if not decode(tokenizer, rest[: len(rest) - unfinished(tokenizer, rest)]).startswith(REPLACEMENT):
            return rest
    return found


def unfinished(tokenizer: Any, tokens: Sequence[int]) -> int:
    """How many of the last tokens begin a character without ending it."""
    if not tokens:
        return 0
    count, text = 0, decode(tokenizer, tokens)
    while text.endswith(REPLACEMENT) and count < min(len(tokens), LONGEST):
        count += 1
        text = decode(tokenizer, tokens[: len(tokens) - count])
    last = list(tokens[len(tokens) - count :])
    if not count or text.endswith(REPLACEMENT):
        return 0
    whole = list(tokenizer.encode(decode(tokenizer, last), add_special_tokens=False))
    return 0 if whole[-count:] == last else count  # the text itself may have U+FFFD


def spelled(tokenizer: Any, token: int) -> str:
    """The text of a token among others: with the space at its start that some tokenizers strip from the first one."""
    first = str(tokenizer.decode([token]))
    second = str(tokenizer.decode([token, token]))[len(first) :]
    return second if second.lstrip(" ") == first.lstrip(" ") else first


class StopStrings:
    """Passes text on, except for an end that may yet become a stop string; ``stopped`` once one is complete."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.stopped = tuple(stop), "", False

    def add(self, text: str) -> str:
        """What can be shown now. Of several stop strings the one that begins first counts."""
        text, self.held = self.held + text, ""
        if found := [text.index(s) for s in self.stop if s in text]:
            self.stopped = True
            return text[: min(found)]
        keep = max((partial(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of a generation that no stop string ended."""
        text, self.held = self.held, ""
        return text


def partial(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
