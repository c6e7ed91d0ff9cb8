"""The command line: translates arguments, prints results, turns a user's mistake into a sentence and exit code 2."""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from lolcats.errors import Interrupted, LolcatsError, out_of_memory

app = typer.Typer(
    name="lolcats", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Turn pretrained softmax-attention language models into linear-attention ones.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on them.")
app.add_typer(data_app, name="data")
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hub id, local model directory or .gguf file.", metavar="MODEL")]
Directory = Annotated[Path, typer.Argument(help="A run directory or a linearized model.", metavar="DIR")]
DataPath = Annotated[str, typer.Option("--data", help="Hub data set id; local .json, .jsonl, .parquet, .txt file; or "
                                       "a .yaml file that mixes several.")]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", help="Directory to write; an unfinished run in it is continued.")]
Recipe = Annotated[str, typer.Option(help="default, paper, paper-70b, paper-405b, small, or a YAML file.")]
Sets = Annotated[list[str], typer.Option("--set", help="Change one setting: transfer.learning_rate=1e-3. Repeatable.")]

Controls = Annotated[bool, typer.Option("--controls", help="Also train window + sinks with the same LoRA (no linear "
                                        "term) and the teacher with it.")]  # fmt: skip


NO_MEMORY = (
    "Memory ran out. Lower transfer.micro_batch_size and finetune.micro_batch_size (the batch stays as it is), use "
    "shorter rows (data.sequence_length), or --set finetune.gradient_checkpointing=true. Evaluations: --batch-size; "
    "serving: --slots. What was finished is saved."
)


def command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Register a command whose user errors end in one sentence."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet()
            function(*args, **kwargs)
        except Interrupted as error:
            _fail(f"{error} Run the same command again to continue.", 130)
        except KeyboardInterrupt:
            _fail("Stopped. What was finished is saved; run the same command again to continue.", 130)
        except LolcatsError as error:
            _fail(str(error), 2)
        except Exception as error:
            if out_of_memory(error):
                _fail(NO_MEMORY, 2)
            if not _disk_full(error, [path for path in kwargs.values() if isinstance(path, Path)]):
                raise
            _fail("The disk is full. Free some space and run the same command again: it continues where it stopped.", 2)

    return group.command(function.__name__.removesuffix("_"))(guarded)


@command
def linearize(model: Model, data: DataPath, out_: Out, recipe: Recipe = "default", set_: Sets = [],  # noqa: B006
              merge: Annotated[bool, typer.Option(help="Also write DIR/merged.")] = True,
              controls: Controls = False) -> None:  # fmt: skip
    """The whole job: attention transfer, LoRA, table, adapter and merged model."""
    from lolcats.config import Control, load_config
    from lolcats.pipeline import linearize as run_pipeline

    asked = [f"controls=[{', '.join(get_args(Control))}]"] if controls else []
    run = run_pipeline(model, data, out_, load_config(recipe, [*set_, *asked]), merge)
    _show(run)
    out.print(f"\nAdapter: {out_}   merged model: {out_ / 'merged'}   card: {out_ / 'README.md'}", soft_wrap=True)


@command
def transfer(
    model: Model, data: DataPath, out_: Out, recipe: Recipe = "default", set_: Sets = [],  # noqa: B006
    schedule: Annotated[str, typer.Option(help="Order of the work: joint, stream or blocks, as --set transfer.order=; "
                                               "the last two set transfer.coupling=per_layer.")] = "",
    block_size: Annotated[int, typer.Option(help="Layers in a block, as --set transfer.block_size=.")] = 0,
    block: Annotated[int, typer.Option(help="With --schedule blocks: train this block alone, counted from 0.")] = -1,
    join: Annotated[list[Path], typer.Option(help="Another directory of the same run whose layers to take over; "
                                                  "repeatable.")] = [],  # noqa: B006
) -> None:  # fmt: skip
    """Stage 1 alone: attention transfer. Runs under torchrun, too."""
    from lolcats.config import load_config
    from lolcats.inputs import Inputs
    from lolcats.pipeline import run_transfer, start
    from lolcats.ranks import is_first, ranks
    from lolcats.training.orders import join_units

    order = [f"transfer.order={schedule}"] if schedule else []
    order += ["transfer.coupling=per_layer"] if schedule in ("stream", "blocks") else []
    order += [f"transfer.block_size={block_size}"] if block_size else []
    config = load_config(recipe, [*order, *set_])
    session = start(Inputs(model, trust=config.trust_remote_code), data, out_, config)
    if is_first():
        join_units(out_, join)
    ranks().wait()
    run_transfer(session, None if block < 0 else block)
    if is_first():
        _show(session.run)
        if session.run.stage_done("transfer"):
            out.print(f"\nFeature maps: {out_}. Next: lolcats finetune {out_}", soft_wrap=True)


@command
def finetune(directory: Directory, merge: Annotated[bool, typer.Option(help="Also write DIR/merged.")] = True,
             controls: Controls = False) -> None:  # fmt: skip
    """Stage 2 alone: LoRA, in a run directory that attention transfer has finished. Under torchrun sharded (FSDP2)."""
    from lolcats.config import Control
    from lolcats.pipeline import finish, resume, run_controls, run_finetune
    from lolcats.ranks import is_first

    session = resume(directory, controls=get_args(Control) if controls else ())
    run_controls(session)
    run_finetune(session)
    finish(session, merge)
    if is_first():
        _show(session.run)


@command
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Data for perplexity; with --tasks recall, positions: their text.")] = "",
    tasks: Annotated[str, typer.Option(help="Comma list: paper, recall, generate, positions, mmlu-permuted, or tasks "
                                            "of lm-eval. Without: perplexity on --data.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Local Parquet files instead of the hub's data sets.")] = None,
    baseline: Annotated[str, typer.Option(help="With --tasks, a comma list: window, window+sinks (both untrained), "
                                               "window+lora, teacher+lora (controls), linear-off, window-off, or "
                                               "linearized models.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many items of each task; 0: all.")] = 0,
    lengths: Annotated[str, typer.Option(help="Context lengths of recall and positions, e.g. 1024,8192.")] = "",
    batch_size: Annotated[int, typer.Option(help="Rows at a time; 0: transfer.micro_batch_size.")] = 0,
    device: Annotated[str, typer.Option(help="As --set device=.")] = "",
    dtype: Annotated[str, typer.Option(help="As --set dtype=.")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results of --tasks, items included.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and few-shot draws.")] = 1234,
    recipe: Annotated[str, typer.Option(help="Default: the run's own.")] = "",
    rows: Annotated[int, typer.Option(help="At most so many rows of data.sequence_length tokens; 0: all.")] = 0,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Perplexity on DATA of teacher, student, and the student with one branch off (on a run's own data: its test rows);
    or benchmarks of teacher and student, with --tasks."""
    from lolcats.config import load_config
    from lolcats.evaluation.suite import Options
    from lolcats.pipeline import device_and_dtype

    own = Path(model) / "config.yaml"
    changes = [f"{key}={value}" for key, value in (("device", device), ("dtype", dtype)) if value]
    config = load_config(recipe or (str(own) if own.is_file() else "default"), [*changes, *set_])
    place, batch_size = device_and_dtype(config), batch_size or config.transfer.micro_batch_size
    if tasks:
        options = Options(data_dir, data, _numbers(lengths), limit or None, batch_size, seed)
        if output and not output.parent.is_dir():
            raise LolcatsError(f"--output {output}: {output.parent} is no directory.")
        _benchmarks(model, _words(tasks), _words(baseline), place, options, output)
    elif data:
        _perplexity(model, data, config, rows, place, batch_size)
    else:
        raise LolcatsError("Nothing to evaluate: give --data (perplexity) or --tasks (benchmarks).")


@command
def report(directory: Directory) -> None:
    """Write DIR/report.html: curves, errors, attention maps, tables, samples."""
    from lolcats.pipeline import report as write_report

    out.print(f"Report: {write_report(directory)}", soft_wrap=True)


@command
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep's YAML file, e.g. of experiments/.", metavar="FILE")],
    model: Annotated[str, typer.Argument(help="As --set base.model=.", metavar="MODEL")] = "",
    data: Annotated[str, typer.Option(help="As --set base.data=.")] = "",
    out_: Annotated[Path, typer.Option("--out", help="Directory of results; one begun is continued.")] = Path("sweep"),
    set_: Sets = [],  # noqa: B006
    deadline: Annotated[float, typer.Option(help="Seconds after which no new row is begun; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the rows and their tokens.")] = False,
) -> None:  # fmt: skip
    """Run every row of FILE with every seed, and make one table of them. Run again to continue."""
    from lolcats.pipeline import log
    from lolcats.sweep.plan import plan, plan_rows, read_sweep

    given = [f"{key}={value}" for key, value in (("base.model", model), ("base.data", data)) if value]
    wanted = read_sweep(file, [*given, *set_])
    if dry_run:
        _print_rows(*plan_rows(plan(wanted)), title=wanted.title)
        return
    from lolcats.sweep.execute import TABLE, run_sweep

    run_sweep(wanted, out_, shlex.join(["lolcats", *sys.argv[1:]]), log, deadline or None)
    if (out_ / TABLE).exists():
        out.print((out_ / TABLE).read_text(), soft_wrap=True, markup=False, highlight=False)


@command
def generate(
    model: Model, prompt: Annotated[str, typer.Option(help="What to answer or continue.")],
    max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Answer one prompt, streaming."""
    from lolcats.config import load_config
    from lolcats.inference.generate import generate as run_generate

    loaded, tokenizer = _load(model, load_config("default", set_))
    run_generate(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, stream=True)


@command
def chat(model: Model, max_new_tokens: int = 512, temperature: float = 0.7, top_p: float = 0.9,
         system: str = "", set_: Sets = []) -> None:  # noqa: B006  # fmt: skip
    """Talk to a model in the terminal. An empty line, /exit or Ctrl-D ends; /new starts over."""
    from lolcats.config import load_config
    from lolcats.inference.generate import generate as run_generate

    loaded, tokenizer = _load(model, load_config("default", set_))
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text in ("", "/exit"):
            return
        if text == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        answer = run_generate(loaded, tokenizer, messages, max_new_tokens, temperature, top_p, stream=True)
        messages.append({"role": "assistant", "content": answer})


@command
def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16,
    context: Annotated[int, typer.Option(min=0, help="Most tokens of prompt and answer; 0: the model's own.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot; then 429.")] = 128,
    prefix_mb: Annotated[int, typer.Option(min=0, help="MiB for states of prompts' beginnings.")] = 256,
    deadline: Annotated[int, typer.Option(min=0, help="Seconds that running requests have after SIGTERM.")] = 30,
    state_dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of the sums in the states.")] = "float32",
    api_key: Annotated[str, typer.Option(envvar="LOLCATS_API_KEY", help="Clients must send it.")] = "",
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """An OpenAI-compatible server and a chat page for a linearized model."""
    try:
        from lolcats.inference import server
    except ImportError as error:
        raise LolcatsError(f"The server needs more packages ({error}): pip install 'lolcats[serve]'.") from None
    from lolcats.config import load_config
    from lolcats.inference.engine import Engine

    model, tokenizer = _load(str(directory), load_config("default", set_))
    engine = Engine(model, tokenizer, slots, prefix_bytes=prefix_mb << 20, state_dtype=_state_dtype(state_dtype))
    own = getattr(model.config.get_text_config(), "max_position_embeddings", 8192)
    limits = server.Limits(context or own, min(max_tokens, context or own), waiting=max_waiting)
    app_ = server.create_app(engine, directory.resolve().name, limits, api_key)
    out.print(f"{directory} on http://{host}:{port} ({slots} slots); Ctrl-C ends.", soft_wrap=True)
    server.serve(app_, host, port, deadline)


@command
def bench(
    model: Annotated[str, typer.Argument(help="A linearized model, or any base model.", metavar="[DIR|MODEL]")] = "",
    random: Annotated[str, typer.Option(help="Instead of MODEL, random weights: llama3-8b, smollm2-135m, tiny.")] = "",
    batches: Annotated[str, typer.Option(help="Comma list of batch sizes; max: the largest that fits.")] = "1,16,64",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=3, help="Tokens to generate for each.")] = 4096,
    peers: Annotated[str, typer.Option(help="Hugging Face's generate on the teacher, a comma list: sdpa, static "
                                            "(static cache, compiled); or empty.")] = "sdpa",
    peer_new: Annotated[int, typer.Option(min=3, help="Tokens that a peer generates.")] = 64,
    state_dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of the sums in the states.")] = "float32",
    runs: Annotated[int, typer.Option(min=1, help="Of each system, in turns; the median counts.")] = 1,
    deadline: Annotated[float, typer.Option(help="Seconds after which nothing begins; 0: none.")] = 0,
    bandwidth: Annotated[float, typer.Option(help="TB/s of the device's memory, for the bound.")] = 3.0,
    flops: Annotated[float, typer.Option(help="TFLOP/s of the device, for the bound.")] = 782,
    prefill_rows: Annotated[int, typer.Option(min=1, help="Prompts that are prefilled together.")] = 16,
    out_: Annotated[Path, typer.Option("--out", help="FILE.json that results are added to; .md, .png beside it.")]
        = Path("generation.json"),
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Tokens per second and memory by batch size: the engine beside Hugging Face's generate (the paper's Figure 8)."""
    from lolcats.config import load_config
    from lolcats.inference import bench as benchmarks
    from lolcats.pipeline import device_and_dtype
    from lolcats.report.generation import write

    config, unknown = load_config("default", set_), set(_words(peers)) - set(benchmarks.PEERS)
    if unknown or bool(model) == bool(random):
        raise LolcatsError(f"--peers: no {unknown.pop()!r}." if unknown else "Give a model or --random, one of them.")
    sizes = tuple(0 if word == "max" else _numbers(word, "--batches")[0] for word in _words(batches))
    options = benchmarks.Options(
        sizes, prompt, new, tuple(_words(peers)), peer_new, _state_dtype(state_dtype), runs, deadline or float("inf"),
        bandwidth * 1e12, flops * 1e12, prefill_rows,
    )  # fmt: skip
    if random:
        student = benchmarks.random_model(random, config.attention, *device_and_dtype(config))
    else:
        student = benchmarks.linearized(_load(model, config)[0], config.attention)
    table = write(out_, benchmarks.benchmark(student, options), shlex.join(["lolcats", *sys.argv[1:]]))
    out.print(table, soft_wrap=True, markup=False, highlight=False)


@command
def export(directory: Directory, out_: Out,
           merge: Annotated[bool, typer.Option("--merge", help="Fold LoRA into the weights.")] = False,
           dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: as trained.")] = "auto",
           ) -> None:  # fmt: skip
    """Write a self-contained model directory from an adapter."""
    from lolcats.modeling.checkpoint import load
    from lolcats.pipeline import export_merged

    if not merge:
        raise LolcatsError("The run directory is the adapter already: copy it, or pass --merge for a full model.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise LolcatsError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}.")
    if out_.exists() and any(out_.iterdir()):
        raise LolcatsError(f"{out_} is not empty; choose another --out.")
    export_merged(load(directory, dtype), _tokenizer(str(directory)), out_)
    out.print(f"Merged model: {out_}", soft_wrap=True)


@partial(command, group=data_app)
def stats(
    model: Model, data: DataPath,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to look at with the model.")] = 64,
    picture: Annotated[Path, typer.Option(help="PNG file for the histograms.")] = Path("data-stats.png"),
    recipe: Recipe = "default", set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Sizes, document lengths, and how far back MODEL's attention looks on DATA (effective sequence length)."""
    from lolcats.config import load_config
    from lolcats.data_stats import data_statistics
    from lolcats.pipeline import device_and_dtype

    if not picture.parent.is_dir():
        raise LolcatsError(f"--picture {picture}: {picture.parent} is no directory.")
    config = load_config(recipe, set_)
    found = data_statistics(model, data, config, *device_and_dtype(config), rows)
    facts = Table("", "", show_header=False)
    for name, value in found.facts.items():
        facts.add_row(name, value)
    out.print(facts)
    _print_rows(*found.rows(), title=Path(data).name)
    found.draw(picture)
    out.print(f"Histograms: {picture}", soft_wrap=True)


@command
def import_(
    base: Annotated[str, typer.Option(help="The base model: hub id, directory or .gguf file.")],
    transfer: Annotated[Path, typer.Option(help=".pt file with feature maps and window factors.")],
    out_: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    lora: Annotated[Path | None, typer.Option(help=".pt file with LoRA matrices.")] = None,
    recipe: Recipe = "paper", set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """An adapter from checkpoints of the paper's own code. What they do not say (window, α): --set attention...=."""
    from lolcats.config import load_config
    from lolcats.reference_import import import_reference

    import_reference(base, transfer, lora, out_, load_config(recipe, set_))
    out.print(f"Adapter: {out_}", soft_wrap=True)


@command
def info(model: Model) -> None:
    """What a linearized model is, or how a base model would be linearized."""
    from lolcats.modeling.info import describe

    table = Table(show_header=False)
    for name, value in describe(model).items():
        table.add_row(name, escape(str(value)))
    out.print(table)


@command
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, model directory, config.json, or llama-3-8b, llama-3.1-70b, "
                                              "llama-3.1-405b.", metavar="MODEL")],
    gpus: Annotated[int, typer.Option(help="All GPUs of the run.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Of each.")] = "80GiB",
    host_memory: Annotated[str, typer.Option(help="Of each node.")] = "128GiB",
    disk: Annotated[str, typer.Option(help="Free space of each node; default: not checked.")] = "",
    read_speed: Annotated[str, typer.Option(help="Reading of weights on each node.")] = "3GB/s",
    gpus_per_node: Annotated[int, typer.Option()] = 8,
    tokens: Annotated[str, typer.Option(help="Tokens of stage 1, all epochs together.")] = "20M",
    finetune_tokens: Annotated[str, typer.Option(help="Tokens of stage 2, all epochs together.")] = "40M",
    block_size: Annotated[int, typer.Option(help="Layers of a block; 0: as many as fit.")] = 0,
    recipe: Recipe = "default", set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Memory, disk and time of both stages from the model's configuration alone, and the commands to run."""
    from lolcats.config import load_config
    from lolcats.plan import Machine, Work, plan_finetune, plan_transfer, read_config, report, size_of

    read = report.parse_quantity
    machine = Machine(
        gpus, read(gpu_memory, "--gpu-memory"), read(host_memory, "--host-memory"), read(read_speed, "--read-speed"),
        read(disk or "1e30", "--disk"), gpus_per_node,
    )  # fmt: skip
    work = Work(read(tokens, "--tokens"), read(finetune_tokens, "--finetune-tokens"), block_size)
    config = load_config(recipe, set_)
    size = size_of(read_config(model), config)
    stages = [plans(size, config, machine, work) for plans in (plan_transfer, plan_finetune)]
    _print_rows(
        report.HEADER, report.plan_rows([*stages[0], *stages[1]]), title=report.title(model, size, machine, work)
    )
    out.print(report.paper_line(size, work, stages[0]), soft_wrap=True)
    chosen = [plan for plans in stages for plan in report.recommended(plans)]
    for best in chosen:
        _print_rows(("where", "part", "amount"), report.part_rows(best), f"{best.stage}, {best.schedule}")
    for line in report.commands(chosen, model, recipe, set_, machine):
        out.print(f"\n{line}", soft_wrap=True, markup=False, highlight=False)
    if refused := " ".join(filter(None, (report.refusal(p, size, config, machine, work) for p in stages))):
        raise LolcatsError(refused)


