"""Tokens per second on a CPU: the engine with a linearized model against Hugging Face's generate with its teacher.

    python benchmarks/engine.py TEACHER STUDENT      # prints a table

One sequence, greedy, fp32; teacher and student take turns in one process and the medians are reported. *decode* counts
the tokens after the first and the time between the first and the last; *whole* counts prefill too. With --batches the
engine alone runs several sequences at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lolcats.inference.engine import Delta, Engine, Request
from lolcats.inference.sampling import SamplingParams
from lolcats.modeling.base import find_base, load_model, load_tokenizer
from lolcats.modeling.checkpoint import load


class Stopwatch:
    """A streamer of transformers that notes when each token came (the prompt comes first)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def teacher_times(model: Any, prompt: list[int], new: int) -> list[float]:
    """When generation began, and when each new token came."""
    watch, ids = Stopwatch(), torch.tensor([prompt])
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
        streamer=watch,
    )  # fmt: skip
    return [start, *watch.times[1:]]


def engine_times(engine: Engine, prompts: list[list[int]], new: int) -> list[float]:
    """The same for several sequences at once, by the steps of the engine."""
    times, ends = [time.perf_counter()], [0]

    def note(delta: Delta) -> None:
        ends[0] += delta.finish_reason is not None

    for prompt in prompts:
        engine.submit(Request(prompt, SamplingParams(max_tokens=new), note))
    while ends[0] < len(prompts):
        engine.step()
        if len(engine.running) + ends[0] == len(prompts):
            times.append(time.perf_counter())
    return times


def rates(measure: Callable[[], list[float]], sequences: int = 1) -> tuple[float, float]:
    """(decode, whole) tokens per second."""
    times = measure()
    tokens = sequences * (len(times) - 2)
    return tokens / (times[-1] - times[1]), (tokens + sequences) / (times[-1] - times[0])


def compare(teacher: Any, engine: Engine, length: int, new: int, runs: int) -> str:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(10, 40000, (length,), generator=generator).tolist()
    results: dict[str, list[tuple[float, float]]] = {"teacher": [], "engine": []}
    for _ in range(runs):
        results["teacher"].append(rates(lambda: teacher_times(teacher, prompt, new)))
        results["engine"].append(rates(lambda: engine_times(engine, [prompt], new)))
    cells = []
    for kind in (0, 1):
        a, b = (statistics.median(pair[kind] for pair in results[name]) for name in ("teacher", "engine"))
        cells += [f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}×"]
    return f"| {length:,} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="directory or .gguf file")
    parser.add_argument("student", help="linearized model directory")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--batches", type=int, nargs="*", default=[])
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    base = find_base(args.teacher)
    student, tokenizer = load(args.student, torch.float32), load_tokenizer(base)
    if args.contexts:
        teacher = load_model(base, torch.float32)
        engine = Engine(student, tokenizer, slots=1, prefix_bytes=0, stop_tokens=())
        print(f"{torch.get_num_threads()} threads, fp32, {args.new} new tokens, medians of {args.runs} runs\n")
        print("| context | teacher decode | engine decode | ratio | teacher whole | engine whole | ratio |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for length in args.contexts:
            print(compare(teacher, engine, length, args.new, args.runs), flush=True)
    for batch in args.batches:
        engine = Engine(student, tokenizer, slots=batch, prefix_bytes=0, stop_tokens=())
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(10, 40000, (batch, 128), generator=generator).tolist()
        decode, _ = rates(lambda engine=engine, prompts=prompts: engine_times(engine, prompts, args.new), batch)
        print(f"batch {batch}: {decode:.1f} tokens/s decode, {engine.state_bytes / 2**20:.1f} MiB of state a row")


if __name__ == "__main__":
    main()
