"""Shared by all commands: the Typer app, argument types, error handling and tables."""

from __future__ import annotations

import errno
import importlib.util
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from logging import getLogger
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from wrapt import register_post_import_hook

from lolcats.errors import Interrupted, LolcatsError, out_of_memory
from lolcats.version import __version__

app = typer.Typer(
    name="lolcats", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Turn pretrained softmax-attention language models into linear-attention ones.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Inspect training data.")
app.add_typer(data_app, name="data")
out, err = Console(), Console(stderr=True)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lolcats {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                          help="Show the version and exit.")] = False,
) -> None:  # fmt: skip
    """Options of the program itself."""


Model = Annotated[str, typer.Argument(help="Hub id, local model directory or .gguf file.", metavar="MODEL")]
Directory = Annotated[Path, typer.Argument(help="Run directory or linearized model.", metavar="DIR")]
RunDirectory = Annotated[Path, typer.Argument(help="Run directory.", metavar="DIR")]
DataPath = Annotated[str, typer.Option("--data", help="Hub data set id, a local .json, .jsonl, .parquet or .txt "
                                       "file, or a .yaml file that mixes several sources.")]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", file_okay=False,
                                    help="Output directory; an unfinished run in it is continued.")]  # fmt: skip
Recipe = Annotated[
    str, typer.Option(help="default, long, paper, paper-sinks, paper-70b, paper-405b, small, untrained or a YAML file.")
]
Sets = Annotated[list[str], typer.Option("--set", help="Change a setting, e.g. transfer.learning_rate=1e-3. "
                                         "Repeatable.")]  # fmt: skip

ChosenHeads = Annotated[Path | None, typer.Option("--selection", help="Keep the heads in this file, made by lolcats "
                                                  "select, as softmax attention.")]  # fmt: skip
Controls = Annotated[bool, typer.Option("--controls", help="Also train two controls, each with its own LoRA of the "
                                        "same settings and data: window and sinks without the linear term, and the "
                                        "softmax teacher.")]  # fmt: skip
MovedBase = Annotated[str, typer.Option("--base", help="Where the base model of an adapter is now, if it has moved: "
                                        "hub id, directory or .gguf file.")]  # fmt: skip
Quantized = Annotated[str, typer.Option("--quantize", help="nf4: load the weights of linear layers in 4 bits "
                                        "(bitsandbytes). LoRA stays beside them.", metavar="nf4")]  # fmt: skip
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model. "
                                     "Not remembered: each command needs it.")]  # fmt: skip


NO_MEMORY = (
    "Out of memory. To train, lower transfer.micro_batch_size and finetune.micro_batch_size (the batch size stays the "
    "same), shorten rows (data.sequence_length), or use --set finetune.gradient_checkpointing=true. To evaluate, lower "
    "--batch-size; to serve, lower --slots."
)
CONTINUED = ("linearize", "transfer", "finetune", "sweep", "distill-data")
"""Commands that keep what they have finished, and go on from it when they are run again."""


def command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Register a command that reports user errors in one sentence, without a traceback.

    A command checks its options first and then imports what it needs: importing torch takes seconds.
    """

    name = function.__name__.removesuffix("_").replace("_", "-")
    kept = " Finished work is saved" if name in CONTINUED else ""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet()
            _check_finite(kwargs)
            function(*args, **kwargs)
        except Interrupted as error:
            _fail(f"{error} Run the same command again to continue.", 130)
        except KeyboardInterrupt:
            _fail(f"Stopped.{kept and kept + '; run the same command again to continue.'}", 130)
        except LolcatsError as error:
            _fail(str(error), 2)
        except Exception as error:
            if out_of_memory(error):
                _fail(NO_MEMORY + (kept and kept + "."), 2)
            if not _disk_full(error, [path for path in kwargs.values() if isinstance(path, Path)]):
                raise
            again = " to continue where it stopped" if kept else ""
            _fail(f"The disk is full. Free some space and run the same command again{again}.", 2)

    return group.command(name)(guarded)


def _check_finite(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise LolcatsError(f"--{name.strip('_').replace('_', '-')}: expected a finite number, got {value}.")


def _quiet() -> None:
    """Silence the progress bars and notes of transformers: lolcats reports its own progress."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    getLogger("bitsandbytes").setLevel("ERROR")  # warns about a package that nothing here needs
    register_post_import_hook(_silence, "transformers.utils.logging")  # not every command needs transformers


