"""Next-token loss and KL divergence from the teacher by position: does a model still gain from distant context?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.scores import Score, mean_score
from lolcats.evaluation.text import special_prefix
from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.loss import find_head

FIRST = 64  # end of the first bucket of positions; each bucket ends at twice the end of the one before
TOKENS = 512  # logits in memory at a time


def positions(model: PreTrainedModel, tokenizer: Any, documents: Sequence[Sequence[int]], length: int,
              limit: int | None, teacher: Callable[[], PreTrainedModel] | None = None) -> list[Score]:  # fmt: skip
    """Mean −log p (nats per token) by bucket of positions, over windows of ``length`` tokens cut from the documents.

    Each item is the mean of one window; the standard error is over windows. ``teacher``: loads the model to compare
    with; also score the KL divergence from its predictions, in nats per token.
    """
    windows = cut(tokenizer, documents, length, limit)
    own, other = Predictions(model), None if teacher is None else Predictions(teacher())
    found = [token_scores(own, other, window) for window in windows]
    scores = []
    for metric in found[0]:
        for start, end in buckets(length):
            items = tuple(each[metric][0, max(start, 1) - 1 : end - 1].mean().item() for each in found)
            scores.append(mean_score("positions", f"{metric} {start}-{end - 1}", (items,), higher_is_better=False))
    return scores


def cut(tokenizer: Any, documents: Sequence[Sequence[int]], length: int, limit: int | None) -> list[Tensor]:
    """The first ``limit`` windows of the documents, (1, length) each, with the tokens that begin a text."""
    prefix = special_prefix(tokenizer)
    size = length - len(prefix)
    windows = [
        [*prefix, *document[start : start + size]]
        for document in documents
        for start in range(0, len(document) - size + 1, size)
    ][:limit]
    if not windows:
        longest = max(map(len, documents), default=0)
        raise LolcatsError(
            f"No document has {length} tokens (the longest has {longest}): give longer documents or a smaller length."
        )
    return [torch.tensor([window]) for window in windows]


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """Buckets [start, end) of positions: 0-63, 64-127, 128-255, ... up to ``length``."""
    start, end = 0, min(FIRST, length)
    while start < length:
        yield start, end
        start, end = end, min(2 * end, length)


class Predictions:
    """A model's logits for windows of text, TOKENS positions at a time, from one forward pass of its decoder each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.head = model, find_head(model)

    def __call__(self, ids: Tensor) -> Iterator[Tensor]:
        """(B, T) -> (B, at most TOKENS, V) fp32 for each part of T."""
        call = inputs_of(ids.to(self.model.device))
        head = self.head
        if head is None:
            yield from (logits.float() for logits in self.model(**call).logits.split(TOKENS, dim=1))
        else:
            yield from map(head, decoder(self.model)(**call)[0].split(TOKENS, dim=1))


@torch.no_grad()
def token_scores(model: Predictions, teacher: Predictions | None, ids: Tensor) -> dict[str, Tensor]:
    """For each of ids[:, 1:], (B, T − 1) fp32: nll, −log p; with a teacher also kl, the KL divergence of the prediction
    from the teacher's."""
    found: dict[str, list[Tensor]] = {name: [] for name in (["nll"] if teacher is None else ["nll", "kl"])}
    wanted = itertools.repeat(None) if teacher is None else teacher(ids[:, :-1])
    for logits, target, other in zip(model(ids[:, :-1]), ids[:, 1:].split(TOKENS, dim=1), wanted, strict=False):
        own = logits.log_softmax(-1)
        found["nll"].append(-own.gather(-1, target.to(own.device)[..., None])[..., 0])
        if other is not None:
            divergence = kl_div(own, other.log_softmax(-1), reduction="none", log_target=True)
            found["kl"].append(divergence.nansum(-1))  # NaN: a target of -inf
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}
