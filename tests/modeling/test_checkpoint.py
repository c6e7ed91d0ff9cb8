"""Saving and loading: exact, strict, and never silently as softmax."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
LOAD = """
import json
from transformers import AutoModelForCausalLM
found = []
for path, options in {calls!r}:
    try:
        found.append(type(AutoModelForCausalLM.from_pretrained(path, **options)).__name__)
    except Exception as error:
        found.append(str(error))
print("\\n" + json.dumps(found))
"""


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


@torch.no_grad()
def test_config_json_may_be_written_in_any_form(tmp_path: Path) -> None:
    """As by ``jq -c``, and with another order of fields. Only the model's own type counts."""
    model, path = saved(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    for separators in ((",", ":"), (", ", " : ")):
        path.write_text(json.dumps(dict(reversed(config.items())), separators=separators))
        assert torch.equal(lolcats.load(tmp_path)(IDS).logits, model(IDS).logits)
    path.write_text(json.dumps({"model_type": "llama", "was": {"model_type": "lolcats"}}))
    with pytest.raises(LolcatsError, match="is not a linearized model"):
        lolcats.load(tmp_path)
    path.write_text(json.dumps(config)[:-9])
    with pytest.raises(LolcatsError, match="damaged"):
        lolcats.load(tmp_path)


def python(code: str) -> Any:
    """The last line that a separate process prints, read as JSON; its standard input is empty."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_transformers_fails_and_trust_remote_code_works(tmp_path: Path) -> None:
    whole, without_code = str(tmp_path / "whole"), tmp_path / "without code"
    saved(tmp_path / "whole")
    saved(without_code)
    (without_code / "modeling_lolcats.py").unlink()
    config = json.loads((without_code / "config.json").read_text())
    del config["auto_map"]
    (without_code / "config.json").write_text(json.dumps(config))
    calls = [(whole, {}), (str(without_code), {}), (whole, {"trust_remote_code": True})]
    plain, unknown, trusted = python(LOAD.format(calls=calls))
    assert "trust_remote_code" in plain
    assert "lolcats" in unknown
    assert trusted == "LolcatsLlamaForCausalLM"
    assert python("import lolcats\n" + LOAD.format(calls=calls[:1])) == ["LolcatsLlamaForCausalLM"]


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
    named = {
        "missing": f"{name} is missing (missing tensors: 1)", "extra": "unexpected tensor surplus",
        "shape": f"{name} has shape (4, 8, 7), but the model needs (4, 8, 8) (mismatched tensors: 1)",
    }.get(damage, "damaged or truncated")  # fmt: skip
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
    """Under 3 s of processor time, so that a busy machine does not count; the best of three."""
    code = "import time; import lolcats; print(time.process_time())"
    assert any(python(code) < 3 for _ in range(3))
