"""Queries, keys and values of a decode step by one product: the same values, and a model that is as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from support.interpreted import DEVICE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig
from lolcats.inference.engine import projections
from lolcats.inference.engine.projections import joint_projections

WINDOW: dict[str, Any] = {"window_size": 8, "sinks": 2, "feature_dim": 8}


def converted(family: str = "llama", **attention: Any) -> Any:
    return lolcats.convert(tiny_model(family), AttentionConfig(**{**WINDOW, **attention}))


def logits(model: Any, grad: bool = False) -> Tensor:
    """Of the last of three tokens that are decoded after a prompt, in two rows."""
    ids = torch.randint(6, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        out = model(input_ids=ids[:, :17], use_cache=True)
        for i in range(17, 20):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
    last: Tensor = out.logits
    return last


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of outputs of the products that take the place of the model's own."""
    seen: list[int] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(weight))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(projections, "linear", linear)
    return seen


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", {}), ("qwen2", {"softmax_heads": {"0": [1]}}), ("gemma3", {}), ("mistral", {"kind": "softmax"})],
)
def test_a_step_has_one_product_a_layer(family: str, attention: dict[str, Any], products: list[int]) -> None:
    """A prompt and a call with gradients have the family's own three. Afterwards weights are where they were."""
    model = converted(family, **attention)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    layers, config = model.config.num_hidden_layers, model.config
    whole = (config.num_attention_heads + 2 * config.num_key_value_heads) * model.model.layers[0].self_attn.head_dim
    with joint_projections(model):
        torch.testing.assert_close(logits(model), expected)
        assert products.count(whole) == 3 * layers
        assert len(products) == 3 * layers + 3 * layers
        products.clear()
        logits(model, grad=True)
        assert whole not in products
        torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    products.clear()
    torch.testing.assert_close(logits(model), expected)
    assert not products
    assert all("forward" not in vars(module) for module in model.modules())


def test_weights_that_change_are_used(products: list[int]) -> None:
    """In place, or others in their stead."""
    model = converted()
    first = model.model.layers[0].self_attn
    with joint_projections(model):
        before = logits(model)
        with torch.no_grad():
            first.k_proj.weight.mul_(-1)
        changed = logits(model)
        assert (changed - before).abs().max() > 1e-3
        first.v_proj.weight.data = first.v_proj.weight.data * 2
        products.clear()
        others = logits(model)
        assert len(products) == 3 * (3 + 1) + 6  # the layer with other weights has three
    torch.testing.assert_close(logits(model), others)


def test_a_second_engine_needs_no_more_memory_and_a_copy_has_weights_of_its_own() -> None:
    model = converted()
    weight = model.model.layers[1].self_attn.v_proj.weight
    with joint_projections(model):
        place, expected = weight.data_ptr(), logits(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            weight.zero_()
        torch.testing.assert_close(logits(other), expected, atol=0, rtol=0)
        with joint_projections(model):
            assert weight.data_ptr() == place
    with joint_projections(model):
        assert weight.data_ptr() == place


def test_a_model_can_be_saved_meanwhile(tmp_path: Path) -> None:
    model = converted()
    with joint_projections(model):
        model.save_pretrained(tmp_path)
        expected = logits(model)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_layers_that_are_more_than_a_product_stay(products: list[int]) -> None:
    lora = get_peft_model(converted(), LoraConfig(target_modules=["k_proj"]))
    hooked = converted()
    for layer in hooked.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output + 1)
    for model in (lora, hooked):
        expected = logits(model)
        with joint_projections(model):
            torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)
    assert not products


def test_only_the_same_input_takes_the_same_product() -> None:
    """Another one, the first one again, and a call out of order."""
    model = converted()
    attention = model.model.layers[0].self_attn
    own = {name: copy.deepcopy(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")}
    x, y = torch.randn(2, 2, 1, 32)
    with joint_projections(model), torch.no_grad():
        for name, given in (("q_proj", x), ("k_proj", y), ("v_proj", x), ("v_proj", x), ("k_proj", x), ("k_proj", x),
                            ("q_proj", y), ("q_proj", x), ("v_proj", y), ("k_proj", x)):  # fmt: skip
            torch.testing.assert_close(getattr(attention, name)(given), own[name](given))


def test_columns() -> None:
    pytest.importorskip("triton")
    from lolcats.attention.kernels.columns import columns

    for sizes in ((8, 4, 4), (1500, 24, 1030)):
        x = torch.randn(3, 1, sum(sizes), device=DEVICE)
        for part, expected in zip(columns(x, sizes), x.split(sizes, -1), strict=True):
            assert part.is_contiguous()
            torch.testing.assert_close(part, expected, atol=0, rtol=0)
