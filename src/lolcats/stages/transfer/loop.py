"""Attention transfer as one loop that all orders of the work share.

A group of layers processes the batches of some optimizer steps. The teacher's hidden states pass through, and each
layer whose unit has not done that step yet learns from it on the way. Backward runs inside the layer's forward, so only
one layer's activations are in memory. Orders differ in what a group is, which steps it processes at a time, and where
hidden states are kept.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from lolcats.config import PLACEMENT, Config, TransferConfig, identity_of, to_dict
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.files import write_text
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, override
from lolcats.ranks import Ranks
from lolcats.stages.interrupt import noting_interrupt
from lolcats.stages.metrics import replace_metrics
from lolcats.stages.result import StageResult
from lolcats.stages.trackers import Trackers, name_directory
from lolcats.stages.transfer.graph import Graphs, Learned
from lolcats.stages.transfer.hidden import Inputs, Positions, Source, Target, feed
from lolcats.stages.transfer.loss import attention_loss, attention_losses
from lolcats.stages.transfer.units import Unit
from lolcats.stages.transfer.visits import VALIDATION, Batch, Visits, validation_batches
from lolcats.stages.watch import LossWatch
from lolcats.version import __version__

STAGE, JOB = "transfer", "job.json"
HARMLESS = (*PLACEMENT["transfer"], "save_steps", "log_steps")  # settings that do not change the result


@dataclass(frozen=True)
class LayerwiseResult(StageResult):
    """``best_loss`` is the mean over units; the errors are those of each layer's output on the validation rows."""

    errors_before: list[float]
    errors_after: list[float]


@dataclass
class Group:
    """Layers that are on the device together, and a function that passes inputs and position ids through them."""

    layers: list[LinearizedAttention]
    run: Callable[[Tensor, Tensor | None], Tensor]
    units: list[Unit]


