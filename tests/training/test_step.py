"""What a step of stage 2 does besides its arithmetic: how little of it there is, and that it changes no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from transformers import Trainer

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.data.rows import Rows
from lolcats.stages.arguments import training_arguments
from lolcats.stages.finetune.stage import FinetuneTrainer, add_lora
from lolcats.stages.finetune.trainer import quick_zero_grad

IDS = torch.randint(6, 300, (4, 40), generator=torch.Generator().manual_seed(0))
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
STAGE = FinetuneConfig(rank=4, batch_size=4, micro_batch_size=2)


def student(stage: FinetuneConfig = STAGE, name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model with LoRA whose matrices are all different from 0."""
    torch.manual_seed(0)
    wrapped = add_lora(lolcats.convert(tiny_model(name).to(dtype), SMALL), stage)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.fixture
def trainer(tmp_path: Path) -> FinetuneTrainer:
    rows = Rows(IDS)
    made = FinetuneTrainer(student(), STAGE, rows, rows, "finetune", tmp_path, tmp_path / "metrics.jsonl")
    made.current_gradient_accumulation_steps = 2
    return made


def gradients(model: nn.Module, step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = step()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_is_that_of_transformers(trainer: FinetuneTrainer) -> None:
    inputs = {"input_ids": IDS[:2], "labels": IDS[:2]}
    ours = gradients(trainer.model, lambda: trainer.training_step(trainer.model, inputs))
    theirs = gradients(trainer.model, lambda: Trainer.training_step(trainer, trainer.model, inputs))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0


def test_a_step_does_not_visit_every_module(trainer: FinetuneTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, model = {"input_ids": IDS[:2], "labels": IDS[:2]}, trainer.model
    with quick_zero_grad(model, trainer.trained):
        step = lambda: (trainer.training_step(model, inputs), trainer.floating_point_ops(inputs),  # noqa: E731
                        trainer._clip_grad_norm(model), model.zero_grad())  # fmt: skip
        step()
        assert all(p.grad is None for p in model.parameters())
        visits: list[str] = []
        for name in ("train", "named_modules", "named_parameters"):
            monkeypatch.setattr(nn.Module, name, lambda self, *_, name=name, **__: visits.append(name) or iter(()))
        step()
    assert not visits
    monkeypatch.undo()
    model.eval()
    trainer.training_step(model, inputs)
    assert all(module.training for module in model.modules()), "evaluation must not leave it as it is"
    assert "zero_grad" not in vars(model)


def test_batches_are_copied_ahead_without_waiting(tmp_path: Path) -> None:
    on_gpu, on_cpu = (
        training_arguments(STAGE, tmp_path, 0, torch.device(kind), []) for kind in ("cuda", "cpu")
    )  # fmt: skip
    assert on_gpu.dataloader_pin_memory
    assert on_gpu.accelerator_config.non_blocking
    assert not on_cpu.accelerator_config.non_blocking
