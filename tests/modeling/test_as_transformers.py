"""A converted model is to transformers, PEFT, accelerate and liger-kernel what the model was before."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import lolcats
from lolcats.config import AttentionConfig
from lolcats.modeling import others
from lolcats.modeling.classes import linearized_class

IDS = torch.randint(6, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def lol(family: str = "llama", **settings: Any) -> Any:
    attention = AttentionConfig(**{"window_size": 4, "sinks": 2, "feature_dim": 4, **settings})
    return lolcats.convert(tiny_model(family), attention)


def smoothed(model: Any, directory: Path) -> Tensor:
    arguments = TrainingArguments(output_dir=str(directory), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    return Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS}).detach()


@pytest.mark.parametrize("wrapped", [False, True])
def test_label_smoothing_shifts_the_labels(wrapped: bool, tmp_path: Path) -> None:
    models = [tiny_model(), lol(kind="softmax")]
    if wrapped:
        models = [get_peft_model(m, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])) for m in models]
    plain, ours = (smoothed(model, tmp_path) for model in models)
    torch.testing.assert_close(ours, plain)


def test_listed_by_name_where_the_base_is() -> None:
    before = {k: set(map(str, v.values())) for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")}
    listed = {title for title, names in before.items() if "GlmForCausalLM" in names}
    assert listed
    linearized_class(GlmForCausalLM)
    assert all("LolcatsGlmForCausalLM" in getattr(modeling_auto, title).values() for title in listed)
    small = GlmConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=16, pad_token_id=0)  # fmt: skip
    assert type(AutoModelForCausalLM.from_config(small)) is GlmForCausalLM
    assert list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.items())


def test_pipeline_knows_the_class(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    try:
        pipeline("text-generation", model=lol(), tokenizer=tokenizer)
    finally:
        logging.disable_propagation()
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_default_lora_targets_are_those_of_the_family(family: str) -> None:
    for kind in (LoraConfig, IA3Config):
        plain, ours = (get_peft_model(m, kind(task_type="CAUSAL_LM")) for m in (tiny_model(family), lol(family)))
        targets = [sorted(m.peft_config["default"].target_modules) for m in (plain, ours)]
        assert targets[0] == targets[1]
        assert ours.config.model_type == ours.config.to_dict()["model_type"] == "lolcats"


@pytest.mark.parametrize("first", ["import peft", "import lolcats.modeling.classes"])
def test_peft_is_taught_whichever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import lolcats.modeling.classes, peft
from types import SimpleNamespace
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba as check
def config(**fields):
    return SimpleNamespace(config=SimpleNamespace(to_dict=lambda: fields, **fields))
ours = config(model_type="lolcats", base_model_type="falcon_h1")
assert BaseTuner.get_model_config(ours)["model_type"] == "falcon_h1"
assert BaseTuner.get_model_config(config(model_type="llama"))["model_type"] == "llama"
try:
    check(peft.LoraConfig(), ours, "out_proj")
except ValueError as error:
    assert "falcon_h1" in str(error)
else:
    raise AssertionError("LoRA on a projection that Mamba's kernels read directly")
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)


def test_liger_applies_the_patch_of_the_family() -> None:
    applied: list[Any] = []

    def llama(rope: bool = True, swiglu: bool = True, model: Any = None) -> None:
        applied.append(("llama", rope, swiglu, model))

    def gemma(geglu: bool = True, model: Any = None) -> None:
        applied.append(("gemma", geglu, model))

    module = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": llama, "gemma": gemma})
    others.CHANGES["liger_kernel.transformers.monkey_patch"](module)
    table, model = module.MODEL_TYPE_TO_APPLY_LIGER_FN, lol()
    options = {"rope": False, "geglu": False, "unknown": 1}  # as liger's _apply_liger_kernel_to_instance does it
    known = {k: v for k, v in options.items() if k in inspect.signature(table["lolcats"]).parameters}
    table["lolcats"](model=model, **known)
    assert applied == [("llama", False, True, model)]
    table["lolcats"]()
    assert len(applied) == 1
