"""Losses that do not keep a second tensor of their input's size: next-token cross-entropy, mean squared error.

Shapes: B batch, T tokens, V vocabulary, E hidden size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lolcats.modeling.install import decoder, inputs_of

TOKENS = 512  # tokens whose logits become fp32 log-probabilities at a time: 256 MB at 128k words
PIECE = 1024  # tokens whose logits are in memory at a time, if the loss computes them itself


def next_token_loss(logits: Tensor, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Mean −log p(ids[:, n+1] | ids[:, ≤n]) in fp32; logits (B, T, V) in any float dtype, ids (B, T) int64.

    positions: (B, T), 0 where another document begins; its first token is not predicted.
    """
    targets = next_tokens(ids, positions)
    return in_parts(_summed, logits.flatten(0, 1), targets) / (targets >= 0).sum()


def in_parts(loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The sum of ``loss`` over parts of ``TOKENS`` tokens of all ``tensors`` (B · T, ...), recomputed in backward."""
    parts = zip(*(x.split(TOKENS) for x in tensors), strict=True)
    return torch.as_tensor(sum(checkpoint(loss, *part, use_reentrant=False) for part in parts))


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")


def next_tokens(ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """(B, T) -> (B · T,): the next token of each, −100 after the last of a row or document."""
    if positions is not None:
        ids = ids.masked_fill(positions == 0, -100)
    return pad(ids[:, 1:], (0, 1), value=-100).flatten()


@dataclass(frozen=True)
class Head:
    """How a family turns the decoder's hidden states h into logits: y = scale · module(h), or c · tanh(y / c)."""

    module: nn.Module
    scale: float
    softcap: float | None

    @property
    def plain(self) -> bool:
        """Whether the module is nothing but a product with its weight."""
        module = self.module
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.bias is None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V) fp32."""
        return self.shape(self.module(hidden).float())

    def shape(self, logits: Tensor) -> Tensor:
        """Scale and cap the module's output as the family does."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head | None:
    """The head of ``model``, read from a real call, since families differ in the names of their attributes.

    In that call the head's module returns known numbers, and the logits that the family makes of them show scale and
    cap. None if they do not have the form of :class:`Head`, or if the module does not receive the decoder's output
    unchanged.
    """
    module, given, answers = model.get_output_embeddings(), [], []

    def answer(_: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        numbers = torch.linspace(-100, 100, logits.shape[-1], device=logits.device)
        numbers[0], numbers[1] = 1e4, 1e-2  # far above any cap, and far below it
        given.append(inputs[0])
        answers.append(numbers.expand(logits.shape))
        return answers[-1]

    ids = torch.arange(4, device=model.device)[None]  # several, since a padding token's embedding may be zero
    hook, training = module.register_forward_hook(answer), model.training
    try:
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = decoder(model)(input_ids=ids, use_cache=False)[0]
    finally:
        hook.remove()
        model.train(training)
    if len(given) != 1 or given[0].shape != hidden.shape or logits.shape != answers[0].shape:
        return None
    if not torch.isfinite(hidden).all():  # a broken model: its loss will show it
        return None
    high, low = logits[0, 0, 0].item(), logits[0, 0, 1].item()
    capped = abs(high - 1e6 * low) > 1e-3 * abs(high)
    if capped and abs(low) >= abs(high):
        return None
    head = Head(module, 100 * high * math.atanh(low / high) if capped else high / 1e4, high if capped else None)
    head = Head(module, 1.0, head.softcap) if abs(head.scale - 1) < 1e-5 else head
    same = torch.allclose(hidden.float(), given[0].float(), rtol=1e-2, atol=1e-2 * hidden.abs().max().item())
    return head if same and torch.allclose(head.shape(answers[0]), logits.float(), rtol=1e-4, atol=1e-4) else None


def language_model_loss(
    model: PreTrainedModel, head: Head | None, ids: Tensor, liger: bool = True, positions: Tensor | None = None,
    labels: Tensor | None = None, count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`next_token_loss` of the model on ids (B, T) without the logits of the whole batch.

    Args:
        head: from :func:`find_head`; None: use the family's own forward, which computes all logits at once.
        liger: on CUDA, use liger-kernel's fused head and loss if it is installed (the extra ``gpu``).
        positions: (B, T), which restart at 0 with each document; None: each row is one sequence.
        labels: (B, T), the ids, −100 where a token is not to be predicted; None: all are.
        count: what the sum over tokens is divided by; None: the number of predicted tokens, for their mean.
    """
    call = inputs_of(ids, positions)
    targets = next_tokens(ids if labels is None else labels, positions)
    if head is None:
        return in_parts(_summed, model(**call).logits.flatten(0, 1), targets) / counted(targets, count)
    hidden = decoder(model)(**call)[0].flatten(0, 1)
    if liger and head.plain and hidden.is_cuda and has_liger():
        with gathered(head.module):
            return _liger_loss(head, hidden, targets, count)
    parts = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
    total = sum(
        checkpoint(_head_and_loss, head, part, target, use_reentrant=False, preserve_rng_state=not head.plain)
        for part, target in parts
    )
    return torch.as_tensor(total) / counted(targets, count)


def counted(targets: Tensor, count: Tensor | None) -> Tensor:
    """``count``, by default the number of predicted tokens."""
    return (targets >= 0).sum() if count is None else count


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Gather the weights of an output layer that FSDP2 shards, while they are used without calling it."""
    if hasattr(module, "unshard"):
        module.unshard()
    yield
    if hasattr(module, "reshard"):
        module.reshard()


def _head_and_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden), targets, reduction="sum")


def _liger_loss(head: Head, hidden: Tensor, targets: Tensor, count: Tensor | None) -> Tensor:
    """Loss, summed and divided by ``count`` (None: mean), by liger-kernel, which computes the gradients in forward,
    ``PIECE`` tokens at a time."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    weight: Any = head.module.weight
    hidden = hidden if head.scale == 1 else hidden * head.scale
    budget = -(-PIECE * weight.shape[0] // (hidden.shape[0] * weight.shape[1]))
    accumulate = torch.float32 if weight.requires_grad else None
    bias = class_weight = implementation = mode = None
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, bias, class_weight, -100, 0.0, 0.0, "mean" if count is None else "sum", head.softcap,
        False, accumulate, False, False, False, implementation, mode, max(1, budget),
    )[0]  # fmt: skip
    return loss if count is None else loss / count


@functools.cache
def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def mean_squared_error(y: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (y − target)² in fp32 over (B, T, ...), in 16-bit memory for 16-bit tensors; ``target`` is constant.

    mask: (B, T) bool, False where a token does not count.
    """
    return _MeanSquaredError.apply(y, target, mask)  # type: ignore[no-untyped-call]


class _MeanSquaredError(torch.autograd.Function):
    """Keeps only the error, in the operands' dtype, and takes three passes over it where autograd takes ten."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        error, ctx.count = y - target, y.numel()
        if mask is not None:
            error = error * mask[..., *[None] * (y.ndim - 2)]
            ctx.count = mask.sum() * (y.numel() // mask.numel())
        ctx.dtype = y.dtype
        ctx.save_for_backward(error)
        wide = torch.promote_types(error.dtype, torch.float32)
        return torch.linalg.vector_norm(error, dtype=wide).square() / ctx.count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return (error * (2 * gradient / ctx.count)).to(ctx.dtype), None, None
