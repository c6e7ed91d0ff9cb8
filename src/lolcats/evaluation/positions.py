"""Next-token loss and KL divergence from the teacher by position: does a model still gain from distant context?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.scores import Score, mean_score
from lolcats.evaluation.text import special_prefix
from lolcats.modeling.install import decoder

FIRST = 64  # end of the first bucket of positions; each bucket ends at twice the end of the one before
TOKENS = 512  # logits in memory at a time


def positions(model: PreTrainedModel, tokenizer: Any, documents: Sequence[Sequence[int]], length: int,
              limit: int | None, teacher: Callable[[], PreTrainedModel] | None = None) -> list[Score]:  # fmt: skip
    """Mean −log p (nats per token) by bucket of positions, over windows of ``length`` tokens cut from the documents.

    Each item is the mean of one window; the standard error is over windows. ``teacher``: loads the model to compare
    with; also score the KL divergence from its predictions, in nats per token.
    """
    windows = cut(tokenizer, documents, length, limit)
    found = {"nll": [token_losses(model, one.to(model.device))[0] for one in windows]}
    if teacher is not None:
        other = teacher()
        found["kl"] = [token_divergences(model, other, one.to(model.device))[0] for one in windows]
        del other
    scores = []
    for metric, values in found.items():
        for start, end in buckets(length):
            items = tuple(value[max(start, 1) - 1 : end - 1].mean().item() for value in values)
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


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """−log p of ids[:, 1:], (B, T − 1) fp32, from one forward pass that never holds all logits at once."""
    parts = []
    targets = ids[:, 1:].split(TOKENS, dim=1)
    for logits, target in zip(_logits(model, ids[:, :-1]), targets, strict=True):
        parts.append(cross_entropy(logits.float().transpose(1, 2), target, reduction="none"))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def token_divergences(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """KL divergence of the model's prediction of each of ids[:, 1:] from the teacher's, (B, T − 1) fp32, as
    :func:`token_losses` computes losses."""
    parts = []
    for logits, wanted in zip(_logits(model, ids[:, :-1]), _logits(teacher, ids[:, :-1]), strict=True):
        own, target = (x.float().log_softmax(-1) for x in (logits, wanted))
        parts.append(kl_div(own, target, reduction="none", log_target=True).nansum(-1))  # NaN: a target of -inf
    return torch.cat(parts, dim=1)


def _logits(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """The model's logits, TOKENS at a time, from one forward pass of the decoder.

    Some families scale or cap the logits in their own forward, so each piece of hidden states must pass through it. The
    forward is called with one token, and a hook replaces the decoder's output by the piece.
    """
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    for piece in hidden.split(TOKENS, dim=1):
        with _leaving(decoder(model), piece):
            yield model(input_ids=ids[:, :1], use_cache=False).logits


@contextmanager
def _leaving(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Make ``module`` return ``hidden`` as its last hidden state."""
    handle = module.register_forward_hook(lambda _, __, output: type(output)(last_hidden_state=hidden))
    try:
        yield
    finally:
        handle.remove()
