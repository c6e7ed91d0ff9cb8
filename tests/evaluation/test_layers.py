"""Errors, entropies and older shares by layer and head, against the full matrix of the teacher's own weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SETTINGS, tiny_model
from support.scripts import script
from torch import Tensor

import lolcats
from lolcats.attention import AttentionSpec
from lolcats.attention.reference import QUERIES
from lolcats.config import AttentionConfig, load_config
from lolcats.evaluation.layers import measure_layers, weights_of_queries
from lolcats.files import append_line
from lolcats.lab.sweep.execute import run_sweep
from lolcats.lab.sweep.plan import Sweep, read_sweep
from lolcats.modeling.layer import linearized_layers, override
from lolcats.pipeline import linearize
from lolcats.stages.transfer.stage import layer_errors

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
IDS = torch.randint(6, 300, (3, 50), generator=torch.Generator().manual_seed(0))


def converted(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(1)
    return lolcats.convert(tiny_model(family), AttentionConfig(**{**vars(SMALL), **changes}))


def teacher_weights(family: str = "llama", ids: Tensor = IDS) -> Tensor:
    """(layers, B, H, T, T) of the original model, by transformers' eager attention."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(ids, output_attentions=True).attentions)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_entropies_and_shares_are_those_of_the_original(family: str) -> None:
    """Gemma's sliding layer is not linearized and not measured."""
    found = measure_layers(converted(family), [(IDS[:2], None), (IDS[2:], None)], "teacher")
    weights = teacher_weights(family)[found["layers"]]
    assert found["layers"] == ([0, 1] if family != "gemma3" else [1, 2])
    assert (found["rows"], found["tokens"], found["of"]) == (3, 50, "teacher")
    entropies = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean((1, 3))
    torch.testing.assert_close(torch.tensor(found["entropies"]), entropies, atol=1e-4, rtol=1e-4)
    n, i = torch.arange(50)[:, None], torch.arange(50)
    older = (i >= 2) & (i < (n // 8 - 1) * 8)
    torch.testing.assert_close(
        torch.tensor(found["older"]), (weights * older).sum(-1).mean((1, 3)), atol=1e-5, rtol=1e-4
    )
    assert torch.tensor(found["older"]).min() > 0


@torch.no_grad()
def test_errors_are_those_that_training_sees() -> None:
    model = converted()
    found = measure_layers(model, [(IDS, None)], "teacher")
    errors = torch.tensor(found["errors"])
    torch.testing.assert_close(errors.mean(1), torch.tensor(layer_errors(model, [IDS])), atol=0, rtol=1e-4)
    targets = []
    with override(model, mode="transfer", observer=lambda layer, call: targets.append(call.target)):
        model(IDS, use_cache=False)
    sizes = torch.stack(targets).square().mean((1, 2, 4))
    torch.testing.assert_close(torch.tensor(found["sizes"]), sizes, atol=0, rtol=1e-4)
    with override(model, window_size=64, sinks=0):  # softmax over all keys
        same = measure_layers(model, [(IDS, None)], "teacher")
    assert torch.tensor(same["errors"]).max() < 1e-10
    assert torch.tensor(same["older"]).max() == 0
    assert same["entropies"] == found["entropies"]


def test_known_weights() -> None:
    """Uniform attention of query n has entropy log(n + 1); all keys outside its window and sinks are older."""
    length = QUERIES + 20
    values = weights_of_queries(
        torch.zeros(1, 2, length, 4), torch.randn(1, 1, length, 4), AttentionSpec("hybrid", "sliding", 5, 3), 1.0
    )
    n = torch.arange(length)
    torch.testing.assert_close(values[0, 1, :, 0], (n + 1.0).log())
    torch.testing.assert_close(values[0, 0, :, 1], (n - 7).clamp_min(0) / (n + 1.0))
    linear = weights_of_queries(torch.zeros(1, 2, 9, 4), torch.randn(1, 1, 9, 4), AttentionSpec("linear"), 1.0)
    torch.testing.assert_close(linear[..., 1], torch.ones(1, 2, 9))


def test_documents_are_sequences_of_their_own() -> None:
    model = converted()
    lengths = (20, 30)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    packed = measure_layers(model, [(IDS, positions)], "teacher")
    parts = [measure_layers(model, [(ids, None)], "teacher") for ids in IDS.split(lengths, 1)]
    for name in ("errors", "sizes", "entropies", "older"):
        alone = sum(n / 50 * torch.tensor(part[name]) for n, part in zip(lengths, parts, strict=True))
        torch.testing.assert_close(torch.tensor(packed[name]), alone, atol=1e-6, rtol=1e-3)


def test_a_run_leaves_them_as_data(model_dirs, chat_file: Path, settings: list[str], tmp_path: Path) -> None:
    """Measured after stage 1 on the teacher's queries, or after stage 2 on the student's if that trains the maps."""
    for name, more in (("frozen", []), ("trained", ["finetune.feature_map_learning_rate=1e-2"])):
        config = load_config("paper-sinks", [*settings, *more])
        linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / name, config, merge=False, say=lambda _: None)
        results = json.loads((tmp_path / name / "run.json").read_text())["results"]
        found = results["layers"]
        assert found["of"] == ("teacher" if name == "frozen" else "student")
        assert (found["rows"], found["tokens"]) == (4, 32)
        assert all(0 < h < math.log(32) for layer in found["entropies"] for h in layer)
        if name == "frozen":  # the same rows
            means = torch.tensor(found["errors"]).mean(1)
            torch.testing.assert_close(means, torch.tensor(results["layer_errors_after"]), atol=0, rtol=1e-3)
    model = lolcats.load(tmp_path / "trained")
    assert len(found["errors"]) == len(linearized_layers(model))


def tiny_sweep(path: Path, model: Path, data: Path) -> Sweep:
    rows = {
        "few steps": ["transfer.max_steps=1"],
        "late": ["transfer.max_steps=0", "finetune.feature_map_learning_rate=1e-2"],
        "window": ["attention.kind=window"],
    }
    path.write_text(json.dumps({"base": {"recipe": "paper-sinks", "set": SETTINGS}, "rows": rows, "seeds": [0]}))
    return read_sweep(path, [f"base.model={model}", f"base.data={data}"])


def test_tables_of_a_sweep(model_dirs, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column or line for each row with linear attention, as means over the seeds in the results."""
    layers, out = script("layers"), tmp_path / "out"
    run_sweep(tiny_sweep(tmp_path / "sweep.yaml", model_dirs["llama"], chat_file), out, "", lambda _: None)
    results = out / "results.jsonl"
    few = next(r for line in results.open() if (r := json.loads(line))["name"] == "few steps")
    found = few["layer_errors"]["after"]
    again = {**few["layer_errors"], "after": [3 * error for error in found]}
    append_line(results, json.dumps({**few, "seed": 1, "layer_errors": again}))
    rows = layers.read_sweep(results)
    assert [row.name for row in rows] == ["few steps", "late"]
    assert [row.of for row in rows] == ["teacher", "student"]
    means = 2 * torch.tensor(found, dtype=torch.float64)
    torch.testing.assert_close(rows[0].error, means)
    assert rows[0].quality["held-out"] == pytest.approx(few["systems"]["student"]["held-out"]["value"])
    picture = tmp_path / "layers.png"
    monkeypatch.setattr(
        "sys.argv", ["layers.py", str(results), "--picture", str(picture), "--out", str(tmp_path / "layers.md")]
    )
    layers.main()
    tables = (tmp_path / "layers.md").read_text()
    assert "| layer | few steps | late |" in tables
    assert f"| 1 | {means[1]:.3g} | " in tables
    assert "| row | errors of the | untrained | error | relative error | held-out |" in tables
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rank_correlation() -> None:
    layers = script("layers")
    x = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert layers.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert layers.rank_correlation(x, -x) == pytest.approx(-1)
    assert layers.rank_correlation(x, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.8)
    assert math.isnan(layers.rank_correlation(x[:2], x[:2]))
