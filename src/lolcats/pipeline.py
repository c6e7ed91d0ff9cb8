"""The whole job in order: teacher, attention transfer, LoRA, table, export. A killed run continues where it stopped."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.compared import (
    BRANCHES,
    CONTROLS,
    STUDENT,
    TEACHER,
    TRANSFERRED,
    WINDOW,
    WINDOW_SINKS,
    Compared,
    baseline_sinks,
)
from lolcats.config import Config, Control, from_dict, to_dict, to_yaml
from lolcats.data.inputs import Inputs
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.evaluation.attention_maps import FILE, measure_attention
from lolcats.evaluation.effective_length import longest
from lolcats.evaluation.layers import measure_layers
from lolcats.evaluation.memory import cache_bytes
from lolcats.evaluation.perplexity import perplexity
from lolcats.files import whole_directory, write_text
from lolcats.inference.generate import generate
from lolcats.modeling.checkpoint import (
    FEATURE_MAPS,
    LORA,
    load_feature_maps,
    merge_lora,
    save_adapter_config,
    save_feature_maps,
    save_lora,
)
from lolcats.modeling.classes import convert_as
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.skeleton import Skeleton, build_skeleton
from lolcats.ranks import is_first, ranks
from lolcats.run import SAMPLE_PROMPT, SAMPLE_WINDOWS, Run
from lolcats.stages.distributed import is_sharded
from lolcats.stages.finetune.controls import control, control_directory, train_control
from lolcats.stages.finetune.fits import shards
from lolcats.stages.finetune.stage import finetune, load_lora, load_over_ranks, lora_targets
from lolcats.stages.result import StageResult
from lolcats.stages.transfer.stage import layer_errors, transfer, transfer_in_turn
from lolcats.weights.base import check_quantized, load_model, load_quantized

LENGTHS = (1024, 8192, 65536)
LOOKED_AT = 8  # validation rows to measure each head's attention on
Say = Callable[[str], None]


def log(message: str) -> None:
    """Print progress to standard error, only on the first rank; results go to standard output."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


@dataclass
class Session:
    """A run, and everything its stages need in memory.

    ``wrapped``: the model with untrained LoRA, if it was loaded sharded across ranks for stage 2.
    ``skeleton``: set if stage 1 loads one layer after another; ``model`` is then the skeleton's model until
    :func:`load_whole` replaces it by the whole model.
    ``lean``: measure only what a table of many runs shows, without samples and pictures.
    """

    run: Run
    config: Config
    model: PreTrainedModel
    tokenizer: Any
    data: Data
    inputs: Inputs
    say: Say = log
    skeleton: Skeleton | None = None
    wrapped: PeftModel | None = None
    lean: bool = False


def linearize(model: str, data: str, out: Path, config: Config, merge: bool = True, say: Say = log) -> Run:
    """Turn ``model`` into a linear-attention model by training on ``data``, and write everything to ``out``.

    When called again with the same arguments, it continues where it stopped and ends with the same weights.

    Args:
        model: hub id, directory or .gguf file.
        data: hub data set id or file, see :func:`lolcats.data.rows.load_data`.
        merge: also write ``out``/merged.
        say: called with each progress message.

    Raises:
        LolcatsError: the model, data or settings cannot be used, or ``out`` holds something else.
    """
    session = start(Inputs(model, trust=config.trust_remote_code), data, out, config, say)
    run_transfer(session)
    run_controls(session)
    run_finetune(session)
    finish(session, merge)
    return session.run


