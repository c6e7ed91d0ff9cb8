"""Stages 1 and 2 and generation on 1, 2, 4, 8 GPUs of one machine, at Llama geometries with random weights.

    python benchmarks/multi_gpu.py              # all GPUs there are; writes benchmarks/results/multi_gpu.json and .md
    python benchmarks/multi_gpu.py --counts 4 2 1     # in another order: GPUs that are done with are free
    python benchmarks/multi_gpu.py --parts "stage 2" "stage 2, sharded" --layers-per-unit 1 2 4 --against DIR
    python benchmarks/multi_gpu.py --table      # the table again, from the JSON
    python benchmarks/multi_gpu.py --tiny --out DIR   # two processes on a CPU, at a size that measures nothing

Starts itself with torchrun once for each number of GPUs. Every number of GPUs trains on the same batches from the same
weights, so loss curves must be the same; the micro-batch of a GPU is the same too, and fewer GPUs accumulate more of
them. Weights are drawn tensor by tensor, where they are used. What a part found is written before the next begins.
With --against, stage 2 of one GPU and sharded stage 2 also run with the sources of DIR (which holds src/lolcats, as
`git archive COMMIT src` writes it), each right after this build's ranks of that number.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from multi_gpu_report import LARGER, SHARDED, collect, report
from multi_gpu_sizes import STAGING, TINY, Sizes, kept_and_taught, lean_lora, model_config
from profiles import profiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import Config, TransferConfig, load_config
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.loss import find_head, language_model_loss
from lolcats.modeling.parallel import tensor_parallel
from lolcats.plan import Machine, Work, plan_finetune, plan_transfer, size_of
from lolcats.ranks import ranks
from lolcats.stages.distributed import all_reduce_gradients, materialize, own_device, shard
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.trained import train_only
from lolcats.stages.transfer.stage import layer_losses

ROOT = Path(__file__).parents[1]
WARM_UP = 2


class Bench:
    """One rank. ``ranks``: how many there are; ``most``: how many there are in the largest measurement.

    parts: names of what will be measured.
    """

    def __init__(self, sizes: Sizes, device: torch.device, most: int, parts: Sequence[str]) -> None:
        self.sizes, self.ranks, self.most = sizes, ranks().size, most
        self.device = own_device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.config = load_config("paper-sinks", sizes.settings)
        # now: counting runs a small model on the CPU, which layers fused for the GPU would break
        models = sizes.models if "large stage 2" in parts else sizes.models[:1]
        self.counted = {name: size_of(model_config(name), self.config) for name in models}
        self.taught = kept_and_taught(sizes) if any("KL" in name for name in parts) else self.config

    def transfer(self) -> dict[str, Any]:
        """Stage 1, data-parallel: the whole model on each GPU, gradients of the feature maps summed."""
        model = self.build(self.sizes.models[0])
        train_only(model, lambda name: ".lolcats." in name)
        maps = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(maps, lr=1e-2, weight_decay=0.0)
        micro_batches, settings = self.micro_batches(self.sizes.transfer_rows), TransferConfig()

        def step() -> Tensor:
            losses = [layer_losses(model, ids, settings, 1 / len(micro_batches)) for ids in micro_batches]
            return self.update(maps, optimizer, torch.stack(losses).mean())

        with fused_layers(model, True):
            found = self.measure(step, self.sizes.transfer_rows * self.most * self.sizes.length, self.sizes.steps)
        return found | self.predicted("transfer", self.sizes.models[0], self.sizes.transfer_rows)

    def finetune(self) -> dict[str, Any]:
        """Stage 2, data-parallel: the whole model on each GPU, gradients of LoRA summed."""
        name, rows = self.sizes.models[0], self.sizes.finetune_rows
        model = self.build(name, lora=True)
        with fused_layers(model.get_base_model(), True):
            return self.tune(model, name, rows, self.sizes.steps)

    def sharded(self, layers_per_unit: int = 1, staging: str = "") -> dict[str, Any]:
        """Stage 2, the base model sharded over all GPUs (FSDP2), and one step of each rank looked into. staging: a
        method of STAGING, by which every unit gathers."""
        name, rows = self.sizes.models[0], self.sizes.finetune_rows
        model = self.build(name, lora=True, sharded=True, layers_per_unit=layers_per_unit)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)] if staging else []
        if not all(hasattr(unit, STAGING[staging][0]) for unit in units):
            return {"missing": "not in this PyTorch"}
        for unit in units:
            getattr(unit, STAGING[staging][0])(STAGING[staging][1])
        with fused_layers(model.get_base_model(), True):
            found = self.tune(model, name, rows, self.sizes.steps, sharded=True)
            return found | {"profile": profiled(self.tuning(model, rows), self.device)}

    def larger(self) -> dict[str, Any]:
        """Sharded stage 2 with larger micro-batches."""
        name, rows = self.sizes.models[0], LARGER * self.sizes.finetune_rows
        if not self.predicted("finetune", name, rows, sharded=True)["fits"]:
            return {"missing": "does not fit"}
        model = self.build(name, lora=True, sharded=True)
        with fused_layers(model.get_base_model(), True):
            return self.tune(model, name, rows, self.sizes.large_steps, sharded=True)

    def distilled(self, sharded: bool = False) -> dict[str, Any]:
        """Stage 2 against the model's own teacher, an eighth of the key/value heads kept; data-parallel or sharded."""
        from lolcats.stages.finetune.protection import protected

        name, rows = self.sizes.models[0], self.sizes.finetune_rows
        model = self.build(name, lora=True, sharded=sharded and self.ranks > 1, config=self.taught)
        with fused_layers(model.get_base_model(), True), protected(model, self.taught.finetune.protect_kept):
            found = self.measure(
                self.tuning(model, rows, taught=True), rows * self.most * self.sizes.length, self.sizes.steps
            )
        return found | {"predicted_gib": None, "predicted_tokens_per_second": None}

    def selection(self) -> dict[str, Any]:
        """The search for heads to keep, its work shared by the ranks; nothing is loaded, and prompts are random."""
        from selection import timed

        found = timed(self.sizes.search, self.sizes.search_heads, self.sizes.search_lengths)
        return found | {"peak_gib": self.peak()}

    def tune(
        self, model: Any, name: str, rows: int, steps: int, sharded: bool = False, recompute: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        """Stage 2 of a model by micro-batches of ``rows``, and what was planned."""
        found = self.measure(self.tuning(model, rows), rows * self.most * self.sizes.length, steps)
        return found | self.predicted("finetune", name, rows, recompute, sharded)

    def tuning(self, wrapped: Any, rows: int, taught: bool = False) -> Callable[[], Tensor]:
        """An optimizer step of LoRA by micro-batches of ``rows``, as the trainer makes it."""
        lora = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(lora, lr=1e-3, weight_decay=0.0)
        model = wrapped.get_base_model()
        micro_batches, head, passing = self.micro_batches(rows), find_head(model), lean_lora(model)

        def loss_of(ids: Tensor) -> Tensor:
            if not taught:
                return language_model_loss(model, head, ids)
            from lolcats.stages.finetune.distillation import Distillation, distillation_loss

            return distillation_loss(wrapped, head, ids, Distillation())

        def step() -> Tensor:
            losses = []
            for ids in micro_batches:
                with passing():
                    loss = loss_of(ids) / len(micro_batches)
                    loss.backward()
                losses.append(loss.detach())
            return self.update(lora, optimizer, torch.stack(losses).sum())

        return step

    def large(self) -> dict[str, Any]:
        """Stage 2 of the large geometry, where the planner says that its shards fit."""
        name, sharded = self.sizes.models[1], self.ranks > 1
        foreseen = self.predicted("finetune", name, self.sizes.large_rows, recompute=True, sharded=sharded)
        if self.device.type == "cuda" and not foreseen["fits"]:
            return {"missing": f"does not fit: {foreseen['predicted_gib']:.0f} GiB on each GPU by the planner"}
        model = self.build(name, lora=True, sharded=sharded)
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with fused_layers(model.get_base_model(), True):
            return self.tune(model, name, self.sizes.large_rows, self.sizes.large_steps, sharded, recompute=True)

    @torch.no_grad()
    def generate(self) -> dict[str, Any]:
        """Greedy tokens a second after a prompt, the heads split over all GPUs (tensor parallel)."""
        model = self.build(self.sizes.models[0], split=self.ranks > 1).eval()
        found = {}
        for rows in self.sizes.batches:
            ids = self.numbers("prompt", (rows, self.sizes.prompt))
            self.decode(model, ids, 2)
            prefill, decoding, tokens = self.decode(model, ids, self.sizes.new_tokens)
            found[str(rows)] = {
                "prefill_seconds": prefill, "decode_seconds": decoding, "first_row": tokens[0].tolist(),
                "tokens_per_second": rows * (self.sizes.new_tokens - 1) / decoding,
            }  # fmt: skip
        return {"batches": found, "peak_gib": self.peak()}

    def decode(self, model: Any, ids: Tensor, count: int) -> tuple[float, float, Tensor]:
        """Seconds of prefill, seconds of all further tokens, and the tokens (rows, count)."""
        common.synchronize(self.device)
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        common.synchronize(self.device)
        middle = time.perf_counter()
        for _ in range(count - 1):
            out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        common.synchronize(self.device)
        return middle - started, time.perf_counter() - middle, torch.cat(tokens, 1)

    def build(
        self, name: str, lora: bool = False, sharded: bool = False, split: bool = False, layers_per_unit: int = 1,
        config: Config | None = None,
    ) -> Any:  # fmt: skip
        """A converted model with random weights: whole, sharded over the ranks, or its heads split over them; with
        LoRA, PEFT's model around it."""
        config = config or self.config
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(model_config(name), dtype=half, attn_implementation="sdpa")
        model = lolcats.convert(model.eval(), config)
        wrapped = add_lora(model, config.finetune) if lora else model
        for module in model.modules():
            for own, p in module._parameters.items():
                if p is not None:
                    module._parameters[own] = nn.Parameter(p.to("meta"), p.requires_grad)
        mesh = init_device_mesh(self.device.type, (self.ranks,)) if self.ranks > 1 else None
        if sharded:
            more = {"layers_per_unit": layers_per_unit} if layers_per_unit > 1 else {}  # older builds do not know it
            shard(model, self.device, mesh, **more)
        if split and mesh is not None:
            tensor_parallel(model, mesh)
        materialize(model, self.device, partial(self.fill, split_heads=split))
        common.synchronize(self.device)
        return wrapped

    def fill(self, name: str, parameter: Tensor, split_heads: bool) -> None:
        """Values by name alone, so that any number of ranks has the same model; one whole tensor at a time."""
        shape, dim = list(parameter.shape), None
        if isinstance(parameter, DTensor):
            dim = next((p.dim for p in parameter.placements if isinstance(p, Shard)), None)
        elif split_heads and ".lolcats." in name:
            dim, shape[0] = 0, shape[0] * self.ranks
        whole = self.draw(name, shape, parameter.dtype)
        if dim is not None:
            parts = whole.chunk(self.ranks, dim)
            whole = parts[self.rank] if self.rank < len(parts) else whole.narrow(dim, 0, 0)
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(whole)

    def draw(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        if name.endswith(".gate"):
            return whole.fill_(self.config.attention.gate_init)
        if "lora_B" in name:
            return whole.zero_()
        if len(shape) == 1:
            return whole.fill_(1)
        return whole.normal_(0, 0.1 if ".lolcats." in name else 0.02, generator=seeded(name, self.device))

    def micro_batches(self, rows: int) -> list[Tensor]:
        """This rank's part of the one batch that all steps train on: the same whatever the number of ranks."""
        everything = self.numbers("batch", (self.most, rows, self.sizes.length))
        return list(everything[self.rank :: self.ranks])

    def numbers(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Token ids, the same on every rank."""
        vocabulary = model_config(self.sizes.models[0]).vocab_size
        return torch.randint(vocabulary, shape, generator=seeded(name, torch.device("cpu"))).to(self.device)

    def update(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        """End a step as the trainers do; the loss of all ranks."""
        all_reduce_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if self.ranks > 1:
            dist.all_reduce(loss)
        return loss / self.ranks

    def measure(self, step: Callable[[], Tensor], tokens: int, steps: int) -> dict[str, Any]:
        """Losses and seconds of the steps after the warm-up, and the peak of allocated memory of any GPU."""
        seconds, losses = [], []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            losses.append(step().item())
            common.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        speed = tokens / statistics.median(seconds[WARM_UP:])
        return {"losses": losses, "seconds": seconds[WARM_UP:], "tokens": tokens, "tokens_per_second": speed,
                "peak_gib": self.peak()}  # fmt: skip

    def peak(self) -> float | None:
        """GiB, the most of any rank."""
        own = common.peak_gib(self.device)
        if own is None:
            return None
        peak = torch.tensor(own, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        return peak.item()

    def predicted(
        self, stage: str, name: str, rows: int, recompute: bool = False, sharded: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        """What ``lolcats plan`` says of this part."""
        config, batch = self.config, {"batch_size": rows * self.most, "micro_batch_size": rows}
        config = replace(config, **{stage: replace(getattr(config, stage), **batch)})
        form: Any = {"sharding": "always" if sharded else "never", "gradient_checkpointing": recompute}
        config = replace(config, finetune=replace(config.finetune, **form))
        memory = torch.cuda.get_device_properties(0).total_memory if self.device.type == "cuda" else 2**40
        machine = Machine(self.ranks, memory, host_memory=2**50)
        plans = plan_transfer if stage == "transfer" else plan_finetune
        plan = plans(self.counted[name], config, machine, Work())[0]
        return {"predicted_gib": plan.peak / 2**30, "predicted_tokens_per_second": plan.tokens / plan.time,
                "fits": not plan.problems}  # fmt: skip


def seeded(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "stage 1": Bench.transfer, "stage 2": Bench.finetune, SHARDED: Bench.sharded, f"{SHARDED}, larger": Bench.larger,
    "stage 2 with KL": Bench.distilled, "stage 2 with KL, sharded": partial(Bench.distilled, sharded=True),
    "selection": Bench.selection, "generation": Bench.generate, "large stage 2": Bench.large,
}  # fmt: skip
START = 2  # starting the ranks takes as long as so many parts
COMPARED = ("stage 2", SHARDED)  # with another build


def chosen(
    names: Sequence[str], units: Sequence[int], staging: Sequence[str], count: int
) -> dict[str, Callable[[Bench], dict[str, Any]]]:
    """The parts of these names for ``count`` ranks; one rank shards nothing. units: layers in a unit of FSDP2; staging:
    names in STAGING, whose parts come last."""
    found = {}
    for name in [name for name in PARTS if name in names and (count > 1 or ", sharded" not in name)]:
        if name != SHARDED:
            found[name] = PARTS[name]
            continue
        for n in units:
            title = SHARDED if n == 1 else f"{SHARDED}, {n} layers a unit"
            found[title] = partial(Bench.sharded, layers_per_unit=n)
    ways = staging if SHARDED in found else []
    return found | {f"{SHARDED}, {way} buffers": partial(Bench.sharded, staging=way) for way in ways}


def work(sizes: Sizes, device: torch.device, arguments: argparse.Namespace) -> None:
    """One rank: the first part, and every other that begins before the end (seconds since the epoch), each result added
    to the file."""
    bench = Bench(sizes, device, arguments.most, arguments.parts)
    for i, (name, part) in enumerate(
        chosen(arguments.parts, arguments.layers_per_unit, arguments.staging, bench.ranks).items()
    ):
        late = torch.tensor(float(i > 0 and time.time() > arguments.end), device=bench.device)
        if bench.ranks > 1:
            dist.all_reduce(late, dist.ReduceOp.MAX)
        try:
            common.reset_peak(device)
            found = {"missing": "no time left"} if late else part(bench)
        except torch.OutOfMemoryError:
            if bench.ranks > 1:
                raise  # the other ranks wait in vain: torchrun ends them
            found = {"missing": "out of memory"}
        if bench.rank == 0:
            with arguments.worker.open("a") as stream:
                stream.write(json.dumps([bench.ranks, name, found]) + "\n")
            shown = {k: v for k, v in found.items() if k not in ("losses", "profile")}
            print(bench.ranks, name, shown, file=sys.stderr, flush=True)
        common.free(device)
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(arguments: argparse.Namespace, counts: Sequence[int]) -> dict[str, Any]:
    """Start torchrun for each number of ranks and each build, and write what all of them found after every part."""
    tiny, directory = arguments.tiny, arguments.out
    end = time.time() + arguments.deadline
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": str(date.today()), "device": common.hardware(torch.device("cpu" if tiny else "cuda")),
        "counts": sorted(counts), "note": arguments.note,
        "versions": common.installed("torch", "transformers", "peft", "triton", "liger-kernel"),
        "sizes": asdict(TINY if tiny else Sizes()), "parts": {}, "failures": {},
    }  # fmt: skip
    builds = {"this": ROOT, **({"other": arguments.against.resolve()} if arguments.against else {})}
    runs = [(count, build) for count in counts for build in builds]
    files = {build: directory / f"multi_gpu_{build}.jsonl" for build in builds}
    for file in files.values():
        file.unlink(missing_ok=True)

    def write() -> None:
        found = {
            build: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for build, file in files.items()
        }
        results["parts"] = collect(found["this"], list(PARTS), found.get("other", []))
        common.write(results, report(results), directory, "multi_gpu")

    kinds = {build: [name for name in arguments.parts if build == "this" or name in COMPARED] for build in builds}
    layers = {"this": arguments.layers_per_unit, "other": [1]}
    ways: dict[str, list[str]] = {"this": arguments.staging, "other": []}
    work_of = {run: len(chosen(kinds[run[1]], layers[run[1]], ways[run[1]], run[0])) for run in runs}
    runs = [run for run in runs if work_of[run]]
    for index, (count, build) in enumerate(runs):
        parts, units = kinds[build], layers[build]
        left = [START + work_of[run] for run in runs[index:]]
        share = (end - time.time()) * left[0] / sum(left)
        own_end = time.time() + share - min(20, share / 4)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                   __file__, "--worker", str(files[build]), "--most", str(max(counts)), "--end", str(own_end),
                   "--layers-per-unit", *map(str, units), "--staging", *ways[build], "--parts", *parts,
                   *(["--tiny"] if tiny else [])]  # fmt: skip
        label = str(count) if build == "this" else f"{count} (other build)"
        try:
            if code := run(command, end - time.time(), builds[build], write):
                results["failures"][label] = f"ended with {code}"
        except subprocess.TimeoutExpired:
            results["failures"][label] = "no time left"
        write()
    for file in files.values():
        file.unlink(missing_ok=True)
    return results


def run(command: list[str], seconds: float, source: Path, seen: Callable[[], None]) -> int:
    """The exit code of ``command`` with lolcats of ``source``; after ``seconds`` it is killed with all its processes.
    ``seen`` is called every two seconds."""
    path = os.pathsep.join([str(source / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"NCCL_NVLS_ENABLE": "0", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    end = time.time() + max(seconds, 1)
    try:
        while True:
            try:
                return process.wait(min(2.0, max(end - time.time(), 0.01)))
            except subprocess.TimeoutExpired:
                if time.time() >= end:
                    raise
                seen()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of GPUs in their order (default: 1, 2, 4, 8)")
    parser.add_argument("--note", default="", help="what else a reader must know")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument(
        "--layers-per-unit", type=int, nargs="+", default=[1], help="sharded stage 2 with units of so many layers"
    )
    parser.add_argument(
        "--staging", nargs="*", choices=list(STAGING), default=[], help="sharded stage 2 with such buffers, too"
    )
    parser.add_argument("--against", type=Path, help="directory with src/ of another build, measured in the same run")
    parser.add_argument(
        "--deadline", "--seconds", type=float, default=280, help="seconds for everything (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--table", action="store_true", help="only write the table again from the JSON")
    parser.add_argument("--tiny", action="store_true", help="one and two processes on a CPU; needs --out")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        results = common.read(arguments.out, "multi_gpu")
        common.write(results, report(results), arguments.out, "multi_gpu")
        return
    if arguments.tiny and not arguments.worker and arguments.out == common.RESULTS:
        raise SystemExit("--tiny measures nothing: choose another --out.")
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs CUDA GPUs (--tiny --out DIR runs it on a CPU).")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    if arguments.worker:
        sizes = TINY if arguments.tiny else Sizes()
        work(sizes, device, arguments)
        return
    most = 2 if arguments.tiny else torch.cuda.device_count()
    counts = arguments.counts or [n for n in (1, 2, 4, 8) if n <= most]
    launch(arguments, counts)
    print((arguments.out / "multi_gpu.md").read_text())


if __name__ == "__main__":
    main()
