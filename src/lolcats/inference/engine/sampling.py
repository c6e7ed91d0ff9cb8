"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty; one generator a request.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats.errors import LolcatsError

ROWS = 256  # drawn at a time: of each, some copies of its logits in double precision are alive
DRAWN = 64  # uniform numbers that a request's generator gives at a time


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: 1 and 0 are off. seed: None draws one.
    logprobs: None, or how many of the likeliest tokens to report beside the chosen one.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            ("stop", all(self.stop), "without empty strings"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
        ):
            if not ok:
                raise LolcatsError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model itself (before temperature and filters), and the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """A request's own state of sampling: its random generator and which tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.seen = dict.fromkeys(prompt) if params.repetition_penalty != 1 else None
        self.drawn: list[float] = []

    def uniform(self) -> float:
        """The next number of the request's generator, in [0, 1); many are drawn at a time."""
        if not self.drawn:
            self.drawn = torch.rand(DRAWN, generator=self.generator, dtype=torch.float64).tolist()[::-1]
        return self.drawn.pop()

    def saw(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = None


class BatchSampler:
    """Chooses tokens for a batch in a few operations on its device, whatever the number of rows.

    What only changes with the batch's composition (parameters, the tokens that rows have seen) stays on the device from
    one step to the next.
    """

    def __init__(self) -> None:
        self.samplers: list[Sampler] = []

    def sample(
        self, logits: Tensor, samplers: Sequence[Sampler]
    ) -> tuple[list[int], list[TokenLogprob | None]]:  # fmt: skip
        """A token for each row of ``logits`` (B, V), and its log-probability where the row's parameters ask for it.

        A row's token depends on that row and its own sampler alone.
        """
        tokens = self.choose(logits, samplers)
        result: list[int] = tokens.tolist()
        for row in self.penalized_rows:
            samplers[row].saw(result[row])
        return result, self._logprobs(logits, tokens, result)

    def choose(self, logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
        """The tokens (B,) alone, on the device; the samplers are yet to be told that they saw them."""
        if self.samplers != list(samplers):
            self._compose(list(samplers), logits)
        changed = self._penalize(logits)
        tokens = changed.argmax(-1)
        for i in range(0, len(self.drawn), ROWS):
            index = self.drawn_index[i : i + ROWS]
            columns = [column[i : i + ROWS] for column in self.columns]
            uniform = torch.tensor([samplers[row].uniform() for row in self.drawn[i : i + ROWS]], dtype=torch.float64)
            every = len(self.drawn) == len(samplers) <= ROWS
            tokens[index] = draw(changed if every else changed[index], uniform.to(logits.device), columns, self.filters)
        if len(self.penalized):
            self.seen[self.rows, tokens[self.penalized]] = True
        return tokens

    def _compose(self, samplers: list[Sampler], logits: Tensor) -> None:
        """Bring to the device what a batch of other requests needs."""
        self.samplers, device, params = samplers, logits.device, [s.params for s in samplers]
        self.drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        self.drawn_index = torch.tensor(self.drawn, dtype=torch.long, device=device)
        self.columns = [
            torch.tensor([getattr(params[i], name) for i in self.drawn], dtype=dtype, device=device)[:, None]
            for name, dtype in (
                ("temperature", torch.float64), ("top_k", torch.long), ("top_p", torch.float32),
                ("min_p", torch.float32),
            )
        ]  # fmt: skip
        self.filters = any(p.top_k or p.top_p < 1 or p.min_p for p in (params[i] for i in self.drawn))
        self.logprob_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.penalized_rows = [i for i, s in enumerate(samplers) if s.seen is not None]
        self.penalized = torch.tensor(self.penalized_rows, dtype=torch.long, device=device)
        self.rows = torch.arange(len(self.penalized_rows), device=device)
        if not self.penalized_rows:
            return
        penalties = [params[i].repetition_penalty for i in self.penalized_rows]
        self.penalty = torch.tensor(penalties, dtype=torch.float32, device=device)[:, None]
        places = [(row, token) for row, i in enumerate(self.penalized_rows) for token in samplers[i].seen or ()]
        seen = torch.zeros(len(penalties), logits.shape[1], dtype=torch.bool)
        seen[tuple(torch.tensor(places, dtype=torch.long).view(-1, 2).T)] = True
        self.seen = seen.to(device)

    def _penalize(self, logits: Tensor) -> Tensor:
        """Logits of tokens already seen divided by the row's penalty, or multiplied where negative."""
        if not self.penalized_rows:
            return logits
        every = len(self.penalized_rows) == len(logits)
        rows = (logits if every else logits[self.penalized]).float()
        rows = torch.where(self.seen, torch.where(rows > 0, rows / self.penalty, rows * self.penalty), rows)
        return rows if every else logits.float().index_copy(0, self.penalized, rows)

    def _logprobs(self, logits: Tensor, tokens: Tensor, chosen: list[int]) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * len(chosen)
        if not self.logprob_rows:
            return result
        rows = torch.tensor(self.logprob_rows, device=logits.device)
        counts = [self.samplers[row].params.logprobs or 0 for row in self.logprob_rows]
        for row, entry in zip(self.logprob_rows, token_logprobs(logits[rows], tokens[rows], counts), strict=True):
            result[row] = entry
        return result


def draw(logits: Tensor, uniform: Tensor, columns: Sequence[Tensor], filters: bool) -> Tensor:
    """(B,) tokens by inverting each row's distribution function at its uniform number.

    columns: temperature, top_k, top_p, min_p, (B, 1) each; the last three count where ``filters``.
    """
    temperature, top_k, top_p, min_p = columns
    probs = torch.softmax(logits.double() / temperature, -1)
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
    """Of rows of logits (B, V) and their tokens (B,), each with so many of the likeliest."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logprobs.topk(max(counts)))
    return [
        TokenLogprob(token, logprob, tuple(zip(i[:count], v[:count], strict=True)))
        for token, logprob, i, v, count in zip(tokens.tolist(), own, ids, values, counts, strict=True)
    ]