def start(inputs: Inputs, data: str, out: Path, config: Config, say: Say = log, lean: bool = False) -> Session:
    """Load base model, tokenizer and data, convert the model, and measure the teacher and the untrained baselines."""
    device, dtype = device_and_dtype(config)
    base, tokenizer = inputs.base, inputs.tokenizer
    if config.finetune.quantize_base != "none":
        check_quantized(base, device)
    data = str(Path(data).resolve()) if Path(data).exists() else data
    say(f"Reading {data}")
    rows = inputs.data(data, config.data, config.seed)
    run = Run.start(out, base, {**rows.summary, "fingerprint": rows.fingerprint}, config)
    config = run.config
    ranks().wait()  # every rank has checked the directory before one of them writes
    skeleton = wrapped = None
    if config.transfer.order != "joint" and not run.stage_done("transfer"):
        if config.data.keep_longest_effective < 1:
            raise LolcatsError(
                "data.keep_longest_effective needs the whole model in memory to measure its attention: use "
                "transfer.order=joint."
            )
        say(f"Reading {base.path} layer by layer ({dtype}, {device})".replace("torch.", ""))
        skeleton = build_skeleton(base, config.attention, dtype, device, config.seed, inputs.trust)
        student = skeleton.model
    else:
        student, wrapped = _load_converted(inputs, config, say, run.stage_done("transfer"))
    if config.finetune.max_steps:
        lora_targets(student, config.finetune.targets)  # reject bad targets before stage 1, not after it
    if is_first():
        run.save()
        write_text(out / "config.yaml", to_yaml(config))
        tokenizer.save_pretrained(out)
        save_adapter_config(student, base, out)
    session = Session(run, config, student, tokenizer, rows, inputs, say, skeleton, wrapped, lean)
    if skeleton is None:
        _begin_measuring(session)
    return session


def _load_converted(
    inputs: Inputs, config: Config, say: Say, for_finetuning: bool
) -> tuple[PreTrainedModel, PeftModel | None]:  # fmt: skip
    """Load the converted model. If stage 2 shards it across ranks, also return the PEFT model that wraps it."""
    device, dtype = device_and_dtype(config)
    if for_finetuning and shards(inputs.base, config, device, dtype):
        say(f"Loading {inputs.base.path} over {ranks().size} ranks ({dtype}, {device})".replace("torch.", ""))
        wrapped = load_over_ranks(inputs.base, config, dtype, device)
        return wrapped.get_base_model(), wrapped
    say(f"Loading {inputs.base.path} ({dtype}, {device})".replace("torch.", ""))
    base_model = inputs.model(dtype, device)
    torch.manual_seed(config.seed)
    return convert(base_model, config), None


def _begin_measuring(session: Session) -> None:
    """Measure the untrained model, then load its feature maps if stage 1 is done."""
    _baselines(session)
    _keep_longest(session)
    if session.run.stage_done("transfer"):
        load_feature_maps(session.model, session.run.directory / FEATURE_MAPS)
        _measure_transfer(session)


def load_whole(session: Session) -> None:
    """Load the whole model, for stage 2 and measurements, after a stage 1 that loaded one layer after another."""
    if session.skeleton is None:
        return
    if not session.run.stage_done("transfer"):
        raise LolcatsError(f"{session.run.directory}: run attention transfer first (lolcats transfer).")
    session.skeleton = None
    session.model, session.wrapped = _load_converted(session.inputs, session.config, session.say, True)
    _begin_measuring(session)
    _measure_final_maps(session)


def resume(
    directory: Path, say: Say = log, controls: Sequence[Control] = (), sharding: str = ""
) -> Session:  # fmt: skip
    """Load the session of an existing run. Adds ``controls`` to the run's own, and replaces ``finetune.sharding``
    unless ``sharding`` is empty."""
    run = Run.open(directory)
    settings = to_dict(replace(run.config, controls=[*run.config.controls, *controls]))
    settings["finetune"] |= {"sharding": sharding} if sharding else {}
    config = from_dict(Config, settings)
    inputs = Inputs(run.base.path, trust=config.trust_remote_code)
    return start(inputs, run.record["data"]["source"], directory, config, say)


def check_block(config: Config, block: int | None) -> None:
    """Raise LolcatsError if ``block`` is set but stage 1 has no blocks."""
    if block is not None and config.transfer.order != "blocks":
        raise LolcatsError("--block needs transfer.order=blocks (--schedule blocks), but this run has no blocks.")


