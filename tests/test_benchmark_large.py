"""benchmarks/large.py, at sizes too small to measure anything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import script

import lolcats
from lolcats.config import load_config
from lolcats.stages.finetune.stage import add_lora


def test_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts tell what they find as they come, and a part that was measured before stays."""
    large, told = script("large"), dict[str, Any]()
    for part in ("stage 1", "stage 2", large.OTHERS, "streamed selection"):
        if at_the_end := large.WORK[part](large.MODELS["tiny"], torch.device("cpu"), told.__setitem__):
            told[part] = at_the_end
    known = {"parts": {"stage 1, this build, turn 1": told["stage 1"], "build": told["build"]}}
    (tmp_path / "large.json").write_text(json.dumps(known))
    monkeypatch.setattr(sys, "argv", ["large.py", "--tiny", "--out", str(tmp_path), "--only", "^selection"])
    large.main()
    results, page = json.loads((tmp_path / "large.json").read_text()), (tmp_path / "large.md").read_text()
    assert large.report(results) == page == capsys.readouterr().out.removesuffix("\n")
    assert list(results["parts"]) == ["stage 1, this build, turn 1", "build", "selection"]
    for found, slopes in ((results["parts"]["selection"], 3), (told["streamed selection"], 2)):
        assert found["recorded_on"] == "cpu"
        spent = found["spent"]
        assert [round(passes, 3) for _, passes in spent.values()] == [1, 1, slopes, 9], (
            "of 12 candidates, half start late"
        )
        a_pass = sum(seconds for seconds, _ in spent.values()) / (1 + 1 + 3 + 9)
        assert found["seconds"] == pytest.approx(found["passes"] * a_pass), "slopes count as in the plan"
    variants = {name: found for name, found in told.items() if name.startswith("stage 2, ")}
    assert len(variants) == len(large.VARIANTS)
    assert all(found["tokens_per_second"] > 0 for found in variants.values())
    assert "All of it" not in large.report(results)
    results["parts"] |= {**variants, "stage 2, the rest": {"missing": "out of time"}}
    assert large.report(results).count(" tokens/s, 120 GiB |\n") == len(variants)
    assert "All of it with 8M tokens in each stage, on the cross-entropy: " in large.report(results)


def test_the_table_is_written_again_with_the_plan_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = script("large")
    known = json.loads((large.ROOT / "benchmarks/results/large.json").read_text())
    known |= {"model": "tiny", "plan": {}}
    known["parts"] = {"stage 2, kl, 2 rows at a time": known["parts"]["stage 2, kl, 2 rows at a time"]}
    (tmp_path / "large.json").write_text(json.dumps(known))
    monkeypatch.setattr(sys, "argv", ["large.py", "--tiny", "--report", "--out", str(tmp_path)])
    large.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| stage 2")]
    plan = json.loads((tmp_path / "large.json").read_text())["plan"]
    planned = plan["stage 2, kl, 2 rows at a time"]["tokens_per_second"]
    assert f"| 1,188 tokens/s | 73.8 | {planned:,.0f} tokens/s |" in row
    assert "20M tokens; other build: 77adf81. Stage 2" in (tmp_path / "large.md").read_text()


def test_each_loss_is_measured_in_the_first_form_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in one form is told, and the next one is tried."""
    large, told, errors = script("large"), dict[str, Any](), [torch.OutOfMemoryError(), None, ValueError("no kernel")]

    def train(*arguments: Any) -> dict[str, float]:
        if errors and (error := errors.pop(0)):
            raise error
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(large, "train", train)
    assert large.stage_2(large.MODELS["tiny"], torch.device("cpu"), told.__setitem__) == {}
    assert [(name, found.get("missing")) for name, found in told.items()] == [
        ("build", None), ("stage 2, cross_entropy, 4 rows at a time", "out of memory"),
        ("stage 2, cross_entropy, 2 rows at a time", None),
        ("stage 2, kl, 4 rows at a time", "ValueError: no kernel"), ("stage 2, kl, 2 rows at a time", None),
    ]  # fmt: skip


def test_a_search_is_timed_after_its_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a smaller model, of which nothing is told. Hidden states are recorded where ``lolcats select`` has them."""
    large, search = script("large"), sys.modules["large_search"]
    places, rounds, told = list[Any](), list[int](), list[str]()
    select_heads = import_module("lolcats.selection.select")
    real, where = search.round_of_search, select_heads.where_to_record
    monkeypatch.setattr(select_heads, "where_to_record", lambda scorer: places.append(where(scorer)) or places[-1])
    monkeypatch.setattr(search, "round_of_search", lambda *a: rounds.append(a[1].layers) or real(*a))
    model = replace(large.MODELS["tiny"], layers=3)
    for part in ("selection", "streamed selection"):
        assert large.WORK[part](model, torch.device("cpu"), lambda name, _: told.append(name)) == {}
    assert rounds == [2, 3] * 2
    assert places == [torch.device("cpu")] * 4
    assert told == ["selection"] * 3 + ["streamed selection"] * 3


