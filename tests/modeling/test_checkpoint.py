"""Saving and loading: exact, strict, and never silently as softmax."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import load_feature_maps, save_feature_maps

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
IDS = torch.randint(6, 300, (2, 50), generator=torch.Generator().manual_seed(0))
LOAD = (
    "from transformers import AutoModelForCausalLM as A; "
    "m = A.from_pretrained({path!r}{extra}); print(type(m).__name__)"
)


def saved(tmp_path: Path, family: str = "llama"):
    model = lolcats.convert(tiny_model(family), SMALL)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reload_equals_memory_exactly(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    generated = again.generate(IDS[:, :20], max_new_tokens=20, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:, :20], max_new_tokens=20, do_sample=False))
    assert not list(tmp_path.glob("*.bin"))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for n, p in half.named_parameters() if ".lolcats." in n} == {torch.float32}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_plain_transformers_fails_and_trust_remote_code_works(tmp_path: Path) -> None:
    saved(tmp_path)
    plain = python(LOAD.format(path=str(tmp_path), extra=""))
    assert plain.returncode != 0
    assert "trust_remote_code" in plain.stderr
    (tmp_path / "modeling_lolcats.py").rename(tmp_path / "elsewhere")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    without_code = python(LOAD.format(path=str(tmp_path), extra=""))
    assert without_code.returncode != 0
    assert "lolcats" in without_code.stderr
    saved(tmp_path)
    trusted = python(LOAD.format(path=str(tmp_path), extra=", trust_remote_code=True"))
    assert trusted.stdout.strip() == "LolcatsLlamaForCausalLM", trusted.stderr
    imported = python("import lolcats; " + LOAD.format(path=str(tmp_path), extra=""))
    assert imported.stdout.strip() == "LolcatsLlamaForCausalLM", imported.stderr


def test_pipeline_from_directory(tmp_path: Path, tokenizer) -> None:
    saved(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert type(pipe.model).__name__ == "LolcatsLlamaForCausalLM"
    assert len(pipe("the cat", max_new_tokens=25, do_sample=False)[0]["generated_text"]) > 7


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "truncated", "empty"])
def test_damaged_merged_model_is_an_error_that_names_the_tensor(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.lolcats.phi_q.weight"
    spoil(path, damage, name)
    with pytest.raises(LolcatsError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    named = {"missing": name, "shape": name, "extra": "surplus"}.get(damage, "damaged or truncated")
    assert named in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "truncated", "empty"])
def test_damaged_feature_maps_are_an_error_that_names_the_tensor(damage: str, tmp_path: Path) -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    path, name = tmp_path / "feature_maps.safetensors", "model.layers.1.self_attn.lolcats.phi_k.weight"
    save_feature_maps(model, path)
    load_feature_maps(model, path)
    spoil(path, damage, name)
    with pytest.raises(LolcatsError) as caught:
        load_feature_maps(model, path)
    named = {"missing": name, "shape": name, "extra": "surplus"}.get(damage, "damaged or truncated")
    assert named in str(caught.value)


def spoil(path: Path, damage: str, name: str) -> None:
    if damage in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
        return
    tensors = load_file(path)
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["surplus"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def test_import_is_fast() -> None:
    """Under 3 s (the best of three, since the machine may be busy)."""
    code = "import time; t = time.time(); import lolcats; print(time.time() - t)"
    assert min(float(python(code).stdout) for _ in range(3)) < 3