def _silence(logging: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _disk_full(error: Exception, written: list[Path]) -> bool:
    """Whether a full disk caused ``error``. torch.save only reports a failed write: then check the free space."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return True
    writing = isinstance(error, (OSError, RuntimeError, SafetensorError))
    return writing and any(shutil.disk_usage(path).free < 1 << 20 for path in written if path.exists())


def _fail(message: str, code: int) -> None:
    err.print(f"[red]{escape(message)}[/red]", soft_wrap=True)
    sys.exit(code)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """For commands that write to ``directory``: refuse it if it cannot be written to, or if another process does so.
    Readers do not wait."""
    from lolcats.files import check_directory, only_writer
    from lolcats.ranks import is_first, ranks

    check_directory(directory)
    with only_writer(directory) if is_first() else nullcontext(True) as ours:
        if not ranks().shared(ours):
            raise LolcatsError(
                f"{directory} is in use by another lolcats process that writes to it. Wait until it has finished, or "
                "choose another directory."
            )
        yield


def print_rows(header: tuple[str, ...], rows: list[tuple[str, ...]], title: str) -> None:
    """Print a table: rich in a terminal, Markdown in a pipe or file; print nothing if there are no rows."""
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


def check_picture(path: Path, option: str = "--picture") -> None:
    """Raise LolcatsError if no picture can be written to ``path``."""
    from lolcats.files import check_file

    if importlib.util.find_spec("matplotlib"):
        from matplotlib.backend_bases import FigureCanvasBase

        known = sorted(FigureCanvasBase.get_supported_filetypes())
        if path.suffix.lower().removeprefix(".") not in known:
            raise LolcatsError(f"{option} {path}: expected a file that ends in .{', .'.join(known)}.")
    check_file(path, option)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, option: str = "--lengths") -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        numbers = (0,)
    if any(number <= 0 for number in numbers):
        raise LolcatsError(f"{option} {text}: expected positive numbers such as 1024,8192.")
    return numbers


def quantization(option: str) -> Any:
    """What --quantize asks for."""
    if option not in ("", "none", "nf4"):
        raise LolcatsError(f"--quantize {option}: expected nf4.")
    return option or "none"


def load_any(model: str, config: Any, moved: str = "", quantize: Any = "none") -> tuple[Any, Any]:
    """Load a linearized model or any base model, and its tokenizer. ``moved``: where an adapter's base is now."""
    from lolcats.modeling.checkpoint import load
    from lolcats.modeling.record import is_linearized
    from lolcats.pipeline import device_and_dtype
    from lolcats.weights.base import find_base, load_model, load_tokenizer

    device, dtype = device_and_dtype(config)
    trust = config.trust_remote_code
    if is_linearized(model):
        return load(model, dtype, device, trust, moved, quantize), tokenizer_of(model, trust)
    if moved:
        raise LolcatsError(f"{model} is not an adapter: it needs no --base.")
    base = find_base(model, trust)
    return load_model(base, dtype, device, trust, quantize), load_tokenizer(base, trust)


def tokenizer_of(model: str, trust: bool = False) -> Any:
    from lolcats.weights.base import find_base, load_tokenizer

    return load_tokenizer(find_base(model), trust)


PLAIN = "paper-sinks"
"""The recipe of commands that train nothing: device, dtype, and rows of 1,024 tokens."""


def settings(recipe: str, changes: list[str], trust: bool) -> Any:
    """The configuration, with this command's consent to run the base model's code."""
    from lolcats.config import load_config

    return replace(load_config(recipe, changes), trust_remote_code=trust)


def curve_table(selection: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Header, rows and title of a selection of heads, for :func:`print_rows`."""
    from lolcats.report.curve import HEADER, curve_rows, curve_title

    return HEADER, curve_rows(selection), curve_title(selection)


def show_run(run: Any) -> None:
    """Print the tables at the end of a run."""
    from lolcats.report.table import memory_rows, model_table, remarks

    rows, length = run.record["data"]["test_rows"], run.config.data.sequence_length
    header, measured = model_table(run)  # no rows after a stage 1 that trained layers in turn
    table = Table(header[0], title=f"Perplexity on {rows} × {length} held-out tokens")
    for name in header[1:]:
        table.add_column("\n".join(wrap(name, 10)), justify="right")  # narrow, so that the first column is not
    for row in measured:
        table.add_row(*row)
    if measured:
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
