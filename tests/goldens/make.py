"""Golden results of attention transfer (stage 1), for tests/training/test_goldens.py.

stage1.json was written by commit b5a2d0a, whose joint runs go through transformers' Trainer. To write it again, run the
code of that commit in a worktree, with one thread:

    git worktree add ../b5a2d0a b5a2d0a
    OMP_NUM_THREADS=1 PYTHONPATH=../b5a2d0a/src python tests/goldens/make.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import tiny_model

import lolcats
from lolcats.config import Config

try:
    from lolcats.data.rows import Data
except ImportError:  # as commit b5a2d0a has it
    from lolcats.training.data import Data

GOLDENS = Path(__file__).parent / "stage1.json"
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
COMMON = [
    "attention.window_size=8", "attention.sinks=2", "attention.feature_dim=4", "data.sequence_length=48",
    "transfer.max_steps=20", "transfer.batch_size=4", "transfer.micro_batch_size=4", "transfer.eval_steps=3",
    "transfer.save_steps=100", "transfer.log_steps=1", "transfer.schedule=constant", "seed=1",
    "finetune.max_steps=4", "finetune.batch_size=4", "finetune.micro_batch_size=4", "finetune.eval_steps=2",
    "finetune.log_steps=1",
]  # fmt: skip
PER_LAYER = "transfer.coupling=per_layer"
PLATEAU = ["transfer.schedule=reduce_on_plateau", "transfer.plateau_patience=0", "transfer.learning_rate=1",
           "transfer.eval_steps=1", "transfer.early_stopping_patience=0"]  # fmt: skip
EARLY = ["transfer.learning_rate=1", "transfer.eval_steps=1", "transfer.early_stopping_patience=2"]
CASES: dict[str, list[str]] = {
    "joint": ["transfer.schedule=cosine", "transfer.warmup_steps=3"],
    "per_layer": [PER_LAYER, "transfer.schedule=cosine", "transfer.warmup_steps=3"],
    "accumulation": [
        "transfer.batch_size=8", "transfer.micro_batch_size=2", "transfer.max_steps=-1", "transfer.epochs=6",
        "transfer.schedule=linear",
    ],
    "plateau": PLATEAU,
    "plateau, per_layer": [PER_LAYER, *PLATEAU],
    "early stopping": EARLY,
    "early stopping, per_layer": [PER_LAYER, *EARLY],
    "clip": ["transfer.max_grad_norm=0.02"],
    "no clip": ["transfer.max_grad_norm=0"],
    "cross-entropy": ["transfer.xent_weight=0.5"],
    "packed documents": ["data.reset_at_documents=true"],
    "unrotated": ["attention.feature_inputs=unrotated", "attention.sinks=4"],
    "no sinks, sliding": ["attention.sinks=0", "attention.window=sliding", "attention.key_maps=per_kv_head"],
    "linear": [
        "attention.kind=linear", "attention.decay=retnet", "attention.normalizer=group_norm",
        "transfer.weight_decay=0.1",
    ],
    "t2r": ["attention.feature_map=t2r", "transfer.weight_decay=0.1"],
    "a layer that stays softmax": ["attention.layers={0: softmax}"],
}  # fmt: skip
"""Settings of each run, beyond ``COMMON``."""
SERIES = ("loss", "grad_norm", "learning_rate", "eval_loss")


def case_config(case: str) -> Config:
    return lolcats.load_config("paper-sinks", [*COMMON, *CASES[case]])


def case_data(apart: bool) -> Data:
    """22 training rows, so that batches of 8 leave a smaller one; ``apart``: documents of 5 to 40 tokens in rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(6, 300, (33, 48), generator=generator)
    if not apart:
        return Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {})
    lengths = torch.randint(5, 40, (1000,), generator=generator).tolist()
    places = torch.cat([torch.arange(n) for n in lengths])[: rows.numel()].view_as(rows)
    since_row = torch.arange(rows.shape[1]).expand_as(rows)
    places = torch.minimum(places, since_row)
    positions = {"train": places[11:], "validation": places[:5], "test": places[5:8]}
    return Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {}, positions)


def converted(config: Config) -> Any:
    model = tiny_model(**SMALL)
    torch.manual_seed(config.seed)
    return lolcats.convert(model, config)


def measure(case: str, directory: Path) -> dict[str, Any]:
    """What a run of stage 1 decides, logs and leaves in the feature maps."""
    config = case_config(case)
    model, data = converted(config), case_data(config.data.reset_at_documents)
    result = lolcats.transfer(model, data, config, directory)
    logged = read_metrics(directory)
    maps = {name: digest(p) for name, p in model.named_parameters() if ".lolcats." in name}
    decisions = {"steps": result.steps, "best_step": result.best_step, "best_loss": result.best_loss}
    return {**decisions, **{name: series(logged, name) for name in SERIES}, "maps": maps}


def digest(tensor: Tensor) -> list[float]:
    """Norm of a tensor, and its projection on a fixed unit vector, which also tells signs and places."""
    flat = tensor.detach().double().flatten()
    weights = torch.arange(1, len(flat) + 1).double().cos()
    return [flat.norm().item(), (flat @ weights / weights.norm()).item()]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def series(logged: list[dict[str, Any]], name: str) -> list[list[float]]:
    """[step, value] of each entry that has ``name``."""
    return [[entry["step"], entry[name]] for entry in logged if name in entry]


def metric_names(directory: Path) -> dict[str, list[str]]:
    """The names in metrics.jsonl of each stage: of stage 1 with either coupling, and of stage 2."""
    found = {}
    for case in ("joint", "per_layer"):
        lolcats.transfer(converted(case_config(case)), case_data(False), case_config(case), directory / case)
        found[f"transfer, {case}"] = names(directory / case)
    lolcats.finetune(converted(case_config("joint")), case_data(False), case_config("joint"), directory / "finetune")
    return {**found, "finetune": names(directory / "finetune")}


def names(directory: Path) -> list[str]:
    return sorted({name for entry in read_metrics(directory) for name in entry})


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        goldens = {case: measure(case, place / case) for case in CASES}
        everything = {"metric_names": metric_names(place / "names"), "cases": goldens}
    GOLDENS.write_text(dumped(everything) + "\n")


def dumped(value: Any, indent: int = 0) -> str:
    """JSON with lists on one line and floats to ten digits."""
    if isinstance(value, dict):
        inner = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(k)}: {dumped(v, indent + 1)}" for k, v in value.items())
        return f"{{\n{inner}\n{' ' * indent}}}"
    if isinstance(value, list):
        return f"[{', '.join(dumped(item) for item in value)}]"
    return f"{value:.10g}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    main()
