"""Stop a stage as soon as its loss is NaN or infinite, and name step and layer, without waiting for the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from lolcats.errors import LolcatsError

ADVICE = (
    "The last good checkpoint is kept: run the same command again to continue from it. If this happens again, look for "
    "broken data or lower the learning rate."
)


class LossWatch(TrainerCallback):
    """Check the losses of every step.

    On a CPU, this happens immediately, before the step changes anything. On a GPU, it happens as soon as the losses
    have been copied to the host, and always before anything is saved.

    Args:
        where: called with (n,) bool, which of the losses passed to ``add`` are NaN or infinite; returns where that
            happened in words, or "".
    """

    def __init__(self, stage: str, where: Callable[[Tensor], str]) -> None:
        self.stage, self.where, self.step = stage, where, 1
        self.bad: Tensor | None = None  # of the current step
        self.steps: deque[tuple[int, Tensor, Any]] = deque()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def add(self, losses: Tensor) -> None:
        """The losses (n,) or () of a micro-batch."""
        bad = ~torch.isfinite(losses.detach()).reshape(-1)
        if bad.is_cuda:
            self.bad = bad if self.bad is None else self.bad | bad
        else:
            self._stop_if(bad, self.step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bad is not None:
            event, bad = torch.cuda.Event(), torch.empty(self.bad.shape, dtype=torch.bool, pin_memory=True)
            bad.copy_(self.bad, non_blocking=True)
            event.record()
            self.steps.append((state.global_step, bad, event))
        self.bad = None
        self.check(wait=False)

    def check(self, wait: bool = True) -> None:
        """Raise LolcatsError if a loss was NaN or infinite; without ``wait``, check only losses that are copied."""
        while self.steps and (wait or self.steps[0][2].query()):
            step, bad, event = self.steps.popleft()
            event.synchronize()
            self._stop_if(bad, step)

    def _stop_if(self, bad: Tensor, step: int) -> None:
        if bad.any():
            raise LolcatsError(
                f"In step {step} of {self.stage} the loss became NaN or infinite{self.where(bad)}. {ADVICE}"
            )  # fmt: skip

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
def first_bad_layer(model: PreTrainedModel, modules: list[nn.Module], call: dict[str, Tensor]) -> int | None:
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
        model(**call, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return min(bad, default=None)
