"""Tokens to text as they come: whole characters only, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer gives for an incomplete character


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    Some tokenizers strip or add spaces at the start of what they decode. So each piece is decoded together with the
    few tokens before it, whose text is then cut off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.tokens = tokenizer, list[int]()
        self.context = self.done = 0  # tokens[context:done] are out already and are decoded again

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while it ends inside a character."""
        self.tokens.append(token)
        before, after = self._decode(self.tokens[self.context : self.done]), self._decode(self.tokens[self.context :])
        if after.endswith(REPLACEMENT) and len(self.tokens) - self.done < 8:  # no character takes more tokens
            return ""
        self.context, self.done = self.done, len(self.tokens)
        return after[len(before) :]

    def rest(self) -> str:
        """What is left at the end, broken characters included."""
        before, after = self._decode(self.tokens[self.context : self.done]), self._decode(self.tokens[self.context :])
        self.done = len(self.tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
