"""attention.feature_inputs=unrotated: feature maps see q and k before RoPE, in every mode and for any family."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Glm4Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    SmolLM3Config,
)

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig, TransferConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Engine, Request
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers, override
from lolcats.modeling.skeleton import convert_empty, empty_model
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.transfer.stage import layer_losses

IDS = torch.randint(6, 300, (2, 60), generator=torch.Generator().manual_seed(0))
UNROTATED = AttentionConfig(window_size=8, sinks=2, feature_dim=8, feature_inputs="unrotated")
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "interleaved": lambda: CohereConfig(**SMALL),
    "interleaved, part of the channels": lambda: Glm4Config(**SMALL, head_dim=8, partial_rotary_factor=0.5),
    "part of the channels": lambda: PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "fused projections": lambda: Phi3Config(**SMALL),
    "scaled cos and sin": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                  "original_max_position_embeddings": 512},
    ),
}  # fmt: skip


def converted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    return lolcats.convert(model, replace(UNROTATED, **changes))


def at(start: int) -> Tensor:
    return torch.arange(start, start + IDS.shape[1]).expand_as(IDS)


def other(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[name](), dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "q", "k"), [("llama", "q_proj", "k_proj"), ("gemma3", "q_norm", "k_norm")])
@torch.no_grad()
def test_maps_see_what_comes_before_rope(family: str, q: str, k: str) -> None:
    model, made, seen = converted(tiny_model(family)), [], []
    for module in model.modules():
        if isinstance(getattr(module, "lolcats", None), LinearizedAttention):
            for name in (q, k):
                getattr(module, name).register_forward_hook(lambda *call: made.append(call[2]))

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        channels = layer.geometry.head_dim
        assert call.q.shape[-1] == call.k.shape[-1] == 2 * channels
        seen.extend((call.q[..., channels:], call.k[..., channels:]))

    with override(model, mode="transfer", observer=observe):
        decoder(model)(input_ids=IDS, use_cache=False)
    assert len(seen) == len(made) >= 4
    for there, here in zip(made, seen, strict=True):
        there = there.unflatten(-1, (-1, here.shape[-1])).transpose(1, 2) if there.ndim == 3 else there
        assert_close(here, there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_where_a_sequence_begins_changes_nothing(name: str) -> None:
    make = other if name in OTHERS else tiny_model
    logits = [converted(make(name))(IDS, position_ids=at(n), use_cache=False).logits for n in (0, 700)]
    assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-3)
    if name == "llama":
        usual = converted(make(name), feature_inputs="rotated")
        logits = [usual(IDS, position_ids=at(n), use_cache=False).logits for n in (0, 700)]
        assert (logits[1] - logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("changes", [{}, {"window": "sliding", "key_maps": "per_kv_head"}, {"kind": "linear"},
                                     {"layers": {"1": "softmax"}}])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma3", "interleaved, part of the channels"])
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(name: str, changes: dict[str, Any]) -> None:
    model = converted(other(name) if name in OTHERS else tiny_model(name), **changes)
    full = model(IDS, use_cache=False).logits
    for cuts in ([0, 21, 60], [0, 5, *range(6, 61)]):
        cache, outputs = None, []
        for start, stop in pairwise(cuts):
            out = model(IDS[:, start:stop], past_key_values=cache)
            cache = out.past_key_values
            outputs.append(out.logits)
        assert_close(torch.cat(outputs, 1), full, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_engine(tokenizer: Any) -> None:
    model = converted(tiny_model())
    prompt = IDS[0, :30].tolist()
    expected = model.generate(IDS[:1, :30], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ends: list[Any] = []
    engine = Engine(model, tokenizer, slots=2)
    engine.submit(Request(prompt, SamplingParams(max_tokens=12), ends.append))
    engine.run()
    assert [token for delta in ends for token in delta.tokens] == expected[0, 30:].tolist()


@torch.no_grad()
def test_reload_equals_memory(tmp_path: Path) -> None:
    model = converted(tiny_model())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(layer.spec.unrotated for layer in linearized_layers(again))
    assert torch.equal(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@torch.no_grad()
def test_packed_documents() -> None:
    model, lengths = converted(tiny_model()), (25, 35)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand_as(IDS)
    apart = torch.cat([model(part, use_cache=False).logits for part in IDS.split(lengths, 1)], 1)
    assert_close(model(IDS, position_ids=positions).logits, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [TransferConfig(), TransferConfig(xent_weight=1.0)])
def test_losses_do_not_know_positions(config: TransferConfig) -> None:
    found = []
    for start in (0, 700):
        model = converted(tiny_model())
        losses = layer_losses(model, IDS, config, 1.0, at(start))
        found.append([losses, *(x.grad for layer in linearized_layers(model) for x in layer.parameters())])
    for one, two in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert_close(two, one, atol=1e-4, rtol=1e-3)


def test_lora_with_gradient_checkpointing() -> None:
    """Layers are called again in backward, and must find their rotation again."""
    gradients = []
    for again in (False, True):
        model = converted(tiny_model())
        torch.manual_seed(2)
        peft = add_lora(model, FinetuneConfig(rank=2, learning_rate=1e-3))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        peft.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in peft.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 16
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


FOUR: dict[str, Any] = {**SMALL, "num_hidden_layers": 4}
NO_ROPE: dict[str, Any] = {  # the first layer that is refused
    "0 of GPT2LMHeadModel": lambda: GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "1 of SmolLM3ForCausalLM": lambda: SmolLM3Config(**FOUR, no_rope_layers=[1, 0, 1, 1]),
    "3 of Cohere2ForCausalLM": lambda: Cohere2Config(**FOUR),  # RoPE in the layers that slide
}


@pytest.mark.parametrize("layer", NO_ROPE)
@pytest.mark.parametrize("weights", [True, False])
def test_layers_without_rope_are_refused(layer: str, weights: bool) -> None:
    config = NO_ROPE[layer]()
    model = AutoModelForCausalLM.from_config(config) if weights else empty_model(config, torch.float32)
    with pytest.raises(LolcatsError, match=f"^Layer {layer} does not apply RoPE the way"):
        (lolcats.convert if weights else convert_empty)(model, UNROTATED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made_before", [True, False])
def test_models_are_converted_in_inference_mode_too(made_before: bool, family: str) -> None:
    """Whether layers rotate is found with gradients, which inference mode turns off."""
    changes = AttentionConfig(window_size=8, feature_dim=4, feature_inputs="unrotated")
    ids = torch.arange(3, 20)[None]
    expected = lolcats.convert(tiny_model(family), changes)(input_ids=ids).logits
    with torch.inference_mode(not made_before):
        model = tiny_model(family)  # sets the seed that feature maps are drawn with
    with torch.inference_mode():
        assert_close(lolcats.convert(model, changes)(input_ids=ids).logits, expected)


def test_a_layer_without_rope_may_stay_softmax() -> None:
    config = NO_ROPE["1 of SmolLM3ForCausalLM"]()
    model = converted(AutoModelForCausalLM.from_config(config, dtype=torch.float32), layers={"1": "softmax"})
    assert len(linearized_layers(model)) == 3


def test_setting() -> None:
    assert load_config("paper-sinks").attention.feature_inputs == "rotated"
    assert load_config("paper-sinks", ["attention.feature_inputs=unrotated"]).attention.feature_inputs == "unrotated"
    with pytest.raises(LolcatsError, match="feature_inputs: expected one of rotated, unrotated"):
        load_config("paper-sinks", ["attention.feature_inputs=plain"])


@pytest.mark.parametrize("kind", ["window", "hybrid", "linear"])
def test_keys_before_rope_are_kept_only_for_feature_maps(kind: Any) -> None:
    """A layer without linear attention computes and remembers the same with either setting."""
    found = []
    for inputs in ("rotated", "unrotated"):
        config = replace(UNROTATED, kind=kind, feature_inputs=inputs)
        model = lolcats.convert(tiny_model(), config)
        with torch.no_grad():
            out = model(IDS, use_cache=True)
        found.append((out.logits, [layer.state.nbytes for layer in out.past_key_values.layers]))
    (logits, sizes), (unrotated, larger) = found
    if kind == "window":
        assert torch.equal(unrotated, logits)
        assert larger == sizes
    else:
        assert not torch.equal(unrotated, logits)
    if kind == "hybrid":
        assert all(more > size for more, size in zip(larger, sizes, strict=True))


def test_windows_beside_layers_with_maps_before_rope() -> None:
    """Only layers whose feature maps see queries and keys before RoPE are checked for whether these can be had."""
    model = lolcats.convert(tiny_model(num_hidden_layers=3), replace(UNROTATED, layers={"0": "window", "2": "linear"}))
    assert [layer.spec.unrotated for layer in linearized_layers(model)] == [False, True, True]
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :40], use_cache=True)
        rest = model(IDS[:, 40:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-4, rtol=1e-4)
