"""A job: a run, and what its stages read. What they make lies in the run's directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import Config, Control, from_dict, to_dict, to_yaml
from lolcats.data.inputs import Inputs
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.modeling.checkpoint import save_adapter_config
from lolcats.modeling.code import needs_code
from lolcats.modeling.parts import CONFIG, check_parts, find_parts, listed_parts
from lolcats.pipeline.models import Models, Say, device_and_dtype
from lolcats.ranks import is_first, ranks
from lolcats.run import Run
from lolcats.stages.finetune.stage import lora_targets
from lolcats.weights.base import check_quantized, find_again, with_content


def log(message: str) -> None:
    """Print progress to standard error, only on the first rank; results go to standard output."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Job:
    """``models`` hands out the run's models, made from the base model and what the directory holds. ``lean``: measure
    only what a table of many runs shows, without samples and pictures."""

    run: Run
    config: Config
    inputs: Inputs
    data: Data
    models: Models
    say: Say = log
    lean: bool = False

    @property
    def in_turn(self) -> bool:
        """Whether stage 1 is still to be trained without the whole model in memory."""
        return self.config.transfer.order != "joint" and not self.run.stage_done("transfer")

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of the model's layers, softmax among them if some stay."""
        return {layer["kind"] for layer in self.run.layers}

    @property
    def learns(self) -> bool:
        """Whether some layer has feature maps to train."""
        return bool(self.kinds & {"hybrid", "linear"})

    @property
    def batch(self) -> int:
        return self.config.transfer.micro_batch_size

    def validation(self, rows: int | None = None) -> tuple[Iterable[Tensor], Iterable[Tensor | None]]:
        """Batches of the first ``rows`` validation rows (default: all), and their positions, if they hold documents."""
        data = self.data
        places = data.positions["validation"][:rows].split(self.batch) if data.positions else repeat(None)
        return data.validation[:rows].split(self.batch), places


def start(inputs: Inputs, data: str, out: Path, config: Config, say: Say = log, lean: bool = False) -> Job:
    """Read tokenizer and data, and begin a run in ``out`` or continue the one there. Refuses what no stage can use."""
    device, _ = device_and_dtype(config)
    base, tokenizer = inputs.base, inputs.tokenizer
    if config.finetune.quantize_base != "none":
        check_quantized(base, device)
    data = str(Path(data).resolve()) if Path(data).exists() else data
    say(f"Reading {data}")
    rows = inputs.data(data, config.data, config.seed)
    run = Run.start(out, base, {**rows.summary, "fingerprint": rows.fingerprint}, config)
    parts = listed_parts(out)
    if run.stage_done("finetune"):
        check_parts(out, parts)
    if parts is None:  # a new run, or one that an older version began
        parts = find_parts(out) if run.record["stages"] else {}
    ranks().wait()  # every rank has checked the directory before one of them writes
    job = Job(run, run.config, inputs, rows, Models(run, inputs, say), say, lean)
    if job.in_turn and config.data.keep_longest_effective < 1:
        raise LolcatsError(
            "data.keep_longest_effective needs the whole model in memory to measure its attention: use "
            "transfer.order=joint."
        )
    model = job.models.skeleton().model if job.in_turn else job.models.converted()
    if config.finetune.max_steps:
        lora_targets(model, config.finetune.targets)  # reject bad targets before stage 1, not after it
    _check_classes(out, model)
    if is_first():
        base = with_content(run.base)  # its weights are on disk by now
        run.record["base"] = base.record
        run.save()
        write_text(out / "config.yaml", to_yaml(job.config))
        tokenizer.save_pretrained(out)
        save_adapter_config(model, base, out, parts=parts)
    ranks().wait()  # for config.json
    return job


def _check_classes(out: Path, model: PreTrainedModel) -> None:
    """Raise LolcatsError if ``out`` was begun with other classes than ``model`` has: the base model's own or not."""
    if not (out / CONFIG).is_file():
        return
    own = getattr(model.config, "own_model", None) is not None
    if own != needs_code(json.loads((out / CONFIG).read_text())):
        begun, change = ("without", "leave out") if own else ("with", "use")
        raise LolcatsError(f"{out} was begun {begun} the code of its base model: {change} --trust-remote-code.")


def resume(directory: Path, say: Say = log, controls: Sequence[Control] = (), sharding: str = "", base: str = "",
           trust: bool = False) -> Job:  # fmt: skip
    """The job of an existing run. Adds ``controls`` to the run's own, and replaces ``finetune.sharding`` unless
    ``sharding`` is empty. ``base``: where the base model is now, if it has moved; the run remembers it. ``trust``: run
    Python code that comes with it."""
    run = Run.open(directory)
    settings = to_dict(replace(run.config, controls=[*run.config.controls, *controls], trust_remote_code=trust))
    settings["finetune"] |= {"sharding": sharding} if sharding else {}
    config: Any = from_dict(Config, settings)
    found = find_again(run.base, directory, base, config.trust_remote_code)
    inputs = Inputs(found, trust=config.trust_remote_code)
    return start(inputs, run.record["data"]["source"], directory, config, say)