def test_what_a_large_part_told_stays_if_memory_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(model: Any, device: Any, tell: Any) -> None:
        tell("selection", {"passes": 1})
        raise torch.OutOfMemoryError

    large = script("large")
    monkeypatch.setitem(large.WORK, "selection", ends)
    large.work("selection", large.MODELS["tiny"])
    assert capsys.readouterr().out.splitlines() == [
        'FOUND ["selection", {"passes": 1}]', 'FOUND ["selection, the rest", {"missing": "out of memory"}]',
    ]  # fmt: skip


def test_large_parts_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends at its limit and before the deadline; what says most comes first; turns of stage 1 have lines of their
    own."""
    large, limits, now = script("large"), list[Any](), [0.0]
    monkeypatch.setattr(large.time, "monotonic", lambda: now[0])

    def measured(part: str, model: str, source: Path, seconds: float, heard: Any) -> str:
        limits.append((part, seconds))
        now[0] += seconds
        if part == "stage 1":
            heard("stage 1", {"missing": "no time left"})
        return "out of time"

    monkeypatch.setattr(large, "measured", measured)
    arguments = ["--tiny", "--out", str(tmp_path), "--turns", "1", "--deadline"]
    monkeypatch.setattr(sys, "argv", ["large.py", *arguments, "410", "--only", "stage 2|selection"])
    large.main()
    assert limits == [("stage 2", 240), ("selection", 120), ("streamed selection", 45)]
    limits.clear()
    monkeypatch.setattr(sys, "argv", ["large.py", *arguments, "520"])
    large.main()
    assert limits == [("stage 2", 240), ("selection", 120), ("streamed selection", 120), ("stage 1", 35)]
    parts = json.loads((tmp_path / "large.json").read_text())["parts"]
    turn = "stage 1, this build, turn 1"
    assert {name: found["missing"] for name, found in parts.items()} == {
        "stage 2, the rest": "out of time", "selection, the rest": "out of time",
        "streamed selection, the rest": "out of time", f"{large.OTHERS}, the rest": "no time left",
        turn: "no time left", f"{turn}, the rest": "out of time",
    }  # fmt: skip


def test_a_large_part_ends_at_its_limit() -> None:
    large = script("large")
    heard: list[Any] = []
    assert large.measured("stage 1", "tiny", large.ROOT, 0.2, lambda *found: heard.append(found)) == "out of time"
    assert not heard


def test_random_weights_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute and learn as those that transformers loads, and each layer has memory of its own."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # else weights are packed in a form without gradients
    large, device = script("large"), torch.device("cpu")
    tiny = replace(large.MODELS["tiny"], layers=3)
    config = large.shape(tiny)
    model = large.quantized_model(config, device)
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    assert [type(layer) for layer in layers] == [modules.Linear4bit] * 3
    assert all(layer.weight.module is layer for layer in layers)
    assert len({layer.weight.data_ptr() for layer in layers}) == 3
    recipe = load_config("paper-70b", [*tiny.settings, "data.sequence_length=64"])
    lolcats.convert(model, replace(recipe.attention, softmax_heads=large.kept_heads(config)))
    wrapped = add_lora(model, recipe.finetune)
    found = large.train(wrapped, config.vocab_size, tiny, large.VARIANTS[1], device)
    assert len(found["step_seconds"]) == 1
    trained = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
    assert len(trained) == 4 * 3
    assert all(p.abs().sum() > 0 for p in trained)