def _perplexity(model: str, data: str, config: Any, rows: int, place: tuple[Any, Any], batch_size: int) -> None:
    """The table of ``evaluate --data``."""
    from lolcats.evaluation.compare import compare, evaluation_rows
    from lolcats.report.table import controls_hint

    ids, positions = (
        x if x is None else x[: rows or None] for x in evaluation_rows(model, data, _tokenizer(model), config)
    )
    assert ids is not None
    table = Table("model", title=f"{ids.numel():,} tokens of {Path(data).name}")
    table.add_column("perplexity", justify="right", no_wrap=True)
    for name, value in compare(model, ids, *place, batch_size, positions).items():
        table.add_row(name, f"{value:.3f}")
    out.print(table)
    out.print(controls_hint(model))


def _benchmarks(
    model: str, tasks: list[str], baselines: list[str], place: tuple[Any, Any], options: Any, output: Path | None
) -> None:  # fmt: skip
    """The tables of ``evaluate --tasks``, and its JSON file."""
    from lolcats.evaluation.suite import evaluate as run_suite
    from lolcats.pipeline import log
    from lolcats.report.comparison import comparison_rows, depth_rows, write_comparison
    from lolcats.report.table import controls_hint

    scores = run_suite(model, tasks, baselines, *place, options, log)
    _print_rows(*comparison_rows(scores), title=f"{Path(model).name}: score ± standard error")
    for metric in ("exact", "argmax"):
        _print_rows(*depth_rows(scores, metric), title=f"Recall by depth: {metric}")
    out.print(controls_hint(model))
    if output:
        write_comparison(output, scores, model, tasks, baselines, place, options)
        out.print(f"Results: {output}", soft_wrap=True)


