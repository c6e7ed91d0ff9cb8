"""Units of attention transfer, the parameters that are optimized together, and the files that keep their progress.

A unit holds one layer's feature maps and gate (``coupling: per_layer``) or those of all layers (``joint``). It has its
own gradient norm, optimizer, schedule, early stopping and best weights. Optimizer and schedules, and the order in which
they step, are those of transformers' Trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from lolcats.config import TransferConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import LinearizedAttention
from lolcats.stages.schedules import SCHEDULES, plateau_arguments
from lolcats.tensors import load_strictly, read_metadata, read_tensors, write_tensors

MAPS, BEST, FIRST, SECOND = "maps.", "best.", "exp_avg.", "exp_avg_sq."


@dataclass
class Progress:
    """Progress of a unit; ``step`` is the number of optimizer steps done."""

    step: int = 0
    stopped: bool = False
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    errors_before: list[float] = field(default_factory=list)
    """Mean squared error of each layer's output on the validation rows; empty until measured."""
    errors_best: list[float] = field(default_factory=list)
    loss_sum: float = 0.0
    """Sum of the training losses since the last entry of the history."""
    loss_total: float = 0.0
    """Sum of all training losses that entries of the history have."""
    history: list[dict[str, float]] = field(default_factory=list)


class Unit:
    """Train ``layers`` for ``steps`` optimizer steps in total.

    Args:
        names: names of the layers' attention modules, in the same order.
        path: the unit's file.
    """

    def __init__(
        self, layers: Sequence[LinearizedAttention], names: Sequence[str], config: TransferConfig, steps: int,
        path: Path,
    ) -> None:  # fmt: skip
        self.layers, self.config, self.steps, self.path = list(layers), config, steps, path
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.lolcats.{own}": parameter
            for name, layer in zip(names, layers, strict=True)
            for own, parameter in layer.named_parameters()
        }
        self.progress = Progress()
        self.saved_step = -1
        self.best: dict[str, Tensor] = {}
        self.loss: Tensor | None = None  # of the current step
        self._losses: Tensor | None = None  # since the last entry of the history
        self._touched = torch.zeros(0)  # which parameters have gradients
        self._idle: list[nn.Parameter] | None = None  # those that never have one, once that is known
        self._keeps_gradients = False
        undecayed = {name for name in self.parameters if "bias" in name or ".norm." in name}
        decay = [p for name, p in self.parameters.items() if name not in undecayed]
        rest = [p for name, p in self.parameters.items() if name in undecayed]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-8, fused=True)
        self.scheduler = _scheduler(self.optimizer, config, steps)

    def learns_from(self, step: int) -> bool:
        """Whether the unit still has to do optimizer step ``step``."""
        return not self.progress.stopped and self.progress.step <= step < self.steps

    @property
    def knows_gradients(self) -> bool:
        """Whether it is known which parameters have gradients."""
        return self._idle is not None

    def keep_gradients(self) -> None:
        """Give every parameter that has gradients a tensor for them that stays where it is."""
        self._keeps_gradients = True
        idle = {id(parameter) for parameter in self._idle or ()}
        for parameter in self.parameters.values():
            if parameter.grad is None and id(parameter) not in idle:
                parameter.grad = torch.zeros_like(parameter)

    def add(self, loss: Tensor) -> None:
        """Add a part of the mean loss of the current step."""
        self.loss = loss.float() if self.loss is None else self.loss + loss

    def gradients(self) -> list[Tensor]:
        """The tensors to sum over ranks: gradients, loss, and which parameters have gradients.

        A rank without rows has zeros.
        """
        parameters = list(self.parameters.values())
        device = parameters[0].device
        if self._idle is None:
            self._touched = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.loss is None:
            self.loss = torch.zeros((), device=device)
        touched = [self._touched] if self._idle is None else []
        return [*(p.grad for p in parameters if p.grad is not None), self.loss, *touched]

    def update(self) -> None:
        """Finish an optimizer step: clip gradients, step optimizer and schedule, update the history."""
        config, progress = self.config, self.progress
        if self._idle is None:  # the same in every step, and on every rank
            touched = zip(self.parameters.values(), self._touched.tolist(), strict=True)
            self._idle = [parameter for parameter, count in touched if not count]
        for parameter in self._idle:
            parameter.grad = None  # so that the optimizer leaves it as it is, without weight decay
        limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        progress.step += 1
        assert self.loss is not None
        self._losses = self.loss if self._losses is None else self._losses + self.loss
        self.loss = None
        if progress.step % config.log_steps == 0:
            self._log(norm, rate)

    def _log(self, norm: Tensor, rate: float) -> None:
        loss = (self._taken() + self.progress.loss_sum) / self.config.log_steps
        entry = {"step": self.progress.step, "loss": loss, "grad_norm": norm.item(), "learning_rate": rate}
        self.progress.history.append(entry)
        self.progress.loss_sum = 0.0
        self.progress.loss_total += loss * self.config.log_steps

    def mean_loss(self) -> float:
        """The mean training loss of all steps that the unit has done; 0 before the first."""
        rest = 0.0 if self._losses is None else self._losses.item()
        return (self.progress.loss_total + self.progress.loss_sum + rest) / max(self.progress.step, 1)

    def _taken(self) -> float:
        value, self._losses = 0.0 if self._losses is None else self._losses.item(), None
        return value

    def evaluated(self, loss: float, errors: list[float]) -> None:
        """Apply the result of an evaluation: plateau, best weights, early stopping."""
        progress, patience = self.progress, self.config.early_stopping_patience
        progress.history.append({"step": progress.step, "eval_loss": loss})
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.waited = loss, progress.step, 0
            progress.errors_best = errors
            self.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        else:
            progress.waited += 1
        progress.stopped = 0 < patience <= progress.waited

    @property
    def finished(self) -> bool:
        return self.progress.stopped or self.progress.step >= self.steps

    def to(self, device: torch.device) -> None:
        """Move parameters and optimizer state to ``device``."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        for state in self.optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items()})

    def save(self) -> None:
        """Write the unit's file, unless it is up to date."""
        if self.saved_step == self.progress.step:
            return
        self.progress.loss_sum += self._taken()
        tensors: dict[str, Tensor] = {f"{MAPS}{name}": p for name, p in self.parameters.items()}
        tensors |= {f"{BEST}{name}": p for name, p in self.best.items()}
        for name, parameter in self.parameters.items():
            if state := self.optimizer.state.get(parameter):
                tensors |= {f"{FIRST}{name}": state["exp_avg"], f"{SECOND}{name}": state["exp_avg_sq"]}
        record = {
            "progress": asdict(self.progress),
            "scheduler": self.scheduler.state_dict(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
        }
        write_tensors(tensors, self.path, more={"unit": json.dumps(record)})
        self.saved_step = self.progress.step

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the unit's file, for :meth:`restore`; None if it does not exist."""
        if not self.path.exists():
            return None
        return read_tensors(self.path), _record(self.path)

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Restore the state that :meth:`read` returned."""
        self.progress = Progress(**record["progress"])
        self.saved_step = self.progress.step
        load_strictly(dict(self.parameters), _under(MAPS, tensors), self.path)
        self.best = _under(BEST, tensors)
        first, second = _under(FIRST, tensors), _under(SECOND, tensors)
        for name, parameter in self.parameters.items():
            if name in first:
                state = {
                    "step": torch.tensor(float(self.progress.step)),
                    "exp_avg": first[name],
                    "exp_avg_sq": second[name],
                }
                self.optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in state.items()}
        self.scheduler.load_state_dict(record["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, record["rates"], strict=True):
            group["lr"] = rate

    def take_best(self) -> None:
        """Give the layers their best weights."""
        load_strictly({n: p.detach() for n, p in self.parameters.items()}, self.best, self.path)


def read_progress(path: Path) -> Progress:
    """Progress of the unit saved in a file."""
    return Progress(**_record(path)["progress"])


def _record(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    if "unit" not in metadata:
        raise LolcatsError(f"{path} was not written by attention transfer.")
    return json.loads(metadata["unit"])


def _scheduler(optimizer: torch.optim.Optimizer, config: TransferConfig, steps: int) -> Any:
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps,
        scheduler_specific_kwargs=plateau_arguments(config),
    )  # fmt: skip


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
