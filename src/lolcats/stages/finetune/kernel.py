"""Value and gradient of the losses of stage 2 from logits, in two passes over a token's logits. Imports triton.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program reads at a time


def loss_and_gradient(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, weight: float, temperature: float
) -> Tensor:  # fmt: skip
    """(1 − w) · CE + w · T² · KL(teacher ‖ student), summed over tokens with a target, in fp32; ``logits`` become its
    gradient by them.

    Args:
        logits: (N, V) of the student, in any float dtype.
        teacher: the same of the teacher; None with a weight of 0.
        targets: (N,) int64, negative where there is none.
        weight, temperature: w and T.
    """
    assert all(x is None or x.is_contiguous() for x in (logits, teacher))
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    size = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    grid: Any = (len(logits),)
    _loss_and_gradient[grid](
        logits, logits if teacher is None else teacher, targets, losses, logits.shape[1], float(weight),
        float(temperature), SOFT=teacher is not None, HARD=weight < 1, BLOCK=size, num_warps=8,
    )  # fmt: skip
    return losses.sum()


@triton.jit
def _more(top, total, x):
    """The largest logit so far and the sum of exponentials relative to it, with those of ``x``."""
    larger = tl.maximum(top, tl.max(x, 0))
    return larger, total * tl.exp(top - larger) + tl.sum(tl.exp(x - larger), 0)


@triton.jit
def _loss_and_gradient(
    logits, teacher, targets, losses, vocabulary, weight, temperature,
    SOFT: tl.constexpr, HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    logits += token * vocabulary
    teacher += token * vocabulary
    columns = tl.arange(0, BLOCK)
    has_target = target >= 0
    lowest = -1e38  # not −inf, whose differences are NaN
    hard_top, hard_sum, soft_top, soft_sum, known_top, known_sum = lowest, 0.0, lowest, 0.0, lowest, 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if HARD:
            hard_top, hard_sum = _more(hard_top, hard_sum, x)
        if SOFT:
            soft_top, soft_sum = _more(soft_top, soft_sum, x / temperature)
            y = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            known_top, known_sum = _more(known_top, known_sum, y / temperature)
    hard, soft, known = hard_top + tl.log(hard_sum), soft_top + tl.log(soft_sum), known_top + tl.log(known_sum)
    loss = 0.0
    if HARD:
        loss = (1 - weight) * (hard - tl.load(logits + tl.maximum(target, 0)).to(tl.float32))
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        slope = tl.zeros((BLOCK,), tl.float32)
        if HARD:
            slope += (1 - weight) * (tl.exp(x - hard) - tl.where(start + columns == target, 1.0, 0.0))
        if SOFT:
            y = (
                tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32) / temperature
                - known
            )
            x = x / temperature - soft
            chance = tl.exp(y)
            slope += weight * temperature * (tl.exp(x) - chance)
            gap = tl.where(chance > 0, y - tl.maximum(x, lowest), 0.0)
            loss += weight * temperature * temperature * tl.sum(chance * gap, 0)
        tl.store(logits + start + columns, tl.where(has_target, slope, 0.0), mask=inside)
    tl.store(losses + token, tl.where(has_target, loss, 0.0))
