"""Stages 1 and 2 and generation on 1, 2, 4, 8 GPUs of one machine, at Llama geometries with random weights.

    python benchmarks/multi_gpu.py              # all GPUs there are; writes benchmarks/results/multi_gpu.json and .md
    python benchmarks/multi_gpu.py --counts 4 2 1     # in another order: GPUs that are done with are free
    python benchmarks/multi_gpu.py --table      # the table again, from the JSON
    python benchmarks/multi_gpu.py --tiny --out DIR   # two processes on a CPU, at a size that measures nothing

Starts itself with torchrun once for each number of GPUs. Every number of GPUs trains on the same batches from the same
weights, so loss curves must be the same; the micro-batch of a GPU is the same too, and fewer GPUs accumulate more of
them. Weights are drawn tensor by tensor, where they are used. What a part found is written before the next begins.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from profiles import profiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, LlamaConfig

import lolcats
from lolcats.config import FinetuneConfig, TransferConfig, load_config
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.loss import find_head, language_model_loss
from lolcats.modeling.parallel import tensor_parallel
from lolcats.plan import Machine, Work, plan_finetune, plan_transfer, read_config, size_of
from lolcats.ranks import ranks
from lolcats.stages.distributed import all_reduce_gradients, materialize, own_device, shard
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.trained import train_only
from lolcats.stages.transfer.stage import layer_losses

SCALING = {2: 0.9, 4: 0.85, 8: 0.8}  # targets: speed of n GPUs against n times one GPU's
WARM_UP = 2
LARGER = 3  # times the rows of a micro-batch: does a sharded layer take as long with more to compute?
TINY_CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured. Rows are those of a micro-batch of one GPU."""

    models: tuple[str, str] = ("llama-3-8b", "llama-3.1-70b")
    length: int = 1024
    transfer_rows: int = 8
    finetune_rows: int = 4
    large_rows: int = 2
    steps: int = 6
    large_steps: int = 3
    prompt: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 256)
    settings: tuple[str, ...] = ()


TINY = Sizes(("tiny", "tiny"), 64, 2, 2, 1, 3, 1, 24, 4, (1, 3),
             ("attention.feature_dim=16", "attention.window_size=16", "attention.sinks=2",
              "data.sequence_length=64"))  # fmt: skip


class Bench:
    """One rank. ``ranks``: how many there are; ``most``: how many there are in the largest measurement."""

    def __init__(self, sizes: Sizes, device: torch.device, most: int) -> None:
        self.sizes, self.ranks, self.most = sizes, ranks().size, most
        self.device = own_device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.config = load_config("default", sizes.settings)
        # now: counting runs a small model on the CPU, which layers fused for the GPU would break
        self.counted = {name: size_of(model_config(name), self.config) for name in sizes.models}

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
        with fused_layers(model, True):
            return self.tune(model, name, rows, self.sizes.steps)

    def sharded(self) -> dict[str, Any]:
        """Stage 2, the base model sharded over all GPUs (FSDP2): also with larger micro-batches, and one step of each
        rank looked into."""
        name, rows = self.sizes.models[0], self.sizes.finetune_rows
        model = self.build(name, lora=True, sharded=True)
        with fused_layers(model, True):
            found = self.tune(model, name, rows, self.sizes.steps, sharded=True)
            found["profile"] = profiled(self.tuning(model, rows), self.device)
            common.reset_peak(self.device)
            if self.predicted("finetune", name, LARGER * rows, sharded=True)["fits"]:
                found["larger"] = self.tune(model, name, LARGER * rows, self.sizes.large_steps, sharded=True)
        return found

    def tune(
        self, model: Any, name: str, rows: int, steps: int, sharded: bool = False, recompute: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        """Stage 2 of a model by micro-batches of ``rows``, and what was planned."""
        found = self.measure(self.tuning(model, rows), rows * self.most * self.sizes.length, steps)
        return found | self.predicted("finetune", name, rows, recompute, sharded)

    def tuning(self, model: Any, rows: int) -> Callable[[], Tensor]:
        """An optimizer step of LoRA by micro-batches of ``rows``."""
        lora = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(lora, lr=1e-3, weight_decay=0.0)
        micro_batches, head = self.micro_batches(rows), find_head(model)

        def step() -> Tensor:
            losses = []
            for ids in micro_batches:
                loss = language_model_loss(model, head, ids) / len(micro_batches)
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
        with fused_layers(model, True):
            return self.tune(model, name, self.sizes.large_rows, self.sizes.large_steps, sharded, recompute=True)

    @torch.no_grad()
    def generate(self) -> dict[str, Any]:
        """Greedy tokens a second behind a prompt, the heads split over all GPUs (tensor parallel)."""
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

    def build(self, name: str, lora: bool = False, sharded: bool = False, split: bool = False) -> Any:
        """A converted model with random weights: whole, sharded over the ranks, or its heads split over them."""
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(model_config(name), dtype=half, attn_implementation="sdpa")
        model = lolcats.convert(model.eval(), self.config)
        if lora:
            add_lora(model, FinetuneConfig())  # the LoRA layers are in the model itself
        for module in model.modules():
            for own, p in module._parameters.items():
                if p is not None:
                    module._parameters[own] = nn.Parameter(p.to("meta"), p.requires_grad)
        mesh = init_device_mesh(self.device.type, (self.ranks,)) if self.ranks > 1 else None
        if sharded:
            shard(model, self.device, mesh)
        if split and mesh is not None:
            tensor_parallel(model, mesh)
        materialize(model, self.device, partial(self.fill, split_heads=split))
        common.synchronize(self.device)
        return model

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
        """Losses and seconds of the steps behind the warm-up, and the peak of allocated memory of any GPU."""
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


def model_config(name: str) -> Any:
    return LlamaConfig(**TINY_CONFIG) if name == "tiny" else read_config(name)


def seeded(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))