def _print_rows(header: tuple[str, ...], rows: list[tuple[str, ...]], title: str) -> None:
    """A table in a terminal, Markdown in a pipe or file; nothing without rows."""
    from lolcats.report.table import markdown

    if not rows:
        return
    if not out.is_terminal:
        out.print(f"\n{title}\n\n{markdown(header, rows)}", soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _state_dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "bfloat16"):
        raise LolcatsError(f"--state-dtype: expected float32 or bfloat16, got {name!r}.")
    return getattr(torch, name)


def _numbers(text: str, option: str = "--lengths") -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        numbers = (0,)
    if any(number <= 0 for number in numbers):
        raise LolcatsError(f"{option} {text}: expected positive numbers such as 1024,8192.")
    return numbers


def _load(model: str, config: Any) -> tuple[Any, Any]:
    """A linearized directory, or any base model, with its tokenizer."""
    from lolcats.modeling.base import find_base, load_model, load_tokenizer
    from lolcats.modeling.checkpoint import is_linearized, load
    from lolcats.pipeline import device_and_dtype

    device, dtype = device_and_dtype(config)
    trust = config.trust_remote_code
    if is_linearized(model):
        return load(model, dtype, device, trust), _tokenizer(model)
    base = find_base(model, trust)
    return load_model(base, dtype, device, trust), load_tokenizer(base, trust)


