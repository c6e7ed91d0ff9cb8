"""The whole job on tiny models of four families, in process: results, artefacts, exact reload, continuing."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, sentence, tiny_model
from transformers import AutoModelForCausalLM, pipeline

import lolcats
from lolcats.config import load_config
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import cache_bytes, readable
from lolcats.evaluation.recall import BEYOND, sight
from lolcats.evaluation.recall import measure as measure_recall
from lolcats.modeling.layer import linearized_layers
from lolcats.pipeline import linearize, resume, run_finetune, run_transfer, start
from lolcats.pipeline.measure import recall_prompts
from lolcats.report.table import model_table, recall_note
from lolcats.run import Run

RESULTS = {
    "ppl_teacher", "ppl_window", "ppl_window_sinks", "ppl_transfer", "ppl_student", "ppl_linear_off", "ppl_window_off",
    "baseline_sinks", "layer_errors_before", "layer_errors_after", "sample_teacher", "sample_student", "cache_bytes",
    "gamma", "layers", "attention", "bytes_teacher", "bytes_window_sinks", "bytes_student",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whole_job(family: str, model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = load_config("paper-sinks", settings)
    with torch.enable_grad():
        run = linearize(str(model_dirs[family]), str(chat_file), out, config, say=lambda _: None)
    assert set(run.results) == RESULTS
    assert all(run.results[k] > 1 for k in RESULTS if k.startswith("ppl_"))
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    expected = {
        "README.md", "config.json", "config.yaml", "feature_maps.safetensors", "metrics.jsonl", "run.json",
        "attention.safetensors", "report.png", "tokenizer.json",
        "lora/adapter_model.safetensors", "merged/model.safetensors",
        "merged/modeling_lolcats.py", "merged/README.md", "merged/tokenizer.json",
    }  # fmt: skip
    assert expected <= names
    assert not [n for n in names if "partial" in n or "checkpoint" in n or n.endswith((".bin", ".pt"))]

    ids = torch.randint(6, 300, (2, 40))
    adapter = AutoModelForCausalLM.from_pretrained(out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert type(adapter) is type(merged)
    assert adapter.config.use_cache is merged.config.use_cache is True
    assert torch.equal(adapter(ids).logits, merged(ids).logits)
    assert set(dict(adapter.named_parameters())) == set(dict(merged.named_parameters()))
    pipe = pipeline("text-generation", model=str(out / "merged"))
    assert len(pipe("the cat", max_new_tokens=20, do_sample=False)[0]["generated_text"]) > 7
    card = (out / "README.md").read_text()
    assert f"{run.results['ppl_student']:.2f}" in card
    assert "window only, nothing trained" in card
    assert "Memory and time per generated token are constant." in card
    assert "tags: [lolcats, linear-attention]" in card

    # The same command again does nothing; a different one is refused.
    before = (out / "run.json").read_bytes(), (out / "merged" / "model.safetensors").stat().st_mtime_ns
    linearize(str(model_dirs[family]), str(chat_file), out, config, say=lambda _: None)
    assert before == ((out / "run.json").read_bytes(), (out / "merged" / "model.safetensors").stat().st_mtime_ns)


def test_recall_and_bytes_stand_beside_perplexity(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    """Only rows that are long enough for the prompts have recall; the same numbers come from the saved model."""
    settings += ["data.sequence_length=512", "data.test_rows=2", "data.validation_rows=2", "transfer.max_steps=2"]
    config, out = load_config("paper-sinks", settings), tmp_path / "out"
    run = linearize(str(model_dirs["llama"]), str(chat_file), out, config, merge=False, say=lambda _: None)
    assert set(run.results) == RESULTS | {"recall_teacher", "recall_window_sinks", "recall_student"}
    job = resume(out, say=lambda _: None)
    prompts = recall_prompts(job)
    assert {len(prompt.ids) for prompt in prompts} == {512}
    saved = lolcats.load(out)
    found = measure_recall(saved, job.inputs.tokenizer, prompts, 2, sight(config.attention))
    assert run.results["recall_student"]["nll"]["value"] == pytest.approx(sum(one.nll for one in found) / 20, rel=1e-4)
    beyond = run.results["recall_teacher"][BEYOND]
    assert beyond["answers"] == sum(not one.in_window for one in found)
    assert beyond["task"] == "needles@512"
    state = run.results["bytes_student"], run.results["bytes_window_sinks"]
    assert state[0] == cache_bytes(saved, 8192)[1] > state[1] > 0
    assert run.results["bytes_teacher"] == cache_bytes(saved, 8192)[0]

    header, rows = model_table(run)
    assert header == ("model", "perplexity", "against teacher", "recall at 512 tokens", "state at 8,192 tokens")
    cells = {row[0]: row[3:] for row in rows}
    assert cells["teacher (softmax attention)"] == (
        f"{100 * beyond['value']:.0f} ± {100 * beyond['stderr']:.0f} %", readable(run.results["bytes_teacher"]),
    )  # fmt: skip
    assert cells["after stage 1 (attention transfer)"] == ("", "")
    assert all(cell in (out / "README.md").read_text() for cell in (*header, recall_note(run)))
    run.record["results"]["recall_student"] = None  # as of a model in pieces
    assert {row[0]: row[3] for row in model_table(run)[1]}["after stage 2 (LoRA)"] == ""
    softmax = load_config("paper-sinks", [*settings, "attention.kind=softmax"])
    assert recall_prompts(replace(job, config=softmax)) == []
    with pytest.MonkeyPatch.context() as patch:  # a model of 512 positions has room for the answers, too
        patch.setattr(sys.modules["lolcats.pipeline.measure"], "positions_of", lambda *_: 512)
        assert 480 < max(len(prompt.ids) + len(prompt.continuation) for prompt in recall_prompts(job)) <= 512


def test_recorded_perplexity_is_that_of_the_saved_model(model_dirs, chat_file, settings, tmp_path, tokenizer) -> None:
    config = load_config("paper-sinks", settings)
    run = linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "out", config, say=lambda _: None)
    rows = lolcats.data.rows.load_data(str(chat_file), tokenizer, config.data, config.seed).test
    saved = lolcats.load(tmp_path / "out" / "merged")
    assert lolcats.perplexity(saved, rows, 2) == pytest.approx(run.results["ppl_student"], rel=1e-5)
    original = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    assert lolcats.perplexity(original, rows, 2) == pytest.approx(run.results["ppl_teacher"], rel=1e-5)


def test_parts_equal_the_whole(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    config, quiet = load_config("paper-sinks", settings), lambda _: None
    linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "whole", config, merge=False, say=quiet)
    run_transfer(start(Inputs(str(model_dirs["llama"])), str(chat_file), tmp_path / "parts", config, quiet))
    between = lolcats.load(tmp_path / "parts")  # stage 1 is loadable without stage 2
    assert len(linearized_layers(between)) == 2
    run_finetune(resume(tmp_path / "parts", quiet))
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_run_from_before_a_setting_existed_continues(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    config, quiet = load_config("paper-sinks", settings), lambda _: None
    start(Inputs(str(model_dirs["llama"])), str(chat_file), tmp_path / "out", config, quiet)
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    del record["config"]["transfer"]["liger"]
    path.write_text(json.dumps(record))
    start(Inputs(str(model_dirs["llama"])), str(chat_file), tmp_path / "out", config, quiet)
    changed = load_config("paper-sinks", [*settings, "transfer.liger=off"])
    with pytest.raises(LolcatsError, match=r"transfer\.liger was True and is now False"):
        start(Inputs(str(model_dirs["llama"])), str(chat_file), tmp_path / "out", changed, quiet)


def test_another_run_in_the_same_directory_is_refused(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    config, quiet = load_config("paper-sinks", settings), lambda _: None
    llama = str(model_dirs["llama"])
    start(Inputs(llama), str(chat_file), tmp_path / "out", config, quiet)
    with pytest.raises(LolcatsError, match="holds another run: its base model is"):
        start(Inputs(str(model_dirs["qwen2"])), str(chat_file), tmp_path / "out", config, quiet)
    changed = load_config("paper-sinks", [*settings, "transfer.learning_rate=0.5"])
    with pytest.raises(LolcatsError, match=r"transfer.learning_rate was 0.01 and is now 0.5"):
        start(Inputs(llama), str(chat_file), tmp_path / "out", changed, quiet)
    other = tmp_path / "other.jsonl"
    other.write_text(chat_file.read_text()[::-1].replace("}", "{") and chat_file.read_text().replace("cat", "dog"))
    with pytest.raises(LolcatsError, match="its data differs"):
        start(Inputs(llama), str(other), tmp_path / "out", config, quiet)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(LolcatsError, match="not empty and does not hold a lolcats run"):
        start(Inputs(llama), str(chat_file), tmp_path / "full", config, quiet)


def test_adapter_refuses_a_changed_base(chat_file: Path, settings, tmp_path: Path, tokenizer) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = load_config("paper-sinks", settings)
    linearize(str(tmp_path / "base"), str(chat_file), tmp_path / "out", config, merge=False, say=lambda _: None)
    tiny_model(seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(LolcatsError, match="adapters only fit their own base model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["linear", "window", "softmax"])
def test_controls_and_stages_skipped(kind: str, model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    """Only linear attention; the control with LoRA but no linear term; the teacher with the same LoRA."""
    config = load_config("paper-sinks", [*settings, f"attention.kind={kind}"])
    run = linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "out", config, say=lambda _: None)
    assert ("skipped" in run.record["stages"]["transfer"]) == (kind != "linear")
    if kind == "softmax":
        assert run.results["ppl_transfer"] == run.results["ppl_teacher"]
    if kind == "window":
        assert run.results["ppl_transfer"] == run.results["ppl_window_sinks"]
    assert ("ppl_linear_off" in run.results) == (kind == "linear"), "no other has a linear term to switch off"


def test_no_transfer_baseline(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    changes = ["transfer.max_steps=0", "finetune.feature_map_learning_rate=0.01"]
    config = load_config("paper-sinks", [*settings, *changes])
    run = linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "out", config, say=lambda _: None)
    assert run.record["stages"]["transfer"] == {"skipped": True}
    saved = lolcats.load(tmp_path / "out")
    merged = lolcats.load(tmp_path / "out" / "merged")
    ids = torch.randint(6, 300, (1, 40))
    assert torch.equal(saved(ids).logits, merged(ids).logits)


def test_record_is_complete(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    config = load_config("paper-sinks", settings)
    linearize(str(model_dirs["qwen2"]), str(chat_file), tmp_path / "out", config, merge=False, say=lambda _: None)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record) == {"base", "data", "config", "date", "versions", "stages", "results"}
    assert {"torch", "transformers", "peft", "lolcats", "python"} <= set(record["versions"])
    assert record["data"]["fingerprint"].startswith("sha256 ")
    assert record["stages"]["transfer"]["steps"] == 6
    assert record["stages"]["finetune"]["steps"] == 4
    assert Run.open(tmp_path / "out").config == config


@pytest.mark.slow
def test_long_sequences_through_the_cache(tokenizer) -> None:
    """2,000 generated tokens equal the full forward, with a state of constant size."""
    model = lolcats.convert(tiny_model("llama"), lolcats.config.AttentionConfig(window_size=16, sinks=4, feature_dim=8))
    ids = torch.tensor([tokenizer.encode(sentence(random.Random(2), 30))])[:, :30]
    out = model.generate(ids, max_new_tokens=1970, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(out.sequences, use_cache=False).logits
    chosen = logits[0, 29:-1].gather(1, out.sequences[0, 30:, None])[:, 0]
    torch.testing.assert_close(chosen, logits[0, 29:-1].max(-1).values, atol=1e-4, rtol=0)
    assert out.past_key_values.layers[0].state.ring.k.shape[2] == 32