SHARDED = "stage 2, sharded"  # in results of 2026-11-25 that is what "stage 2" of several GPUs was
PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "stage 1": Bench.transfer, "stage 2": Bench.finetune, SHARDED: Bench.sharded, "generation": Bench.generate,
    "large stage 2": Bench.large,
}  # fmt: skip


def work(sizes: Sizes, device: torch.device, most: int, file: Path, end: float) -> None:
    """One rank: every part that begins before ``end`` (seconds since the epoch), each result added to ``file``."""
    bench = Bench(sizes, device, most)
    for name, part in PARTS.items():
        if name == SHARDED and bench.ranks == 1:
            continue
        late = torch.tensor(float(time.time() > end), device=bench.device)
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
            with file.open("a") as stream:
                stream.write(json.dumps([bench.ranks, name, found]) + "\n")
            shown = {k: v for k, v in found.items() if k not in ("losses", "profile")}
            print(bench.ranks, name, shown, file=sys.stderr, flush=True)
        common.free(device)
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(tiny: bool, counts: list[int], seconds: float, directory: Path, note: str) -> dict[str, Any]:
    """Start torchrun for each number of ranks, and write what all of them found."""
    end, file = time.time() + seconds, directory / "multi_gpu.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    results: dict[str, Any] = {
        "date": str(date.today()), "device": common.hardware(torch.device("cpu" if tiny else "cuda")),
        "counts": sorted(counts), "note": note,
        "versions": common.installed("torch", "transformers", "peft", "triton", "liger-kernel"),
        "sizes": asdict(TINY if tiny else Sizes()), "parts": {}, "failures": {},
    }  # fmt: skip
    for index, count in enumerate(counts):
        own_end = time.time() + (end - time.time()) / (len(counts) - index)  # an equal share of what is left
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                   __file__, "--worker", str(file), "--most", str(max(counts)), "--end", str(own_end - 20)]  # fmt: skip
        try:
            if code := run([*command, *(["--tiny"] if tiny else [])], end - time.time()):
                results["failures"][str(count)] = f"ended with {code}"
        except subprocess.TimeoutExpired:
            results["failures"][str(count)] = "no time left"
        lines = file.read_text().splitlines() if file.exists() else []
        results["parts"] = collect(sorted((json.loads(line) for line in lines), key=itemgetter(0)))
        common.write(results, report(results), directory, "multi_gpu")
    file.unlink(missing_ok=True)
    return results


