"""Arguments of ``from_pretrained`` mean the same for an adapter as for a merged model, or are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from support.adapters import SMALL, adapter
from transformers import AutoConfig, AutoModelForCausalLM

import lolcats
from lolcats.errors import LolcatsError
from lolcats.modeling import checkpoint
from lolcats.modeling.layer import attached, linearized_layers
from lolcats.weights import base as bases
from lolcats.weights.base import Base, find_base

IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
FORMS = ("adapter", "merged")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an adapter and a merged model in folders of these names."""
    path = tmp_path_factory.mktemp("models")
    adapter(path, tiny_model(), torch.float32, SMALL)
    lolcats.load(path / "adapter").save_pretrained(path / "merged")
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_config", [False, True])
def test_the_base_models_attention(form: str, with_config: bool, place: Path) -> None:
    config: dict[str, Any] = {"config": AutoConfig.from_pretrained(place / form)} if with_config else {}
    for name in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(place / form, attn_implementation=name, **config)
        assert {attached(x.self_attn).base_implementation for x in model.model.layers} == {name}
        torch.testing.assert_close(logits(model), logits(lolcats.load(place / form)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"nonsense": 3}, {"dtpye": "bfloat16"}, {"load_in_8bit": True}, {"max_position_embeddings": 77},
        {"num_hidden_layers": 1}, {"hidden_act": "gelu"}, {"variant": "fp16"}, {"state_dict": {}},
    ],
)  # fmt: skip
def test_what_does_not_apply_to_adapters_is_an_error(given: dict[str, Any], place: Path) -> None:
    with pytest.raises(LolcatsError, match=f"adapter, and from_pretrained does not take {next(iter(given))} for"):
        AutoModelForCausalLM.from_pretrained(place / "adapter", **given)


def test_a_changed_configuration_is_an_error(place: Path) -> None:
    config = AutoConfig.from_pretrained(place / "adapter")
    config.rms_norm_eps, config.use_cache = 0.1, False
    with pytest.raises(LolcatsError, match="does not take rms_norm_eps for"):
        AutoModelForCausalLM.from_pretrained(place / "adapter", config=config)
    with pytest.raises(LolcatsError, match="does not take 5 for"):
        AutoModelForCausalLM.from_pretrained(place / "adapter", 5)


@pytest.mark.parametrize("form", FORMS)
def test_defaults_of_calls_and_what_has_no_effect(form: str, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        place / form, use_cache=False, low_cpu_mem_usage=True, torch_dtype=torch.float16, tp_plan=None, max_memory=None
    )
    assert model.dtype == torch.float16
    assert model(IDS).past_key_values is None
    config = AutoConfig.from_pretrained(place / form)
    assert AutoModelForCausalLM.from_pretrained(place / form, config=config, torch_dtype="float16").dtype == model.dtype
    config.pad_token_id = 5
    for given in ({"config": config}, {"pad_token_id": 5, "eos_token_id": 2}):
        assert AutoModelForCausalLM.from_pretrained(place / form, **given).config.pad_token_id == 5


def test_what_is_switched_off(place: Path) -> None:
    AutoModelForCausalLM.from_pretrained(place / "adapter", load_in_8bit=False, use_kernels=False, resume_download=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_loading_report(form: str, place: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(place / form, output_loading_info=True)
    assert linearized_layers(model)
    assert set(info) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert not any(info.values())


@pytest.mark.parametrize("form", FORMS)
def test_devices(form: str, place: Path, tmp_path: Path) -> None:
    expected = logits(lolcats.load(place / form))
    by_name: dict[str, Any] = {
        **dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu"),
        "model.layers.1": "disk",
    }
    for given in ("auto", "balanced", "balanced_low_0", "sequential", "cpu", torch.device("cpu"), by_name):
        model = AutoModelForCausalLM.from_pretrained(place / form, device_map=given, offload_folder=tmp_path / "off")
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert next(model.model.layers[1].mlp.parameters()).is_meta
    room = {"cpu": sum(p.nbytes for p in model.model.embed_tokens.parameters()) * 3}
    for given in ("auto", "balanced_low_0", "sequential"):
        model = AutoModelForCausalLM.from_pretrained(
            place / form, device_map=given, max_memory=room, offload_folder=tmp_path / "more"
        )
        assert "disk" in model.hf_device_map.values()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_each_adapter_on_disk_has_its_own_weights(place: Path, tmp_path: Path) -> None:
    """Also in a folder that another model was loaded with, and with all parts on disk."""
    other = tmp_path / "other"
    other.mkdir()
    base = tiny_model()
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)
    adapter(other, base, torch.float32, SMALL)
    folder = tmp_path / "off"
    for path in (other / "adapter", place / "adapter"):
        expected = logits(lolcats.load(path))
        for given in ({"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {}}):
            model = AutoModelForCausalLM.from_pretrained(path, offload_folder=folder, **given)
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(lolcats.load(other / "adapter")), atol=1e-2)


def test_a_peft_adapter_that_was_trained_on_an_adapter(place: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(lolcats.load(place / "adapter"), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(lolcats.load(place / "adapter")), atol=1e-2)


def test_an_adapter_on_disk_needs_a_folder(place: Path) -> None:
    with pytest.raises(LolcatsError, match="offload_folder=DIR"):
        AutoModelForCausalLM.from_pretrained(place / "adapter", device_map="auto", max_memory={"cpu": "1KiB"})


def test_a_subfolder(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place, subfolder="adapter")
    assert torch.equal(logits(model), logits(lolcats.load(place / "adapter")))


def test_hub_options_reach_the_adapter_and_its_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision is only the adapter's, and no token is written down."""
    asked: dict[str, Any] = {}
    find = bases.find_base

    def found(model: str, trust: bool = False, hub: Any = None) -> Base:
        asked["base"] = hub
        return find(model, trust, hub)

    monkeypatch.setattr(checkpoint, "snapshot_download", lambda _, **x: asked.update(adapter=x) or place / "adapter")
    monkeypatch.setattr(bases, "find_base", found)
    options = {"token": "hf_secret", "cache_dir": str(place / "cache")}
    model = AutoModelForCausalLM.from_pretrained(
        "somebody/adapter", config=AutoConfig.from_pretrained(place / "adapter"), revision="0" * 40, **options
    )
    assert asked == {"adapter": {"revision": "0" * 40, **options}, "base": {"revision": "0" * 40, **options}}
    assert "hf_secret" not in repr(model.config)

    read: list[dict[str, Any]] = []

    def config_of(_: str, **given: Any) -> Any:
        read.append(given)
        return AutoConfig.for_model("llama")

    monkeypatch.setattr(bases.AutoConfig, "from_pretrained", config_of)
    base = find_base("somebody/base", False, {"revision": "0" * 40, **options})
    assert read == [{"trust_remote_code": False, **options}]
    assert base.arguments == ("somebody/base", options)
    assert "hf_secret" not in f"{base} {base.record}"
