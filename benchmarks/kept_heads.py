"""Decoding with kept heads: whether it is right, and how fast it is at a long context, next to keeping all heads.

    python benchmarks/kept_heads.py [--context 32768] [--batch 16] [--layers 32] [--steps 100] [--out results.json]

Random weights of Llama-3-8B's geometry. *Check*: the engine (with CUDA graphs on a GPU) gives the greedy tokens of
Hugging Face's generate, in fp32, with two layers. *Speed*: tokens per second in bf16 at a given number of sequences and
at the most that fit, with all heads kept, with an eighth of the key/value heads (one in each layer), and with none.
Contexts are not prefilled: blocks and counts are set up as a prefill would leave them, with random keys.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import hardware, synchronize
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig
from lolcats.inference.engine import Delta, Engine, Request
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.lab import bench

SPARE = 4 << 30
"""Bytes to leave free beside the most sequences that fit."""
MOST = 512


def attention(kept: str, layers: int, kv_heads: int) -> AttentionConfig:
    """``all``, ``eighth`` (of the key/value heads, at least one in each layer) or ``none``."""
    if kept == "all":
        return AttentionConfig(kind="softmax")
    heads = {str(layer): list(range(max(1, kv_heads // 8))) for layer in range(layers)} if kept == "eighth" else {}
    return AttentionConfig(softmax_heads=heads)


def model_of(kept: str, shape: str, layers: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    sizes = bench.SHAPES[shape]
    bench.SHAPES["cut"] = {**sizes, "num_hidden_layers": layers}
    return bench.random_model("cut", attention(kept, layers, sizes["num_key_value_heads"]), device, dtype)


def ignore(_: Delta) -> None:
    pass


# Check


def check(kept: str, shape: str, device: torch.device, lengths: tuple[int, ...], new: int) -> dict[str, Any]:
    """How many prompts get the tokens of Hugging Face's generate, and after how many the others part."""
    model = model_of(kept, shape, 2, device, torch.float32)
    scores = {n: p for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n}
    with torch.no_grad():  # attention far from uniform, so that mistakes show
        for parameter in scores.values():
            parameter.mul_(4)
    prompts = [bench.prompts(model, 1, length)[0] for length in lengths]
    expected = [generated(model, prompt, new) for prompt in prompts]
    engine = Engine(model, None, len(prompts), prefix_bytes=0, stop_tokens=(), context=max(lengths) + new)
    requests = [Request(prompt, SamplingParams(max_tokens=new), ignore, text=False) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    engine.run()
    parted = [first_difference(r.generated, e) for r, e in zip(requests, expected, strict=True)]
    graphs = engine.graphs is not None
    engine.close()
    return {"kept": kept, "graphs": graphs, "prompts": list(lengths), "new": new, "part_after": parted}


def generated(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )
    said: list[int] = out[0, len(prompt) :].tolist()
    return said


def first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


# Speed


def fill(engine: Engine, context: int, most: int) -> None:
    """Requests in all slots, as if prompts of ``context`` tokens had been prefilled."""
    if engine.kept is not None:
        for group in engine.kept.groups:
            for pair in group.tensors.values():
                for x in pair:
                    x.normal_()
    for state in engine.table.states:
        state.seen.rows.fill_(context)
    for slot in range(engine.table.slots):
        request = Request([1] * context, SamplingParams(max_tokens=most), ignore, text=False)
        request.begin(None)
        if engine.kept is not None:
            tables = engine.kept.empty()
            engine.kept.reserve(tables, context)
            tables.advance(context)
            engine.table.tables[slot] = tables
        engine.running.append(request)
        engine.inputs[:, slot] = torch.tensor([1, context])


def most_slots(model: PreTrainedModel, context: int) -> int:
    """Sequences that fit beside the weights."""
    free, config = torch.cuda.mem_get_info(model.device)[0] - SPARE, model.config.get_text_config()
    kept = bench.token_bytes(model) * (context + 64)
    return max(1, min(MOST, free // (bench.state_bytes(model, torch.float32) + kept + 4 * config.vocab_size)))


@torch.inference_mode()
def speed(kept: str, model: PreTrainedModel, batch: int, context: int, steps: int) -> dict[str, Any]:
    """batch: 0 for the most that fit."""
    slots, room = batch or most_slots(model, context), context + 2 * steps + 64
    row: dict[str, Any] = {"kept": kept, "batch": slots, "context": context}
    try:
        blocks = slots * (-(-room // 64) + 1)
        engine = Engine(
            model, None, slots, prefix_bytes=0, batch_sizes=[slots], stop_tokens=(), context=room,
            kept_bytes=blocks * 64 * bench.token_bytes(model),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        return {**row, "missing": "out of memory"}
    try:
        fill(engine, context, room - context)
        for _ in range(max(2, steps // 10)):
            engine.step()
        synchronize(model.device)
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        synchronize(model.device)
        seconds = (time.perf_counter() - began) / steps
        allocated = engine.table.nbytes + (engine.kept.nbytes if engine.kept else 0)
        return {
            **row, "graphs": engine.graphs is not None, "step_ms": 1e3 * seconds, "tokens_per_second": slots / seconds,
            "bytes_per_sequence": allocated // slots, "running": len(engine.running),
        }  # fmt: skip
    finally:
        engine.close()
        engine.slots.clear()


def speeds(shape: str, layers: int, device: torch.device, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for kept in arguments.kept.split(","):
        model = model_of(kept, shape, layers, device, dtype)
        for batch in [int(x) for x in arguments.batch.split(",")]:
            rows.append(speed(kept, model, batch, arguments.context, arguments.steps))
            print(json.dumps(rows[-1]), flush=True)
            free(device)
        del model
        free(device)
    return rows


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="tokens of each sequence (default: 32768)")
    parser.add_argument("--batch", default="16,0", help="numbers of sequences; 0 = the most that fit (default: 16,0)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model for speed (default: 32)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps to time (default: 100)")
    parser.add_argument("--kept", default="all,eighth,none", help="what is kept: all, eighth, none (default: each)")
    parser.add_argument("--no-check", action="store_true", help="only speed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script; works on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("torch finds no GPU; --tiny tries the script on a CPU")
    shape, layers, lengths = "llama3-8b", arguments.layers, (5, 64, 100, 700)
    if arguments.tiny:
        shape, layers, lengths = "tiny", 2, (5, 40)
    results: dict[str, Any] = {"device": hardware(device), "torch": torch.__version__, "check": [], "speed": []}
    for kept in () if arguments.no_check else ("eighth", "all"):
        results["check"].append(check(kept, shape, device, lengths, 24))
        print(json.dumps(results["check"][-1]), flush=True)
        free(device)
    results["speed"] = speeds(shape, layers, device, arguments)
    print(compared(results["speed"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def compared(rows: list[dict[str, Any]]) -> str:
    """A table of the speeds, with each row's factor over all heads kept in the same place of the list of batches."""
    lines = ["| kept | sequences | ms a step | tokens/s | against all | GiB a sequence |", "|---|---|---|---|---|---|"]
    first, seen = [row.get("tokens_per_second") for row in rows if row["kept"] == "all"], dict[str, int]()
    for row in rows:
        place = seen[row["kept"]] = seen.get(row["kept"], -1) + 1
        if "missing" in row:
            lines.append(f"| {row['kept']} | {row['batch']} | {row['missing']} | | | |")
            continue
        base = first[place] if place < len(first) else None
        factor = f"{row['tokens_per_second'] / base:.2f}" if base else ""
        lines.append(
            f"| {row['kept']} | {row['batch']} | {row['step_ms']:.2f} | {row['tokens_per_second']:,.0f} | {factor} "
            f"| {row['bytes_per_sequence'] / 2**30:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
