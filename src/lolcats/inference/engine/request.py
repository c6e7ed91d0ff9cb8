"""A prompt on its way through the engine, and what each step adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lolcats.errors import LolcatsError
from lolcats.inference.engine.grammar import Matcher
from lolcats.inference.engine.sampling import Sampler, SamplingParams, TokenLogprob
from lolcats.inference.engine.states import PrefillCache, Snapshot
from lolcats.inference.engine.text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(slots=True)
class Delta:
    """What one step added to a request: text that can be shown, tokens, and on the last one why it ended.

    refused: the error is the request's own fault, such as a grammar that leads nowhere.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    snapshot: Snapshot | None = None
    error: str = ""
    refused: bool = False


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine.

    Args:
        prompt: token ids; with ``start`` those that follow its tokens.
        on_delta: called from the engine's thread.
        keep_state: the last delta carries a snapshot of the state after all tokens but the last sampled one, or after
            the prompt if ``max_tokens`` is 0.
        text: whether deltas have text, which goes on from the prompt's as :class:`.Detokenizer` says; without it stop
            strings are not looked for.
        anew: whether that text begins anew instead, as an assistant's message does.
        matcher: a grammar that the answer follows; each request needs one of its own.
    """

    prompt: list[int]
    params: SamplingParams
    on_delta: Callable[[Delta], None]
    start: Snapshot | None = None
    keep_state: bool = False
    text: bool = True
    anew: bool = False
    matcher: Matcher | None = None
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """For the prompt's tokens from the second on, if the parameters ask for them; complete with the first delta."""
    prefilled: int = 0
    """Prompt tokens whose keys are in the state."""
    cached: int = 0
    """How many of these came from the prefix cache."""
    number: int = 0
    """Counts requests in the order in which they came."""
    paused: Snapshot | None = None
    """Where it goes on, on the host, if it had to give its blocks back."""

    def begin(self, tokenizer: Any) -> None:
        before = self.history
        self.sampler, self.stops = Sampler(self.params, before, self.matcher), StopStrings(self.params.stop)
        if self.text:
            self.detokenizer = Detokenizer(tokenizer, () if self.anew else before)
        self.cache: PrefillCache | None = None

    def restart(self) -> None:
        """Forget the part of the prompt that is prefilled."""
        self.cache, self.prefilled, self.cached = None, 0, 0
        self.prompt_logprobs.clear()

    @property
    def first(self) -> int:
        """Position of the next prompt token."""
        return self.prefilled + (len(self.start.tokens) if self.start else 0)

    @property
    def left(self) -> int:
        """Prompt tokens that are yet to be prefilled."""
        return len(self.prompt) - self.prefilled

    @property
    def history(self) -> list[int]:
        return [*(self.start.tokens if self.start else ()), *self.prompt, *self.generated]

    @property
    def overlaps(self) -> bool:
        """Whether its next step may begin before the host knows the token of this one."""
        return not self.keep_state and self.params.logprobs is None and self.matcher is None

    def delta(self, token: int, logprob: TokenLogprob | None, ends: bool) -> Delta:
        """Add a token; ``ends``: it is an end-of-sequence token."""
        self.generated.append(token)
        full = len(self.generated) == self.params.max_tokens
        complete = False
        if self.matcher is not None:
            self.matcher.accept(token)
            complete = self.matcher.stopped
        text = self._shown(token, ends, full or complete) if self.text else ""
        stopped = ends or complete or self.stops.stopped
        reason: FinishReason | None = "stop" if stopped else "length" if full else None
        return Delta(text, [token], [] if logprob is None else [logprob], reason)

    def prompt_only(self) -> Delta:
        """The only delta of a request for no tokens, once its prompt is prefilled."""
        assert self.cache is not None
        cache, self.cache = self.cache, None
        return Delta(finish_reason="length", snapshot=cache.snapshot(self.history) if self.keep_state else None)

    def _shown(self, token: int, ends: bool, last: bool) -> str:
        """The text that can be shown now."""
        text = self.stops.add("" if ends else self.detokenizer.add(token))
        if (ends or last) and not self.stops.stopped:
            text += self.stops.add(self.detokenizer.rest())
            text += self.stops.rest()
        return text


def failure(error: Exception) -> Delta:
    """The last delta of a request that ends with an error."""
    if isinstance(error, LolcatsError):
        return Delta(finish_reason="error", error=str(error), refused=True)
    return Delta(finish_reason="error", error=f"{type(error).__name__}: {error}")
