"""Optimizer steps of both stages, this build against another commit and against PEFT, on small and larger Llamas.

    python benchmarks/training_steps.py --against COMMIT --only "1.5B"     # rows whose name matches; the others stay
    python benchmarks/training_steps.py --only "stage 1"                   # without another build
    python benchmarks/training_steps.py --against COMMIT --losses          # the losses of 50 steps instead of times

Every measurement is a process of its own that trains through the public functions of its build; builds take turns.
Times are between the ends of optimizer steps, on the GPU, without waiting for it. The other commit is checked out into
a temporary worktree. A row that would begin less than a minute before --deadline is left for another call.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
NAME = "training_steps"
SIZES = {  # fields of training.Geometry
    "0.5B": {"layers": 24, "heads": 14, "kv_heads": 2, "head_dim": 64, "intermediate": 4864, "vocabulary": 151936},
    "1.5B": {"layers": 28, "heads": 12, "kv_heads": 2, "intermediate": 8960, "vocabulary": 151936},
    "8B": {},
    "tiny": {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 96, "vocabulary": 320},
}
EAGER, GRAPH = "transfer.cuda_graph=false", "finetune.cuda_graph=true"  # older builds do not know them, and are eager
WARM, LOSSES = 4, 50
MARGIN = 60


@dataclass(frozen=True)
class Row:
    """What a process trains. stage: ``transfer``, ``finetune`` or ``peft`` (PEFT and transformers' Trainer without us).

    settings: of this build; ``then``: of the other one, None if it has no such row. The rest is of paper-sinks.
    """

    size: str
    stage: str
    settings: tuple[str, ...] = ()
    then: tuple[str, ...] | None = ()
    softmax: bool = False
    length: int = 1024
    batch: int = 8


def of_both(size: str, stage: str, *settings: str, **more: Any) -> Row:
    return Row(size, stage, settings, settings, **more)


def rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for size in ("1.5B", "0.5B", "8B"):
        every = f"finetune.micro_batch_size={8 if size != '8B' else 4}"
        at_once = every.rpartition("=")[2]
        found |= {
            f"{size}, stage 1": Row(size, "transfer", (EAGER,)),
            f"{size}, stage 1, CUDA graph": Row(size, "transfer", ("transfer.cuda_graph=true",)),
            f"{size}, stage 2": Row(size, "finetune"),
            f"{size}, stage 2, CUDA graph": Row(size, "finetune", (GRAPH,)),
            f"{size}, stage 2, {at_once} rows at once": of_both(size, "finetune", every),
            f"{size}, stage 2, {at_once} rows at once, CUDA graph": Row(size, "finetune", (every, GRAPH), (every,)),
            f"{size}, stage 2, softmax attention": of_both(size, "finetune", every, softmax=True),
            f"{size}, PEFT and Trainer, {at_once} rows at once": Row(size, "peft", (every,), None),
            f"{size}, PEFT and Trainer, 4 rows at once": Row(size, "peft", ("finetune.micro_batch_size=4",), None),
        }
        unrotated = "attention.feature_inputs=unrotated"
        found[f"{size}, stage 1, maps before RoPE"] = Row(size, "transfer", (unrotated, EAGER), (unrotated,))
        found[f"{size}, stage 2, maps before RoPE"] = of_both(size, "finetune", unrotated)
        found[f"{size}, stage 2, maps before RoPE, CUDA graph"] = Row(
            size, "finetune", (unrotated, GRAPH), (unrotated,)
        )
        kl = "finetune.loss=kl"  # against 7f1bade, or later
        found[f"{size}, stage 2, KL"] = of_both(size, "finetune", kl)
        found[f"{size}, stage 2, KL, CUDA graph"] = Row(size, "finetune", (kl, GRAPH), (kl,))
    for length in (4096, 8192):
        one, shape = "finetune.micro_batch_size=1", {"length": length, "batch": 8192 // length}
        found[f"8B, stage 2, rows of {length:,}"] = of_both("8B", "finetune", one, **shape)
        found[f"8B, stage 2, rows of {length:,}, softmax attention"] = of_both(
            "8B", "finetune", one, softmax=True, **shape
        )
    return found


def tiny_rows() -> dict[str, Row]:
    small = {"length": 128, "batch": 4}
    return {
        "tiny, stage 1": Row("tiny", "transfer", **small), "tiny, stage 2": Row("tiny", "finetune", **small),
        "tiny, stage 2, softmax attention": of_both("tiny", "finetune", softmax=True, **small),
        "tiny, PEFT and Trainer": Row("tiny", "peft", ("finetune.micro_batch_size=4",), None, **small),
    }  # fmt: skip


@dataclass
class Clock:
    """Times between the ends of steps, and what the GPU was busy with in the last one."""

    device: torch.device
    steps: int
    ends: list[Any] = field(default_factory=list)
    busy: float | None = None
    peak: float | None = None
    profiler: Any = None

    def tick(self) -> None:
        """Call at the end of each optimizer step."""
        if self.device.type == "cuda":
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())
        if len(self.ends) == WARM:
            common.reset_peak(self.device)
        if len(self.ends) == WARM + self.steps and self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = common.peak_gib(self.device)
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        if len(self.ends) == WARM + self.steps + 1 and self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            self.busy = sum(event.self_device_time_total for event in self.profiler.key_averages()) / 1e3

    def seconds(self) -> list[float]:
        measured = self.ends[WARM - 1 : WARM + self.steps]
        pairs = itertools.pairwise(measured)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


class Warnings(logging.Handler):
    """What lolcats warned of: a graph that could not be recorded, for example."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def work(row: Row, steps: int, losses: bool) -> dict[str, Any]:
    """Train in this process, whose lolcats is the build to measure."""
    from training import Geometry, build

    import lolcats

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = replace(Geometry(), **SIZES[row.size], length=row.length)
    model = build(geometry, device)
    if row.size == "tiny" and device.type == "cpu":
        model = model.float()
    torch.manual_seed(1)
    data = torch.randint(geometry.vocabulary, ((WARM + steps + 1) * row.batch, row.length))
    clock, warnings = Clock(device, steps), Warnings()
    logging.getLogger("lolcats").addHandler(warnings)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        train = {"transfer": train_lolcats, "finetune": train_lolcats, "peft": train_peft}[row.stage]
        history = train(model, data, row, clock, Path(directory), losses)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "build": str(Path(lolcats.__file__).parents[2]), "seconds": clock.seconds(), "tokens": row.batch * row.length,
        "peak_gib": clock.peak, "busy_ms": clock.busy, "total_seconds": time.perf_counter() - started,
        "losses": history, "warnings": warnings.said, "device": common.hardware(device),
        "versions": common.installed("torch", "transformers", "peft", "triton", "liger-kernel"),
    }  # fmt: skip


