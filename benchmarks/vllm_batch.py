"""What our plugin for vLLM computes in each layer of a step, without vLLM: batches as vLLM's metadata describes them.

Attention layers of an 8B Llama's geometry with random weights, each with states in pages as vLLM allots them. Batches
that only decode are timed, eager and as a CUDA graph, beside our own engine's decoding of the same tokens and beside
states that are copied out of their pages and back. A mixed batch is timed and compared with the fp32 reference.

    python benchmarks/vllm_batch.py --out benchmarks/results

Parts that have not begun after ``--seconds`` are left out. Most of the time goes into compiling the kernels.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from lolcats.attention import SlotState, parallel_attention, step, use_backend
from lolcats.config import AttentionConfig
from lolcats.modeling.cuda_graph import record
from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec
from lolcats.vllm.attend import attend
from lolcats.vllm.batch import Batch
from lolcats.vllm.pool import Layout, Pool

NAME = "vllm_batch"
SEEN = 512, 7  # tokens of a batch's first row, and how many more each next row has
COLUMNS = "sequences | in place, eager | CUDA graph | copied, eager | CUDA graph | our engine, eager | CUDA graph"
WAYS = "in place", "copied", "our engine"
CHECKS = "graph's outputs equal", "graph's states equal", "padding touched nothing"
ABOUT = """vLLM was not run. Only what the plugin computes in linearized layers is timed: not the rest of a model, not
vLLM's scheduler, and not how vLLM records and replays steps.

Microseconds per layer for one new token of each sequence, mean of {steps} steps of {layers} layers. *In place*: the
plugin, with one more row as padding; states stay where they lie in vLLM's pages. *Copied*: the same states copied out
of their pages and back. *Our engine*: the step of `lolcats serve`, whose states lie side by side. *Eager* includes
launching each kernel from the host.
"""


@dataclass(frozen=True)
class Size:
    """What is measured. layers: each with states of its own, so that no cache holds them."""

    geometry: Geometry
    features: int
    window: int
    layers: int
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    dtype: torch.dtype
    steps: int
    """Timed: every row's window is left twice."""
    compared: int
    """Steps of a graph beside eager ones."""


LARGE = Size(Geometry(0, 32, 8, 128, 128), 64, 64, 8, (1, 16, 64, 256), (700, 513, 600, 1), torch.bfloat16, 128, 70)
TINY = Size(Geometry(0, 2, 1, 16, 16), 8, 4, 1, (2,), (9, 5, 1), torch.float32, 1, 3)


