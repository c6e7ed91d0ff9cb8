"""Named families through the whole pipeline: convert, both stages, save, reload, generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import (
    HYBRID,
    IDS,
    PADDING,
    TOLERANCE,
    check_cache,
    check_teacher,
    check_window,
    converted,
    decode_error,
    forward,
    generated_alike,
    padding_error,
)
from support.families import FAMILIES, REFUSED, Family
from support.tiny import tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig, Config, load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.inference.engine import check_model
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, save_adapter_config, save_feature_maps, save_lora
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.probe import probe
from lolcats.stages.finetune.stage import finetune
from lolcats.stages.transfer.stage import layer_errors, transfer
from lolcats.weights.base import find_base, load_model

NOT_UNROTATED = {  # learned positions, none in some or all layers, turned in another way, or norms after RoPE
    "AFMoE", "Cohere 2", "EXAONE 4", "GPT-2", "Granite 4 hybrid", "Hunyuan", "Jamba", "Llama 4", "OPT",
    "SmolLM3",
}  # fmt: skip
ROWS = torch.randint(6, 300, (20, 32), generator=torch.Generator().manual_seed(0))
DATA = Data(ROWS[8:], ROWS[:4], ROWS[4:8], "", {})
QUICK = [
    "transfer.max_steps=4", "transfer.eval_steps=4", "transfer.save_steps=4", "transfer.learning_rate=3e-3",
    "finetune.max_steps=2", "finetune.eval_steps=2", "finetune.save_steps=2",
]  # fmt: skip


def built(family: Family) -> Any:
    if family.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family.model_type}")
    return tiny(family.model_type, **family.changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_in_front_of_rope(name: str) -> None:
    config, model = replace(HYBRID, feature_inputs="unrotated"), built(FAMILIES[name])
    if name in NOT_UNROTATED:
        with pytest.raises(LolcatsError, match="does not apply RoPE the way"):
            converted(model, config)
        return
    student = converted(model, config)
    assert decode_error(student, 17, 18) < TOLERANCE
    assert padding_error(student) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_function(family: Family) -> None:
    """The teacher is exact, the window is that of the family, prefill and decode agree, and padding has no effect."""
    model = built(family)
    check_teacher(model)
    check_window(model)
    student = converted(model)
    check_cache(student)
    assert decode_error(student, 21) < max(1e-4, 2 * decode_error(model, 21))
    assert padding_error(student) < 1e-4


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f.quick else pytest.mark.slow, id=name) for name, f in FAMILIES.items()]
)
def test_pipeline(family: Family, settings: list[str], tmp_path: Path) -> None:
    """convert -> stage 1 -> stage 2 -> adapter and merged model -> both loaded -> the same logits and answers."""
    built(family).save_pretrained(tmp_path / "base")
    base, out, config = (
        find_base(str(tmp_path / "base")),
        tmp_path / "out",
        load_config("paper-sinks", [*settings, *QUICK]),
    )
    out.mkdir()
    model = lolcats.convert(load_model(base, torch.float32), config)
    before = layer_errors(model, [DATA.validation])
    transfer(model, DATA, config, out)
    assert sum(layer_errors(model, [DATA.validation])) < sum(before)
    save_feature_maps(model, out / FEATURE_MAPS)
    save_adapter_config(model, base, out)
    merged = tuned(model, base, config, out)
    merged.save_pretrained(out / "merged")
    loaded = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (out, out / "merged")]
    with torch.no_grad():
        expected = forward(merged)
        assert all(torch.equal(forward(other), expected) for other in loaded)
        answers = [answer(other) for other in (merged, *loaded)]
    assert all(torch.equal(other, answers[0]) for other in answers[1:])


def tuned(model: Any, base: Any, config: Config, out: Path) -> Any:
    wrapped, _ = finetune(model, DATA, config, out)
    attentions = {layer["name"] for layer in model.config.lolcats["layers"]}
    adapted = {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name, _ in wrapped.named_parameters()
               if ".lora_A" in name}  # fmt: skip
    assert all(any(name.startswith(a + ".") for name in adapted) for a in attentions)
    assert all(any(name.startswith(a + ".") for a in attentions) for name in adapted)
    save_lora(wrapped, base, out / LORA)
    return wrapped.merge_and_unload().eval()


def answer(model: Any) -> torch.Tensor:
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(IDS[:, :20], attention_mask=PADDING[:, :20], **greedy)


SHARING = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
}  # fmt: skip
PARTLY = {
    "Gemma 3n": Family("gemma3n_text", {**SHARING, "activation_sparsity_pattern": [0.0] * 6}),
    "Gemma 4 E": Family("gemma4_text", SHARING),
}


@pytest.mark.parametrize("family", PARTLY.values(), ids=list(PARTLY))
def test_layers_that_cannot_be_linearized_may_stay(family: Family) -> None:
    model = built(family)
    layers = {str(layer.geometry.layer): "softmax" for layer in probe(model) if layer.obstacle}
    student = converted(model, replace(HYBRID, layers=layers))
    assert len(linearized_layers(student)) == 1
    with lolcats.override(student, mode="teacher"), torch.no_grad():
        assert torch.equal(forward(student), forward(model))
        assert torch.equal(answer(student), answer(model))
    assert decode_error(student, 21) < 1e-4
    assert padding_error(student) < 1e-4
    assert generated_alike(student)


@torch.no_grad()
def test_bidirectional_image_tokens_are_refused_in_the_call() -> None:
    """Plain text is causal in Gemma 3; tokens that are marked as an image see each other."""
    model = built(FAMILIES["Gemma 3 with vision"])
    kinds = torch.zeros_like(IDS)
    kinds[:, 5:15] = 1
    student = converted(model)
    with lolcats.override(student, mode="teacher"):
        marked = student(IDS, token_type_ids=kinds, use_cache=False).logits
        assert torch.equal(marked, model(IDS, token_type_ids=kinds, use_cache=False).logits)
        assert not torch.equal(marked, forward(student))
    with pytest.raises(LolcatsError, match="attention that is not causal"):
        student(IDS, token_type_ids=kinds, use_cache=False)
    torch.testing.assert_close(student(IDS, token_type_ids=0 * kinds, use_cache=False).logits, forward(student))


def test_sparse_layers_cannot_even_stay() -> None:
    """The indexer's choice would be lost."""
    with pytest.raises(LolcatsError, match="keys that an indexer picks"):
        converted(built(Family("minimax_m3_vl_text")), AttentionConfig(kind="softmax"))


@pytest.mark.parametrize("family", ["Falcon-H1", "Qwen3-Next"])
def test_engine_refuses_recurrent_layers(family: str) -> None:
    with pytest.raises(LolcatsError, match="recurrence or convolution"):
        check_model(converted(built(FAMILIES[family])))


@pytest.mark.parametrize(("family", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_refused_with_the_reason(family: Family, reason: str) -> None:
    model = built(family)
    with pytest.raises(LolcatsError, match=reason):
        lolcats.convert(model, HYBRID)
    assert not linearized_layers(model)
    assert torch.isfinite(forward(model)).all()  # unchanged
