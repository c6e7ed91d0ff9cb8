"""A PEFT adapter that is trained on top of a linearized model leads back to that model, not to its softmax base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from modeling.test_base import write_gguf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, save_adapter_config, save_feature_maps, save_lora
from lolcats.modeling.parts import find_parts
from lolcats.stages.finetune.stage import add_lora
from lolcats.weights.base import find_base, load_model

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=4)
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def base_of(kind: str, model_dirs, tokenizer, tmp_path: Path) -> str:
    if kind == "directory":
        return str(model_dirs["llama"])
    pytest.importorskip("gguf", reason="gguf is not installed")
    return str(write_gguf(tmp_path / "base.gguf", tiny_model("llama"), tokenizer))


def written(form: str, base_path: str, out: Path) -> Path:
    """A linearized model with LoRA, as an adapter or merged."""
    base = find_base(base_path)
    model = lolcats.convert(load_model(base, torch.float32), SMALL)
    out.mkdir()
    save_feature_maps(model, out / FEATURE_MAPS)
    wrapped = add_lora(model, FinetuneConfig(rank=2, targets=["q_proj"]))
    randomized(wrapped)
    save_lora(wrapped, base, out / LORA)
    save_adapter_config(model, base, out, parts=find_parts(out))
    if form == "adapter":
        return out
    lolcats.load(out).save_pretrained(out / "merged")
    return out / "merged"


def randomized(wrapped: Any) -> None:
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("base", ["directory", "gguf"])
@pytest.mark.parametrize("form", ["adapter", "merged"])
@torch.no_grad()
def test_peft_saves_and_loads_the_linearized_model(
    form: str, base: str, model_dirs, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(form, base_of(base, model_dirs, tokenizer, tmp_path), tmp_path / "model")
    given = "model" if form == "adapter" else "model/merged"
    model = AutoModelForCausalLM.from_pretrained(given)
    assert model.name_or_path == model.config.name_or_path == model.model.name_or_path == given
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")).eval()
    randomized(wrapped)
    wrapped.save_pretrained("on top")
    again = AutoPeftModelForCausalLM.from_pretrained("on top")
    assert type(again.get_base_model()).__name__ == "LolcatsLlamaForCausalLM"
    assert again.peft_config["default"].base_model_name_or_path == given
    torch.testing.assert_close(again(IDS).logits, wrapped(IDS).logits, atol=0, rtol=0)
    assert lolcats.load(given).name_or_path == given


def test_a_model_that_was_only_converted_is_not_mistaken_for_its_base(model_dirs, tmp_path: Path) -> None:
    """It is nowhere on disk, so there is nothing that the adapter could name."""
    model = lolcats.convert(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), SMALL)
    get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert not PeftConfig.from_pretrained(tmp_path).base_model_name_or_path
    with pytest.raises(OSError, match="huggingface"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
