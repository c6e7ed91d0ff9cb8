"""Models whose linear layers are loaded in 4 bits: base model, adapter with its LoRA beside it, merged model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from support.adapters import adapter, peak
from support.local_data import write_files
from support.tiny import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lolcats.cli import app
from lolcats.errors import LolcatsError
from lolcats.evaluation.systems import available, check_baselines, systems
from lolcats.inference.engine import Engine, Request
from lolcats.inference.sampling import SamplingParams
from lolcats.modeling.checkpoint import load
from lolcats.modeling.classes import convert_as
from lolcats.modeling.layer import override
from lolcats.modeling.merge import merge_adapter
from lolcats.modeling.record import read_record
from lolcats.weights.base import check_quantized, find_base, load_model, nf4

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes quantizes 64 weights at a time


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits.float()


def linear4bit(model: Any) -> list[str]:
    from bitsandbytes.nn import Linear4bit

    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """An adapter; its base model and its merged model lie beside it."""
    place = tmp_path_factory.mktemp("quantized")
    made = adapter(place, tiny_model(**BLOCKS))
    merge_adapter(made, place / "merged", tokenizer)
    for each in (made, place / "base"):
        tokenizer.save_pretrained(each)
    return made


def test_an_adapter_keeps_its_lora_beside_weights_in_4_bits(directory: Path) -> None:
    whole, quantized = load(directory), load(directory, quantize="nf4")
    assert type(quantized) is type(whole)
    assert len(linear4bit(quantized)) == 2 * 7
    assert "lm_head" not in linear4bit(quantized)
    assert not [name for name, p in quantized.named_parameters() if p.requires_grad]
    found, expected = logits(quantized), logits(whole)
    assert (found - expected).norm() < 0.3 * expected.norm()
    base = load_model(find_base(str(directory.parent / "base")), torch.bfloat16, quantize="nf4")
    without = logits(convert_as(base, read_record(directory)))
    assert (without - expected).norm() > 2 * (found - expected).norm(), "LoRA counts"
    again = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=nf4(torch.bfloat16), device_map={"": CPU}, dtype=torch.bfloat16
    )
    assert torch.equal(logits(again), found)


def test_the_base_of_an_adapter_is_the_base_in_4_bits(directory: Path) -> None:
    """In teacher mode and without LoRA, bit for bit."""
    base = load_model(find_base(str(directory.parent / "base")), torch.float32, quantize="nf4")
    expected = logits(base)
    student = load(directory, torch.float32, quantize="nf4")
    for layer in student.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)
    with override(student, mode="teacher"):
        assert torch.equal(logits(student), expected)


def test_merged_models_are_quantized_too(directory: Path) -> None:
    merged, whole = directory.parent / "merged", load(directory.parent / "merged")
    quantized = load(merged, quantize="nf4")
    assert len(linear4bit(quantized)) == 2 * 7
    assert (logits(quantized) - logits(whole)).norm() < 0.5 * logits(whole).norm()
    maps = {name: p for name, p in whole.named_parameters() if ".lolcats." in name}
    assert maps
    assert all(torch.equal(quantized.get_parameter(name), p) for name, p in maps.items())


def test_the_whole_model_is_never_in_memory(tmp_path: Path) -> None:
    """transformers reads and quantizes one weight after another."""
    model = tiny_model(hidden_size=128, intermediate_size=512, num_hidden_layers=6, vocab_size=320)
    directory = adapter(tmp_path, model)
    total = sum(p.nbytes for p in model.parameters()) // 2
    del model
    mapped = {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert peak(lambda: load(directory, quantize="nf4"), mapped) < 0.7 * total


def test_teacher_and_student_are_compared_in_4_bits(directory: Path) -> None:
    found = {
        name: linear4bit(model)
        for name, model in systems(str(directory), ["window"], CPU, torch.float32, quantize="nf4")
    }
    assert list(found) == ["teacher", "window", "student"]
    assert all(len(layers) == 2 * 7 for layers in found.values())
    ((_, alone),) = systems(str(directory.parent / "base"), [], CPU, torch.float32, quantize="nf4")
    assert len(linear4bit(alone)) == 2 * 7


def test_controls_are_not_merged_into_4_bits(directory: Path) -> None:
    with pytest.raises(LolcatsError, match="LoRA of controls is merged"):
        check_baselines(str(directory), ["window+lora"], "nf4")
    assert "window" in available(str(directory), "nf4")


@pytest.mark.parametrize("used", [False, True])
def test_the_engine_answers_as_the_model(used: bool, directory: Path, tokenizer: Any) -> None:
    """Also after a call, in which bitsandbytes lays weights out anew for a CPU: the engine leaves them as they are."""
    model = load(directory, torch.float32, quantize="nf4")
    if used:
        with torch.no_grad():
            logits(model)
    weights = {name: model.get_submodule(name).weight for name in linear4bit(model)} if used else {}
    before = {name: (weight.data.clone(), weight.stride()) for name, weight in weights.items()}
    prompt = tokenizer("the cat sat on a mat and saw that dogs like warm milk").input_ids
    engine, found = Engine(model, tokenizer, slots=2), list[int]()
    engine.submit(Request(prompt, SamplingParams(max_tokens=8), on_delta=lambda delta: found.extend(delta.tokens)))
    engine.run()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert found == expected.tolist()
    for name, (weight, strides) in before.items():
        after = model.get_submodule(name).weight
        assert torch.equal(after.data, weight)
        assert after.stride() == strides


def test_commands(directory: Path, tmp_path: Path) -> None:
    text, base = tmp_path / "text.txt", str(directory.parent / "base")
    text.write_text("the cat sat on a mat and saw that dogs like warm milk while birds sing\n" * 40)
    run, data = CliRunner(), ["--data", str(text), "--set", "data.sequence_length=128", "--set", "device=cpu"]
    done = {}
    for quantize in ([], ["--quantize", "nf4"]):
        result = run.invoke(app, ["evaluate", str(directory), *data, *quantize])
        assert result.exit_code == 0, result.output
        done[bool(quantize)] = result.output
    assert done[True] != done[False]
    for model in (str(directory), base):
        result = run.invoke(
            app, ["generate", model, "--prompt", "the cat", "--quantize", "nf4", "--max-new-tokens", "3"]
        )
        assert result.exit_code == 0, result.output
    for command in (["generate", base, "--prompt", "x"], ["evaluate", base, *data], ["chat", base], ["serve", base]):
        result = run.invoke(app, [*command, "--quantize", "int3"])
        assert (result.exit_code, "--quantize int3: expected nf4" in result.output) == (2, True)


def test_what_cannot_be_quantized_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "experts")
    experts = find_base(str(tmp_path / "experts"))
    with pytest.raises(LolcatsError, match=r"which hold only .*% of the weights in the layers"):
        check_quantized(experts, CPU)
    tiny_model(**BLOCKS).save_pretrained(tmp_path / "fp8")
    file = tmp_path / "fp8" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(LolcatsError, match=r"is quantized already \(fp8\)"):
        check_quantized(find_base(str(tmp_path / "fp8")), CPU)
    with pytest.raises(LolcatsError, match="need a CUDA GPU, but this runs on mps"):
        check_quantized(experts, torch.device("mps"))
    tiny_model(**BLOCKS).save_pretrained(tmp_path / "plain")
    plain = find_base(str(tmp_path / "plain"))
    check_quantized(plain, CPU)
    with monkeypatch.context() as small:
        small.setattr("lolcats.weights.base.device_room", lambda device: 50_000)
        with pytest.raises(LolcatsError, match=r"takes about 0.0 GiB in 4 bits, .* lolcats plan says what fits"):
            check_quantized(plain, CPU)
    monkeypatch.setattr("lolcats.weights.base.importlib.util.find_spec", lambda name: None)
    with pytest.raises(LolcatsError, match="--quantize needs bitsandbytes"):
        check_quantized(experts, CPU)


def test_quantized_adapters_go_to_one_device_in_nf4(directory: Path) -> None:
    with pytest.raises(LolcatsError, match="loaded to one device"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=nf4(torch.float32), device_map="auto")
    other = nf4(torch.float32)
    other.bnb_4bit_quant_type = "fp4"
    with pytest.raises(LolcatsError, match="in NF4"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=other, device_map={"": "cpu"})


@pytest.mark.slow
def test_benchmarks_run_in_4_bits(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lolcats[eval]'")
    text, output = tmp_path / "text.txt", tmp_path / "scores.json"
    text.write_text("the cat sat on a mat and saw that dogs like warm milk while birds sing\n" * 200)
    options = ["--lengths", "512", "--limit", "2", "--device", "cpu", "--dtype", "float32", "--output", str(output)]
    local = ["--data-dir", str(write_files(tmp_path / "parquet")), "--data", str(text)]
    asked = ["evaluate", str(directory), "--tasks", "piqa,recall-passkey", *local, *options, "--quantize", "nf4"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["quantize"] == "nf4"
    assert all(word in result.output for word in ("teacher", "student", "piqa", "recall-passkey"))
