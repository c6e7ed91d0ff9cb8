"""What kept heads cost in training: steps of both stages with one of eight key/value heads kept against none.

    python benchmarks/kept_training.py [--layers 8] [--length 4096] [--rows 2] [--turns 3] [--out results.json]

Random weights of Llama-3-8B's geometry, cut to --layers. A step is the difference of a long and a short run of a stage
(lolcats.transfer, lolcats.finetune), divided by the steps between them. The two models take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from kept_heads import attention
from transformers import PreTrainedModel

import lolcats
from lolcats.config import Config, load_config
from lolcats.data.rows import Data
from lolcats.lab import bench

SHORT, LONG = 3, 13
"""Steps of the two runs."""
STAGES: dict[str, Callable[..., Any]] = {"transfer": lolcats.transfer, "finetune": lolcats.finetune}


def seconds(model: PreTrainedModel, data: Data, config: Config, stage: str, steps: int) -> float:
    """Time of a run of ``stage``."""
    settings = replace(getattr(config, stage), batch_size=len(data.test), micro_batch_size=len(data.test),
                       max_steps=steps, eval_steps=1000, save_steps=1000)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        trained = STAGES[stage](model, data, replace(config, **{stage: settings}), Path(directory))
        common.synchronize(model.device)
        took = time.perf_counter() - began
    if stage == "finetune":
        trained[0].unload()
    return took


def measure(shape: str, layers: int, rows: int, length: int, turns: int, until: float) -> dict[str, list[float]]:
    """Milliseconds a step by stage and kept heads, one for every turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = {**bench.SHAPES[shape], "num_hidden_layers": layers}
    bench.SHAPES["cut"] = sizes
    tokens = torch.randint(sizes["vocab_size"], (LONG * rows, length))
    data = Data(tokens, tokens[:rows], tokens[:rows], "benchmark", {})
    models = {}
    for kept in ("none", "eighth"):
        chosen = attention(kept, layers, sizes["num_key_value_heads"])
        config = load_config("paper-sinks", ["attention.sinks=4"])
        config = replace(config, attention=replace(config.attention, softmax_heads=chosen.softmax_heads))
        models[kept] = bench.random_model("cut", config.attention, device, dtype), config
    found: dict[str, list[float]] = {}
    for stage in STAGES:
        for model, config in models.values():  # kernels are compiled
            seconds(model, data, config, stage, 2)
        for _ in range(turns):
            for kept, (model, config) in models.items():
                if time.time() > until:
                    break
                short, long = (seconds(model, data, config, stage, steps) for steps in (SHORT, LONG))
                found.setdefault(f"{stage}, {kept} kept", []).append(1e3 * (long - short) / (LONG - SHORT))
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default: 4096)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step (default: 2)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="begin no turn after that time (default: 60)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script; works on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if not (torch.cuda.is_available() or arguments.tiny):
        parser.error("torch finds no GPU; --tiny tries the script on a CPU")
    shape, layers = ("tiny", 2) if arguments.tiny else ("llama3-8b", arguments.layers)
    until = time.time() + 60 * arguments.minutes
    steps = measure(shape, layers, arguments.rows, arguments.length, arguments.turns, until)
    medians = {name: statistics.median(times) for name, times in steps.items()}
    ratios = {stage: medians[f"{stage}, eighth kept"] / medians[f"{stage}, none kept"] for stage in STAGES
              if f"{stage}, eighth kept" in medians}  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"device": common.hardware(device), "torch": torch.__version__, "layers": layers, "ratios": ratios,
               "length": arguments.length, "rows": arguments.rows, "ms": steps}  # fmt: skip
    print(json.dumps(results, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
