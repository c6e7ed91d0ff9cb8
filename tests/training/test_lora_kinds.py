"""Stage 2 with DoRA, rsLoRA and on a base model in 4 bits; what merging changes."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupt_at, tiny_model
from support.adapters import SMALL, stir
from torch import Tensor, nn

import lolcats
from lolcats import pipeline
from lolcats.config import FinetuneConfig, load_config
from lolcats.data import inputs
from lolcats.errors import Interrupted, LolcatsError
from lolcats.evaluation.perplexity import perplexity
from lolcats.files import read_json_lines
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, LORA_WEIGHTS
from lolcats.report.table import remarks
from lolcats.run import Run
from lolcats.stages import micro_batch
from lolcats.stages.finetune.stage import add_lora, lora_targets, trained_layers
from lolcats.tensors import read_tensors
from lolcats.weights import base as bases

IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def with_lora(dtype: torch.dtype, **kind: bool) -> Any:
    """A model with LoRA far from its initial values, which change nothing."""
    wrapped = add_lora(lolcats.convert(tiny_model().to(dtype), SMALL), FinetuneConfig(rank=4, **kind))
    stir(wrapped)
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@torch.no_grad()
def test_merging_changes_no_logit_in_fp32(kind: dict[str, bool]) -> None:
    wrapped = with_lora(torch.float32, **kind)
    expected = logits(wrapped)
    with wrapped.disable_adapter():
        assert (logits(wrapped) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@torch.no_grad()
def test_merging_changes_nothing_beyond_rounding_in_bf16(kind: dict[str, bool]) -> None:
    """Each merged weight is within one bf16 step of the exact one, and the logits are no further from those computed
    in fp32 than before merging, give or take that rounding."""
    wrapped = with_lora(torch.bfloat16, **kind)
    exact = copy.deepcopy(wrapped).float()
    reference, before = logits(exact), logits(wrapped)
    merged, exact = wrapped.merge_and_unload(), exact.merge_and_unload()
    weights = dict(exact.named_parameters())
    for name, parameter in merged.named_parameters():
        if parameter.dtype == torch.bfloat16:
            torch.testing.assert_close(
                parameter.float(), weights[name], rtol=2**-7, atol=2**-9 * weights[name].abs().max()
            )
    assert (logits(merged) - reference).norm() < 2 * (before - reference).norm()


@pytest.mark.parametrize("kind", [KINDS["rslora"], KINDS["dora"]], ids=["rslora", "dora"])
def test_through_the_recipe(kind: dict[str, bool], model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    """Trained, saved, and the same as adapter, merged model, and in memory."""
    config = load_config("paper-sinks", [*settings, *(f"finetune.{name}=true" for name in kind)])
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path, config, say=lambda _: None)
    saved = (tmp_path / "lora" / "adapter_config.json").read_text()
    assert all(f'"{name}": true' in saved for name in kind)
    with torch.no_grad():
        assert torch.equal(logits(lolcats.load(tmp_path)), logits(lolcats.load(tmp_path / "merged")))


def test_targets_by_their_role() -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    assert lora_targets(model, ["q_proj", "gate_proj"]) == [
        f"model.layers.{i}.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj") for i in (0, 1)
    ]
    with pytest.raises(LolcatsError, match=r"it has no 'qkv'. Linear layers of its attention: k_proj, o_proj"):
        lora_targets(model, ["q_proj", "qkv"])
    with pytest.raises(LolcatsError, match=r"finetune\.targets is empty: .* skip stage 2 with finetune\.max_steps=0"):
        trained_layers(model, FinetuneConfig(targets=[]))


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("targets", ["q k", "q k v", "v o", "o", "q k v o"])
def test_rank_and_projections(rank: int, targets: str) -> None:
    """The paper's Tables 11 and 12: what trains, its shapes, and that all of it learns."""
    names = [f"{name}_proj" for name in targets.split()]
    chosen = ", ".join(names)
    config = load_config("paper-sinks", [f"finetune.rank={rank}", "finetune.alpha=16", f"finetune.targets=[{chosen}]"])
    wrapped = add_lora(lolcats.convert(tiny_model("qwen2"), SMALL), config.finetune)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    place = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.default.weight"
    assert set(trained) == {place.format(i, name, part) for i in (0, 1) for name in names for part in "AB"}
    width = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    assert all(trained[place.format(0, name, "A")].shape == (rank, 32) for name in names)
    assert all(trained[place.format(1, name, "B")].shape == (width[name], rank) for name in names)
    wrapped(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(trained[place.format(i, name, "B")].grad.any() for i in (0, 1) for name in names)


def test_rank_and_projections_through_the_recipe(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    changes = ["finetune.rank=16", "finetune.alpha=32", "finetune.targets=[q_proj, o_proj]"]
    config = load_config("paper-sinks", [*settings, *changes])
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path, config, say=lambda _: None)
    lora = read_tensors(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(lora) == 8
    assert {min(x.shape) for x in lora.values()} == {16}
    with torch.no_grad():
        assert torch.equal(logits(lolcats.load(tmp_path)), logits(lolcats.load(tmp_path / "merged")))


def test_quantized_base_needs_cuda_and_bitsandbytes(
    model_dirs, chat_file: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("paper-sinks", [*settings, "finetune.quantize_base=nf4", "device=cpu"])
    with pytest.raises(LolcatsError, match="need a CUDA GPU"):
        pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path, config, say=lambda _: None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LolcatsError, match=r"pip install 'lolcats\[quantize\]'"):
        bases.check_quantized(bases.find_base(str(model_dirs["llama"])), torch.device("cuda"))
    with pytest.raises(LolcatsError, match="cannot be compared"):
        load_config("paper-sinks", ["finetune.quantize_base=nf4", "controls=[window_lora]"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quantized_base(
    device: str, tokenizer, chat_file: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, bitsandbytes packs weights again and gives them no gradient, so learning is not tested there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from bitsandbytes.nn import Linear4bit

    if device == "cpu":
        monkeypatch.setattr(pipeline.job, "check_quantized", lambda *_, **__: None)
        monkeypatch.setattr(bases, "check_quantized", lambda *_, **__: None)
    untouched = tiny_model("llama", hidden_size=64, intermediate_size=128)  # its blocks of weights hold 64
    untouched.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    real, seen, out = pipeline.stages.finetune, [], tmp_path / "out"

    def watched(model: Any, *arguments: Any) -> Any:
        seen.append({name: type(module) for name, module in model.named_modules()})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wrapped, result = real(model, *arguments)
        after = {
            n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in wrapped.named_parameters()
        }
        plain = [name for name in before if seen[0][name.rpartition(".")[0]] is not Linear4bit]
        assert all(torch.equal(after[name], before[name]) for name in plain)
        assert {p.dtype for n, p in wrapped.named_parameters() if ".lolcats." in n or "lora_" in n} == {torch.float32}
        assert all("lora_" in name for name, p in wrapped.named_parameters() if p.requires_grad)
        return wrapped, result

    monkeypatch.setattr(pipeline.stages, "finetune", watched)
    config = load_config("paper-sinks", [*settings, "finetune.quantize_base=nf4", f"device={device}"])
    run = pipeline.linearize(str(tmp_path / "base"), str(chat_file), out, config, say=lambda _: None)
    assert seen[0]["model.layers.0.self_attn.q_proj"] is Linear4bit
    if device == "cuda":
        assert run.results["ppl_student"] < run.results["ppl_transfer"]
    adapter, merged = lolcats.load(out), lolcats.load(out / "merged")
    assert type(adapter.model.layers[0].self_attn.q_proj) is nn.Linear
    with torch.no_grad():
        assert torch.equal(logits(adapter), logits(merged))
    weight = adapter.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, untouched.model.layers[1].mlp.up_proj.weight.to(weight.dtype))


def test_a_base_model_that_does_not_fit_is_only_in_4_bits(
    tokenizer, chat_file: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 layer by layer, the rest on weights in 4 bits, the merged model from the original ones, file by file."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(pipeline.job, "check_quantized", lambda *_, **__: None)  # training needs a GPU
    monkeypatch.setattr(pipeline.heads, "weights_room", lambda _: 100_000)
    monkeypatch.setattr(inputs, "load_model", lambda *_, **__: pytest.fail("loaded as a whole"))
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, out, said = str(tmp_path / "base"), tmp_path / "out", list[str]()
    config = load_config("paper-sinks", [*settings, "finetune.quantize_base=nf4", "device=cpu"])
    with pytest.raises(LolcatsError, match=r"set transfer\.order=stream and transfer\.coupling=per_layer"):
        pipeline.linearize(base, str(chat_file), out, config, say=said.append)
    streamed = ["transfer.order=stream", "transfer.coupling=per_layer"]
    config = load_config("paper-sinks", [*settings, *streamed, "finetune.quantize_base=nf4", "device=cpu"])
    run = pipeline.linearize(base, str(chat_file), tmp_path / "stream", config, say=said.append)
    assert any("in 4 bits" in line for line in said)
    assert run.results["ppl_teacher"] > 0
    assert "in 4 bits" in remarks(run)[0]
    job = pipeline.resume(tmp_path / "stream", said.append)
    model = job.models.student()
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), Linear4bit)
    found = perplexity(model, job.data.test, job.batch)
    assert found == pytest.approx(run.results["ppl_student"], rel=1e-3), "as when it was trained"
    merged = lolcats.load(tmp_path / "stream" / "merged")
    with torch.no_grad():
        assert torch.equal(logits(merged), logits(lolcats.load(tmp_path / "stream")))
    config = load_config(
        "paper-sinks", [*settings, "attention.kind=window", "finetune.quantize_base=nf4", "device=cpu"]
    )
    run = pipeline.linearize(base, str(chat_file), tmp_path / "window", config, say=said.append)
    assert "skipped" in run.record["stages"]["transfer"], "windows have no stage 1, which would need the weights"
    assert run.record["stages"]["finetune"]["steps"] > 0


def test_stage_2_in_4_bits_with_all_that_stage_2_has(
    tokenizer, chat_file: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL divergence, kept heads, packed documents and layers computed again, stopped and continued bit for bit."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # else weights are packed in a form without gradients
    monkeypatch.setattr(pipeline.job, "check_quantized", lambda *_, **__: None)  # training needs a GPU
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = ["finetune.quantize_base=nf4", "finetune.loss=kl", "finetune.gradient_checkpointing=true",
               "finetune.protect_kept=true", "finetune.feature_map_learning_rate=1e-4", "device=cpu",
               "data.reset_at_documents=true", "finetune.learning_rate=1e-4", "finetune.eval_steps=1",
               "attention.softmax_heads={\"0\": [1]}"]  # fmt: skip

    def run(name: str, *others: str) -> Any:
        asked = load_config("paper-sinks", [*settings, *changes, *others])
        return pipeline.linearize(str(tmp_path / "base"), str(chat_file), tmp_path / name, asked, merge=False,
                                  say=lambda _: None)  # fmt: skip

    whole = run("whole")
    with monkeypatch.context() as patch:  # as on a GPU where activations of all layers do not fit
        fits, tried = micro_batch._fits, list[int]()
        patch.setattr(micro_batch, "TRIED", ("cpu",))
        patch.setattr(micro_batch, "_fits", lambda trial, rows, at: tried.append(fits(trial, rows, at)) or False)
        chosen = run("auto", "finetune.gradient_checkpointing=auto")
    assert tried == [True], "one micro-batch, on the weights in 4 bits"
    assert chosen.record["stages"]["finetune"]["gradient_checkpointing"] is True
    assert chosen.results["ppl_student"] == whole.results["ppl_student"]
    real = pipeline.stages.finetune

    def stopped(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)
            return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.stages, "finetune", stopped)
        with pytest.raises(Interrupted, match="Stopped in finetune after step 3"):
            run("stopped")
    assert not Run.open(tmp_path / "stopped").stage_done("finetune")
    continued = run("stopped")
    assert continued.results["ppl_student"] == whole.results["ppl_student"]
    parts = [{**read_tensors(tmp_path / name / LORA / LORA_WEIGHTS), **read_tensors(tmp_path / name / FEATURE_MAPS)}
             for name in ("whole", "stopped")]  # fmt: skip
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(parts[1][name], tensor) for name, tensor in parts[0].items())
    trained = {name: tensor for name, tensor in parts[0].items() if "lora_B" in name}
    assert all(tensor.abs().sum() > 0 for tensor in trained.values())
    keys = next(tensor for name, tensor in trained.items() if "layers.0" in name and "k_proj" in name)
    assert keys[16:].abs().sum() == 0 < keys[:16].abs().sum(), "the second of two heads is kept"
    losses = [entry["eval_loss"] for entry in read_json_lines(tmp_path / "whole" / "metrics.jsonl")
              if entry["stage"] == "finetune" and "eval_loss" in entry]  # fmt: skip
    assert 0 < losses[-1] < losses[0]
