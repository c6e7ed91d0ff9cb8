"""What is refused before a model is built, each with a sentence."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def settings(models: Path, name: str = "llama", **changes: Any) -> Any:
    """vLLM's configuration, as far as we read it."""
    import torch
    from transformers import AutoConfig

    import lolcats  # noqa: F401

    config = AutoConfig.from_pretrained(models / name)
    for field, value in changes.pop("record", {}).items():
        config.lolcats[field] = value
    values = {
        "pipeline_parallel_size": 1, "tensor_parallel_size": 1, "mamba_cache_dtype": "auto",
        "mamba_ssm_cache_dtype": "auto", "speculative_config": None, "additional_config": {}, **changes,
    }  # fmt: skip
    part = SimpleNamespace(**values)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, dtype=torch.float32), parallel_config=part, cache_config=part,
        speculative_config=part.speculative_config, additional_config=part.additional_config,
    )  # fmt: skip


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
REFUSED = {
    "adapter": ({"record": {"form": "adapter"}}, "lolcats export DIR --merge"),
    "pipeline": ({"pipeline_parallel_size": 2}, "--tensor-parallel-size"),
    "kept heads on ranks": ({"name": "heads", "tensor_parallel_size": 2}, "lolcats select --unit layer"),
    "speculative": ({"speculative_config": object()}, "--speculative-config"),
    "mamba dtype": ({"mamba_ssm_cache_dtype": "bfloat16"}, "state_dtype"),
    "state dtype": ({"additional_config": {"lolcats": {"state_dtype": "float16"}}}, "float32, bfloat16"),
    "unknown setting": ({"additional_config": {"lolcats": {"dtype": "float32"}}}, "lolcats.state_dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings(name: str, models: Path) -> None:
    from lolcats.errors import LolcatsError
    from lolcats.vllm.record import check_settings

    changes, said = REFUSED[name]
    check_settings(settings(models))
    check_settings(settings(models, "heads"))
    with pytest.raises(LolcatsError) as refused:
        check_settings(settings(models, **changes))
    assert said in str(refused.value)


def test_states_of_different_shapes_have_pages_of_one_length(models: Path) -> None:
    from lolcats.vllm.record import state_layouts

    layouts = state_layouts(settings(models, "kinds"))
    assert len({layout.shapes for layout in layouts.values()}) == 3
    assert len({layout.nbytes for layout in layouts.values()}) == 1


def test_ranks_that_cannot_share_the_heads(models: Path) -> None:
    from lolcats.errors import LolcatsError
    from lolcats.vllm.record import state_layouts

    with pytest.raises(LolcatsError, match="key/value heads"):
        state_layouts(settings(models, tensor_parallel_size=4))


def test_another_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own models load as always. Ours say why they do not load, and import nothing that it may not have."""
    from vllm import ModelRegistry

    from lolcats.errors import LolcatsError
    from lolcats.vllm import plugin

    assert not plugin.wrong_version()
    real = importlib.metadata.version
    own = {name: model for name, model in ModelRegistry.models.items() if not name.startswith("Lolcats")}
    monkeypatch.setattr(ModelRegistry, "models", dict(own))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.1" if "vllm" in name else real(name))
    for name in [name for name in sys.modules if name.startswith("lolcats.vllm") and name != plugin.__name__]:
        monkeypatch.setitem(sys.modules, name, None)
    plugin.register()
    assert own.items() <= ModelRegistry.models.items()
    for name in ("LolcatsLlamaForCausalLM", "LolcatsGPT2LMHeadModel"):
        with pytest.raises(LolcatsError, match=r"vLLM 0\.32, but vllm 0\.33\.1"):
            ModelRegistry.models[name].load_model_cls()


def test_layers_with_states_of_another_kind() -> None:
    from torch import nn
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    from lolcats.errors import LolcatsError
    from lolcats.vllm.record import check_states

    class Mixer(nn.Module, MambaBase):
        mamba_type = get_state_shape = get_state_dtype = None

    check_states(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LolcatsError, match=r"other layers with a state \(Mixer\).* Use lolcats serve"):
        check_states(nn.Sequential(nn.Linear(2, 2), Mixer()))


def attention(layer: int, **changes: Any) -> Any:
    """One of vLLM's attention layers, as far as we read it."""
    from vllm.v1.attention.backend import AttentionType

    values = {
        "layer_name": f"model.layers.{layer}.self_attn.attn", "num_heads": 4, "num_kv_heads": 2, "head_size": 16,
        "head_size_v": 16, "attn_type": AttentionType.DECODER, "has_sink": False, "impl": SimpleNamespace(),
        "kv_sharing_target_layer_name": None, **changes,
    }  # fmt: skip
    return SimpleNamespace(**values)


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"head_size": 32}, "heads of another shape"),
    "encoder": ({"attn_type": "encoder"}, "not a decoder's attention"),
    "sinks": ({"has_sink": True}, "learned sinks"),
    "bias": ({"impl": SimpleNamespace(alibi_slopes=[1.0])}, "position bias"),
    "shared": ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "another layer's keys"),
    "twice": ({"layer_name": "model.layers.1.cross_attn.attn"}, "second attention"),
    "missing": ({"layer_name": "model.layers.9.self_attn.attn"}, "no plain attention in layer 2"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_attention_that_is_not_what_was_linearized(name: str, models: Path) -> None:
    from lolcats.errors import LolcatsError
    from lolcats.vllm.record import check_attention, linearized_layers

    config, (changes, said) = settings(models), OTHERWISE[name]
    layers, whole = linearized_layers(config), {str(layer): attention(layer) for layer in range(3)}
    assert list(check_attention(whole, layers, config)) == ["0", "1", "2"]
    with pytest.raises(LolcatsError) as refused:
        check_attention({**whole, "2": attention(2, **changes)}, layers, config)
    assert said in str(refused.value)


def test_heads_are_kept_only_in_plain_attention(models: Path) -> None:
    """Of a subclass, vLLM's attention for the kept heads would compute something else."""
    from lolcats.errors import LolcatsError
    from lolcats.vllm.record import check_attention, linearized_layers

    config, shape = settings(models, "heads"), {"num_heads": 8, "num_kv_heads": 4, "head_size": 32, "head_size_v": 32}
    whole = {str(layer): attention(layer, **shape) for layer in range(3)}
    with pytest.raises(LolcatsError, match="vLLM's 0 is attention of another kind, some of whose heads are kept"):
        check_attention(whole, linearized_layers(config), config)


SCALED: dict[str, tuple[str, dict[str, Any], tuple[float, float], tuple[float, float]]] = {
    "llama": ("LlamaConfig", {}, (0.25, 0.0), (1.0, 0.0)),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3}, (0.3, 0.0), (0.25, 0.0)),
    "longrope": ("Phi3Config", {"rope_parameters": LONGROPE}, (0.25, 0.0), (0.3, 0.0)),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 4, "head_dim": 16}, (0.5, 50.0), (0.5, 0.0)),
    "qwen2_moe": ("Qwen2MoeConfig", {"layer_types": ["sliding_attention"] * 2}, (0.25, 0.0), (0.3, 0.0)),
    "opt": ("OPTConfig", {"ffn_dim": 96}, (1.0, 0.0), (0.25, 0.0)),
}
"""Configuration, scale and softcap of transformers, and others that vLLM might have. OPT scales queries itself."""


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_scaled_where_transformers_does(name: str) -> None:
    import transformers

    from lolcats.errors import LolcatsError
    from lolcats.vllm.logits import check_logits

    family, changes, same, other = SCALED[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, family)(**sizes, num_key_value_heads=2, vocab_size=320, pad_token_id=0, **changes)
    if hasattr(config, "sliding_window"):
        config.sliding_window = None  # as vLLM does with --disable-sliding-window, or for 0
    placed: Any = {"a": SimpleNamespace(geometry=SimpleNamespace(layer=1))}

    def check(scale: float, softcap: float) -> None:
        check_logits({"a": attention(1, impl=SimpleNamespace(scale=scale, logits_soft_cap=softcap))}, placed, config)

    check(*same)
    with pytest.raises(LolcatsError, match="so feature maps would see other queries"):
        check(*other)


def test_a_model_that_transformers_cannot_build_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import PretrainedConfig

    from lolcats.vllm.logits import check_logits

    class ZebraConfig(PretrainedConfig):
        model_type = "zebra"

    check_logits({}, {}, ZebraConfig())
    assert "Scales of vLLM's ZebraConfig were not compared" in caplog.text


def test_families_that_differ_or_were_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    from lolcats.errors import LolcatsError
    from lolcats.vllm.families import check_family

    for name in ("LlamaForCausalLM", "Glm4ForCausalLM", "GPT2LMHeadModel"):
        check_family(name)
    assert not caplog.records
    check_family("ZebraForCausalLM")
    assert "ZebraForCausalLM have not been compared with transformers" in caplog.text
    with pytest.raises(LolcatsError, match=r"Llama4ForCausalLM reorders the channels .* different order than in"):
        check_family("Llama4ForCausalLM")
