"""Which heads to keep, nothing trained: the search, controls beside it, and what each choice finds in long prompts.

    python benchmarks/selection.py MODEL --text BOOK.txt [--heads 7,8,14] [--lengths 1024,4096,8192] [--answers 200]
        [--tasks passkey,needle,multi-query] [--random 5] [--rows teacher,found,none,controls,random] [--minutes 9]
        [--gsm8k 320 --data-dir DIR]
        [--set attention.window_size=256] [--selection FILE] [--name NAME] [--out results]
    python benchmarks/selection.py --shape llama3-8b --heads 32   # only the time of a search, with random weights

Searches once, up to the largest number of heads, or takes the curve of a file of ``lolcats select``, and measures the
set of every number that is asked for. At the first
number also these controls: whole layers chosen alike, the heads with the steepest slopes when none is kept, the heads
whose loss in the teacher costs most (*single drop*), and random sets. *Loss* is the search's own objective on its own
prompts, *held out* the same on others. Heads that are not kept have 4 sinks and the default window, unless --set says
otherwise. MODEL is as ``lolcats select`` takes it. Rows that do not fit into --minutes are left out, and the table says
so.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from transformers import PreTrainedModel

import lolcats
from lolcats.config import AttentionConfig, load_config
from lolcats.data.inputs import Inputs
from lolcats.evaluation.recall import BEYOND, sight
from lolcats.evaluation.scores import Score
from lolcats.evaluation.suite import Options, prepare
from lolcats.lab.bench import SHAPES, random_model
from lolcats.modeling.layer import linearized_layers
from lolcats.pipeline import device_and_dtype
from lolcats.selection.prompts import Scored, prompts
from lolcats.selection.result import Selection, by_layer
from lolcats.selection.scorer import Scorer
from lolcats.selection.search import Head, grow, units_of
from lolcats.selection.select import PASS, Settings, check_lengths, fitting_scorer, prompt_plan, search, trial_attention
from lolcats.stages.distributed import own_device
from lolcats.weights.base import Base

ROWS = {"cuda": 64, "cpu": 8}
"""Rows of 1,024 tokens in a batch of an evaluation."""
LIMIT = 50
"""Answers in a cell of a random set."""
PARTS = ["teacher", "found", "none", "controls", "random"]
"""Rows of the table: the teacher, the search's sets, no heads, other ways to choose, and random sets."""
ANSWER = 40
"""Answer tokens of a random prompt."""


@dataclass
class Row:
    """Heads to keep (None: all), how they were chosen, and the seconds that took."""

    how: str
    heads: list[Head] | None
    seconds: float | None = None
    control: bool = False


@dataclass
class Bench:
    """A model under trial: scorers of the search's prompts and of others, and the tasks."""

    inputs: Inputs
    attention: AttentionConfig
    dtype: torch.dtype
    device: torch.device
    scorer: Scorer
    held: Scorer
    width: int

    @property
    def bytes_per_head(self) -> int:
        geometry = linearized_layers(self.scorer.model)[0].geometry
        return (geometry.head_dim + geometry.value_dim) * self.dtype.itemsize

    def kept(self, heads: list[Head] | None) -> PreTrainedModel:
        """A copy of the model in which only these heads are softmax attention."""
        model = self.inputs.model(self.dtype, self.device).eval()
        if heads is None:  # in a form that the engine generates with
            return lolcats.convert(model, AttentionConfig(kind="softmax")).eval()
        changes = {**vars(trial_attention(self.attention)), "softmax_heads": by_layer(heads)}
        return lolcats.convert(model, AttentionConfig(**changes)).eval()


def start(arguments: argparse.Namespace) -> tuple[Bench, dict[str, float]]:
    config = load_config("paper-sinks", ["attention.sinks=4", *arguments.set])
    device, dtype = device_and_dtype(config)
    began = time.time()
    inputs = Inputs(arguments.model, keep=True)
    model = inputs.model(dtype, device)
    loaded = time.time()
    lolcats.convert(model, trial_attention(config.attention))
    plan = prompt_plan(check_lengths(arguments.search_lengths, model))
    asked = [prompts(inputs.tokenizer, plan, f"0/{part}") for part in ("search", "check")]
    written, tokens = time.time(), PASS.get(device.type, PASS["cpu"])
    bench = Bench(inputs, config.attention, dtype, device, *(Scorer(model, each, tokens) for each in asked),
                  Settings().width)  # fmt: skip
    seconds = {"loading": loaded - began, "prompts": written - loaded, "teacher": time.time() - written}
    return bench, seconds