class LayerTrainer:
    """The units of a run, and the loop that trains them.

    Args:
        layers: linearized layers by the name of their attention module, in order.
        directory: run directory; units are saved under ``checkpoints/transfer``.
        base: fingerprint of the base model.
        tick: called after each optimizer step of a group with the number of steps done.
    """

    def __init__(
        self, layers: Mapping[str, LinearizedAttention], data: Data, config: Config, directory: Path, ranks: Ranks,
        device: torch.device, base: str = "", tick: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.device, self.data, self.tick = config.transfer, ranks, device, data, tick
        if self.config.batch_size < ranks.size:
            raise LolcatsError(
                f"transfer.batch_size ({self.config.batch_size}) is below the number of ranks ({ranks.size}): some "
                "would have no rows. Use a larger batch or fewer ranks."
            )
        self.run_directory, self.directory, self.seed = directory, directory / "checkpoints" / STAGE, config.seed
        self.visits = Visits.draw(len(data.train), self.config, config.seed)
        self.validation = validation_batches(len(data.validation), self.config.rows_at_once, ranks)
        self.positions = Positions(data)
        self.interrupted, self.started, self.reported = False, time.monotonic(), 0
        self.eval_seconds: dict[int, float] = {}  # of evaluations in this process, over all groups, by step
        self.watch, self.graphs = LossWatch(STAGE), Graphs(asked=False)
        self.trackers: Trackers | None = None
        self.reported_of: dict[Unit, int] = {}  # for units that are also reported one by one
        self.report_to = config.report_to
        alone = self.config.coupling == "per_layer"
        split = [[name] for name in layers] if alone else [list(layers)]
        self.units = [
            Unit([layers[n] for n in names], names, self.config, len(self.visits.steps), self._unit_path(names))
            for names in split
        ]
        self._check_job(job_of(config, data, list(layers), base))
        if ranks.is_first and any(self.directory.glob("checkpoint-*")):
            raise LolcatsError(
                f"{self.directory} was left unfinished by an older version of lolcats, whose checkpoints cannot be "
                "continued. Finish it with that version, or remove the directory to start stage 1 again."
            )
        for unit in self.units:
            if saved := ranks.shared(unit.read() if ranks.is_first else None):
                unit.restore(*saved)

    def _unit_path(self, names: Sequence[str]) -> Path:
        return self.directory / "units" / f"{names[0] if len(names) == 1 else 'all-layers'}.safetensors"

    def _check_job(self, job: dict[str, Any]) -> None:
        """Check that all ranks do the same job, and that files in the directory belong to it."""
        versions = {name: version(name) for name in ("torch", "transformers")}
        self.ranks.agree({**job, **versions, "lolcats": __version__})
        known = self.ranks.shared(read_job(self.directory) if self.ranks.is_first else None)
        if known is not None:
            compare_jobs(known, job, self.directory)
        elif self.ranks.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / JOB, json.dumps(job, indent=1) + "\n")

    def unit_of(self, layer: LinearizedAttention) -> Unit:
        return next(unit for unit in self.units if any(layer is one for one in unit.layers))

    def pass_rows(self, group: Group, source: Source, target: Target, steps: range, learn: bool = True) -> None:
        """Pass the rows of ``steps`` through a group; its units learn from the steps they have not done yet.

        ``learn``: False to only compute hidden states.
        """
        units = group.units if learn else []
        apart = self.config.coupling == "per_layer"  # of a joint run, the pipeline measures the layers itself
        if apart and any(unit.learns_from(0) and not unit.progress.errors_before for unit in units):
            self._evaluate(group, [unit for unit in units if unit.progress.step == 0], source, before=True)
        wanted = (b for b in self._batches(steps) if target.wants(b.step) or _learning(units, b.step))
        with torch.no_grad(), self._ctrl_c():
            for batch, inputs in self._feed(source, wanted):
                learning, keep = _learning(units, batch.step), target.wants(batch.step)
                if not (learning or keep):
                    continue
                if inputs is not None:
                    hidden = self._learn(group, learning, batch, inputs, keep)
                    if keep:
                        target.write(batch, hidden)
                if batch.last:
                    self._end_step(group, learning, source, batch.step)
                    if keep:
                        target.done(batch.step)
            if target.wants(VALIDATION):
                for batch, inputs in self._feed(source, self.validation):
                    if inputs is not None:
                        target.write(batch, self._learn(group, [], batch, inputs, keep=True))
            target.done(VALIDATION)
        self._save(units)

    def _batches(self, steps: range) -> Iterator[Batch]:
        return self.visits.batches(steps, self.config.rows_at_once, self.ranks)

    def _feed(self, source: Source, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Inputs | None]]:
        return feed(source, self.positions, batches, self.device)

    def _learn(self, group: Group, units: list[Unit], batch: Batch, inputs: Inputs, keep: bool) -> Tensor:
        """Pass one batch through the group, and accumulate the gradients of its share of the mean loss in the units.

        Returns:
            The group's output; valid until the next batch, unless it is to be kept.
        """
        learn, shares = partial(learn_from, group, units, self.config), [batch.weight / len(u.layers) for u in units]
        graph = None if keep else self.graphs.find(learn, units, inputs)
        found = learn(inputs, shares) if graph is None else graph(inputs, shares)
        for unit, part in zip(units, found.parts, strict=True):
            unit.add(part.clone())
        if units:
            self.watch.step = batch.step + 1
            self.watch.add(found.losses, partial(_place, [layer for unit in units for layer in unit.layers]))
        return found.hidden

    def _end_step(self, group: Group, units: list[Unit], source: Source, step: int) -> None:
        self.ranks.sum([tensor for unit in units for tensor in unit.gradients()])
        for unit in units:
            unit.update()
        self.watch.end_step()
        done = step + 1
        if units and (done % self.config.eval_steps == 0 or done == len(self.visits.steps)):
            self._evaluate(group, units, source)
        self._report(units)
        if done % self.config.save_steps == 0:
            self._save(units)
        self.tick(done)
        if self.interrupted:
            self._save(group.units)
            raise Interrupted(f"Stopped in {STAGE} after step {done} of {_describe(group)}; its state is saved.")

    @torch.no_grad()
    def _evaluate(self, group: Group, units: list[Unit], source: Source, before: bool = False) -> None:
        """Compute validation loss and error of the units' layers; ``before``: only record the initial errors."""
        owner = _owners(units)
        layers, started = list(owner), time.monotonic()
        sums = {layer: torch.zeros(2, device=self.device) for layer in layers}
        weight = 0.0

        def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
            sums[layer] += torch.stack(attention_losses(layer, call, self.config)).float() * weight

        for batch, inputs in self._feed(source, self.validation):
            weight = batch.weight
            if inputs is not None:
                with override(group.layers, "teacher"), override(owner, "transfer", observe):
                    group.run(*inputs)
        self.ranks.sum(list(sums.values()))
        table = dict(zip(layers, torch.stack(list(sums.values())).tolist(), strict=True)) if layers else {}
        for unit in units:
            losses, errors = zip(*(table[layer] for layer in unit.layers), strict=True)
            if before:
                unit.progress.errors_before = list(errors)
            else:
                unit.evaluated(statistics.fmean(losses), list(errors))
        if not before:
            step = units[0].progress.step
            self.eval_seconds[step] = self.eval_seconds.get(step, 0.0) + time.monotonic() - started

    def _save(self, units: list[Unit]) -> None:
        if self.ranks.is_first:
            for unit in units:
                weights = {name: p.detach() for name, p in unit.parameters.items()}
                self.watch.check_weights(unit.progress.step, weights)
                unit.save()

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """On Ctrl-C, stop after the current step. Several ranks stop at once, as they would wait for each other."""
        if self.ranks.size > 1:
            yield
        else:
            with noting_interrupt(lambda: setattr(self, "interrupted", True)):
                yield

    def last_losses(self) -> dict[str, str]:
        """The newest training and validation loss, for a progress bar."""
        names = {"loss": "loss", "eval_loss": "validation"}
        return {names[k]: f"{e[k]:.4g}" for e in self.history()[-2 * len(names) :] for k in names if k in e}

    @property
    def finished(self) -> bool:
        return all(unit.finished for unit in self.units)

    def track(self, model: nn.Module, one_by_one: bool = False) -> None:
        """Report to the run's trackers from here on: means over units and, with ``one_by_one``, each unit's own log."""
        if self.ranks.is_first and self.report_to:
            name_directory(self.report_to, self.run_directory / "metrics.jsonl")
            settings = TrainingArguments(
                output_dir=str(self.directory), seed=self.seed, use_cpu=self.device.type == "cpu",
                learning_rate=self.config.learning_rate, max_steps=len(self.visits.steps), report_to=self.report_to,
            )  # fmt: skip
            self.trackers = Trackers(self.report_to, settings, model, len(self.visits.steps))
            self.reported = len(self.history())
            self.reported_of = {unit: len(unit.progress.history) for unit in self.units if one_by_one}

    def _report(self, units: list[Unit]) -> None:
        """Hand trackers what is new in the logs of units that are reported one by one."""
        for unit in units:
            if self.trackers is not None and unit in self.reported_of:
                history, layer = unit.progress.history, unit.layers[0].geometry.layer
                for entry in history[self.reported_of[unit] :]:
                    self.trackers.log(_of_layer(entry, layer))
                self.reported_of[unit] = len(history)

    def close(self) -> None:
        """Report no more."""
        if self.trackers is not None:
            self.trackers.close()
            self.trackers = None

    def write_metrics(self, last: Sequence[dict[str, float]] = ()) -> None:
        """Write the run's metrics.jsonl up to the step that all units have reached, and then ``last``."""
        if not self.ranks.is_first:
            return
        history = [entry | self._eval_speed(entry) for entry in self.history()] + list(last)
        replace_metrics(self.run_directory / "metrics.jsonl", STAGE, history)
        if self.trackers is not None:
            for entry in history[self.reported :]:
                self.trackers.log(entry)
            self.reported = len(history)

    def _eval_speed(self, entry: dict[str, float]) -> dict[str, float]:
        """Time and speed of an evaluation that was made in this process."""
        if "eval_loss" not in entry or entry["step"] not in self.eval_seconds:
            return {}
        seconds = self.eval_seconds[int(entry["step"])]
        return _speed("eval", seconds, len(self.data.validation), len(self.validation))

    def history(self) -> list[dict[str, float]]:
        """Means over units for each step; a unit that has stopped early contributes its last values."""
        reached = min((u.progress.step for u in self.units if not u.progress.stopped), default=len(self.visits.steps))
        entries: list[dict[str, float]] = []
        for key in ("loss", "eval_loss"):
            own = [{e["step"]: e for e in u.progress.history if key in e} for u in self.units]
            last: list[dict[str, float] | None] = [None] * len(own)
            for step in sorted({s for one in own for s in one if s <= reached}):
                last = [one.get(step, old) for one, old in zip(own, last, strict=True)]
                known = [entry for entry in last if entry is not None]
                keys = [k for k in known[0] if k != "step"]
                values = {k: statistics.fmean(e[k] for e in known if k in e) for k in keys}
                entries.append({"step": step, "epoch": step / self.visits.steps_per_epoch, **values})
        return sorted(entries, key=lambda entry: (entry["step"], "eval_loss" in entry))

    def result(self) -> LayerwiseResult:
        """Give the layers their best weights, and return what all units did."""
        progress = [unit.progress for unit in self.units]
        self.write_metrics([self._summary()])
        self.close()
        for unit in self.units:
            unit.take_best()
        return LayerwiseResult(
            steps=max(p.step for p in progress),
            best_step=max(p.best_step for p in progress),
            best_loss=statistics.fmean(p.best_loss for p in progress),
            history=self.history(),
            errors_before=[error for p in progress for error in p.errors_before],
            errors_after=[error for p in progress for error in p.errors_best],
        )

    def _summary(self) -> dict[str, float]:
        """The last entry of the log, with the names that transformers' Trainer has."""
        steps = max(unit.progress.step for unit in self.units)
        seconds = time.monotonic() - self.started
        rows = self.visits.steps[steps - 1].stop if steps else 0
        loss = statistics.fmean(unit.mean_loss() for unit in self.units)
        return {
            "step": steps, "epoch": steps / self.visits.steps_per_epoch, "train_loss": loss,
            "total_flos": 0.0, **_speed("train", seconds, rows, steps),
        }  # fmt: skip


