"""What the benchmarks share: hardware, versions, a part that may be missing, results as JSON and as a table."""

import functools
import gc
import gzip
import importlib.util
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

RESULTS = Path(__file__).parent / "results"


def installed(*packages: str) -> dict[str, str | None]:
    """The version of each, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def listed(versions: dict[str, str | None]) -> str:
    """Versions for the head of a table."""
    return ", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items())


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def processor() -> str:
    """The CPU's name. Linux only."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")


def chosen_device(arguments: Namespace, needed: str) -> torch.device:
    """The GPU, or with ``--tiny`` what there is; exits where results would be worth nothing. ``needed``: GPU memory."""
    if arguments.tiny and arguments.out == RESULTS:
        sys.exit("--tiny measures nothing: give it a directory of its own with --out.")
    if not (torch.cuda.is_available() or arguments.tiny):
        sys.exit(f"This benchmark needs a CUDA (or ROCm) GPU with {needed}; torch finds none. --tiny tries the script.")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device) -> float | None:
    """The most that was allocated on the GPU since the peak was reset, and what CUDA graphs hold besides."""
    if device.type != "cuda":
        return None
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    held = sum(part["total_size"] - part["allocated_size"] for part in pools)
    return (torch.cuda.max_memory_allocated() + held) / 2**30


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free(device: torch.device) -> None:
    """Give back what an earlier part held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(part: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """What ``part`` found, or why that is missing. ``deadline``: of ``time.monotonic``; after it nothing begins."""
    if time.monotonic() > deadline:
        return {"missing": "no time left"}
    try:
        return part()
    except torch.OutOfMemoryError:
        return {"missing": "out of memory"}


def write(results: dict[str, Any], report: str, directory: Path, name: str) -> None:
    """``results`` as NAME.json, ``report`` as NAME.md."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (directory / f"{name}.json").write_text(text, encoding="utf-8")
    (directory / f"{name}.md").write_text(report, encoding="utf-8")


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


def alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a sweep's rows those that were measured as most were; where that says nothing, as the newest were."""
    ways = [row["evaluation"] for row in reversed(rows)]
    way = max(ways, key=ways.count, default=None)
    return [row for row in rows if row["evaluation"] == way]


def load_pyplot() -> Any:
    """matplotlib's pyplot without a display, None where it is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        print("No picture: matplotlib is not installed.", file=sys.stderr)
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results of a sweep, from its results.jsonl, packed (.gz) or not."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return [json.loads(line) for line in text.decode().splitlines()]


@functools.cache
def experiments() -> dict[str, dict[str, Any]]:
    """What the files of experiments/ say, by name."""
    files = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text()) for path in files}


FORMER_ROWS = {
    "prior_art": {
        "LoLCATs, window dropout 0.5 in transfer": "LoLCATs",
        "LoLCATs, 4 sinks, window dropout 0.5 in transfer": "LoLCATs, 4 sinks",
    },
}  # fmt: skip
"""Rows that experiments had when results were committed, each with the row after which tables show it."""


def row_order(experiment: str) -> dict[str, int]:
    """Where each row of an experiment stands; nothing for an experiment that there is not."""
    rows = list(experiments().get(experiment, {}).get("rows", ()))
    for former, before in FORMER_ROWS.get(experiment, {}).items():
        rows.insert(rows.index(before) + 1, former)
    return {row: n for n, row in enumerate(rows)}