def timed(shape: str, count: int, lengths: Sequence[int]) -> dict[str, Any]:
    """How long it takes to choose ``count`` heads with random weights and random prompts of the usual sizes. Under
    torchrun, the ranks share the work."""
    config = load_config("paper-sinks", ["attention.sinks=4"])
    device, dtype = device_and_dtype(config)
    device = own_device(device)
    model = random_model(shape, trial_attention(config.attention), device, dtype)
    draw, plan = random.Random(0), prompt_plan(lengths)
    asked = [Scored(kind, [draw.randrange(SHAPES[shape]["vocab_size"]) for _ in range(n)], [(n - ANSWER, n)])
             for kind, n in plan]  # fmt: skip
    began = time.time()
    scorer = fitting_scorer(partial(Scorer, model), asked, device)
    scorer.losses([[head] for head in scorer.heads[: scorer.ranks.size]])  # compiles what is not compiled yet
    scorer.passes = 0.0
    scorer.ranks.wait()
    prepared = time.time()
    trail = search(scorer, count, Settings(), lambda line: print(f"{time.time() - prepared:.1f} s: {line}", flush=True))
    return {
        "shape": shape, "heads": f"{count} of {len(scorer.heads)}", "tokens": scorer.tokens, "passes": scorer.passes,
        "chosen": by_layer(trail[-1].heads), "loss": trail[-1].loss,
        "teacher_seconds": prepared - began, "search_seconds": time.time() - prepared,
        "peak_gib": common.peak_gib(device), "device": common.hardware(device), "torch": torch.__version__,
    }  # fmt: skip


def found(bench: Bench, counts: Sequence[int]) -> Iterator[Row]:
    """The search's sets. The seconds of each are those since the search began."""
    began, times = time.time(), dict[int, float]()

    def say(line: str) -> None:
        print(line, flush=True)
        times[int(line.split()[0])] = time.time() - began

    for trail in search(bench.scorer, max(counts), Settings(width=bench.width), say):
        if (count := len(trail.heads)) in counts:
            yield Row("one by one", trail.heads, times[count])


def from_file(path: Path, counts: Sequence[int], base: Base) -> list[Row]:
    """The sets of a selection's curve that have one of these numbers of heads."""
    selection = Selection.read(path)
    selection.check(base, path)
    sets = {point.count: point.heads for point in selection.curve}
    if missing := [count for count in counts if count not in sets]:
        sys.exit(f"{path} has no set of {missing[0]} heads. Numbers it has: {', '.join(map(str, sets))}.")
    return [
        Row("one by one", [(int(layer), head) for layer, heads in sets[count].items() for head in heads])
        for count in counts
    ]


