"""Saving memory in stage 2 changes no gradient, and leaves the model unchanged."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.liger import _patch, fused_layers
from lolcats.modeling.loss import find_head, language_model_loss
from lolcats.stages.finetune.stage import add_lora

IDS = torch.randint(6, 300, (2, 45), generator=torch.Generator().manual_seed(0))
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)


def with_lora(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = lolcats.convert(tiny_model().to(dtype), SMALL)
    wrapped = add_lora(model, FinetuneConfig(rank=2))
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, wrapped


def gradients(model: Any, wrapped: Any) -> list[Tensor]:
    loss = language_model_loss(model, find_head(model), IDS)
    return list(torch.autograd.grad(loss, [p for p in wrapped.parameters() if p.requires_grad]))


def test_gradient_checkpointing() -> None:
    model, wrapped = with_lora()
    wrapped.train()
    expected = gradients(model, wrapped)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model, wrapped)
    assert sum(calls) == 4  # two in find_head, forward, and again in backward
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a)


def test_lora_of_a_16_bit_model_keeps_no_fp32_input() -> None:
    """fp32 weights and gradients of LoRA, everything kept for backward in its layers in 16 bits."""
    model, wrapped = with_lora(torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.dtype for t in kept} == {torch.bfloat16}
    y.sum().backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    exact = x.float() @ (layer.base_layer.weight.float() + layer.get_delta_weight("default").float()).T
    torch.testing.assert_close(y.float(), exact, atol=5e-2, rtol=5e-2)


def fake_liger(monkeypatch: pytest.MonkeyPatch, patch: Any) -> None:
    table = ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)


def test_fused_layers_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def patch(rope: bool = True, fused_linear_cross_entropy: bool = True, model: Any = None) -> None:
        assert not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = lambda *_: "fused"
        modeling_llama.LlamaRMSNorm = None
        model.model.norm.__dict__["forward"] = lambda x: x
        model.model.norm.variance_epsilon = 7

    fake_liger(monkeypatch, patch)
    model, _ = with_lora()
    expected = tiny_model()(IDS).logits
    norm, epsilon = model.model.norm, model.model.norm.variance_epsilon
    with ExitStack() as undo:
        _patch(model, undo)
        assert modeling_llama.apply_rotary_pos_emb is not original
        assert modeling_llama.apply_rotary_pos_emb(Mock(Tensor, is_cuda=True)) == "fused"
        assert norm(IDS) is IDS
        other = tiny_model()  # of the same family, on a CPU
        assert torch.equal(other(IDS).logits, expected)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert "forward" not in vars(norm)
    assert norm.variance_epsilon == epsilon
    with fused_layers(model, True):  # not on CUDA
        assert "forward" not in vars(norm)


def test_a_family_that_liger_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(model: Any) -> None:
        raise AttributeError("no norm")

    fake_liger(monkeypatch, patch)
    model, _ = with_lora()
    with ExitStack() as undo, pytest.raises(LolcatsError, match=r"finetune.liger=off"):
        _patch(model, undo)
    monkeypatch.setattr(model.config, "base_model_type", "unheard-of")
    with ExitStack() as undo:
        _patch(model, undo)
