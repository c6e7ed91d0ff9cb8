"""Answers that follow a grammar: which tokens of a request may come next. Uses llguidance, an optional extra."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolcats.errors import LolcatsError

END = "<|end of grammar|>"


class GrammarError(LolcatsError):
    """A grammar that is invalid, not supported or too costly, or an answer that cannot go on as its grammar says."""


@dataclass(frozen=True)
class MatcherLimits:
    """What a grammar may cost in the process of the engine: the first four in the units of llguidance, for each step.

    Args:
        step_fuel: work on regular expressions; about 70 µs of time for 1000.
        step_items: items of the parser that a mask looks at.
        row_items: of these, in one place of the text; an object needs four for each of its optional properties.
        lexer_states: kept for the whole request, 0.3 KiB each; about 25 for each token of a string with a maxLength.
        compile_fuel: work on regular expressions before the first token.
        grammar_size: symbols of all rules.
        token_seconds: processor time of a token, on average.
        spare_seconds: processor time for a whole request beyond that.
    """

    step_fuel: int = 200_000
    step_items: int = 50_000
    row_items: int = 2_000
    lexer_states: int = 250_000
    compile_fuel: int = 1_000_000
    grammar_size: int = 100_000
    token_seconds: float = 0.01
    spare_seconds: float = 1.0

    def parser(self) -> dict[str, Any]:
        """Arguments of ``llguidance.LLParserLimits``."""
        return {
            "step_lexer_fuel": self.step_fuel, "step_max_items": self.step_items, "max_items_in_row": self.row_items,
            "max_lexer_states": self.lexer_states, "initial_lexer_fuel": self.compile_fuel,
            "max_grammar_size": self.grammar_size, "verbose_errors": False,
        }  # fmt: skip


class Vocabulary:
    """A tokenizer as grammars see it; made once, which takes seconds for 150,000 tokens and holds Python's lock.

    llguidance gets an end token of its own, which no model has: its bit in a mask says that the text may end here. The
    end tokens of the engine are then allowed all together or not at all, whatever the tokenizer knows about them.

    Args:
        tokenizer: a fast one of Hugging Face; it is not changed.
        size: of the model's vocabulary; tokens that only the model or only the tokenizer has are never allowed.
        stop_tokens: end a generation; may be empty.

    Raises:
        GrammarError: llguidance is not installed, or does not take this tokenizer.
    """

    def __init__(self, tokenizer: Any, size: int, stop_tokens: Iterable[int]) -> None:
        self.size, self.stop_tokens = size, frozenset(stop_tokens)
        self.json, self.end = with_end(tokenizer)
        self.tokenizer = _llguidance_tokenizer(self.json, max(size, self.end + 1), self.end)
        self.words = (self.tokenizer.vocab_size + 31) // 32
        known = torch.arange(self.words * 32) < size
        stops = torch.zeros_like(known)
        stops[[token for token in self.stop_tokens if token < size]] = True
        known[[token for token in (*self.stop_tokens, self.end) if token < len(known)]] = False
        self.plain, self.stops = packed(known), packed(stops)


class Matcher:
    """Follows the tokens of one request through its grammar.

    Two matchers of the same grammar share nothing: copies of llguidance's share their lexer, and with it the limits.

    Args:
        grammar: as llguidance takes it, from a process with limits; see :mod:`lolcats.inference.server.grammar`.

    Raises:
        GrammarError: the grammar is invalid, costs too much, or allows no text that has these tokens.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str, limits: MatcherLimits) -> None:
        import llguidance

        self.vocabulary, self.limits = vocabulary, limits
        self.stopped = False
        """Nothing more can follow."""
        self._tokens, self._seconds = 0, 0.0
        self._matcher = llguidance.LLMatcher(
            vocabulary.tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**self.limits.parser())
        )
        self._check()
        self._look_ahead()

    def bitmask(self) -> Tensor:
        """(⌈V/32⌉,) int32: bit i % 32 of word i // 32 says whether token i may be next. Not to be written to."""
        return self._mask

    def accept(self, token: int) -> None:
        """Move on past ``token``.

        Raises:
            GrammarError: the grammar does not allow it, or costs too much from here on.
        """
        if self.stopped or not self._mask[token // 32] >> token % 32 & 1:
            raise GrammarError(f"Token {token} cannot follow: the grammar of the answer does not allow it.")
        if token in self.vocabulary.stop_tokens:
            self.stopped = True
            return
        begin = time.thread_time()
        self._matcher.consume_token(token)
        self._seconds += time.thread_time() - begin
        self._tokens += 1
        self._check()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Compute the next mask, which also says whether anything follows: llguidance notices that late at times."""
        begin = time.thread_time()
        mask = torch.zeros(self.vocabulary.words, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._seconds += time.thread_time() - begin
        self._check()
        word, bit = divmod(self.vocabulary.end, 32)
        may_end = bool(mask[word] >> bit & 1)
        mask &= self.vocabulary.plain
        self.stopped = not bool(mask.any())
        if self.stopped and not may_end:
            raise GrammarError("The grammar of the answer reaches a point where no token can follow.")
        if may_end:
            mask |= self.vocabulary.stops
        self._mask = mask[: (self.vocabulary.size + 31) // 32]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"The grammar of the answer cannot be followed: {one_line(self._matcher.get_error())}")
        if self._seconds > self.limits.spare_seconds + self.limits.token_seconds * self._tokens:
            raise GrammarError(
                "Keeping the answer to its grammar takes too much processor time per token; use a simpler schema."
            )


def allowed(bitmask: Tensor, vocabulary: int) -> Tensor:
    """(B, ⌈V/32⌉) int32 on any device -> (B, V) bool."""
    bits = bitmask[..., None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return (bits & 1).bool().flatten(1)[:, :vocabulary]


def packed(bits: Tensor) -> Tensor:
    """(32 W,) bool -> (W,) int32."""
    values = bits.view(-1, 32).long() << torch.arange(32)
    return values.sum(1).to(torch.int32)  # the highest bit is the sign


def with_end(tokenizer: Any) -> tuple[str, int]:
    """tokenizer.json with one token more, and that token."""
    from tokenizers import AddedToken, Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GrammarError("response_format needs a fast tokenizer (tokenizer.json), which this model does not have.")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.add_special_tokens([AddedToken(END, special=True)])
    end = copy.token_to_id(END)
    assert end is not None
    return str(copy.to_str()), end


def _llguidance_tokenizer(text: str, size: int, end: int) -> Any:
    try:
        import llguidance
    except ImportError:
        raise GrammarError(
            "response_format needs llguidance; install it with: pip install 'lolcats[grammar]'"
        ) from None
    try:
        return llguidance.LLTokenizer(text, n_vocab=size, eos_token=end)
    except ValueError as error:
        raise GrammarError(f"llguidance does not take this model's tokenizer: {one_line(str(error))}") from None


def one_line(text: str, most: int = 200) -> str:
    """An error of llguidance, which may have several lines and quotes the client's text."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= most else f"{text[:most]} …"