def run_transfer(session: Session, block: int | None = None) -> None:
    """Run stage 1 unless done: train feature maps and gates, save ``feature_maps.safetensors``, measure the result.

    ``block``: with ``transfer.order: blocks``, train only this block; the stage is done once all blocks are.
    """
    run, model = session.run, session.model
    check_block(session.config, block)
    learns = any(layer.spec.has_linear for layer in linearized_layers(model))
    if not run.stage_done("transfer"):
        summary: dict[str, Any] | None = {"skipped": True}
        if learns and session.skeleton is None:
            run.measure("layer_errors_before", partial(_layer_errors, session))
        if learns and session.config.transfer.max_steps != 0:
            session.say(_headline(session, "Stage 1: attention transfer", "transfer"))
            summary = _train_transfer(session, block)
        if summary is None:
            session.say("Other blocks are still untrained: train them too, then combine them with --join.")
            return
        _finish_transfer(session, summary)
    if session.skeleton is not None:
        return
    _measure_transfer(session)
    _measure_final_maps(session)


def _measure_transfer(session: Session) -> None:
    """Measure the result of stage 1 unless done; the model has its feature maps and no LoRA yet."""
    _measure_perplexity(session, TRANSFERRED)
    if any(layer.spec.has_linear for layer in linearized_layers(session.model)):
        session.run.measure("layer_errors_after", partial(_layer_errors, session))


def _train_transfer(session: Session, block: int | None) -> dict[str, Any] | None:
    """Train stage 1 and return its entry in run.json; None while there are untrained blocks."""
    run, data, config, base = session.run, session.data, session.config, session.run.base.fingerprint
    started = time.time()
    if session.skeleton is None:
        return _summary(transfer(session.model, data, config, run.directory, base), started)
    result = transfer_in_turn(session.skeleton, data, config, run.directory, base, block, session.say)
    if result is None:
        return None
    run.measure("layer_errors_before", lambda: result.errors_before)
    run.measure("layer_errors_after", lambda: result.errors_after)
    return _summary(result, started)


def _finish_transfer(session: Session, summary: dict[str, Any]) -> None:
    run, out = session.run, session.run.directory
    if is_first():
        save_feature_maps(session.model, out / FEATURE_MAPS)
    run.finish_stage("transfer", summary)
    ranks().wait()
    if is_first():
        shutil.rmtree(out / "checkpoints" / "transfer", ignore_errors=True)


def run_controls(session: Session) -> None:
    """Train and measure the configured controls unless done.

    Call it before stage 2: controls need the base model's weights without the student's LoRA, and leave them unchanged.
    """
    load_whole(session)
    run, model, config = session.run, session.model, session.config
    comparable = config.finetune.max_steps != 0 and any(layer.spec.has_linear for layer in linearized_layers(model))
    if comparable and config.controls and ranks().size > 1:
        raise LolcatsError("Controls are trained in one process: run lolcats finetune --controls without torchrun.")
    for name in config.controls if comparable else ():
        if not run.stage_done(name):
            session.say(_headline(session, f"Control {CONTROLS[name].in_words}", "finetune"))
            started = time.time()
            result = train_control(model, name, session.data, config, run.base, run.directory)
            run.finish_stage(name, _summary(result, started))
            shutil.rmtree(control_directory(run.directory, name) / "checkpoints", ignore_errors=True)
        if CONTROLS[name].result not in run.results:
            with control(model, name, run.directory):
                _measure_perplexity(session, CONTROLS[name])


