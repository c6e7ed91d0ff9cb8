"""What a step of stage 2 does besides its arithmetic: how little of it there is, and that it changes no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.data.rows import Rows
from lolcats.stages.arguments import training_arguments
from lolcats.stages.finetune.lora import LeanLinear, LeanLora
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


def trainer_of(model: Any, directory: Path, stage: FinetuneConfig = STAGE) -> FinetuneTrainer:
    rows = Rows(IDS)
    made = FinetuneTrainer(model, stage, rows, rows, "finetune", directory, directory / "metrics.jsonl")
    made.current_gradient_accumulation_steps = 2
    return made


@pytest.fixture
def trainer(tmp_path: Path) -> FinetuneTrainer:
    return trainer_of(student(), tmp_path)


def gradients(model: nn.Module, step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = step()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_is_that_of_transformers(trainer: FinetuneTrainer) -> None:
    inputs = {"input_ids": IDS[:2], "labels": IDS[:2]}
    ours = gradients(trainer.model, lambda: trainer.training_step(trainer.model, inputs))
    with trainer.passing():
        theirs = gradients(trainer.model, lambda: Trainer.training_step(trainer, trainer.model, inputs))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0


def test_a_step_does_not_visit_every_module(trainer: FinetuneTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, model = {"input_ids": IDS[:2], "labels": IDS[:2]}, trainer.model
    with quick_zero_grad(model, trainer.forget_gradients):
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


def lean_and_peft(model: Any, directory: Path, stage: FinetuneConfig = STAGE) -> list[Any]:
    """Loss and gradients of a step with our LoRA, and with PEFT's own."""
    trainer, found = trainer_of(model, directory, stage), []
    for lora in (trainer.lora, LeanLora(nn.Module(), torch.float32)):
        trainer.__dict__["lora"] = lora
        found.append(gradients(model, lambda: trainer.training_step(model, {"input_ids": IDS, "labels": IDS})))
    return found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_lora_is_pefts_up_to_rounding(name: str, recompute: bool, tmp_path: Path) -> None:
    stage = FinetuneConfig(rank=4, alpha=12, batch_size=4, micro_batch_size=4)
    model = student(stage, name)
    if recompute:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lean, peft = lean_and_peft(model, tmp_path, stage)
    assert len(LeanLora(model, torch.float32).layers) == 8
    assert len(lean[1]) == 16
    torch.testing.assert_close(lean, peft, rtol=1e-5, atol=1e-6)


def test_lora_in_bf16_is_as_exact_as_pefts(tmp_path: Path) -> None:
    model = student(dtype=torch.bfloat16)
    found = lean_and_peft(model, tmp_path)
    _, exact = lean_and_peft(model.float(), tmp_path)[1]
    lean, peft = (
        sum((gradient - exact[name]).square().sum() / exact[name].square().sum() for name, gradient in grads.items())
        for _, grads in found
    )
    assert all(gradient.dtype == torch.float32 for gradient in found[0][1].values())
    assert 0 < lean < 1.1 * peft


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_lora_takes_only_products(tmp_path: Path) -> None:
    """None of the casts, products with the scale and sums that PEFT makes in each of the eight layers, in bf16."""
    stage = FinetuneConfig(rank=4, batch_size=4, micro_batch_size=4)
    trainer, counts = trainer_of(student(stage, dtype=torch.bfloat16), tmp_path, stage), []
    for lora in (trainer.lora, LeanLora(nn.Module(), torch.float32)):
        trainer.__dict__["lora"] = lora
        trainer.training_step(trainer.model, {"input_ids": IDS, "labels": IDS})
        trainer.model.zero_grad()
        with Counted() as counted:
            trainer.training_step(trainer.model, {"input_ids": IDS, "labels": IDS})
        counts.append(counted.names)
    lean, peft = counts
    assert peft["_to_copy"] - lean["_to_copy"] == 8 * 4
    assert peft["mul"] - lean["mul"] == 8 * 2
    assert peft["add"] - lean["add"] == lean["addmm_"] == 8 + 5  # in backward only where the input has a gradient
    assert sum(peft.values()) - sum(lean.values()) > 8 * 7


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"use_dora": True}])
def test_other_kinds_of_lora_are_left_to_peft(setting: dict[str, Any]) -> None:
    assert not LeanLora(student(FinetuneConfig(rank=4, **setting)), torch.float32).layers


def test_lora_looks_at_what_is_active() -> None:
    model = student()
    model.eval()
    plain = lambda: model(IDS, use_cache=False).logits  # noqa: E731
    lora = LeanLora(model, torch.float32)
    with torch.no_grad():
        peft = plain()
        with lora.cast():
            torch.testing.assert_close(plain(), peft, rtol=1e-5, atol=1e-5)
            with model.disable_adapter():
                base = plain()
        with model.disable_adapter():
            torch.testing.assert_close(base, plain(), rtol=0, atol=0)
        assert (base - peft).abs().max() > 0.1
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        assert (plain() - peft).abs().max() > 1e-3, "outside of the block the matrices are read again"
    assert all(isinstance(layer, LeanLinear) and layer.matrices is None for layer in lora.layers)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert not LeanLora(model, torch.float32).layers


def test_a_layer_that_is_not_called_has_no_gradient() -> None:
    lora = LeanLora(student(), torch.float32)
    with lora.cast():
        first, *_ = lora.layers
        first(torch.ones(1, 2, first.in_features)).sum().backward()
    assert [matrix.grad is not None for matrix in lora.matrices].count(True) == 2
