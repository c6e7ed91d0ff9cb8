"""Benchmarks of teacher, baselines and student: look up tasks by name, and run every model on every task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, from_dict, load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation import tasks
from lolcats.evaluation.harness import Harness, Spec, load_tasks
from lolcats.evaluation.kinds import KINDS
from lolcats.evaluation.positions import positions
from lolcats.evaluation.recall import Sight, recall, sight
from lolcats.evaluation.scores import Score, average, mean_score
from lolcats.evaluation.systems import check_baselines, systems
from lolcats.evaluation.text import encode, read_documents
from lolcats.modeling.auto import LolcatsConfig
from lolcats.modeling.code import may_run_code
from lolcats.modeling.record import is_linearized, read_record
from lolcats.weights.base import Quantize, find_base, load_tokenizer, read_config

RECALL = {"recall": tuple(KINDS), **{f"recall-{kind}": (kind,) for kind in KINDS}}  # kinds of prompts by task
LONG = {*RECALL, "positions"}  # tasks over long text, at given lengths
LENGTHS = tuple(2**n for n in range(10, 16))
Task = Callable[[PreTrainedModel], list[Score]]


@dataclass(frozen=True)
class Options:
    """What tasks need besides the model."""

    data_dir: Path | None = None
    """Folder of local Parquet files to use instead of the hub's data."""
    text: str = ""
    """Long text for recall and positions. Default: long_books.parquet in ``data_dir``."""
    lengths: tuple[int, ...] = ()
    """Context lengths for recall and positions. Default: powers of two from 1,024 to 32,768 that the model supports."""
    limit: int | None = None
    """Maximum number of items per task; for recall, number of answers per kind and length, 200 by default; for
    positions, of windows."""
    batch_size: int = 8
    """Rows of 1,024 tokens per batch; of shorter or longer rows, as many as hold the same number of tokens."""
    seed: int = 1234
    """Seed for recall prompts and few-shot examples; 1234 is lm-eval's default."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits of single benchmarks by lm-eval's name, instead of ``limit``; a group's is shared evenly by its tasks."""
    seen: Sight | None = None
    """What recall reports as in the window. Default: what the model's linearized layers see."""
    teacher: Callable[[], PreTrainedModel] | None = None
    """Loads the model whose predictions ``positions`` also compares with; a second model in memory meanwhile."""


def evaluate(model: str, names: list[str], baselines: list[str], device: torch.device, dtype: torch.dtype,
             options: Options, say: Callable[[str], None], base: str = "",
             trust: bool = False, quantize: Quantize = "none") -> dict[str, list[Score]]:  # fmt: skip
    """Scores by model: teacher, baselines and student for an adapter, otherwise the model itself.

    ``base``: where the base model of an adapter is now, if it has moved. ``quantize``: of all models.

    Raises:
        LolcatsError: an unknown task or baseline, or data that cannot be loaded. Raised before any model is loaded.
    """
    check_baselines(model, baselines, quantize)
    options = fill_in(options, model, names, base, trust)
    if LONG & set(names) and (warning := beyond_training(model, options.lengths)):
        say(warning)
    prepared = prepare(names, options, load_tokenizer(find_base(model, trust), trust))
    scores: dict[str, list[Score]] = {}
    for system, loaded in systems(model, baselines, device, dtype, base, trust, quantize):
        scores[system] = []
        for name, task in prepared.items():
            started = time.time()
            scores[system] += task(loaded)
            say(f"  {system}: {name} ({time.time() - started:.0f} s)")
        del loaded  # before the next model is loaded
    return scores


def prepare(names: list[str], options: Options, tokenizer: Any) -> dict[str, Task]:
    """Read all data and return functions from a model to its scores, by task name. LONG tasks need lengths."""
    single = [name for name in names if name not in SUITES]
    prepared: dict[str, Task] = {name: SUITES[name](tokenizer, options) for name in names if name in SUITES}
    if single:
        specs = [tasks.named_spec(name, options.data_dir) for name in single]
        prepared[", ".join(single)] = _harness(specs, tokenizer, options)
    return prepared


def _paper(tokenizer: Any, options: Options) -> Task:
    run = _harness(tasks.paper_specs(options.data_dir), tokenizer, options)

    def scored(model: PreTrainedModel) -> list[Score]:
        scores = [s for s in run(model) if s.metric == tasks.PAPER.get(s.task, "acc")]
        zero_shot = [s for s in scores if s.task in tasks.PAPER]
        return [*scores, average("zero-shot average", "acc, acc_norm", zero_shot)]

    return scored


def _generate(tokenizer: Any, options: Options) -> Task:
    return _harness([tasks.gsm8k_spec(options.data_dir)], tokenizer, options)


