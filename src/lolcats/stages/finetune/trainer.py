"""A transformers.Trainer that saves only what it trains, keeps the best weights, and can resume.

A checkpoint is used only if its ``complete`` marker was written. It holds the trained tensors, optimizer, schedule,
random state, early-stopping count and sums of losses, so on a CPU a resumed run equals an uninterrupted one bit for
bit, ``metrics.jsonl`` included, except for times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from lolcats.config import StageConfig
from lolcats.data.rows import Item
from lolcats.errors import Interrupted, LolcatsError
from lolcats.files import read_json_lines, write_text
from lolcats.ranks import is_first, ranks
from lolcats.stages.arguments import training_arguments
from lolcats.stages.distributed import all_reduce_gradients, any_rank, is_sharded
from lolcats.stages.interrupt import noting_interrupt
from lolcats.stages.metrics import replace_metrics
from lolcats.stages.result import StageResult
from lolcats.stages.trackers import name_directory
from lolcats.stages.trained import trainable
from lolcats.stages.watch import ADVICE, LossWatch
from lolcats.tensors import load_strictly, read_tensors, write_tensors

COMPLETE = "complete"
TRAINABLE = "trainable.safetensors"
BEST = "best.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names


class StageTrainer(Trainer):
    """Train every parameter of ``model`` that requires a gradient. Subclasses define the loss.

    Args:
        train, validation: data sets of rows.
        stage: name for progress and metrics, ``transfer`` or ``finetune``.
        directory: working directory of the stage (checkpoints, best weights); kept until the caller removes it.
        metrics: path of the run's ``metrics.jsonl``.
    """

    def __init__(
        self, model: nn.Module, config: StageConfig, train: Dataset[Item], validation: Dataset[Item],
        stage: str, directory: Path, metrics: Path, seed: int = 0, report_to: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.keeper = BestKeeper(config.early_stopping_patience, directory / BEST)
        self.metrics, self.sums = metrics, dict[str, float]()
        self.watch = LossWatch(stage)
        self.stage, self.directory, self.stage_config = stage, directory, config
        configuration: Any = getattr(model, "config", None)
        use_cache = getattr(configuration, "use_cache", None)
        name_directory(report_to or [], metrics)
        try:
            super().__init__(
                model=model,
                args=training_arguments(
                    config,
                    directory,
                    seed,
                    next(model.parameters()).device,
                    report_to or [],
                    len(validation),  # type: ignore[arg-type]
                ),
                train_dataset=train,
                eval_dataset=validation,
                callbacks=[WatchSteps(self.watch), self.keeper, ContinueSums(self), MetricsFile(metrics, stage)],
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if report_to:
                raise LolcatsError(f"report_to {', '.join(report_to)}: {error}") from error
            raise
        if use_cache is not None:
            configuration.use_cache = use_cache  # Trainer switches it off for good, even in the saved configuration
        self.model_accepts_loss_kwargs = False  # ``training_step`` takes the mean over micro-batches itself
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(StageProgress(stage))

    def run(self) -> StageResult:
        """Train, or resume from the newest complete checkpoint. The model ends with its best weights."""
        checkpoint = newest_checkpoint(self.directory)
        state: dict[str, Any] = {}
        if checkpoint:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            progress = json.loads((checkpoint / COMPLETE).read_text())
            self.sums = progress.pop("sums", {})  # older versions wrote none
            self.keeper.__dict__.update(progress)
        if not state or not (self.keeper.exhausted or state["global_step"] >= state["max_steps"]):
            self.model.train()  # every module of it: steps only ask the outermost one
            with self.keeper.stop_on_interrupt(), quick_zero_grad(self.model, self.forget_gradients):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = {"global_step": self.state.global_step, "log_history": self.state.log_history}
            self.accelerator.wait_for_everyone()  # rank 0 writes what all ranks read
            if self.keeper.interrupted:
                raise Interrupted(f"Stopped in {self.stage} after step {self.state.global_step}; its state is saved.")
        elif self.sums and is_first():
            self._end_metrics(state)
        load_strictly(trainable(self.model), read_tensors(self.directory / BEST), self.directory / BEST)
        return StageResult(state["global_step"], self.keeper.step, self.keeper.loss, state["log_history"])

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained. Listed once: to look at every module of a model in each step takes long."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def _operations_per_token(self) -> int:
        return 6 * self.model.num_parameters(exclude_embeddings=True)  # type: ignore[operator]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """transformers' step for what we use of it, without visiting every module (``model.train()``) each time."""
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        with self.passing():
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                loss = loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def forget_gradients(self) -> None:
        """After each optimizer step."""
        for parameter in self.trained:
            parameter.grad = None

    def passing(self) -> AbstractContextManager[None]:
        """Around each forward pass and its backward pass; subclasses may prepare the model for it."""
        return nullcontext()

    def try_step(self) -> None:
        """Pass a micro-batch forwards and backwards twice, the second time beside the gradients of the first, and leave
        nothing of it."""
        count, rows, training = len(self.train_dataset), self.args.per_device_train_batch_size, self.model.training
        batch = self.data_collator([self.train_dataset[n % count] for n in range(rows)])
        self.current_gradient_accumulation_steps = 1
        self.model.train()
        for _ in range(2):
            self.training_step(self.model, batch)
        self.model.zero_grad()
        self.model.train(training)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return int(inputs["input_ids"].numel() * self._operations_per_token)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs``; the mean loss of the whole training counts the steps before a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _end_metrics(self, state: dict[str, Any]) -> None:
        """Write the last line of metrics.jsonl for a training that was killed after its last checkpoint."""
        step, history = state["global_step"], state["log_history"]
        if any("train_loss" in e for e in read_json_lines(self.metrics) if e["stage"] == self.stage):
            return
        mean = (self.sums["total"] + self.sums["running"]) / max(step, 1)
        last = {"total_flos": state["total_flos"], "train_loss": mean, "epoch": state["epoch"], "step": step}
        replace_metrics(self.metrics, self.stage, [*history, last])

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        with torch.no_grad(), self.passing():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.watch.check_weights(self.state.global_step, trainable(self.model))
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        marker = self.directory / f"checkpoint-{self.state.global_step}" / COMPLETE
        running = self._tr_loss.clone()
        ranks().sum([running])
        sums = {"running": running.item() / ranks().size, "total": self._total_loss_scalar,
                "logged": self._globalstep_last_logged}  # fmt: skip
        if is_first():
            write_text(marker, json.dumps({**self.keeper.progress(), "sums": sums}))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        write_tensors(trainable(self.model), Path(output_dir or self.directory) / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINABLE
        load_strictly(trainable(self.model), read_tensors(path), path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load through host memory: with several ranks, transformers would load onto devices such as ``cpu:0``."""
        if checkpoint is None or ranks().size == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for name, target in ((OPTIMIZER, self.optimizer), (SCHEDULER, self.lr_scheduler)):
            target.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = UnwrappingAccelerator

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _clip_grad_norm(self, model: Any) -> Any:
        all_reduce_gradients(self.trained)
        return clip_grad_norm_(self.trained, self.args.max_grad_norm or math.inf)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.args.world_size > 1:  # without clipping, the gradients have not been summed yet
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)


class UnwrappingAccelerator(Accelerator):  # type: ignore[misc]
    """Do not wrap models in DDP. Frozen weights may be sharded, and ``_clip_grad_norm`` sums the gradients."""

    def prepare_model(self, model: Any, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
        return super().prepare_model(model, False if is_sharded(model) else device_placement, evaluation_mode=True)


@contextmanager
def quick_zero_grad(model: nn.Module, forget: Callable[[], None]) -> Iterator[None]:
    """For the block's duration, let ``model.zero_grad()`` do what ``forget`` does, which need not look for what is
    trained."""
    model.zero_grad = lambda set_to_none=True: forget()  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.zero_grad


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps, if any."""
    complete = [p.parent for p in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda p: int(p.name.split("-")[1]), default=None)


class WatchSteps(TrainerCallback):
    """Tells a :class:`LossWatch` which step the Trainer is in."""

    def __init__(self, watch: LossWatch) -> None:
        self.watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.step = state.global_step + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.end_step()


class ContinueSums(TrainerCallback):
    """Makes the mean losses that a resumed Trainer logs those of an uninterrupted one."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, sums = self.trainer, self.trainer.sums
        if sums:
            trainer._tr_loss.fill_(sums["running"])
            trainer._total_loss_scalar, trainer._globalstep_last_logged = sums["total"], int(sums["logged"])


class BestKeeper(TrainerCallback):
    """Save the weights with the best validation loss, stop early, and stop cleanly on Ctrl-C or NaN."""

    def __init__(self, patience: int, path: Path) -> None:
        self.patience, self.path, self.interrupted = patience, path, False
        self.loss, self.step, self.waited = math.inf, 0, 0

    def progress(self) -> dict[str, float]:
        """The state that a resumed stage needs."""
        return {"loss": self.loss, "step": self.step, "waited": self.waited}

    @property
    def exhausted(self) -> bool:
        """Whether the validation loss has not improved for ``patience`` evaluations."""
        return 0 < self.patience <= self.waited

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """First Ctrl-C: finish the step, save, stop. Second: stop at once."""
        with noting_interrupt(lambda: setattr(self, "interrupted", True)):
            yield

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupted = any_rank(self.interrupted, args.device)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise LolcatsError(f"The loss became {logs['loss']} by step {state.global_step}. {ADVICE}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], model: Any,
                    **kwargs: Any) -> None:  # fmt: skip
        if metrics["eval_loss"] < self.loss:
            self.loss, self.step, self.waited = metrics["eval_loss"], state.global_step, 0
            if is_first():
                write_tensors(trainable(model), self.path)
        else:
            self.waited += 1
        if self.exhausted:
            control.should_training_stop = control.should_save = True


class MetricsFile(TrainerCallback):
    """Write metrics.jsonl, one JSON object per line, for both stages. On resuming, drop lines after the checkpoint."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_first():
            replace_metrics(self.path, self.stage, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps({"stage": self.stage, **logs, "step": state.global_step}) + "\n")


class StageProgress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar, with the stage's name and the last losses instead of printed dicts."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_loss": "validation"}
        self.shown.update({names[k]: f"{v:.4g}" for k, v in (logs or {}).items() if k in names})
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)
