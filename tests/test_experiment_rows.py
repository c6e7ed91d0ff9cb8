"""Rows of the experiments through the whole pipeline: prior art in both stages, saving, loading, generation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import sentence
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import load_config
from lolcats.lab.sweep.execute import run_sweep
from lolcats.lab.sweep.plan import read_sweep
from lolcats.modeling.layer import linearized_layers, override
from lolcats.pipeline import linearize
from lolcats.tensors import read_tensors

NO_TRANSFER = ["transfer.max_steps=0", "finetune.feature_map_learning_rate=1e-2"]
HEDGEHOG = ["attention.kind=linear", "transfer.mse_weight=0", "transfer.xent_weight=1"]
T2R = ["attention.kind=linear", "attention.feature_map=t2r"]
SUPRA = [*T2R, "attention.decay=retnet", "attention.normalizer=group_norm"]
ROWS = {
    "hedgehog": HEDGEHOG, "t2r": [*T2R, *NO_TRANSFER], "supra": [*SUPRA, *NO_TRANSFER], "supra, transfer": SUPRA,
    "lolcats": ["attention.sinks=0"], "ours": [],
    "unrotated": ["attention.feature_inputs=unrotated"],
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_whole_job(row: str, model_dirs: dict[str, Path], chat_file: Path, settings: list[str], tmp_path: Path) -> None:
    out, config = tmp_path / "out", load_config("paper-sinks", [*settings, *ROWS[row]])
    with torch.enable_grad():
        run = linearize(str(model_dirs["qwen2"]), str(chat_file), out, config, say=lambda _: None)
    assert all(value > 1 for key, value in run.results.items() if key.startswith("ppl_"))
    before, after = (torch.tensor(run.results[f"layer_errors_{when}"]) for when in ("before", "after"))
    if "transfer.max_steps=0" in ROWS[row]:
        assert torch.equal(before, after)
        assert run.record["stages"]["transfer"] == {"skipped": True}
    else:
        assert (after < before).all()

    ids = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    adapter, merged = AutoModelForCausalLM.from_pretrained(out), lolcats.load(out / "merged")
    assert torch.equal(adapter(ids).logits, merged(ids).logits)
    with override(adapter, mode="teacher"):
        assert not torch.allclose(adapter(ids).logits, merged(ids).logits)
    pieces, cache = [], None
    for part in ids.split([17, 1, 22], 1):
        done = merged(part, past_key_values=cache, use_cache=True)
        pieces, cache = [*pieces, done.logits], done.past_key_values
    torch.testing.assert_close(torch.cat(pieces, 1), merged(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    grown = merged.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert grown.shape == (2, 45)


def test_supra_saves_its_norm_and_trains_it(model_dirs, chat_file: Path, settings: list[str], tmp_path: Path) -> None:
    """In stage 1 it trains with the feature maps, in stage 2 with them or not at all."""
    saved = {}
    for name, more in (("stage 1", ["finetune.max_steps=0"]), ("both", []), ("stage 2", NO_TRANSFER)):
        config = load_config("paper-sinks", [*settings, *SUPRA, *more])
        linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / name, config, merge=False, say=lambda _: None)
        saved[name] = read_tensors(tmp_path / name / "feature_maps.safetensors")
    for name in ("stage 1", "stage 2"):
        weight, bias = (saved[name][f"model.layers.1.self_attn.lolcats.norm.{part}"] for part in ("weight", "bias"))
        assert weight.shape == bias.shape == (4, 8)
        assert (weight != 1).any()
        assert (bias != 0).any()
    assert all(torch.equal(saved["both"][name], tensor) for name, tensor in saved["stage 1"].items())
    loaded = linearized_layers(lolcats.load(tmp_path / "both"))[1]
    assert torch.equal(loaded.norm.weight, saved["both"]["model.layers.1.self_attn.lolcats.norm.weight"])


def test_half_and_half_and_longest_effective_lengths(model_dirs, settings: list[str], tmp_path: Path) -> None:
    """The paper's Tables 14 and 15 as rows of one sweep: each trains on its own selection of rows."""
    rng = random.Random(0)
    for name, mark in (("a", "A"), ("b", "B")):
        texts = [f"{mark} {sentence(rng, rng.randint(5, 60))}" for _ in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "half.yaml").write_text("sources: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]")
    rows = {
        "one": [], "half and half": ["base.data=half"],
        "longest": ["base.data=half", "data.keep_longest_effective=0.25"],
    }  # fmt: skip
    tree = {
        "base": {"recipe": "paper-sinks", "set": settings, "sources": {"half": str(tmp_path / "half.yaml")}},
        "rows": rows,
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(tree))
    places = [f"base.model={model_dirs['llama']}", f"base.data={tmp_path / 'a.jsonl'}"]
    run_sweep(read_sweep(tmp_path / "sweep.yaml", places), tmp_path / "out", "", lambda _: None)
    runs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/run.json")}
    one, half, longest = (next(r for n, r in runs.items() if n.startswith(s)) for s in ("one", "half", "longest"))
    assert half["data"]["train_rows"] == longest["data"]["train_rows"] > 1.5 * one["data"]["train_rows"]
    assert half["data"]["fingerprint"] == longest["data"]["fingerprint"] != one["data"]["fingerprint"]
    found = longest["results"]["effective_length"]
    assert len(found["rows"]) == round(0.25 * half["data"]["train_rows"])
    assert found["mean"]["kept"] > found["mean"]["all"]
    assert "effective_length" not in half["results"]
    maps = [read_tensors(next((tmp_path / "out").glob(f"{s}*/feature_maps.safetensors"))) for s in ("half", "longest")]
    assert any(not torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
