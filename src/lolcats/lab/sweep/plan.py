"""Read a sweep file and turn it into runs. It has a base, rows of settings or a grid, seeds, and what to evaluate.

    title: Heading of the table
    base: {recipe: long, set: [transfer.max_steps=488]}
    rows:
      no sinks: [attention.sinks=0]
      other text: [base.data=books]      # a name in base.sources
    grid:                                # adds every combination of one setting per list
      - [attention.window_size=32, attention.window_size=64]
    seeds: [0, 1]
    evaluate: {perplexity: {wikitext2: ""}, tasks: [paper, recall], limit: 500, limits: {mmlu_half: 2000}}

Paths are given on the command line: base.model, base.data, base.sources.NAME, evaluate.perplexity.NAME,
evaluate.data_dir, evaluate.text. base.recipe may be a file relative to the sweep file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lolcats.compared import CONTROLS
from lolcats.config import (
    AttentionConfig,
    Config,
    Control,
    Kind,
    StageConfig,
    TransferConfig,
    from_dict,
    load_config,
    parse_setting,
    read_yaml,
    set_key,
)
from lolcats.errors import LolcatsError
from lolcats.stages.finetune.controls import control_config

SECTIONS = ("base", "evaluate", "seeds", "rows", "grid")
DATA = "base.data="


@dataclass(frozen=True)
class Base:
    """Defaults for every row."""

    model: str = ""
    data: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    """Further data sets by name, for rows with ``base.data=NAME``."""
    recipe: str = "default"
    set: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluate:
    """What to measure for every trained row besides the perplexity on its held-out rows."""

    perplexity: dict[str, str] = field(default_factory=dict)
    """Data sets by name; those without a path are skipped."""
    tasks: list[str] = field(default_factory=list)
    """As in ``lolcats evaluate --tasks``. Tasks that need lm-eval or a long text are skipped if it is missing."""
    limit: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    """Limits of single tasks, instead of ``limit``; that of a group (``mmlu_half``) is shared evenly by its tasks."""
    rows: int = 0
    """Maximum number of rows of each perplexity file (0 = all)."""
    lengths: list[int] = field(default_factory=list)
    kl: bool = False
    """Let the task ``positions`` also measure the KL divergence from the teacher, which is in memory meanwhile."""
    data_dir: str = ""
    text: str = ""
    batch_size: int = 8
    """Rows of 1,024 tokens per batch; of shorter rows, as many as hold the same number of tokens."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the settings of the command line."""

    name: str = ""
    """The name of the file without its extension."""
    title: str = ""
    base: Base = field(default_factory=Base)
    rows: dict[str, list[str]] = field(default_factory=dict)
    grid: list[list[str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluate: Evaluate = field(default_factory=Evaluate)
    last: list[str] = field(default_factory=list)
    """Settings of the command line, which override those of rows."""


@dataclass(frozen=True)
class Row:
    """One run: a row's settings with one seed."""

    name: str
    settings: list[str]
    config: Config
    data: str
    """The name of its data in base.sources, or empty for base.data."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:48]

    @property
    def controls(self) -> dict[Control, Row]:
        """The controls that the row can have: all if it has a linear term and LoRA, else none."""
        finetune = self.config.finetune
        if not self.config.attention.has_linear or finetune.max_steps == 0 or finetune.learning_rate == 0:
            return {}
        return {name: control_row(self, name) for name in get_args(Control)}

    def tokens(self, stage: str) -> int | None:
        """Number of tokens that a stage trains on; None if it depends on the data."""
        config: StageConfig = getattr(self.config, stage)
        if config.max_steps < 0:
            return None
        return config.max_steps * config.batch_size * self.config.data.sequence_length


def control_row(row: Row, name: Control) -> Row:
    """A control of a row as its own row, with every setting that does not affect it at its default.

    Rows with the same data, window, sinks, seed and LoRA therefore share their controls.
    """
    config, own = row.config, row.config.attention
    finetune = control_config(config, name).finetune
    softmax: dict[str, Kind] = {layers: kind for layers, kind in own.layers.items() if kind == "softmax"}
    keeps = bool(softmax or own.softmax_heads or own.softmax_budget)
    attention = AttentionConfig(
        kind="window" if name == "window_lora" else "softmax", layers=softmax, window=own.window,
        window_size=own.window_size, sinks=own.sinks, softmax_heads=own.softmax_heads,
        softmax_budget=own.softmax_budget,
    )  # fmt: skip
    if name == "teacher_lora" and not (finetune.protect_kept and keeps):  # nothing that the row keeps matters
        attention, finetune = AttentionConfig(kind="softmax"), replace(finetune, protect_kept=False)
    size, micro = config.transfer.batch_size, config.transfer.micro_batch_size
    transfer = TransferConfig(max_steps=0, batch_size=size, micro_batch_size=micro)
    only_lora = replace(config, attention=attention, transfer=transfer, finetune=finetune, controls=[])
    return Row(f"{CONTROLS[name].name} of {row.name}", row.settings, only_lora, row.data)


def read_sweep(path: Path, changes: Iterable[str] = ()) -> Sweep:
    """Read a sweep file and apply ``a.b=c`` changes to its own sections or to the configuration of every row.

    Raises:
        LolcatsError: an unknown key, a wrong type, no rows, or a row with an invalid configuration.
    """
    if not path.is_file():
        raise LolcatsError(f"{path} does not exist.")
    tree = read_yaml(path.read_text(), str(path)) or {}
    last = []
    for change in changes:
        key, value = parse_setting(change)
        if key.split(".")[0] in SECTIONS:
            set_key(tree, key, value)
        else:
            last.append(change)
    if not isinstance(tree, dict):
        raise LolcatsError(f"{path}: expected a mapping of sections, got {type(tree).__name__}.")
    sweep = from_dict(Sweep, {"name": path.stem, **tree, "last": last})
    beside = path.parent / sweep.base.recipe
    if beside.is_file():
        sweep = replace(sweep, base=replace(sweep.base, recipe=str(beside)))
    plan(sweep)
    return sweep


def plan(sweep: Sweep) -> list[Row]:
    """Every row with the first seed, then with the next one, so that the table has all rows early on."""
    combined = itertools.product(*sweep.grid) if sweep.grid else ()
    named = [*sweep.rows.items(), *((_name(chosen), list(chosen)) for chosen in combined)]
    if not named:
        raise LolcatsError("The sweep has no rows: give it rows or a grid.")
    return [_row(sweep, name, settings, seed) for seed in sweep.seeds for name, settings in named]


def _row(sweep: Sweep, name: str, settings: list[str], seed: int) -> Row:
    chosen = [s.removeprefix(DATA) for s in settings if s.startswith(DATA)]
    for source in chosen:
        if source not in sweep.base.sources:
            raise LolcatsError(f"Row {name!r}: {source!r} is not in base.sources.")
    own = [s for s in settings if not s.startswith(DATA)]
    try:
        config = load_config(sweep.base.recipe, [*sweep.base.set, *own, *sweep.last, f"seed={seed}"])
    except LolcatsError as error:
        raise LolcatsError(f"Row {name!r}: {error}") from None
    return Row(name, settings, config, chosen[-1] if chosen else "")


def _name(settings: Iterable[str]) -> str:
    """``sinks=4, window=sliding``: the settings without their sections."""
    return ", ".join(setting.split(".", 1)[-1] for setting in settings)


def plan_rows(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of the runs of a sweep, for --dry-run."""
    header = ("row", "seed", "settings", "transfer tokens", "LoRA tokens", "controls")
    return header, [
        (
            row.name, str(row.config.seed), " ".join(row.settings), _tokens(row, "transfer"), _tokens(row, "finetune"),
            " ".join(row.config.controls),
        )
        for row in rows
    ]  # fmt: skip


def _tokens(row: Row, stage: str) -> str:
    count = row.tokens(stage)
    stage_config: Any = getattr(row.config, stage)
    return f"{stage_config.epochs:g} epochs" if count is None else f"{count:,}"
