"""config.json says for other engines which layers are linear; the family's own code sees its own layer types."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
SAVED = {
    "llama": ([LINEAR, FULL], None),
    "qwen2": ([LINEAR, FULL], [FULL, FULL]),
    "gemma3": ([SLIDING, LINEAR, FULL], [SLIDING, FULL, FULL]),
}
"""Family to its saved ``layer_types`` and ``base_layer_types``, with the last layer kept."""


def converted(family: str) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    kept = {str(config.num_hidden_layers - 1): "softmax"}
    model = AutoModelForCausalLM.from_config(config)
    return lolcats.convert(model, AttentionConfig(window_size=8, feature_dim=8, layers=kept)).eval()


@pytest.mark.parametrize("family", SAVED)
def test_saved_configuration_names_linear_layers(family: str, tmp_path: Path) -> None:
    model, (types, base) = converted(family), SAVED[family]
    model.save_pretrained(tmp_path / "one")
    saved = json.loads((tmp_path / "one/config.json").read_text())
    assert (saved["layer_types"], saved["base_layer_types"]) == (types, base)
    assert saved["architectures"] == [type(model).__name__]
    read = AutoConfig.from_pretrained(tmp_path / "one")
    assert pickle.loads(pickle.dumps(read)).layer_types == read.layer_types == types
    read.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two/config.json").read_text()) == saved


@pytest.mark.parametrize("family", SAVED)
def test_a_loaded_model_has_the_layer_types_of_its_base(family: str, tmp_path: Path) -> None:
    model = converted(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded.config, "layer_types", None) == SAVED[family][1]
    assert not hasattr(loaded.config, "base_layer_types")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / name).read_text() for name in ("config.json", "again/config.json"))
    assert first == second


def test_an_export_of_an_older_version_has_them_when_read(tmp_path: Path) -> None:
    converted("gemma3").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["layer_types"] = saved.pop("base_layer_types")
    path.write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).layer_types == SAVED["gemma3"][0]


def test_vllms_own_backend_is_refused() -> None:
    """It asks ``is_backend_compatible``; if a user names it as the architecture, it sets the implementation."""
    model = converted("llama")
    with pytest.raises(LolcatsError, match=r"lolcats\[vllm\]"):
        type(model).is_backend_compatible()
    with pytest.raises(LolcatsError, match=r"lolcats\[vllm\]"):
        model.config._attn_implementation = "vllm"
