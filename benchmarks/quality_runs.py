"""The sweeps behind ``benchmarks/quality/`` on all GPUs of a machine: several processes share a GPU, until a deadline.

    python benchmarks/quality_data.py ... --out DATA
    python benchmarks/quality_runs.py RUNS.yaml --models MODELS --data DATA --eval EVAL --out OUT --seconds 1200
    python benchmarks/quality.py OUT/MODEL/results.jsonl --name MODEL --teacher "..."

RUNS.yaml (see quality_runs.yaml) lists processes in the order in which they start: gpu, model, copies, delay (seconds),
and steps, each with the sweeps and the settings of one ``lolcats sweep``. Processes of a model share its rows out.
MODELS: a directory or GGUF file for each model; GGUF files become directories in OUT/models first. EVAL: Parquet files
as ``lolcats evaluate --data-dir`` takes them. Under NVIDIA's MPS, where it is installed or runs already, the kernels of
a GPU's processes run side by side. The same command continues; results in OUT/MODEL/results.jsonl are not made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from lolcats.config import from_dict, read_yaml
from lolcats.files import locked, whole_directory
from lolcats.weights.base import find_base, load_model, load_tokenizer

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SOURCES = {"alpaca": "jsonl", "prose": "yaml", "both": "yaml"}  # of rows with base.data=NAME, in DATA
STATUS = 30  # seconds between lines that say how far every process is


@dataclass(frozen=True)
class Step:
    sweeps: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Process:
    model: str = ""
    gpu: int = 0
    copies: int = 1
    delay: float = 0.0
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Runs:
    processes: list[Process] = field(default_factory=list)


def sweep_command(step: Step, model: Path, data: Path, evaluation: Path, out: Path, seconds: float) -> list[str]:
    given = {
        "base.sources": {name: data / f"{name}.{form}" for name, form in SOURCES.items()},
        "evaluate.perplexity": {
            "alpaca": data / "alpaca_heldout.jsonl", "textbooks": data / "textbooks_heldout.jsonl",
            "books": data / "books_heldout.jsonl", "wikitext2": evaluation / "wikitext2_raw_test.parquet",
        },
    }  # fmt: skip
    settings = [f"{key}.{name}={path}" for key, paths in given.items() for name, path in paths.items()]
    settings += [f"evaluate.data_dir={evaluation}", f"evaluate.text={evaluation / 'long_books.parquet'}", *step.set]
    files = [str(EXPERIMENTS / f"{name}.yaml") for name in step.sweeps]
    fixed = ["--data", str(data / "alpaca.jsonl"), "--out", str(out), "--deadline", f"{seconds:.0f}"]
    return ["sweep", *files, str(model), *fixed, *(word for setting in settings for word in ("--set", setting))]


def work(process: Process, options: argparse.Namespace, end: float) -> int:
    """In a process of its own: its steps, one after another; the number of those that failed."""
    model, failed = ready(process.model, options), 0
    for step in process.steps:
        out, left = options.out / process.model, end - time.time()
        command = sweep_command(step, model, options.data, options.eval, out, left)
        failed += subprocess.run([sys.executable, "-m", "lolcats.cli", *command], check=False).returncode != 0
    return failed


def ready(name: str, options: argparse.Namespace) -> Path:
    """The directory of a model, once it is there."""
    path = options.models / name
    while not (path / "config.json").is_file():
        path = options.out / "models" / name
        time.sleep(1)
    return path


def to_directory(source: Path, target: Path) -> None:
    """Once, whoever else was told to."""
    base = find_base(str(source))
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():
            with whole_directory(target) as directory:
                load_model(base, torch.bfloat16).save_pretrained(directory)
                load_tokenizer(base).save_pretrained(directory)


def convert(names: set[str], options: argparse.Namespace) -> list[BaseProcess]:
    """Begin to turn GGUF files into directories."""
    begun = []
    for name in names:
        source, target = options.models / f"{name}.gguf", options.out / "models" / name
        if source.is_file() and not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            begun.append(get_context("spawn").Process(target=to_directory, args=(source, target)))
            begun[-1].start()
    return begun


@contextmanager
def shared_gpus(out: Path) -> Iterator[dict[str, str]]:
    """The environment in which processes share GPUs: MPS runs while the block does, where it is installed and does not
    run already."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield {}
        return
    places = {"CUDA_MPS_PIPE_DIRECTORY": str(out / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(out / "mps")}
    (out / "mps").mkdir(exist_ok=True)
    subprocess.run([control, "-d"], env={**os.environ, **places}, check=True)
    try:
        yield places
    finally:
        subprocess.run([control], input=b"quit\n", env={**os.environ, **places}, check=False)


def run(runs: Runs, options: argparse.Namespace) -> None:
    end, count = time.time() + options.seconds, sum(process.copies for process in runs.processes)
    options.out.mkdir(parents=True, exist_ok=True)
    converting = convert({process.model for process in runs.processes}, options)
    threads = max(1, (os.cpu_count() or 1) // count)
    fixed = {"OMP_NUM_THREADS": str(threads), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    begun: dict[Path, subprocess.Popen[bytes]] = {}
    with shared_gpus(options.out) as places:
        for number, process in enumerate(runs.processes):
            time.sleep(process.delay)
            for copy in range(process.copies):
                log = options.out / f"{number}-{copy}-gpu{process.gpu}-{process.model}.log"
                environment = {**fixed, **os.environ, **places, "CUDA_VISIBLE_DEVICES": str(process.gpu)}
                command = [sys.executable, __file__, *sys.argv[1:], "--process", str(number), "--end", str(end)]
                with log.open("ab") as file:
                    begun[log] = subprocess.Popen(
                        command, env=environment, stdout=file, stderr=file, start_new_session=True
                    )
        said = time.time()
        while time.time() < end and any(process.poll() is None for process in begun.values()):
            time.sleep(0.5)
            if time.time() > said + STATUS:
                said = time.time()
                say(begun)
        say(begun)
        for process in begun.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # with the sweep that it runs
            process.wait()
    for process in converting:
        process.terminate()


def say(begun: dict[Path, subprocess.Popen[bytes]]) -> None:
    """A line for each process, with the last one of its log."""
    for log, process in begun.items():
        state = "runs" if process.poll() is None else f"ended with {process.returncode}"
        lines = log.read_text(errors="replace")[-2000:].replace("\r", "\n").split("\n")
        last = next((line[:150] for line in reversed(lines) if line.strip()), "")
        print(f"{log.name}, {state}: {last}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a file like quality_runs.yaml")
    for name in ("models", "data", "eval", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("models", "data", "eval", "out"):
        setattr(options, name, getattr(options, name).resolve())
    runs = from_dict(Runs, read_yaml(options.runs.read_text(), str(options.runs)))
    if options.process is not None:
        sys.exit(work(runs.processes[options.process], options, options.end))
    run(runs, options)


if __name__ == "__main__":
    main()
