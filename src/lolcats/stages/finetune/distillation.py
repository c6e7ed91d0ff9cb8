"""Knowledge distillation without all logits at once: the student's next-token distributions against the teacher's.

Shapes: B batch, T tokens, N = B · T, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, log_softmax

from lolcats.attention.path import choose_loss_path
from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.layer import LinearizedAttention, override
from lolcats.modeling.loss import PIECE, TOKENS, Head, counted, gathered, in_parts, next_tokens

LOWEST = torch.finfo(torch.float32).min / 2  # in place of −inf, whose differences are NaN


@dataclass(frozen=True)
class Distillation:
    """The loss (1 − w) · CE + w · T² · KL(teacher ‖ student) of a token (Hinton et al. 2015, arXiv 1503.02531).

    CE is the next-token cross-entropy, and KL is between distributions over the vocabulary at temperature T. With a
    weight of 0 there need not be a teacher.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def summed(self, logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """The sum over tokens with a target; logits (N, V), of the teacher without gradient, targets (N,)."""
        logits, teacher = (x.float().clamp_min(LOWEST) for x in (logits, teacher))
        student = log_softmax(logits / self.temperature, -1)
        known = log_softmax(teacher / self.temperature, -1)
        divergence = (known.exp() * (known - student)).sum(-1)[targets >= 0].sum()
        total = self.weight * self.temperature**2 * divergence
        if self.weight < 1:
            total = total + (1 - self.weight) * cross_entropy(logits, targets, reduction="sum")
        return total

    def summed_with_gradient(
        self, logits: Tensor, teacher: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """:meth:`summed` of fp32 logits, and its gradient by them. Overwrites both logits."""
        if teacher is None:
            return _cross_entropy_with_gradient(logits, targets)
        w, t, other = self.weight, self.temperature, (targets < 0)[:, None]
        place = targets.clamp_min(0)[:, None]
        hard = log_softmax(logits, -1) if w < 1 or t == 1 else None
        total = logits.new_zeros(())
        if hard is not None and w < 1:
            total = (w - 1) * hard.gather(1, place).masked_fill(other, 0).sum()
        soft = hard if t == 1 and hard is not None else log_softmax(logits.div_(t), -1)
        known = log_softmax(teacher if t == 1 else teacher.div_(t), -1)
        chances = known.exp()
        total = total + w * t**2 * known.sub_(soft).mul_(chances).sum(-1, keepdim=True).masked_fill(other, 0).sum()
        gradient = soft.exp_()
        if soft is hard:
            gradient.sub_(chances, alpha=w)
        else:
            gradient.sub_(chances).mul_(w * t)
            if hard is not None:
                gradient.add_(hard.exp_(), alpha=1 - w)
        if w < 1:
            gradient.scatter_add_(1, place, gradient.new_full(place.shape, w - 1))
        return total, gradient.masked_fill_(other, 0)


def _cross_entropy_with_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over tokens with a target; logits (N, V) fp32, which are overwritten, targets (N,)."""
    place, other = targets.clamp_min(0)[:, None], (targets < 0)[:, None]
    known = log_softmax(logits, -1)
    total = -known.gather(1, place).masked_fill(other, 0).sum()
    gradient = torch.exp(known, out=logits)
    gradient.scatter_add_(1, place, gradient.new_full(place.shape, -1.0))
    return total, gradient.masked_fill_(other, 0)


@contextmanager
def as_teacher(wrapped: PeftModel) -> Iterator[None]:
    """For the block's duration, ``wrapped`` computes as its base model does: softmax attention, no adapter, no dropout,
    no gradients."""
    modules = list(wrapped.modules())
    training = [module for module in modules if module.training]
    linearized = [module for module in modules if isinstance(module, LinearizedAttention)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), override(linearized, mode="teacher"), without_adapter(modules):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapter(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch the adapters of PEFT among ``modules`` off for the block's duration."""
    layers = [m for m in modules if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def distillation_loss(
    wrapped: PeftModel, head: Head | None, ids: Tensor, kind: Distillation, positions: Tensor | None = None,
    labels: Tensor | None = None, count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean of ``kind`` over the predicted tokens of ids (B, T). The model is its own teacher (:func:`as_teacher`); with
    a weight of 0, and a head that is known and frozen, it is not computed.

    The other arguments are those of :func:`~lolcats.modeling.loss.language_model_loss`.
    """
    model: Any = wrapped.get_base_model()
    call, targets = inputs_of(ids, positions), next_tokens(ids if labels is None else labels, positions)
    stack = model if head is None else decoder(model)

    def outputs() -> Tensor:
        """Hidden states (N, E); logits (N, V) without a known head."""
        return (stack(**call).logits if head is None else stack(**call)[0]).flatten(0, 1)

    def taught() -> Tensor:
        with as_teacher(wrapped):
            return outputs()

    if head is not None and is_frozen(head):
        known = taught() if kind.weight > 0 else None
        student = outputs()
        with gathered(head.module):
            total = _Distilled.apply(student, known, head.module.weight, targets, head, kind)  # type: ignore[no-untyped-call]
    else:
        teacher, student = taught(), outputs()
        loss = kind.summed if head is None else partial(_through_head, head, kind)
        total = in_parts(loss, student, teacher, targets)
    return total / counted(targets, count)


def is_frozen(head: Head | None) -> bool:
    """Whether it is a product with a weight that is not trained."""
    return head is not None and head.plain and not head.module.weight.requires_grad


def _through_head(head: Head, kind: Distillation, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad(), without_adapter(head.module.modules()):
        known = head(teacher)
    return kind.summed(head(student), known, targets)


class _Distilled(torch.autograd.Function):
    """The summed loss through a frozen output layer. Forward also computes the gradient of the hidden states, so the
    logits of ``TOKENS`` tokens are in memory at a time, and none is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        weight: Tensor,
        targets: Tensor,
        head: Head,
        kind: Distillation,
    ) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student.device)
        by_kernel = head.scale == 1 and head.softcap is None and choose_loss_path(student) == "kernels"
        for start in range(0, len(student), size := PIECE if by_kernel else TOKENS):
            rows = slice(start, start + size)
            seen = (student[rows], None if teacher is None else teacher[rows], targets[rows])
            loss, slope = _by_kernel(*seen, weight, kind) if by_kernel else _by_parts(*seen, weight, head, kind)
            total += loss
            if gradient is not None:
                gradient[rows] = slope.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * slope).to(gradient.dtype), None, None, None, None, None


def _by_kernel(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weight: Tensor, kind: Distillation
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The summed loss of some tokens, and its gradient (n, V) by their logits."""
    from lolcats.stages.finetune.kernel import loss_and_gradient

    logits = linear(student, weight)
    known = None if teacher is None else linear(teacher, weight)
    return loss_and_gradient(logits, known, targets, kind.weight, kind.temperature), logits


def _by_parts(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weight: Tensor, head: Head, kind: Distillation
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, also for heads that scale and cap; the gradient is by what the head's product is."""
    logits, known = _logits(head, student, weight), None if teacher is None else _logits(head, teacher, weight)
    bent = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    loss, slope = kind.summed_with_gradient(logits, known, targets)
    slope = slope if bent is None else slope.mul_(bent)
    return loss, slope if head.scale == 1 else slope.mul_(head.scale)


def _logits(head: Head, hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, E) -> (n, V) fp32, in memory of their own."""
    return head.shape(linear(hidden, weight).float())