def run_finetune(session: Session) -> None:
    """Run stage 2 unless done: train LoRA and save it in ``lora/``.

    Afterwards the session's model has LoRA merged into its weights, or beside them if they are sharded.
    """
    load_whole(session)
    run, model, out = session.run, session.model, session.run.directory
    if not run.stage_done("transfer"):
        raise LolcatsError(f"{out}: run attention transfer first (lolcats transfer).")
    run_transfer(session)  # measure what stage 1 could not without the whole model
    if run.stage_done("finetune"):
        if session.wrapped is not None and (out / LORA).is_dir():
            load_lora(session.wrapped, out / LORA)
        elif (out / LORA).is_dir():
            session.model = merge_lora(model, out / LORA)
        return
    if session.config.finetune.max_steps == 0:
        run.finish_stage("finetune", {"skipped": True})
        return
    quantized = session.config.finetune.quantize_base != "none"
    if quantized and ranks().size > 1:
        raise LolcatsError("finetune.quantize_base works on one GPU only: run this without torchrun.")
    if quantized:
        del model  # a second model in memory would undo the saving
        model = _reload(session, load_quantized)
    session.say(_headline(session, "Stage 2: low-rank linearizing", "finetune"))
    started = time.time()
    config = session.config
    if session.wrapped is None and shards(run.base, config, *device_and_dtype(config)):
        config = replace(config, finetune=replace(config.finetune, sharding="always"))
    wrapped, result = finetune(session.wrapped or model, session.data, config, out)
    save_lora(wrapped, run.base, out / LORA)
    if session.config.finetune.feature_map_learning_rate > 0:
        save_feature_maps(wrapped, out / FEATURE_MAPS)
    run.finish_stage("finetune", _summary(result, started))
    ranks().wait()
    if is_first():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if is_sharded(wrapped):  # LoRA is not merged into sharded weights
        session.model, session.wrapped = wrapped.get_base_model().eval(), wrapped
    elif quantized:
        del wrapped, model
        session.model = merge_lora(_reload(session, load_model), out / LORA)
    else:
        session.model = wrapped.merge_and_unload().eval()