def controls(bench: Bench, count: int) -> Iterator[Row]:
    """Other ways to choose ``count`` heads."""
    scorer, heads = bench.scorer, bench.scorer.heads
    size = len(heads) // len({layer for layer, _ in heads})
    if count >= size:
        began = time.time()
        layers = grow(scorer, [], units_of(scorer, by_layer=True), count // size, bench.width, lambda _: None)
        yield Row("whole layers", layers[-1].heads, time.time() - began, True)
    began = time.time()
    _, slopes = scorer.slopes({})
    yield Row("steepest slopes", sorted(sorted(heads, key=slopes.__getitem__)[:count]), time.time() - began, True)
    began = time.time()
    scorer.move_to(heads)
    missed = {gone: scorer.loss([head for head in heads if head != gone]) for gone in heads}
    costly = sorted(heads, key=missed.__getitem__, reverse=True)[:count]
    yield Row("single drop", sorted(costly), time.time() - began, True)


def random_sets(bench: Bench, count: int, sets: int) -> Iterator[Row]:
    for seed in range(sets):
        yield Row(f"random {seed}", sorted(random.Random(seed).sample(bench.scorer.heads, count)), None, True)


def tasks(arguments: argparse.Namespace, bench: Bench, answers: int, gsm8k: int) -> list[Any]:
    """Functions from a model to its scores."""
    seen = sight(trial_attention(bench.attention))
    rows = ROWS.get(bench.device.type, ROWS["cpu"])
    options = Options(arguments.data_dir, str(arguments.text), arguments.lengths, answers, rows, seen=seen)
    prepared = list(prepare([f"recall-{kind}" for kind in arguments.tasks], options, bench.inputs.tokenizer).values())
    if gsm8k:
        generate = Options(arguments.data_dir, limit=gsm8k)
        prepared += prepare(["generate"], generate, bench.inputs.tokenizer).values()
    return prepared


def measure(bench: Bench, row: Row, run: Sequence[Callable[[PreTrainedModel], list[Score]]]) -> dict[str, Any]:
    began, heads = time.time(), bench.scorer.heads if row.heads is None else row.heads
    losses = {"loss": bench.scorer.loss(heads), "held": bench.held.loss(heads)}
    model = bench.kept(row.heads)
    scores = [score for task in run for score in task(model)]
    del model
    common.free(bench.device)
    return {
        "how": row.how, "count": len(heads), "heads": by_layer(heads), "seconds": row.seconds, **losses,
        "held_exact": bench.held.exact(row.heads), "bytes_per_token": len(heads) * bench.bytes_per_head,
        "measuring": time.time() - began,
        "scores": {f"{s.task} {s.metric}": [s.value, s.stderr, sum(map(len, s.items))] for s in scores},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    lengths, kinds = results["lengths"], results["tasks"]
    columns = [*(f"{kind} {' / '.join(f'{n:,}' for n in lengths)}" for kind in kinds)]
    gsm8k = next((key for row in results["rows"] for key in row["scores"] if "strict" in key), "")
    head = ["heads", "chosen", "loss / held out", *columns, *(["GSM8K, strict"] if gsm8k else []), "KiB a token", "s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        cells = [[_cell(row, f"{kind}@{n} {BEYOND}") for n in lengths] for kind in kinds]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        values = [
            str(row["count"]), row["how"], f"{row['loss']:.3f} / {row['held']:.3f}", *map(" / ".join, cells),
            *([_cell(row, gsm8k)] if gsm8k else []), f"{row['bytes_per_token'] / 1024:.1f}", seconds,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    missing = results["missing"]
    note = f"\nNot measured for lack of time: {', '.join(missing)}.\n" if missing else ""
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items())
    return (
        f"# Heads to keep: {results['name']}\n\n`{results['command']}`, {results['device']}, torch {results['torch']}, "
        f"{results['date']}{results.get('note', '')}. "
        f"One score is {results['tokens']:,} tokens; {spent}. Percent of answers beyond the window all of whose tokens "
        "are the most likely ones, ± standard error; *s*: seconds of the search up to this row.\n\n"
        + "\n".join(lines) + "\n" + note
    )  # fmt: skip


def _cell(row: dict[str, Any], key: str) -> str:
    value, error, _ = row["scores"].get(key, (None, None, 0))
    return "–" if value is None else f"{100 * value:.0f}" + (f" ± {100 * error:.0f}" if error is not None else "")


def arguments_of(argv: list[str]) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, help="long text to hide answers in")
    parser.add_argument("--shape", choices=list(SHAPES), help="only time a search, with random weights of this shape")
    parser.add_argument("--heads", type=numbers, default=(7, 8, 14), help="numbers of heads (default: 7,8,14)")
    parser.add_argument("--lengths", type=numbers, default=(1024, 4096, 8192), help="of the prompts that are measured")
    parser.add_argument("--search-lengths", type=numbers, default=Settings().lengths, help="of the search's prompts")
    parser.add_argument("--answers", type=int, default=200, help="in a cell (default: 200)")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=["passkey", "needle", "multi-query"])
    parser.add_argument("--random", type=int, default=5, help="random sets (default: 5)")
    parser.add_argument("--selection", type=Path, help="of lolcats select: its sets, instead of a search")
    parser.add_argument(
        "--rows", type=lambda text: text.split(","), default=PARTS, help=f"of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument("--gsm8k", type=int, default=0, help="questions of GSM8K, 5 shots (default: none)")
    parser.add_argument("--set", action="append", default=[], help="a setting, as lolcats takes it")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k_train.parquet and gsm8k_test.parquet")
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after that time (default: 60)")
    parser.add_argument("--name", help="of the model, in the table (default: MODEL)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder (default: results)")
    arguments = parser.parse_args(argv)
    if not arguments.shape and not (arguments.model and arguments.text):
        parser.error("give MODEL and --text, or --shape")
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    arguments = arguments_of(argv)
    if arguments.shape:
        results = timed(arguments.shape, max(arguments.heads), arguments.search_lengths)
        print(results)
        return results
    end = time.time() + 60 * arguments.minutes
    name = arguments.name or Path(arguments.model).stem
    bench, seconds = start(arguments)
    results = {
        "name": name, "command": shlex.join(["python", "benchmarks/selection.py", *(Path(x).name for x in argv)]),
        "device": common.hardware(bench.device), "torch": torch.__version__, "date": str(date.today()),
        "tokens": bench.scorer.tokens,
        "lengths": list(arguments.lengths), "tasks": arguments.tasks, "seconds": seconds, "rows": [], "missing": [],
    }  # fmt: skip
    full = tasks(arguments, bench, arguments.answers, arguments.gsm8k)
    few = tasks(arguments, bench, min(LIMIT, arguments.answers), 0)
    print("Searching", flush=True)
    chosen = (
        from_file(arguments.selection, arguments.heads, bench.inputs.base)
        if arguments.selection
        else list(found(bench, arguments.heads))
    )
    print("The search has ended.", flush=True)
    parts: dict[str, Iterable[Row]] = {
        "teacher": [Row("all: the teacher", None)], "found": list(reversed(chosen)), "none": [Row("none", [])],
        "controls": controls(bench, arguments.heads[0]),
        "random": random_sets(bench, arguments.heads[0], arguments.random),
    }  # fmt: skip
    for row in itertools.chain.from_iterable(parts[name] for name in PARTS if name in arguments.rows):
        if time.time() > end:
            results["missing"].append(row.how)
        else:
            results["rows"].append(measure(bench, row, few if row.control else full))
            print(results["rows"][-1], flush=True)
        common.write(results, table(results), arguments.out, f"selection-{name}")
    return results


if __name__ == "__main__":
    main()
