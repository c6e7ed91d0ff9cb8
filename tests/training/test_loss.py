"""Losses that save memory are the plain ones, in value and gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import COMMON, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Cohere2Config, CohereConfig, Gemma2Config, GraniteConfig

import lolcats
import lolcats.modeling.loss as loss_module
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.modeling.loss import find_head, language_model_loss, mean_squared_error, next_token_loss
from lolcats.training.finetune import add_lora

IDS = torch.randint(6, 300, (2, 45), generator=torch.Generator().manual_seed(0))
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
MODELS: dict[str, Any] = {
    "llama": lambda: tiny_model("llama"),
    "llama, tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "gemma3": lambda: tiny_model("gemma3", final_logit_softcapping=3.0),
    "gemma2": lambda: other(Gemma2Config(**COMMON, vocab_size=320, head_dim=8, final_logit_softcapping=2.0)),
    "granite": lambda: other(GraniteConfig(**COMMON, vocab_size=320, logits_scaling=3.0)),
    "cohere": lambda: other(CohereConfig(**COMMON, vocab_size=320, logit_scale=0.0625)),
    "cohere2": lambda: other(Cohere2Config(**COMMON, vocab_size=320, logit_scale=0.25)),
}
EXPECTED = {"gemma3": (1.0, 3.0), "gemma2": (1.0, 2.0), "granite": (1 / 3, None), "cohere": (0.0625, None),
            "cohere2": (0.25, None)}  # fmt: skip


def other(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that a cap bends
    return model.eval()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("trained_head", [False, True])
def test_loss_in_pieces(family: str, trained_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of LoRA, and of the head's weight where it trains, against the family's own logits."""
    monkeypatch.setattr(loss_module, "PIECE", 32)
    model = MODELS[family]()
    wrapped = add_lora(lolcats.convert(model, SMALL), FinetuneConfig(rank=2))
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.get_output_embeddings().weight.requires_grad_(trained_head)
    head = find_head(model)
    assert head is not None
    scale, softcap = EXPECTED.get(family, (1.0, None))
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    expected = next_token_loss(wrapped(input_ids=IDS, use_cache=False).logits, IDS)
    actual = language_model_loss(model, head, IDS)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    pairs = zip(*(torch.autograd.grad(loss, trained) for loss in (expected, actual)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("change", [lambda y: y**3, lambda y: y + 1, lambda y: y.clamp(-5, 5)])
def test_unknown_heads_take_the_familys_own_forward(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    forward = type(model).forward

    def strange(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=change(forward(self, *args, **kwargs).logits))

    monkeypatch.setattr(type(model), "forward", strange)
    assert find_head(model) is None
    loss = language_model_loss(model, None, IDS)
    torch.testing.assert_close(loss, next_token_loss(model(input_ids=IDS, use_cache=False).logits, IDS))


def test_hidden_states_changed_before_the_head_are_noticed() -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    assert find_head(model) is None


def test_finding_the_head_leaves_no_trace() -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    expected = model(IDS).logits
    model.train()
    find_head(model)
    assert model.training
    assert torch.equal(model.eval()(IDS).logits, expected)


def test_lora_on_the_head() -> None:
    model = tiny_model()
    wrapped = add_lora(lolcats.convert(model, SMALL), FinetuneConfig(rank=2, targets=["q_proj", "lm_head"]))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    expected = next_token_loss(wrapped(input_ids=IDS, use_cache=False).logits, IDS)
    actual = language_model_loss(model, find_head(model), IDS)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(loss, trained) for loss in (expected, actual)), strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_mean_squared_error(masked: bool) -> None:
    torch.manual_seed(0)
    y, target = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    mask = torch.rand(2, 5) > 0.4 if masked else None
    y.requires_grad_()
    error = (y - target).square()
    torch.testing.assert_close(mean_squared_error(y, target, mask), (error if mask is None else error[mask]).mean())
    assert torch.autograd.gradcheck(lambda x: mean_squared_error(x, target, mask), y)


def test_mean_squared_error_of_16_bit_tensors_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    y, target = torch.randn(2, 4, 64, 4, 16).bfloat16()
    y.requires_grad_()
    loss = mean_squared_error(y, target)
    loss.backward()
    expected = (y.detach().float() - target.float()).square().mean()
    assert loss.dtype == torch.float32
    assert y.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-3)
