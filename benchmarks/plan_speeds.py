"""The speeds that `lolcats plan` reckons with, from the measurements of benchmarks/training.py.

python benchmarks/plan_speeds.py     # prints the values for src/lolcats/plan/costs.py, class Speeds
"""

import statistics
from typing import Any

import common

from lolcats.config import load_config
from lolcats.plan import Speeds, read_config, size_of
from lolcats.plan.costs import forward_operations


def speeds(results: dict[str, Any]) -> dict[str, float]:
    """The measured fields of :class:`Speeds`, by the formulas of its docstring."""
    known, geometry = Speeds(), results["geometry"]
    seconds = {name: statistics.median(part["seconds"]) for name, part in results["parts"].items() if "seconds" in part}
    size = size_of(read_config("llama-3-8b"), load_config("default"))
    products, attention = forward_operations(size, geometry["length"])
    tokens = geometry["transfer_rows"] * geometry["length"]
    units = 1e-9 * tokens * size.layers * size.heads
    softmax = tokens * attention / known.softmax / known.matmul
    forward = tokens * products / (seconds["teacher, forward alone"] - softmax) / known.matmul
    training_operations = tokens * (2 * products + 4 * size.head)
    training = training_operations / (seconds["stage 2, softmax attention"] - 3.5 * softmax) / known.matmul
    stage_2, again = seconds["stage 2, linear attention"], seconds["stage 2, linear attention, recomputed layers"]
    return {
        "forward": forward,
        "training": training,
        "transfer_ns": (seconds["stage 1, a key map per query head"] - seconds["teacher, forward alone"]) / units,
        "finetune_ns": (stage_2 - training_operations / training / known.matmul) / units,
        "recompute_ns": (again - stage_2 - tokens * products / forward / known.matmul) / units,
        "chunked_ns": (seconds["stage 1, chunked path"] - seconds["teacher, forward alone"]) / units,
    }


if __name__ == "__main__":
    for name, value in speeds(common.read(common.RESULTS, "training")).items():
        print(f"{name}: {value:.3g} (in the table: {getattr(Speeds(), name)})")
