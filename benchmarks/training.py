"""Both training stages on one GPU, at the geometry of Llama 3 8B with random weights.

    python benchmarks/training.py           # writes benchmarks/results/training.json, training.md and training.png
    python benchmarks/training.py --only "in front|linear attention$"    # parts whose name matches; the others stay
    python benchmarks/training.py --loss kl # stage 2 on this loss and on the cross-entropy; the other parts stay
    python benchmarks/training.py --plot    # table and picture again, from the JSON

Every part goes through the trainers' own code and is the median of a few optimizer steps behind a warm-up, data loading
left out. What a part found is written before the next begins. liger-kernel and matplotlib are used where installed.
"""

import argparse
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lolcats
from lolcats.attention import use_backend
from lolcats.config import AttentionConfig, FinetuneConfig, TransferConfig, load_config
from lolcats.data.rows import Data, Rows
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import LinearizedAttention, layer_spec, linearized_layers, override
from lolcats.modeling.liger import fused_layers
from lolcats.ranks import Ranks
from lolcats.stages.finetune.stage import FinetuneTrainer, add_lora
from lolcats.stages.finetune.trainer import StageTrainer
from lolcats.stages.trained import train_only
from lolcats.stages.transfer.hidden import Tokens
from lolcats.stages.transfer.loop import Group, LayerTrainer
from lolcats.stages.transfer.orders import layers_by_name
from lolcats.stages.transfer.visits import Batch

TARGETS = {"stage 1": (28_000, 22), "stage 2": (13_000, 40)}  # tokens/s and GiB on an H100 80GB
CROSS_ENTROPY = "stage 2, linear attention"
TAUGHT = {"kl": "loss kl", "mix": "loss mix"}  # what learns from the teacher
MARGIN = 30  # seconds before the deadline in which no part begins