def learn_from(
    group: Group, units: Sequence[Unit], config: TransferConfig, inputs: Inputs, shares: Sequence[float | Tensor]
) -> Learned:  # fmt: skip
    """Pass inputs through a group, and add the gradients of each unit's share of its layers' losses."""
    owner, losses = _owners(units), dict[LinearizedAttention, Tensor]()
    share, parts = dict(zip(units, shares, strict=True)), dict[Unit, Tensor]()

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        unit = owner[layer]
        with torch.enable_grad():
            loss = attention_loss(layer, call, config)
            if loss.requires_grad:  # not if the layer has nothing to train, as one with only a window
                (loss * share[unit]).backward()
        losses[layer] = loss.detach()
        part = losses[layer] * share[unit]
        parts[unit] = parts[unit] + part if unit in parts else part.float()

    with override(group.layers, "teacher"), override(owner, "transfer", observe):
        hidden = group.run(*inputs)
    each = torch.stack([losses[layer] for layer in owner]) if owner else hidden.new_zeros(0)
    return Learned(hidden, each, [parts[unit] for unit in units])


def _speed(stage: str, seconds: float, rows: int, steps: int) -> dict[str, float]:
    """Time and speed as transformers' Trainer logs them."""
    seconds = max(seconds, 1e-9)
    return {
        f"{stage}_runtime": seconds, f"{stage}_samples_per_second": rows / seconds,
        f"{stage}_steps_per_second": steps / seconds,
    }  # fmt: skip


