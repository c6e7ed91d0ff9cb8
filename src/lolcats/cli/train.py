"""Commands that make linearized models: ``linearize`` and its stages, ``sweep``, and the commands around them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from lolcats.cli.app import (
    ChosenHeads,
    Controls,
    DataPath,
    Model,
    MovedBase,
    Out,
    Recipe,
    RunDirectory,
    Sets,
    Trust,
    check_picture,
    command,
    curve_table,
    data_app,
    out,
    print_rows,
    settings,
    show_run,
    writing,
)
from lolcats.errors import LolcatsError


@command
def linearize(model: Model, out_: Out, data: DataPath = "", recipe: Recipe = "", set_: Sets = [],  # noqa: B006
              merge: Annotated[bool, typer.Option(help="Also write the merged model to OUT/merged.")] = True,
              train: Annotated[bool, typer.Option(help="Train feature maps and LoRA. --no-train only keeps heads "
                                                       "(attention.softmax_budget, or --selection); the others see "
                                                       "only window and sinks, those of the recipe untrained unless "
                                                       "you give another. It needs no data.")] = True,
              selection: ChosenHeads = None, controls: Controls = False, trust: Trust = False) -> None:  # fmt: skip
    """Linearize a model: attention transfer, LoRA, results table, adapter and merged model."""
    from lolcats.config import Control

    asked = [f"controls=[{', '.join(get_args(Control))}]"] if controls else []
    chosen = recipe or ("default" if train else "untrained")
    config = _with_heads(settings(chosen, [*set_, *asked], trust), selection, model)
    if train != bool(data):
        missing, unused = "Training needs --data. To skip training, add --no-train.", "--no-train does not use --data."
        raise LolcatsError(missing if train else unused)

    from lolcats.pipeline import linearize as run_pipeline

    with writing(out_):
        if not train:
            return _without_training(model, out_, config, merge, selection)
        run = run_pipeline(model, data, out_, config, merge)
    show_run(run)
    _show_written(out_)


def _with_heads(config: Any, selection: Path | None, model: str) -> Any:
    """The configuration with the heads of a selection file, if one is given."""
    if selection is None:
        return config

    from lolcats.ranks import is_first
    from lolcats.selection import Selection, other_window, with_selection
    from lolcats.weights.base import find_base

    changed = with_selection(config, selection, find_base(model, config.trust_remote_code))
    if is_first() and config.attention.softmax_budget:
        out.print(f"{selection} says which heads to keep, so attention.softmax_budget is not used.", soft_wrap=True,
                  highlight=False, markup=False)  # fmt: skip
    if is_first() and (note := other_window(config, Selection.read(selection))):
        out.print(f"{selection}: {note}", soft_wrap=True, highlight=False, markup=False)
    return changed


def _without_training(model: str, directory: Path, config: Any, merge: bool, file: Path | None) -> None:
    from lolcats.pipeline import linearize_untrained
    from lolcats.ranks import is_first
    from lolcats.selection import Selection

    given = Selection.read(file) if file else None
    selection = linearize_untrained(model, directory, config, merge, selection=given)
    if not is_first():
        return
    if selection is not None:
        print_rows(*curve_table(selection))
    _show_written(directory)


def _show_written(directory: Path) -> None:
    merged = f"merged model: {directory / 'merged'}   " if (directory / "merged").is_dir() else ""
    out.print(f"\nAdapter: {directory}   {merged}card: {directory / 'README.md'}", soft_wrap=True)


@command
def transfer(
    model: Model, data: DataPath, out_: Out, recipe: Recipe = "default", set_: Sets = [],  # noqa: B006
    schedule: Annotated[str, typer.Option(help="Training order: joint, stream or blocks. Same as --set "
                                               "transfer.order=; stream and blocks also set "
                                               "transfer.coupling=per_layer.")] = "",
    block_size: Annotated[int, typer.Option(help="Layers per block; same as --set transfer.block_size= (0 = "
                                             "the recipe's value).")] = 0,
    block: Annotated[int | None, typer.Option(min=0, help="With --schedule blocks, train only this block "
                                                          "(counted from 0).")] = None,
    join: Annotated[list[Path], typer.Option(help="Take over the trained layers from another directory of the same "
                                                  "run. Repeatable.")] = [],  # noqa: B006
    selection: ChosenHeads = None, trust: Trust = False,
) -> None:  # fmt: skip
    """Run only stage 1, attention transfer. Also runs under torchrun."""
    order = [f"transfer.order={schedule}"] if schedule else []
    order += ["transfer.coupling=per_layer"] if schedule in ("stream", "blocks") else []
    order += [f"transfer.block_size={block_size}"] if block_size else []
    config = _with_heads(settings(recipe, [*order, *set_], trust), selection, model)

    from lolcats.data.inputs import Inputs
    from lolcats.pipeline import check_block, judge, start, train_maps
    from lolcats.ranks import is_first, ranks
    from lolcats.stages.transfer.orders import join_units

    check_block(config, block)
    with writing(out_):
        job = start(Inputs(model, trust=config.trust_remote_code), data, out_, config)
        if is_first():
            join_units(out_, join)
        ranks().wait()
        train_maps(job, block)
        judge(job)
    if is_first():
        show_run(job.run)
        if job.run.stage_done("transfer"):
            made = f"Feature maps: {out_}." if job.learns else "Stage 1 has nothing to train without linear attention."
            out.print(f"\n{made} Next: lolcats finetune {out_}", soft_wrap=True)


@command
def finetune(directory: RunDirectory,
             merge: Annotated[bool, typer.Option(help="Also write the merged model to DIR/merged.")] = True,
             controls: Controls = False,
             sharding: Annotated[str, typer.Option(help="Whether to shard the base model across GPUs: always, "
                                                        "never, or auto (only if it does not fit on each). Default: "
                                                        "the run's finetune.sharding.")] = "",
             base: MovedBase = "", trust: Trust = False,
             ) -> None:  # fmt: skip
    """Run only stage 2, LoRA, in a run directory where stage 1 is finished. Also runs under torchrun."""
    from lolcats.config import Control
    from lolcats.pipeline import resume, train_lora
    from lolcats.ranks import is_first

    with writing(directory):
        job = resume(
            directory, controls=get_args(Control) if controls else (), sharding=sharding, base=base, trust=trust
        )  # fmt: skip
        train_lora(job, merge)
    if is_first():
        show_run(job.run)


@command
def sweep(
    files: Annotated[list[str], typer.Argument(help="Sweep files (YAML), e.g. from experiments/; then, optionally, "
                                                    "the base model (same as --set base.model=).",
                                               metavar="FILE... [MODEL]")],
    data: Annotated[str, typer.Option(help="Training data; same as --set base.data=.")] = "",
    out_: Annotated[Path, typer.Option("--out", file_okay=False, help="Results directory; an unfinished sweep in it "
                                      "is continued.")]
        = Path("sweep"),
    set_: Annotated[list[str], typer.Option("--set", help="Change one setting of the sweep (base.sources.NAME=, "
                                            "evaluate.perplexity.NAME=, seeds=) or of every row. Repeatable.")]
        = [],  # noqa: B006
    deadline: Annotated[float, typer.Option(help="Time limit in seconds; rows not expected to finish in time are not "
                                                 "started (0 = no limit).")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List rows and tokens without running anything.")] = False,
    trust: Trust = False,
) -> None:  # fmt: skip
    """Run every row of each FILE with every seed, and write one table per FILE.

    Run the same command again to continue, or several times at once to share the rows.
    """
    from lolcats.lab.sweep.plan import plan, plan_rows, read_sweep
    from lolcats.pipeline import log

    model = "" if len(files) == 1 or Path(files[-1]).suffix in (".yaml", ".yml") else files.pop()
    given = [f"{key}={value}" for key, value in (("base.model", model), ("base.data", data)) if value]
    sweeps = [read_sweep(Path(file), [*given, *set_]) for file in files]
    if dry_run:
        for one in sweeps:
            print_rows(*plan_rows(plan(one)), title=one.title)
        return
    from lolcats.lab.sweep.execute import run_sweeps

    for table in run_sweeps(sweeps, out_, shlex.join(["lolcats", *sys.argv[1:]]), log, deadline or None, trust):
        out.print(table.read_text(), soft_wrap=True, markup=False, highlight=False)


@command
def report(directory: RunDirectory, base: MovedBase = "", trust: Trust = False) -> None:
    """Write DIR/report.html with loss curves, errors, attention maps, tables and samples."""
    from lolcats.pipeline import report as write_report

    with writing(directory):
        path = write_report(directory, base=base, trust=trust)
    out.print(f"Report: {path}", soft_wrap=True)


@command
def import_(
    base: Annotated[str, typer.Option(help="Base model: hub id, directory or .gguf file.")],
    transfer: Annotated[Path, typer.Option(help=".pt file with feature maps and window factors.")],
    out_: Annotated[Path, typer.Option("--out", help="Output directory.")],
    lora: Annotated[Path | None, typer.Option(help=".pt file with LoRA matrices.")] = None,
    recipe: Recipe = "paper", selection: ChosenHeads = None, trust: Trust = False, set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Convert checkpoints of the paper's own code to an adapter.

    The checkpoints do not record every setting (window, α): pass those with --set attention...=. The feature maps of
    heads that are to stay softmax attention (--selection, attention.softmax_heads) are left out.
    """
    config = _with_heads(settings(recipe, set_, trust), selection, base)

    from lolcats.reference_import import import_reference

    with writing(out_):
        import_reference(base, transfer, lora, out_, config)
    out.print(f"Adapter: {out_}", soft_wrap=True)


