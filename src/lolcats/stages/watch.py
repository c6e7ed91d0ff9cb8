"""Stop a stage as soon as its loss is NaN or infinite, and name step and layer, without waiting for the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError

ADVICE = (
    "The last good checkpoint is kept: run the same command again to continue from it. If this happens again, look for "
    "broken data or lower the learning rate."
)


Where = Callable[[Tensor], str]
"""From (n,) bool, which losses are NaN or infinite, to the place in words, such as " in layer 3", or ""."""


class LossWatch:
    """Check the losses of every step.

    On a CPU, this happens immediately, before the step changes anything. On a GPU, it happens as soon as the losses
    have been copied to the host, and always before anything is saved.
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.step = stage, 1
        self.bad: tuple[Tensor, Where] | None = None  # of the current step
        self.steps: deque[tuple[int, Tensor, Where, Any]] = deque()

    def add(self, losses: Tensor, where: Where) -> None:
        """The losses (n,) or () of a micro-batch of step ``step``."""
        bad = ~torch.isfinite(losses.detach()).reshape(-1)
        if bad.is_cuda:
            self.bad = bad if self.bad is None else self.bad[0] | bad, where
        else:
            self._stop_if(bad, self.step, where)

    def end_step(self) -> None:
        """Have the losses of the current step copied to the host, and check those that have arrived."""
        if self.bad is not None:
            bad, where = self.bad
            event, copy = torch.cuda.Event(), torch.empty(bad.shape, dtype=torch.bool, pin_memory=True)
            copy.copy_(bad, non_blocking=True)
            event.record()
            self.steps.append((self.step, copy, where, event))
        self.bad = None
        self.check(wait=False)

    def check(self, wait: bool = True) -> None:
        """Raise LolcatsError if a loss was NaN or infinite; without ``wait``, check only losses that are copied."""
        while self.steps and (wait or self.steps[0][3].query()):
            step, bad, where, event = self.steps.popleft()
            event.synchronize()
            self._stop_if(bad, step, where)

    def _stop_if(self, bad: Tensor, step: int, where: Where) -> None:
        if bad.any():
            raise LolcatsError(f"In step {step} of {self.stage} the loss became NaN or infinite{where(bad)}. {ADVICE}")

    def check_weights(self, step: int, weights: dict[str, Tensor]) -> None:
        """Raise LolcatsError if a weight that is about to be saved is NaN or infinite."""
        self.check()
        if name := first_bad_weight(weights):
            raise LolcatsError(f"By step {step} of {self.stage}, {name} has become NaN or infinite. {ADVICE}")


def first_bad_weight(weights: dict[str, Tensor]) -> str:
    """Name of the first tensor with a NaN or infinite value; empty if all are finite."""
    finite = torch.stack([torch.isfinite(x).all() for x in weights.values()])
    return "" if finite.all() else list(weights)[int(finite.long().argmin())]


@torch.no_grad()
def first_bad_layer(model: PreTrainedModel, modules: list[nn.Module], call: dict[str, Any]) -> int | None:
    """Index of the first of ``modules`` (attentions, in order) with NaN or infinite output; None if all are finite."""
    bad: list[int] = []

    def look(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and not torch.isfinite(hidden).all():
            bad.append(number)

    hooks = [
        module.register_forward_hook(lambda _, __, output, number=number: look(number, output))
        for number, module in enumerate(modules)
    ]
    try:
        model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return min(bad, default=None)