def _tokenizer(model: str) -> Any:
    from lolcats.modeling.base import find_base, load_tokenizer

    return load_tokenizer(find_base(model))


def _show(run: Any) -> None:
    """The tables that end a run."""
    from lolcats.report.table import memory_rows, perplexity_rows, remarks

    rows, length = run.record["data"]["test_rows"], run.config.data.sequence_length
    table = Table("model", title=f"Perplexity on {rows} × {length} held-out tokens")
    for name in ("perplexity", "against teacher"):
        table.add_column(name, justify="right")
    perplexities = perplexity_rows(run)  # none behind a stage 1 that brought layers in turn
    for row in perplexities:
        table.add_row(*row)
    if perplexities:
        out.print(table)
    for text in remarks(run):
        out.print(text)
    if sizes := memory_rows(run):
        table = Table("tokens", "teacher", "student", title="State per sequence")
        for row in sizes:
            table.add_row(*row)
        out.print(table)
    for who in ("teacher", "student"):
        if f"sample_{who}" in run.results:
            out.print(f"[bold]{who}[/bold]: {escape(run.results[f'sample_{who}'])}")


def _quiet() -> None:
    """Our own progress is enough: no loading bars or notes of transformers."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _disk_full(error: Exception, written: list[Path]) -> bool:
    """Whether ``error`` comes of a full disk. torch.save only reports that some write failed: look at the disk then."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return True
    writing = isinstance(error, (OSError, RuntimeError, SafetensorError))
    return writing and any(shutil.disk_usage(path).free < 1 << 20 for path in written if path.exists())


def _fail(message: str, code: int) -> None:
    err.print(f"[red]{escape(message)}[/red]", soft_wrap=True)
    sys.exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