@dataclass(frozen=True)
class Geometry:
    """A Llama, its linear attention, and the batches of both stages."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    vocabulary: int = 128256
    feature_dim: int = 64
    window: int = 64
    sinks: int = 4
    length: int = 1024
    transfer_rows: int = 8
    finetune_rows: int = 4
    accumulated: int = 2
    steps: int = 7


TINY = Geometry(2, 4, 2, 16, 96, 320, feature_dim=16, window=16, sinks=2, length=64, transfer_rows=4, finetune_rows=2,
                steps=2)  # fmt: skip


class Bench:
    """The model, and one method for each thing measured."""

    def __init__(self, geometry: Geometry, device: torch.device, deadline: float) -> None:
        self.geometry, self.device, self.deadline = geometry, device, deadline
        started = time.perf_counter()
        # Converted for unrotated inputs, which needs hooks that rotated ones do without and that then do nothing.
        self.model = lolcats.convert(build(geometry, device), self.attention("per_query_head", "unrotated"))
        common.synchronize(device)
        self.build_seconds = time.perf_counter() - started

    def attention(self, key_maps: Any, inputs: Any = "rotated") -> AttentionConfig:
        g = self.geometry
        return AttentionConfig(
            feature_dim=g.feature_dim, window_size=g.window, sinks=g.sinks, key_maps=key_maps, feature_inputs=inputs
        )

    def teacher(self) -> dict[str, Any]:
        """The base model's hidden states alone, no logits."""
        ids = self.ids(self.geometry.transfer_rows)

        def forward() -> None:
            with torch.no_grad(), override(self.model, mode="teacher"):
                decoder(self.model)(input_ids=ids, use_cache=False)

        with fused_layers(self.model.eval(), True):
            return self.measure(forward, ids.numel())

    def transfer(
        self, key_maps: str = "per_query_head", inputs: str = "rotated", backend: str = "auto"
    ) -> dict[str, Any]:
        """Stage 1; fewer rows where those of the geometry do not fit."""
        self.fresh_maps(key_maps, inputs)
        train_only(self.model, lambda name: ".lolcats." in name)
        rows = self.geometry.transfer_rows
        while True:
            try:
                with use_backend(backend), self.transfer_step(rows) as step:
                    return {"rows": rows, **self.measure(step, rows * self.geometry.length)}
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2

    @contextmanager
    def transfer_step(self, rows: int) -> Iterator[Callable[[], None]]:
        """One optimizer step of stage 1, as its loop takes it."""
        ids, layers = self.ids(rows), layers_by_name(self.model)
        data = Data(ids.cpu(), ids[:1].cpu(), ids[:1].cpu(), "benchmark", {})
        stage = TransferConfig(
            batch_size=rows, micro_batch_size=rows, max_steps=10**4, eval_steps=10**5, save_steps=10**5
        )
        batch = Batch(torch.arange(rows), range(rows), 1.0, 0, True)

        def run(rows: Tensor, positions: Tensor | None) -> Tensor:
            return decoder(self.model)(input_ids=rows, use_cache=False)[0]

        with tempfile.TemporaryDirectory() as directory, fused_layers(self.model.eval(), stage.liger):
            config = replace(load_config("paper-sinks"), transfer=stage)
            trainer = LayerTrainer(layers, data, config, Path(directory), Ranks(), self.device)
            group = Group(list(layers.values()), run, trainer.units)

            def step() -> None:
                with torch.no_grad():
                    trainer._learn(group, trainer.units, batch, (ids, None), keep=False)
                    trainer._end_step(group, trainer.units, Tokens(data.train, data.validation), 0)

            yield step

    def finetune(self, mode: Any = "student", inputs: str = "rotated", **settings: Any) -> dict[str, Any]:
        """Stage 2: LoRA on the linearized model, or in mode ``teacher`` on its softmax attention."""
        self.fresh_maps("per_query_head", inputs)
        g = self.geometry
        batch = {"batch_size": g.finetune_rows * g.accumulated, "micro_batch_size": g.finetune_rows}
        config = replace(FinetuneConfig(**batch), **settings)
        wrapped = add_lora(self.model, config)
        try:
            if config.gradient_checkpointing:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            with override(self.model, mode=mode), self.trainer(FinetuneTrainer, wrapped, config) as trainer:
                return self.measure(*self.step(trainer, [self.ids(g.finetune_rows) for _ in range(g.accumulated)]))
        finally:
            self.model.gradient_checkpointing_disable()
            self.model = wrapped.unload()

    @contextmanager
    def trainer(self, kind: type[StageTrainer], model: nn.Module, config: Any) -> Iterator[StageTrainer]:
        rows = Rows(self.ids(config.batch_size).cpu())
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(fused_layers(self.model, config.liger))
            yield kind(model, config, rows, rows, "benchmark", directory, directory / "metrics.jsonl")

    def step(self, trainer: StageTrainer, batches: list[Tensor]) -> tuple[Callable[[], None], int]:
        """One optimizer step over accumulated batches as transformers' training loop takes it, and its tokens."""
        optimizer: Any = trainer.create_optimizer()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.current_gradient_accumulation_steps = len(batches)

        def step() -> None:
            for ids in batches:
                trainer.training_step(trainer.model, {"input_ids": ids, "labels": ids})
            nn.utils.clip_grad_norm_(trained, trainer.stage_config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        return step, sum(ids.numel() for ids in batches)

    def measure(self, function: Callable[[], None], tokens: int, warm_up: int = 2) -> dict[str, Any]:
        """Seconds of each step behind the warm-up, and the peak of allocated memory over all of them."""
        common.reset_peak(self.device)
        seconds: list[float] = []
        while len(seconds) < warm_up + self.geometry.steps:
            started = time.perf_counter()
            function()
            common.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
            if time.monotonic() > self.deadline and len(seconds) > warm_up:
                break
        median = statistics.median(seconds[warm_up:])
        return {"seconds": seconds[warm_up:], "tokens": tokens, "tokens_per_second": tokens / median,
                "peak_gib": common.peak_gib(self.device)}  # fmt: skip

    def ids(self, rows: int) -> Tensor:
        return torch.randint(self.geometry.vocabulary, (rows, self.geometry.length), device=self.device)

    def fresh_maps(self, key_maps: str, inputs: str) -> None:
        """New feature maps and gates in every layer, without gradients or optimizer state of an earlier part."""
        config = self.attention(key_maps, inputs)
        for module in self.model.modules():
            layer = getattr(module, "lolcats", None)
            if isinstance(layer, LinearizedAttention):
                spec = layer_spec(config, layer.spec.kind)
                fresh = LinearizedAttention(layer.geometry, config, spec, layer.base_implementation)
                module.lolcats = fresh.to(self.device)
        assert len(linearized_layers(self.model)) == self.geometry.layers


def build(geometry: Geometry, device: torch.device) -> Any:
    """A Llama in bf16 with random weights, made where it runs."""
    g = geometry
    config = LlamaConfig(
        hidden_size=g.heads * g.head_dim, intermediate_size=g.intermediate, num_hidden_layers=g.layers,
        num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, vocab_size=g.vocabulary, rope_theta=500_000.0,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def parts(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "teacher, forward alone": bench.teacher,
        "stage 1, a key map per query head": bench.transfer,
        "stage 1, a key map per kv head": lambda: bench.transfer("per_kv_head"),
        "stage 1, maps in front of RoPE": lambda: bench.transfer(inputs="unrotated"),
        CROSS_ENTROPY: bench.finetune,
        "stage 2, maps in front of RoPE": lambda: bench.finetune(inputs="unrotated"),
        **{
            f"{CROSS_ENTROPY}, {words}": lambda loss=loss: bench.finetune(loss=loss)  # type: ignore[misc]
            for loss, words in TAUGHT.items()
        },
        "stage 2, softmax attention": lambda: bench.finetune("teacher"),
        "stage 2, linear attention, recomputed layers": lambda: bench.finetune(gradient_checkpointing=True),
        "stage 2, linear attention, no liger-kernel": lambda: bench.finetune(liger=False),
        "stage 1, chunked path": lambda: bench.transfer(backend="chunked"),
    }


def run(geometry: Geometry, device: torch.device, seconds: float, directory: Path, only: str = "") -> dict[str, Any]:
    """All parts that ``only`` matches and that begin before the deadline; the results are written after each."""
    deadline = time.monotonic() + seconds - MARGIN
    bench = Bench(geometry, device, deadline)
    results: dict[str, Any] = {
        "device": common.hardware(device),
        "versions": common.installed("torch", "transformers", "peft", "triton", "liger-kernel"),
        "geometry": asdict(geometry),
        "build_seconds": bench.build_seconds,
        "parts": {},
    }
    known = common.read(directory, "training") if only and (directory / "training.json").exists() else {}
    if any(known.get(key, results[key]) != results[key] for key in ("device", "versions", "geometry")):
        raise SystemExit(f"{directory}/training.json is of {known['device']}, {known['versions']}: measure all parts.")
    for name, part in parts(bench).items():
        if not re.search(only, name):
            results["parts"] |= {name: known["parts"][name]} if name in known.get("parts", {}) else {}
            continue
        results["parts"][name] = {"date": str(date.today()), **common.attempt(part, deadline)}
        common.free(device)
        print(name, results["parts"][name], file=sys.stderr, flush=True)
        common.write(results, report(results), directory, "training")
    common.write(results, report(results), directory, "training")  # parts behind the last one measured, too
    return results


def report(results: dict[str, Any]) -> str:
    g = Geometry(**results["geometry"])
    measured = {name: part for name, part in results["parts"].items() if "missing" not in part}
    dates = sorted({part["date"] for part in results["parts"].values()})
    picture = "\n![Training](training.png)\n" if importlib.util.find_spec("matplotlib") else ""
    lines = [
        "# Training",
        "",
        f"`python benchmarks/training.py`, {' and '.join(dates)}, {results['device']}, bf16; "
        f"{common.listed(results['versions'])}.",
        f"A Llama of {g.layers} layers, {g.heads} query and {g.kv_heads} kv heads of {g.head_dim}, hidden size "
        f"{g.heads * g.head_dim}, {g.intermediate} inside the MLP, {g.vocabulary} words, random weights (built and "
        f"converted in {results['build_seconds']:.0f} s). f {g.feature_dim}, terraced window of {g.window}, {g.sinks} "
        f"sinks. Rows of {g.length} tokens: {g.transfer_rows} a step in stage 1, {g.accumulated} × {g.finetune_rows} "
        "in stage 2 (LoRA, r = 8, on q, k, v and o). Medians of optimizer steps; peak of allocated memory, weights "
        "included.",
        "",
        "| part | tokens a step | ms a step | tokens/s | of the target | peak GiB | target |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in results["parts"].items():
        rate, memory = TARGETS.get(name.split(",")[0], (None, None))
        if name in measured:
            speed, peak = part["tokens_per_second"], part["peak_gib"]
            times = f"{part['tokens']} | {1e3 * statistics.median(part['seconds']):.1f} | {speed:,.0f}"
            against = f"{speed / rate:.2f}" if rate else ""
            lines.append(f"| {name} | {times} | {against} | {peak or 0:.1f} | {memory or ''} |")
        else:
            lines.append(f"| {name} | {part['missing']} | | | | | |")
    lines += [""] + [
        f"{text}: {measured[a]['tokens_per_second'] / measured[b]['tokens_per_second']:.2f}."
        for text, a, b in RATIOS
        if a in measured and b in measured
    ]
    return "\n".join(lines) + "\n" + picture


RATIOS = (
    ("Stage 1 against the teacher's forward alone", "stage 1, a key map per query head", "teacher, forward alone"),
    *(
        (f"Stage 2 with {words} against cross-entropy", f"{CROSS_ENTROPY}, {words}", CROSS_ENTROPY)
        for words in TAUGHT.values()
    ),
    ("Stage 2 against the same on softmax attention", "stage 2, linear attention", "stage 2, softmax attention"),
    (
        "Stage 1 with maps in front of RoPE against maps behind it",
        "stage 1, maps in front of RoPE",
        "stage 1, a key map per query head",
    ),
    (
        "Stage 2 with maps in front of RoPE against maps behind it",
        "stage 2, maps in front of RoPE",
        "stage 2, linear attention",
    ),
)


def draw(results: dict[str, Any], directory: Path) -> None:
    pyplot = common.load_pyplot()
    if pyplot is None:
        return
    measured = {name: part for name, part in results["parts"].items() if "missing" not in part}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for column, (key, label) in enumerate((("tokens_per_second", "tokens/s"), ("peak_gib", "peak GiB"))):
        axis = axes[column]
        axis.barh(list(measured), [part[key] or 0 for part in measured.values()], color="tab:blue")
        for row, name in enumerate(measured):
            if target := TARGETS.get(name.split(",")[0]):
                axis.plot([target[column]] * 2, [row - 0.4, row + 0.4], color="tab:red")
        axis.set(xlabel=f"{label} (red: target)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(directory / "training.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=540, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--only", default="", help="measure parts whose name has a match of this regular expression")
    parser.add_argument(
        "--loss", choices=list(TAUGHT), help="measure only stage 2 on this loss, and on the cross-entropy beside it"
    )
    parser.add_argument("--plot", action="store_true", help="only write table and picture again from the JSON")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two small layers, on a CPU too: tries the script"
    )
    arguments = parser.parse_args()
    if arguments.plot:
        results = common.read(arguments.out, "training")
        common.write(results, report(results), arguments.out, "training")
    else:
        device = common.chosen_device(arguments, "80 GB")
        geometry = TINY if arguments.tiny else Geometry()
        beside = f"^{CROSS_ENTROPY}(, {TAUGHT[arguments.loss]})?$" if arguments.loss else ""
        results = run(geometry, device, arguments.deadline, arguments.out, arguments.only or beside)
    draw(results, arguments.out)
    print((arguments.out / "training.md").read_text())


if __name__ == "__main__":
    main()
