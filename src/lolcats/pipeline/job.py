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
from lolcats.data.inputs import Inputs, has_tokenizer
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.modeling.checkpoint import save_adapter_config
from lolcats.modeling.code import needs_code
from lolcats.modeling.parts import CONFIG, check_parts, find_parts, listed_parts
from lolcats.pipeline.heads import choose_heads
from lolcats.pipeline.models import Models, Say, device_and_dtype
from lolcats.pipeline.rows import check_documents, check_positions, check_rows, empty_share, notes
from lolcats.ranks import is_first, ranks
from lolcats.report.table import EMPTY
from lolcats.run import RECORD, Run
from lolcats.stages.finetune.stage import trained_layers
from lolcats.weights.base import check_quantized, find_again, with_content


def log(message: str) -> None:
    """Print progress to standard error, only on the first rank; results go to standard output."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Job:
    """``models`` hands out the run's models, made from the base model and what the directory holds. ``lean``: measure
    only what a table of many runs shows, without samples and pictures, and the student as it was trained: in 4 bits
    if its stage 2 was."""

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
        return self.config.transfer.rows_at_once

    def validation(self, rows: int | None = None) -> tuple[Iterable[Tensor], Iterable[Tensor | None]]:
        """Batches of the first ``rows`` validation rows (default: all), and their positions, if they hold documents."""
        data = self.data
        places = data.positions["validation"][:rows].split(self.batch) if data.positions else repeat(None)
        return data.validation[:rows].split(self.batch), places


def start(inputs: Inputs, data: str, out: Path, config: Config, say: Say = log, lean: bool = False) -> Job:
    """Read tokenizer and data, and begin a run in ``out`` or continue the one there. Refuses what no stage can use."""
    device, _ = device_and_dtype(config)
    trained = (out / RECORD).is_file() and Run.open(out).stage_done("finetune")
    base, given = inputs.base, inputs
    if not trained:
        check_rows(config)
        check_positions(config, base, inputs.trust)
    inputs = given.of_run(out)
    if inputs is not given:
        say(f"{out} keeps the tokenizer it was started with, because the base model's tokenizer now loads differently.")
    if config.finetune.quantize_base != "none":
        check_quantized(base, device, inputs.trust, "finetune.quantize_base", gradients=True)
    data = str(Path(data).resolve()) if Path(data).exists() else data
    say(f"Reading {data}")
    rows = inputs.data(data, config.data, config.seed)
    empty = empty_share(rows, config) if config.data.reset_at_documents else None
    if not trained:
        check_documents(empty, config)
    for line in notes(rows, config, empty):
        say(f"  {line}")
    run = Run.start(out, base, {**rows.summary, "fingerprint": rows.fingerprint}, config)
    run.record["data"] |= {} if empty is None else {EMPTY: empty}
    parts = listed_parts(out)
    if run.stage_done("finetune"):
        check_parts(out, parts)
    if parts is None:  # a new run, or one that an older version began
        parts = find_parts(out) if run.record["stages"] else {}
    ranks().wait()  # every rank has checked the directory before one of them writes
    choose_heads(run, inputs, *device_and_dtype(config), say)
    models = Models(run, inputs, say, as_trained=lean)
    job = Job(run, models.config, inputs, rows, models, say, lean)
    trains_maps = config.attention.has_linear and not run.stage_done("transfer")
    if models.in_4_bits and trains_maps and not job.in_turn:
        raise LolcatsError(
            f"{base.path} does not fit into memory, and stage 1 needs its own weights, not those in 4 bits of stage 2 "
            "(finetune.quantize_base): set transfer.order=stream and transfer.coupling=per_layer, which loads one "
            "layer after another."
        )
    if job.in_turn and config.data.keep_longest_effective < 1:
        raise LolcatsError(
            "data.keep_longest_effective needs the whole model in memory to measure its attention: use "
            "transfer.order=joint."
        )
    model = job.models.skeleton().model if job.in_turn else job.models.converted()
    if config.finetune.max_steps:
        trained_layers(model, models.config.finetune)  # reject bad targets before stage 1, not after it
    _check_classes(out, model)
    if is_first():
        base = with_content(run.base)  # its weights are on disk by now
        run.record["base"] = base.record
        run.save()
        write_text(out / "config.yaml", to_yaml(run.config))
        if not has_tokenizer(out):
            inputs.tokenizer.save_pretrained(out)
        save_adapter_config(model, base, out, parts=parts)
    ranks().wait()  # for config.json
    return job


def _check_classes(out: Path, model: PreTrainedModel) -> None:
    """Raise LolcatsError if ``out`` was started with other classes than ``model`` has: the base model's own or not."""
    if not (out / CONFIG).is_file():
        return
    own = getattr(model.config, "own_model", None) is not None
    if own != needs_code(json.loads((out / CONFIG).read_text())):
        how, change = ("without", "leave out") if own else ("with", "use")
        raise LolcatsError(f"{out} was started {how} the code of its base model: {change} --trust-remote-code.")


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
