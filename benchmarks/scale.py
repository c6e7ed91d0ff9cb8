"""Streamed stage 1 at the true geometries of Llama 3.1 70B and 405B on one GPU, with random weights.

    python benchmarks/scale.py              # writes benchmarks/results/scale.json and scale.md
    python benchmarks/scale.py --report     # the table again, from the JSON

It is the code of ``lolcats transfer --schedule stream`` on a small chunk of tokens; only the source of weights is
another one (each layer is drawn when its turn comes), and its time is left out. Steps are timed apart from validation,
saving and weights; the hours of a whole run are added up from them, from the measured speed of copies to the GPU, and
from an assumed speed of reading weights.
"""

import argparse
import hashlib
import itertools
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from transformers import LlamaConfig

from lolcats.config import AttentionConfig, Config, DataConfig, TransferConfig
from lolcats.data.rows import Data
from lolcats.modeling.skeleton import Skeleton, convert_empty, empty_model
from lolcats.ranks import Ranks
from lolcats.stages.transfer.orders import LayerByLayer

MARGIN = 45  # seconds before the deadline in which no layer begins


class Random:
    """Random weights, drawn on the device at each request. On one device, seed and name determine them.

    Matrices are normal with ``std``; vectors are ones (norms) or zeros (biases).
    """

    ahead = False

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self.seed, self.std = seed, std

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Nothing can be missing."""

    def read(self, wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: self._draw(name, like, device) for name, like in wanted.items()}

    def _draw(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        if tensor.ndim < 2:
            return tensor.fill_(0 if name.endswith("bias") else 1)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return tensor.normal_(0, self.std, generator=generator)


@dataclass(frozen=True)
class Geometry:
    """A Llama of which ``layers`` out of ``of_layers`` are run, and the targets: GiB of GPU memory, hours."""

    layers: int
    of_layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 128256
    length: int = 1024
    rows: int = 8
    """A step, all at a time."""
    steps: int = 6
    feature_dim: int = 64
    window: int = 64
    peak_target: float = 0
    hours_target: float = 0


GEOMETRIES = {
    "Llama 3.1 70B": Geometry(80, 80, 8192, 64, 8, 28672, peak_target=10, hours_target=2.5),
    "Llama 3.1 405B": Geometry(8, 126, 16384, 128, 8, 53248, peak_target=24, hours_target=15),
}
TINY = {"tiny": Geometry(3, 5, 64, 4, 2, 96, vocabulary=320, length=64, rows=2, steps=4, feature_dim=8, window=16)}


@dataclass(frozen=True)
class Run:
    """The whole run that the hours are those of."""

    tokens: int = 20_000_000
    chunk_tokens: int = 1_000_000
    validation_rows: int = 32
    eval_steps: int = 100
    read_bytes_per_second: float = 3e9


class OutOfTime(Exception):
    """The deadline has come."""


class Bench:
    """One geometry: the work of ``--schedule stream``, with clocks around a layer's steps and its evaluations."""

    def __init__(self, geometry: Geometry, device: torch.device, deadline: float, directory: Path) -> None:
        self.geometry, self.device, self.deadline, g = geometry, device, deadline, geometry
        self.layers: list[dict[str, Any]] = []
        attention = AttentionConfig(feature_dim=g.feature_dim, window_size=g.window)
        transfer = TransferConfig(coupling="per_layer", order="stream", batch_size=g.rows, micro_batch_size=g.rows,
                                  max_steps=g.steps, save_steps=10**9, log_steps=10**9, eval_steps=10**9,
                                  chunk_tokens=g.steps * g.rows * g.length)  # fmt: skip
        config = Config(attention=attention, data=DataConfig(sequence_length=g.length), transfer=transfer)
        llama = LlamaConfig(
            hidden_size=g.hidden, intermediate_size=g.intermediate, num_hidden_layers=g.layers,
            num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, vocab_size=g.vocabulary,
            rope_theta=500_000.0, max_position_embeddings=max(8192, g.length), tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = convert_empty(empty_model(llama, dtype), attention)
        rows = torch.randint(g.vocabulary, (g.rows * (g.steps + 1), g.length))
        data = Data(rows[g.rows :], rows[: g.rows], rows[: g.rows], "random", {})
        self.skeleton = Skeleton(model, Random(), device)
        self.work = LayerByLayer(self.skeleton, data, config, directory, Ranks())
        self._sweep, self._evaluate = self.work.trainer.pass_rows, self.work.trainer._evaluate
        self.work.trainer.pass_rows = self.sweep  # type: ignore[method-assign]
        self.work.trainer._evaluate = self.evaluate  # type: ignore[method-assign]

    def sweep(self, *arguments: Any, **options: Any) -> None:
        """A layer's turn: seconds of its steps, and of its evaluations of one batch."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        self.ticks: list[float] = []
        self.evaluations: list[float] = []
        self.work.trainer.tick = lambda step: self.ticks.append(self.clock())
        started = self.clock()
        self._sweep(*arguments, **options)
        turn = self.clock() - started
        inner = self.ticks[:-1]  # the last step ends with an evaluation
        steps = [after - before for before, after in itertools.pairwise(inner)]
        self.layers.append({"steps": steps, "evaluations": self.evaluations, "turn": turn})

    def evaluate(self, *arguments: Any, **options: Any) -> None:
        started = self.clock()
        self._evaluate(*arguments, **options)
        self.evaluations.append(self.clock() - started)

    def clock(self) -> float:
        common.synchronize(self.device)
        return time.perf_counter()

    def run(self) -> dict[str, Any]:
        common.reset_peak(self.device)
        started = self.clock()
        complete = True
        try:
            self.work.stream()
        except OutOfTime:
            complete = False
        wall, g = self.clock() - started, self.geometry
        if not self.layers:
            return {"missing": "no time left"}
        steps = [s for layer in self.layers for s in layer["steps"]]
        return {
            "layers_run": len(self.layers),
            "complete": complete,
            "tokens": g.steps * g.rows * g.length,
            "wall_seconds": wall,
            "step_seconds": statistics.median(steps),
            "step_seconds_range": [min(steps), max(steps)],
            "turn_seconds": [layer["turn"] for layer in self.layers],
            "evaluation_seconds": statistics.median(e for layer in self.layers[1:] or self.layers for e in
                                                    layer["evaluations"]),
            "layer_bytes": self.skeleton.bytes(0),
            "embedding_bytes": self.skeleton.bytes(-1),
            "peak_gpu_gib": common.peak_gib(self.device),
            "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "copy_bytes_per_second": copy_speed(self.device),
        }  # fmt: skip


def copy_speed(device: torch.device) -> float | None:
    """Bytes a second from pinned memory to the GPU."""
    if device.type != "cuda":
        return None
    host = torch.empty(1 << 28, pin_memory=True)
    target = torch.empty_like(host, device=device)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return host.nbytes / statistics.median(seconds[1:])


def whole_run(geometry: Geometry, found: dict[str, Any], run: Run) -> dict[str, float]:
    """Hours of stage 1 over ``run.tokens``, all visits counted, and what they are made of (seconds)."""
    g, step_tokens = geometry, geometry.rows * geometry.length
    chunks = math.ceil(run.tokens / run.chunk_tokens)
    steps = run.tokens / step_tokens
    batches = run.validation_rows / g.rows
    training = steps * found["step_seconds"]
    validation = (steps / run.eval_steps + chunks) * batches * found["evaluation_seconds"]
    reading = found["layer_bytes"] / run.read_bytes_per_second * chunks
    copying = found["layer_bytes"] / found["copy_bytes_per_second"] * chunks if found["copy_bytes_per_second"] else 0
    layer = max(training + validation, reading) + copying
    return {
        "chunks": chunks,
        "training_seconds_per_layer": training,
        "validation_seconds_per_layer": validation,
        "reading_seconds_per_layer": reading,
        "copying_seconds_per_layer": copying,
        "hours": layer * g.of_layers / 3600,
        "tokens_per_second": run.tokens / (layer * g.of_layers),
        "hidden_states_gib": (run.chunk_tokens + run.validation_rows * g.length) * g.hidden * 2 / 2**30,
    }


def measure(geometries: dict[str, Geometry], device: torch.device, seconds: float, directory: Path) -> dict[str, Any]:
    """All geometries that begin before the deadline; what one found is written before the next begins."""
    deadline = time.monotonic() + seconds - MARGIN
    results: dict[str, Any] = {
        "date": str(date.today()),
        "device": common.hardware(device),
        "versions": common.installed("torch", "transformers", "triton", "liger-kernel"),
        "run": asdict(Run()),
        "geometries": {},
    }
    for number, (name, geometry) in enumerate(geometries.items()):
        left = len(geometries) - number
        end = time.monotonic() + (deadline - time.monotonic()) / left  # each has its part, and what others left over
        found = common.attempt(partial(measure_one, geometry, device, end), deadline)
        results["geometries"][name] = {"geometry": asdict(geometry), **found}
        common.free(device)
        print(name, found, file=sys.stderr, flush=True)
        common.write(results, report(results), directory, "scale")
    return results


def measure_one(geometry: Geometry, device: torch.device, end: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        found = Bench(geometry, device, end, Path(place)).run()
    return found if "missing" in found else {**found, "whole_run": whole_run(geometry, found, Run())}


def report(results: dict[str, Any]) -> str:
    run = Run(**results["run"])
    measured = {n: part for n, part in results["geometries"].items() if "missing" not in part}
    lines = [
        "# Stage 1 at the geometries of 70B and 405B",
        "",
        f"`python benchmarks/scale.py`, {results['date']}, {results['device']}, bf16; "
        f"{common.listed(results['versions'])}. Random weights, made layer by layer; layers streamed as by "
        "`lolcats transfer --schedule stream`, feature maps trained with AdamW.",
        "",
        "| geometry | layers run | tokens | ms a step and layer | tokens/s of a layer | peak GPU GiB | target | "
        "peak host GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in results["geometries"].items():
        g = Geometry(**part["geometry"])
        if name not in measured:
            lines.append(f"| {name} | {part['missing']} | | | | | | |")
            continue
        speed = g.rows * g.length / part["step_seconds"]
        peak = f"{part['peak_gpu_gib']:.2f}" if part["peak_gpu_gib"] else ""
        lines.append(
            f"| {name} | {part['layers_run']} of {g.of_layers} | {part['tokens']:,} | "
            f"{1e3 * part['step_seconds']:.1f} | {speed:,.0f} | {peak} | {g.peak_target:g} | "
            f"{part['peak_host_gib']:.1f} |"
        )
    lines += [
        "",
        f"Whole runs over {run.tokens:,} tokens on one GPU, chunks of {run.chunk_tokens:,}. For each layer: training "
        "is the measured step times the number of steps; validation the measured evaluation of a batch times the "
        f"batches of {run.validation_rows} rows, every {run.eval_steps} steps and once a chunk; reading its weights at "
        f"{run.read_bytes_per_second / 1e9:g} GB/s (assumed) goes on beside them, copying them to the GPU (measured "
        "speed) does not. Hours = layers × (max(training + validation, reading) + copying) / 3600.",
        "",
        "| geometry | training s | validation s | reading s | copying s | layers | hours | target | tokens/s | "
        "hidden states GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in measured.items():
        g, whole = Geometry(**part["geometry"]), part["whole_run"]
        seconds = " | ".join(
            f"{whole[f'{what}_seconds_per_layer']:.1f}" for what in ("training", "validation", "reading", "copying")
        )
        lines.append(
            f"| {name} | {seconds} | {g.of_layers} | {whole['hours']:.2f} | {g.hours_target:g} | "
            f"{whole['tokens_per_second']:,.0f} | {whole['hidden_states_gib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=540, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--only", choices=["70B", "405B"], help="one geometry alone")
    parser.add_argument("--report", action="store_true", help="only write the table again from the JSON")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too: tries the script")
    arguments = parser.parse_args()
    if arguments.report:
        results = common.read(arguments.out, "scale")
        common.write(results, report(results), arguments.out, "scale")
    else:
        device = common.chosen_device(arguments, "32 GB")
        chosen = {n: g for n, g in GEOMETRIES.items() if n.endswith(arguments.only or "B")}
        measure(TINY if arguments.tiny else chosen, device, arguments.deadline, arguments.out)
    print((arguments.out / "scale.md").read_text())


if __name__ == "__main__":
    main()
