"""The speeds that `lolcats plan` reckons with, from the measurements of benchmarks/training.py and benchmarks/large.py.

python benchmarks/plan_speeds.py     # prints the values for src/lolcats/plan/costs.py, class Speeds
"""

import statistics
from typing import Any

import common
from large_weights import KEPT, MODELS, shape

from lolcats.config import load_config
from lolcats.plan import Size, Speeds, quantized, read_config, size_of
from lolcats.plan.costs import forward_operations, linear_attention

MEMORY = 4.8 / 3.35
"""Speed of an H200's memory over that of an H100's, by their data sheets: what lies between products depends on it."""


def speeds(training: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """The measured fields of :class:`Speeds`, by the formulas of its docstring."""
    known, geometry = Speeds(), training["geometry"]
    seconds = {
        name: statistics.median(part["seconds"]) for name, part in training["parts"].items() if "seconds" in part
    }
    size = size_of(read_config("llama-3-8b"), load_config("paper-sinks"))
    products, attention = forward_operations(size, geometry["length"])
    tokens = geometry["transfer_rows"] * geometry["length"]
    units = 1e-9 * tokens * size.layers * size.heads
    softmax = tokens * attention / known.softmax / known.matmul
    forward = tokens * products / (seconds["teacher, forward alone"] - softmax) / known.matmul
    plain = seconds["stage 2, softmax attention"] - 3.5 * softmax
    stage_2, again = seconds["stage 2, linear attention"], seconds["stage 2, linear attention, recomputed layers"]
    recomputed = tokens * (products - size.layers * size.mlp * size.hidden) / forward / known.matmul
    finetune_ns = (stage_2 - plain) / units
    return {
        "forward": forward,
        "transfer_ns": (seconds["stage 1, a key map per query head"] - seconds["teacher, forward alone"]) / units,
        "finetune_ns": finetune_ns,
        "recomputed_layer": (again - stage_2 - recomputed) / size.layers / geometry["accumulated"],
        "chunked_ns": (seconds["stage 1, chunked path"] - seconds["teacher, forward alone"]) / units,
        **of_large_model(large, size, plain / tokens, finetune_ns),
    }


def of_large_model(large: dict[str, Any], small: Size, small_token: float, finetune_ns: float) -> dict[str, float]:
    """What two sizes tell: ``small_token`` are the seconds of a token of the small one, attention left out.

    Stage 2 of the large one with 4 and with 2 rows at a time differs by the weights that are dequantized. The rest is
    products, of which a token takes as many at both, and what lies between them.
    """
    known, model, parts = Speeds(), MODELS[large["model"]], large["parts"]
    recipe = load_config("paper-70b", [f"attention.softmax_budget={KEPT}"])
    whole = size_of(shape(model), load_config("paper-70b"))
    size = size_of(shape(model), quantized.kept_evenly(recipe, whole))
    step = {
        (loss, rows): statistics.median(parts[f"stage 2, {loss}, {rows} rows at a time"]["step_seconds"])
        for loss in ("cross_entropy", "kl")
        for rows in (4, 2)
    }
    each = {loss: (step[loss, 2] - step[loss, 4]) * 4 / model.batch for loss in ("cross_entropy", "kl")}  # micro-batch
    dequantize = 5 * quantized.dequantized_bytes(size) / (each["cross_entropy"] + each["kl"])  # 2 passes and 3
    tokens = model.batch * model.length
    _, attention = forward_operations(size, model.length)
    kept = 3.5 * attention * (1 - size.heads / size.queries) / known.softmax / known.matmul
    token = (step["cross_entropy", 4] - model.batch / 4 * each["cross_entropy"]) / tokens
    token -= linear_attention(size, finetune_ns) + kept
    channels = size.layers * size.hidden / (small.layers * small.hidden) / MEMORY
    operations = {s: (4.0 * s.active + 4.0 * s.head) / known.matmul for s in (small, size)}
    training = (operations[size] - channels * operations[small]) / (token - channels * small_token)
    between = (small_token - operations[small] / training) / (small.layers * small.hidden)
    search, passes = parts["selection"], parts["selection"]["seconds"] / parts["selection"]["passes"]
    passes -= quantized.batches_of(model.lengths) * quantized.dequantized_bytes(size) / dequantize
    work = search["tokens_per_score"] * sum(forward_operations(whole, max(model.lengths)))
    return {
        "training": training,
        "between_ns": 1e9 * between,
        "dequantize": dequantize,
        "search": work / passes / known.matmul,
    }


if __name__ == "__main__":
    found = speeds(common.read(common.RESULTS, "training"), common.read(common.RESULTS, "large"))
    for name, value in found.items():
        print(f"{name}: {value:.3g} (in the table: {getattr(Speeds(), name)})")
