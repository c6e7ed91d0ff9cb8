"""Both stages with their steps as CUDA graphs learn what they learn without. Needs a GPU.

In fp32 this shows to five digits. In bf16 rounding grows from step to step, so there graphs may be as far from the
plain run as other micro-batches are, which compute the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

import lolcats
from lolcats.config import Config, load_config
from lolcats.data.rows import Data
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.stages import cuda_graph
from lolcats.stages.finetune.graph import PassGraph
from lolcats.stages.finetune.stage import add_lora, finetune
from lolcats.stages.transfer.graph import MicroStepGraph
from lolcats.stages.transfer.stage import transfer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = ["max_steps=12", "learning_rate=1e-2", "batch_size=16", "log_steps=1", "eval_steps=6"]
ATTENTION = ["attention.window_size=16", "attention.feature_dim=16"]
ROWS = torch.randint(6, 300, (45, 256), generator=torch.Generator().manual_seed(0))
LABELS = ROWS.masked_fill(torch.arange(256) < 5 * torch.arange(45)[:, None], -100)
DATA = Data(ROWS[5:], ROWS[:4], ROWS[:4], "fingerprint", {}, labels={"train": LABELS[5:], "validation": ROWS[:4]})
"""The last step of an epoch has 8 of the 16 rows."""


@dataclass
class Run:
    """losses: in their order. weights: what was trained; learned: how far these have gone."""

    losses: Tensor
    weights: Tensor
    learned: Tensor

    @classmethod
    def of(cls, history: Sequence[dict[str, float]], before: dict[str, Tensor], after: dict[str, Tensor]) -> Run:
        losses = [x for entry in history for key, x in entry.items() if key in ("loss", "train_loss", "eval_loss")]
        flat = [torch.cat([x.detach().double().flatten() for x in some.values()]) for some in (before, after)]
        return cls(torch.tensor(losses, dtype=torch.float64), flat[1], (flat[1] - flat[0]).norm())

    def gaps(self, other: Run) -> tuple[Tensor, Tensor]:
        """The largest relative difference of losses, and the weights' distance as a part of what was learned."""
        losses = ((self.losses - other.losses) / self.losses).abs().max()
        return losses, (self.weights - other.weights).norm() / self.learned


def settings(stage: str, rows: int, graph: str, more: Sequence[str] = ()) -> Config:
    own = [*STEPS, f"micro_batch_size={rows}", f"cuda_graph={graph}"]
    return load_config("paper-sinks", [*ATTENTION, *(f"{stage}.{setting}" for setting in own), *more])


def stage_1(dtype: torch.dtype, place: Path, rows: int, graph: str, more: Sequence[str]) -> Run:
    config = settings("transfer", rows, graph, more)
    torch.manual_seed(0)
    model = lolcats.convert(tiny_model(num_hidden_layers=3).to("cuda", dtype), config.attention)
    before = {name: x.detach().clone() for name, x in feature_map_state(model).items()}
    history = transfer(model, DATA, config, place / f"{rows}-{graph}").history
    return Run.of(history, before, feature_map_state(model))


def stage_2(dtype: torch.dtype, place: Path, rows: int, graph: str, more: Sequence[str]) -> Run:
    config = settings("finetune", rows, graph, ["finetune.feature_map_learning_rate=1e-2", *more])
    torch.manual_seed(0)
    model = lolcats.convert(tiny_model(num_hidden_layers=3).to("cuda", dtype), config.attention)
    wrapped = add_lora(model, config.finetune)
    before = {name: x.detach().clone() for name, x in wrapped.named_parameters() if x.requires_grad}
    wrapped, result = finetune(wrapped, DATA, config, place / f"{rows}-{graph}")
    after = dict(wrapped.named_parameters())
    return Run.of(result.history, before, {name: after[name] for name in before})


KINDS = {
    "stage 1": (stage_1, []),
    "stage 2": (stage_2, []),
    "stage 2, KL": (stage_2, ["finetune.loss=kl"]),
    "window": (stage_2, ["attention.kind=window", "attention.softmax_heads={0: [1]}"]),
    "window, KL": (stage_2, ["attention.kind=window", "attention.softmax_heads={0: [1]}", "finetune.loss=kl"]),
    "unrotated": (stage_2, ["attention.feature_inputs=unrotated", "attention.softmax_heads={0: [1]}"]),
    "unrotated, KL": (
        stage_2, ["attention.feature_inputs=unrotated", "attention.softmax_heads={0: [1]}", "finetune.loss=kl"],
    ),
}  # fmt: skip


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs that were recorded; they are worth their while for few steps."""
    found: list[object] = []
    monkeypatch.setattr(cuda_graph, "WORTH", 2)
    for kind in (MicroStepGraph, PassGraph):
        own = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *given, own=own: own(self, *given) or found.append(self))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_learns_the_same(kind: str, recorded: list[object], tmp_path: Path) -> None:
    stage, more = KINDS[kind]
    plain = stage(torch.float32, tmp_path, 4, "false", more)
    assert not recorded
    losses, weights = plain.gaps(stage(torch.float32, tmp_path, 4, "true", more))
    assert len(recorded) == 1
    assert len(plain.losses) > 12
    assert losses < 1e-4
    assert weights < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_a_graph_is_as_near_as_other_micro_batches(kind: str, recorded: list[object], tmp_path: Path) -> None:
    stage, more = KINDS[kind]
    plain, other = (stage(torch.bfloat16, tmp_path, rows, "false", more) for rows in (4, 2))
    losses, weights = plain.gaps(stage(torch.bfloat16, tmp_path, 4, "auto", more))
    assert len(recorded) == 1
    usual = plain.gaps(other)
    assert losses < 2 * usual[0]
    assert weights < 2 * usual[1]