@command
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, model directory, .gguf file, config.json, or one of "
                                              "llama-3-8b, llama-3.1-70b, llama-3.1-405b.", metavar="MODEL")],
    gpus: Annotated[int, typer.Option(help="Total number of GPUs.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each GPU.")] = "80GiB",
    host_memory: Annotated[str, typer.Option(help="Memory of each node.")] = "128GiB",
    disk: Annotated[str, typer.Option(help="Free disk space of each node. Default: not checked.")] = "",
    read_speed: Annotated[str, typer.Option(help="Speed at which each node reads weights from disk.")] = "3GB/s",
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs of each node.")] = 8,
    tokens: Annotated[str, typer.Option(help="Training tokens of stage 1, over all epochs.")] = "20M",
    finetune_tokens: Annotated[str, typer.Option(help="Training tokens of stage 2, over all epochs.")] = "40M",
    block_size: Annotated[int, typer.Option(help="Layers per block (0 = as many as fit).")] = 0,
    recipe: Recipe = "default", trust: Trust = False, set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Estimate memory, disk and time from the model's configuration, and print the commands to run.

    Covers both stages and, on one GPU, the search for heads, a base model in 4 bits, and export.
    """
    from lolcats.pipeline.rows import check_rows
    from lolcats.plan import Machine, Work, plan_finetune, plan_transfer, quantized, read_config, report, size_of

    read = report.parse_quantity
    machine = Machine(
        gpus, read(gpu_memory, "--gpu-memory", 1e6), read(host_memory, "--host-memory", 1e6),
        read(read_speed, "--read-speed", 1e6), read(disk or "1e30", "--disk", 1e6), gpus_per_node,
    )  # fmt: skip
    work = Work(read(tokens, "--tokens"), read(finetune_tokens, "--finetune-tokens"), block_size)
    config = settings(recipe, set_, trust)
    check_rows(config)
    budget, plain = config.attention.softmax_budget, replace(config.attention, softmax_budget=0.0)
    size = size_of(read_config(model, trust), replace(config, attention=plain), trust)
    if budget:
        size = size_of(read_config(model, trust), quantized.kept_evenly(config, size), trust)
    needed = (plan_transfer, plan_finetune) if size.maps or machine.gpus > 1 else (plan_finetune,)
    stages = [plans(size, config, machine, work) for plans in needed]
    in_4_bits = [] if Path(model).suffix == ".gguf" else quantized.plan_quantized(size, config, machine, work)
    stages[-1] += in_4_bits
    searches = [] if config.attention.softmax_heads else quantized.plan_select(size, config, machine)
    exports = quantized.plan_export(size, machine)
    shown = [plan for plans in stages for plan in plans if size.maps or plan.stage != "stage 1"]
    rows = report.plan_rows([*searches, *shown, *exports])
    print_rows(report.HEADER, rows, title=report.title(model, size, machine, work))
    paper = report.paper_line(size, work, stages[0]) if size.maps else ""
    for line in filter(None, (paper, report.generation_line(size), report.time_line(size))):
        out.print(line, soft_wrap=True)
    if Path(model).suffix == ".gguf":
        whole = f"{size.total * 2 / 2**30:.1f} GiB"
        out.print(
            f"A GGUF file is read whole, with any schedule: it takes {whole} of host memory in 16 bits.", soft_wrap=True
        )
    chosen = [plan for plans in stages for plan in report.recommended(plans)]
    detailed = [plan for plan in chosen if plan in shown]
    for best in detailed:
        print_rows(("where", "part", "amount"), report.part_rows(best), f"{best.stage}, {best.schedule}")
    search = quantized.chosen_search(searches) if budget else []
    chosen = chosen if search or not budget else []
    steps = [report.search_command(plan, model, budget, recipe, set_, trust) for plan in search]
    steps += report.commands(chosen, model, recipe, set_, machine, trust, bool(search), size.maps > 0)
    for line in steps:
        out.print(f"\n{line}", soft_wrap=True, markup=False, highlight=False)
    if machine.gpus == 1 and len(chosen) == len(stages) and bool(search) == bool(budget):
        out.print(f"\n{quantized.path_line([*search, *detailed, *exports])}", soft_wrap=True)
    refusals = [report.refusal(plans, size, config, machine, work) for plans in stages]
    refusals += [quantized.what_would_fit(in_4_bits), report.no_search(searches) if budget else ""]
    if refused := " ".join(filter(None, refusals)):
        raise LolcatsError(refused)


@partial(command, group=data_app)
def stats(
    model: Model, data: DataPath,
    rows: Annotated[int, typer.Option(min=1, help="Number of training rows to run the model on.")] = 64,
    picture: Annotated[Path, typer.Option(help="PNG file for the histograms.")] = Path("data-stats.png"),
    recipe: Recipe = "default", trust: Trust = False, set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Show data sizes, document lengths, and how far back MODEL's attention looks on DATA."""
    config = settings(recipe, set_, trust)
    check_picture(picture)

    from lolcats.lab.data_stats import data_statistics
    from lolcats.pipeline import device_and_dtype

    found = data_statistics(model, data, config, *device_and_dtype(config), rows)
    facts = Table("", "", show_header=False)
    for name, value in found.facts.items():
        facts.add_row(name, value)
    out.print(facts)
    print_rows(*found.rows(), title=Path(data).name)
    found.draw(picture)
    out.print(f"Histograms: {picture}", soft_wrap=True)
