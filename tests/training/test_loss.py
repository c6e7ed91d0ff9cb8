"""Memory-saving losses equal the plain ones in value and gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import COMMON, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Cohere2Config, CohereConfig, Gemma2Config, GraniteConfig

import lolcats
import lolcats.modeling.loss as loss_module
from lolcats.attention.reference import softmax_weights
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import AttentionCall
from lolcats.modeling.loss import find_head, language_model_loss, mean_squared_error, next_token_loss
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.transfer.loss import weight_cross_entropy

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


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["hybrid", "linear"])
@pytest.mark.parametrize("key_maps", ["per_query_head", "per_kv_head"])
def test_cross_entropy_of_weights_equals_the_naive_one(kind: Any, key_maps: Any, softcap: float | None) -> None:
    """In value and gradients, also if queries and rows do not divide evenly into pieces."""
    config = AttentionConfig(kind=kind, window_size=8, sinks=2, feature_dim=8, key_maps=key_maps)
    layer = lolcats.convert(tiny_model(), config).model.layers[0].self_attn.lolcats
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, heads, 45, 8, generator=generator) for heads in (4, 2, 2))
    call = AttentionCall(q, k, v, q.transpose(1, 2), 0.7, softcap, None)
    a = softmax_weights(q, k, 0.7, softcap)
    naive = -(a * layer.weights(q, k, 0.7, softcap).clamp_min(1e-12).log()).sum(-1).mean()
    trained = [p for p in layer.parameters() if p.requires_grad]
    expected = torch.autograd.grad(naive, trained, allow_unused=True)
    for queries, weights in ((64, 1 << 25), (7, 1), (16, 4 * 16 * 45 * 2)):
        loss = weight_cross_entropy(layer, call, queries, weights)
        torch.testing.assert_close(loss, naive)
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        for gradient, right in zip(found, expected, strict=True):
            assert (gradient is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(gradient, right)
    with pytest.raises(LolcatsError, match="pack the rows"):
        weight_cross_entropy(layer, replace(call, padding=torch.ones(3, 45, dtype=torch.bool)))


def test_cross_entropy_of_weights_has_no_square_tensor() -> None:
    """Neither in forward nor kept for backward: the largest is one piece of queries."""
    layer = lolcats.convert(tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8)).model.layers[0]
    q, k, v = (torch.randn(1, heads, 512, 8) for heads in (4, 2, 2))
    call = AttentionCall(q, k, v, q.transpose(1, 2), 0.7, None, None)
    largest = Largest()
    with largest:
        weight_cross_entropy(layer.self_attn.lolcats, call, queries=32).backward()
    assert 4 * 32 * 512 <= largest.elements <= 2 * 4 * 32 * 512


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out
