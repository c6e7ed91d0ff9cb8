"""Conversion through the attention interface: parity, kinds per layer, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from support.tiny import tiny
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling import convert as convert_module
from lolcats.modeling.layer import KeptAttention, LinearizedAttention, linearized_layers, override

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
IDS = torch.randint(6, 300, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_teacher_mode_is_the_original_exactly(family: str) -> None:
    model = tiny_model(family)
    original_class, expected = type(model), model(IDS).logits
    padding = torch.ones_like(IDS)
    padding[0, :9] = 0
    expected_padded = model(IDS, attention_mask=padding).logits
    generated = model.generate(IDS[:, :20], max_new_tokens=8, do_sample=False)
    lolcats.convert(model, SMALL)
    assert isinstance(model, original_class)
    with override(model, mode="teacher"):
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS, attention_mask=padding).logits, expected_padded)
        assert torch.equal(model.generate(IDS[:, :20], max_new_tokens=8, do_sample=False), generated)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_softmax_layers_change_nothing(family: str) -> None:
    model = tiny_model(family)
    expected = model(IDS).logits
    lolcats.convert(model, AttentionConfig(kind="softmax"))
    assert torch.equal(model(IDS).logits, expected)
    assert not linearized_layers(model)


@torch.no_grad()
def test_eager_base_implementation() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    expected = model(IDS).logits
    lolcats.convert(model, SMALL)
    with override(model, mode="teacher"):
        assert torch.equal(model(IDS).logits, expected)


def test_kinds_per_layer() -> None:
    model = tiny_model("gemma3")
    lolcats.convert(model, SMALL)
    attached = [layer.self_attn.lolcats for layer in model.model.layers]
    assert isinstance(attached[0], KeptAttention)  # slides already, in a model that mixes
    assert all(isinstance(a, LinearizedAttention) for a in attached[1:])
    model = tiny_model("gemma3")
    lolcats.convert(model, AttentionConfig(window_size=8, layers={"0": "hybrid", "1": "linear", "2": "softmax"}))
    kinds = [getattr(layer.self_attn.lolcats, "spec", None) for layer in model.model.layers]
    assert [k and k.kind for k in kinds] == ["hybrid", "linear", None]


def test_model_whose_layers_all_slide_is_linearized() -> None:
    model = tiny_model("mistral", sliding_window=16)
    lolcats.convert(model, SMALL)
    assert len(linearized_layers(model)) == 2
    with torch.no_grad():
        full = model(IDS, use_cache=False).logits
        first = model(IDS[:, :30])
        rest = model(IDS[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, full[:, 30:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_window_alone_equals_softmax_inside_the_window() -> None:
    """Short sequences lie inside the window: the hybrid model is the teacher there."""
    model = tiny_model("qwen2")
    expected = model(IDS[:, :16]).logits
    lolcats.convert(model, SMALL)
    torch.testing.assert_close(model(IDS[:, :16]).logits, expected, atol=1e-4, rtol=1e-4)


def test_new_parameters() -> None:
    model = tiny_model("llama")
    before = {name for name, _ in model.named_parameters()}
    lolcats.convert(model, SMALL)
    new = {name for name, _ in model.named_parameters()} - before
    assert new == {
        f"model.layers.{i}.self_attn.lolcats.{name}"
        for i in (0, 1)
        for name in ("gate", "phi_q.weight", "phi_k.weight")
    }


def test_set_attn_implementation_is_refused() -> None:
    model = lolcats.convert(tiny_model("llama"), SMALL)
    with pytest.raises(LolcatsError, match="silently become softmax"):
        model.set_attn_implementation("sdpa")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(LolcatsError, match="silently run softmax"):
        model(IDS)


def test_refusals_say_why() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**sizes))
    with pytest.raises(LolcatsError, match="instead of leaving attention to transformers' attention interface"):
        lolcats.convert(falcon, SMALL)
    bert = AutoModelForCausalLM.from_config(BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(LolcatsError, match="encoder"):
        lolcats.convert(bert, SMALL)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(LolcatsError, match="not a decoder-only"):
        lolcats.convert(t5, SMALL)
    model = lolcats.convert(tiny_model("llama"), SMALL)
    with pytest.raises(LolcatsError, match="already linearized"):
        lolcats.convert(model, SMALL)
    with pytest.raises(LolcatsError, match="no attention layer 9"):
        lolcats.convert(tiny_model("llama"), AttentionConfig(layers={"9": "linear"}))
    with pytest.raises(LolcatsError, match="'1-0' names no layer"):
        lolcats.convert(tiny_model("llama"), AttentionConfig(layers={"1-0": "softmax"}))


@pytest.mark.parametrize(
    "make", [lambda: tiny("gpt2"), lambda: tiny("smollm3", no_rope_layers=[1, 0]), lambda: tiny("gemma2")]
)
@torch.no_grad()
def test_a_model_that_is_refused_stays_as_it_was(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last check, after its modules have been put in place."""
    model = make()
    expected, kind, asked = model(IDS).logits, type(model), list[Any]()
    settings, modules = model.config.to_dict(), [name for name, _ in model.named_modules()]
    handle = model.register_forward_pre_hook(lambda *_: asked.append(None))
    if model.config.model_type == "gemma2":
        monkeypatch.setattr(convert_module, "check_rotation", lambda _: (_ for _ in ()).throw(LolcatsError("does not")))
    unrotated = dataclasses.replace(SMALL, feature_inputs="unrotated")
    with pytest.raises(LolcatsError, match="does not"):
        lolcats.convert(model, unrotated)
    assert type(model) is kind
    assert model.config.to_dict() == settings
    assert [name for name, _ in model.named_modules()] == modules
    asked.clear()
    assert torch.equal(model(IDS).logits, expected)
    assert asked
    handle.remove()
    assert not model._forward_pre_hooks
    lolcats.convert(model, SMALL)
    assert linearized_layers(model)
    assert model(IDS).logits.shape == expected.shape


def test_custom_masks_are_refused() -> None:
    model = lolcats.convert(tiny_model("llama"), SMALL)
    with pytest.raises(LolcatsError, match="2-D attention mask"):
        model(IDS, attention_mask=torch.ones(2, 1, 50, 50))


@torch.no_grad()
def test_half_precision_keeps_feature_maps_in_fp32() -> None:
    model = lolcats.convert(tiny_model("llama").to(torch.bfloat16), SMALL)
    assert {p.dtype for n, p in model.named_parameters() if ".lolcats." in n} == {torch.float32}
    assert torch.isfinite(model(IDS).logits).all()
    assert model.dtype == torch.bfloat16


def test_llama3_rope_scaling_and_llama_config_survive() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256, "rope_theta": 10000.0}  # fmt: skip
    model = lolcats.convert(tiny_model("llama", rope_parameters=rope), SMALL)
    assert isinstance(model.config, LlamaConfig)
    assert model.config.rope_parameters["rope_type"] == "llama3"
