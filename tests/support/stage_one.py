"""Stage 1 of a small model in each of its orders, for tests that compare them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import lolcats
from lolcats.config import Config, load_config
from lolcats.data.rows import Data
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.skeleton import build_skeleton
from lolcats.stages.result import StageResult
from lolcats.stages.transfer.stage import transfer, transfer_in_turn
from lolcats.weights.base import find_base, load_model

CPU = torch.device("cpu")
HARD = [  # an uneven last batch, accumulation, everything that depends on validation, chunks that end anywhere
    "transfer.coupling=per_layer", "transfer.max_steps=9", "transfer.batch_size=8", "transfer.micro_batch_size=4",
    "transfer.eval_steps=2", "transfer.save_steps=3", "transfer.schedule=reduce_on_plateau",
    "transfer.plateau_patience=0", "transfer.early_stopping_patience=2", "transfer.learning_rate=0.5",
    "transfer.chunk_tokens=700", "transfer.block_size=2", "seed=1",
]  # fmt: skip
APART = [  # layers stop at different steps
    "transfer.learning_rate=3", "transfer.early_stopping_patience=1", "transfer.max_steps=14", "transfer.eval_steps=1",
    "transfer.plateau_patience=3",
]  # fmt: skip


@dataclass
class Job:
    """A base model on disk and what it is trained with."""

    model: Path
    data: Data
    settings: list[str]

    def config(self, *changes: str) -> Config:
        return load_config("paper-sinks", [*self.settings, *HARD, *changes])

    def train(
        self, out: Path, config: Config, only: int | None = None
    ) -> tuple[dict[str, Tensor], StageResult | None]:  # fmt: skip
        """The feature maps that an order produces."""
        base = find_base(str(self.model))
        if config.transfer.order == "joint":
            model = load_model(base, torch.float32)
            torch.manual_seed(config.seed)
            lolcats.convert(model, config)
            result: StageResult | None = transfer(model, self.data, config, out)
        else:
            skeleton = build_skeleton(base, config.attention, torch.float32, CPU, config.seed)
            model = skeleton.model
            result = transfer_in_turn(skeleton, self.data, config, out, only=only)
        return feature_map_state(model), result

    def train_in_every_order(self, out: Path, *changes: str) -> dict[str, Tensor]:
        """The feature maps of the joint order, once the two others gave the same maps, result and metrics."""
        maps, result = self.train(out / "joint", self.config(*changes))
        for order in ("stream", "blocks"):
            others, same = self.train(out / order, self.config(*changes, f"transfer.order={order}"))
            assert_same(maps, others)
            assert same == result
            assert logged(out / "joint") == logged(out / order)
        return maps


def packed(data: Data) -> Data:
    """The same rows with documents of 3 to 26 tokens; the first validation row is one document."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    positions = {
        name: torch.arange(32) % (3 + 5 * torch.arange(len(rows))[:, None] % 24) for name, rows in splits.items()
    }
    positions["validation"][0] = torch.arange(32)
    return replace(data, positions=positions)


def logged(directory: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times and speeds, which differ from run to run."""
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in entries
    ]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