def _of_layer(entry: dict[str, float], layer: int) -> dict[str, float]:
    """An entry of one layer's log with its names for trackers, such as ``layer_3_loss`` and ``eval_layer_3_loss``."""
    named = {re.sub("^(eval_)?", rf"\1layer_{layer}_", name): value for name, value in entry.items() if name != "step"}
    return {"step": entry["step"], **named}


def _place(layers: Sequence[LinearizedAttention], bad: Tensor) -> str:
    """Where a loss became NaN or infinite, as the end of a sentence."""
    return f" in layer {layers[int(bad.long().argmax())].geometry.layer}"


def compare_jobs(known: dict[str, Any], asked: dict[str, Any], directory: Path) -> None:
    """Raise LolcatsError, naming the first difference, if the files in ``directory`` belong to another job.

    A setting that is newer than the files has its default.
    """
    defaults = {f"{part}.{k}": v for part in ("attention", "transfer") for k, v in to_dict(Config())[part].items()}
    known = {key: value for key, value in defaults.items() if key in asked} | known
    for key in [*known, *asked]:
        if known.get(key) != asked.get(key):
            raise LolcatsError(
                f"{directory} holds another job: {key} was {known.get(key)!r} and is now {asked.get(key)!r}. Nothing "
                "was changed. Repeat the original command, or choose another --out."
            )


def job_of(config: Config, data: Data, layers: list[str], base: str) -> dict[str, Any]:
    """Everything that the contents of the units depend on."""
    identity = identity_of(config)
    settings = {f"transfer.{k}": v for k, v in identity["transfer"].items() if k not in HARMLESS}
    settings |= {f"attention.{k}": v for k, v in identity["attention"].items()}
    rows = {"data": data.fingerprint, "rows": len(data.train)}
    if data.positions:
        rows["data.reset_at_documents"] = True
    return {"base": base, **settings, "seed": config.seed, **rows, "layers": layers}


def read_job(directory: Path) -> Any:
    """Read the job that attention transfer in ``directory`` was started with; None if there is none."""
    path = directory / JOB
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise LolcatsError(f"{path} is damaged ({error}).") from None


def _learning(units: list[Unit], step: int) -> list[Unit]:
    return [unit for unit in units if unit.learns_from(step)]


def _owners(units: Sequence[Unit]) -> dict[LinearizedAttention, Unit]:
    return {layer: unit for unit in units for layer in unit.layers}


def _describe(group: Group) -> str:
    first, last = group.layers[0].geometry.layer, group.layers[-1].geometry.layer
    return f"layer {first}" if first == last else f"layers {first} to {last}"
