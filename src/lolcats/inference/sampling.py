"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty; one generator a request.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats.errors import LolcatsError


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

    def penalize(self, logits: Tensor) -> Tensor:
        """(V,) with the logits of tokens already seen divided by the penalty, or multiplied where negative."""
        if not self.seen:
            return logits
        index = torch.tensor(list(self.seen), device=logits.device)
        chosen, penalty = logits[index], self.params.repetition_penalty
        return logits.index_put((index,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))

    def saw(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = None


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token for each row of ``logits`` (B, V); a row's token depends on that row and its own sampler alone."""
    logits = logits.float()
    if any(s.seen for s in samplers):
        logits = torch.stack([s.penalize(row) for s, row in zip(samplers, logits, strict=True)])
    tokens = logits.argmax(-1)
    drawn = [i for i, s in enumerate(samplers) if s.params.temperature > 0]
    if drawn:
        tokens[drawn] = draw(logits[drawn], [samplers[i] for i in drawn])
    result: list[int] = tokens.tolist()
    for sampler, token in zip(samplers, result, strict=True):
        sampler.saw(token)
    return result


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """(B,) tokens by inverting each row's distribution function at a uniform number of the row's own generator."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(s.params, name) for s in samplers], dtype=dtype, device=logits.device)[:, None]

    uniform = torch.cat([torch.rand(1, generator=s.generator, dtype=torch.float64) for s in samplers]).to(logits.device)
    probs = torch.softmax(logits.double() / column("temperature", torch.float64), -1)
    order = None
    if any(s.params.top_k or s.params.top_p < 1 or s.params.min_p for s in samplers):
        probs, order = probs.sort(-1, descending=True)
        probs = filtered(probs, column("top_k", torch.long), column("top_p"), column("min_p"))
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


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of one row of logits (V,)."""
    logprobs = torch.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(count)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