@dataclass
class Layers:
    """Layers with states of ``rows`` sequences, in pages 1, 2, ... (0 is vLLM's page for nothing)."""

    size: Size
    rows: int
    device: torch.device
    layers: list[LinearizedAttention] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    pages: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = AttentionConfig(feature_dim=self.size.features, window_size=self.size.window, sinks=0)
        for _ in range(self.size.layers):
            with torch.device(self.device):
                layer = LinearizedAttention(self.size.geometry, config, layer_spec(config, "hybrid"), "vllm")
            layer.requires_grad_(False)
            k, v = self.random(1, self.size.geometry.kv_heads)[1:]
            layout = Layout.of(layer.empty_state(k[:, :, None], v[:, :, None]))
            self.pages.append(torch.zeros(self.rows + 1, layout.nbytes, dtype=torch.uint8, device=self.device))
            self.layers.append(layer)
            self.pools.append(Pool(layout, self.pages[-1]))
        self.mixers = [layer.mixer(self.size.geometry.head_dim**-0.5, None) for layer in self.layers]

    def random(self, tokens: int, *_: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (tokens, heads, D)."""
        heads = self.size.geometry.heads, self.size.geometry.kv_heads, self.size.geometry.kv_heads
        make = (torch.randn(tokens, n, self.size.geometry.head_dim, device=self.device) for n in heads)
        q, k, v = (x.to(self.size.dtype) for x in make)
        return q, k, v

    def run(self, batch: Batch, qkv: Sequence[Tensor]) -> list[Tensor]:
        """The outputs (tokens, H, D) of each layer for the same tokens."""
        outputs = []
        for pool, layer, mixer in zip(self.pools, self.layers, self.mixers, strict=True):
            outputs.append(torch.empty_like(qkv[0]))
            attend(pool, layer, mixer, batch, *qkv, outputs[-1])
        return outputs

    def fill(self) -> None:
        """States as after many tokens: random numbers of their size, sums positive."""
        for pool in self.pools:
            for name, part in pool.parts.items():
                part.normal_() if name not in ("S", "z") else part.uniform_(0, 1)


def mixed(size: Size, device: torch.device) -> dict[str, Any]:
    """Prompts, more of the prompts beside decoding rows, and a step for all: each compared with the reference."""
    lengths = [list(size.prompts), [1, *size.prompts[1:-1], 1], [1] * len(size.prompts)]
    layers, slots = Layers(size, len(size.prompts), device), torch.arange(1, len(size.prompts) + 1, device=device)
    seen, tokens, outputs = [0] * len(size.prompts), [], []
    for counts in lengths:
        tokens.append(layers.random(sum(counts)))
        outputs.append(layers.run(Batch.of(counts, seen, slots), tokens[-1])[0])
        seen = [n + count for n, count in zip(seen, counts, strict=True)]
    errors, steps = list[Tensor](), list(zip(lengths, tokens, outputs, strict=True))
    for row in range(len(size.prompts)):
        of_row = [[x.split(counts)[row] for x in (*qkv, y)] for counts, qkv, y in steps]
        q, k, v, y = (torch.cat(x).float().transpose(0, 1)[None] for x in zip(*of_row, strict=True))
        mixer = layers.mixers[0]
        expected = parallel_attention(q, k, v, mixer.phi_q(q), mixer.phi_k(k), mixer.gamma, mixer.spec, mixer.scale)
        errors.append((y - expected).norm() / expected.norm())
    batch = Batch.of(lengths[1], lengths[0], slots)
    return {
        "new tokens of each row": lengths, "relative error": torch.stack(errors).max().item(),
        "ms to describe the second step": 1e3 * elapsed(
            lambda: Batch.of(lengths[1], lengths[0], slots), device, size.steps
        ),
        "ms per layer of the second step": 1e3 * elapsed(
            lambda: layers.run(batch, tokens[1]), device, size.steps
        ) / size.layers,
    }  # fmt: skip


@dataclass
class Decoding:
    """One new token for each of ``count`` rows; a row more, which is padding."""

    layers: Layers
    count: int

    def __post_init__(self) -> None:
        device = self.layers.device
        first, more = SEEN
        self.start = torch.cat([first + more * torch.arange(self.count), torch.tensor([-1])]).to(device)
        self.real = (self.start >= 0).long()
        self.seen, self.slots = self.start.clone(), torch.arange(1, self.count + 2, dtype=torch.int32, device=device)
        self.slots[-1] = 0
        self.qkv = self.layers.random(self.count + 1)
        self.batch = Batch.decoding(self.seen, self.slots)

    def in_place(self) -> list[Tensor]:
        outputs = self.layers.run(self.batch, self.qkv)
        self.seen.add_(self.real)
        return outputs

    def copied(self) -> list[Tensor]:
        """As it was before: whole states out of their pages and back."""
        outputs = []
        rows, slots = self.batch.decodes, self.slots[:-1].long()
        assert rows is not None
        for pool, mixer in zip(self.layers.pools, self.layers.mixers, strict=True):
            parts = {name: part[slots] for name, part in pool.parts.items()}
            state = SlotState.of_tensors({**parts, "seen": self.seen[:-1].clone()}, None)
            outputs.append(step(state, *(x[:-1] for x in map(rows.take, self.qkv)), mixer)[0])
            for name, part in pool.parts.items():
                part[slots] = state.tensors()[name]
        self.seen.add_(self.real)
        return outputs

    def own(self) -> Callable[[], list[Tensor]]:
        """Our engine's step: its table has a slot for each row."""
        rows = self.batch.decodes
        assert rows is not None
        qkv = [x[:-1] for x in map(rows.take, self.qkv)]
        states = []
        for pool in self.layers.pools:
            parts = {name: part[1 : self.count + 1].clone() for name, part in pool.parts.items()}
            states.append(SlotState.of_tensors({**parts, "seen": self.start[:-1].clone()}, None))
        return lambda: [step(x, *qkv, mixer)[0] for x, mixer in zip(states, self.layers.mixers, strict=True)]


def decoding(size: Size, count: int, device: torch.device) -> dict[str, Any]:
    layers = Layers(size, count, device)
    layers.fill()
    rows = Decoding(layers, count)
    before = [pages.clone() for pages in layers.pages]
    result = {"MB of a state": layers.pages[0].shape[1] / 1e6, **compare(rows, before)}
    for name, run in zip(WAYS, (rows.in_place, rows.copied, rows.own()), strict=True):
        rows.seen.copy_(rows.start)
        run()
        result[f"{name}, eager"] = 1e6 * elapsed(run, device, size.steps) / size.layers
        if device.type == "cuda":
            graph, outputs = record(run)
            rows.seen.copy_(rows.start)
            result[f"{name}, graph"] = 1e6 * elapsed(graph.replay, device, size.steps) / size.layers
            del graph, outputs
    return result


def compare(rows: Decoding, before: Sequence[Tensor]) -> dict[str, Any]:
    """The same steps eager and as a graph (on a CPU: eager again): outputs and pages, bit for bit; and what padding
    touched."""
    pages, device = rows.layers.pages, rows.layers.device

    def replayed() -> Callable[[], list[Tensor]]:
        if device.type != "cuda":
            return rows.in_place
        graph, outputs = record(rows.in_place)

        def replay() -> list[Tensor]:
            graph.replay()
            return outputs

        return replay

    results = []
    for run in (rows.in_place, replayed()):
        for page, old in zip(pages, before, strict=True):
            page.copy_(old)
        rows.seen.copy_(rows.start)
        outputs = [torch.stack(run()).clone() for _ in range(rows.layers.size.compared)]
        results.append((torch.stack(outputs), [page.clone() for page in pages]))
    (eager, eager_pages), (graph, graph_pages) = results
    found = (
        torch.equal(eager, graph), all(map(torch.equal, eager_pages, graph_pages)),
        all(torch.equal(x[0], y[0]) for x, y in zip(graph_pages, before, strict=True)),
    )  # fmt: skip
    return dict(zip(CHECKS, found, strict=True))


def elapsed(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of a call."""
    run()
    common.synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        run()
    common.synchronize(device)
    return (time.perf_counter() - begin) / times


def table(results: dict[str, Any]) -> str:
    rows = results["decoding"]
    checked = [row[name] for row in rows if "missing" not in row for name in CHECKS]
    equal = ("yes" if all(checked) else "NO") if checked else "not checked"
    return "\n".join(
        [
            "# The plugin's step for vLLM, without vLLM", "",
            f"{results['date']}, {results['hardware']}; {common.listed(results['versions'])}.", "",
            f"{results['geometry']}.", "", ABOUT.format(**results),
            f"| {COLUMNS} |", f"|{' --- |' * 7}", *map(line, rows), "",
            "Outputs and states of the graph equal the eager ones bit for bit, and padding touches no state: "
            f"{equal}.", "",
            *mixed_lines(results.get("mixed", {"missing": "not yet"})),
        ]
    )  # fmt: skip


def line(row: dict[str, Any]) -> str:
    ways = [f"{name}, {how}" for name in WAYS for how in ("eager", "graph")]
    cells = [f"{row[way]:.1f}" if way in row else "" for way in ways]
    cells[0] = row.get("missing", cells[0])
    return f"| {row['sequences']} | {' | '.join(cells)} |"


def mixed_lines(found: dict[str, Any]) -> list[str]:
    if "missing" in found:
        return [f"Mixed batches: {found['missing']}.", ""]
    return [
        f"Mixed batches: relative error {found['relative error']:.1e} to the fp32 reference; new tokens of each row in "
        f"three steps: {found['new tokens of each row']}. The second, eager, takes "
        f"{found['ms per layer of the second step']:.2f} ms per layer, and "
        f"{found['ms to describe the second step']:.2f} ms once for all layers, to describe it.", "",
    ]  # fmt: skip


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--seconds", type=float, default=60, help="no part begins later (default: 60)")
    parser.add_argument("--tiny", action="store_true", help="try the script, also without a GPU")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    device = common.chosen_device(arguments, "40 GiB")
    size = TINY if arguments.tiny else LARGE
    results = described(size, device)
    if device.type != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    with use_backend("auto" if device.type == "cuda" else "triton"):
        for count in size.batches:
            found = common.attempt(functools.partial(decoding, size, count, device), deadline)
            results["decoding"].append({"sequences": count, **found})
            common.free(device)
            common.write(results, table(results), arguments.out, NAME)
        results["mixed"] = common.attempt(lambda: mixed(size, device), deadline)
        common.write(results, table(results), arguments.out, NAME)
    print((arguments.out / f"{NAME}.md").read_text(encoding="utf-8"))


def described(size: Size, device: torch.device) -> dict[str, Any]:
    """What is measured, where and with what."""
    shape = size.geometry
    return {
        "date": time.strftime("%Y-%m-%d"), "hardware": common.hardware(device),
        "versions": common.installed("torch", "triton", "transformers", "vllm"),
        "geometry": f"{shape.heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}, "
        f"f = {size.features}, terraced windows of {size.window}, states in float32, "
        f"{str(size.dtype).removeprefix('torch.')}",
        "layers": size.layers, "steps": size.steps, "decoding": [],
    }  # fmt: skip


if __name__ == "__main__":
    main()