def _reload(session: Session, load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Replace the session's model: reload its base model with ``load``, convert it, and load stage 1's feature maps."""
    record, device, dtype = session.model.config.lolcats, session.model.device, session.model.dtype
    del session.model
    session.model = convert_as(load(session.run.base, dtype, device, session.config.trust_remote_code), record)
    load_feature_maps(session.model, session.run.directory / FEATURE_MAPS)
    return session.model


def measure_student(session: Session) -> None:
    """Measure the held-out perplexity of the trained model, complete and with one branch off, and its gates."""
    run, model = session.run, session.model
    _measure_perplexity(session, STUDENT, *(BRANCHES if linearized_layers(model) else ()))
    run.measure("gamma", lambda: [layer.gamma.tolist() for layer in linearized_layers(model)])


def finish(session: Session, merge: bool = True, pictures: bool = True) -> None:
    """Measure the result, write model card and pictures, and write the merged model if ``merge`` is set."""
    from lolcats.report.card import write_card
    from lolcats.report.html import write_html
    from lolcats.report.picture import draw_report

    run, model, out = session.run, session.model, session.run.directory
    measure_student(session)
    run.measure("sample_student", lambda: _sample(session))
    run.measure("cache_bytes", lambda: {str(n): cache_bytes(model, n) for n in LENGTHS})
    measure_maps(session, "student")  # unless stage 2 left the feature maps unchanged
    if merge and is_sharded(model):
        session.say(f"No merged model: the weights are sharded. To write it: lolcats export {out} --merge --out MERGED")
    elif merge and is_first() and not (out / "merged").is_dir():
        session.say(f"Writing {out / 'merged'}")
        export_merged(model, session.tokenizer, out / "merged")
    if not is_first():
        return
    if pictures:
        draw_report(run)
        write_html(run)
    write_card(run)
    if (out / "merged").is_dir():
        shutil.copy(out / "README.md", out / "merged" / "README.md")


def report(directory: Path, say: Say = log) -> Path:
    """Write report.html of a run. If its attention has not been measured, load the model and measure it first."""
    from lolcats.report.html import write_html

    if find_spec("matplotlib") is None:
        raise LolcatsError("The report needs matplotlib: pip install 'lolcats[plots]'.")
    run = Run.open(directory)
    if run.stage_done("transfer") and "attention" not in run.results:
        session = resume(directory, say)
        run_transfer(session)
        if run.stage_done("finetune"):
            run_finetune(session)
            measure_maps(session, "student")
        run = session.run
    write_html(run)
    return directory / "report.html"


def export_merged(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write a self-contained model directory, completely or not at all."""
    with whole_directory(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """The configured device and dtype, with ``auto`` resolved for this machine."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not getattr(torch, device).is_available():
        raise LolcatsError(f"device: {device} is not available on this machine.")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype)


def _baselines(session: Session) -> None:
    _measure_perplexity(session, TEACHER)
    if not session.lean:
        session.run.measure("sample_teacher", lambda: _teacher_sample(session))
    _measure_perplexity(session, WINDOW)
    session.run.measure("baseline_sinks", lambda: baseline_sinks(session.config.attention))
    _measure_perplexity(session, WINDOW_SINKS)


def _keep_longest(session: Session) -> None:
    """Keep only the training rows that ``data.keep_longest_effective`` selects; measured once per run."""
    fraction, data = session.config.data.keep_longest_effective, session.data
    if fraction == 1:
        return

    def measured() -> dict[str, Any]:
        session.say(f"Effective sequence lengths of {len(data.train)} rows")
        lengths, indices = longest(data, session.model, fraction, _batch(session))
        means = {"all": lengths.rows.mean().item(), "kept": lengths.rows[indices].mean().item()}
        return {"mean": means, "rows": indices.tolist()}

    selection = session.run.measure("effective_length", measured)
    session.data = data.select(torch.tensor(selection["rows"]))
    means = selection["mean"]
    session.say(
        f"  training on the {len(selection['rows'])} of {len(data.train)} rows with the longest effective sequence "
        f"length: {means['kept']:.1f} tokens on average, {means['all']:.1f} over all rows"
    )


def _measure_perplexity(session: Session, *models: Compared) -> None:
    """Measure the held-out perplexity of each of ``models`` unless done; the session's model has what they need."""
    for model in models:
        session.run.measure(model.result, partial(_perplexity, session, model))


def _perplexity(session: Session, model: Compared) -> float:
    with model.on(session.model):
        value = perplexity(session.model, session.data.test, _batch(session), session.data.positions.get("test"))
    session.say(f"  perplexity, {model.in_words}: {value:.2f}")
    return value


def _teacher_sample(session: Session) -> str:
    with TEACHER.on(session.model):
        return _sample(session)


def _sample(session: Session) -> str:
    tokens = SAMPLE_WINDOWS * session.config.attention.window_size
    return generate(session.model, session.tokenizer, SAMPLE_PROMPT, tokens)


def _batch(session: Session) -> int:
    return session.config.transfer.micro_batch_size


def _headline(session: Session, title: str, stage: str) -> str:
    config = getattr(session.config, stage)
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.epochs:g} epochs"
    return f"{title}: {length} of {config.batch_size} × {session.config.data.sequence_length} tokens"


def _summary(result: StageResult, started: float) -> dict[str, Any]:
    """A stage's entry in run.json; ``seconds`` counts from when the stage was last started or continued."""
    entry = {key: getattr(result, key) for key in ("steps", "best_step", "best_loss")}
    return {**entry, "seconds": round(time.time() - started, 1)}


def measure_maps(session: Session, of: str) -> None:
    """Measure the attention of each layer unless done; ``of``: whose queries and keys these are, teacher or student."""
    model, run, rows = session.model, session.run, session.data.validation
    if linearized_layers(model):
        batches = zip(*_validation(session, LOOKED_AT), strict=False)
        run.measure("layers", lambda: measure_layers(model, batches, of))
        if not session.lean:
            run.measure("attention", lambda: measure_attention(model, rows[0], run.directory / FILE, of))


def _measure_final_maps(session: Session) -> None:
    """Measure attention on the teacher's queries and keys if stage 2 does not change the feature maps."""
    if session.config.finetune.feature_map_learning_rate == 0:
        measure_maps(session, "teacher")


def _layer_errors(session: Session) -> list[float]:
    return layer_errors(session.model, *_validation(session))


def _validation(session: Session, rows: int | None = None) -> tuple[Iterable[Tensor], Iterable[Tensor | None]]:
    """Batches of the first ``rows`` validation rows (default: all) and their positions (None: one sequence per row)."""
    data, size = session.data, _batch(session)
    places = data.positions["validation"][:rows].split(size) if data.positions else repeat(None)
    return data.validation[:rows].split(size), places