def train_lolcats(
    model: Any, data: Tensor, row: Row, clock: Clock, directory: Path, losses: bool
) -> list[float]:  # fmt: skip
    """Through ``transfer`` or ``finetune`` of the build, with a clock at the end of each optimizer step."""
    import lolcats
    from lolcats.config import load_config
    from lolcats.data.rows import Data
    from lolcats.modeling.layer import override
    from lolcats.stages.finetune.stage import finetune
    from lolcats.stages.finetune.trainer import WatchSteps
    from lolcats.stages.transfer.loop import LayerTrainer
    from lolcats.stages.transfer.stage import transfer

    never, name, steps = 10**6, row.stage, len(data) // row.batch
    config = load_config("paper-sinks", [
        f"data.sequence_length={row.length}", f"{name}.batch_size={row.batch}", f"{name}.max_steps={steps}",
        f"{name}.eval_steps={never}", f"{name}.save_steps={never}", f"{name}.log_steps={1 if losses else never}",
        *row.settings,
    ])  # fmt: skip
    if row.size == "tiny":
        config = replace(config, attention=replace(config.attention, feature_dim=16, window_size=16))
    model = lolcats.convert(model, config.attention)
    rows = Data(data, data[:1], data[:1], "benchmark", {})
    owner, method = (WatchSteps, "on_step_end") if name == "finetune" else (LayerTrainer, "_end_step")
    own: Callable[..., Any] = getattr(owner, method)

    def end(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        clock.tick()
        return found

    setattr(owner, method, end)
    with override(model, mode="teacher") if row.softmax else contextlib.nullcontext():
        result = (
            transfer(model, rows, config, directory)
            if name == "transfer"
            else finetune(model, rows, config, directory)[1]
        )
    return [entry["loss"] for entry in result.history if "loss" in entry]


def train_peft(model: Any, data: Tensor, row: Row, clock: Clock, directory: Path, losses: bool) -> list[float]:
    """LoRA on the same model without lolcats: PEFT, transformers' Trainer, and liger-kernel if installed."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    micro = int(row.settings[0].rpartition("=")[2])
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=micro, gradient_accumulation_steps=row.batch // micro,
        max_steps=len(data) // row.batch, learning_rate=1e-4, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1 if losses else 10**6, use_liger_kernel=bool(common.installed("liger-kernel")["liger-kernel"]),
        use_cpu=clock.device.type == "cpu",
    )  # fmt: skip
    items = [{"input_ids": ids, "labels": ids} for ids in data]
    trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=items, callbacks=[Ticks()])  # type: ignore[arg-type]
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(row: Row, source: Path, steps: int, losses: bool) -> dict[str, Any]:
    """:func:`work` in a process whose lolcats is that of ``source``."""
    path = os.pathsep.join([str(source / "src"), str(Path(__file__).parent)])
    command = [sys.executable, __file__, "--work", json.dumps(asdict(row)), "--steps", str(steps)]
    done = subprocess.run(
        [*command, *(["--losses"] if losses else [])], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        wrong = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"missing": "out of memory" if "OutOfMemory" in done.stderr else wrong[0][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    build = found.pop("build")
    assert Path(build) == source.resolve(), f"{build} was measured instead of {source}"
    return found


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path | None]:
    """A worktree of the commit; None without one. A directory is taken as it is."""
    if not commit or Path(commit).is_dir():
        yield Path(commit).resolve() if commit else None
        return
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory).resolve() / "other"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], check=True)


def commit() -> str:
    """Of this build; empty outside a repository."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


def compare(row: Row, other: Path | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both builds in turns, as often as asked."""
    steps = LOSSES - WARM - 1 if arguments.losses else arguments.steps
    against = "" if row.then is None else Path(arguments.against).name
    facts = {"date": str(date.today()), "commit": arguments.commit or commit(), "against": against}
    found: dict[str, Any] = {**facts, "this": [], "other": []}
    for _ in range(1 if arguments.losses else arguments.turns):
        if other is not None and row.then is not None:
            found["other"].append(measured(replace(row, settings=row.then), other, steps, arguments.losses))
        found["this"].append(measured(row, ROOT, steps, arguments.losses))
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    name = f"{NAME}_losses" if arguments.losses else NAME
    deadline = time.monotonic() + arguments.deadline - MARGIN
    known = common.read(arguments.out, name) if (arguments.out / f"{name}.json").exists() else {"rows": {}}
    results: dict[str, Any] = {"rows": known["rows"]}
    with checked_out(arguments.against) as other:
        for title, row in (tiny_rows() if arguments.tiny else rows()).items():
            if not re.search(arguments.only, title):
                continue
            if time.monotonic() > deadline:
                print(f"No time left for: {title}", file=sys.stderr)
                continue
            results["rows"][title] = compare(row, other, arguments)
            print(title, json.dumps(results["rows"][title])[:300], file=sys.stderr, flush=True)
            common.write(results, report(results), arguments.out, name)
    return results


def report(results: dict[str, Any]) -> str:
    """A table of medians over all steps, and the least and greatest median of a process."""
    first = next((x for row in results["rows"].values() for x in row["this"] if "device" in x), None)
    where = f"{first['device']}, bf16; {common.listed(first['versions'])}" if first else "nothing measured"
    lines = [
        "# Steps of training", "",
        f"`python benchmarks/training_steps.py`, {where}. Llamas with random weights, 8,192 tokens a step, recipe "
        "paper-sinks. Milliseconds between the ends of optimizer steps: medians of all steps, in brackets the least "
        "and the greatest median of a process. Builds took turns. *Busy*: the time that kernels of one step take. "
        "*All*: seconds of the whole run, compiling included.", "",
        "| row | this build | its commit | other build | its commit | ratio | tokens/s | busy ms "
        "| peak GiB, this / other | all s |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [_line(title, row) for title, row in results["rows"].items()]
    warned = {
        text: title for title, row in results["rows"].items() for x in row["this"] for text in x.get("warnings", ())
    }
    lines += ["", *(f"{title} warned: {text}" for text, title in warned.items())] if warned else []
    if any(x.get("losses") for row in results["rows"].values() for x in row["this"]):
        lines += ["", "| row | build | losses |", "|---|---|---|"]
        lines += [
            f"| {title} | {build} | {', '.join(f'{x:.4f}' for x in one['losses'])} |"
            for title, row in results["rows"].items()
            for build in ("this", "other")
            for one in row[build][:1]
            if one.get("losses")
        ]
    return "\n".join(lines) + "\n"


def _line(title: str, row: dict[str, Any]) -> str:
    this, other = row["this"], row["other"]
    if lost := [x["missing"] for x in (*this, *other) if "missing" in x]:
        return f"| {title} | {lost[0]} | {row['commit']} | | | | | | | |"
    ours, theirs = _times(this), _times(other)
    ratio = f"{theirs[0] / ours[0]:.2f}" if other else ""
    peaks = " / ".join(_peak(some) for some in (this, other) if some)
    busy = this[-1]["busy_ms"]
    return (
        f"| {title} | {_spread(ours)} | {row['commit']} | {_spread(theirs) if other else ''} | {row['against']} | "
        f"{ratio} | {this[0]['tokens'] / ours[0] * 1e3:,.0f} | {'' if busy is None else f'{busy:.0f}'} | {peaks} | "
        f"{max(x['total_seconds'] for x in this):.0f} |"
    )


def _peak(some: list[dict[str, Any]]) -> str:
    known = [x["peak_gib"] for x in some if x["peak_gib"] is not None]
    return f"{max(known):.1f}" if known else "–"


def _times(some: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Milliseconds of a step: median over all processes, the least and the greatest median of one."""
    if not some:
        return 0.0, 0.0, 0.0
    medians = [statistics.median(x["seconds"]) * 1e3 for x in some]
    return statistics.median(s * 1e3 for x in some for s in x["seconds"]), min(medians), max(medians)


def _spread(times: tuple[float, float, float]) -> str:
    return f"{times[0]:.1f} ({times[1]:.1f} to {times[2]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="", help="commit, or directory, of another build")
    parser.add_argument("--commit", default="", help="of this build, where it is no repository")
    parser.add_argument("--only", default="", help="rows whose name has a match of this regular expression")
    parser.add_argument("--steps", type=int, default=30, help="steps that each process measures (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="processes of each build (default: %(default)s)")
    parser.add_argument("--losses", action="store_true", help=f"losses of {LOSSES} steps instead of times")
    parser.add_argument("--deadline", type=float, default=470, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--plot", action="store_true", help="only write the table again from the JSON")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two small layers, on a CPU too: tries the script"
    )
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        given = json.loads(arguments.work)
        row = Row(**{**given, "settings": tuple(given["settings"])})
        print(json.dumps(work(row, arguments.steps, arguments.losses)))
        return
    if arguments.plot:
        results = common.read(arguments.out, NAME)
        common.write(results, report(results), arguments.out, NAME)
    else:
        common.chosen_device(arguments, "80 GB")
        print(report(run(arguments)))


if __name__ == "__main__":
    main()
