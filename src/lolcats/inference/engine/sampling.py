"""From logits to tokens: biases, penalties, grammars, temperature, top-k, top-p, min-p; one generator a request.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.inference.engine.grammar import Matcher, allowed

ROWS = 256  # drawn at a time: of each, some copies of its logits in double precision are alive
SCORED = 64  # rows of prompt tokens whose log-probabilities are computed at a time
DRAWN = 64  # uniform numbers that a request's generator gives at a time


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Names and meanings are those of OpenAI's API and of vLLM.

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: 1 and 0 are off. seed: None draws one.
    repetition_penalty: divides positive logits of tokens of prompt and answer, multiplies negative ones; 1 is off.
    frequency_penalty, presence_penalty: subtracted from a token's logit for each time, or once, that the answer has it.
    logit_bias: (token, value) pairs, added to these tokens' logits before the penalties.
    stop: strings before which the answer ends, or a single one.
    logprobs: None, or how many of the likeliest tokens to report beside each chosen one; prompt_logprobs: the same
    for the tokens of the prompt.
    max_tokens: 0 only reads the prompt, to score it or to keep its state.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] | str = ()
    seed: int | None = None
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, ok, expected in (
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", 0 <= self.top_k < 2**31, "between 0 and 2^31 - 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "between -2 and 2"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "between -2 and 2"),
            ("logit_bias", all(abs(bias) <= 100 for _, bias in self.logit_bias), "values between -100 and 100"),
            ("stop", all(self.stop), "no empty strings"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "at most 64 bits"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "between 0 and 20"),
        ):
            if not ok:
                raise LolcatsError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")

    @property
    def filters(self) -> bool:
        """Whether only some tokens can be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def counts(self) -> bool:
        """Whether the answer's tokens are counted for penalties."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model itself (before temperature and filters), and the likeliest ones.

    logprob: None for the first token of a prompt, which nothing predicts.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """A request's own state of sampling: its random generator, the tokens it has seen, and its grammar."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], matcher: Matcher | None = None) -> None:
        self.params, self.matcher = params, matcher
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.seen = dict.fromkeys(prompt) if params.repetition_penalty != 1 else None
        self.counts: Counter[int] | None = Counter() if params.counts else None
        self.drawn: list[float] = []
        self.used = 0

    @property
    def uniform(self) -> float:
        """The number of the request's generator for its next token, in [0, 1); many are drawn at a time."""
        if self.used == len(self.drawn):
            self.drawn = torch.rand(DRAWN, generator=self.generator, dtype=torch.float64).tolist()
            self.used = 0
        return self.drawn[self.used]

    def saw(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = None
        if self.counts is not None:
            self.counts[token] += 1


class BatchSampler:
    """Chooses tokens for a batch in a few operations on its device, whatever the number of rows.

    What only changes with the batch's composition (parameters, the tokens that rows have seen) stays on the device from
    one step to the next.
    """

    def __init__(self) -> None:
        self.samplers: list[Sampler] = []

    def sample(self, logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[TokenLogprob | None]]:
        """A token for each row of ``logits`` (B, V), and its log-probability where the row's parameters ask for it.

        A row's token depends only on that row and its own sampler. After an error nothing has been drawn or seen.
        """
        tokens = self._choose(logits, samplers)
        result: list[int] = tokens.tolist()
        logprobs = self._logprobs(logits, tokens)
        self._chosen(tokens)
        for sampler, token in zip(samplers, result, strict=True):
            sampler.saw(token)
        return result, logprobs

    def choose(self, logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
        """Only the tokens (B,), on the device; the samplers are yet to be told that they saw them."""
        tokens = self._choose(logits, samplers)
        self._chosen(tokens)
        return tokens

    def _choose(self, logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
        if self.samplers != list(samplers):
            self._compose(list(samplers), logits)
        changed = self.grammars.apply(self.penalties.apply(self.biases.apply(logits)))
        tokens = changed.argmax(-1)
        for group in self.groups:
            uniform = torch.tensor([samplers[row].uniform for row in group.rows], dtype=torch.float64)
            every = len(group.rows) == len(samplers)
            drawn = draw(
                changed if every else changed[group.index], uniform.to(logits.device), group.columns, group.filters
            )
            tokens[group.index] = drawn
        return tokens

    def _chosen(self, tokens: Tensor) -> None:
        """Nothing can fail any more: count what was used up."""
        self.penalties.saw(tokens)
        for row in self.drawn:
            self.samplers[row].used += 1

    def _compose(self, samplers: list[Sampler], logits: Tensor) -> None:
        """Bring to the device what a batch of other requests needs."""
        self.samplers, device, params = [], logits.device, [s.params for s in samplers]
        self.drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        self.groups = [
            Group(rows[i : i + ROWS], params, filters, device)
            for filters in (False, True)
            if (rows := [row for row in self.drawn if params[row].filters == filters])
            for i in range(0, len(rows), ROWS)
        ]
        self.logprob_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.biases, self.penalties = Biases(samplers, logits), Penalties(samplers, logits)
        self.grammars = Grammars(samplers)
        self.samplers = samplers  # last: after an error the next call composes again

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * len(tokens)
        if not self.logprob_rows:
            return result
        rows = torch.tensor(self.logprob_rows, device=logits.device)
        counts = [self.samplers[row].params.logprobs or 0 for row in self.logprob_rows]
        for row, entry in zip(self.logprob_rows, token_logprobs(logits[rows], tokens[rows], counts), strict=True):
            result[row] = entry
        return result


class Group:
    """Rows that are drawn together: all of them with filters, or none, since the two invert in different orders.

    A row would otherwise draw another token where a batch mate has a filter.
    """

    def __init__(self, rows: list[int], params: Sequence[SamplingParams], filters: bool, device: torch.device) -> None:
        self.rows, self.filters = rows, filters
        self.index = torch.tensor(rows, dtype=torch.long, device=device)
        self.columns = [
            torch.tensor([getattr(params[row], name) for row in rows], dtype=dtype, device=device)[:, None]
            for name, dtype in (
                ("temperature", torch.float64), ("top_k", torch.long), ("top_p", torch.float32),
                ("min_p", torch.float32),
            )
        ]  # fmt: skip


class Biases:
    """Values added to the logits of single tokens."""

    def __init__(self, samplers: Sequence[Sampler], logits: Tensor) -> None:
        entries = [(row, *entry) for row, s in enumerate(samplers) for entry in s.params.logit_bias]
        self.any = bool(entries)
        if entries:
            rows, tokens, values = zip(*entries, strict=True)
            self.where = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
            self.values = torch.tensor(values, dtype=torch.float32, device=logits.device)

    def apply(self, logits: Tensor) -> Tensor:
        return logits.float().index_put(self.where, self.values, accumulate=True) if self.any else logits


class Penalties:
    """Repetition, frequency and presence penalties: which tokens rows have seen, on the device."""

    def __init__(self, samplers: Sequence[Sampler], logits: Tensor) -> None:
        self.rows = [i for i, s in enumerate(samplers) if s.seen is not None or s.counts is not None]
        if not self.rows:
            return
        chosen, device = [samplers[i] for i in self.rows], logits.device
        self.index = torch.tensor(self.rows, dtype=torch.long, device=device)
        self.number = torch.arange(len(chosen), device=device)
        self.repetition, self.frequency, self.presence = (
            torch.tensor([getattr(s.params, name) for s in chosen], dtype=torch.float32, device=device)[:, None]
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        shape = len(chosen), logits.shape[1]
        self.seen = _table(shape, [dict.fromkeys(s.seen or (), 1) for s in chosen], torch.bool).to(device)
        counted = any(s.counts is not None for s in chosen)
        self.counts = _table(shape, [s.counts or {} for s in chosen], torch.float32).to(device) if counted else None

    def apply(self, logits: Tensor) -> Tensor:
        if not self.rows:
            return logits
        every = len(self.rows) == len(logits)
        rows = (logits if every else logits[self.index]).float()
        rows = torch.where(self.seen, torch.where(rows > 0, rows / self.repetition, rows * self.repetition), rows)
        if self.counts is not None:
            rows = rows - self.frequency * self.counts - self.presence * (self.counts > 0)
        return rows if every else logits.float().index_copy(0, self.index, rows)

    def saw(self, tokens: Tensor) -> None:
        if self.rows:
            own = tokens[self.index]
            self.seen[self.number, own] = True
            if self.counts is not None:
                self.counts[self.number, own] += 1


def _table(shape: tuple[int, int], rows: Sequence[Mapping[int, int]], dtype: torch.dtype) -> Tensor:
    """(rows, V) values by token, on the host."""
    result = torch.zeros(shape, dtype=dtype)
    places = [(row, token, value) for row, values in enumerate(rows) for token, value in values.items()]
    if places:
        row, token, value = torch.tensor(places, dtype=torch.long).T
        result[row, token] = value.to(dtype)
    return result


class Grammars:
    """Takes away the tokens that a row's grammar forbids."""

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.rows = [(row, s.matcher) for row, s in enumerate(samplers) if s.matcher is not None]

    def apply(self, logits: Tensor) -> Tensor:
        if not self.rows:
            return logits
        index = torch.tensor([row for row, _ in self.rows], device=logits.device)
        masks = torch.stack([matcher.bitmask() for _, matcher in self.rows]).to(logits.device)
        rows = logits[index].float().masked_fill(~allowed(masks, logits.shape[1]), -torch.inf)
        return logits.float().index_copy(0, index, rows)


def draw(logits: Tensor, uniform: Tensor, columns: Sequence[Tensor], filters: bool) -> Tensor:
    """(B,) tokens by inverting each row's distribution function at its uniform number.

    columns: temperature, top_k, top_p, min_p, (B, 1) each; the last three count where ``filters``.
    """
    temperature, top_k, top_p, min_p = columns
    logits = logits.double()
    logits = logits - logits.amax(-1, True)  # first: divided by a tiny temperature they would be infinite
    probs = torch.softmax(logits / temperature, -1)
    order = None
    if filters:
        probs, order = probs.sort(-1, descending=True)
        probs = filtered(probs, top_k, top_p, min_p)
    cumulative = probs.cumsum(-1)
    index = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    index = torch.where(probs > 0, torch.arange(probs.shape[1], device=probs.device), 0).amax(-1, True).minimum(index)
    return (index if order is None else order.gather(1, index))[:, 0]


def filtered(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (B, V), sorted downwards, with what each row's (B, 1) limits leave out set to 0.

    top-k first; top-p is the shortest head that holds the share p of what top-k left; min-p is against the likeliest.
    """
    rank = torch.arange(probs.shape[1], device=probs.device)
    probs = torch.where((rank < top_k) | (top_k == 0), probs, 0)
    share = probs / probs.sum(-1, keepdim=True)
    before = share.cumsum(-1) - share
    keep = ((before < top_p) | (top_p >= 1)) & (probs >= min_p * probs[:, :1])
    return torch.where(keep | (rank == 0), probs, 0)


def token_logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of tokens (B,) under logits (B, V), each with its ``counts`` likeliest tokens."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logprobs.topk(max(counts)))
    return [
        TokenLogprob(token, logprob, tuple(zip(i[:count], v[:count], strict=True)))
        for token, logprob, i, v, count in zip(tokens.tolist(), own, ids, values, counts, strict=True)
    ]


def sequence_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that follow each of T positions, from logits (T, V), a few rows at a time."""
    result: list[TokenLogprob] = []
    for i in range(0, len(tokens), SCORED):
        own = torch.tensor(tokens[i : i + SCORED], dtype=torch.long, device=logits.device)
        result += token_logprobs(logits[i : i + SCORED], own, [count] * len(own))
    return result