def run(command: list[str], seconds: float) -> int:
    """The exit code of ``command``; behind ``seconds`` it is killed with all processes that it started."""
    environment = {"NCCL_NVLS_ENABLE": "0", **os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def collect(found: list[list[Any]]) -> dict[str, dict[str, Any]]:
    """Part -> number of ranks -> result, with what compares it to one rank's."""
    parts: dict[str, dict[str, Any]] = {}
    larger = [[count, f"{name}, larger", result.pop("larger")] for count, name, result in found if "larger" in result]
    for count, name, result in [*found, *larger]:
        single = parts.get("stage 2" if name.startswith(SHARDED) else name, {}).get("1")
        if count > 1 and single and "missing" not in single and "missing" not in result:
            if "losses" in result:
                if result["tokens"] == single["tokens"]:
                    pairs = zip(result["losses"], single["losses"], strict=True)
                    result["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
                result["efficiency"] = result["tokens_per_second"] / count / single["tokens_per_second"]
            for rows, batch in result.get("batches", {}).items():
                batch["speed_up"] = batch["tokens_per_second"] / single["batches"][rows]["tokens_per_second"]
        parts.setdefault(name, {})[str(count)] = result
    order = list(PARTS)
    return dict(sorted(parts.items(), key=lambda part: order.index(part[0].removesuffix(", larger"))))


def report(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    most = max(results["counts"])
    packages = common.listed(results["versions"])
    small, large = sizes["models"]
    lines = [
        "# Several GPUs",
        "",
        f"`python benchmarks/multi_gpu.py`, {results['date']}, up to {most} × {results['device']}; {packages}.",
        f"Random weights in bf16; {small}, and {large} with recomputed layers in the large stage 2. Every number "
        f"of GPUs trains on the same rows of {sizes['length']} tokens: {most} micro-batches of "
        f"{sizes['transfer_rows']}, {sizes['finetune_rows']} and (large) {sizes['large_rows']} rows a step. Stage 1 is "
        f"data-parallel, {kind_of_stage_2(results['parts'])}. "
        "Efficiency: tokens/s against one GPU's times the number of GPUs. Peak: PyTorch's allocated memory, weights "
        f"included, of the fullest GPU; planned: what `lolcats plan` says. {results['note']}".rstrip(),
        "",
        "| part | GPUs | tokens/s | planned | efficiency | target | losses differ by | peak GiB | planned |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in results["parts"].items():
        for count, found in part.items():
            if "missing" in found:
                lines.append(f"| {name} | {count} | {found['missing']} | | | | | | |")
            elif "losses" in found:
                share = f"{found['efficiency']:.2f}" if "efficiency" in found else ""
                differ = f"{100 * found['loss_difference']:.2g} %" if "loss_difference" in found else ""
                speeds = f"{found['tokens_per_second']:,.0f} | {found['predicted_tokens_per_second']:,.0f}"
                memory = f"{found['peak_gib'] or 0:.1f} | {found['predicted_gib']:.1f}"
                target = SCALING.get(int(count), "")
                lines.append(f"| {name} | {count} | {speeds} | {share} | {target} | {differ} | {memory} |")
    lines += [
        "",
        f"Generation, greedy, plain PyTorch, {sizes['new_tokens']} tokens behind {sizes['prompt']}; heads split "
        "over the GPUs (tensor parallel):",
        "",
        "| GPUs | batch | prefill s | decoded tokens/s | against one GPU |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count, found in results["parts"].get("generation", {}).items():
        for rows, batch in found.get("batches", {}).items():
            speed_up = f"{batch['speed_up']:.2f}" if "speed_up" in batch else ""
            times = f"{batch['prefill_seconds']:.3f} | {batch['tokens_per_second']:,.1f}"
            lines.append(f"| {count} | {rows} | {times} | {speed_up} |")
    for found in results["parts"].get(SHARDED, {}).values():
        lines += profile_lines(found["profile"]) if "profile" in found else []
    lines += [f"\n{count} ranks: {what}." for count, what in results["failures"].items()]
    return "\n".join(lines) + "\n"


def kind_of_stage_2(parts: dict[str, Any]) -> str:
    if SHARDED not in parts:
        return "stage 2 sharded (FSDP2)"
    return (
        "stage 2 data-parallel, too, or sharded (FSDP2), then also with "
        f"micro-batches {LARGER} times as large, and against one GPU's stage 2; the large one is sharded"
    )


def profile_lines(found: dict[str, Any]) -> list[str]:
    """One step of the first rank in a sentence; what took longest in short tables."""
    share = 100 * found["communication_hidden"]
    lines = [
        "",
        f"A sharded step under torch.profiler, first rank: {found['milliseconds']:.0f} ms from the first kernel to the "
        f"last; GPU busy {found['busy']:.0f}, computing {found['computing']:.0f}, communicating "
        f"{found['communication']:.0f} ms, of which {share:.0f} % while computing.",
    ]
    for name, title in (("host", "host, alone"), ("hooks", "host, with what it calls"), ("gpu", "kernel")):
        if found[name]:
            lines += ["", f"| {title} | calls | ms |", "|---|---:|---:|"]
            lines += [f"| `{what}` | {calls} | {time:.1f} |" for what, calls, time in found[name][:6]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of GPUs in their order (default: 1, 2, 4, 8)")
    parser.add_argument("--note", default="", help="what else a reader must know")
    parser.add_argument("--deadline", type=float, default=280, help="seconds for everything (default: %(default)s)")
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
        work(sizes, device, arguments.most, arguments.worker, arguments.end)
        return
    most = 2 if arguments.tiny else torch.cuda.device_count()
    counts = arguments.counts or [n for n in (1, 2, 4, 8) if n <= most]
    launch(arguments.tiny, counts, arguments.deadline, arguments.out, arguments.note)
    print((arguments.out / "multi_gpu.md").read_text())


if __name__ == "__main__":
    main()