def _permuted(tokenizer: Any, options: Options) -> Task:
    """Accuracy over all rotations of a question's options, and the share of questions right in every rotation."""
    asked = replace(options, limit=options.limit and options.limit * tasks.OPTIONS, limits={})
    run = _harness([tasks.permuted_mmlu_spec(options.data_dir)], tokenizer, asked)

    def scored(model: PreTrainedModel) -> list[Score]:
        (score,) = run(model)
        items = score.items[0]
        questions = [items[i : i + tasks.OPTIONS] for i in range(0, len(items), tasks.OPTIONS)]
        return [
            mean_score(score.task, "acc", (tuple(sum(q) / tasks.OPTIONS for q in questions),)),
            mean_score(score.task, "acc in the given order", (tuple(q[0] for q in questions),)),
            mean_score(score.task, "right in every order", (tuple(min(q) for q in questions),)),
        ]

    return scored


def _recall(tokenizer: Any, options: Options, kinds: Sequence[str]) -> Task:
    haystack = [token for document in _documents(tokenizer, options) for token in document]
    given = (options.lengths, options.limit, options.batch_size, options.seed, options.seen, kinds)
    return lambda model: recall(model, tokenizer, haystack, *given)


def _positions(tokenizer: Any, options: Options) -> Task:
    documents = _documents(tokenizer, options)
    given = (max(options.lengths), options.limit, options.teacher)
    return lambda model: positions(model, tokenizer, documents, *given)


SUITES: dict[str, Callable[[Any, Options], Task]] = {
    "paper": _paper, "generate": _generate, "positions": _positions, "mmlu-permuted": _permuted,
    **{name: partial(_recall, kinds=kinds) for name, kinds in RECALL.items()},
}  # fmt: skip


IN_SUITES = {"paper": (*tasks.PAPER, "mmlu_half"), "generate": ("gsm8k",), "mmlu-permuted": ("mmlu_half",)}
"""The tasks whose local files a suite reads."""


def sources(name: str, options: Options) -> list[str]:
    """The files that task ``name`` reads, or the data set that is its long text; none if it reads the hub's data."""
    if name in LONG:
        return [_long_text(options)]
    read = IN_SUITES.get(name, (name,))
    return [] if options.data_dir is None else [str(path) for path in tasks.files_of(read, options.data_dir)]


def _harness(specs: list[Spec], tokenizer: Any, options: Options) -> Task:
    limits = ({} if options.limit is None else {"": options.limit}) | dict(options.limits)
    return Harness(load_tasks(specs, SUITES), tokenizer, limits, options.batch_size, options.seed)


def _documents(tokenizer: Any, options: Options) -> list[list[int]]:
    return [encode(tokenizer, document) for document in read_documents(_long_text(options))]


def _long_text(options: Options) -> str:
    source = options.text
    if not source and options.data_dir is not None:
        source = str(tasks.find_file(options.data_dir, "long_books"))
    if not source:
        raise LolcatsError("These tasks need long text: give --data FILE, or --data-dir with long_books.parquet.")
    return source


def fill_in(options: Options, model: str, names: list[str], base: str = "", trust: bool = False) -> Options:
    """Options with what the user left to the model: lengths, and what recall reports as in the window."""
    options = _with_lengths(model, names, options, base, trust)
    return _with_sight(model, options) if RECALL.keys() & set(names) else options


def _with_lengths(model: str, names: list[str], options: Options, base: str, trust: bool) -> Options:
    """Fill in the lengths that the model supports, if a task needs lengths and the user gave none."""
    if options.lengths or not LONG & set(names):
        return options
    found = find_base(model, trust)
    if is_linearized(model) and may_run_code(model, trust):
        config = LolcatsConfig.with_code(found.path, base=base)
    else:
        config = read_config(found, trust and not is_linearized(model))
    return replace(options, lengths=reached_lengths(config))


def _with_sight(model: str, options: Options) -> Options:
    """Fill in what the model's linearized layers see, unless given: one rule for all models that are compared."""
    if options.seen is not None or not is_linearized(model):
        return options
    return replace(options, seen=sight(from_dict(AttentionConfig, read_record(model)["attention"])))


def beyond_training(model: str, lengths: Sequence[int]) -> str:
    """A warning if the student of a run directory is measured on longer rows than it was trained on, else ''."""
    own = Path(model) / "config.yaml"
    if not own.is_file():
        return ""
    config = load_config(str(own))
    trained, longest = config.data.sequence_length, max(lengths)
    if longest <= trained or config.attention.kind not in ("hybrid", "linear"):
        return ""
    return (
        f"The student was trained on rows of {trained:,} tokens but is evaluated on up to {longest:,}: expect worse "
        "results there, above all with attention.feature_inputs=rotated (docs/theory/long_range.md)."
    )


def reached_lengths(config: Any) -> tuple[int, ...]:
    """The LENGTHS within the maximum position of a model with this configuration."""
    reach = getattr(config, "max_position_embeddings", LENGTHS[-1])
    return tuple(n for n in LENGTHS if n <= reach) or LENGTHS[:1]
